"""Functions with private names of torch give the same results through the public API."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

from framework.runtime.identity import ModelContents
from framework.runtime.torch_internals import foreach, module_contents, pytree
from framework.runtime.torch_internals.module_contents import (
    direct_buffers,
    direct_parameters,
    has_gradient_hooks,
    module_hooks,
)
from framework.runtime.torch_internals.non_finite import NonFiniteFlag
from framework.runtime.torch_internals.tensor_version import content_hash, version_of


class Outputs(NamedTuple):
    logits: torch.Tensor
    states: list


@pytest.fixture(params=["private", "fallback"])
def names(request, monkeypatch):
    """Run a test with the private names of this release of torch, and without them."""
    if request.param == "fallback":
        monkeypatch.setattr(pytree, "torch_pytree", None)
        monkeypatch.setattr(module_contents, "HAS_DICTIONARIES", False)
        for name in ("copy_", "add_", "sub", "mul", "lerp", "lerp_", "norm"):
            monkeypatch.delattr(torch, f"_foreach_{name}")
        monkeypatch.delattr(torch, "_amp_foreach_non_finite_check_and_unscale_")
    return request.param


def test_a_tree_keeps_its_structure(names):
    one = torch.ones(())
    tree = {"a": (one, [one + 1]), "b": Outputs(one + 2, [one + 3, None])}
    doubled = pytree.tree_map(lambda leaf: leaf if leaf is None else leaf * 2, tree)
    assert doubled == {"a": (2, [4]), "b": Outputs(6, [8, None])}
    assert type(doubled["b"]) is Outputs
    assert pytree.tree_leaves(tree) == [1, 2, 3, 4, None]
    assert pytree.tree_leaves(one) == [1]


def lists():
    generator = torch.Generator().manual_seed(1)
    shapes = ((3, 4), (5,), ())
    first = [torch.randn(shape, generator=generator) for shape in shapes]
    second = [torch.randn(shape, generator=generator) for shape in shapes]
    return first, second


OPERATIONS = {
    "copy_": (lambda a, b: foreach.copy_(a, b), lambda a, b: b),
    "add_": (lambda a, b: foreach.add_(a, b), lambda a, b: a + b),
    "lerp_": (lambda a, b: foreach.lerp_(a, b, 0.3), lambda a, b: torch.lerp(a, b, 0.3)),
    "sub": (lambda a, b: foreach.sub(a, b), lambda a, b: a - b),
    "mul": (lambda a, b: foreach.mul(a, torch.tensor(0.3)), lambda a, b: a * torch.tensor(0.3)),
    "lerp": (lambda a, b: foreach.lerp(a, b, 0.7), lambda a, b: torch.lerp(a, b, 0.7)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_on_lists_are_those_on_each_tensor_bit_for_bit(name, names):
    operation, of_one = OPERATIONS[name]
    tensors, others = lists()
    expected = [of_one(a, b) for a, b in zip(*lists(), strict=True)]
    result = operation(tensors, others)
    assert (result is None) == name.endswith("_")
    for found, wanted in zip(tensors if result is None else result, expected, strict=True):
        assert torch.equal(found, wanted)


def test_norms_are_those_of_each_tensor(names):
    tensors, _ = lists()
    for found, tensor in zip(foreach.norms(tensors), tensors, strict=True):
        torch.testing.assert_close(found, torch.linalg.vector_norm(tensor))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["dense", "complex", "sparse"])
def test_a_number_that_is_not_finite_is_found(value, kind, names):
    flag = NonFiniteFlag(torch.device("cpu"))
    tensor = torch.ones(4)
    if kind == "complex":
        tensor = torch.complex(tensor, tensor)
    if kind == "sparse":
        tensor = tensor.to_sparse()
    flag.check([torch.ones(3), tensor])
    assert flag.value == 0
    if kind == "sparse":
        tensor = tensor.coalesce()
        tensor.values()[2] = value
    else:
        tensor[2] = value
    flag.check([torch.ones(3), tensor])
    assert flag.value == 1
    flag.check([torch.ones(3)])
    assert flag.value == 1, "it stays 1"


def network():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.tied = model[0]
    return model


def test_changed_contents_of_a_model_are_found(names):
    model = network()
    contents = ModelContents(model)
    assert not contents.changed()
    assert contents.addresses()[0] == model[0].weight.data_ptr()
    model[1].running_mean.add_(1)
    assert not contents.changed(), "a new value is in the same tensor"
    model[1].running_mean = torch.zeros(2)
    assert contents.changed()
    contents.remember()
    model[0].weight = nn.Parameter(torch.zeros(2, 2))
    assert contents.changed()
    contents.remember()
    model.append(nn.Tanh())
    assert contents.changed()


def test_a_tensor_can_replace_a_parameter_or_buffer(names):
    model = network()
    for owned, name in (
        (direct_parameters(model[0]), "weight"),
        (direct_buffers(model[1]), "running_mean"),
    ):
        assert name in owned
        before = owned[name]
        other = torch.full_like(before, 3.0)
        owned[name] = other
        assert owned[name] is other
        owned[name] = before
        assert owned[name] is before
    assert model(torch.zeros(2, 2)).shape == (2, 2)


def test_hooks_are_listed():
    model = nn.Linear(2, 2)
    model.register_forward_hook(print)
    assert [hooks for hooks in module_hooks(model).values() if hooks] == [[print]]
    assert not has_gradient_hooks(model.weight)
    model.weight.register_hook(print)
    assert has_gradient_hooks(model.weight)
    model.bias.register_post_accumulate_grad_hook(print)
    assert has_gradient_hooks(model.bias)


@pytest.mark.parametrize("version", [version_of, content_hash])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
)
def test_an_in_place_change_gives_another_version(version, dtype):
    tensor = torch.zeros(3, 2, dtype=dtype).t()
    before = version(tensor)
    assert version(tensor) == before
    tensor[1, 0] = 1
    assert version(tensor) != before


def test_tensors_of_inference_mode_have_a_version():
    with torch.inference_mode():
        assert version_of(torch.zeros(2)) == 0
