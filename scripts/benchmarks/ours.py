"""Our Trainer, from Python."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

import framework as fw
from benchmarks.contender import EPOCHS, LOG_EVERY, Job, Watch
from framework.contracts.optimizer import implementation
from framework.data.dataset import Loader
from framework.runs.status_file import Status

# callbacks and loggers: those of the other contenders, and those of `framework train`
TYPICAL = (("progress", "checkpoint"), ("tensorboard",))
DEFAULT = (
    ("progress", "checkpoint", "non_finite", "gradient_norm"),
    ("tensorboard", "json_lines"),
)


class RoundEnds(fw.Callback):
    """Report the end of each epoch to the watch; must be the last callback."""

    def __init__(self, watch: Watch):
        self.watch = watch

    def on_epoch_end(self, trainer: fw.Context) -> None:
        if self.watch.round_ends:  # a checkpoint's background write belongs to this round
            for callback in trainer.callbacks:
                if isinstance(callback, fw.SavingCallback):
                    callback.finish_saving()
        self.watch.epoch_end()


def eager(job: Job, watch: Watch) -> None:
    train(job, watch)


def as_by_default(job: Job, watch: Watch) -> None:
    train(job, watch, parts=DEFAULT, status=[Status()])


def compiled(job: Job, watch: Watch) -> None:
    train(job, watch, compile="step")


def graphed(job: Job, watch: Watch) -> None:
    train(job, watch, cuda_graph="on")


def channels_first(job: Job, watch: Watch) -> None:
    train(job, watch, channels_last=False)


def train(
    job: Job,
    watch: Watch,
    parts: tuple[Sequence[str], Sequence[str]] = TYPICAL,
    status: Sequence[fw.Callback] = (),
    channels_last: Literal["auto"] | bool = "auto",
    **settings: Any,
) -> None:
    """Train until the watch ends it; in the typical mode with the named callbacks and loggers."""
    fw.discover()
    callbacks: list[fw.Callback] = []
    loggers: list[fw.Logger] = []
    if job.typical:
        callback_names, logger_names = parts
        callbacks += [fw.callbacks.build(name) for name in callback_names]
        callbacks += status
        loggers += [fw.loggers.build(name) for name in logger_names]
    callbacks.append(RoundEnds(watch))
    model = job.model()

    def loader(split: str) -> Loader:
        return Loader(
            fw.TensorSplit(*job.tensors(split)),
            job.batch_size,
            4 * job.batch_size,
            channels_last=channels_last,
            shuffle=split == "train",
            model=model,
        )

    settings |= {"log_every": f"{LOG_EVERY}steps", "device": job.device, "folder": Path(job.folder)}
    trainer = fw.Trainer(max_epochs=EPOCHS, callbacks=callbacks, loggers=loggers, **settings)
    parameters = list(model.parameters())
    fused = implementation(torch.optim.AdamW, parameters)  # as in `framework train`
    optimizer = torch.optim.AdamW(parameters, lr=job.lr, fused=fused.get("fused"))
    watch.on(model, optimizer)
    trainer.fit(
        model,
        loader("train"),
        val=loader("val") if job.typical else None,
        task=torch.nn.CrossEntropyLoss(),
        optimizer=optimizer,
        metrics=[fw.metrics.build("accuracy")] if job.typical else [],
    )
