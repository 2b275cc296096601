"""A sweep and other processes: killed, spread over several, and run twice at once."""

import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from framework.errors import RunError
from framework.runs.checkpoint import newest, read_manifest
from framework.tuning.sweep.folder import SweepFolder, Trial
from sweeps import rows, table_of

QUICK = "model.width=8 model.depth=1 trainer.max_steps=4 callbacks=[checkpoint] loggers=[json_lines] data=blobs"
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
    """Run a command beside the plugin."""
    (tmp_path / "killed.py").write_text(PLUGIN)
    return command


def results(name):
    """What the last trial came to, speed apart."""
    return {
        key: value
        for key, value in rows(name)[-1]["metrics"].items()
        if not key.endswith("per_second")
    }


def test_a_killed_sweep_comes_to_what_it_would_have_come_to(command):
    """The trial under way at the kill goes on from its checkpoint, to the same bits."""
    line = f"train --plugins killed.py {QUICK} +callbacks=killed -m seed=0,1"
    line += " callbacks.checkpoint.every=1steps callbacks.checkpoint.background=false"
    assert command(f"{line} sweep.name=whole")[0] == 0
    Path("kill").touch()
    killed = [sys.executable, "-m", "framework", *shlex.split(f"{line} sweep.name=cut")]
    assert (
        subprocess.run(killed, stdout=subprocess.DEVNULL, check=False).returncode == -signal.SIGKILL
    )
    assert [row["state"] for row in rows("cut")] == ["running", "done", "running"]
    os.remove("kill")
    status, out, _ = command(f"{line} sweep.name=cut resume=auto")
    assert status == 0
    assert "of which 1 trials are done\n001 seed=1" in out
    assert "after step 3" in Path("runs/default/cut/001_seed-1/output.txt").read_text()
    weights = [
        sums(Path(f"runs/default/{name}/001_seed-1/checkpoints")) for name in ("whole", "cut")
    ]
    assert weights[0] == weights[1]
    assert results("cut") == results("whole")


def sums(checkpoints):
    return read_manifest(newest(checkpoints)[0])["files"]["model.safetensors"]


def test_joblib_gives_the_same_trials(command):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    line = f"train --plugins killed.py {QUICK} -m optimizer.lr=1e-3,1e-1 seed=0,1"
    one = table_of(command(f"{line} sweep.name=one")[1])
    status, out, _ = command(f"{line} sweep.name=two hydra/launcher=joblib hydra.launcher.n_jobs=2")
    assert status == 0
    assert table_of(out) == one
    assert len({row["number"] for row in rows("two")}) == 4
    assert SweepFolder(Path("runs/default/two")).asked()["swept"] == ["optimizer.lr", "seed"]


def record(folder, first):
    for number in range(first, first + 50):
        SweepFolder(folder).record(Trial(number, {"seed": number}))
        SweepFolder(folder).record(
            Trial(number, {"seed": number}, state="done", metrics={"val/loss": float("nan")})
        )


def test_processes_record_at_once_and_a_torn_row_is_no_row(tmp_path):
    writers = [
        multiprocessing.get_context("fork").Process(target=record, args=(tmp_path, 50 * n))
        for n in range(4)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    folder = SweepFolder(tmp_path)
    assert [(trial.number, trial.state) for trial in folder.trials()] == [
        (n, "done") for n in range(200)
    ]
    with (tmp_path / "sweep.jsonl").open("a") as file:
        file.write('{"number": 3, "settings": {"se')
    assert len(folder.trials()) == 200
    folder.record(Trial(200, {}, state="pruned"))
    assert [trial.state for trial in folder.trials()[-2:]] == ["done", "pruned"]
    assert [trial.state for trial in SweepFolder(tmp_path).trials()[-2:]] == ["done", "pruned"]


def test_a_sweep_is_run_by_one_process(tmp_path):
    folder = SweepFolder.claim(tmp_path, "default", "s", {})
    folder.conduct()
    with pytest.raises(RunError, match="is run by another process"):
        SweepFolder(folder.path).conduct()
    for name in ("../s", ".s", "a/b", ""):
        with pytest.raises(RunError, match=r"sweep\.name should be"):
            SweepFolder.claim(tmp_path, "default", name, {})


def test_a_single_run_imports_nothing_of_sweeps(tmp_path):
    program = "import sys, framework.cli.main, framework.composition.compose; print(*sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    ours = {name for name in found if name.startswith("framework.tuning.")}
    assert ours == {"framework.tuning.sections"}


def test_a_trial_that_was_done_when_the_sweep_was_killed_has_its_steps(command):
    """The kill comes after the run's last file, and before the row of the sweep."""
    line = f"train {QUICK} -m seed=0,1 sweep.name=s"
    assert command(line)[0] == 0
    file = Path("runs/default/s/sweep.jsonl")
    whole = rows("s")[-1]
    file.write_text("\n".join(file.read_text().splitlines()[:-1]) + "\n")
    assert command(f"{line} resume=auto")[0] == 0
    assert (rows("s")[-1]["state"], rows("s")[-1]["steps"]) == ("done", whole["steps"])
    assert results("s")["test/loss"] == whole["metrics"]["test/loss"]
