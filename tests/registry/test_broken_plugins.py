"""Installed plugins that do not load are a note in commands that inform, an error in others."""

import importlib
import pickle
import re
import sys
from pathlib import Path

import pytest

import framework as fw
from framework.composition.hydra_groups import filled_store
from framework.errors import PluginError
from framework.registry.registry import Registry

PLUGIN = """
from torch import nn
from framework import activations

@activations.register("{name}")
class Part(nn.ReLU):
    \"\"\"A part.\"\"\"
"""


@pytest.fixture(autouse=True)
def _clean(tmp_path, monkeypatch):
    """Make the working folder a place of packages; remove their modules and parts afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.startswith("a_")]:
        del sys.modules[name]
    for registry in Registry.every.values():
        registry.forget_unloaded()


def write(name, content):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    importlib.invalidate_caches()


BROKEN = {
    "raises": ("raise ValueError('no')", "ValueError: no"),
    "exits": ("import sys; print('bye'); sys.exit(0)", r"sys\.exit\(0\) is called"),
    "system_exit": ("raise SystemExit", r"sys\.exit\(\) is called"),
    "recursion": ("def f(): f()\nf()", "RecursionError"),
    "dependency": ("import not_installed_at_all", "No module named 'not_installed_at_all'"),
    "syntax": ("def (", "SyntaxError"),
    "duplicate": (PLUGIN.format(name="relu"), "two parts are called activation/relu"),
    "half_way": (PLUGIN.format(name="half") + "\nraise OSError('late')", "OSError: late"),
    "missing": (None, "No module named 'a_missing'"),
}


def install(text, name, folder="."):
    """Install a package with a plugin; its name begins with "a" to be loaded first."""
    if text is not None:
        write(f"{folder}/a_{name}.py", text)
    info = f"{folder}/{name}_package-1.0.dist-info"
    write(f"{info}/METADATA", f"Name: {name}-package\nVersion: 1.0\n")
    write(f"{info}/entry_points.txt", f"[framework.plugins]\na_{name} = a_{name}\n")


@pytest.fixture
def broken(tmp_path_factory, monkeypatch):
    """Install a broken plugin; some commands import nothing from the working folder."""
    folder = tmp_path_factory.mktemp("site")
    monkeypatch.syspath_prepend(folder)
    install("raise ValueError('no')", "broken", folder)


@pytest.mark.parametrize("name", BROKEN)
def test_an_installed_plugin_that_does_not_load_can_be_left_out(name, capsys):
    text, cause = BROKEN[name]
    install(text, name)
    reached_by = rf"reached by the entry point 'a_{name}' of package {name}-package 1\.0"
    named = rf"plugin a_{name} \({reached_by}\) cannot be loaded"
    with pytest.raises(
        PluginError, match=rf"{named}: .*{cause}.*`--without-plugin a_{name}` leaves it out"
    ):
        fw.discover()
    (problem,) = fw.discover(tolerant=True)
    assert re.match(rf"{named}: .*{cause}", problem)
    assert "\n" not in problem
    assert {"relu", "gelu"} <= set(fw.activations.names())
    assert "half" not in fw.activations
    assert fw.activations.get("relu").registered.module == "framework_plugins.layers.activations"
    for left_out in (f"a_{name}", f"{name}-package"):
        assert fw.discover(without=[left_out]) == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "content", [b"[framework.plugins]\nnonsense\n", b"\xff[framework.plugins]\na=b\n"]
)
def test_a_package_with_unreadable_entry_points_can_be_left_out(content):
    install("", "odd")
    write("odd_package-1.0.dist-info/entry_points.txt", content)
    with pytest.raises(
        PluginError, match=r"odd-package.*`--without-plugin odd-package` leaves it out"
    ):
        fw.discover()
    (problem,) = fw.discover(tolerant=True)
    assert "odd-package" in problem
    assert fw.discover(without=["odd-package"]) == []


def test_other_entry_points_of_a_package_do_no_harm():
    install("", "other")
    write("other_package-1.0.dist-info/entry_points.txt", "[another.group]\nnonsense\n")
    fw.discover()


def test_only_installed_plugins_can_be_left_out():
    with pytest.raises(
        PluginError,
        match=r"--without-plugin any: .*only the built-in plugins are installed",
    ):
        fw.discover(without=["any"])
    install("", "good")
    assert fw.discover(without=["a_good"]) == []
    with pytest.raises(PluginError, match=r"--without-plugin a_god: .*did you mean 'a_good'\?"):
        fw.discover(without=["a_god"])
    with pytest.raises(PluginError, match="--without-plugin builtin: there is no"):
        fw.discover(without=["builtin"])


@pytest.mark.parametrize(
    "line", ["list", "show relu", "list --json", "--help", "complete -- train activation=rel"]
)
def test_a_broken_plugin_does_not_stop_commands_that_inform(command, broken, line):
    status, out, err = command(line)
    assert status == 0
    assert out.strip()
    noted = line.startswith(("list", "show"))
    assert ("a_broken" in err, len(err.splitlines())) == (noted, int(noted))


def test_a_broken_plugin_stops_training_until_it_is_left_out(command, broken, tmp_path):
    small = "data=blobs trainer.max_epochs=1 data.samples=64"
    for line in (
        f"train {small}",
        f"plan {small}",
        f"check {small}",
        f"find lr {small}",
        f"train -m seed=1,2 {small}",
    ):
        status, _, err = command(line)
        assert status == 2, line
        assert "a_broken" in err
        assert "`--without-plugin a_broken` leaves it out" in err
    assert not (tmp_path / "runs").exists()
    status, out, err = command(f"train {small} run.name=first --without-plugin a_broken")
    assert status == 0, err
    assert "framework eval runs/default/first --without-plugin a_broken" in out
    status, _, err = command("resume runs/default/first")
    assert (status, "a_broken" in err) == (2, True)
    assert command("resume runs/default/first --without-plugin a_broken")[0] == 0
    status, out, err = command("eval runs/default/first --json")
    assert (status, "accuracy" in out, err.count("a_broken")) == (0, True, 3), err
    assert command("eval runs/default/first --without-plugin a_broken")[2] == ""


def test_plugins_are_left_out_in_other_processes(broken):
    fw.discover(without=["a_broken"])
    assert "optimizer" in pickle.loads(pickle.dumps(filled_store((), ["a_broken"]))).repo
    with pytest.raises(PluginError, match="a_broken"):
        pickle.loads(pickle.dumps(filled_store(())))
