"""`framework tell` sends commands to a running run, and prints the answer."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from framework.cli import tell
from framework.runs.requests import REQUEST, event, record, take
from waiting import wait_for


@pytest.fixture
def run(tmp_path):
    """Return the folder of a run that this process seems to write."""
    folder = tmp_path / "runs/default/first"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    (folder / "status.json").write_text(json.dumps({"status": "running", "step": 5}))
    with (folder / ".lock").open("w") as file:
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        yield folder


def answer(run, *rows):
    """Take the next request, and write rows as the run would."""

    def later():
        wait_for((run / REQUEST).exists, pause=0.01)
        request = take(run)
        record(run, [event(7, request.id, do, **more) for do, more in rows])

    thread = threading.Thread(target=later)
    thread.start()
    return thread


def test_the_answer_of_the_run_is_printed(run, command):
    change = {"setting": "optimizer.lr", "old": 0.1, "new": 0.01}
    thread = answer(run, ("set", change), ("checkpoint", {"checkpoint": "checkpoints/step-7"}))
    code, out, _ = command("tell runs/default/first set optimizer.lr=0.01 checkpoint")
    thread.join()
    assert code == 0
    assert out.splitlines() == [
        "optimizer.lr=0.01 (was 0.1) from step 8 on",
        "saved checkpoints/step-7",
    ]
    thread = answer(run, ("stop", {}))
    code, out, _ = command("tell runs/default/first stop")
    thread.join()
    assert out.splitlines()[1] == "resume   framework resume runs/default/first"


def test_a_short_name_of_a_setting_is_completed(run, command):
    config = "optimizer: {name: sgd, lr: 0.1, momentum: 0.9}\nmodel: {name: mlp, momentum: 0.1}\n"
    (run / "config.yaml").write_text(config)
    requests = []

    def later():
        wait_for((run / REQUEST).exists, pause=0.01)
        requests.append(take(run))
        change = {"setting": "optimizer.lr", "old": 0.1, "new": 0.01}
        record(run, [event(7, requests[0].id, "set", **change)])

    thread = threading.Thread(target=later)
    thread.start()
    code, _, err = command("tell runs/default/first set lr=0.01")
    thread.join()
    assert (code, err) == (0, "")
    assert [each.setting for each in requests[0].commands] == ["optimizer.lr"]
    code, _, err = command("tell runs/default/first set momentum=0.5")
    assert code == 2
    assert "optimizer.momentum, model.momentum" in err
    code, _, err = command("tell runs/default/first set lr=0.5 optimizer.lr=0.4")
    assert code == 2
    assert "optimizer.lr is given 2 times" in err


def test_a_refusal_is_an_error_in_one_line(run, command):
    thread = answer(run, ("refused", {"reason": "optimizer.lr=-1: expected more"}))
    code, out, err = command("tell runs/default/first set optimizer.lr=-1")
    thread.join()
    assert (code, out, err) == (2, "", "framework: optimizer.lr=-1: expected more\n")


def test_a_request_that_is_not_taken_is_withdrawn(run, command):
    code, _, err = command("tell runs/default/first stop --timeout 0.3")
    assert code == 2
    assert "the request is withdrawn" in err
    assert not (run / REQUEST).exists()


def test_another_request_is_not_replaced(run, command):
    (run / REQUEST).write_text("{}")
    code, _, err = command("tell runs/default/first stop")
    assert (code, (run / REQUEST).read_text()) == (2, "{}")
    assert "another request waits" in err


@pytest.mark.parametrize(
    ("status", "state"), [("done", "done"), ("failed", "failed"), ("testing", "testing")]
)
def test_a_run_that_is_not_in_training_is_refused(status, state, run, command):
    (run / "status.json").write_text(json.dumps({"status": status, "step": 5}))
    code, _, err = command("tell runs/default/first stop")
    assert (code, len(err.splitlines())) == (2, 1)
    assert f"it is {state}" in err
    assert not (run / REQUEST).exists()


def test_a_run_that_ends_meanwhile_is_reported(run, command, monkeypatch):
    monkeypatch.setattr(tell, "STATE_SECONDS", 0.1)
    (run / "status.json").write_text(json.dumps({"status": "running"}))
    done = json.dumps({"status": "done"})
    threading.Timer(0.5, (run / "status.json").write_text, (done,)).start()
    code, _, err = command("tell runs/default/first stop")
    assert (code, "is not running: it is done" in err) == (2, True)
    assert not (run / REQUEST).exists()


@pytest.mark.parametrize(
    "line",
    [
        "tell",
        "tell runs/default/first",
        "tell runs/default/first halt",
        "tell runs/default/first set optimizer.lr=fast",
        "tell runs/default/first stop --timeout 0",
        "tell runs/default/other stop",
        "tell runs stop",
    ],
)
def test_a_wrong_command_line_is_one_error(line, run, command):
    code, out, err = command(line)
    assert (code, out, len(err.splitlines())) == (2, "", 1)


def test_a_run_of_the_command_line_is_told_and_resumed(tmp_path):
    """The complete program: a running process is told to stop, and resumes."""
    arguments = ["train", "run.name=first", "trainer.max_epochs=2000", "data=digits"]
    start = [sys.executable, "-m", "framework"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = {"cwd": tmp_path, "env": environment, "text": True}
    process = subprocess.Popen(
        [*start, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, **options
    )
    run = tmp_path / "runs/default/first"
    try:
        wait_for((run / "metrics.jsonl").exists)
        words = ["tell", "runs/default/first", "set", "optimizer.lr=1e-4", "pause"]
        told = subprocess.run([*start, *words], capture_output=True, **options)
        assert told.returncode == 0, told.stderr
        assert told.stdout.startswith("optimizer.lr=0.0001 (was 0.001) from step")
        assert json.loads((run / "status.json").read_text())["status"] == "paused"
        process.send_signal(signal.SIGTERM)  # a paused run handles signals
        _, err = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM
        assert "paused after step" in err
    finally:
        process.kill()
        process.wait()
    assert json.loads((run / "status.json").read_text())["status"] == "stopped"
