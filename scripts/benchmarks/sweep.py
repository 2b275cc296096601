"""Trials per second, end to end: a whole `framework train -m`, by launcher."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec

from benchmarks.rounds import Failed, ratio, table

LAUNCHERS = {
    "vectorized": ["hydra/launcher=vectorized"],
    "one by one": ["hydra/launcher=one_by_one"],
    "Hydra's basic": ["hydra/launcher=basic"],
    "joblib, 2 processes": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
}
NOT_OURS = (
    "OMP_NUM_THREADS",
    "PYTHONDONTWRITEBYTECODE",
)  # each takes as many threads as suit it, and starts as usual
MODELS = {
    "mlp": ["model.width=128", "model.depth=2"],
    "cnn": ["data.image=true", "model=cnn", "model.channels=[8, 16]"],
}


def sweep(models: Sequence[str], trials: Sequence[int], rounds: int, epochs: int) -> int:
    """Print a table of trials per second, and how many times as many as with Hydra's basic launcher."""
    chosen = {
        name: more for name, more in LAUNCHERS.items() if "joblib" not in name or has_joblib()
    }
    rows = []
    for model in models:
        for count in trials:
            seconds: dict[str, list[float]] = {name: [] for name in chosen}
            for _ in range(rounds):
                for name, more in chosen.items():
                    seconds[name].append(run([*MODELS[model], *more], count, epochs))
            basic = seconds["Hydra's basic"]
            for name, spent in seconds.items():
                per_second = count / sorted(spent)[len(spent) // 2]
                rows.append(
                    [
                        f"{model}, {count} trials, {name}",
                        f"{per_second:.2f}",
                        f"{ratio(basic, spent):.2f}",
                    ]
                )
                print(rows[-1], file=sys.stderr, flush=True)
    print(table([f"{epochs} epochs of digits each", "trials/s", "times basic"], rows))
    return 0


def has_joblib() -> bool:
    return (
        find_spec("hydra_plugins") is not None
        and find_spec("hydra_plugins.hydra_joblib_launcher") is not None
    )


def run(overrides: Sequence[str], trials: int, epochs: int) -> float:
    """Return the seconds of a sweep over two learning rates and as many seeds as it takes."""
    swept = ["optimizer.lr=1e-3,3e-3", f"seed=range({trials // 2})", f"trainer.max_epochs={epochs}"]
    command = [sys.executable, "-m", "framework", "train", "-m", *swept, *overrides]
    free = {name: value for name, value in os.environ.items() if name not in NOT_OURS}
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        done = subprocess.run(
            command, cwd=folder, env=free | {"TERM": "dumb"}, capture_output=True, text=True
        )
        if done.returncode != 0 or f"{trials}: done" not in done.stdout:
            raise Failed(f"{' '.join(command)}: {done.stdout[-300:]} {done.stderr[-300:]}")
        return time.perf_counter() - began
