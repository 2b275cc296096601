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
    dtensors,
    foreach,
    move_batch,
    seeds,
)
from framework.contracts.state import Cadence


class Averaging(Callback):
    """Base of callbacks that keep an average of the trained weights and evaluate the average.

    Validation, test and predictions use the average. In a checkpoint, the model contains the
    average, and the training state the weights with which a resumed run continues. After `fit` the
    model keeps the average. Buffers (running statistics of batch norms) are those of training,
    except those that a subclass adds to `averaged_tensors`.

    Attributes:
        updates: number of updates of the average.
        last_step: the last step that the average takes into account.
        averaged: whether the model contains the average, and `others` the trained weights.
        others: one tensor for each of `parameters`: the average, or the weights if `averaged`.
        saved: the restored state, until `restore` applies it.
    """

    follows_metrics = False

    def __init__(self) -> None:
        self.updates = 0
        self.last_step = -1
        self.averaged = False
        self.others: list[Tensor] = []
        self.trainer: Context | None = None
        self.saved: dict[str, Any] = {}

    def reset(self) -> None:
        super().reset()
        self.updates = 0
        self.last_step = -1
        self.averaged = False
        self.others = []
        self.trainer = None
        self.saved = {}

    def update(self, trainer: Context) -> None:
        """Update `others`, and in some subclasses the weights, after a step."""
        raise NotImplementedError

    def on_fit_start(self, trainer: Context) -> None:
        self._check_single(trainer)
        check_initialized(trainer.model, type(self).__name__)
        self.trainer = trainer
        self.last_step = trainer.state.step
        self.contents = ModelContents(trainer.model, buffers=self.averages_buffers)
        self._collect_parameters()
        self.restore()

    def averaged_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the averaged parameters and buffers of the model, by name."""
        return {name: p for name, p in model.named_parameters() if is_averageable(p)}

    @property
    def averages_buffers(self) -> bool:
        """Whether `averaged_tensors` returns buffers."""
        return False

    def match_parameters(self, before: list[Tensor]) -> None:
        """Match the kept tensors with the current parameters. before: the previous parameters."""
        self.others = match_tensors(self.parameters, before, self.others)

    def on_step_end(self, trainer: Context) -> None:
        self._update_once()

    def on_validation_start(self, trainer: Context) -> None:
        self._update_once()
        self._swap()

    def on_validation_end(self, trainer: Context) -> None:
        self._swap()

    def on_train_end(self, trainer: Context) -> None:
        self._update_once()
        self._swap()

    def on_exception(self, trainer: Context) -> None:
        if self.averaged:
            self._swap()

    def on_save(self, model_state: dict[str, Any], own_state: dict[str, Any]) -> None:
        """Exchange the weights in the model's state with the average in this callback's state."""
        if self.averaged or self.trainer is None:
            return
        averages = own_state.pop("average")
        own_state["weights"] = {}
        average_of: dict[Tensor, Tensor] = {}  # tensors are compared by identity
        for name, parameter in zip(self.names, self.parameters, strict=True):
            own_state["weights"][name] = parameter.detach()
            average_of[parameter] = averages[name]
        model = self.trainer.model
        tensors = chain(
            model.named_parameters(remove_duplicate=False),
            model.named_buffers(remove_duplicate=False),
        )
        for name, tensor in tensors:
            if tensor in average_of:
                model_state[name] = average_of[tensor]

    def on_rewind(self, own_state: dict[str, Any]) -> None:
        """Restore weights and average from a checkpoint; the model contains the average."""
        self.load_state_dict(own_state)
        self.restore()

    def restore(self) -> None:
        """Restore the average from the saved state, or begin it; put the weights into the model."""
        self.averaged = "weights" in self.saved
        tensors = self.saved.get("weights", self.saved.get("average", {}))
        self.others = self.copies(tensors)
        self.saved = {}
        if self.averaged:
            self._swap()

    def copies(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        """Return a copy of a saved tensor for each parameter, or of the parameter without one."""
        copies = []
        for name, parameter in zip(self.names, self.parameters, strict=True):
            tensor = tensors.get(name, parameter)
            own = dtensors.distribute_like(tensor.detach(), parameter)
            copies.append(own.to(parameter.device, copy=True))
        return copies

    def state_dict(self) -> dict[str, Any]:
        self._update_once()
        if self.trainer is None:
            return {"updates": self.updates}
        self._follow_replacements()
        others = dict(zip(self.names, self.others, strict=True))
        return {"updates": self.updates, "weights" if self.averaged else "average": others}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.saved = dict(state)
        self.updates = state.get("updates", 0)

    @torch.no_grad()
    def _update_once(self) -> None:
        """Update the average for the last step, unless an earlier event has done so."""
        if self.trainer is None or self.averaged or self.last_step == self.trainer.state.step:
            return
        self.last_step = self.trainer.state.step
        self._follow_replacements()
        self.update(self.trainer)

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange the values of `parameters` and `others`."""
        self._follow_replacements()
        for parameter, other in zip(self.parameters, self.others, strict=True):
            before = parameter.detach().clone()
            parameter.copy_(other)
            other.copy_(before)
        self.averaged = not self.averaged

    def _collect_parameters(self) -> None:
        tensors = self.averaged_tensors(self.contents.model)
        self.names = list(tensors)
        self.parameters = list(tensors.values())

    def _follow_replacements(self) -> None:
        """Match the average with the model if parameters were replaced; new ones are copied."""
        if not self.contents.changed():
            return
        self.contents.remember()
        before = self.parameters
        self._collect_parameters()
        self.match_parameters(before)

    def _check_single(self, trainer: Context) -> None:
        """Raise SettingError if several callbacks would each evaluate their own weights."""
        names = [type(each).__name__ for each in trainer.callbacks if isinstance(each, Averaging)]
        if len(names) > 1:
            raise SettingError(f"{' and '.join(names)} evaluate different weights: choose one")


def is_averageable(tensor: Tensor) -> bool:
    """Return whether a tensor can be averaged: its numbers are real or complex, not integers."""
    return tensor.is_floating_point() or tensor.is_complex()


def match_tensors(
    parameters: list[Tensor], before: list[Tensor], kept: list[Tensor]
) -> list[Tensor]:
    """Return the kept tensor of each parameter, or a copy of a new parameter.

    Args:
        parameters: the current parameters of the model.
        before: its previous parameters.
        kept: a tensor for each of the previous parameters.
    """
    kept_of = dict(zip(before, kept, strict=True))
    matches = []
    for parameter in parameters:
        tensor = kept_of.get(parameter)
        matches.append(parameter.detach().clone() if tensor is None else tensor)
    return matches


@callbacks.register("ema", aliases=["exponential_moving_average"])
class Ema(Averaging):
    """Keeps an exponential moving average of the weights, a ← d·a + (1 - d)·w, and evaluates it.

    (Polyak and Juditsky 1992.) Buffers, such as running statistics of batch norms, are not
    averaged: evaluation uses those of training.

    Args:
        decay: d, the weight of the old average; 0.999 averages about 1,000 updates.
        warmup: begin with a shorter average: after n updates d is at most (1 + n) / (10 + n),
            as in TensorFlow's ExponentialMovingAverage.
        every: when to update the average.
    """

    alone = False

    def __init__(self, decay: Rate = 0.999, warmup: bool = True, every: Every = "1step"):
        super().__init__()
        self.decay = decay
        self.warmup = warmup
        self.cadence = Cadence(every)

    def update(self, trainer: Context) -> None:
        state = trainer.state
        if not self.cadence.due(state):
            return
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        foreach.lerp_(self.others, self.parameters, 1 - decay)
        self.updates += 1


@callbacks.register("swa", aliases=["stochastic_weight_averaging"])
class Swa(Averaging):
    """Evaluates the mean of the weights at the ends of the last epochs.

    (Stochastic weight averaging: Izmailov et al. 2018, arXiv:1803.05407, algorithm 1.) Before the
    first averaged epoch, the weights themselves are evaluated. It needs a learning rate that stays
    high: scheduler=null, or a schedule that only warms up. The running statistics of batch norms
    are measured for the mean, with untransformed training batches (section 3.2).

    Args:
        start: epochs before the first averaged one; null: three quarters of the run, as in the
            paper.
        batches: training batches to measure the statistics of batch norms with after each
            epoch; null: all, 0: none, which keeps the statistics of training.
    """

    alone = True  # vectorized trials have no models of their own to measure statistics with

    def __init__(self, start: NonNegativeInt | None = None, batches: NonNegativeInt | None = None):
        super().__init__()
        self.start = start
        self.batches = batches

    @property
    def averages_buffers(self) -> bool:
        return self.batches != 0

    def averaged_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        tensors = super().averaged_tensors(model)
        if self.averages_buffers:
            for name, buffer in model.named_buffers():
                if ".running_" in f".{name}" and is_averageable(buffer):
                    tensors[name] = buffer
        return tensors

    def on_fit_start(self, trainer: Context) -> None:
        self.first = self._first_epoch(trainer)
        if self.updates:  # a longer run continues the average of the shorter one
            self.first = min(self.first, self.saved.get("first", self.first))
        super().on_fit_start(trainer)
        if self.averaged_norms(trainer):
            if dtensors.has_dtensors(trainer.model):
                raise SettingError(
                    "callbacks.swa.batches: expected 0 for a model with batch norms and "
                    "strategy=fsdp, whose statistics swa cannot measure"
                )
            check_read_again(trainer.train_batches, "callbacks.swa")

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return state if self.trainer is None else state | {"first": self.first}

    def update(self, trainer: Context) -> None:
        """Average the weights after an epoch; before the first averaged epoch, copy them."""
        state = trainer.state
        if state.batch == 0 and state.epoch > self.first:
            self.updates += 1
            foreach.lerp_(self.others, self.parameters, 1 / self.updates)
            self.measure_statistics(trainer)
        elif not self.updates:
            foreach.copy_(self.others, self.parameters)

    def on_train_end(self, trainer: Context) -> None:
        super().on_train_end(trainer)
        if not self.updates and trainer.state.stop is None:
            warnings.warn(
                f"swa averaged no weights: the run ended before the end of epoch {self.first + 1}",
                stacklevel=2,
            )

    def averaged_norms(self, trainer: Context) -> list[nn.Module]:
        """Return the modules with averaged running statistics."""
        averaged = set(self.parameters)
        norms = []
        for module in trainer.model.modules():
            is_averaged = not averaged.isdisjoint(module.buffers(recurse=False))
            if is_averaged and module.training and hasattr(module, "momentum"):
                norms.append(module)
        return norms

    def measure_statistics(self, trainer: Context) -> None:
        """Replace the averaged running statistics by those of the averaged weights."""
        norms = self.averaged_norms(trainer)
        if not norms:
            return
        self._swap()
        averaged = set(self.parameters)
        other_buffers = [b for b in trainer.model.buffers() if b not in averaged]
        values = [buffer.clone() for buffer in other_buffers]
        momenta = [norm.momentum for norm in norms]
        try:
            with seeds.undisturbed():
                batches = trainer.train_batches.epoch(trainer.state.epoch)
                for number, batch in enumerate(islice(batches, self.batches), 1):
                    if not batch:  # other processes have its rows
                        continue
                    for norm in norms:
                        norm.momentum = 1 / number  # the mean over batches
                    self._run_model(trainer, batch)
            trainer.strategy.share_buffers()
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
            for buffer, value in zip(other_buffers, values, strict=True):
                buffer.copy_(value)
        self._swap()

    def _run_model(self, trainer: Context, batch: Batch) -> None:
        on_device = move_batch(batch, trainer.device)
        with trainer.precision.autocast():
            trainer.task.step(trainer.model, on_device)

    def _first_epoch(self, trainer: Context) -> int:
        """Return the number of epochs before the first averaged one."""
        if self.start is not None:
            return self.start
        limits: list[float] = []
        if trainer.max_epochs is not None:
            limits.append(trainer.max_epochs)
        if trainer.max_steps and trainer.state.steps_per_epoch:
            limits.append(trainer.max_steps / trainer.state.steps_per_epoch)
        if not limits:
            raise SettingError(
                "swa: the number of epochs is unknown; set callbacks.swa.start "
                "or trainer.max_epochs"
            )
        return int(0.75 * min(limits))
