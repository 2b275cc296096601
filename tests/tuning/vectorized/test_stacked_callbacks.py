"""What a callback says of trials that train as one."""

import pytest
import torch

import framework as fw
from framework import Callback, SavingCallback, Transform
from framework.tuning.vectorized.callbacks import check_stackable, clip_rows_of, is_alone, prepare
from framework.tuning.vectorized.stacked_update import NotStackable


class Silent(Callback):
    """Says nothing of trials that train as one."""


class Looks(Callback):
    changes_training = False


class InPlace(Callback):
    alone = False


class Own(Callback):
    changes_training = False

    def __init__(self):
        self.alone = True


class Flips(Transform):
    alone = False

    def __call__(self, batch):
        return batch


@pytest.mark.parametrize("able", [Looks, InPlace])
def test_a_callback_that_only_looks_or_says_so_serves_trials_that_train_as_one(able):
    check_stackable([able()])


@pytest.mark.parametrize("unable", [Silent, Own, Flips])
def test_another_callback_is_refused_by_name(unable):
    with pytest.raises(NotStackable, match=unable.__name__):
        check_stackable([Looks(), unable()])


def test_a_callback_is_told_how_many_trials_there_are():
    class Told(Callback):
        def among(self, trials):
            self.trials = trials

    told = Told()
    prepare([Silent(), told], 7)
    assert told.trials == 7


class Halves(Callback):
    alone = False

    def on_gradients(self, trainer):
        for parameter in trainer.model.parameters():
            parameter.grad.div_(2)

    @staticmethod
    def clip_rows(callbacks, gradients):
        gradients.div_(len(callbacks))


class Doubles(Halves):
    def on_gradients(self, trainer):
        for parameter in trainer.model.parameters():
            parameter.grad.mul_(2)


def test_clip_rows_counts_unless_a_subclass_changes_what_it_stands_for():
    gradients = torch.ones(2, 3)
    clip_rows_of(Halves)([Halves(), Halves()], gradients)
    assert gradients.tolist() == [[0.5] * 3] * 2
    assert clip_rows_of(Doubles) is None
    assert clip_rows_of(Looks) is None


def test_what_the_built_in_callbacks_say():
    clip = fw.callbacks.build("clip_gradients")
    assert is_alone(clip) is False
    assert clip_rows_of(type(clip)) is not None
    assert is_alone(fw.callbacks.build("non_finite")) is False
    assert is_alone(fw.callbacks.build("non_finite", policy="skip")) is True
    checkpoint = fw.callbacks.build("checkpoint")
    assert isinstance(checkpoint, SavingCallback)
    checkpoint.among(3)
