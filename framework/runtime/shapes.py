"""Shapes of samples, measured: a module's output shape is found by running it once on a zero sample."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from framework.errors import BuildError, SettingError
from framework.errors.user_code import describe, user_place
from framework.registry.kinds import Shape
from framework.registry.registry import Maker

from . import seeds


class NoTensorError(BuildError):
    """A module returns something other than a tensor; the text follows the module's name."""


def expect(in_shape: Shape, forms: str, who: str, hint: str = "") -> Shape:
    """Return `in_shape` when it has as many axes as one of `forms`, such as "(D,) or images (C, H, W)".

    Raises BuildError: "conv2d expects (C, H, W), gets (128,)", followed by the hint.
    """
    ranks = [len(axes.replace(",", " ").split()) for axes in re.findall(r"\(([^)]*)\)", forms)]
    if len(in_shape) not in ranks:
        raise BuildError(
            f"{who} expects {forms}, gets {tuple(in_shape)}" + (f"; {hint}" if hint else "")
        )
    return tuple(in_shape)


def dry_run(module: nn.Module, batch: Tensor) -> Tensor:
    """Return the module's output in evaluation mode, without gradients.

    Nothing remembers it: neither statistics, nor training flags, nor random generators.
    Raises BuildError when the output is not a tensor, and whatever the module raises.
    """
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        devices = [batch.device] if batch.is_cuda else []
        with torch.no_grad(), seeds.measuring(), torch.random.fork_rng(devices):
            output = module(batch)
    finally:
        for part, flag in training.items():
            part.training = flag
    if not isinstance(output, Tensor):
        raise NoTensorError(f"returns a {type(output).__name__}, not a tensor")
    return output


def first_output(module: nn.Module, in_shape: Shape) -> Tensor:
    """Return the output for one zero sample: of floats, or where the module refuses them, of int64 (token ids)."""
    try:
        return dry_run(module, torch.zeros(1, *in_shape))
    except Exception as error:
        try:
            return dry_run(module, torch.zeros(1, *in_shape, dtype=torch.int64))
        except Exception:
            raise error from None


def output_shape(module: nn.Module, in_shape: Shape) -> Shape:
    """Return the shape that the module gives for a sample of `in_shape`; both without the batch axis."""
    return tuple(first_output(module, in_shape).shape[1:])


def build_chain(
    makers: Iterable[Callable[..., Any]], in_shape: Shape
) -> tuple[list[nn.Module], Shape]:
    """Build blocks one after another, each for the shape that the one before it gives.

    Returns the blocks and the shape that the last one gives. Raises BuildError that counts the blocks from 1:
    "block 4 (conv2d) expects (C, H, W), gets (128,)".
    """
    modules: list[nn.Module] = []
    output, shape = None, tuple(in_shape)
    for number, maker in enumerate(makers, 1):
        name = maker_name(maker)
        where = f"block {number} ({name})"
        try:
            module = maker(shape)
        except (BuildError, SettingError) as error:
            raise error.with_text(after(where, name, error)) from error
        try:
            output = first_output(module, shape) if output is None else dry_run(module, output)
        except BuildError as error:
            raise BuildError(after(where, name, error)) from error
        except Exception as error:
            if user_place(error) is None:
                raise BuildError(f"{where} cannot take {shape}: {first_line(error)}") from error
            situation = f"while running it on an input of shape {shape}"
            raise BuildError(f"{where}: {describe(error)}, {situation}") from error
        shape = tuple(output.shape[1:])
        modules.append(module)
    return modules, shape


def maker_name(maker: Callable[..., Any]) -> str:
    if isinstance(maker, Maker):
        return maker.entry.name
    return getattr(maker, "__name__", type(maker).__name__)


def after(where: str, name: str, error: Exception) -> str:
    """Return the error's text led by its place, without saying the part's name twice."""
    text = str(error)
    if isinstance(error, NoTensorError):
        return f"{where} {text}"
    rest = text.removeprefix(f"{name} ")
    return f"{where}: {text}" if rest == text else f"{where} {rest}"


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
