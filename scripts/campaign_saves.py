"""Kills a process at every system call of a save, or lets the call fail for want of room, and looks what is left."""

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

STEPS = 3  # before the save that is disturbed
REFUSED = 3  # exit status of a save that ended in a CheckpointError
DISK = 2**20  # bytes
CUTS = 2  # lengths at which each write is cut
Contents = dict[int, Any]


@dataclass(frozen=True)
class Case:
    """A sort of save: with which settings of the callback, and what it saves."""

    name: str
    settings: dict[str, Any]
    again: bool = False  # the step that is there already
    better: bool = False  # the best one so far

    def start(self, folder: Path) -> fw.Trainer:
        """Train a little, saving each step."""
        torch.manual_seed(1)
        saving = fw.callbacks.build("checkpoint", every="1steps", **self.settings)
        trainer = fw.Trainer(max_steps=STEPS, callbacks=[saving], folder=folder, device="cpu")
        model = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8))
        data = fw.TensorSplit(torch.randn(12, 8), torch.randn(12, 8))
        optimizer = torch.optim.AdamW(model.parameters())
        trainer.fit(model, data, val=data, task=nn.MSELoss(), optimizer=optimizer, batch_size=4)
        return trainer

    def save(self, trainer: fw.Trainer, *, again: bool = False, better: bool = False) -> int:
        """Do what the callback does after one more step, or after another one with the same number."""
        random.seed(1)  # every fork gets a state of its own, and a checkpoint holds it
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
    """Every sort of save, on the training thread and off it."""
    found = []
    for background, where in {False: "", True: ", background"}.items():
        settings = {"keep": 9, "monitor": None, "background": background}
        found += [
            Case(f"new step{where}", settings),
            Case(f"same step again{where}", settings, again=True),
            Case(f"rotation{where}", settings | {"keep": 1}),
            Case(
                f"rotation, best{where}", settings | {"keep": 1, "monitor": "val/loss"}, better=True
            ),
        ]
    return found


class Rehearsal:
    """One case: the folder before the save, and what the save comes to undisturbed."""

    def __init__(self, case: Case, root: Path):
        self.case, self.before, self.place = case, root / "before", root / "place"
        self.trainer = case.start(self.before)
        self.old = contents(self.before / "checkpoints")
        self.set_up()
        self.calls, status = traced(self.save, self.place)
        if status != 0:
            raise RuntimeError(f"{case.name}: the undisturbed save failed")
        self.new = contents(self.place / "checkpoints")

    def set_up(self) -> None:
        """Lay out the folder as it was before the save, for a process that will fork."""
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.before, self.place, symlinks=True)
        self.trainer.folder = self.place
        self.trainer.callbacks[0].on_fit_start(self.trainer)

    def save(self) -> int:
        return self.case.save(self.trainer, again=self.case.again, better=self.case.better)

    def judge(self, status: int) -> tuple[str, list[str]]:
        """Return which checkpoint is the newest afterwards, the old or the new one, and all that is wrong."""
        folder = self.place / "checkpoints"
        wrong = [] if status in (0, REFUSED, -9) else [f"it ended with status {status}"]
        wrong += unreadable(folder)
        clean(folder)
        found, skipped = newest(folder)
        if found is None or skipped:
            return "none", [*wrong, "the newest is not good", *skipped]
        saved = {step_of(found): plain(load(found))}
        which = (
            "new"
            if saved == newest_of(self.new)
            else "old"
            if saved == newest_of(self.old)
            else "other"
        )
        if which == "other" or (status == 0 and which == "old"):
            wrong.append(f"the newest is {which} {found.name}, after status {status}")
        wrong += litter(folder)
        wrong += self.go_on_from(found)
        return which, wrong

    def go_on_from(self, found: Path) -> Iterator[str]:
        """A process that starts afresh goes on from there with one more save; yield what is wrong then."""

        def go_on() -> None:
            model, training = load(found)
            self.trainer.load_state_dict(training | {"model": model})
            self.trainer.callbacks[0].on_fit_start(self.trainer)
            if self.case.save(self.trainer):
                raise RuntimeError("it could not be saved")

        ended = status_of(fork(go_on))
        after = newest(found.parent)[0]
        if ended or after is None or step_of(after) != step_of(found) + 1:
            yield "the next save failed"
        elif best := load(after)[1]["callbacks"]["0:Checkpoint"].get("best"):
            link = found.parent / "best"
            if not link.is_symlink() or os.readlink(link) != folder_name(best[0][1]):
                yield f"after the next save, the best is of step {best[0][1]}, but the link does not lead there"


def contents(folder: Path) -> Contents:
    return {step_of(saved): plain(load(saved)) for saved in listed(folder)}


def newest_of(found: Contents) -> Contents:
    return {max(found): found[max(found)]}


def unreadable(folder: Path) -> Iterator[str]:
    """Yield what bears a final name and cannot be read."""
    for saved in listed(folder):
        try:
            load(saved)
        except CheckpointError as error:
            yield f"unreadable under a final name: {error}"
    best = folder / "best"
    if best.is_symlink() and best.resolve() not in [saved.resolve() for saved in listed(folder)]:
        yield f"best leads to {os.readlink(best)}, which is not there"


def litter(folder: Path) -> Iterator[str]:
    """Yield what `clean` has left and is neither a checkpoint nor the link to the best one."""
    known = {"best", *(saved.name for saved in listed(folder))}
    for saved in folder.iterdir():
        if saved.name not in known:
            yield f"litter: {saved.name} {sorted(os.listdir(saved)) if saved.is_dir() else ''}".rstrip()


def faults(calls: list[Call], chance: random.Random) -> Iterator[Fault]:
    """Yield every fault: before, after and instead of each call, and each write cut at some lengths."""
    for at, call in enumerate(calls):
        yield Fault(at, "killed before")
        for _ in range(CUTS if call.length > 1 else 0):
            yield Fault(at, "killed within", chance.randrange(1, call.length))
        yield Fault(at, "killed after")
        yield Fault(at, "no room")


@dataclass
class Tally:
    """What came of all points of a case."""

    name: str
    points: Counter[str] = field(default_factory=Counter)
    newest: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, how: str, where: str, which: str, wrong: list[str]) -> None:
        self.points[how] += 1
        self.newest[which] += 1
        self.wrong += [f"{how} {where}: {each}" for each in wrong]

    def __str__(self) -> str:
        points = ", ".join(f"{count} {how}" for how, count in self.points.items())
        verdict = f"{len(self.wrong)} WRONG: {self.wrong[0]}" if self.wrong else "all good"
        newest = f"old/new one is the newest: {self.newest['old']}/{self.newest['new']}"
        return f"{self.name:<28} {points}; {newest}; {verdict}"


def in_place(written: Path, final: Path) -> Path:
    """Give a checkpoint its name as the negative control does: file by file."""
    shutil.rmtree(final, ignore_errors=True)
    shutil.copytree(written, final)
    shutil.rmtree(written)
    return final


def disturb(
    case: Case, chance: random.Random, sorts: Sequence[How] = get_args(How), every: int = 1
) -> Tally:
    """Go through every fault (or every n-th one) of some sorts, each on a fresh copy of the folder."""
    tally = Tally(case.name)
    with tempfile.TemporaryDirectory(prefix="campaign-") as root:
        rehearsal = Rehearsal(case, Path(root))
        for fault in [each for each in faults(rehearsal.calls, chance) if each.how in sorts][
            ::every
        ]:
            rehearsal.set_up()
            calls, status = traced(rehearsal.save, rehearsal.place, fault)
            which, wrong = rehearsal.judge(status)
            if fault.how != "no room" and status != -9:
                wrong.append("it was not killed")
            tally.add(fault.how, f"call {fault.at} ({calls[fault.at].name})", which, wrong)
    return tally


def fill_up(case: Case) -> Tally | str:
    """Save on a disk that is really full, with 0, 1, 2 ... pages left until it suffices; or why none can be had."""
    with tempfile.TemporaryDirectory(prefix="campaign-") as root:
        told = Path(root) / "told.json"
        if status_of(fork(lambda: told.write_text(json.dumps(on_a_small_disk(case, Path(root)))))):
            return Tally(case.name, wrong=["the campaign itself failed"])
        tally = json.loads(told.read_text(encoding="utf-8"))
        return (
            tally
            if isinstance(tally, str)
            else Tally(case.name, Counter(tally[0]), Counter(tally[1]), tally[2])
        )


def on_a_small_disk(case: Case, root: Path) -> Any:
    mounted = root / "disk"
    mounted.mkdir()
    try:
        mount(mounted, DISK)
    except OSError as error:
        return f"  skipped: no small disk may be mounted here: {error.strerror}"
    tally = filled_up(case, mounted)
    return tally.points, tally.newest, tally.wrong


def filled_up(case: Case, disk: Path) -> Tally:
    tally, rehearsal = Tally(case.name), Rehearsal(case, disk)
    for pages in range(DISK // PAGE):
        rehearsal.set_up()
        with pages_left(disk, pages):
            _, status = traced(rehearsal.save, rehearsal.place)
        which, wrong = rehearsal.judge(status)
        tally.add("full disk", f"with {pages} pages left", which, wrong)
        if status == 0:
            return tally
    tally.wrong.append("no save succeeded, though there was room")
    return tally


def saves(seed: int, control: bool, only: str = "") -> int:
    """Run the campaign, of the cases with such a name only, and return its exit status.

    control: a checkpoint gets its name file by file.
    """
    if why := supported():
        print(f"skipped: {why}")
        return 0
    if control:
        writing.publish = in_place
    chance, tallies = random.Random(seed), list[Tally]()
    for case in cases():
        if only not in case.name:
            continue
        for tally in (disturb(case, chance), fill_up(case)):
            print(tally, flush=True)
            tallies += [tally] if isinstance(tally, Tally) else []
    points, wrong = (
        sum(tally.points.total() for tally in tallies),
        [each for tally in tallies for each in tally.wrong],
    )
    print(f"{len(wrong)} of {points} points left something wrong")
    return int(bool(wrong))
