"""Steps per second: loops written by hand, our Trainer and, from an environment of their own, other frameworks."""

import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from benchmarks.contender import Job, training_loss
from benchmarks.rounds import Contender, Failed, Process, ratio, table
from benchmarks.workloads import WORKLOADS, read

OWN = {  # name: file, function
    "handwritten": ("loops", "handwritten"),
    "tight": ("loops", "tight"),
    "tight, compiled step": ("loops", "tight_compiled"),
    "ours": ("ours", "eager"),
    "ours, all defaults": (
        "ours",
        "as_by_default",
    ),  # looks for NaN, gradient norms, JSON lines, status.json
    "ours, compile=step": ("ours", "compiled"),
    "ours, cuda_graph=on": ("ours", "graphed"),
    "ours, channels first": ("ours", "channels_first"),
}
PEERS = {  # name and function: module
    "lightning": "peers",
    "accelerate": "peers",
    "transformers": "peers",
    "ignite": "peers",
    "skorch": "peers",
    "fastai": "peers",
    "poutyne": "peers",
    "keras": "keras_peer",
}
LACKING = {("keras", "transformer")}  # it takes no torch model
LACKING |= {("ours, channels first", name) for name in WORKLOADS if name != "cnn"}  # no images
SECONDS_EACH = 40.0  # for each contender, unless it is said how long all may take
LEAST_ROUNDS = 2
PROGRESS = (
    0.8  # of the fall of the loss that the median contender reaches; less is another training
)


class Course(NamedTuple):
    """What a contender did in the rounds of a workload and mode; with `failed`, why it did no more."""

    microseconds: list[float]  # a step, for each round
    steps: list[int]
    losses: list[float]
    failed: str = ""


Courses = dict[str, Course]


class BadPeers(Exception):
    """What was given as an environment with peers is none."""


class Plan(NamedTuple):
    """What is asked of the contenders."""

    workloads: Sequence[str]
    modes: Sequence[str]
    rounds: int
    threads: int
    device: str
    seconds: float | None  # for all together; with fewer left there are fewer rounds


def contenders(peers: Path | None) -> list[Contender]:
    """Return who can take part: all of ours, and what is installed beside the Python of a venv."""
    own = [
        Contender(name, sys.executable, f"benchmarks.{file}", function)
        for name, (file, function) in OWN.items()
    ]
    if peers is None:
        return own
    python = str(peers / "bin" / "python")
    ask = f"from importlib.util import find_spec; print(*(n for n in {list(PEERS)!r} if find_spec(n)))"
    try:
        asked = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BadPeers(
            f"--peers {peers}: {python} does not run ({error}); give a virtual environment"
        ) from None
    return [
        *own,
        *(
            Contender(name, python, f"benchmarks.{PEERS[name]}", name)
            for name in asked.stdout.split()
        ),
    ]


def speed(plan: Plan, chosen: Sequence[Contender]) -> int:
    """Measure, print a table for each workload, and return the exit status: 1 when a contender did not train."""
    present = [each for each in chosen if plan.device != "cpu" or each.function != "graphed"]
    processes = {each.name: Process(each, plan.threads, plan.device) for each in present}
    pairs = [(workload, mode) for workload in plan.workloads for mode in plan.modes]
    seconds = SECONDS_EACH * len(chosen) if plan.seconds is None else plan.seconds
    ends, problems, courses = time.monotonic() + seconds, [], {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            for number, (workload, mode) in enumerate(pairs):
                job, said = prepare(plan, workload, mode, Path(folder, f"{number}"))
                until = time.monotonic() + max(0.0, ends - time.monotonic()) / (len(pairs) - number)
                able = {
                    name: process
                    for name, process in processes.items()
                    if (name, workload) not in LACKING
                }
                courses[mode] = compete(able, job, plan.rounds, until)
                problems += [f"{workload}, {mode}: {each}" for each in unsound(courses[mode], job)]
                if mode == plan.modes[-1]:
                    done = " and ".join(
                        str(max(len(run.losses) for run in each.values()))
                        for each in courses.values()
                    )
                    print(
                        f"\n{workload}: {said}, batch {job.batch_size}; rounds: {done}\n",
                        flush=True,
                    )
                    print(compared(courses), flush=True)
    finally:
        for process in processes.values():
            process.close()
    for problem in problems:
        print(f"bench: {problem}", file=sys.stderr, flush=True)
    return int(bool(problems))


def prepare(plan: Plan, workload: str, mode: str, folder: Path) -> tuple[Job, str]:
    """Write the data of a workload for all contenders to read; return the job, and what the data is."""
    splits, said = read(workload)
    folder.mkdir()
    torch.save(splits, folder / "data.pt")
    epochs, data = WORKLOADS[workload].epochs_per_round, str(folder / "data.pt")
    return Job(
        workload, mode == "typical", plan.device, str(folder), data, min(2, epochs), epochs
    ), said


def compete(processes: dict[str, Process], job: Job, rounds: int, until: float) -> Courses:
    """Warm all up at once, then let them take turns; from the third on a round is begun only before `until`."""
    courses = {name: Course([], [], []) for name in processes}
    for name, process in processes.items():
        folder = Path(job.folder, name)
        folder.mkdir()
        process.tell(job._replace(folder=str(folder))._asdict())
    running = {
        name: process for name, process in processes.items() if heard(courses, name, process)
    }
    for number in range(rounds):
        if number >= LEAST_ROUNDS and time.monotonic() > until:
            break
        for name, process in list(running.items()):
            process.tell("go")
            if (said := heard(courses, name, process)) is None:
                del running[name]
                continue
            courses[name].microseconds.append(
                said["seconds"] / said["steps"] * 1e6 if said["steps"] else math.inf
            )
            courses[name].steps.append(said["steps"])
            courses[name].losses.append(said["loss"])
    for name, process in running.items():
        process.tell("stop")
        heard(courses, name, process)
    return courses


def heard(courses: Courses, name: str, process: Process) -> dict | None:
    """Return the answer; without one note why, and return None."""
    try:
        return process.hear()
    except Failed as error:
        courses[name] = courses[name]._replace(failed=str(error))
        return None


def unsound(courses: Courses, job: Job) -> list[str]:
    """Say who failed, who made other steps than asked for, and whose loss did not fall as that of the others."""
    workload = WORKLOADS[job.workload]
    wanted = job.epochs_per_round * math.ceil(workload.train / workload.batch_size)
    before = training_loss(job._replace(device="cpu").model(), job._replace(device="cpu"))
    done = {name: course for name, course in courses.items() if not course.failed}
    problems = [
        f"{name} failed: {course.failed}" for name, course in courses.items() if course.failed
    ]
    for name, course in done.items():
        if set(course.steps) != {wanted}:
            problems.append(f"{name} made {course.steps} steps in its rounds, not {wanted} in each")
        last, usual = course.losses[-1], median(other.losses[-1] for other in done.values())
        if not before - last >= PROGRESS * (before - usual) > 0:
            problems.append(
                f"{name} brought the loss from {before:.3g} to {last:.3g}; usual was {usual:.3g}"
            )
    return problems


def compared(courses: dict[str, Courses]) -> str:
    """Return the table of a workload: times, and how many times as fast as the loops written by hand."""
    header = ["contender"]
    for mode in courses:
        header += [f"{mode}, µs a step", "against handwritten", "against tight"]
    header += ["typical/bare"] * (len(courses) == 2) + ["loss"]
    rows, names = (
        [],
        [
            name
            for name in next(iter(courses.values()))
            if any(e[name].losses for e in courses.values())
        ],
    )
    for name in names:
        row, runs = [name], [each[name] for each in courses.values()]
        for others, run in zip(courses.values(), runs, strict=True):
            times = run.microseconds
            row += [f"{median(times):,.0f}" if times else "-"]
            row += [against(others, base, times) for base in ("handwritten", "tight")]
        if len(runs) == 2:
            whole = all(run.microseconds for run in runs)
            row.append(
                f"{median(runs[1].microseconds) / median(runs[0].microseconds):.2f}"
                if whole
                else "-"
            )
        rows.append([*row, f"{next(run.losses[-1] for run in reversed(runs) if run.losses):.2g}"])
    return "\n".join([table(header, rows), *fastest_peer(courses)])


def against(courses: Courses, base: str, times: Sequence[float]) -> str:
    bases = courses[base].microseconds if base in courses else []
    return f"{ratio(bases, times):.2f}" if bases and len(bases) == len(times) else "-"


def fastest_peer(courses: dict[str, Courses]) -> list[str]:
    """Say how ours compares with the fastest peer, if there is one."""
    lines = []
    for mode, each in courses.items():
        peers = {
            name: median(each[name].microseconds)
            for name in PEERS
            if name in each and each[name].microseconds
        }
        if not peers or "ours" not in each:
            continue
        best = min(peers, key=peers.__getitem__)
        lines.append(
            f"{mode}: ours against {best}, the fastest peer: {against(each, best, each['ours'].microseconds)}"
        )
    return ["", *lines] if lines else []
