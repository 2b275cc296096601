"""A part's settings, read from its signature: the one place where a type, a range or a default is written.

Supported types: int, float, bool, str, Path, None, Any, Literal, unions, list, tuple, dict[str, T], `Annotated` with a
`Range`, and parts (`Activation`, `Norm`, ... in `kinds.py`), also in lists.
"""

import inspect
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from .errors import ContractError, SettingError

REQUIRED: Any = inspect.Parameter.empty  # the default of a setting that has none
SCALARS = (bool, int, float, str, Path)
Names = Iterable[str]
Types = Mapping[str, Any] | None  # annotations by parameter


@dataclass(frozen=True)
class Range:
    """An interval in mathematical notation, as a mark of a number: `Annotated[float, Range("[0, 1)")]`."""

    interval: str

    def __post_init__(self):
        number = r"\s*[-+]?(inf|\d+(\.\d*)?(e[-+]?\d+)?)\s*"
        if re.fullmatch(rf"[\[(]{number},{number}[\])]", self.interval) is None:
            raise ContractError(f"{self.interval!r} is no interval; write it like [0, 1) or (0, inf)")

    def __contains__(self, number: float) -> bool:
        low, high = (float(end) for end in self.interval[1:-1].split(","))
        above = number >= low if self.interval[0] == "[" else number > low
        below = number <= high if self.interval[-1] == "]" else number < high
        return above and below

    def __str__(self) -> str:
        return self.interval


@dataclass(frozen=True)
class Pattern:
    """Marks a text that must match a regular expression; `form` says in words what is right."""

    regex: str
    form: str

    def __contains__(self, text: str) -> bool:
        return re.fullmatch(self.regex, text) is not None


@dataclass(frozen=True)
class PartOf:
    """Marks a parameter that receives a maker of parts of one kind."""

    kind: str


PositiveInt = Annotated[int, Range("[1, inf)")]
NonNegativeInt = Annotated[int, Range("[0, inf)")]
PositiveFloat = Annotated[float, Range("(0, inf)")]
NonNegativeFloat = Annotated[float, Range("[0, inf)")]
Fraction = Annotated[float, Range("[0, 1]")]
Rate = Annotated[float, Range("[0, 1)")]


@dataclass(frozen=True)
class Setting:
    """One setting of a part: what may be overridden, with its type, default and a sentence."""

    name: str
    annotation: Any
    default: Any
    doc: str = ""

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    @property
    def part(self) -> str | None:
        """The kind of the part that this setting names, if it names one (or a list of them)."""
        return next((mark.kind for mark in marks(self.annotation) if isinstance(mark, PartOf)), None)

    @property
    def many(self) -> bool:
        """Whether the setting is a list of parts."""
        return self.part is not None and any(get_origin(strip(each)) is list for each in members(self.annotation))

    @property
    def type_text(self) -> str:
        return describe(self.annotation)

    def convert(self, value: Any) -> Any:
        """Return `value` as the setting's type. Raises SettingError that says what was expected."""
        return convert(value, self.annotation)


def strip(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union; of anything else, itself."""
    if get_origin(strip(annotation)) in (Union, types.UnionType):
        return get_args(strip(annotation))
    return (annotation,)


def marks(annotation: Any) -> list[Any]:
    """Every mark (`Range`, `Pattern`, `PartOf`) in an annotation, at any depth."""
    own = list(annotation.__metadata__) if get_origin(annotation) is Annotated else []
    arguments = get_args(annotation)[:1] if own else get_args(annotation)
    inner = [] if get_origin(annotation) is Literal else [m for a in arguments for m in marks(a)]
    return own + inner


def check_arguments(part: Callable, given: Mapping[str, Any]) -> None:
    """Raise SettingError, with its name, for the first argument outside the type or range of its setting."""
    for name, setting in read_settings(part).items():
        try:
            setting.convert(given[name])
        except SettingError as error:
            raise SettingError(f"{name} {error}") from None


def read_settings(part: Callable, given: Names = (), hide: Names = (), types: Types = None) -> dict[str, Setting]:
    """Return the settings of a part by name: each parameter that is not given by the framework and can be configured.

    `types` replaces annotations (for classes that are not ours); `hide` leaves parameters out.
    Raises ContractError when a required parameter has a type that no config can express.
    """
    left_out = {*given, *hide}
    documented = parameter_docs(part)
    parameters = signature(part).parameters
    for name in types or {}:
        if name not in parameters:
            raise ContractError(f"`types` names {name!r}; {name_of(part)} has no such parameter")
    found = {}
    for parameter in parameters.values():
        if parameter.name in left_out or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        annotation = (types or {}).get(parameter.name, infer(parameter))
        if not expressible(annotation):
            if parameter.default is REQUIRED:
                raise ContractError(
                    f"parameter {parameter.name!r} of {name_of(part)} has type {annotation!r}, which no config can "
                    f"express, and no default. Give it a default, or one of the types int, float, bool, str, list ..."
                )
            continue
        doc = documented.get(parameter.name, "")
        found[parameter.name] = Setting(parameter.name, annotation, parameter.default, doc)
    return found


def signature(part: Callable) -> inspect.Signature:
    """Return the signature with its annotations evaluated, also under `from __future__ import annotations`."""
    try:
        return inspect.signature(part, eval_str=True)
    except (NameError, SyntaxError) as error:
        raise ContractError(f"the annotations of {name_of(part)} cannot be read: {error}") from error
    except (ValueError, TypeError) as error:
        raise ContractError(f"{name_of(part)} has no signature that Python can read: {error}") from error


def name_of(part: Any) -> str:
    return getattr(part, "__qualname__", None) or repr(part)


def infer(parameter: inspect.Parameter) -> Any:
    """The annotation, or for a bare parameter (as in much of torch) the type of its default."""
    if parameter.annotation is not parameter.empty:
        if parameter.default is None and type(None) not in get_args(strip(parameter.annotation)):
            return parameter.annotation | None if parameter.annotation is not Any else Any
        return parameter.annotation
    return type(parameter.default) if isinstance(parameter.default, SCALARS) else Any


def parameter_docs(part: Callable) -> dict[str, str]:
    """Return the first sentence on each parameter in an `Args:` section (Google style, as torch's).

    Of a class, that of the class itself, of its `__init__`, and of the class that it inherits `__init__` from.
    """
    if not isinstance(part, type):
        return documented_args(inspect.getdoc(part) or "")
    owner = next(ancestor for ancestor in part.__mro__ if "__init__" in vars(ancestor))
    docs = (owner.__doc__, vars(owner)["__init__"].__doc__, part.__doc__)
    return {name: line for doc in docs for name, line in documented_args(inspect.cleandoc(doc or "")).items()}


def documented_args(doc: str) -> dict[str, str]:
    lines = iter(doc.split("\n"))
    found: dict[str, str] = {}
    for line in lines:
        if line.strip() in ("Args:", "Arguments:"):
            break
    name, indent = "", 0
    for line in lines:
        if line and not line[0].isspace():
            break
        depth = len(line) - len(line.lstrip())
        match = re.match(r"\s{1,8}\**(\w+)\s*(?:\([^)]*\))?\s*:(?:\s+(.*))?$", line)
        if match and (depth <= indent or not indent):
            name, indent = match[1], depth
            found[name] = match[2] or ""
        elif name and depth > indent:
            found[name] += " " + line.strip()
    return {name: first_sentence(text) for name, text in found.items()}


def first_sentence(text: str) -> str:
    """Return the first sentence of a paragraph, without the marks of reStructuredText and what it says of defaults."""
    sentence = re.split(r"(?<!e\.g|i\.e| al| cf| vs)\. (?=[^a-z0-9])", " ".join(text.split()))[0]
    sentence = re.sub(r"\s*\([Dd]efaults?\b[^)]*\)", "", sentence)
    sentence = re.sub(r":\w+:`([^`]*)`", lambda match: match[1].replace("\\", ""), sentence)
    return sentence.replace("``", "`").strip().rstrip(".:")


def expressible(annotation: Any) -> bool:
    """Whether a value of this type can be written in a config."""
    origin = get_origin(annotation)
    if origin is Annotated:
        is_part = any(isinstance(mark, PartOf) for mark in annotation.__metadata__)
        return is_part or expressible(strip(annotation))
    if origin in (Union, types.UnionType):  # float | Tensor: the float can be written
        return any(expressible(a) for a in get_args(annotation) if a is not type(None))
    if origin in (list, tuple, dict, Sequence, Iterable):
        return all(expressible(a) for a in get_args(annotation) if a is not Ellipsis)
    if origin is Literal:
        return True
    return annotation in (*SCALARS, None, type(None), Any, list, tuple, dict)


def describe(annotation: Any) -> str:
    """Return a type in words: "float in (0, 1]", "one of mean, sum", "int or list of int"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        text = describe(arguments[0])
        for mark in annotation.__metadata__:
            if isinstance(mark, PartOf):
                return f"name of {'an' if mark.kind[0] in 'aeiou' else 'a'} {mark.kind}"
            text = mark.form if isinstance(mark, Pattern) else f"{text} in {mark}" if isinstance(mark, Range) else text
        return text
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(a) for a in arguments if expressible(a)))
    if origin is Literal:
        return "one of " * (len(arguments) > 1) + ", ".join(str(a) for a in arguments)
    if origin is tuple and Ellipsis not in arguments:
        return "[" + ", ".join(describe(a) for a in arguments) + "]"
    if origin in (list, tuple, Sequence, Iterable):
        return f"list of {describe(arguments[0])}"
    if origin is dict:
        return f"dict of {describe(arguments[1])}"
    if annotation in (None, type(None)):
        return "null"
    return "path" if annotation is Path else getattr(annotation, "__name__", str(annotation)).replace("Any", "any")


def convert(value: Any, annotation: Any) -> Any:
    """Return `value` as the annotated type: 3.0 as int 3, 1 as float 1.0, a list as tuple.

    Raises SettingError: "should be float in (0, 1], not 'fast'".
    """
    try:
        return converted(value, annotation)
    except Mismatch:
        raise SettingError(f"should be {describe(annotation)}, not {value!r}") from None


class Mismatch(Exception):
    """A value, or something in it, is not of its type; the message is about the whole value."""


def converted(value: Any, annotation: Any) -> Any:
    """Do as `convert` says. Raises Mismatch."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any or annotation is REQUIRED:
        return value
    if origin is Annotated:
        if any(isinstance(mark, PartOf) for mark in annotation.__metadata__):
            return value  # a part is checked by its registry
        number = converted(value, arguments[0])
        limits = [mark for mark in annotation.__metadata__ if isinstance(mark, Range | Pattern)]
        return matching(number, number is None or all(number in limit for limit in limits))
    if origin in (Union, types.UnionType):
        return convert_union(value, arguments)
    if origin is Literal:
        same = [choice for choice in arguments if value == choice and type(value) is type(choice)]
        if type(value) is int:  # `precision=16` where the choices are texts
            same += [choice for choice in arguments if choice == str(value)]
        return matching(same, bool(same))[0]
    if origin in (list, tuple, dict, Sequence, Iterable) or annotation in (list, tuple, dict):
        return convert_container(value, origin or annotation, arguments)
    return convert_scalar(value, annotation)


def matching(value: Any, matches: bool) -> Any:
    if not matches:
        raise Mismatch
    return value


def convert_union(value: Any, alternatives: Iterable[Any]) -> Any:
    alternatives = [a for a in alternatives if expressible(a)]
    exact = sorted(alternatives, key=lambda a: (strip(a) is not type(value), strip(a) in (str, Path)))  # 3 is no text
    for alternative in exact:
        with suppress(Mismatch):
            return converted(value, alternative)
    raise Mismatch


def convert_container(value: Any, kind: Any, inner: Sequence[Any]) -> Any:
    if kind is dict:
        matching(value, isinstance(value, Mapping))
        return {str(key): converted(item, inner[1] if inner else Any) for key, item in value.items()}
    matching(value, isinstance(value, Sequence) and not isinstance(value, str))
    if kind is tuple and inner and Ellipsis not in inner:
        matching(value, len(value) == len(inner))
        return tuple(converted(item, each) for item, each in zip(value, inner, strict=True))
    items = [converted(item, inner[0] if inner else Any) for item in value]
    return tuple(items) if kind is tuple else items


def convert_scalar(value: Any, annotation: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is None or annotation is type(None):
        return matching(value, value is None)
    if annotation is bool:
        return matching(value, isinstance(value, bool))
    if annotation is int:  # 1e3 is an int, in words
        return int(matching(value, number and math.isfinite(value) and value == int(value)))
    if annotation is float:
        return float(matching(value, number))
    if annotation in (str, Path):
        return annotation(str(matching(value, isinstance(value, str | Path) or (number and isinstance(value, int)))))
    return value
