"""The cost of callbacks that monitor a training: fits with and without them.

A process, whose stderr is a terminal, trains an experiment in turns without callbacks, with one of
them, and with all that are on by default. The time is that of the fit: without the start-up and the
test. Compare the CPU time on a machine that does other work too; the smallest one of all rounds is
the least disturbed. `python -m benchmarks.monitoring` is this process: it reads a list of overrides
as JSON from each line of stdin, and answers with the times of the fit.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from benchmarks.rounds import Contender, Process, ratio, table

DEFAULT = ("progress", "checkpoint", "non_finite", "gradient_norm", "health")
CLASSES = ("per_class", "confusion", "curves", "worst", "embeddings", "histograms")
NONE = "none"
AGAIN = "none again"
ALL = "the default set"
OBSERVING = ("progress", "gradient_norm", "health")  # of the default set; the others are for safety


class Workload(NamedTuple):
    """An experiment, and the callbacks to measure.

    Args:
        overrides: of the experiment.
        callbacks: that are not on by default.
        settings: of these callbacks.
        with_default: whether to measure those that are on by default too.
    """

    overrides: Sequence[str]
    callbacks: Sequence[str]
    settings: Mapping[str, Sequence[str]] = {}
    with_default: bool = True


WORKLOADS = {
    "mlp": Workload((), (*CLASSES, "speed")),
    "cnn": Workload(("experiment=digits_cnn",), (*CLASSES, "speed", "augmented", "filters")),
    "language_model": Workload(
        (
            "experiment=lm_char",
            "data.length=128",
            "data.characters=1000000",
            "data.measured=20000",
            "model.width=64",
            "model.depth=2",
            "model.buckets=4096",
            "trainer.max_steps=300",
            "trainer.validate_every=100steps",
        ),
        ("histograms", "attention", "text_samples", "speed"),
        dict.fromkeys(("histograms", "attention", "text_samples"), ("every=100steps",)),
    ),
    "spirals": Workload(("experiment=spirals",), ("boundary",), with_default=False),
    "sounds": Workload(
        (
            "data=tones",
            "model={name:sequence_cnn,channels:[32,48],front:[{name:log_mel,sample_rate:8000}]}",
            "trainer.max_epochs=5",
        ),
        ("sounds", "spectrograms"),
        with_default=False,
    ),
}


def measured(workload: Workload) -> list[str]:
    """Return the callbacks that are measured with a workload."""
    return [*(DEFAULT if workload.with_default else ()), *workload.callbacks]


def available(names: Sequence[str]) -> list[str]:
    """Return the callbacks that are measured with some of the workloads."""
    found: dict[str, None] = {}
    for name in names:
        found |= dict.fromkeys(measured(WORKLOADS[name]))
    return list(found)


def monitoring(names: Sequence[str], only: Sequence[str] | None, rounds: int, threads: int) -> int:
    """Print a table for each workload.

    Args:
        names: of the workloads.
        only: the callbacks to measure; None for all.
        rounds: fits with each set of callbacks.
        threads: of torch.
    """
    contender = Contender("framework", sys.executable, "", "")
    process = Process(contender, threads, "cpu", "benchmarks.monitoring")
    try:
        for name in names:
            print(costs(name, process, only, rounds), end="\n\n", flush=True)
    finally:
        process.close()
    return 0


def costs(name: str, process: Process, only: Sequence[str] | None, rounds: int) -> str:
    """Return the table of a workload."""
    workload = WORKLOADS[name]
    sets: dict[str, Sequence[str]] = {NONE: (), AGAIN: ()}
    if workload.with_default:
        sets[ALL] = DEFAULT
        sets[", ".join(OBSERVING)] = OBSERVING
    for callback in measured(workload):
        if only is None or callback in only:
            sets[callback] = [callback]
    cpu: dict[str, list[float]] = {label: [] for label in sets}
    wall: dict[str, list[float]] = {label: [] for label in sets}
    for number in range(rounds + 1):
        for label, callbacks in sets.items():
            process.send(overrides(workload, callbacks))
            answer = process.receive()
            if number > 0:  # the first one warms up
                cpu[label].append(answer["cpu_seconds"])
                wall[label].append(answer["seconds"])
    rows = []
    for label in sets:
        difference = median(
            with_it - without for with_it, without in zip(cpu[label], cpu[NONE], strict=True)
        )
        ratios = [
            ratio(cpu[label], cpu[NONE]),
            min(cpu[label]) / min(cpu[NONE]),
            ratio(wall[label], wall[NONE]),
        ]
        rows.append([label, *(f"{each:.3f}" for each in ratios), f"{1000 * difference:.0f}"])
    title = f"{name}: fit of {min(cpu[NONE]):.2f} s of the CPU"
    columns = ["CPU time, against none", "smallest CPU time", "time", "ms of the CPU"]
    return table([title, *columns], rows)


def overrides(workload: Workload, callbacks: Sequence[str]) -> list[str]:
    """Return the command line of a fit with some callbacks."""
    lines = [*workload.overrides, f"callbacks=[{','.join(callbacks)}]"]
    for callback in callbacks:
        settings = workload.settings.get(callback, ())
        lines.extend(f"callbacks.{callback}.{setting}" for setting in settings)
    return lines


def fit(command_line: Sequence[str]) -> dict[str, float]:
    """Train in a temporary folder; return the times of the fit in seconds."""
    import framework as fw
    from framework.composition.compose import CommandLine, Job, run_composed
    from framework.experiment.experiment import train

    times: dict[str, float] = {}
    original = fw.Trainer.fit

    def timed(*args: Any, **settings: Any) -> Any:
        cpu_began = time.process_time()  # of all threads
        began = time.perf_counter()
        result = original(*args, **settings)
        times["seconds"] = time.perf_counter() - began
        times["cpu_seconds"] = time.process_time() - cpu_began
        return result

    jobs: list[Job] = []
    with tempfile.TemporaryDirectory(prefix="monitoring-") as folder:
        run_composed(CommandLine([*command_line, f"run.root={folder}"], []), jobs.append)
        (job,) = jobs
        fw.Trainer.fit = timed  # type: ignore[method-assign]
        try:
            train(job.spec, job.experiment, job.overrides, say=lambda line: None)
        finally:
            fw.Trainer.fit = original  # type: ignore[method-assign]
    return times


def main() -> None:
    """Answer each line of stdin; other output goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in iter(sys.stdin.readline, ""):
        try:
            answer: dict[str, Any] = dict(fit(json.loads(line)))
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
