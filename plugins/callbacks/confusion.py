"""A callback that shows the confusion matrix."""

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
    dtensors,
    move_batch,
    with_stand_ins,
)
from framework.contracts.state import Cadence

CELL = 16  # pixels


@callbacks.register("confusion", aliases=["confusion_matrix"])
class Confusion(Callback):
    """Shows the confusion matrix of the validation split.

    Rows are true classes, columns predicted classes. The loggers get it as an image
    (white: all samples of the class; the diagonal is correct) and as a table of counts. It reads
    the split a second time.

    Args:
        every: how often to show it.
    """

    changes_training = False

    def __init__(self, every: Every = "1epoch"):
        self.cadence = Cadence(every)

    def on_fit_start(self, trainer: Context) -> None:
        if trainer.val_batches is not None:
            check_read_again(trainer.val_batches, "callbacks.confusion")

    def on_validation_end(self, trainer: Context) -> None:
        state = trainer.state
        if not self.cadence.due(state, epoch_end=state.batch == 0):
            return
        counts = count_pairs(trainer)
        shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
        image = shares.repeat_interleave(CELL, 0).repeat_interleave(CELL, 1)
        table = counts_table(counts, trainer)
        for logger in trainer.loggers:
            logger.images("confusion", image[None, None], state.step)
            logger.text("confusion/counts", table, state.step)


@torch.no_grad()
def count_pairs(trainer: Context) -> Tensor:
    """Count the pairs of true class (row) and predicted class (column) in the validation split.

    Returns:
        The counts, shape (classes, classes), float64 on the CPU.

    Raises:
        SettingError: the targets are no classes.
    """
    counts = torch.zeros(0, 0, dtype=torch.float64)
    assert trainer.val_batches is not None
    with trainer.precision.inference(trainer.model):
        all_run = dtensors.has_dtensors(trainer.model)
        for batch, counted in with_stand_ins(trainer.val_batches.epoch(), all_run):
            if not batch:  # other processes have its rows
                continue
            on_device = move_batch(batch, trainer.device)
            step = trainer.strategy.forward(trainer.task.step, trainer.model, on_device)
            if not counted:
                continue
            targets = step.targets.cpu()
            outputs = step.outputs.cpu()
            if targets.is_floating_point() or targets.ndim != 1 or outputs.ndim != 2:
                raise SettingError(
                    "callbacks.confusion needs one class for each sample; "
                    "this task has other targets"
                )
            classes = outputs.shape[1]
            known = targets >= 0
            pairs = targets[known] * classes + outputs.argmax(1)[known]
            new = pairs.bincount(minlength=classes**2).reshape(classes, classes)
            counts = new.double() if counts.numel() == 0 else counts + new
    counts_of_processes = [each for each in trainer.strategy.gather(counts) if each.numel() > 0]
    return torch.stack(counts_of_processes).sum(0)


def counts_table(counts: Tensor, trainer: Context) -> str:
    """Return the counts as a markdown table, with the names of the classes if they are known."""
    names = class_names(trainer.folder)
    if len(names) != len(counts):
        names = [str(index) for index in range(len(counts))]
    lines = [f"| is \\ taken for | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for name, row in zip(names, counts.long().tolist(), strict=True):
        lines.append(f"| {name} | {' | '.join(map(str, row))} |")
    return "\n".join(lines)
