"""The contract of an optimizer: parameter groups, and the choice of a fused implementation.

An optimizer is any `torch.optim.Optimizer` that takes `params`: tensors, (name, tensor) pairs, or
groups (dicts). The trainer multiplies the "lr" of each group by the factor of the schedule, and
calls `step()` without a closure.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from framework.errors import BuildError, SettingError, did_you_mean
from framework.registry.annotations import PositiveFloat, Range
from framework.registry.registry import Entry, Maker
from framework.runtime.torch_internals.lazy_compiler import defer_compiler

FORM_ERRORS = (KeyError, RuntimeError, AssertionError, AttributeError, TypeError)
"""Errors of a constructor that needs its parameters in another form."""
DECAYED = "weights"
NOT_DECAYED = "biases and norms"


class Parameters:
    """Divides the parameters of a model into the groups that the optimizer is built with."""

    def __init__(
        self,
        decay: Literal["weights", "all"] = "weights",
        rates: dict[str, PositiveFloat] | None = None,
        layer_decay: Annotated[float, Range("(0, 1]")] = 1.0,
    ):
        """Set which parameters are decayed, and their learning rates.

        Args:
            decay: parameters that the optimizer's weight_decay applies to: weights (all with two
                axes or more, so neither biases nor the scales of norms), or all.
            rates: factors on the learning rate by patterns of parameter names, e.g. {head.*: 10}
                for the parameters of the layer `head` of `plan`; of several matching patterns the
                first one counts.
            layer_decay: factor on the learning rate from each layer to the previous one; the last
                layer keeps its rate (Howard and Ruder 2018, arXiv:1801.06146, section 3.2). A layer
                is a numbered module, such as blocks.3.
        """
        self.decay = decay
        self.rates = rates or {}
        self.layer_decay = layer_decay

    def groups(self, model: nn.Module, maker: Maker) -> list[Any]:
        """Return the parameters of a model in the form that its optimizer takes.

        Args:
            model: any module.
            maker: the optimizer and its settings.

        Returns:
            A list of parameters, or of groups if their settings differ. Groups keep the order of
            the model, for optimizers that depend on it.

        Raises:
            SettingError: a pattern matches no parameter, or the optimizer has no learning rate.
        """
        settings = {
            name: maker.settings.get(name, setting.default)
            for name, setting in maker.entry.settings.items()
        }
        if (self.rates or self.layer_decay != 1.0) and "lr" not in settings:
            setting = "rates" if self.rates else "layer_decay"
            raise SettingError(
                f"parameters.{setting}: {maker.entry} has no learning rate `lr` to multiply"
            )
        named = dict(model.named_parameters())
        factors = self.factors(list(named))
        splits_decay = self.decay == "weights" and bool(settings.get("weight_decay"))
        groups: list[dict[str, Any]] = []
        for factor, names in groupby(named, factors.__getitem__):
            parameters = [named[name] for name in names]
            parts = split_by_decay(parameters) if splits_decay else {"all": parameters}
            for part, members in parts.items():
                name = part if factor == 1 else f"{part} x {factor:.3g}"
                group: dict[str, Any] = {"params": members, "name": name}
                if part == NOT_DECAYED:
                    group["weight_decay"] = 0.0
                if factor != 1:
                    group["lr"] = settings["lr"] * factor
                groups.append(group)
        if len(groups) == 1 and not groups[0].keys() & {"lr", "weight_decay"}:
            return list(groups[0]["params"])
        return groups

    def factors(self, names: list[str]) -> dict[str, float]:
        """Return the factor on the learning rate of each parameter.

        Raises:
            SettingError: a pattern of `rates` matches none of the names.
        """
        for pattern in self.rates:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise SettingError(
                    f"parameters.rates: no parameter matches {pattern!r}; "
                    f"{did_you_mean(pattern, names, most=10)}"
                )
        layers = list(dict.fromkeys(map(layer_of, names)))
        factors = {}
        for name in names:
            layers_above = len(layers) - 1 - layers.index(layer_of(name))
            factors[name] = self._rate(name) * self.layer_decay**layers_above
        return factors

    def _rate(self, name: str) -> float:
        """Return the factor of the first pattern of `rates` that matches a name."""
        for pattern, rate in self.rates.items():
            if fnmatchcase(name, pattern):
                return rate
        return 1.0


def split_by_decay(parameters: Iterable[nn.Parameter]) -> dict[str, list[nn.Parameter]]:
    """Return the parameters that are decayed and those that are not, without empty lists."""
    parts: dict[str, list[nn.Parameter]] = {DECAYED: [], NOT_DECAYED: []}
    for parameter in parameters:
        parts[DECAYED if parameter.ndim >= 2 else NOT_DECAYED].append(parameter)
    return {name: members for name, members in parts.items() if members}


def layer_of(name: str) -> str:
    """Return the layer of a parameter: its name up to the first number, or its first component.

    "blocks.3.linear.weight" is in the layer "blocks.3", and "head.weight" in "head".
    """
    components = name.split(".")
    for index, component in enumerate(components):
        if component.isdigit():
            return ".".join(components[: index + 1])
    return components[0]


def build_optimizer(
    entry: Entry,
    given: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Optimizer:
    """Build an optimizer, with its fused implementation if possible.

    It is the `Kind.builder` of optimizers. The settings `fused` and `foreach` take precedence.

    Args:
        entry: the optimizer.
        given: "params" is an iterable of tensors, (name, tensor) pairs or groups.
        settings: of the optimizer, checked.

    Raises:
        BuildError: the optimizer cannot be built.
    """
    defer_compiler()
    params = [with_list(item) for item in given.get("params", ())]
    if not settings.keys() & {"fused", "foreach"}:
        settings = {**settings, **implementation(entry.part, params)}
    try:
        optimizer: Optimizer = entry.build({**given, "params": params}, settings)
    except BuildError as error:
        cause = error.__cause__
        if not isinstance(cause, FORM_ERRORS):
            raise
        kind = "groups" if params and isinstance(params[0], Mapping) else "parameters"
        raise BuildError(
            f"{error}; an optimizer receives a list of {len(params)} {kind}: "
            "for other groups, register a function that creates them from `params`"
        ) from cause
    return optimizer


def with_list(item: Any) -> Any:
    """Return an item of `params`; if it is a group with an iterator, with a list in its place."""
    if not isinstance(item, Mapping) or isinstance(item["params"], Tensor):
        return item
    return {**item, "params": list(item["params"])}


def implementation(part: Callable[..., Optimizer], params: Iterable[Any]) -> dict[str, bool]:
    """Return {"fused": True} if an optimizer has a fused kernel for all parameters, else {}.

    {} leaves the choice to the optimizer. Those of torch use their multi-tensor (foreach)
    implementation on accelerators but not on the CPU, where it takes 0.4 to 2.8 times as long as
    the loop over parameters, depending on the optimizer.

    Args:
        part: a class of optimizers, or a function that returns an optimizer.
        params: tensors, (name, tensor) pairs or groups.
    """
    if "fused" not in inspect.signature(part).parameters:
        return {}
    parameters = list(tensors(params))
    if not parameters or not all(map(is_dense, parameters)):
        return {}  # the kernels read parameters in the order of their memory
    places = {(parameter.device, parameter.dtype) for parameter in parameters}
    if all(runs_fused(part, *place) for place in places):
        return {"fused": True}
    return {}


def is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor fills its memory without gaps and overlaps, in any order of axes.

    A parameter of a lazy module will, as it gets its memory from torch.
    """
    if is_lazy(tensor):
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def runs_fused(part: Callable[..., Optimizer], device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether an optimizer has a fused kernel for a device and dtype.

    It runs two steps on some numbers, since the kernels differ between releases of torch: that of
    SGD for bf16 and fp16 on a CPU is wrong in torch 2.13 (from 16 numbers on).
    """
    results: list[Tensor] = []
    try:
        for fused in (True, False):
            parameter = nn.Parameter(torch.zeros(64, device=device, dtype=dtype))
            parameter.grad = torch.full_like(parameter, 0.5)
            optimizer = part([parameter], fused=fused)
            optimizer.step()
            optimizer.step()
            results.append(parameter.detach())
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError):
        return False
    return torch.allclose(results[0], results[1], rtol=0.02, atol=0.0)


def tensors(params: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the parameters from tensors, (name, tensor) pairs or groups."""
    for item in params:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping):
            members = item["params"]
            yield from tensors([members] if isinstance(members, Tensor) else members)
        else:
            yield item[1]
