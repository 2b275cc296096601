"""Sums that add over batches: the loss and metrics do not depend on the size of the batches."""

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch.nn import functional as F

import framework as fw
from framework.contracts.metric import Measures

CPU = torch.device("cpu")
torch.manual_seed(11)
LOGITS = torch.randn(101, 4)
TARGETS = torch.randint(0, 4, (101,))


def measures():
    return Measures([fw.metrics.build("accuracy"), fw.metrics.build("f1")], CPU)


def add(measured, rows, count=None):
    loss = F.cross_entropy(LOGITS[rows], TARGETS[rows])
    measured.add(loss, LOGITS[rows], TARGETS[rows], len(LOGITS[rows]) if count is None else count)


@pytest.mark.parametrize("size", [1, 7, 50, 101])
def test_uneven_batches_add_up_to_the_values_of_all_samples(size):
    measured = measures()
    for start in range(0, 101, size):
        add(measured, slice(start, start + size))
    values = measured.read()
    assert values["loss"] == pytest.approx(F.cross_entropy(LOGITS, TARGETS).item(), rel=1e-6)
    assert values["accuracy"] == accuracy_score(TARGETS, LOGITS.argmax(1))
    assert values["f1"] == pytest.approx(
        f1_score(TARGETS, LOGITS.argmax(1), average="macro"), rel=1e-12
    )


@pytest.mark.parametrize("kind", [int, torch.tensor])
def test_the_loss_is_weighted_by_the_count_of_items(kind):
    measured = Measures([], CPU)
    outputs = torch.zeros(2, 1)
    measured.add(torch.tensor(1.0), outputs, outputs, kind(1))
    measured.add(torch.tensor(5.0), outputs, outputs, kind(3))
    assert measured.read() == {"loss": 4.0}


def test_reading_resets_the_sums():
    measured = measures()
    add(measured, slice(0, 50))
    measured.read()
    add(measured, slice(50, 60))
    only = measures()
    add(only, slice(50, 60))
    assert measured.read() == only.read()


def test_a_million_small_losses_lose_no_digits():
    measured = Measures([], CPU)
    loss = torch.tensor(0.1)
    outputs = torch.zeros(1, 1)
    measured.add(torch.tensor(1e7), outputs, outputs, 1)
    for _ in range(1000):
        measured.add(loss, outputs, outputs, 1)
    assert measured.read()["loss"] * 1001 == pytest.approx(
        1e7 + 1000 * loss.item(), rel=1e-14
    )  # in float32 it would be 1e7


def test_restored_sums_continue():
    whole = measures()
    part = measures()
    rest = measures()
    add(whole, slice(0, 60))
    add(part, slice(0, 60))
    saved = part.state_dict()
    add(part, slice(60, 80))  # it does not change the saved sums
    rest.load_state_dict(saved)
    add(whole, slice(60, 101))
    add(rest, slice(60, 101))
    assert whole.read() == rest.read()


def test_saved_sums_of_other_metrics_are_dropped():
    saved = measures()
    other = Measures([fw.metrics.build("accuracy")], CPU)
    add(saved, slice(0, 60))
    other.load_state_dict(saved.state_dict())
    add(other, slice(60, 80))
    assert other.read()["accuracy"] == accuracy_score(TARGETS[60:80], LOGITS[60:80].argmax(1))


def test_saved_sums_of_an_older_version_of_a_metric_are_dropped():
    saved = Measures([fw.metrics.build("r2")], CPU)
    other = Measures([fw.metrics.build("r2")], CPU)
    values = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    saved.add(torch.tensor(0.0), values, values, 50)
    state = saved.state_dict()
    state["sums"] = [torch.ones(4, 1)]
    state["held"] = {"losses": (), "counts": (), "sizes": ()}
    other.load_state_dict(state)
    other.add(torch.tensor(0.0), values, values, 50)
    with pytest.warns(UserWarning, match="r2: the checkpoint has sums of another version"):
        assert other.read()["r2"] == 1


def test_the_sums_have_no_autograd_graph():
    measured = Measures([], CPU)
    weight = torch.ones(1, requires_grad=True)
    measured.add((weight * 2).sum(), weight * 2, torch.zeros(1), 1)
    assert not measured.loss.requires_grad
