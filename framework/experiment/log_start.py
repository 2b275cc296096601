"""What the loggers are shown of a run before it begins: its config, its layers, its graph."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from framework.contracts.logger import Logger
from framework.contracts.task import Task
from framework.data.dataset import Batch, Loader
from framework.runs.folder import dump
from framework.runtime import seeds
from framework.training.layer_table import read_layers


def introduce(
    loggers: Sequence[Logger],
    config: dict[str, Any],
    model: nn.Module,
    task: Task,
    batches: Loader,
    layers: str | None = None,
) -> str | None:
    """Show the loggers what runs: the config, the layers, the graph; returns the layers, if a logger shows texts.

    layers: of a model of the same shapes, where they are known already.
    """
    showing = [logger for logger in loggers if type(logger).text is not Logger.text]
    drawing = [logger for logger in loggers if type(logger).graph is not Logger.graph]
    if not showing and not drawing:
        return None
    batch = first_batch(batches)
    texts = {"config": indented(dump("config.yaml", config))} if showing else {}
    if showing:
        texts["layers"] = layers_in_markdown(model, batch, task) if layers is None else layers
    for logger in showing:
        for tag, text in texts.items():
            logger.text(tag, text)
    for logger in drawing:
        logger.graph(model, batch[0][:2])
    return texts.get("layers")


def indented(text: str) -> str:
    """Return a text as a code block of markdown."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def layers_in_markdown(model: nn.Module, batch: Batch, task: Task) -> str:
    layers, _ = read_layers(model, batch, task)
    rows = ["| layer | type | output | parameters | FLOPs |", "|---|---|---|--:|--:|"]
    for layer in layers:
        shape = " × ".join(map(str, layer.out_shape))
        rows.append(
            f"| {layer.name} | {layer.type} | {shape} | {layer.parameters:,} | {layer.flops:,} |"
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return "\n".join(
        [*rows, f"| total | | | {parameters:,} | {sum(layer.flops for layer in layers):,} |"]
    )


def first_batch(batches: Loader) -> Batch:
    """Return the first batch of the first epoch, without moving any generator."""
    with seeds.undisturbed():
        return next(iter(batches.epoch()))
