"""Averages of the weights over training."""

import warnings
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from framework import (
    Batch,
    Callback,
    Context,
    Every,
    ModelContents,
    NonNegativeInt,
    Rate,
    SettingError,
    callbacks,
    check_initialized,
    check_read_again,
    foreach,
    seeds,
)
from framework.contracts.state import Cadence


class Averaging(Callback):
    """Base of callbacks that keep other weights beside those that are trained, and evaluate these.

    What is evaluated are the others: in validation, in the test, in predictions. A checkpoint's model holds them too,
    and its training state the weights that a resumed run goes on with; after `fit` the model keeps the others. Buffers
    (running statistics of batch norms) are those of training, but for what a subclass adds to `averaged_of`.
    """

    follows_metrics = False

    def __init__(self) -> None:
        self.updates = 0
        self.seen = -1  # the last step taken into account
        self.averaged = (
            False  # whether it is the model that holds the average, and `others` the weights
        )
        self.others: list[Tensor] = []
        self.trainer: Context | None = None
        self.saved: dict[str, Any] = {}

    def reset(self) -> None:
        super().reset()
        self.updates = 0
        self.seen = -1
        self.averaged = False
        self.others = []
        self.trainer = None
        self.saved = {}

    def take_in(self, trainer: Context) -> None:
        """Change `others` (and the weights, if need be) after a step that is done."""
        raise NotImplementedError

    def on_fit_start(self, trainer: Context) -> None:
        self._check_alone(trainer)
        check_initialized(trainer.model, type(self).__name__)
        self.trainer, self.seen = trainer, trainer.state.step
        self.contents = ModelContents(trainer.model, buffers=self.averages_buffers)
        self._find_places()
        self.restore()

    def _find_places(self) -> None:
        places = self.averaged_of(self.contents.model)
        self.names, self.parameters = list(places), list(places.values())  # whose `data` may move

    def averaged_of(self, model: nn.Module) -> dict[str, Tensor]:
        """Return by name what there is another one of."""
        return {name: p for name, p in model.named_parameters() if has_fractions(p)}

    @property
    def averages_buffers(self) -> bool:
        """Whether `averaged_of` returns buffers."""
        return False

    def _follow(self) -> None:
        """Follow the model where a parameter was replaced: its average begins as a copy."""
        if not self.contents.changed():
            return
        self.contents.remember()
        before = self.parameters
        self._find_places()
        self.keep_in_step(before)

    def keep_in_step(self, before: list[Tensor]) -> None:
        """Match what is kept of the parameters with the new ones. before: the old parameters."""
        self.others = matched(self.parameters, before, self.others)

    def on_step_end(self, trainer: Context) -> None:
        self._update()

    def on_validation_start(self, trainer: Context) -> None:
        self._update()
        self._swap()

    def on_validation_end(self, trainer: Context) -> None:
        self._swap()

    def on_fit_end(self, trainer: Context) -> None:
        self._update()
        self._swap()

    def on_exception(self, trainer: Context) -> None:
        if self.averaged:
            self._swap()

    def on_save(self, model_state: dict[str, Any], own_state: dict[str, Any]) -> None:
        """Put the average in the place of the weights, and the weights into the state of this callback."""
        if self.averaged or self.trainer is None:
            return
        own_state["weights"] = {
            name: p.detach() for name, p in zip(self.names, self.parameters, strict=True)
        }
        averages = own_state.pop("average")
        places = {
            id(p): averages[name] for name, p in zip(self.names, self.parameters, strict=True)
        }
        model = self.trainer.model
        known = (
            model.named_parameters(remove_duplicate=False),
            model.named_buffers(remove_duplicate=False),
        )
        for name, tensor in chain(*known):
            if id(tensor) in places:
                model_state[name] = places[id(tensor)]

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
        self._follow()
        self.take_in(self.trainer)

    def _check_alone(self, trainer: Context) -> None:
        """Raise SettingError where two such callbacks would evaluate each its own weights."""
        names = [type(each).__name__ for each in trainer.callbacks if isinstance(each, Averaging)]
        if len(names) > 1:
            raise SettingError(
                f"{' and '.join(names)} each have their own weights to evaluate: choose one"
            )

    @torch.no_grad()
    def _swap(self) -> None:
        self._follow()
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
        self._follow()
        others = dict(zip(self.names, self.others, strict=True))
        return {"updates": self.updates, "weights" if self.averaged else "average": others}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.saved, self.updates = dict(state), state.get("updates", 0)


def has_fractions(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor can be averaged: real or complex ones, no integers."""
    return tensor.is_floating_point() or tensor.is_complex()


def matched(parameters: list[Tensor], before: list[Tensor], kept: list[Tensor]) -> list[Tensor]:
    """Return for each parameter the tensor that is kept of it, or a copy of a new parameter.

    Args:
        parameters: those that the model has now.
        before: those that it had.
        kept: the tensors that were kept of these.
    """
    known = dict(zip(map(id, before), kept, strict=True))  # `before` holds them: each id is of one
    found = []
    for parameter in parameters:
        value = known.get(id(parameter))
        found.append(parameter.detach().clone() if value is None else value)
    return found


@callbacks.register("ema", aliases=["exponential_moving_average"])
class Ema(Averaging):
    """Keeps an exponential moving average of the weights, a ← d·a + (1 - d)·w (Polyak and Juditsky 1992; as d ≪ 1/n).

    What is evaluated is the average, but for buffers (running statistics of batch norms), which are those of training.
    """

    alone = False

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

    def take_in(self, trainer: Context) -> None:
        state = trainer.state
        if self.cadence.due(state, epoch_end=state.batch == 0):
            longest = (1 + self.updates) / (10 + self.updates) if self.warmup else 1.0
            foreach.lerp_(self.others, self.parameters, 1 - min(self.decay, longest))
            self.updates += 1


@callbacks.register("swa", aliases=["stochastic_weight_averaging"])
class Swa(Averaging):
    """The mean of the weights at the ends of the last epochs (Izmailov et al. 2018, arXiv:1803.05407, algorithm 1).

    It is what is evaluated from the first such epoch on; before, the weights themselves are. It goes with a learning
    rate that stays high: scheduler=null, or one that warms up only. Running statistics of batch norms are measured anew
    for the mean, over training batches as they are before any transform (the paper's section 3.2).
    """

    alone = True  # trials that train as one have no model each to measure statistics with

    def __init__(self, start: NonNegativeInt | None = None, batches: NonNegativeInt | None = None):
        """Say which epochs are averaged.

        Args:
            start: epochs before the first that is averaged; null: three quarters of the run's, as in the paper.
            batches: training batches that batch norms are measured with after each epoch; null: all, 0: none, so that
                their running statistics are those of training.
        """
        super().__init__()
        self.start, self.batches = start, batches

    @property
    def averages_buffers(self) -> bool:
        return self.batches != 0

    def averaged_of(self, model: nn.Module) -> dict[str, Tensor]:
        buffers = model.named_buffers() if self.batches != 0 else ()
        statistics = {n: b for n, b in buffers if ".running_" in f".{n}" and has_fractions(b)}
        return super().averaged_of(model) | statistics

    def on_fit_start(self, trainer: Context) -> None:
        state = trainer.state
        by_steps = (
            trainer.max_steps / state.steps_per_epoch
            if trainer.max_steps and state.steps_per_epoch
            else None
        )
        epochs = min(
            (limit for limit in (trainer.max_epochs, by_steps) if limit is not None), default=None
        )
        if self.start is None and epochs is None:
            raise SettingError(
                "swa cannot tell how many epochs there will be: it needs `start`, or trainer.max_epochs"
            )
        self.first = self.start if self.start is not None else int(0.75 * (epochs or 0))
        if self.updates:  # a longer run that averages already goes on with it
            self.first = min(self.first, self.saved.get("first", self.first))
        super().on_fit_start(trainer)
        if self.norms(trainer):
            check_read_again(trainer.train_batches, "callbacks.swa")

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return state if self.trainer is None else state | {"first": self.first}

    def take_in(self, trainer: Context) -> None:
        """Follow the weights until there is a first epoch to average."""
        state = trainer.state
        if state.batch == 0 and state.epoch > self.first:
            self.updates += 1
            foreach.lerp_(self.others, self.parameters, 1 / self.updates)
            self.measure(trainer)
        elif not self.updates:
            foreach.copy_(self.others, self.parameters)

    def norms(self, trainer: Context) -> list[nn.Module]:
        """Return the modules whose running statistics are averaged."""
        running = set(map(id, self.parameters))
        norms = [m for m in trainer.model.modules() if m.training and hasattr(m, "momentum")]
        return [
            m for m in norms if any(id(buffer) in running for buffer in m.buffers(recurse=False))
        ]

    def measure(self, trainer: Context) -> None:
        """Put the statistics of the mean weights' activations in the place of their running ones."""
        running = set(map(id, self.parameters))
        norms = self.norms(trainer)
        if not norms:
            return
        self._swap()
        rest = [
            (buffer, buffer.clone())
            for buffer in trainer.model.buffers()
            if id(buffer) not in running
        ]
        momenta = [norm.momentum for norm in norms]
        try:
            with seeds.undisturbed():
                batches = trainer.train_batches.epoch(trainer.state.epoch)
                for number, batch in enumerate(islice(batches, self.batches), 1):
                    for norm in norms:
                        norm.momentum = 1 / number  # a plain mean over batches
                    self.look_at(trainer, batch)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
            for buffer, before in rest:
                buffer.copy_(before)
        self._swap()

    def look_at(self, trainer: Context, batch: Batch) -> None:
        placed = tuple(tensor.to(trainer.device) for tensor in batch)
        with trainer.precision.autocast():
            trainer.task.step(trainer.model, placed)

    def on_fit_end(self, trainer: Context) -> None:
        super().on_fit_end(trainer)
        if not self.updates and trainer.state.stop is None:
            warnings.warn(
                f"swa averaged nothing: the run ended before its epoch {self.first + 1} did",
                stacklevel=2,
            )
