"""Activation checkpointing: the same results with fewer bytes."""

import copy
from collections import OrderedDict
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import framework as fw
from framework import Callback, TensorSplit, Trainer
from framework.errors import SettingError
from framework.training.layer_table import saved_bytes

INPUTS = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
SPLIT = TensorSplit(INPUTS, (INPUTS.mean((1, 2, 3)) > 0).long())


class Noisy(nn.Module):
    """A block with dropout, and with an output that depends on a buffer that counts its calls."""

    def __init__(self, channels):
        super().__init__()
        convolution = nn.Conv2d(channels, channels, 3, padding=1)
        self.layers = nn.ModuleList([convolution, nn.Dropout(0.3), nn.GELU()])
        self.norm = nn.BatchNorm2d(channels)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.calls += 1
        for layer in self.layers:
            x = layer(x)
        return self.norm(x) * self.calls


def network():
    torch.manual_seed(2)
    parts = {
        "stem": nn.Conv2d(3, 4, 1),
        "blocks": nn.Sequential(Noisy(4), Noisy(4), Noisy(4)),
        "flat": nn.Flatten(),
        "head": nn.Linear(256, 2),
    }
    return nn.Sequential(OrderedDict(parts))


class Watch(Callback):
    """Records the bytes stored for the backward pass, and the model's state after each step."""

    changes_training = False

    def __init__(self):
        self.bytes = 0
        self.states = []

    def on_step_start(self, trainer):
        self.bytes = saved_bytes(trainer.model, SPLIT[:], trainer.task, 16)

    def on_step_end(self, trainer):
        self.states.append(copy.deepcopy(trainer.model.state_dict()))


def fit(*callbacks, **settings):
    model = network()
    watch = Watch()
    trainer = Trainer(max_epochs=2, callbacks=[*callbacks, watch], device="cpu", **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trainer.fit(
        model, SPLIT, task=nn.CrossEntropyLoss(), optimizer=optimizer, val=SPLIT, batch_size=4
    )
    return model, watch


def checkpointing(*patterns):
    return fw.callbacks.build("activation_checkpointing", patterns=list(patterns))


@pytest.mark.parametrize(
    "settings", [{}, {"accumulate": 2}, {"micro_batch": 2}, {"precision": "bf16"}], ids=str
)
def test_results_are_bitwise_the_same_with_fewer_bytes(settings):
    _, plain = fit(**settings)
    _, checkpointed = fit(checkpointing("blocks.*"), **settings)
    assert len(plain.states) == len(checkpointed.states) > 0
    for expected, state in zip(plain.states, checkpointed.states, strict=True):
        for name, tensor in expected.items():
            assert torch.equal(tensor, state[name]), name
    last = plain.states[-1]
    assert last["blocks.0.calls"] == last["blocks.0.norm.num_batches_tracked"] > 0
    assert checkpointed.bytes < plain.bytes / 2


def test_patterns_choose_the_blocks():
    _, plain = fit()
    _, one = fit(checkpointing("blocks.1"))
    _, two = fit(checkpointing("blocks.[01]"))
    assert plain.bytes > one.bytes > two.bytes
    assert plain.bytes - one.bytes == one.bytes - two.bytes, "each block saves the same"


def test_of_nested_blocks_the_outermost_is_checkpointed():
    _, outer = fit(checkpointing("blocks.1"))
    _, both = fit(checkpointing("blocks.1", "blocks.1.norm"))
    assert both.bytes == outer.bytes


class Fail(Callback):
    def on_step_end(self, trainer):
        raise ZeroDivisionError


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_restored_after_a_fit(fails):
    model = network()
    callbacks = [checkpointing("*"), Fail()] if fails else [checkpointing("*")]
    trainer = Trainer(max_steps=1, callbacks=callbacks, device="cpu")
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        trainer.fit(model, SPLIT, task=nn.CrossEntropyLoss(), optimizer=optimizer)
    assert not any("forward" in vars(module) for module in model.modules())
    fresh = saved_bytes(network(), SPLIT[:], trainer.task, 16)
    assert saved_bytes(model, SPLIT[:], trainer.task, 16) == fresh


@pytest.mark.parametrize(
    ("patterns", "settings", "problem"),
    [
        (["block.*"], {}, r"no module matches 'block\.\*'; .*blocks"),
        (["blocks.0.layers"], {}, "no module matches 'blocks.0.layers'"),  # a ModuleList
        ([], {}, r"patterns=\[\] has no effect"),
        (["blocks.*"], {"compile": "model"}, "requires compile=off, not model"),
    ],
)
def test_invalid_settings_are_errors(patterns, settings, problem):
    with pytest.raises(SettingError, match=problem):
        fit(checkpointing(*patterns), **settings)


def test_patterns_match_the_blocks_of_a_registered_model():
    batch = (torch.randn(4, 1, 16, 16), torch.zeros(4, dtype=torch.long))
    torch.manual_seed(0)
    model = fw.models.build("resnet", (1, 16, 16), (2,), depths=[2, 2], channels=[4, 8])
    measured = []

    class Bytes(Callback):
        def on_step_start(self, trainer):
            measured.append(saved_bytes(trainer.model, batch, trainer.task, 4))

    for callbacks in ([Bytes()], [checkpointing("blocks.*"), Bytes()]):
        trainer = Trainer(max_steps=1, callbacks=callbacks, device="cpu")
        optimizer = torch.optim.SGD(model.parameters())
        trainer.fit(model, TensorSplit(*batch), task=nn.CrossEntropyLoss(), optimizer=optimizer)
    plain, checkpointed = measured
    assert checkpointed < plain / 2


def test_a_forward_attribute_of_a_module_is_restored():
    model = network()
    block = model.blocks[0]
    calls = []

    def forward(inputs):
        calls.append(len(inputs))
        return Noisy.forward(block, inputs)

    block.forward = forward
    trainer = Trainer(max_steps=1, callbacks=[checkpointing("blocks.*")], device="cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer.fit(model, SPLIT, task=nn.CrossEntropyLoss(), optimizer=optimizer, batch_size=4)
    assert block.forward is forward
    assert calls == [4, 4], "forward and backward pass"
    assert "forward" not in vars(model.blocks[1])
