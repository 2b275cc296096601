"""The state of a Trainer, from which a fit resumes exactly: reset, capture and restore."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from framework.contracts.callback import keyed
from framework.contracts.context import Context
from framework.contracts.schedule import Schedule
from framework.contracts.state import Cadence
from framework.data.dataset import ForeignLoader, Loader
from framework.errors import SettingError
from framework.errors.user_code import describe
from framework.runtime import seeds
from framework.runtime.dtensors import load_model_state

from .acceleration.compile_choice import CompileChoice
from .optimizer_state import group_settings, restore_optimizer, same_setting
from .shards import ShardedMeasures

WRONG_FORM = (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError)


class TrainerParts(Context, Protocol):
    """The parts of a trainer that have state: a `Context`, and the state of validation.

    Attributes:
        validate_every: the cadence of validation.
        validated_step: the step of the last validation; -1 before the first.
        compile_choice: of compile=auto.
    """

    validate_every: Cadence
    validated_step: int
    compile_choice: CompileChoice


def reset(trainer: TrainerParts) -> None:
    """Clear the state of an earlier fit in all parts of a trainer, and delete gradients."""
    trainer.validate_every.restart()
    trainer.log_every.restart()
    trainer.precision.reset()
    trainer.micro_batches.reset()
    trainer.compile_choice.reset()
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
    for parameter in trainer.model.parameters():
        parameter.grad = None
    if isinstance(trainer.train_batches, Loader):
        trainer.train_batches.skipped = 0
    elif trainer.train_batches.states is not None:
        trainer.train_batches.states.reset()
    if isinstance(trainer.schedule, Schedule):
        trainer.schedule.reset()
    for callback in trainer.callbacks:
        callback.reset()


class FitSettings(NamedTuple):
    """The settings of an optimizer after a fit, and those that the user had set before it."""

    optimizer: Optimizer
    after_fit: list[dict[str, Any]]
    by_user: list[dict[str, Any]]


def user_settings(
    optimizer: Optimizer,
    model: nn.Module,
    last_fit: FitSettings | None,
) -> list[dict[str, Any]]:
    """Return the settings of the optimizer's groups that the user has set.

    A setting that the last fit has changed has its value from before that fit, unless the user has
    changed it since.
    """
    now = group_settings(optimizer, model)
    if last_fit is None or last_fit.optimizer is not optimizer:
        return now
    for group, after_fit, by_user in zip(now, last_fit.after_fit, last_fit.by_user, strict=False):
        settings = group["settings"]
        for name, value in by_user["settings"].items():
            if name not in settings or name not in after_fit["settings"]:
                continue
            if same_setting(settings[name], after_fit["settings"][name]):
                settings[name] = value
    return now


def capture(trainer: TrainerParts) -> dict[str, Any]:
    """Return the state of the model, and of everything that the next steps depend on (collective).

    The tensors are not copied; the next step changes them. They may be sharded.
    """
    saved = trainer.state.state_dict() | {
        "model": trainer.model.state_dict(),
        "optimizer": optimizer_state(trainer),
        "optimizer_settings": trainer.optimizer_settings,
        "optimizer_class": type(trainer.optimizer).__name__,
        "schedule": trainer.schedule.state_dict() if isinstance(trainer.schedule, Schedule) else {},
        "scheduled": trainer.schedule is not None,
        "scaler": trainer.precision.state_dict(),
        "micro_batches": trainer.micro_batches.state_dict(),
        "compile": trainer.compile_choice.state_dict(),
        "callbacks": {
            key: callback.state_dict() for key, callback in keyed(trainer.callbacks).items()
        },
        "measures": measures_state(trainer),
        "processes": trainer.strategy.world_size,
        "validated": trainer.validated_step,
        "batch_size": trainer.train_batches.batch_size,
        "skipped": skipped_samples(trainer),
        "random": seeds.capture(),
    }
    if isinstance(trainer.train_batches, ForeignLoader):
        state = trainer.state
        saved["source"] = trainer.train_batches.source_state(state.epoch, state.batch)
    return saved


def optimizer_state(trainer: TrainerParts) -> dict[str, Any]:
    """Return the state dict of the optimizer, with `fused` of each group as the user has set it."""
    state = trainer.optimizer.state_dict()
    for group, by_user in zip(state["param_groups"], trainer.optimizer_settings, strict=False):
        if "fused" in by_user["settings"]:
            group["fused"] = by_user["settings"]["fused"]
    return state


def restore(trainer: TrainerParts, saved: dict[str, Any]) -> None:
    """Restore a result of `capture` in a trainer with the same parts.

    Raises:
        SettingError: the state is damaged, or one of other parts.
    """
    try:
        restore_parts(trainer, saved)
    except WRONG_FORM as error:
        raise SettingError(
            f"resume: the state does not fit this trainer: {describe(error)}"
        ) from error


def restore_parts(trainer: TrainerParts, saved: dict[str, Any]) -> None:
    """Restore the state of each part of a trainer; a damaged state may raise any of WRONG_FORM."""
    load_model_state(trainer.model, saved["model"])
    kind = type(trainer.optimizer).__name__
    if saved.get("optimizer_class", kind) != kind:
        raise SettingError(
            f"resume: the state is of the optimizer {saved['optimizer_class']}, not {kind}"
        )
    restore_optimizer(
        trainer.optimizer,
        saved["optimizer"],
        before=saved.get("optimizer_settings"),
        now=trainer.optimizer_settings,
    )
    if trainer.schedule is None and saved.get("scheduled"):
        for group in trainer.optimizer.param_groups:
            group["lr"] = group["initial_lr"]  # without the last factor of the removed schedule
    if isinstance(trainer.schedule, Schedule) and saved["schedule"]:
        trainer.schedule.load_state_dict(saved["schedule"])
    trainer.precision.load_state_dict(saved["scaler"])
    trainer.micro_batches.load_state_dict(saved.get("micro_batches", {}))
    trainer.compile_choice.load_state_dict(saved.get("compile", {}))
    for key, callback in keyed(trainer.callbacks).items():
        callback.load_state_dict(saved["callbacks"].get(key, {}))
    restore_measures(trainer, saved["measures"])
    trainer.state.load_state_dict(saved)
    convert_batch_counter(trainer, saved.get("batch_size"))
    trainer.validated_step = saved["validated"]
    if isinstance(trainer.train_batches, Loader):
        trainer.train_batches.skipped = saved["skipped"] if trainer.strategy.is_main else 0
    else:
        trainer.train_batches.load_source_state(saved.get("source"))
    seeds.restore(saved["random"])


def skipped_samples(trainer: TrainerParts) -> int:
    """Return the number of samples that all processes have skipped (collective)."""
    return int(trainer.strategy.sum(torch.tensor(trainer.train_batches.skipped)))


def measures_state(trainer: TrainerParts) -> list[dict[str, Any]] | dict[str, Any]:
    """Return the sums of this process, or a list of those of all processes (collective).

    With shards it is the list of the sums of all shards.
    """
    if isinstance(trainer.measures, ShardedMeasures):
        return trainer.measures.all_states()
    state = trainer.measures.state_dict()
    if trainer.strategy.world_size == 1:
        return state
    return trainer.strategy.gather(state)


def restore_measures(trainer: TrainerParts, saved: list[dict[str, Any]] | dict[str, Any]) -> None:
    """Restore the sums of each process; with another number of processes, all in the main one.

    Args:
        trainer: the trainer of this process.
        saved: the sums of each process; those of one process in a state of an older version.
    """
    strategy = trainer.strategy
    states = [saved] if isinstance(saved, dict) else saved
    if isinstance(trainer.measures, ShardedMeasures):
        trainer.measures.restore_states(states)
        return
    if len(states) == strategy.world_size:
        trainer.measures.load_state_dict(states[strategy.rank])
        return
    if strategy.is_main:
        trainer.measures.load_state_dict(states[0])
        for state in states[1:]:
            trainer.measures.add_state(state)


def convert_batch_counter(trainer: TrainerParts, size_before: int | None) -> None:
    """Convert the number of batches done in the current epoch to the present batch size.

    Args:
        trainer: the trainer, whose counters are restored.
        size_before: samples of a batch when the state was saved; None if it is not known.
    """
    state = trainer.state
    batches = trainer.train_batches
    if state.batch == 0 or state.steps_per_epoch == 0:
        return
    size = batches.batch_size
    if size is not None and size_before is not None and size != size_before:
        done = state.batch * size_before // size
        state.batch = done - done % trainer.accumulate
    if state.batch >= len(batches):
        state.epoch += 1
        state.batch = 0
