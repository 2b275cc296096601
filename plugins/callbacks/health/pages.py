"""The numbers of all layers as a table in Markdown, and as images over the steps of the run."""

from collections.abc import Sequence
from math import isnan

from torch import Tensor

from framework import drawing, markdown

from .layers import QUANTITIES
from .problems import Observation

TITLES = {
    "mean": "mean of activations",
    "std": "standard deviation of activations",
    "stuck": "share of saturated activations or dead units",
    "gradient": "norm of the gradient",
    "update": "change of the weights in a step / weights",
    "weight": "norm of the weights",
}
LOGARITHMIC = ("std", "gradient", "update", "weight")


def layer_table(seen: Observation, messages: Sequence[str]) -> str:
    """Return the numbers of an observation, with a row for each layer, and all warnings."""
    columns = ["mean", "std", "saturated\nor dead", "gradient", "update /\nweight", "weight"]
    rows = []
    for row, layer in enumerate(seen.layers):
        cells = [f"{row + 1} `{layer.name}`", layer.activation]
        for quantity in QUANTITIES:
            value = seen.numbers[quantity][row]
            cells.append("" if isnan(value) else f"{value:.3g}")
        rows.append(cells)
    table = markdown.table(["layer", "activation", *columns], rows)
    if not messages:
        return table
    items = "\n".join(f"- {message}" for message in messages)
    return f"{items}\n\n{table}"


def heat_maps(seen: Observation, steps: Sequence[int], history: Tensor) -> dict[str, Tensor]:
    """Return an image for each quantity that is known: a row for each layer, a column for a step.

    Args:
        seen: the last observation.
        steps: those of the columns.
        history: shape (steps, quantities, layers).
    """
    labels = []
    for row, layer in enumerate(seen.layers):
        labels.append(f"{row + 1} {layer.name} {layer.activation}".strip())
    images = {}
    for number, quantity in enumerate(QUANTITIES):
        values = history[:, number].T
        if values.isfinite().any():
            log = quantity in LOGARITHMIC
            columns = [str(step) for step in steps]
            images[f"health/{quantity}"] = drawing.heat_map(
                TITLES[quantity], values, labels, columns, log
            )
    return images
