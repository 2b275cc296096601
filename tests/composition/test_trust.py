"""Commands that only print run the plugins of a folder only if the user trusts it."""

import json
import os
import pty
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from framework.cli.main import COMMANDS
from framework.composition import trust
from framework.composition.catalogue import cache_file, trusted_among
from framework.errors import FrameworkError, RunError

PLUGIN = """\
from pathlib import Path
import torch
from framework import activations

Path({proof!r}).joinpath({name!r}).touch()

@activations.register({name!r})
class Part(torch.nn.ReLU):
    \"\"\"A part of the folder.\"\"\"
"""
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")
INFORMING = ["list", "list activation", "show relu", "complete -- train activation=", "list --json"]
INFORMING += ["schema"]


@pytest.fixture(autouse=True)
def _own_files(tmp_path_factory, monkeypatch, forget_plugins):
    """Give the test its own state and cache folders."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def proofs(tmp_path_factory):
    """Return a function that lists the plugins that ran; each leaves a file in its folder."""
    folder = tmp_path_factory.mktemp("proofs")

    def ran() -> list[str]:
        return sorted(os.listdir(folder))

    ran.folder = str(folder)
    return ran


@pytest.fixture
def folder(tmp_path, proofs):
    """Return the folder of a project with a plugin that its config names."""
    return write_project(tmp_path, proofs)


def write_project(folder, proofs):
    write_plugin(folder / "parts/evil.py", proofs)
    (folder / "conf/experiment").mkdir(parents=True)
    (folder / "conf/config.yaml").write_text("defaults: [framework, _self_]\nplugins: [parts]\n")
    (folder / "conf/experiment/wide.yaml").write_text("plugins: [wide.py]\n")
    return folder


def write_plugin(file, proofs):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(PLUGIN.format(proof=proofs.folder, name=file.stem))


# which plugins run


@pytest.mark.parametrize("line", INFORMING)
def test_an_untrusted_folder_runs_nothing(folder, command, proofs, line):
    status, out, err = command(line)
    assert (status, proofs()) == (0, [])
    assert "evil" not in out
    assert out.strip()
    note = "plugins of conf/config.yaml are not loaded: parts: this folder is not trusted"
    assert (note in err) == (not line.startswith("complete"))


@pytest.mark.parametrize("line", [*INFORMING, "show evil"])
def test_a_trusted_folder_runs_its_plugins(folder, command, proofs, line):
    trust.trust(folder)
    status, _, err = command(line)
    assert (status, proofs(), err) == (0, ["evil"], "")


def test_a_folder_can_be_trusted_for_one_command(folder, command, proofs):
    status, out, err = command("list activation --trust")
    assert (status, proofs(), err) == (0, ["evil"], "")
    assert "evil" in out
    assert not trust.is_trusted(folder)


def test_a_plugin_that_the_user_names_is_loaded(folder, command, proofs):
    write_plugin(folder / "mine.py", proofs)
    assert "mine" in command("list activation --plugins mine.py")[1]
    assert proofs() == ["mine"]


def test_experiments_are_completed_without_trust(folder, command):
    assert "experiment=wide" in command("complete -- train experiment=")[1].split()


PLUGIN_NAMES = ["evil", "./parts/evil.py", "{folder}/parts/evil.py", "conf/../parts"]


@pytest.mark.parametrize("plugin", PLUGIN_NAMES)
def test_trust_does_not_depend_on_the_name_of_a_plugin(
    folder, command, proofs, plugin, monkeypatch
):
    monkeypatch.syspath_prepend(folder / "parts")
    (folder / "conf/config.yaml").write_text(f"plugins: ['{plugin.format(folder=folder)}']\n")
    command("list")
    assert proofs() == []
    trust.trust(folder)
    command("list")
    assert proofs() == ["evil"]
    sys.modules.pop("evil", None)


def test_a_folder_reached_by_a_link_is_the_same_folder(
    folder, command, proofs, tmp_path_factory, monkeypatch
):
    link = tmp_path_factory.mktemp("links") / "link"
    link.symlink_to(folder)
    monkeypatch.chdir(link)
    command("list")
    assert proofs() == []
    command("trust . --trust")
    assert trust.is_trusted(folder)
    command("list")
    assert proofs() == ["evil"]


def test_a_folder_below_a_trusted_one_is_not_trusted(folder, command, proofs, monkeypatch):
    below = write_project(folder / "below", proofs)
    trust.trust(folder)
    monkeypatch.chdir(below)
    command("list")
    assert proofs() == []


def test_plugins_of_another_folder_with_config_files(tmp_path, command, proofs, tmp_path_factory):
    """A relative path in a trusted --config-dir does not lead to the working folder."""
    other = write_project(tmp_path_factory.mktemp("other"), proofs)
    line = f"complete -- train --config-dir {other}/conf activation=e"
    assert command(line)[1].split() == ["activation=elu"]
    trust.trust(other)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/cwd.py").write_text(PLUGIN.format(proof=proofs.folder, name="cwd"))
    assert "activation=evil" in command(line)[1].split()
    assert proofs() == ["evil"]
    shutil.rmtree(Path(other, "parts"))  # with the bytecode of the plugin
    command(line)
    assert proofs() == ["evil"], "nor if the other folder has no such plugin"


def test_a_link_to_the_config_files_of_a_trusted_folder_is_not_trusted(
    tmp_path, command, proofs, tmp_path_factory
):
    other = write_project(tmp_path_factory.mktemp("other"), proofs)
    trust.trust(other)
    (tmp_path / "conf").symlink_to(other / "conf")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/cwd.py").write_text(PLUGIN.format(proof=proofs.folder, name="cwd"))
    command("list")
    assert proofs() == []


@pytest.mark.parametrize(
    "line", ["--help", "--version", "plan --help", "find --help", "completion bash", "trust --list"]
)
def test_other_commands_run_nothing(folder, command, proofs, line):
    assert command(line)[0] == 0
    assert proofs() == []


def test_an_alias_bomb_is_refused_at_once(folder, command):
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else 'x'] * 10)}]" for n in range(10)]
    (folder / "conf/config.yaml").write_text("\n".join([*levels, "defaults: [{optimizer: *a9}]"]))
    status, _, err = command("list")
    assert status == 2
    assert "config.yaml is too large or too deep" in err


SHADOWS = ["torch", "yaml", "numpy", "hydra", "framework_plugins", "framework_conf", "rich", "evil"]
PROGRAM = """
import io, os, sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from framework.cli.main import main
for line in sys.argv[1:]:
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out), suppress(SystemExit):
        main(line.split())
    assert len(out.getvalue().splitlines()) > 0, line
"""


def test_nothing_is_imported_from_the_working_folder(tmp_path, proofs):
    """A new process imports no shadowing module, installed plugin or Hydra plugin from there."""
    for name in SHADOWS:
        (tmp_path / f"{name}.py").write_text(f"open({proofs.folder!r} + '/{name}', 'w')\n")
    package = tmp_path / "evil-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Name: evil\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[framework.plugins]\nevil = evil\n")
    (tmp_path / "hydra_plugins").mkdir()
    proof = f"open({proofs.folder!r} + '/hydra_plugins', 'w')\n"
    (tmp_path / "hydra_plugins/evil.py").write_text(proof)
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    environment = os.environ | {"PYTHONPATH": f"{link}::.:{tmp_path}", "OMP_NUM_THREADS": "1"}
    lines = ["--help", "list", "show relu", "complete -- train activation=", "board --help"]
    informing = [sys.executable, "-c", PROGRAM, *lines]
    subprocess.run(informing, cwd=tmp_path, env=environment, check=True)
    assert proofs() == []
    control = [sys.executable, "-c", "import torch, evil"]
    subprocess.run(control, cwd=tmp_path, env=environment, check=True)
    assert proofs() == ["evil", "torch"], "the control: they can be imported"


def test_help_is_printed_in_a_deleted_folder(tmp_path, command, monkeypatch):
    (tmp_path / "deleted").mkdir()
    monkeypatch.chdir(tmp_path / "deleted")
    (tmp_path / "deleted").rmdir()
    assert command("--help")[0] == 0


def test_entries_of_the_import_path_in_a_folder(tmp_path, monkeypatch):
    inside = tmp_path / "lib"
    inside.mkdir()
    monkeypatch.chdir(tmp_path)
    installed = str(tmp_path / "venv/lib/site-packages")
    Path(installed).mkdir(parents=True)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    monkeypatch.setattr(
        sys,
        "path",
        ["", str(inside), "lib", str(tmp_path.parent), installed, "/usr", trust.FRAMEWORK],
    )
    assert trust.entries_in(tmp_path) == ["", str(inside), "lib"]
    monkeypatch.setattr(trust, "paths_of_installed", lambda: [str(inside)])
    assert trust.entries_in(tmp_path) == [""], "a package that is installed in editable mode"
    with trust.importing_from_elsewhere(tmp_path) as left_out:
        assert left_out == [""]
        assert "" not in sys.path
    assert sys.path[0] == ""
    (tmp_path / "mine.py").touch()
    with trust.importing_from_elsewhere(tmp_path, ["mine.inner"]) as left_out:
        assert left_out == [], "a module that the user has named"


# the cached index


def test_trusted_and_untrusted_folders_have_different_cache_files(folder, monkeypatch):
    def file():
        return cache_file([], [], trusted_among([]))

    monkeypatch.chdir(folder)
    before = file()
    trust.trust(folder)
    trusted = file()
    trust.untrust(folder)
    assert before == file() != trusted


# the command


def test_the_command_stores_lists_and_removes(folder, command):
    assert command("trust --list") == (0, "", "")
    status, out, err = command("trust --trust")
    assert (status, err) == (0, "")
    assert "conf/config.yaml names the plugin parts (folder with 1 .py file)" in out
    assert "conf/experiment/wide.yaml names the plugin wide.py" in out
    assert command("trust --list")[1] == f"{folder}\n"
    assert command(f"trust --remove {folder}")[0] == 0
    assert command("trust --list")[1] == ""
    status, _, err = command(f"trust --remove {folder}")
    assert status == 2
    assert "is not trusted" in err


def test_without_a_terminal_there_is_no_question(folder, command, monkeypatch):
    status, _, err = command("trust")
    assert status == 2
    assert "without a terminal" in err
    assert "--trust" in err
    assert not trust.is_trusted(folder)


def test_a_folder_without_plugins_needs_no_trust(tmp_path, command, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    status, out, err = command("trust")
    assert (status, out) == (2, ""), "no question, and no folder that is trusted"
    assert "no plugins" in err
    assert command("trust --trust")[0] == 0
    assert trust.is_trusted(empty)


@pytest.mark.parametrize(
    ("answer", "trusted"),
    [("y\n", True), ("Yes\n", True), ("\n", False), ("n\n", False), ("", False)],
)
def test_the_answer_to_the_question_decides(folder, command, monkeypatch, answer, trusted):
    ours, theirs = pty.openpty()
    os.write(ours, answer.encode() or b"\x04")
    with os.fdopen(theirs) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        status, out, _ = command("trust")
    os.close(ours)
    assert status == int(not trusted)
    assert f"Trust {folder}? `list`, `show` and TAB will run its plugins. [y/N] " in out
    assert trust.is_trusted(folder) == trusted
    assert (f"`framework trust --remove {folder}`" in out) == trusted


@pytest.mark.parametrize(
    "line", ["trust nowhere", "trust . --list", "trust --list --trust", "trust --remove . --list"]
)
def test_a_wrong_command_line_is_an_error_of_one_line(folder, command, line):
    status, _, err = command(line)
    assert status == 2
    assert len(err.splitlines()) == 1


def test_the_question_warns_of_other_users(folder, monkeypatch):
    assert not any("warning" in line for line in trust.description(folder))
    folder.chmod(0o777)
    assert "every user of this machine can write" in trust.description(folder)[-1]
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert any("belongs to another user" in line for line in trust.description(folder))


def test_control_characters_in_names_are_escaped_in_the_question(folder):
    (folder / "conf/config.yaml").write_text('plugins: ["a\\e[2Jb"]\n')
    assert all(line.isprintable() for line in trust.description(folder))


@pytest.mark.parametrize("content", ["plugins: one", "plugins: [1, {}]", "[", "\0", "- a", ""])
def test_config_files_of_any_shape_can_be_described(folder, content):
    (folder / "conf/config.yaml").write_text(content)
    os.mkfifo(folder / "conf/experiment/fifo.yaml")
    assert len(trust.description(folder)) == 1, "the experiment's plugin"


# the file


def test_the_file_follows_the_umask_and_is_replaced_atomically(folder):
    before = os.umask(0o027)
    try:
        trust.trust(folder)
    finally:
        os.umask(before)
    file = trust.trust_file()
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert os.listdir(file.parent) == ["trusted.json"]
    assert json.loads(file.read_text())["folders"] == {str(folder): os.geteuid()}


def world_writable(file):
    file.chmod(0o666)


def damaged(file):
    file.write_text(file.read_text()[:-4])


def other_content(file):
    file.write_text("[]")


def link(file):
    file.rename(file.with_name("other"))
    file.symlink_to("other")


def fifo(file):
    file.unlink()
    os.mkfifo(file)


def large(file):
    os.truncate(file, 2**30)


@pytest.mark.parametrize("harm", [world_writable, damaged, other_content, link, fifo, large])
def test_a_damaged_or_foreign_file_trusts_nothing(folder, command, proofs, harm):
    trust.trust(folder)
    harm(trust.trust_file())
    assert not trust.is_trusted(folder)
    status, _, err = command("list")
    assert (status, proofs()) == (0, [])
    assert len(err.splitlines()) == 1
    assert "no folder is trusted" in err
    assert command("trust --list")[0] == 2


@AS_ROOT
def test_a_file_of_another_user_trusts_nothing(folder, monkeypatch):
    trust.trust(folder)
    os.chown(trust.trust_file(), 12345, -1)
    assert not trust.is_trusted(folder)
    with pytest.raises(RunError, match="may have been written by another user"):
        trust.read_trusted()


@AS_ROOT
def test_trust_ends_with_the_owner_of_the_folder(folder):
    trust.trust(folder)
    assert trust.is_trusted(folder)
    os.chown(folder, 12345, -1)
    assert not trust.is_trusted(folder)


def test_without_a_home_no_folder_can_be_trusted(folder, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", "relative")
    assert not trust.is_trusted(folder)
    with pytest.raises(FrameworkError, match="cannot be stored"):
        trust.trust(folder)


def test_a_folder_with_a_name_that_is_not_utf8_can_be_trusted(folder, command):
    odd = folder / os.fsdecode(b"caf\xe9")
    odd.mkdir()
    trust.trust(odd)
    assert trust.is_trusted(odd)
    assert command("trust --list")[0] == 0


def test_commands_that_only_print_do_not_run_parts():
    informing = {name for name, each in COMMANDS.items() if not each.runs_parts}
    reading = {"diff", "watch", "tell", "runs", "best"}
    printing = {"list", "show", "schema", "completion", "tour"}
    assert informing == {"data", "trust", "board"} | reading | printing
