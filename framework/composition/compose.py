"""Composition: a command line becomes a checked Spec, through Hydra, so that sweepers, launchers and --cfg work."""

import io
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from framework.errors import ConfigError, FrameworkError, PluginError, did_you_mean
from framework.errors.paths import expanded, real_path, shorter
from framework.errors.terminal import note, printable_lines
from framework.registry.discovery import discover, locate, located
from framework.registry.registry import Registry

from .config_files import File, FileConfigSource, Sources, line_with, read_yaml, searching
from .hydra_groups import fill_store
from .overrides import Overrides, as_typed, groups, own_settings, rewrite
from .spec import Spec, follow, read_spec


@dataclass
class Job:
    """One composed experiment: its specification, and in a sweep its number and what it has of its own."""

    spec: Spec
    experiment: str
    overrides: list[str]
    number: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)  # its own: {"optimizer.lr": 0.1, "model": "cnn"}
    sweep: Path | None = None  # the folder of its sweep, which holds that of its run
    inexact: bool = False
    traceback: bool = False

    @property
    def label(self) -> str:
        return " ".join(f"{key}={'null' if value is None else value}" for key, value in self.settings.items())


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
    inexact: bool = False
    traceback: bool = False
    only_plan: bool = False
    without: list[str] = field(default_factory=list)

    @property
    def shows(self) -> bool:
        return bool(self.cfg or self.info)


@dataclass
class Composing:
    """What it takes to make a job of a config that Hydra composed: the command line as read, the files behind it."""

    line: CommandLine
    overrides: Overrides
    files: list[File]
    plugins: list[str]
    folders: list[Path]

    def job(self, config: Any) -> Job:
        """Check a composed config, with what was wrong on the command line, and report all of it together."""
        hydra = HydraConfig.get()
        multirun = hydra.mode is not None and hydra.mode.name == "MULTIRUN"
        typed = list(hydra.overrides.task) if multirun else None
        tree = to_tree(config, Sources(self.overrides.typed, self.files))
        return self.checked(tree, hydra.runtime.choices.get("experiment"), typed, hydra.job.num if multirun else None)

    def checked(
        self, tree: dict[str, Any], experiment: str | None, typed: list[str] | None, number: int | None = None
    ) -> Job:
        """Do so with the tree of plain values. `typed`: the overrides of a job of a sweep. Raises ConfigError."""
        try:
            spec = read_spec(tree, Sources(self.overrides.typed, self.files), self.overrides.typed)
        except ConfigError as error:
            raise ConfigError([*self.overrides.problems, *error.problems]) from None
        problems = [*self.overrides.problems, *self.idle(spec)]
        if problems:
            raise ConfigError(problems)
        spec.plugins, spec.without = self.plugins, self.line.without
        job = Job(spec, experiment or "default", self.line.overrides, number)
        job.inexact, job.traceback = self.line.inexact, self.line.traceback
        if typed is not None:
            job.overrides = list(dict.fromkeys(as_typed(override) for override in typed))
            job.settings = own_settings(typed, self.overrides)
        return job

    def idle(self, spec: Spec) -> list[str]:
        """Return what was typed and has no effect, whether or not a run is resumed."""
        if spec.resume == "never":
            advice = "nothing is resumed: give resume=auto or resume=RUN, or leave it out"
            return [f"--inexact has no effect: {advice}"] if self.line.inexact else []
        if spec.resume == "auto":
            return []
        return [
            f"{text}: has no effect: resume={spec.resume} goes on in the folder of that run (command line)"
            for key, text in self.overrides.typed.items()
            if key.startswith(("run.", "init_from"))
        ]


def run(
    line: CommandLine, task: Callable[[Job], Any], explain: Callable[[Exception], list[str]] = lambda e: [str(e)]
) -> None:
    """Compose what the command line says and run the task on it: on a job, or on each of a sweep.

    All jobs of a sweep are checked before the first runs; then one that fails does not stop the others, and `explain`
    gives the lines that say why.
    Raises ConfigError with every problem, PluginError for plugins that do not load, and FrameworkError that counts the
    failed jobs of a sweep.
    """
    folders = config_folders(line)
    named = [*project_plugins(folders, line.overrides, Path.cwd()), *line.plugins]
    plugins = [located(plugin) for plugin in named]
    discover(plugins, line.without)
    fill_store(plugins, line.without)
    overrides = rewrite(line.overrides, folders, line.multirun, line.shows)
    if overrides.problems and line.shows:
        raise ConfigError(overrides.problems)
    with searching(folders) as files, tempfile.TemporaryDirectory(prefix="framework-") as scratch:
        composing = Composing(line, overrides, files, plugins, folders)
        arguments = hydra_arguments(overrides, Path(scratch))
        try:
            if line.multirun:
                from framework.tuning.sweep.sweep import sweep  # not at the top: a single run does without

                notes(overrides.notes)
                sweep(composing, arguments, task, explain)
                return
            made = compose(composing, arguments)
        except ConfigError as error:
            raise ConfigError(dict.fromkeys([*overrides.problems, *error.problems])) from error.__cause__
    notes(overrides.notes)
    for job in made:
        task(job)


def notes(lines: Iterable[str]) -> None:
    """Print what has no effect, and does no harm, for the person at the terminal."""
    for line in lines:
        note(line)


def compose(composing: Composing, arguments: list[str]) -> list[Job]:
    """Let Hydra compose the job; none when it only prints what was asked for."""
    line, made, problems = composing.line, list[Job](), list[str]()

    def collect(config: Any) -> None:
        try:
            made.append(composing.job(config))
            composing.overrides.notes += sweep_without_flag(HydraConfig.get())
        except ConfigError as error:  # raised here, Hydra would put words of its own to it
            problems.extend(error.problems)

    with hydra_in(composing.folders) as hydra:
        if line.shows:
            show(hydra, line, arguments)
        else:
            hydra.run("config", collect, [*arguments, "hydra.mode=RUN"])
    if problems:
        raise ConfigError(problems)
    return made


def show(hydra: Hydra, line: CommandLine, arguments: list[str]) -> None:
    """Let Hydra print what it composed."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        if line.cfg:
            hydra.show_cfg("config", arguments, line.cfg, package=None, resolve=line.resolve)
        elif line.info:
            hydra.show_info(line.info, "config", arguments)
    print(printable_lines(printed.getvalue()), end="")


def sweep_without_flag(hydra: Any) -> list[str]:
    """Return a note on an experiment file that describes a sweep, when it is run without -m."""
    params = hydra.sweeper.get("params") or {}
    return [f"hydra.sweeper.params has no effect without -m: {', '.join(params)}"] if params else []


def hydra_arguments(overrides: Overrides, scratch: Path) -> list[str]:
    """Return Hydra's arguments: with those that keep it from writing folders, files and logs of its own."""
    own = {"hydra.run.dir": ".", "hydra.output_subdir": "null", "hydra.sweep.dir": scratch, "hydra.sweep.subdir": "."}
    own |= {"hydra/job_logging": "none", "hydra/hydra_logging": "none"}
    typed = {text.partition("=")[0].lstrip("+~").replace("/", ".") for text in overrides.arguments}
    ours = [f"{key}={value}" for key, value in own.items() if key.replace("/", ".") not in typed]
    return [*ours, *overrides.arguments]


@contextmanager
def hydra_in(folders: list[Path]) -> Iterator[Hydra]:
    """Open Hydra on folders of config files. Its errors are raised as ours."""
    version.setbase("1.3")
    try:
        yield Hydra.create_main_hydra2("compose", create_config_search_path(str(folders[0])))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([words_of(error)]) from error
    finally:
        GlobalHydra.instance().clear()


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
    tree = keep_following(raw, resolved)
    for key, names in source.of_others(tree).items():
        tree[key] = {name: value for name, value in tree[key].items() if name not in names}
    return tree


def value_at(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else tree
    return tree


def keep_following(raw: Any, resolved: Any) -> Any:
    """Replace by what was written each resolved value that follows the experiment's choice, such as ${activation}."""
    if isinstance(raw, dict) and isinstance(resolved, dict):
        return {key: keep_following(raw[key], resolved[key]) for key in raw}
    if isinstance(raw, list) and isinstance(resolved, list):
        return [keep_following(a, b) for a, b in zip(raw, resolved, strict=True)]
    return raw if isinstance(raw, str) and raw in map(follow, Registry.every) else resolved


def config_folders(line: CommandLine) -> list[Path]:
    """The folders with config files: ours, then the project's `conf` in the working folder, then --config-dir."""
    import framework_conf  # not at the top: it is data, beside the package

    ours = real_path(Path(framework_conf.__path__[0]))
    here = real_path(Path("conf"))
    folders = [ours]
    if (here / "config.yaml").is_file() or (here / "experiment").is_dir():
        folders.append(here)
    for folder in map(expanded, line.folders):
        if not folder.is_dir():
            raise FrameworkError(f"--config-dir {folder}: no such folder (looked in {Path.cwd()})")
        if not any(folder.rglob("*.yaml")):
            raise FrameworkError(f"--config-dir {folder}: there is no .yaml file in it")
        folders.append(real_path(folder))
    return list(dict.fromkeys(folders))


def project_plugins(folders: list[Path], overrides: Iterable[str], here: Path | None) -> Iterator[str]:
    """Yield what `plugins:` names in the project's config.yaml and in the chosen experiment, before composing.

    here: the working folder, for plugins with a relative path; None: they are looked for beside the config files only.
    """
    chosen = [name for o in overrides if o.startswith("experiment=") for name in o.partition("=")[2].split(",")]
    names = ["config", *(f"experiment/{name}" for name in chosen)]
    for name in names:  # the list grows by what an experiment builds on
        for folder in [f for f in reversed(folders) if (f / f"{name}.yaml").is_file()][:1]:  # the one that Hydra reads
            file = folder / f"{name}.yaml"
            content = read_yaml(file)
            below, listed = content.get("defaults"), content.get("plugins") or []
            wider = [f"experiment/{each}" for each in (below if isinstance(below, list) and name != "config" else ())]
            names += [each for each in wider if each not in names]
            if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
                raise PluginError(f"{file}: plugins should be a list of paths or module names, not {listed!r}")
            yield from (locate(plugin, folder, here) for plugin in listed)


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
    elif match := re.search(r"Error merging override \+*([^=]+)=.*; *list index out of range", text, re.DOTALL):
        said, word = f"{match[1]}: the list has no such item", ""
    elif "INTERVAL_SWEEP" in text:
        said, word = "interval(...) is for a sweeper that draws values: write a,b,c or range(...)", ""
    else:
        lines = [line.strip() for line in text.removeprefix(inside[0] if inside else "").splitlines()]
        said, word = "; ".join(dict.fromkeys(line for line in lines if line and not line.startswith(ADVICE))), ""
    files = [file for file, _ in reversed(FileConfigSource.read)] if word else []
    read = [file for file in files if word in file.read_text(encoding="utf-8")]
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
