"""Peak memory of hand-written loops, our Trainer and its peers."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.contender import Job, peak_bytes
from benchmarks.rounds import Contender, Failed, Process, table
from benchmarks.speed import UNSUPPORTED, Plan, prepare

MB = 2**20
Peaks = dict[str, int]
"""Peak resident memory in bytes, by contender."""


def memory(plan: Plan, chosen: Sequence[Contender]) -> int:
    """Measure each contender in a process of its own, and print a table for each workload.

    Returns:
        The exit status: 1 when a contender failed.

    Raises:
        Failed: This system does not report the peak memory.
    """
    if peak_bytes() is None:
        raise Failed("--memory: this system has no /proc/self/status with the line VmHWM")
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for workload in plan.workloads:
            able = [
                contender for contender in chosen if (contender.name, workload) not in UNSUPPORTED
            ]
            by_mode: dict[str, Peaks] = {}
            for mode in plan.modes:
                job, title = prepare(plan, workload, mode, Path(folder, f"{workload}-{mode}"))
                job = job._replace(warm_epochs=plan.rounds * job.epochs_per_round)
                by_mode[mode] = {}
                for contender in able:
                    try:
                        by_mode[mode][contender.name] = peak_of(contender, plan, job)
                    except Failed as error:
                        problems.append(f"{workload}, {mode}: {contender.name} failed: {error}")
            size = checkpoint_bytes(job)
            print(
                f"\n{workload}: {title}; {job.warm_epochs} epochs; checkpoint: {size / MB:.1f} MB"
            )
            print(f"\n{comparison(by_mode, size)}", flush=True)
    for problem in problems:
        print(f"bench: {problem}", file=sys.stderr, flush=True)
    return int(bool(problems))


def peak_of(contender: Contender, plan: Plan, job: Job) -> int:
    """Return the peak memory of a new process that trains the epochs before the first round.

    Raises:
        Failed: The contender reports an error or has ended.
    """
    folder = Path(job.folder, contender.name)
    folder.mkdir()
    process = Process(contender, plan.threads, plan.device)
    try:
        process.send(job._replace(folder=str(folder))._asdict())
        peak: int = process.receive()["peak_bytes"]
        process.send("stop")
        process.receive()
        return peak
    finally:
        process.close()


def checkpoint_bytes(job: Job) -> int:
    """Return the bytes of the weights and of the two moments of Adam for each weight."""
    parameters = job._replace(device="cpu").model().parameters()
    return 3 * sum(parameter.nbytes for parameter in parameters)


def comparison(by_mode: dict[str, Peaks], checkpoint: int) -> str:
    """Return the table of a workload: peaks, and their difference to the handwritten loop's."""
    header = ["contender"]
    names: list[str] = []
    for mode, peaks in by_mode.items():
        header += [f"{mode}, peak MB", "against handwritten", "difference in checkpoints"]
        names += [name for name in peaks if name not in names]
    rows = []
    for name in names:
        row = [name]
        for peaks in by_mode.values():
            row += cells(peaks.get(name), peaks.get("handwritten"), checkpoint)
        rows.append(row)
    return table(header, rows)


def cells(peak: int | None, base: int | None, checkpoint: int) -> list[str]:
    if peak is None:
        return ["-", "-", "-"]
    if base is None:
        return [f"{peak / MB:,.0f}", "-", "-"]
    return [f"{peak / MB:,.0f}", f"{peak / base:.2f}", f"{(peak - base) / checkpoint:+.2f}"]
