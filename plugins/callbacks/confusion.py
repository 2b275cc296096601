"""A callback that shows which classes are taken for which."""

import torch
from torch import Tensor

from framework import (
    Callback,
    Context,
    Every,
    SettingError,
    callbacks,
    check_read_again,
    class_names,
)
from framework.contracts.state import Cadence

CELL = 16  # pixels


@callbacks.register("confusion", aliases=["confusion_matrix"])
class Confusion(Callback):
    """Shows the confusion matrix of the validation split: a row for each class, with what its samples are taken for.

    As a picture (white: all of the class; right is the diagonal) and as a table of counts. It reads the split anew.
    """

    changes_training = False

    def __init__(self, every: Every = "1epoch"):
        """Say how often.

        Args:
            every: how often.
        """
        self.cadence = Cadence(every)

    def on_fit_start(self, trainer: Context) -> None:
        if trainer.val_batches is not None:
            check_read_again(trainer.val_batches, "callbacks.confusion")

    def on_validation_end(self, trainer: Context) -> None:
        if self.cadence.due(trainer.state, epoch_end=trainer.state.batch == 0):
            counts = count_pairs(trainer)
            shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
            picture = shares.repeat_interleave(CELL, 0).repeat_interleave(CELL, 1)
            for logger in trainer.loggers:
                logger.images("confusion", picture[None, None], trainer.state.step)
                logger.text("confusion/counts", counts_table(counts, trainer), trainer.state.step)


@torch.no_grad()
def count_pairs(trainer: Context) -> Tensor:
    """Return how often a class (row) is taken for each class (column) in the validation split, float64 on the CPU.

    Raises SettingError when the targets are no classes.
    """
    counts = torch.zeros(0, 0, dtype=torch.float64)
    assert trainer.val_batches is not None
    with trainer.precision.inference(trainer.model):
        for batch in trainer.val_batches.epoch():
            step = trainer.task.step(
                trainer.model, tuple(part.to(trainer.device) for part in batch)
            )
            targets, outputs = step.targets.cpu(), step.outputs.cpu()
            if targets.is_floating_point() or targets.ndim != 1 or outputs.ndim != 2:
                raise SettingError(
                    "callbacks.confusion needs one class for each sample; this task has other targets"
                )
            classes = outputs.shape[1]
            known = targets >= 0
            pairs = targets[known] * classes + outputs.argmax(1)[known]
            new = pairs.bincount(minlength=classes**2).reshape(classes, classes)
            counts = new.double() if counts.numel() == 0 else counts + new
    return counts


def counts_table(counts: Tensor, trainer: Context) -> str:
    """Return the counts as a table in markdown, with the names of the classes where the run's folder keeps them."""
    found = class_names(trainer.folder)
    names = found if len(found) == len(counts) else [str(index) for index in range(len(counts))]
    head = [f"| is \\ taken for | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    rows = zip(names, counts.long().tolist(), strict=True)
    return "\n".join([*head, *(f"| {name} | {' | '.join(map(str, row))} |" for name, row in rows)])
