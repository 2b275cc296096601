"""Shared functions of the campaigns: composing runs, forking, and comparing the results of runs."""

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from framework.composition.compose import CommandLine, run_composed as compose
from framework.composition.spec import Spec
from framework.runs.checkpoint import listed, load

UNEQUAL = ("wall_seconds", "train/samples_per_second", "train/seconds_per_epoch")
UNEQUAL += ("train/communication", "train/waiting", "train/slowest_process")


def spec_of(overrides: list[str]) -> Spec:
    """Compose a run without starting it."""
    specs: list[Spec] = []
    compose(CommandLine(overrides), lambda job: specs.append(job.spec))
    return specs[0]


def fork(work: Callable[[], Any]) -> int:
    """Call a function in a forked process without stdout; return the id of the process."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setpgid(0, 0)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        work()
        status = 0
    except BaseException as error:
        print(f"  {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(status)


def status_of(child: int) -> int:
    """Wait for a process; return its exit status, or the negative number of a fatal signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def done(run: Path) -> bool:
    """Return whether a run is complete."""
    return json.loads((run / "status.json").read_text(encoding="utf-8"))["status"] == "done"


def differences(expected: Path, run: Path) -> Iterator[str]:
    """Yield the names of the parts in which two runs differ."""
    parts = {
        "weights": weights,
        "training state": training,
        "metrics": metrics,
        "board": board,
    }
    for name, read in parts.items():
        if read(expected) != read(run):
            yield f"other {name}"


def last(run: Path) -> Path:
    return listed(run / "checkpoints")[-1]


def weights(run: Path) -> str:
    return hashlib.sha256((last(run) / "model.safetensors").read_bytes()).hexdigest()


def training(run: Path) -> Any:
    return plain(load(last(run))[1])


def plain(value: Any) -> Any:
    """Return a state for a comparison with ==: tensors as bytes, without times."""
    if isinstance(value, torch.Tensor):
        content = value.reshape(-1).view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), content
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in UNEQUAL}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def metrics(run: Path) -> list[Any]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [plain(json.loads(line)) for line in lines]


def board(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # TensorBoard warns when it drops values of steps that a resumed run repeats
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    scalars = {}
    for tag in events.Tags()["scalars"]:
        if tag not in UNEQUAL:
            scalars[tag] = [(scalar.step, scalar.value) for scalar in events.Scalars(tag)]
    return scalars
