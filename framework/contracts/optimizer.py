"""The contract of an optimizer, and the choice of the fastest implementation that runs where the parameters are.

An optimizer is any `torch.optim.Optimizer` that takes `params`: tensors, (name, tensor) pairs, or groups (dicts).
The trainer multiplies each group's own "lr" by the schedule's factor, and calls `step()` without a closure.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from framework.errors import BuildError, SettingError, did_you_mean
from framework.registry.annotations import PositiveFloat, Range
from framework.registry.registry import Maker
from framework.runtime.torch_internals.lazy_compiler import defer_compiler

FORM_ERRORS = (KeyError, RuntimeError, AssertionError, AttributeError, TypeError)
"""What a constructor may raise when parameters do not come in the form that it needs."""


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
        settings = {
            name: maker.settings.get(name, setting.default) for name, setting in known.items()
        }
        if (self.rates or self.layer_decay != 1.0) and "lr" not in settings:
            setting = "rates" if self.rates else "layer_decay"
            said = f"{maker.entry} has no learning rate `lr` that could differ"
            raise SettingError(f"parameters.{setting}: {said}")
        factors, spared = (
            self.factors(names),
            self.decay == "weights" and bool(settings.get("weight_decay")),
        )
        found: list[dict[str, Any]] = []
        for factor, run in groupby(names, factors.__getitem__):
            each = {name: model.get_parameter(name) for name in run}
            for name, few in (
                (("weights", False), ("biases and norms", True)) if spared else (("all", None),)
            ):
                chosen = [p for p in each.values() if few is None or (p.ndim < 2) == few]
                group: dict[str, Any] = {
                    "params": chosen,
                    "name": name if factor == 1 else f"{name} x {factor:.3g}",
                }
                group |= {"weight_decay": 0.0} if few else {}
                found += (
                    [group | ({} if factor == 1 else {"lr": settings["lr"] * factor})]
                    if chosen
                    else []
                )
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
        first = {
            n: next((f for p, f in self.rates.items() if fnmatchcase(n, p)), 1.0) for n in names
        }
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
    chosen = (
        {} if maker.settings.keys() & {"fused", "foreach"} else implementation(entry.part, params)
    )
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


def tensors(params: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the parameters, whether they come bare, as (name, tensor) pairs or in groups."""
    for item in params:
        if isinstance(item, Mapping):
            yield from tensors(
                item["params"] if not isinstance(item["params"], Tensor) else [item["params"]]
            )
        else:
            yield item[1] if isinstance(item, tuple) else item
