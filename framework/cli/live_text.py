"""The state of a run that is followed, as text."""

from collections.abc import Sequence

from framework.errors.terminal import title
from framework.runs.overview.live import LiveRun

MEASURES = (
    "train/samples_per_second",
    "train/seconds_per_epoch",
    "train/communication",
    "train/waiting",
    "train/slowest_process",
)
"""Metrics whose curves come last."""


def progress_text(run: LiveRun) -> str:
    """Return the steps, such as "1,234 of 16,000 (8%)"."""
    if not run.total_steps:
        return f"{run.step:,}"
    return f"{run.step:,} of {run.total_steps:,} ({run.step / run.total_steps:.0%})"


def speed_text(run: LiveRun) -> str:
    """Return the samples per second of a running run; "" if they are not known."""
    speed = run.samples_per_second
    return "" if speed is None else f"{speed:,.0f} samples/s"


def eta_text(run: LiveRun) -> str:
    """Return the remaining time of a running run; "" if it is not known."""
    seconds = run.eta_seconds
    return "" if seconds is None else f"ETA {clock(seconds)}"


def checkpoint_text(run: LiveRun) -> str:
    """Return the step and the age of the last checkpoint; "" without one."""
    if run.checkpoint is None:
        return ""
    step, age = run.checkpoint
    return f"step {step:,}, {age_text(age)} ago"


def age_text(seconds: float) -> str:
    """Return a time in its largest unit, such as "12 s" or "3 h"."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def clock(seconds: float) -> str:
    """Return a time as 1:02 or 1:00:02."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}"


def four_digits(value: float) -> str:
    """Return a number with four digits."""
    return f"{value:.4g}"


def last_text(run: LiveRun, metric: str) -> str:
    """Return a metric and its last value."""
    return f"{title(metric)} {four_digits(run.metrics.curves[metric].last.value)}"


def metrics_of(runs: Sequence[LiveRun]) -> list[str]:
    """Return the metrics of runs: losses, those of validation, others, measures of time."""
    found = dict.fromkeys(metric for run in runs for metric in run.metrics.curves)

    def rank(metric: str) -> tuple[bool, bool, bool]:
        split, _, name = metric.partition("/")
        return metric in MEASURES, name != "loss", split != "val"

    return sorted(found, key=rank)


def curves_of(run: LiveRun) -> list[str]:
    """Return the metrics of a run with values at several steps."""
    curves = run.metrics.curves
    return [metric for metric in metrics_of([run]) if len(curves[metric]) > 1]
