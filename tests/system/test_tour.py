"""The lessons of `framework tour`: their text, their commands, and what they claim."""

import json
import shlex

import pytest
import torch

from framework.cli import tour
from framework.cli.main import COMMANDS

LESSONS = {lesson.number: lesson for lesson in tour.read_lessons()}
QUIET = "callbacks=[] loggers=[]"


def test_there_are_ten_lessons_with_a_question():
    assert list(LESSONS) == list(range(1, 11))
    for lesson in LESSONS.values():
        assert lesson.text.endswith(".")
        assert "**Look at**" in lesson.notes
        assert "**Question.**" in lesson.notes
        assert lesson.answer
        for command in lesson.commands:
            program, name, *_ = shlex.split(command)
            assert program == "framework"
            assert name in COMMANDS


@pytest.fixture
def sweep(command, monkeypatch):
    """Return a function that trains five seeds of a sweep; the values of a metric by setting."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)

    def run(overrides, metric):
        status, out, err = command(f"train -m {overrides} 'seed=range(5)' {QUIET} --json")
        assert status in (None, 0), err
        found = {}
        for trial in json.loads(out)["trials"]:
            settings = dict(trial["settings"])
            settings.pop("seed")
            key = next(iter(settings.values()), None)
            found.setdefault(key, []).append(trial["metrics"][metric])
        return found

    return run


def changed_in(number, position, *more):
    """Return the overrides of a command of a lesson, without `train` and `-m`."""
    words = shlex.split(LESSONS[number].commands[position])[2:]
    return shlex.join([word for word in [*words, *more] if word != "-m"])


def test_only_a_network_with_an_activation_separates_the_spirals(sweep):
    linear = sweep(changed_in(1, 0), "test/accuracy")[None]
    relu = sweep(changed_in(1, 1), "test/accuracy")[None]
    assert max(linear) < 0.6
    assert min(relu) > 0.95


def test_two_narrow_layers_are_better_than_one(sweep):
    found = sweep(changed_in(2, 0), "val/accuracy")
    assert max(found[1]) < 0.75
    assert min(found[2]) > max(found[1]) + 0.05


def test_a_deep_network_learns_with_relu_and_not_with_sigmoid(sweep):
    assert max(sweep(changed_in(3, 1), "test/accuracy")[None]) < 0.6
    assert min(sweep(changed_in(3, 2), "test/accuracy")[None]) > 0.85


def test_initialization_and_normalization_repair_a_deep_network(sweep):
    found = sweep(changed_in(4, 1), "test/accuracy")
    assert max(found["normal"]) < 0.65
    assert min(found["kaiming_normal"]) > 0.9
    with_norm = sweep(changed_in(4, 2), "test/accuracy")[None]
    assert min(with_norm) > 0.55
    repaired = sweep(changed_in(4, 1, "norm=batch", "initializer=normal"), "test/accuracy")
    assert min(repaired[None]) > 0.85


def test_the_squared_error_fits_wrong_targets(sweep):
    found = sweep(changed_in(5, 1), "test/mae")
    assert min(found["mse"]) > 2 * max(*found["l1"], *found["huber"])


def test_a_learning_rate_may_be_too_small_and_too_large(sweep):
    found = sweep(changed_in(6, 0), "test/accuracy")
    assert max(found[1e-4]) < 0.6
    assert min(found[0.3]) > 0.9
    assert max(found[30]) < 0.6


def test_a_far_too_large_rate_ends_with_an_error(command):
    status, _, err = command(f"train {changed_in(6, 2)} callbacks=[non_finite] loggers=[]")
    assert status == 3
    assert "A lower learning rate" in err


def test_the_optimizers_rank_as_the_lesson_says(sweep):
    sgd = sweep(changed_in(7, 1), "val/loss")
    adaptive = sweep(changed_in(7, 2), "val/loss")
    assert min(sgd[0]) > max(sgd[0.9])
    assert min(sgd[0.9]) > 2 * max(*adaptive["rmsprop"], *adaptive["adam"])


def test_regularization_lowers_the_loss_on_other_images(sweep):
    alone = sweep(changed_in(8, 0), "val/loss")[None]
    regularized = sweep(changed_in(8, 1), "val/loss")[None]
    assert min(alone) > max(regularized) + 0.1
    assert min(alone) > max(sweep(changed_in(8, 2), "val/loss")[None]) + 0.1
    assert max(sweep(changed_in(8, 0), "train/loss")[None]) < 1e-3
