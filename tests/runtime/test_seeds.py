"""Streams of random numbers: independent of each other, captured and restored."""

import random

import numpy
import pytest
import torch

from framework.runtime import seeds


def draws():
    return random.random(), numpy.random.rand(), numpy.random.randn(), torch.rand(2).tolist()


def test_a_stream_depends_on_its_name_only():
    names = [
        (0,),
        (1,),
        (0, "order"),
        (0, "order", 0),
        (0, "order", 1),
        (0, "sample", 1),
        (1, "order", 1),
    ]
    derived = [seeds.derive(*name) for name in names]
    assert len(set(derived)) == len(names)
    assert derived == [seeds.derive(*name) for name in names]
    assert all(0 <= seed < 2**63 for seed in derived)
    assert seeds.derive(0, "train") == 8791238859303715374, "a change would change all runs"
    first = torch.rand(3, generator=seeds.generator(1, "x"))
    assert torch.equal(torch.rand(3, generator=seeds.generator(1, "x")), first)


def test_each_epoch_has_another_permutation():
    first = seeds.order(0, 0, 1000)
    second = seeds.order(0, 1, 1000)
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(1000))
    assert not torch.equal(first, second)
    torch.rand(5)
    assert torch.equal(first, seeds.order(0, 0, 1000))
    distance = (first - second).abs().float().mean().item() / 1000
    assert distance == pytest.approx(1 / 3, abs=0.05), "the mean for independent permutations"


def test_all_global_generators_are_seeded_captured_and_restored():
    seeds.seed_everything(5)
    random.gauss(0, 1)  # the generator keeps the second number of a pair
    numpy.random.randn()
    state = seeds.capture()
    first = draws()
    seeds.restore(state)
    assert draws() == first
    seeds.seed_everything(5)
    again = draws()
    seeds.seed_everything(5)
    assert draws() == again != first


def test_undisturbed_restores_all_generators_after_an_error():
    state = seeds.capture()
    with pytest.raises(ZeroDivisionError), seeds.undisturbed():
        draws()
        raise ZeroDivisionError
    first = draws()
    seeds.restore(state)
    assert draws() == first


def test_a_captured_state_can_be_loaded_as_weights_only(tmp_path):
    torch.save(seeds.capture(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    first = draws()
    seeds.restore(state)
    assert draws() == first
