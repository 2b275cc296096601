"""The samples with the highest loss, with label and prediction."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from framework.contracts.metric import predicted_classes
from framework.contracts.strategy import Strategy
from framework.contracts.task import Task
from framework.data.dataset import Data, Scale, Shown, names_or_numbers
from framework.errors import DataError
from framework.runtime.display import markdown
from framework.runtime.display.drawing import captioned

from .decisions import Decision, decide
from .samples import Measured, Rows, read_rows, row_losses

CUT = 300  # characters of a text in a table
MOST_LABELS = 8  # of a sample with several labels or values
MOST_SHOWN = 100  # samples in a picture and in TensorBoard; all are in the JSON file


@dataclass
class Candidates:
    """Some samples, on the CPU; a process keeps those with the highest loss.

    Attributes:
        numbers: of the samples in their split, shape (samples,).
        losses: float64, shape (samples,).
        inputs, outputs, targets: shape (samples, ...); None where rows do not have them.
        measured: the number of samples that were measured.
    """

    numbers: Tensor
    losses: Tensor
    inputs: Tensor | None
    outputs: Tensor | None
    targets: Tensor | None
    measured: int

    def highest(self, count: int) -> "Candidates":
        """Return the `count` samples with the highest loss, the highest first; NaN is highest."""
        keys = self.losses.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        # stable: of equal losses the sample that was read first
        order = keys.argsort(descending=True, stable=True)[:count]
        return self.at(order[keys[order] > -torch.inf])  # without those that count no target

    def at(self, order: Tensor) -> "Candidates":
        """Return the samples at some places."""

        def rows(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[order]

        return Candidates(
            self.numbers[order],
            self.losses[order],
            rows(self.inputs),
            rows(self.outputs),
            rows(self.targets),
            self.measured,
        )


def find_worst(measured: Measured, batches: Any, count: int) -> Candidates:
    """Return the samples with the highest loss of all processes (collective).

    Args:
        measured: the model and the task.
        batches: the loader of the split.
        count: how many samples.

    Raises:
        DataError: a sample has no loss of its own.
    """
    kept: Candidates | None = None
    for rows in read_rows(measured, batches):
        found = candidates_of(rows, row_losses(measured, rows)).highest(count)
        kept = found if kept is None else joined([kept, found]).highest(count)
    return gathered(kept, measured.strategy, count)


def candidates_of(rows: Rows, losses: Tensor) -> Candidates:
    """Return the samples of a batch."""

    def on_cpu(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.cpu()

    return Candidates(
        rows.numbers,
        losses,
        on_cpu(rows.inputs),
        on_cpu(rows.outputs),
        on_cpu(rows.targets),
        len(rows),
    )


def gathered(own: Candidates | None, strategy: Strategy, count: int) -> Candidates:
    """Return the samples with the highest loss of all processes (collective)."""
    values = None if own is None else vars(own)
    parts = [Candidates(**each) for each in strategy.gather(values) if each is not None]
    if not parts:
        raise DataError("the evaluation data has no batch: it is empty or was already read")
    everything = joined(parts)
    # by number, so that the first of equal losses is the same with any number of processes
    return everything.at(everything.numbers.argsort(stable=True)).highest(count)


def joined(parts: Sequence[Candidates]) -> Candidates:
    """Return the samples of several parts."""
    return Candidates(
        torch.cat([part.numbers for part in parts]),
        torch.cat([part.losses for part in parts]),
        join([part.inputs for part in parts]),
        join([part.outputs for part in parts]),
        join([part.targets for part in parts]),
        sum(part.measured for part in parts),
    )


def join(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Return the rows of tensors; token ids of other length are padded with 0 at the end."""
    found = [tensor for tensor in tensors if tensor is not None]
    if len(found) != len(tensors):
        return None
    longest = max(tensor.shape[-1] for tensor in found)
    if found[0].ndim > 1 and any(tensor.shape[-1] != longest for tensor in found):
        found = [F.pad(tensor, (0, longest - tensor.shape[-1])) for tensor in found]
    if len({tensor.shape[1:] for tensor in found}) > 1:
        return None
    return torch.cat(found)


@dataclass
class WorstSamples:
    """The samples with the highest loss in a readable form, the highest loss first.

    Attributes:
        columns: `sample` (its number in the split, from 0), what identifies it in the source of
            the data, `loss`, `label`, `prediction` and `probability` as far as the task has them.
        shown: the inputs.
        measured: the number of samples of the split.
    """

    columns: dict[str, list[Any]]
    shown: Shown
    measured: int

    def __len__(self) -> int:
        return len(self.columns["loss"])

    def rows(self) -> list[dict[str, Any]]:
        """Return a dict for each sample, with the columns of its inputs."""
        columns: dict[str, Sequence[Any]] = dict(self.columns)
        for name, cells in self.shown.columns.items():
            key = name if name not in columns else f"input:{name}"
            columns[key] = cells
        rows = zip(*columns.values(), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in rows]

    def picture(self) -> Tensor | None:
        """Return the images above their captions, shape (1, 3, height, width); None without one."""
        images = self.shown.images
        if images is None or len(self) == 0:
            return None
        return captioned(images[:MOST_SHOWN], self.captions())

    def captions(self) -> list[str]:
        """Return the captions of the picture: prediction and probability, label, loss."""
        captions = []
        for row in range(min(len(self), MOST_SHOWN)):
            cells = {name: values[row] for name, values in self.columns.items()}
            lines = []
            if "prediction" in cells:
                lines.append(f"{text_of(cells['prediction'])}{percentage(cells)}")
            if "label" in cells:
                lines.append(f"true: {text_of(cells['label'])}")
            lines.append(f"loss {cells['loss']:.3g}")
            captions.append("\n".join(lines))
        return captions

    def markdown(self) -> str:
        """Return the samples as a table in Markdown."""
        rows = self.rows()[:MOST_SHOWN]
        if not rows:
            return ""
        cells = [[markdown.literal(text_of(cell)[:CUT]) for cell in row.values()] for row in rows]
        return markdown.table(list(rows[0]), cells, wrap=44)


def percentage(cells: Mapping[str, Any]) -> str:
    """Return the probability of a prediction as text; empty without one."""
    probability = cells.get("probability")
    return f" {probability:.0%}" if isinstance(probability, float) else ""


def text_of(value: Any) -> str:
    """Return a cell as text, numbers with four digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        texts = [text_of(each) for each in value[:MOST_LABELS]]
        if len(value) > MOST_LABELS:
            texts.append("...")
        return ", ".join(texts) or "none"
    return "" if value is None else str(value)


def describe(
    worst: Candidates,
    task: Task,
    classes: Sequence[str],
    scale: Scale | None,
    show: Callable[[Tensor], Shown],
    names: Callable[[Sequence[int]], dict[str, list[Any]]],
) -> WorstSamples:
    """Return samples in a readable form.

    Args:
        worst: the samples.
        task: makes readable predictions of outputs.
        classes: the names of the classes; empty if unknown.
        scale: of the targets; None if they have none.
        show: makes inputs readable.
        names: returns columns that identify samples by their numbers.
    """
    numbers: list[int] = worst.numbers.tolist()
    columns: dict[str, list[Any]] = {
        "sample": [number if number >= 0 else None for number in numbers]
    }
    if all(number >= 0 for number in numbers):
        columns |= names(numbers)
    columns["loss"] = worst.losses.tolist()
    columns |= predictions(worst, task, classes, scale)
    shown = Shown()
    if worst.inputs is not None:
        shown = show(worst.inputs)
    return WorstSamples(columns, shown, worst.measured)


def predictions(
    worst: Candidates, task: Task, classes: Sequence[str], scale: Scale | None
) -> dict[str, list[Any]]:
    """Return label, prediction and probability of samples, as far as the task has them."""
    outputs = worst.outputs
    targets = worst.targets
    if outputs is None or targets is None:
        return {}
    decision = decide(task, outputs, targets)
    if decision is not None:
        return class_columns(decision, classes)
    if outputs.shape == targets.shape and outputs[0].numel() <= MOST_LABELS:
        if scale is not None:
            outputs = scale.inverse_transform(outputs)
            targets = scale.inverse_transform(targets)
        return {"label": values_of(targets), "prediction": values_of(outputs)}
    return {}


def values_of(rows: Tensor) -> list[Any]:
    """Return the numbers of each row: one number, or a list."""
    numbers = rows.double()
    if numbers.ndim > 1:
        numbers = numbers.flatten(1)
        if numbers.shape[1] == 1:
            numbers = numbers[:, 0]
    found: list[Any] = numbers.tolist()
    return found


def class_columns(decision: Decision, classes: Sequence[str]) -> dict[str, list[Any]]:
    """Return the columns label, prediction and probability."""
    probabilities = decision.probabilities
    targets = decision.targets
    names = names_or_numbers(classes, probabilities.shape[1])
    if not decision.is_multilabel:
        labels = [names[index] if index >= 0 else None for index in targets.tolist()]
        predicted = predicted_classes(probabilities).tolist()
        return {
            "label": labels,
            "prediction": [names[index] if index < len(names) else None for index in predicted],
            "probability": probabilities.amax(1).tolist(),
        }
    chosen = (probabilities > 0.5).long()
    confidence = torch.where(chosen == 1, probabilities, 1 - probabilities)
    if probabilities.shape[1] == 1:
        return {
            "label": targets[:, 0].tolist(),
            "prediction": chosen[:, 0].tolist(),
            "probability": confidence[:, 0].tolist(),
        }
    return {
        "label": [names_at(row, names) for row in targets.tolist()],
        "prediction": [names_at(row, names) for row in chosen.tolist()],
        "probability": confidence.prod(1).tolist(),
    }


def names_at(row: Iterable[int], names: Sequence[str]) -> list[str]:
    """Return the names of the labels that are 1."""
    return [name for value, name in zip(row, names, strict=True) if value]


def show_function(part: type[Data] | None, facts: Mapping[str, Any]) -> Callable[[Tensor], Shown]:
    """Return the function that makes inputs readable: that of the data set if it is known."""
    kind = Data if part is None else part
    return lambda inputs: kind.show(inputs, dict(facts))
