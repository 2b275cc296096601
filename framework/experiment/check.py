"""A try of an experiment in seconds, before hours: does it build, train, validate, save, resume and learn at all?"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from framework.composition.spec import Spec
from framework.contracts.callback import Callback, changes_training
from framework.contracts.context import Context
from framework.data.dataset import Data, Loader, TensorSplit
from framework.errors import RunError
from framework.runs import checkpoint
from framework.runtime.threads import intra_op_threads
from framework.training.trainer import Trainer

from .experiment import Experiment
from .log_start import first_batch

STEPS, SECONDS = 100, 10.0  # most that one batch is learnt for
LEARNT = 0.9  # of its loss: what must be left at most


class StopAfter(Callback):
    """Ends the run after so many steps, or seconds."""

    def __init__(self, steps: int, seconds: float = 1e9):
        self.steps, self.until = steps, time.monotonic() + seconds
        self.losses: list[float] = []

    def on_step_end(self, trainer: Context) -> None:
        self.losses.append(float(trainer.loss))
        if trainer.state.step >= self.steps or time.monotonic() > self.until:
            trainer.stop("check", "tried")


def run_check(spec: Spec, say: Callable[[str], None]) -> None:
    """Build an experiment, take two steps with a validation, save after the first, resume, learn a batch by heart.

    Nothing of it is kept. Raises what goes wrong; RunError when a resumed run comes to other weights, and when the loss
    of a single batch does not fall. say: takes a line for each part that went well.
    """
    built = timed(say, "build", lambda: Experiment(spec))
    data, threads = built.data, built.threads()
    with intra_op_threads(threads), TemporaryDirectory(prefix="framework-check-") as folder:
        whole = timed(say, "2 steps and a validation", lambda: fit(built, Path(folder)))
        cut = fit(Experiment(spec, data), Path(folder), StopAfter(1))
        state = timed(say, "checkpoint after a step", lambda: through_disk(cut, Path(folder)))
        rest = timed(
            say, "resume from it", lambda: fit(Experiment(spec, data), Path(folder), resume=state)
        )
        after = rest.model.state_dict()
        other = next(
            (
                name
                for name, one in whole.model.state_dict().items()
                if not torch.equal(one, after[name])
            ),
            None,
        )
        if other is not None:
            raise RunError(
                f"a resumed run comes to other weights ({other}): is something random kept in a part?"
            )
        say("the resumed run comes to the same weights, bit for bit")
        losses = timed(
            say, "one batch by heart", lambda: by_heart(Experiment(spec, data), data, Path(folder))
        )
    told = f"loss of one batch: {losses[0]:.4g}, after {len(losses)} steps {losses[-1]:.4g}"
    if not losses[-1] < max(LEARNT * losses[0], losses[0] - abs(losses[0]) / 10):
        raise RunError(f"{told}: it does not learn; look at optimizer.lr, the loss and the targets")
    say(told)


def timed(say: Callable[[str], None], what: str, do: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    made = do()
    say(f"{what:<26}{time.perf_counter() - began:8.1f} s")
    return made


def fit(
    built: Experiment,
    folder: Path,
    *callbacks: Callback,
    steps: int = 2,
    resume: Any = None,
    **given: Any,
) -> Trainer:
    """Take some steps with all that has a say in the training; writes nothing of its own."""
    limits = {"max_epochs": None, "max_steps": steps, "profile": False}
    own = [maker() for maker in built.spec.parts["callback"] if changes_training(maker.entry.part)]
    settings = built.spec.sections["trainer"] | limits
    every = [*built.transforms, *own, *callbacks]
    trainer = Trainer(**settings, seed=built.spec.seed, callbacks=every, folder=folder)
    arguments: dict[str, Any] = {
        "data": built.train_batches,
        "val": None if built.data.val is None else built.batches("val"),
        "schedule": built.schedule,
    }
    arguments |= {
        "model": built.model,
        "task": built.task,
        "optimizer": built.optimizer,
        "metrics": built.metrics,
    }
    with trainer:
        trainer.fit(**arguments | given, resume=resume)
    return trainer


def through_disk(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Write a trainer's state as a checkpoint, and return what is read back."""
    state = trainer.state_dict()
    saved = checkpoint.save(folder / "checkpoints", state.pop("model"), state, trainer.state.step)
    model, training = checkpoint.load(saved)
    return training | {"model": model}


def by_heart(built: Experiment, data: Data, folder: Path) -> Sequence[float]:
    """Return the losses of training on the first batch alone, again and again."""
    losses = StopAfter(STEPS, SECONDS)
    batch = first_batch(built.train_batches)
    again = Loader(TensorSplit(*batch), batch_size=len(batch[0]))
    fit(built, folder, losses, steps=STEPS, data=again, val=None, schedule=None)
    return losses.losses
