"""Send signals to sweeps at random times, and compare their results with undisturbed sweeps."""

import contextlib
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import campaign_runs
import campaign_witness
from safetensors.torch import load_file

from framework.cli import main
from framework.tuning.sweep.folder import SweepFolder

WITNESS = Path(__file__).with_name("campaign_witness.py")
TIMEOUT = 120.0  # seconds until a process ends after a signal or completes its sweep
CHILD_TIMEOUT = 10.0  # seconds until its child processes end
NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, signal.SIGSTOP]
IMPORTS = 4.0  # seconds of the imports of a new program
ROUNDING = 1e-4
FRESH = 5  # one of FRESH processes is a new program with all its imports; the others are forked

COMMON = [
    "data=blobs",
    "model.width=8",
    "model.depth=1",
    "trainer.max_steps=90",
    "resume=auto",
    "trainer.max_epochs=null",
    "trainer.log_every=5steps",
    "trainer.validate_every=15steps",
    "callbacks=[witness,checkpoint]",
    "callbacks.checkpoint.every=5steps",
    "loggers=[json_lines]",
    "callbacks.checkpoint.background=false",
]
# no dropout for vectorized trials: a kill changes their groups, which share random numbers
DROPOUT = "model.dropout=0.3"
LAUNCHERS = {
    "basic": [DROPOUT, "optimizer.lr=1e-3,1e-2", "seed=0,1"],
    "vectorized": ["seed=range(6)", "hydra/launcher=vectorized", "hydra.launcher.processes=2"],
    "search": [
        DROPOUT,
        "optimizer.lr=tag(log, interval(1e-3, 1e-1))",
        "hydra/sweeper=optuna",
        "hydra.sweeper.trials=4",
    ],
    "joblib": [
        DROPOUT,
        "optimizer.lr=1e-3,1e-2",
        "seed=0,1",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
    ],
}


@dataclass
class Tally:
    """The results of the sweeps of one launcher."""

    launcher: str
    signals: Counter[str] = field(default_factory=Counter)
    moments: Counter[str] = field(default_factory=Counter)
    sweeps: int = 0
    equal: int = 0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        sent = " ".join(f"{name} {count}" for name, count in sorted(self.signals.items()))
        when = ", ".join(f"{count} {name}" for name, count in sorted(self.moments.items()))
        equal = f"{self.equal} of {self.sweeps} sweeps equal"
        verdict = "; ".join(dict.fromkeys(self.wrong)) or "equal"
        return f"{self.launcher:<11} {equal}  {sent}  ({when})  {verdict}"


def arguments(launcher: str, name: str) -> list[str]:
    plugin = ["--plugins", str(WITNESS)]
    return ["train", *plugin, *COMMON, "-m", *LAUNCHERS[launcher], f"sweep.name={name}"]


def start(arguments: list[str], log: Path, forked: bool) -> int:
    """Start a sweep in a new session; return its process id.

    Args:
        arguments: The command line.
        log: File for stdout and stderr.
        forked: Fork this process, to save the time of imports.
    """
    if not forked:
        with log.open("wb") as out:
            command = [sys.executable, "-m", "framework", *arguments]
            return subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True).pid
    child = os.fork()
    if child:
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(child, child)
        return child
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        with contextlib.suppress(PermissionError):
            os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        main.main(arguments)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    finally:
        sys.stdout.flush()
        os._exit(status)


def ended(pid: int, seconds: float) -> bool:
    """Return whether a process ends within `seconds`; it is not reaped."""
    until = time.monotonic() + seconds
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > until:
            return False
        time.sleep(0.002)
    return True


def started_by(pid: int, before: set[int]) -> set[int]:
    """Return the running child processes of a sweep, also those in `before` without a parent."""
    candidates = before | descendants(pid)
    candidates.discard(pid)
    return {child for child in candidates if state_of(child) not in ("Z", "")}


def descendants(pid: int) -> set[int]:
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            found |= {int(word)} | descendants(int(word))
    return found


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def moment() -> str:
    """Return the activity of the trials, as recorded by the witness."""
    states = set(Path(campaign_witness.STATES).read_bytes())
    if campaign_witness.SAVING in states:
        return "in saves"
    if campaign_witness.STEPS in states:
        return "in training"
    return "before the first step" if campaign_witness.BEGUN in states else "in start-up"


def send_signal(
    tally: Tally, arguments: list[str], chance: random.Random, number: Any, seconds: float
) -> int:
    """Start a sweep, send it a signal at a random time, and wait for its end.

    Args:
        tally: Counts of the launcher.
        arguments: The command line.
        chance: Source of random numbers.
        number: The signal.
        seconds: Duration of an undisturbed sweep.

    Returns:
        The exit status.
    """
    forked = chance.randrange(FRESH) > 0
    Path(campaign_witness.STATES).write_bytes(bytes(campaign_witness.SIZE))
    log = Path("log")
    pid = start(arguments, log, forked)
    if chance.random() < 0.5:
        over = ended(pid, chance.uniform(0, seconds if forked else seconds + IMPORTS))
    else:  # many processes must leave a checkpoint from which the next one resumes
        while not (over := ended(pid, 0.0)) and moment() not in ("in training", "in saves"):
            time.sleep(0.002)
        over = over or ended(pid, chance.uniform(0, seconds / 4))
    children = descendants(pid)
    name = signal.Signals(number).name
    if not over:
        tally.signals[name] += 1
        tally.moments[moment()] += 1
        to_group = number in (signal.SIGINT, signal.SIGHUP) and chance.random() < 0.5
        if to_group and os.getpgid(pid) == pid:
            os.killpg(pid, number)
        else:
            os.kill(pid, number)
        if number == signal.SIGSTOP:
            time.sleep(chance.uniform(0, 0.3))
            os.kill(pid, signal.SIGCONT)
    if not ended(pid, TIMEOUT):
        tally.wrong.append(f"did not end within {TIMEOUT:.0f} s after {name}")
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    until = time.monotonic() + CHILD_TIMEOUT
    while (left := started_by(pid, children)) and time.monotonic() < until:
        time.sleep(0.01)
    for child in left:
        tally.wrong.append(f"a process is left after {name}")
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    output = " ".join(log.read_text(errors="replace").split()) if log.exists() else ""
    expected = {0, -number, 128 + number} if number != signal.SIGSTOP else {0}
    if status not in expected:
        tally.wrong.append(f"ended with {status} after {name}: {output[-200:]}")
    crashed = "Traceback" in output or "terminate called" in output
    if crashed and number != signal.SIGKILL:
        tally.wrong.append(f"a traceback after {name}: {output[-300:]}")
    return status


def result(sweep: Path) -> Any:
    """Return the result of a sweep: its table, the best trial, the runs' metrics, weights, states.

    The states of vectorized trials are left out: a kill changes their groups, so that they are
    equal only up to rounding.
    """
    rounded = sweep.name.startswith("vectorized")
    rows = []
    for row in SweepFolder(sweep).trials():
        run = sweep / row.folder
        parts: list[Any] = [campaign_runs.metrics(run)]
        if rounded:
            weights = load_file(campaign_runs.last(run) / "model.safetensors")
            parts += [{name: tensor.flatten().tolist() for name, tensor in weights.items()}, None]
        else:
            parts += [campaign_runs.weights(run), campaign_runs.training(run)]
        metrics = campaign_runs.plain(row.metrics)
        rows.append([row.number, row.settings, row.folder, row.state, row.steps, metrics, *parts])
    return rounded, rows, (sweep / "best" / "config.yaml").resolve().parent.name


def alike(a: Any, b: Any, rounded: bool) -> bool:
    """Return whether two values are equal, if `rounded` up to rounding."""
    if not rounded:
        return bool(a == b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key], True) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(alike(*pair, True) for pair in zip(a, b, strict=True))
    if isinstance(a, float):
        return math.isclose(a, b, rel_tol=ROUNDING, abs_tol=ROUNDING)
    return bool(a == b)


def differences(expected: Any, disturbed: Any) -> Iterator[str]:
    names = [
        "numbers",
        "settings",
        "folders",
        "states",
        "steps",
        "metrics",
        "logs",
        "weights",
        "training states",
    ]
    rounded, expected_rows, expected_best = expected
    _, rows, best = disturbed
    if len(expected_rows) != len(rows):
        yield "another number of trials"
        return
    columns = zip(*rows, strict=True)
    expected_columns = zip(*expected_rows, strict=True)
    for name, column, expected_column in zip(names, columns, expected_columns, strict=True):
        if not alike(list(expected_column), list(column), rounded):
            yield f"other {name}"
    if expected_best != best:
        yield "another best trial"


def undisturbed(launcher: str) -> float:
    """Run a sweep; return its seconds."""
    began = time.monotonic()
    pid = start(arguments(launcher, f"{launcher}-whole"), Path("log"), True)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status != 0:
        raise RuntimeError(f"the undisturbed sweep failed: {Path('log').read_text()[-500:]}")
    return time.monotonic() - began


def disturb(launcher: str, signals: int, chance: random.Random, control: bool) -> Tally:
    """Send that number of signals to sweeps of a launcher."""
    tally = Tally(launcher)
    os.environ.pop(campaign_witness.FORGET, None)
    seconds = undisturbed(launcher)
    folder = Path("runs/default")
    expected = result(folder / f"{launcher}-whole")
    if control:
        os.environ[campaign_witness.FORGET] = "1"
    while tally.signals.total() < signals or tally.sweeps == 0:
        command = arguments(launcher, f"{launcher}-{tally.sweeps}")
        share = min(tally.signals.total() + 12, signals)  # at most 12 signals for one sweep
        while tally.signals.total() < share:
            number = NUMBERS[tally.signals.total() % len(NUMBERS)]
            if send_signal(tally, command, chance, number, seconds) == 0:
                break
        pid = start(command, Path("log"), True)
        if not ended(pid, TIMEOUT):
            tally.wrong.append("the last process hangs")
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status:
            wrong = [f"the last process ended with {status}"]
        else:
            wrong = list(differences(expected, result(folder / f"{launcher}-{tally.sweeps}")))
        tally.sweeps += 1
        tally.equal += not wrong
        tally.wrong += wrong
    return tally


def signalled(signals: int, seed: int, control: bool, launchers: list[str] | None = None) -> int:
    """Run the campaign and return its exit status.

    Args:
        signals: Number of signals.
        seed: Seed of the times of the signals.
        control: Resume without the random state and the optimizer's state.
        launchers: Names of the launchers; all by default.
    """
    root = Path(tempfile.mkdtemp(prefix="campaign-"))
    here = Path.cwd()
    began = time.monotonic()
    chosen = launchers or list(LAUNCHERS)
    tallies: list[Tally] = []
    os.chdir(root)
    try:
        for position, launcher in enumerate(chosen):
            share = signals * (position + 1) // len(chosen) - signals * position // len(chosen)
            tallies.append(disturb(launcher, share, random.Random(f"{seed} {launcher}"), control))
            print(tallies[-1], flush=True)
    finally:
        os.chdir(here)
        os.environ.pop(campaign_witness.FORGET, None)
    sent = sum(tally.signals.total() for tally in tallies)
    moments: Counter[str] = sum((tally.moments for tally in tallies), Counter())
    sweeps = sum(tally.sweeps for tally in tallies)
    equal = sum(tally.equal for tally in tallies)
    print(f"{equal} of {sweeps} sweeps equal after {sent} signals: {dict(sorted(moments.items()))}")
    wrong = any(tally.wrong for tally in tallies)
    keep = wrong and not control
    print(f"  {time.monotonic() - began:.0f} s" + (f"; the sweeps are in {root}" if keep else ""))
    if not keep:
        shutil.rmtree(root)
    if control and any(not tally.wrong for tally in tallies):
        print("the control did not fail for each launcher")
    return int(wrong)
