"""A catalogue of all parts in plain types, cached in a file.

With the cache, `list`, `show` and TAB need neither torch nor the plugins. The cached catalogue is
used only while everything that it depends on is unchanged: plugin files and the modules that they
import, config files, and the installed packages. Otherwise, or if the cache cannot be read or
written, the catalogue is built from the registries.
"""

import json
import math
import os
import re
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import Enum
from functools import cache, partial
from hashlib import blake2b
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from framework.errors import RunError
from framework.errors.paths import expanded, real_path
from framework.registry.annotations import Range, is_enum, marks, members, strip
from framework.registry.discovery import (
    discover,
    installed_plugins,
    leave_out,
    located,
    plugin_files,
)
from framework.registry.json_types import setting_type
from framework.registry.plain_values import plain_value, readable
from framework.registry.registry import Entry, Registry
from framework.registry.schema import Setting, names_parts
from framework.system.files import write_file

from .trust import has_config, is_trusted

TICK = 100_000_000  # nanoseconds in which two changes of a file may get the same time
Dependencies = dict[str, list[str]]
"""The arguments of `stamps`: all that an index depends on."""


@dataclass
class Index:
    """All parts, and the other keys of an experiment, in plain types (JSON).

    Attributes:
        kinds: kind -> {"key", "many", "composed", "doc", "parts"}; the parts are by name, as
            `part_as_dict` returns them.
        sections: other top-level keys -> their settings; [] for a plain value such as `seed`.
        experiments: names for `experiment=`.
        plain: the keys of `sections` with a plain value -> a setting, as `setting_as_dict`.
        chosen: config key -> the part, or parts, of the default experiment.
        broken: messages about installed plugins that do not load.
        not_trusted: plugins in config files that are not loaded, as the folder is not trusted.
    """

    kinds: dict[str, dict[str, Any]]
    sections: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    plain: dict[str, dict[str, Any]] = field(default_factory=dict)
    experiments: list[str] = field(default_factory=list)
    chosen: dict[str, Any] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    not_trusted: list[str] = field(default_factory=list)

    @property
    def keys(self) -> dict[str, str]:
        """The kind of each config key."""
        return {about["key"]: kind for kind, about in self.kinds.items()}

    def many(self, key: str) -> bool:
        """Return whether a config key takes a list of parts."""
        return bool(self.kinds[self.keys[key]]["many"])

    def parts(self, kind: str) -> list[str]:
        """Return the names of the parts of a kind; [] if there is no such kind."""
        return sorted(self.kinds[kind]["parts"]) if kind in self.kinds else []

    def settings(self, kind: str, part: str) -> list[dict[str, Any]]:
        """Return the settings of a part; [] if there is no such part."""
        parts = self.kinds[kind]["parts"]
        return list(parts[part]["settings"]) if part in parts else []


# the cache


def find_index(
    plugins: Iterable[str] = (),
    folders: Iterable[Path] = (),
    without: Iterable[str] = (),
    trusted: bool = False,
) -> Index:
    """Return the index of all parts, from the cache if nothing has changed.

    It contains the parts of installed plugins, of the named ones, and of the project's plugins if
    its folder is trusted.

    Args:
        plugins: plugins that the user named.
        folders: further folders with config files, from --config-dir.
        without: installed plugins to leave out.
        trusted: load the plugins that config files name, also in folders that are not trusted.

    Raises:
        FrameworkError: if a plugin or a config file cannot be read.
    """
    plugins = [located(plugin) for plugin in plugins]
    folders = [real_path(folder) for folder in map(expanded, folders) if folder.is_dir()]
    trusted_folders = trusted_among(folders, trusted)
    without = sorted(set(without))
    build_now = partial(build_index, plugins, folders, trusted_folders, without)
    if any(Registry.every.values()):  # a program with its own parts
        return build_now()[0]
    return cached_index(cache_file(plugins, folders, trusted_folders, without), build_now)


def project_folder() -> list[Path]:
    """Return the folder `conf` of the project in the working folder; [] if there is none."""
    here = real_path(Path("conf"))
    return [here] if has_config(here) else []


def trusted_among(folders: list[Path], everything: bool = False) -> list[Path]:
    """Return the trusted folders among the working folder, its `conf`, and further folders.

    The project's config files are trusted with the working folder, other folders with config files
    by themselves or with the folder above.

    Args:
        folders: further folders with config files.
        everything: trust all of them.
    """
    project = project_folder()
    if not folders and not project:
        return []  # without reading the file of trusted folders at each TAB
    found = []
    if everything or is_trusted(Path.cwd()):
        found += [Path.cwd(), *project]
    for folder in folders:
        if folder in project:
            continue
        if everything or is_trusted(folder) or is_trusted(folder.parent):
            found.append(folder)
    return found


def cached_index(file: Path, build: Callable[[], tuple[Index, Dependencies]]) -> Index:
    """Return the cached index if it is valid; otherwise build it and write the cache."""
    begun = time.time_ns()
    try:
        digest, _, text = file.read_text(encoding="utf-8").partition("\n")
        cached = json.loads(text) if digest == text_digest(text) else {}
        if cached["stamps"] == stamps(**cached["of"]):
            return Index(**cached["index"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # missing, damaged, or of another version
    index, dependencies = build()
    if not index.broken:  # a broken plugin may load next time although no file has changed
        content = {"of": dependencies, "stamps": stamps(**dependencies), "index": asdict(index)}
        write_cache(file, begun, content)
    return index


def cache_file(
    plugins: list[str],
    folders: list[Path],
    trusted: Sequence[Path] = (),
    without: Sequence[str] = (),
) -> Path:
    """Return the cache file for these arguments, the working folder and this interpreter."""
    python = [sys.executable, sys.version, sys.flags.optimize, sys.path, __file__]
    inputs = [plugins, folders, project_folder(), list(trusted), list(without), python]
    name = f"{text_digest(repr(inputs))}.json"
    for home in (os.environ.get("XDG_CACHE_HOME", ""), "~/.cache"):
        if os.path.isabs(os.path.expanduser(home)):
            return Path(os.path.expanduser(home), "framework", name)
    return Path(os.devnull, "framework", name)


def text_digest(text: str) -> str:
    """Return a hash of a text."""
    return blake2b(text.encode(), digest_size=16).hexdigest()


def write_cache(file: Path, begun: int, content: dict[str, Any]) -> None:
    """Write the cache file atomically, unless a dependency changed while it was read.

    Args:
        file: the cache file.
        begun: when the reading of the dependencies began, in nanoseconds.
        content: "of", "stamps" and "index".
    """
    changed = 0
    for found in content["stamps"].values():
        if found:
            changed = max(changed, *found[:2])
    if changed > begun - TICK:
        return
    text = json.dumps(content, default=str)
    with suppress(OSError, RunError):  # a read-only home makes the next command slower
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file.parent, file.name, f"{text_digest(text)}\n{text}")


def stamps(
    modules: list[str], plugins: list[str], files: list[str], folders: list[str]
) -> dict[str, list[int] | None]:
    """Return the stamp of every path that an index depends on.

    Args:
        modules: modules of installed plugins.
        plugins: other plugins.
        files: files of loaded modules.
        folders: folders with config files.
    """
    paths = [*files]
    paths += [str(path) for path in plugin_files([*modules, *plugins])]
    for folder in folders:
        paths.append(str(Path(folder, "config.yaml")))
        paths += [str(path) for path in Path(folder, "experiment").glob("*.yaml")]
    paths += [os.path.abspath(plugin) for plugin in plugins]
    paths += entry_point_files()
    return {path: stamp(path) for path in paths}


def stamp(path: str) -> list[int] | None:
    """Return the times of change and the size of a file; [] for a folder, None if missing."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    if os.path.isdir(path):
        return []
    return [status.st_mtime_ns, status.st_ctime_ns, status.st_size]


def entry_point_files() -> Iterator[str]:
    """Yield the file of entry points of each installed package; its path contains the version."""
    for folder in sys.path:
        with suppress(OSError):
            for name in os.listdir(folder or "."):
                if name.endswith((".dist-info", ".egg-info")):
                    yield os.path.join(folder, name, "entry_points.txt")


# building the index


def build_index(
    plugins: list[str],
    folders: list[Path],
    trusted: Sequence[Path] = (),
    without: Sequence[str] = (),
) -> tuple[Index, Dependencies]:
    """Load the plugins and build the index from the registries.

    Args:
        plugins: plugins that the user named.
        folders: further folders with config files.
        trusted: the trusted folders with config files, whose plugins are loaded; and the working
            folder, if relative paths in them may lead there.
        without: installed plugins to leave out.

    Returns:
        The index, and all that it depends on.
    """
    from .compose import config_folders  # not at the top: it imports Hydra
    from .config_files import chosen_in, experiments_in
    from .sections import SECTIONS, section_settings
    from .spec import PLAIN

    all_folders = config_folders(folders)
    listed, not_trusted = plugins_in(all_folders, folders, trusted)
    plugins = [*listed, *plugins]
    broken = discover(plugins, without, tolerant=True)
    sections: dict[str, Mapping[str, Setting]] = {name: section_settings(name) for name in SECTIONS}
    sections |= {name: {} for name in PLAIN}
    index = read_index(sections, experiments_in(all_folders), chosen_in(all_folders))
    index.plain = {name: setting_as_dict(setting) for name, setting in PLAIN.items()}
    index.broken = broken
    index.not_trusted = not_trusted
    installed = leave_out(without, installed_plugins())
    dependencies = {
        "modules": [plugin.module for plugin in installed if plugin.module],
        "plugins": plugins,
        "files": loaded_files(),
        "folders": [str(folder) for folder in all_folders],
    }
    return index, dependencies


def plugins_in(
    all_folders: Sequence[Path], folders: Sequence[Path], trusted: Sequence[Path]
) -> tuple[list[str], list[str]]:
    """Return the plugins that config files name: those to load, and those not to load.

    Args:
        all_folders: the folders with config files.
        folders: the further folders among them, from --config-dir.
        trusted: as for `build_index`.
    """
    from .compose import project_plugins  # not at the top: it imports Hydra

    here = Path.cwd() if Path.cwd() in trusted else None
    need_trust = [*project_folder(), *folders]
    loadable = [each for each in all_folders if each in trusted or each not in need_trust]
    listed = list(project_plugins(loadable, (), here))
    if here is None:
        # without relative paths to something in the working folder
        listed = [each for each in listed if os.path.isabs(each) or not os.path.exists(each)]
    if loadable == all_folders:
        return listed, []
    others = project_plugins(list(all_folders), (), Path.cwd())
    return listed, [plugin for plugin in others if plugin not in listed]


def load_parts(
    plugins: Iterable[str] = (), *, without: Iterable[str] = (), trusted: bool = False
) -> None:
    """Register the parts of `find_index`, which come from its cache otherwise.

    The arguments are those of `find_index`. Plugins that do not load are left out.
    """
    if any(Registry.every.values()):  # the index was built in this process
        return
    from .compose import config_folders  # not at the top: it imports Hydra

    plugins = [located(plugin) for plugin in plugins]
    listed, _ = plugins_in(config_folders([]), [], trusted_among([], trusted))
    discover([*listed, *plugins], sorted(set(without)), tolerant=True)


def loaded_files() -> list[str]:
    """Return the files of the loaded modules on which the index depends.

    They exclude the standard library and installed packages, except packages that register parts.
    """
    with_parts = set()
    for registry in Registry.every.values():
        for entry in registry:
            with_parts.add(entry.registered.module.partition(".")[0])
    stdlib = sysconfig.get_path("stdlib")
    found = set()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__dict__", {}).get("__file__")  # getattr would load lazy modules
        if not file:
            continue
        if re.search("(site|dist)-packages", file):
            is_library = name.partition(".")[0] not in with_parts
        else:
            is_library = file.startswith(stdlib)
        if not is_library:
            found.add(file)
    return sorted(found)


def read_index(
    sections: Mapping[str, Mapping[str, Setting]] | None = None,
    experiments: Iterable[str] = (),
    chosen: Mapping[str, Any] | None = None,
) -> Index:
    """Return the index of all registered parts; see `Index` for the arguments."""
    kinds: dict[str, dict[str, Any]] = {}
    for name, registry in Registry.every.items():
        kinds[name] = {
            "key": registry.kind.key,
            "many": registry.kind.many,
            "composed": registry.kind.composed,
            "doc": registry.kind.doc,
            "parts": {entry.name: part_as_dict(entry) for entry in registry},
        }
    settings = {}
    for name, section in (sections or {}).items():
        settings[name] = [setting_as_dict(setting) for setting in section.values()]
    found = Index(kinds, settings)
    found.experiments = sorted(experiments)
    found.chosen = dict(chosen or {})
    return found


def part_as_dict(entry: Entry) -> dict[str, Any]:
    """Return a part in plain types; values that JSON does not have, such as infinity, as text."""
    package, number = package_of_part(entry)
    return {
        "kind": entry.kind.name,
        "key": entry.kind.key,
        "many": entry.kind.many,
        "name": entry.name,
        "aliases": list(entry.aliases),
        "summary": entry.summary,
        "doc": " ".join(entry.doc.split("\n\n")[0].split()),
        "settings": [setting_as_dict(setting) for setting in entry.settings.values()],
        "source": str(entry.source),
        "registered": str(entry.registered),
        "module": entry.part.__module__,
        "package": package,
        "version": number,
    }


def setting_as_dict(setting: Setting) -> dict[str, Any]:
    """Return a setting in plain types.

    Its keys are `name`, `type`, `doc`, `required` and `schema` (the JSON schema of its values), and
    where they apply:

    - `default`, or `default_text` for a default that a config cannot hold;
    - `part` and `many`: the kind of part that it names, and whether it is a list of them;
    - `range`, such as "[0, 1)", and `values`: the allowed words.
    """
    found = {
        "name": setting.name,
        "type": setting.type_text,
        "doc": setting.doc,
        "required": setting.required,
        "schema": setting_type(setting),
    }
    is_typeable = setting.is_typeable if setting.part is None else names_parts(setting.default)
    if not setting.required and is_typeable:
        found["default"] = json_default(setting.default)
    elif not setting.required:
        found["default_text"] = f"{readable(setting.default)} (set in the code)"
    if setting.part:
        found["part"] = setting.part
        found["many"] = setting.many
    for mark in marks(setting.annotation):
        if isinstance(mark, Range):
            found.setdefault("range", str(mark))
    values = list(word_values(setting))
    if values:
        found["values"] = values
    return found


def word_values(setting: Setting) -> Iterator[str]:
    """Yield the values of a setting that are words: choices, truth values, null."""
    for member in map(strip, members(setting.annotation)):
        if get_origin(member) is Literal:
            for value in get_args(member):
                yield value.name if isinstance(value, Enum) else str(value)
        elif is_enum(member):
            yield from member.__members__
        elif member is bool:
            yield from ("false", "true")
        elif member in (None, type(None)):
            yield "null"


def json_default(value: Any) -> Any:
    """Return a default as JSON can hold it: infinities and NaN as text."""
    if isinstance(value, dict):
        return {str(key): json_default(item) for key, item in plain_value(value).items()}
    if isinstance(value, list | tuple):
        return [json_default(item) for item in value]
    found = plain_value(value)
    if isinstance(found, float) and not math.isfinite(found):
        return str(found)
    return found


@cache
def packages() -> dict[str, list[str]]:
    """Return the installed packages that each top-level module belongs to."""
    return dict(packages_distributions())


def package_of_part(entry: Entry) -> tuple[str | None, str | None]:
    """Return the installed package of a part's code and its version; None for a loose file."""
    found = packages().get(entry.part.__module__.partition(".")[0], [])
    return (found[0], version(found[0])) if found else (None, None)
