"""Mutations of genuine runs and sweeps for the campaign of hostile folders, by class."""

import json
import os
import pickle
import random
import re
import shutil
import socket
import stat
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml

from framework.runs.checkpoint import MANIFEST, MODEL, TRAINING, own_sha256

TERABYTE = 2**40
CACHED: dict[str, bytes] = {}  # large contents, created once

FILES = [
    "config.yaml",
    "overrides.yaml",
    "provenance.json",
    "facts.json",
    "status.json",
    "metrics.jsonl",
    ".lock",
]
OF_CHECKPOINT = [MANIFEST, MODEL, TRAINING]
SWEEP_FILES = [
    "sweep.json",
    "sweep.jsonl",
    "sweep.lock",
    ".lock",
    "study.journal",
    "best/config.yaml",
    "best/facts.json",
    "best/status.json",
    "best/metrics.jsonl",
]
FOLDERS = ["checkpoints", "checkpoints/step-1", "checkpoints/step-2", "checkpoints/best"]
TEMPORARY = [
    "status.tmp",
    "status.json.tmp",
    "config.yaml.tmp",
    "facts.json.tmp",
    "provenance.json.tmp",
    "overrides.yaml.tmp",
    "metrics.jsonl.new",
    "metrics.jsonl.tmp",
    "checkpoints/.best",
    "output.txt",
    "checkpoints/step-3",
    "checkpoints/.step-3",
    "events.new",
    ".status.json.0000000000000000.tmp",
]
SWEEP_TEMPORARY = [
    "sweep.json.tmp",
    "sweep.jsonl.tmp",
    "study.journal.tmp",
    "sweep.lock",
    "output.txt",
    ".best",
]


@dataclass
class World:
    """A scratch folder with a hostile run or sweep, and files that no command may touch.

    work/runs/default/victim is hostile; outside/ and home/ contain sentinel files, and outside/twin
    is a genuine copy of the victim with the token in its files.

    Args:
        endless: The training would not end; commands that train are skipped.
        names_data: The config has outside files as its data, which commands may read.
    """

    root: Path
    token: str
    sweep: bool
    chance: random.Random
    notes: list[str] = field(default_factory=list)
    endless: bool = False
    names_data: bool = False

    @property
    def run(self) -> Path:
        return self.root / "work/runs/default/victim"

    @property
    def plugin(self) -> Path:
        """A plugin in the working folder that creates the proof."""
        return self.root / "work" / "evil.py"

    @property
    def outside(self) -> Path:
        return self.root / "outside"

    @property
    def proof(self) -> Path:
        return self.root / "proof/executed"

    def place(self, name: str) -> Path:
        """Return the path of a name such as checkpoints/step-2 or events in the folder of a run."""
        of_sweep = name in {*SWEEP_FILES, *SWEEP_TEMPORARY, "best"}
        base = self.run if of_sweep or not self.sweep else self.trial
        steps = sorted(path.name for path in (base / "checkpoints").glob("step-*"))
        steps = steps or ["step-00000001"]
        next_step = f"step-{int(steps[-1][5:]) + 7:08}"
        name = name.replace("step-1", steps[0]).replace("step-2", steps[-1])
        name = name.replace(".step-3", f".{next_step}-0123abcd").replace("step-3", next_step)
        if name == "events":
            found = sorted(base.glob("events.out.tfevents.*"))
            return found[0] if found else base / "events.out.tfevents.1.vm"
        if name == "events.new":
            return base / "events.out.tfevents.9999999999.vm"
        return base / name

    @property
    def trial(self) -> Path:
        found = sorted(self.run.glob("0*")) if self.sweep else []
        return found[0] if found else self.run

    @property
    def checkpoint(self) -> Path:
        return self.place("checkpoints/step-2")

    def files(self) -> list[str]:
        """Return the names of the files; in a sweep, mostly those of the sweep itself."""
        names = [*FILES, "events"]
        for checkpoint in ("checkpoints/step-1", "checkpoints/step-2"):
            names += [f"{checkpoint}/{name}" for name in OF_CHECKPOINT]
        return [*SWEEP_FILES, *SWEEP_FILES, *names] if self.sweep else names

    def folders(self) -> list[str]:
        return ["best", "best", *FOLDERS] if self.sweep else FOLDERS

    def temporary(self) -> list[str]:
        return SWEEP_TEMPORARY if self.sweep else TEMPORARY

    def note(self, text: str) -> None:
        printable = text.encode("utf-8", "backslashreplace").decode()
        self.notes.append(printable.replace("\n", "\\n")[:160])

    def name_of(self, path: Path) -> str:
        return str(path.relative_to(self.run)) if path.is_relative_to(self.run) else str(path)


def take_away(path: Path) -> None:
    """Remove a file, link or folder, and create its parent folder."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)


def twin(world: World, path: Path) -> Path:
    """Return the same file of the genuine copy outside."""
    return world.outside / "twin" / path.relative_to(world.run)


def readable(world: World, path: Path) -> bool:
    """Return whether a mutation can read a file; an earlier one may have enlarged or linked it."""
    return path.is_file() and inside(path, world.run) and path.stat().st_size < 2**22


# links

DEVICES = [
    "/dev/zero",
    "/dev/full",
    "/dev/null",
    "/proc/self/environ",
    "/proc/self/cmdline",
    "/proc/self/fd/0",
]


def link(world: World, names: list[str]) -> None:
    path = world.place(world.chance.choice(names))
    while not inside(path, world.run):  # an earlier link points outside
        path = world.place(world.chance.choice(FILES[:6]))
    target = world.chance.choice([str(twin(world, path))] * 5 + targets(world, path))
    take_away(path)
    path.symlink_to(target)
    world.note(f"{world.name_of(path)} -> {target.replace(str(world.root), 'WORLD')}")


def inside(path: Path, folder: Path) -> bool:
    return path.parent.resolve().is_relative_to(folder.resolve())


def targets(world: World, path: Path) -> list[str]:
    out = world.outside
    return [
        str(out / "secret.txt"),
        str(out / "secret.json"),
        str(out / "empty"),
        str(out / "missing"),
        str(out / "folder"),
        str(world.root / "home/.bashrc"),
        str(world.root / "home/.ssh"),
        os.path.relpath(out / "secret.txt", path.parent),
        path.name,
        "..",
        ".",
        str(world.proof),
        *world.chance.sample(DEVICES, 2),
    ]


def link_file(world: World) -> None:
    link(world, [*world.files(), *world.folders()])


def link_temporary(world: World) -> None:
    link(world, world.temporary())


def hard_link(world: World) -> None:
    names = [*world.files(), *world.temporary()]
    path = world.place(world.chance.choice(names))
    while not inside(path, world.run):
        path = world.place(world.chance.choice(FILES[:6]))
    source = twin(world, path)
    if not source.is_file() or world.chance.random() < 0.3:
        source = world.outside / world.chance.choice(["secret.txt", "secret.json", "empty"])
    take_away(path)
    os.link(source, path, follow_symlinks=True)
    world.note(f"{world.name_of(path)} is a hard link to {world.name_of(source)[-60:]}")


# special files


def special(world: World) -> None:
    path = world.place(world.chance.choice([*world.files(), *world.folders(), *world.temporary()]))
    if not inside(path, world.run):
        return
    kinds: list[Callable[[Path], None]] = [
        os.mkfifo,
        os.mkfifo,
        bind,
        Path.mkdir,
        with_files,
        Path.touch,
    ]
    if os.geteuid() == 0:
        kinds.append(zero_device)
    kind = world.chance.choice(kinds)
    take_away(path)
    kind(path)
    world.note(f"{world.name_of(path)} is created by {kind.__name__}")


def bind(path: Path) -> None:
    """Create a socket from its folder, because the path may be too long for the call."""
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def with_files(path: Path) -> None:
    path.mkdir()
    (path / "file").write_text("text")
    (path / "folder").mkdir()


def zero_device(path: Path) -> None:
    with suppress(PermissionError):
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))


# bombs


def alias_bomb(levels: int, width: int = 10) -> str:
    lines = [f"a0: &a0 [{', '.join(['x'] * width)}]"]
    for n in range(1, levels):
        aliases = ", ".join([f"*a{n - 1}"] * width)
        lines.append(f"a{n}: &a{n} [{aliases}]")
    return "\n".join(lines) + "\n"


def yaml_bombs(text: str) -> list[tuple[str, str]]:
    merged = "b0: &b0 {k: v}\n"
    for n in range(1, 9):
        aliases = ", ".join([f"*b{n - 1}"] * 9)
        merged += f"b{n}: &b{n}\n  <<: [{aliases}]\n"
    return [
        ("alias bomb of 10^10 values", text + alias_bomb(10)),
        ("alias bomb of 10^30 values", text + alias_bomb(30)),
        ("alias bomb in a setting", text.replace("plugins: []", "plugins: *a9") + alias_bomb(10)),
        ("alias bomb of mappings", text + alias_bomb(10).replace("[", "{k: [").replace("]", "]}")),
        ("merge bomb", text + merged),
        ("an alias to itself", text + "loop: &loop [*loop]\n"),
        ("a mapping that contains itself", text + "loop: &loop\n  inner: *loop\n"),
        ("100,000 levels", text + "deep: " + "[" * 100_000 + "]" * 100_000 + "\n"),
        ("900 levels", text + "deep: " + "[" * 900 + "]" * 900 + "\n"),
        ("levels by indentation", text + "".join(" " * n + "k:\n" for n in range(1, 2_000))),
        ("2,000,000 values", text + "wide: [" + "1," * 2_000_000 + "]\n"),
        ("300,000 keys", text + "".join(f"k{n}: 1\n" for n in range(300_000))),
        ("a number of 1,000,000 digits", text + "n: " + "9" * 1_000_000 + "\n"),
        ("a number base 60", text + "n: " + ":".join(["59"] * 20_000) + "\n"),
        ("80 MB of text", text + "t: '" + "x" * (80 * 2**20) + "'\n"),
        ("1,000,000 documents", text + "---\n" * 1_000_000),
        ("a long tag", "%TAG ! tag:" + "x" * 1_000_000 + ":\n---\n" + text),
    ]


def json_bombs(text: str) -> list[tuple[str, str]]:
    opened = text.rstrip().removesuffix("}").rstrip()
    line = '{"step": 1, "epoch": 1, "wall_seconds": 1, "val/loss": 1}\n'
    objects = '{"a":' * 100_000 + "1" + "}" * 100_000
    metrics = "".join(f'"val/m{n}": 1, ' for n in range(100_000))
    return [
        ("100,000 levels", opened + ', "deep": ' + "[" * 100_000 + "]" * 100_000 + "}\n"),
        ("100,000 levels of objects", opened + ', "deep": ' + objects + "}\n"),
        ("900 levels", opened + ', "deep": ' + "[" * 900 + "]" * 900 + "}\n"),
        ("unclosed levels", "[" * 1_000_000),
        ("3,000,000 values", opened + ', "wide": [' + "1," * 3_000_000 + "1]}\n"),
        ("300,000 keys", opened + "".join(f', "k{n}": 1' for n in range(300_000)) + "}\n"),
        ("a number of 4,000 digits", opened + ', "n": ' + "9" * 4_000 + "}\n"),
        ("a number of 1,000,000 digits", opened + ', "n": ' + "9" * 1_000_000 + "}\n"),
        ("80 MB of text", opened + ', "t": "' + "x" * (80 * 2**20) + '"}\n'),
        ("500,000 lines", text + line * 500_000),
        ("a line of 40 MB", text + '{"step": 1, "val/loss": ' + " " * (40 * 2**20) + "1}\n"),
        ("100,000 metrics", text + "{" + metrics + '"step": 2}\n'),
    ]


def bomb(world: World) -> None:
    path = world.place(world.chance.choice(text_files(world)))
    if not readable(world, path):
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    bombs = yaml_bombs(text) if path.suffix == ".yaml" else json_bombs(text)
    name, content = world.chance.choice(bombs)
    replace(path, content)
    world.note(f"{world.name_of(path)}: {name}")


def text_files(world: World) -> list[str]:
    own = [
        *FILES[:6],
        "config.yaml",
        "config.yaml",
        "status.json",
        f"checkpoints/step-2/{MANIFEST}",
    ]
    return ["sweep.json", "sweep.jsonl", "study.journal", *own] if world.sweep else own


def replace(path: Path, content: str | bytes) -> None:
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    take_away(path)
    path.write_bytes(data)


def zip_bomb(world: World) -> None:
    """Write a training.pt of a few MB that unpacks to gigabytes."""
    signed = world.chance.random() < 0.8
    choice = world.chance.choice(["zeros", "pickle", "names", "tensor"])
    path = world.checkpoint / TRAINING
    if not path.is_file():
        return
    if choice not in CACHED:
        file = path.parent / "bomb"
        write_zip_bomb(choice, file)
        CACHED[choice] = file.read_bytes()
        file.unlink()
    replace(path, CACHED[choice])
    if signed:
        sign(world.checkpoint)
    world.note(f"{TRAINING}: zip bomb, {choice}, signed: {signed}")


def write_zip_bomb(choice: str, path: Path) -> None:
    if choice == "tensor":  # its shape is much larger than its record
        torch.save({"counters": {"step": 1}, "x": torch.ones(4).expand(2**40, 4)}, path)
        return
    torch.save({"counters": {"step": 1}, "x": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    suffix = {"zeros": "data/0", "pickle": "data.pkl"}.get(choice)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in records.items():
            if suffix is None or not name.endswith(suffix):
                archive.writestr(name, content)
                continue
            with archive.open(name, "w", force_zip64=True) as file:
                for _ in range(3 * 64):
                    file.write(bytes(2**24))
        if choice == "names":
            for n in range(50_000):
                archive.writestr(f"archive/data/x{n}", b"")


def trial_folders(world: World) -> None:
    """Move the trials of a sweep, or the best one, to another place."""
    out = world.outside / "twin"
    path = world.place("sweep.jsonl")
    if not world.sweep or not readable(world, path):
        return
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    folder = world.chance.choice(
        [str(out), "../../../../outside/twin", "..", ".", "", "best", "\0", ESCAPES]
    )
    for row in rows:
        row["folder"] = folder
        row["metrics"] = {"val/loss": -1e9}
    replace(path, "".join(json.dumps(row) + "\n" for row in rows))
    if world.chance.random() < 0.5:
        take_away(world.run / "best")
        (world.run / "best").symlink_to(world.chance.choice([out, "..", world.outside / "missing"]))
    world.note(f"sweep.jsonl: all trials in {folder!r}")


def sparse(world: World) -> None:
    path = world.place(world.chance.choice(world.files()))
    if not inside(path, world.run):
        return
    size = world.chance.choice([2**31 - 1, 2**33, TERABYTE])
    if not path.is_file():
        take_away(path)
    with path.open("ab") as file:
        file.truncate(size)
    if world.chance.random() < 0.5 and path.parent == world.checkpoint:
        claim_sizes(world.checkpoint)
    world.note(f"{world.name_of(path)}: {size:,} bytes, a hole")


def claim_sizes(checkpoint: Path) -> None:
    """Write the actual sizes of the files to the manifest."""
    with suppress(OSError, ValueError, KeyError):
        if (checkpoint / MANIFEST).stat().st_size > 2**22:
            return
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        for name in (MODEL, TRAINING):
            manifest["files"][name]["bytes"] = (checkpoint / name).stat().st_size
        write_manifest(checkpoint, manifest)


# torn files


def torn(world: World) -> None:
    path = world.place(world.chance.choice(world.files()))
    if not readable(world, path):
        return
    content = path.read_bytes()
    chance = world.chance
    cut = chance.randrange(len(content) + 1)
    flipped = bytearray(content)
    for _ in range(min(len(content), chance.choice([1, 3, 50]))):
        flipped[chance.randrange(len(content))] = chance.randrange(256)
    text = content.decode("utf-8", "replace")
    versions = {
        "cut": content[:cut],
        "cut at the last byte": content[:-1],
        "flipped bytes": bytes(flipped),
        "empty": b"",
        "a NUL at the end": content + b"\0",
        "NULs within": content[:cut] + bytes(4096) + content[cut:],
        "all zeros": bytes(len(content)),
        "invalid UTF-8": content[:cut] + b"\xff\xfe\xc3(" + content[cut:],
        "invalid UTF-8 at the end": content + b'{"step": 9, "caf\xe9": 1}\n',
        "a lone surrogate": content[:cut] + b"\xed\xa0\x80" + content[cut:],
        "an escaped surrogate": content + b'{"step": 9, "val/\\udcff": 1}\n',
        "BOM": b"\xef\xbb\xbf" + content,
        "CRLF": content.replace(b"\n", b"\r\n"),
        "CR": content.replace(b"\n", b"\r"),
        "UTF-16": text.encode("utf-16"),
        "twice": content + content,
        "garbage": chance.randbytes(500),
        "a torn last line": content + b'{"step": 40, "ep',
        "empty lines": content.replace(b"\n", b"\n\n \n"),
        "null lines": content + b'null\n[]\n7\n"text"\n{}\n',
    }
    name = chance.choice(list(versions))
    replace(path, versions[name])
    if path.parent == world.checkpoint and path.name != MANIFEST and chance.random() < 0.5:
        sign(world.checkpoint)
        name += ", signed"
    world.note(f"{world.name_of(path)}: {name}")


# wrong types

ESCAPES = "\x1b]0;owned\x07\x1b[31mred\x1b[2J\nframework: all is well\r\x9b1m\u202e"
VALUES: list[Any] = [
    None,
    [],
    {},
    [[]],
    {"a": {"b": []}},
    "",
    "text",
    "-",
    "0",
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    2**64,
    10**400,
    -(10**400),
    float("nan"),
    float("inf"),
    float("-inf"),
    1e308,
    -1e308,
    1e-320,
    "NaN",
    "9" * 5_000,
    "x" * 200_000,
    ESCAPES,
    "\0",
    "\ud800",
    [None],
    [1, "a", None],
    {"name": None},
    {"name": []},
    {"": ""},
    [1e308],
    "1" * 400,
    {ESCAPES: 1},
    [ESCAPES],
    "null",
    "a: b",
    "2026-11-29",
    [10**30],
    [-1],
    [0],
    {"0": 1},
]
ENDLESS = re.compile(
    r"max_epochs|max_steps|samples|seconds|workers|noise|generat|features|micro_batch|accumulate"
)


def wrong_type(world: World) -> None:
    """Replace any value of any file by one of another type or size, or by a path outside."""
    paths = [
        str(world.outside / "twin"),
        "../../../../outside/twin",
        "../outside",
        "/dev/zero",
        "~/.ssh",
        "..",
        ".",
    ]
    value = world.chance.choice([*VALUES, *paths])
    exchange(world, value, world.chance.choice(text_files(world)))


def text_in_names(world: World) -> None:
    """Insert texts that forge lines, control the terminal or run shell code, as values or keys."""
    shell = f"$(touch {world.proof}); touch {world.proof} #"
    text = world.chance.choice(
        [ESCAPES, shell, f"{ESCAPES}{shell}", "x\n" * 3_000, "\x1b[31m", "\u2028framework: x"]
    )
    if world.chance.random() < 0.15:
        path = world.place("provenance.json")
        if readable(world, path):
            content = json.loads(path.read_text(encoding="utf-8", errors="replace") or "{}")
            content["plugins"] = [f"x.py; touch {world.proof} #", text, "-x"]
            replace(path, json.dumps(content))
            world.note("provenance.json: plugins with shell code")
            return
    exchange(world, text, world.chance.choice(text_files(world)), keys=True)


def exchange(world: World, value: Any, name: str, keys: bool = False) -> None:
    """Replace or delete a value in a JSON or YAML file; with `keys`, replace a value or a key."""
    path = world.place(name)
    if not readable(world, path):
        return
    parse: Callable[[str], Any] = json.loads
    dump: Callable[[Any], str] = json.dumps
    if path.suffix == ".yaml":
        parse = yaml.safe_load
        dump = partial(yaml.safe_dump, sort_keys=False, allow_unicode=True)
    if path.suffix in (".jsonl", ".journal"):
        documents = path.read_text(encoding="utf-8", errors="replace").splitlines()
    else:
        documents = [path.read_text()]
    try:
        trees = list(map(parse, documents))
    except Exception:  # after another mutation
        return
    if not trees:
        return
    number = world.chance.randrange(len(trees))
    places = list(islice(leaves_and_branches(trees[number]), 1_000))  # limited for alias bombs
    place = world.chance.choice(places)
    other_kinds = ["key", "key"] if keys else ["value", "drop"]
    kind = world.chance.choice(["value", "value", "value", *other_kinds])
    trees[number] = put(trees[number], place, value, kind)
    try:
        texts = list(map(dump, trees))
    except (ValueError, RecursionError, UnicodeError):
        return
    replace(path, "\n".join(texts) + "\n")
    setting = ".".join(map(str, place))
    world.endless |= bool(ENDLESS.search(setting)) and isinstance(value, int | float | str)
    world.note(f"{world.name_of(path)}: {kind} {setting or 'all'} := {value!r:.60}")


def leaves_and_branches(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves_and_branches(value, (*path, key))
    if isinstance(tree, list):
        for number, value in enumerate(tree[:3]):
            yield from leaves_and_branches(value, (*path, number))


def put(tree: Any, place: tuple[Any, ...], value: Any, kind: str) -> Any:
    if not place:
        return value
    *parents, last = place
    inner = tree
    for key in parents:
        inner = inner[key]
    if kind == "drop":
        del inner[last]
    elif kind == "key" and isinstance(inner, dict):
        inner[value if isinstance(value, str) else str(value)] = inner.pop(last)
    else:
        inner[last] = value
    return tree


# values of settings


def settings(world: World) -> None:
    out = str(world.outside)
    proof = str(world.proof)
    evil = str(world.plugin)
    home = "~/.bashrc"
    series = {"name": "series", "path": "/dev/zero", "target": "x", "lookback": 8, "horizon": 4}
    changes: list[dict[str, Any]] = [
        {"model.width": 10**6},
        {"model.width": 10**9},
        {"model.width": 2**62},
        {"model.width": 10**30},
        {"model.depth": 10**9},
        {"model.depth": 5_000},
        {"data.samples": 10**12},
        {"data.samples": 2**62},
        {"data.classes": 10**9},
        {"data.classes": 10**5},
        {"data.features": 10**9},
        {"data.features": 10**18},
        {"loader.batch_size": 10**18},
        {"loader.eval_batch_size": 10**18},
        {"loader.eval_batch_size": 10**30},
        {"trainer.max_epochs": 10**18},
        {"trainer.max_steps": 10**18},
        {"trainer.max_epochs": 10**30},
        {"trainer.accumulate": 10**18},
        {"trainer.log_every": "1" * 4_000 + "steps"},
        {"trainer.validate_every": "1e308epochs"},
        {"seed": 2**64},
        {"seed": 10**400},
        {"scheduler.warmup": 1e308},
        {"optimizer.lr": 1e308},
        {"callbacks.checkpoint.keep": 10**18},
        {"callbacks.checkpoint.every": "1steps"},
        {"loggers.tensorboard.bins": 10**12},
        {"callbacks.progress.per_second": 1e308},
        {"init_from": f"$(touch {proof})", "trainer.log_every": None},
        {"init_from": f"{out}/twin"},
        {"init_from": "/dev/zero"},
        {"init_from": f"{out}/secret.txt"},
        {"init_from": home},
        {"run.root": out},
        {"run.root": "../../outside"},
        {"run.root": "~"},
        {"run.name": "../../../../outside/escape"},
        {"run.name": f"{out}/escape"},
        {"run": {"root": f"{out}/new", "name": "new"}},
        {"plugins": [evil]},
        {"plugins": ["evil", "evil.py"]},
        {"plugins": evil},
        {"plugins": ["~/evil.py", "/dev/zero", out]},
        {"model._target_": "os.system"},
        {"model": {"_target_": "os.system", "command": f"touch {proof}"}},
        {"callbacks.x": {"_target_": "os.system", "_args_": [f"touch {proof}"]}},
        {"model.activation": {"_target_": "os.system", "_args_": [f"touch {proof}"]}},
        {"model.activation": "os.system"},
        {"model.name": "${oc.env:SECRET}"},
        {"seed": "${oc.env:SECRET}"},
        {"data.samples": "${oc.decode:${oc.env:SECRET}}"},
        {"model.name": "../../evil"},
        {"model.name": evil},
        {"hydra": {"run": {"dir": f"{out}/hydra"}, "sweep": {"dir": out}, "output_subdir": "x"}},
        {"hydra": {"searchpath": [f"file://{out}"], "job": {"chdir": True}}},
        {"defaults": [{"model": "/etc/passwd"}]},
        {"resume": "auto"},
        {"resume": f"{out}/twin"},
        {"sweep": {"name": "x", "metric": 7}},
        {"callbacks.checkpoint.folder": out},
        {"loggers.tensorboard.folder": out},
        {"loggers.json_lines.file": f"{out}/secret.txt"},
        {"trainer.device": "cuda"},
        {"trainer.device": "meta"},
        {"trainer.device": "cpu:99999999"},
        {"trainer.compile": "on"},
        {"trainer.precision": "fp8"},
        {"model": {"name": "transformer", "width": 16, "depth": 10**7, "heads": 2}},
        {"task": {"name": "distillation", "teacher": f"{out}/twin"}},
        {"task": {"name": "distillation", "teacher": "/dev/zero"}},
        {"task": {"name": "distillation", "teacher": "runs/default/victim"}},
        {"data": {"name": "table", "path": f"{out}/secret.csv", "target": "label"}},
        {"data": {"name": "table", "path": f"{out}/secret.txt", "target": "label"}},
        {"data": {"name": "table", "path": "/dev/zero", "target": "label"}},
        {"data": {"name": "table", "path": f"{out}/fifo", "target": "label"}},
        {"data": {"name": "table", "path": "~/.bashrc", "target": "label"}},
        {"data": {"name": "npz", "path": "/dev/zero"}},
        {"data": {"name": "text_table", "path": f"{out}/secret.csv"}},
        {"data": series},
    ]
    set_in_config(world, world.chance.choice(changes))


def set_in_config(world: World, change: dict[str, Any]) -> None:
    path = world.place("config.yaml")
    if not readable(world, path):
        return
    try:
        tree = yaml.safe_load(path.read_text())
        for key, value in change.items():
            *parents, last = key.split(".")
            place = tree
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = value
        replace(path, yaml.safe_dump(tree, sort_keys=False))
    except Exception:  # after another mutation
        return
    text = str(change).replace(str(world.root), "WORLD")
    world.endless |= bool(ENDLESS.search(text)) or "1steps" in text
    world.names_data |= any(word in text for word in ("'path'", "teacher", "init_from"))
    world.note(f"config.yaml: {text:.120}")


def tags(world: World) -> None:
    proof = world.proof
    text = world.chance.choice(
        [
            f"!!python/object/apply:os.system ['touch {proof}']\n",
            f"model: !!python/object/apply:os.system ['touch {proof}']\n",
            f"model: !!python/object/new:os.system ['touch {proof}']\n",
            "model: !!python/name:os.system ''\n",
            "model: !!python/module:os ''\n",
            "seed: !!binary aGVsbG8=\n",
            "seed: !!timestamp 2026-11-29\n",
            "model: !!set {a, b}\n",
            "2026-11-29: 1\n? [a, b]\n: 2\n",
            "null: 1\n1.5: {true: 3}\n",
            "? {a: 1}\n: 2\n",
            "!!omap [a: 1]\n",
            "a: !<tag:x> 1\n",
            "- 1\n",
            "7\n",
            "model: [\n",
            "\t\n",
            "%YAML 9.9\n---\n",
            "seed: !!int abc\n",
            "seed: !!float abc\n",
            "seed: !!bool abc\n",
            "seed: 9999-99-99\n",
            "seed: 2026-02-30\n",
            "a: *missing\n",
            "seed: !!null x\n",
        ]
    )
    path = world.place("config.yaml")
    if not readable(world, path):
        return
    before = ""
    if world.chance.random() < 0.6:
        before = path.read_text(encoding="utf-8", errors="replace")
    replace(path, before + text)
    world.note(f"config.yaml: {'with' if before else 'only'} {text[:60]}")


# pickles


class Payload:
    """An object that creates a file when it is unpickled."""

    def __init__(self, proof: Path):
        self.proof = str(proof)

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.proof}",))


def pickled(world: World) -> None:
    name = world.chance.choice([MODEL, TRAINING, TRAINING])
    payload = Payload(world.proof)
    form = world.chance.choice(
        ["plain", "torch", "old torch", "module", "exchanged", "global", "reduce bomb"]
    )
    path = world.checkpoint / name
    if not path.is_file():
        return
    take_away(path)
    if form == "plain":
        path.write_bytes(pickle.dumps(payload))
    elif form == "torch":
        torch.save({"counters": {"step": payload}}, path)
    elif form == "old torch":
        torch.save([payload], path, _use_new_zipfile_serialization=False)
    elif form == "module":
        model: Any = torch.nn.Linear(1, 1)
        model.payload = payload
        torch.save(model, path)
    elif form == "exchanged":
        exchanged(path, pickle.dumps(payload))
    elif form == "global":
        exchanged(path, b"\x80\x02cevil\nx\n.")
    else:  # nested references: printing or comparing takes exponential time
        levels: list[Any] = []
        for _ in range(40):
            levels = [levels, levels]
        torch.save({"counters": {"step": levels}}, path)
    signed = world.chance.random() < 0.8
    if signed:
        sign(world.checkpoint)
    world.note(f"{name}: a pickle, {form}, signed: {signed}")


def exchanged(path: Path, content: bytes) -> None:
    torch.save({"x": torch.ones(3)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, record in records.items():
            archive.writestr(name, content if name.endswith("data.pkl") else record)


def plugin(world: World) -> None:
    """Add a file of code to the plugins in all files of a run."""
    evil = str(world.plugin)
    path = world.place("provenance.json")
    in_provenance = world.chance.random() < 0.7
    name = world.chance.choice([evil, "evil", "evil.py", "runs/default/victim"])
    set_in_config(world, {"plugins": [name]})
    if in_provenance and readable(world, path):
        with suppress(ValueError, TypeError):
            provenance = json.loads(path.read_text())
            provenance["plugins"] = [evil, "evil.py"]
            replace(path, json.dumps(provenance))
    for name in ("__init__.py", "torch.py", "sitecustomize.py", "conftest.py", "plugin.py"):
        if inside(world.run / name, world.run):
            (world.run / name).write_text(f"open({str(world.proof)!r}, 'w')\n")


# forged checkpoints


def sign(checkpoint: Path, **changes: Any) -> None:
    """Write a correct manifest for the changed files, as an attacker can."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        if (checkpoint / MANIFEST).stat().st_size > 2**22:
            return
        manifest = json.loads((checkpoint / MANIFEST).read_text()) | changes
        for name in (MODEL, TRAINING):
            if "files" not in changes and (checkpoint / name).stat().st_size < 2**26:
                content = (checkpoint / name).read_bytes()
                manifest["files"][name] = {
                    "bytes": len(content),
                    "sha256": sha256(content).hexdigest(),
                }
        write_manifest(checkpoint, manifest)


def write_manifest(checkpoint: Path, manifest: dict[str, Any]) -> None:
    manifest.pop("sha256", None)
    replace(checkpoint / MANIFEST, json.dumps(manifest | {"sha256": own_sha256(manifest)}))


def signed_manifest(world: World) -> None:
    path = world.checkpoint / MANIFEST
    if not readable(world, path):
        return
    try:
        manifest = json.loads(path.read_text())
        files = manifest["files"]
    except (ValueError, KeyError, TypeError):
        return
    secret = world.outside / "secret.txt"
    entry = {"bytes": secret.stat().st_size, "sha256": sha256(secret.read_bytes()).hexdigest()}
    names = [
        str(secret),
        os.path.relpath(secret, path.parent),
        "..",
        ".",
        "/dev/zero",
        "a/../../x",
        "\0",
        "~",
        ESCAPES,
    ]
    values = {
        "files": [{}, None, {MODEL: {}}],
        "torch": [ESCAPES, None],
        "step": [-1, 10**400, None, "x", 1e308, 10**9],
        "run": [None, [], {"threads": 10**6}, {"threads": -1}, {"threads": "x"}],
        "schema": [None, 3, -1, "1", 10**400],
    }
    changes: list[dict[str, Any]] = [{"files": files | {name: entry}} for name in names]
    for key, wrong_values in values.items():
        changes += [{key: value} for value in wrong_values]
    for size in (2**70, -1, None, "1", 1e308):
        changes.append({"files": files | {MODEL: {"bytes": size, "sha256": ""}}})
    change = world.chance.choice(changes)
    sign(world.checkpoint, **change)
    world.note(f"{MANIFEST}, signed: {change!r:.100}".replace(str(world.root), "WORLD"))


def lying_model(world: World) -> None:
    """Write a model.safetensors with a header that does not match its content."""

    def entry(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, Any]:
        return {"dtype": dtype, "shape": shape, "data_offsets": offsets}

    trees: list[Any] = [
        {"w": entry([2**20, 2**20], [0, 2**42])},
        {"w": entry([2**63 - 1, 2**63 - 1], [0, 0])},
        {"w": entry([1], [4, 0])},
        {"w": entry([0, 2**62], [0, 0])},
        {"w": entry([1], [0, 4], dtype=ESCAPES)},
        {ESCAPES: entry([1], [0, 4])},
        {"__metadata__": {"tied": '{"a": "nowhere"}'}},
        {"__metadata__": {"tied": "[1, 2]"}},
        {"__metadata__": {"tied": "[" * 100_000 + "]" * 100_000}},
        {f"w{n}": entry([0], [0, 0]) for n in range(200_000)},
    ]
    headers = [json.dumps(tree).encode() for tree in trees]
    headers += [b"[" * 10_000, b"{" + b" " * 10]
    path = world.checkpoint / MODEL
    header = world.chance.choice(headers)
    if not path.is_file():
        return
    length = world.chance.choice([len(header)] * 4 + [2**63, 0, 2**40])
    replace(path, struct.pack("<Q", length) + header + bytes(world.chance.choice([0, 4])))
    sign(world.checkpoint)
    world.note(f"{MODEL}: {header[:70]!r}, length {length}, signed")


def lying_state(world: World) -> None:
    """Write a training.pt with wrong values of plain types."""
    path = world.checkpoint / TRAINING
    chance = world.chance
    if not readable(world, path):
        return
    try:
        state = torch.load(path, weights_only=True)
    except Exception:  # after another mutation
        return
    places = [place for place in leaves_and_branches(state) if place]
    values = [
        *VALUES,
        torch.ones(3),
        torch.zeros(0),
        torch.full((2,), float("nan")),
        torch.ones(2**10, 2**10),
    ]
    place = chance.choice(places)
    value = chance.choice(values)
    kind = chance.choice(["value", "value", "drop"])
    try:
        torch.save(put(state, place, value, kind), path)
    except Exception:  # a value that torch cannot save, or an entry of a tuple
        return
    sign(world.checkpoint)
    world.note(f"{TRAINING}: {kind} {'.'.join(map(str, place)):.60} := {value!r:.50}, signed")


def events(world: World) -> None:
    """Write event files with too long records or random bytes."""
    path = world.place("events")
    chance = world.chance
    if not inside(path, world.run):
        return
    contents = [
        b"",
        b"\xff" * 12,
        struct.pack("<Q", 2**62) + bytes(4),
        struct.pack("<Q", 0) + bytes(8),
        bytes(100_000),
    ]
    content = chance.choice([*contents, chance.randbytes(10_000)])
    before = path.read_bytes() if readable(world, path) and chance.random() < 0.5 else b""
    replace(path, before + content)
    world.note(f"{world.name_of(path)}: {len(before)} good bytes, then {content[:12]!r}")


def crowd(world: World) -> None:
    """Create many files and folders, or unusual names."""
    kind = world.chance.choice(["many", "names", "steps", "deep"])
    folder = world.run
    if not folder.is_dir():
        return
    if kind == "many":
        for number in range(2_000):
            (folder / f"junk-{number}").touch()
    if kind == "names":
        forged = "a\nframework: all is well"
        for name in ("\x1b[31m", forged, "-rf", "$(touch x)", "\udcff", "x" * 250, " "):
            (folder / name).touch()
    if kind == "steps" and inside(world.place("checkpoints/step-1"), world.run):
        for number in (0, 10**8, 10**30, 10**200):
            with suppress(OSError):
                (world.place("checkpoints") / f"step-{number:08}").mkdir()
    if kind == "deep":
        (folder / "/".join(["d"] * 60)).mkdir(parents=True, exist_ok=True)
    world.note(f"crowd: {kind}")


CLASSES: dict[str, list[Callable[[World], None]]] = {
    "links": [link_file],
    "links at temporary names": [link_temporary],
    "hard links": [hard_link],
    "special files": [special],
    "folders elsewhere": [trial_folders],
    "bombs": [bomb, bomb, zip_bomb],
    "sparse files": [sparse],
    "torn files": [torn],
    "wrong types": [wrong_type],
    "text": [text_in_names],
    "settings": [settings],
    "tags": [tags],
    "code": [pickled, plugin],
    "lying checkpoints": [signed_manifest, lying_model, lying_state],
    "events, crowds": [events, crowd],
}
