"""Sends signals to sweeps at random moments, and compares what they come to with undisturbed ones."""

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
BOUND = 120.0  # seconds in which a process must end after a signal, or come to the end of its sweep
LEFT = 10.0  # seconds in which the processes that it started must end
NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, signal.SIGSTOP]
IMPORTS = 4.0  # seconds that those of a new program take
ROUNDING = 1e-4
FROM_SCRATCH = (
    5  # one of so many lives is a new program, which imports everything; the others are forked
)

COMMON = ["data=blobs", "model.width=8", "model.depth=1", "trainer.max_steps=90", "resume=auto"]
COMMON += ["trainer.max_epochs=null", "trainer.log_every=5steps", "trainer.validate_every=15steps"]
COMMON += [
    "callbacks=[witness,checkpoint]",
    "callbacks.checkpoint.every=5steps",
    "loggers=[json_lines]",
]
COMMON += ["callbacks.checkpoint.background=false"]
DROPOUT = "model.dropout=0.3"  # not of trials that train as one: a kill regroups them, and they share their draws
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
    """What became of the sweeps of one launcher."""

    launcher: str
    signals: Counter[str] = field(default_factory=Counter)
    moments: Counter[str] = field(default_factory=Counter)
    sweeps: int = 0
    equal: int = 0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        sent = " ".join(f"{name} {count}" for name, count in sorted(self.signals.items()))
        when = ", ".join(f"{count} {name}" for name, count in sorted(self.moments.items()))
        said = "; ".join(dict.fromkeys(self.wrong)) or "equal"
        return f"{self.launcher:<11} {self.equal} of {self.sweeps} sweeps equal  {sent}  ({when})  {said}"


def arguments(launcher: str, name: str) -> list[str]:
    return [
        "train",
        "--plugins",
        str(WITNESS),
        *COMMON,
        "-m",
        *LAUNCHERS[launcher],
        f"sweep.name={name}",
    ]


def start(words: list[str], log: Path, forked: bool) -> int:
    """Start a sweep in a session of its own; returns its process id. forked: from this process, without imports."""
    if not forked:
        with log.open("wb") as out:
            command = [sys.executable, "-m", "framework", *words]
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
        main.main(words)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    finally:
        sys.stdout.flush()
        os._exit(status)


def ended(pid: int, seconds: float) -> bool:
    """Return whether a process ends within some seconds; it stays a zombie."""
    until = time.monotonic() + seconds
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > until:
            return False
        time.sleep(0.002)
    return True


def started_by(pid: int, before: set[int]) -> set[int]:
    """Return the processes of a sweep that are left: those that were found when it was alive, and are still there."""
    return {
        each
        for each in before | descendants(pid)
        if each != pid and state_of(each) not in ("Z", "")
    }


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
    """Return what the trials are doing, as the witness has noted."""
    states = set(Path(campaign_witness.STATES).read_bytes())
    if campaign_witness.SAVING in states:
        return "in saves"
    if campaign_witness.STEPS in states:
        return "in training"
    return "before the first step" if campaign_witness.BEGUN in states else "in start-up"


def life(tally: Tally, words: list[str], chance: random.Random, number: Any, took: float) -> int:
    """Start a sweep, send it a signal at a random moment, and wait for its end; returns its exit status."""
    forked = chance.randrange(FROM_SCRATCH) > 0
    Path(campaign_witness.STATES).write_bytes(bytes(campaign_witness.SIZE))
    log = Path("log")
    pid = start(words, log, forked)
    if chance.random() < 0.5:
        over = ended(pid, chance.uniform(0, took if forked else took + IMPORTS))
    else:  # so that a good part of the lives leaves a checkpoint to go on from
        while not (over := ended(pid, 0.0)) and moment() not in ("in training", "in saves"):
            time.sleep(0.002)
        over = over or ended(pid, chance.uniform(0, took / 4))
    family = descendants(pid)
    name = signal.Signals(number).name
    if not over:
        tally.signals[name] += 1
        tally.moments[moment()] += 1
        whole_group = number in (signal.SIGINT, signal.SIGHUP) and chance.random() < 0.5
        (os.killpg if whole_group and os.getpgid(pid) == pid else os.kill)(pid, number)
        if number == signal.SIGSTOP:
            time.sleep(chance.uniform(0, 0.3))
            os.kill(pid, signal.SIGCONT)
    if not ended(pid, BOUND):
        tally.wrong.append(f"did not end within {BOUND:.0f} s after {name}")
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    until = time.monotonic() + LEFT
    while (left := started_by(pid, family)) and time.monotonic() < until:
        time.sleep(0.01)
    for each in left:
        tally.wrong.append(f"a process is left after {name}")
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    said = log.read_text(errors="replace") if log.exists() else ""
    expected = {0, -number, 128 + number} if number != signal.SIGSTOP else {0}
    if status not in expected:
        tally.wrong.append(f"ended with {status} after {name}: {' '.join(said.split())[-200:]}")
    if number != signal.SIGKILL and any(
        words in said for words in ("Traceback", "terminate called")
    ):
        tally.wrong.append(f"a traceback after {name}: {' '.join(said.split())[-300:]}")
    return status


def result(sweep: Path) -> Any:
    """Return what a sweep came to: its table, the best trial, the runs' metrics, weights and states.

    Of trials that train as one without their states: a kill regroups them, and they are equal but for rounding.
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
    """Return whether two values are equal, or if `rounded` equal but for rounding."""
    if not rounded:
        return bool(a == b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key], True) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(alike(*pair, True) for pair in zip(a, b, strict=True))
    return (
        math.isclose(a, b, rel_tol=ROUNDING, abs_tol=ROUNDING)
        if isinstance(a, float)
        else bool(a == b)
    )


def differences(whole: Any, cut: Any) -> Iterator[str]:
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
    (rounded, whole_rows, whole_best), (_, cut_rows, cut_best) = whole, cut
    if len(whole_rows) != len(cut_rows):
        yield "another number of trials"
        return
    for position, name in enumerate(names):
        if not alike(
            [row[position] for row in whole_rows], [row[position] for row in cut_rows], rounded
        ):
            yield f"other {name}"
    if whole_best != cut_best:
        yield "another best trial"


def undisturbed(launcher: str) -> float:
    """Run a sweep; returns the seconds that it takes."""
    began = time.monotonic()
    pid = start(arguments(launcher, f"{launcher}-whole"), Path("log"), True)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status != 0:
        raise RuntimeError(f"the undisturbed sweep failed: {Path('log').read_text()[-500:]}")
    return time.monotonic() - began


def disturb(launcher: str, signals: int, chance: random.Random, control: bool) -> Tally:
    """Send so many signals to sweeps of a launcher."""
    tally = Tally(launcher)
    os.environ.pop(campaign_witness.FORGET, None)
    took = undisturbed(launcher)
    folder = Path("runs/default")
    whole = result(folder / f"{launcher}-whole")
    if control:
        os.environ[campaign_witness.FORGET] = "1"
    while sum(tally.signals.values()) < signals or tally.sweeps == 0:
        words = arguments(launcher, f"{launcher}-{tally.sweeps}")
        share = min(sum(tally.signals.values()) + 12, signals)  # of one sweep
        while sum(tally.signals.values()) < share:
            number = NUMBERS[sum(tally.signals.values()) % len(NUMBERS)]
            if life(tally, words, chance, number, took) == 0:
                break
        pid = start(words, Path("log"), True)
        if not ended(pid, BOUND):
            tally.wrong.append("the last life hangs")
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        found = (
            [f"the last life ended with {status}"]
            if status
            else differences(whole, result(folder / f"{launcher}-{tally.sweeps}"))
        )
        wrong = list(found)
        tally.sweeps += 1
        tally.equal += not wrong
        tally.wrong += wrong
    return tally


def signalled(signals: int, seed: int, control: bool, launchers: list[str] | None = None) -> int:
    """Run the campaign and return its exit status. control: a resume forgets its random state and the optimizer's."""
    root, here, began = Path(tempfile.mkdtemp(prefix="campaign-")), Path.cwd(), time.monotonic()
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
    sent = sum(sum(tally.signals.values()) for tally in tallies)
    moments: Counter[str] = sum((tally.moments for tally in tallies), Counter())
    sweeps, equal = sum(tally.sweeps for tally in tallies), sum(tally.equal for tally in tallies)
    print(f"{equal} of {sweeps} sweeps equal after {sent} signals: {dict(sorted(moments.items()))}")
    wrong = any(tally.wrong for tally in tallies)
    print(
        f"  {time.monotonic() - began:.0f} s"
        + (f"; the sweeps are in {root}" if wrong and not control else "")
    )
    if control or not wrong:
        shutil.rmtree(root)
    if control and any(not tally.wrong for tally in tallies):
        print("the control did not fail for each launcher")
    return int(wrong)
