"""On file systems without locks the message names the setting that makes all commands work."""

import errno
import fcntl
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from framework.errors import RunError, SettingError
from framework.runs.folder import RunFolder
from framework.system.locks import has_ended, lock

QUICK = "model.width=8 model.depth=1 trainer.max_steps=4 callbacks=[checkpoint]"
QUICK += " loggers=[json_lines] data=blobs"
UNSUPPORTED = ["ENOLCK", "ENOTSUP", "ENOSYS"]


def without_locks(monkeypatch, number):
    def flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_the_message_names_the_cause_and_the_setting(name, monkeypatch, tmp_path):
    without_locks(monkeypatch, getattr(errno, name))
    with pytest.raises(RunError, match=r"does not support locks .*FRAMEWORK_LOCKS=off") as raised:
        RunFolder(tmp_path, "a")
    assert "\n" not in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def test_every_command_works_without_locks(monkeypatch, command):
    without_locks(monkeypatch, errno.ENOLCK)
    lines = [
        f"train {QUICK} run.name=a",
        f"train {QUICK} run.name=a resume=auto trainer.max_steps=6",
        "resume runs/default/a trainer.max_steps=8",
        f"train {QUICK} -m seed=0,1 sweep.name=s",
        f"train {QUICK} -m seed=0,1,2 sweep.name=s resume=auto",
    ]
    status, _, err = command(lines[0])
    assert (status, err.count("\n")) == (2, 1), "the control"
    monkeypatch.setenv("FRAMEWORK_LOCKS", "off")
    for line in lines:
        status, _, err = command(line)
        assert status == 0, err
    assert Path("runs/default/a/.lock").read_text() == ""
    Path("runs/default/s/sweep.lock").write_text("process 1 on another-machine")
    status, _, err = command(lines[-1])
    assert (status, "is being written by process 1 on another-machine" in err) == (2, True)


def test_without_locks_a_writer_is_identified_by_the_name_of_its_process(monkeypatch, tmp_path):
    monkeypatch.setenv("FRAMEWORK_LOCKS", "off")
    folder = RunFolder(tmp_path, "a")
    with pytest.raises(
        RunError, match=rf"being written by process {os.getpid()} on .*delete .*\.lock"
    ):
        RunFolder.existing(folder.path)
    folder.lock.close()
    RunFolder.existing(folder.path).lock.close()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (folder.path / ".lock").write_text(f"process {ended.pid} on {platform.node()}")
    RunFolder.existing(folder.path).lock.close()
    (folder.path / ".lock").write_text("process 1 on another-machine")
    with pytest.raises(RunError, match="process 1 on another-machine"):
        RunFolder.existing(folder.path)


def test_a_forked_process_does_not_release_a_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("FRAMEWORK_LOCKS", "off")
    folder = RunFolder(tmp_path, "a")
    child = os.fork()
    if child == 0:
        folder.lock.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert (folder.path / ".lock").read_text() == f"process {os.getpid()} on {platform.node()}"
    folder.lock.close()


def test_another_value_of_the_variable_is_refused_and_other_errors_pass(monkeypatch, tmp_path):
    with (tmp_path / "file").open("w") as file:
        monkeypatch.setenv("FRAMEWORK_LOCKS", "no")
        with pytest.raises(SettingError, match="FRAMEWORK_LOCKS=no: expected on or off"):
            lock(file, tmp_path / "file", wait=True)
        monkeypatch.setenv("FRAMEWORK_LOCKS", "on")
        without_locks(monkeypatch, errno.EIO)
        with pytest.raises(OSError, match="Input/output"):
            lock(file, tmp_path / "file", wait=True)


@pytest.mark.parametrize(
    "holder", ["", "process x on y", "process 1 on another", f"process 1 on {platform.node()}"]
)
def test_a_holder_has_ended_only_if_this_machine_knows_it(holder):
    assert not has_ended(holder)
    assert has_ended(f"process {10**30} on {platform.node()}")
