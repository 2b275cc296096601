"""The confusion matrix, and the precision and recall of each class."""

from collections.abc import Sequence

import torch
from torch import Tensor

from framework import (
    Callback,
    Context,
    Every,
    SettingError,
    callbacks,
    check_has_validation,
    class_names,
    drawing,
    evaluation,
    markdown,
    names_or_numbers,
)
from framework.contracts.state import Cadence

from .samples import is_due

CELL = 15  # pixels at least, for a card of TensorBoard
MOST_NAMED = 20  # classes
NAMES = 48  # pixels of the names of classes
FULL = (8, 48, 107)  # the color of all samples of a class
MOST_CHARTED = 20  # classes; the colors of more lines cannot be told apart
QUANTITIES = ("precision", "recall", "f1")


class ClassCounts(Callback):
    """Base of callbacks that count true and predicted classes of the validation split.

    Several of them in a run read the split once for all.

    Args:
        every: how often to count.
    """

    changes_training = False
    name = ""  # for messages

    def __init__(self, every: Every = "1epoch"):
        self.cadence = Cadence(every)
        self.counts: Tensor | None = None
        self.counted_step = -1

    def reset(self) -> None:
        super().reset()
        self.counts = None
        self.counted_step = -1

    def on_fit_start(self, trainer: Context) -> None:
        check_has_validation(trainer.val_batches, f"callbacks.{self.name}")
        rows = evaluation.first_rows(trainer)
        if rows is not None:
            pairs_of(rows, self.name)

    def on_validation_end(self, trainer: Context) -> None:
        state = trainer.state
        if not is_due(self.cadence, state):
            return
        self.counts = self._known_counts(trainer)
        if self.counts is None:
            self.counts = count_pairs(trainer, self.name)
        self.counted_step = state.step
        self.show(trainer, self.counts)

    def cost(self) -> str:
        return f"reads the validation split once more, {self.cadence}"

    def show(self, trainer: Context, counts: Tensor) -> None:
        """Pass the counts to the loggers."""
        raise NotImplementedError

    def _known_counts(self, trainer: Context) -> Tensor | None:
        """Return the counts of another callback at this step."""
        for callback in trainer.callbacks:
            if isinstance(callback, ClassCounts) and callback.counted_step == trainer.state.step:
                return callback.counts
        return None


@callbacks.register("confusion", aliases=["confusion_matrix"])
class Confusion(ClassCounts):
    """Shows the confusion matrix of the validation split.

    Rows are true classes, columns predicted classes. The loggers get it as an image
    (dark: all samples of the class; numbers are per cent; the diagonal is correct) and as a table
    of counts. It reads the split a second time.

    Args:
        every: how often to show it.
    """

    name = "confusion"

    def show(self, trainer: Context, counts: Tensor) -> None:
        names = names_or_numbers(class_names(trainer.folder), len(counts))
        image = matrix_image(counts, names)
        table = counts_table(counts, names)
        for logger in trainer.loggers:
            logger.images("confusion", image, trainer.state.step)
            logger.text("confusion/counts", table, trainer.state.step)


def matrix_image(counts: Tensor, names: Sequence[str]) -> Tensor:
    """Return the shares of the predicted classes in each true class as an image (1, 3, H, W).

    With at most MOST_NAMED classes their names are written beside it, and the shares in percent.
    """
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    classes = len(counts)
    named = classes <= MOST_NAMED
    margin = NAMES if named else 0
    cell = max(CELL if named else 1, (drawing.CARD - margin) // classes)
    side = margin + classes * cell
    canvas = drawing.Canvas(max(drawing.CARD, side), side, 10)
    full = torch.tensor(FULL).reshape(3, 1, 1) / 255
    colors = 1 - shares * (1 - full)
    canvas.paste(colors, margin, margin, classes * cell, classes * cell)
    if not named:
        return canvas.tensor()
    for row, name in enumerate(names):
        middle = margin + (row + 0.5) * cell
        canvas.text(margin - 4, middle, drawing.cut_to_width(canvas, name, margin - 6), "rm")
        canvas.text(middle, margin - 8, drawing.cut_to_width(canvas, name, cell - 2))
        for column, share in enumerate(shares[row].tolist()):
            color = drawing.WHITE if share > 0.5 else drawing.BLACK
            if share >= 0.005:
                at = margin + (column + 0.5) * cell
                canvas.text(at, middle, f"{share:.0%}".removesuffix("%"), "mm", color)
    return canvas.tensor()


@callbacks.register("per_class")
class PerClass(ClassCounts):
    """Logs precision, recall and F1 of each class of the validation split.

    The tags are val_per_class/precision/<class>, and the same for recall and f1;
    TensorBoard's Custom Scalars page shows all classes in one chart. The worst class is the first
    in a table. With more than 20 classes there is only the table. The values are those of
    scikit-learn's `precision_recall_fscore_support`; 0 if the denominator is 0. It reads the split
    a second time, together with `confusion` if both are due.

    Args:
        every: how often to log them.
    """

    name = "per_class"

    def on_fit_start(self, trainer: Context) -> None:
        super().on_fit_start(trainer)
        charts = {name: f"val_per_class/{name}/" for name in QUANTITIES}
        for logger in trainer.loggers:
            logger.charts("classes of the validation split", charts)

    def cost(self) -> str:
        return f"{super().cost()} (together with confusion)"

    def show(self, trainer: Context, counts: Tensor) -> None:
        names = names_or_numbers(class_names(trainer.folder), len(counts))
        rows = class_scores(counts)
        if len(names) <= MOST_CHARTED:
            for column, quantity in enumerate(QUANTITIES):
                for name, row in zip(names, rows, strict=True):
                    trainer.log({f"val_per_class/{quantity}/{name}": row[column]})
        table = scores_table(names, rows)
        for logger in trainer.loggers:
            logger.text("per_class", table, trainer.state.step)


def class_scores(counts: Tensor) -> list[list[float]]:
    """Return precision, recall, F1 and number of samples of each class.

    Args:
        counts: of the pairs of true class (row) and predicted class (column).
    """
    if not counts.any():  # all targets are ignored
        return torch.zeros(len(counts), 4, dtype=torch.float64).tolist()
    from sklearn.metrics import precision_recall_fscore_support  # takes 1 s

    classes = torch.arange(len(counts))
    pairs = torch.cartesian_prod(classes, classes).numpy()
    columns = precision_recall_fscore_support(
        pairs[:, 0],
        pairs[:, 1],
        labels=classes.numpy(),
        sample_weight=counts.flatten().numpy(),
        zero_division=0,
    )
    return torch.tensor([column.tolist() for column in columns], dtype=torch.float64).T.tolist()


def scores_table(names: Sequence[str], rows: Sequence[Sequence[float]]) -> str:
    """Return the result of `class_scores` as a markdown table, the lowest F1 first."""
    cells = []
    for name, row in sorted(zip(names, rows, strict=True), key=lambda pair: pair[1][2]):
        *scores, samples = row
        cells.append([name, *(f"{score:.3f}" for score in scores), f"{samples:.0f}"])
    return markdown.table(["class", "precision", "recall", "F1", "samples"], cells, texts=1)


def count_pairs(trainer: Context, name: str) -> Tensor:
    """Count the pairs of true class (row) and predicted class (column) in the validation split.

    Args:
        name: the callback, for messages.

    Returns:
        The counts, shape (classes, classes), float64 on the CPU.

    Raises:
        SettingError: the targets are no classes.
    """
    counts = torch.zeros(0, 0, dtype=torch.float64)
    assert trainer.val_batches is not None
    for rows in evaluation.read_rows(trainer, trainer.val_batches):
        outputs, targets = pairs_of(rows, name)
        classes = outputs.shape[1]
        known = targets >= 0
        pairs = targets[known] * classes + outputs.argmax(1)[known]
        new = pairs.bincount(minlength=classes**2).reshape(classes, classes)
        counts = new.double() if counts.numel() == 0 else counts + new
    counts_of_processes = [each for each in trainer.strategy.gather(counts) if each.numel() > 0]
    return torch.stack(counts_of_processes).sum(0)


def pairs_of(rows: evaluation.Rows, name: str) -> tuple[Tensor, Tensor]:
    """Return outputs (samples, classes) and targets (samples,), on the CPU.

    Raises:
        SettingError: the targets are no classes.
    """
    outputs = rows.outputs
    targets = rows.targets
    is_known = outputs is not None and targets is not None
    if not is_known or targets.is_floating_point() or targets.ndim != 1 or outputs.ndim != 2:
        raise SettingError(
            f"callbacks.{name} needs one class for each sample; this task has other targets"
        )
    return outputs.cpu(), targets.cpu()


def counts_table(counts: Tensor, names: Sequence[str]) -> str:
    """Return the counts as a markdown table."""
    rows = [[name, *row] for name, row in zip(names, counts.long().tolist(), strict=True)]
    return markdown.table(["is \\ taken for", *names], rows)
