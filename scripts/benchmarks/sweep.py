"""Trials per second of a complete `framework train -m`, for each launcher."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from itertools import product

from benchmarks.rounds import Failed, ratio, table, take_turns

LAUNCHERS = {
    "vectorized": ["hydra/launcher=vectorized"],
    "one by one": ["hydra/launcher=one_by_one"],
    "Hydra's basic": ["hydra/launcher=basic"],
    "joblib, 2 processes": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
}
# removed from the environment: a launcher selects its number of threads, and imports from caches
NOT_PASSED = ("OMP_NUM_THREADS", "PYTHONDONTWRITEBYTECODE")
MODELS = {
    "mlp": ["model.width=128", "model.depth=2"],
    "cnn": ["data.image=true", "model=cnn", "model.channels=[8, 16]"],
}


def sweep(models: Sequence[str], trials: Sequence[int], rounds: int, epochs: int) -> int:
    """Print a table of trials per second, and their ratios to Hydra's basic launcher."""
    launchers = dict(LAUNCHERS)
    if not has_joblib():
        del launchers["joblib, 2 processes"]
    rows = []
    for model, count in product(models, trials):
        parts = {
            name: partial(run, [*MODELS[model], *overrides], count, epochs)
            for name, overrides in launchers.items()
        }
        seconds = take_turns(parts, rounds, warm=0)
        for name, spent in seconds.items():
            per_second = count / sorted(spent)[len(spent) // 2]
            times_basic = ratio(seconds["Hydra's basic"], spent)
            title = f"{model}, {count} trials, {name}"
            rows.append([title, f"{per_second:.2f}", f"{times_basic:.2f}"])
            print(rows[-1], file=sys.stderr, flush=True)
    print(table([f"{epochs} epochs of digits each", "trials/s", "times basic"], rows))
    return 0


def has_joblib() -> bool:
    return (
        find_spec("hydra_plugins") is not None
        and find_spec("hydra_plugins.hydra_joblib_launcher") is not None
    )


def run(overrides: Sequence[str], trials: int, epochs: int) -> float:
    """Return the seconds of a sweep over two learning rates and `trials` / 2 seeds."""
    swept = ["optimizer.lr=1e-3,3e-3", f"seed=range({trials // 2})", f"trainer.max_epochs={epochs}"]
    command = [sys.executable, "-m", "framework", "train", "-m", *swept, *overrides]
    environment = os.environ | {"TERM": "dumb"}
    for name in NOT_PASSED:
        environment.pop(name, None)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0 or f"{trials}: done" not in done.stdout:
            raise Failed(f"{' '.join(command)}: {done.stdout[-300:]} {done.stderr[-300:]}")
        return time.perf_counter() - began
