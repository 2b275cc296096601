"""The framework works without plugins, and one module opens the files of runs."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import framework
from shipped import shipped

ROOT = Path(framework.__file__).parent.parent
CORE = sorted((ROOT / "framework").rglob("*.py"))
PLUGINS = shipped(ROOT / "plugins", "**/*.py")


def test_import_contracts(tmp_path):
    """`lint-imports` accepts the files that git tracks; the contracts are in pyproject.toml."""
    for name, package in (("framework", "framework"), ("plugins", "framework_plugins")):
        for file in shipped(ROOT / name, "**/*.py"):
            copy = tmp_path / package / file.relative_to(ROOT / name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache", ROOT / "pyproject.toml"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_every_package_is_installed():
    """pyproject.toml lists all packages; an editable install would also work without the list."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = {"framework_conf"}
    for folder, package in (("framework", "framework"), ("plugins", "framework_plugins")):
        for file in shipped(ROOT / folder, "**/__init__.py"):
            found.add(".".join([package, *file.parent.relative_to(ROOT / folder).parts]))
    assert set(project["tool"]["setuptools"]["packages"]) == found


def test_every_file_of_conf_is_installed():
    """`package-data` lists all configs, lessons and notebooks."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["framework_conf"]
    for file in shipped(ROOT / "conf", "**/*.*"):
        path = file.relative_to(ROOT / "conf")
        if path.suffix != ".py" and path.name != "README.md":
            assert any(path.match(pattern) for pattern in patterns), path


OPENING = {"read_text", "write_text", "read_bytes", "write_bytes", "touch"}
OF_PACKAGES = {
    "torch.load",
    "load_file",
    "save_file",
    "safe_open",
    "os.open",
    "os.replace",
    "os.rename",
}
OPENED_ELSEWHERE = {  # modules that open files themselves, and the files
    "framework/system/files.py": "the functions that other modules use",
    "framework/runs/checkpoint/reading.py": "torch and safetensors read files from `open_file`",
    "framework/runs/checkpoint/writing.py": "safetensors and `sync` open the files; renames",
    "framework/runs/checkpoint/retention.py": "folders are renamed",
    "framework/runs/checkpoint/parts.py": "safetensors reads files from `open_file`, or new ones",
    "framework/runs/checkpoint/sharded.py": "files are renamed in the folder that is being written",
    "framework/experiment/trained/export.py": "new files in a private temporary folder",
    "framework/experiment/trained/trained_model.py": "new files in a private temporary folder",
    "plugins/exporters/programs.py": "new files in the private temporary folder of an export",
    "plugins/loggers/journal.py": "Pillow decodes an image in memory",
    "framework/experiment/resumption/find_run.py": "`read_bytes` of framework/system/files.py",
    "framework/experiment/recorded/replay.py": "`read_bytes` of framework/system/files.py",
    "framework/experiment/recorded/saved_step.py": "torch reads a file from `open_file`",
    "framework/experiment/weights.py": "a .safetensors file that the user names",
    "framework/data/content.py": "files of data sets",
    "framework/data/convert.py": "input and output that the user names",
    "framework/composition/trust.py": "the user's list of trusted folders",
    "framework/composition/compose.py": "configs of the user's project",
    "framework/composition/catalogue.py": "the index cache of the user",
    "framework/runtime/memory.py": "/proc/meminfo",
    "framework/experiment/trained/prediction_files.py": "the output that the user names",
    "framework/composition/config_files.py": "`read_bytes` of framework/system/files.py",
    "framework/cli/tour.py": "the lessons, which are a part of the package",
    "framework/cli/json_output.py": "the null device, and stdout itself",
    "framework/composition/origins.py": "configs of the user's project",
    "framework/composition/sources.py": "configs of the user's project",
    "framework/system/streams.py": "the standard streams",
    "framework/runtime/clock.py": "a trace in a private temporary folder",
    "framework/training/trainer.py": "loggers are opened",
    "framework/registry/discovery.py": "plugins of the user",
    "framework/tuning/search/search.py": "loggers are opened",
    "framework/experiment/evaluation/reports.py": "a logger is opened",
}


def opened_in(file):
    """Yield the names of the functions that a file calls to open, read or write files."""
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in ("open", *OF_PACKAGES) or name.rpartition(".")[2] in ("open", *OPENING):
            yield name


@pytest.mark.parametrize("file", CORE + PLUGINS, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_of_a_run_are_opened_by_one_module(file):
    """`framework/system/files.py` follows no links and accepts regular files only."""
    name = str(file.relative_to(ROOT))
    if name.startswith("plugins/datasets/"):
        return
    found = list(opened_in(file))
    if name in OPENED_ELSEWHERE:
        assert found, "remove the entry of OPENED_ELSEWHERE"
    else:
        assert found == [], "use the functions of framework/system/files.py"


def test_the_search_finds_functions_that_open_files(tmp_path):
    file = tmp_path / "part.py"
    file.write_text("open('a'); path.read_text(); (run / 'x').open('w'); os.replace(a, b)")
    assert len(list(opened_in(file))) == 4


def test_conf_has_no_file_for_a_single_part():
    """The settings of a part are its signature."""
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert path.name == "config.yaml" or path.parent.name == "experiment"


def test_the_framework_can_be_imported_without_plugins(tmp_path):
    without_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "framework", tmp_path / "framework", ignore=without_caches)
    check = """
import importlib, pkgutil, sys
sys.modules["framework_plugins"] = None
import framework
assert framework.__file__.startswith(sys.argv[1]), framework.__file__
for module in pkgutil.walk_packages(framework.__path__, "framework."):
    if not module.name.endswith("__main__"):  # it would run
        importlib.import_module(module.name)
"""
    command = [sys.executable, "-c", check, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
