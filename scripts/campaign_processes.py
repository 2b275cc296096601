"""Kill processes of runs that have several, cause faults in them, and compare the results."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import campaign_disk
from campaign_kills import EVERY, STEPS, Witness, choose, kill, prepare, train_or_resume
from campaign_runs import differences, done, fork, spec_of, status_of

from framework.composition.spec import Spec

LIMIT = 20.0  # seconds until all processes end after a kill or a fault
FAULTS = Path(__file__).with_name("campaign_faults.py")
MARKED = "FRAMEWORK_CAMPAIGN"  # an environment variable of all processes of a command
DISK_BYTES = 30 * 2**20


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def fork_ranks(spec: Spec, processes: int, forget: bool = False) -> list[int]:
    """Train or resume a run in several processes; return their ids by rank."""
    port = free_port()

    def work(rank: int) -> Callable[[], None]:
        def train() -> None:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(processes),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2)  # the errors of lost connections
            train_or_resume(spec, forget)

        return train

    return [fork(work(rank)) for rank in range(processes)]


def is_running(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def wait_all(children: list[int], seconds: float) -> tuple[list[int], float]:
    """Wait for processes; return their statuses, and the seconds until the last one ended.

    After `seconds` those that still run are killed.
    """
    began = time.monotonic()
    while any(map(is_running, children)) and time.monotonic() - began < seconds:
        time.sleep(0.002)
    waited = time.monotonic() - began
    for child in filter(is_running, children):
        kill(child)
    return [status_of(child) for child in children], waited


@dataclass
class Outcome:
    """The result of a run that was killed."""

    name: str
    kills: int = 0
    main_kills: int = 0
    in_saves: int = 0
    resumed: int = 0
    longest: float = 0.0  # seconds until the other processes ended
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        verdict = "; ".join(dict.fromkeys(self.wrong)) or "equal"
        counts = f"{self.kills} kills ({self.main_kills} of main, {self.in_saves} in saves)"
        others = f"others ended within {self.longest:.1f} s"
        return f"{self.name:<34} {counts}, {self.resumed} resumes, {others}  {verdict}"


def kill_one(children: list[int], seconds: float, chance: random.Random) -> int | None:
    """Kill a random process some seconds after the first step; return its rank.

    None if a process ends before.
    """
    rank = chance.randrange(len(children))
    while True:
        began = Witness.read().began
        if began and time.monotonic() >= began + seconds:
            break
        if not all(map(is_running, children)):
            return None
        time.sleep(0.0005)
    kill(children[rank])
    return rank


def kill_one_in_save(children: list[int], chance: random.Random) -> int | None:
    """Kill a random process while a checkpoint is written, after the first one; return its rank."""
    rank = chance.randrange(len(children))
    while not (Witness.read().saving and Witness.read().saved):
        if not all(map(is_running, children)):
            return None
    kill(children[rank])
    return rank


def killed_run(
    number: int, kills: int, root: Path, chance: random.Random, settings: list[str], forget: bool
) -> Outcome:
    """Train a run undisturbed, then again with kills of random processes, and compare."""
    name, overrides = choose(number, root)
    overrides = [*overrides, *settings]
    processes = int(settings[0].partition("=")[2])
    outcome = Outcome(name)
    undisturbed = root / f"campaign/{number}-whole"
    run = root / f"campaign/{number}-killed"
    undisturbed_spec = spec_of([*overrides, f"run.name={undisturbed.name}"])
    killed_spec = spec_of([*overrides, f"run.name={run.name}"])
    Witness.forget()
    statuses, _ = wait_all(fork_ranks(undisturbed_spec, processes), 300)
    if any(statuses):
        outcome.wrong.append(f"the undisturbed run failed: {statuses}")
        return outcome
    seconds = time.monotonic() - Witness.read().began
    attempts = 0
    while True:
        Witness.forget()
        children = fork_ranks(killed_spec, processes, forget)
        attempts += 1
        rank = None
        if outcome.kills < kills and attempts < 4 * kills:
            if chance.random() < 0.4:
                rank = kill_one_in_save(children, chance)
            else:
                rank = kill_one(children, chance.uniform(0, 1.5 * seconds / kills), chance)
        statuses, waited = wait_all(children, LIMIT if rank is not None else 300)
        outcome.resumed += Witness.read().began_at > 0
        if rank is not None and statuses[rank] == -signal.SIGKILL:
            outcome.kills += 1
            outcome.main_kills += rank == 0
            outcome.in_saves += Witness.read().saving > 0
            outcome.longest = max(outcome.longest, waited)
            if waited >= LIMIT:
                outcome.wrong.append("the other processes hang")
        elif any(statuses):
            outcome.wrong.append(f"a resumed run failed: {statuses}")
            return outcome
        if not done(run):
            continue
        if outcome.kills >= kills or attempts >= 4 * kills:
            break
        shutil.rmtree(run)  # it has ended before all kills
    outcome.wrong += differences(undisturbed, run)
    return outcome


def process_kills(
    runs: int, per_run: int, processes: int, strategy: str, seed: int, control: bool
) -> int:
    """Run the campaign of kills and return its exit status.

    Args:
        runs: Number of runs.
        per_run: Number of kills of each run.
        processes: Number of processes of each run.
        strategy: Name of the strategy.
        seed: Seed of the times of the kills.
        control: Resume without the random state and the optimizer's state.
    """
    root = Path(tempfile.mkdtemp(prefix="campaign-"))
    began = time.monotonic()
    chance = random.Random(seed)
    prepare(root)
    settings = [f"trainer.devices={processes}", f"strategy={strategy}"]
    outcomes = []
    for number in range(runs):
        outcomes.append(killed_run(number, per_run, root, chance, settings, control))
        print(f"{number:3} {outcomes[-1]}", flush=True)
    equal = sum(not outcome.wrong for outcome in outcomes)
    killed = sum(outcome.kills for outcome in outcomes)
    in_saves = sum(outcome.in_saves for outcome in outcomes)
    mains = sum(outcome.main_kills for outcome in outcomes)
    longest = max(outcome.longest for outcome in outcomes)
    print(
        f"{equal} of {runs} runs of {processes} processes ({strategy}) bitwise equal after "
        f"{killed} kills, {mains} of the main process, {in_saves} inside saves; the other "
        f"processes ended within {longest:.1f} s"
    )
    keep = equal != runs and not control
    print(f"  {time.monotonic() - began:.0f} s" + (f"; the runs are in {root}" if keep else ""))
    if not keep:
        shutil.rmtree(root)
    return int(equal != runs)


# faults


@dataclass(frozen=True)
class Expected:
    """How a command ends after a fault.

    Args:
        statuses: Possible exit statuses.
        error: Pattern of its only error line; None for no error.
        state: Status of the run in status.json.
        main_only: Whether the fault is in the main process only.
    """

    statuses: tuple[int, ...]
    error: str | None
    state: tuple[str, ...]
    main_only: bool = False


FAILED = ("failed",)
KINDS = {
    "exception": Expected((1,), "ValueError: this process fails", FAILED),
    "memory": Expected((1, 2), "allocate memory|[Mm]emory", FAILED),
    "kill": Expected((1,), "killed by SIGKILL", ("failed", "running")),
    "hang": Expected((1,), "ended or does not answer|has failed", ("failed", "running")),
    "term": Expected((143,), None, ("stopped",)),
    "term_launcher": Expected((143,), None, ("stopped",)),
    "interrupt_launcher": Expected((130,), None, ("stopped",)),
    "interrupt_twice": Expected((130,), None, ("stopped", "running", "failed")),
    "hang_up_launcher": Expected((129,), None, ("stopped",)),
    "kill_launcher": Expected((-9,), None, ("running", "failed", "stopped")),
    "kill_data_worker": Expected((1, 2), "worker", FAILED),
    "fill_disk": Expected((2,), "[Nn]o space|disk", ("failed",), main_only=True),
}


def fault(
    kind: str, number: int, processes: int, strategy: str, chance: random.Random, whole: Path
) -> tuple[list[str], float]:
    """Cause a fault in a run, and resume it; return the problems and the seconds until its end."""
    expected = KINDS[kind]
    root = Path.cwd() / f"disk-{number}" if kind == "fill_disk" else Path.cwd()
    marker = root / f"marker-{number}"
    run = root / f"default/fault-{number}"
    rank = 0 if expected.main_only else chance.randrange(processes)
    step = chance.randrange(5, STEPS - 5)
    settings = fault_settings(processes, strategy, root, run.name)
    settings += [f"callbacks.fault.kind={kind}", f"callbacks.fault.rank={rank}"]
    settings += [f"callbacks.fault.step={step}", f"callbacks.fault.marker={marker}"]
    command = [sys.executable, "-m", "framework", "train", "--plugins", str(FAULTS), *settings]
    problems = []
    if kind == "fill_disk":
        root.mkdir()
    mark = f"{os.getpid()}-{number}"
    status, output, ended = run_command(command, mark, root if kind == "fill_disk" else None)
    if not marker_time(marker, output):
        return [f"the fault did not happen: {output[-300:]}"], 0.0
    seconds = ended - marker_time(marker, output)
    errors = [line for line in output.splitlines() if re.match("framework: (?!warning)", line)]
    problems += problems_of_end(expected, status, output, errors)
    if seconds > LIMIT:
        problems.append(f"ended after {seconds:.1f} s")
    if left_over(mark):
        problems.append("processes are left")
    if kind == "fill_disk":
        return problems, seconds  # its folder was visible only to the command
    state = (run / "status.json").read_text(encoding="utf-8")
    if not any(f'"status": "{name}"' in state for name in expected.state):
        problems.append(f"status.json: {state.strip()}")
    if number >= len(KINDS):
        return problems, seconds
    status, output, _ = run_command([*command, "resume=auto"], mark, None)
    if status != 0 or "resuming" not in output:
        problems.append(f"the resumed run ended with {status}: {output[-300:]}")
    else:
        problems += differences(whole, run)
    return problems, seconds


def problems_of_end(
    expected: Expected, status: int, output: str, errors: list[str]
) -> Iterator[str]:
    """Yield the differences between the end of a command and the expected one."""
    if status not in expected.statuses:
        yield f"exit status {status}"
    if "Traceback" in output or re.search(r"^\[?[WE]\d{4}|\[rank\d\]", output, re.MULTILINE):
        yield f"output of torch: {output[-1000:]}"
    if expected.error is None:
        if errors:
            yield f"unexpected errors: {errors}"
    elif len(errors) != 1 or not re.search(expected.error, errors[0]):
        yield f"expected one error, got {errors}"


def fault_settings(processes: int, strategy: str, root: Path, name: str) -> list[str]:
    return [
        f"run.root={root}",
        f"run.name={name}",
        "data=slow_digits",
        "loader.workers=1",
        "model.width=16",
        "model.dropout=0.1",
        f"trainer.devices={processes}",
        f"strategy={strategy}",
        "strategy.timeout_seconds=4",
        "callbacks=[fault,checkpoint,non_finite,gradient_norm]",
        f"callbacks.checkpoint.every={EVERY}steps",
        f"trainer.max_steps={STEPS}",
        "trainer.max_epochs=null",
        "trainer.log_every=5steps",
        "trainer.validate_every=10steps",
    ]


def run_command(command: list[str], mark: str, disk: Path | None) -> tuple[int, str, float]:
    """Run a command; return its status, its output, and the time when it has ended.

    Args:
        command: The command.
        mark: Value of an environment variable of its processes.
        disk: Mount point of a small disk that only the command sees.
    """
    environment = os.environ | {MARKED: mark, "OMP_NUM_THREADS": "1"}

    def mount() -> None:
        if disk is not None:
            campaign_disk.mount(disk, DISK_BYTES)

    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=out,
            env=environment,
            preexec_fn=mount,  # noqa: PLW1509  # this process has one thread
            start_new_session=True,
        )
        try:
            status = process.wait(180)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
        deadline = time.monotonic() + LIMIT
        while left_over(mark) and time.monotonic() < deadline:
            time.sleep(0.05)
        ended = time.time()
        out.seek(0)
        return status, out.read().decode(errors="replace"), ended


def marker_time(marker: Path, output: str) -> float:
    """Return the time of a fault; 0 if it did not happen."""
    with suppress(OSError, ValueError):
        return float(marker.read_text())
    return time.time() - 1 if "No space" in output or "disk" in output else 0.0


def left_over(mark: str) -> list[int]:
    """Return the processes of a command that still run."""
    found = []
    text = f"{MARKED}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                if text in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def process_faults(times: int, processes: int, strategy: str, seed: int, only: str = "") -> int:
    """Cause faults in runs of several processes; return the exit status of the campaign.

    Args:
        times: Number of faults.
        processes: Number of processes of each run.
        strategy: Name of the strategy.
        seed: Seed of the processes and steps of the faults.
        only: Kind of the faults; all by default.
    """
    root = Path(tempfile.mkdtemp(prefix="campaign-"))
    here = Path.cwd()
    began = time.monotonic()
    chance = random.Random(seed)
    correct: Counter[str] = Counter()
    longest: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    os.chdir(root)
    settings = fault_settings(processes, strategy, root, "whole")
    settings += ["callbacks.fault.kind=none", "callbacks.fault.rank=0"]
    settings += ["callbacks.fault.step=0", "callbacks.fault.marker=none"]
    command = [sys.executable, "-m", "framework", "train", "--plugins", str(FAULTS), *settings]
    status, output, _ = run_command(command, f"{os.getpid()}-whole", None)
    if status:
        raise RuntimeError(f"the undisturbed run failed: {output[-500:]}")
    kinds = [only] if only else list(KINDS)
    for number in range(times):
        kind = kinds[number % len(kinds)]
        problems, seconds = fault(kind, number, processes, strategy, chance, root / "default/whole")
        counts[kind] += 1
        correct[kind] += not problems
        longest[kind] = max(longest[kind], round(seconds, 1))  # type: ignore[assignment]
        print(
            f"{number:3} {kind:<20} {seconds:5.1f} s  {'; '.join(problems) or 'correct'}",
            flush=True,
        )
    os.chdir(here)
    for kind in counts:
        print(f"{kind:<20} {correct[kind]} of {counts[kind]}, at most {longest[kind]} s")
    right = correct.total()
    print(f"{right} of {times} faults ended correctly; {time.monotonic() - began:.0f} s")
    if right == times:
        shutil.rmtree(root)
    else:
        print(f"the runs are in {root}")
    return int(right != times)
