"""Measuring a model without leaving a trace: layers with shapes and costs, memory of activations and optimizer.

The model runs on the first few samples of a batch; weights, buffers, modes and random state are left as they were.
"""

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from framework.contracts.task import Task
from framework.data.dataset import Batch
from framework.runtime import seeds
from framework.runtime.modes import restored_modes
from framework.runtime.torch_internals.module_contents import buffers_of


@dataclass
class Layer:
    """A module that does work of its own; `name` is its path in the model.

    Attributes:
        out_shape: of one sample, without the batch axis; of its last call.
        parameters: those that no layer before it has (tied weights count once).
        flops: of one sample's forward pass, two for each multiply-add; matrix products and convolutions only.
    """

    name: str
    type: str
    out_shape: tuple[int, ...]
    parameters: int
    flops: int


@contextmanager
def model_undisturbed(model: nn.Module, train: bool | None = False) -> Iterator[None]:
    """Run a model; afterwards its modes, buffers and the random state are as before.

    Args:
        model: any module.
        train: whether it is in training mode meanwhile; None keeps the modes.
    """
    buffers = []
    for owner in model.modules():
        for name, buffer in buffers_of(owner).items():
            if buffer is not None:
                buffers.append((owner, name, buffer, buffer.clone()))
    try:
        with restored_modes(model), seeds.undisturbed():
            if train is not None:
                model.train(train)
            yield
    finally:
        with torch.no_grad():
            for owner, name, buffer, before in buffers:
                buffer.copy_(before)
                buffers_of(owner)[name] = buffer  # the forward pass may have replaced it


def call(model: nn.Module, batch: Batch, task: Task | None, samples: int) -> None:
    few = tuple(
        tensor[:samples].clone() for tensor in batch
    )  # cloned, so that no storage is larger than its tensor
    if task is None:
        model(few[0])
    else:
        task.step(model, few)


@dataclass
class _Call:
    """A module at work: what it cost, and what of that its children account for."""

    flops_before: int
    flops_inside: int = 0
    children: int = 0


class _Probe:
    """Follows a forward pass with hooks and notes each module that does work itself."""

    def __init__(self, model: nn.Module, counter: FlopCounterMode):
        self.counter = counter
        self.names = {module: name for name, module in model.named_modules()}
        self.open: list[_Call] = []
        self.flops: dict[nn.Module, int] = {}  # in the order of the first calls
        self.shapes: dict[nn.Module, tuple[int, ...]] = {}
        self.leaves: set[nn.Module] = set()

    @contextmanager
    def watch(self) -> Iterator[None]:
        hooks = [module.register_forward_pre_hook(self._enter) for module in self.names]
        hooks += [module.register_forward_hook(self._leave) for module in self.names]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, module: nn.Module, _: Any) -> None:
        self.flops.setdefault(module, 0)
        self.open.append(_Call(self.counter.get_total_flops()))

    def _leave(self, module: nn.Module, _: Any, output: Any) -> None:
        call = self.open.pop()
        spent = self.counter.get_total_flops() - call.flops_before
        self.flops[module] += spent - call.flops_inside
        self.shapes[module] = shape_of(output)
        if call.children == 0:
            self.leaves.add(module)
        if self.open:
            self.open[-1].flops_inside += spent
            self.open[-1].children += 1


def shape_of(output: Any) -> tuple[int, ...]:
    """The shape of one sample of an output; of several outputs, of the first tensor."""
    if isinstance(output, dict):
        output = tuple(output.values())
    while isinstance(output, tuple | list) and output:
        output = output[0]
    return tuple(output.shape[1:]) if isinstance(output, Tensor) else ()


def read_layers(
    model: nn.Module, batch: Batch, task: Task | None = None
) -> tuple[list[Layer], list[str]]:
    """Return the layers in the order of their first call, and the names of parameters that no layer uses."""
    counter = FlopCounterMode(display=False)
    probe = _Probe(model, counter)
    with model_undisturbed(model), torch.no_grad(), counted_as_written(), counter, probe.watch():
        call(model, batch, task, samples=1)
    counted: set[Tensor] = set()
    called = [(module, make_layer(probe, module, counted)) for module in probe.flops]
    layers = [
        layer
        for module, layer in called
        if module in probe.leaves or layer.parameters or layer.flops
    ]
    return layers, [
        name for name, parameter in model.named_parameters() if parameter not in counted
    ]


def make_layer(probe: _Probe, module: nn.Module, counted: set[Tensor]) -> Layer:
    """Return a called module as a layer; if it calls no other, the parameters below it are its own too."""
    own = [p for p in module.parameters(recurse=module in probe.leaves) if p not in counted]
    counted.update(own)
    name = probe.names[module] or "(itself)"
    size = sum(p.numel() for p in own)
    return Layer(
        name, type(module).__name__, probe.shapes.get(module, ()), size, probe.flops[module]
    )


@contextmanager
def counted_as_written() -> Iterator[None]:
    """Switch off the fused kernels (attention, transformer and recurrent layers) that the counter does not know."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("ignore")  # reading oneDNN's flags warns of TF32 on some builds
            with torch.backends.mkldnn.flags(enabled=False):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def activation_bytes(model: nn.Module, batch: Batch, task: Task | None = None) -> int:
    """Return the bytes that a batch's forward pass keeps for the backward pass, parameters left out.

    Measured in train mode on two and on four samples and carried on in a straight line to the size of the batch.
    """
    size = len(batch[0])
    few, more = min(2, size), min(4, size)
    at_more = saved_bytes(model, batch, task, more)
    if few == more or size == more:
        return at_more
    slope = (at_more - saved_bytes(model, batch, task, few)) / (more - few)
    return round(at_more + slope * (size - more))


def saved_bytes(model: nn.Module, batch: Batch, task: Task | None, samples: int) -> int:
    """Return the bytes of the distinct storages that autograd saves for a forward pass of `samples` samples."""
    storages = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: list[Tensor] = []  # held, so that no address is used twice
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            storages.add(storage.data_ptr())
            kept.append(tensor.detach())
            total += storage.nbytes()
        return (
            tensor.detach()
        )  # an output kept by its own node would be a cycle that only the collector frees

    saving = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with model_undisturbed(model, train=True), torch.enable_grad(), saving:
        call(model, batch, task, samples)
    return total


def size_in_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int | None:
    """Return the bytes of the optimizer's state, from one step of a copy on parameters without storage.

    An optimizer that reads values is tried with zeros on the CPU instead; None when neither works.
    """
    for device in ("meta", "cpu"):
        try:
            states = stepped_copy(optimizer, device).state.values()
            return sum(
                size_in_bytes(v for v in state.values() if isinstance(v, Tensor))
                for state in states
            )
        except Exception:  # an optimizer may fail in any way where no value can be read
            continue
    return None


def stepped_copy(optimizer: torch.optim.Optimizer, device: str) -> torch.optim.Optimizer:
    stand_ins: dict[int, Any] = {}
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        stand_in = nn.Parameter(torch.zeros_like(parameter, device=device), parameter.requires_grad)
        stand_in.grad = torch.zeros_like(stand_in) if parameter.requires_grad else None
        stand_ins[id(parameter)] = stand_in
    twin = copy.deepcopy(optimizer, stand_ins)
    twin.step(lambda: 0.0)  # some rules (LBFGS) ask for the loss
    return twin
