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

TYPICAL = (
    ("progress", "checkpoint"),
    ("tensorboard",),
)  # callbacks and loggers: what the loops by hand and others have
DEFAULT = ("progress", "checkpoint", "non_finite", "gradient_norm"), ("tensorboard", "json_lines")


class RoundEnds(fw.Callback):
    """Tells the watch of the end of each epoch; the last of the callbacks, so that the others have done their part."""

    def __init__(self, watch: Watch):
        self.watch = watch

    def on_epoch_end(self, trainer: fw.Context) -> None:
        if (
            self.watch.round_ends
        ):  # what is still being written belongs to this round, not to whoever comes next
            for callback in trainer.callbacks:
                if isinstance(callback, fw.SavingCallback):
                    callback.finish_saving()
        self.watch.epoch_end()


def eager(job: Job, watch: Watch) -> None:
    train(job, watch)


def as_by_default(job: Job, watch: Watch) -> None:
    train(job, watch, besides=DEFAULT, status=[Status()])


def compiled(job: Job, watch: Watch) -> None:
    train(job, watch, compile="step")


def graphed(job: Job, watch: Watch) -> None:
    train(job, watch, cuda_graph="on")


def channels_first(job: Job, watch: Watch) -> None:
    train(job, watch, channels_last=False)


def train(
    job: Job,
    watch: Watch,
    besides: tuple[Sequence[str], Sequence[str]] = TYPICAL,
    status: Sequence[fw.Callback] = (),
    channels_last: Literal["auto"] | bool = "auto",
    **settings: Any,
) -> None:
    """Fit for as many epochs as the watch wants, with those callbacks and loggers if the mode is typical."""
    fw.discover()
    callbacks: list[fw.Callback] = [RoundEnds(watch)]
    loggers: Sequence[fw.Logger] = ()
    if job.typical:
        callbacks = [*(fw.callbacks.build(name) for name in besides[0]), *status, *callbacks]
        loggers = [fw.loggers.build(name) for name in besides[1]]
    model, size = job.model(), job.batch_size
    train, val = (
        Loader(
            fw.TensorSplit(*job.tensors(name)),
            *(size, 4 * size),
            channels_last=channels_last,
            shuffle=name == "train",
            model=model,
        )
        for name in ("train", "val")
    )
    settings |= {"log_every": f"{LOG_EVERY}steps", "device": job.device, "folder": Path(job.folder)}
    trainer = fw.Trainer(max_epochs=EPOCHS, callbacks=callbacks, loggers=loggers, **settings)
    parameters = list(model.parameters())
    fused = implementation(torch.optim.AdamW, parameters)  # as `framework train` chooses it
    optimizer = torch.optim.AdamW(parameters, lr=job.lr, fused=fused.get("fused"))
    watch.on(model, optimizer)
    trainer.fit(
        model,
        train,
        val=val if job.typical else None,
        task=torch.nn.CrossEntropyLoss(),
        optimizer=optimizer,
        metrics=[fw.metrics.build("accuracy")] if job.typical else [],
    )
