"""The same command line with Hydra's launchers: processes of this machine, jobs of a cluster."""

import importlib.util
import os
import signal
from pathlib import Path

import pytest

from framework.cli import main
from framework.runs.checkpoint import newest
from framework.tuning.search.study import storage_in
from framework.tuning.sweep.folder import SweepFolder
from runs import logged
from sweeps import rows

QUICK = ["trainer.max_steps=4", "model.width=8", "loggers=json_lines", "callbacks=[checkpoint]"]
SEARCH = [
    "hydra/sweeper=optuna",
    "hydra.sweeper.trials=2",
    "hydra.sweeper.parallel=2",
    "hydra.sweeper.seed=3",
]
LAUNCHERS = {
    "joblib": ("hydra_plugins.hydra_joblib_launcher", ["hydra.launcher.n_jobs=2"]),
    "submitit_local": (
        "hydra_plugins.hydra_submitit_launcher",
        ["hydra.launcher.submitit_folder=jobs", "hydra.sweeper.trials=1"],
    ),
    "ray": (
        "hydra_plugins.hydra_ray_launcher",
        ["+hydra.launcher.ray.init.num_cpus=2", "+hydra.launcher.ray.init.include_dashboard=false"],
    ),
}


@pytest.fixture(params=LAUNCHERS)
def launcher(request, tmp_path, monkeypatch):
    package, settings = LAUNCHERS[request.param]
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        found = None
    if found is None or (request.param == "ray" and importlib.util.find_spec("ray") is None):
        pytest.skip(f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    storage_in.cache_clear()
    return [f"hydra/launcher={request.param}", *settings]


def search(name, *overrides):
    space = ["optimizer.lr=tag(log, interval(1e-3, 1e-1))", f"sweep.name={name}"]
    main.run(["train", "-m", *QUICK, *SEARCH, *space, *overrides])
    return SweepFolder(Path("runs/default") / name)


def test_a_search_with_a_launcher_finds_what_it_finds_alone(launcher, capsys):
    away = search("away", *launcher)
    storage_in.cache_clear()
    here = search("here", f"hydra.sweeper.trials={len(away.trials())}")
    assert [trial.state for trial in away.trials()] == ["done"] * len(here.trials())
    assert [trial.settings for trial in away.trials()] == [
        trial.settings for trial in here.trials()
    ]
    assert [t.metrics["val/loss"] for t in away.trials()] == [
        t.metrics["val/loss"] for t in here.trials()
    ]
    assert all((away.path / trial.folder / "config.yaml").is_file() for trial in away.trials())


PLUGIN = """\
import os
from framework import Callback, callbacks

@callbacks.register("preempted")
class Preempted(Callback):
    changes_training = False

    def on_step_end(self, trainer):
        step, number = map(int, open("signals").readline().split() or (0, 0))
        if trainer.seed == 1 and trainer.state.step == step:
            later = open("signals").readlines()[1:]
            open("signals", "w").writelines(later)
            if number == 15:
                open("queued_again_1", "w")  # SLURM sees to that itself
            os.kill(os.getpid(), number)
"""
TRIALS = f"train --plugins preempted.py {' '.join(QUICK)} -m seed=0,1 trainer.max_steps=10 +callbacks=preempted"
TRIALS += " data=blobs callbacks.checkpoint.every=4steps callbacks.checkpoint.background=false"
LOCAL = "hydra/launcher=submitit_local hydra.launcher.submitit_folder=jobs hydra.sweeper.max_batch_size=1"
SLURM = {  # as much of it as submitit calls: an array of two jobs, which are queued again where a file says so
    "sbatch": """
        cp "$1" job.sh
        export SLURM_ARRAY_JOB_ID=$$
        for task in 0 1; do
            export SLURM_JOB_ID=$(($$ + task)) SLURM_ARRAY_TASK_ID=$task
            until rm -f queued_again_$task; bash job.sh; [ ! -e queued_again_$task ]; do :; done
            echo "$$_$task|COMPLETED|here" >> ended
        done > log 2>&1 &
        echo Submitted batch job $$""",
    "srun": """shift 5; exec "$@" """,  # --unbuffered --output FILE --error FILE
    "scontrol": "touch queued_again_${2#*_}",  # requeue JOB_TASK
    "sacct": "echo 'JobID|State|NodeList'; cat ended",
}


@pytest.fixture
def preempting(command, tmp_path, forget_plugins):
    """Run a sweep in which seed 1 gets signals, by the step after which they come; returns as `command` does."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    (tmp_path / "preempted.py").write_text(PLUGIN)
    (tmp_path / "signals").touch()
    assert command(f"{TRIALS} sweep.name=whole")[0] == 0

    def run(launcher, signals):
        Path("signals").write_text(
            "".join(f"{step} {number.value}\n" for step, number in signals.items())
        )
        ended = command(f"{TRIALS} sweep.name=cut {launcher}")
        assert Path("signals").read_text() == ""
        return ended

    return run


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """SLURM's commands, played by scripts; returns the launcher."""
    (tmp_path / "bin").mkdir()
    for name, script in SLURM.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return "hydra/launcher=submitit_slurm hydra.launcher.submitit_folder=jobs/%j hydra.launcher.max_num_timeout=1"


def states():
    """How it went with seed 1."""
    return [row["state"] for row in rows("cut") if row["number"] == 1]


def weights(name):
    """Those that seed 1 has come to."""
    return (
        newest(Path(f"runs/default/{name}/001_seed-1/checkpoints"))[0] / "model.safetensors"
    ).read_bytes()


def run(name):
    return Path(f"runs/default/{name}/001_seed-1")


def said():
    return (run("cut") / "output.txt").read_text()


def test_a_preempted_job_goes_on_with_its_run(preempting):
    """submitit queues it again at SIGUSR2, and nobody said resume=auto."""
    status, out, _ = preempting(LOCAL, {6: signal.SIGUSR2})
    assert status == 0
    assert said() == "going on with runs/default/cut/001_seed-1 after step 6\n"
    assert states() == ["running", "stopped", "running", "done"]
    assert "trials   2: done; 20 steps" in out
    assert weights("cut") == weights("whole")
    assert logged(run("cut")) == logged(run("whole"))


def test_a_job_that_is_told_to_end_saves_and_the_same_command_goes_on(preempting, command):
    status, out, _ = preempting(LOCAL, {6: signal.SIGTERM})
    assert status == 128 + signal.SIGTERM
    assert "trials   2: 1 done, 1 stopped; 16 steps" in out
    status, out, _ = command(f"{TRIALS} sweep.name=cut resume=auto")
    assert status == 0
    assert said().splitlines()[-1] == "going on with runs/default/cut/001_seed-1 after step 6"
    assert weights("cut") == weights("whole")
    assert logged(run("cut")) == logged(run("whole"))


def test_a_job_of_slurm_goes_on_when_its_time_is_up_and_when_its_machine_is_taken(
    preempting, slurm
):
    """At SIGUSR2 submitit queues it again; SIGTERM says that SLURM does."""
    status, out, _ = preempting(slurm, {6: signal.SIGUSR2, 8: signal.SIGTERM})
    assert status == 0, Path("log").read_text()
    assert said().splitlines() == [
        f"going on with runs/default/cut/001_seed-1 after step {step}" for step in (6, 8)
    ]
    assert states() == [*["running", "stopped"] * 2, "running", "done"]
    assert "trials   2: done; 20 steps" in out
    assert weights("cut") == weights("whole")
    assert logged(run("cut")) == logged(run("whole"))
