"""Try an experiment in seconds: build, train, validate, save, resume, and overfit one batch.

Then a step on two processes, whose gradients must be those of one process.
"""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from safetensors.torch import load as load_tensors, save as tensors_as_bytes
from torch import Tensor, nn

from framework.composition.spec import Spec
from framework.contracts.callback import Callback, changes_training
from framework.contracts.context import Context
from framework.contracts.strategy import Strategy
from framework.data.dataset import Data, Loader, TensorSplit
from framework.errors import DataError, RunError, SettingError
from framework.experiment.distributed import check_processes, connected
from framework.experiment.experiment import Experiment
from framework.experiment.launch import RESULT, Request, run_request, write_request
from framework.experiment.log_start import first_batch
from framework.runs import checkpoint
from framework.runtime import seeds
from framework.runtime.batch import is_flat
from framework.runtime.threads import intra_op_threads
from framework.system.files import open_file, write_file
from framework.training.trainer import Trainer
from framework.training.validation import check_shared_batch

OVERFIT_STEPS = 100  # at most, of overfitting one batch
OVERFIT_SECONDS = 10.0  # at most, of overfitting one batch
LARGEST_SHARE = 0.9  # of its loss that may be left afterwards
PROCESSES = 2
GRADIENTS = "gradients.safetensors"
DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
MOST_DIFFERENCE = 1e-3  # of gradients on several processes, relative to their norm
MOST_DIFFERENCE_16_BITS = 0.1  # the same for bf16 and fp16


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


class Say(Protocol):
    """Prints a line of the check."""

    def __call__(self, text: str, seconds: float | None = None) -> None:
        """Print a line.

        Args:
            text: what was done.
            seconds: how long it took, where that is measured.
        """


def run_check(spec: Spec, say: Say) -> None:
    """Train two steps with a validation, save and resume after the first, and overfit one batch.

    Then take a step on two processes, unless the experiment does not support several. No files
    remain.

    Args:
        say: prints a line for each part that succeeds.

    Raises:
        RunError: a resumed run has other weights, the loss of a single batch does not fall, or the
            gradients on two processes are not those of one.
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

        def overfitted() -> dict[str, Sequence[float]]:
            return overfit_one_batch(lambda: Experiment(spec, data), folder)

        reference = timed(say, "2 steps and a validation", lambda: fit(built, folder))
        stopped = fit(Experiment(spec, data), folder, StopAfter(1))
        state = timed(say, "checkpoint after a step", lambda: save_and_load(stopped, folder))
        check_same_weights(reference.model, timed(say, "resume from it", resumed).model)
        say("the resumed run has the same weights, bit for bit")
        losses = timed(say, "overfit one batch", overfitted)
    for name, values in losses.items():
        say(check_learned(name, values))
    check_step_of_processes(spec, data, say)


def timed(say: Say, part: str, run: Callable[[], Any]) -> Any:
    """Run a part of the check and print its seconds."""
    began = time.perf_counter()
    result = run()
    say(part, time.perf_counter() - began)
    return result


def fit(
    built: Experiment,
    folder: Path,
    *callbacks: Callback,
    steps: int = 2,
    resume: Any = None,
    strategy: Strategy | None = None,
    with_callbacks: bool = True,
    **arguments: Any,
) -> Trainer:
    """Take some steps with all callbacks that change the training; no files are written.

    Args:
        with_callbacks: whether the callbacks of the experiment take part.
        strategy: the processes of the run; by default there is one.
        arguments: of `Trainer.fit`, instead of those of the experiment.
    """
    limits = {"max_epochs": None, "max_steps": steps, "profile": False, "devices": None}
    makers = [m for m in built.spec.parts["callback"] if changes_training(m.entry.part)]
    own = [maker() for maker in makers] if with_callbacks else []
    trainer = Trainer(
        **(built.spec.sections["trainer"] | limits),
        seed=built.spec.seed,
        strategy=strategy or Strategy(),
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


def overfit_one_batch(make: Callable[[], Experiment], folder: Path) -> dict[str, Sequence[float]]:
    """Return the losses of training on the first batch only, by name.

    Each phase of a task is trained alone, as the loss of one may rise when that of another falls:
    those of a GAN. Its own parameters minimize its loss, so that it has to fall.

    Args:
        make: builds the experiment, with new weights.
        folder: of the run.
    """
    built = make()
    phases = {phase.name: phase for phase in built.task.phases}
    if not phases:
        return {"loss": losses_of_one_batch(built, folder, OVERFIT_SECONDS)}
    losses: dict[str, Sequence[float]] = {}
    for name, phase in phases.items():
        built = make()
        built.task.phases = [phase]
        seconds = OVERFIT_SECONDS / len(phases)
        losses[f"loss of phase {name}"] = losses_of_one_batch(built, folder, seconds)
    return losses


def losses_of_one_batch(built: Experiment, folder: Path, seconds: float) -> Sequence[float]:
    """Return the losses of training on the first batch for some steps, at most for some seconds.

    The callbacks of the experiment do not take part: the steps before this test have called them,
    and one that prints would print a line for each step.
    """
    stop = StopAfter(OVERFIT_STEPS, seconds)
    batch = first_batch(built.train_batches)
    batches: Any = [batch]
    if is_flat(batch):
        batches = Loader(TensorSplit(*batch), batch_size=len(batch[0]))
    fit(
        built,
        folder,
        stop,
        steps=OVERFIT_STEPS,
        with_callbacks=False,
        data=batches,
        val=None,
        schedule=None,
    )
    return stop.losses


def check_learned(name: str, losses: Sequence[float]) -> str:
    """Return a line about the losses of one batch.

    Raises:
        RunError: they do not fall.
    """
    first = losses[0]
    last = losses[-1]
    summary = f"{name} of one batch: {first:.4g} at first, {last:.4g} after {len(losses)} steps"
    if not last < max(LARGEST_SHARE * first, first - abs(first) / 10):
        raise RunError(
            f"{summary}: the batch is not learned; check optimizer.lr, the loss and the targets"
        )
    return summary


# a step on several processes


class Gradients(Callback):
    """Keeps the gradients of the first step, which has no dropout.

    Args:
        other_random: draw other random numbers than those of the seed in the step.
    """

    def __init__(self, other_random: bool = False):
        self.other_random = other_random
        self.values: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Context) -> None:
        for module in trainer.model.modules():
            if isinstance(module, DROPOUTS):
                module.p = 0.0
            elif isinstance(module, nn.MultiheadAttention | nn.RNNBase):
                module.dropout = 0.0

    def on_step_start(self, trainer: Context) -> None:
        if self.other_random:
            seeds.seed_everything(seeds.derive(trainer.seed, "other"))

    def on_gradients(self, trainer: Context) -> None:
        gradients = {}
        for name, parameter in trainer.model.named_parameters():
            if parameter.grad is not None:
                gradients[name] = parameter.grad.detach()
        for name, gradient in trainer.strategy.full(gradients).items():
            if gradient is not None:  # None in processes other than the main one, if sharded
                self.values[name] = gradient.to("cpu", copy=True).contiguous()


def check_step_of_processes(spec: Spec, data: Data, say: Say) -> None:
    """Compare the gradients of a step on two processes with those of one.

    Args:
        spec: the checked experiment.
        data: of the spec.
        say: prints a line.

    Raises:
        RunError: they differ.
        FrameworkError: a process fails.
    """
    part = f"a step on {PROCESSES} processes"
    trainer = spec.tree["trainer"] | {"devices": None}
    shared = replace(spec, tree=spec.tree | {"trainer": trainer})
    shared.sections = spec.sections | {"trainer": spec.sections["trainer"] | {"devices": None}}
    try:
        check_processes(shared, PROCESSES)
        gradients = timed(say, part, lambda: gradients_of_processes(shared, data))
    except (DataError, SettingError) as error:
        say(f"{part:<26} skipped: {error}")
        return
    with TemporaryDirectory(prefix="framework-check-") as name:
        expected = gradients_of_step(Experiment(shared, data), Path(name))
        others = gradients_of_step(Experiment(shared, data), Path(name), other_random=True)
    if difference(expected, others) > 0:
        say(
            f"{PROCESSES} processes have equal weights; the gradients are not compared with those "
            "of one process, since they depend on random numbers"
        )
        return
    relative = difference(expected, gradients)
    summary = (
        f"the gradients on {PROCESSES} processes differ from those of one process by "
        f"{relative:.1g} of their norm"
    )
    if not relative <= most_difference(spec):
        raise RunError(f"{summary}: does the loss of a sample depend on other samples?")
    say(f"{summary}; the weights of the processes are equal")


def gradients_of_processes(spec: Spec, data: Data) -> dict[str, Tensor]:
    """Return the gradients of a step on several processes, which are started for it.

    Raises:
        SettingError: the experiment does not support several processes.
        FrameworkError: a process fails.
    """
    check_shared_batch(spec.sections["loader"]["batch_size"], PROCESSES)
    request = Request(spec, "check", [], time.monotonic(), check=True)
    with TemporaryDirectory(prefix="framework-check-") as name:
        folder = Path(name)
        write_request(folder, request)
        status = run_request(folder, PROCESSES, request)
        if status:
            sys.exit(status)
        with open_file(folder, GRADIENTS) as file:
            return load_tensors(file.read())


def step_of_process(spec: Spec, folder: Path) -> None:
    """Take a step in this one of several processes; the main one writes the gradients.

    Raises:
        RunError: the processes have different weights after the step.
    """
    with connected(spec) as strategy:
        gradients = Gradients()
        trainer = fit(
            Experiment(spec), folder, gradients, steps=1, strategy=strategy, val=None, schedule=None
        )
        weights = strategy.full(trainer.model.state_dict(), everywhere=True)
        for rank, other in enumerate(strategy.gather(weights)):
            for name, tensor in weights.items():
                if not torch.equal(tensor.cpu(), other[name]):
                    raise RunError(f"after a step, {name} of process {rank} has other values")
        if strategy.is_main:
            write_file(folder, GRADIENTS, tensors_as_bytes(gradients.values))
            write_file(folder, RESULT, "{}")


def gradients_of_step(
    built: Experiment, folder: Path, other_random: bool = False
) -> dict[str, Tensor]:
    """Return the gradients of a step in this process; the arguments are those of `Gradients`."""
    gradients = Gradients(other_random)
    with intra_op_threads(built.threads()):
        fit(built, folder, gradients, steps=1, val=None, schedule=None)
    return gradients.values


def difference(expected: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> float:
    """Return the norm of the difference of gradients, relative to the norm of the expected ones.

    A gradient that is missing in one of them counts as zeros.
    """
    squares = 0.0
    for name in {**expected, **values}:
        zero = torch.zeros((), dtype=torch.float64)
        change = values.get(name, zero).double() - expected.get(name, zero).double()
        squares += float(change.square().sum())
    total = sum(float(gradient.double().square().sum()) for gradient in expected.values())
    return math.sqrt(squares / max(total, 1e-30))


def most_difference(spec: Spec) -> float:
    """Return the largest difference of gradients that rounding explains."""
    maker = spec.parts["strategy"]
    formats = [spec.sections["trainer"]["precision"]]
    formats += [] if maker is None else list(maker.settings.values())
    if "bf16" in formats or "fp16" in formats:
        return MOST_DIFFERENCE_16_BITS
    return MOST_DIFFERENCE
