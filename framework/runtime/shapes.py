"""Shapes of samples: the output shape of a module is found by running it once on zeros."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from framework.errors import BuildError, SettingError
from framework.errors.user_code import describe, user_place
from framework.registry.kinds import Shape
from framework.registry.registry import Maker

from . import seeds
from .modes import restored_modes


class NoTensorError(BuildError):
    """A module does not return a tensor; the text follows the name of the module."""


class ShapeError(BuildError):
    """A part does not support the shape of its input.

    Attributes:
        in_shape: the shape of a sample.
        axes: the numbers of axes that the part supports.
    """

    in_shape: Shape = ()
    axes: Sequence[int] = ()


def shape_error(part: str, forms: str, in_shape: Shape, hint: str = "") -> ShapeError:
    """Return the error of a part that does not support a shape; for the arguments see `expect`."""
    message = f"{part} expects {forms}, got {tuple(in_shape)}"
    error = ShapeError(f"{message}; {hint}" if hint else message)
    error.in_shape = tuple(in_shape)
    error.axes = supported_axes(forms)
    return error


def supported_axes(forms: str) -> list[int]:
    """Return the number of axes of each of the forms: [1, 3] for "(D,) or images (C, H, W)"."""
    found = re.findall(r"\(([^)]*)\)", forms)
    return [len(axes.replace(",", " ").split()) for axes in found]


def expect(in_shape: Shape, forms: str, part: str, hint: str = "") -> Shape:
    """Return `in_shape` if it has as many axes as one of the forms.

    Args:
        in_shape: the shape of a sample.
        forms: the supported shapes, such as "(D,) or images (C, H, W)".
        part: the name of the part, for the message.
        hint: further text for the message.

    Raises:
        ShapeError: such as "conv2d expects (C, H, W), got (128,)", followed by the hint.
    """
    if len(in_shape) in supported_axes(forms):
        return tuple(in_shape)
    raise shape_error(part, forms, in_shape, hint)


def dry_run(
    module: nn.Module, batch: Any, outputs_of: Callable[[Any], Any] | None = None
) -> Tensor:
    """Return the output of a module in evaluation mode, without gradients.

    Afterwards the modes of its modules and the global random generators are as before.

    Args:
        module: the module.
        batch: its only argument.
        outputs_of: calls the module with a batch, if it takes other arguments.

    Raises:
        BuildError: the output is not a tensor.
        Exception: any error of the module.
    """
    with restored_modes(module):
        module.eval()
        with seeds.undisturbed(), torch.no_grad():
            output = module(batch) if outputs_of is None else outputs_of(batch)
    if not isinstance(output, Tensor):
        raise NoTensorError(f"returns a {type(output).__name__}, not a tensor")
    return output


def first_output(module: nn.Module, in_shape: Shape) -> Tensor:
    """Return the output for one sample of zeros.

    The zeros are floats, or int64 (token ids) if the module raises an error for floats.
    """
    try:
        return dry_run(module, torch.zeros(1, *in_shape))
    except Exception as error:
        try:
            return dry_run(module, torch.zeros(1, *in_shape, dtype=torch.int64))
        except Exception:
            raise error from None


def output_shape(module: nn.Module, in_shape: Shape) -> Shape:
    """Return the output shape for a sample of `in_shape`; both without the batch axis."""
    return tuple(first_output(module, in_shape).shape[1:])


def build_chain(
    makers: Iterable[Callable[..., Any]], in_shape: Shape
) -> tuple[list[nn.Module], Shape]:
    """Build blocks one after another, each for the output shape of the previous one.

    Args:
        makers: each returns a block for an input shape.
        in_shape: the input shape of the first block.

    Returns:
        The blocks, and the output shape of the last one.

    Raises:
        BuildError: with the number of the block, counted from 1, such as
            "block 4 (conv2d) expects (C, H, W), got (128,)".
    """
    modules: list[nn.Module] = []
    output: Tensor | None = None
    shape = tuple(in_shape)
    for number, maker in enumerate(makers, 1):
        name = maker_name(maker)
        place = f"block {number} ({name})"
        try:
            module = maker(shape)
        except (BuildError, SettingError) as error:
            raise error.with_text(message_at(place, name, error)) from error
        with run_errors(place, name, shape):
            output = first_output(module, shape) if output is None else dry_run(module, output)
        shape = tuple(output.shape[1:])
        modules.append(module)
    return modules, shape


@contextmanager
def run_errors(place: str, name: str, in_shape: Shape) -> Iterator[None]:
    """Raise BuildError with the place of a module for an error of running it.

    Args:
        place: the position and name of the module, such as "block 4 (conv2d)".
        name: the name of the module.
        in_shape: the shape of its input.
    """
    try:
        yield
    except BuildError as error:
        raise BuildError(message_at(place, name, error)) from error
    except Exception as error:
        if user_place(error) is None:
            raise BuildError(f"{place} cannot take {in_shape}: {first_line(error)}") from error
        situation = f"while running it on an input of shape {in_shape}"
        raise BuildError(f"{place}: {describe(error)}, {situation}") from error


def maker_name(maker: Callable[..., Any]) -> str:
    """Return the registered name of a block, or the name of the callable that makes it."""
    if isinstance(maker, Maker):
        return maker.entry.name
    return getattr(maker, "__name__", type(maker).__name__)


def message_at(place: str, name: str, error: Exception) -> str:
    """Return the text of an error after its place, without the name of the part twice."""
    text = str(error)
    if isinstance(error, NoTensorError):
        return f"{place} {text}"
    without_name = text.removeprefix(f"{name} ")
    if without_name == text:
        return f"{place}: {text}"
    return f"{place} {without_name}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its class if the text is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
