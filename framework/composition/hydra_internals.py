"""All uses of what Hydra does not document as public, one function for each.

Hydra has no public way to compose with another command line than its own, to offer options whose
content is made when they are chosen, or to use sweepers and launchers outside of the package
`hydra_plugins`. What is replaced in Hydra is restored afterwards, so that other Hydra applications
in the process are not affected. Works with Hydra 1.3.8 and 1.4.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra import version
from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.file_config_source import FileConfigSource as FileConfigSource
from hydra._internal.hydra import Hydra as Hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra._internal.utils import create_config_search_path
from hydra.core.config_loader import ConfigLoader as ConfigLoader
from hydra.core.config_store import ConfigNode, ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    Glob as Glob,
    IntervalSweep as IntervalSweep,
    Override as Override,
    Quote,
    QuotedString,
    RangeSweep as RangeSweep,
)
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import MissingConfigException
from hydra.plugins.config_source import ConfigSource
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigIndexError, InterpolationKeyError, InterpolationResolutionError

BEFORE_1_4 = tuple(int(number) for number in hydra.__version__.split(".")[:2]) < (1, 4)


# composing


@contextmanager
def opened_hydra(folders: Sequence[Path]) -> Iterator[Hydra]:
    """Open Hydra on folders of config files; the last one is searched first.

    `hydra.initialize` takes a single folder and refuses sweeps.
    """
    active = GlobalHydra.instance().hydra
    base = version.getbase() if BEFORE_1_4 else None
    GlobalHydra.instance().clear()
    if BEFORE_1_4:
        version.setbase("1.3")
    try:
        search_path = create_config_search_path(str(folders[0]))
        for folder in folders:
            search_path.prepend("framework", f"file://{folder}")
        yield Hydra.create_main_hydra2("compose", search_path)
    finally:
        GlobalHydra.instance().hydra = active
        if BEFORE_1_4:
            version.VersionBase.instance().version_base = base


def compose_config(opened: Hydra, arguments: Sequence[str], multirun: bool) -> DictConfig:
    """Compose the main config with its node `hydra`, which `hydra.compose` leaves out."""
    mode = RunMode.MULTIRUN if multirun else RunMode.RUN
    overrides = [*arguments, f"hydra.mode={mode.name}"]
    return opened.compose_config("config", overrides, mode, with_log_configuration=False)


def compose_job(
    loader: ConfigLoader, master: DictConfig, overrides: Sequence[str], number: int
) -> DictConfig:
    """Compose the config of a job in a sweep, with its node `hydra`, as Hydra's launchers do."""
    config = loader.load_sweep_config(master, list(overrides))
    with open_dict(config):
        config.hydra.job.id = str(number)
        config.hydra.job.num = number
    return config


@contextmanager
def current_config(config: DictConfig) -> Iterator[None]:
    """Resolve `${hydra:...}` in the node `hydra` of a config, as in a job of Hydra's."""
    instance = HydraConfig.instance()
    before = instance.cfg
    instance.set_config(config)
    try:
        yield
    finally:
        instance.cfg = before


def print_config(opened: Hydra, arguments: Sequence[str], which: str, resolve: bool) -> None:
    """Print the composed config, as --cfg does."""
    opened.show_cfg("config", list(arguments), which, package=None, resolve=resolve)


def print_info(opened: Hydra, arguments: Sequence[str], which: str) -> None:
    """Print how the config is composed, as --info does."""
    opened.show_info(which, "config", list(arguments))


# config files


@contextmanager
def replaced_file_source(source: type[ConfigSource]) -> Iterator[None]:
    """Read config files through another class; `Plugins.register` does not replace one.

    Args:
        source: a class with the same name as Hydra's. Hydra registers its own class again in the
            process of a launcher, and compares the names.
    """
    Plugins.instance()  # registers Hydra's own class
    types = SourcesRegistry.instance().types
    before = types["file"]
    types["file"] = source
    try:
        yield
    finally:
        types["file"] = before


# the store of options


class LazyNode(ConfigNode):
    """An option whose content is made when Hydra reads it; a run uses about 10 of 1,000 options."""

    def __init__(
        self, name: str, group: str | None, package: str | None, content: Callable[[], Any]
    ):
        self.name = f"{name}.yaml"
        self.group = group
        self.package = package
        self.provider = "framework"
        self.content = content

    @property
    def node(self) -> DictConfig:
        created: DictConfig = OmegaConf.create(self.content())
        return created

    @node.setter
    def node(self, value: DictConfig) -> None:
        """Ignore the deep copy that Hydra stores; each reading makes new content."""


class LazyStore(ConfigStore):
    """A ConfigStore with the options of the current one and further, lazily made options.

    Hydra copies its store for each composition and for each group that it lists. With all parts
    this takes 0.5 s for each run, so a copy of this store is the store itself. Unpickling it in the
    process of a job calls `remake`.
    """

    remake: tuple[Callable[..., ConfigStore], tuple[Any, ...]]

    @classmethod
    def extended(cls, remake: Callable[..., ConfigStore], *arguments: Any) -> "LazyStore":
        """Return a store with the options of the current one, which does not change."""
        Plugins.instance()  # imports installed plugins, which store their options
        store = cls.__new__(cls)  # calling the class returns the singleton
        store.repo = copy_of_groups(ConfigStore.instance().repo)
        store.remake = (remake, arguments)
        return store

    def add(
        self, name: str, group: str | None, package: str | None, content: Callable[[], Any]
    ) -> None:
        """Add an option; `content` is called each time Hydra reads it."""
        options = self.repo
        for part in group.split("/") if group else ():
            options = options.setdefault(part, {})
        options[f"{name}.yaml"] = LazyNode(name, group, package, content)

    @contextmanager
    def in_use(self) -> Iterator["LazyStore"]:
        """Make this store the one that Hydra uses."""
        instances: dict[type, Any] = Singleton._instances
        before = ConfigStore.instance()
        instances[ConfigStore] = self
        try:
            yield self
        finally:
            instances[ConfigStore] = before

    def __deepcopy__(self, memo: dict[int, Any]) -> "LazyStore":
        return self

    def __reduce__(self) -> tuple[Callable[..., ConfigStore], tuple[Any, ...]]:
        return self.remake


def copy_of_groups(repo: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a store's tree of groups that shares the options."""
    copied = {}
    for key, value in repo.items():
        copied[key] = copy_of_groups(value) if isinstance(value, dict) else value
    return copied


# sweepers and launchers


def plugin_options(group: str, folders: Sequence[Path]) -> list[str]:
    """Return the options of "hydra/launcher" or "hydra/sweeper".

    They are those of installed packages and those in the folders with config files.
    """
    with opened_hydra(folders) as hydra:  # imports installed plugins, which store their options
        options: list[str] = hydra.config_loader.get_group_options(group)
    return options


@contextmanager
def launcher_in_use(launcher: Launcher) -> Iterator[None]:
    """Give sweepers this launcher instead of the one in the config.

    Hydra 1.3 builds only launchers of the package `hydra_plugins`, and Hydra 1.4 only the class
    that the config names. The config cannot be changed, since Hydra 1.4 compares it with the config
    of each job.
    """

    def instantiate_launcher(
        hydra_context: HydraContext, task_function: Any, config: DictConfig
    ) -> Launcher:
        launcher.setup(hydra_context=hydra_context, task_function=task_function, config=config)
        return launcher

    plugins: Any = Plugins.instance()
    plugins.instantiate_launcher = instantiate_launcher  # on the instance, hides the method
    try:
        yield
    finally:
        del plugins.instantiate_launcher


def make_launcher(context: HydraContext, config: DictConfig, task: Any) -> Any:
    """Return the launcher of a config, set up as for Hydra's own sweepers."""
    return Plugins.instance().instantiate_launcher(
        hydra_context=context, task_function=task, config=config
    )


def set_up_sweeper(
    sweeper: Sweeper | None, opened: Hydra, config: DictConfig, task: Any
) -> Sweeper:
    """Set up a sweeper, or the one in the config if None, without Hydra's callbacks."""
    context = HydraContext(config_loader=opened.config_loader, callbacks=Callbacks())
    if sweeper is None:
        return Plugins.instance().instantiate_sweeper(
            hydra_context=context, task_function=task, config=config
        )
    sweeper.setup(hydra_context=context, task_function=task, config=config)
    return sweeper


def result_of(done: JobReturn) -> Any:
    """Return the result of a job, or raise its error.

    For a failed job, `done.return_value` prints a line before it raises the error.
    """
    if done.status == JobStatus.FAILED:
        raise done._return_value
    return done.return_value


# overrides


def parse_override(text: str) -> Override:
    """Parse an override without a composition.

    Raises:
        HydraException: the syntax is wrong.
    """
    return OverridesParser.create().parse_override(text)


def parse_overrides(texts: Sequence[str], loader: ConfigLoader | None = None) -> list[Override]:
    """Parse overrides like sweepers; with a loader, glob(...) matches the options of a group."""
    return OverridesParser.create(config_loader=loader).parse_overrides(list(texts))


def quoted_text(text: str) -> str:
    """Return a text between single quotes, in the syntax of overrides."""
    return QuotedString(text=text, quote=Quote.single).with_quotes()


# errors


@dataclass
class Failure:
    """The facts in an error of Hydra or OmegaConf.

    Attributes:
        kind: "option" (the group has no such option), "override" (the key does not exist),
            "delete" (the key does not exist), "item" (the list has no such item), "interval" (the
            sweeper draws no values), or "other".
        path: an option such as "optimizer/sgd", or a key.
        text: the text of the error, without Hydra's advice.
        options: the options that the group has, for "option".
        in_file: whether the cause is in a config file.
    """

    kind: str
    path: str = ""
    text: str = ""
    options: Sequence[str] = ()
    in_file: bool = False


HYDRA_ADVICE = (
    "To append",
    "Set the env",
    "Did you mean to override",
    "See ",
    "Config search path",
    "provider=",
    "full_key",
    "object_type",
    "reference_type",
)


def failure_of(error: Exception) -> Failure:
    """Return the facts in an error: from its class and attributes, or else from its text."""
    text = f"{error}\n{error.__cause__ or ''}"
    place = re.match(r"In '([^']+)': ", text)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        return Failure("option", error.missing_cfg_file, options=error.options or (), in_file=True)
    if isinstance(error.__cause__, ConfigIndexError):
        key = re.sub(r"\[(\d+)\]", r".\1", str(error.__cause__.full_key))
        return Failure("item", key)
    # ConfigCompositionException; Hydra 1.4 has the second text for the defaults list of a file
    pattern = r"Could not override '([^']+)'|Invalid Defaults List override '([^':]+)"
    if match := re.search(pattern, text):
        return Failure("override", match[1] or match[2], in_file=True)
    if match := re.search(r"Could not delete (?:from config\. )?'([^']+)'", text):
        return Failure("delete", match[1], in_file=place is not None)
    if "INTERVAL_SWEEP" in text:  # HydraException of the sweeper `basic`
        return Failure("interval")
    lines: dict[str, None] = {}
    for line in text.removeprefix(place[0] if place else "").splitlines():
        if line.strip() and not line.strip().startswith(HYDRA_ADVICE):
            lines[line.strip()] = None
    return Failure("other", text="; ".join(lines))


def unresolved_reference(error: Exception) -> str:
    """Return why OmegaConf cannot resolve a reference to another key."""
    text = str(getattr(error, "msg", error)).splitlines()[0]
    if isinstance(error, InterpolationKeyError):
        missing = re.search(r"key '([^']+)' not found", text)
        if missing:
            return f"refers to {missing[1]}, which does not exist"
    if isinstance(error, InterpolationResolutionError) and text.startswith("Recursive"):
        return "refers to itself"
    return text.replace("Interpolation", "a reference")
