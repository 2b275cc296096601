"""Freezing of parameters, for some epochs or the whole run."""

from fnmatch import fnmatchcase

from torch import nn

from framework import Callback, Context, NonNegativeInt, SettingError, callbacks, did_you_mean


@callbacks.register("freeze", aliases=["freezing"])
class Freeze(Callback):
    """Freezes parameters for the whole run, for some epochs, or with gradual unfreezing.

    Gradual unfreezing (Howard and Ruder 2018, arXiv:1801.06146, section 3.3) unfreezes one pattern
    after the other, the last one first. Layers with frozen parameters only, such as batch norms,
    run in eval mode, so their running statistics do not change either. Logs
    train/frozen_parameters, the count of frozen numbers, whenever it changes.

    Args:
        patterns: of the names of parameters, e.g. [blocks.*] for the layers that `plan` shows as
            blocks.0, blocks.1, ...; those of the last pattern are unfrozen first.
        epochs: epochs until those of the last pattern are unfrozen; null: never.
        every: epochs between the unfreezing of one pattern and of the pattern before it; 0: all
            at once.
    """

    alone = True  # in vectorized trials, one trial cannot freeze the parameters of all

    def __init__(
        self, patterns: list[str], epochs: NonNegativeInt | None = None, every: NonNegativeInt = 0
    ):
        if not patterns:
            raise SettingError("freeze.patterns=[] has no effect: name parameters to freeze")
        self.patterns = patterns
        self.epochs = epochs
        self.every = every
        self.frozen: set[str] = set()
        self.frozen_parameters: dict[str, nn.Parameter] = {}
        self.frozen_modules: list[nn.Module] = []

    def on_fit_start(self, trainer: Context) -> None:
        """Freeze the parameters of this epoch.

        Raises:
            SettingError: a pattern matches no parameter, or the patterns match all parameters.
        """
        names: list[str] = []
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad or name in self.frozen:
                names.append(name)
        self.names: dict[str, list[str]] = {}  # by pattern: the parameters that match it
        for pattern in self.patterns:
            self.names[pattern] = [name for name in names if fnmatchcase(name, pattern)]
            if not self.names[pattern]:
                raise SettingError(
                    f"freeze: no parameter matches {pattern!r}; {did_you_mean(pattern, names)}"
                )
        if self.frozen_in(0) >= set(names):
            raise SettingError(
                "freeze: the patterns match every parameter, so no parameter is left to train"
            )
        self.apply(trainer)

    def on_epoch_start(self, trainer: Context) -> None:
        self.apply(trainer)

    def on_step_start(self, trainer: Context) -> None:
        for module in self.frozen_modules:  # `model.train()` in each epoch resets them
            module.training = False

    def on_fit_end(self, trainer: Context) -> None:
        self.freeze(trainer.model, set())

    def on_exception(self, trainer: Context) -> None:
        self.freeze(trainer.model, set())

    def needs_gradients(self, trainer: Context) -> bool:
        return False

    def frozen_in(self, epoch: int) -> set[str]:
        """Return the names of the parameters that are frozen in an epoch, counted from 0."""
        frozen: set[str] = set()
        for number, pattern in enumerate(reversed(self.patterns)):
            if self.epochs is None or epoch < self.epochs + number * self.every:
                frozen.update(self.names[pattern])
        return frozen

    def apply(self, trainer: Context) -> None:
        """Freeze the parameters of the current epoch, and unfreeze the others."""
        names = self.frozen_in(trainer.state.epoch)
        if names != self.frozen:
            self.freeze(trainer.model, names)
            count = sum(parameter.numel() for parameter in self.frozen_parameters.values())
            trainer.log({"train/frozen_parameters": float(count)})
        elif self._replaced(trainer.model):
            self.freeze(trainer.model, names)

    def freeze(self, model: nn.Module, names: set[str]) -> None:
        """Freeze these parameters, and unfreeze all others that this callback has frozen."""
        for name in names | self.frozen:
            model.get_parameter(name).requires_grad_(name not in names)
        self.frozen = names
        self.frozen_parameters = {name: model.get_parameter(name) for name in names}
        self.frozen_modules = []
        for module_name, module in model.named_modules():
            owned = [name for name, _ in module.named_parameters(module_name)]
            if owned and names.issuperset(owned):
                self.frozen_modules.append(module)

    def _replaced(self, model: nn.Module) -> bool:
        """Return whether another callback has replaced a frozen parameter by a new one."""
        for name, parameter in self.frozen_parameters.items():
            if model.get_parameter(name) is not parameter:
                return True
        return False
