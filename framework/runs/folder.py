"""A run on disk: its folder and the files that tell what it was. Who reads JSON can watch it.

runs/<experiment>/<name or time>/
    config.yaml  overrides.yaml  provenance.json  facts.json   what was composed, by whom, from which code and data
    status.json  metrics.jsonl  events.out.tfevents.*          where it stands, every number
    checkpoints/step-00001234/                                 see checkpoint/
"""

import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO
from weakref import ref

from framework.errors import RunError, short
from framework.errors.paths import expanded, real_path
from framework.registry.discovery import package_version
from framework.system.files import (
    failure_reason,
    open_file,
    read_json,
    read_yaml,
    remove_temporary,
    write_error,
    write_file,
)
from framework.system.git import commit_and_diff
from framework.system.locks import HeldLock, are_off, is_gone, lock, this_process

MOST_HOLDER = 300  # bytes of the text in a lock
PATIENCE = 2.0  # seconds for the workers of a killed run to end
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
LARGEST_SIZE = 2**48  # numbers in a sample: a tensor with more numbers fits into no memory
MOST_DIMENSIONS = 64  # torch's limit
LITTER = re.compile(
    r"(status|config\.yaml|facts\.json|overrides\.yaml|provenance\.json)\.tmp|metrics\.jsonl\.new"
)
"""Temporary files of earlier versions."""


class RunFolder:
    """Claims a new folder for a run, under `root`."""

    def __init__(
        self, root: Path = Path("runs"), name: str | None = None, *, experiment: str = "default"
    ):
        """Create the folder root/experiment/name.

        Args:
            root: where all runs go.
            name: of the run's folder (letters, digits, '.', '_', '-'); without one, the date and time.

        Raises RunError when the name is not allowed or taken, or the folder cannot be written.
        """
        for what, text in (("experiment", experiment), ("run.name", name)):
            if text is not None and (not re.fullmatch(NAME, text) or ".." in text):
                raise RunError(
                    f"{what} should be letters, digits, '.', '_' and '-' (at most 128), not {text!r}"
                )
        parent = expanded(root) / experiment
        check_encoding(real_path(parent))
        try:
            parent.mkdir(parents=True, exist_ok=True)
            with locked(parent):  # so that nobody sees a folder before its maker has locked it
                self.path = claim(parent, name)
                self.lock = only_writer(self.path)
        except OSError as error:
            where = parent / (name or "...")
            why = failure_reason(where, error)
            raise write_error(error)(
                f"the run folder {where} cannot be made: {why} (run.root={root})"
            ) from None

    @classmethod
    def existing(cls, path: Path) -> "RunFolder":
        """Take an existing run's folder. Raises RunError when another process writes there."""
        folder = cls.__new__(cls)
        folder.path = path
        try:
            with locked(path.parent):
                folder.lock = only_writer(path)
            remove_litter(path)
        except OSError as error:
            said = f"the run folder {path} cannot be written: {failure_reason(path, error)}"
            raise write_error(error)(said) from None
        return folder

    def write(self, file: str, content: Any) -> None:
        """Write a JSON or YAML file, whole or not at all."""
        write_file(self.path, file, dump(file, content))


def check_encoding(path: Path) -> None:
    """Raise RunError for a path that is no UTF-8: safetensors could write a checkpoint there, but not read it."""
    try:
        os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError:
        raise RunError(f"run.root: expected a path in UTF-8, got {path}") from None


def claim(parent: Path, name: str | None) -> Path:
    """Make a folder that did not exist before, so that no two runs share one; a named one without a config, which a
    run left that was killed before it began, is taken over."""
    wanted = name or time.strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in range(1, 1000):
        path = parent / (wanted if attempt == 1 else f"{wanted}_{attempt}")
        try:
            path.mkdir()
        except FileExistsError:
            if name is None:
                continue
            if not path.is_dir() or (path / "config.yaml").exists():
                advice = "choose another run.name, or go on with it by resume=auto"
                raise RunError(f"{path} exists already: {advice}") from None
        return path
    raise RunError(f"{parent} has too many runs named {wanted}")


def remove_litter(run: Path) -> None:
    """Remove the temporary files that killed processes left, also those of earlier versions."""
    remove_temporary(run)
    for path in run.iterdir():
        if LITTER.fullmatch(path.name) and (path.is_symlink() or not path.is_dir()):
            path.unlink(missing_ok=True)


def plugins_of(run: Path, key: str = "plugins") -> list[str]:
    """Return the plugins that a run was trained with (or "without_plugins"), as its provenance.json names them.

    The file may come from a stranger: a name with control characters is left out.
    """
    try:
        found = read_json(run, "provenance.json")[key]
        return [plugin for plugin in found if isinstance(plugin, str) and plugin.isprintable()]
    except (OSError, RunError, KeyError, TypeError):
        return []


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait for, and hold, the lock of a folder of runs."""
    with open_file(folder, ".lock", "a") as file:
        lock(file, folder / ".lock", wait=True)
        yield


def only_writer(run: Path, name: str = ".lock") -> HeldLock:
    """Lock a folder until the returned object is closed (a kill releases it). Raises RunError when taken.

    Without locks (see `locks.py`), the process that the file names is taken for the writer unless it has ended.
    """
    file, until = open_file(run, name, "a"), time.monotonic() + PATIENCE
    try:
        while not lock(file, run / name, wait=False):
            holder = holder_in(file)
            if not is_gone(holder) or time.monotonic() > until:
                advice = "wait for it, or choose another run.name"
                raise RunError(f"{run} is being written by {holder or 'another process'}: {advice}")
            time.sleep(0.01)
        holder = holder_in(file)
        if are_off() and holder and not is_gone(holder):
            advice = f"wait for it; if it has ended, delete {run / name}"
            raise RunError(f"{run} is being written by {holder}: {advice}")
        file.truncate(0)
        file.write(this_process().encode())
        file.flush()
    except BaseException:
        file.close()
        raise
    held = ref(file)  # a forked data worker would hold the lock on
    os.register_at_fork(after_in_child=lambda: close(held()))
    return HeldLock(file)


def holder_in(file: BinaryIO) -> str:
    file.seek(0)
    return file.read(MOST_HOLDER).decode("utf-8", errors="replace").strip()


def close(file: BinaryIO | None) -> None:
    if file is not None:
        file.close()


def read_facts(run: Path) -> dict[str, Any]:
    """Return what a run folder keeps of its data. Raises RunError when that is missing or is something else."""
    file = run / "facts.json"
    try:
        facts = read_json(run, "facts.json")
    except OSError as error:
        raise RunError(f"{file} cannot be read: {error.strerror}") from error
    if not isinstance(facts, dict):
        raise RunError(f"{file} cannot be read: expected a JSON object, got {short(facts)}")
    for name in ("in_shape", "out_shape", "classes"):
        if name not in facts:
            raise RunError(f"{file} cannot be read: it has no {name}")
    for name, (is_valid, expected) in FACTS.items():
        if name in facts and not is_valid(facts[name]):
            raise RunError(
                f"{file} cannot be read: expected {name} to be {expected}, got {short(facts[name])}"
            )
    return facts


def is_shape(value: Any) -> bool:
    return is_sizes(value) and len(value) <= MOST_DIMENSIONS and math.prod(value) <= LARGEST_SIZE


def is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(each) is int and 0 <= each <= LARGEST_SIZE for each in value
    )


def is_classes(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, str | int | float | None) for each in value
    )


def is_scale(value: Any) -> bool:
    """Whether a value is (mean, std) or (mean, std, log); each of the first two a number, or a list of them."""
    if not isinstance(value, list) or len(value) not in (2, 3):
        return False
    for moment in value[:2]:
        numbers = moment if isinstance(moment, list) else [moment]
        if not all(type(each) in (int, float) for each in numbers):
            return False
    return isinstance(value[-1], bool) or len(value) == 2


FACTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "in_shape": (is_shape, f"a list of at most {MOST_DIMENSIONS} sizes"),
    "out_shape": (is_shape, f"a list of at most {MOST_DIMENSIONS} sizes"),
    "classes": (is_classes, "a list of names"),
    "columns": (is_sizes, "a list of counts"),
    "scale": (is_scale, "a mean and a standard deviation"),
    "data": (lambda value: isinstance(value, dict), "an object"),
}


def dump(file: str, content: Any) -> str:
    if file.endswith(".json"):
        return json.dumps(content, indent=2, default=str) + "\n"
    import yaml

    dumper = getattr(
        yaml, "CSafeDumper", yaml.SafeDumper
    )  # libyaml's writes the same ten times as fast
    try:
        return yaml.dump(content, Dumper=dumper, sort_keys=False)
    except UnicodeEncodeError:  # a path that is no UTF-8, which libyaml cannot escape
        return yaml.dump(content, Dumper=yaml.SafeDumper, sort_keys=False)


def read_config(run: Path) -> dict[str, Any]:
    """Return the composed config of a run folder. Raises RunError when it is none."""
    file = run / "config.yaml"
    if not run.is_dir():
        raise RunError(f"there is no run folder {run}")
    try:
        config = read_yaml(run, "config.yaml")
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(
            f"{run} is not the folder of a run: it has no config.yaml{run_meant(run)}"
        ) from None
    except OSError as error:
        raise RunError(f"{file} cannot be read: {error.strerror}") from error
    if not isinstance(config, dict):
        raise RunError(f"{file} holds no config")
    return config


def run_behind(folder: Path) -> Path:
    """Return the folder of a run, or of a checkpoint, that a path stands for: of a sweep's `best`, which holds links,
    that of the run beside it.

    The links are not followed: the name of the run is read from one, and has to be that of a folder in the sweep.
    Any other folder is returned as it is.

    Raises RunError when a sweep's `best` leads elsewhere.
    """
    if folder.parent.name == "checkpoints":
        return run_behind(folder.parent.parent) / "checkpoints" / folder.name
    sweep = folder.absolute().parent
    link = folder if folder.is_symlink() else folder / "config.yaml"
    if folder.name != "best" or not link.is_symlink() or not (sweep / "sweep.json").is_file():
        return folder
    text = os.readlink(link)
    name = text if link == folder else text.removeprefix("../").removesuffix("/config.yaml")
    run = folder.parent / name
    plain = re.fullmatch(NAME, name) is not None and ".." not in name
    if (
        not plain
        or (link != folder and text != f"../{name}/config.yaml")
        or run.is_symlink()
        or not run.is_dir()
    ):
        raise RunError(
            f"{link} is a symbolic link to {text!r}; expected a run of the sweep {sweep}"
        )
    return run


def run_meant(folder: Path) -> str:
    """Return advice on which run was probably meant by a folder that is none."""
    if (folder / "sweep.json").is_file():
        best = folder / "best"
        return f"; it is a sweep, {f'whose best run is {best}' if best.exists() else 'of which no run is done yet'}"
    for above in (folder.parent, folder.parent.parent):
        if (above / "config.yaml").is_file():
            return f"; did you mean {above}?"
    return ""


def run_of_checkpoint(folder: Path) -> Path | None:
    """Return the run that a checkpoint's folder belongs to; None of any other folder."""
    run = folder.parent.parent
    if folder.parent.name == "checkpoints" and (run / "config.yaml").is_file():
        return run
    return None


def provenance(parts: dict[str, str]) -> dict[str, Any]:
    """Return what the run was made of: versions, machine, git commit and diff of the working folder, parts' sources."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **machine(),
        **code(Path.cwd()),
        "parts": parts,
    }


@cache
def machine() -> dict[str, Any]:
    packages = ("framework", "torch", "hydra-core", "numpy", "scikit-learn", "tensorboard")
    versions = {name: package_version(name) for name in packages}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
    }


@cache
def code(folder: Path) -> dict[str, str | None]:
    """Return commit and diff of a folder as they were at first: it is that code which is loaded."""
    commit, diff = commit_and_diff(folder)
    return {"git_commit": commit, "git_diff": diff}
