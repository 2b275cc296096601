"""Our Trainer, from Python."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.optim import AdamW, Optimizer

import framework as fw
from benchmarks.contender import EPOCHS, LOG_EVERY, Job, Watch
from framework.data.dataset import Loader
from framework.runs.status_file import Status

# callbacks and loggers: those of the other contenders, and those of `framework train`
TYPICAL = (("progress", "checkpoint"), ("tensorboard",))
DEFAULT = (
    ("progress", "checkpoint", "non_finite", "gradient_norm", "health"),
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


Sources = tuple[Any, Any]
"""The sources of training and validation batches, as `Trainer.fit` accepts them."""


def as_on_command_line(job: Job, model: nn.Module, channels_last: bool | None = None) -> Sources:
    """Return loaders as `framework train` makes them; None selects the memory format by itself."""
    memory_format: Literal["auto"] | bool = "auto" if channels_last is None else channels_last

    def loader(split: str) -> Loader:
        return Loader(
            fw.TensorSplit(*job.tensors(split)),
            job.batch_size,
            4 * job.batch_size,
            channels_last=memory_format,
            shuffle=split == "train",
            model=model,
        )

    return loader("train"), loader("val")


def in_memory(job: Job, model: nn.Module) -> Sources:
    return fw.TensorSplit(*job.tensors("train")), fw.TensorSplit(*job.tensors("val"))


def dataloaders(job: Job, model: nn.Module) -> Sources:
    return job.loader("train"), job.loader("val")


def adamw_by_name(job: Job, model: nn.Module) -> Optimizer:
    optimizer: Optimizer = fw.optimizers.build("adamw", model.parameters(), lr=job.lr)
    return optimizer


def adamw(job: Job, model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=job.lr)


def eager(job: Job, watch: Watch) -> None:
    train(job, watch)


def as_by_default(job: Job, watch: Watch) -> None:
    train(job, watch, parts=DEFAULT, status=[Status()])


def compiled(job: Job, watch: Watch) -> None:
    train(job, watch, compile="step")


def graphed(job: Job, watch: Watch) -> None:
    train(job, watch, cuda_graph="on")


def channels_first(job: Job, watch: Watch) -> None:
    train(job, watch, sources=partial(as_on_command_line, channels_last=False))


def compile_auto(job: Job, watch: Watch) -> None:
    train(job, watch, compile="auto")


def dataloader_adamw(job: Job, watch: Watch) -> None:
    """Train with objects of the user: a DataLoader and `torch.optim.AdamW(...)`."""
    train(job, watch, sources=dataloaders, optimizer=adamw)


def in_memory_adamw(job: Job, watch: Watch) -> None:
    """Train as in README's Python example: data in memory and `torch.optim.AdamW(...)`."""
    train(job, watch, sources=in_memory, optimizer=adamw)


def in_memory_adamw_not_fused(job: Job, watch: Watch) -> None:
    train(job, watch, sources=in_memory, optimizer=adamw, fused=False)


def in_memory_by_name(job: Job, watch: Watch) -> None:
    """Train with data in memory and `fw.optimizers.build("adamw", ...)`."""
    train(job, watch, sources=in_memory)


def dataloader_channels_last(job: Job, watch: Watch) -> None:
    train(job, watch, sources=dataloaders, optimizer=adamw, channels_last="auto")


def by_name_channels_last(job: Job, watch: Watch) -> None:
    train(job, watch, sources=in_memory, channels_last="auto")


def train(
    job: Job,
    watch: Watch,
    parts: tuple[Sequence[str], Sequence[str]] = TYPICAL,
    status: Sequence[fw.Callback] = (),
    sources: Callable[[Job, nn.Module], Sources] = as_on_command_line,
    optimizer: Callable[[Job, nn.Module], Optimizer] = adamw_by_name,
    channels_last: Literal["auto"] | bool = False,
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
    data, val = sources(job, model)
    built = optimizer(job, model)
    watch.on(model, built)
    settings |= {"log_every": f"{LOG_EVERY}steps", "device": job.device, "folder": Path(job.folder)}
    trainer = fw.Trainer(max_epochs=EPOCHS, callbacks=callbacks, loggers=loggers, **settings)
    trainer.fit(
        model,
        data,
        val=val if job.typical else None,
        task=nn.CrossEntropyLoss(),
        optimizer=built,
        metrics=[fw.metrics.build("accuracy")] if job.typical else [],
        batch_size=job.batch_size,
        channels_last=channels_last,
    )
