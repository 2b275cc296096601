import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import framework as fw
from framework.errors import PluginError
from framework.registry.discovery import files_in, load_module
from framework.registry.registry import Registry

PLUGIN = """
from torch import nn
from framework import activations

@activations.register("{name}")
class Double(nn.Module):
    \"\"\"2x.\"\"\"

    def forward(self, x):
        return 2 * x
"""


@pytest.fixture(autouse=True)
def _clean(tmp_path, monkeypatch):
    """Import plugins from a new working folder; remove their modules and parts afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]
    for registry in Registry.every.values():
        registry.forget_unloaded()


def write(name, text):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    importlib.invalidate_caches()
    return path


def test_installed_plugins_are_found_by_their_entry_points():
    fw.discover()
    assert {"relu", "gelu", "swiglu"} <= set(fw.activations.names())
    assert fw.activations.get("snake").source.module == "framework_plugins.layers.activations"


@pytest.mark.parametrize(
    "reach",
    ["mine/double.py", "./mine/double.py", "mine", "mine/", "mine.double", "{here}/mine/double.py"],
)
def test_a_plugin_is_a_file_a_folder_or_a_module(reach):
    write("mine/__init__.py", "")
    write("mine/double.py", PLUGIN.format(name="double"))
    fw.discover([reach.format(here=Path.cwd())])
    assert fw.activations.build("double")(3) == 6
    assert (
        Path(fw.activations.get("double").registered.file).resolve()
        == Path("mine/double.py").resolve()
    )


@pytest.mark.parametrize("first", ["mine/double.py", "mine", "mine.double"])
@pytest.mark.parametrize(
    "then", ["mine/double.py", "mine/../mine", "link/double.py", "mine.double", "mine"]
)
def test_a_file_is_loaded_once_from_all_its_paths(first, then):
    write("mine/__init__.py", "")
    write("mine/double.py", PLUGIN.format(name="double"))
    Path("link").symlink_to("mine")
    fw.discover([first])
    entry = fw.activations.get("double")
    fw.discover([then])
    assert fw.activations.get("double") is entry


def test_every_module_of_a_package_is_loaded():
    write("packaged/__init__.py", "")
    write("packaged/one.py", PLUGIN.format(name="one_of_two"))
    write("packaged/two.py", PLUGIN.format(name="two_of_two"))
    fw.discover(["packaged"])
    assert {"one_of_two", "two_of_two"} <= set(fw.activations.names())


def test_postponed_annotations_keep_nested_parts():
    text = """
    from __future__ import annotations
    from torch import nn
    from framework import Activation, Norm, PositiveInt, Shape, blocks

    @blocks.register("postponed")
    class Postponed(nn.Module):
        \"\"\"A block.\"\"\"

        def __init__(
            self,
            in_shape: Shape,
            width: PositiveInt = 3,
            activation: Activation = "gelu",
            norm: Norm | None = None,
        ):
            super().__init__()
            self.activation, self.width = activation(), width
    """
    write("postponed.py", text.replace("\n    ", "\n"))
    fw.discover(["postponed.py"])
    settings = fw.blocks.get("postponed").settings
    assert [settings[name].part for name in ("width", "activation", "norm")] == [
        None,
        "activation",
        "norm",
    ]
    assert type(fw.blocks.build("postponed", (4,), activation="tanh").activation).__name__ == "Tanh"
    assert settings["width"].type_text == "int in [1, inf)"


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (
            "x = 1\nimport nothing_of_that_name",
            r"ModuleNotFoundError: No module named 'nothing_of_that_name' \(.*broken.py:2.*",
        ),
        ("x = (", r"SyntaxError: .* \(.*broken.py:1.*"),
        ("def f():\n    1 / 0\nf()", r"ZeroDivisionError: division by zero \(.*broken.py:2.*"),
        ("from torch import nn\nnn.Linear(-1, 'x')", r"TypeError: .* \(.*broken.py:2.*"),
        (
            "from framework import losses\nlosses.register('Big', print)",
            "'Big' .*broken.py:2.* is not a valid name for a part",
        ),
    ],
)
@pytest.mark.parametrize("reach", ["broken.py", "broken"])
def test_a_broken_plugin_is_named_with_file_line_and_cause(text, cause, reach):
    write("broken.py", text)
    with pytest.raises(PluginError, match=f"plugin {reach}.* cannot be loaded: {cause}"):
        fw.discover([reach])


@pytest.mark.parametrize("reach", ["late.py", "late"])
def test_a_plugin_that_failed_can_be_corrected_and_loaded_again(reach):
    good = PLUGIN.format(name="late")
    write("late.py", good + "\nraise RuntimeError('not yet')\n")
    with pytest.raises(PluginError, match="not yet"):
        fw.discover([reach])
    assert "late" not in fw.activations
    write("late.py", good + "\n")
    fw.discover([reach])
    assert fw.activations.build("late")(1) == 2


def test_the_error_of_a_duplicate_name_has_both_files():
    write("one.py", PLUGIN.format(name="twice"))
    write("two.py", PLUGIN.format(name="twice"))
    with pytest.raises(
        PluginError, match=r"two parts are called activation/twice: .*one\.py:5 and .*two\.py:5"
    ):
        fw.discover(["one.py", "two.py"])


@pytest.mark.parametrize("missing", ["missing.py", "no/such/folder", "no_such_module"])
def test_a_missing_plugin_is_an_error(missing):
    with pytest.raises(PluginError, match=missing):
        fw.discover([missing])


def test_importing_the_framework_registers_nothing_and_does_not_import_torch():
    check = """
import sys, framework
from framework.registry.registry import Registry
assert sum(map(len, Registry.every.values())) == 0
assert len(Registry.every) >= 15
assert 'torch' not in sys.modules and 'numpy' not in sys.modules and 'hydra' not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(fw.__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", check], check=True, env=environment)


BASE = "SCALE = 3\n"
NESTED = """
from torch import nn
from framework import activations
from ..base import SCALE
from .factors import FACTOR

@activations.register("{name}")
class Nested(nn.Module):
    \"\"\"A factor of two files.\"\"\"

    def forward(self, x):
        return SCALE * FACTOR * x
"""


def write_nested(folder, name="nested"):
    write(f"{folder}/base.py", BASE)
    write(f"{folder}/layers/__init__.py", "")
    write(f"{folder}/layers/factors.py", "FACTOR = 5\n")
    write(f"{folder}/layers/more.py", NESTED.format(name=name))


@pytest.mark.parametrize("reach", ["mine", "package", "package.layers.more"])
def test_packages_in_a_folder_are_loaded_with_relative_imports(reach):
    write_nested(reach.partition(".")[0])
    if reach != "mine":
        write("package/__init__.py", "")
    fw.discover([reach])
    assert fw.activations.build("nested")(1) == 15
    again = [reach, f"{reach.partition('.')[0]}/layers"]
    fw.discover(again)  # loads no file twice, which would be an error: the name is taken


def test_packages_may_be_nested_and_have_any_name():
    write("mine/a-b/__init__.py", "")
    write("mine/a-b/c/__init__.py", "from ..d import NAME\n")
    write("mine/a-b/d.py", "NAME = 'deep'\n")
    write("mine/a-b/c/e.py", PLUGIN.format(name="deep"))
    fw.discover(["mine"])
    assert "deep" in fw.activations.names()


def test_tests_programs_and_other_folders_than_packages_are_not_loaded():
    write("mine/double.py", PLUGIN.format(name="double"))
    write("mine/scripts/run.py", "raise SystemExit('a script')")
    for package in ("test", "tests"):
        write(f"mine/{package}/__init__.py", "raise ImportError('tests')")
    write("package/__init__.py", "")
    write("package/__main__.py", "raise SystemExit('a program')")
    write("package/tests/__init__.py", "raise ImportError('tests')")
    fw.discover(["mine", "package"])
    assert "double" in fw.activations.names()


def test_a_link_to_a_parent_folder_is_not_followed():
    write("mine/__init__.py", "")
    write("mine/double.py", PLUGIN.format(name="double"))
    Path("mine/again").symlink_to(Path("mine").resolve())
    assert list(files_in(Path("mine"))) == [Path("mine/__init__.py"), Path("mine/double.py")]
    fw.discover(["mine"])


def test_an_error_in_a_package_names_its_file():
    write("mine/broken/__init__.py", "import no_such_module\n")
    write("mine/broken/part.py", PLUGIN.format(name="part"))
    with pytest.raises(PluginError, match=r"mine/broken/__init__\.py .*no_such_module"):
        fw.discover(["mine"])


def test_hidden_packages_are_not_loaded():
    write("mine/double.py", PLUGIN.format(name="double"))
    for package in (".git", "__pycache__"):
        write(f"mine/{package}/__init__.py", "raise ImportError('hidden')")
    fw.discover(["mine"])
    assert "double" in fw.activations.names()


def test_a_link_in_a_package_to_a_parent_folder_is_not_followed():
    write("package/__init__.py", "")
    write("package/inner/__init__.py", PLUGIN.format(name="double"))
    Path("package/inner/again").symlink_to("..")
    load_module("package", "the test")
    assert "double" in fw.activations.names()
