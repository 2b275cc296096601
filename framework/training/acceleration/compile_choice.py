"""compile=auto: train compiled and eager steps in turn at first, and continue with the faster kind.

Both kinds compute the same up to rounding. Which kind is faster is measured, so two runs may choose
differently; a checkpoint contains the choice.
"""

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor

from framework.contracts.task import Phase, Step
from framework.data.dataset import Batch
from framework.errors import FrameworkError
from framework.errors.terminal import print_note
from framework.runtime.torch_internals.compiler import CompilationError

StepKind = Literal["compiled", "eager"]
WARM_UP_PER_KIND = 4  # steps that compile and fill caches
TIMED_PER_KIND = 12  # steps


class CompileChoice:
    """Whether compile=auto runs compiled steps; a part of the state of a trainer.

    Attributes:
        kind: the faster kind; None before it is known.
    """

    def __init__(self) -> None:
        self.kind: StepKind | None = None

    def reset(self) -> None:
        """Forget the choice of an earlier fit."""
        self.kind = None

    def state_dict(self) -> dict[str, Any]:
        """Return the choice."""
        return {"kind": self.kind}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore a choice.

        Raises:
            ValueError: it is not a kind.
        """
        kind = saved.get("kind")
        if kind not in ("compiled", "eager", None):
            raise ValueError(f"compile: expected compiled or eager, got {kind!r}")
        self.kind = kind


class MeasuredStep:
    """Runs eager and compiled steps in turn, measures them, and continues with the faster kind.

    The time of a step is that from its start to the start of the next one, since the update is a
    part of a compiled step, but follows an eager one. The median ignores steps that compile,
    validate or save. Steps of several batches are eager.

    It is a `StepImplementation` (see `training/step.py`), as are the two steps.

    Args:
        eager: the eager step.
        compiled: the compiled step.
        choice: receives the faster kind; if it has one, nothing is measured.
        device: the device that the steps run on.
    """

    def __init__(
        self,
        eager: Callable[..., tuple[Step, bool]],
        compiled: Callable[..., tuple[Step, bool]],
        choice: CompileChoice,
        device: torch.device,
    ):
        self.eager = eager
        self.compiled = compiled
        self.choice = choice
        self.device = device
        self.seconds: dict[StepKind, list[float]] = {"compiled": [], "eager": []}
        self.running: StepKind | None = None  # the kind of the last step, if it is measured
        self.began = 0.0

    def __call__(
        self,
        batch: Batch,
        share: float | Tensor | None,
        phase: Phase | None = None,
    ) -> tuple[Step, bool]:
        """Run the step of the chosen kind, or one of each kind in turn."""
        if share is not None:
            self.running = None
            return self.eager(batch, share, phase)
        if self.choice.kind is None:
            self._measure()
        kind = self.choice.kind or self._next_kind()
        self.running = kind
        if kind == "eager":
            return self.eager(batch, share, phase)
        try:
            return self.compiled(batch, share, phase)
        except FrameworkError as error:
            if not isinstance(error.__cause__, CompilationError):
                raise
            self.choice.kind = "eager"
            print_note(f"compile=auto: eager steps, since torch cannot compile: {error.__cause__}")
            return self.eager(batch, share, phase)

    def _next_kind(self) -> StepKind:
        if len(self.seconds["compiled"]) > len(self.seconds["eager"]):
            return "eager"
        return "compiled"

    def _measure(self) -> None:
        """Add the time of the last step; choose once there are enough of them."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = perf_counter()
        if self.running is not None:
            self.seconds[self.running].append(now - self.began)
        self.began = now
        if min(map(len, self.seconds.values())) < WARM_UP_PER_KIND + TIMED_PER_KIND:
            return
        compiled = median(self.seconds["compiled"][WARM_UP_PER_KIND:])
        eager = median(self.seconds["eager"][WARM_UP_PER_KIND:])
        self.choice.kind = "compiled" if compiled < eager else "eager"
        print_note(
            f"compile=auto: a step takes {compiled * 1e3:.3g} ms compiled, {eager * 1e3:.3g} ms "
            f"eager: {self.choice.kind} from now on"
        )
