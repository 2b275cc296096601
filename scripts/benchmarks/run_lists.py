"""Lists of runs: `framework runs` and `framework best` on thousands of synthetic run folders."""

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.rounds import table
from framework.composition.compose import CommandLine, Job, run_composed
from framework.runs.folder import dump
from framework.runs.overview.run_index import INDEX

TRIALS = 10  # of each sweep; half of the runs belong to sweeps
VALIDATIONS = 30  # rows of val/... in each metrics.jsonl, and as many of train/...
BEGAN = 1_700_000_000


def time_lists(rounds: int, runs: int) -> int:
    """Print the time of the commands on the runs, without and with an index.

    Args:
        rounds: number of measurements with an index.
        runs: number of run folders.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "runs")
        write_runs(root, runs)
        framework = [sys.executable, "-m", "framework"]
        trials = sorted((root / "default" / "sweep0000").glob("*_seed-*"))[:2]
        where = "optimizer=adamw and val/accuracy>0.9"
        commands = {
            "framework --version": ["--version"],
            "framework runs": ["runs"],
            "framework runs --where ... --sort val/loss": [
                "runs",
                "--where",
                where,
                "--sort",
                "val/loss",
            ],
            "framework runs --expand --json": ["runs", "--expand", "--json"],
            "framework best": ["best"],
            "framework diff of two trials": ["diff", *map(str, trials)],
        }
        cold = seconds([*framework, "runs"], folder)
        index_bytes = (root / INDEX).stat().st_size
        parts: dict[str, Callable[[], Times]] = {}
        for name, words in commands.items():
            parts[name] = partial(seconds, [*framework, *words], folder)
        times = [(name, [part() for _ in range(rounds)]) for name, part in parts.items()]
    rows = [["framework runs, without an index", *texts([cold])]]
    rows += [[name, *texts(measured)] for name, measured in times]
    print(f"{runs:,} runs, half of them in sweeps of {TRIALS}; the index has {index_bytes:,} bytes")
    print(table(["from process start", "s", "least to most", "CPU s"], rows))
    return 0


class Times(NamedTuple):
    """The time of a command in seconds, and the CPU time of its process."""

    wall: float
    cpu: float


def texts(measured: list[Times]) -> list[str]:
    """Return the median, the range, and the median of the CPU time, as cells of the table."""
    walls = [times.wall for times in measured]
    spread = f"{min(walls):.2f} to {max(walls):.2f}"
    return [f"{median(walls):.2f}", spread, f"{median(times.cpu for times in measured):.2f}"]


def seconds(command: list[str], folder: str) -> Times:
    """Return the time of a command, whose output goes to a file."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        subprocess.run(command, cwd=folder, stdout=output, stderr=subprocess.DEVNULL, check=True)
        wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    user = after.ru_utime - before.ru_utime
    return Times(wall, user + after.ru_stime - before.ru_stime)


def write_runs(root: Path, runs: int) -> None:
    """Write run folders with the files of real runs, but without checkpoints."""
    rng = random.Random(0)
    trees: list[Job] = []
    run_composed(CommandLine(), trees.append)
    tree = trees[0].spec.tree
    for number in range(runs):
        tree["optimizer"]["lr"] = rng.choice([1e-4, 3e-4, 1e-3, 3e-3])
        tree["model"]["width"] = rng.choice([64, 128, 256])
        tree["optimizer"]["weight_decay"] = rng.choice([0.0, 0.01, 0.1])
        tree["seed"] = number
        in_sweep = number < runs // 2
        sweep = root / f"experiment{number % 7}"
        path = sweep / f"run{number:05}"
        if in_sweep:
            sweep = root / "default" / f"sweep{number // TRIALS:04}"
            path = sweep / f"{number % TRIALS:03}_seed-{number}"
            if number % TRIALS == 0:
                write_sweep(sweep)
        write_run(path, tree, rng, number)
        if in_sweep:
            row = {"number": number % TRIALS, "settings": {"seed": number}, "folder": path.name}
            with open(sweep / "sweep.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({**row, "state": "done", "metrics": {}}) + "\n")


def write_sweep(sweep: Path) -> None:
    """Write the request of a sweep."""
    sweep.mkdir(parents=True)
    request = {"command": ["seed=range(10)"], "swept": ["seed"], "by": {"val/loss": "min"}}
    (sweep / "sweep.json").write_text(json.dumps(request), encoding="utf-8")


def write_run(path: Path, tree: dict[str, object], rng: random.Random, number: int) -> None:
    """Write a run folder."""
    (path / "checkpoints").mkdir(parents=True)
    (path / "config.yaml").write_text(dump("config.yaml", tree), encoding="utf-8")
    (path / "overrides.yaml").write_text(f"- seed={number}\n", encoding="utf-8")
    began = time.strftime("%Y-%m-%dT%H:%M:%S+0000", time.gmtime(BEGAN + 60 * number))
    directions = {"loss": "min", "accuracy": "max"}
    provenance = {"time": began, "git_commit": None, "parts": {}, "directions": directions}
    (path / "provenance.json").write_text(json.dumps(provenance), encoding="utf-8")
    loss = 1.0
    lines = []
    for epoch in range(1, VALIDATIONS + 1):
        loss *= rng.uniform(0.8, 1.05)
        row = {"step": 40 * epoch, "epoch": epoch, "wall_seconds": epoch * 0.3}
        rate = {"train/learning_rate": 1e-3, "train/samples_per_second": 6000 * rng.random()}
        lines.append({**row, "train/loss": loss, "train/accuracy": 1 - loss / 3, **rate})
        lines.append({**row, "val/loss": loss * 1.1, "val/accuracy": 1 - loss / 2.5})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (path / "metrics.jsonl").write_text(text, encoding="utf-8")
    status: dict[str, object] = {"status": "done", "reason": None, "step": 40 * VALIDATIONS}
    status |= {"processes": 1, "total_steps": 40 * VALIDATIONS, "wall_seconds": VALIDATIONS * 0.3}
    (path / "status.json").write_text(json.dumps(status).ljust(1023) + "\n", encoding="utf-8")
