"""Imports go down or sideways, and the core imports no plugin."""

import ast
import os
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import framework
from shipped import shipped

ROOT = Path(framework.__file__).parent.parent
FLOORS = {
    "stdlib": [
        "signals",
        "errors",
        "exits",
        "files",
        "git",
        "locks",
        "paths",
        "streams",
        "terminal",
        "schema",
        "registry",
        "kinds",
        "user_code",
    ],
    "ground work": [
        "discovery",
        "gradients",
        "torch_errors",
        "seeds",
        "state",
        "shapes",
        "alignment",
        "workers",
        "identity",
        "fused",
        "device",
        "memory",
        "clock",
    ],
    "contracts": [
        "data",
        "ragged",
        "loss",
        "metric",
        "task",
        "scheduler",
        "optimizer",
        "pure",
        "logger",
        "callback",
        "transform",
        "record",
    ],
    "engines": [
        "trainer",
        "checks",
        "evaluator",
        "modes",
        "backward",
        "cuda_graph",
        "compiled",
        "whole",
        "trainer_state",
        "snapshot",
        "checkpoint",
        "writer",
        "loop",
        "vectorize",
        "plan",
        "probe",
        "batches",
        "status",
    ],
    "assembly": [
        "experiment",
        "building",
        "content",
        "model_limits",
        "folds",
        "introduction",
        "resume",
        "trained",
        "run",
        "compose",
        "overrides",
        "sources",
        "spec",
        "store",
        "index",
        "trust",
    ],
    "doors": ["cli", "arguments", "help", "describe", "completion", "report", "board", "__main__", "__init__"],
}
LIGHT = {"tuning.settings", "tuning.hydra_parts"}  # what every command line imports of the package `tuning`
FLOOR = {module: number for number, modules in enumerate(FLOORS.values()) for module in modules}
SIBLINGS = {  # plugin files that may import others: what several kinds of data set, or metrics, need
    "auroc": {"metrics"},
    "arrays": {"data_files"},
    "data_arrays": {"arrays", "data_files"},
    "data_audio": {"arrays", "data_files", "data_images"},
    "data_builtin": {"arrays"},
    "data_images": {"arrays", "data_files"},
    "data_series": {"arrays", "data_files", "tables"},
    "data_language": {"arrays", "data_files"},
    "data_tables": {"arrays", "tables"},
    "data_text": {"arrays", "data_files"},
    "representation": {"tasks"},
    "tables": {"arrays", "data_files"},
    "wrappers": {"averaging"},
}

CORE = sorted((ROOT / "framework").glob("*.py"))
TUNING = sorted((ROOT / "framework" / "tuning").glob("*.py"))
PLUGINS = shipped(ROOT / "plugins", "*.py")


def imports(file):
    """Every module that a file imports when it runs: "framework.data", "torch"; also inside functions."""
    packages = {"framework": "framework", "plugins": "framework_plugins", "tuning": "framework.tuning"}
    package = packages[file.parent.name]
    nodes = list(ast.walk(ast.parse(file.read_text())))
    typing_only = {id(inner) for node in nodes if is_type_checking(node) for inner in ast.walk(node)}
    for node in nodes:
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package if node.level < 2 else package.rpartition(".")[0]
            origin = ".".join(filter(None, [above if node.level else "", node.module]))
            yield from (submodule(origin, alias.name) for alias in node.names)


def is_type_checking(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def submodule(origin, name):
    """`from framework import data` imports framework.data; `from framework import Data` imports framework."""
    folder = ROOT / origin.replace("framework_plugins", "plugins").replace(".", "/")
    return f"{origin}.{name}" if (folder / f"{name}.py").is_file() else origin


def core_imports(file):
    names = (name for name in imports(file) if name.split(".")[0] == "framework")
    return {name.partition(".")[2] or "__init__" for name in names}


@pytest.mark.parametrize("file", CORE, ids=lambda file: file.stem)
def test_an_import_never_goes_up(file):
    assert file.stem in FLOOR, f"on which floor is framework/{file.name}? List it in FLOORS"
    up = {name for name in core_imports(file) if FLOOR.get(name, 0) > FLOOR[file.stem]}
    assert not up, f"framework/{file.name} imports {up} from a floor above"


def test_no_import_cycles():
    TopologicalSorter({file.stem: core_imports(file) - {file.stem} for file in CORE}).prepare()


@pytest.mark.parametrize("file", CORE, ids=lambda file: file.stem)
def test_a_single_run_does_without_tuning(file):
    """It is a package on top; what stands in the core of it are the settings of a sweep, and its parts for Hydra."""
    used = {name for name in core_imports(file) if name.startswith("tuning") and name not in LIGHT}
    doors = {"compose": {"tuning.sweep"}, "cli": {"tuning.finders", "tuning.preflight"}}  # train -m, find and check
    assert used <= doors.get(file.stem, set())


@pytest.mark.parametrize("file", TUNING, ids=lambda file: file.stem)
def test_tuning_rests_on_the_assembly(file):
    above = {name for name in core_imports(file) if FLOOR.get(name, 0) > FLOOR["experiment"]} - {"describe", "__init__"}
    assert not above, f"framework/tuning/{file.name} imports {above}"
    if f"tuning.{file.stem}" in LIGHT:
        assert {name for name in core_imports(file) if FLOOR.get(name, 0) > FLOOR["errors"]} == set()


@pytest.mark.parametrize("file", CORE + TUNING, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_the_core_imports_no_plugin(file):
    assert not [name for name in imports(file) if name.split(".")[0] in ("framework_plugins", "plugins", "conf")]


@pytest.mark.parametrize("file", PLUGINS, ids=lambda file: file.stem)
def test_a_plugin_imports_the_framework_and_no_other_plugin(file):
    siblings = {name.partition(".")[2] for name in imports(file) if name.split(".")[0] == "framework_plugins"}
    assert siblings <= SIBLINGS.get(file.stem, set()), "build other parts by name, through their registry"
    above = {name for name in core_imports(file) - {"__init__"} if FLOOR.get(name, 0) > FLOOR["trainer"]}
    runs = {"representation": {"trained"}}  # a teacher is a run, read back
    assert above <= runs.get(file.stem, set()), "a plugin rests on contracts and engines only"
    text = ast.walk(ast.parse(file.read_text()))
    named = [
        a.name
        for node in text
        if isinstance(node, ast.ImportFrom) and "framework" in (node.module or "")
        for a in node.names
    ]
    assert not [name for name in named if name.startswith("_")], "public names only"


OPENING = {"read_text", "write_text", "read_bytes", "write_bytes", "touch"}
OF_PACKAGES = {"torch.load", "load_file", "save_file", "safe_open", "os.open", "os.replace", "os.rename"}
OPENED_ELSEWHERE = {  # modules that open files themselves, and which these are
    "framework/files.py": "the functions that the others use",
    "framework/checkpoint.py": "torch and safetensors open what `open_file` has opened; folders are renamed",
    "framework/resume.py": "a .safetensors file that the user names",
    "framework/content.py": "files of data sets",
    "framework/trust.py": "the user's list of trusted folders",
    "framework/compose.py": "configs of the user's project",
    "framework/index.py": "the index cache of the user",
    "framework/memory.py": "/proc/meminfo",
    "framework/report.py": "the output that the user names",
    "framework/sources.py": "configs of the user's project",
    "framework/streams.py": "the standard streams",
    "framework/clock.py": "a trace in a private temporary folder, which is copied",
    "framework/trainer.py": "loggers are opened",
    "framework/discovery.py": "plugins of the user",
    "framework/tuning/search.py": "loggers are opened",
    "plugins/arrays.py": "data sets",
    "plugins/tables.py": "data sets",
}


def opened_in(file):
    """The names of functions that a file calls to open, read or write files."""
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in ("open", *OF_PACKAGES) or name.rpartition(".")[2] in ("open", *OPENING):
            yield name


@pytest.mark.parametrize("file", CORE + TUNING + PLUGINS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_files_of_a_run_are_opened_by_one_module(file):
    """`framework/files.py` follows no links and accepts regular files only."""
    name = str(file.relative_to(ROOT))
    if file.stem.startswith("data_"):  # data sets
        return
    found = list(opened_in(file))
    if name in OPENED_ELSEWHERE:
        assert found, "remove the entry of OPENED_ELSEWHERE"
    else:
        assert found == [], "use `open_file`, `write_file` and the readers of framework/files.py"


def test_the_search_for_open_files_finds_them(tmp_path):
    file = tmp_path / "part.py"
    file.write_text("open('a'); path.read_text(); (run / 'x').open('w'); os.replace(a, b)")
    assert len(list(opened_in(file))) == 4


def test_conf_holds_composition_only():
    found = {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")}
    per_part = [str(path) for path in found if path.name != "config.yaml" and path.parts[0] != "experiment"]
    assert not per_part, "a part's settings are its signature: no YAML per part"


def test_the_core_stands_without_plugins(tmp_path):
    shutil.copytree(ROOT / "framework", tmp_path / "framework", ignore=shutil.ignore_patterns("__pycache__"))
    check = """
import importlib, pkgutil, sys
sys.modules["framework_plugins"] = None
import framework
assert framework.__file__.startswith(sys.argv[1]), framework.__file__
for module in pkgutil.iter_modules(framework.__path__):
    if module.name == "__main__":  # it would run
        continue
    importlib.import_module(f"framework.{module.name}")
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", check, str(tmp_path)], check=True, cwd=tmp_path, env=environment)
