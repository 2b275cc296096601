"""The result of a run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from framework.contracts.state import Stop
from framework.runs import checkpoint
from framework.system.files import read_rows

from .weights import chosen_checkpoint

if TYPE_CHECKING:
    pass


@dataclass
class Result:
    """What a run came to: its folder, final metrics, and why it ended early, if it did.

    Attributes:
        seconds: since the process began: start-up, training and test.
        steps: of the whole run, with those before it was resumed.
        fit_seconds, fit_steps: those of this process's training alone; `shares` are of this time.
        weights: by split, the weights that its metrics belong to, such as "best, step 900".
        advice: how the training could be faster, if there is a simple way.
        split: what `framework eval` can measure: test, val, or None.
    """

    folder: Path
    metrics: dict[str, float] = field(default_factory=dict)
    stopped: Stop | None = None
    signal: int | None = None
    seconds: float = 0.0
    steps: int = 0
    shares: dict[str, float] = field(default_factory=dict)
    fit_seconds: float = 0.0
    fit_steps: int = 0
    weights: dict[str, str] = field(default_factory=dict)
    advice: str | None = None
    split: str | None = "test"


def earlier_result(run: Path) -> Result:
    """Return what a run came to that is done already, as its folder keeps it."""
    values, steps = last_values(run)
    result = Result(run, values)
    last = max(steps.values(), default=0)
    result.steps = last
    chosen = chosen_checkpoint(run)
    if "val" in steps:
        result.weights["val"] = which_weights(steps["val"], last)
    if "test" in steps:
        result.weights["test"] = which_weights(last if chosen is None else chosen, last)
    return result


def which_weights(measured: int | Path, steps: int) -> str:
    """Return a label of the weights that were measured, such as "best, step 900".

    Args:
        measured: the checkpoint that was loaded, or the step after which they were in memory.
        steps: those of the whole run.
    """
    step, best = measured, False
    if isinstance(measured, Path):
        best = measured.name == "best"
        # Not by its name: in a copy without links, best is a folder.
        step = checkpoint.step_in(checkpoint.target_of(measured))
    if best:
        return f"best, step {step:,}"
    return f"last, step {step:,}" if step == steps else f"step {step:,}"


def last_values(run: Path) -> tuple[dict[str, float], dict[str, int]]:
    """Return the last value of everything in a run's metrics.jsonl, and by split their step."""
    values: dict[str, float] = {}
    steps: dict[str, int] = {}
    try:
        for row in read_rows(run, "metrics.jsonl"):
            step = row.get("step")
            if type(step) is not int:
                continue
            for key, value in row.items():
                split, slash, _ = key.partition("/")
                if slash and isinstance(value, int | float | None):
                    values[key] = float("nan") if value is None else value
                    steps[split] = step
    except FileNotFoundError:
        pass
    return values, steps
