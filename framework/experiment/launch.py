"""Start the processes of a run on this machine: `framework train trainer.devices=4`.

This process composes and checks the experiment. torch's elastic agent starts the processes, as
`torchrun --standalone` does; they read the experiment from a temporary folder, and write their
errors and the result into it, so that an error is printed once. On several machines, start
`torchrun ... -m framework train ...` on each of them instead.
"""

import json
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from framework.composition.sources import Sources
from framework.composition.spec import Spec, read_spec
from framework.contracts.state import Stop
from framework.errors import ConfigError, DiskFull, FrameworkError, SettingError
from framework.errors.terminal import printable_lines
from framework.registry.discovery import discover
from framework.runs.folder import dump
from framework.runtime.device import find_device
from framework.runtime.processes import RESUME_ADVICE, LostProcess, launched
from framework.system.files import open_file, read_json, read_yaml, write_file
from framework.system.signals import ENDING, TIME_LIMIT, ending_signals, handled, record_signal
from framework.training.process_times import ProcessTimes

from .distributed import check_processes
from .result import Result

COMMAND = "process"
"""The command of a process that `launch` starts. Its arguments: the folder, and this process."""
REQUEST = "request.yaml"
RESULT = "result.json"
OUTPUT = "output.txt"
MOST_PER_CORE = 4  # processes; more would only wait for each other


class ProcessFailed(FrameworkError):
    """A process of the run has failed: with an error of its own, or by a signal."""

    exit_status = 1


@dataclass
class Request:
    """What the processes of a run train.

    Attributes:
        spec: the checked experiment.
        experiment: its name.
        overrides: the command line, which is written into the folder of the run.
        started: the start of the command, in seconds of `time.monotonic`.
        inexact: allow settings that change the rest of a resumed run.
        traceback: print the traceback of an error.
        captured: the output of the processes goes to `sys.stdout` of this process, as in a sweep.
        check: take the step of `framework check` instead of training; its output is not shown.
    """

    spec: Spec
    experiment: str
    overrides: Sequence[str]
    started: float
    inexact: bool = False
    traceback: bool = False
    captured: bool = False
    check: bool = False


def is_launcher(spec: Spec) -> bool:
    """Return whether this process has to start those of the run."""
    devices = spec.sections["trainer"]["devices"]
    return devices is not None and devices > 1 and launched().world_size == 1


def launch(request: Request) -> Result | int:
    """Train in several processes.

    Returns:
        The result, or the exit status if a signal ended the run before its training.

    Raises:
        ProcessFailed: a process was killed.
        FrameworkError: the error of a process, with its text and exit status.
    """
    trainer = request.spec.sections["trainer"]
    devices = trainer["devices"]
    check_processes(request.spec, devices)
    check_cores(devices, find_device(trainer["device"]))
    with tempfile.TemporaryDirectory(prefix="framework-") as name:
        folder = Path(name)
        write_request(folder, request)
        status = run_request(folder, devices, request)
        if status:
            return status
        return read_result(folder)


def check_cores(devices: int, device: torch.device) -> None:
    """Raise SettingError for more processes than the cores of this machine can run."""
    cores = os.cpu_count() or 1
    if device.type == "cpu" and devices > MOST_PER_CORE * cores:
        raise SettingError(
            f"trainer.devices={devices}: expected at most {MOST_PER_CORE * cores} processes on the "
            f"{cores} cores of this machine"
        )


def run_request(folder: Path, devices: int, request: Request) -> int:
    """Run the processes; return an exit status if a signal ended them before there is a result.

    Raises:
        FrameworkError: as `launch`.
    """
    from framework.runtime.torch_internals.elastic import SignalException, run_processes

    received: list[int] = []

    def forward(number: int, frame: Any) -> None:
        if received and number == signal.SIGHUP:  # shell and system may both send it
            return
        received.append(number)
        sent = number if number in ENDING else signal.SIGTERM
        raise SignalException("a signal", signal.Signals(sent))  # the agent sends it on

    follower = Follower(folder, silent=request.check)
    words = ["-m", "framework", COMMAND, str(folder), str(os.getpid())]
    if request.traceback:
        words.append("--traceback")
    threads = max(1, (os.cpu_count() or 1) // devices)
    environment = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGQUIT",  # `forward` handles the others
    }
    time_limit = [number for number in TIME_LIMIT if callable(signal.getsignal(number))]
    failures: dict[int, int] = {}
    with variables(environment), handled((*ending_signals(), *time_limit), forward) as before:
        with suppress(SignalException):
            failures = run_processes(devices, words, str(folder), follower.read)
        follower.read()
    for number in received:
        if number in ENDING:
            record_signal(before.values(), number)
    status = 0
    if not (folder / RESULT).is_file() or failures:
        status = status_of_failure(folder, devices, failures, received)
    for late in time_limit:
        if late in received:
            before[late](late, None)
    return status


def status_of_failure(
    folder: Path, devices: int, failures: dict[int, int], received: Sequence[int]
) -> int:
    """Return the exit status of a run that a signal has ended before there is a result.

    Args:
        folder: of the errors of the processes.
        devices: the number of processes.
        failures: see `run_processes`.
        received: the signals of this process.

    Raises:
        FrameworkError: the error of the first process that has failed.
    """
    errors = read_errors(folder)
    for error in errors:
        if not error["lost"]:
            raise as_error(error)
    if received:
        return 128 + received[0]
    for rank, status in failures.items():
        if status < 0:
            raise process_killed(rank, devices, -status)
    for status in failures.values():
        if status - 128 in ENDING:
            return status
    for error in errors:
        raise as_error(error)
    for rank, status in failures.items():
        raise ProcessFailed(
            f"process {rank} of {devices} has ended with exit status {status} and without an error"
        )
    raise ProcessFailed("the processes of the run have ended without a result")


def process_killed(rank: int, devices: int, number: int) -> ProcessFailed:
    """Return the error of a process that a signal has killed."""
    name = signal.Signals(number).name
    cause = " (out of memory?)" if number == signal.SIGKILL else ""
    return ProcessFailed(
        f"process {rank} of {devices} was killed by {name}{cause}; {RESUME_ADVICE}"
    )


@contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables in a block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Follower:
    """Writes the output that the processes add to a file to `sys.stdout`, if the file exists."""

    def __init__(self, folder: Path, silent: bool = False):
        self.folder = folder
        self.silent = silent
        self.position = 0

    def read(self) -> None:
        if self.silent or not (self.folder / OUTPUT).is_file():
            return
        with open_file(self.folder, OUTPUT) as file:
            file.seek(self.position)
            content = file.read()
        if content:
            self.position += len(content)
            sys.stdout.write(printable_lines(content.decode("utf-8", errors="replace")))


# the files of the folder


def write_request(folder: Path, request: Request) -> None:
    """Write what the processes train."""
    spec = request.spec
    content = {
        "tree": spec.tree,
        "origins": spec.origins,
        "plugins": spec.plugins,
        "without": spec.without,
        "resume": spec.resume,
        "experiment": request.experiment,
        "overrides": list(request.overrides),
        "started": request.started,
        "inexact": request.inexact,
        "check": request.check,
    }
    write_file(folder, REQUEST, dump(REQUEST, content))
    if request.captured or request.check:
        write_file(folder, OUTPUT, "")


def read_request(folder: Path) -> Request:
    """Return what this process trains, after loading the plugins."""
    content = read_yaml(folder, REQUEST)
    with warnings.catch_warnings(action="ignore"):  # the launcher has printed them
        discover(content["plugins"], content["without"])
    spec = read_spec(content["tree"], Sources(fallback="the experiment of the launcher"))
    spec.origins = content["origins"]
    spec.plugins = content["plugins"]
    spec.without = content["without"]
    spec.resume = content["resume"]
    request = Request(
        spec, content["experiment"], content["overrides"], content["started"], content["inexact"]
    )
    request.check = content["check"]
    return request


def redirect_output(folder: Path) -> None:
    """Send the output of this process to the launcher, if it captures the output."""
    if not (folder / OUTPUT).is_file():
        return
    with open_file(folder, OUTPUT, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def write_result(folder: Path, result: Result) -> None:
    """Write the result of the run for the launcher."""
    content = asdict(result) | {"folder": str(result.folder)}
    if result.stopped is not None:
        content["stopped"] = [result.stopped.by, result.stopped.reason, result.stopped.signal]
    write_file(folder, RESULT, json.dumps(content))


def read_result(folder: Path) -> Result:
    """Return the result that the main process has written."""
    content = read_json(folder, RESULT)
    result = Result(**content)
    result.folder = Path(content["folder"])
    if content["processes"] is not None:
        result.processes = ProcessTimes(**content["processes"])
    if content["stopped"] is not None:
        by, reason, number = content["stopped"]
        result.stopped = Stop(by, reason, None if number is None else signal.Signals(number))
    return result


def write_error(folder: Path, error: Exception, lines: Sequence[str], status: int) -> None:
    """Write the error that ends this process for the launcher.

    Args:
        folder: of the launcher.
        error: the error.
        lines: its text.
        status: the exit status.
    """
    content = {
        "lines": list(lines),
        "status": status,
        "time": time.time(),
        "rank": launched().rank,
        "lost": isinstance(error, LostProcess),
        "disk_full": isinstance(error, DiskFull),
        "refused": isinstance(error, SettingError),
    }
    with suppress(OSError, FrameworkError):  # the launcher has ended
        write_file(folder, f"error-{launched().rank}.json", json.dumps(content))


def read_errors(folder: Path) -> list[dict[str, Any]]:
    """Return the errors of the processes, the first one first."""
    files = list(folder.glob("error-*.json"))
    errors = [read_json(folder, file.name) for file in files]
    return sorted(errors, key=lambda error: error["time"])


def as_error(written: Mapping[str, Any]) -> FrameworkError:
    """Return the error of a process as one of this process."""
    text = "\n".join(written["lines"])
    error: FrameworkError
    if written["disk_full"]:
        error = DiskFull(text)
    elif written["refused"]:
        error = SettingError(text)
    elif len(written["lines"]) > 1:
        error = ConfigError(written["lines"])
    else:
        error = ProcessFailed(text)
    error.exit_status = written["status"]
    return error
