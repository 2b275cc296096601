"""Properties of a loss that can be read without calling it.

A loss is a module of torch or of the user, a function, a `functools.partial`, or a method.
"""

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100
"""The class index of a target that the loss ignores, in the targets that metrics receive."""

MODULES: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.CrossEntropyLoss: F.cross_entropy,
    nn.NLLLoss: F.nll_loss,
    nn.BCELoss: F.binary_cross_entropy,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
    nn.MSELoss: F.mse_loss,
    nn.L1Loss: F.l1_loss,
    nn.SmoothL1Loss: F.smooth_l1_loss,
    nn.HuberLoss: F.huber_loss,
    nn.PoissonNLLLoss: F.poisson_nll_loss,
    nn.SoftMarginLoss: F.soft_margin_loss,
    nn.HingeEmbeddingLoss: F.hinge_embedding_loss,
    nn.KLDivLoss: F.kl_div,
    nn.MultiMarginLoss: F.multi_margin_loss,
    nn.MultiLabelMarginLoss: F.multilabel_margin_loss,
    nn.MultiLabelSoftMarginLoss: F.multilabel_soft_margin_loss,
}
CLASS_LOSSES = (F.cross_entropy, F.nll_loss)


def known_function(loss: Callable[..., Any]) -> tuple[Callable[..., Tensor] | None, bool]:
    """Return the function of torch that a loss computes, and whether a subclass overrides it.

    Returns:
        A function of `torch.nn.functional`, or None for a loss that is not one of torch; and
        whether the loss is a subclass with its own `forward`.
    """
    loss = loss_function(loss)
    for module, function in MODULES.items():
        if loss is function:
            return function, False
        if isinstance(loss, module):
            return function, type(loss).forward is not module.forward
    return None, False


def loss_function(loss: Callable[..., Any]) -> Any:
    """Return the function or module that a partial, or a method of a module, calls."""
    while isinstance(loss, partial):
        loss = loss.func
    if isinstance(loss, MethodType) and isinstance(loss.__self__, nn.Module):
        return loss.__self__
    return loss


def loss_modules(loss: Callable[..., Any]) -> list[nn.Module]:
    """Return the modules of a loss: itself, the arguments of a partial, the owner of a method."""
    held: list[Any] = []
    while isinstance(loss, partial):
        held += [*loss.args, *loss.keywords.values()]
        loss = loss.func
    held.append(loss_function(loss))
    return [value for value in held if isinstance(value, nn.Module)]


def loss_name(loss: Callable[..., Any]) -> str:
    """Return the name of a loss for messages, such as "CrossEntropyLoss"."""
    inner = loss_function(loss)
    return str(getattr(inner, "__name__", type(inner).__name__))


def loss_setting(loss: Callable[..., Any], name: str, default: Any) -> Any:
    """Return a setting of a loss: an argument of a partial, or an attribute of a module."""
    while isinstance(loss, partial):
        if name in loss.keywords:
            return loss.keywords[name]
        loss = loss.func
    return getattr(loss_function(loss), name, default)


def own_count(loss: Callable[..., Any]) -> Callable[[Tensor], Any] | None:
    """Return the `count` of a loss that counts the items of its mean itself; None without one.

    It is a method of a module, or an attribute of a function. A number or buffer of that name does
    not count items.
    """
    count = getattr(loss, "count", None)
    return count if callable(count) else None


def class_weights(loss: Callable[..., Any]) -> Tensor | None:
    """Return the class weights of a loss, shape (classes,); None without any."""
    weight = loss_setting(class_loss(loss), "weight", None)
    return weight if isinstance(weight, Tensor) and weight.ndim == 1 else None


def ignored_index(loss: Callable[..., Any]) -> int | None:
    """Return the class index of the targets that a loss ignores; None if it ignores none."""
    loss = class_loss(loss)
    standard = IGNORED if known_function(loss)[0] in CLASS_LOSSES else None
    index = loss_setting(loss, "ignore_index", standard)
    return index if isinstance(index, int) else None


def class_loss(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return the loss that has the class weights and the ignored index.

    It is the only cross entropy inside a module without these attributes, else the loss itself.
    """
    module = loss_function(loss)
    if not isinstance(module, nn.Module) or hasattr(module, "ignore_index"):
        return loss
    if isinstance(getattr(module, "weight", None), Tensor):
        return loss
    inner = [m for m in module.modules() if isinstance(m, nn.CrossEntropyLoss | nn.NLLLoss)]
    return inner[0] if len(inner) == 1 else loss


def describe_outputs(value: Any) -> str:
    """Return a description of outputs: "a dict (logits, loss)", "a tuple of 2", "a float"."""
    if value is None:
        return "None"
    name = type(value).__name__
    if isinstance(value, dict):
        return f"a {name} ({', '.join(map(str, value))})"
    if isinstance(value, tuple | list):
        return f"a {name} of {len(value)}"
    return f"a {name}"
