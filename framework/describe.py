"""What parts there are, in tables for people and dicts for programs."""

import math
import re
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import IO, Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from .errors import SettingError, UnknownName, did_you_mean
from .registry import Entry, Registry, Where
from .schema import Range, Setting, marks

PLAIN_WIDTH = 10_000  # where no terminal limits the width, nothing is cut or wrapped


def console(file: IO[str] | None = None) -> Console:
    """Return a console: as wide as the terminal and in colour; plain and without wrapping in a pipe or file."""
    file = file or sys.stdout
    return Console(file=file, highlight=False, width=None if file.isatty() else PLAIN_WIDTH)


def registry_of(kind: str) -> Registry:
    """Return the registry of a kind, by its name (or plural) or config key. Raises UnknownName with the nearest."""
    for name, registry in Registry.every.items():
        if kind in (name, registry.kind.key, f"{name}s", f"{name}es"):
            return registry
    raise UnknownName(f"there is no kind of part {kind!r}; {did_you_mean(kind, Registry.every, most=20)}")


def find(target: str) -> Entry:
    """Return the part of "optimizer/adamw", or of "adamw" when one kind only has it.

    Raises UnknownName when there is none, SettingError when several kinds have the name.
    """
    kind, slash, name = target.partition("/")
    if slash:
        return registry_of(kind).get(name)
    found = [registry.get(target) for registry in Registry.every.values() if target in registry]
    if len(found) > 1:
        raise SettingError(f"{target!r} is several parts: {', '.join(map(str, found))}. Name its kind too.")
    if not found:
        names = [entry.name for registry in Registry.every.values() for entry in registry]
        raise UnknownName(f"there is no part {target!r}; {did_you_mean(target, names)}")
    return found[0]


def as_dict(entry: Entry) -> dict[str, Any]:
    """Return a part in plain types (JSON): infinities and everything that JSON lacks as text."""
    package, number = package_of(entry)
    return {
        "kind": entry.kind.name,
        "name": entry.name,
        "aliases": list(entry.aliases),
        "summary": entry.summary,
        "settings": [setting_as_dict(setting) for setting in entry.settings.values()],
        "source": str(entry.source),
        "registered": str(entry.registered),
        "module": entry.part.__module__,
        "package": package,
        "version": number,
    }


def setting_as_dict(setting: Setting) -> dict[str, Any]:
    """Return a setting in plain types; `default` is missing when a value is required."""
    found = {"name": setting.name, "type": setting.type_text, "doc": setting.doc, "required": setting.required}
    if not setting.required:
        found["default"] = plain(setting.default)
    if setting.part:
        found["part"] = setting.part
    ranges = [str(mark) for mark in marks(setting.annotation) if isinstance(mark, Range)]
    return found | ({"range": ranges[0]} if ranges else {})


def plain(value: Any) -> Any:
    """Return a default as JSON can hold it."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def kinds_as_dicts() -> list[dict[str, Any]]:
    """Return every kind with the names of its parts."""
    kinds = [(registry.kind, registry.names()) for registry in Registry.every.values()]
    return [{"kind": kind.name, "key": kind.key, "doc": kind.doc, "parts": names} for kind, names in kinds]


@cache
def packages() -> dict[str, list[str]]:
    return dict(packages_distributions())


def package_of(entry: Entry) -> tuple[str | None, str | None]:
    """Return the installed package that a part's code comes from, and its version; None for a loose file."""
    found = packages().get(entry.part.__module__.partition(".")[0], [])
    return (found[0], version(found[0])) if found else (None, None)


def list_kinds() -> RenderableType:
    """Return a table of the kinds: how many parts each has, and what it is."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("kind", style="cyan", no_wrap=True)
    table.add_column("parts", justify="right", no_wrap=True)
    table.add_column("what it is", overflow="fold")
    for registry in Registry.every.values():
        table.add_row(registry.kind.key, str(len(registry)), registry.kind.doc)
    return table


def list_parts(registry: Registry) -> RenderableType:
    """Return a table of the parts of a kind: name, other names, the first sentence of the docstring."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(registry.kind.name, style="cyan", no_wrap=True)
    if any(entry.aliases for entry in registry):
        table.add_column("also", style="dim", overflow="fold", max_width=24)
    table.add_column("what it is", overflow="fold")
    for entry in registry:
        also = [", ".join(entry.aliases)] if len(table.columns) == 3 else []
        table.add_row(entry.name, *also, Text(tidy(entry.summary)))
    return table


def show(entry: Entry) -> RenderableType:
    """Return all about a part: its docstring's first paragraph, settings, an example, and where it comes from."""
    title = Text.assemble(
        (str(entry), "bold cyan"), (f"  also {', '.join(entry.aliases)}" if entry.aliases else "", "dim")
    )
    paragraph = Text(tidy(" ".join(entry.doc.split("\n\n")[0].split())))
    parts: list[RenderableType] = [title, paragraph, Text()] if entry.doc else [title, Text()]
    parts.append(settings_table(entry.settings.values()) if entry.settings else Text("no settings", "dim"))
    return Group(*parts, Text(), origin(entry))


def settings_table(settings: Iterable[Setting]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("setting", style="cyan", no_wrap=True)
    table.add_column("default", overflow="fold", max_width=20)
    table.add_column("type", overflow="fold", min_width=14)
    table.add_column("meaning", overflow="fold", style="dim")
    for setting in settings:
        default = Text("required", "yellow") if setting.required else Text(value_text(setting.default))
        table.add_row(setting.name, default, Text(setting.type_text), Text(tidy(setting.doc)))
    return table


def tidy(text: str) -> str:
    """Return a line of a docstring without the marks of reStructuredText: roles, links, double backticks."""
    text = re.sub(r":\w+:`([^`]*)`", r"\1", text)
    text = re.sub(r"`([^`<]*?)\s*(?:<[^>]*>)?`_+", r"\1", text)
    return text.replace("``", "")


def value_text(value: Any) -> str:
    """Write a value as on the command line: null, true, [0.9,0.999]."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(value_text, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def origin(entry: Entry) -> RenderableType:
    package, number = package_of(entry)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("try", Text(example(entry)))
    table.add_row("written in", Text(place(entry.source)))
    if entry.source.file != entry.registered.file:
        table.add_row("registered in", Text(place(entry.registered)))
    if package:
        table.add_row("package", Text(f"{package} {number}"))
    return table


def example(entry: Entry) -> str:
    """Return an override that chooses the part, with what it requires or else its first plain setting."""
    key = entry.kind.key
    if entry.kind.many:
        return f"framework train '{key}=[{entry.name}]'"
    needed = [f"{key}.{setting.name}=..." for setting in entry.settings.values() if setting.required]
    plain_ones = [s for s in entry.settings.values() if isinstance(s.default, bool | int | float | str) and not s.part]
    shown = needed or [f"{key}.{s.name}={value_text(s.default)}" for s in plain_ones[:1]]
    return " ".join([f"framework train {key}={entry.name}", *shown])


def place(where: Where) -> str:
    """Return file:line, relative to the current folder when below it."""
    file, here = Path(where.file), Path.cwd()
    shown = file.relative_to(here) if file.is_relative_to(here) else file
    return f"{shown}:{where.line}"
