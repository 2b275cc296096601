"""The contract of an optimizer, and the choice of the fastest implementation that runs where the parameters are.

An optimizer is any `torch.optim.Optimizer` that takes `params`: tensors, (name, tensor) pairs, or groups (dicts).
The trainer multiplies each group's own "lr" by the schedule's factor, and calls `step()` without a closure.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from framework.errors import BuildError, SettingError, did_you_mean
from framework.registry.registry import Maker
from framework.registry.schema import PositiveFloat, Range
from framework.runtime import seeds
from framework.runtime.torch_internals.lazy_compiler import defer_compiler

OTHER_GROUPS = "resume: the optimizer has other parameter groups than the saved one"
LEFT = "scheduled_lr"  # in a parameter group: the learning rate after a fit with a schedule
FORM_ERRORS = (KeyError, RuntimeError, AssertionError, AttributeError, TypeError)
"""What a constructor may raise when parameters do not come in the form that it needs."""
NOT_GIVEN = ("params", "initial_lr", LEFT)


class Parameters:
    """How the parameters of a model differ in training: makes the groups that the optimizer is built with."""

    def __init__(
        self,
        decay: Literal["weights", "all"] = "weights",
        rates: dict[str, PositiveFloat] | None = None,
        layer_decay: Annotated[float, Range("(0, 1]")] = 1.0,
    ):
        """Say which are decayed, and how fast each learns.

        Args:
            decay: which ones the optimizer's weight_decay is for: weights (matrices and kernels, neither biases nor the
                scales of norms: all with two axes or more), or all.
            rates: factors on the learning rate by patterns of names as `plan` shows them, e.g. {head.*: 10}; of
                several patterns that fit the first counts.
            layer_decay: factor on the learning rate from a layer to the one before it, the last one keeping its own
                (Howard and Ruder 2018, arXiv:1801.06146, section 3.2). A layer is a numbered module, such as blocks.3.
        """
        self.decay, self.rates, self.layer_decay = decay, rates or {}, layer_decay

    def groups(self, model: nn.Module, maker: Maker) -> list[Any]:
        """Return the parameters as an optimizer of that maker takes them: groups, where they differ.

        Groups keep the order of the model, for optimizers to which it means something. Raises SettingError for a
        pattern that fits no parameter.
        """
        names, known = list(dict(model.named_parameters())), maker.entry.settings
        settings = {name: maker.settings.get(name, setting.default) for name, setting in known.items()}
        if (self.rates or self.layer_decay != 1.0) and "lr" not in settings:
            setting = "rates" if self.rates else "layer_decay"
            said = f"{maker.entry} has no learning rate `lr` that could differ"
            raise SettingError(f"parameters.{setting}: {said}")
        factors, spared = self.factors(names), self.decay == "weights" and bool(settings.get("weight_decay"))
        found: list[dict[str, Any]] = []
        for factor, run in groupby(names, factors.__getitem__):
            each = {name: model.get_parameter(name) for name in run}
            for name, few in (("weights", False), ("biases and norms", True)) if spared else (("all", None),):
                chosen = [p for p in each.values() if few is None or (p.ndim < 2) == few]
                group: dict[str, Any] = {"params": chosen, "name": name if factor == 1 else f"{name} x {factor:.3g}"}
                group |= {"weight_decay": 0.0} if few else {}
                found += [group | ({} if factor == 1 else {"lr": settings["lr"] * factor})] if chosen else []
        plain = len(found) == 1 and not found[0].keys() & {"lr", "weight_decay"}
        return found[0]["params"] if plain else found

    def factors(self, names: list[str]) -> dict[str, float]:
        """Return the factor on the learning rate of each parameter."""
        layers = list(dict.fromkeys(map(layer_of, names)))
        depth = {name: len(layers) - 1 - layers.index(layer_of(name)) for name in names}
        for pattern in self.rates:
            if not any(fnmatchcase(name, pattern) for name in names):
                said = did_you_mean(pattern, names, most=10)
                raise SettingError(f"parameters.rates: no parameter fits {pattern!r}; {said}")
        first = {n: next((f for p, f in self.rates.items() if fnmatchcase(n, p)), 1.0) for n in names}
        return {name: first[name] * self.layer_decay ** depth[name] for name in names}


def layer_of(name: str) -> str:
    """Return the layer of a parameter: its name up to the first number, or else its first word."""
    words = name.split(".")
    number = next((place for place, word in enumerate(words) if word.isdigit()), 0)
    return ".".join(words[: number + 1])


def build_optimizer(maker: Maker, params: Iterable[Any]) -> Optimizer:
    """Build the optimizer, fused where it can be; a `fused` or `foreach` among the maker's settings is left alone."""
    defer_compiler()
    params, entry = list(params), maker.entry
    chosen = {} if maker.settings.keys() & {"fused", "foreach"} else implementation(entry.part, params)
    try:
        return entry.build({"params": params}, {**maker.settings, **chosen})
    except BuildError as error:
        cause = error.__cause__
        if not isinstance(cause, FORM_ERRORS):
            raise
        kind = "groups" if params and isinstance(params[0], Mapping) else "parameters"
        given = f"an optimizer gets a list of {len(params)} {kind}"
        advice = "for other groups, register a function that makes them of `params`"
        raise BuildError(f"{error}; {given}: {advice}") from cause


def implementation(part: Callable[..., Optimizer], params: Iterable[Any]) -> dict[str, bool]:
    """Return {"fused": True} when the part has a fused step that runs on every device and dtype of the parameters.

    Else {}, which leaves the choice to the part. torch's own take their multi-tensor (foreach) step on accelerators;
    on the CPU they do not, and rightly: there it took 0.4 to 2.8 times as long as the plain step, as the rule may be.
    """
    if "fused" not in inspect.signature(part).parameters:
        return {}
    places = {(tensor.device, tensor.dtype) for tensor in tensors(params)}
    return {"fused": True} if places and all(runs_fused(part, *place) for place in places) else {}


def runs_fused(part: Callable[..., Optimizer], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a fused step works there. One is tried, on one number: which kernels exist differs between releases."""
    tried = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))
    tried.grad = torch.zeros_like(tried)
    try:
        part([tried], fused=True).step()
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return False
    return True


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
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def tensors(params: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the parameters, whether they come bare, as (name, tensor) pairs or in groups."""
    for item in params:
        if isinstance(item, Mapping):
            yield from tensors(item["params"] if not isinstance(item["params"], Tensor) else [item["params"]])
        else:
            yield item[1] if isinstance(item, tuple) else item
