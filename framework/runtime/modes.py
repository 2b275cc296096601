"""Training and evaluation modes: modules that the user put into evaluation mode stay in it."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn


class FitModes(NamedTuple):
    """What a fit noted of a module when it left it in evaluation mode.

    Attributes:
        fit: the same object for all modules of one fit.
        training: the mode of the module that its user had set before the fit.
    """

    fit: object
    training: bool


# `fit` leaves the whole model in evaluation mode. Without this note the next `fit` would take that
# for a choice of the user. It is an attribute of the module, so that copies of the module, and other
# models that it becomes a part of, have it too.
NOTE = "_left_by_fit"


class Modes:
    """Knows which modules of a model stay in evaluation mode while it trains.

    These are the ones that are in evaluation mode when the fit begins, except where the model
    itself is: then all of it is trained. What an earlier fit left in evaluation mode counts as it
    was trained, unless one of the modules of that fit is in training mode again: then its user has
    set the modes since.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        modes = modes_set_by_user(model)
        self.still: list[nn.Module] = []
        if modes[model]:
            self.still = [module for module, training in modes.items() if not training]
        self.set_by_user = set(self.still)

    def train(self) -> None:
        """Put the model into training mode, apart from the modules that stay in evaluation mode."""
        self.model.train()
        for module in self.still:
            module.training = False

    def keep_choice(self) -> None:
        """Keep in evaluation mode what is in it now: callbacks may have chosen other modules."""
        if self.model.training:
            self.still = [module for module in self.model.modules() if not module.training]

    def keep_training(self) -> None:
        """Train in later epochs too what callbacks have put into training mode in this one."""
        self.still = [module for module in self.still if not module.training]

    def leave(self) -> None:
        """Put the model into evaluation mode, and note which modules its user had put there."""
        self.model.eval()
        fit = object()
        for module in self.model.modules():
            setattr(module, NOTE, FitModes(fit, module not in self.set_by_user))

    def names(self) -> Sequence[str]:
        """Return the names of the modules that stay in evaluation mode."""
        still = set(self.still)
        return [name for name, module in self.model.named_modules() if module in still]


def modes_set_by_user(model: nn.Module) -> dict[nn.Module, bool]:
    """Return which modules are in training mode, as if no fit had left them in evaluation mode."""
    changed_since = set()
    for module in model.modules():
        left = getattr(module, NOTE, None)
        if module.training and left is not None:
            changed_since.add(left.fit)
    modes = {}
    for module in model.modules():
        left = getattr(module, NOTE, None)
        as_left = left is not None and left.fit not in changed_since
        modes[module] = left.training if left is not None and as_left else module.training
    return modes
