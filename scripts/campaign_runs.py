"""What the campaigns share: composing and starting runs, processes of their own, and comparing what came of runs."""

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


def spec_of(overrides: list[str]) -> Spec:
    """Compose a run without starting it."""
    specs: list[Spec] = []
    compose(CommandLine(overrides), lambda job: specs.append(job.spec))
    return specs[0]


def fork(work: Callable[[], Any]) -> int:
    """Do some work in a process of its own, and return its id; what it prints is dropped."""
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
    """Wait for a process and return its exit status; less than 0: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def done(run: Path) -> bool:
    """Whether a run has come to its end."""
    return json.loads((run / "status.json").read_text(encoding="utf-8"))["status"] == "done"


def differences(whole: Path, killed: Path) -> Iterator[str]:
    """Yield what differs between the two runs."""
    for what, read in {
        "weights": weights,
        "training state": training,
        "metrics": metrics,
        "board": board,
    }.items():
        if read(whole) != read(killed):
            yield f"other {what}"


def last(run: Path) -> Path:
    return listed(run / "checkpoints")[-1]


def weights(run: Path) -> str:
    return hashlib.sha256((last(run) / "model.safetensors").read_bytes()).hexdigest()


def training(run: Path) -> Any:
    return plain(load(last(run))[1])


def plain(value: Any) -> Any:
    """Return a state as something that == compares: tensors as bytes, times left out."""
    if isinstance(value, torch.Tensor):
        return (
            str(value.dtype),
            tuple(value.shape),
            value.reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in UNEQUAL}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def metrics(run: Path) -> list[Any]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [plain(json.loads(line)) for line in lines]


def board(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(
        logging.ERROR
    )  # that it drops what a resumed run made void is the point
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag not in UNEQUAL]
    return {tag: [(scalar.step, scalar.value) for scalar in events.Scalars(tag)] for tag in tags}
