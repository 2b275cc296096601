"""Problems of training that the numbers of the layers show, and what helps against them.

Each threshold is far from what healthy runs reach, and must be exceeded in several observations in
a row.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite, nan
from typing import Any

from torch import Tensor

from .layers import Layer

PATIENCE = 3  # observations in a row,
LEAST_STEPS = 20  # and steps from the first of them to the last
SATURATED = 0.5
"""Share of saturated activations (Glorot & Bengio 2010, sections 3.2 and 3.3). More are healthy if
they become so while the loss falls: 0.58 in the experiment spirals, with an accuracy of 1.0."""
DEAD = 0.75
"""Share of units that are dead for all samples of `PATIENCE` observations. CS231n (Karpathy 2016,
"Commonly used activation functions") reports 0.4 with a rate that is too large, for all samples of
the data. More are healthy if they become so while the loss falls: 0.93 for 32 samples in the
experiment electricity."""
EFFECTS = {
    "inputs": ("activations", "gradients", "vanishing", "saturated", "dead", "untrained"),
    "zero": ("dead", "untrained"),
    "gradients": ("vanishing",),  # which are relative to the largest one
    "dead": ("vanishing", "untrained", "small"),  # no gradient passes a dead layer
    "saturated": ("vanishing", "untrained"),
    "vanishing": ("untrained",),
}
"""Problems that are not reported together with the one that causes them."""
UNTRAINED = {
    "zero": "all weights are 0 and get no gradient; try initializer=kaiming_normal",
    "untrained": "its weights get no gradient; check that the loss depends on its outputs, without "
    "detach() or torch.no_grad(), or freeze it",
}
FEWEST_UNITS = 8  # of a layer whose share of dead units counts
VANISHING = 1e-4
"""Gradient norm of a layer, relative to the largest of all layers (Glorot & Bengio 2010, section
4.2; fastai's `ActivationStats` shows the same in colors)."""
WEAK = 1e-3
"""The same for a run whose loss does not fall, such as five sigmoid layers trained by sgd."""
EXPLODING_ACTIVATIONS = 100.0
"""Root mean square of the activations of a layer, relative to that of the inputs, or to 1 (He et
al. 2015, section 2.2: it is about equal in all layers)."""
EXPLODING_GRADIENTS = 1000.0
"""Gradient norm of a layer, relative to the norm of its weights (Pascanu et al. 2013,
arXiv:1211.5063)."""
TYPICAL_UPDATE = 1e-3
"""Change of the weights in a step, relative to the weights (Karpathy, CS231n: "ratio of weights
to updates")."""
SMALL_UPDATE = 1e-4
"""Relative change of the weights that is too small, if the loss stays. Those of the shipped
experiments are above 3e-4 while the schedule does not reduce the learning rate."""
STAYS = (0.95, 1.2)
"""Loss that stays, relative to the first one. That of a trained model, which may need a small
learning rate, varies more from batch to batch."""
LARGE_UPDATES = ((1e-2, 1.5), (1e-1, 1.2))
"""Relative changes of the weights that are too large if the loss is above the first one by this
factor, or above the lowest one by as much."""
UNSCALED = 10.0  # root mean square of the inputs, and of what the first layer makes of them
COLLAPSED = 0.01  # standard deviation of samples over the batch, relative to that of the inputs
SEPARATED = 0.01
"""Loss of a discriminator that recognizes all samples, so that the generator gets no gradient
(Arjovsky & Bottou 2017, arXiv:1701.04862, section 2)."""


@dataclass
class Observation:
    """The numbers of a step.

    Attributes:
        step: the number of the step.
        layers: those of the model.
        numbers: of each layer, by quantity (see `layers.QUANTITIES`); nan for unknown ones.
        loss: of the step.
        rate: the largest learning rate of the optimizer's groups, without the schedule; nan if
            the optimizer has none.
        factor: that of the schedule on the learning rate.
        inputs: mean and standard deviation of the model's inputs; nan if they are no numbers.
        spread: standard deviation over the batch of samples of a generator, relative to that of the
            inputs; nan without one.
        discriminator_loss: the last one that was logged; nan without one.
        has_phases: whether a step has several updates with a loss each.
    """

    step: int
    layers: Sequence[Layer]
    numbers: dict[str, list[float]]
    loss: float
    rate: float
    factor: float
    inputs: tuple[float, float] = (nan, nan)
    spread: float = nan
    discriminator_loss: float = nan
    has_phases: bool = False

    def root_mean_square(self, row: int) -> float:
        """Return the root mean square of the activations of a layer."""
        return math.hypot(self.numbers["mean"][row], self.numbers["std"][row])

    def trained(self) -> list[int]:
        """Return the rows of layers with a gradient."""
        gradients = enumerate(self.numbers["gradient"])
        return [row for row, gradient in gradients if not math.isnan(gradient)]


@dataclass
class Watch:
    """Finds problems that persist.

    Attributes:
        first_step: of the first observation; None before it.
        first_loss: of the first step; nan if it is unknown.
        lowest_loss: the lowest mean loss of `PATIENCE` observations.
        losses: of the last observations.
        streaks: the number of observations in a row with a problem, and the step of the first one,
            by the problem's name and layer.
        reported: the problems that a warning was given for, with their layers.
        dead: the dead units of each layer in the last observations.
    """

    first_step: int | None = None
    first_loss: float = nan
    lowest_loss: float = inf
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=PATIENCE))
    streaks: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)
    reported: set[tuple[str, int]] = field(default_factory=set)
    dead: dict[int, deque[Tensor]] = field(default_factory=dict)

    def messages(self, seen: Observation) -> list[str]:
        """Count an observation; return a message for each new problem."""
        self._record_loss(seen)
        found = {
            "inputs": unscaled_inputs(seen),
            "large": [0] if self._large_updates(seen) else [],
            "zero": zero_layers(seen),
            "activations": exploding_activations(seen),
            "gradients": exploding_gradients(seen),
            "vanishing": vanishing_gradients(seen, WEAK),
            "saturated": saturated_layers(seen),
            "dead": dead_layers(seen),
            "untrained": untrained_layers(seen),
            "small": [0] if self._small_updates(seen) else [],
            "collapsed": [0] if seen.spread < COLLAPSED else [],
            "separated": [0] if seen.discriminator_loss < SEPARATED else [],
        }
        for cause, effects in EFFECTS.items():
            if found[cause]:
                for effect in effects:
                    found[effect] = []
        texts = []
        for name, rows in self._persistent(found, seen.step).items():
            unknown = [row for row in rows if (name, row) not in self.reported]
            new = [row for row in unknown if self._is_confirmed(name, row, seen)]
            if new:
                self.reported.update((name, row) for row in new)
                texts.append(self._text(name, new, seen))
        return texts

    def _record_loss(self, seen: Observation) -> None:
        if self.first_step is None:
            self.first_step = seen.step
        self.losses.append(seen.loss)
        if len(self.losses) == PATIENCE:
            self.lowest_loss = min(self.lowest_loss, self.recent_loss)

    def _persistent(self, found: dict[str, list[int]], step: int) -> dict[str, list[int]]:
        """Count the observations with each problem; return the layers of those that persist."""
        streaks: dict[tuple[str, int], tuple[int, int]] = {}
        persistent: dict[str, list[int]] = {}
        for name, rows in found.items():
            for row in rows:
                count, first = self.streaks.get((name, row), (0, step))
                streaks[name, row] = (count + 1, first)
                if count + 1 >= PATIENCE and step - first >= LEAST_STEPS:
                    persistent.setdefault(name, []).append(row)
        self.streaks = streaks
        return persistent

    def _small_updates(self, seen: Observation) -> bool:
        if seen.has_phases or seen.factor < 0.1:
            return False
        return largest_update(seen) < SMALL_UPDATE * seen.factor  # so that decay is no problem

    def _large_updates(self, seen: Observation) -> bool:
        return not seen.has_phases and largest_update(seen) > LARGE_UPDATES[0][0]

    def _is_confirmed(self, name: str, row: int, seen: Observation) -> bool:
        """Return whether the last observations together show a problem that each of them has."""
        match name:
            case "dead":
                return self._dead_share(row) > DEAD and self._is_harmful(name, row)
            case "saturated":
                return self._is_harmful(name, row)
            case "vanishing":
                return row in vanishing_gradients(seen, VANISHING) or not self._has_fallen(0.01)
            case "small":
                return self._loss_stays()
            case "large":
                rise = self.recent_loss - self._loss_before()
                for update, factor in LARGE_UPDATES:
                    is_large = largest_update(seen) > update
                    if is_large and rise > (factor - 1) * abs(self.first_loss):
                        return True
                return False
        return True

    def _loss_stays(self) -> bool:
        """Return whether the loss is about the first one."""
        change = self.recent_loss - self.first_loss
        scale = abs(self.first_loss)
        return (STAYS[0] - 1) * scale < change < (STAYS[1] - 1) * scale

    def _is_harmful(self, name: str, row: int) -> bool:
        """Return whether units of a layer were stuck from the beginning, or the loss is high.

        Units also become stuck while a network learns, for example when it is sure of its classes.
        """
        _, began = self.streaks[name, row]
        return began == self.first_step or not self._has_fallen(0.1)

    def _loss_before(self) -> float:
        """Return the loss from which a learning rate that is too large has led away."""
        return min(self.first_loss, self.lowest_loss)

    def _has_fallen(self, share: float) -> bool:
        """Return whether the loss has fallen by a share of the first one."""
        return self.recent_loss <= self.first_loss - share * abs(self.first_loss)

    @property
    def recent_loss(self) -> float:
        """The mean loss of the last observations."""
        return sum(self.losses) / len(self.losses)

    def _dead_share(self, row: int) -> float:
        """Return the share of units of a layer that were dead in all of the last observations."""
        masks = self.dead.get(row, deque())
        if len(masks) < PATIENCE:
            return 0.0
        dead = masks[0]
        if len(dead) < FEWEST_UNITS:
            return 0.0
        for mask in masks:
            dead = dead & mask
        return float(dead.float().mean())

    def _text(self, name: str, rows: list[int], seen: Observation) -> str:
        gradients = seen.numbers["gradient"]
        worst = worst_layer(name, rows, gradients)
        where = describe_layer(seen, worst) + describe_others(rows, worst)
        gradient = gradients[worst]
        stuck = percent(seen.numbers["stuck"][worst])
        weight = seen.numbers["weight"][worst]
        update = largest_update(seen)
        size = seen.root_mean_square(worst)
        now = "" if math.isnan(seen.rate) else f" (now {seen.rate:.3g})"
        match name:
            case "inputs":
                mean, std = seen.inputs
                return (
                    f"the inputs have mean {mean:.3g} and standard deviation {std:.3g}, the "
                    f"outputs of {where} {describe_outputs(seen, worst)}; try data.normalize=true"
                )
            case "zero" | "untrained":
                return f"{where}: {UNTRAINED[name]}"
            case "activations":
                return (
                    f"{where}: exploding activations, root mean square {size:.3g}; try "
                    f"initializer=kaiming_normal, norm=batch, or a lower optimizer.lr{now}"
                )
            case "gradients":
                return (
                    f"{where}: exploding gradients, norm {gradient:.3g} (weights {weight:.3g}); "
                    "try +callbacks=clip_gradients, initializer=kaiming_normal, or norm=batch"
                )
            case "vanishing":
                top = max(each for each in gradients if isfinite(each))
                return (
                    f"{where}: vanishing gradients, norm {gradient:.3g} (largest of a layer "
                    f"{top:.3g}); try {remedies_of_vanishing(seen.layers[worst])}"
                )
            case "saturated":
                return (
                    f"{where}: {stuck} of its outputs saturated, gradient norm {gradient:.3g}; "
                    "try activation=relu, norm=batch, or initializer=xavier_uniform"
                )
            case "dead":
                return (
                    f"{where}: {percent(self._dead_share(worst))} of its units dead, gradient norm "
                    f"{gradient:.3g}; try a lower optimizer.lr{now}, "
                    "activation=leaky_relu, or norm=batch"
                )
            case "small":
                return (
                    f"the learning rate is too small: a step changes no layer by more than "
                    f"{update:.1e} of its weights (typical: {TYPICAL_UPDATE:g}), and the loss went "
                    f"from {self.first_loss:.3g} to {self.recent_loss:.3g}; try "
                    f"{better_rate(seen.rate, update, 'a higher learning rate')}{now}"
                )
            case "large":
                before = self._loss_before()
                return (
                    f"the learning rate is too large: a step changes a layer by {update:.2g} of "
                    f"its weights (typical: {TYPICAL_UPDATE:g}), and the loss went from "
                    f"{before:.3g} to {self.recent_loss:.3g}; try "
                    f"{better_rate(seen.rate, update, 'a lower learning rate')}{now}"
                )
            case "separated":
                return (
                    f"the discriminator recognizes all samples, its loss is "
                    f"{seen.discriminator_loss:.2g}; try task.penalty=1, or a lower "
                    f"optimizer.lr{now}"
                )
        return (
            f"the generator has collapsed: its samples vary {percent(seen.spread)} as much as the "
            f"inputs; try task.penalty=1, or a lower optimizer.lr{now}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the counts as plain types, without the dead units of the last observations."""
        streaks = [[*problem, *streak] for problem, streak in self.streaks.items()]
        return {
            "first_step": self.first_step,
            "first_loss": None if math.isnan(self.first_loss) else self.first_loss,
            "lowest_loss": None if math.isinf(self.lowest_loss) else self.lowest_loss,
            "losses": list(self.losses),
            "streaks": streaks,
            "reported": [list(each) for each in sorted(self.reported)],
        }


def unscaled_inputs(seen: Observation) -> list[int]:
    """Return the first layer if the inputs are far from mean 0 and deviation 1."""
    measured = [row for row, mean in enumerate(seen.numbers["mean"]) if not math.isnan(mean)]
    if math.hypot(*seen.inputs) > UNSCALED and measured:
        first = measured[0]
        if seen.root_mean_square(first) > UNSCALED or first in saturated_layers(seen):
            return [first]
    return []


def exploding_activations(seen: Observation) -> list[int]:
    """Return the hidden layers with activations much larger than the inputs."""
    inputs = math.hypot(*seen.inputs)
    limit = EXPLODING_ACTIVATIONS * max(1.0, 1.0 if math.isnan(inputs) else inputs)
    rows = []
    for row, layer in enumerate(seen.layers):
        if not layer.is_output and seen.root_mean_square(row) > limit:
            rows.append(row)
    return rows


def exploding_gradients(seen: Observation) -> list[int]:
    """Return the layers with a gradient much larger than their weights."""
    rows = []
    for row in seen.trained():
        weight = seen.numbers["weight"][row]
        if weight > 0 and seen.numbers["gradient"][row] > EXPLODING_GRADIENTS * weight:
            rows.append(row)
    return rows


def vanishing_gradients(seen: Observation, limit: float) -> list[int]:
    """Return the layers with a gradient below a limit, relative to the largest one of a layer."""
    if seen.has_phases:  # the gradients are those of one phase
        return []
    gradients = seen.numbers["gradient"]
    rows = seen.trained()
    largest = max((gradients[row] for row in rows if isfinite(gradients[row])), default=0.0)
    return [row for row in rows if 0 < gradients[row] < limit * largest]


def zero_layers(seen: Observation) -> list[int]:
    """Return the layers that stay 0, because all their weights are 0 and get no gradient."""
    weights = seen.numbers["weight"]
    return [row for row in untrained_layers(seen) if weights[row] == 0]


def untrained_layers(seen: Observation) -> list[int]:
    """Return the layers that may be trained, but get no gradient and do not change."""
    if seen.has_phases or not isfinite(seen.loss):
        return []
    rows = []
    for row, layer in enumerate(seen.layers):
        is_trainable = any(parameter.requires_grad for parameter in layer.parameters)
        moves = seen.numbers["gradient"][row] > 0 or seen.numbers["update"][row] > 0
        if is_trainable and not moves:
            rows.append(row)
    return rows


def saturated_layers(seen: Observation) -> list[int]:
    """Return the hidden layers with many saturated activations."""
    return stuck_layers(seen, "saturates", SATURATED)


def dead_layers(seen: Observation) -> list[int]:
    """Return the layers with many units that are dead in this observation."""
    return stuck_layers(seen, "dies", DEAD)


def stuck_layers(seen: Observation, kind: str, share: float) -> list[int]:
    """Return the layers with a kind of activation, more than a share of which is stuck."""
    rows = []
    for row, layer in enumerate(seen.layers):
        of_kind = layer.response is not None and layer.response.kind == kind
        if of_kind and not layer.is_output and seen.numbers["stuck"][row] > share:
            rows.append(row)
    return rows


def largest_update(seen: Observation) -> float:
    """Return the largest relative change of the weights of a layer in the step; nan without one."""
    updates = [seen.numbers["update"][row] for row in seen.trained()]
    return max((each for each in updates if isfinite(each)), default=nan)


def better_rate(rate: float, update: float, default: str) -> str:
    """Return the setting of a learning rate, a power of ten, with a typical update.

    Args:
        rate: the learning rate now; nan if the optimizer has none.
        update: the largest relative change of weights with it.
        default: returned without a learning rate.
    """
    if math.isnan(rate):
        return default
    if rate <= 0 or update <= 0:
        return f"optimizer.lr={TYPICAL_UPDATE:g}"
    exponent = math.log10(rate * TYPICAL_UPDATE / update)
    if update > TYPICAL_UPDATE:  # rounded down, as the weights have grown
        return f"optimizer.lr={10.0 ** math.floor(exponent):g}"
    return f"optimizer.lr={10.0 ** round(exponent):g}"


def worst_layer(name: str, rows: Sequence[int], gradients: Sequence[float]) -> int:
    """Return the layer among those with a problem that the warning describes."""
    if name == "vanishing":
        return min(rows, key=gradients.__getitem__)
    if name == "gradients":
        return max(rows, key=gradients.__getitem__)
    return rows[0]


def percent(share: float) -> str:
    """Return a share as a text."""
    return f"{100 * share:.0f} %"


def describe_layer(seen: Observation, row: int) -> str:
    """Return the number, the name and the activation of a layer."""
    layer = seen.layers[row]
    kind = layer.activation or type(layer.module).__name__
    return f"layer {row + 1} of {len(seen.layers)}, {layer.name} ({kind})"


def describe_outputs(seen: Observation, row: int) -> str:
    """Return what is wrong with the outputs of a layer whose inputs are not scaled."""
    size = seen.root_mean_square(row)
    if size > UNSCALED:
        return f"{size:.3g} (root mean square)"
    return f"are saturated ({percent(seen.numbers['stuck'][row])})"


def remedies_of_vanishing(layer: Layer) -> str:
    """Return what helps against vanishing gradients in a layer."""
    response = layer.response
    if response is None or response.kind != "saturates":
        return "norm=batch, or initializer=kaiming_normal"
    if response.largest < 0.5:  # such as sigmoid: larger weights would saturate it
        return "activation=relu, or norm=batch"
    return "activation=relu, norm=batch, or initializer=kaiming_normal"


def describe_others(rows: Iterable[int], worst: int) -> str:
    """Return the numbers of the other layers with the same problem."""
    others = [str(row + 1) for row in rows if row != worst]
    if not others:
        return ""
    more = f" and {len(others) - 6} more" if len(others) > 6 else ""
    return f", also {', '.join(others[:6])}{more}"


def restored_watch(state: Mapping[str, Any]) -> Watch:
    """Return a `Watch` with a result of its `state_dict`."""
    first_loss = state.get("first_loss")
    lowest_loss = state.get("lowest_loss")
    watch = Watch(
        first_step=state.get("first_step"),
        first_loss=nan if first_loss is None else first_loss,
        lowest_loss=inf if lowest_loss is None else lowest_loss,
    )
    watch.losses.extend(state.get("losses", []))
    for name, row, count, first in state.get("streaks", []):
        watch.streaks[name, row] = (count, first)
    watch.reported = {(name, row) for name, row in state.get("reported", [])}
    return watch
