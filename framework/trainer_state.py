"""All that a Trainer needs to go on from where it stands, in plain types and tensors."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from . import seeds
from .callback import keyed
from .data import Loader
from .optimizer import match_layout
from .scheduler import Schedule

if TYPE_CHECKING:
    from .trainer import Trainer


def capture(trainer: Trainer) -> dict[str, Any]:
    """Return the state of the model, and of everything that the next steps depend on."""
    return trainer.state.state_dict() | {
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "schedule": trainer.schedule.state_dict() if isinstance(trainer.schedule, Schedule) else {},
        "scaler": trainer.precision.state_dict(),
        "micro_batches": trainer.micro_batches.state_dict(),
        "callbacks": {key: callback.state_dict() for key, callback in keyed(trainer.callbacks).items()},
        "measures": trainer.measures.state_dict(),
        "validated": trainer._validated,
        "skipped": getattr(trainer.train_batches, "skipped", 0),
        "random": seeds.capture(),
    }


def restore(trainer: Trainer, saved: dict[str, Any]) -> None:
    """Take back what `capture` gave, into a trainer with the same parts."""
    trainer.model.load_state_dict(saved["model"])
    own = deepcopy(saved["optimizer"])  # or the optimizer would write into the tensors of `saved`
    trainer.optimizer.load_state_dict(own)
    match_layout(trainer.optimizer)
    if isinstance(trainer.schedule, Schedule):
        trainer.schedule.load_state_dict(saved["schedule"])
    trainer.precision.load_state_dict(saved["scaler"])
    trainer.micro_batches.load_state_dict(saved.get("micro_batches", {}))
    for key, callback in keyed(trainer.callbacks).items():
        callback.load_state_dict(saved["callbacks"].get(key, {}))
    trainer.measures.load_state_dict(saved["measures"])
    trainer.state.load_state_dict(saved)
    trainer._validated = saved["validated"]
    if isinstance(trainer.train_batches, Loader):
        trainer.train_batches.skipped = saved["skipped"]
    seeds.restore(saved["random"])
