"""Turn a composed tree of plain values into a checked specification, or report all problems."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from framework.errors import (
    ConfigError,
    Facts,
    Problem,
    SettingError,
    did_you_mean,
    nearest,
    short,
    with_article,
)
from framework.errors.paths import quoted_override, with_homes
from framework.registry.annotations import members, strip
from framework.registry.older_defaults import is_old_text, means_default
from framework.registry.plain_values import NotPlain, plain_key, plain_value
from framework.registry.registry import Entry, Kind, Maker, Registry
from framework.registry.schema import Setting, names_parts
from framework.registry.signatures import signature_parameters
from framework.training.validation import settings_refused

from .sections import SECTIONS, section_settings
from .sources import COMMAND_LINE, Sources

Schema = Mapping[str, Setting]
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
    "strategy",
)
"""Kinds that an experiment builds itself; parts of other kinds are built by parts that use them."""

PLAIN = {
    "seed": Setting(
        "seed", int, 0, "seed of all random numbers: initial weights, order of samples, dropout"
    ),
    "plugins": Setting("plugins", list[str], [], "files, folders or modules that register parts"),
    "resume": Setting(
        "resume",
        str,
        "never",
        "never, auto (the same command resumes its run), or the folder of a run or checkpoint",
    ),
    "fold": Setting(
        "fold",
        str | None,
        None,
        "K/N: validate on the K-th of N folds of training and validation data",
    ),
    "init_from": Setting(
        "init_from", str | None, None, "run, checkpoint or .safetensors file to take weights from"
    ),
}

MISSING = "???"
"""The value of a required setting that has none, as in OmegaConf."""
IMPORTS = frozenset({"_target_", "_partial_", "_args_", "_recursive_", "_convert_"})
NO_IMPORTS = "is refused: a config names registered parts (`name: ...`) and cannot import code"
OLD_TEXT = (
    "was written by an earlier version in place of a value that a config cannot hold, perhaps the "
    "default: remove the line to use the default"
)
SETTINGS = "a mapping of settings"
NO_SETTINGS = f"expected {SETTINGS} ({{}} for the defaults), got null"
NO_FACTS = Facts()
UNSET: Any = object()
"""Marks a setting that a maker leaves out, so that the default in the part's signature applies."""


@dataclass
class Spec:
    """A checked experiment: which parts, with which settings.

    Attributes:
        parts: by direct kind, a Maker, a list of Makers if there may be several, or None.
        sections: by section, its settings.
        seed: see `PLAIN`, as for the other plain values.
        plugins: the plugins to load.
        without: installed plugins that are not loaded.
        tree: the complete experiment in plain values, as `config.yaml` in the run folder holds it.
        origins: by path, where a setting was written other than in a signature, see `origins.py`.
    """

    parts: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    seed: int = 0
    plugins: list[str] = field(default_factory=list)
    without: list[str] = field(default_factory=list)
    resume: str = "never"
    init_from: str | None = None
    fold: str | None = None
    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def read_spec(tree: Mapping[str, Any], sources: Sources | None = None) -> Spec:
    """Check a composed tree and return the specification.

    Args:
        tree: the experiment in plain values.
        sources: finds where a value was written, for the messages.

    Raises:
        ConfigError: with all problems.
    """
    return Reader(tree, sources or Sources()).read()


class Reader:
    """Walks a tree once, and collects the problems and the kinds of parts that its parts use."""

    def __init__(self, tree: Mapping[str, Any], sources: Sources):
        self.tree = tree
        self.source = sources
        self.typed = sources.typed
        self.problems: list[str] = []
        self.own_choices: dict[str, list[str]] = {}  # kind -> paths of parts' own choices
        self.followed: set[str] = set()  # kinds whose choice in the experiment is used

    def read(self) -> Spec:
        spec = Spec()
        known = Registry.by_key().keys() | SECTIONS.keys() | PLAIN.keys()
        for key in self.tree:
            if key not in known:
                self.unknown_key(str(key), self.tree[key], known)
        for kind_name in DIRECT:
            kind = Registry.every[kind_name].kind
            if kind.many:
                spec.parts[kind_name] = self.many(kind)
            else:
                spec.parts[kind_name] = self.part(kind, kind.key, self.tree.get(kind.key))
        for name in SECTIONS:
            values = self.tree.get(name, {})
            spec.sections[name] = self.settings(name, section_settings(name), values, name)
        for name, setting in PLAIN.items():
            setattr(spec, name, self.value(setting, self.tree.get(name, setting.default), name))
        self.check_choices_have_effect(spec.parts)
        for name in ("model", "data", "task", "optimizer"):
            if spec.parts[name] is None and not self.problems:
                self.problem(
                    name,
                    None,
                    f"an experiment needs {with_article(name)}; choose one with {name}=NAME",
                )
        if spec.sections["trainer"]:
            self.check_trainer(spec.sections["trainer"])
        if self.problems:
            raise ConfigError(dict.fromkeys(self.problems))
        spec.tree = complete_tree(spec)
        return spec

    # parts

    def part(self, kind: Kind, path: str, value: Any, default: Any = None) -> Maker | None:
        """Return the maker of a part.

        Args:
            kind: the kind of the part.
            path: where the part is chosen, such as "model.activation".
            value: a name, a mapping with `name` and settings, or None.
            default: the name for a mapping without a name.
        """
        if isinstance(value, str):
            value = {"name": value}
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.problem(
                path,
                value,
                f"expected the name of {with_article(kind.name)}, "
                "or a mapping with its `name` and settings",
                Facts(expected=f"name of {with_article(kind.name)}"),
            )
            return None
        registry = Registry.every[kind.name]
        name = value.get("name", default)
        if name is None:
            self.problem(
                path,
                None,
                f"has settings, but no {kind.name} is chosen; choose one with {path}=NAME",
            )
            return None
        if not isinstance(name, str) or name not in registry:
            unknown = registry.unknown(str(name))
            self.problem(path, name, unknown, registry.unknown_facts(name))
            return None
        entry = registry.get(name)
        values = {key: item for key, item in value.items() if key != "name"}
        return Maker(entry, self.settings(path, entry.settings, values, entry))

    def many(self, kind: Kind) -> list[Maker]:
        """Return the makers of several parts: `callbacks: {early_stop: {patience: 3}}`."""
        value = self.tree.get(kind.key) or {}
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            value = {name: {} for name in value}
        if not isinstance(value, Mapping):
            self.problem(
                kind.key,
                value,
                f"expected a list of names of {kind.key}, or a mapping from name to settings",
            )
            return []
        makers = []
        for name, settings in value.items():
            path = f"{kind.key}.{name}"
            if not isinstance(settings, Mapping) and name in Registry.every[kind.name]:
                message = self.not_settings(kind, name, settings)
                self.problem(path, settings, message, Facts(expected=SETTINGS))
                continue
            known = settings if isinstance(settings, Mapping) else {}
            maker = self.part(kind, path, {"name": name, **known})
            if maker is not None:
                makers.append(maker)
        return makers

    def not_settings(self, kind: Kind, name: str, value: Any) -> str:
        """Return what is expected in place of a value other than settings of a part in a list."""
        if value is not None:
            return f"expected {SETTINGS}"
        advice = f"to remove it, write ~{kind.key}={name}"
        if self.source(f"{kind.key}.{name}") != COMMAND_LINE:
            advice += f" on the command line, or list the other {kind.key}"
        return f"{NO_SETTINGS}; {advice}"

    # settings

    def settings(
        self, path: str, schema: Schema, values: Any, owner: Entry | str
    ) -> dict[str, Any]:
        """Return the checked settings of a part or section.

        Args:
            path: where the part or section lies in the experiment.
            schema: the settings that it has.
            values: the values in the tree.
            owner: the part, or the name of the section.
        """
        if not isinstance(values, Mapping):
            message = NO_SETTINGS if values is None else f"expected {SETTINGS}"
            self.problem(path, values, message, Facts(expected=SETTINGS))
            return {}
        for key, value in values.items():
            if key not in schema:
                self.unknown_setting(f"{path}.{key}", key, value, schema, owner)
        found = {}
        for key, setting in schema.items():
            setting_path = f"{path}.{key}"
            if setting.part is not None:
                value = values.get(key, default_choice(setting, path, owner))
                checked = self.nested_part(setting_path, setting, value)
            else:
                checked = self.setting(setting_path, setting, values.get(key, MISSING), owner)
            if checked is not UNSET:
                found[key] = checked
        return found

    def setting(self, path: str, setting: Setting, value: Any, owner: Entry | str) -> Any:
        """Return the checked value of a setting that names no part; UNSET to use the default."""
        if not setting.is_typeable and means_default(value, setting):
            value = MISSING
        of_section = isinstance(owner, str)
        if value != MISSING:
            checked = self.value(setting, value, path)
            return self.expand_home(checked, path) if of_section else checked
        if setting.required:
            name = self.shown_name(path.rpartition(".")[0], owner)
            message = f"{name} needs a value ({setting.type_text}); give {path}=..."
            self.problem(path, None, message, Facts(expected=setting.type_text))
            return UNSET
        return setting.initial() if of_section else UNSET  # a Maker applies the part's defaults

    def nested_part(self, path: str, setting: Setting, value: Any) -> Any:
        """Return the maker for a setting that names a part; UNSET to use the default.

        | value of `model.activation` | part                                                |
        |-----------------------------|-----------------------------------------------------|
        | `"${activation}"`           | the experiment's choice, else the setting's default |
        | `gelu`, `{name: elu, ...}`  | this part                                           |
        | `{alpha: 0.5}`              | the same as `"${activation}"`, with this setting    |
        | `null`                      | none, if the setting allows it                      |
        """
        kind_name = str(setting.part)
        own_choices = self.own_choices.setdefault(kind_name, [])
        if setting.many:
            return self.nested_parts(path, setting, value)
        kind = Registry.every[kind_name].kind
        if value == MISSING:
            self.problem(
                path, None, f"needs {with_article(kind_name)}; choose one with {path}=NAME"
            )
            return None
        if value == followed_kind(kind_name):
            self.followed.add(kind_name)
            return self.followed_part(path, setting)
        default = None
        if isinstance(value, Mapping) and "name" not in value:
            self.followed.add(kind_name)
            default = self.name_at(kind.key)
            if not default and isinstance(setting.default, str):
                default = setting.default
        else:
            own_choices.append(path)
        if value is setting.default and not names_parts(value):
            return UNSET
        if value == {"name": None}:  # from a sweep over null and names
            value = None
        if value is None and "null" not in setting.type_text:
            message = f"expected {setting.type_text}, got null"
            self.problem(path, None, message, Facts(expected=setting.type_text))
        return self.part(kind, path, value, default)

    def nested_parts(self, path: str, setting: Setting, value: Any) -> Any:
        """Return the makers for a setting that names a list of parts; UNSET to use the default."""
        registry = Registry.every[str(setting.part)]
        if value == followed_kind(str(setting.part)):
            value = setting.default
        if value is setting.default and not names_parts(value):
            return UNSET
        if not isinstance(value, list | tuple):
            message = f"expected {setting.type_text}"
            self.problem(path, value, message, Facts(expected=setting.type_text))
            return []
        makers = []
        for number, item in enumerate(value):
            makers.append(self.part(registry.kind, f"{path}.{number}", item))
        return makers

    def followed_part(self, path: str, setting: Setting) -> Any:
        """Return the maker for the experiment's choice of a kind, else for the default."""
        kind = Registry.every[str(setting.part)].kind
        default = setting.default
        chosen = self.tree.get(kind.key)
        if chosen is None and setting.required:
            self.problem(
                path,
                None,
                f"needs {with_article(kind.name)}; "
                f"choose one with {path}=NAME or {setting.part}=NAME",
            )
            return None
        if chosen is None:
            return self.part(kind, path, default) if names_parts(default) else UNSET
        chosen = chosen or default
        if isinstance(chosen, Mapping) and "name" not in chosen and isinstance(default, Mapping):
            chosen = {**default, **chosen}
        return self.part(kind, kind.key, chosen, default if isinstance(default, str) else None)

    def value(self, setting: Setting, value: Any, path: str) -> Any:
        """Return a value as the type of its setting; after a problem, the default."""
        if isinstance(value, str | list | dict) and is_old_text(value, setting):
            self.problem(path, value, OLD_TEXT)
            return setting.default
        try:
            converted = setting.convert(value)
        except SettingError as error:
            if isinstance(value, Mapping) and value.keys() == {"name"}:
                # `task.loss=hinge` was rewritten for a part; for this task it is a text
                return self.value(setting, value["name"], path)
            message = f"{error}{self.quoting(setting, value, path)}"
            self.problem(path, value, message, error.facts)
            return setting.default
        is_text = isinstance(converted, str | Path)
        if type(value) is int and is_text and self.is_altered(value, path):
            self.problem(
                path,
                self.typed_value(path),
                f"is read as the number {value}{self.quoting(setting, value, path)}",
            )
        return converted

    def typed_value(self, path: str) -> str:
        """Return a value as it was typed on the command line; "" if it was not typed."""
        return self.typed.get(path, "").partition("=")[2]

    def is_altered(self, value: int, path: str) -> bool:
        """Return whether a number that is used as a text was typed differently: 1_000 for 1000."""
        if path not in self.typed:
            return False
        if "${" in self.typed[path]:  # a reference to a number
            return False
        return str(value) not in re.split(r"[^\w+-]", self.typed_value(path))

    def quoting(self, setting: Setting, value: Any, path: str) -> str:
        """Return how to type a text that looks like a number or a truth value."""
        text = self.typed_value(path)
        takes_text = any(strip(each) in (str, Path) for each in members(setting.annotation))
        if not text or not takes_text or isinstance(value, str | list | Mapping):
            return ""
        try:
            setting.convert(text)
        except SettingError:  # the text would be refused too
            return ""
        typed = text if re.fullmatch(r"[\w.+-]+", text) else "..."
        return f"; for a text write {path}=\"'{typed}'\""

    def expand_home(self, value: Any, path: str) -> Any:
        """Return a section's value with `~` expanded; for parts, `Entry.build` does this."""
        try:
            return with_homes(value)
        except SettingError as error:
            self.problem(path, str(value), str(error))
            return value

    # checks of the whole experiment

    def check_choices_have_effect(self, parts: Mapping[str, Any]) -> None:
        """Report the experiment's choices of kinds that no part uses."""
        users = [f"{name} {parts[name].entry.name}" for name in ("model", "task") if parts[name]]
        for name, registry in Registry.every.items():
            key = registry.kind.key
            if name in DIRECT or name in self.followed or self.tree.get(key) is None:
                continue
            chosen = self.name_at(key)
            own_choices = self.own_choices.get(name)
            if own_choices is None:
                self.problem(
                    key,
                    chosen,
                    f"has no effect: neither {' nor '.join(users)} uses {with_article(name)}",
                )
            elif self.source(key) == COMMAND_LINE:
                self.check_same_choice(key, chosen, own_choices)

    def check_same_choice(self, key: str, chosen: Any, own_choices: list[str]) -> None:
        """Report a typed choice of a kind if parts have their own choices and these differ."""
        if all(self.name_at(path) == chosen for path in own_choices):
            return
        places = ", ".join(dict.fromkeys(own_choices))
        source = self.source(own_choices[0])
        where = f" in {source}" if source not in ("", COMMAND_LINE) else ""
        self.problem(key, chosen, f"has no effect: {places}{where} overrides it")

    def name_at(self, path: str) -> Any:
        """Return the name of the part that the experiment chooses at a path such as model.norm."""
        value: Any = self.tree
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value.get("name") if isinstance(value, Mapping) else value

    def check_trainer(self, settings: Mapping[str, Any]) -> None:
        """Report settings that the trainer will refuse, such as a device that does not exist."""
        limits = ("trainer.max_epochs", "trainer.max_steps")
        no_limit = settings["max_epochs"] is None and settings["max_steps"] is None
        if no_limit and not any(text.startswith(limits) for text in self.problems):
            self.problem("trainer", None, f"needs a limit; give {limits[0]}=... or {limits[1]}=...")
        refused = settings_refused(settings)
        for name in settings:
            if name in refused:
                self.problem(f"trainer.{name}", settings[name], refused[name])

    # problems

    def unknown_key(self, key: str, value: Any, known: set[str]) -> None:
        """Report a key that an experiment does not have."""
        owners = [section for section in SECTIONS if key in section_settings(section)]
        owners += [choice for choice in Registry.by_key() if self.has(choice, key)]
        path, value = as_typed(key, value)
        facts = NO_FACTS
        if key in IMPORTS:
            message = NO_IMPORTS
        elif owners:
            facts = Facts(suggestion=f"{owners[0]}.{path}")
            advice = quoted_override(f"{owners[0]}.{path}={short(value, quote=False)}")
            message = f"is a setting of {owners[0]}: write {advice}"
        else:
            facts = Facts(suggestion=nearest(key, known))
            message = f"an experiment has no key {key!r}; {did_you_mean(key, known, most=30)}"
        self.problem(path, value, message, facts)

    def has(self, choice: str, key: str) -> bool:
        """Return whether the part that the experiment chooses of a kind has this setting."""
        name = self.name_at(choice)
        registry = Registry.by_key()[choice]
        return isinstance(name, str) and name in registry and key in registry.get(name).settings

    def unknown_setting(
        self, path: str, key: Any, value: Any, schema: Schema, owner: Entry | str
    ) -> None:
        """Report a setting that a part or section does not have."""
        name = self.shown_name(path.rpartition(".")[0], owner)
        others = parts_with(key, owner)
        facts = NO_FACTS
        if key in IMPORTS:
            message = NO_IMPORTS
        elif isinstance(owner, Entry) and key in signature_parameters(owner.part):
            reason = "has a type that no config can hold"
            if key in owner.kind.given:
                reason = "is passed by the framework"
            message = f"the parameter {key} of {name} {reason}, so it is not a setting"
        elif isinstance(owner, str) and key in Registry.by_key():
            typed, value = as_typed(key, value)
            path = f"{owner}.{typed}"
            facts = Facts(suggestion=typed)
            advice = quoted_override(f"{typed}={short(value, quote=False)}")
            message = f"{key} is a key of its own: write {advice}"
        elif others:
            more = " ..." if len(others) > 4 else ""
            message = f"{key} is a setting of {', '.join(others[:4])}{more}, not of {name}"
        elif schema:
            facts = Facts(suggestion=nearest(str(key), schema))
            message = f"{name} has no setting {key!r}; {did_you_mean(str(key), schema, most=20)}"
        else:
            message = f"{name} has no settings"
        self.problem(path, value, message, facts)

    def shown_name(self, path: str, owner: Entry | str) -> str:
        """Return the name of a section or part for a message; an alias if that was given.

        Args:
            path: where the part is chosen.
            owner: the part, or the name of the section.
        """
        if isinstance(owner, str):
            return owner
        for name in (self.typed_value(path), self.name_at(path)):
            if name in owner.aliases:
                return str(name)
        return owner.name

    def problem(self, path: str, value: Any, message: str, facts: Facts = NO_FACTS) -> None:
        """Record a problem as `path=value: message (place)`, without the value if it is None.

        Typed settings of a part whose own name is a problem belong to no known part, so that
        nothing can be said about them.

        Args:
            facts: what is known besides path, value and place.
        """
        source = self.source(path)
        for refused in self.source.refused:
            if source == COMMAND_LINE and f"{path}.".startswith(f"{refused}."):
                return
        shown = path if value is None else f"{path}={short(value, quote=False)}"
        place = f" ({source})" if source else ""
        known = replace(facts, setting=path, value=value, source=source or None)
        self.problems.append(Problem(f"{shown}: {message}{place}", known))


def as_typed(key: str, value: Any) -> tuple[str, Any]:
    """Return the path and the value of a setting as they were typed: x.y=1 for {x: {y: 1}}."""
    path = key
    while isinstance(value, Mapping) and len(value) == 1:
        (deeper, value), *_ = value.items()
        path = f"{path}.{deeper}"
    return path, value


def default_choice(setting: Setting, path: str, owner: Entry | str) -> Any:
    """Return the value of a setting that names a part where the tree has none.

    It follows the experiment's choice of the kind. A part that is itself this choice cannot: an
    optimizer that wraps an optimizer has its own default.
    """
    if isinstance(owner, Entry) and path == owner.kind.key == setting.part:
        return MISSING if setting.required else setting.default
    return followed_kind(str(setting.part))


def followed_kind(kind: str) -> str:
    """Return the value by which a setting follows the experiment's choice: "${activation}"."""
    return f"${{{Registry.every[kind].kind.key}}}"


def parts_with(key: Any, owner: Entry | str) -> list[str]:
    """Return the parts of the same kind, and the other sections, that have a setting."""
    found = []
    if isinstance(owner, Entry):
        found += [entry.name for entry in Registry.every[owner.kind.name] if key in entry.settings]
    for section in SECTIONS:
        name = owner if isinstance(owner, str) else owner.name
        if section != name and key in section_settings(section):
            found.append(section)
    return found


# plain values


def complete_tree(spec: Spec) -> dict[str, Any]:
    """Return the complete experiment in plain values, with all defaults."""
    tree: dict[str, Any] = {}
    for kind_name, made in spec.parts.items():
        key = Registry.every[kind_name].kind.key
        if isinstance(made, list):
            tree[key] = {}
            for maker in made:
                tree[key][maker.entry.name] = plain_settings(maker.settings, maker.entry.settings)
        else:
            tree[key] = config_value(made)
    for name, settings in spec.sections.items():
        if SECTIONS[name].of_run:
            tree[name] = plain_settings(settings, section_settings(name))
    if spec.fold is not None:
        tree["fold"] = spec.fold
    return tree | {"seed": spec.seed, "plugins": spec.plugins, "init_from": spec.init_from}


def config_value(value: Any) -> Any:
    """Return makers, tuples, paths and members of enumerations as a config holds them.

    Raises:
        SettingError: for an object that a config cannot hold.
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
        raise SettingError(f"{short(value, quote=False)} cannot be written to a config") from None


def plain_settings(values: Mapping[str, Any], schema: Schema) -> dict[str, Any]:
    """Return the values of settings, and the defaults that a config can hold, in plain values."""
    found = {}
    for key, setting in schema.items():
        if key in values:
            found[key] = config_value(values[key])
        elif setting.in_config:
            found[key] = config_value(setting.default)
    return found
