"""The learning rates and settings of an optimizer in a fit, and restoring its saved state."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from framework.errors import SettingError
from framework.runtime import seeds
from framework.runtime.dtensors import distribute_like, is_dtensor

OTHER_GROUPS = "resume: the optimizer has other parameter groups than the saved one"
SCHEDULED_LR = "scheduled_lr"  # key of a group: the learning rate after a fit with a schedule
NOT_SETTINGS = ("params", "initial_lr", SCHEDULED_LR)


def start_learning_rates(optimizer: Optimizer, scheduled: bool) -> None:
    """Set the learning rates at the start of a fit, and store them as "initial_lr".

    A rate that the schedule of an earlier fit has changed (see `mark_learning_rates`) is reset to
    that without the schedule, unless the user has changed it since.

    Args:
        optimizer: its groups are changed.
        scheduled: whether the fit has a schedule.
    """
    for group in optimizer.param_groups:
        if "lr" not in group:
            continue
        scheduled_rate = group.pop(SCHEDULED_LR, None)
        if scheduled_rate is not None and scheduled_rate == group["lr"]:
            group["lr"] = group["initial_lr"]
        if scheduled:
            group["initial_lr"] = group["lr"]
        else:
            group.setdefault("initial_lr", group["lr"])


def mark_learning_rates(optimizer: Optimizer) -> None:
    """Mark the learning rate of each group as changed by a schedule, at the end of a fit."""
    for group in optimizer.param_groups:
        if "lr" in group:
            group[SCHEDULED_LR] = group["lr"]


def group_settings(optimizer: Optimizer, model: nn.Module) -> list[dict[str, Any]]:
    """Return the present settings of each group, and the names of its parameters in the model.

    At the start of a fit these are the settings that the optimizer was built with, before a
    schedule or a callback changes them. Checkpoints contain them, so that a resumed run knows which
    settings the user has changed.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        settings = {name: value for name, value in group.items() if name not in NOT_SETTINGS}
        parameters = [names.get(parameter, "") for parameter in group["params"]]
        groups.append({"settings": copy.deepcopy(settings), "parameters": parameters})
    return groups


def restore_optimizer(
    optimizer: Optimizer,
    saved: dict[str, Any],
    before: Sequence[dict[str, Any]] | None,
    now: Sequence[dict[str, Any]],
) -> None:
    """Load a saved state into an optimizer, except the settings that the user has changed since.

    Args:
        optimizer: an optimizer over the same parameters in the same groups.
        saved: the state dict of the saved optimizer; its tensors are copied.
        before: `group_settings` at the start of the saved fit; None for a checkpoint of an earlier
            version, where only the learning rate can be compared.
        now: `group_settings` of the optimizer as the user has built it.

    Raises:
        SettingError: the groups contain other parameters, or a changed setting needs state that was
            not saved.
    """
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if [len(group["params"]) for group in saved["param_groups"]] != sizes:
        raise SettingError(OTHER_GROUPS)
    groups, changed = merged_groups(saved["param_groups"], before, now)
    for group, own in zip(groups, optimizer.param_groups, strict=False):
        if "fused" in own:
            group["fused"] = own["fused"]  # as now: both implementations have the same state
    if changed:
        check_state(optimizer, saved["state"], groups, changed)
    state = own_parts(optimizer, saved)
    optimizer.load_state_dict({**saved, "state": state, "param_groups": groups})
    match_layout(optimizer)


def own_parts(optimizer: Optimizer, saved: Mapping[str, Any]) -> dict[Any, Any]:
    """Return a copy of a saved state, with the parts of this process of sharded parameters.

    Raises:
        SettingError: the state of a sharded parameter has another shape.
    """
    state: dict[Any, Any] = copy.deepcopy(saved["state"])
    for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        for index, parameter in zip(group["params"], own["params"], strict=True):
            if index not in state or not is_dtensor(parameter):
                continue
            for name, value in state[index].items():
                if not isinstance(value, Tensor) or value.ndim == 0:
                    continue
                if value.shape != parameter.shape:
                    raise SettingError(
                        f"resume: strategy=fsdp cannot shard the state of "
                        f"{type(optimizer).__name__}: {name} has the shape {tuple(value.shape)}, "
                        f"its parameter {tuple(parameter.shape)}"
                    )
                state[index][name] = distribute_like(value, parameter)
    return state


def merged_groups(
    saved: Sequence[dict[str, Any]],
    before: Sequence[dict[str, Any]] | None,
    now: Sequence[dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the groups of a resumed optimizer, and the names of the changed settings.

    A setting that the user has changed has its new value. All others have the saved value, which a
    callback may have changed during the run. The arguments are those of `restore_optimizer`.

    Raises:
        SettingError: the groups contain other parameters.
    """
    before = older_settings(saved, now) if before is None else before
    if [each["parameters"] for each in before] != [each["parameters"] for each in now]:
        raise SettingError(OTHER_GROUPS)
    groups = []
    changed: list[str] = []
    for group, old, new in zip(saved, before, now, strict=False):
        merged = {name: value for name, value in group.items() if name != SCHEDULED_LR}
        for name, value in new["settings"].items():
            if name in old["settings"] and same_setting(old["settings"][name], value):
                continue
            merged[name] = value
            changed.append(name)
            if name == "lr":
                merged["initial_lr"] = value
        groups.append(merged)
    groups += saved[len(groups) :]  # those that a callback has added during the run
    return groups, list(dict.fromkeys(changed))


def older_settings(
    saved: Sequence[dict[str, Any]],
    now: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Return the assumed `group_settings` of a checkpoint of an earlier version without them.

    Args:
        saved: the groups in the state dict of the optimizer.
        now: `group_settings` of the optimizer as the user has built it.
    """
    assumed = []
    for group, new in zip(saved, now, strict=False):
        settings = dict(new["settings"])
        if "lr" in group:
            settings["lr"] = group.get("initial_lr", group["lr"])
        assumed.append({"settings": settings, "parameters": new["parameters"]})
    return assumed


def same_setting(one: Any, other: Any) -> bool:
    """Return whether two values of a setting are equal; a list equals a tuple of the same items."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return torch.equal(torch.as_tensor(one).cpu(), torch.as_tensor(other).cpu())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return list(one) == list(other)
    return bool(one == other)


def check_state(
    optimizer: Optimizer,
    state: Mapping[Any, Any],
    groups: Sequence[dict[str, Any]],
    changed: Sequence[str],
) -> None:
    """Raise SettingError if a changed setting needs state that was not saved, such as `amsgrad`.

    A copy of the optimizer takes a step on a parameter with one element, before training starts.

    Args:
        optimizer: it stays unchanged.
        state: the saved state, by the index of a parameter.
        groups: the result of `merged_groups`.
        changed: the names of the changed settings.
    """
    for group, own in zip(groups, optimizer.param_groups, strict=True):
        positions = [i for i, index in enumerate(group["params"]) if state.get(index)]
        if not positions:
            continue
        parameter = own["params"][positions[0]]
        parameter_state = state[group["params"][positions[0]]]
        try:
            small, element = on_one_element(optimizer, group, parameter)
            for name, value in parameter_state.items():
                small.state[element][name] = state_of_one_element(value, parameter)
            with seeds.undisturbed():
                small.step()
        except KeyError as error:
            raise SettingError(
                f"resume: the saved state of the optimizer has no {error}, which the changed "
                f"settings need ({', '.join(changed)}); start a new run with the saved weights"
            ) from error
        except Exception:  # other optimizers cannot be checked like this
            continue


def state_after_a_step(optimizer: Optimizer) -> dict[str, Any]:
    """Return the state of an optimizer after a step, for one parameter of each group.

    A copy of the optimizer takes the step, on a parameter with one element.

    Returns:
        The state by the index of the group, as a text. Groups for which the step fails are left
        out.
    """
    states: dict[str, Any] = {}
    for index, group in enumerate(optimizer.param_groups):
        if not group["params"]:
            continue
        try:
            small, element = on_one_element(optimizer, group, group["params"][0])
            with seeds.undisturbed():
                small.step()
            states[str(index)] = dict(small.state[element])
        except Exception:  # its state is known after its first step only
            continue
    return states


def on_one_element(
    optimizer: Optimizer,
    group: dict[str, Any],
    like: Tensor,
) -> tuple[Optimizer, nn.Parameter]:
    """Return an optimizer with the settings of a group, and its parameter with one element."""
    element = nn.Parameter(torch.zeros([1] * like.ndim, dtype=like.dtype))
    element.grad = torch.zeros_like(element)
    make: Callable[..., Optimizer] = type(optimizer)
    small = make([element])
    for name, value in group.items():
        if name not in ("params", "fused", "foreach"):
            small.param_groups[0][name] = value
    return small, element


def state_of_one_element(value: Any, parameter: Tensor) -> Any:
    """Return a value of the state of a parameter, reduced to a parameter with one element."""
    if not isinstance(value, Tensor):
        return copy.copy(value)
    if value.shape == parameter.shape:
        return torch.zeros([1] * value.ndim, dtype=value.dtype)
    return value.detach().cpu().clone()


def match_layout(optimizer: Optimizer) -> None:
    """Give the state tensors of each parameter its strides.

    Checkpoints store no strides, and fused kernels read parameters and state in the order of their
    memory.
    """
    for parameter, state in optimizer.state.items():
        if not isinstance(parameter, Tensor) or not isinstance(state, dict):
            continue  # some optimizers have other state in addition to that of the parameters
        for name, value in state.items():
            if not isinstance(value, Tensor) or value.shape != parameter.shape:
                continue
            if value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
