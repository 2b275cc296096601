"""The confusion matrix, and the precision and recall of each class."""

from collections.abc import Sequence

import torch
from torch import Tensor

from framework import (
    Context,
    Every,
    SettingError,
    callbacks,
    class_names,
    drawing,
    evaluation,
    markdown,
    names_or_numbers,
)
from framework.contracts.metric import predicted_classes
from framework.contracts.periodic_callback import ValidationCallback

CELL = 15  # pixels at least, for a card of TensorBoard
MOST_NAMED = 20  # classes
TITLE = 14  # pixels of "true" and "predicted"
NAMES = 64  # pixels of the names of classes, at most
CHARACTER = 6  # pixels of a character of a name
FULL = (8, 48, 107)  # the color of all samples of a class
MOST_CHARTED = 20  # classes; the colors of more lines cannot be told apart
QUANTITIES = ("precision", "recall", "f1")


class ClassCounts(ValidationCallback):
    """Base of callbacks that count true and predicted classes of the validation split.

    Several of them in a run read the split once for all.

    Args:
        every: how often to count.
    """

    def __init__(self, every: Every = "1epoch"):
        super().__init__(every)
        self.counts: Tensor | None = None  # at the last step that was shown

    def reset(self) -> None:
        super().reset()
        self.counts = None

    def on_fit_start(self, trainer: Context) -> None:
        super().on_fit_start(trainer)
        rows = evaluation.first_rows(trainer)
        if rows is not None:
            pairs_of(rows, self.name)

    def show(self, trainer: Context) -> None:
        self.counts = self._known_counts(trainer)
        if self.counts is None:
            self.counts = count_pairs(trainer, self.name)
        self.show_counts(trainer, self.counts)

    def show_counts(self, trainer: Context, counts: Tensor) -> None:
        """Pass the counts to the loggers."""
        raise NotImplementedError

    def _known_counts(self, trainer: Context) -> Tensor | None:
        """Return the counts of another callback at this step."""
        for callback in trainer.callbacks:
            is_other = isinstance(callback, ClassCounts) and callback is not self
            if is_other and callback.shown_step == trainer.state.step:
                return callback.counts
        return None


@callbacks.register("confusion", aliases=["confusion_matrix"])
class Confusion(ClassCounts):
    """Shows the confusion matrix of the validation split.

    Rows are true classes, columns predicted classes. The loggers get it as an image (dark: all
    samples of the class; numbers are per cent; the diagonal is correct) and as a table of counts.
    It reads the split a second time. An output of NaN is no prediction: it has a column of its own
    in the table.

    Args:
        every: how often to show it.
    """

    name = "confusion"

    def show_counts(self, trainer: Context, counts: Tensor) -> None:
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
    classes = len(counts)
    shares = counts[:, :classes] / counts.sum(1, keepdim=True).clamp(min=1)
    named = classes <= MOST_NAMED
    margin = min(NAMES, CHARACTER * max(map(len, names)) + 8) if named else 0
    left = TITLE + margin
    cell = max(CELL if named else 1, (drawing.CARD - left) // classes)
    size = classes * cell
    upright = named and margin > cell
    top = TITLE + (margin if upright or not named else TITLE)
    canvas = drawing.Canvas(max(drawing.CARD, left + size + 1), top + size + 1, 10)
    full = torch.tensor(FULL).reshape(3, 1, 1) / 255
    canvas.box(left - 1, top - 1, left + size, top + size, drawing.GRAY)
    canvas.paste(1 - shares * (1 - full), left, top, size, size)
    canvas.text(left + size / 2, TITLE / 2, "predicted")
    canvas.text_upwards(TITLE / 2, top + size / 2 + 10, "true")
    if not named:
        return canvas.tensor()
    for number, name in enumerate(names):
        middle = (number + 0.5) * cell
        row_name = drawing.cut_to_width(canvas, name, margin - 6)
        canvas.text(left - 4, top + middle, row_name, "rm")
        if upright:
            canvas.text_upwards(left + middle, top - 4, row_name)
        else:
            canvas.text(left + middle, top - 8, drawing.cut_to_width(canvas, name, cell - 2))
        for column, share in enumerate(shares[number].tolist()):
            color = drawing.WHITE if share > 0.5 else drawing.BLACK
            if share >= 0.005:
                at = left + (column + 0.5) * cell
                canvas.text(at, top + middle, f"{share:.0%}".removesuffix("%"), "mm", color)
    return canvas.tensor()


@callbacks.register("per_class")
class PerClass(ClassCounts):
    """Logs precision, recall and F1 of each class of the validation split.

    The tags are val_per_class/precision/<class>, and the same for recall and f1;
    TensorBoard's Custom Scalars page shows all classes in one chart. The worst class is the first
    in a table. With more than 20 classes there is only the table. The values are those of
    scikit-learn's `precision_recall_fscore_support`; 0 if the denominator is 0. An output
    of NaN is no prediction, but its sample counts as one of its class. It reads the split a second
    time, together with `confusion` if both are due.

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

    def show_counts(self, trainer: Context, counts: Tensor) -> None:
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
        counts: see `count_pairs`.
    """
    # Not by scikit-learn, whose import takes 1 s.
    correct = counts.diagonal()
    predicted = counts[:, : len(counts)].sum(0)
    true = counts.sum(1)
    precision = correct / predicted.clamp(min=1)
    recall = correct / true.clamp(min=1)
    f1 = 2 * correct / (predicted + true).clamp(min=1)
    return torch.stack([precision, recall, f1, true], 1).tolist()


def scores_table(names: Sequence[str], rows: Sequence[Sequence[float]]) -> str:
    """Return the result of `class_scores` as a markdown table, the lowest F1 first."""
    cells = []
    for name, row in sorted(zip(names, rows, strict=True), key=lambda pair: pair[1][2]):
        *scores, samples = row
        cells.append(
            [markdown.literal(name), *(f"{score:.3f}" for score in scores), f"{samples:.0f}"]
        )
    return markdown.table(["class", "precision", "recall", "F1", "samples"], cells, texts=1)


def count_pairs(trainer: Context, name: str) -> Tensor:
    """Count the pairs of true class and predicted class in the validation split.

    Args:
        name: the callback, for messages.

    Returns:
        The counts by true class (row) and predicted class (column), shape (classes, classes + 1),
        float64 on the CPU. The last column counts samples without a prediction (NaN).

    Raises:
        SettingError: the targets are no classes.
    """
    counts = torch.zeros(0, 0, dtype=torch.float64)
    assert trainer.val_batches is not None
    for rows in evaluation.read_rows(trainer, trainer.val_batches):
        outputs, targets = pairs_of(rows, name)
        classes = outputs.shape[1]
        known = targets >= 0
        pairs = targets[known] * (classes + 1) + predicted_classes(outputs[known])
        new = pairs.bincount(minlength=classes * (classes + 1)).reshape(classes, classes + 1)
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
    """Return the counts as a markdown table, the last column only if it has counts."""
    names = [markdown.literal(name) for name in names]
    heads = ["true \\ predicted", *names]
    if counts[:, -1].any():
        heads.append("no prediction (NaN)")
    rows = [[name, *row] for name, row in zip(names, counts.long().tolist(), strict=True)]
    return markdown.table(heads, [row[: len(heads)] for row in rows])
