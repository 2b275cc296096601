"""Worst samples and curves of the validation split during a fit, for callbacks."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from framework.contracts.context import Context
from framework.data.dataset import (
    Scale,
    Shown,
    class_names,
    file_names,
)
from framework.errors import RunError, SettingError
from framework.registry.kinds import datasets
from framework.runs.folder import read_config, read_facts

from .decisions import NO_CLASSES, decide, read_decisions
from .reports import log_curves, log_worst
from .samples import Rows as Rows, read_rows as read_rows
from .worst import describe, find_worst, show_function


def check_worst(trainer: Context) -> None:
    """Check at the start of a fit that its samples have a loss of their own.

    Raises:
        SettingError: the task compares samples with each other.
    """
    if not trainer.task.splits_batches:
        name = type(trainer.task).__name__
        raise SettingError(
            f"callbacks.worst: {name} compares the samples of a batch with each other: a sample "
            "has no loss of its own"
        )


def check_curves(trainer: Context) -> None:
    """Check at the start of a fit that the task has classes or labels, with one batch (collective).

    Raises:
        SettingError: the task has neither.
    """
    rows = first_rows(trainer)
    if rows is None:
        return
    outputs, targets = rows.outputs, rows.targets
    is_known = outputs is not None and targets is not None
    if not is_known or decide(trainer.task, outputs, targets) is None:  # type: ignore[arg-type]
        name = type(trainer.task).__name__
        raise SettingError(f"callbacks.curves: {NO_CLASSES}; got {name}")


def first_rows(trainer: Context) -> Rows | None:
    """Return the results for the first samples of the validation split (collective).

    None if this process reads no sample.
    """
    assert trainer.val_batches is not None
    results = read_rows(trainer, trainer.val_batches)
    try:
        return next(results, None)
    finally:
        results.close()  # type: ignore[attr-defined]  # a generator


def record_worst(trainer: Context, count: int) -> None:
    """Log the samples of the validation split with the highest loss (collective)."""
    assert trainer.val_batches is not None
    found = find_worst(trainer, trainer.val_batches, count)
    if not trainer.strategy.is_main:
        return
    worst = describe(
        found,
        trainer.task,
        class_names(trainer.folder),
        target_scale(trainer.folder),
        partial(show_inputs, trainer),
        partial(file_names, getattr(trainer.val_batches, "split", None)),
    )
    for logger in trainer.loggers:
        log_worst(logger, worst, "worst", trainer.state.step)


def record_curves(trainer: Context) -> None:
    """Log PR, ROC and calibration of the validation split (collective)."""
    from .curves import compute_curves

    assert trainer.val_batches is not None
    decision = read_decisions(trainer, trainer.val_batches)
    if not trainer.strategy.is_main:
        return
    curves = compute_curves(decision, class_names(trainer.folder))
    for logger in trainer.loggers:
        log_curves(logger, curves, decision, "curves", trainer.state.step)


def facts_of(folder: Path | None) -> Mapping[str, Any]:
    """Return the facts of the data in the folder of a run; empty without one."""
    if folder is None:
        return {}
    try:
        return read_facts(folder)
    except (OSError, RunError):
        return {}


def target_scale(folder: Path | None) -> Scale | None:
    """Return the scale of the targets of the run in a folder; None if they are not scaled."""
    scale = facts_of(folder).get("scale")
    return None if scale is None else Scale(*scale)


def show_inputs(
    trainer: Context, inputs: Tensor, changed_facts: Mapping[str, Any] = MappingProxyType({})
) -> Shown:
    """Return inputs as a reader sees them, by the data set of the run (see `Data.show`).

    Args:
        trainer: the running fit.
        inputs: shape (samples, ...).
        changed_facts: replace facts of the data set.
    """
    folder = trainer.folder
    facts = facts_of(folder)
    part: Any = None
    if folder is not None and facts:
        try:
            data = read_config(folder)["data"]
            name = data["name"] if isinstance(data, Mapping) else data
            part = datasets.get(name).part if name in datasets else None
        except (OSError, RunError, LookupError, TypeError):
            part = None
    return show_function(part, {**facts.get("data", {}), **changed_facts})(inputs.detach().cpu())
