"""Activation checkpointing: less memory for activations, at the cost of computing them again."""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from framework import Callback, Context, SettingError, callbacks, did_you_mean


@callbacks.register("activation_checkpointing", aliases=["gradient_checkpointing"])
class ActivationCheckpointing(Callback):
    """Stores only the inputs of chosen blocks, and runs the blocks again in the backward pass.

    (Chen et al. 2016, arXiv:1604.06174, section 4.) Results are bitwise the same, including dropout
    and running statistics. Each block costs one more forward pass. Of nested blocks, the outermost
    is checkpointed.

    Args:
        patterns: of the names of modules, as `plan` shows them, e.g. [blocks.*].
    """

    changes_training = False
    alone = True  # vectorized trials do not call the forward methods of the modules

    def __init__(self, patterns: list[str]):
        if not patterns:
            raise SettingError(
                "activation_checkpointing.patterns=[] has no effect: name blocks to checkpoint"
            )
        self.patterns = patterns
        self.wrapped: list[tuple[nn.Module, Any]] = []  # each with its own `forward` attribute

    def on_fit_start(self, trainer: Context) -> None:
        """Wrap the blocks.

        Raises:
            SettingError: a pattern matches no module, or steps are compiled or replayed.
        """
        for name, value in {"compile": trainer.compile, "cuda_graph": trainer.cuda_graph}.items():
            if value != "off":
                raise SettingError(f"activation_checkpointing requires {name}=off, not {value}")
        self.unwrap()
        for module in self.matching_modules(trainer.model):
            self.wrapped.append((module, vars(module).get("forward")))
            module.forward = partial(checkpointed_forward, module, module.forward)

    def on_fit_end(self, trainer: Context) -> None:
        self.unwrap()

    def on_exception(self, trainer: Context) -> None:
        self.unwrap()

    def matching_modules(self, model: nn.Module) -> list[nn.Module]:
        """Return the outermost modules whose names match a pattern.

        Raises:
            SettingError: a pattern matches no module.
        """
        named_modules = model.named_modules()
        modules = {name: module for name, module in named_modules if name and has_forward(module)}
        chosen: set[str] = set()
        for pattern in self.patterns:
            matches = [name for name in modules if fnmatchcase(name, pattern)]
            if not matches:
                suggestion = did_you_mean(pattern, modules)
                raise SettingError(
                    f"activation_checkpointing: no module matches {pattern!r}; {suggestion}"
                )
            chosen.update(matches)
        return [module for name, module in modules.items() if is_outermost(name, chosen)]

    def unwrap(self) -> None:
        """Restore the `forward` of each wrapped module."""
        for module, own_forward in self.wrapped:
            del module.forward  # leaves the method of the class
            if own_forward is not None:
                module.forward = own_forward
        self.wrapped = []


def has_forward(module: nn.Module) -> bool:
    """Return whether a module can be called; a ModuleList, for example, cannot."""
    return type(module).forward is not nn.Module.forward


def is_outermost(name: str, chosen: Collection[str]) -> bool:
    """Return whether a module is chosen, and no module that contains it is."""
    return name in chosen and not any(name.startswith(f"{other}.") for other in chosen)


def checkpointed_forward(
    module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Run the forward pass of a module such that the backward pass runs it again."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(
        forward, *args, use_reentrant=False, context_fn=partial(contexts, module), **kwargs
    )


def contexts(
    module: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the context of the first run of a module, and of the second with the same buffers."""
    initial = [buffer.clone() for buffer in module.buffers()]
    return nullcontext(), buffer_values(module, initial)


@contextmanager
def buffer_values(module: nn.Module, values: list[Tensor]) -> Iterator[None]:
    """Set the buffers of a module to these values for the duration of the context."""
    buffers = [buffer.data for buffer in module.buffers()]  # autograd does not track `data`
    current = [buffer.clone() for buffer in buffers]
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)
    try:
        yield
    finally:
        for buffer, value in zip(buffers, current, strict=True):
            buffer.copy_(value)
