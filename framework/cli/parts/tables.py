"""Tables of the kinds of parts, of the parts of a kind, and of the settings of a part."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from framework.composition.catalogue import Index
from framework.errors import Facts, SettingError, UnknownName, did_you_mean, nearest
from framework.errors.paths import pasted, quoted, shorter, typed
from framework.errors.terminal import LONGEST_NAME, printable, shortened
from framework.registry.registry import no_part
from framework.registry.signatures import plain_math
from framework.runtime.display.console import empty_table

Part = dict[str, Any]
"""A part, as `part_as_dict` returns it."""
OWNERS = ("model", "task", "data")
"""Kinds whose parts have settings that name parts of other kinds."""
LONGEST_DEFAULT = 300
"""Characters of a default value that are shown."""


def line(text: object, style: str = "", most: int | None = None) -> Text:
    """Return a text on one line, cut to `most` characters."""
    return Text(printable(text if most is None else shortened(text, most)), style)


def kind_of(index: Index, kind: str) -> str:
    """Return the name of a kind.

    Args:
        index: all parts.
        kind: the name, its plural, or the config key.

    Raises:
        UnknownName: with the nearest name.
    """
    for name, about in index.kinds.items():
        if kind in (name, about["key"], f"{name}s", f"{name}es"):
            return str(name)
    suggestion = did_you_mean(kind, index.kinds, most=20)
    error = UnknownName(f"there is no kind of parts {kind!r}; {suggestion}")
    raise error.with_facts(Facts(value=kind, suggestion=nearest(kind, index.kinds)))


def find_part(index: Index, target: str) -> Part:
    """Return the part "optimizer/adamw", or "adamw" if only one kind has this name.

    Raises:
        UnknownName: if there is no such part.
        SettingError: if parts of several kinds have the name.
    """
    kind, slash, name = target.rpartition("/")
    kinds = [kind_of(index, kind)] if slash else list(index.kinds)
    found: list[Part] = []
    names: list[str] = []
    for each in kinds:
        for part in index.kinds[each]["parts"].values():
            names.append(part["name"])
            if name in (part["name"], *part["aliases"]):
                found.append(part)
    if len(found) > 1:
        several = " or ".join(f"{part['kind']}/{part['name']}" for part in found)
        raise SettingError(f"{target!r} is ambiguous: give {several}")
    if not found and slash:
        names_by_kind = {kind: names_of(index, kind) for kind in index.kinds}
        facts = Facts(value=name, suggestion=nearest(name, names))
        raise UnknownName(no_part(kinds[0], name, names_by_kind)).with_facts(facts)
    if not found:
        facts = Facts(value=target, suggestion=nearest(target, names))
        error = UnknownName(f"there is no part {target!r}; {did_you_mean(target, names)}")
        raise error.with_facts(facts)
    return found[0]


def names_of(index: Index, kind: str) -> list[str]:
    """Return the names and aliases of the parts of a kind."""
    names: list[str] = []
    for part in index.kinds[kind]["parts"].values():
        names += [part["name"], *part["aliases"]]
    return names


def list_kinds(index: Index) -> RenderableType:
    """Return a table of the kinds: key, number of parts, description."""
    table = empty_table()
    table.add_column("key", style="cyan", no_wrap=True)
    table.add_column("parts", justify="right", no_wrap=True)
    table.add_column("description", overflow="fold")
    for kind in index.kinds.values():
        key = line(kind["key"], most=LONGEST_NAME)
        table.add_row(key, str(len(kind["parts"])), line(kind["doc"]))
    return table


def parts_table(index: Index, kind: str) -> RenderableType:
    """Return a table of the parts of a kind: name, aliases, first sentence of the docstring."""
    parts = index.kinds[kind]["parts"].values()
    has_aliases = any(part["aliases"] for part in parts)
    table = empty_table()
    table.add_column(kind, style="cyan", no_wrap=True)
    if has_aliases:
        table.add_column("also", style="dim", overflow="fold", max_width=24)
    table.add_column("description", overflow="fold")
    for part in parts:
        cells = [line(part["name"], most=LONGEST_NAME)]
        if has_aliases:
            cells.append(line(", ".join(part["aliases"])))
        table.add_row(*cells, line(tidy(part["summary"])))
    return table


def experiments_table(experiments: Sequence[Mapping[str, str]]) -> RenderableType:
    """Return a table of the experiments: name, first sentence, folder of the file."""
    folders = {each["folder"] for each in experiments}
    table = empty_table()
    table.add_column("experiment", style="cyan", no_wrap=True)
    table.add_column("description", overflow="fold")
    if len(folders) > 1:
        table.add_column("folder", style="dim", overflow="fold")
    for each in experiments:
        cells = [line(each["name"], most=LONGEST_NAME), line(each["summary"])]
        if len(folders) > 1:
            cells.append(line(each["folder"]))
        table.add_row(*cells)
    return table


def part_page(
    part: Part,
    index: Index | None = None,
    plugins: Sequence[str] = (),
    without: Sequence[str] = (),
) -> RenderableType:
    """Return the page of a part: description, settings, an example, and its source.

    Args:
        part: the part, from `find_part`.
        index: all parts; with it the example also chooses a part that uses this one.
        plugins: plugins that the example needs.
        without: installed plugins that the example leaves out.
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


def summaries(parts: Sequence[Part]) -> Table:
    """Return a table of parts: kind and name, first sentence of the docstring."""
    table = empty_table()
    table.show_header = False
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for part in parts:
        table.add_row(line(f"{part['kind']}/{part['name']}"), line(tidy(part["summary"])))
    return table


def settings_table(settings: Iterable[dict[str, Any]]) -> Table:
    """Return a table of settings: name, default, type, meaning."""
    table = empty_table()
    table.add_column("setting", style="cyan", no_wrap=True)
    table.add_column("default", overflow="fold", max_width=20)
    table.add_column("type", overflow="fold", min_width=14)
    table.add_column("meaning", overflow="fold", style="dim")
    for setting in settings:
        if setting["required"]:
            default = Text("required", "yellow")
        else:
            default = line(default_text(setting), most=LONGEST_DEFAULT)
        name = line(setting["name"], most=LONGEST_NAME)
        table.add_row(name, default, line(setting["type"]), line(tidy(setting["doc"])))
    return table


def tidy(text: str) -> str:
    """Return a line of a docstring without the roles, links and literals of reStructuredText."""
    text = re.sub(r":\w+:`([^`]*)`", lambda match: plain_math(match[1]), text)
    text = re.sub(r"`([^`<]*?)\s*(?:<[^>]*>)?`_+", r"\1", text)
    return text.replace("``", "")


def default_text(setting: dict[str, Any]) -> str:
    """Return the default of a setting as text."""
    if "default" in setting:
        return value_text(setting["default"])
    return str(setting["default_text"])


def value_text(value: Any) -> str:
    """Return a value as it is typed on the command line: null, true, [0.9,0.999]."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(value_text, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def origin(part: Part, example: str) -> RenderableType:
    """Return a table with an example command, the source and the package of a part."""
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
    """Return overrides that choose a part and give it settings.

    | part               | overrides                                                        |
    |--------------------|------------------------------------------------------------------|
    | `optimizer/sgd`    | `optimizer=sgd optimizer.lr=0.1`                                 |
    | `callback/freeze`  | `+callbacks=freeze callbacks.freeze.patterns=...` (required)     |
    | `block/linear`     | `model=stack model.blocks=[linear]`, as the default uses none    |
    """
    key = part["key"]
    name = part["name"]
    if part["many"]:
        choice = [f"+{key}={name}"]  # `callbacks=[NAME]` would replace the default ones
        settings = settings_for(part, f"{key}.{name}")
        is_default = index is not None and name in index.chosen.get(key, ())
        return settings if is_default and settings else [*choice, *settings]
    user = None if index is None else find_user(index, part["kind"])
    if user is None:
        return [f"{key}={name}", *settings_for(part, key)]
    owner, setting = user
    choice = [f"{owner['key']}={owner['name']}"]
    if setting["many"]:
        required = [f"{each['name']}: ..." for each in part["settings"] if each["required"]]
        item = f"{{name: {name}, {', '.join(required)}}}" if required else name
        return [*choice, f"{owner['key']}.{setting['name']}=[{item}]"]
    return [*choice, f"{key}={name}", *settings_for(part, key)]


def settings_for(part: Part, prefix: str) -> list[str]:
    """Return overrides of the required settings, as "lr=...", else of the first plain setting."""
    required = [setting["name"] for setting in part["settings"] if setting["required"]]
    if required:
        return [f"{prefix}.{name}=..." for name in required]
    for setting in part["settings"]:
        default = setting.get("default")
        if isinstance(default, bool | int | float | str) and "part" not in setting:
            return [f"{prefix}.{setting['name']}={typed(default)}"]
    return []


def find_user(index: Index, kind: str) -> tuple[Part, dict[str, Any]] | None:
    """Return a part that uses parts of a kind, and its setting that names them.

    Returns None if a part of the default experiment uses them, since choosing one then has an
    effect without another choice.
    """
    users: list[tuple[Part, dict[str, Any]]] = []
    for owner in OWNERS:
        for part in index.kinds.get(owner, {"parts": {}})["parts"].values():
            settings = [each for each in part["settings"] if each.get("part") == kind]
            if settings and index.chosen.get(part["key"]) == part["name"]:
                return None
            users += [(part, setting) for setting in settings]

    def simplest_first(pair: tuple[Part, dict[str, Any]]) -> tuple[bool, bool, int]:
        part, setting = pair
        return setting["many"], not setting["required"], len(part["settings"])

    return min(users, key=simplest_first, default=None)
