"""Composition: a command line becomes a checked Spec, through Hydra, so that sweepers, launchers and --cfg work."""

import io
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from framework.errors import ConfigError, FrameworkError, PluginError, did_you_mean
from framework.errors.paths import expanded, real_path, shorter
from framework.errors.terminal import note, printable_lines
from framework.registry.discovery import discover, locate, located
from framework.registry.registry import Registry

from . import hydra_internals
from .config_files import checked_files
from .hydra_groups import filled_store
from .overrides import Overrides, as_typed, groups, own_settings, rewrite
from .sources import File, Sources, line_with, read_yaml
from .spec import Spec, followed_kind, read_spec


@dataclass
class Job:
    """One composed experiment: its specification, and in a sweep its number and what it has of its own."""

    spec: Spec
    experiment: str
    overrides: list[str]
    number: int | None = None
    settings: dict[str, Any] = field(
        default_factory=dict
    )  # its own: {"optimizer.lr": 0.1, "model": "cnn"}
    sweep: Path | None = None  # the folder of its sweep, which holds that of its run
    inexact: bool = False
    traceback: bool = False

    @property
    def label(self) -> str:
        return " ".join(
            f"{key}={'null' if value is None else value}" for key, value in self.settings.items()
        )


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
    without: list[str] = field(default_factory=list)

    @property
    def shows(self) -> bool:
        return bool(self.cfg or self.info)


@dataclass
class Composing:
    """What it takes to make a job of a config that Hydra composed: the command line as read, the files behind it.

    Attributes:
        arguments: of Hydra.
        files: those that Hydra has read so far.
    """

    line: CommandLine
    overrides: Overrides
    arguments: list[str]
    files: list[File]
    plugins: list[str]
    folders: list[Path]

    @property
    def sources(self) -> Sources:
        return Sources(self.overrides.typed, self.files)

    def job(self, config: Any) -> Job:
        """Check the config of a job of a sweep, which Hydra has composed and made current. Raises ConfigError."""
        hydra = HydraConfig.get()
        tree = to_tree(config, self.sources)
        return self.checked(
            tree, hydra.runtime.choices.get("experiment"), list(hydra.overrides.task), hydra.job.num
        )

    def checked(
        self,
        tree: dict[str, Any],
        experiment: str | None,
        typed: list[str] | None,
        number: int | None = None,
    ) -> Job:
        """Check a composed tree of plain values, with what was wrong on the command line; report all of it together.

        Args:
            tree: the experiment in plain values.
            experiment: the chosen experiment file, if any.
            typed: of a job of a sweep, its overrides.
            number: of a job of a sweep.

        Raises ConfigError.
        """
        try:
            spec = read_spec(tree, self.sources)
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


def run_composed(line: CommandLine, task: Callable[[Job], Any]) -> None:
    """Compose what the command line says, and run the task on it; only print it with `cfg` or `info`.

    Raises ConfigError with every problem, and PluginError for plugins that do not load.
    """
    job = None
    with opened(line) as (composing, hydra):
        if line.shows:
            show_composed(composing, hydra)
        else:
            job = compose(composing, hydra)
    notes(composing.overrides.notes)
    if job is not None:
        task(job)


@contextmanager
def opened(line: CommandLine) -> Iterator[tuple[Composing, hydra_internals.Hydra]]:
    """Load the plugins, read the overrides and open Hydra on the folders of config files.

    Raises PluginError for plugins that do not load. Every problem that Hydra finds is raised as a ConfigError, after
    those of the command line.
    """
    folders = config_folders(line.folders)
    chosen = [text.partition("=")[2] for text in line.overrides if text.startswith("experiment=")]
    named = [*project_plugins(folders, chosen, Path.cwd()), *line.plugins]
    plugins = [located(plugin) for plugin in named]
    discover(plugins, line.without)
    overrides = rewrite(line.overrides, folders, line.multirun, line.shows)
    if overrides.problems and line.shows:
        raise ConfigError(overrides.problems)
    with ExitStack() as stack:
        files = stack.enter_context(checked_files())
        stack.enter_context(filled_store(plugins, line.without).in_use())
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="framework-")))
        composing = Composing(
            line, overrides, hydra_arguments(overrides, scratch), files, plugins, folders
        )
        try:
            with hydra_errors(files), hydra_internals.opened_hydra(folders) as hydra:
                yield composing, hydra
        except ConfigError as error:
            raise ConfigError(
                dict.fromkeys([*overrides.problems, *error.problems])
            ) from error.__cause__


@contextmanager
def hydra_errors(files: list[File]) -> Iterator[None]:
    """Raise the errors of Hydra as ours."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([hydra_error_text(error, files)]) from error


def notes(lines: Iterable[str]) -> None:
    """Print what has no effect, and does no harm, for the person at the terminal."""
    for line in lines:
        note(line)


def compose(composing: Composing, hydra: hydra_internals.Hydra) -> Job:
    """Let Hydra compose the experiment, and check it. Raises ConfigError."""
    config = hydra_internals.compose_config(hydra, composing.arguments, multirun=False)
    own = config.hydra
    with hydra_internals.current_config(config):
        tree = to_tree(without_hydra(config), composing.sources)
    job = composing.checked(tree, own.runtime.choices.get("experiment"), None)
    composing.overrides.notes += sweep_without_flag(own)
    return job


def without_hydra(config: DictConfig) -> DictConfig:
    """Take the node `hydra`, which is no part of the experiment, out of a composed config, and return the config."""
    with flag_override(config, ["struct", "readonly"], False):
        del config["hydra"]
    return config


def show_composed(composing: Composing, hydra: hydra_internals.Hydra) -> None:
    """Let Hydra print what it composed."""
    line, printed = composing.line, io.StringIO()
    with redirect_stdout(printed):
        if line.cfg:
            hydra_internals.print_config(hydra, composing.arguments, line.cfg, line.resolve)
        elif line.info:
            hydra_internals.print_info(hydra, composing.arguments, line.info)
    print(printable_lines(printed.getvalue()), end="")


def sweep_without_flag(hydra: Any) -> list[str]:
    """Return a note on an experiment file that describes a sweep, when it is run without -m."""
    params = hydra.sweeper.get("params") or {}
    return [f"hydra.sweeper.params has no effect without -m: {', '.join(params)}"] if params else []


def hydra_arguments(overrides: Overrides, scratch: Path) -> list[str]:
    """Return Hydra's arguments: with those that keep it from writing folders, files and logs of its own."""
    own = {
        "hydra.run.dir": ".",
        "hydra.output_subdir": "null",
        "hydra.sweep.dir": scratch,
        "hydra.sweep.subdir": ".",
    }
    own |= {"hydra/job_logging": "none", "hydra/hydra_logging": "none"}
    typed = {text.partition("=")[0].lstrip("+~").replace("/", ".") for text in overrides.arguments}
    ours = [f"{key}={value}" for key, value in own.items() if key.replace("/", ".") not in typed]
    return [*ours, *overrides.arguments]


def to_tree(config: Any, sources: Sources) -> dict[str, Any]:
    """Return the config in plain values; references to other keys are resolved, those that follow a kind kept."""
    raw: Any = OmegaConf.to_container(config, resolve=False)
    try:
        tree: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        key = str(error.full_key)
        said = hydra_internals.unresolved_reference(error)
        raise ConfigError([f"{key}={value_at(raw, key)}: {said} ({sources(key)})"]) from None
    keep_following(raw, tree, {followed_kind(kind) for kind in Registry.every})
    for key, names in sources.of_others(tree).items():
        tree[key] = {name: value for name, value in tree[key].items() if name not in names}
    return tree


def value_at(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else tree
    return tree


def keep_following(raw: Any, resolved: Any, following: set[str]) -> None:
    """Put back what was written where a value follows the experiment's choice of a kind, such as ${activation}."""
    for key in range(len(raw)) if isinstance(raw, list) else raw:
        if isinstance(raw[key], dict | list):
            if isinstance(resolved[key], dict | list):
                keep_following(raw[key], resolved[key], following)
        elif raw[key] in following:
            resolved[key] = raw[key]


def config_folders(more: Iterable[Path] = ()) -> list[Path]:
    """Return the folders with config files: ours, the project's `conf` in the working folder, and those given."""
    import framework_conf  # not at the top: it is data, beside the package

    ours = real_path(Path(framework_conf.__path__[0]))
    here = real_path(Path("conf"))
    folders = [ours]
    if (here / "config.yaml").is_file() or (here / "experiment").is_dir():
        folders.append(here)
    for folder in map(expanded, more):
        if not folder.is_dir():
            raise FrameworkError(f"--config-dir {folder}: no such folder (looked in {Path.cwd()})")
        if not any(folder.rglob("*.yaml")):
            raise FrameworkError(f"--config-dir {folder}: there is no .yaml file in it")
        folders.append(real_path(folder))
    return list(dict.fromkeys(folders))


def project_plugins(
    folders: list[Path], experiments: Iterable[str], here: Path | None
) -> Iterator[str]:
    """Yield what `plugins:` names in the project's config.yaml and in the chosen experiments, before composing.

    Args:
        folders: with config files.
        experiments: names, also several in a text: "one,two".
        here: the working folder, for plugins with a relative path; None: they are looked for beside the config files.
    """
    names = ["config"]
    for text in experiments:
        names += [f"experiment/{name}" for name in text.split(",")]
    for name in names:  # the list grows by what an experiment builds on
        for folder in [f for f in reversed(folders) if (f / f"{name}.yaml").is_file()][
            :1
        ]:  # the one that Hydra reads
            file = folder / f"{name}.yaml"
            content = read_yaml(file)
            below, listed = content.get("defaults"), content.get("plugins") or []
            wider = [
                f"experiment/{each}"
                for each in (below if isinstance(below, list) and name != "config" else ())
            ]
            names += [each for each in wider if each not in names]
            if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
                raise PluginError(
                    f"{file}: plugins should be a list of paths or module names, not {listed!r}"
                )
            yield from (locate(plugin, folder, here) for plugin in listed)


def hydra_error_text(error: Exception, files: list[File]) -> str:
    """Return an error of Hydra in our words: which file and line, what is missing, what there is; without its advice.

    files: those that Hydra has read.
    """
    failure = hydra_internals.failure_of(error)
    path, word = failure.path, failure.path
    if failure.kind in ("option", "override"):
        said = no_such(path, failure.options)
        word = path if path.startswith("hydra.") else path.rpartition("/")[2]
    elif failure.kind == "delete":
        said = f"~{path}: there is no {path} to take away"
    elif failure.kind == "item":
        said = f"{path}: the list has no such item"
    elif failure.kind == "interval":
        said = "interval(...) is for a sweeper that draws values: write a,b,c or range(...)"
    else:
        said = failure.text
    if not failure.in_file:
        return said
    for file, _ in reversed(files):
        if word in file.read_text(encoding="utf-8"):
            return f"{shorter(file)}:{line_with(file, word)}: {said}"
    return said


def no_such(path: str, options: Iterable[str]) -> str:
    """Say that a group has no such option, or that there is no such group."""
    group, _, name = path.rpartition("/")
    if group in groups():
        return groups()[group].unknown(name)
    if path.startswith("hydra."):
        return f"{path}: Hydra has no such setting (--cfg hydra shows them)"
    if group in ("hydra/launcher", "hydra/sweeper"):
        package = f"hydra-{name.replace('_', '-')}-{group.partition('/')[2]}"
        chosen = path.replace(f"/{name}", f"={name}")
        return f"{chosen}: not installed ({package}?); there is: {', '.join(options)}"
    if group:
        return f"there is no {group} {name!r}; {did_you_mean(name, options)}"
    return f"there is no group {name!r} of parts; {did_you_mean(name, groups())}"
