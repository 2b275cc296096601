"""Composition: a command line becomes a checked Spec, through Hydra, so that sweepers, launchers and --cfg work."""

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .discovery import discover, shorter
from .errors import ConfigError, FrameworkError, PluginError, did_you_mean
from .overrides import Overrides, as_typed, groups, rewrite
from .sources import File, FileConfigSource, Sources, line_with, read_yaml, searching
from .spec import Spec, read_spec
from .store import fill_store

Through = Callable[[Callable[[Any], None]], None]
"""Lets Hydra call a function with each config that it composes."""


@dataclass
class Job:
    """One composed experiment: its specification, and in a sweep its number and what it has of its own."""

    spec: Spec
    experiment: str
    overrides: list[str]
    number: int | None = None
    label: str = ""


@dataclass
class CommandLine:
    """What `train` and `plan` take. With `cfg` or `info` Hydra only prints what is composed, and no job checks it."""

    overrides: list[str] = field(default_factory=list)
    plugins: list[str] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    multirun: bool = False
    cfg: str | None = None
    resolve: bool = False
    info: str | None = None

    @property
    def shows(self) -> bool:
        return bool(self.cfg or self.info)

    def chooses(self, group: str) -> bool:
        return any(override.lstrip("+").startswith(f"{group}=") for override in self.overrides)


def run(line: CommandLine, task: Callable[[Job], Any]) -> None:
    """Compose what the command line says and run the task on it (on each job of a sweep).

    All jobs of a sweep are checked before the first runs; then one that fails does not stop the others.
    Raises ConfigError with every problem, PluginError for plugins that do not load, and FrameworkError that counts the
    failed jobs of a sweep (the task itself has to say why each failed).
    """
    folders = config_folders(line)
    named = [*project_plugins(folders, line.overrides), *line.plugins]
    plugins = [str(Path(plugin).resolve()) if Path(plugin).exists() else plugin for plugin in named]
    discover(plugins)
    fill_store(plugins)
    overrides = rewrite(line.overrides, folders, line.multirun)
    if overrides.problems and line.shows:
        raise ConfigError(overrides.problems)
    with searching(folders) as files, tempfile.TemporaryDirectory(prefix="framework-") as scratch:
        through_hydra = partial(hydra_main, line, hydra_arguments(overrides, Path(scratch)), folders)
        compose = partial(make_job, line, overrides, files, plugins)
        try:
            known = line.multirun and not line.chooses("hydra/sweeper")  # which jobs there will be
            jobs = compose_sweep(through_hydra, compose) if known else []
            if not known or line.chooses("hydra/launcher"):
                settle(launch(through_hydra, compose, task))
            else:
                settle([failure(task, job) for job in jobs])
        except ConfigError as error:
            raise ConfigError(dict.fromkeys([*overrides.problems, *error.problems])) from error.__cause__


def hydra_arguments(overrides: Overrides, scratch: Path) -> list[str]:
    """Return Hydra's arguments: with those that keep it from writing folders, files and logs of its own."""
    own = {"hydra.run.dir": ".", "hydra.output_subdir": "null", "hydra.sweep.dir": scratch, "hydra.sweep.subdir": "."}
    own |= {"hydra/job_logging": "none", "hydra/hydra_logging": "none"}
    ours = [f"{key}={value}" for key, value in own.items() if key.replace("/", ".") not in overrides.typed]
    return [*ours, *overrides.arguments]


def launch(through_hydra: Through, compose: Callable[[Any], Job], task: Callable[[Job], Any]) -> list[Exception | None]:
    """Let Hydra run the task on each job it makes; returns how each failed, or None."""
    outcomes: list[Exception | None] = []
    here = os.getpid()

    def job(config: Any) -> None:
        try:
            outcomes.append(failure(task, compose(config)))
        except ConfigError as error:
            outcomes.append(error)
        if outcomes[-1] is not None and os.getpid() != here:
            raise outcomes[-1]  # from a launcher's process only Hydra can tell; here it would use its own words

    through_hydra(job)
    return outcomes


def failure(task: Callable[[Job], Any], job: Job) -> Exception | None:
    """Run the task on a job; returns how it failed, or None."""
    try:
        task(job)
    except Exception as error:
        return error
    return None


def settle(outcomes: list[Exception | None]) -> None:
    """Raise what the only job failed by; of several, how many failed."""
    failures = [outcome for outcome in outcomes if outcome is not None]
    if failures and len(outcomes) == 1:
        raise failures[0]
    if failures:
        counted = FrameworkError(f"{len(failures)} of {len(outcomes)} jobs failed")
        counted.exit_status = 2 if all(isinstance(failure, FrameworkError) for failure in failures) else 1
        raise counted


def hydra_main(line: CommandLine, arguments: list[str], folders: list[Path], job: Callable[[Any], None]) -> None:
    """Let Hydra compose, and print what was asked for or run the job on what it made. Its errors are raised as ours.

    Its sweeper is spared a rehearsal, of composing each job before any runs: whether that can be done is known here.
    """
    version.setbase("1.3")
    rehearsal, Sweeper.validate_batch_is_legal = Sweeper.validate_batch_is_legal, nothing  # type: ignore[method-assign]
    try:
        hydra = Hydra.create_main_hydra2("compose", create_config_search_path(str(folders[0])))
        if line.cfg:
            hydra.show_cfg("config", arguments, line.cfg, package=None, resolve=line.resolve)
        elif line.info:
            hydra.show_info(line.info, "config", arguments)
        elif line.multirun:
            hydra.multirun("config", job, [*arguments, "hydra.mode=MULTIRUN"])
        else:
            hydra.run("config", job, [*arguments, "hydra.mode=RUN"])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([words_of(error)]) from error
    finally:
        Sweeper.validate_batch_is_legal = rehearsal  # type: ignore[method-assign]
        GlobalHydra.instance().clear()


def nothing(*_: Any, **__: Any) -> None:
    return None


def compose_sweep(through_hydra: Through, compose: Callable[[Any], Job]) -> list[Job]:
    """Compose every job of a sweep without running any. Raises ConfigError with all their problems."""
    problems: dict[str, None] = {}
    jobs: list[Job] = []

    def collect(config: Any) -> None:
        try:
            jobs.append(compose(config))
        except ConfigError as error:
            problems.update(dict.fromkeys(error.problems))

    through_hydra(collect)
    names = [str(job.spec.sections["run"]["name"]) for job in jobs]
    taken = next((name for name in names if name != "None" and names.count(name) > 1), None)
    if taken is not None:
        problems[f"run.name={taken}: each job of a sweep needs a folder of its own: leave the name out"] = None
    if problems:
        raise ConfigError(problems)
    return jobs


def make_job(line: CommandLine, overrides: Overrides, files: list[File], plugins: list[str], config: Any) -> Job:
    """Check a composed config, with what was wrong on the command line, and report all of it together."""
    hydra_config = HydraConfig.get()
    experiment = hydra_config.runtime.choices.get("experiment") or "default"
    source = Sources(overrides.typed, files)
    try:
        spec = read_spec(to_tree(config, source), source)
    except ConfigError as error:
        raise ConfigError([*overrides.problems, *error.problems]) from None
    if overrides.problems:
        raise ConfigError(overrides.problems)
    spec.plugins = plugins
    if hydra_config.mode is None or hydra_config.mode.name != "MULTIRUN":
        return Job(spec, experiment, line.overrides)
    typed = dict.fromkeys(as_typed(override) for override in hydra_config.overrides.task)
    own = [each for each in typed if each.lstrip("+").partition("=")[0].replace("/", ".") in overrides.swept]
    return Job(spec, experiment, list(typed), hydra_config.job.num, " ".join(own or typed))


def to_tree(config: Any, source: Sources) -> dict[str, Any]:
    """Return the config in plain values; references to other keys are resolved, those that follow a kind kept."""
    raw = OmegaConf.to_container(config, resolve=False)
    try:
        resolved = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        key, said = str(error.full_key), str(error.msg).splitlines()[0]
        said = re.sub(r".*key '([^']+)' not found.*", r"refers to \1, which is not there", said)
        said = "refers to itself" if said.startswith("Recursive") else said.replace("Interpolation", "a reference")
        raise ConfigError([f"{key}={value_at(raw, key)}: {said} ({source(key)})"]) from None
    return keep_following(raw, resolved)


def value_at(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else tree
    return tree


def keep_following(raw: Any, resolved: Any) -> Any:
    """Replace by what was written each resolved value that was a plain reference such as ${activation}."""
    if isinstance(raw, dict) and isinstance(resolved, dict):
        return {key: keep_following(raw[key], resolved[key]) for key in raw}
    if isinstance(raw, list) and isinstance(resolved, list):
        return [keep_following(a, b) for a, b in zip(raw, resolved, strict=True)]
    return raw if isinstance(raw, str) and raw.startswith("${") and raw[2:-1].isidentifier() else resolved


def config_folders(line: CommandLine) -> list[Path]:
    """The folders with config files: ours, then the project's `conf` in the working folder, then --config-dir."""
    import framework_conf  # not at the top: it is data, beside the package

    ours = Path(framework_conf.__path__[0]).resolve()
    here = Path("conf").resolve()
    folders = [ours]
    if (here / "config.yaml").is_file() or (here / "experiment").is_dir():
        folders.append(here)
    for folder in line.folders:
        if not folder.is_dir():
            raise FrameworkError(f"--config-dir {folder}: no such folder (looked in {Path.cwd()})")
        folders.append(folder.resolve())
    return list(dict.fromkeys(folders))


def project_plugins(folders: list[Path], overrides: Iterable[str]) -> Iterator[str]:
    """Yield what `plugins:` names in the project's config.yaml and in the chosen experiment, before composing."""
    chosen = [name for o in overrides if o.startswith("experiment=") for name in o.partition("=")[2].split(",")]
    for name in ("config", *(f"experiment/{name}" for name in chosen)):
        for folder in [f for f in reversed(folders) if (f / f"{name}.yaml").is_file()][:1]:  # the one that Hydra reads
            file = folder / f"{name}.yaml"
            listed = read_yaml(file).get("plugins") or []
            if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
                raise PluginError(f"{file}: plugins should be a list of paths or module names, not {listed!r}")
            yield from (locate(plugin, folder) for plugin in listed)


def locate(plugin: str, folder: Path) -> str:
    """Return the path of a plugin named in a config file: from the working folder, the config's, or the one above."""
    for base in (Path.cwd(), folder.parent, folder):
        if (base / plugin).exists():
            return str(base / plugin)
    return plugin


ADVICE: tuple[str, ...] = ("To append", "Set the env", "Did you mean to override", "See ", "Config search path")
ADVICE += ("provider=", "full_key", "object_type", "reference_type")


def words_of(error: Exception) -> str:
    """Return a Hydra error in our words: which file and line, what is missing, what there is; without its advice."""
    text = f"{error}\n{error.__cause__ or ''}"
    inside = re.match(r"In '([^']+)': ", text)
    missing = re.search(r"Could not (?:find|load|override) '([^']+)'", text)
    if missing:
        said, word = no_such(missing[1], text)
    elif match := re.search(r"Could not delete (?:from config\. )?'([^']+)'", text):
        said, word = f"~{match[1]}: there is no {match[1]} to take away", match[1]
    elif "INTERVAL_SWEEP" in text:
        said, word = "interval(...) is for a sweeper that draws values: write a,b,c or range(...)", ""
    else:
        lines = [line.strip() for line in text.removeprefix(inside[0] if inside else "").splitlines()]
        said, word = "; ".join(dict.fromkeys(line for line in lines if line and not line.startswith(ADVICE))), ""
    read = [file for file, _ in reversed(FileConfigSource.read) if word and word in file.read_text()]
    return f"{shorter(read[0])}:{line_with(read[0], word)}: {said}" if read and (inside or missing) else said


def no_such(path: str, text: str) -> tuple[str, str]:
    """Say that a group has no such option, or that there is no such group; returns it and the word that is wrong."""
    group, _, name = path.rpartition("/")
    if group in groups():
        return groups()[group].unknown(name), name
    if path.startswith("hydra."):
        return f"{path}: Hydra has no such setting (--cfg hydra shows them)", path
    listed = text.partition("Available options in")[2].splitlines()[1:]
    options = [line.strip() for line in listed if line.startswith("\t") and ":" not in line]
    if group in ("hydra/launcher", "hydra/sweeper"):
        package = f"hydra-{name.replace('_', '-')}-{group.partition('/')[2]}"
        chosen = path.replace(f"/{name}", f"={name}")
        return f"{chosen}: not installed ({package}?); there is: {', '.join(options)}", name
    if group:
        return f"there is no {group} {name!r}; {did_you_mean(name, options)}", name
    return f"there is no group {name!r} of parts; {did_you_mean(name, groups())}", name
