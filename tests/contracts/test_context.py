"""The Trainer has all members of the Context, through which callbacks use it."""

import inspect
import signal
from typing import get_type_hints

import pytest
import torch

from fits import At, fit
from framework import Callback, Context, Stop, Trainer

MEMBERS = [
    *get_type_hints(Context),
    *(name for name in vars(Context) if not name.startswith("_")),
]


@pytest.mark.parametrize("name", MEMBERS)
def test_the_trainer_has_each_member_of_the_context_at_each_event(name):
    missing = []

    class Reading(Callback):
        changes_training = False

    for event in ("fit_start", "step_start", "gradients", "log", "step_done", "fit_end"):

        def read(self, trainer, event=event):
            try:
                getattr(trainer, name)
            except AttributeError:
                missing.append(event)

        setattr(Reading, f"on_{event}", read)
    fit(callbacks=[Reading()])
    assert missing == []


def test_a_callback_annotated_with_the_trainer_still_gets_its_events():
    steps = []

    class Older(Callback):
        def on_step_end(self, trainer: Trainer) -> None:
            steps.append(trainer.state.step)

    fit(callbacks=[Older()], max_epochs=1)
    assert steps == [1, 2, 3, 4, 5]


def test_the_first_of_two_callbacks_that_stop_a_run_gives_the_reason():
    trainer = Trainer(max_epochs=1, device="cpu")
    trainer.stop("timer", "time is up")
    trainer.stop("early_stop", "no improvement")
    assert trainer.state.stop == Stop("timer", "time is up")


def test_a_signal_replaces_another_reason():
    trainer = Trainer(max_epochs=1, device="cpu")
    trainer.stop("timer", "time is up")
    trainer.stop("signal", "SIGTERM", signal.SIGTERM)
    assert trainer.state.stop.signal == signal.SIGTERM


def test_capture_returns_the_tensors_in_training_and_state_dict_copies():
    found = {}

    def capture(trainer):
        found["own"] = trainer.capture()["model"]
        found["copy"] = trainer.state_dict()["model"]
        found["before"] = {name: tensor.clone() for name, tensor in found["own"].items()}

    fit(callbacks=[At(1, capture)])
    for name, before in found["before"].items():
        assert torch.equal(found["copy"][name], before)
        assert not torch.equal(found["own"][name], before)


def test_every_event_of_a_callback_receives_the_context():
    events = [name for name in vars(Callback) if name.startswith("on_") and name not in WITHOUT]
    for name in events:
        annotation = inspect.signature(getattr(Callback, name)).parameters["trainer"].annotation
        assert annotation == "Context", name


WITHOUT = ("on_save", "on_rewind")  # called with states, when a checkpoint is written or read
