"""Named parts: a registry holds the parts of one kind, a maker builds one of them.

    activations = Registry(Kind("activation"))

    @activations.register("snake")                              # a part of your own
    class Snake(nn.Module): ...

    activations.register("silu", nn.SiLU, aliases=["swish"])    # a class of another library

    activations.build("snake", alpha=0.5)                       # one Snake
    activation = activations.maker("snake", alpha=0.5)          # activation() is a new Snake

The signature of a part defines its settings (`schema.py`). Names are unique: a second part with the
same name is an error with both places.
"""

import inspect
import re
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from functools import cached_property
from linecache import getlines
from pkgutil import resolve_name
from typing import Any, ClassVar, TypeVar, overload

from framework.errors import (
    BuildError,
    ContractError,
    DuplicateName,
    Facts,
    FrameworkError,
    PartExit,
    SettingError,
    UnknownName,
    did_you_mean,
    nearest,
    short,
    with_article,
)
from framework.errors.exits import no_exit
from framework.errors.paths import with_homes
from framework.errors.user_code import reason_of

from .plain_values import identical_values
from .schema import Names, Setting, Types, read_settings
from .signatures import call_arguments, first_sentence, signature_parameters, unwrapped

P = TypeVar("P", bound=Callable[..., Any])
RESERVED = {
    "name": "in a config it is the name of the part",
    "defaults": "in a config it is the list of selected parts",
}


@dataclass(frozen=True)
class Kind:
    """The common properties of the parts in one registry.

    Attributes:
        name: singular; used in messages and in annotations.
        given: parameters that the framework passes, by name, to the parts that have them.
        needs: those of `given` that every part must have.
        base: the class of a part, or of the object that it builds, as "module.Class".
        many: an experiment can have several of them (`callbacks=[...]`); the config key is plural.
        doc: a one-line description.
        composed: whether an experiment's config may choose a part of this kind.
        builder: "module:function", called as function(entry, given, settings) in place of
            `entry.build(given, settings)`, for settings that depend on the given parameters. It is
            imported at the first call, since contracts import the registry.
    """

    name: str
    given: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    base: str | None = None
    many: bool = False
    doc: str = ""
    builder: str | None = None
    composed: bool = True

    @property
    def key(self) -> str:
        """The Hydra group and config key."""
        return f"{self.name}s" if self.many else self.name


class Registry:
    """The parts of one kind, by name."""

    every: ClassVar[dict[str, "Registry"]] = {}  # by kind

    def __init__(self, kind: Kind):
        self.kind = kind
        self._entries: dict[str, Entry] = {}
        self._aliases: dict[str, str] = {}
        Registry.every[kind.name] = self

    @overload
    def register(self, name: str, *, aliases: Names = ...) -> Callable[[P], P]: ...
    @overload
    def register(
        self, name: str, part: P, *, aliases: Names = ..., hide: Names = ..., types: Types = ...
    ) -> P: ...
    def register(
        self,
        name: str,
        part: P | None = None,
        *,
        aliases: Names = (),
        hide: Names = (),
        types: Types = None,
    ) -> P | Callable[[P], P]:
        """Register a part under a name; without `part`, return a decorator.

        Args:
            name: lower-case letters, digits and underscores.
            part: a class or function; its signature defines its settings.
            aliases: other common names.
            hide: parameters that are not settings.
            types: annotations that replace those of a class of another library, for example to
                add a `Range`.

        Raises:
            DuplicateName: the name is taken.
            ContractError: the signature violates the contract of the kind.
        """
        if not isinstance(name, str):
            raise ContractError(
                f'{with_article(self.kind.name)} needs a name: register("..."), got {short(name)}'
            )
        caller = sys._getframe(1)
        module = caller.f_globals.get("__name__", "")
        registered = Location(caller.f_code.co_filename, caller.f_lineno, module)

        def add(part: P) -> P:
            entry = Entry(
                self.kind, name, part, registered, tuple(aliases), tuple(hide), types or {}
            )
            self._check_names(entry)
            check_contract(entry)
            self._entries[name] = entry
            self._aliases |= dict.fromkeys(entry.aliases, name)
            return part

        return add if part is None else add(part)

    def get(self, name: str) -> "Entry":
        """Return the entry with a name or alias.

        Raises:
            UnknownName: the message suggests the most similar name, also of other kinds.
        """
        entry = self._entries.get(self._aliases.get(name, name))
        if entry is None:
            raise UnknownName(self.unknown(name)).with_facts(self.unknown_facts(name))
        return entry

    def build(self, name: str, *given: Any, **arguments: Any) -> Any:
        """Build the part with a name.

        Args:
            name: a name or alias.
            given: the kind's given parameters, in their order.
            arguments: settings, and given parameters by name.
        """
        return Maker(self.get(name))(*given, **arguments)

    def maker(self, name: str, **settings: Any) -> "Maker":
        """Return a maker of the part with a name.

        Raises:
            UnknownName: there is no such part.
            SettingError: a setting does not exist, or has a value of another type.
        """
        entry = self.get(name)
        return Maker(entry, entry.checked(settings))

    def names(self) -> list[str]:
        """Return the names, without aliases, in alphabetical order."""
        return sorted(self._entries)

    @classmethod
    def by_key(cls) -> dict[str, "Registry"]:
        """Return every registry of parts for experiments, by its Hydra group and config key."""
        composed = [registry for registry in cls.every.values() if registry.kind.composed]
        return {registry.kind.key: registry for registry in composed}

    def unknown(self, name: str) -> str:
        """Return the message for an unknown name, with a suggestion."""
        names = {}
        for kind, registry in Registry.every.items():
            names[kind] = [*registry._entries, *registry._aliases]
        return no_part(self.kind.name, name, names)

    def unknown_facts(self, name: object, setting: str | None = None) -> Facts:
        """Return the facts of an unknown name.

        Args:
            name: the unknown name.
            setting: where it was written.
        """
        similar = nearest(str(name), [*self._entries, *self._aliases])
        expected = f"name of {with_article(self.kind.name)}"
        return Facts(setting, name, expected, suggestion=similar)

    def forget_unloaded(self) -> None:
        """Remove the parts of modules that are not loaded because their import failed."""
        for name, entry in list(self._entries.items()):
            if entry.registered.module not in sys.modules:
                del self._entries[name]
        for alias, name in list(self._aliases.items()):
            if name not in self._entries:
                del self._aliases[alias]

    def _check_names(self, entry: "Entry") -> None:
        for name in (entry.name, *entry.aliases):
            if not name.isidentifier() or name != name.lower():
                raise ContractError(
                    f"{name!r} ({entry.registered}) is not a valid name for a part: use "
                    "lower-case letters, digits and _"
                )
            if name in self:
                first = self.get(name).registered
                raise DuplicateName(
                    f"two parts are called {self.kind.name}/{name}: {first} and "
                    f"{entry.registered}. Rename one of them."
                )

    def __iter__(self) -> Iterator["Entry"]:
        return iter([self._entries[name] for name in self.names()])

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._aliases

    def __len__(self) -> int:
        return len(self._entries)


@dataclass(frozen=True)
class Location:
    """A line of a file, and the name of its module."""

    file: str
    line: int
    module: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Entry:
    """A registered part, with the place of its registration."""

    kind: Kind
    name: str
    part: Callable[..., Any]
    registered: Location
    aliases: tuple[str, ...] = ()
    hide: tuple[str, ...] = ()
    types: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.kind.name}/{self.name}"

    @cached_property
    def settings(self) -> dict[str, Setting]:
        """The settings by name. Defaults are checked only for parts that register themselves."""
        strict = getattr(self.part, "__module__", None) == self.registered.module
        return read_settings(self.part, self.kind.given, self.hide, self.types, strict)

    @cached_property
    def asks_for(self) -> tuple[str, ...]:
        """The kind's given parameters that this part has."""
        parameters = signature_parameters(self.part)
        return tuple(name for name in self.kind.given if name in parameters)

    @property
    def doc(self) -> str:
        """The part's own docstring; that of a base class does not count."""
        part = unwrapped(self.part)
        doc = part.__doc__ or ""
        name = getattr(part, "__name__", "")
        if is_dataclass(part) and doc.startswith(f"{name}("):  # Python generated it
            return ""
        return inspect.cleandoc(doc)

    @property
    def summary(self) -> str:
        """The first sentence of the docstring."""
        return first_sentence(self.doc.split("\n\n")[0])

    @cached_property
    def source(self) -> Location:
        """The definition of the part; for C functions the place of the registration."""
        part = unwrapped(self.part)
        try:
            file = inspect.getsourcefile(part) or self.registered.file
            return Location(file, first_line_number(part, file), part.__module__)
        except (TypeError, OSError):
            return self.registered

    def checked(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return settings converted to their types, with a maker for every nested part.

        Raises:
            SettingError: a setting does not exist, or has a value of another type.
        """
        for name in settings:
            if name not in self.settings:
                error = SettingError(
                    f"{self} has no setting {name!r}; {did_you_mean(name, self.settings)}"
                )
                similar = nearest(name, self.settings)
                raise error.with_facts(Facts(name, settings[name], suggestion=similar))
        result = {}
        for name, setting in self.settings.items():
            if name not in settings:
                continue
            try:
                result[name] = as_makers(setting, setting.convert(settings[name]))
            except FrameworkError as error:
                named = error.with_text(f"{self}: {name}: {error}")
                raise named.with_facts(replace(error.facts, setting=name)) from None
        return result

    def defaults(self, without: Container[str] = ()) -> dict[str, Any]:
        """Return the defaults that the part itself would not supply in this form.

        These are nested parts, as makers, and defaults of another type than their annotation, such
        as 0 for a float.

        Args:
            without: names of settings whose defaults are not needed.
        """
        result = {}
        for name, setting in self.settings.items():
            if name in without or setting.required:
                continue
            if setting.part is not None:
                try:
                    result[name] = as_makers(setting, setting.default)
                except FrameworkError as error:
                    raise error.with_text(f"{self}: {name}: {error}") from None
            elif setting.in_config:
                default = setting.initial()
                if not identical_values(default, setting.default):
                    result[name] = default
        return result

    def build(self, given: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
        """Call the part with its settings and those of the given parameters that it has.

        Args:
            given: the kind's given parameters, by name.
            settings: as `checked` returns them.

        Raises:
            SettingError: a required setting is missing.
            BuildError: the part raised an error; the message names the part.
        """
        missing = []
        for name, setting in self.settings.items():
            if setting.required and name not in settings:
                missing.append(name)
        if missing:
            raise SettingError(f"{self} needs a value for {', '.join(missing)}")
        arguments = {**self.defaults(without=settings.keys()), **settings}
        for name, value in arguments.items():
            arguments[name] = with_homes(value)
        for name in self.asks_for:
            if name in given:
                arguments[name] = given[name]
        positional, named = call_arguments(self.part, arguments)
        try:
            with no_exit():
                built = self.part(*positional, **named)
        except PartExit as error:
            raise BuildError(f"{self} ({self.registered}) cannot be built: {error}") from error
        except FrameworkError:
            raise
        except Exception as error:
            raise BuildError(
                f"{self} ({self.registered}) cannot be built: {reason_of(error)}"
            ) from error
        name = type(built).__qualname__
        check_base(self.kind, type(built), f"{self} ({self.registered}) builds a {name}, which")
        return built


@dataclass(eq=False, repr=False)
class Maker:
    """Builds a part with its settings, as often as needed: `activation()`, `norm(in_shape)`.

    `Registry.maker` checks the settings and returns a maker.

    Attributes:
        entry: the part.
        settings: as `Entry.checked` returns them; they are not checked again.
    """

    entry: Entry
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, *given: Any, **more: Any) -> Any:
        """Build the part.

        Args:
            given: the kind's given parameters, in their order.
            more: given parameters by name, and settings that replace those of the maker.
        """
        names = self.entry.kind.given
        if len(given) > len(names):
            expected = f"only {', '.join(names)}" if names else "nothing"
            raise SettingError(
                f"{self.entry} takes {expected} by position, not {len(given)} arguments; give "
                "settings by name"
            )
        given_by_name = dict(zip(names, given, strict=False))
        settings: dict[str, Any] = {}
        for name, value in more.items():
            if name in names:
                given_by_name[name] = value
            else:
                settings[name] = value
        settings = {**self.settings, **self.entry.checked(settings)}
        builder = self.entry.kind.builder
        if builder is None:
            return self.entry.build(given_by_name, settings)
        return resolve_name(builder)(self.entry, given_by_name, settings)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return f"{self.entry}({settings})"


def as_makers(setting: Setting, value: Any) -> Any:
    """Return the value of a setting with makers in the place of parts.

    A config has a part as a name or as {"name": ..., settings}; None, callables and the values of
    other settings are returned unchanged.
    """
    if setting.part is None or value is None or callable(value):
        return value
    registry = Registry.every[setting.part]
    if isinstance(value, list | tuple):
        return [as_makers(setting, item) for item in value]
    if isinstance(value, str):
        return registry.maker(value)
    if isinstance(value, Mapping):
        settings = dict(value)
        name = settings.pop("name", setting.default)
        if isinstance(name, str):
            return registry.maker(name, **settings)
        raise SettingError(
            f"expected the `name` of {with_article(setting.part)}, got {short(value)}"
        )
    raise SettingError(f"expected {setting.type_text}, got {short(value)}")


def no_part(kind: str, name: str, names: Mapping[str, Sequence[str]]) -> str:
    """Return the message for an unknown name, with a suggestion.

    Args:
        kind: the kind that was searched.
        name: the unknown name.
        names: all names and aliases by kind.
    """
    message = f"there is no {kind} {name!r}"
    for other, known in names.items():
        if other != kind and name in known:
            return f"{message}; {name!r} is {with_article(other)}"
    if not names[kind]:
        return f"{message}: none is registered. Call framework.discover() first"
    return f"{message}; {did_you_mean(name, names[kind])}"


def check_contract(entry: Entry) -> None:
    """Raise ContractError unless a part fulfils the contract of its kind."""
    kind = entry.kind
    label = f"{entry} ({entry.registered})"
    if not callable(entry.part):
        found = with_article(type(entry.part).__name__)
        raise ContractError(f"{label} is {found}, not a class or function")
    try:
        missing = [name for name in kind.needs if name not in entry.asks_for]
        for name, reason in RESERVED.items():
            if name in entry.settings:
                raise ContractError(f"no setting may be called {name!r}: {reason}")
    except ContractError as error:
        raise ContractError(f"{label}: {error}") from error
    if missing:
        names = " and ".join(map(repr, missing))
        raise ContractError(
            f"{label} must have a parameter {names}: the framework passes it to every {kind.name}"
        )
    if isinstance(entry.part, type):
        check_base(kind, entry.part, label)


def check_base(kind: Kind, built: type, label: str) -> None:
    """Raise ContractError unless a class is a subclass of the kind's base.

    Classes are compared by name, so that the base need not be imported.
    """
    ancestors = [f"{each.__module__}.{each.__qualname__}" for each in built.__mro__]
    if kind.base is not None and kind.base not in ancestors:
        raise ContractError(f"{label} is not a {kind.base}, as every {kind.name} must be")


def first_line_number(part: Callable[..., Any], file: str) -> int:
    """Return the first line of a function or class.

    A class is searched in the text of its file. `inspect` would parse each file as often as it has
    classes: the first `framework list` after a change of a plugin would take 1.4 s longer.
    """
    if inspect.isclass(part):
        definition = re.compile(rf"\s*class {part.__name__}\b")
        lines = enumerate(getlines(file), 1)
        numbers = [number for number, line in lines if definition.match(line)]
        if len(numbers) == 1:
            return numbers[0]
    return inspect.getsourcelines(part)[1]
