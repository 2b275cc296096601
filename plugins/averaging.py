"""Averages of the weights over training."""

from typing import Any

import torch
from torch import Tensor

from framework import Callback, Every, Rate, Trainer, callbacks
from framework.errors import SettingError
from framework.state import Cadence


class Averaging(Callback):
    """Base of callbacks that keep other weights beside those that are trained, and evaluate these.

    What is evaluated are the others: in validation, in the test, in predictions. A checkpoint's model holds them too,
    and its training state the weights that a resumed run goes on with; after `fit` the model keeps the others. Buffers
    (running statistics of batch norms) are always those of training.
    """

    def __init__(self) -> None:
        self.updates = 0
        self.seen = -1  # the last step taken into account
        self.averaged = False  # whether it is the model that holds the average, and `others` the weights
        self.others: list[Tensor] = []
        self.trainer: Trainer | None = None
        self.saved: dict[str, Any] = {}

    def take_in(self, trainer: Trainer) -> None:
        """Change `others` (and the weights, if need be) after a step that is done."""
        raise NotImplementedError

    def on_fit_start(self, trainer: Trainer) -> None:
        self._check_alone(trainer)
        if not self.saved:
            self.updates = 0
        self.trainer, self.seen = trainer, trainer.state.step
        self.names = [name for name, p in trainer.model.named_parameters() if p.is_floating_point()]
        self.parameters = [trainer.model.get_parameter(name) for name in self.names]  # whose `data` may move
        self.restore()

    def on_step_end(self, trainer: Trainer) -> None:
        self._update()

    def on_validation_start(self, trainer: Trainer) -> None:
        self._update()
        self._swap()

    def on_validation_end(self, trainer: Trainer) -> None:
        self._swap()

    def on_fit_end(self, trainer: Trainer) -> None:
        self._update()
        self._swap()

    def on_exception(self, trainer: Trainer) -> None:
        if self.averaged:
            self._swap()

    def on_save(self, model_state: dict[str, Any], own_state: dict[str, Any]) -> None:
        """Put the average in the place of the weights, and the weights into the state of this callback."""
        if self.averaged or self.trainer is None:
            return
        own_state["weights"] = {name: p.detach() for name, p in zip(self.names, self.parameters, strict=True)}
        averages = own_state.pop("average")
        places = {id(self.trainer.model.get_parameter(name)): averages[name] for name in self.names}
        for name, parameter in self.trainer.model.named_parameters(remove_duplicate=False):
            if id(parameter) in places:
                model_state[name] = places[id(parameter)]

    def on_rewind(self, own_state: dict[str, Any]) -> None:
        """Take back what `on_save` made; the model holds the average."""
        self.load_state_dict(own_state)
        self.restore()

    @torch.no_grad()
    def _update(self) -> None:
        """Take in the weights of the step just done, once, whoever asks first (a checkpoint, a validation, its end)."""
        if self.trainer is None or self.averaged or self.seen == self.trainer.state.step:
            return
        self.seen = self.trainer.state.step
        self.take_in(self.trainer)

    def _check_alone(self, trainer: Trainer) -> None:
        """Raise SettingError where two such callbacks would evaluate each its own weights."""
        names = [type(each).__name__ for each in trainer.callbacks if isinstance(each, Averaging)]
        if len(names) > 1:
            raise SettingError(f"{' and '.join(names)} each have their own weights to evaluate: choose one")

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, other in zip(self.parameters, self.others, strict=True):
            before = parameter.detach().clone()
            parameter.copy_(other)
            other.copy_(before)
        self.averaged = not self.averaged

    def restore(self) -> None:
        """Make the average from what was saved, or begin it; afterwards the model holds the weights to train on."""
        self.averaged = "weights" in self.saved
        others = self.saved.get("weights", self.saved.get("average", {}))
        pairs = zip(self.names, self.parameters, strict=True)
        self.others = [others.get(name, p).detach().to(p.device, copy=True) for name, p in pairs]
        self.saved = {}
        if self.averaged:
            self._swap()

    def state_dict(self) -> dict[str, Any]:
        self._update()
        if self.trainer is None:
            return {"updates": self.updates}
        others = dict(zip(self.names, self.others, strict=True))
        return {"updates": self.updates, "weights" if self.averaged else "average": others}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.saved, self.updates = dict(state), state.get("updates", 0)


@callbacks.register("ema", aliases=["exponential_moving_average"])
class Ema(Averaging):
    """Keeps an exponential moving average of the weights, a ← d·a + (1 - d)·w (Polyak and Juditsky 1992; as d ≪ 1/n).

    What is evaluated is the average, but for buffers (running statistics of batch norms), which are those of training.
    """

    def __init__(self, decay: Rate = 0.999, warmup: bool = True, every: Every = "1step"):
        """Say how far back to average.

        Args:
            decay: d, the share of the old average that stays; 0.999 looks back on about 1,000 updates.
            warmup: begin with a shorter memory: after n updates d is at most (1 + n) / (10 + n), as in TensorFlow's
                ExponentialMovingAverage.
            every: when to take the weights in.
        """
        super().__init__()
        self.decay, self.warmup, self.cadence = decay, warmup, Cadence(every)

    def take_in(self, trainer: Trainer) -> None:
        state = trainer.state
        if self.cadence.due(state, epoch_end=state.batch == 0):
            longest = (1 + self.updates) / (10 + self.updates) if self.warmup else 1.0
            torch._foreach_lerp_(self.others, self.parameters, 1 - min(self.decay, longest))
            self.updates += 1
