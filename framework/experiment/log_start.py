"""Log the config, the layers and the graph of a run before it begins."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from framework.contracts.logger import Logger
from framework.contracts.task import Task
from framework.data.dataset import Batch, Loader
from framework.runs.folder import dump
from framework.runtime import seeds
from framework.runtime.batch import is_flat, select_rows
from framework.runtime.display import markdown
from framework.training.layer_table import read_layers


def log_run_start(
    loggers: Sequence[Logger],
    config: dict[str, Any],
    model: nn.Module,
    task: Task,
    batches: Loader,
    layers: str | None = None,
) -> str | None:
    """Give the loggers the config, the layers and the graph of a run.

    Args:
        layers: the table of layers, if it is known from a model of the same shapes.

    Returns:
        The table of layers; None if no logger takes texts.
    """
    text_loggers = [logger for logger in loggers if type(logger).text is not Logger.text]
    graph_loggers = [logger for logger in loggers if type(logger).graph is not Logger.graph]
    if not text_loggers and not graph_loggers:
        return None
    batch = first_batch(batches)
    shown = None
    if text_loggers:
        shown = layers_in_markdown(model, batch, task) if layers is None else layers
        config_text = indented(dump("config.yaml", config))
        for logger in text_loggers:
            logger.text("config", config_text)
            logger.text("layers", shown)
    inputs = model_inputs(batch, task)
    for logger in graph_loggers:
        if inputs is not None:
            logger.graph(model, inputs)
    return shown


def model_inputs(batch: Batch, task: Task) -> Any:
    """Return what the model is called with for two samples, see `Logger.graph`.

    None if the task does not name it, or mixes positional and keyword arguments.
    """
    if not task.fields.named:
        return batch[0][:2] if is_flat(batch) else None
    positional, by_name = task.fields.arguments(select_rows(batch, 0, 2))
    if positional and by_name:
        return None
    if by_name:
        return by_name
    return positional[0] if len(positional) == 1 else tuple(positional)


def indented(text: str) -> str:
    """Return a text as a code block in Markdown."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def layers_in_markdown(model: nn.Module, batch: Batch, task: Task) -> str:
    """Return the table of layers in Markdown."""
    layers, _ = read_layers(model, batch, task)
    rows = []
    for layer in layers:
        shape = " × ".join(map(str, layer.out_shape))
        rows.append([layer.name, layer.type, shape, f"{layer.parameters:,}", f"{layer.flops:,}"])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    flops = sum(layer.flops for layer in layers)
    rows.append(["total", "", "", f"{parameters:,}", f"{flops:,}"])
    return markdown.table(["layer", "type", "output", "parameters", "FLOPs"], rows, texts=3)


def first_batch(batches: Loader) -> Batch:
    """Return the first batch of the first epoch, without a change to the random generators."""
    with seeds.undisturbed():
        return next(iter(batches.epoch()))
