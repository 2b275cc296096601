"""Train a new run with the config of another one: `framework rerun RUN`."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framework.composition.override_syntax import override_key
from framework.composition.spec import Spec
from framework.data.dataset import Data
from framework.errors import RunError, short
from framework.errors.paths import expanded
from framework.experiment.build import build_data
from framework.experiment.launch import is_launcher
from framework.experiment.resumption.resume_overrides import apply_overrides
from framework.experiment.run_facts import content_changes, data_facts, fact_changes
from framework.experiment.trained.load import read_spec_of
from framework.registry.discovery import discover, located
from framework.runs.folder import dump, git_state, machine, read_config, resolve_run
from framework.runs.run_files import RunFiles
from framework.system.files import failure_reason, write_error

FIXED = ("resume", "plugins", "sweep", "hydra")
"""Sections of a config that a new run does not take from another one."""
MOST_SUFFIX = 1000


@dataclass
class Rerun:
    """A run that is to be trained.

    Attributes:
        spec: the experiment.
        experiment: its name.
        overrides: the command line of the earlier run, and the new overrides.
        differences: lines on code, versions and data that differ from those of the earlier run.
        data: of the spec, built already; None if other processes build it.
        claimed: the empty folder of the new run, so that no other rerun takes its name; None if
            the overrides name the run.
    """

    spec: Spec
    experiment: str
    overrides: list[str]
    differences: list[str]
    data: Data | None = None
    claimed: Path | None = None

    def release(self) -> None:
        """Remove the folder of the new run if the run has not begun."""
        if self.claimed is not None:
            with suppress(OSError):  # it is not empty: the run has begun
                self.claimed.rmdir()


def prepare_rerun(
    run: Path | str,
    overrides: Sequence[str],
    plugins: Sequence[str] = (),
    without: Sequence[str] = (),
) -> Rerun:
    """Return a new run with the config of another one, and what differs from it.

    It has a folder already if it has the name of the other run with a suffix; `Rerun.release`
    removes the folder of a run that does not begin.

    Args:
        run: the folder of the other run.
        overrides: settings to change, such as seed=1 or run.name=again.
        plugins: files, folders or modules that register parts.
        without: installed plugins that are not loaded.

    Raises:
        RunError: there is no such run.
        ConfigError: an override or the config has problems.
    """
    folder = resolve_run(expanded(run))
    tree = read_config(folder)
    names = [located(plugin) for plugin in plugins]
    discover(names, list(without))
    files = RunFiles(folder)
    place = folder.absolute().parent  # of the experiment
    if files.sweep is not None:
        place = place.parent
    section = tree.get("run")
    name = section.get("name") if isinstance(section, dict) and files.sweep is None else None
    tree["run"] = {"root": str(shortest(place.parent)), "name": None}
    for key in FIXED:
        tree.pop(key, None)
    typed = {override_key(text): text for text in overrides}
    spec = read_spec_of(folder, apply_overrides(tree, overrides, FIXED), typed)
    spec.plugins = names
    spec.without = list(without)
    kept = [text for text in files.overrides if is_kept(text, typed)]
    rerun = Rerun(spec, place.name, [*kept, *overrides], [])
    rerun.differences = [*code_differences(files), *version_differences(files)]
    data = build_data(spec)
    rerun.differences += data_differences(files, spec, data)
    if not is_launcher(spec):
        rerun.data = data
    if isinstance(name, str) and "run.name" not in typed:
        rerun.claimed = claim_name(expanded(spec.sections["run"]["root"]) / place.name, name)
        spec.sections["run"]["name"] = rerun.claimed.name
        spec.tree["run"]["name"] = rerun.claimed.name
    return rerun


def shortest(path: Path) -> Path:
    """Return a path below the working folder relative to it, any other path unchanged."""
    working = Path.cwd()
    return path.relative_to(working) if path.is_relative_to(working) else path


def claim_name(experiment: Path, name: str) -> Path:
    """Make the folder first_rerun for first, or first_rerun-2 and so on if it is taken.

    Raises:
        RunError: the folder cannot be made.
    """
    base = re.sub(r"_rerun(-\d+)?$", "", name)[:110] + "_rerun"
    for number in range(1, MOST_SUFFIX):
        path = experiment / (base if number == 1 else f"{base}-{number}")
        try:
            experiment.mkdir(parents=True, exist_ok=True)
            path.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            reason = failure_reason(path, error)
            raise write_error(error)(f"{path} cannot be created: {reason}") from error
        return path
    raise RunError(f"{experiment} has too many runs named {base}: give run.name")


def is_kept(text: str, typed: Mapping[str, str]) -> bool:
    """Return whether an override of the earlier run is one of the new run too."""
    try:
        key = override_key(text)
    except ValueError:
        return False
    return key not in typed and key.partition(".")[0] not in ("run", *FIXED)


def code_differences(files: RunFiles) -> Iterator[str]:
    """Yield lines on the git commit and the uncommitted changes that differ from those of a run."""
    before = files.provenance
    now = git_state(Path.cwd())
    old = before.get("git_commit")
    new = now["git_commit"]
    if not isinstance(old, str):
        yield f"code: {files.path} has no git commit, so that its code cannot be compared"
        return
    if old != new:
        current = "not in a repository" if new is None else f"commit {new[:12]}"
        yield f"code: {current}, was commit {short(old[:12], quote=False)}"
    old_diff = before.get("git_diff") or ""
    new_diff = now["git_diff"] or ""
    if old_diff == new_diff:
        return
    if old == new or old_diff:
        described = [changed_files(text) for text in (str(new_diff), str(old_diff))]
        yield f"code: uncommitted changes in {described[0]}, was {described[1]}"


def changed_files(diff: str) -> str:
    """Return the names of the files in a diff, shortened."""
    names = re.findall(r"(?m)^diff --git a/(\S+)", diff)
    return short(", ".join(names), 120, quote=False) if names else "no file"


def version_differences(files: RunFiles) -> Iterator[str]:
    """Yield lines on versions and the platform that differ from those of a run."""
    before = files.provenance
    if not before:
        yield f"versions: {files.path} does not record them"
        return
    now = machine()
    for key in ("python", "platform"):
        if before.get(key) != now[key]:
            yield f"versions: {key} {now[key]}, was {short(before.get(key), quote=False)}"
    packages = before.get("packages")
    if not isinstance(packages, dict):
        return
    for name, version in now["packages"].items():
        if packages.get(name) != version:
            was = short(packages.get(name), quote=False)
            yield f"versions: {name} {version}, was {was}"


def data_differences(files: RunFiles, spec: Spec, data: Data) -> list[str]:
    """Return lines on the data that differ from those of a run."""
    before = files.facts
    if not before:
        return [f"data: {files.path} has no facts.json, so that its data cannot be compared"]
    task = spec.parts["task"]()
    task.check(data)
    now: dict[str, Any] = json.loads(
        dump("facts.json", data_facts(data, task, task.targets_of(data)[1]))
    )
    found = [*fact_changes(before, now), *content_changes(before.get("content"), now["content"])]
    return [f"data: {text}" for text in found]
