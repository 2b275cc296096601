"""Memory for time: what a forward pass keeps for the backward pass, computed again instead."""

from collections.abc import Callable, Iterator
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
    """Keeps only the inputs of chosen blocks, and runs these again in the backward pass (Chen et al. 2016).

    arXiv:1604.06174, section 4. The numbers are bitwise the same, dropout and running statistics included; a chosen
    block costs another forward pass. Of blocks in each other the outermost is kept together.
    """

    changes_training = False
    alone = True  # trials that train as one go through their layers by themselves

    def __init__(self, patterns: list[str]):
        """Say which blocks.

        Args:
            patterns: of modules' names, as those of layers in `plan` begin, e.g. [blocks.*].
        """
        if not patterns:
            raise SettingError(
                "activation_checkpointing: `patterns` is empty, so no block would be run again"
            )
        self.patterns = patterns
        self.wrapped: list[tuple[nn.Module, Any]] = []  # with the module's own `forward`

    def on_fit_start(self, trainer: Context) -> None:
        """Wrap the blocks. Raises SettingError for a pattern that fits none, where steps are compiled, or replayed."""
        for name, value in {"compile": trainer.compile, "cuda_graph": trainer.cuda_graph}.items():
            if value != "off":
                raise SettingError(f"activation_checkpointing goes with {name}=off, not {value}")
        modules = {
            name: each for name, each in trainer.model.named_modules() if name and runs(each)
        }
        for pattern in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in modules):
                said = did_you_mean(pattern, modules)
                raise SettingError(f"activation_checkpointing: no module fits {pattern!r}; {said}")
        chosen = [
            name for name in modules if any(fnmatchcase(name, pattern) for pattern in self.patterns)
        ]
        outermost = [
            name for name in chosen if not any(name.startswith(f"{other}.") for other in chosen)
        ]
        self.unwrap()
        for module in dict.fromkeys(map(modules.__getitem__, outermost)):
            self.wrapped.append((module, vars(module).get("forward")))
            module.forward = partial(again, module, module.forward)

    def on_fit_end(self, trainer: Context) -> None:
        self.unwrap()

    def on_exception(self, trainer: Context) -> None:
        self.unwrap()

    def unwrap(self) -> None:
        for module, own in self.wrapped:
            del module.forward  # what is left is the method of its class
            if own is not None:
                module.forward = own
        self.wrapped = []


def runs(module: nn.Module) -> bool:
    """Whether a module is called itself, as a list of modules is not."""
    return type(module).forward is not nn.Module.forward


def again(module: nn.Module, forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    """Run a module's forward pass such that the backward pass runs it again."""
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    return checkpoint(
        forward, *inputs, use_reentrant=False, context_fn=partial(contexts, module), **named
    )


def contexts(module: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Return what surrounds the first run of a module and the second, which sees the buffers that the first saw."""
    before = [buffer.clone() for buffer in module.buffers()]
    return nullcontext(), as_they_were(module, before)


@contextmanager
def as_they_were(module: nn.Module, before: list[Tensor]) -> Iterator[None]:
    buffers = [
        buffer.data for buffer in module.buffers()
    ]  # which autograd does not watch for changes
    now = [buffer.clone() for buffer in buffers]
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)
    try:
        yield
    finally:
        for buffer, value in zip(buffers, now, strict=True):
            buffer.copy_(value)
