"""The layers of a model with their shapes and costs, and the memory of activations and optimizer.

The model runs on a few samples of a batch. Its weights, buffers, modes, and the random generators
do not change.
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

from framework.contracts.fields import first_tensor
from framework.contracts.task import Task
from framework.data.dataset import Batch
from framework.runtime import seeds
from framework.runtime.batch import count_rows, map_tensors, select_rows, tensors_of
from framework.runtime.modes import restored_modes
from framework.runtime.torch_internals.module_contents import direct_buffers


@dataclass
class Layer:
    """A module that computes something itself, not only in its submodules.

    Attributes:
        name: the path of the module in the model.
        type: the name of its class.
        out_shape: the shape of its last output, without the batch axis.
        parameters: the number of its parameters; tied weights count for the first layer only.
        flops: of the forward pass of one sample, two for each multiply-add; matrix products and
            convolutions only.
    """

    name: str
    type: str
    out_shape: tuple[int, ...]
    parameters: int
    flops: int


@contextmanager
def model_undisturbed(model: nn.Module, train: bool | None = False) -> Iterator[None]:
    """Run a model in a block, then restore its modes, its buffers and the random generators.

    Args:
        model: any module.
        train: whether the model is in training mode in the block; None keeps the modes.
    """
    buffers = []
    for owner in model.modules():
        for name, buffer in direct_buffers(owner).items():
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
                direct_buffers(owner)[name] = buffer  # the forward pass may have replaced it


def run_model(model: nn.Module, batch: Batch, task: Task | None, samples: int) -> None:
    """Run the model, or the step of its task, on the first samples of a batch."""
    # Cloned, so that no storage is larger than its tensor.
    few = map_tensors(Tensor.clone, select_rows(batch, 0, samples))
    if task is None:
        model(first_tensor(few))
    else:
        task.step(model, few)


@dataclass
class _Call:
    """A running call of a module.

    Attributes:
        flops_before: the count when the call began.
        flops_inside: the operations of the calls of its children.
        children: the number of calls of its children.
    """

    flops_before: int
    flops_inside: int = 0
    children: int = 0


class _Probe:
    """Records shapes and operations of each module with hooks during a forward pass."""

    def __init__(self, model: nn.Module, counter: FlopCounterMode):
        self.counter = counter
        self.names = {module: name for name, module in model.named_modules()}
        self.running: list[_Call] = []
        self.flops: dict[nn.Module, int] = {}  # in the order of the first calls
        self.shapes: dict[nn.Module, tuple[int, ...]] = {}
        self.leaves: set[nn.Module] = set()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Record the forward passes of a block."""
        hooks = [module.register_forward_pre_hook(self._enter) for module in self.names]
        hooks += [module.register_forward_hook(self._leave) for module in self.names]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, module: nn.Module, _: Any) -> None:
        self.flops.setdefault(module, 0)
        self.running.append(_Call(self.counter.get_total_flops()))

    def _leave(self, module: nn.Module, _: Any, output: Any) -> None:
        call = self.running.pop()
        spent = self.counter.get_total_flops() - call.flops_before
        self.flops[module] += spent - call.flops_inside
        self.shapes[module] = shape_of(output)
        if call.children == 0:
            self.leaves.add(module)
        if self.running:
            self.running[-1].flops_inside += spent
            self.running[-1].children += 1


def shape_of(output: Any) -> tuple[int, ...]:
    """Return the shape of one sample of an output; of several outputs that of the first tensor."""
    for tensor in tensors_of(output):
        if tensor.ndim:
            return tuple(tensor.shape[1:])
    return ()


def read_layers(
    model: nn.Module, batch: Batch, task: Task | None = None
) -> tuple[list[Layer], list[str]]:
    """Run a model on one sample and return its layers.

    Args:
        model: it stays unchanged.
        batch: on the device of the model.
        task: if not None, its `step` calls the model.

    Returns:
        The layers in the order of their first call, and the names of the parameters that belong to
        none of them.
    """
    counter = FlopCounterMode(display=False)
    probe = _Probe(model, counter)
    with model_undisturbed(model), torch.no_grad(), counted_as_written(), counter, probe.watch():
        run_model(model, batch, task, samples=1)
    counted: set[Tensor] = set()
    layers = []
    for module in probe.flops:
        layer = make_layer(probe, module, counted)
        if module in probe.leaves or layer.parameters or layer.flops:
            layers.append(layer)
    unused = [name for name, p in model.named_parameters() if p not in counted]
    return layers, unused


def make_layer(probe: _Probe, module: nn.Module, counted: set[Tensor]) -> Layer:
    """Return the layer of a module that was called.

    Args:
        probe: the records of the forward pass.
        module: the module. If it calls no other module, it owns the parameters of its submodules.
        counted: the parameters of earlier layers, to which those of this layer are added.
    """
    own = [p for p in module.parameters(recurse=module in probe.leaves) if p not in counted]
    counted.update(own)
    return Layer(
        name=probe.names[module] or "(itself)",
        type=type(module).__name__,
        out_shape=probe.shapes.get(module, ()),
        parameters=sum(p.numel() for p in own),
        flops=probe.flops[module],
    )


@contextmanager
def counted_as_written() -> Iterator[None]:
    """Disable the fused kernels of attention, transformer and recurrent layers in a block.

    The counter of operations does not know them.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("ignore")  # some builds warn about TF32 here
            with torch.backends.mkldnn.flags(enabled=False):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def activation_bytes(
    model: nn.Module, batch: Batch, task: Task | None = None, rows: int | None = None
) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, without parameters.

    Measured in training mode on two and on four samples, and extrapolated linearly to the size of
    the batch, or to its first `rows` samples. The other arguments are those of `read_layers`.
    """
    size = count_rows(batch) if rows is None else rows
    few = min(2, size)
    more = min(4, size)
    at_more = saved_bytes(model, batch, task, more)
    if few == more or size == more:
        return at_more
    slope = (at_more - saved_bytes(model, batch, task, few)) / (more - few)
    return round(at_more + slope * (size - more))


def saved_bytes(model: nn.Module, batch: Batch, task: Task | None, samples: int) -> int:
    """Return the bytes of the distinct storages that autograd saves in a forward pass.

    Args:
        model: it stays unchanged.
        batch: on the device of the model.
        task: if not None, its `step` calls the model.
        samples: the number of samples of the batch to use.
    """
    storages = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: list[Tensor] = []  # so that no address is used twice
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            storages.add(storage.data_ptr())
            kept.append(tensor.detach())
            total += storage.nbytes()
        # Detached: an output that its own node keeps would be a cycle until garbage collection.
        return tensor.detach()

    saving = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with model_undisturbed(model, train=True), torch.enable_grad(), saving:
        run_model(model, batch, task, samples)
    return total


def size_in_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the number of bytes of the elements of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int | None:
    """Return the bytes of the state of an optimizer; None if it cannot be measured.

    A copy of the optimizer takes a step on parameters without storage. A copy that reads values
    fails at that; then the parameters are zeros on the CPU.
    """
    for device in ("meta", "cpu"):
        try:
            return size_in_bytes(state_tensors(stepped_copy(optimizer, device)))
        except Exception:  # an optimizer may fail in any way if it reads values
            continue
    return None


def state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yield the tensors in the state of an optimizer."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                yield value


def stepped_copy(optimizer: torch.optim.Optimizer, device: str) -> torch.optim.Optimizer:
    """Return a copy of an optimizer after a step on parameters of zeros on a device."""
    replacements: dict[int, Any] = {}  # by `id`, as `deepcopy` looks up objects
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            zeros = torch.zeros_like(parameter, device=device)
            replacement = nn.Parameter(zeros, parameter.requires_grad)
            if parameter.requires_grad:
                replacement.grad = torch.zeros_like(replacement)
            replacements[id(parameter)] = replacement
    stepped = copy.deepcopy(optimizer, replacements)
    stepped.step(lambda: 0.0)  # some optimizers, such as LBFGS, need the loss
    return stepped
