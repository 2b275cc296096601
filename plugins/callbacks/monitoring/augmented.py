"""A callback that shows training images after the transforms."""

from typing import Any

from torch import Tensor

from framework import (
    Batch,
    Context,
    Every,
    PositiveInt,
    SettingError,
    Transform,
    callbacks,
    class_names,
    drawing,
    evaluation,
)
from framework.contracts.periodic_callback import PeriodicCallback

from .samples import target_texts


@callbacks.register("augmented")
class Augmented(PeriodicCallback, Transform):
    """Logs the first images of a training batch side by side, as the model gets them: transformed.

    Below each is its class or number; for mixed targets, the two largest shares. It logs them after
    the first step, and then at its cadence; instead of a smaller batch, such as the last one of an
    epoch, the batch before it. List it after the other transforms.

    Args:
        count: number of images, at most a batch.
        every: how often to log them.
    """

    def __init__(self, count: PositiveInt = 16, every: Every = "1epoch"):
        super().__init__(every)
        self.count = count
        self.inputs: Tensor | None = None
        self.targets: Any = None

    def reset(self) -> None:
        super().reset()
        self.inputs = None
        self.targets = None

    def __call__(self, batch: Batch) -> Batch:
        """Copy the first inputs and targets; return the batch unchanged."""
        inputs = batch[0][: self.count]
        if self.inputs is not None and len(inputs) < len(self.inputs):
            return batch  # the last batch of an epoch may be small
        self.inputs = inputs.clone()  # a loader may reuse their memory
        self.targets = batch[1][: self.count].clone() if len(batch) > 1 else None
        return batch

    def on_step_end(self, trainer: Context) -> None:
        self.show_if_due(trainer)
        if trainer.state.step == 1:
            self.show_once(trainer)

    def show(self, trainer: Context) -> None:
        if self.inputs is None:  # no step since a resume
            return
        images = evaluation.show_inputs(trainer, self.inputs).images
        if images is None:
            raise SettingError(
                f"callbacks.augmented: expected images (C, H, W), got {self.inputs.dtype} "
                f"{tuple(self.inputs.shape[1:])}"
            )
        captions = [""] * len(images)
        if isinstance(self.targets, Tensor):
            captions = target_texts(self.targets, class_names(trainer.folder))
        image = drawing.captioned(images, captions)
        for logger in trainer.loggers:
            logger.images("augmented", image, trainer.state.step)
