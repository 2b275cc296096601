"""A run on disk: its folder and the files that describe it, which other programs can read.

runs/<experiment>/<name or time>/
    config.yaml  overrides.yaml             the composed config, the command line
    provenance.json  facts.json             code and versions, facts of the data
    status.json                             the state of the run
    metrics.jsonl  events.out.tfevents.*    all metrics
    checkpoints/step-00001234/              see checkpoint/
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
from typing import Any

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
from framework.system.locks import WriterLock, lock

DEFAULT_ROOT = Path("runs")
FOLDER_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
LARGEST_SIZE = 2**48  # elements of a sample; more do not fit into any memory
MOST_DIMENSIONS = 64  # torch's limit
OLDER_TEMPORARY = re.compile(
    r"(status|config\.yaml|facts\.json|overrides\.yaml|provenance\.json)\.tmp|metrics\.jsonl\.new"
)
"""Temporary files of earlier versions."""


class RunFolder:
    """A new folder for a run, locked for this process, below `root`."""

    def __init__(
        self, root: Path = DEFAULT_ROOT, name: str | None = None, *, experiment: str = "default"
    ):
        """Create the folder root/experiment/name.

        Args:
            root: the folder of all runs.
            name: of the folder (letters, digits, '.', '_', '-'); by default the date and time.
            experiment: the name of the experiment.

        Raises:
            RunError: the name is not allowed or taken, or the folder cannot be written.
        """
        check_name("experiment", experiment)
        if name is not None:
            check_name("run.name", name)
        parent = expanded(root) / experiment
        check_encoding(real_path(parent))
        try:
            parent.mkdir(parents=True, exist_ok=True)
            with locked(parent):  # no other process sees the folder before it is locked
                self.path = claim(parent, name)
                self.lock: WriterLock | None = WriterLock(self.path)
        except OSError as error:
            path = parent / (name or "...")
            raise write_error(error)(
                f"the run folder {path} cannot be created: {failure_reason(path, error)} "
                f"(run.root={root})"
            ) from None

    @classmethod
    def existing(cls, path: Path, writes: bool = True) -> "RunFolder":
        """Open and lock the folder of an existing run.

        Args:
            path: the folder.
            writes: whether this process writes to it. If not, another process of the run holds the
                lock.

        Raises:
            RunError: another process writes to the folder, or it cannot be written.
        """
        folder = cls.__new__(cls)
        folder.path = path
        folder.lock = None
        if not writes:
            return folder
        try:
            with locked(path.parent):
                folder.lock = WriterLock(path)
            remove_temporary_files(path)
        except OSError as error:
            raise write_error(error)(
                f"the run folder {path} cannot be written: {failure_reason(path, error)}"
            ) from None
        return folder

    def release(self) -> None:
        """Release the lock, for another process or another object of this one."""
        if self.lock is not None:
            self.lock.close()

    def write(self, file: str, content: Any) -> None:
        """Write a JSON or YAML file completely or not at all."""
        write_file(self.path, file, dump(file, content))


def check_name(setting: str, name: str) -> None:
    """Raise RunError if a name is not allowed for a folder."""
    if not re.fullmatch(FOLDER_NAME, name) or ".." in name:
        raise RunError(f"{setting}={name}: expected at most 128 letters, digits, '.', '_' or '-'")


def check_encoding(path: Path) -> None:
    """Raise RunError for a path that is not UTF-8: safetensors cannot read a checkpoint there."""
    try:
        os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError:
        raise RunError(f"run.root: expected a path in UTF-8, got {path}") from None


def claim(parent: Path, name: str | None) -> Path:
    """Make a new folder, so that no two runs share one.

    A named folder without a config is reused: it belongs to a run that was killed before it began.
    Without a name, the date and time are used, with a number if they are taken.
    """
    base = name or time.strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in range(1, 1000):
        path = parent / (base if attempt == 1 else f"{base}_{attempt}")
        try:
            path.mkdir()
        except FileExistsError:
            if name is None:
                continue
            if not path.is_dir() or (path / "config.yaml").exists():
                raise RunError(
                    f"{path} exists already: choose another run.name, or resume it with resume=auto"
                ) from None
        return path
    raise RunError(f"{parent} has too many runs named {base}")


def remove_temporary_files(run: Path) -> None:
    """Remove the temporary files of killed processes, also those of earlier versions."""
    remove_temporary(run)
    for path in run.iterdir():
        if OLDER_TEMPORARY.fullmatch(path.name) and (path.is_symlink() or not path.is_dir()):
            path.unlink(missing_ok=True)


def plugins_of(run: Path, key: str = "plugins") -> list[str]:
    """Return the plugins of a run from its provenance.json.

    The file may come from an untrusted source: a name with control characters is left out.

    Args:
        run: the folder of the run.
        key: "plugins", or "without_plugins" for those that were excluded.
    """
    try:
        names = read_json(run, "provenance.json")[key]
        return [name for name in names if isinstance(name, str) and name.isprintable()]
    except (OSError, RunError, KeyError, TypeError):
        return []


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait for the lock of a folder of runs, and hold it."""
    with open_file(folder, ".lock", "a") as file:
        lock(file, folder / ".lock", wait=True)
        yield


def read_facts(run: Path) -> dict[str, Any]:
    """Return the facts of the data of a run.

    Raises:
        RunError: facts.json is missing, or is of another form.
    """
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
    """Return whether a value is a list of sizes that a tensor can have."""
    return is_sizes(value) and len(value) <= MOST_DIMENSIONS and math.prod(value) <= LARGEST_SIZE


def is_sizes(value: Any) -> bool:
    """Return whether a value is a list of sizes."""
    if not isinstance(value, list):
        return False
    return all(type(size) is int and 0 <= size <= LARGEST_SIZE for size in value)


def is_classes(value: Any) -> bool:
    """Return whether a value is a list of class names."""
    if not isinstance(value, list):
        return False
    return all(isinstance(name, str | int | float | None) for name in value)


def is_scale(value: Any) -> bool:
    """Return whether a value is (mean, std) or (mean, std, log), of numbers or lists of them."""
    if not isinstance(value, list) or len(value) not in (2, 3):
        return False
    for moment in value[:2]:
        numbers = moment if isinstance(moment, list) else [moment]
        if not all(type(number) in (int, float) for number in numbers):
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
    """Return a content as JSON or YAML, by the name of the file."""
    if file.endswith(".json"):
        return json.dumps(content, indent=2, default=str) + "\n"
    import yaml

    # The dumper of libyaml writes the same text ten times as fast.
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    try:
        text: str = yaml.dump(content, Dumper=dumper, sort_keys=False)
    except UnicodeEncodeError:  # a path that is not UTF-8, which libyaml cannot escape
        text = yaml.dump(content, Dumper=yaml.SafeDumper, sort_keys=False)
    return text


def read_config(run: Path) -> dict[str, Any]:
    """Return the composed config of a run.

    Raises:
        RunError: there is no such folder, or it is not the folder of a run.
    """
    file = run / "config.yaml"
    if not run.is_dir():
        raise RunError(f"there is no run folder {run}")
    try:
        config = read_yaml(run, "config.yaml")
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(
            f"{run} is not the folder of a run: it has no config.yaml{run_advice(run)}"
        ) from None
    except OSError as error:
        raise RunError(f"{file} cannot be read: {error.strerror}") from error
    if not isinstance(config, dict):
        raise RunError(f"{file} does not contain a config")
    return config


def resolve_run(folder: Path) -> Path:
    """Return the folder of a run that a user names.

    A relative path that does not exist is looked up in the folder `runs`, so that the names which
    `framework runs` prints can be used. The folder `best` of a sweep, which holds links, is
    resolved to the run in the same sweep. The links are not followed: the name of the run is read
    from one of them, and must be that of a folder in the sweep.

    Args:
        folder: of a run, or of a checkpoint in one; any other folder is returned unchanged.

    Raises:
        RunError: the `best` of a sweep leads elsewhere.
    """
    folder = in_default_root(folder)
    if folder.parent.name == "checkpoints":
        return resolve_run(folder.parent.parent) / "checkpoints" / folder.name
    sweep = folder.absolute().parent
    link = folder if folder.is_symlink() else folder / "config.yaml"
    if folder.name != "best" or not link.is_symlink() or not (sweep / "sweep.json").is_file():
        return folder
    target = os.readlink(link)
    name = target
    if link != folder:
        name = target.removeprefix("../").removesuffix("/config.yaml")
    run = folder.parent / name
    is_name = re.fullmatch(FOLDER_NAME, name) is not None and ".." not in name
    is_expected = target == (name if link == folder else f"../{name}/config.yaml")
    if not is_name or not is_expected or run.is_symlink() or not run.is_dir():
        raise RunError(
            f"{link} is a symbolic link to {target!r}; expected a run of the sweep {sweep}"
        )
    return run


def in_default_root(path: Path) -> Path:
    """Return the folder in `runs` with a name that does not exist here; otherwise the path."""
    if not path.is_absolute() and not os.path.lexists(path) and (DEFAULT_ROOT / path).is_dir():
        return DEFAULT_ROOT / path
    return path


def run_advice(folder: Path) -> str:
    """Return advice on the run that was probably meant, for a folder that is not a run."""
    if (folder / "sweep.json").is_file():
        best = folder / "best"
        if best.exists():
            return f"; it is a sweep, whose best run is {best}"
        return "; it is a sweep without a finished run"
    for above in (folder.parent, folder.parent.parent):
        if (above / "config.yaml").is_file():
            return f"; did you mean {above}?"
    return ""


def run_of_checkpoint(folder: Path) -> Path | None:
    """Return the run of a checkpoint; None for any other folder."""
    run = folder.parent.parent
    if folder.parent.name == "checkpoints" and (run / "config.yaml").is_file():
        return run
    return None


def provenance(parts: dict[str, str]) -> dict[str, Any]:
    """Return the versions, the machine, the git state of the working folder, and the parts.

    Args:
        parts: the source of each part, by its name.
    """
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **machine(),
        **git_state(Path.cwd()),
        "parts": parts,
    }


@cache
def machine() -> dict[str, Any]:
    """Return the platform and the versions of Python and of packages."""
    packages = ("framework", "torch", "hydra-core", "numpy", "scikit-learn", "tensorboard")
    versions = {name: package_version(name) for name in packages}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
    }


@cache
def git_state(folder: Path) -> dict[str, str | None]:
    """Return commit and diff of a folder at the first call, as loaded code does not change."""
    commit, diff = commit_and_diff(folder)
    return {"git_commit": commit, "git_diff": diff}
