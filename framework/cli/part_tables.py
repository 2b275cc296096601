"""What parts there are, in tables for people; what they show comes from the index."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from framework.composition.catalogue import Index
from framework.errors import SettingError, UnknownName, did_you_mean
from framework.errors.paths import pasted, quoted, shorter, typed
from framework.errors.terminal import LONGEST_NAME, printable, shortened
from framework.registry.registry import no_part

Part = dict[str, Any]  # as `part_as_dict` returns it
OWNERS = ("model", "task", "data")  # kinds whose parts ask for parts of other kinds
LONGEST_DEFAULT = 300  # characters of a default value


def line(text: object, style: str = "", most: int | None = None) -> Text:
    """Return a text on one line, for a table or as a paragraph, of at most so many characters."""
    return Text(printable(text if most is None else shortened(text, most)), style)


def kind_of(index: Index, kind: str) -> str:
    """Return a kind's name, given that (or its plural) or its config key. Raises UnknownName with the nearest."""
    for name, about in index.kinds.items():
        if kind in (name, about["key"], f"{name}s", f"{name}es"):
            return name
    raise UnknownName(
        f"there is no kind of part {kind!r}; {did_you_mean(kind, index.kinds, most=20)}"
    )


def find_part(index: Index, target: str) -> Part:
    """Return the part of "optimizer/adamw", or of "adamw" when one kind only has it.

    Raises UnknownName when there is none, SettingError when several kinds have the name.
    """
    kind, slash, name = target.rpartition("/")
    kinds = [kind_of(index, kind)] if slash else list(index.kinds)
    parts = [part for each in kinds for part in index.kinds[each]["parts"].values()]
    found = [part for part in parts if name in (part["name"], *part["aliases"])]
    if len(found) > 1:
        several = ", ".join(f"{part['kind']}/{part['name']}" for part in found)
        raise SettingError(f"{target!r} is several parts: {several}. Name its kind too.")
    if not found and slash:
        raise UnknownName(
            no_part(kinds[0], name, {kind: names_of(index, kind) for kind in index.kinds})
        )
    if not found:
        raise UnknownName(
            f"there is no part {target!r}; {did_you_mean(target, [part['name'] for part in parts])}"
        )
    return found[0]


def names_of(index: Index, kind: str) -> list[str]:
    return [
        name
        for part in index.kinds[kind]["parts"].values()
        for name in (part["name"], *part["aliases"])
    ]


def list_kinds(index: Index) -> RenderableType:
    """Return a table of the kinds: how many parts each has, and what it is."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("kind", style="cyan", no_wrap=True)
    table.add_column("parts", justify="right", no_wrap=True)
    table.add_column("what it is", overflow="fold")
    for kind in index.kinds.values():
        table.add_row(
            line(kind["key"], most=LONGEST_NAME), str(len(kind["parts"])), line(kind["doc"])
        )
    return table


def parts_table(index: Index, kind: str) -> RenderableType:
    """Return a table of the parts of a kind: name, other names, the first sentence of the docstring."""
    parts = index.kinds[kind]["parts"].values()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(kind, style="cyan", no_wrap=True)
    if any(part["aliases"] for part in parts):
        table.add_column("also", style="dim", overflow="fold", max_width=24)
    table.add_column("what it is", overflow="fold")
    for part in parts:
        also = [line(", ".join(part["aliases"]))] if len(table.columns) == 3 else []
        table.add_row(line(part["name"], most=LONGEST_NAME), *also, line(tidy(part["summary"])))
    return table


def part_page(
    part: Part,
    index: Index | None = None,
    plugins: Sequence[str] = (),
    without: Sequence[str] = (),
) -> RenderableType:
    """Return all about a part: its docstring's first paragraph, settings, an example, its origin.

    Args:
        part: what `find` returns.
        index: all parts; with it the example also chooses a part that asks for this one.
        plugins: the plugins that were given to find the part; the example needs them too.
        without: the installed plugins that were left out.
    """
    also = f"  also {', '.join(part['aliases'])}" if part["aliases"] else ""
    title = Text.assemble(line(f"{part['kind']}/{part['name']}", "bold cyan"), line(also, "dim"))
    paragraphs = [line(tidy(part["doc"]))] if part["doc"] else []
    settings = settings_table(part["settings"]) if part["settings"] else Text("no settings", "dim")
    words = ["framework", "train", *map(quoted, overrides_for(part, index))]
    if part["package"] is None:
        for plugin in plugins:
            words += ["--plugins", pasted(plugin)]
    for name in without:
        words += ["--without-plugin", quoted(name)]
    return Group(title, *paragraphs, Text(), settings, Text(), origin(part, " ".join(words)))


def settings_table(settings: Iterable[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("setting", style="cyan", no_wrap=True)
    table.add_column("default", overflow="fold", max_width=20)
    table.add_column("type", overflow="fold", min_width=14)
    table.add_column("meaning", overflow="fold", style="dim")
    for setting in settings:
        required = Text("required", "yellow")
        default = (
            required if setting["required"] else line(default_text(setting), most=LONGEST_DEFAULT)
        )
        name = line(setting["name"], most=LONGEST_NAME)
        table.add_row(name, default, line(setting["type"]), line(tidy(setting["doc"])))
    return table


def tidy(text: str) -> str:
    """Return a line of a docstring without the marks of reStructuredText: roles, links, double backticks."""
    text = re.sub(r":\w+:`([^`]*)`", r"\1", text)
    text = re.sub(r"`([^`<]*?)\s*(?:<[^>]*>)?`_+", r"\1", text)
    return text.replace("``", "")


def default_text(setting: dict[str, Any]) -> str:
    return value_text(setting["default"]) if "default" in setting else setting["default_text"]


def value_text(value: Any) -> str:
    """Write a value as on the command line: null, true, [0.9,0.999]."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(value_text, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def origin(part: Part, example: str) -> RenderableType:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("try", line(example))
    table.add_row("written in", line(shorter(part["source"])))
    if part["source"].rpartition(":")[0] != part["registered"].rpartition(":")[0]:
        table.add_row("registered in", line(shorter(part["registered"])))
    if part["package"]:
        table.add_row("package", line(f"{part['package']} {part['version']}"))
    return table


def overrides_for(part: Part, index: Index | None = None) -> list[str]:
    """Return overrides that choose a part, and its required settings or else its first plain one."""
    key, name = part["key"], part["name"]
    if part["many"]:
        prefix = f"{key}.{name}"
        chosen = [f"+{key}={name}"]  # `callbacks=[NAME]` would take the place of the default ones
        if index is not None and name in index.chosen.get(key, ()):
            chosen = []
        return [*chosen, *settings_for(part, prefix)] or [f"+{key}={name}"]
    asker = None if index is None else find_asker(index, part["kind"])
    if asker is None:
        return [f"{key}={name}", *settings_for(part, key)]
    owner, setting = asker
    if setting["many"]:
        needed = [f"{each['name']}: ..." for each in part["settings"] if each["required"]]
        item = f"{{name: {name}, {', '.join(needed)}}}" if needed else name
        return [f"{owner['key']}={owner['name']}", f"{owner['key']}.{setting['name']}=[{item}]"]
    return [f"{owner['key']}={owner['name']}", f"{key}={name}", *settings_for(part, key)]


def settings_for(part: Part, prefix: str) -> list[str]:
    """Return overrides of the required settings ("..." for the value) or else of the first plain one."""
    needed = [setting["name"] for setting in part["settings"] if setting["required"]]
    if needed:
        return [f"{prefix}.{name}=..." for name in needed]
    for setting in part["settings"]:
        default = setting.get("default")
        if isinstance(default, bool | int | float | str) and "part" not in setting:
            return [f"{prefix}.{setting['name']}={typed(default)}"]
    return []


def find_asker(index: Index, kind: str) -> tuple[Part, dict[str, Any]] | None:
    """Return a part that asks for parts of a kind, and its setting that names them.

    None when a part of the default experiment asks for them, so that choosing one has an effect.
    """
    asking: list[tuple[Part, dict[str, Any]]] = []
    for owner in OWNERS:
        for part in index.kinds.get(owner, {"parts": {}})["parts"].values():
            settings = [each for each in part["settings"] if each.get("part") == kind]
            if settings and index.chosen.get(part["key"]) == part["name"]:
                return None
            asking += [(part, setting) for setting in settings]

    def simplest_first(pair: tuple[Part, dict[str, Any]]) -> tuple[bool, bool, int]:
        part, setting = pair
        return setting["many"], not setting["required"], len(part["settings"])

    return min(asking, key=simplest_first, default=None)
