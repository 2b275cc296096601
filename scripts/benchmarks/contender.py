"""A contender: a process that trains with one framework and measures the time of rounds.

It is started with the names of its module and function, and reads JSON lines from stdin: a job,
then "go" for each round, and "stop" at the end. It answers each line with one line. A round
consists of complete epochs of one long training, so that it includes all costs of an epoch but
not the start-up. Between rounds the process waits while other contenders run.
"""

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.workloads import WORKLOADS, Tensors

EPOCHS = 10**6  # a training that does not end by itself
LOG_EVERY = 50  # steps


class Enough(Exception):
    """End a training after an epoch."""


class Job(NamedTuple):
    """A training task.

    Args:
        typical: Add TensorBoard, accuracy, validation, checkpoints and a progress bar.
    """

    workload: str
    typical: bool
    device: str
    folder: str
    data: str
    warm_epochs: int
    epochs_per_round: int

    @property
    def batch_size(self) -> int:
        return WORKLOADS[self.workload].batch_size

    @property
    def lr(self) -> float:
        return WORKLOADS[self.workload].lr

    def model(self) -> nn.Module:
        """Return the model, with the same weights for every contender."""
        torch.manual_seed(0)
        return WORKLOADS[self.workload].model().to(self.device)

    def tensors(self, split: str) -> Tensors:
        splits: dict[str, Tensors] = torch.load(self.data, weights_only=True)
        return splits[split]

    def loader(self, split: str) -> DataLoader[Any]:
        """Return the usual DataLoader for tensors; the training split is shuffled."""
        training = split == "train"
        return DataLoader(
            TensorDataset(*self.tensors(split)),
            batch_size=self.batch_size if training else 256,
            shuffle=training,
            pin_memory=self.device != "cpu",
        )


class Watch:
    """Measure the time of rounds.

    `updates` returns the number of steps so far, and `loss` the current training loss.
    """

    def __init__(self, job: Job, answers: IO[str]):
        self.job = job
        self.answers = answers
        self.epochs = 0
        self.until = job.warm_epochs
        self.steps_before = 0
        self.loss: Callable[[], float] | None = None
        self.updates: Callable[[], int] | None = None
        self._start()

    def on(self, model: nn.Module, optimizer: Any) -> None:
        """Watch a torch model and its optimizer; the optimizer must be a variant of Adam."""
        first = next(model.parameters())

        def updates() -> int:
            return int(optimizer.state[first]["step"]) if first in optimizer.state else 0

        self.updates = updates
        self.loss = lambda: training_loss(model, self.job)

    @property
    def round_ends(self) -> bool:
        """Whether the current epoch is the last of its round."""
        return self.epochs + 1 >= self.until

    def epoch_end(self) -> None:
        """Count an epoch after its validation and checkpoint.

        Raises:
            Enough: The last round has ended.
        """
        self.epochs += 1
        if self.epochs < self.until:
            return
        if self.job.device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.began
        cpu_seconds = time.process_time() - self.cpu_began
        assert self.loss is not None
        assert self.updates is not None
        updates = self.updates()
        answer(
            self.answers,
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            steps=updates - self.steps_before,
            epochs=self.epochs,
            peak_bytes=peak_bytes(),  # without the memory of the next line
            loss=self.loss(),
        )
        if json.loads(sys.stdin.readline() or '"stop"') != "go":
            raise Enough("no more rounds")  # fastai fails with an exception without text
        self.until = self.epochs + self.job.epochs_per_round
        self.steps_before = updates
        self._start()

    def _start(self) -> None:
        self.began = time.perf_counter()
        self.cpu_began = time.process_time()  # of all threads


def answer(answers: IO[str], **content: Any) -> None:
    print(json.dumps(content), file=answers, flush=True)


def peak_bytes() -> int | None:
    """Return the peak resident memory of this process; None on systems other than Linux.

    `resource.getrusage` is no alternative: it includes the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return None


@torch.no_grad()
def training_loss(model: nn.Module, job: Job) -> float:
    """Return the mean loss of 512 training samples; mode and random state do not change."""
    inputs, targets = job.tensors("train")
    mode = model.training
    model.eval()
    outputs = model(inputs[:512].to(job.device))
    loss = float(F.cross_entropy(outputs, targets[:512].to(job.device)))
    model.train(mode)
    return loss


def log_folder(job: Job) -> str:
    return str(Path(job.folder, "tensorboard"))


def main(module: str, function: str) -> None:
    """Run jobs until stdin ends; stdout has only the answers, other output goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    train: Callable[[Job, Watch], None] = getattr(importlib.import_module(module), function)
    for line in iter(sys.stdin.readline, ""):
        job = Job(**json.loads(line))
        try:
            train(job, Watch(job, answers))
        except Enough:
            answer(answers, done=True)
        except Exception as error:
            message = (str(error).strip() or "no message").splitlines()[0]
            traceback.print_exc()
            answer(answers, failed=f"{type(error).__name__}: {message}"[:300])
    os._exit(0)  # a framework may have left threads


if __name__ == "__main__":
    main(*sys.argv[1:])
