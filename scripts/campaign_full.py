"""Fill a small disk during runs and sweeps, free it, resume, and compare the results."""

import importlib
import json
import os
import random
import re
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from campaign_disk import PAGE, mount, pages_free
from campaign_runs import differences, fork, status_of

from framework.cli.main import main
from framework.runs.checkpoint import listed, verify, writing
from framework.system import files
from framework.system.files import AppendFile
from framework.tuning.sweep.folder import SweepFolder

DISK = 48 * 2**20  # bytes
STEPS = 24
MESSAGE = re.compile(r"framework: .*/.*(No space left on device|no room|no space).*[\d,]+ bytes.*")
RUN = (
    f"train data=digits model.width=24 trainer.max_steps={STEPS} trainer.max_epochs=null "
    "trainer.log_every=1steps trainer.validate_every=6steps loader.batch_size=256 "
    "callbacks.checkpoint.every=4steps callbacks.checkpoint.background=false "
    "+callbacks=confusion loggers=[tensorboard,json_lines] resume=auto"
)
SMALL = (
    "train -m data=blobs trainer.max_epochs=2 trainer.log_every=1steps "
    "callbacks.checkpoint.every=1epoch sweep.name=s resume=auto"
)
SWEEP = f"{SMALL} seed=range(12)"
SEARCH = f"{SMALL} hydra/sweeper=optuna hydra.sweeper.trials=12 optimizer.lr=interval(0.001,0.1)"
WRITERS = {  # files whose writers meet the full disk, by command
    RUN: [
        "status.json",
        "facts.json",
        "overrides.yaml",
        "provenance.json",
        "config.yaml",
        "metrics.jsonl",
        "events",
        "checkpoint",
    ],
    f"{RUN} trainer.profile=true".replace(f"max_steps={STEPS}", "max_steps=60"): [
        "profile.pt.trace.json"
    ],
    SWEEP: [
        "sweep.json",
        "sweep.jsonl",
        "output.txt",
        "config.yaml",
        "metrics.jsonl",
        "events",
        "checkpoint",
    ],
    SEARCH: ["study.journal", "sweep.jsonl", "checkpoint"],
}
WRITTEN_ONCE = (".yaml", "facts.json", "provenance.json", "sweep.json", ".trace.json")


@dataclass
class Filling:
    """The time when the disk is full.

    Args:
        writer: Fill the disk when this file is written for the `number`-th time.
        pages: Without a writer: free pages at the start.
    """

    command: str
    writer: str = ""
    number: int = 0
    pages: int = 0

    def __str__(self) -> str:
        kind = "run"
        if "optuna" in self.command:
            kind = "search"
        elif " -m " in self.command:
            kind = "sweep"
        if self.writer:
            return f"{kind}, {self.writer} {self.number}"
        return f"{kind}, {self.pages} pages left"


class Disk:
    """A small disk that can be filled up to the last page."""

    def __init__(self, place: Path):
        self.place = place
        self.filler = place / "filler"

    def fill(self, pages: int = 0) -> None:
        """Fill the disk until `pages` pages are free; a file can still grow in its last page."""
        with suppress(OSError):
            size = self.filler.stat().st_size if self.filler.exists() else 0
            with self.filler.open("ab", buffering=0) as file:
                file.write(bytes(max(pages_free(self.place) - pages, 0) * PAGE))
                assert size <= self.filler.stat().st_size

    def free(self) -> None:
        self.filler.unlink(missing_ok=True)


def install(filling: Filling, disk: Disk) -> None:
    """Fill the disk in this process at the time of `filling`."""
    if not filling.writer:
        disk.fill(filling.pages)
        return
    left = filling.number

    def before_write(name: str) -> None:
        nonlocal left
        if name == filling.writer:
            left -= 1
            if left < 0:
                disk.fill()

    real_write = files.write_and_rename
    real_append = AppendFile.append
    real_checkpoint = writing.write

    def write_and_rename(directory: int, temporary: str, path: Path, *content: Any) -> None:
        before_write(path.name)
        real_write(directory, temporary, path, *content)

    def append(self: AppendFile, record: bytes) -> None:
        size = os.fstat(self.file.fileno()).st_size
        if size == 0 or size // PAGE != (size + len(record)) // PAGE:  # it needs a new page
            before_write("events" if "tfevents" in self.path.name else self.path.name)
        real_append(self, record)

    def write(folder: Path, taken: Any) -> None:
        before_write("checkpoint")
        real_checkpoint(folder, taken)

    files.write_and_rename = write_and_rename  # type: ignore[assignment]
    writing.write = write  # type: ignore[assignment]
    AppendFile.append = append  # type: ignore[method-assign]


def run_command(
    command: str, root: Path, log: Path, before: Callable[[], None] = lambda: None
) -> int:
    """Run a command in a forked process in the folder `root`; return the exit status."""

    def work() -> None:
        os.chdir(root)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        stream = open(output, "w", buffering=1, encoding="utf-8")  # noqa: SIM115  # never closed
        sys.stdout = stream
        sys.stderr = stream
        before()
        try:
            main(shlex.split(command))
        except SystemExit as error:
            sys.stdout.flush()
            os._exit(int(error.code or 0))

    return status_of(fork(work))


def runs_in(root: Path) -> list[Path]:
    return sorted(
        file.parent for file in root.glob("runs/default/**/config.yaml") if "best" not in file.parts
    )


def torn(root: Path) -> Iterator[str]:
    """Yield the incomplete lines and temporary files after a full disk."""
    for path in root.rglob("*"):
        if path.name.startswith(".") and path.name != ".lock":
            yield f"leftover: {path.name}"
        is_log = path.suffix == ".jsonl" or path.name == "study.journal"
        if is_log and not has_complete_lines(path.read_bytes()):
            yield f"torn: {path.name}"
    for folder in root.rglob("checkpoints"):
        if folder.is_symlink():  # in the folder `best` of a sweep
            continue
        for saved in listed(folder):
            verify(saved)


def has_complete_lines(content: bytes) -> bool:
    try:
        for line in content.splitlines():
            json.loads(line)
    except ValueError:
        return False
    return not content or content.endswith(b"\n")


def problems_after(filling: Filling, status: int, output: str, root: Path) -> Iterator[str]:
    """Yield the problems after the command has met the full disk."""
    lines = [line for line in output.splitlines() if line.startswith("framework: ")]
    in_sweep = " -m " in filling.command
    if status != 2:
        yield f"exit status {status}: {output[-300:]}"
    elif in_sweep:
        if "bytes" not in output:
            yield f"no number of bytes in the message: {output[-300:]}"
    elif len(lines) != 1 or not MESSAGE.fullmatch(lines[0]):
        yield f"expected one line with the file and the bytes, got {lines}"
    yield from torn(root)
    for run in runs_in(root):
        state = json.loads((run / "status.json").read_text(encoding="utf-8"))
        if not in_sweep and (state["status"] != "failed" or "bytes" not in state["reason"]):
            yield f"status.json has {state['status']}: {state['reason']}"


def point(filling: Filling, disk: Disk, log: Path, expected: Path) -> tuple[str, list[str]]:
    """Run a command until the disk is full, free the disk, and run the command again.

    Returns:
        "met" if the disk was full, otherwise "room enough", and the problems.
    """
    root = Path(tempfile.mkdtemp(dir=disk.place))
    status = run_command(filling.command, root, log, lambda: install(filling, disk))
    outcome = "met" if status else "room enough"
    wrong: list[str] = []
    if status:
        output = log.read_text(encoding="utf-8", errors="replace")
        wrong += problems_after(filling, status, output, root)
    disk.free()
    if status:  # after success, the same command would start another run
        status = run_command(filling.command, root, log)
    if status:
        wrong.append(f"resume: exit status {status}: {log.read_text(errors='replace')[-300:]}")
    else:
        wrong += compared(expected, root)
    shutil.rmtree(root)
    return outcome, wrong


def rows_in(root: Path) -> list[tuple[Any, ...]]:
    """Return the rows of a sweep, if there is one, without times."""
    rows: list[tuple[Any, ...]] = []
    for path in root.glob("runs/default/*/sweep.jsonl"):
        for trial in SweepFolder(path.parent).trials():
            measured = {
                name: value for name, value in trial.metrics.items() if name.startswith("val/")
            }
            rows.append((trial.number, trial.settings, trial.state, measured))
    return rows


def compared(expected: Path, root: Path) -> Iterator[str]:
    """Yield the differences from the runs of the same command with enough space."""
    expected_runs = runs_in(expected)
    runs = runs_in(root)
    if len(expected_runs) != len(runs):
        yield f"expected {len(expected_runs)} runs, got {len(runs)}"
        return
    if rows_in(expected) != rows_in(root):
        yield f"expected the rows {rows_in(expected)} of the sweep, got {rows_in(root)}"
    for one, other in zip(expected_runs, runs, strict=True):
        try:
            for difference in differences(one, other):
                yield f"{other.name}: {difference}"
        except ValueError as error:  # an unreadable file
            yield f"{other.name}: {error}"


@dataclass
class Tally:
    points: Counter[str] = field(default_factory=Counter)
    writers: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def fillings(points: int, chance: random.Random, only: str) -> list[Filling]:
    """Return the points: the first writes of each writer, and random numbers of free pages."""
    found = []
    for command, writers in WRITERS.items():
        for writer in writers:
            times = 1 if writer.endswith(WRITTEN_ONCE) else 3
            found += [Filling(command, writer, number) for number in range(times)]
    for number in range(max(points - len(found), 0)):
        command = [RUN, RUN, SWEEP, SEARCH][number % 4]
        found.append(Filling(command, pages=chance.randrange(0, 60)))
    return [filling for filling in found if only in str(filling)]


def on_a_small_disk(chosen: list[Filling], root: Path, control: bool) -> Any:
    place = root / "disk"
    place.mkdir()
    try:
        mount(place, DISK)
    except OSError as error:
        return f"skipped: the system does not permit a small disk: {error.strerror}"
    if control:
        ignore_errors()
    tally = Tally()
    disk = Disk(place)
    log = root / "log"
    expected: dict[str, Path] = {}
    for filling in chosen:
        if filling.command not in expected:
            folder = root / f"whole-{len(expected)}"
            folder.mkdir()
            expected[filling.command] = folder
            if run_command(filling.command, folder, log):
                problem = f"the undisturbed command failed: {log.read_text()[-500:]}"
                tally.wrong.append(f"{filling}: {problem}")
                continue
        outcome, wrong = point(filling, disk, log, expected[filling.command])
        tally.points[outcome] += 1
        tally.writers[filling.writer or "random"] += outcome == "met"
        tally.wrong += [f"{filling}: {problem}" for problem in wrong]
        verdict = f", WRONG: {'; '.join(wrong)}" if wrong else ""
        print(f"{filling}: {outcome}{verdict}", file=sys.stderr, flush=True)
    return tally.points, tally.writers, tally.wrong


def ignore_errors() -> None:
    """Ignore errors of the disk, and keep partly written records: the negative control."""

    def append(self: AppendFile, record: bytes) -> None:
        with suppress(OSError):
            self.file.write(record)

    AppendFile.append = append  # type: ignore[method-assign]


def full_disk(points: int, seed: int, control: bool, only: str = "") -> int:
    """Run the campaign and return its exit status."""
    chosen = fillings(points, random.Random(seed), only)
    # imported before the forks, so that no child must import them
    for module in ("event_pb2", "graph_pb2"):
        importlib.import_module(f"tensorboard.compat.proto.{module}")
    importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    importlib.import_module("framework.experiment.experiment")
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        root = Path(folder)
        file = root / "result.json"

        def work() -> None:
            file.write_text(json.dumps(on_a_small_disk(chosen, root, control)))

        if status_of(fork(work)):
            print("the campaign itself failed")
            return 1
        found = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(found, str):
        print(found)
        return 0
    counts, writers, wrong = found
    full = counts.get("met", 0)
    enough = counts.get("room enough", 0)
    print(f"the disk was full at {full} points, and had enough space at {enough}:")
    print("  " + ", ".join(f"{count} {writer}" for writer, count in writers.items()))
    for problem in wrong[:30]:
        print(f"WRONG {problem}")
    print(f"{len(wrong)} problems at {len(chosen)} points")
    return int(bool(wrong))
