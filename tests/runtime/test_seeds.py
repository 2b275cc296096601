"""One seed, many streams: none disturbs another, and each can be taken back."""

import random

import numpy
import pytest
import torch

from framework.runtime import seeds


def draws():
    return random.random(), numpy.random.rand(), numpy.random.randn(), torch.rand(2).tolist()


def test_streams_are_functions_of_their_names():
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
    assert (
        seeds.derive(0, "train") == 8791238859303715374
    )  # may never change: runs would no longer repeat
    assert torch.equal(
        torch.rand(3, generator=seeds.generator(1, "x")),
        torch.rand(3, generator=seeds.generator(1, "x")),
    )


def test_an_order_is_a_permutation_of_its_own():
    first, second = seeds.order(0, 0, 1000), seeds.order(0, 1, 1000)
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(1000))
    assert not torch.equal(first, second)
    torch.rand(5)
    assert torch.equal(first, seeds.order(0, 0, 1000))
    apart = (torch.stack([first, second]).diff().abs().float().mean() / 1000).item()
    assert apart == pytest.approx(1 / 3, abs=0.05)  # as far as places drawn at random


def test_all_global_generators_are_seeded_captured_and_restored():
    seeds.seed_everything(5)
    random.gauss(0, 1)  # half a pair is kept
    numpy.random.randn()
    state = seeds.capture()
    first = draws()
    seeds.restore(state)
    assert draws() == first
    seeds.seed_everything(5)
    again = draws()
    seeds.seed_everything(5)
    assert draws() == again != first


def test_what_looks_on_disturbs_no_generator():
    state = seeds.capture()
    with pytest.raises(ZeroDivisionError), seeds.undisturbed():
        draws()
        raise ZeroDivisionError
    first = draws()
    seeds.restore(state)
    assert draws() == first


def test_a_captured_state_is_of_plain_types(tmp_path):
    torch.save(seeds.capture(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    first = draws()
    seeds.restore(state)
    assert draws() == first
