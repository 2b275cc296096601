"""Steps per second of hand-written loops, our Trainer and, in another environment, its peers."""

import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from benchmarks.contender import Job, training_loss
from benchmarks.rounds import Contender, Failed, Process, ratio, table
from benchmarks.workloads import WORKLOADS, read

OWN = {  # name: file, function
    "handwritten": ("loops", "handwritten"),
    "tight": ("loops", "tight"),
    "tight, compiled step": ("loops", "tight_compiled"),
    "ours": ("ours", "eager"),
    # with NaN check, gradient norms, JSON lines and status.json
    "ours, all defaults": ("ours", "as_by_default"),
    "ours, compile=step": ("ours", "compiled"),
    "ours, cuda_graph=on": ("ours", "graphed"),
    "ours, channels first": ("ours", "channels_first"),
}
API = {  # the rows of `scripts/bench api`
    "handwritten": ("loops", "handwritten"),
    "tight": ("loops", "tight"),
    "tight, compiled step": ("loops", "tight_compiled"),
    "ours, as on the command line": ("ours", "eager"),
    "ours, compile=step": ("ours", "compiled"),
    "ours, compile=auto": ("ours", "compile_auto"),
    "ours, DataLoader, AdamW()": ("ours", "dataloader_adamw"),
    "ours, in memory, AdamW()": ("ours", "in_memory_adamw"),
    "ours, in memory, AdamW(), fused=False": ("ours", "in_memory_adamw_not_fused"),
    "ours, in memory, adamw by name": ("ours", "in_memory_by_name"),
    "ours, DataLoader, channels_last=auto": ("ours", "dataloader_channels_last"),
    "ours, by name, channels_last=auto": ("ours", "by_name_channels_last"),
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
UNSUPPORTED = {("keras", "transformer")}  # keras takes no torch model
OF_IMAGES = (
    "ours, channels first",
    "ours, DataLoader, channels_last=auto",
    "ours, by name, channels_last=auto",
)
UNSUPPORTED |= {(row, name) for row in OF_IMAGES for name in WORKLOADS if name != "cnn"}
SECONDS_PER_CONTENDER = 40.0
LEAST_ROUNDS = 2
PROGRESS = 0.8  # of the median contender's fall of the loss; below it, the training differs


class Course(NamedTuple):
    """The results of a contender in the rounds of a workload and mode.

    Args:
        microseconds: A step's time in each round.
        cpu_microseconds: A step's time on the CPU in each round, of all threads together.
        failed: The error that ended the contender, if any.
    """

    microseconds: list[float]
    cpu_microseconds: list[float]
    steps: list[int]
    losses: list[float]
    failed: str = ""


Courses = dict[str, Course]


class BadPeers(Exception):
    """The option --peers does not name a virtual environment."""


class Plan(NamedTuple):
    """The options of a measurement.

    Args:
        seconds: Time limit for all contenders together; there are fewer rounds when it is over.
    """

    workloads: Sequence[str]
    modes: Sequence[str]
    rounds: int
    threads: int
    device: str
    seconds: float | None


def contenders(peers: Path | None, own: Mapping[str, tuple[str, str]] = OWN) -> list[Contender]:
    """Return our contenders and the peers that are installed in a virtual environment."""
    found = [
        Contender(name, sys.executable, f"benchmarks.{file}", function)
        for name, (file, function) in own.items()
    ]
    if peers is None:
        return found
    python = str(peers / "bin" / "python")
    program = (
        "from importlib.util import find_spec\n"
        f"print(*(name for name in {list(PEERS)!r} if find_spec(name)))"
    )
    try:
        done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BadPeers(
            f"--peers {peers}: expected a virtual environment, but {python} does not run: {error}"
        ) from None
    found += [
        Contender(name, python, f"benchmarks.{PEERS[name]}", name) for name in done.stdout.split()
    ]
    return found


def speed(plan: Plan, chosen: Sequence[Contender]) -> int:
    """Measure, and print a table for each workload.

    Returns:
        The exit status: 1 when a contender did not train.
    """
    processes = {
        contender.name: Process(contender, plan.threads, plan.device)
        for contender in chosen
        if plan.device != "cpu" or contender.function != "graphed"
    }
    pairs = list(product(plan.workloads, plan.modes))
    seconds = plan.seconds
    if seconds is None:
        seconds = SECONDS_PER_CONTENDER * len(chosen)
    deadline = time.monotonic() + seconds
    problems: list[str] = []
    courses: dict[str, Courses] = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            for number, (workload, mode) in enumerate(pairs):
                job, title = prepare(plan, workload, mode, Path(folder, f"{number}"))
                now = time.monotonic()
                until = now + max(0.0, deadline - now) / (len(pairs) - number)
                able = {
                    name: process
                    for name, process in processes.items()
                    if (name, workload) not in UNSUPPORTED
                }
                courses[mode] = compete(able, job, plan.rounds, until)
                found = find_problems(courses[mode], job)
                problems += [f"{workload}, {mode}: {problem}" for problem in found]
                if mode == plan.modes[-1]:
                    done = " and ".join(map(str, map(rounds_done, courses.values())))
                    print(f"\n{workload}: {title}, batch {job.batch_size}; rounds: {done}\n")
                    print(comparison(courses))
                    print("\nCPU time of all threads; other programs affect it less:\n")
                    by_cpu = {mode: on_cpu(by_name) for mode, by_name in courses.items()}
                    print(comparison(by_cpu, "CPU µs a step"), flush=True)
    finally:
        for process in processes.values():
            process.close()
    for problem in problems:
        print(f"bench: {problem}", file=sys.stderr, flush=True)
    return int(bool(problems))


def rounds_done(courses: Courses) -> int:
    return max(len(course.losses) for course in courses.values())


def prepare(plan: Plan, workload: str, mode: str, folder: Path) -> tuple[Job, str]:
    """Write the data of a workload to a file; return the job, and the name of the data."""
    splits, title = read(workload)
    folder.mkdir()
    data = folder / "data.pt"
    torch.save(splits, data)
    epochs = WORKLOADS[workload].epochs_per_round
    job = Job(
        workload,
        typical=mode == "typical",
        device=plan.device,
        folder=str(folder),
        data=str(data),
        warm_epochs=min(2, epochs),
        epochs_per_round=epochs,
    )
    return job, title


def compete(processes: dict[str, Process], job: Job, rounds: int, until: float) -> Courses:
    """Warm all contenders up at the same time, then run them in turns.

    The third and later rounds start only before `until`.
    """
    courses = {name: Course([], [], [], []) for name in processes}
    for name, process in processes.items():
        folder = Path(job.folder, name)
        folder.mkdir()
        process.send(job._replace(folder=str(folder))._asdict())
    running = {
        name: process
        for name, process in processes.items()
        if receive(courses, name, process) is not None
    }
    for number in range(rounds):
        if number >= LEAST_ROUNDS and time.monotonic() > until:
            break
        for name, process in list(running.items()):
            process.send("go")
            answer = receive(courses, name, process)
            if answer is None:
                del running[name]
                continue
            course = courses[name]
            steps = answer["steps"]
            course.steps.append(steps)
            course.microseconds.append(microseconds_of_step(answer["seconds"], steps))
            course.cpu_microseconds.append(microseconds_of_step(answer["cpu_seconds"], steps))
            course.losses.append(answer["loss"])
    for name, process in running.items():
        process.send("stop")
        receive(courses, name, process)
    return courses


def microseconds_of_step(seconds: float, steps: int) -> float:
    return seconds / steps * 1e6 if steps else math.inf


def receive(courses: Courses, name: str, process: Process) -> dict[str, Any] | None:
    """Return the answer; None after an error, which is recorded."""
    try:
        return process.receive()
    except Failed as error:
        courses[name] = courses[name]._replace(failed=str(error))
        return None


def find_problems(courses: Courses, job: Job) -> list[str]:
    """Return a message for each contender that failed or trained differently from the others."""
    workload = WORKLOADS[job.workload]
    wanted = job.epochs_per_round * math.ceil(workload.train / workload.batch_size)
    job = job._replace(device="cpu")
    before = training_loss(job.model(), job)
    problems = []
    trained: Courses = {}
    for name, course in courses.items():
        if course.failed:
            problems.append(f"{name} failed: {course.failed}")
        else:
            trained[name] = course
    for name, course in trained.items():
        if set(course.steps) != {wanted}:
            problems.append(f"{name} made {course.steps} steps in its rounds, not {wanted} in each")
        last = course.losses[-1]
        usual = median(other.losses[-1] for other in trained.values())
        if not before - last >= PROGRESS * (before - usual) > 0:
            problems.append(
                f"{name} changed the loss from {before:.3g} to {last:.3g}; median: {usual:.3g}"
            )
    return problems


def on_cpu(courses: Courses) -> Courses:
    """Return the courses with the time on the CPU in place of the elapsed time."""
    return {
        name: course._replace(microseconds=course.cpu_microseconds)
        for name, course in courses.items()
    }


def comparison(courses: dict[str, Courses], unit: str = "µs a step") -> str:
    """Return the table of a workload: times, and their ratios to the hand-written loops."""
    two_modes = len(courses) == 2
    header = ["contender"]
    for mode in courses:
        header += [f"{mode}, {unit}", "against handwritten", "against tight"]
    if two_modes:
        header.append("typical/bare")
    header.append("loss")
    rows = []
    for name in next(iter(courses.values())):
        runs = [by_name[name] for by_name in courses.values()]
        losses = [run.losses[-1] for run in runs if run.losses]
        if not losses:
            continue
        row = [name]
        for others, run in zip(courses.values(), runs, strict=True):
            row.append(f"{median(run.microseconds):,.0f}" if run.microseconds else "-")
            row.append(against(others, "handwritten", run.microseconds))
            row.append(against(others, "tight", run.microseconds))
        if two_modes:
            row.append(typical_against_bare(*runs))
        rows.append([*row, f"{losses[-1]:.2g}"])
    return "\n".join([table(header, rows), *fastest_peer(courses)])


def typical_against_bare(bare: Course, typical: Course) -> str:
    if not bare.microseconds or not typical.microseconds:
        return "-"
    return f"{median(typical.microseconds) / median(bare.microseconds):.2f}"


def against(courses: Courses, base: str, times: Sequence[float]) -> str:
    bases = courses[base].microseconds if base in courses else []
    return f"{ratio(bases, times):.2f}" if bases and len(bases) == len(times) else "-"


def fastest_peer(courses: dict[str, Courses]) -> list[str]:
    """Return a line for each mode that compares ours with the fastest peer, if there is one."""
    lines = []
    for mode, by_name in courses.items():
        peers = {
            name: median(course.microseconds)
            for name, course in by_name.items()
            if name in PEERS and course.microseconds
        }
        if not peers or "ours" not in by_name:
            continue
        best = min(peers, key=peers.__getitem__)
        times = against(by_name, best, by_name["ours"].microseconds)
        lines.append(f"{mode}: ours against {best}, the fastest peer: {times}")
    return ["", *lines] if lines else []
