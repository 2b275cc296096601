"""Fills a small disk under runs and sweeps, at each writer in turn and at random; frees it, resumes, and compares."""

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
SAID = re.compile(r"framework: .*/.*(No space left on device|no room).*[\d,]+ bytes.*")
RUN = (
    f"train data=digits model.width=24 trainer.max_steps={STEPS} trainer.max_epochs=null trainer.log_every=1steps "
    "trainer.validate_every=6steps loader.batch_size=256 callbacks.checkpoint.every=4steps "
    "callbacks.checkpoint.background=false +callbacks=confusion loggers=[tensorboard,json_lines] resume=auto"
)
SMALL = (
    "train -m data=blobs trainer.max_epochs=2 trainer.log_every=1steps callbacks.checkpoint.every=1epoch "
    "sweep.name=s resume=auto"
)
SWEEP = f"{SMALL} seed=range(12)"
SEARCH = f"{SMALL} hydra/sweeper=optuna hydra.sweeper.trials=12 optimizer.lr=interval(0.001,0.1)"
WRITERS = {  # the files that meet the full disk, by command
    RUN: [
        *("status.json", "facts.json", "overrides.yaml", "provenance.json", "config.yaml"),
        *("metrics.jsonl", "events", "checkpoint"),
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


@dataclass
class Filling:
    """When the disk gets full: at the n-th time that a writer begins, or from the start with so many pages left."""

    command: str
    writer: str = ""
    number: int = 0
    pages: int = 0

    def __str__(self) -> str:
        verb = (
            "search" if "optuna" in self.command else "sweep" if " -m " in self.command else "run"
        )
        return (
            f"{verb}, {self.writer} {self.number}"
            if self.writer
            else f"{verb}, {self.pages} pages left"
        )


class Disk:
    """A small disk that can be filled up to the last page."""

    def __init__(self, place: Path):
        self.place = place
        self.filler = place / "filler"

    def fill(self, pages: int = 0) -> None:
        """Leave so many pages; a file that exists may still grow within its last page."""
        with suppress(OSError):
            size = self.filler.stat().st_size if self.filler.exists() else 0
            with self.filler.open("ab", buffering=0) as file:
                file.write(bytes(max(pages_free(self.place) - pages, 0) * PAGE))
                assert size <= self.filler.stat().st_size

    def free(self) -> None:
        self.filler.unlink(missing_ok=True)


def install(filling: Filling, disk: Disk) -> None:
    """Let the disk be full at the moment that `filling` says, in this process."""
    if not filling.writer:
        disk.fill(filling.pages)
        return
    left = filling.number

    def meets(name: str) -> None:
        nonlocal left
        if name == filling.writer:
            left -= 1
            if left < 0:
                disk.fill()

    real_write, real_append, real_checkpoint = files.write_in, AppendFile.append, writing.write

    def write_in(directory: int, temporary: str, name: str, pieces: Any) -> None:
        meets(name)
        real_write(directory, temporary, name, pieces)

    def append(self: AppendFile, record: bytes) -> None:
        size = os.fstat(self.file.fileno()).st_size
        if size == 0 or size // PAGE != (size + len(record)) // PAGE:  # it takes a new page
            meets("events" if "tfevents" in self.path.name else self.path.name)
        real_append(self, record)

    def write(folder: Path, taken: Any) -> None:
        meets("checkpoint")
        real_checkpoint(folder, taken)

    files.write_in, writing.write = write_in, write  # type: ignore[assignment]
    AppendFile.append = append  # type: ignore[method-assign]


def do(command: str, root: Path, said: Path, before: Callable[[], None] = lambda: None) -> int:
    """Run a command in a process of its own, with its runs below a folder; returns the exit status."""

    def work() -> None:
        os.chdir(root)
        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = sys.stderr = open(output, "w", buffering=1, encoding="utf-8")  # noqa: SIM115 (ends with the process)
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
    """Yield what a full disk has left half written, or behind."""
    for path in root.rglob("*"):
        if path.name.startswith(".") and path.name != ".lock":
            yield f"litter: {path.name}"
        if path.suffix == ".jsonl" or path.name == "study.journal":
            content = path.read_bytes()
            with suppress(ValueError):
                [json.loads(line) for line in content.splitlines()]
                if not content or content.endswith(b"\n"):
                    continue
            yield f"torn: {path.name}"
    for folder in root.rglob("checkpoints"):
        if folder.is_symlink():  # in the folder `best` of a sweep
            continue
        for saved in listed(folder):
            verify(saved)


def wrong_after(filling: Filling, status: int, said: str, root: Path) -> Iterator[str]:
    """Yield what is wrong after the command has met the full disk."""
    lines = [line for line in said.splitlines() if line.startswith("framework: ")]
    in_sweep = " -m " in filling.command
    if status != 2:
        yield f"exit status {status}: {said[-300:]}"
    elif in_sweep:
        if "bytes" not in said:
            yield f"no bytes are named: {said[-300:]}"
    elif len(lines) != 1 or not SAID.fullmatch(lines[0]):
        yield f"not one line with the file and the bytes: {lines}"
    yield from torn(root)
    for run in runs_in(root):
        state = json.loads((run / "status.json").read_text(encoding="utf-8"))
        if not in_sweep and (state["status"] != "failed" or "bytes" not in state["reason"]):
            yield f"status.json says {state['status']}: {state['reason']}"


def point(filling: Filling, disk: Disk, said: Path, whole: Path) -> tuple[str, list[str]]:
    """Run a command until the disk is full, free it, run it again; returns what happened, and what is wrong."""
    root = Path(tempfile.mkdtemp(dir=disk.place))
    status = do(filling.command, root, said, lambda: install(filling, disk))
    text = said.read_text(encoding="utf-8", errors="replace")
    what = "met" if status else "room enough"
    wrong = list(wrong_after(filling, status, text, root)) if status else []
    disk.free()
    if status == 0:  # the run is done, and the same command would begin another
        wrong += compared(whole, root)
        shutil.rmtree(root)
        return what, wrong
    again = do(filling.command, root, said)
    if again:
        wrong.append(f"going on: exit status {again}: {said.read_text(errors='replace')[-300:]}")
    else:
        wrong += compared(whole, root)
    shutil.rmtree(root)
    return what, wrong


def rows_in(root: Path) -> list[tuple[Any, ...]]:
    """Return what does not depend on time in the rows of a sweep, if there is one."""
    rows: list[tuple[Any, ...]] = []
    for path in root.glob("runs/default/*/sweep.jsonl"):
        for trial in SweepFolder(path.parent).trials():
            measured = {
                name: value for name, value in trial.metrics.items() if name.startswith("val/")
            }
            rows.append((trial.number, trial.settings, trial.state, measured))
    return rows


def compared(whole: Path, root: Path) -> Iterator[str]:
    """Yield how the runs of a command differ from those of the same command on a disk with room."""
    names = [run.relative_to(whole).parts[3:] for run in runs_in(whole)]
    runs = runs_in(root)
    if len(names) != len(runs):
        yield f"{len(runs)} runs, expected {len(names)}"
        return
    if rows_in(whole) != rows_in(root):
        yield f"the rows of the sweep are {rows_in(root)}, expected {rows_in(whole)}"
    for one, other in zip(runs_in(whole), runs, strict=True):
        try:
            yield from (f"{other.name}: {each}" for each in differences(one, other))
        except ValueError as error:  # of a file that cannot be read
            yield f"{other.name}: {error}"


@dataclass
class Tally:
    points: Counter[str] = field(default_factory=Counter)
    writers: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def fillings(points: int, chance: random.Random, only: str) -> list[Filling]:
    """Return the points: each writer at its first times, and random free pages up to the given number in all."""
    found = []
    for command, writers in WRITERS.items():
        for writer in writers:
            times = (
                1
                if writer.endswith(
                    (".yaml", "facts.json", "provenance.json", "sweep.json", ".trace.json")
                )
                else 3
            )
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
        return f"skipped: no small disk may be mounted here: {error.strerror}"
    if control:
        forget()
    tally, disk, said = Tally(), Disk(place), root / "said"
    whole: dict[str, Path] = {}
    for filling in chosen:
        if filling.command not in whole:
            whole[filling.command] = root / f"whole-{len(whole)}"
            whole[filling.command].mkdir()
            if do(filling.command, whole[filling.command], said):
                tally.wrong.append(
                    f"{filling}: the undisturbed command failed: {said.read_text()[-500:]}"
                )
                continue
        what, wrong = point(filling, disk, said, whole[filling.command])
        tally.points[what] += 1
        tally.writers[filling.writer or "random"] += what == "met"
        tally.wrong += [f"{filling}: {each}" for each in wrong]
        print(
            f"{filling}: {what}{', WRONG: ' * bool(wrong)}{'; '.join(wrong)}",
            file=sys.stderr,
            flush=True,
        )
    return tally.points, tally.writers, tally.wrong


def forget() -> None:
    """Control: a part of a record stays when there is no room for the rest, and errors of a disk are not told."""

    def append(self: AppendFile, record: bytes) -> None:
        with suppress(OSError):
            self.file.write(record)

    AppendFile.append = append  # type: ignore[method-assign]


def full_disk(points: int, seed: int, control: bool, only: str = "") -> int:
    """Run the campaign and return its exit status."""
    chosen = fillings(points, random.Random(seed), only)
    for module in ("event_pb2", "graph_pb2"):  # here, so that no process that is forked has to
        importlib.import_module(f"tensorboard.compat.proto.{module}")
    importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    importlib.import_module("framework.experiment.experiment")
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        root = Path(folder)
        told = root / "told.json"
        if status_of(
            fork(lambda: told.write_text(json.dumps(on_a_small_disk(chosen, root, control))))
        ):
            print("the campaign itself failed")
            return 1
        found = json.loads(told.read_text(encoding="utf-8"))
    if isinstance(found, str):
        print(found)
        return 0
    counts, writers, wrong = found
    print(
        f"the disk was full at {counts.get('met', 0)} points, and had room at {counts.get('room enough', 0)}:"
    )
    print("  " + ", ".join(f"{count} {writer}" for writer, count in writers.items()))
    for each in wrong[:30]:
        print(f"WRONG {each}")
    print(f"{len(wrong)} things wrong at {len(chosen)} points")
    return int(bool(wrong))
