"""Ctrl-C ends a search so that it can be resumed."""

import signal
import subprocess
import sys
import time

from framework.tuning.sweep.folder import SweepFolder

SEARCH = [
    "hydra/sweeper=optuna",
    "hydra.sweeper.trials=4",
    "optimizer.lr=tag(log, interval(1e-3, 1e-1))",
]


def test_ctrl_c_prints_a_table_and_leaves_a_stopped_trial(tmp_path):
    command = [sys.executable, "-m", "framework", "train", "-m", *SEARCH, "sweep.name=a"]
    command += ["trainer.max_steps=100000", "trainer.max_epochs=null", "loggers=json_lines"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("runs/default/a/000_*/metrics.jsonl")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert [row.state for row in SweepFolder(tmp_path / "runs/default/a").trials()] == ["stopped"]
    assert "stopped" in output
