"""A run on disk: its folder and the files that tell what it was. Who reads JSON can watch it.

runs/<experiment>/<name or time>/
    config.yaml  overrides.yaml  provenance.json  facts.json   what was composed, by whom, from which code and data
    status.json  metrics.jsonl  events.out.tfevents.*          where it stands, every number
    checkpoints/step-00001234/                                 see checkpoint.py
"""

import fcntl
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TextIO
from weakref import ref

from .discovery import package_version
from .errors import RunError
from .files import reason_of, write_file
from .paths import expanded

PATIENCE = 2.0  # seconds for the workers of a killed run to end
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"


class RunFolder:
    """Claims a new folder for a run, under `root`."""

    def __init__(self, root: Path = Path("runs"), name: str | None = None, *, experiment: str = "default"):
        """Create the folder root/experiment/name.

        Args:
            root: where all runs go.
            name: of the run's folder (letters, digits, '.', '_', '-'); without one, the date and time.

        Raises RunError when the name is not allowed or taken, or the folder cannot be written.
        """
        for what, text in (("experiment", experiment), ("run.name", name)):
            if text is not None and (not re.fullmatch(NAME, text) or ".." in text):
                raise RunError(f"{what} should be letters, digits, '.', '_' and '-' (at most 128), not {text!r}")
        parent = expanded(root) / experiment
        check_encoding(parent.resolve())
        try:
            parent.mkdir(parents=True, exist_ok=True)
            with locked(parent):  # so that nobody sees a folder before its maker has locked it
                self.path = claim(parent, name)
                self.lock = only_writer(self.path)
        except OSError as error:
            where = parent / (name or "...")
            why = reason_of(where, error)
            raise RunError(f"the run folder {where} cannot be made: {why} (run.root={root})") from None

    @classmethod
    def existing(cls, path: Path) -> "RunFolder":
        """Take an existing run's folder. Raises RunError when another process writes there."""
        folder = cls.__new__(cls)
        folder.path = path
        try:
            with locked(path.parent):
                folder.lock = only_writer(path)
        except OSError as error:
            raise RunError(f"the run folder {path} cannot be written: {reason_of(path, error)}") from None
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


def plugins_of(run: Path) -> list[str]:
    """Return the plugins that a run was trained with, as its provenance.json names them.

    The file may come from a stranger: a name with control characters is left out.
    """
    try:
        found = json.loads((run / "provenance.json").read_text(encoding="utf-8"))
        return [plugin for plugin in map(str, found["plugins"]) if plugin.isprintable()]
    except (OSError, ValueError, KeyError, TypeError):
        return []


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait for, and hold, the lock of a folder of runs."""
    with (folder / ".lock").open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def only_writer(run: Path) -> TextIO:
    """Lock a run's folder for as long as the returned file is open (a kill closes it). Raises RunError when taken."""
    file, until = (run / ".lock").open("a+", encoding="utf-8"), time.monotonic() + PATIENCE
    while not take(file):
        file.seek(0)
        holder = file.read().strip()
        if not gone(holder) or time.monotonic() > until:
            file.close()
            raise RunError(
                f"{run} is being written by {holder or 'another process'}: wait for it, or choose another run.name"
            )
        time.sleep(0.01)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    held = ref(file)  # a forked data worker would hold the lock on
    os.register_at_fork(after_in_child=lambda: close(held()))
    return file


def take(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def gone(holder: str) -> bool:
    """Whether who holds a lock was a process of this machine that is no more, so that only its data workers hold it
    on, for the moment that it takes them to end."""
    match = re.fullmatch(rf"process (\d+) on {re.escape(platform.node())}", holder)
    if match is None:
        return False
    try:
        os.kill(int(match[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def close(file: TextIO | None) -> None:
    if file is not None:
        file.close()


def read_facts(run: Path) -> dict[str, Any]:
    """Return what a run folder keeps of its data. Raises RunError when that is missing or is something else."""
    file = run / "facts.json"
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        shapes = [[int(size) for size in facts[name]] for name in ("in_shape", "out_shape")]
        return facts | dict(zip(("in_shape", "out_shape"), shapes, strict=True)) | {"classes": list(facts["classes"])}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise RunError(f"{file} cannot be read: {type(error).__name__}: {error}") from error


def dump(file: str, content: Any) -> str:
    if file.endswith(".json"):
        return json.dumps(content, indent=2, default=str) + "\n"
    import yaml

    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # libyaml's writes the same ten times as fast
    try:
        return yaml.dump(content, Dumper=dumper, sort_keys=False)
    except UnicodeEncodeError:  # a path that is no UTF-8, which libyaml cannot escape
        return yaml.dump(content, Dumper=yaml.SafeDumper, sort_keys=False)


def read_config(run: Path) -> dict[str, Any]:
    """Return the composed config of a run folder. Raises RunError when it is none."""
    import yaml

    file = run / "config.yaml"
    if not run.is_dir():
        raise RunError(f"there is no run folder {run}")
    if not file.is_file():
        raise RunError(f"{run} is not the folder of a run: it has no config.yaml{run_meant(run)}")
    try:
        text = file.read_text(encoding="utf-8")
        config = yaml.safe_load(text)  # libyaml's reader has no limit to the depth
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise RunError(f"{file} cannot be read: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(config, dict):
        raise RunError(f"{file} holds no config")
    return config


def run_meant(folder: Path) -> str:
    """Return advice on which run was probably meant by a folder that is none."""
    if (folder / "sweep.json").is_file():
        return f"; it is a sweep, whose best run is {folder / 'best'}"
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
    return {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **machine(), **code(Path.cwd()), "parts": parts}


@cache
def machine() -> dict[str, Any]:
    packages = ("framework", "torch", "hydra-core", "numpy", "scikit-learn", "tensorboard")
    versions = {name: package_version(name) for name in packages}
    return {"python": platform.python_version(), "platform": platform.platform(), "packages": versions}


@cache
def code(folder: Path) -> dict[str, str | None]:
    """Return commit and diff of a folder as they were at first: it is that code which is loaded."""
    return {"git_commit": git(folder, "rev-parse", "HEAD"), "git_diff": git(folder, "diff", "HEAD")}


def git(folder: Path, *arguments: str) -> str | None:
    """Return what git says in a folder, or None outside a repository or without git."""
    try:
        command = ["git", *arguments]
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    text = done.stdout.decode("utf-8", errors="replace")  # a diff may hold a file of any encoding
    return text.strip() if done.returncode == 0 else None
