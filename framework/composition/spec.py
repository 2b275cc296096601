"""From a composed tree of plain values to a checked specification: one pass that finds every problem at once."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from framework.errors import ConfigError, SettingError, did_you_mean, short, with_article
from framework.errors.paths import quoted_override, with_homes
from framework.registry.annotations import members, strip
from framework.registry.older_defaults import is_old_text, means_default
from framework.registry.plain_values import NotPlain, plain_key, plain_value
from framework.registry.registry import Entry, Kind, Maker, Registry
from framework.registry.schema import Setting, names_parts
from framework.registry.signatures import parameters_of
from framework.training.validation import settings_refused

from .sections import SECTIONS, section_settings
from .sources import COMMAND_LINE, Sources

Settings = Mapping[str, Setting]
DIRECT = (
    "model",
    "data",
    "task",
    "optimizer",
    "scheduler",
    "metric",
    "transform",
    "callback",
    "logger",
    "initializer",
)
"""Kinds that an experiment builds itself; a choice of any other kind is for the parts that ask for one."""

PLAIN = {
    "seed": Setting(
        "seed", int, 0, "of everything random: initial weights, order of samples, dropout"
    ),
    "plugins": Setting(
        "plugins", list[str], [], "files, folders or modules with parts of your own"
    ),
    "resume": Setting(
        "resume",
        str,
        "never",
        "never, auto (the same command goes on), or the folder of a run or checkpoint",
    ),
    "fold": Setting(
        "fold",
        str | None,
        None,
        "K/N: validate on the K-th of N folds of training and validation data",
    ),
    "init_from": Setting(
        "init_from", str | None, None, "a run, checkpoint or .safetensors file to take weights from"
    ),
}


@dataclass
class Spec:
    """A checked experiment: which parts, with which settings.

    `parts` holds a Maker for each direct kind, a list of them where there may be several, or None.
    `tree` is the same in plain values, complete: what `config.yaml` in the run folder keeps.
    """

    parts: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    seed: int = 0
    plugins: list[str] = field(default_factory=list)
    without: list[str] = field(default_factory=list)  # installed plugins that are left out
    resume: str = "never"
    init_from: str | None = None
    fold: str | None = None
    tree: dict[str, Any] = field(default_factory=dict)


def read_spec(tree: Mapping[str, Any], sources: Sources | None = None) -> Spec:
    """Check a composed tree and return the specification. Raises ConfigError with all problems.

    Args:
        tree: the experiment in plain values.
        sources: where the values were written, for the messages.
    """
    return Reader(tree, sources or Sources()).read()


class Reader:
    """Walks a tree once, gathering problems and the kinds that its parts ask for."""

    def __init__(self, tree: Mapping[str, Any], sources: Sources):
        self.tree = tree
        self.source = sources
        self.typed = sources.typed
        self.problems: list[str] = []
        self.asked: dict[str, list[str]] = {}  # by kind: where parts have a choice of their own
        self.followed: set[str] = set()  # kinds of which the experiment's choice is used

    def read(self) -> Spec:
        spec = Spec()
        known = Registry.by_key().keys() | SECTIONS.keys() | PLAIN.keys()
        for key in self.tree:
            if key not in known:
                self.unknown_key(str(key), self.tree[key], known)
        for kind_name in DIRECT:
            kind = Registry.every[kind_name].kind
            spec.parts[kind_name] = (
                self.many(kind) if kind.many else self.part(kind, kind.key, self.tree.get(kind.key))
            )
        for name in SECTIONS:
            spec.sections[name] = self.settings(
                name, section_settings(name), self.tree.get(name) or {}, name
            )
        for name, setting in PLAIN.items():
            setattr(spec, name, self.value(setting, self.tree.get(name, setting.default), name))
        self.check_choices_reach(spec.parts)
        for name in ("model", "data", "task", "optimizer"):
            if spec.parts[name] is None and not self.problems:
                self.problem(
                    name,
                    None,
                    f"an experiment needs {with_article(name)}: choose one with {name}=NAME",
                )
        if spec.sections["trainer"]:
            self.check_trainer(spec.sections["trainer"])
        if self.problems:
            raise ConfigError(dict.fromkeys(self.problems))
        spec.tree = self.complete(spec)
        return spec

    def part(self, kind: Kind, path: str, value: Any, default: Any = None) -> Maker | None:
        """Return the maker for a value of a part's setting: a name, or a mapping with `name` and settings."""
        if isinstance(value, str):
            value = {"name": value}
        if value is None:
            return None
        if not isinstance(value, Mapping):
            noun = with_article(kind.name)
            self.problem(
                path,
                value,
                f"should be the name of {noun}, or a mapping with its `name` and settings",
            )
            return None
        name = value.get("name", default)
        if not isinstance(name, str) or name not in Registry.every[kind.name]:
            nothing = f"these are settings of no {kind.name} yet: choose one with {path}=NAME"
            self.problem(
                path,
                name,
                nothing if name is None else Registry.every[kind.name].unknown(str(name)),
            )
            return None
        entry = Registry.every[kind.name].get(str(name))
        given = {key: item for key, item in value.items() if key != "name"}
        return Maker(entry, self.settings(path, entry.settings, given, entry))

    def many(self, kind: Kind) -> list[Maker]:
        """Read `callbacks: {early_stop: {patience: 3}}`: parts by name."""
        value = self.tree.get(kind.key) or {}
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            value = {name: {} for name in value}
        if not isinstance(value, Mapping):
            names = f"a list of names of {kind.key}"
            self.problem(kind.key, value, f"should be {names}, or a mapping from name to settings")
            return []
        makers: list[Maker | None] = []
        for name, settings in value.items():
            if isinstance(settings, Mapping | None):
                makers.append(
                    self.part(kind, f"{kind.key}.{name}", {"name": name, **(settings or {})})
                )
            else:
                self.problem(f"{kind.key}.{name}", settings, "should be a mapping of settings")
        return [maker for maker in makers if maker is not None]

    def settings(
        self, path: str, settings: Settings, given: Any, owner: Entry | str
    ) -> dict[str, Any]:
        """Return the checked settings of a part or section."""
        if not isinstance(given, Mapping):
            self.problem(path, given, "should be a mapping of settings")
            return {}
        for key, value in given.items():
            if key not in settings:
                self.unknown_setting(f"{path}.{key}", key, value, settings, owner)
        found = {}
        for key, setting in settings.items():
            where = f"{path}.{key}"
            if setting.part is not None:
                fallback = followed_kind(setting.part)
                if isinstance(owner, Entry) and path == owner.kind.key == setting.part:
                    # to follow the choice of its own kind would be to follow itself
                    fallback = "???" if setting.required else setting.default
                part = self.nested(where, setting, given.get(key, fallback))
                if part is not OWN_DEFAULT:
                    found[key] = part
                continue
            value = given.get(key, "???")
            if not setting.is_typeable and means_default(value, setting):
                value = "???"
            if value != "???":
                found[key] = self.value(setting, value, where)
                if isinstance(owner, str):
                    found[key] = self.with_homes(found[key], where)
            elif not setting.required and isinstance(owner, str):
                found[key] = (
                    setting.initial()
                )  # a section is taken apart by its settings; a maker knows its defaults
            elif setting.required:
                name = owner if isinstance(owner, str) else owner.name
                self.problems.append(
                    f"{name} needs {where}: give it with {where}=... ({setting.type_text})"
                )
        return found

    def nested(self, path: str, setting: Setting, value: Any) -> Any:
        """Return the part that a setting names; without a choice there it is the experiment's, else the default."""
        assert setting.part is not None
        own_choices = self.asked.setdefault(setting.part, [])
        registry = Registry.every[setting.part]
        if setting.many:
            if value == followed_kind(setting.part):
                value = setting.default
            if value is setting.default and not names_parts(value):
                return OWN_DEFAULT
            if not isinstance(value, list | tuple):
                self.problem(path, value, f"should be a {setting.type_text}")
                return []
            return [
                self.part(registry.kind, f"{path}.{number}", item)
                for number, item in enumerate(value)
            ]
        chosen = self.tree.get(registry.kind.key)
        if value == "???":
            self.problem(
                path, None, f"needs {with_article(setting.part)}: choose one with {path}=NAME"
            )
            return None
        nameless = isinstance(value, Mapping) and "name" not in value
        if value == followed_kind(setting.part) or nameless:
            self.followed.add(setting.part)
        else:
            own_choices.append(path)
        if value == followed_kind(setting.part):
            if chosen is None and setting.required:
                self.problem(
                    path,
                    None,
                    f"needs a {setting.part}: choose one with {path}=NAME or {setting.part}=NAME",
                )
                return None
            if chosen is None:
                if not names_parts(setting.default):
                    return OWN_DEFAULT
                return self.part(registry.kind, path, setting.default)
            return self.settings_of_default(
                registry.kind, chosen or setting.default, setting.default
            )
        if value is setting.default and not names_parts(value):
            return OWN_DEFAULT
        default = setting.default if isinstance(setting.default, str) else None
        value = None if value == {"name": None} else value  # what a sweep over null and names gives
        if nameless:
            default = (chosen if isinstance(chosen, str) else (chosen or {}).get("name")) or default
        if value is None and "null" not in setting.type_text:
            self.problem(path, None, f"should be a {setting.type_text}, not null")
        return self.part(registry.kind, path, value, default)

    def settings_of_default(self, kind: Kind, chosen: Any, default: Any) -> Maker | None:
        """Return the experiment's choice of a kind; settings without a name are for the default of the asking part."""
        if isinstance(chosen, Mapping) and "name" not in chosen and isinstance(default, Mapping):
            chosen = {**default, **chosen}
        return self.part(kind, kind.key, chosen, default if isinstance(default, str) else None)

    def value(self, setting: Setting, value: Any, path: str) -> Any:
        if isinstance(value, str | list | dict) and is_old_text(value, setting):
            self.problem(path, value, OLD_TEXT)
            return setting.default
        try:
            converted = setting.convert(value)
        except SettingError as error:
            if isinstance(value, Mapping) and value.keys() == {"name"}:
                # `task.loss=hinge` was read as the name of a part; of this task it is a text
                return self.value(setting, value["name"], path)
            self.problem(path, value, f"{error}{self.quoting(setting, value, path)}")
            return setting.default
        if (
            type(value) is int
            and isinstance(converted, str | Path)
            and self.is_altered(value, path)
        ):
            said = f"is read as the number {value}"
            self.problem(
                path, self.typed[path].partition("=")[2], said + self.quoting(setting, value, path)
            )
        return converted

    def is_altered(self, value: int, path: str) -> bool:
        """Whether a number that stands for a text was typed otherwise: 1_000 becomes 1000."""
        if path not in self.typed:
            return False
        if "${" in self.typed[path]:  # it refers to a number
            return False
        return str(value) not in re.split(r"[^\w+-]", self.typed[path].partition("=")[2])

    def quoting(self, setting: Setting, value: Any, path: str) -> str:
        """Return how to type a text that looks like a number or a truth value."""
        text = self.typed.get(path, "").partition("=")[2]
        takes_text = any(strip(each) in (str, Path) for each in members(setting.annotation))
        if not text or not takes_text or isinstance(value, str | list | Mapping):
            return ""
        typed = text if re.fullmatch(r"[\w.+-]+", text) else "..."
        return f"; for a text write {path}=\"'{typed}'\""

    def with_homes(self, value: Any, path: str) -> Any:
        """Return the value of a section's setting without `~` (a part's: see `Entry.build`)."""
        try:
            return with_homes(value)
        except SettingError as error:
            self.problem(path, str(value), str(error))
            return value

    def check_choices_reach(self, parts: Mapping[str, Any]) -> None:
        """An experiment's choice of a kind that no part asks for would be a silent no-op."""
        askers = " nor ".join(
            parts[name].entry.name for name in ("model", "task") if parts[name] is not None
        )
        for name, registry in Registry.every.items():
            key = registry.kind.key
            chosen = self.tree.get(key)
            if name in DIRECT or chosen is None or name in self.followed:
                continue
            chosen = chosen.get("name") if isinstance(chosen, Mapping) else chosen
            own_choices = self.asked.get(name)
            if own_choices is None:
                self.problem(
                    key, chosen, f"reaches nothing: neither {askers} asks for {with_article(name)}"
                )
            elif self.source(key) == COMMAND_LINE and any(
                self.name_at(path) != chosen for path in own_choices
            ):
                places = ", ".join(dict.fromkeys(own_choices))
                written = self.source(own_choices[0])
                where = f" in {written}" if written not in ("", COMMAND_LINE) else ""
                self.problem(key, chosen, f"has no effect: what counts is {places}{where}")

    def name_at(self, path: str) -> Any:
        """Return the name of the part that the experiment chooses at a path such as model.norm."""
        value: Any = self.tree
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value.get("name") if isinstance(value, Mapping) else value

    def check_trainer(self, settings: Mapping[str, Any]) -> None:
        """Find now what the trainer will refuse (a device that is not there), before any data is read."""
        no_limit = settings["max_epochs"] is None and settings["max_steps"] is None
        if no_limit and not any(
            text.startswith(("trainer.max_epochs", "trainer.max_steps")) for text in self.problems
        ):
            advice = "give it with trainer.max_epochs=... or trainer.max_steps=..."
            self.problem("trainer", None, f"needs a limit: {advice}")
        refused = settings_refused(settings)
        for name in settings:
            if name in refused:
                self.problem(f"trainer.{name}", settings[name], refused[name])

    def unknown_key(self, key: str, value: Any, known: set[str]) -> None:
        owners = [section for section in SECTIONS if key in section_settings(section)]
        owners += [choice for choice in Registry.by_key() if self.has(choice, key)]
        path = key
        while isinstance(value, Mapping) and len(value) == 1:  # as it was typed: x.y=1
            (deeper, value), *_ = value.items()
            path = f"{path}.{deeper}"
        if key in IMPORTS:
            self.problem(key, value, TARGET)
        elif owners:
            advice = quoted_override(f"{owners[0]}.{path}={short(value, quote=False)}")
            self.problem(path, value, f"is a setting of {owners[0]}: write {advice}")
        else:
            self.problem(
                path,
                value,
                f"there is no key {key!r} in an experiment; {did_you_mean(key, known, most=30)}",
            )

    def has(self, choice: str, key: str) -> bool:
        """Whether the part that the experiment chooses of a kind has a setting of that name."""
        value, registry = self.tree.get(choice), Registry.by_key()[choice]
        name = value.get("name") if isinstance(value, Mapping) else value
        return isinstance(name, str) and name in registry and key in registry.get(name).settings

    def unknown_setting(
        self, path: str, key: Any, value: Any, settings: Settings, owner: Entry | str
    ) -> None:
        """Say whose setting it is, when it is one of another part: momentum is a setting of sgd, not of adam."""
        if key in IMPORTS:
            return self.problem(path, value, TARGET)
        name = owner if isinstance(owner, str) else owner.name
        others = []
        if isinstance(owner, Entry) and key in parameters_of(owner.part):
            given = key in owner.kind.given
            by = "is given by the framework" if given else "has a type that no config can hold"
            return self.problem(
                path, value, f"the parameter {key} of {name} {by}, so it is no setting"
            )
        if isinstance(owner, Entry):
            others = [e.name for e in Registry.every[owner.kind.name] if key in e.settings]
        others += [
            section for section in SECTIONS if section != name and key in section_settings(section)
        ]
        if others:
            said = ", ".join(others[:4]) + (" ..." if len(others) > 4 else "")
            return self.problem(path, value, f"{key} is a setting of {said}, not of {name}")
        listed = f" {key!r}; {did_you_mean(str(key), settings, most=20)}" if settings else "s"
        return self.problem(path, value, f"{name} has no setting{listed}")

    def problem(self, path: str, value: Any, message: str) -> None:
        source = self.source(path)
        shown = path if value is None else f"{path}={short(value, quote=False)}"
        self.problems.append(f"{shown}: {message}" + (f" ({source})" if source else ""))

    def complete(self, spec: Spec) -> dict[str, Any]:
        """Return the whole experiment in plain values, every default written out."""
        tree: dict[str, Any] = {}
        for kind_name, made in spec.parts.items():
            key = Registry.every[kind_name].kind.key
            if isinstance(made, list):
                tree[key] = {}
                for maker in made:
                    tree[key][maker.entry.name] = plain_settings(
                        maker.settings, maker.entry.settings
                    )
            else:
                tree[key] = config_value(made)
        for name, settings in spec.sections.items():
            if SECTIONS[name].of_run:
                tree[name] = plain_settings(settings, section_settings(name))
        if spec.fold is not None:
            tree["fold"] = spec.fold
        return tree | {"seed": spec.seed, "plugins": spec.plugins, "init_from": spec.init_from}


IMPORTS = frozenset({"_target_", "_partial_", "_args_", "_recursive_", "_convert_"})
TARGET = "is refused: a config names registered parts (`name: ...`), never something to import"


def followed_kind(kind: str) -> str:
    """What a config shows where a part follows the experiment's choice of a kind."""
    return f"${{{Registry.every[kind].kind.key}}}"


OWN_DEFAULT: Any = (
    object()
)  # in the place of a part that a signature has as an object, not by its name
OLD_TEXT = (
    "is what an earlier version wrote for a default that no config can hold, so whether the part had the default "
    "or this text is not known: take the line out to use the default"
)


def config_value(value: Any) -> Any:
    """Return makers, tuples, paths and members of enumerations as a config holds them.

    Raises SettingError for an object that no config can hold.
    """
    if isinstance(value, Maker):
        return {"name": value.entry.name} | plain_settings(value.settings, value.entry.settings)
    if isinstance(value, list | tuple):
        return [config_value(item) for item in value]
    if isinstance(value, Mapping):
        return {plain_key(key): config_value(item) for key, item in value.items()}
    try:
        return plain_value(value)
    except NotPlain:
        raise SettingError(f"{short(value, quote=False)} cannot be written into a config") from None


def plain_settings(given: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Return what was given and the defaults that a config can hold, in plain values."""
    found = {}
    for key, setting in settings.items():
        if key in given:
            found[key] = config_value(given[key])
        elif setting.in_config:
            found[key] = config_value(setting.default)
    return found
