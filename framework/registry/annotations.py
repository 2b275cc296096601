"""Annotations of settings: marks for ranges, patterns and parts, and the types a config can hold.

    PositiveInt = Annotated[int, Range("[1, inf)")]

A config can hold int, float, bool, str, Path, None, Any, Literal, enumerations, unions, list,
tuple, dict[str, T], dict[int, T], and parts (`Activation`, `Norm`, ... in `kinds.py`), also in
lists.
"""

import operator
import re
import types
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import reduce
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from framework.errors import ContractError, with_article

SCALARS = (bool, int, float, str, Path)
KEYS = (str, int, float, bool, Any)  # types of the keys of a dict that a config can hold
BARE_TYPES = (*SCALARS, None, NoneType, Any, list, tuple, dict)
LISTS = (list, tuple, Sequence, Iterable)  # types that a config writes as a list
NUMBER = r"\s*[-+]?(inf|\d+(\.\d*)?(e[-+]?\d+)?)\s*"
INTERVAL = re.compile(rf"[\[(]{NUMBER},{NUMBER}[\])]")


@dataclass(frozen=True)
class Range:
    """An interval in mathematical notation: `Annotated[float, Range("[0, 1)")]`."""

    interval: str

    def __post_init__(self) -> None:
        if INTERVAL.fullmatch(self.interval) is None:
            raise ContractError(
                f"{self.interval!r} is not an interval: expected one like [0, 1) or (0, inf)"
            )

    def __contains__(self, number: float) -> bool:
        low, high = map(float, self.interval[1:-1].split(","))
        above = number >= low if self.interval[0] == "[" else number > low
        below = number <= high if self.interval[-1] == "]" else number < high
        return above and below

    def __str__(self) -> str:
        return self.interval


@dataclass(frozen=True)
class Pattern:
    """A regular expression for a text: `Annotated[str, Pattern("[a-z]+", "lower-case letters")]`.

    Args:
        regex: the expression that the whole text must match.
        form: a description of correct texts, for messages.
    """

    regex: str
    form: str

    def __contains__(self, text: str) -> bool:
        return re.fullmatch(self.regex, text) is not None


@dataclass(frozen=True)
class PartOf:
    """Marks a parameter that receives a `Maker` of parts of one kind."""

    kind: str


PositiveInt = Annotated[int, Range("[1, inf)")]
NonNegativeInt = Annotated[int, Range("[0, inf)")]
PositiveFloat = Annotated[float, Range("(0, inf)")]
NonNegativeFloat = Annotated[float, Range("[0, inf)")]
Fraction = Annotated[float, Range("[0, 1]")]
Rate = Annotated[float, Range("[0, 1)")]


def describe_type(annotation: Any) -> str:
    """Return a type in words: "float in (0, 1]", "one of mean, sum", "int or list of int"."""
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin is Annotated:
        return describe_marked(annotation)
    if is_union(annotation):
        alternatives = map(describe_type, filter(expressible, arguments))
        return " or ".join(dict.fromkeys(alternatives))
    if origin is Literal:
        return one_of([each.name if isinstance(each, Enum) else str(each) for each in arguments])
    if is_enum(annotation):
        return one_of(annotation.__members__)
    if origin is tuple and Ellipsis not in arguments:
        return f"[{', '.join(map(describe_type, arguments))}]"
    if origin in LISTS:
        return f"list of {describe_type(arguments[0])}"
    if origin is dict:
        key, item = arguments
        keys = "" if key in (str, Any) else f"{describe_type(key)} to "
        return f"dict of {keys}{describe_type(item)}"
    if annotation in (None, NoneType):
        return "null"
    if annotation is Any:
        return "any"
    if annotation is Path:
        return "path"
    return getattr(annotation, "__name__", str(annotation))


def describe_marked(annotation: Any) -> str:
    """Return an `Annotated` type in words."""
    kind = part_kind(annotation)
    if kind is not None:
        return f"name of {with_article(kind)}"
    text = describe_type(strip(annotation))
    for mark in annotation.__metadata__:
        if isinstance(mark, Pattern):
            text = mark.form
        elif isinstance(mark, Range):
            text = f"{text} in {mark}"
    return text


def one_of(names: Collection[str]) -> str:
    """Return the names of choices; a single one as it is."""
    text = ", ".join(names)
    return f"one of {text}" if len(names) > 1 else text


def expressible(annotation: Any) -> bool:
    """Return whether a config can hold a value of this type; of a union, one alternative."""
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin is Annotated:
        return part_kind(annotation) is not None or expressible(strip(annotation))
    if is_union(annotation):  # float | Tensor: a config can hold the float
        return any(expressible(each) for each in arguments if each is not NoneType)
    if origin is Literal:
        return all(isinstance(choice, bool | int | str | Enum | None) for choice in arguments)
    if origin is dict:
        key, item = arguments
        return (key in KEYS or is_enum(key)) and expressible(item)
    if origin in LISTS:
        return all(map(expressible, without_ellipsis(arguments)))
    return is_enum(annotation) or annotation in BARE_TYPES


def fully_expressible(annotation: Any) -> bool:
    """Return whether a config can hold values of every alternative in an annotation."""
    if get_origin(annotation) is Literal:
        return expressible(annotation)
    if get_origin(annotation) is Annotated:
        return fully_expressible(strip(annotation))
    arguments = without_ellipsis(get_args(annotation))
    return expressible(annotation) and all(map(fully_expressible, arguments))


def strip(annotation: Any) -> Any:
    """Return the type in an `Annotated`; other annotations are returned as they are."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def members(annotation: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union; other annotations are the only alternative."""
    return get_args(strip(annotation)) if is_union(annotation) else (annotation,)


def marks(annotation: Any) -> list[Any]:
    """Return every mark (`Range`, `Pattern`, `PartOf`) in an annotation, at any depth."""
    arguments = get_args(annotation)
    found: list[Any] = []
    if get_origin(annotation) is Literal:
        return found
    if get_origin(annotation) is Annotated:
        found += annotation.__metadata__
        arguments = arguments[:1]
    for argument in arguments:
        found += marks(argument)
    return found


def part_kind(annotation: Any) -> str | None:
    """Return the kind of parts that an annotation marks; its union members are not searched."""
    for mark in getattr(annotation, "__metadata__", ()):
        if isinstance(mark, PartOf):
            return mark.kind
    return None


def without_marks(annotation: Any) -> Any:
    """Return an annotation without its ranges and patterns, at any depth."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return without_marks(strip(annotation))
    if origin is None or origin is Literal:  # None also for the ... of tuple[int, ...]
        return annotation
    arguments = [without_marks(each) for each in get_args(annotation)]
    if is_union(annotation):
        return reduce(operator.or_, arguments)
    return origin[tuple(arguments)]


def without_ellipsis(arguments: Iterable[Any]) -> list[Any]:
    """Return the arguments of a type such as `tuple[int, ...]` without the `...`."""
    return [each for each in arguments if each is not Ellipsis]


def is_union(annotation: Any) -> bool:
    """Return whether an annotation, without its marks, is a union."""
    return get_origin(strip(annotation)) in (Union, types.UnionType)


def is_enum(annotation: Any) -> bool:
    """Return whether an annotation is an enumeration."""
    return isinstance(annotation, type) and issubclass(annotation, Enum)


def is_untyped(annotation: Any) -> bool:
    """Return whether an annotation leaves the type of a value, or of its items, open."""
    if annotation is Any or annotation in (list, tuple, dict):
        return True
    if get_origin(annotation) is Literal:
        return False
    return any(map(is_untyped, get_args(annotation)))


def allows_tuples(annotation: Any) -> bool:
    """Return whether a list and a tuple both have the annotated type, such as `Sequence[int]`."""
    origins = [get_origin(strip(each)) for each in members(annotation)]
    return Sequence in origins or Iterable in origins
