"""Where tensors are, and in which number format the arithmetic runs."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from framework.errors import SettingError

from . import seeds
from .momentum import complete_momentum

NOTHING = nullcontext()
SMALL = 20_000_000  # products of a forward pass
Format = Literal["fp32", "bf16", "fp16"]
Item = TypeVar("Item")


def find_device(name: str) -> torch.device:
    """Return the device of that name; auto is cuda, else mps, else cpu. Raises SettingError when it is not there."""
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingError(
            f"device should be auto, cpu, cuda, cuda:N or mps, not {name!r}"
        ) from error
    there = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    if (device.index or 0) >= there.get(device.type, 0):
        raise SettingError(
            f"device {name} is not on this machine (it has {there['cuda']} CUDA devices)"
        )
    return device


def channels_last(tensor: Tensor) -> Tensor:
    """Return images (samples, channels, height, width) with the channels of a pixel side by side in memory.

    The values and the shape are the same, and other tensors stay as they are. A convolution goes on in this format.
    """
    if tensor.ndim != 4:
        return tensor
    _, channels, height, width = tensor.shape
    pixels = tensor.permute(0, 2, 3, 1).contiguous()
    strides = (channels * height * width, 1, width * channels, channels)
    return pixels.as_strided(
        tensor.shape, strides
    )  # of one channel torch would leave the strides as they were


def overruns_memory(layer: nn.Module) -> bool:
    """Return whether the backward pass of a layer on `channels_last` images writes past the end of a buffer.

    oneDNN's kernel for processors with AVX2 but without AVX-512 does so, as of torch 2.13: the process crashes.
    """
    if not isinstance(layer, nn.Conv2d) or layer.groups != 1:
        return False
    return layer.kernel_size == (1, 1) and layer.stride != (1, 1) and layer.in_channels < 8


def chosen_layout(wanted: bool | Literal["auto"], model: nn.Module | None) -> tuple[bool, str]:
    """Return whether a model's images are to be `channels_last`, and what to say of it; auto looks at its layers only.

    A convolution is faster so. A change of format costs, and behind the last convolution there often is one, if only
    in the backward pass (of a mean over all positions): it is cheap where the images have become smaller by then.
    """
    parts = [] if model is None else list(model.modules())
    convolutions = sum(isinstance(part, nn.Conv2d) for part in parts)
    if wanted != "auto" or convolutions < 2:
        return wanted is True, ", channels last" * (wanted is True)
    if any(map(overruns_memory, parts)):
        return (
            False,
            ", channels first (for a 1x1 convolution with a stride and fewer than 8 input channels)",
        )
    steps = [
        part.stride for part in parts if isinstance(part, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d)
    ]
    if any(step not in (1, (1, 1)) for step in steps[1:]):  # the first may cut patches
        return (
            True,
            f", channels last (for {convolutions} convolutions that go on to smaller images)",
        )
    return (
        False,
        f", channels first (for {convolutions} convolutions that do not go on to smaller images)",
    )


class CopyStream:
    """Copies batches to a CUDA device on a stream of its own, which does not wait for the model.

    Args:
        device: the CUDA device.
        reused: whether the memory of a batch may be written when the next one is read. Then each
            copy is complete before that, and a batch that is on the device already is copied too.
    """

    def __init__(self, device: torch.device, reused: bool = False):
        self.device, self.stream, self.reused = device, torch.cuda.Stream(device), reused

    def ahead(self, reads: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        """Yield (batch, something) on the device, having begun to copy the one after it; no batch passes as it is."""
        return self._ready(one_ahead(map(self._begin, reads)))

    def in_turn(self, reads: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        """Yield (batch, something) on the device; the next one is read when it is asked for."""
        return self._ready(map(self._begin, reads))

    def _ready(self, begun: Iterable[tuple[Any, Any, Any]]) -> Iterator[tuple[Any, Any]]:
        """Yield the copies that `_begin` has begun, ready for the current stream."""
        for batch, beside, done in begun:
            if done is not None:
                current = torch.cuda.current_stream(self.device)
                current.wait_event(done)
                for tensor in batch:
                    tensor.record_stream(
                        current
                    )  # its memory is of the other stream, which might use it again
            yield batch, beside

    def _begin(self, read: tuple[Any, Any]) -> tuple[Any, Any, torch.cuda.Event | None]:
        batch, beside = read
        if not isinstance(batch, tuple | list):
            return batch, beside, None
        with torch.cuda.stream(self.stream):
            copied = tuple(tensor.to(self.device, non_blocking=True) for tensor in batch)
            done = self.stream.record_event()
        if self.reused:
            done.synchronize()  # waits for this copy alone; out of pinned memory it is asynchronous
            pairs = zip(copied, batch, strict=True)
            copied = tuple(new.clone() if new is old else new for new, old in pairs)
        return copied, beside, done


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield each item once the next one is made. An error comes where it would have: after the items before it."""
    held: list[Item] = []
    failed: Exception | None = None
    try:
        for item in items:
            yield from held
            held = [item]
    except Exception as error:
        failed = error
    yield from held
    if failed is not None:
        raise failed


def suitable_threads(model: nn.Module, rows: int, workers: int = 0) -> int:
    """Return how many threads an operation of a model may use: one for a small model, else as many as there are cores.

    rows: what each weight is multiplied with in a step (samples; times positions, for sequences and images). Below some
    20 million products a second thread costs more than it does, and much more where another process wants its core.
    Cores that data workers need are left to them; OMP_NUM_THREADS, if it is set, is obeyed.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    products = rows * sum(
        parameter.numel() for parameter in model.parameters() if parameter.ndim > 1
    )
    return 1 if products < SMALL else max(torch.get_num_threads() - workers, 1)


@contextmanager
def intra_op_threads(number: int) -> Iterator[None]:
    """Let operations use so many threads; afterwards torch is set as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Run with deterministic algorithms only, if wanted; afterwards torch is set as before."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    if wanted:
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # cuBLAS asks for one fixed workspace
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        if wanted:  # torch imports its compiler here, which takes a second
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class Precision:
    """Runs forward passes in a number format, and scales the loss where the format needs it (fp16)."""

    def __init__(self, format: Format, device: torch.device):
        self.device = device
        self.dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[format]
        self.scaler: torch.amp.GradScaler | None = None
        self.needs_scaler = format == "fp16"
        self.reset()

    def reset(self) -> None:
        """Forget the scale of an earlier fit."""
        self.scaler = torch.amp.GradScaler(self.device.type) if self.needs_scaler else None

    def autocast(self) -> AbstractContextManager:
        return NOTHING if self.dtype is None else torch.autocast(self.device.type, self.dtype)

    @contextmanager
    def inference(self, model: nn.Module) -> Iterator[None]:
        """Run a model as it is used after training; its modules' modes and the random generators stay as they are."""
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            with seeds.undisturbed(), torch.no_grad(), self.autocast():
                yield
        finally:
            model.train(modes[model])  # some modules do more in `train` than set a flag
            for module, mode in modes.items():
                module.training = mode

    def scaled(self, loss: Tensor) -> Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, update: Callable[[], Any]) -> None:
        """Update the parameters; with a scaler, only when no gradient overflowed. `update` does as `optimizer.step`."""
        if self.scaler is None:
            update()
        else:
            complete_momentum(optimizer)
            self.scaler.step(optimizer)
            self.scaler.update()

    def state_dict(self) -> dict:
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)
