"""The result of a run."""

from dataclasses import dataclass, field
from pathlib import Path

from framework.contracts.state import Stop
from framework.runs import checkpoint
from framework.system.files import read_rows
from framework.training.process_times import ProcessTimes

from .weights import find_checkpoint


@dataclass
class Result:
    """The result of a run.

    Attributes:
        folder: of the run.
        metrics: the final ones.
        stopped: why the run ended early, if it did.
        signal: the number of the signal that stopped it, if any.
        seconds: since the process began: start-up, training and test.
        steps: of the whole run, including those before it was resumed.
        shares: the fractions of `fit_seconds` by activity, such as waiting for data.
        fit_seconds: of the training in this process.
        fit_steps: of the training in this process.
        weights: by split, the weights with which its metrics were measured, such as
            "best, step 900".
        advice: how to train faster, if there is a simple way.
        split: that `framework eval` can measure: test, val, or None.
        is_main: whether this is the result of the main process of a run with several.
        step_kind: the kind of steps that `compile=auto` has kept, compiled or eager; else None.
        processes: the time of each process in the training; None with a single process.
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
    is_main: bool = True
    step_kind: str | None = None
    processes: ProcessTimes | None = None


def read_result(run: Path) -> Result:
    """Return the result of a finished run, from the files in its folder; missing ones are empty.

    `read_config` checks whether a folder is that of a run.
    """
    values, steps = last_values(run)
    last = max(steps.values(), default=0)
    result = Result(run, values, steps=last)
    if "val" in steps:
        result.weights["val"] = weights_label(steps["val"], last)
    found = find_checkpoint(run)
    if "test" in steps:
        result.weights["test"] = weights_label(found or last, last)
    return result


def weights_label(measured: int | Path, steps: int) -> str:
    """Return a label of the weights that were measured, such as "best, step 900".

    Args:
        measured: the checkpoint that was loaded, or the step after which they were in memory.
        steps: of the whole run.
    """
    if isinstance(measured, int):
        step = measured
    else:
        # Not by its name: in a copy without links, best is a folder.
        step = checkpoint.step_in(checkpoint.target_of(measured))
        if measured.name == "best":
            return f"best, step {step:,}"
    return f"last, step {step:,}" if step == steps else f"step {step:,}"


def last_values(run: Path) -> tuple[dict[str, float], dict[str, int]]:
    """Return the last value of each metric in metrics.jsonl, and the last step of each split."""
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
