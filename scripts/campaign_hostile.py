"""Create hostile run and sweep folders, and run all commands that read such folders.

No command may execute content of the folder, write outside it, show files from outside, hang, end
with a traceback or need much memory. Unrelated runs in the same root must work.
"""

import json
import os
import pickle
import random
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
    files_with,
    last_line,
    program,
    run,
    snapshot,
    times_of_access,
)

TOKEN = "TOKEN5e3c1b0f9a"
REAL = 0.05  # share of commands that the real program runs
BOARD = 0.12  # share of folders that TensorBoard reads
COMMON = ["data=blobs", "model.width=8", "model.depth=1", "loggers.tensorboard.graph=false"]
OWN = [*COMMON, "data.samples=160", "trainer.max_epochs=2", "callbacks.checkpoint.background=false"]
OTHER = [*COMMON, "data.samples=150", "trainer.max_epochs=1"]
GRID = ["seed=0,1"]
SEARCH = ["hydra/sweeper=optuna", "optimizer.lr=interval(0.001,0.1)", "hydra.sweeper.trials=2"]
RUN = "runs/default/victim"
INPUT = "inputs.npy"


def run_commands() -> dict[str, list[str]]:
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


READING = ("eval", "predict", "plan", "unrelated")  # commands that do not train the hostile config
REFUSED = ("eval sweep", "board")  # fail with a genuine folder too (a signal ends the board)
MOST_HANGS = 3  # of a folder; its other commands are skipped
FEW = (  # commands that are seldom selected
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
    """The results of the commands with one folder.

    Args:
        name: Name of the class of its first mutation.
        base: Name of the genuine folder.
    """

    number: int
    name: str
    base: str
    notes: list[str] = field(default_factory=list)
    commands: int = 0
    accepted: int = 0
    slowest: float = 0.0
    failures: list[Failure] = field(default_factory=list)


# genuine folders


def templates(root: Path) -> dict[str, Path]:
    """Create the genuine folders: an interrupted run, a complete run, a sweep, a search."""
    overrides = {
        "stopped": ["run.name=victim"],
        "done": ["run.name=victim"],
        "grid": ["-m", *GRID, "sweep.name=victim"],
        "search": ["-m", *SEARCH, "sweep.name=victim"],
    }
    folders: dict[str, Path] = {}
    for kind, own in overrides.items():
        world = root / kind
        make_folders(world)
        ended = run(command_of(["train", *OWN, *own]), world, environment(world))
        if ended.status != 0:
            raise SystemExit(f"the genuine folder {kind} cannot be created: {ended.err}")
        folders[kind] = world / "work" / RUN
        if kind == "stopped":
            interrupt(folders[kind])
        copy_with_token(folders[kind], root / f"{kind}-twin")
    return folders


def interrupt(folder: Path) -> None:
    """Change a complete run to the state after a kill in its second epoch."""
    steps = sorted((folder / "checkpoints").glob("step-*"))
    first = int(steps[0].name[5:])
    shutil.rmtree(steps[-1])
    (folder / "checkpoints/best").unlink()
    (folder / "checkpoints/best").symlink_to(steps[0].name)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= first]
    (folder / "metrics.jsonl").write_text("".join(kept))
    status = (folder / "status.json").read_text().replace('"done"', '"running"')
    (folder / "status.json").write_text(status)


def copy_with_token(folder: Path, copy: Path) -> None:
    """Copy a genuine folder, with the token in values that commands print."""
    replacements = {
        "name: victim": f"name: {TOKEN}",
        '"plugins": []': f'"plugins": ["{TOKEN}.py"]',
        '"0",': f'"{TOKEN}",',
        '"val/loss"': f'"val/{TOKEN}": 1, "val/loss"',
        '"reason": null': f'"reason": "{TOKEN}"',
    }
    shutil.copytree(folder, copy, symlinks=True)
    for path in copy.rglob("*"):
        if path.is_symlink() or path.name == "MANIFEST.json":
            continue
        if path.suffix in (".json", ".jsonl", ".yaml"):
            text = path.read_text()
            for old, new in replacements.items():
                text = text.replace(old, new)
            path.write_text(text)


def make_folders(world: Path) -> None:
    for name in ("work", "home", "outside", "proof", "tmp", "cache", "config"):
        (world / name).mkdir(parents=True)
    numpy.save(world / "work" / INPUT, numpy.array([[0.5, 1.5], [-1, 2]], dtype=numpy.float32))


def environment(world: Path) -> dict[str, str]:
    inherited = {
        name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL") if name in os.environ
    }
    return inherited | {
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
        "SECRET": TOKEN,
        "HOME": str(world / "home"),
        "XDG_CACHE_HOME": str(world / "cache"),
        "XDG_CONFIG_HOME": str(world / "config"),
        "XDG_DATA_HOME": str(world / "config"),
        "TMPDIR": str(world / "tmp"),
    }


def command_of(arguments: list[str]) -> Callable[[], Any]:
    """Return a function that runs a command in this process, without imports."""

    def work() -> Any:
        from framework.cli.main import main

        tempfile.tempdir = None
        main(arguments)

    return work


# hostile folders


def make_world(
    root: Path, genuine: dict[str, Path], seed: int, number: int
) -> tuple[World, Outcome]:
    """Create the scratch folder with this number; the content depends only on seed and number."""
    chance = random.Random(f"{seed}-{number}")
    cases = list(CASES.items())
    names = list(CLASSES)
    if number < len(cases):
        name, (base, mutate) = cases[number]
        mutations = [mutate]
    else:
        name = names[number % len(names)]
        bases = ["stopped"] * 5 + ["done"] * 2 + ["grid", "search"]
        base = chance.choice(["grid", "search"] if name == "folders elsewhere" else bases)
        mutations = [chance.choice(CLASSES[name])]
        for _ in range(chance.choice([0, 0, 0, 1, 2])):
            mutations.append(chance.choice(CLASSES[chance.choice(names)]))
    world = World(root, TOKEN, base in ("grid", "search"), chance)
    make_folders(root)
    fill(world, genuine[base])
    for mutate in mutations:
        try:
            mutate(world)
        except Exception as error:  # after another mutation
            world.note(f"{mutate.__name__} was not possible: {type(error).__name__}: {error}")
    age([world.outside, root / "home"])
    return world, Outcome(number, name, base, world.notes)


def fill(world: World, genuine: Path) -> None:
    """Copy a genuine run, and create the files that no command may touch."""
    shutil.copytree(genuine, world.run, symlinks=True)
    out = world.outside
    home = world.root / "home"
    genuine_world = genuine.parents[3]
    twin = genuine_world.with_name(f"{genuine_world.name}-twin")
    shutil.copytree(twin, out / "twin", symlinks=True)
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


# cases found by hand


def diff_of_bytes(world: World) -> None:
    """Create a git repository with a diff that is not UTF-8 and a config that runs commands."""
    work = world.root / "work"
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x", "-c", "commit.gpgsign=false"]
    (work / "notes.txt").write_bytes(b"caf\xe9\n")
    for arguments in (["init", "-q"], ["add", "notes.txt"], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *arguments], cwd=work, check=False, capture_output=True)
    (work / "notes.txt").write_bytes(b"caf\xe9s\n")
    hook = world.root / "hook"
    hook.write_text(f"#!/bin/sh\ntouch {world.proof}\n")
    hook.chmod(0o755)
    with (work / ".git/config").open("a") as file:
        file.write(f"[core]\n\tfsmonitor = {hook}\n[diff]\n\texternal = {hook}\n")
    world.note("a git diff that is not UTF-8, fsmonitor and external diff that run commands")


def links_at_written_names(world: World, *names: str) -> None:
    for name in names:
        path = world.run / name
        take_away(path)
        path.symlink_to(world.outside / "secret.txt")
        world.note(f"{name} -> outside/secret.txt")


def untouched(world: World) -> None:
    """Change nothing; every command must accept the folder."""
    world.note("nothing")


def links_to_twin(world: World, *names: str) -> None:
    for name in names:
        take_away(world.run / name)
        (world.run / name).symlink_to(world.outside / "twin" / name)
        world.note(f"{name} -> outside/twin/{name}")


def later_lines(world: World) -> None:
    """Add lines of metrics after the checkpoint, so that the file is rewritten."""
    torn_line(world, b'{"step": 99, "epoch": 9, "wall_seconds": 9, "val/loss": 1}\n')
    links_at_written_names(world, "metrics.jsonl.new", "metrics.jsonl.tmp")


def fifo(world: World) -> None:
    take_away(world.run / "status.json")
    os.mkfifo(world.run / "status.json")
    world.note("status.json is a FIFO")


def hole(world: World) -> None:
    os.truncate(world.run / "status.json", 2**31 - 2**20)
    world.note("status.json has a hole of 2 GB")


def code_in_state(world: World) -> None:
    exchanged(world.checkpoint / TRAINING, pickle.dumps(Payload(world.proof)))
    sign(world.checkpoint)
    world.note(f"{TRAINING}: a pickle that runs a command, signed")


def shell_start(world: World) -> None:
    """Add a link from the temporary config to ~/.bashrc, and a command as a setting."""
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
    """Add control characters to keys and values of the config."""
    set_in_config(world, {f"model.{ESCAPES}": 1, "optimizer.lr": ESCAPES})


def forged_metrics(world: World) -> None:
    torn_line(world, json.dumps({"step": 99, f"val/{ESCAPES}": 1.0}).encode() + b"\n")
    file = world.run / "provenance.json"
    provenance = json.loads(file.read_text())
    provenance["plugins"] = [f"x.py; touch {world.proof} #", ESCAPES]
    file.write_text(json.dumps(provenance))
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
    """Yield the commands for a folder.

    Args:
        world: The scratch folder.
        outcome: Its mutation and base.
        chance: Skip some commands at random; None to yield all.
    """
    commands = sweep_commands(outcome.base) if world.sweep else run_commands()
    case = outcome.name.startswith("case")
    for name, arguments in commands.items():
        share = 0.2 if name in FEW else 0.65
        skipped = chance is not None and not case and chance.random() > share
        endless = world.endless and not name.startswith(READING) and name != "resume more"
        if not skipped and not endless:
            yield name, arguments


def fill_in(arguments: list[str], world: World) -> list[str]:
    """Replace the placeholders STEP and TRIAL."""
    step = world.place("checkpoints/step-2").name[5:]
    trial = world.trial.name
    return [argument.replace("STEP", step).replace("TRIAL", trial) for argument in arguments]


def attack(
    root: Path,
    genuine: dict[str, Path],
    seed: int,
    only: str | None,
    most: int | None,
    access: bool,
    number: int,
) -> Outcome:
    """Create a folder, and run commands on it; each command gets a new copy.

    Args:
        root: The parent of the scratch folder.
        genuine: The genuine folders by name.
        seed: Seed of the mutations.
        only: Name of the only command; its folder is kept.
        most: Limit of the number of commands.
        access: Compare access times.
        number: Number of the folder.
    """
    chance = random.Random(f"commands {seed}-{number}")
    folder = root / f"{number}"
    world, outcome = make_world(folder, genuine, seed, number)
    commands = list(commands_for(world, outcome, chance if only is None else None))
    about_events = outcome.name.startswith(("events", "links", "hard", "special"))
    if only == "board" or chance.random() < (4 * BOARD if about_events else BOARD):
        commands.append(("board", ["board", "--port", "0"]))
    if only is None and most is not None and len(commands) > most:
        commands = chance.sample(commands, most)
    for name, arguments in commands:
        real = chance.random() < REAL
        hangs = sum(failure.kind == "hang" for failure in outcome.failures)
        if (only is not None and name != only) or hangs >= MOST_HANGS:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        world, _ = make_world(folder, genuine, seed, number)
        attack_with(world, outcome, name, fill_in(arguments, world), real, access)
        if only is not None:
            kept = folder.with_name(f"{number}-{name.replace(' ', '-').replace('=', '-')}")
            shutil.rmtree(kept, ignore_errors=True)
            os.rename(folder, kept)
    shutil.rmtree(folder, ignore_errors=True)
    return outcome


def attack_with(
    world: World, outcome: Outcome, name: str, arguments: list[str], real: bool, access: bool
) -> None:
    talk = ask_board if arguments[0] == "board" else None
    work = program(arguments) if real else command_of(arguments)
    ended, wrong = judge(world, work, access, talk)
    outcome.commands += 1
    outcome.accepted += ended.status == 0
    outcome.slowest = max(outcome.slowest, ended.cpu)
    must_succeed = name.startswith("unrelated") or outcome.name.startswith("case: genuine")
    if must_succeed and ended.status != 0 and not ended.hang and name not in REFUSED:
        wrong.append(("others", f"exit status {ended.status}: {last_line(ended)}"))
    for kind, detail in wrong:
        outcome.failures.append(Failure(kind, name, detail.replace(str(world.root), "WORLD")))


def judge(
    world: World, work: Callable[[], Any], access: bool, talk: Any = None
) -> tuple[Ended, list[tuple[str, str]]]:
    """Run a command in a scratch folder.

    Args:
        world: The scratch folder.
        work: See `campaign_sandbox.run`.
        access: Compare access times to find files that were read.
        talk: See `campaign_sandbox.run`.

    Returns:
        The end of the command, and its problems as pairs of kind and detail.
    """
    watched = [world.outside, world.root / "home"]
    work_folder = world.root / "work"
    token = TOKEN.encode()
    before = snapshot(watched)
    links = {(status.st_dev, status.st_ino) for status in map(os.lstat, before)}
    earlier = set(files_with(token, work_folder, links))
    age(watched)  # the snapshot has changed the access times
    ended = run(work, world.root, environment(world.root), talk)
    wrong = faults(ended, "" if world.names_data else TOKEN)
    written, read = changes(before, snapshot(watched))
    wrong += [("written", change) for change in written[:3]]
    if access and not world.names_data:
        wrong += [("read", change) for change in read[:3]]
    copies = sorted(set(files_with(token, work_folder, links)) - earlier)
    wrong += [("read", f"the token is in {path}") for path in copies[:3]]
    if any((world.root / "proof").iterdir()):
        wrong.append(("executed", "the proof was created"))
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
        folders: Number of folders; the first are the fixed cases.
        seed: Seed of the mutations and of the choice of commands.
        control: Disable the protections; failures must be found.
        only: NUMBER or NUMBER:COMMAND to run only this folder and keep it.
        most: Number of commands for each folder; by default about two thirds of all.
        jobs: Number of folders in parallel.
    """
    import_all()
    root = Path(tempfile.mkdtemp(prefix="hostile-"))
    began = time.monotonic()
    access = times_of_access(root)
    if not access:
        print("the file system records no access times: reads are detected only in outputs")
    if control:
        disable_protections()
    genuine = templates(root / "genuine")
    number, _, command = (only or "").partition(":")
    numbers = [int(number)] if only else list(range(folders))
    work = partial(attack, root, genuine, seed, command or None, most, access)
    outcomes: list[Outcome] = []
    found: set[str] = set()
    for outcome in in_parallel(work, numbers, jobs):
        outcomes.append(outcome)
        found |= {failure.kind for failure in outcome.failures}
        for line in lines_of(outcome, seed):
            print(line, flush=True)
    print(*summary(outcomes), sep="\n")
    print(f"  {time.monotonic() - began:.0f} s" + (f"; the folders are in {root}" if only else ""))
    if not only:
        shutil.rmtree(root, ignore_errors=True)
    if control:
        kinds = [kind for kind in KINDS if kind in found]
        print(f"without the protections, these failures are found: {', '.join(kinds)}")
    return int(bool(found))


def in_parallel(work: Callable[[int], Outcome], numbers: list[int], jobs: int) -> Iterator[Outcome]:
    if jobs == 1:
        yield from map(work, numbers)
        return
    with ProcessPoolExecutor(jobs, get_context("fork")) as pool:
        for future in as_completed([pool.submit(work, number) for number in numbers]):
            yield future.result()


def import_all() -> None:
    """Import the modules of all commands, so that no child must import them."""
    import framework.cli.board
    import framework.cli.main
    import framework.cli.output
    import framework.experiment.dry_runs.check
    import framework.experiment.experiment
    import framework.experiment.plan
    import framework.experiment.trained.load
    import framework.tuning.search.study
    import framework.tuning.sweep.sweep  # noqa: F401
    from framework.registry.discovery import discover

    discover()


def disable_protections() -> None:
    """Open files without checks and limits, and unpickle all content: the negative control."""
    from framework.runs.checkpoint import checks
    from framework.system import files

    unprotected = {
        checks.check_torch_file: lambda file: None,
        files.open_file: open_unprotected,
        files.write_file: write_unprotected,
        files.check_tree: lambda content, path: None,
        files.check_yaml: lambda events, path: None,
    }
    for module in list(sys.modules.values()):
        if not getattr(module, "__name__", "").startswith(("framework", "framework_plugins")):
            continue
        for name, value in list(vars(module).items()):
            if isinstance(value, FunctionType) and value in unprotected:
                setattr(module, name, unprotected[value])
    load = torch.load
    torch.load = lambda *args, **kwargs: load(*args, **kwargs | {"weights_only": False})


def open_unprotected(folder: Path, name: str, mode: str = "r", most: int | None = None) -> Any:
    binary_mode = {"r": "rb", "r+": "r+b", "a": "a+b", "x": "xb"}[mode]
    return open(folder / name, binary_mode, buffering=-1 if mode == "r" else 0)


def write_unprotected(folder: Path, name: str, content: bytes | str) -> None:
    if isinstance(content, str):
        content = content.encode("utf-8", errors="backslashreplace")
    temporary = folder / f"{name}.tmp"
    temporary.write_bytes(content)
    os.replace(temporary, folder / name)


def lines_of(outcome: Outcome, seed: int) -> Iterator[str]:
    for failure in outcome.failures:
        cells = [
            f"{failure.kind:<9} {outcome.name} ({outcome.base})",
            failure.command,
            f"{failure.detail!r:.240}",
            "; ".join(outcome.notes),
            f"--only '{outcome.number}:{failure.command}' --seed {seed}",
        ]
        yield " | ".join(cells)


def class_of(outcome: Outcome) -> str:
    return "cases" if outcome.name.startswith("case") else outcome.name


def failed(outcome: Outcome, kind: str) -> int:
    """Return the number of commands with this kind of failure."""
    return len({failure.command for failure in outcome.failures if failure.kind == kind})


def summary(outcomes: list[Outcome]) -> Iterator[str]:
    """Yield a line for each class of mutations, with the number of failed commands by kind."""
    titles = "".join(f"{title:>10}" for title in ("folders", "commands", "accepted", *KINDS))
    yield f"{'':<26}{titles}  slowest"
    names = list(dict.fromkeys(class_of(outcome) for outcome in outcomes))
    for name in [*names, "all"]:
        members = [outcome for outcome in outcomes if name in ("all", class_of(outcome))]
        counts = [
            len(members),
            sum(outcome.commands for outcome in members),
            sum(outcome.accepted for outcome in members),
        ]
        for kind in KINDS:
            commands = sum(failed(outcome, kind) for outcome in members)
            counts.append(commands)
        cells = "".join(f"{count:>10}" for count in counts)
        slowest = max(outcome.slowest for outcome in members)
        yield f"{name:<26}{cells}  {slowest:.1f} s CPU"
