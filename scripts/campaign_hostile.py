"""Makes hostile run and sweep folders, and gives each to every command that reads one.

Nothing in such a folder may be executed; nothing outside it may be written, or read into an output; no command may
hang, end in a traceback, or need much memory; and an unrelated run in the same root must not notice it.
"""

import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy
import torch
import yaml
from campaign_mutations import (
    CLASSES,
    ESCAPES,
    TRAINING,
    Payload,
    World,
    alias_bomb,
    exchanged,
    replace,
    set_in_config,
    sign,
    take_away,
)
from campaign_sandbox import (
    KINDS,
    Ended,
    age,
    ask_board,
    changes,
    faults,
    holds,
    last_line,
    program,
    run,
    snapshot,
    times_of_access,
)

TOKEN = "TOKEN5e3c1b0f9a"
REAL = 0.05  # of the commands are run by the real program
BOARD = 0.12  # of the folders are shown to TensorBoard
COMMON = ["data=blobs", "model.width=8", "model.depth=1", "loggers.tensorboard.graph=false"]
OWN = [*COMMON, "data.samples=160", "trainer.max_epochs=2", "callbacks.checkpoint.background=false"]
OTHER = [*COMMON, "data.samples=150", "trainer.max_epochs=1"]
GRID = ["seed=0,1"]
SEARCH = ["hydra/sweeper=optuna", "optimizer.lr=interval(0.001,0.1)", "hydra.sweeper.trials=2"]
RUN, INPUT = "runs/default/victim", "inputs.npy"


def run_commands(kind: str) -> dict[str, list[str]]:
    """Return the commands that read a run, by name."""
    return {
        "eval": ["eval", RUN],
        "eval last": ["eval", RUN, "--checkpoint", "last", "--json"],
        "eval step": ["eval", f"{RUN}/checkpoints/step-STEP"],
        "predict": ["predict", RUN, "--input", INPUT, "--output", "-"],
        "resume": ["resume", RUN],
        "resume more": ["resume", RUN, "trainer.max_epochs=3"],
        "same auto": ["train", *OWN, "resume=auto"],
        "named auto": ["train", *OWN, "resume=auto", "run.name=victim"],
        "resume=RUN": ["train", *OWN, f"resume={RUN}"],
        "unrelated auto": ["train", *OTHER, "resume=auto"],
        "unrelated sweep auto": ["train", "-m", *OTHER, *GRID, "resume=auto"],
        "init_from": ["train", *OTHER, f"init_from={RUN}", "run.name=warm"],
        "plan resume": ["plan", *OWN, f"resume={RUN}"],
        "check init_from": ["check", *OTHER, f"init_from={RUN}"],
        "find lr init_from": ["find", "lr", *OTHER, f"init_from={RUN}"],
    }


def sweep_commands(kind: str) -> dict[str, list[str]]:
    """Return the commands that read a sweep, by name."""
    swept = GRID if kind == "grid" else SEARCH
    return {
        "eval best": ["eval", f"{RUN}/best"],
        "eval sweep": ["eval", RUN],
        "predict best": ["predict", f"{RUN}/best", "--input", INPUT, "--output", "-"],
        "resume trial": ["resume", f"{RUN}/TRIAL", "trainer.max_epochs=3"],
        "resume best": ["resume", f"{RUN}/best"],
        "sweep by name": ["train", "-m", *OWN, *swept, "resume=auto", "sweep.name=victim"],
        "sweep auto": ["train", "-m", *OWN, *swept, "resume=auto"],
        "unrelated sweep auto": ["train", "-m", *OTHER, *GRID, "resume=auto"],
        "unrelated auto": ["train", *OTHER, "resume=auto"],
        "init_from best": ["train", *OTHER, f"init_from={RUN}/best", "run.name=warm"],
    }


READING = ("eval", "predict", "plan", "unrelated")  # verbs that train nothing of the hostile config
REFUSED = ("eval sweep", "board")  # also of a genuine folder; the board is ended by a signal
MOST_HANGS = 3  # of a folder, whose other commands are then left out
FEW = (
    "check init_from",
    "find lr init_from",
    "resume=RUN",
    "eval last",
    "eval sweep",
    "plan resume",
)


@dataclass
class Failure:
    kind: str
    command: str
    detail: str


@dataclass
class Outcome:
    """What the commands did with a folder."""

    number: int
    name: str  # of the class of its first mutation
    base: str
    notes: list[str] = field(default_factory=list)
    commands: int = 0
    accepted: int = 0
    slowest: float = 0.0
    failures: list[Failure] = field(default_factory=list)


# genuine folders


def templates(root: Path) -> dict[str, Path]:
    """Make the genuine folders: a run cut off after an epoch, a finished one, a sweep, a search."""
    made: dict[str, Path] = {}
    for kind in ("stopped", "done", "grid", "search"):
        world = root / kind
        empty(world)
        extra = {
            "grid": ["-m", *GRID, "sweep.name=victim"],
            "search": ["-m", *SEARCH, "sweep.name=victim"],
        }
        arguments = ["train", *OWN, *extra.get(kind, ["run.name=victim"])]
        ended = run(command_of(arguments), world, environment(world))
        if ended.status != 0:
            raise SystemExit(f"the genuine folder {kind} cannot be made: {ended.err}")
        made[kind] = world / "work" / RUN
        if kind == "stopped":
            cut_off(made[kind])
        with_token(made[kind], root / f"{kind}-twin")
    return made


def cut_off(folder: Path) -> None:
    """Leave of a run what a kill in its second epoch leaves."""
    steps = sorted((folder / "checkpoints").glob("step-*"))
    first = int(steps[0].name[5:])
    shutil.rmtree(steps[-1])
    (folder / "checkpoints/best").unlink()
    (folder / "checkpoints/best").symlink_to(steps[0].name)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if int(re.search(r'"step": (\d+)', line)[1]) <= first]  # type: ignore[index]
    (folder / "metrics.jsonl").write_text("".join(kept))
    status = (folder / "status.json").read_text().replace('"done"', '"running"')
    (folder / "status.json").write_text(status)


def with_token(folder: Path, copy: Path) -> None:
    """Copy a genuine folder; the copy's files hold the token, in places that commands print."""
    shutil.copytree(folder, copy, symlinks=True)
    for path in copy.rglob("*"):
        if (
            path.is_symlink()
            or path.suffix not in (".json", ".jsonl", ".yaml")
            or path.name == "MANIFEST.json"
        ):
            continue
        text = path.read_text()
        text = text.replace("name: victim", f"name: {TOKEN}").replace(
            '"plugins": []', f'"plugins": ["{TOKEN}.py"]'
        )
        text = text.replace('"0",', f'"{TOKEN}",').replace(
            '"val/loss"', f'"val/{TOKEN}": 1, "val/loss"'
        )
        path.write_text(text.replace('"reason": null', f'"reason": "{TOKEN}"'))


def empty(world: Path) -> None:
    for name in ("work", "home", "outside", "proof", "tmp", "cache", "config"):
        (world / name).mkdir(parents=True)
    numpy.save(world / "work" / INPUT, numpy.array([[0.5, 1.5], [-1, 2]], dtype=numpy.float32))


def environment(world: Path) -> dict[str, str]:
    named = {
        "HOME": "home",
        "XDG_CACHE_HOME": "cache",
        "XDG_CONFIG_HOME": "config",
        "TMPDIR": "tmp",
    }
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL") if name in os.environ}
    values = {
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
        "SECRET": TOKEN,
        "XDG_DATA_HOME": str(world / "config"),
    }
    return kept | values | {name: str(world / folder) for name, folder in named.items()}


def command_of(arguments: list[str]) -> Callable[[], Any]:
    """Return the work of a command in a process that has imported what it needs."""

    def work() -> Any:
        from framework.cli.main import main

        tempfile.tempdir = None
        main(arguments)

    return work


# hostile folders


def make_world(
    root: Path, genuine: dict[str, Path], seed: int, number: int
) -> tuple[World, Outcome]:
    """Make the world with the folder of this number, always the same."""
    chance = random.Random(f"{seed}-{number}")
    cases = list(CASES.items())
    names = list(CLASSES)
    if number < len(cases):
        name, (base, mutate) = cases[number]
        first = [mutate]
    else:
        name = names[number % len(names)]
        bases = ["stopped"] * 5 + ["done"] * 2 + ["grid", "search"]
        base = chance.choice(["grid", "search"] if name == "folders elsewhere" else bases)
        first = [chance.choice(CLASSES[name])]
        for _ in range(chance.choice([0, 0, 0, 1, 2])):
            first.append(chance.choice(CLASSES[chance.choice(names)]))
    world = World(root, TOKEN, base in ("grid", "search"), chance)
    empty(root)
    fill(world, genuine[base])
    for mutate in first:
        try:
            mutate(world)
        except Exception as error:  # because of what another mutation has done
            world.note(f"{mutate.__name__} was not possible: {type(error).__name__}: {error}")
    age([world.outside, root / "home"])
    return world, Outcome(number, name, base, world.notes)


def fill(world: World, genuine: Path) -> None:
    """Copy a genuine run, and make what no command may touch."""
    shutil.copytree(genuine, world.run, symlinks=True)
    out, home = world.outside, world.root / "home"
    shutil.copytree(
        genuine.parents[3].with_name(f"{genuine.parents[3].name}-twin"), out / "twin", symlinks=True
    )
    (home / ".ssh").mkdir()
    (home / ".ssh/id").write_text(f"{TOKEN}\n")
    (home / ".bashrc").write_text(f"# {TOKEN}\n")
    (out / "secret.txt").write_text(f"{TOKEN}\n" * 3)
    (out / "secret.json").write_text(f'{{"status": "{TOKEN}", "{TOKEN}": 1}}\n')
    (out / "secret.csv").write_text(f"a,label\n1,0\n{TOKEN},1\n")
    (out / "empty").touch()
    os.mkfifo(out / "fifo")
    (out / "folder").mkdir()
    (out / "folder/file").write_text(f"{TOKEN}\n")
    world.plugin.write_text(f"open({str(world.proof)!r}, 'w')\n")


# the cases that were found by hand


def diff_of_bytes(world: World) -> None:
    """A git repository whose uncommitted diff is no UTF-8, and whose config names commands."""
    work = world.root / "work"
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x", "-c", "commit.gpgsign=false"]
    (work / "notes.txt").write_bytes(b"caf\xe9\n")
    for words in (["init", "-q"], ["add", "notes.txt"], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *words], cwd=work, check=False, capture_output=True)
    (work / "notes.txt").write_bytes(b"caf\xe9s\n")
    hook = world.root / "hook"
    hook.write_text(f"#!/bin/sh\ntouch {world.proof}\n")
    hook.chmod(0o755)
    with (work / ".git/config").open("a") as file:
        file.write(f"[core]\n\tfsmonitor = {hook}\n[diff]\n\texternal = {hook}\n")
    world.note("a git diff that is no UTF-8, fsmonitor and external diff that run commands")


def links_at_written_names(world: World, *names: str) -> None:
    for name in names:
        path = world.run / name
        take_away(path)
        path.symlink_to(world.outside / "secret.txt")
        world.note(f"{name} -> outside/secret.txt")


def untouched(world: World) -> None:
    """A folder to which nothing was done; every command must accept it."""
    world.note("nothing")


def links_to_twin(world: World, *names: str) -> None:
    for name in names:
        take_away(world.run / name)
        (world.run / name).symlink_to(world.outside / "twin" / name)
        world.note(f"{name} -> outside/twin/{name}")


def later_lines(world: World) -> None:
    """Lines of metrics after the checkpoint, so that the file is written anew."""
    torn_line(world, b'{"step": 99, "epoch": 9, "wall_seconds": 9, "val/loss": 1}\n')
    links_at_written_names(world, "metrics.jsonl.new", "metrics.jsonl.tmp")


def fifo(world: World) -> None:
    take_away(world.run / "status.json")
    os.mkfifo(world.run / "status.json")
    world.note("status.json is a FIFO")


def hole(world: World) -> None:
    os.truncate(world.run / "status.json", 2**31 - 2**20)
    world.note("status.json has 2 GB, a hole")


def code_in_state(world: World) -> None:
    exchanged(world.checkpoint / TRAINING, pickle.dumps(Payload(world.proof)))
    sign(world.checkpoint)
    world.note(f"{TRAINING}: a pickle that runs a command, signed")


def shell_start(world: World) -> None:
    """A config that is rewritten through a link to ~/.bashrc, with a command as a setting."""
    path = world.run / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    del tree["trainer"]["log_every"]
    path.write_text(yaml.safe_dump(tree | {"init_from": f"$(touch {world.proof})"}))
    (world.run / "config.yaml.tmp").symlink_to(world.root / "home/.bashrc")
    world.note("config.yaml.tmp -> ~/.bashrc, init_from=$(touch ...)")


def alias_bombs(world: World) -> None:
    path = world.run / "config.yaml"
    replace(path, path.read_text() + alias_bomb(10))
    world.note("config.yaml: alias bomb of 10^10 values")


def torn_line(world: World, line: bytes) -> None:
    with (world.run / "metrics.jsonl").open("ab") as file:
        file.write(line)
    world.note(f"metrics.jsonl: ends in {line!r}")


def forged_names(world: World) -> None:
    """Control characters in a config, its keys, metrics, plugins and classes."""
    set_in_config(world, {f"model.{ESCAPES}": 1, "optimizer.lr": ESCAPES})


def forged_metrics(world: World) -> None:
    torn_line(world, json.dumps({"step": 99, f"val/{ESCAPES}": 1.0}).encode() + b"\n")
    file = world.run / "provenance.json"
    file.write_text(
        json.dumps(
            json.loads(file.read_text()) | {"plugins": [f"x.py; touch {world.proof} #", ESCAPES]}
        )
    )
    facts = world.run / "facts.json"
    facts.write_text(facts.read_text().replace('"0"', json.dumps(ESCAPES), 1))
    world.note("names with control characters in metrics, plugins and classes")


CASES: dict[str, tuple[str, Callable[[World], None]]] = {
    "case: git diff": ("stopped", diff_of_bytes),
    "case: link .lock": ("stopped", lambda world: links_at_written_names(world, ".lock")),
    "case: link status.tmp": ("stopped", lambda world: links_at_written_names(world, "status.tmp")),
    "case: link config.yaml.tmp": (
        "stopped",
        lambda world: links_at_written_names(world, "config.yaml.tmp"),
    ),
    "case: link status.json.tmp": (
        "stopped",
        lambda world: links_at_written_names(world, "status.json.tmp"),
    ),
    "case: link metrics.jsonl.new": ("stopped", later_lines),
    "case: link status.json": (
        "stopped",
        lambda world: links_to_twin(world, "status.json", "facts.json"),
    ),
    "case: link checkpoints": ("stopped", lambda world: links_to_twin(world, "checkpoints")),
    "case: link to .bashrc": ("stopped", shell_start),
    "case: alias bomb": ("stopped", alias_bombs),
    "case: genuine run": ("stopped", untouched),
    "case: genuine sweep": ("grid", untouched),
    "case: genuine search": ("search", untouched),
    "case: FIFO": ("stopped", fifo),
    "case: large hole": ("stopped", hole),
    "case: pickle": ("stopped", code_in_state),
    "case: torn line": ("done", lambda world: torn_line(world, b'{"step": 40, "ep')),
    "case: line of other bytes": (
        "done",
        lambda world: torn_line(world, b'{"step": 40, "caf\xe9": 1}\n'),
    ),
    "case: forged config": ("stopped", forged_names),
    "case: forged metrics": ("done", forged_metrics),
}


# one folder


def commands_for(
    world: World, outcome: Outcome, chance: random.Random | None
) -> Iterator[tuple[str, list[str]]]:
    """Yield the commands that a folder is given to; chance: that leaves some out."""
    every = sweep_commands(outcome.base) if world.sweep else run_commands(outcome.base)
    case = outcome.name.startswith("case")
    for name, words in every.items():
        few = chance is not None and not case and chance.random() > (0.2 if name in FEW else 0.65)
        training = world.endless and not name.startswith(READING) and name != "resume more"
        if not few and not training:
            yield name, words


def filled_in(words: list[str], world: World) -> list[str]:
    step = world.place("checkpoints/step-2").name[5:]
    return [word.replace("STEP", step).replace("TRIAL", world.trial.name) for word in words]


def attack(
    root: Path,
    genuine: dict[str, Path],
    seed: int,
    only: str | None,
    most: int | None,
    access: bool,
    number: int,
) -> Outcome:
    """Make a folder, and run commands on it, each time on a fresh one. most: so many of them."""
    chance = random.Random(f"commands {seed}-{number}")
    where = root / f"{number}"
    world, outcome = make_world(where, genuine, seed, number)
    wanted = list(commands_for(world, outcome, chance if only is None else None))
    about_events = outcome.name.startswith(("events", "links", "hard", "special"))
    if only == "board" or chance.random() < (4 * BOARD if about_events else BOARD):
        wanted.append(("board", ["board", "--port", "0"]))
    if only is None and most is not None and len(wanted) > most:
        wanted = chance.sample(wanted, most)
    for name, words in wanted:
        real = chance.random() < REAL
        hangs = sum(failure.kind == "hang" for failure in outcome.failures)
        if (only is not None and name != only) or hangs >= MOST_HANGS:
            continue
        shutil.rmtree(where, ignore_errors=True)
        world, _ = make_world(where, genuine, seed, number)
        one_command(world, outcome, name, filled_in(words, world), real, access)
        keep = world.root.with_name(f"{number}-{name.replace(' ', '-').replace('=', '-')}")
        if only is not None:
            shutil.rmtree(keep, ignore_errors=True)
            os.rename(where, keep)
    shutil.rmtree(where, ignore_errors=True)
    return outcome


def one_command(
    world: World, outcome: Outcome, name: str, words: list[str], real: bool, access: bool
) -> None:
    talk = ask_board if words[0] == "board" else None
    work = program(words) if real else command_of(words)
    ended, wrong = judge(world, work, access, talk)
    outcome.commands += 1
    outcome.accepted += ended.status == 0
    outcome.slowest = max(outcome.slowest, ended.cpu)
    unharmed = name.startswith("unrelated") or outcome.name.startswith("case: genuine")
    if unharmed and ended.status != 0 and not ended.hang and name not in REFUSED:
        wrong.append(("others", f"exit status {ended.status}: {last_line(ended)}"))
    for kind, detail in wrong:
        outcome.failures.append(Failure(kind, name, detail.replace(str(world.root), "WORLD")))


def judge(
    world: World, work: Callable[[], Any], access: bool, talk: Any = None
) -> tuple[Ended, list[tuple[str, str]]]:
    """Run a command in a world, and return what it did wrong, by kind.

    Args:
        world: the scratch folder.
        work: see `campaign_sandbox.run`.
        access: whether times of access tell that a file was read.
        talk: see `campaign_sandbox.run`.
    """
    watched = [world.outside, world.root / "home"]
    before = snapshot(watched)
    age(watched)  # to look was an access
    links = {(status.st_dev, status.st_ino) for status in map(os.lstat, before)}
    token = TOKEN.encode()
    earlier = set(holds(world.root / "work", token, links))
    age(watched)
    ended = run(work, world.root, environment(world.root), talk)
    wrong = faults(ended, "" if world.names_data else TOKEN)
    written, read = changes(before, snapshot(watched))
    wrong += [("written", each) for each in written[:3]]
    if access and not world.names_data:
        wrong += [("read", each) for each in read[:3]]
    for path in sorted(set(holds(world.root / "work", token, links)) - earlier)[:3]:
        wrong.append(("read", f"the token is in {path}"))
    if any((world.root / "proof").iterdir()):
        wrong.append(("executed", "the proof was made"))
    return ended, wrong


# the campaign


def hostile(
    folders: int,
    seed: int,
    control: bool,
    only: str | None = None,
    most: int | None = None,
    jobs: int = 1,
) -> int:
    """Run the campaign and return its exit status.

    Args:
        folders: how many; the first are the fixed cases.
        seed: of the mutations and the choice of commands.
        control: without the protections: failures must be found.
        only: NUMBER or NUMBER:COMMAND, whose folders are kept.
        most: commands for each folder; None: about two thirds of all.
        jobs: folders at the same time.
    """
    import_all()
    root, began = Path(tempfile.mkdtemp(prefix="hostile-")), time.monotonic()
    access = times_of_access(root)
    if not access:
        print(
            "the file system keeps no times of access: that a file is read shows only by what is in outputs"
        )
    if control:
        switch_off()
    genuine = templates(root / "genuine")
    number, _, command = (only or "").partition(":")
    numbers = [int(number)] if only else list(range(folders))
    work = partial(attack, root, genuine, seed, command or None, most, access)
    outcomes: list[Outcome] = []
    for outcome in spread(work, numbers, jobs):
        outcomes.append(outcome)
        for line in lines_of(outcome, seed):
            print(line, flush=True)
    print(*summary(outcomes), sep="\n")
    print(f"  {time.monotonic() - began:.0f} s" + (f"; the folders are in {root}" if only else ""))
    if not only:
        shutil.rmtree(root, ignore_errors=True)
    if control:
        found = {failure.kind for outcome in outcomes for failure in outcome.failures}
        print(
            f"without the protections, found are: {', '.join(kind for kind in KINDS if kind in found)}"
        )
    return int(any(outcome.failures for outcome in outcomes))


def spread(work: Callable[[int], Outcome], numbers: list[int], jobs: int) -> Iterator[Outcome]:
    if jobs == 1:
        yield from map(work, numbers)
        return
    with ProcessPoolExecutor(jobs, get_context("fork")) as pool:
        for future in as_completed([pool.submit(work, number) for number in numbers]):
            yield future.result()


def import_all() -> None:
    """Import what commands import, so that no child has to."""
    import framework.cli.board
    import framework.cli.main
    import framework.cli.output
    import framework.experiment.check
    import framework.experiment.experiment
    import framework.experiment.load
    import framework.experiment.plan
    import framework.tuning.search.study
    import framework.tuning.sweep.sweep  # noqa: F401
    from framework.registry.discovery import discover

    discover()


def switch_off() -> None:
    """For the control: open files as Python does, without limits, and unpickle whatever is there."""
    from framework.system import files

    unguarded = {
        files.open_file: open_plainly,
        files.write_file: write_plainly,
        files.check_tree: lambda content, path: None,
        files.check_yaml: lambda events, path: None,
    }
    for module in list(sys.modules.values()):
        if not getattr(module, "__name__", "").startswith(("framework", "framework_plugins")):
            continue
        for name, value in list(vars(module).items()):
            if callable(value) and isinstance(value, FunctionType) and value in unguarded:
                setattr(module, name, unguarded[value])
    load = torch.load
    torch.load = lambda *given, **named: load(*given, **{**named, "weights_only": False})


def open_plainly(folder: Path, name: str, mode: str = "r", most: int | None = None) -> Any:
    how = {"r": "rb", "r+": "r+b", "a": "a+b", "x": "xb"}[mode]
    return open(folder / name, how, buffering=-1 if mode == "r" else 0)


def write_plainly(folder: Path, name: str, content: bytes | str) -> None:
    data = (
        content.encode("utf-8", errors="backslashreplace") if isinstance(content, str) else content
    )
    temporary = folder / f"{name}.tmp"
    temporary.write_bytes(data)
    os.replace(temporary, folder / name)


def lines_of(outcome: Outcome, seed: int) -> Iterator[str]:
    for failure in outcome.failures:
        again = f"--only '{outcome.number}:{failure.command}' --seed {seed}"
        what = f"{failure.kind:<9} {outcome.name} ({outcome.base}) | {failure.command} | {failure.detail!r:.240}"
        yield f"{what} | {'; '.join(outcome.notes)} | {again}"


def class_of(outcome: Outcome) -> str:
    return "cases" if outcome.name.startswith("case") else outcome.name


def failed(outcome: Outcome, kind: str) -> int:
    """Return how many commands failed so."""
    return len({failure.command for failure in outcome.failures if failure.kind == kind})


def summary(outcomes: list[Outcome]) -> Iterator[str]:
    """Yield a line for each class of mutations, with the number of commands that did each wrong thing."""
    titles = "".join(f"{title:>10}" for title in ("folders", "commands", "accepted", *KINDS))
    yield f"{'':<26}{titles}  slowest"
    names = list(dict.fromkeys(class_of(outcome) for outcome in outcomes))
    for name in [*names, "all"]:
        of = [outcome for outcome in outcomes if name in ("all", class_of(outcome))]
        counts = [
            len(of),
            sum(outcome.commands for outcome in of),
            sum(outcome.accepted for outcome in of),
        ]
        counts += [sum(failed(outcome, kind) for outcome in of) for kind in KINDS]
        cells = "".join(f"{count:>10}" for count in counts)
        yield f"{name:<26}{cells}  {max(outcome.slowest for outcome in of):.1f} s CPU"
