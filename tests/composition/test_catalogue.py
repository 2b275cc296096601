"""The kept index of parts: the same answers as without it, without torch, and never those of yesterday."""

import importlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from framework.composition.catalogue import build, entry_point_files, file_of, kept_index
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
    *(
        "list",
        "list optimizer",
        "list --json",
        "list data --json",
        "show optimizer/sgd",
        "show gelu --json",
    ),
    *(
        "show rnn",
        "show optimizer/sgdd",
        "show activation/sgd",
        "show nothing_like_it",
        "list optimiser",
    ),
    *(
        "complete -- train optimizer.l",
        "complete -- train model.activation=g",
        "complete -- show loss/",
    ),
]
PROGRAM = """
import contextlib, io, sys
from framework.cli.main import main
for line in sys.argv[1:]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), contextlib.suppress(SystemExit):
        main(line.split())
    print(line, out.getvalue(), sep="\\n", end="\\0")
print("torch" in sys.modules)
"""


def answers(folder, home, lines):
    """Type lines in a folder, with a cache of its own; returns what each prints, and whether torch was imported."""
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


def test_the_same_is_printed_with_the_kept_index_and_without_and_then_torch_is_not_imported(
    tmp_path,
):
    fresh, with_torch = answers(tmp_path, tmp_path / "home", LINES)
    assert with_torch
    assert len(list((tmp_path / "home/framework").glob("*.json"))) == 1, "kept for every line alike"
    kept, with_torch = answers(tmp_path, tmp_path / "home", LINES)
    assert not with_torch
    assert kept == fresh
    assert all(len(answer.splitlines()) > 1 for answer in kept)


def test_help_never_waits_for_torch(tmp_path):
    verbs = ("train", "resume", "plan", "eval", "predict", "list", "show", "board", "completion")
    printed, with_torch = answers(
        tmp_path,
        os.devnull,
        ["--help", "--version", "completion bash", *(f"{verb} --help" for verb in verbs)],
    )
    assert all(len(answer.splitlines()) > 1 for answer in printed)
    assert not with_torch


class Project:
    """A folder with plugins, and the index of them, kept in `index.json`."""

    def __init__(self, folder: Path):
        self.folder, self.file, self.plugins, self.built = (
            folder,
            folder / "home/index.json",
            ["parts"],
            0,
        )
        self.trusted = [folder.resolve(), folder.resolve() / "conf"]

    def write(self, name: str, text: str) -> Path:
        """Write a file, and wait until its time is past doubt."""
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        time.sleep(0.11)
        return file

    def describe(self, part: str = "hump") -> tuple[str, float, bool] | None:
        """Return a part's first sentence and default height as the index has them, and whether it was built anew."""
        before, index = self.built, kept_index(self.file, self.build)
        found = index.kinds["activation"]["parts"].get(part)
        return found and (found["summary"], found["settings"][0]["default"], self.built > before)

    def build(self):
        forget(self.folder)
        importlib.invalidate_caches()
        self.built += 1
        return build(
            [str((self.folder / name).resolve()) for name in self.plugins], [], self.trusted
        )


def forget(folder):
    """Unload what was loaded from a folder, as if the program had just begun."""
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


def test_a_plugin_edited_in_place_to_the_same_size_and_time(project):
    project.describe()
    file = project.folder / "parts/hump.py"
    before = file.stat()
    project.write("parts/hump.py", file.read_text().replace("First", "Later"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    time.sleep(0.11)
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert project.describe() == ("Later", 1.0, True)
    assert project.describe() == ("Later", 1.0, False)


def test_what_a_plugin_imports_of_its_own_counts_too(project):
    project.describe()
    project.write("heights.py", "HEIGHT = 2.0\n")
    assert project.describe() == ("First", 2.0, True)


def test_a_plugin_file_that_is_added_or_taken_away(project):
    assert project.describe("other") is None
    other = project.write(
        "parts/other.py", PLUGIN.format(name="other", helper="heights", doc="Added.")
    )
    assert project.describe("other") == ("Added", 1.0, True)
    other.unlink()
    assert project.describe("other") is None


def test_the_plugins_of_a_project_belong_to_it(project):
    project.plugins = []
    assert project.describe() is None
    config = project.write("conf/config.yaml", "defaults: [framework, _self_]\nplugins: [parts]\n")
    project.file = (
        project.folder / "home/another.json"
    )  # as `file_of` says for a folder with a config
    assert project.describe() == ("First", 1.0, True)
    assert project.describe() == ("First", 1.0, False)
    project.write("conf/experiment/wide.yaml", "model: {width: 9}\n")
    assert "wide" in kept_index(project.file, project.build).experiments
    project.write("conf/config.yaml", config.read_text().replace("plugins", "#"))
    assert project.describe() is None


def test_the_plugins_of_a_folder_that_is_not_trusted_are_named_only(project):
    project.plugins, project.trusted = [], []
    project.write("conf/config.yaml", "defaults: [framework, _self_]\nplugins: [parts]\n")
    assert project.describe() is None
    assert kept_index(project.file, project.build).not_trusted == [
        str(project.folder.resolve() / "parts")
    ]


def test_each_project_set_of_plugins_and_interpreter_has_a_file_of_its_own(project, monkeypatch):
    files = [file_of([], []), file_of(["parts"], []), file_of([], [project.folder])]
    project.write("conf/config.yaml", "")
    files.append(file_of([], []))
    files.append(file_of([], [], [project.folder / "conf"]))
    files.append(file_of([], [], [], ["humps"]))
    monkeypatch.setattr(sys, "executable", "/another/python")
    files.append(file_of([], []))
    assert len(set(files)) == 7


def test_a_package_that_is_installed_and_upgraded(project):
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
    assert project.describe() == ("First", 2.0, True), "nothing of another version is believed"
    project.write("humps-1.1.dist-info/entry_points.txt", "")
    assert project.describe() is None


@pytest.mark.parametrize("damage", ["", "{", "[]", "\0\n\0", "changed", "cut", "folder"])
def test_a_damaged_or_foreign_file_is_not_believed(project, damage):
    project.describe()
    text = project.file.read_text()
    project.file.unlink()
    if damage == "folder":
        project.file.mkdir()
    else:
        damaged = {"changed": text.replace("First", "Fjrst"), "cut": text[:-1]}
        project.file.write_text(damaged.get(damage, damage))
    assert project.describe() == ("First", 1.0, True)
    assert project.describe() == ("First", 1.0, damage == "folder"), (
        "it was written anew, where that can be"
    )


@pytest.mark.parametrize("home", ["heights.py", "/proc", "/dev/null"])
def test_a_home_that_cannot_be_written_only_costs_time(project, home):
    project.file = Path(home, "framework", "index.json")
    assert project.describe() == project.describe() == ("First", 1.0, True)


def test_a_home_that_is_missing_or_relative_leaves_no_litter(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "relative/too")
    assert str(file_of([], [])).startswith(os.devnull)


def test_what_was_changed_as_it_was_read_is_not_kept(project):
    (project.folder / "heights.py").write_text("HEIGHT = 3.0\nopen(__file__, 'a').write('#')\n")
    assert project.describe() == ("First", 3.0, True)
    assert not project.file.exists()
    time.sleep(0.11)
    project.write("heights.py", "HEIGHT = 4.0\n")
    assert project.describe() == ("First", 4.0, True)
    assert project.describe() == ("First", 4.0, False)


@pytest.mark.parametrize("name", ["parts", "parts/hump.py", "humps", "humps.deep"])
def test_the_files_of_a_plugin_are_those_that_are_loaded(project, name):
    for file in (
        "humps/__init__.py",
        "humps/one.py",
        "humps/deep/__init__.py",
        "humps/deep/two.py",
    ):
        project.write(file, "")
    found, before = {file.resolve() for file in plugin_files([name])}, set(sys.modules)
    load_plugin(name)
    modules = [sys.modules[each] for each in set(sys.modules) - before]
    files = [
        module.__file__ for module in modules if hasattr(module, "__file__")
    ]  # a folder has none
    loaded = {Path(file).resolve() for file in files}
    stem = name.partition("/")[0].replace(".", "/")  # not what it imports from elsewhere
    assert (
        found
        == {file for file in loaded if file.is_relative_to(project.folder.resolve() / stem)}
        != set()
    )


@pytest.mark.parametrize(
    "name", ["no_such_module", "no.such", "json.no_such", "", "..", "no/such.py"]
)
def test_what_is_not_there_has_no_files(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not list(plugin_files([name]))


def test_what_is_installed_has_its_version_in_its_path():
    assert any(Path(path).parent.name.startswith("hydra_core-") for path in entry_point_files())
