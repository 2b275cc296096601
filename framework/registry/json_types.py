"""The JSON schema of the values of a setting (https://json-schema.org, draft 2020-12).

It accepts what `conversion.py` converts: an int for a float or a text, a list for a tuple.
"""

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from enum import Enum, Flag
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from .annotations import (
    LISTS,
    Pattern,
    Range,
    expressible,
    is_enum,
    is_union,
    part_kind,
    strip,
    without_ellipsis,
)
from .conversion import Mismatch, converted
from .plain_values import NotPlain, plain_value
from .schema import Setting

JsonType = dict[str, Any]
NULL: JsonType = {"type": "null"}
SCALAR_TYPES: dict[Any, Any] = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: ["string", "integer"],
    Path: ["string", "integer"],
    None: "null",
    NoneType: "null",
    list: "array",
    tuple: "array",
    dict: "object",
}


def setting_type(setting: Setting) -> JsonType:
    """Return the JSON schema of the values of a setting, also of a default outside its range.

    A part is a reference such as {"$ref": "#/$defs/optimizer"}.
    """
    if setting.part is not None:
        return part_type(setting)
    schema = json_type(setting.annotation)
    if setting.required:
        return schema
    try:
        converted(setting.default, setting.annotation)
    except Mismatch:
        with suppress(NotPlain, ValueError):  # ValueError: NaN or infinity
            default = plain_value(setting.default)
            json.dumps(default, allow_nan=False)
            return any_of([schema, {"const": default}])
    return schema


def part_type(setting: Setting) -> JsonType:
    """Return the schema of a setting that names a part or a list of parts."""
    reference = {"$ref": f"#/$defs/{setting.part}"}
    named = reference | {"if": {"type": "object"}, "then": {"required": ["name"]}}
    schema: JsonType = {"type": "array", "items": named} if setting.many else reference
    allows_none = setting.default is None or "null" in setting.type_text
    return or_null(schema) if allows_none else schema


def json_type(annotation: Any) -> JsonType:
    """Return the JSON schema of the values of an annotated type."""
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin is Annotated:
        return marked_type(annotation)
    if is_union(annotation):
        return any_of(map(json_type, filter(expressible, arguments)))
    if origin is Literal:
        return literal_type(arguments)
    if is_enum(annotation):
        return enum_type(annotation)
    if origin is tuple and Ellipsis not in arguments:
        items = [json_type(each) for each in arguments]
        count = len(items)
        return {"type": "array", "prefixItems": items, "minItems": count, "maxItems": count}
    if origin in LISTS:
        return {"type": "array", "items": json_type(without_ellipsis(arguments)[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": json_type(arguments[1])}
    if annotation in SCALAR_TYPES:
        return {"type": SCALAR_TYPES[annotation]}
    return {}


def marked_type(annotation: Any) -> JsonType:
    """Return the schema of an `Annotated` type, within its ranges and patterns."""
    kind = part_kind(annotation)
    if kind is not None:
        return {"$ref": f"#/$defs/{kind}"}
    schema = json_type(strip(annotation))
    for mark in annotation.__metadata__:
        if isinstance(mark, Range):
            schema = schema | limits(mark)
        elif isinstance(mark, Pattern) and re.search(r"\(\?[^:=!]", mark.regex) is None:
            # Named groups and flags are written differently in Python and in JSON schema.
            schema = schema | {"pattern": f"^(?:{mark.regex})$"}
    return schema


def limits(mark: Range) -> JsonType:
    """Return the keywords of an interval: [0, 1) has minimum and exclusiveMaximum."""
    low, high = map(float, mark.interval[1:-1].split(","))
    found: JsonType = {}
    if low > float("-inf"):
        found["minimum" if mark.interval[0] == "[" else "exclusiveMinimum"] = as_json_number(low)
    if high < float("inf"):
        found["maximum" if mark.interval[-1] == "]" else "exclusiveMaximum"] = as_json_number(high)
    return found


def as_json_number(value: float) -> int | float:
    """Return a whole number as an int."""
    return int(value) if value.is_integer() else value


def literal_type(choices: Iterable[Any]) -> JsonType:
    """Return the schema of choices; 16 is also accepted for "16"."""
    values: list[Any] = []
    for choice in choices:
        values.append(choice.name if isinstance(choice, Enum) else choice)
        if isinstance(choice, str) and choice.isdecimal() and str(int(choice)) == choice:
            values.append(int(choice))
    return {"enum": values}


def enum_type(annotation: type[Enum]) -> JsonType:
    """Return the schema of the names of an enumeration; those of a flag may be joined by |."""
    if issubclass(annotation, Flag):
        names = "|".join(annotation.__members__)
        return {"type": "string", "pattern": rf"^({names})(\|({names}))*$"}
    return {"enum": list(annotation.__members__)}


def or_null(schema: JsonType) -> JsonType:
    """Return a schema that also accepts null; its errors are those of `schema`."""
    types = schema.get("type")
    if schema.keys() == {"enum"}:
        return {"enum": [*schema["enum"], None]}
    if types is None or "enum" in schema:
        return {"if": NULL, "else": schema}
    return schema | {"type": [*([types] if isinstance(types, str) else types), "null"]}


def any_of(schemas: Iterable[JsonType]) -> JsonType:
    """Return a schema that accepts what one of several accepts; {} accepts everything."""
    distinct: dict[str, JsonType] = {}
    for schema in schemas:
        for each in schema["anyOf"] if schema.keys() == {"anyOf"} else [schema]:
            distinct[json.dumps(each, sort_keys=True, default=str)] = each
    found = list(distinct.values())
    if {} in found:
        return {}
    if NULL in found and len(found) == 2:
        found.remove(NULL)
        return or_null(found[0])
    return found[0] if len(found) == 1 else {"anyOf": found}
