"""Conversion of a value from a config or a command line to the annotated type of a setting."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from enum import Enum, Flag
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from framework.errors import Facts, SettingError, nearest, short

from .annotations import (
    LISTS,
    Pattern,
    Range,
    describe_type,
    expressible,
    is_enum,
    is_union,
    members,
    part_kind,
    strip,
)


def convert(value: Any, annotation: Any) -> Any:
    """Return `value` as the annotated type: 3.0 as int 3, 1 as float 1.0, a list as tuple.

    Raises:
        SettingError: the value has another type: "expected float in (0, 1], got 'fast'".
    """
    try:
        return converted(value, annotation)
    except Mismatch:
        raise mismatch_error(value, annotation) from None


class Mismatch(Exception):
    """A value, or one of its items, does not have its type. The error names the outermost value."""


def mismatch_error(value: Any, annotation: Any) -> SettingError:
    """Return the error of a value that does not have the annotated type."""
    expected = describe_type(annotation)
    similar = similar_member(value, annotation)
    advice = "" if similar is None else f"; did you mean {similar!r}?"
    error = SettingError(f"expected {expected}, got {short(value)}{advice}")
    return error.with_facts(Facts(value=value, expected=expected, suggestion=similar))


def similar_member(value: Any, annotation: Any) -> str | None:
    """Return the member of an enumeration that is similar to a misspelt one, such as "SOFT"."""
    names: list[str] = []
    for each in members(annotation):
        if is_enum(each):
            names += each.__members__
    return nearest(value, names) if isinstance(value, str) else None


def converted(value: Any, annotation: Any) -> Any:
    """Return `value` as the annotated type.

    Raises:
        Mismatch: the value has another type.
    """
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if annotation is Any:
        return value
    if origin is Annotated:
        return convert_marked(value, annotation)
    if is_union(annotation):
        return convert_union(value, arguments)
    if origin is Literal:
        return convert_literal(value, arguments)
    if is_enum(annotation):
        return convert_enum(value, annotation)
    container = origin or annotation
    if container is dict:
        return convert_dict(value, arguments)
    if container in LISTS:
        return convert_list(value, container, arguments)
    return convert_scalar(value, annotation)


def convert_marked(value: Any, annotation: Any) -> Any:
    """Return `value` as an `Annotated` type, within its ranges and patterns."""
    if part_kind(annotation) is not None:
        return value  # the registry checks parts
    result = converted(value, strip(annotation))
    if result is None:
        return None
    for mark in annotation.__metadata__:
        if isinstance(mark, Range | Pattern) and result not in mark:
            raise Mismatch
    return result


def convert_union(value: Any, alternatives: Iterable[Any]) -> Any:
    """Return `value` as the first alternative that fits; its own type first, texts last."""

    def rank(alternative: Any) -> tuple[bool, bool]:
        bare = strip(alternative)
        return bare is not type(value), bare in (str, Path)

    for alternative in sorted(filter(expressible, alternatives), key=rank):
        with suppress(Mismatch):
            return converted(value, alternative)
    raise Mismatch


def convert_literal(value: Any, choices: Iterable[Any]) -> Any:
    """Return the choice that equals `value`, has it as its name, or is its text (16 for "16")."""
    for choice in choices:
        if value == choice and type(value) is type(choice):
            return choice
    for choice in choices:
        if isinstance(choice, Enum) and choice.name == value:
            return choice
    if type(value) is int and str(value) in choices:
        return str(value)
    raise Mismatch


def convert_enum(value: Any, annotation: type[Enum]) -> Any:
    """Return the member with the name `value`; several members of a flag as "READ|WRITE"."""
    if isinstance(value, annotation):
        return value
    if not isinstance(value, str):
        raise Mismatch
    names = value.split("|") if issubclass(annotation, Flag) else [value]
    result: Any = None
    for name in names:
        if name not in annotation.__members__:
            raise Mismatch
        member: Any = annotation[name]
        result = member if result is None else result | member
    return result


def convert_dict(value: Any, types: Sequence[Any]) -> dict[Any, Any]:
    """Return a mapping with its keys and items as their types; `types` is empty for a bare dict."""
    if not isinstance(value, Mapping):
        raise Mismatch
    key_type, item_type = types or (Any, Any)
    result = {}
    for key, item in value.items():
        converted_key = str(key) if key_type is str else converted(key, key_type)
        result[converted_key] = converted(item, item_type)
    return result


def convert_list(value: Any, container: Any, types: Sequence[Any]) -> Any:
    """Return a sequence with its items as their types, as a tuple if `container` is tuple."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise Mismatch
    if container is tuple and types and Ellipsis not in types:
        if len(value) != len(types):
            raise Mismatch
        return tuple(map(converted, value, types))
    item_type = types[0] if types else Any
    items = [converted(item, item_type) for item in value]
    return tuple(items) if container is tuple else items


def convert_scalar(value: Any, annotation: Any) -> Any:
    """Return `value` as a number, a truth value, a text, a path or None."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    is_number = is_int or isinstance(value, float)
    if annotation in (None, NoneType):
        fits = value is None
    elif annotation is bool:
        fits = isinstance(value, bool)
    elif annotation is int:
        fits = is_int or (is_number and value.is_integer())  # 1e3 is an int
    elif annotation is float:
        fits = is_number
    elif annotation in (str, Path):
        fits = is_int or isinstance(value, str | Path)
    else:
        return value
    if not fits:
        raise Mismatch
    if annotation in (str, Path):
        return annotation(str(value))
    if annotation not in (int, float):
        return value
    try:
        return annotation(value)
    except OverflowError:  # an int that is larger than any float
        raise Mismatch from None
