"""Blocks that are run again in the backward pass: the same numbers, fewer bytes."""

from collections import OrderedDict

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
    """Draws, counts its calls in a buffer, and depends on the count, as a spectral norm does on its vectors."""

    def __init__(self, channels):
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Conv2d(channels, channels, 3, padding=1), nn.Dropout(0.3), nn.GELU()]
        )
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
    blocks = nn.Sequential(*(Noisy(4) for _ in range(3)))
    parts = {
        "stem": nn.Conv2d(3, 4, 1),
        "blocks": blocks,
        "flat": nn.Flatten(),
        "head": nn.Linear(256, 2),
    }
    return nn.Sequential(OrderedDict(parts))


class Watch(Callback):
    """Measures what a step keeps for its backward pass, and the model as it is after each step."""

    changes_training = False

    def __init__(self):
        self.bytes, self.states = 0, []

    def on_step_start(self, trainer):
        self.bytes = saved_bytes(trainer.model, SPLIT[:], trainer.task, 16)

    def on_step_end(self, trainer):
        self.states.append(
            {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        )


def fit(*callbacks, **settings):
    model, watch = network(), Watch()
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
def test_the_numbers_are_bitwise_the_same_and_the_bytes_fewer(settings):
    _, plain = fit(**settings)
    _, less = fit(checkpointing("blocks.*"), **settings)
    assert len(plain.states) == len(less.states) > 0
    for one, other in zip(plain.states, less.states, strict=True):
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name]), name
    assert (
        plain.states[-1]["blocks.0.norm.num_batches_tracked"]
        == plain.states[-1]["blocks.0.calls"]
        > 0
    )
    assert less.bytes < plain.bytes / 2


def test_a_pattern_chooses_the_blocks():
    _, plain = fit()
    _, one = fit(checkpointing("blocks.1"))
    _, two = fit(checkpointing("blocks.[01]"))
    assert plain.bytes > one.bytes > two.bytes
    assert plain.bytes - one.bytes == one.bytes - two.bytes, "each block keeps as much"
    _, within = fit(checkpointing("blocks.1", "blocks.1.norm"))
    assert within.bytes == one.bytes, "of blocks in each other the outermost"


class Fail(Callback):
    def on_step_end(self, trainer):
        raise ZeroDivisionError


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_the_model_is_as_it_was(fails):
    part, model = checkpointing("*"), network()
    trainer = Trainer(max_steps=1, callbacks=[part, *[Fail()] * fails], device="cpu")
    optimizer = torch.optim.SGD(model.parameters())
    try:
        trainer.fit(model, SPLIT, task=nn.CrossEntropyLoss(), optimizer=optimizer)
    except ZeroDivisionError:
        assert fails
    assert not any("forward" in vars(module) for module in model.modules())
    fresh = saved_bytes(network(), SPLIT[:], trainer.task, 16)
    assert saved_bytes(model, SPLIT[:], trainer.task, 16) == fresh


@pytest.mark.parametrize(
    ("patterns", "settings", "said"),
    [
        (["block.*"], {}, r"no module matches 'block\.\*'; .*blocks"),
        (
            ["blocks.0.layers"],
            {},
            "no module matches 'blocks.0.layers'",
        ),  # a list of modules is never called itself
        ([], {}, r"patterns=\[\] has no effect"),
        (["blocks.*"], {"compile": "model"}, "requires compile=off, not model"),
    ],
)
def test_what_makes_no_sense_is_refused(patterns, settings, said):
    with pytest.raises(SettingError, match=said):
        fit(checkpointing(*patterns), **settings)


def test_blocks_of_a_registered_model_have_the_names_that_plan_shows():
    task, batch = (
        nn.CrossEntropyLoss(),
        (torch.randn(4, 1, 16, 16), torch.zeros(4, dtype=torch.long)),
    )
    torch.manual_seed(0)
    model = fw.models.build("resnet", (1, 16, 16), (2,), depths=[2, 2], channels=[4, 8])
    watch = []

    class Bytes(Callback):
        def on_step_start(self, trainer):
            watch.append(saved_bytes(trainer.model, batch, trainer.task, 4))

    for parts in ([], [checkpointing("blocks.*")]):
        trainer = Trainer(max_steps=1, callbacks=[*parts, Bytes()], device="cpu")
        trainer.fit(
            model, TensorSplit(*batch), task=task, optimizer=torch.optim.SGD(model.parameters())
        )
    assert watch[1] < watch[0] / 2


def test_a_forward_of_a_module_s_own_is_put_back():
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
    assert calls == [4, 4], "once more in the backward pass"
    assert "forward" not in vars(model.blocks[1])
