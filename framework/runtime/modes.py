"""Training and evaluation modes of modules."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import nn


@contextmanager
def restored_modes(model: nn.Module) -> Iterator[None]:
    """Let a block change the modes of a model's modules; restore them afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        if model.training != modes[model]:
            model.train(modes[model])  # some modules do more in `train` than set a flag
        for module, training in modes.items():
            module.training = training


class FitModes(NamedTuple):
    """The note that a fit leaves in each module, because it leaves the model in evaluation mode.

    Attributes:
        fit: the same object for all modules of one fit.
        training: the mode of the module that the user had set before the fit.
    """

    fit: object
    training: bool


# Without this note the next `fit` would take the evaluation mode for a choice of the user. It is an
# attribute of the module, so that copies of the module, and other models that include the module,
# have it too.
NOTE = "_left_by_fit"


class Modes:
    """The modules of a model that stay in evaluation mode while it trains.

    These are the modules that are in evaluation mode when the fit begins, unless the whole model is
    in evaluation mode: then all modules are trained. A module that an earlier fit left in
    evaluation mode counts with the mode before that fit, unless one of the modules of that fit is
    in training mode again: then the user has set the modes since.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        modes = modes_set_by_user(model)
        self.frozen: list[nn.Module] = []
        if modes[model]:
            self.frozen = [module for module, training in modes.items() if not training]
        self.set_by_user = set(self.frozen)

    def train(self) -> None:
        """Put the model into training mode, except for the modules that stay in evaluation mode."""
        self.model.train()
        for module in self.frozen:
            module.training = False

    def keep_choice(self) -> None:
        """Adopt the present modes, which callbacks may have changed."""
        if self.model.training:
            self.frozen = [module for module in self.model.modules() if not module.training]

    def keep_training(self) -> None:
        """Train in later epochs, too, the modules that callbacks have put into training mode."""
        self.frozen = [module for module in self.frozen if not module.training]

    def leave(self) -> None:
        """Put the model into evaluation mode, and note the modes that the user had set."""
        self.model.eval()
        fit = object()
        for module in self.model.modules():
            setattr(module, NOTE, FitModes(fit, module not in self.set_by_user))

    def names(self) -> Sequence[str]:
        """Return the names of the modules that stay in evaluation mode."""
        frozen = set(self.frozen)
        return [name for name, module in self.model.named_modules() if module in frozen]


def modes_set_by_user(model: nn.Module) -> dict[nn.Module, bool]:
    """Return for each module whether it was in training mode before a fit left it."""
    fits_changed_since = set()
    for module in model.modules():
        note = getattr(module, NOTE, None)
        if module.training and note is not None:
            fits_changed_since.add(note.fit)
    modes = {}
    for module in model.modules():
        note = getattr(module, NOTE, None)
        if note is None or note.fit in fits_changed_since:
            modes[module] = module.training
        else:
            modes[module] = note.training
    return modes
