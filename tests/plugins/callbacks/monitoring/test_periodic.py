"""The steps that callbacks with a cadence show: those that are due, and the end of the run.

All fits have 3 steps in an epoch, and a validation after each step.
"""

from collections import Counter
from signal import SIGTERM

import pytest
import torch
from torch import nn

import framework as fw
from framework.contracts.periodic_callback import PeriodicCallback
from framework_plugins.callbacks.monitoring.filters import filters_image
from framework_plugins.datasets.readers.tokenizers import Characters

FACTORS = torch.rand(12, 2, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(12) % 3
POINTS = fw.TensorSplit(FACTORS, CLASSES)
IMAGES = fw.TensorSplit(torch.rand(12, 1, 8, 8), CLASSES)
CROSS_ENTROPY = nn.CrossEntropyLoss()


class Shown(fw.Logger):
    """Stores (step, kind, tag) of each record that is no measurement of the trainer."""

    def __init__(self):
        self.records = []
        self.pictures = {}

    def scalars(self, values, *, step, epoch, wall_seconds):
        tags = [tag for tag in values if tag.startswith("val_per_class")]
        self.records += [(step, "scalar", tag) for tag in tags]

    def images(self, tag, images, step):
        self.records.append((step, "images", tag))
        self.pictures[tag, step] = images

    def text(self, tag, markdown, step=0):
        self.records.append((step, "text", tag))

    def histogram(self, tag, values, step):
        self.records.append((step, "histogram", tag))

    def embedding(self, tag, vectors, labels, step, images=None):
        self.records.append((step, "embedding", tag))

    @property
    def steps(self):
        return sorted({step for step, _, _ in self.records})


class EndAt(fw.Callback):
    """Ends the run in a validation."""

    changes_training = False

    def __init__(self, step, signal=None):
        self.step = step
        self.signal = signal

    def on_validation_end(self, trainer):
        if trainer.state.step == self.step:
            trainer.stop("end_at", "enough", self.signal)


def linear(inputs=2, outputs=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs))


def convolution():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3))


def attention():
    blocks = [
        fw.blocks.maker("patch_embedding", width=4, patch=4),
        fw.blocks.maker("transformer_encoder"),
    ]
    return fw.models.build("stack", (1, 8, 8), (3,), blocks=blocks)


def language_model():
    return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))


def windows():
    """Return twelve windows of a text."""
    tokenizer = Characters()
    text = 5 * "to be or not "
    tokenizer.fit(text)
    return fw.WindowSplit(torch.tensor(tokenizer.encode(text))[:53], 4, tokenizer=tokenizer)


def fits():
    """Return model, split and task of a fit with each callback."""
    points = (linear, POINTS, CROSS_ENTROPY)
    images = (lambda: linear(64), IMAGES, CROSS_ENTROPY)
    autoencoder = lambda: fw.models.build("autoencoder", (1, 8, 8), (1, 8, 8))  # noqa: E731
    sounds = fw.TensorSplit(torch.rand(12, 2, 6), CLASSES)
    regression = fw.TensorSplit(FACTORS, FACTORS.sum(1, keepdim=True))
    return {
        "attention": (attention, IMAGES, CROSS_ENTROPY),
        "augmented": images,
        "boundary": points,
        "confusion": points,
        "curves": points,
        "embeddings": points,
        "filters": (convolution, IMAGES, CROSS_ENTROPY),
        "histograms": points,
        "per_class": points,
        "pictures": (autoencoder, IMAGES, fw.tasks.build("reconstruction")),
        "predictions": (lambda: linear(2, 1), regression, nn.MSELoss()),
        "text_samples": (language_model, windows(), fw.tasks.build("language_modelling")),
        "spectrograms": (lambda: linear(12), sounds, CROSS_ENTROPY),
        "worst": points,
    }


NAMES = sorted(fits())
FIRST = {"boundary": [0], "filters": [0], "augmented": [1]}
"""The steps that a callback shows in addition."""


def expected_steps(name, due, last):
    steps = {*FIRST.get(name, []), *due, last}
    if name == "histograms":  # before the update of the first step, and of that after a due one
        steps = {1, last} | {step + 1 for step in due if step < last}
    return sorted(steps)


def run(name, every, *others, resume=None, **limits):
    """Fit with a callback, and return the logger, the model and the trainer."""
    make_model, split, task = fits()[name]
    torch.manual_seed(1)
    model = make_model()
    shown = Shown()
    callback = fw.callbacks.build(name, every=every)
    trainer = fw.Trainer(
        **(limits or {"max_epochs": 2}),
        callbacks=[callback, *others],
        loggers=[shown],
        validate_every="1step",
        device="cpu",
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer.fit(
        model, split, val=split, task=task, optimizer=optimizer, batch_size=4, resume=resume
    )
    return shown, model, trainer


def check_shown(shown, steps):
    assert shown.steps == steps
    assert set(Counter(shown.records).values()) == {1}, "each of them once"


def test_the_list_is_complete():
    periodic = set()
    for name in fw.callbacks.names():
        part = fw.callbacks.get(name).part
        if isinstance(part, type) and issubclass(part, PeriodicCallback):
            periodic.add(name)
    assert periodic == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_last_step_is_shown_once(name):
    for every, due in {"4steps": [4], "3steps": [3, 6], "1epoch": [3, 6]}.items():
        shown, _, _ = run(name, every)
        check_shown(shown, expected_steps(name, due, last=6))
    shown, _, _ = run(name, "4steps", max_steps=5)
    check_shown(shown, expected_steps(name, [4], last=5))


@pytest.mark.parametrize("name", NAMES)
def test_the_last_step_of_a_run_that_a_callback_ends_is_shown_once(name):
    for end in (3, 5):
        shown, _, _ = run(name, "3steps", EndAt(end))
        check_shown(shown, expected_steps(name, [3], last=end))


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_a_signal_ends_shows_what_an_uninterrupted_one_shows(name):
    """The signal comes in a step that is not due, in one that is due, and in the last one."""
    ends = [("4steps", 3), ("4steps", 4), ("3steps", 6)]
    if name != "augmented":  # no batch is left to show
        ends.append(("4steps", 6))
    for every, end in ends:
        whole, _, _ = run(name, every)
        first, _, trainer = run(name, every, EndAt(end, SIGTERM))
        assert trainer.state.interrupted
        second, _, _ = run(name, every, resume=trainer.state_dict())
        assert sorted(first.records + second.records) == sorted(whole.records), (every, end)


@pytest.mark.parametrize("order", [1, -1])
def test_the_end_of_the_run_shows_the_averaged_weights_that_the_model_keeps(order):
    """It does not depend on the order of the callbacks."""

    shown = Shown()
    callbacks = [fw.callbacks.build("filters", every="4steps"), fw.callbacks.build("ema")]
    trainer = fw.Trainer(max_epochs=2, callbacks=callbacks[::order], loggers=[shown], device="cpu")
    torch.manual_seed(1)
    model = convolution()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    trained = []

    class Keep(fw.Callback):
        def on_step_end(self, trainer):
            trained.append(filters_image(trainer.model[0].weight.detach()))

    trainer.callbacks.append(Keep())
    trainer.fit(model, IMAGES, task=CROSS_ENTROPY, optimizer=optimizer, batch_size=4)
    last = shown.pictures["filters", 6][0]
    assert torch.equal(last, filters_image(model[0].weight.detach()))
    assert not torch.equal(last, trained[-1])


def test_data_of_unknown_length_has_a_last_step_too():
    batches = [(FACTORS[row : row + 4], CLASSES[row : row + 4]) for row in (0, 4, 8)]

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from batches

    shown = Shown()
    callback = fw.callbacks.build("confusion", every="4steps")
    trainer = fw.Trainer(max_epochs=2, callbacks=[callback], loggers=[shown], device="cpu")
    model = linear()
    data = torch.utils.data.DataLoader(Stream(), batch_size=None)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer.fit(model, data, val=POINTS, task=CROSS_ENTROPY, optimizer=optimizer)
    assert trainer.state.total_steps == 0
    check_shown(shown, [6])


@pytest.mark.parametrize("name", ["linear_probe", "spectrograms", "text_samples"])
def test_data_that_a_callback_cannot_show_are_refused_before_training(name):
    steps = []

    class Count(fw.Callback):
        def on_step_start(self, trainer):
            steps.append(trainer.state.step)

    settings = {"layer": "0"} if name == "linear_probe" else {}
    callbacks = [fw.callbacks.build(name, **settings), Count()]
    trainer = fw.Trainer(max_epochs=1, callbacks=callbacks, device="cpu")
    model = linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    data = fw.TensorSplit(FACTORS, FACTORS.sum(1, keepdim=True))
    with pytest.raises(fw.SettingError, match=f"callbacks.{name}: expected"):
        trainer.fit(model, data, val=data, task=nn.MSELoss(), optimizer=optimizer)
    assert not steps
