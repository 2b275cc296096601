"""Settings of a part, read from its signature: each has a name, a type, a default and a sentence.

    class Snake(nn.Module):
        '''x + sin(alpha x)^2 / alpha.

        Args:
            alpha: the frequency.
        '''

        def __init__(self, alpha: PositiveFloat = 1.0): ...

    read_settings(Snake)["alpha"].convert(2)  # 2.0; -1 is an error: expected float in (0, inf)

The signature is the only place of a type, a range or a default. `annotations.py` lists the types.
A default that a config cannot hold exactly (a function, a tensor, a dtype, a sentinel, ...) is
never written into one: the signature supplies it when the part is built.
"""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path, PurePath
from types import NoneType
from typing import Any, get_args, get_origin

from framework.errors import ContractError, SettingError

from .annotations import (
    SCALARS,
    PartOf,
    allows_tuples,
    describe_type,
    expressible,
    fully_expressible,
    is_untyped,
    marks,
    members,
    strip,
    without_marks,
)
from .conversion import Mismatch, convert, converted, mismatch_error
from .plain_values import (
    NotPlain,
    identical_values,
    is_builtin,
    is_default_factory,
    plain_value,
    readable,
    restore_tuples,
)
from .signatures import Part, parameter_docs, qualified_name, signature, signature_parameters

REQUIRED: Any = inspect.Parameter.empty  # the default of a setting without a default
Names = Iterable[str]
Types = Mapping[str, Any] | None  # annotations by parameter


@dataclass(frozen=True)
class Setting:
    """One setting of a part.

    Attributes:
        name: the parameter.
        annotation: its type; the type of the default for a parameter without annotation.
        default: as the signature has it; REQUIRED for none.
        doc: a sentence from the docstring.
        inherited: the parameter is one of a base class and reaches it through **kwargs.
    """

    name: str
    annotation: Any
    default: Any
    doc: str = ""
    inherited: bool = False

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    @property
    def type_text(self) -> str:
        """The type in words."""
        return describe_type(self.annotation)

    @property
    def part(self) -> str | None:
        """The kind of the part, or of the list of parts, that this setting names; else None."""
        for mark in marks(self.annotation):
            if isinstance(mark, PartOf):
                return mark.kind
        return None

    @property
    def many(self) -> bool:
        """Whether the setting is a list of parts."""
        origins = [get_origin(strip(each)) for each in members(self.annotation)]
        return self.part is not None and list in origins

    def convert(self, value: Any) -> Any:
        """Return `value` as the setting's type. The default is allowed also outside its range.

        Raises:
            SettingError: the value has another type or is out of range.
        """
        try:
            result = converted(value, self.annotation)
        except Mismatch:
            if self.is_default(value):
                return self.default
            raise mismatch_error(value, self.annotation) from None
        return self.with_tuples(result)

    def with_tuples(self, value: Any) -> Any:
        """Return a value in which lists are tuples where the default has tuples.

        A config has lists only. Types that the annotation states are kept.
        """
        replaces_tuple = isinstance(value, list) and isinstance(self.default, tuple)
        if replaces_tuple and allows_tuples(self.annotation):
            return restore_tuples(value, self.default)
        if self.required or not is_untyped(self.annotation):
            return value
        if replaces_tuple and self.annotation is not Any:  # the value stays a list
            return restore_tuples(value, list(self.default))
        return restore_tuples(value, self.default)

    def initial(self) -> Any:
        """Return the default as the annotated type: 0 as 0.0 for a float.

        Objects that are not of Python's plain types are returned unchanged.
        """
        if not is_builtin(self.default):
            return self.default
        result = self.convert(self.default)
        return self.default if became_text(self.default, result) else result

    def is_default(self, value: Any) -> bool:
        """Return whether a value equals the default, as in the signature or as in a config."""
        if self.required or not is_builtin(self.default):
            return False
        if identical_values(value, self.default):
            return True
        try:
            return identical_values(value, plain_value(self.default))
        except NotPlain:
            return False

    @cached_property
    def in_config(self) -> bool:
        """Whether a config holds the default; a base class supplies its defaults itself."""
        return self.is_typeable and not self.inherited

    @cached_property
    def is_typeable(self) -> bool:
        """Whether a config that holds the default gives the same value and type."""
        if self.required:
            return False
        try:
            default = self.initial()
            return identical_values(self.convert(plain_value(default)), default)
        except (NotPlain, SettingError):
            return False


def read_settings(
    part: Part, given: Names = (), hide: Names = (), types: Types = None, strict: bool = True
) -> dict[str, Setting]:
    """Return the settings of a part by name: the parameters that a config can set.

    Args:
        part: a class or function.
        given: parameters that the framework passes.
        hide: parameters that are not settings.
        types: annotations that replace those of a class of another library.
        strict: refuse a default that contradicts its annotation.

    Raises:
        ContractError: a required parameter has a type that no config can express, or a default
            contradicts its annotation.
    """
    types = types or {}
    parameters = signature_parameters(part)
    for name in types:
        if name not in parameters:
            raise ContractError(
                f"`types` names {name!r}; {qualified_name(part)} has no such parameter"
            )
    docs = parameter_docs(part)
    own_parameters = signature(part).parameters
    left_out = {*given, *hide}
    settings = {}
    for name, parameter in parameters.items():
        if name in left_out:
            continue
        annotation = types[name] if name in types else infer_annotation(parameter)
        inherited = name not in own_parameters
        setting = Setting(name, annotation, parameter.default, docs.get(name, ""), inherited)
        if not expressible(annotation):
            if setting.required:
                raise not_expressible(part, setting)
            continue
        if strict and not inherited and contradicts(setting):
            raise contradiction(part, setting)
        settings[name] = setting
    return settings


def infer_annotation(parameter: inspect.Parameter) -> Any:
    """Return the annotation; without one, as in much of torch, the type of the default."""
    annotation = parameter.annotation
    default = parameter.default
    if annotation is not parameter.empty:
        allows_none = annotation is Any or NoneType in get_args(strip(annotation))
        return annotation if default is not None or allows_none else annotation | None
    if isinstance(default, PurePath):
        return Path
    if type(default) in SCALARS or isinstance(default, Enum):
        return type(default)
    return Any


def contradicts(setting: Setting) -> bool:
    """Return whether the default has none of the annotated types. None is always allowed."""
    default = setting.default
    if setting.required or setting.part is not None or default is None:
        return False
    if is_default_factory(default) or not fully_expressible(setting.annotation):
        return False
    types = [strip(each) for each in members(setting.annotation)]
    is_numpy_scalar = type(default).__module__ == "numpy"
    if (is_numpy_scalar or isinstance(default, bool)) and (int in types or float in types):
        return False
    try:
        result = convert(default, without_marks(setting.annotation))
    except SettingError:
        return True
    return became_text(default, result)


def became_text(default: Any, result: Any) -> bool:
    """Return whether conversion made a text of another object, as of a number under `str`."""
    return isinstance(result, str | Path) and not isinstance(default, str | Path)


def not_expressible(part: Part, setting: Setting) -> ContractError:
    """Return the error of a required parameter whose type no config can express."""
    return ContractError(
        f"parameter {setting.name!r} of {qualified_name(part)} has type {setting.annotation!r}, "
        "which no config can express, and no default. "
        "Give it a default, or one of the types int, float, bool, str, list ..."
    )


def contradiction(part: Part, setting: Setting) -> ContractError:
    """Return the error of a default that does not have the annotated type."""
    return ContractError(
        f"parameter {setting.name!r} of {qualified_name(part)} has the default "
        f"{readable(setting.default)}, which is not {setting.type_text}: "
        "correct the default or the annotation"
    )


def check_arguments(part: Part, arguments: Mapping[str, Any]) -> None:
    """Raise SettingError for the first argument outside the type or range of its setting."""
    for name, setting in read_settings(part).items():
        try:
            setting.convert(arguments[name])
        except SettingError as error:
            raise SettingError(f"{name}: {error}") from None


def accepts(setting: Setting, value: Any) -> bool:
    """Return whether a value fits a setting."""
    try:
        setting.convert(value)
    except SettingError:
        return False
    return True


def names_parts(default: Any) -> bool:
    """Return whether the default of a part's setting is in the form of a config.

    These are names, mappings, lists of them, and None.
    """
    if isinstance(default, list | tuple):
        return all(map(names_parts, default))
    return default is None or isinstance(default, str | Mapping)
