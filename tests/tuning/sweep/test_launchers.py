"""Sweeps with Hydra's launchers: processes on this machine, jobs of a cluster."""

import fcntl
import importlib.util
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from framework.cli import main
from framework.runs.checkpoint import newest
from framework.tuning.search.study import cached_storage
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
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        spec = None
    if spec is None or (request.param == "ray" and importlib.util.find_spec("ray") is None):
        pytest.skip(f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    cached_storage.cache_clear()
    return [f"hydra/launcher={request.param}", *settings]


def search(name, *overrides):
    space = ["optimizer.lr=tag(log, interval(1e-3, 1e-1))", f"sweep.name={name}"]
    main.run(["train", "-m", *QUICK, *SEARCH, *space, *overrides])
    return SweepFolder(Path("runs/default") / name)


def test_a_search_with_a_launcher_gives_the_same_trials(launcher, capsys):
    folder = search("launched", *launcher)
    trials = folder.trials()
    cached_storage.cache_clear()
    expected = search("local", f"hydra.sweeper.trials={len(trials)}").trials()
    for trial, local in zip(trials, expected, strict=True):
        assert trial.state == "done"
        assert trial.settings == local.settings
        assert trial.metrics["val/loss"] == local.metrics["val/loss"]
        assert (folder.path / trial.folder / "config.yaml").is_file()


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
                open("queued_again_1", "w")  # SLURM does this itself
            os.kill(os.getpid(), number)
"""
TRIALS = f"train --plugins preempted.py {' '.join(QUICK)} -m seed=0,1 trainer.max_steps=10"
TRIALS += " +callbacks=preempted data=blobs callbacks.checkpoint.every=4steps"
TRIALS += " callbacks.checkpoint.background=false"
LOCAL = "hydra/launcher=submitit_local hydra.launcher.submitit_folder=jobs"
LOCAL += " hydra.sweeper.max_batch_size=1"
SLURM = {  # the commands that submitit calls, for two jobs, which a file queues again
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
    """Return a function that runs a sweep in which seed 1 gets signals after some steps."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    (tmp_path / "preempted.py").write_text(PLUGIN)
    (tmp_path / "signals").touch()
    assert command(f"{TRIALS} sweep.name=uninterrupted")[0] == 0

    def run(launcher, signals):
        lines = [f"{step} {number.value}\n" for step, number in signals.items()]
        Path("signals").write_text("".join(lines))
        result = command(f"{TRIALS} sweep.name=preempted {launcher}")
        assert Path("signals").read_text() == ""
        return result

    return run


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Replace the commands of SLURM by scripts; return the overrides for the launcher."""
    (tmp_path / "bin").mkdir()
    for name, script in SLURM.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    launcher = "hydra/launcher=submitit_slurm hydra.launcher.submitit_folder=jobs/%j"
    return f"{launcher} hydra.launcher.max_num_timeout=1"


def states():
    """Return the states of the preempted trial, in order."""
    return [row["state"] for row in rows("preempted") if row["number"] == 1]


def run(name):
    return Path(f"runs/default/{name}/001_seed-1")


def weights(name):
    return (newest(run(name) / "checkpoints")[0] / "model.safetensors").read_bytes()


def printed():
    return (run("preempted") / "output.txt").read_text().splitlines()


def assert_same_run():
    """Check that the preempted trial gives the result of an uninterrupted one."""
    assert weights("preempted") == weights("uninterrupted")
    assert logged(run("preempted")) == logged(run("uninterrupted"))


RESUMED = "resuming runs/default/preempted/001_seed-1 after step"


def test_a_preempted_job_resumes_its_run(preempting):
    """submitit queues it again at SIGUSR2, without resume=auto."""
    status, out, _ = preempting(LOCAL, {6: signal.SIGUSR2})
    assert status == 0
    assert printed() == [f"{RESUMED} 6"]
    assert states() == ["running", "stopped", "running", "done"]
    assert "trials   2: done; 20 steps" in out
    assert_same_run()


def test_a_terminated_job_saves_and_the_same_command_resumes_it(preempting, command):
    status, out, _ = preempting(LOCAL, {6: signal.SIGTERM})
    assert status == 128 + signal.SIGTERM
    assert "trials   2: 1 done, 1 stopped; 16 steps" in out
    status, out, _ = command(f"{TRIALS} sweep.name=preempted resume=auto")
    assert status == 0
    assert printed()[-1] == f"{RESUMED} 6"
    assert_same_run()


def test_a_slurm_job_resumes_after_a_timeout_and_after_a_preemption(preempting, slurm):
    """At SIGUSR2 submitit queues it again, at SIGTERM SLURM does."""
    status, out, _ = preempting(slurm, {6: signal.SIGUSR2, 8: signal.SIGTERM})
    assert status == 0, Path("log").read_text()
    assert printed() == [f"{RESUMED} 6", f"{RESUMED} 8"]
    assert states() == ["running", "stopped", "running", "stopped", "running", "done"]
    assert "trials   2: done; 20 steps" in out
    assert_same_run()


def test_a_job_waits_for_the_job_of_a_killed_command(command, tmp_path):
    """The jobs of a killed command continue; the same command does not run their trials again."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    trials = f"train {' '.join(QUICK)} data=blobs -m seed=0,1 sweep.name=killed"
    assert command(trials)[0] == 0
    before = rows("killed")
    file = Path("runs/default/killed/sweep.jsonl")
    *running, done = file.read_text().splitlines(keepends=True)
    file.write_text("".join(running))
    with (run("killed") / ".lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        job = threading.Thread(target=end_job, args=(lock, file, done))
        job.start()
        status, out, _ = command(f"{trials} resume=auto {LOCAL}")
        job.join()
    assert status == 0, out
    assert rows("killed") == before


LOST = """\
import os, signal, time
from pathlib import Path
from framework import Callback, callbacks

@callbacks.register("lost")
class Lost(Callback):
    changes_training = False

    def on_step_end(self, trainer):
        if trainer.state.step != 1:
            return
        running = Path("running")
        if trainer.folder.name.startswith("001"):
            running.touch()
            time.sleep(6)
        else:
            while not running.exists():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_search_waits_for_the_other_jobs_if_one_is_lost(
    command, tmp_path, monkeypatch, forget_plugins
):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    monkeypatch.setattr("submitit.core.core.Job._results_timeout_s", 0)
    (tmp_path / "lost.py").write_text(LOST)
    line = f"train --plugins lost.py {' '.join(QUICK)} data=blobs +callbacks=lost -m"
    search = f"{' '.join(SEARCH)} optimizer.lr=interval(1e-3,1e-1) sweep.name=lost"
    status, _, _ = command(f"{line} {search} {LOCAL.partition(' hydra.sweeper')[0]}")
    assert status == 1
    ended = [(row["number"], row["state"]) for row in rows("lost") if row["state"] != "running"]
    assert ended == [(1, "done"), (0, "failed")]


def end_job(lock, file, done):
    """Record the end of a trial and unlock its run, as soon as another job waits for it."""
    deadline = time.monotonic() + 60
    while not any("waiting" in log.read_text() for log in Path("jobs").glob("*.out")):
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    with file.open("a") as rows:
        rows.write(done)
    lock.close()
