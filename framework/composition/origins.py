"""All places that give a setting a value: the signature, config files, and the command line.

| place                                        | used            |
|----------------------------------------------|-----------------|
| the default in the signature of the part     |                 |
| `lr: 0.01` in conf/experiment/base.yaml      |                 |
| `lr: 0.003` in conf/experiment/digits.yaml   |                 |
| `optimizer.lr=0.1` on the command line       | the last one    |

`Sources` finds the place of a problem, also in an experiment that cannot be built; this module
needs a checked experiment.
"""

import ast
import inspect
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException

from framework.errors.paths import shorter
from framework.registry.plain_values import NotPlain, plain_value, readable
from framework.registry.registry import Maker, Registry
from framework.registry.schema import Setting

from .hydra_internals import Override
from .override_syntax import dotted, of_hydra, parse
from .sections import SECTIONS, import_owner, section_settings
from .sources import COMMAND_LINE, File, changed_at, in_merge_order
from .spec import PLAIN, Spec

SWEEP = "sweep"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
Keys = Sequence[str]


@dataclass(frozen=True)
class Origin:
    """A place that gives a setting a value.

    Attributes:
        place: a line such as "conf/experiment/spam.yaml:7", "command line" or "sweep".
        value: in plain values.
        by: the override as typed, or "default of optimizer/adamw"; "" for a config file.
        other_part: the part to which the value belongs, if it is not the chosen one.
    """

    place: str
    value: Any
    by: str = ""
    other_part: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that have a value."""
        fields = {"place": self.place, "value": self.value, "by": self.by}
        if self.other_part is not None:
            fields["other_part"] = self.other_part
        return fields


@dataclass(frozen=True)
class ReadFile:
    """A config file: its name for messages, the keys of its package, and its content."""

    name: str
    keys: list[str]
    root: yaml.Node | None


class Origins:
    """Finds the places of the settings of a checked experiment.

    Args:
        spec: the experiment.
        files: the config files that Hydra has read.
        overrides: as typed.
        swept: the keys that differ between the jobs of a sweep.
    """

    def __init__(
        self,
        spec: Spec,
        files: Sequence[File] = (),
        overrides: Iterable[str] = (),
        swept: Collection[str] = (),
    ):
        self.spec = spec
        self.files: list[ReadFile] = []
        for file, package in in_merge_order(files):
            keys = package.split(".") if package else []
            self.files.append(ReadFile(shorter(file), keys, parsed(file, changed_at(file))))
        self.swept = swept
        self.typed: list[tuple[list[str], Any, str]] = []
        for text in overrides:
            self._add_override(text)
        self.typed.sort(key=lambda override: len(override[0]))  # choices come before settings

    def _add_override(self, text: str) -> None:
        """Keep the keys, the value and the text of an override of the experiment."""
        try:
            override = parsed_override(text)
        except HydraException:
            return
        if of_hydra(override.key_or_group) or override.is_sweep_override():
            return
        value = None if override.is_delete() else override.value()
        self.typed.append((dotted(override.key_or_group).split("."), value, text))

    def written(self, path: str) -> list[Origin]:
        """Return the places of a setting other than its default; the last used one counts."""
        keys = path.split(".")
        own = list(self._written(keys))
        followed = self._followed_path(keys)
        if followed is None or any(each.other_part is None for each in own):
            return own
        choices = list(self._written(followed))
        if all(choice.value is None for choice in choices):  # null is the default of each part
            return own
        return [*choices, *own]

    def all_written(self) -> dict[str, list[dict[str, Any]]]:
        """Return the result of `written` in plain values, for each setting that has one."""
        found = {}
        for path in setting_paths(self.spec.tree):
            origins = self.written(path)
            if origins:
                found[path] = [origin.as_dict() for origin in origins]
        for key in Registry.by_key():  # kinds that only other parts use, such as activation
            origins = [] if key in self.spec.tree else self.written(f"{key}.name")
            if any(origin.value is not None for origin in origins):
                found[key] = [origin.as_dict() for origin in origins]
        return found

    def _written(self, keys: Keys) -> Iterator[Origin]:
        """Yield the places in config files, and then those on the command line."""
        for file in self.files:
            if list(keys[: len(file.keys)]) != file.keys:
                continue
            for node, line, other_part in self._in_file(file, keys[len(file.keys) :]):
                value = LOADER("").construct_object(node, deep=True)
                yield Origin(f"{file.name}:{line}", value, other_part=other_part)
        for start, content, text in self.typed:
            if list(keys[: len(start)]) != start:
                continue
            found = dig(content, keys[len(start) :], start, self.spec.tree)
            if found is not None:
                place = SWEEP if ".".join(start) in self.swept else COMMAND_LINE
                yield Origin(place, found[0], text, found[1])

    def _in_file(self, file: ReadFile, keys: Keys) -> Iterator[tuple[yaml.Node, int, str | None]]:
        """Yield the values of a setting in a file: in its defaults list, and in its content."""
        if not isinstance(file.root, yaml.MappingNode):
            return
        if not file.keys:
            yield from choices_in_defaults(file.root, keys)
        node: yaml.Node = file.root
        line = 1
        other_part = None
        for depth, key in enumerate(keys):
            step = child(node, key, keys[:depth])
            if step is None:
                return
            node, line = step
            if depth + 1 < len(keys):
                part = name_of(node)
                chosen = chosen_name(self.spec.tree, [*file.keys, *keys[: depth + 1]])
                if part is not None and not same_part(part, chosen, key):
                    other_part = part
        yield node, line, None if keys[-1] == "name" else other_part

    def _followed_path(self, keys: Keys) -> list[str] | None:
        """Return the path at which the experiment chooses a nested part: "activation.name"."""
        for depth in range(2, len(keys)):
            owner = self._owner(keys[:depth])
            setting = owner.entry.settings.get(keys[depth - 1]) if owner is not None else None
            if setting is not None and setting.part is not None and not setting.many:
                choice = Registry.every[setting.part].kind.key
                return None if keys[0] == choice else [choice, *keys[depth:]]
        return None

    def _owner(self, keys: Keys) -> Maker | None:
        """Return the part that has the setting at a path."""
        registry = Registry.by_key().get(keys[0])
        if registry is None:
            return None
        found: Any = self.spec.parts.get(registry.kind.name)
        rest = list(keys[1:-1])
        if isinstance(found, list):
            name = rest.pop(0) if rest else ""
            found = next((maker for maker in found if maker.entry.name == name), None)
        for key in rest:
            found = found.settings.get(key) if isinstance(found, Maker) else None
        return found if isinstance(found, Maker) else None

    def default(self, path: str) -> Origin | None:
        """Return the default of a setting, with its line in the signature; None without one."""
        keys = path.split(".")
        if keys[-1] == "name" and len(keys) > 2:  # the name of a nested part
            keys.pop()
        owner = self._owner(keys)
        setting: Setting | None
        if owner is not None:
            setting = owner.entry.settings.get(keys[-1])
            if setting is None or setting.required:
                return None
            part = owner.entry.part
            place = parameter_line(part, setting.name) or str(owner.entry.source)
            return Origin(place, config_default(setting.default), f"default of {owner.entry}")
        if len(keys) == 2 and keys[0] in SECTIONS:
            setting = section_settings(keys[0]).get(keys[1])
            if setting is None or setting.required:
                return None
            place = parameter_line(import_owner(SECTIONS[keys[0]].owner), setting.name) or ""
            return Origin(place, config_default(setting.default), f"default of {keys[0]}")
        if path in PLAIN:
            return Origin("", config_default(PLAIN[path].default), "default")
        return None


@lru_cache(maxsize=4096)
def parsed_override(text: str) -> Override:
    """Return a parsed override; the jobs of a sweep share most of them.

    Raises:
        HydraException: for a syntax error.
    """
    return parse(text)[1]


def setting_paths(tree: Mapping[str, Any]) -> Iterator[str]:
    """Yield the path of each setting of an experiment, and of each part in a list of parts."""
    for key, value in tree.items():
        registry = Registry.by_key().get(key)
        if registry is not None and registry.kind.many:
            for name, settings in value.items():
                yield f"{key}.{name}"
                if settings:
                    yield from leaf_paths(settings, f"{key}.{name}")
        else:
            yield from leaf_paths(value, key)


def leaf_paths(tree: Any, path: str = "") -> Iterator[str]:
    """Yield the path of each setting of a tree; a part without settings is a leaf."""
    if not isinstance(tree, Mapping) or not tree:
        yield path
        return
    for key, value in tree.items():
        yield from leaf_paths(value, f"{path}.{key}" if path else str(key))


@lru_cache(maxsize=64)
def parsed(file: Path, changed: int) -> yaml.Node | None:
    """Return the nodes of a YAML file; `changed` is the time of its last change."""
    try:
        root: yaml.Node | None = yaml.compose(file.read_text(encoding="utf-8"), Loader=LOADER)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return root


def child(node: yaml.Node, key: str, above: Keys) -> tuple[yaml.Node, int] | None:
    """Return the value of a key, or the part of this name in a list, with its line.

    Args:
        above: the keys that lead to the node.
    """
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            if key_node.value == key:
                return value_node, key_node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            name = item.value if isinstance(item, yaml.ScalarNode) else name_of(item)
            if name is not None and same_part(name, key, above[-1] if above else ""):
                return item, item.start_mark.line + 1
    if isinstance(node, yaml.ScalarNode) and key == "name":  # `optimizer: sgd`
        return node, node.start_mark.line + 1
    return None


def name_of(node: yaml.Node) -> str | None:
    """Return the name in the settings of a part."""
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            if key_node.value == "name" and isinstance(value_node, yaml.ScalarNode):
                return str(value_node.value)
    return None


def choices_in_defaults(
    root: yaml.MappingNode, keys: Keys
) -> Iterator[tuple[yaml.Node, int, str | None]]:
    """Yield the choice of a part in a defaults list: `- optimizer: adamw` for optimizer.name."""
    registry = Registry.by_key().get(keys[0])
    entries = child(root, "defaults", ())
    if registry is None or entries is None or not isinstance(entries[0], yaml.SequenceNode):
        return
    rest = list(keys[1:])
    if registry.kind.many:
        if len(rest) != 1:
            return
    elif rest not in ([], ["name"]):
        return
    for entry in entries[0].value:
        if not isinstance(entry, yaml.MappingNode):
            continue
        for key_node, value_node in entry.value:
            key = str(key_node.value).removeprefix("override ").lstrip("/")
            line = key_node.start_mark.line + 1
            if key.removeprefix("also/") != keys[0]:
                continue
            if not registry.kind.many:
                yield value_node, line, None
                continue
            item = child(value_node, rest[0], keys[:1])
            if item is not None:
                yield item[0], line, None


def dig(
    value: Any, keys: Keys, above: Keys, tree: Mapping[str, Any]
) -> tuple[Any, str | None] | None:
    """Find the value at a path in the value of an override.

    Args:
        value: of the override.
        keys: the path in it.
        above: the key of the override.
        tree: the experiment.

    Returns:
        The value, and the part that it belongs to if that is not chosen; None without a value.
    """
    other_part = None
    above = list(above)
    for key in keys:
        if isinstance(value, Mapping):
            name = value.get("name")
            if isinstance(name, str) and key != "name":
                chosen = chosen_name(tree, above)
                if not same_part(name, chosen, above[-1]):
                    other_part = name
            if key not in value:
                return None
            value = value[key]
        elif isinstance(value, list):
            for item in value:
                name = item.get("name") if isinstance(item, Mapping) else item
                if isinstance(name, str) and same_part(name, key, above[-1]):
                    value = item
                    break
            else:
                return None
        elif key == "name" or (isinstance(value, str) and same_part(value, key, above[-1])):
            pass  # `optimizer=sgd` for optimizer.name, `+callbacks=ema` for callbacks.ema
        else:
            return None
        above.append(key)
    return value, other_part


def chosen_name(tree: Any, keys: Keys) -> str | None:
    """Return the name of the part at a path of the experiment; of a list, the last key."""
    registry = Registry.by_key().get(keys[0])
    if registry is not None and registry.kind.many and len(keys) == 2:
        return keys[1]
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    name = tree.get("name") if isinstance(tree, Mapping) else None
    return name if isinstance(name, str) else None


def same_part(name: str, chosen: str | None, key: str) -> bool:
    """Return whether a name or alias is that of the chosen part of the kind with this key."""
    registry = Registry.by_key().get(key) or Registry.every.get(key)
    if registry is not None and name in registry:
        name = registry.get(name).name
    return chosen is None or name == chosen


def config_default(value: Any) -> Any:
    """Return a default as a config holds it; one that no config can hold as Python shows it."""
    try:
        return plain_value(value)
    except NotPlain:
        return readable(value)


def parameter_line(part: Any, name: str) -> str | None:
    """Return the line of a parameter in the source of a class or function: "file.py:12"."""
    function = part.__init__ if inspect.isclass(part) else part
    function = inspect.unwrap(function)
    try:
        file = inspect.getsourcefile(function)
        lines, first = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (TypeError, OSError, SyntaxError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.arg == name and file is not None:
            return f"{shorter(file)}:{first + node.lineno - 1}"
    return None
