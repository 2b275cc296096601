"""The cached index gives the same answers as the registries, without torch, and is never stale."""

import importlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from framework.cli.main import COMMANDS
from framework.composition.catalogue import build_index, cache_file, cached_index, entry_point_files
from framework.registry.discovery import load_plugin, plugin_files
from framework.registry.registry import Registry

PLUGIN = """\
import torch
from framework import activations
from {helper} import HEIGHT

@activations.register("{name}")
def part(height: float = HEIGHT) -> torch.nn.Module:
    \"\"\"{doc}\"\"\"
"""
LINES = [
    "list",
    "list optimizer",
    "list --json",
    "list data --json",
    "show optimizer/sgd --no-plot",
    "show gelu --json --no-plot",
    "show rnn --no-plot",
    "show optimizer/sgdd --no-plot",
    "show activation/sgd --no-plot",
    "show nothing_like_it --no-plot",
    "list optimiser",
    "complete -- train optimizer.l",
    "complete -- train model.activation=g",
    "complete -- show loss/",
]
PROGRAM = """
import io, sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from framework.cli.main import main
for line in sys.argv[1:]:
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out), suppress(SystemExit):
        main(line.split())
    print(line, out.getvalue(), sep="\\n", end="\\0")
print("torch" in sys.modules)
"""


def answers(folder, home, lines):
    """Run commands in a folder with its own cache.

    Returns the output of each command, and whether torch was imported.
    """
    environment = os.environ | {"XDG_CACHE_HOME": str(home), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *lines],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
    )
    *printed, with_torch = done.stdout.split(b"\0")
    return printed, with_torch == b"True\n"


def test_the_cached_index_gives_the_same_output_without_torch(tmp_path):
    fresh, with_torch = answers(tmp_path, tmp_path / "home", LINES)
    assert with_torch
    assert len(list((tmp_path / "home/framework").glob("*.json"))) == 1, "one cache for all lines"
    cached, with_torch = answers(tmp_path, tmp_path / "home", LINES)
    assert not with_torch
    assert cached == fresh
    assert all(len(answer.splitlines()) > 1 for answer in cached)


def test_help_does_not_import_torch(tmp_path):
    helps = [f"{name} --help" for name in COMMANDS]
    lines = ["--help", "--version", "completion bash", *helps]
    printed, with_torch = answers(tmp_path, os.devnull, lines)
    assert all(len(answer.splitlines()) > 1 for answer in printed)
    assert not with_torch


class Project:
    """A folder with plugins, and their index, cached in `index.json`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.file = folder / "home/index.json"
        self.plugins = ["parts"]
        self.built = 0
        self.trusted = [folder.resolve(), folder.resolve() / "conf"]

    def write(self, name: str, text: str) -> Path:
        """Write a file, and wait until a later change gets another time."""
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        time.sleep(0.11)
        return file

    def describe(self, part: str = "hump") -> tuple[str, float, bool] | None:
        """Return a part's summary and default height, and whether the index was built for this."""
        before = self.built
        index = cached_index(self.file, self.build)
        found = index.kinds["activation"]["parts"].get(part)
        return found and (found["summary"], found["settings"][0]["default"], self.built > before)

    def build(self):
        forget(self.folder)
        importlib.invalidate_caches()
        self.built += 1
        plugins = [str((self.folder / name).resolve()) for name in self.plugins]
        return build_index(plugins, [], self.trusted)


def forget(folder):
    """Unload the modules of a folder, as if the program had just started."""
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__dict__", {}).get("__file__", "")).startswith(str(folder)):
            del sys.modules[name]
    shutil.rmtree(folder / "parts/__pycache__", ignore_errors=True)
    for registry in Registry.every.values():
        registry.forget_unloaded()


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    made = Project(tmp_path)
    made.write("heights.py", "HEIGHT = 1.0\n")
    made.write("parts/hump.py", PLUGIN.format(name="hump", helper="heights", doc="First."))
    yield made
    forget(tmp_path)


def test_the_index_is_built_once(project):
    assert project.describe() == ("First", 1.0, True)
    assert project.describe() == project.describe() == ("First", 1.0, False)


def test_a_plugin_edited_to_the_same_size_and_time_is_noticed(project):
    project.describe()
    file = project.folder / "parts/hump.py"
    before = file.stat()
    project.write("parts/hump.py", file.read_text().replace("First", "Later"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    time.sleep(0.11)
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert project.describe() == ("Later", 1.0, True)
    assert project.describe() == ("Later", 1.0, False)


def test_a_change_in_a_module_that_a_plugin_imports_is_noticed(project):
    project.describe()
    project.write("heights.py", "HEIGHT = 2.0\n")
    assert project.describe() == ("First", 2.0, True)


def test_a_plugin_file_that_is_added_or_removed_is_noticed(project):
    assert project.describe("other") is None
    other = project.write(
        "parts/other.py", PLUGIN.format(name="other", helper="heights", doc="Added.")
    )
    assert project.describe("other") == ("Added", 1.0, True)
    other.unlink()
    assert project.describe("other") is None


def test_the_plugins_of_a_project_are_in_its_index(project):
    project.plugins = []
    assert project.describe() is None
    config = project.write("conf/config.yaml", "defaults: [framework, _self_]\nplugins: [parts]\n")
    project.file = project.folder / "home/another.json"  # as `cache_file` returns with a config
    assert project.describe() == ("First", 1.0, True)
    assert project.describe() == ("First", 1.0, False)
    project.write("conf/experiment/wide.yaml", "model: {width: 9}\n")
    assert "wide" in cached_index(project.file, project.build).experiments
    project.write("conf/config.yaml", config.read_text().replace("plugins", "#"))
    assert project.describe() is None


def test_the_plugins_of_an_untrusted_folder_are_only_named(project):
    project.plugins = []
    project.trusted = []
    project.write("conf/config.yaml", "defaults: [framework, _self_]\nplugins: [parts]\n")
    assert project.describe() is None
    index = cached_index(project.file, project.build)
    assert index.not_trusted == [str(project.folder.resolve() / "parts")]


def test_each_project_set_of_plugins_and_interpreter_has_its_own_file(project, monkeypatch):
    files = [cache_file([], []), cache_file(["parts"], []), cache_file([], [project.folder])]
    project.write("conf/config.yaml", "")
    files.append(cache_file([], []))
    files.append(cache_file([], [], [project.folder / "conf"]))
    files.append(cache_file([], [], [], ["humps"]))
    monkeypatch.setattr(sys, "executable", "/another/python")
    files.append(cache_file([], []))
    assert len(set(files)) == 7


def test_a_package_that_is_installed_or_upgraded_is_noticed(project):
    project.plugins = []
    points = "[framework.plugins]\nhumps = humps\n"
    assert project.describe() is None
    project.write("humps/heights.py", "HEIGHT = 1.0\n")
    project.write("humps/__init__.py", PLUGIN.format(name="hump", helper=".heights", doc="First."))
    project.write("humps-1.0.dist-info/METADATA", "Name: humps\nVersion: 1.0\n")
    project.write("humps-1.0.dist-info/entry_points.txt", points)
    assert project.describe() == ("First", 1.0, True)
    assert project.describe() == ("First", 1.0, False)
    project.write("humps/heights.py", "HEIGHT = 2.0\n")
    assert project.describe() == ("First", 2.0, True)
    (project.folder / "humps-1.0.dist-info").rename(project.folder / "humps-1.1.dist-info")
    time.sleep(0.11)
    assert project.describe() == ("First", 2.0, True), "the index of another version is not used"
    project.write("humps-1.1.dist-info/entry_points.txt", "")
    assert project.describe() is None


@pytest.mark.parametrize("damage", ["", "{", "[]", "\0\n\0", "changed", "cut", "folder"])
def test_a_damaged_or_foreign_file_is_not_used(project, damage):
    project.describe()
    text = project.file.read_text()
    project.file.unlink()
    if damage == "folder":
        project.file.mkdir()
    else:
        damaged = {"changed": text.replace("First", "Fjrst"), "cut": text[:-1]}
        project.file.write_text(damaged.get(damage, damage))
    assert project.describe() == ("First", 1.0, True)
    rebuilt = damage == "folder"  # which the new file cannot replace
    assert project.describe() == ("First", 1.0, rebuilt)


@pytest.mark.parametrize("home", ["heights.py", "/proc", "/dev/null"])
def test_without_a_writable_home_the_index_is_built_each_time(project, home):
    project.file = Path(home, "framework", "index.json")
    assert project.describe() == project.describe() == ("First", 1.0, True)


def test_without_an_absolute_home_no_file_is_written(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "relative/too")
    assert str(cache_file([], [])).startswith(os.devnull)


def test_the_index_of_a_file_that_changed_while_it_was_read_is_not_cached(project):
    (project.folder / "heights.py").write_text("HEIGHT = 3.0\nopen(__file__, 'a').write('#')\n")
    assert project.describe() == ("First", 3.0, True)
    assert not project.file.exists()
    time.sleep(0.11)
    project.write("heights.py", "HEIGHT = 4.0\n")
    assert project.describe() == ("First", 4.0, True)
    assert project.describe() == ("First", 4.0, False)


@pytest.mark.parametrize("name", ["parts", "parts/hump.py", "humps", "humps.deep"])
def test_the_files_of_a_plugin_are_those_that_it_loads(project, name):
    for file in (
        "humps/__init__.py",
        "humps/one.py",
        "humps/deep/__init__.py",
        "humps/deep/two.py",
    ):
        project.write(file, "")
    found = {file.resolve() for file in plugin_files([name])}
    before = set(sys.modules)
    load_plugin(name)
    own_folder = project.folder.resolve() / name.partition("/")[0].replace(".", "/")
    loaded = set()
    for module in set(sys.modules) - before:
        file = Path(getattr(sys.modules[module], "__file__", "/"))  # a folder has no file
        if file.resolve().is_relative_to(own_folder):
            loaded.add(file.resolve())
    assert found == loaded
    assert loaded


@pytest.mark.parametrize(
    "name", ["no_such_module", "no.such", "json.no_such", "", "..", "no/such.py"]
)
def test_a_missing_plugin_has_no_files(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not list(plugin_files([name]))


def test_the_path_of_an_installed_package_contains_its_version():
    assert any(Path(path).parent.name.startswith("hydra_core-") for path in entry_point_files())
