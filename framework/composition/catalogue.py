"""What parts there are, in plain types, kept in a file: with it `list`, `show` and TAB do without torch and plugins.

The file is data, believed only while all that it was made of is as it was: the plugin files and what they import of
their own, the config files, and what is installed. Otherwise, or where nothing can be kept, everything is read anew.
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
from framework.registry.plain_values import plain_value, readable
from framework.registry.registry import Entry, Registry
from framework.registry.schema import Setting, names_parts
from framework.system.files import write_file

from .trust import is_trusted

TICK = 100_000_000  # nanoseconds: two changes of a file within a tick of its clock look the same


@dataclass
class Index:
    """All parts, and what else an experiment may say, in plain types (JSON).

    Attributes:
        kinds: kind -> {"key", "many", "doc", "parts": {name: what `part_as_dict` returns}}.
        sections: other top-level keys -> their settings; of a plain value such as `seed`, none.
        experiments: names for `experiment=`.
        chosen: config key -> the part, or parts, that an experiment has when nothing else is said.
        broken: messages about installed plugins that do not load.
        not_trusted: plugins that config files name, and which are not loaded since the folder is not trusted.
    """

    kinds: dict[str, dict[str, Any]]
    sections: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    experiments: list[str] = field(default_factory=list)
    chosen: dict[str, Any] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    not_trusted: list[str] = field(default_factory=list)

    @property
    def keys(self) -> dict[str, str]:
        """The kind of each config key."""
        return {about["key"]: kind for kind, about in self.kinds.items()}

    def many(self, key: str) -> bool:
        """Whether a config key takes a list of parts."""
        return self.kinds[self.keys[key]]["many"]

    def parts(self, kind: str) -> list[str]:
        """Return the names of the parts of a kind; [] when there is no such kind."""
        return sorted(self.kinds.get(kind, {"parts": {}})["parts"])

    def settings(self, kind: str, part: str) -> list[dict[str, Any]]:
        """Return the settings of a part; [] when there is no such part."""
        return self.kinds[kind]["parts"].get(part, {"settings": []})["settings"]


def find_index(
    plugins: Iterable[str] = (),
    folders: Iterable[Path] = (),
    without: Iterable[str] = (),
    trusted: bool = False,
) -> Index:
    """Return the index of the installed plugins, those named, and the project's if its folder is trusted; kept, if
    nothing has changed.

    Args:
        plugins: plugins that the user named.
        folders: more folders with config files, as --config-dir names them.
        without: installed plugins to leave out.
        trusted: load the plugins that config files name, whether or not their folders were trusted before.

    Raises what discovery and the reading of config files raise.
    """
    plugins = [located(plugin) for plugin in plugins]
    folders = [real_path(folder) for folder in map(expanded, folders) if folder.is_dir()]
    believed = trusted_among(folders, trusted)
    without = sorted(set(without))
    make = partial(build, plugins, folders, believed, without)
    if any(
        Registry.every.values()
    ):  # a program with parts of its own: it is asked itself, and nothing is kept
        return make()[0]
    return kept_index(file_of(plugins, folders, believed, without), make)


def project_folder() -> list[Path]:
    """Return the folder of the project's config files, if the working folder has one."""
    here = real_path(Path("conf"))
    return [here] if (here / "config.yaml").is_file() or (here / "experiment").is_dir() else []


def trusted_among(folders: list[Path], everything: bool = False) -> list[Path]:
    """Return the folders with config files that are trusted, and the working folder if that is.

    The project's config files are trusted with the working folder, others with their folder or the one above it.
    """
    if not folders and not project_folder():
        return []  # no file is read at each TAB without need
    here = everything or is_trusted(Path.cwd())
    found = [Path.cwd(), *project_folder()] if here else []
    others = [folder for folder in folders if folder not in project_folder()]
    found += [
        folder for folder in others if everything or is_trusted(folder) or is_trusted(folder.parent)
    ]
    return found


def kept_index(file: Path, build: Callable[[], tuple[Index, dict[str, list[str]]]]) -> Index:
    """Return the index in a file while it holds; else build it, and keep it there if that can be done."""
    begun = time.time_ns()
    try:
        digest, _, text = file.read_text(encoding="utf-8").partition("\n")
        kept = json.loads(text) if digest == text_digest(text) else {}
        if kept["stamps"] == stamps(**kept["of"]):
            return Index(**kept["index"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # none yet, damaged, or of another version
    index, of = build()
    if not index.broken:  # a plugin may load the next time, for reasons that no file shows
        keep(file, begun, {"of": of, "stamps": stamps(**of), "index": asdict(index)})
    return index


def file_of(
    plugins: list[str],
    folders: list[Path],
    trusted: Sequence[Path] = (),
    without: Sequence[str] = (),
) -> Path:
    """Return the file for these plugins, the working folder's config, what is trusted, and this interpreter."""
    project = project_folder()
    python = [sys.executable, sys.version, sys.flags.optimize, sys.path, __file__]
    made_of = [plugins, folders, project, list(trusted), list(without), python]
    homes = map(os.path.expanduser, (os.environ.get("XDG_CACHE_HOME", ""), "~/.cache", os.devnull))
    home = next(path for path in homes if os.path.isabs(path))
    return Path(home, "framework", f"{text_digest(repr(made_of))}.json")


def text_digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=16).hexdigest()


def keep(file: Path, begun: int, content: dict[str, Any]) -> None:
    """Write the file whole or not at all; not when something was changed as it was read, or a moment before."""
    times = [time for stamp in content["stamps"].values() for time in (stamp or [])[:2]]
    if max(times, default=0) > begun - TICK:
        return
    text = json.dumps(content, default=str)
    with suppress(OSError, RunError):  # a home that cannot be written: slower, not wrong
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file.parent, file.name, f"{text_digest(text)}\n{text}")


def stamps(
    modules: list[str], plugins: list[str], files: list[str], folders: list[str]
) -> dict[str, Any]:
    """Return every path that an index depends on, with when and how large it was written; None: it is not there."""
    configs = [Path(folder, "config.yaml") for folder in folders]
    configs += [file for folder in folders for file in Path(folder, "experiment").glob("*.yaml")]
    paths = [
        *map(str, [*plugin_files([*modules, *plugins]), *configs]),
        *map(os.path.abspath, plugins),
    ]
    return {path: stamp(path) for path in [*files, *paths, *entry_point_files()]}


def stamp(path: str) -> list[int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return (
        [status.st_mtime_ns, status.st_ctime_ns, status.st_size] if not os.path.isdir(path) else []
    )


def entry_point_files() -> Iterator[str]:
    """Yield for each package that is installed the file of its entry points; its folder's name has the version."""
    for folder in sys.path:
        with suppress(OSError):
            names = [
                name
                for name in os.listdir(folder or ".")
                if name.endswith((".dist-info", ".egg-info"))
            ]
            yield from (os.path.join(folder, name, "entry_points.txt") for name in names)


def build(
    plugins: list[str],
    folders: list[Path],
    trusted: Sequence[Path] = (),
    without: Sequence[str] = (),
) -> tuple[Index, dict[str, list[str]]]:
    """Load the plugins; return the index of the registered parts, and what it depends on, for `stamps`.

    Args:
        plugins: plugins that the user named.
        folders: more folders with config files.
        trusted: the folders with config files whose plugins are loaded, too; and the working folder, if relative
            paths in them may lead there.
        without: installed plugins to leave out.
    """
    from .compose import (
        config_folders,
        project_plugins,
    )  # not at the top: a kept index does without Hydra
    from .config_files import chosen_in, experiments_in
    from .sections import SECTIONS, section_settings
    from .spec import PLAIN

    found = config_folders(folders)
    here = Path.cwd() if Path.cwd() in trusted else None
    ours = [
        folder
        for folder in found
        if folder in trusted or folder not in [*project_folder(), *folders]
    ]
    listed = [
        plugin
        for plugin in project_plugins(ours, (), here)
        if here is not None or not is_in_reach(plugin)
    ]
    not_trusted = [] if ours == found else project_plugins(found, (), Path.cwd())
    plugins = [*listed, *plugins]
    broken = discover(plugins, without, tolerant=True)
    sections: dict[str, Mapping[str, Setting]] = {name: section_settings(name) for name in SECTIONS}
    index = read_index(
        sections | {name: {} for name in PLAIN}, experiments_in(found), chosen_in(found)
    )
    index.broken = broken
    index.not_trusted = [plugin for plugin in not_trusted if plugin not in listed]
    modules = [plugin.module for plugin in leave_out(without, installed_plugins()) if plugin.module]
    return index, {
        "modules": modules,
        "plugins": plugins,
        "files": own_files(),
        "folders": [*map(str, found)],
    }


def is_in_reach(plugin: str) -> bool:
    """Whether a plugin would be loaded from the working folder: a relative path that leads to a file or folder."""
    return not os.path.isabs(plugin) and os.path.exists(plugin)


def own_files() -> list[str]:
    """Return the file of every loaded module but Python's and the installed ones, save those of packages with parts."""
    own = {
        entry.registered.module.partition(".")[0]
        for registry in Registry.every.values()
        for entry in registry
    }
    stdlib, found = sysconfig.get_path("stdlib"), set()
    for name, module in list(sys.modules.items()):
        file = (
            getattr(module, "__dict__", {}).get("__file__") or stdlib
        )  # a plain getattr would wake lazy modules
        in_packages = re.search("(site|dist)-packages", file)
        library = name.partition(".")[0] not in own if in_packages else file.startswith(stdlib)
        found |= set() if library else {file}
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
            "doc": registry.kind.doc,
        }
        kinds[name]["parts"] = {entry.name: part_as_dict(entry) for entry in registry}
    settings = {
        name: [setting_as_dict(s) for s in found.values()]
        for name, found in (sections or {}).items()
    }
    return Index(kinds, settings, sorted(experiments), dict(chosen or {}))


def part_as_dict(entry: Entry) -> dict[str, Any]:
    """Return a part in plain types: infinities and everything that JSON lacks as text."""
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
    """Return a setting in plain types; `default` is missing when a value is required, or when no config can hold it:
    then `default_text` shows it to people.

    `part` is the kind of part that it names, `many` whether it is a list of them, `values` the words that it may be.
    """
    found = {
        "name": setting.name,
        "type": setting.type_text,
        "doc": setting.doc,
        "required": setting.required,
    }
    if not setting.required and shows_default(setting):
        found["default"] = json_default(setting.default)
    elif not setting.required:
        found["default_text"] = f"{readable(setting.default)} (set in the code)"
    if setting.part:
        found |= {"part": setting.part, "many": setting.many}
    ranges = [str(mark) for mark in marks(setting.annotation) if isinstance(mark, Range)]
    values = list(words(setting))
    return found | ({"range": ranges[0]} if ranges else {}) | ({"values": values} if values else {})


def words(setting: Setting) -> Iterator[str]:
    """Yield the values of a setting that are words: choices, truth values, null."""
    for member in map(strip, members(setting.annotation)):
        if get_origin(member) is Literal:
            yield from (
                each.name if isinstance(each, Enum) else str(each) for each in get_args(member)
            )
        elif is_enum(member):
            yield from member.__members__
        elif member in (bool, None, type(None)):
            yield from ("false", "true") if member is bool else ("null",)


def shows_default(setting: Setting) -> bool:
    """Whether the default of a setting is one that a person could type."""
    return names_parts(setting.default) if setting.part is not None else setting.is_typeable


def json_default(value: Any) -> Any:
    """Return a default that a config can hold as JSON can hold it: infinities and NaN as text."""
    if isinstance(value, dict):
        return {str(key): json_default(item) for key, item in plain_value(value).items()}
    if isinstance(value, list | tuple):
        return [json_default(item) for item in value]
    found = plain_value(value)
    return found if not isinstance(found, float) or math.isfinite(found) else str(found)


@cache
def packages() -> dict[str, list[str]]:
    return dict(packages_distributions())


def package_of_part(entry: Entry) -> tuple[str | None, str | None]:
    """Return the installed package that a part's code comes from, and its version; None for a loose file."""
    found = packages().get(entry.part.__module__.partition(".")[0], [])
    return (found[0], version(found[0])) if found else (None, None)
