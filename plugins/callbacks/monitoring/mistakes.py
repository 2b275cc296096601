"""Callbacks that show what the model gets wrong: the worst samples, and curves of decisions."""

from framework import Context, Every, PositiveInt, callbacks, evaluation
from framework.contracts.periodic_callback import ValidationCallback


@callbacks.register("worst")
class Worst(ValidationCallback):
    """Shows the samples of the validation split with the highest loss.

    The loggers get a table with label, prediction, probability and loss, and images with captions
    or sounds. It reads the split a second time. A loss that is neither a loss of torch nor a
    subclass of one needs a forward pass for each sample.

    Args:
        count: samples to show.
        every: how often to show them.
    """

    name = "worst"

    def __init__(self, count: PositiveInt = 16, every: Every = "1epoch"):
        super().__init__(every)
        self.count = count

    def on_fit_start(self, trainer: Context) -> None:
        super().on_fit_start(trainer)
        evaluation.check_worst(trainer)

    def show(self, trainer: Context) -> None:
        evaluation.record_worst(trainer, self.count)


@callbacks.register("curves")
class Curves(ValidationCallback):
    """Shows precision and recall, ROC, and calibration on the validation split.

    Each class is compared with all others; with labels, each label by itself. The loggers get the
    three charts as images with the 8 lowest classes, and the curve of precision and recall of the
    first 20 classes. It reads the split a second time.

    Args:
        every: how often to show them.
    """

    name = "curves"

    def on_fit_start(self, trainer: Context) -> None:
        super().on_fit_start(trainer)
        evaluation.check_curves(trainer)

    def show(self, trainer: Context) -> None:
        evaluation.record_curves(trainer)
