"""Explain the speed of a run from its files: where the time went, and what to change."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from framework.errors import short
from framework.runs.run_files import RunFiles
from framework.runs.run_time import RunTime, read_time

WAITING_FOR_DATA = "waiting for data"  # the parts as the clock of a fit names them
COMMUNICATION = "communication and waiting"
NOTABLE_DATA = 0.1  # shares of the training that are worth advice
NOTABLE_VALIDATION = 0.15
NOTABLE_CHECKPOINTS = 0.05
NOTABLE_LOGGING = 0.05
NOTABLE_COMPILING = 0.2
NOTABLE_COMMUNICATION = 0.15
NOTABLE_START = 0.5  # share of the whole run
LEAST_SECONDS = 1.0  # of an activity; less is not worth advice
TINY_STEP = 0.005  # seconds; the operations of such a step take about as long as their launch


@dataclass
class Activity:
    """The time of one activity: seconds, and the share in the whole run."""

    name: str
    seconds: float
    share: float


@dataclass
class Speed:
    """Where the time of a run went.

    Attributes:
        time: as recorded; None if it is not.
        activities: the start, the activities of the training, and the test, longest first.
        of_a_step: the parts of a step, longest first, with trainer.profile.
        samples_per_second: the last logged speed of the training; None if there is none.
        slowest: the process that the others waited for most often; None with one process.
        advice: what to change.
        notes: what is not known.
    """

    time: RunTime | None = None
    activities: list[Activity] = field(default_factory=list)
    of_a_step: list[Activity] = field(default_factory=list)
    samples_per_second: float | None = None
    slowest: int | None = None
    advice: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields in plain values."""
        return {
            "seconds": None if self.time is None else self.time.total,
            "steps": None if self.time is None else self.time.steps,
            "sessions": None if self.time is None else self.time.sessions,
            "activities": [vars(each) for each in self.activities],
            "of_a_step": [vars(each) for each in self.of_a_step],
            "samples_per_second": self.samples_per_second,
            "slowest_process": self.slowest,
            "advice": self.advice,
            "notes": self.notes,
        }


def explain_speed(run: RunFiles) -> Speed:
    """Return where the time of a run went, and what to change."""
    speed = Speed(time=read_time(run.status))
    last = run.last("train/samples_per_second")
    if last is not None and math.isfinite(last.value):
        speed.samples_per_second = last.value
    processes = process_shares(run)
    if processes is not None:
        speed.slowest = processes.slowest
    time = speed.time
    if time is None:
        speed.notes.append("status.json does not record where the time went (version before 0.3)")
    elif not time.training:
        speed.notes.append("the training has not begun")
    else:
        parts = {"start (imports, data, model)": time.start, "steps": time.in_steps}
        parts |= time.parts | {"test": time.test}
        speed.activities = longest_first(parts, time.total)
        speed.of_a_step = longest_first(time.of_a_step, sum(time.of_a_step.values()))
        speed.advice = list(advice_for(run, time, processes))
        if run.state == "stale":
            speed.notes.append("the run was killed: the time since its last log is missing")
        if time.stacked > 1:
            speed.notes.append(f"the times are those of {time.stacked} trials, trained as one")
    speed.notes += run.problems
    return speed


def longest_first(seconds: dict[str, float], total: float) -> list[Activity]:
    """Return activities that took time, the longest first."""
    found = []
    for name, value in seconds.items():
        if value > 0:
            found.append(Activity(name, value, value / max(total, 1e-9)))
    return sorted(found, key=lambda activity: -activity.seconds)


@dataclass
class ProcessShares:
    """Of a run with several processes: mean shares of the time, and the slowest process."""

    communication: float
    waiting: float
    slowest: int
    slowest_share: float  # of the logs in which it was the slowest


def process_shares(run: RunFiles) -> ProcessShares | None:
    """Return the shares that the processes of a run have logged; None without them."""
    communication = []
    waiting = []
    slowest: dict[int, int] = {}
    for row in run.rows():
        values = [row.values.get(f"train/{name}") for name in ("communication", "waiting")]
        rank = row.values.get("train/slowest_process")
        if None in values or rank is None or not math.isfinite(rank):
            continue
        communication.append(values[0] or 0.0)
        waiting.append(values[1] or 0.0)
        slowest[int(rank)] = slowest.get(int(rank), 0) + 1
    if not slowest:
        return None
    rank = max(slowest, key=lambda each: slowest[each])
    share = slowest[rank] / len(communication)
    return ProcessShares(fmean(communication), fmean(waiting), rank, share)


def advice_for(run: RunFiles, time: RunTime, processes: ProcessShares | None) -> Iterator[str]:
    """Yield advice for the activities that took a notable share, the most useful first."""
    settings = run.settings

    def notable(part: str, least: float) -> float | None:
        seconds = time.parts.get(part, 0.0)
        share = seconds / max(time.training, 1e-9)
        return share if share >= least and seconds >= LEAST_SECONDS else None

    def setting(key: str) -> str:
        return f"{key}={short(settings.get(key), quote=False)}"

    share = notable(WAITING_FOR_DATA, NOTABLE_DATA)
    if share is not None:
        yield f"{share:.0%} of the training waits for data: {data_advice(settings, time.reading)}"
    share = notable("validation", NOTABLE_VALIDATION)
    if share is not None:
        yield (
            f"{share:.0%} of the training is validation: validate less often (now "
            f"{setting('trainer.validate_every')}) or in larger batches (now "
            f"{setting('loader.eval_batch_size')})"
        )
    share = notable("checkpoint", NOTABLE_CHECKPOINTS)
    if share is not None:
        text = f"save less often (now {setting('callbacks.checkpoint.every')})"
        if settings.get("callbacks.checkpoint.background") is False:
            text += ", or in the background (callbacks.checkpoint.background=true)"
        yield f"{share:.0%} of the training is saving checkpoints: {text}"
    share = notable("logging", NOTABLE_LOGGING)
    if share is not None:
        yield (
            f"{share:.0%} of the training is logging: log less often (now "
            f"{setting('trainer.log_every')})"
        )
    share = notable("compiling", NOTABLE_COMPILING)
    if share is not None:
        yield (
            f"{share:.0%} of the training is compiling ({setting('trainer.compile')}): that pays "
            "in longer runs only"
        )
    if processes is not None:
        yield from process_advice(processes)
    yield from step_advice(run, time)
    if time.start >= max(NOTABLE_START * time.total, LEAST_SECONDS):
        yield (
            f"{time.start / time.total:.0%} of the run is its start: several short runs are faster "
            "as one sweep (framework train -m), which starts once"
        )


def data_advice(settings: dict[str, Any], reading: str) -> str:
    """Return how to read data faster."""
    workers = settings.get("loader.workers")
    options = []
    if workers == 0:
        options.append("loader.workers=N reads ahead in N processes")
    elif isinstance(workers, int):
        options.append(f"more than loader.workers={workers}, if there are more cores")
    if settings.get("loader.read") != "memory" and not reading.startswith("in memory"):
        options.append("loader.read=memory reads each sample once (samples of one shape)")
    return "; ".join(options) or "the data set itself is slow"


def process_advice(processes: ProcessShares) -> Iterator[str]:
    """Yield advice for a run with several processes."""
    if processes.waiting >= NOTABLE_COMMUNICATION:
        yield (
            f"{processes.waiting:.0%} of the time of the processes is waiting for each other; rank "
            f"{processes.slowest} is the slowest in {processes.slowest_share:.0%} of the logs: "
            "give all processes equal cores or devices"
        )
    if processes.communication >= NOTABLE_COMMUNICATION:
        yield (
            f"{processes.communication:.0%} of the time of the processes is communication: fewer "
            "and larger steps need less of it (loader.batch_size, trainer.accumulate)"
        )


def step_advice(run: RunFiles, time: RunTime) -> Iterator[str]:
    """Yield advice for the steps themselves, if they take most of the time."""
    if not time.steps or time.in_steps < max(time.total / 2, LEAST_SECONDS):
        return
    settings = run.settings
    seconds = time.in_steps / time.steps / time.stacked
    options = []
    if settings.get("trainer.compile") == "off":
        options.append("trainer.compile=auto")
    if time.device == "cuda" and settings.get("trainer.cuda_graph") == "off":
        options.append("trainer.cuda_graph=auto")
    tried = ""
    if options:
        verb = "measures" if len(options) == 1 else "measure"
        tried = f"; {' and '.join(options)} {verb} whether that is faster"
    if seconds < TINY_STEP:
        yield (
            f"a step takes {seconds * 1e3:.2g} ms: of so short a step, much is the launch of its "
            f"operations; a larger loader.batch_size (now {settings.get('loader.batch_size')}) "
            f"needs fewer steps{tried}"
        )
    elif time.device == "cuda" and settings.get("trainer.precision") == "fp32":
        yield f"a step takes {seconds * 1e3:.3g} ms: trainer.precision=bf16 may be faster{tried}"
    elif tried:
        yield f"a step takes {seconds * 1e3:.3g} ms{tried}"
    if not time.of_a_step and settings.get("trainer.profile") is not True:
        yield "trainer.profile=true measures the parts of a step (forward, backward, optimizer)"
