"""The declarations of callbacks for trials that train as one stacked model."""

import pytest
import torch

import framework as fw
from framework import Callback, SavingCallback, Transform
from framework.contracts.callback_protocols import RowClippingCallback, StackableCallback
from framework.tuning.vectorized.callbacks import check_stackable, find_clip_rows, is_alone, prepare
from framework.tuning.vectorized.stacked_update import NotStackable


class Undeclared(Callback):
    """Has no declaration for stacked trials."""


class ReadsOnly(Callback):
    changes_training = False


class InPlace(Callback):
    alone = False


class DeclaredByInstance(Callback):
    changes_training = False

    def __init__(self):
        self.alone = True


class Flip(Transform):
    alone = False

    def __call__(self, batch):
        return batch


class WithContract(StackableCallback, Callback):
    alone = False


@pytest.mark.parametrize("supported", [ReadsOnly, InPlace, WithContract])
def test_a_callback_that_reads_only_or_declares_it_works_with_stacked_trials(supported):
    check_stackable([supported()])


@pytest.mark.parametrize("refused", [Undeclared, DeclaredByInstance, Flip])
def test_another_callback_is_refused_by_name(refused):
    with pytest.raises(NotStackable, match=refused.__name__):
        check_stackable([ReadsOnly(), refused()])


def test_a_callback_gets_the_number_of_trials():
    class Scaled(Callback):
        def among(self, trials):
            self.trials = trials

    callback = Scaled()
    prepare([Undeclared(), callback], 7)
    assert callback.trials == 7


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


def test_clip_rows_is_used_unless_a_subclass_overrides_on_gradients():
    gradients = torch.ones(2, 3)
    assert isinstance(Halves(), RowClippingCallback)
    find_clip_rows(Halves)([Halves(), Halves()], gradients)
    assert gradients.tolist() == [[0.5] * 3] * 2
    assert find_clip_rows(Doubles) is None
    assert find_clip_rows(ReadsOnly) is None


def test_the_declarations_of_built_in_callbacks():
    clip = fw.callbacks.build("clip_gradients")
    assert is_alone(clip) is False
    assert find_clip_rows(type(clip)) is not None
    assert is_alone(fw.callbacks.build("non_finite")) is False
    assert is_alone(fw.callbacks.build("non_finite", policy="skip")) is True
    checkpoint = fw.callbacks.build("checkpoint")
    assert isinstance(checkpoint, SavingCallback)
    checkpoint.among(3)
