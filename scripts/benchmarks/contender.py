"""A contender: a process that trains with one framework, and stops its watch at the ends of rounds.

It is started with the names of its module and of its function, and reads JSON lines on stdin: a job, then for each
round "go", at last "stop". It answers each with a line. A round is some whole epochs of one long training, so that it
holds everything that an epoch costs, and nothing of what starting costs. Between rounds it waits, and others have the
machine.
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

EPOCHS = 10**6  # a training that never ends by itself
LOG_EVERY = 50  # steps


class Enough(Exception):
    """Ends a training at the end of an epoch."""


class Job(NamedTuple):
    """What to train, and what to do besides."""

    workload: str
    typical: (
        bool  # TensorBoard, accuracy, validation, checkpoints, a progress bar; else nothing of it
    )
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
        """Return the model; the same weights for every contender."""
        torch.manual_seed(0)
        return WORKLOADS[self.workload].model().to(self.device)

    def tensors(self, split: str) -> Tensors:
        return torch.load(self.data, weights_only=True)[split]

    def loader(self, split: str) -> DataLoader:
        """Return the loader that people write for tensors; of the training split it is shuffled."""
        training = split == "train"
        size, pinned = self.batch_size if training else 256, self.device != "cpu"
        return DataLoader(
            TensorDataset(*self.tensors(split)),
            batch_size=size,
            shuffle=training,
            pin_memory=pinned,
        )


class Watch:
    """Takes the time of rounds. `loss` says how good the training is so far, `updates` how many steps it made."""

    def __init__(self, job: Job, answers: IO[str]):
        self.job, self.answers = job, answers
        self.epochs, self.until, self.began = 0, job.warm_epochs, time.perf_counter()
        self.steps_before = 0
        self.loss: Callable[[], float] | None = None
        self.updates: Callable[[], int] | None = None

    def on(self, model: nn.Module, optimizer: Any) -> None:
        """Watch a torch model and its optimizer, which must be Adam's kind."""
        first = next(model.parameters())
        self.updates = lambda: (
            int(optimizer.state[first]["step"]) if first in optimizer.state else 0
        )
        self.loss = lambda: training_loss(model, self.job)

    @property
    def round_ends(self) -> bool:
        """Whether the epoch under way is the last of its round."""
        return self.epochs + 1 >= self.until

    def epoch_end(self) -> None:
        """Take note that an epoch, its validation and its checkpoint are done. Raises Enough after the last round."""
        self.epochs += 1
        if self.epochs < self.until:
            return
        if self.job.device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.began
        assert self.loss is not None and self.updates is not None  # noqa: PT018 (set together)
        updates = self.updates()
        answer(
            self.answers,
            seconds=seconds,
            steps=updates - self.steps_before,
            epochs=self.epochs,
            loss=self.loss(),
        )
        if json.loads(sys.stdin.readline() or '"stop"') != "go":
            raise Enough("no more rounds")  # fastai wants words in every exception
        self.until, self.steps_before = self.epochs + self.job.epochs_per_round, updates
        self.began = time.perf_counter()


def answer(answers: IO[str], **content: Any) -> None:
    print(json.dumps(content), file=answers, flush=True)


@torch.no_grad()
def training_loss(model: nn.Module, job: Job) -> float:
    """The mean loss on some training samples; modes and random numbers stay as they are."""
    inputs, targets = (tensor[:512].to(job.device) for tensor in job.tensors("train"))
    mode = model.training
    model.eval()
    loss = float(F.cross_entropy(model(inputs), targets))
    model.train(mode)
    return loss


def log_folder(job: Job) -> str:
    return str(Path(job.folder, "tensorboard"))


def main(module: str, function: str) -> None:
    """Serve jobs until stdin ends. What frameworks print goes to stderr; answers have stdout for themselves."""
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
            words = (str(error).strip() or "it says no more").splitlines()[0]
            traceback.print_exc()
            answer(answers, failed=f"{type(error).__name__}: {words}"[:300])
    os._exit(0)  # whatever threads a framework has left


if __name__ == "__main__":
    main(*sys.argv[1:])
