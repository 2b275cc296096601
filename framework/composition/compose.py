"""Compose a command line and config files into a checked Spec.

Hydra does the composition, so that its sweepers and launchers, --cfg and --info can be used.
"""

import io
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
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
from .origins import Origins
from .override_checks import PLUGIN_GROUPS, not_available
from .override_syntax import dotted, groups, override_key, override_paths
from .overrides import Overrides, as_typed, own_settings, rewrite
from .sources import COMMAND_LINE, File, Sources, line_with, read_config_file
from .spec import Spec, followed_kind, read_spec


@dataclass
class Job:
    """One composed experiment, alone or in a sweep.

    Attributes:
        spec: the checked experiment.
        experiment: the name of the chosen experiment file, or "default".
        overrides: the overrides as typed.
        number: the number of the job in a sweep; None outside a sweep.
        settings: the settings that differ between jobs: {"optimizer.lr": 0.1, "model": "cnn"}.
        sweep: the folder of the sweep, which contains the folder of the run.
        inexact: resume also if settings change the result.
        traceback: print the traceback of an error.
    """

    spec: Spec
    experiment: str
    overrides: list[str]
    number: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    sweep: Path | None = None
    inexact: bool = False
    traceback: bool = False

    @property
    def label(self) -> str:
        words = []
        for key, value in self.settings.items():
            words.append(f"{key}=null" if value is None else f"{key}={value}")
        return " ".join(words)


@dataclass
class CommandLine:
    """The arguments of a command that composes an experiment.

    Attributes:
        overrides: the overrides as typed.
        plugins: files, folders or modules of --plugins.
        folders: folders with config files of --config-dir.
        multirun: run a sweep (-m).
        cfg: print this part of the composed config instead of running (--cfg).
        resolve: with `cfg`, resolve references.
        info: print this information of Hydra's instead of running (--info).
        inexact: resume also if settings change the result.
        traceback: print the traceback of an error.
        without: installed plugins that are not loaded.
    """

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
        """Whether the config is only printed; it is not checked then."""
        return bool(self.cfg or self.info)


@dataclass
class Composing:
    """The state of a composition: makes checked jobs from the configs that Hydra composes.

    Attributes:
        line: the command line.
        overrides: its overrides, rewritten for Hydra.
        arguments: the arguments for Hydra.
        files: the config files that Hydra has read so far.
        plugins: the loaded plugins.
        folders: the folders with config files.
    """

    line: CommandLine
    overrides: Overrides
    arguments: list[str]
    files: list[File]
    plugins: list[str]
    folders: list[Path]

    @property
    def sources(self) -> Sources:
        return Sources(self.overrides.typed, self.files, refused=self.overrides.refused)

    def sources_of_job(self, overrides: Iterable[str]) -> Sources:
        """Return the sources of a job in a sweep; its overrides may come from a config file."""
        chosen: list[str] = []
        for text in overrides:
            chosen += override_paths(text)
        return replace(self.sources, chosen=chosen)

    def job(self, config: Any) -> Job:
        """Check the config of a job in a sweep, while it is Hydra's current config.

        Raises:
            ConfigError: with all problems.
        """
        hydra = HydraConfig.get()
        tree = to_tree(config, self.sources_of_job(hydra.overrides.task))
        experiment = hydra.runtime.choices.get("experiment")
        return self.checked(tree, experiment, list(hydra.overrides.task), hydra.job.num)

    def checked(
        self,
        tree: dict[str, Any],
        experiment: str | None,
        typed: list[str] | None,
        number: int | None = None,
    ) -> Job:
        """Check a composed tree, and report its problems together with those of the command line.

        Args:
            tree: the experiment in plain values.
            experiment: the chosen experiment file, if any.
            typed: the overrides of a job in a sweep; None outside a sweep.
            number: the number of a job in a sweep.

        Raises:
            ConfigError: with all problems.
        """
        try:
            spec = read_spec(tree, self.sources)
        except ConfigError as error:
            raise ConfigError([*self.overrides.problems, *error.problems]) from None
        problems = [*self.overrides.problems, *self.unused(spec)]
        if problems:
            raise ConfigError(problems)
        spec.plugins = self.plugins
        spec.without = self.line.without
        job = Job(spec, experiment or "default", self.line.overrides, number)
        job.inexact = self.line.inexact
        job.traceback = self.line.traceback
        if typed is not None:
            job.overrides = list(dict.fromkeys(as_typed(override) for override in typed))
            job.settings = own_settings(typed, self.overrides)
        origins = Origins(spec, self.files, job.overrides, job.settings)
        spec.origins = origins.all_written()
        return job

    def unused(self, spec: Spec) -> list[str]:
        """Return problems for options and overrides that have no effect with this `resume`."""
        if spec.resume == "never" and self.line.inexact:
            advice = "add resume=auto or resume=RUN, or remove it"
            return [f"--inexact has no effect: no run is resumed; {advice}"]
        if spec.resume in ("never", "auto"):
            return []
        reason = f"resume={spec.resume} continues in the folder of that run"
        problems = []
        for key, text in self.overrides.typed.items():
            if key.startswith(("run.", "init_from")):
                problems.append(f"{text}: has no effect: {reason} ({COMMAND_LINE})")
        return problems


def run_composed(line: CommandLine, task: Callable[[Job], Any]) -> None:
    """Compose the experiment of a command line and run a task on it, or only print its config.

    Args:
        line: the command line.
        task: called with the job, unless `line.shows`.

    Raises:
        ConfigError: with all problems.
        PluginError: for a plugin that does not load.
    """
    job = None
    with opened_composition(line) as (composing, hydra):
        if line.shows:
            show_composed(composing, hydra)
        else:
            job = compose(composing, hydra)
    print_override_notes(composing.overrides.notes)
    if job is not None:
        task(job)


@contextmanager
def opened_composition(line: CommandLine) -> Iterator[tuple[Composing, hydra_internals.Hydra]]:
    """Load the plugins, rewrite the overrides and open Hydra on the folders with config files.

    Raises:
        PluginError: for a plugin that does not load.
        ConfigError: with the problems of the command line and those that Hydra finds.
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
        arguments = hydra_arguments(overrides, scratch)
        composing = Composing(line, overrides, arguments, files, plugins, folders)
        try:
            with hydra_errors(files), hydra_internals.opened_hydra(folders) as hydra:
                yield composing, hydra
        except ConfigError as error:
            problems = dict.fromkeys([*overrides.problems, *error.problems])
            raise ConfigError(problems) from error.__cause__


@contextmanager
def hydra_errors(files: list[File]) -> Iterator[None]:
    """Raise the errors of Hydra and OmegaConf as ConfigError."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([hydra_error_text(error, files)]) from error


def print_override_notes(lines: Iterable[str]) -> None:
    """Print notes on overrides that have no effect."""
    for line in lines:
        note(line)


def compose(composing: Composing, hydra: hydra_internals.Hydra) -> Job:
    """Compose the experiment with Hydra and check it.

    Raises:
        ConfigError: with all problems.
    """
    config = hydra_internals.compose_config(hydra, composing.arguments, multirun=False)
    hydra_node = config.hydra
    with hydra_internals.current_config(config):
        tree = to_tree(without_hydra(config), composing.sources)
    job = composing.checked(tree, hydra_node.runtime.choices.get("experiment"), None)
    params = hydra_node.sweeper.get("params")
    if params:
        composing.overrides.notes.append(
            f"hydra.sweeper.params has no effect without -m: {', '.join(params)}"
        )
    return job


def without_hydra(config: DictConfig) -> DictConfig:
    """Remove the node `hydra`, which is no part of the experiment, and return the config."""
    with flag_override(config, ["struct", "readonly"], False):
        del config["hydra"]
    return config


def show_composed(composing: Composing, hydra: hydra_internals.Hydra) -> None:
    """Print the composed config, or how Hydra composed it."""
    line = composing.line
    printed = io.StringIO()
    with redirect_stdout(printed):
        if line.cfg:
            hydra_internals.print_config(hydra, composing.arguments, line.cfg, line.resolve)
        elif line.info:
            hydra_internals.print_info(hydra, composing.arguments, line.info)
    print(printable_lines(printed.getvalue()), end="")


def hydra_arguments(overrides: Overrides, scratch: Path) -> list[str]:
    """Return Hydra's arguments, with settings that keep Hydra from writing files and logs."""
    defaults = {
        "hydra.run.dir": ".",
        "hydra.output_subdir": "null",
        "hydra.sweep.dir": scratch,
        "hydra.sweep.subdir": ".",
        "hydra/job_logging": "none",
        "hydra/hydra_logging": "none",
    }
    typed = {override_key(text) for text in overrides.arguments}
    ours = [f"{key}={value}" for key, value in defaults.items() if dotted(key) not in typed]
    return [*ours, *overrides.arguments]


def to_tree(config: Any, sources: Sources) -> dict[str, Any]:
    """Return a composed config in plain values.

    References to other keys are resolved, except those to the experiment's choice of a kind, such
    as ${activation}. Settings of parts that are not chosen are removed.

    Raises:
        ConfigError: for a reference that cannot be resolved.
    """
    raw: Any = OmegaConf.to_container(config, resolve=False)
    try:
        resolved: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        key = str(error.full_key)
        reason = hydra_internals.unresolved_reference(error)
        raise ConfigError([f"{key}={value_at(raw, key)}: {reason} ({sources(key)})"]) from None
    keep_following(raw, resolved, {followed_kind(kind) for kind in Registry.every})
    tree: dict[str, Any] = resolved
    for key, names in sources.unused_settings(tree).items():
        for name in names & tree[key].keys():
            del tree[key][name]
    return tree


def value_at(tree: Any, path: str) -> Any:
    """Return the value at a path such as "optimizer.lr" of a tree; None if it has none."""
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else tree
    return tree


def keep_following(raw: Any, resolved: Any, following: set[str]) -> None:
    """Restore the values that follow the experiment's choice of a kind, such as ${activation}.

    Args:
        raw: a tree with references.
        resolved: the same tree with resolved references, which is changed.
        following: the references to restore.
    """
    keys = range(len(raw)) if isinstance(raw, list) else raw
    for key in keys:
        if isinstance(raw[key], dict | list):
            if isinstance(resolved[key], dict | list):
                keep_following(raw[key], resolved[key], following)
        elif raw[key] in following:
            resolved[key] = raw[key]


def config_folders(more: Iterable[Path] = ()) -> list[Path]:
    """Return the folders with config files.

    They are the framework's, those of the tour, the project's `conf` in the working folder, and
    further ones.

    Raises:
        FrameworkError: for a further folder that does not exist or has no config file.
    """
    import framework_conf  # not at the top: it holds data only

    ours = real_path(Path(framework_conf.__path__[0]))
    here = real_path(Path("conf"))
    folders = [ours, ours / "tour"]
    if (here / "config.yaml").is_file() or (here / "experiment").is_dir():
        folders.append(here)
    for folder in map(expanded, more):
        if not folder.is_dir():
            raise FrameworkError(
                f"--config-dir {folder}: no such folder (working folder: {Path.cwd()})"
            )
        if not any(folder.rglob("*.yaml")):
            raise FrameworkError(f"--config-dir {folder}: the folder has no .yaml file")
        folders.append(real_path(folder))
    return list(dict.fromkeys(folders))


def project_plugins(
    folders: list[Path], experiments: Iterable[str], here: Path | None
) -> Iterator[str]:
    """Yield the plugins that the project's config.yaml and the chosen experiments name.

    They have to be loaded before Hydra composes.

    Args:
        folders: folders with config files.
        experiments: names; one text may have several: "one,two".
        here: the working folder, in which relative paths are searched first; None to search them
            only in the folders with config files.

    Raises:
        PluginError: if `plugins` is not a list of texts.
    """
    names = ["config"]
    for text in experiments:
        names += [f"experiment/{name}" for name in text.split(",")]
    for name in names:  # grows by the experiments that an experiment builds on
        folder = last_with(folders, f"{name}.yaml")
        if folder is None:
            continue
        file = folder / f"{name}.yaml"
        content = read_config_file(file)
        if name != "config":
            names += [base for base in base_experiments(content) if base not in names]
        plugins = content.get("plugins") or []
        if not isinstance(plugins, list) or not all(isinstance(each, str) for each in plugins):
            raise PluginError(
                f"{file}: plugins: expected a list of paths or module names, got {plugins!r}"
            )
        for plugin in plugins:
            yield locate(plugin, folder, here)


def last_with(folders: list[Path], name: str) -> Path | None:
    """Return the last folder that has a file, which is the one that Hydra reads."""
    for folder in reversed(folders):
        if (folder / name).is_file():
            return folder
    return None


def base_experiments(content: Mapping[str, Any]) -> list[str]:
    """Return the experiments in the defaults list of an experiment file."""
    defaults = content.get("defaults")
    if not isinstance(defaults, list):
        return []
    return [f"experiment/{entry}" for entry in defaults]


def hydra_error_text(error: Exception, files: list[File]) -> str:
    """Return a message for an error of Hydra: the file and line, the problem, and a suggestion.

    Args:
        files: the config files that Hydra has read.
    """
    failure = hydra_internals.failure_of(error)
    path = failure.path
    word = path  # to find the line in the file
    if failure.kind in ("option", "override"):
        message = no_such(path, failure.options)
        if not path.startswith("hydra."):
            word = path.rpartition("/")[2]
    elif failure.kind == "delete":
        message = f"~{path}: the experiment has no {path}"
    elif failure.kind == "item":
        message = f"{path}: the list has no such item"
    elif failure.kind == "interval":
        message = "interval(...) needs a sweeper that samples values; write a,b,c or range(...)"
    else:
        message = failure.text
    if not failure.in_file:
        return message
    for file, _ in reversed(files):
        if word in file.read_text(encoding="utf-8"):
            return f"{shorter(file)}:{line_with(file, word)}: {message}"
    return message


def no_such(path: str, options: Iterable[str]) -> str:
    """Return the message that a config group has no such option, or that there is no such group.

    Args:
        path: the option, such as "optimizer/sgdd", or the group.
        options: the options that the group has.
    """
    group, _, name = path.rpartition("/")
    if group in groups():
        return groups()[group].unknown(name)
    if path.startswith("hydra."):
        return f"{path}: Hydra has no such setting (--cfg hydra prints them)"
    if group in PLUGIN_GROUPS:
        return f"{group}={name}: {not_available(group, name, options)}"
    if group == "hydra":
        return f"{path}: Hydra has no such group; {did_you_mean(path, PLUGIN_GROUPS)}"
    if group:
        return f"there is no {group} {name!r}; {did_you_mean(name, options)}"
    return f"there is no kind of parts {name!r}; {did_you_mean(name, groups())}"
