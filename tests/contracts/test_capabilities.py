"""Optional methods of tasks, losses, models and splits are found by protocols, not by classes."""

import pytest
import torch
from torch import nn

import framework as fw
from framework import Callback, Data, LabelledSplit, Task, TensorSplit
from framework.contracts.callback import changes_training
from framework.contracts.loss import DataDependentLoss
from framework.contracts.model import CachedDecoder, GenerativeModel
from framework.contracts.task import LossTask, PictureTask, TextTask


class Points(Data):
    def __init__(self):
        self.train = TensorSplit(torch.randn(6, 2), torch.tensor([0, 0, 0, 0, 1, 1]))
        self.in_shape = (2,)
        self.out_shape = (2,)


class Learning(nn.Module):
    def learn(self, data):
        self.samples = len(data.train)

    def forward(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets)


def test_a_loss_of_a_user_learns_from_the_data():
    loss = Learning()
    LossTask(loss).check(Points())
    assert loss.samples == 6


def test_a_balanced_loss_depends_on_the_data_and_a_plain_one_does_not():
    assert isinstance(fw.losses.build("cross_entropy", weight="balanced"), DataDependentLoss)
    assert not isinstance(nn.CrossEntropyLoss(), DataDependentLoss)


class Draws(Task):
    def pictures(self, model, inputs):
        return {"samples": inputs}


@pytest.mark.parametrize(
    ("task", "protocol", "able"),
    [
        (Draws(), PictureTask, True),
        (Draws(), TextTask, False),
        (fw.tasks.build("reconstruction"), PictureTask, True),
        (fw.tasks.build("language_modelling"), TextTask, True),
        (LossTask(nn.MSELoss()), PictureTask, False),
    ],
)
def test_a_task_with_a_method_fulfils_its_protocol(task, protocol, able):
    assert isinstance(task, protocol) is able


def test_a_model_with_a_method_fulfils_its_protocol():
    gan = fw.models.build("gan", in_shape=(4,), out_shape=(1,))
    decoder = fw.models.build("decoder", in_shape=(8,), out_shape=(16,))
    assert isinstance(gan, GenerativeModel)
    assert not isinstance(gan, CachedDecoder)
    assert isinstance(decoder, CachedDecoder)
    assert not isinstance(decoder, GenerativeModel)


class Files(torch.utils.data.Dataset):
    def __init__(self):
        self.labels = torch.tensor([0, 1, 1])

    def __len__(self):
        return 3

    def __getitem__(self, index):
        raise AssertionError("no sample is read for its class")


def test_classes_of_a_split_are_read_from_its_labels():
    class OfFiles(Points):
        def __init__(self):
            super().__init__()
            self.train = Files()

    assert isinstance(Files(), LabelledSplit)
    loss = fw.losses.build("cross_entropy", weight="balanced")
    loss.learn(OfFiles())
    assert loss.weight.tolist() == [1.5, 0.75]


class Watching(Callback):
    changes_training = False


@pytest.mark.parametrize(
    ("part", "expected"), [(Callback, True), (Watching, False), (lambda: Watching(), True)]
)
def test_a_callback_declares_that_it_does_not_change_training(part, expected):
    assert changes_training(part) is expected
