"""Try an experiment in seconds: build, train, validate, save, resume, and overfit one batch."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from framework.composition.spec import Spec
from framework.contracts.callback import Callback, changes_training
from framework.contracts.context import Context
from framework.data.dataset import Loader, TensorSplit
from framework.errors import RunError
from framework.runs import checkpoint
from framework.runtime.threads import intra_op_threads
from framework.training.trainer import Trainer

from .experiment import Experiment
from .log_start import first_batch

OVERFIT_STEPS = 100  # at most, of overfitting one batch
OVERFIT_SECONDS = 10.0  # at most, of overfitting one batch
LARGEST_SHARE = 0.9  # of its loss that may be left afterwards


class StopAfter(Callback):
    """Keeps the losses, and ends the run after some steps or seconds."""

    def __init__(self, steps: int, seconds: float = 1e9):
        self.steps = steps
        self.until = time.monotonic() + seconds
        self.losses: list[float] = []

    def on_step_end(self, trainer: Context) -> None:
        self.losses.append(float(trainer.loss))
        if trainer.state.step >= self.steps or time.monotonic() > self.until:
            trainer.stop("check", "tried")


def run_check(spec: Spec, say: Callable[[str], None]) -> None:
    """Train two steps with a validation, save and resume after the first, and overfit one batch.

    No files remain.

    Args:
        say: prints a line for each part that succeeds.

    Raises:
        RunError: a resumed run has other weights, or the loss of a single batch does not fall.
        FrameworkError: a part of the experiment fails.
    """
    built = timed(say, "build", lambda: Experiment(spec))
    data = built.data
    with (
        intra_op_threads(built.threads()),
        TemporaryDirectory(prefix="framework-check-") as name,
    ):
        folder = Path(name)

        def resumed() -> Trainer:
            return fit(Experiment(spec, data), folder, resume=state)

        def overfitted() -> Sequence[float]:
            return overfit_one_batch(Experiment(spec, data), folder)

        reference = timed(say, "2 steps and a validation", lambda: fit(built, folder))
        stopped = fit(Experiment(spec, data), folder, StopAfter(1))
        state = timed(say, "checkpoint after a step", lambda: save_and_load(stopped, folder))
        check_same_weights(reference.model, timed(say, "resume from it", resumed).model)
        say("the resumed run has the same weights, bit for bit")
        losses = timed(say, "overfit one batch", overfitted)
    first = losses[0]
    last = losses[-1]
    summary = f"loss of one batch: {first:.4g} at first, {last:.4g} after {len(losses)} steps"
    if not last < max(LARGEST_SHARE * first, first - abs(first) / 10):
        raise RunError(
            f"{summary}: the batch is not learned; check optimizer.lr, the loss and the targets"
        )
    say(summary)


def timed(say: Callable[[str], None], part: str, run: Callable[[], Any]) -> Any:
    """Run a part of the check and print its seconds."""
    began = time.perf_counter()
    result = run()
    say(f"{part:<26}{time.perf_counter() - began:8.1f} s")
    return result


def fit(
    built: Experiment,
    folder: Path,
    *callbacks: Callback,
    steps: int = 2,
    resume: Any = None,
    **arguments: Any,
) -> Trainer:
    """Take some steps with all callbacks that change the training; no files are written.

    Args:
        arguments: of `Trainer.fit`, instead of those of the experiment.
    """
    limits = {"max_epochs": None, "max_steps": steps, "profile": False}
    makers = [m for m in built.spec.parts["callback"] if changes_training(m.entry.part)]
    own = [maker() for maker in makers]
    trainer = Trainer(
        **(built.spec.sections["trainer"] | limits),
        seed=built.spec.seed,
        callbacks=[*built.transforms, *own, *callbacks],
        folder=folder,
    )
    defaults: dict[str, Any] = {
        "model": built.model,
        "data": built.train_batches,
        "val": None if built.data.val is None else built.batches("val"),
        "task": built.task,
        "optimizer": built.optimizer,
        "schedule": built.schedule,
        "metrics": built.metrics,
    }
    with trainer:
        trainer.fit(**(defaults | arguments), resume=resume)
    return trainer


def save_and_load(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Write the state of a trainer as a checkpoint, and return the state that is read."""
    state = trainer.state_dict()
    saved = checkpoint.save(folder / "checkpoints", state.pop("model"), state, trainer.state.step)
    model, training = checkpoint.load(saved)
    return training | {"model": model}


def check_same_weights(reference: nn.Module, resumed: nn.Module) -> None:
    """Raise RunError if a tensor of two models differs in a bit."""
    weights = resumed.state_dict()
    for name, tensor in reference.state_dict().items():
        if not torch.equal(tensor, weights[name]):
            raise RunError(
                f"after resuming, {name} differs from that of the uninterrupted run: "
                "a part may have random state that is not saved"
            )


def overfit_one_batch(built: Experiment, folder: Path) -> Sequence[float]:
    """Return the losses of training on the first batch only."""
    stop = StopAfter(OVERFIT_STEPS, OVERFIT_SECONDS)
    batch = first_batch(built.train_batches)
    batches = Loader(TensorSplit(*batch), batch_size=len(batch[0]))
    fit(built, folder, stop, steps=OVERFIT_STEPS, data=batches, val=None, schedule=None)
    return stop.losses
