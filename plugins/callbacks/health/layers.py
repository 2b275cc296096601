"""The layers of a model, and numbers of their activations, gradients and updates."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import hypot, isnan, nan
from typing import Any

import torch
from torch import Tensor, nn

from framework import activations, foreach, numbers_of, pytree

from .responses import Response, responses_of

QUANTITIES = ("mean", "std", "stuck", "gradient", "update", "weight")
"""The numbers of a layer: mean and standard deviation of its activations; the share of them that is
saturated, or of units that are dead; the norm of its gradient; the norm of the change of its
weights in the step, relative to that of the weights; the norm of its weights."""
LARGEST = 2**20  # numbers of a weight that are copied for the update
CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


@dataclass(eq=False)
class Layer:
    """A module with a weight of two axes or more, and the activation that follows it.

    Attributes:
        name: the path of the module in the model.
        module: the module.
        parameters: its own ones; those that are tied belong to the first layer only.
        activation: the name of its activation; empty without one.
        response: that of the activation.
        is_output: no layer follows its activation.
    """

    name: str
    module: nn.Module
    parameters: list[nn.Parameter]
    activation: str = ""
    response: Response | None = None
    is_output: bool = False

    @property
    def unit_axis(self) -> int:
        """The axis of the activations that numbers the units."""
        return 1 if isinstance(self.module, CONVOLUTIONS) else -1


def find_layers(model: nn.Module) -> list[Layer]:
    """Return the layers of a model, in the order of its modules."""
    known: set[Tensor] = set()
    layers = []
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if any(parameter.ndim >= 2 for parameter in own):
            parameters = [parameter for parameter in own if parameter not in known]
            layers.append(Layer(name or type(module).__name__, module, parameters))
        known.update(own)
    return layers


def activation_name(module: nn.Module) -> str:
    """Return the name under which the class of an activation is registered, or of the class."""
    for entry in activations:
        if entry.part is type(module):
            return entry.name
    return type(module).__name__


@dataclass
class Call:
    """A call of a layer in a forward pass, and that of the activation after it.

    Attributes:
        row: the number of the layer.
        output: a copy of that of the activation, or of the layer without one.
        activation: the module, or None.
        inputs: those of the activation.
    """

    row: int
    output: Tensor
    activation: nn.Module | None = None
    inputs: Tensor | None = None


@dataclass
class Activations:
    """Sums over the activations of a layer in a forward pass.

    Attributes:
        count: the number of activations.
        sums: their sum and that of their squares, shape (2,), float64 (float32 on mps).
        stuck: the number of those whose derivative is almost 0.
        dead: whether each unit is stuck for all samples; None without an activation.
    """

    count: int = 0
    sums: Tensor | None = None
    stuck: Tensor | None = None
    dead: Tensor | None = None


class Recorder:
    """Records the activations of layers in forward passes, with hooks that exist only meanwhile.

    Args:
        model: the model.
        layers: those of the model; their activations are found in the first forward pass.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer]):
        self.model = model
        self.layers = layers
        self.rows = {layer.module: row for row, layer in enumerate(layers)}
        others = [module for module in model.modules() if module not in self.rows]
        self.responses = responses_of(others)
        self.totals: dict[int, Activations] = {}
        self.call: Call | None = None
        self.kept: Tensor | None = None  # the inputs of an activation that overwrites them
        self.is_measuring = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the forward passes of a block in `totals`."""
        self.totals = {}
        hooks = [module.register_forward_hook(self._after_layer) for module in self.rows]
        for module in self.responses:
            if getattr(module, "inplace", False):
                hooks.append(module.register_forward_pre_hook(self._before_activation))
            hooks.append(module.register_forward_hook(self._after_activation))
        try:
            yield
        finally:
            self.call = None
            self.kept = None
            for hook in hooks:
                hook.remove()

    def end_forward(self) -> None:
        """Count the last call of a forward pass, whose activation is that of the output."""
        if self.call is not None:
            self.layers[self.call.row].is_output = True
        self._finish_call()

    def _after_layer(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._finish_call()
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel() > 0:
                # a copy, since the model may add to its outputs in place
                self.call = Call(self.rows[module], leaf.detach().clone())
                return

    def _before_activation(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not self.is_measuring:
            self.kept = inputs[0].detach().clone()

    def _after_activation(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        kept = self.kept
        self.kept = None
        if self.is_measuring or self.call is None or self.call.activation is not None:
            return
        self.call.activation = module
        self.call.inputs = inputs[0] if kept is None else kept
        self.call.output = output.detach().clone()

    def _finish_call(self) -> None:
        """Add the numbers of the current call to those of its layer."""
        call = self.call
        self.call = None
        if call is None:
            return
        layer = self.layers[call.row]
        total = self.totals.setdefault(call.row, Activations())
        output = call.output
        variance, mean = torch.var_mean(output.float(), correction=0)
        count = output.numel()
        dtype = torch.float32 if output.device.type == "mps" else torch.float64  # mps has none
        sums = torch.stack([mean, variance + mean.square()]).to(dtype) * count
        total.sums = sums if total.sums is None else total.sums + sums
        total.count += count
        if call.activation is None or call.inputs is None:
            return
        layer.activation = layer.activation or activation_name(call.activation)
        layer.response = self.responses[call.activation]
        if layer.response.kind == "open":
            return
        self.is_measuring = True
        try:
            stuck = layer.response.stuck(call.activation, call.inputs)
        finally:
            self.is_measuring = False
        number = stuck.sum()
        total.stuck = number if total.stuck is None else total.stuck + number
        if stuck.ndim < 2:
            return
        axis = layer.unit_axis % stuck.ndim
        dead = stuck.movedim(axis, 0).flatten(1).all(1)
        total.dead = dead if total.dead is None else total.dead & dead


def stuck_share(layer: Layer, total: Activations) -> Tensor | None:
    """Return the share of saturated activations or of dead units; None if neither is known."""
    if layer.response is None or total.stuck is None:
        return None
    if layer.response.kind == "saturates":
        return total.stuck / total.count
    return None if total.dead is None else total.dead.float().mean()


class Weights:
    """The weights of layers and their gradients before an update.

    A weight of more than about a million numbers is not copied: the change of the weights is
    measured at every k-th number.

    Attributes:
        gradient_norms: of each parameter with a gradient, by (row, place in the layer).
        weight_norms: of each parameter, by (row, place in the layer).
    """

    def __init__(self, layers: Sequence[Layer]):
        self.places: list[tuple[int, int]] = []
        parameters: list[Tensor] = []
        for row, layer in enumerate(layers):
            for place, parameter in enumerate(layer.parameters):
                self.places.append((row, place))
                parameters.append(parameter.detach())
        self.parameters = parameters
        self.before = [some_of(parameter).clone() for parameter in parameters]
        self.weight_norms = dict(zip(self.places, norms(parameters), strict=True))
        self.layers = layers
        self.gradient_norms: dict[tuple[int, int], Tensor] = {}
        self.add_gradients()

    def add_gradients(self) -> None:
        """Measure the existing gradients, in each phase of a step."""
        gradients: dict[tuple[int, int], Tensor] = {}
        for row, place in self.places:
            gradient = self.layers[row].parameters[place].grad
            if gradient is not None:
                gradients[row, place] = gradient
        found = norms(list(gradients.values()))
        self.gradient_norms |= dict(zip(gradients, found, strict=True))

    def changes(self) -> tuple[dict[tuple[int, int], Tensor], dict[tuple[int, int], Tensor]]:
        """Return the norms of the changes since then, and those of the weights that changed."""
        after = [some_of(parameter) for parameter in self.parameters]
        changed = norms(list(foreach.sub(after, self.before))) if after else []
        return (
            dict(zip(self.places, changed, strict=True)),
            dict(zip(self.places, norms(self.before), strict=True)),
        )


def norms(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the 2-norm of each tensor, shape ()."""
    dense = [numbers_of(tensor) for tensor in tensors]
    return foreach.norms(dense) if dense else []


def some_of(tensor: Tensor) -> Tensor:
    """Return a tensor, or every k-th number of a large one that is not sharded."""
    step = tensor.numel() // LARGEST
    if step < 2 or not tensor.is_contiguous() or type(tensor) is not Tensor:
        return tensor
    return tensor.view(-1)[::step]


def joined(values: Iterable[float]) -> float:
    """Return the norm of a vector from those of its parts; nan without a part."""
    parts = list(values)
    return hypot(*parts) if parts else nan


def ratio(change: float, weight: float) -> float:
    """Return the relative change of weights; nan if all of them were 0."""
    return nan if isnan(change) or weight == 0 else change / weight
