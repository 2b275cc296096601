"""The state of an optimizer in a fit: learning rates, settings, restoring a saved state."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from framework.errors import SettingError
from framework.runtime import seeds

OTHER_GROUPS = "resume: the optimizer has other parameter groups than the saved one"
LEFT = "scheduled_lr"  # in a parameter group: the learning rate after a fit with a schedule
NOT_GIVEN = ("params", "initial_lr", LEFT)


def start_learning_rates(optimizer: Optimizer, scheduled: bool) -> None:
    """Set the learning rates that a fit starts with, and keep them as "initial_lr".

    A rate that the schedule of an earlier fit left (see `mark_learning_rates`) becomes the rate
    without that schedule again, unless the user has set another one since.
    """
    for group in optimizer.param_groups:
        if "lr" not in group:
            continue
        left = group.pop(LEFT, None)
        if left is not None and left == group["lr"]:
            group["lr"] = group["initial_lr"]
        if scheduled:
            group["initial_lr"] = group["lr"]
        else:
            group.setdefault("initial_lr", group["lr"])


def mark_learning_rates(optimizer: Optimizer) -> None:
    """Note in each group that its learning rate is one that a schedule left."""
    for group in optimizer.param_groups:
        if "lr" in group:
            group[LEFT] = group["lr"]


def group_settings(optimizer: Optimizer, model: nn.Module) -> list[dict[str, Any]]:
    """Return the present settings of each group, and the names of its parameters in the model.

    Taken when a fit starts, these are the settings that the optimizer was built with, before a
    schedule or a callback changes them. Checkpoints keep them, so that a resumed run can tell which
    settings the user has changed.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = []
    for group in optimizer.param_groups:
        kept = {name: value for name, value in group.items() if name not in NOT_GIVEN}
        parameters = [names.get(parameter, "") for parameter in group["params"]]
        found.append({"settings": copy.deepcopy(kept), "parameters": parameters})
    return found


def restore_optimizer(
    optimizer: Optimizer,
    saved: dict[str, Any],
    before: Sequence[dict[str, Any]] | None,
    now: Sequence[dict[str, Any]],
) -> None:
    """Load a saved state into an optimizer, but for the settings that the user has changed since.

    Args:
        optimizer: one over the same parameters in the same groups.
        saved: what `state_dict` of the optimizer gave; its tensors are copied.
        before: `group_settings` at the start of the saved fit; None for a checkpoint of an earlier
            version, of whose settings only the learning rate can be compared.
        now: `group_settings` of the optimizer as the user has built it.

    Raises SettingError when the groups hold other parameters, and when a changed setting needs
    state that was not saved.
    """
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if [len(group["params"]) for group in saved["param_groups"]] != sizes:
        raise SettingError(OTHER_GROUPS)
    groups, changed = merged_groups(saved["param_groups"], before, now)
    if changed:
        check_state(optimizer, saved["state"], groups, changed)
    state = copy.deepcopy(saved["state"])
    optimizer.load_state_dict({**saved, "state": state, "param_groups": groups})
    match_layout(optimizer)


def merged_groups(
    saved: Sequence[dict[str, Any]],
    before: Sequence[dict[str, Any]] | None,
    now: Sequence[dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the groups of a resumed optimizer, and the names of the changed settings.

    A setting that the user has changed has its new value; every other one has the saved value,
    which a callback may have changed during the run.

    Raises SettingError when the groups hold other parameters.
    """
    before = older_settings(saved, now) if before is None else before
    if [each["parameters"] for each in before] != [each["parameters"] for each in now]:
        raise SettingError(OTHER_GROUPS)
    groups = []
    changed: list[str] = []
    for group, old, new in zip(saved, before, now, strict=False):
        merged = {name: value for name, value in group.items() if name != LEFT}
        for name, value in new["settings"].items():
            if name in old["settings"] and same_setting(old["settings"][name], value):
                continue
            merged[name] = value
            changed.append(name)
            if name == "lr":
                merged["initial_lr"] = value
        groups.append(merged)
    groups += saved[len(groups) :]  # which a callback has added after the start
    return groups, list(dict.fromkeys(changed))


def older_settings(
    saved: Sequence[dict[str, Any]],
    now: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Return what `group_settings` is taken to have been for a checkpoint that does not hold it."""
    found = []
    for group, new in zip(saved, now, strict=False):
        settings = dict(new["settings"])
        if "lr" in group:
            settings["lr"] = group.get("initial_lr", group["lr"])
        found.append({"settings": settings, "parameters": new["parameters"]})
    return found


def same_setting(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return torch.equal(torch.as_tensor(one).cpu(), torch.as_tensor(other).cpu())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return list(one) == list(other)
    return one == other


def check_state(
    optimizer: Optimizer,
    state: Mapping[Any, Any],
    groups: Sequence[dict[str, Any]],
    changed: Sequence[str],
) -> None:
    """Raise SettingError when a changed setting needs state that was not saved, as `amsgrad` does.

    A step on a parameter of one number shows it, before anything is trained.
    """
    for group, own in zip(groups, optimizer.param_groups, strict=True):
        places = [place for place, index in enumerate(group["params"]) if state.get(index)]
        if not places:
            continue
        parameter = own["params"][places[0]]
        kept = state[group["params"][places[0]]]
        try:
            tried, number = on_one_number(optimizer, group, parameter)
            for name, value in kept.items():
                tried.state[number][name] = of_one_number(value, parameter)
            with seeds.undisturbed():
                tried.step()
        except KeyError as error:
            raise SettingError(
                f"resume: the saved state of the optimizer has no {error}, which the changed "
                f"settings need ({', '.join(changed)}); start a new run with the saved weights"
            ) from error
        except Exception:  # an optimizer that cannot be tried like this is taken as it is
            continue


def state_after_a_step(optimizer: Optimizer) -> dict[str, Any]:
    """Return the state that an optimizer keeps after a step, for one parameter of each group.

    A step on a parameter of one number shows it; the optimizer itself takes none. Groups on which
    it fails are left out.
    """
    found: dict[str, Any] = {}
    for place, group in enumerate(optimizer.param_groups):
        if not group["params"]:
            continue
        try:
            tried, number = on_one_number(optimizer, group, group["params"][0])
            with seeds.undisturbed():
                tried.step()
            found[str(place)] = dict(tried.state[number])
        except Exception:  # what it keeps shows after its first step
            continue
    return found


def on_one_number(
    optimizer: Optimizer,
    group: dict[str, Any],
    like: Tensor,
) -> tuple[Optimizer, nn.Parameter]:
    """Return an optimizer with the settings of a group, and its parameter of one number."""
    number = nn.Parameter(torch.zeros([1] * like.ndim, dtype=like.dtype))
    number.grad = torch.zeros_like(number)
    make: Callable[..., Optimizer] = type(optimizer)
    tried = make([number])
    left_out = ("params", "fused", "foreach")
    settings = {name: value for name, value in group.items() if name not in left_out}
    tried.param_groups[0].update(settings)
    return tried, number


def of_one_number(value: Any, parameter: Tensor) -> Any:
    """Return a value of the state of a parameter for a parameter of one number."""
    if not isinstance(value, Tensor):
        return copy.copy(value)
    if value.shape == parameter.shape:
        return torch.zeros([1] * value.ndim, dtype=value.dtype)
    return value.detach().cpu().clone()


def match_layout(optimizer: Optimizer) -> None:
    """Lay the state out in memory as its parameters are, since checkpoints keep no strides and fused kernels go by
    memory."""
    for parameter, state in optimizer.state.items():
        if not isinstance(parameter, Tensor) or not isinstance(state, dict):
            continue  # some optimizers keep values of their own beside those of the parameters
        for name, value in state.items():
            if (
                isinstance(value, Tensor)
                and value.shape == parameter.shape
                and value.stride() != parameter.stride()
            ):
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
