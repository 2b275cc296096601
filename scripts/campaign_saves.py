"""Kill a process at each system call of a save or make the call fail, and check the result."""

import json
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from campaign_disk import PAGE, mount, pages_left
from campaign_runs import fork, plain, status_of
from campaign_trace import Call, Fault, How, supported, traced
from torch import nn

import framework as fw
from framework.errors import CheckpointError
from framework.runs.checkpoint import clean, folder_name, listed, load, newest, step_of, writing

STEPS = 3  # before the disturbed save
REFUSED = 3  # exit status of a save that raised a CheckpointError
DISK = 2**20  # bytes
CUTS = 2  # number of truncations of each write
Contents = dict[int, Any]


@dataclass(frozen=True)
class Case:
    """A kind of saves.

    Args:
        settings: Settings of the callback.
        again: Save a step that already has a checkpoint.
        better: Save the best checkpoint so far.
    """

    name: str
    settings: dict[str, Any]
    again: bool = False
    better: bool = False

    def start(self, folder: Path) -> fw.Trainer:
        """Train a few steps, and save each."""
        torch.manual_seed(1)
        saving = fw.callbacks.build("checkpoint", every="1steps", **self.settings)
        trainer = fw.Trainer(max_steps=STEPS, callbacks=[saving], folder=folder, device="cpu")
        model = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8))
        data = fw.TensorSplit(torch.randn(12, 8), torch.randn(12, 8))
        optimizer = torch.optim.AdamW(model.parameters())
        trainer.fit(model, data, val=data, task=nn.MSELoss(), optimizer=optimizer, batch_size=4)
        return trainer

    def save(self, trainer: fw.Trainer, *, again: bool = False, better: bool = False) -> int:
        """Call the callback after one more step, or after another step with the same number."""
        random.seed(1)  # each fork changes the random state, and a checkpoint contains it
        trainer.state.step += not again
        for parameter in trainer.model.parameters():
            parameter.data += 1
        saving = trainer.callbacks[0]
        try:
            if better:
                trainer.state.metrics["val/loss"] = -1.0
                saving.on_validation_end(trainer)
            saving.on_step_done(trainer)
            saving.finish_saving()
        except CheckpointError as error:
            return REFUSED if "No space left on device" in str(error) else 1
        return 0


def cases() -> list[Case]:
    """Return all kinds of saves, in the training thread and in the background."""
    found = []
    for background, suffix in {False: "", True: ", background"}.items():
        settings = {"keep": 9, "monitor": None, "background": background}
        rotation = settings | {"keep": 1}
        best = rotation | {"monitor": "val/loss"}
        found += [
            Case(f"new step{suffix}", settings),
            Case(f"same step again{suffix}", settings, again=True),
            Case(f"rotation{suffix}", rotation),
            Case(f"rotation, best{suffix}", best, better=True),
        ]
    return found


class Rehearsal:
    """A case with the folder before the save and the result of an undisturbed save."""

    def __init__(self, case: Case, root: Path):
        self.case = case
        self.before = root / "before"
        self.place = root / "place"
        self.trainer = case.start(self.before)
        self.old = contents(self.before / "checkpoints")
        self.set_up()
        self.calls, status = traced(self.save, self.place)
        if status != 0:
            raise RuntimeError(f"{case.name}: the undisturbed save failed")
        self.new = contents(self.place / "checkpoints")

    def set_up(self) -> None:
        """Restore the folder as before the save; the calling process forks afterwards."""
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.before, self.place, symlinks=True)
        self.trainer.folder = self.place
        self.trainer.callbacks[0].on_fit_start(self.trainer)

    def save(self) -> int:
        return self.case.save(self.trainer, again=self.case.again, better=self.case.better)

    def judge(self, status: int) -> tuple[str, list[str]]:
        """Return "old" or "new" for the newest checkpoint after the save, and all problems."""
        folder = self.place / "checkpoints"
        wrong = [] if status in (0, REFUSED, -9) else [f"it ended with status {status}"]
        wrong += unreadable(folder)
        clean(folder)
        found, skipped = newest(folder)
        if found is None or skipped:
            return "none", [*wrong, "the newest is not good", *skipped]
        saved = {step_of(found): plain(load(found))}
        version = "other"
        if saved == newest_of(self.new):
            version = "new"
        elif saved == newest_of(self.old):
            version = "old"
        if version == "other" or (status == 0 and version == "old"):
            wrong.append(f"the newest is {version} {found.name}, after status {status}")
        wrong += leftovers(folder)
        wrong += self.resume_from(found)
        return version, wrong

    def resume_from(self, found: Path) -> Iterator[str]:
        """Resume in a forked process, save one more step, and yield the problems."""

        def resume_and_save() -> None:
            model, training = load(found)
            self.trainer.load_state_dict(training | {"model": model})
            self.trainer.callbacks[0].on_fit_start(self.trainer)
            if self.case.save(self.trainer):
                raise RuntimeError("the next save was refused")

        status = status_of(fork(resume_and_save))
        after = newest(found.parent)[0]
        if status or after is None or step_of(after) != step_of(found) + 1:
            yield "the next save failed"
        elif best := load(after)[1]["callbacks"]["0:Checkpoint"].get("best"):
            step = best[0][1]
            link = found.parent / "best"
            if not link.is_symlink() or os.readlink(link) != folder_name(step):
                yield f"after the next save, the link best does not point to the best step {step}"


def contents(folder: Path) -> Contents:
    return {step_of(saved): plain(load(saved)) for saved in listed(folder)}


def newest_of(found: Contents) -> Contents:
    return {max(found): found[max(found)]}


def unreadable(folder: Path) -> Iterator[str]:
    """Yield the problems of checkpoints with a final name."""
    for saved in listed(folder):
        try:
            load(saved)
        except CheckpointError as error:
            yield f"unreadable under a final name: {error}"
    best = folder / "best"
    if best.is_symlink() and best.resolve() not in [saved.resolve() for saved in listed(folder)]:
        yield f"best points to {os.readlink(best)}, which does not exist"


def leftovers(folder: Path) -> Iterator[str]:
    """Yield the files that are neither a checkpoint nor the link to the best one after `clean`."""
    known = {"best", *(saved.name for saved in listed(folder))}
    for path in folder.iterdir():
        if path.name not in known:
            contents = f" {sorted(os.listdir(path))}" if path.is_dir() else ""
            yield f"leftover: {path.name}{contents}"


def faults(calls: list[Call], chance: random.Random) -> Iterator[Fault]:
    """Yield all faults: before, after and instead of each call, and truncations of each write."""
    for at, call in enumerate(calls):
        yield Fault(at, "killed before")
        for _ in range(CUTS if call.length > 1 else 0):
            yield Fault(at, "killed within", chance.randrange(1, call.length))
        yield Fault(at, "killed after")
        yield Fault(at, "no room")


@dataclass
class Tally:
    """The results of all points of a case."""

    name: str
    points: Counter[str] = field(default_factory=Counter)
    newest: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, how: str, where: str, version: str, wrong: list[str]) -> None:
        self.points[how] += 1
        self.newest[version] += 1
        self.wrong += [f"{how} {where}: {problem}" for problem in wrong]

    def __str__(self) -> str:
        points = ", ".join(f"{count} {how}" for how, count in self.points.items())
        verdict = f"{len(self.wrong)} WRONG: {self.wrong[0]}" if self.wrong else "all good"
        newest = f"old/new one is the newest: {self.newest['old']}/{self.newest['new']}"
        return f"{self.name:<28} {points}; {newest}; {verdict}"


def in_place(written: Path, final: Path) -> Path:
    """Publish a checkpoint file by file: the negative control."""
    shutil.rmtree(final, ignore_errors=True)
    shutil.copytree(written, final)
    shutil.rmtree(written)
    return final


def disturb(
    case: Case, chance: random.Random, kinds: Sequence[How] = get_args(How), every: int = 1
) -> Tally:
    """Cause every n-th fault of some kinds, each on a new copy of the folder."""
    tally = Tally(case.name)
    with tempfile.TemporaryDirectory(prefix="campaign-") as root:
        rehearsal = Rehearsal(case, Path(root))
        selected = [fault for fault in faults(rehearsal.calls, chance) if fault.how in kinds]
        for fault in selected[::every]:
            rehearsal.set_up()
            calls, status = traced(rehearsal.save, rehearsal.place, fault)
            version, wrong = rehearsal.judge(status)
            if fault.how != "no room" and status != -9:
                wrong.append("it was not killed")
            tally.add(fault.how, f"call {fault.at} ({calls[fault.at].name})", version, wrong)
    return tally


def fill_up(case: Case) -> Tally | str:
    """Save on a full disk with 0, 1, 2 ... free pages until a save succeeds.

    Returns:
        The results, or a text if the system does not permit a small disk.
    """
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        root = Path(folder)
        file = root / "result.json"
        if status_of(fork(lambda: file.write_text(json.dumps(on_a_small_disk(case, root))))):
            return Tally(case.name, wrong=["the campaign itself failed"])
        result = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(result, str):
        return result
    points, newest, wrong = result
    return Tally(case.name, Counter(points), Counter(newest), wrong)


def on_a_small_disk(case: Case, root: Path) -> Any:
    disk = root / "disk"
    disk.mkdir()
    try:
        mount(disk, DISK)
    except OSError as error:
        return f"  skipped: the system does not permit a small disk: {error.strerror}"
    tally = Tally(case.name)
    rehearsal = Rehearsal(case, disk)
    for pages in range(DISK // PAGE):
        rehearsal.set_up()
        with pages_left(disk, pages):
            _, status = traced(rehearsal.save, rehearsal.place)
        version, wrong = rehearsal.judge(status)
        tally.add("full disk", f"with {pages} pages left", version, wrong)
        if status == 0:
            break
    else:
        tally.wrong.append("no save succeeded, although there was enough space")
    return tally.points, tally.newest, tally.wrong


def saves(seed: int, control: bool, only: str = "") -> int:
    """Run the campaign and return its exit status.

    Args:
        seed: Seed of the truncations.
        control: Publish a checkpoint file by file.
        only: Text in the names of the selected cases.
    """
    if reason := supported():
        print(f"skipped: {reason}")
        return 0
    if control:
        writing.publish = in_place
    chance = random.Random(seed)
    points = 0
    wrong = 0
    for case in cases():
        if only not in case.name:
            continue
        for tally in (disturb(case, chance), fill_up(case)):
            print(tally, flush=True)
            if isinstance(tally, Tally):
                points += tally.points.total()
                wrong += len(tally.wrong)
    print(f"{wrong} problems at {points} points")
    return int(bool(wrong))
