"""Freezing: parameters that stay as they are, for a while or for good."""

from fnmatch import fnmatchcase

from torch import nn

from framework import Callback, Context, NonNegativeInt, SettingError, callbacks, did_you_mean


@callbacks.register("freeze", aliases=["freezing"])
class Freeze(Callback):
    """Keeps parameters as they are: for good, for some epochs, or thawing one pattern after the other from the last.

    The last is gradual unfreezing (Howard and Ruder 2018, arXiv:1801.06146, section 3.3). Layers all of whose
    parameters are frozen, such as batch norms, run as in evaluation, so that their running statistics stay too. Logs
    train/frozen_parameters, how many numbers are frozen, whenever that changes.
    """

    alone = True  # one of many trials that train as one cannot freeze what the others train

    def __init__(
        self, patterns: list[str], epochs: NonNegativeInt | None = None, every: NonNegativeInt = 0
    ):
        """Say what is frozen and for how long.

        Args:
            patterns: of parameters' names as `plan` shows them, e.g. [blocks.*]; the last one thaws first.
            epochs: epochs until the last pattern thaws; null: never.
            every: epochs from one pattern's thawing to that of the one before it; 0: all thaw together.
        """
        if not patterns:
            raise SettingError("freeze: `patterns` is empty, so there is nothing to freeze")
        self.patterns, self.epochs, self.every = patterns, epochs, every
        self.frozen: set[str] = set()
        self.held: dict[str, nn.Parameter] = {}  # what was frozen by these names
        self.still: list[nn.Module] = []

    def on_fit_start(self, trainer: Context) -> None:
        """Freeze what the epoch under way has frozen. Raises SettingError for a pattern that fits nothing."""
        names = [
            name
            for name, p in trainer.model.named_parameters()
            if p.requires_grad or name in self.frozen
        ]
        self.names = {
            each: [name for name in names if fnmatchcase(name, each)] for each in self.patterns
        }
        for pattern, fitting in self.names.items():
            if not fitting:
                raise SettingError(
                    f"freeze: no parameter fits {pattern!r}; {did_you_mean(pattern, names)}"
                )
        if self.wanted(0) >= set(names):
            raise SettingError(
                "freeze: the patterns fit every parameter, so that nothing is left to train"
            )
        self.apply(trainer)

    def on_epoch_start(self, trainer: Context) -> None:
        self.apply(trainer)

    def on_step_start(self, trainer: Context) -> None:
        for module in self.still:  # each epoch, and whoever else calls `model.train()`, wakes them
            module.training = False

    def on_fit_end(self, trainer: Context) -> None:
        self.set(trainer.model, set())

    def on_exception(self, trainer: Context) -> None:
        self.set(trainer.model, set())

    def needs_gradients(self, trainer: Context) -> bool:
        return False

    def wanted(self, epoch: int) -> set[str]:
        """Return the names of the parameters that are frozen in an epoch, counted from 0."""
        frozen: set[str] = set()
        for number, pattern in enumerate(reversed(self.patterns)):
            if self.epochs is None or epoch < self.epochs + number * self.every:
                frozen.update(self.names[pattern])
        return frozen

    def apply(self, trainer: Context) -> None:
        wanted = self.wanted(trainer.state.epoch)
        if wanted == self.frozen and self._replaced(trainer.model):
            self.set(trainer.model, wanted)
        if wanted != self.frozen:
            self.set(trainer.model, wanted)
            count = sum(trainer.model.get_parameter(name).numel() for name in wanted)
            trainer.log({"train/frozen_parameters": float(count)})

    def _replaced(self, model: nn.Module) -> bool:
        """Whether another callback has put a new parameter in the place of a frozen one."""
        return any(model.get_parameter(name) is not p for name, p in self.held.items())

    def set(self, model: nn.Module, wanted: set[str]) -> None:
        """Freeze these parameters and no other ones of mine."""
        for name in wanted | self.frozen:
            model.get_parameter(name).requires_grad_(name not in wanted)
        self.frozen = wanted
        self.held = {name: model.get_parameter(name) for name in wanted}
        owned = {
            name: [key for key, _ in module.named_parameters(name)]
            for name, module in model.named_modules()
        }
        self.still = [
            model.get_submodule(name)
            for name, keys in owned.items()
            if keys and wanted.issuperset(keys)
        ]
