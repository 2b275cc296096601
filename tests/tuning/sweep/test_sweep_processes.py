"""Sweeps and processes: a killed sweep, several processes, two sweeps in one folder."""

import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from framework.errors import RunError
from framework.runs.checkpoint import newest, read_manifest
from framework.runs.sweep_files import Trial
from framework.tuning.sweep.folder import SweepFolder
from sweeps import rows, table_of

QUICK = (
    "model.width=8 model.depth=1 trainer.max_steps=4 callbacks=[checkpoint] "
    "loggers=[json_lines] data=blobs"
)
PLUGIN = """\
import os, signal
from framework import Callback, callbacks

@callbacks.register("killed")
class Killed(Callback):
    changes_training = False

    def on_step_done(self, trainer):
        if os.path.exists("kill") and trainer.seed == 1 and trainer.state.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def command(command, tmp_path, forget_plugins):
    """Run a command in a folder with the plugin."""
    (tmp_path / "killed.py").write_text(PLUGIN)
    return command


def results(name):
    """Return the metrics of the last trial without its speed."""
    metrics = rows(name)[-1]["metrics"]
    return {key: metrics[key] for key in metrics if not key.endswith("per_second")}


def test_a_killed_sweep_gives_the_results_of_an_uninterrupted_one(command):
    """The running trial is resumed from its checkpoint, bit for bit."""
    line = f"train --plugins killed.py {QUICK} +callbacks=killed -m seed=0,1"
    line += " callbacks.checkpoint.every=1steps callbacks.checkpoint.background=false"
    assert command(f"{line} sweep.name=uninterrupted")[0] == 0
    Path("kill").touch()
    arguments = [sys.executable, "-m", "framework", *shlex.split(f"{line} sweep.name=killed")]
    killed = subprocess.run(arguments, stdout=subprocess.DEVNULL, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [row["state"] for row in rows("killed")] == ["running", "done", "running"]
    os.remove("kill")
    status, out, _ = command(f"{line} sweep.name=killed resume=auto")
    assert status == 0
    assert "of which 1 trials are finished\n001 seed=1" in out
    assert "after step 3" in Path("runs/default/killed/001_seed-1/output.txt").read_text()
    assert checksum("killed") == checksum("uninterrupted")
    assert results("killed") == results("uninterrupted")


def checksum(name):
    """Return the checksum of the newest weights of seed 1."""
    checkpoints = Path(f"runs/default/{name}/001_seed-1/checkpoints")
    return read_manifest(newest(checkpoints)[0])["files"]["model.safetensors"]


def test_joblib_gives_the_same_trials(command):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    line = f"train --plugins killed.py {QUICK} -m optimizer.lr=1e-3,1e-1 seed=0,1"
    one = table_of(command(f"{line} sweep.name=one")[1])
    status, out, _ = command(f"{line} sweep.name=two hydra/launcher=joblib hydra.launcher.n_jobs=2")
    assert status == 0
    assert table_of(out) == one
    assert len({row["number"] for row in rows("two")}) == 4
    assert SweepFolder(Path("runs/default/two")).request()["swept"] == ["optimizer.lr", "seed"]


def record(folder, first):
    for number in range(first, first + 50):
        trial = Trial(number, {"seed": number})
        SweepFolder(folder).record(trial)
        done = replace(trial, state="done", metrics={"val/loss": float("nan")})
        SweepFolder(folder).record(done)


def test_several_processes_record_trials_and_an_incomplete_row_is_skipped(tmp_path):
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=record, args=(tmp_path, 50 * n)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    folder = SweepFolder(tmp_path)
    assert [trial.number for trial in folder.trials()] == list(range(200))
    assert {trial.state for trial in folder.trials()} == {"done"}
    with (tmp_path / "sweep.jsonl").open("a") as file:
        file.write('{"number": 3, "settings": {"se')
    assert len(folder.trials()) == 200
    folder.record(Trial(200, {}, state="pruned"))
    assert [trial.state for trial in folder.trials()[-2:]] == ["done", "pruned"]
    assert [trial.state for trial in SweepFolder(tmp_path).trials()[-2:]] == ["done", "pruned"]


def test_a_sweep_is_run_by_one_process_at_a_time(tmp_path):
    folder = SweepFolder.claim(tmp_path, "default", "s", {})
    folder.acquire()
    with pytest.raises(RunError, match="is run by another process"):
        SweepFolder(folder.path).acquire()
    for name in ("../s", ".s", "a/b", ""):
        with pytest.raises(RunError, match=r"sweep\.name: expected letters"):
            SweepFolder.claim(tmp_path, "default", name, {})


def test_a_single_run_does_not_import_sweeps(tmp_path):
    program = "import sys, framework.cli.main, framework.composition.compose; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    modules = {name for name in done.stdout.split() if name.startswith("framework.tuning.")}
    assert modules == {"framework.tuning.sections"}


def test_a_trial_done_before_its_row_was_written_keeps_its_steps_and_metrics(command):
    """A kill may come after the last file of a run and before the row of the sweep."""
    line = f"train {QUICK} -m seed=0,1 sweep.name=s"
    assert command(line)[0] == 0
    file = Path("runs/default/s/sweep.jsonl")
    expected = rows("s")[-1]
    file.write_text("\n".join(file.read_text().splitlines()[:-1]) + "\n")
    assert command(f"{line} resume=auto")[0] == 0
    assert (rows("s")[-1]["state"], rows("s")[-1]["steps"]) == ("done", expected["steps"])
    assert results("s")["test/loss"] == expected["metrics"]["test/loss"]
