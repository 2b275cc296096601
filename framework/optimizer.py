"""The contract of an optimizer, and the choice of the fastest implementation that runs where the parameters are.

An optimizer is any `torch.optim.Optimizer` that takes `params`: tensors, (name, tensor) pairs, or groups (dicts).
The trainer multiplies each group's own "lr" by the schedule's factor, and calls `step()` without a closure.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .registry import Maker


def build_optimizer(maker: Maker, params: Iterable[Any]) -> Optimizer:
    """Build the optimizer, fused where it can be; a `fused` or `foreach` among the maker's settings is left alone."""
    params, entry = list(params), maker.entry
    if not maker.settings.keys() & {"fused", "foreach"}:
        entry = replace(entry, part=partial(entry.part, **implementation(entry.part, params)))
    return Maker(entry, maker.settings)(params)


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
            yield from tensors(item["params"] if not isinstance(item["params"], Tensor) else [item["params"]])
        else:
            yield item[1] if isinstance(item, tuple) else item
