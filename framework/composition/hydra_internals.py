"""Everything that Hydra does not document as public, one function for each use.

Hydra has no public way to compose with a command line of one's own, to offer options that are made when they are
chosen, or to use sweepers and launchers outside of the package `hydra_plugins`. All other modules use the functions
here. Whatever is replaced in Hydra is put back afterwards, so that other Hydra applications in the process do not
notice. Works with Hydra 1.3.8 and 1.4.
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
    """Open Hydra on folders of config files, of which the last is searched first.

    `hydra.initialize` takes one folder and refuses sweeps.
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
    return opened.compose_config(
        "config", [*arguments, f"hydra.mode={mode.name}"], mode, with_log_configuration=False
    )


def compose_job(
    loader: ConfigLoader, master: DictConfig, overrides: Sequence[str], number: int
) -> DictConfig:
    """Compose the config of a job of a sweep, with its node `hydra`. Sweepers that validate their jobs do the same."""
    config = loader.load_sweep_config(master, list(overrides))
    with open_dict(config):
        config.hydra.job.id, config.hydra.job.num = str(number), number
    return config


@contextmanager
def current_config(config: DictConfig) -> Iterator[None]:
    """Let `${hydra:...}` refer to the node `hydra` of a config, as in a job of Hydra's."""
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
    """Let Hydra read config files through another class; `Plugins.register` does not replace one.

    source: a class of the same name as the one that it replaces. Hydra registers that one again in the process of a
        launcher, and compares the names.
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
    """An option whose content is made when Hydra asks for it; of 1,000 options a run uses ten."""

    def __init__(
        self, name: str, group: str | None, package: str | None, content: Callable[[], Any]
    ):
        self.name, self.group, self.package, self.provider = (
            f"{name}.yaml",
            group,
            package,
            "framework",
        )
        self.content = content

    @property
    def node(self) -> DictConfig:  # type: ignore[override]
        return OmegaConf.create(self.content())

    @node.setter
    def node(self, value: DictConfig) -> None:
        """Hydra puts a deep copy back; each reading is fresh anyway."""


class LazyStore(ConfigStore):
    """A ConfigStore with the options of the present one, and further ones that are made when they are chosen.

    Hydra copies its store for each composition and for each group that it lists, half a second a run with all parts:
    this one is its own copy. Sent to the process of a job, it is made anew there by calling `remake`.
    """

    remake: tuple[Callable[..., ConfigStore], tuple[Any, ...]]

    @classmethod
    def extended(cls, remake: Callable[..., ConfigStore], *arguments: Any) -> "LazyStore":
        """Return a store with the options of the present one. The instance of `ConfigStore` stays what it is."""
        Plugins.instance()  # the options of installed plugins are stored when they are imported
        store = cls.__new__(cls)  # a call would be a singleton
        store.repo = copy_of_groups(ConfigStore.instance().repo)
        store.remake = (remake, arguments)
        return store

    def add(
        self, name: str, group: str | None, package: str | None, content: Callable[[], Any]
    ) -> None:
        """Add an option; `content` returns what it holds."""
        options = self.repo
        for part in group.split("/") if group else ():
            options = options.setdefault(part, {})
        options[f"{name}.yaml"] = LazyNode(name, group, package, content)

    @contextmanager
    def in_use(self) -> Iterator["LazyStore"]:
        """Let Hydra use this store."""
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
    """Return a store's tree of groups with the same options."""
    return {
        key: copy_of_groups(value) if isinstance(value, dict) else value
        for key, value in repo.items()
    }


# sweepers and launchers


@contextmanager
def launcher_in_use(launcher: Launcher) -> Iterator[None]:
    """Give sweepers a launcher when they ask for that of the config.

    Hydra 1.3 builds launchers of the package `hydra_plugins` only, 1.4 only the class that the config names; and the
    config must stay as it was composed, since 1.4 compares that of each job with it.
    """

    def instantiate_launcher(
        hydra_context: HydraContext, task_function: Any, config: DictConfig
    ) -> Launcher:
        launcher.setup(hydra_context=hydra_context, task_function=task_function, config=config)
        return launcher

    plugins: Any = Plugins.instance()
    plugins.instantiate_launcher = instantiate_launcher  # of the instance, in front of the method
    try:
        yield
    finally:
        del plugins.instantiate_launcher


def make_launcher(context: HydraContext, config: DictConfig, task: Any) -> Any:
    """Return the launcher of a config, set up. Hydra's own sweepers get theirs like this."""
    return Plugins.instance().instantiate_launcher(
        hydra_context=context, task_function=task, config=config
    )


def set_up_sweeper(
    sweeper: Sweeper | None, opened: Hydra, config: DictConfig, task: Any
) -> Sweeper:
    """Set up a sweeper, or that of the config, without Hydra's callbacks, which a config cannot have."""
    context = HydraContext(config_loader=opened.config_loader, callbacks=Callbacks())
    if sweeper is None:
        return Plugins.instance().instantiate_sweeper(
            hydra_context=context, task_function=task, config=config
        )
    sweeper.setup(hydra_context=context, task_function=task, config=config)
    return sweeper


def result_of(done: JobReturn) -> Any:
    """Return the result of a job, or raise its error; `done.return_value` would also print a line of Hydra's."""
    if done.status == JobStatus.FAILED:
        raise done._return_value
    return done.return_value


# overrides


def parse_override(text: str) -> Override:
    """Parse an override. Raises HydraException. Hydra's own way would go through a whole composition."""
    return OverridesParser.create().parse_override(text)


def parse_overrides(texts: Sequence[str], loader: ConfigLoader | None = None) -> list[Override]:
    """Parse overrides, as sweepers do; with a loader, glob(...) finds the options of a group."""
    return OverridesParser.create(config_loader=loader).parse_overrides(list(texts))


def quoted_text(text: str) -> str:
    """Return a text as an override has it, between single quotes."""
    return QuotedString(text=text, quote=Quote.single).with_quotes()


# errors


@dataclass
class Failure:
    """What an error of Hydra or OmegaConf is about.

    Attributes:
        kind: option (a group has no such option), override (there is nothing to override), delete, item (of a list),
            interval (a sweep that draws values), other.
        path: an option such as "optimizer/sgd", or a key.
        text: of the error, without Hydra's advice.
        options: those that there are, of a missing one.
        in_file: whether Hydra names a config file as the place.
    """

    kind: str
    path: str = ""
    text: str = ""
    options: Sequence[str] = ()
    in_file: bool = False


ADVICE = (
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
    """Return what an error is about. Where Hydra has neither a class nor an attribute that tells, its text does."""
    text = f"{error}\n{error.__cause__ or ''}"
    place = re.match(r"In '([^']+)': ", text)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        return Failure("option", error.missing_cfg_file, options=error.options or (), in_file=True)
    if isinstance(error.__cause__, ConfigIndexError):
        key = re.sub(r"\[(\d+)\]", r".\1", str(error.__cause__.full_key))
        return Failure("item", key)
    # ConfigCompositionException; the second text is that of Hydra 1.4 for the defaults list of a file
    if match := re.search(
        r"Could not override '([^']+)'|Invalid Defaults List override '([^':]+)", text
    ):
        return Failure("override", match[1] or match[2], in_file=True)
    if match := re.search(r"Could not delete (?:from config\. )?'([^']+)'", text):
        return Failure("delete", match[1], in_file=place is not None)
    if "INTERVAL_SWEEP" in text:  # HydraException of the sweeper `basic`
        return Failure("interval")
    lines = [line.strip() for line in text.removeprefix(place[0] if place else "").splitlines()]
    kept = dict.fromkeys(line for line in lines if line and not line.startswith(ADVICE))
    return Failure("other", text="; ".join(kept))


def unresolved_reference(error: Exception) -> str:
    """Say why OmegaConf cannot resolve a reference to another key."""
    said = str(getattr(error, "msg", error)).splitlines()[0]
    if isinstance(error, InterpolationKeyError):
        missing = re.search(r"key '([^']+)' not found", said)
        if missing:
            return f"refers to {missing[1]}, which is not there"
    if isinstance(error, InterpolationResolutionError) and said.startswith("Recursive"):
        return "refers to itself"
    return said.replace("Interpolation", "a reference")
