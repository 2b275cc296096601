"""Signals: during imports, in training, between trials, in workers, and of a closed terminal."""

import os
import pty
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from framework.composition import hydra_internals
from framework.system import signals
from framework.system.signals import (
    ENDING,
    Forward,
    Interrupt,
    forwarding,
    interruptible,
    received,
    status_of_signal,
    stopping,
)
from waiting import wait_for

SCRIPTS = Path(__file__).parents[2] / "scripts"
FRAMEWORK = [sys.executable, "-m", "framework"]


class Run:
    """A run that records its stops, in the place of a trainer."""

    def __init__(self):
        self.stops = []

    def stop(self, by, reason, signal=None):
        self.stops.append((by, reason, signal))


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


# during imports


@pytest.mark.parametrize(
    ("number", "after"), [("SIGINT", 0.12), ("SIGHUP", 0.5), ("SIGINT", 1.0), ("SIGTERM", 2.0)]
)
def test_a_signal_at_the_start_ends_the_command(tmp_path, number, after):
    command = [*FRAMEWORK, "train", "data=blobs", "trainer.max_epochs=100000"]
    with subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        wait_for(lambda: "signals" in maps(process.pid) or process.poll() is not None, pause=0.005)
        time.sleep(after)
        process.send_signal(getattr(signal, number))
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, number)
    assert "Traceback" not in err
    assert "terminate called" not in err


def maps(pid):
    """Return "signals" once the process handles SIGTERM, which the package does first; else ""."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return ""
    caught = next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt")), 0)
    return "signals" if caught >> (signal.SIGTERM - 1) & 1 else ""


def test_an_ignored_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run = Run()
        with interruptible(), stopping([run]) as got:
            send(signal.SIGHUP)
        assert (got, run.stops) == ([], [])
    finally:
        signal.signal(signal.SIGHUP, before)


# training


@pytest.mark.parametrize("number", ENDING)
def test_each_signal_stops_a_run_after_its_step(number):
    run = Run()
    with stopping([run]) as got:
        send(number)
    assert (got, run.stops) == ([number], [("signal", number.name, number)])


def test_a_second_hangup_does_not_end_the_save():
    with stopping([Run()]) as got:
        send(signal.SIGHUP, signal.SIGHUP)
        with pytest.raises(SystemExit):
            send(signal.SIGTERM)
    assert got == [signal.SIGHUP]


# exceptions that are lost


def test_a_signal_whose_exception_is_lost_stops_the_next_run():
    run = Run()
    with interruptible() as interrupt:
        with suppress(SystemExit):
            send(signal.SIGTERM)
        assert received() == signal.SIGTERM
        with stopping([run]) as got:
            assert run.stops == [("signal", "SIGTERM", signal.SIGTERM)]
        assert got == [signal.SIGTERM]
    assert interrupt.received == signal.SIGTERM


def error_in_cleanup(raised):
    try:
        try:
            raise raised
        finally:
            None.missing  # noqa: B018  # fails, as cleaning up of interrupted code may
    except AttributeError as error:
        return error


def test_an_error_that_replaces_the_exception_of_a_signal_has_its_status():
    for raised, status in ((SystemExit(129), 129), (KeyboardInterrupt(), 130)):
        assert status_of_signal(error_in_cleanup(raised)) == status
    for other in (SystemExit(1), ValueError("x")):
        assert status_of_signal(error_in_cleanup(other)) is None


def test_an_interrupted_composition_ends_with_the_status_of_the_signal(command, monkeypatch):
    def interrupted(*arguments, **settings):
        config = OmegaConf.create({"seed": 1}, flags={"struct": True})
        try:
            raise SystemExit(129)
        finally:
            config.missing  # noqa: B018  # an error of OmegaConf

    monkeypatch.setattr(hydra_internals, "compose_config", interrupted)
    assert command("train") == (129, "", "")


IN_DESTRUCTOR = """
import signal
from framework.system.signals import interruptible

class Deleted:  # as the iterator of a DataLoader
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)

with interruptible() as interrupt:
    Deleted()
    print(interrupt.received)
"""


def test_the_exception_of_a_signal_in_a_destructor_prints_nothing():
    command = [sys.executable, "-c", IN_DESTRUCTOR]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("15\n", "")


def test_a_signal_after_the_last_step_is_not_lost():
    with interruptible() as interrupt:
        with stopping([]):
            send(signal.SIGINT)
        assert interrupt.received == signal.SIGINT


def test_an_import_is_found_in_the_stack(tmp_path, monkeypatch):
    (tmp_path / "imported.py").write_text(
        "import sys\nfrom framework.system.signals import importing\n"
    )
    with (tmp_path / "imported.py").open("a") as file:
        file.write("FOUND = importing(sys._getframe())\n")
    monkeypatch.syspath_prepend(tmp_path)
    import imported

    assert imported.FOUND
    assert not signals.importing(sys._getframe())


# workers


def test_a_signal_is_forwarded_once_to_each_worker(monkeypatch):
    sent = []
    pids = [11]
    monkeypatch.setattr(os, "kill", lambda *args: sent.append(args))
    forward = Forward(lambda: pids)
    forward.send_pending()
    forward(signal.SIGINT, None)
    pids.append(12)
    forward.send_pending()
    forward.send_pending()
    assert sent == [(11, signal.SIGINT), (12, signal.SIGINT)]
    forward(signal.SIGHUP, None)
    forward(signal.SIGTERM, None)
    assert sent[2:] == [(11, signal.SIGTERM), (12, signal.SIGTERM)]


def test_a_forwarded_signal_ends_the_sweep():
    with interruptible() as interrupt:
        with forwarding(list):
            send(signal.SIGHUP)
            assert received() == signal.SIGHUP
        assert interrupt.received == signal.SIGHUP


def test_a_worker_keeps_the_first_signal_and_raises_at_the_second():
    interrupt = Interrupt(defers=True)
    interrupt(signal.SIGINT, None)
    assert interrupt.received == signal.SIGINT
    with pytest.raises(SystemExit):
        interrupt(signal.SIGTERM, None)


@pytest.mark.parametrize("watched", [False, True])
def test_a_process_ends_with_its_parent(tmp_path, monkeypatch, watched):
    """With `watched`, as on systems without a signal for the death of the parent."""
    if watched:
        monkeypatch.setattr(sys, "platform", "another")
        monkeypatch.setattr(signals, "POLL_SECONDS", 0.01)
    parent = os.fork()
    if parent == 0:
        middle = os.getpid()
        child = os.fork()
        if child == 0:
            signals.end_with_parent(middle)
            (tmp_path / "child").write_text(str(os.getpid()))
            time.sleep(60)
            os._exit(0)
        wait_for(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text())
        os.kill(middle, signal.SIGKILL)
    os.waitpid(parent, 0)
    child = int((tmp_path / "child").read_text())
    wait_for(lambda: not alive(child), seconds=10)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# a closed terminal


def test_output_to_a_closed_terminal_is_discarded(tmp_path):
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        program = "import sys, time\n"
        program += "from framework.system.streams import prepare_streams\n"
        program += "prepare_streams()\n"
        program += "print('here', flush=True); time.sleep(0.5)\n"
        program += "print('lost', flush=True); print('lost', file=sys.stderr, flush=True)\n"
        program += "open(sys.argv[1], 'w').write('done')"
        os.execv(sys.executable, [sys.executable, "-c", program, str(tmp_path / "end")])
    assert os.read(terminal, 4) == b"here"
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (tmp_path / "end").read_text() == "done"


# the campaign


@pytest.mark.parametrize("control", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_short_campaign_of_signals(control):
    """With one launcher: workers of joblib, and more signals, take too long for a test."""
    command = [sys.executable, SCRIPTS / "fault_campaign", "--signals", "3", "--launchers", "basic"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command += ["--control"] * control
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == int(control), done.stdout + done.stderr
    assert "after 3 signals" in done.stdout
    assert ("other weights" in done.stdout) == control
