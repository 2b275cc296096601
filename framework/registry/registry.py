"""Parts with names. A registry holds the parts of one kind; a maker builds one part again and again.

    activations = Registry(Kind("activation"))

    @activations.register("snake")                                  # a part of your own
    class Snake(nn.Module): ...

    activations.register("silu", nn.SiLU, aliases=["swish"])        # somebody else's class, as it is
    activations.build("snake", alpha=0.5)

A name is given once: a second part of that name is an error that names both files.
"""

import inspect
import re
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from functools import cached_property
from linecache import getlines
from typing import Any, ClassVar, TypeVar, overload

from framework.errors import (
    BuildError,
    ContractError,
    DuplicateName,
    FrameworkError,
    PartExit,
    SettingError,
    UnknownName,
    did_you_mean,
)
from framework.errors.exits import no_exit
from framework.errors.paths import with_homes
from framework.errors.user_code import reason_of

from .schema import (
    Names,
    Setting,
    Types,
    call_arguments,
    first_sentence,
    identical_values,
    parameters_of,
    read_settings,
    unwrapped,
)

P = TypeVar("P", bound=Callable[..., Any])


@dataclass(frozen=True)
class Kind:
    """What parts of one kind have in common.

    Attributes:
        name: singular, the word in error messages and of the annotation.
        given: parameters that the framework passes, by name, to the parts that ask for them.
        needs: those of `given` that every part must ask for.
        base: the class that a part, or what it builds, must be an instance of, as "module.Class".
        many: whether an experiment has several of them (`callbacks=[...]`), so that its config key is the plural.
        doc: a line on what the kind is.
    """

    name: str
    given: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    base: str | None = None
    many: bool = False
    doc: str = ""

    @property
    def key(self) -> str:
        """The Hydra group and config key."""
        return self.name + "s" if self.many else self.name


@dataclass(frozen=True)
class Where:
    """Where a part comes from."""

    file: str
    line: int
    module: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Entry:
    """A registered part: its name, what builds it, its settings and where it was registered."""

    kind: Kind
    name: str
    part: Callable[..., Any]
    registered: Where
    aliases: tuple[str, ...] = ()
    hide: tuple[str, ...] = ()
    types: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.kind.name}/{self.name}"

    @cached_property
    def settings(self) -> dict[str, Setting]:
        strict = getattr(self.part, "__module__", None) == self.registered.module
        return read_settings(self.part, self.kind.given, self.hide, self.types, strict)

    @cached_property
    def asks_for(self) -> tuple[str, ...]:
        """Those of the kind's given parameters that this part takes."""
        parameters = parameters_of(self.part)
        return tuple(name for name in self.kind.given if name in parameters)

    @property
    def doc(self) -> str:
        part = unwrapped(self.part)
        doc = part.__doc__ or ""  # its own: not what a base class says of itself
        made_by_python = is_dataclass(part) and doc.startswith(f"{getattr(part, '__name__', '')}(")
        return "" if made_by_python else inspect.cleandoc(doc)

    @property
    def summary(self) -> str:
        """The first sentence of the docstring."""
        return first_sentence(self.doc.split("\n\n")[0])

    @cached_property
    def source(self) -> Where:
        """Where the part itself is written; falls back to where it was registered (for C functions)."""
        part = unwrapped(self.part)
        try:
            file = inspect.getsourcefile(part) or self.registered.file
            return Where(file, first_line_number(part, file), part.__module__)
        except (TypeError, OSError):
            return self.registered

    def checked(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return settings as their types, and every nested part as a maker.

        Raises SettingError for an unknown name or a value of another type.
        """
        for name in settings:
            if name not in self.settings:
                raise SettingError(
                    f"{self} has no setting {name!r}; {did_you_mean(name, self.settings)}"
                )
        found = {}
        for name, setting in self.settings.items():
            if name not in settings:
                continue
            try:
                value = setting.convert(settings[name])
                found[name] = as_makers(setting, value) if setting.part else value
            except FrameworkError as error:
                raise error.with_text(f"{self}: {name}: {error}") from None
        return found

    def defaults(self, without: Container[str] = ()) -> dict[str, Any]:
        """Return the defaults that the part itself would not supply in this form.

        These are nested parts, as makers, and values of another type than their annotation: 0 is 0.0 for a float.

        Args:
            without: names of settings whose defaults are not needed.
        """
        found = {}
        for name, setting in self.settings.items():
            if name in without or setting.required:
                continue
            if setting.part is not None:
                try:
                    found[name] = as_makers(setting, setting.default)
                except FrameworkError as error:
                    raise error.with_text(f"{self}: {name}: {error}") from None
            elif setting.in_config:
                default = setting.initial()
                if not identical_values(default, setting.default):
                    found[name] = default
        return found

    def build(self, given: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
        """Call the part with what it asks for of `given`, and its settings. Raises BuildError naming the part.

        Args:
            given: what the framework passes, by the names of the kind's given parameters.
            settings: as `checked` returns them.
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
            reason = reason_of(error)
            raise BuildError(f"{self} ({self.registered}) cannot be built: {reason}") from error
        check_base(
            self.kind,
            type(built),
            f"{self} ({self.registered}) builds a {type(built).__qualname__}, which",
        )
        return built


@dataclass(eq=False, repr=False)
class Maker:
    """A named part with its settings, from which a layer gets a fresh one: `activation()`, `norm(in_shape)`.

    `Registry.maker` makes one and checks its settings.

    Attributes:
        settings: as `Entry.checked` returns them; they are not checked again when the part is built.
    """

    entry: Entry
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, *given: Any, **more: Any) -> Any:
        """Build the part; positional arguments are the kind's given parameters in their order."""
        names = self.entry.kind.given
        if len(given) > len(names):
            expected = f"only {', '.join(names)}" if names else "nothing"
            said = f"{expected} by position, not {len(given)} arguments"
            raise SettingError(f"{self.entry} takes {said}; give settings by name")
        passed = dict(zip(names, given, strict=False))
        settings: dict[str, Any] = {}
        for name, value in more.items():
            (passed if name in names else settings)[name] = value
        return self.entry.build(passed, {**self.settings, **self.entry.checked(settings)})

    def __repr__(self) -> str:
        return f"{self.entry}({', '.join(f'{k}={v!r}' for k, v in self.settings.items())})"


class Registry:
    """The parts of one kind, by name."""

    every: ClassVar[dict[str, "Registry"]] = {}  # by kind; the only mutable state of the core

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
    def register(self, name, part=None, *, aliases=(), hide=(), types=None):
        """Give a part a name; a decorator when `part` is left out.

        Args:
            name: lower-case letters, digits and underscores.
            part: a class or function whose signature holds its settings.
            aliases: other names that people use.
            hide: parameters that are no settings.
            types: annotations that replace those of a class that is not ours, e.g. to add a `Range`.

        Raises DuplicateName when the name is taken, ContractError when the signature does not fit the kind.
        """
        if not isinstance(name, str):
            raise ContractError(
                f'{with_article(self.kind.name)} needs a name, register("..."), not {name!r}'
            )
        caller = sys._getframe(1)
        where = Where(
            caller.f_code.co_filename, caller.f_lineno, caller.f_globals.get("__name__", "")
        )

        def add(part: P) -> P:
            entry = Entry(self.kind, name, part, where, tuple(aliases), tuple(hide), types or {})
            self._check(entry)
            self._entries[name] = entry
            self._aliases |= dict.fromkeys(entry.aliases, name)
            return part

        return add if part is None else add(part)

    @classmethod
    def by_key(cls) -> dict[str, "Registry"]:
        """Return every registry by its Hydra group and config key."""
        return {registry.kind.key: registry for registry in cls.every.values()}

    def _check(self, entry: Entry) -> None:
        where, who = entry.registered, f"{entry} ({entry.registered})"
        for name in (entry.name, *entry.aliases):
            if not name.isidentifier() or name != name.lower():
                raise ContractError(
                    f"{name!r} ({where}) is no name for a part: use lower-case letters, digits and _"
                )
            if name in self:
                said = f"{self.kind.name}/{name}: {self.get(name).registered} and {where}"
                raise DuplicateName(f"two parts are called {said}. Rename one of them.")
        if not callable(entry.part):
            raise ContractError(f"{who} is a {type(entry.part).__name__}, not a class or function")
        try:
            lacking = [name for name in self.kind.needs if name not in entry.asks_for]
            if "name" in entry.settings:
                raise ContractError(
                    "no setting may be called 'name': a config names the part itself by it"
                )
            if "defaults" in entry.settings:
                raise ContractError(
                    "no setting may be called 'defaults': in a config it lists choices of parts"
                )
        except ContractError as error:
            raise ContractError(f"{who}: {error}") from error
        if lacking:
            said = f"must have a parameter {' and '.join(map(repr, lacking))}"
            raise ContractError(f"{who} {said}: the framework passes it to every {self.kind.name}")
        if isinstance(entry.part, type):
            check_base(self.kind, entry.part, who)

    def get(self, name: str) -> Entry:
        """Return the entry of that name or alias. Raises UnknownName with the nearest name, also of other kinds."""
        entry = self._entries.get(self._aliases.get(name, name))
        if entry is None:
            raise UnknownName(self.unknown(name))
        return entry

    def unknown(self, name: str) -> str:
        """Say that there is no such part, and what was probably meant."""
        return no_part(
            self.kind.name, name, {k: [*r._entries, *r._aliases] for k, r in Registry.every.items()}
        )

    def build(self, name: str, *given: Any, **arguments: Any) -> Any:
        """Build the part of that name; positional arguments are the kind's given parameters in their order."""
        return Maker(self.get(name))(*given, **arguments)

    def maker(self, name: str, **settings: Any) -> Maker:
        """Return a maker of the part of that name, with these settings. Raises UnknownName or SettingError."""
        entry = self.get(name)
        return Maker(entry, entry.checked(settings))

    def forget_unloaded(self) -> None:
        """Remove the parts of modules that are not loaded, so that a plugin that failed half-way can be mended."""
        gone = {
            name
            for name, entry in self._entries.items()
            if entry.registered.module not in sys.modules
        }
        self._entries = {name: entry for name, entry in self._entries.items() if name not in gone}
        self._aliases = {alias: name for alias, name in self._aliases.items() if name not in gone}

    def names(self) -> list[str]:
        return sorted(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries[name] for name in self.names())

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._aliases

    def __len__(self) -> int:
        return len(self._entries)


def first_line_number(part: Callable[..., Any], file: str) -> int:
    """Return where a function or a class begins; for a class `inspect` would parse the whole file."""
    begins = re.compile(rf"\s*class {part.__name__}\b") if inspect.isclass(part) else None
    found = [n for n, line in enumerate(getlines(file), 1) if begins.match(line)] if begins else []
    return found[0] if len(found) == 1 else inspect.getsourcelines(part)[1]


def as_makers(setting: Setting, value: Any) -> Any:
    """Turn the value of a part's setting into makers: a name, {"name": ..., settings}, a list of them, None."""
    assert setting.part is not None
    if isinstance(value, list | tuple):
        return [as_makers(setting, item) for item in value]
    if value is None or callable(value):
        return value
    registry = Registry.every[setting.part]
    if isinstance(value, str):
        return registry.maker(value)
    if isinstance(value, Mapping):
        settings = {key: item for key, item in value.items() if key != "name"}
        name = value.get("name", setting.default)
        if isinstance(name, str):
            return registry.maker(name, **settings)
        raise SettingError(
            f"should have the `name` of {with_article(setting.part)}, not {dict(value)!r}"
        )
    raise SettingError(f"should be {setting.type_text}, not {value!r}")


def no_part(kind: str, name: str, names: Mapping[str, Sequence[str]]) -> str:
    """Say that a kind has no part of that name, and what was probably meant; `names` are those of all kinds."""
    elsewhere = [other for other, known in names.items() if other != kind and name in known]
    said = f"there is no {kind} {name!r}"
    if elsewhere:
        return f"{said}; {name!r} is {with_article(elsewhere[0])}"
    if not names[kind]:
        return f"{said}: none is registered. Call framework.discover() first"
    return f"{said}; {did_you_mean(name, names[kind])}"


def with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def check_base(kind: Kind, built: type, who: str) -> None:
    """Raise ContractError unless a class has the kind's base among its ancestors (compared by name: no import)."""
    ancestors = {f"{c.__module__}.{c.__qualname__}" for c in built.__mro__}
    if kind.base is not None and kind.base not in ancestors:
        raise ContractError(f"{who} is not a {kind.base}, as every {kind.name} must be")
