"""A part's settings, read from its signature: the one place where a type, a range or a default is written.

Supported types: int, float, bool, str, Path, None, Any, Literal, enumerations, unions, list, tuple, dict[str, T],
dict[int, T], `Annotated` with a `Range`, and parts (`Activation`, `Norm`, ... in `kinds.py`), also in lists.

A default that a config cannot hold exactly (a function, a tensor, a dtype, a sentinel ...) is never written into one:
the signature supplies it when the part is built.
"""

import ast
import inspect
import operator
import re
import textwrap
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, Flag
from functools import cached_property, partial, reduce
from pathlib import Path, PurePath
from reprlib import Repr
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from framework.errors import ContractError, SettingError, nearest

REQUIRED: Any = inspect.Parameter.empty  # the default of a setting that has none
SCALARS = (bool, int, float, str, Path)
KEYS = (str, int, float, bool, Any)  # types of the keys of a dict that a config can hold
DEEPEST = 50  # levels of lists and dicts in a default
Names = Iterable[str]
Types = Mapping[str, Any] | None  # annotations by parameter


@dataclass(frozen=True)
class Range:
    """An interval in mathematical notation, as a mark of a number: `Annotated[float, Range("[0, 1)")]`."""

    interval: str

    def __post_init__(self):
        number = r"\s*[-+]?(inf|\d+(\.\d*)?(e[-+]?\d+)?)\s*"
        if re.fullmatch(rf"[\[(]{number},{number}[\])]", self.interval) is None:
            raise ContractError(
                f"{self.interval!r} is no interval; write it like [0, 1) or (0, inf)"
            )

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
    inherited: bool = False  # of a base class, reached through **kwargs

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    @cached_property
    def in_config(self) -> bool:
        """Whether a config holds the default. That of a base class is left to the class that calls it."""
        return self.is_typeable and not self.inherited

    @cached_property
    def is_typeable(self) -> bool:
        """Whether the default can be written, so that reading it back gives the same value of the same type."""
        if self.required:
            return False
        try:
            default = self.initial()
            return identical_values(self.convert(plain_value(default)), default)
        except (NotPlain, SettingError):
            return False

    def is_default(self, value: Any) -> bool:
        """Whether a value is the default itself, as the signature or as a config has it."""
        if self.required or not is_builtin(self.default):
            return False
        try:
            return identical_values(value, self.default) or identical_values(
                value, plain_value(self.default)
            )
        except NotPlain:
            return False

    def initial(self) -> Any:
        """Return the default as the annotated type: 0 as 0.0 for a float. Other objects are returned as they are."""
        if not is_builtin(self.default):
            return self.default
        converted = self.convert(self.default)
        return self.default if is_other_text(converted, self.default) else converted

    @property
    def part(self) -> str | None:
        """The kind of the part that this setting names, if it names one (or a list of them)."""
        return next(
            (mark.kind for mark in marks(self.annotation) if isinstance(mark, PartOf)), None
        )

    @property
    def many(self) -> bool:
        """Whether the setting is a list of parts."""
        return self.part is not None and any(
            get_origin(strip(each)) is list for each in members(self.annotation)
        )

    @property
    def type_text(self) -> str:
        return describe_type(self.annotation)

    def convert(self, value: Any) -> Any:
        """Return `value` as the setting's type; the default is always allowed, also outside of its range.

        Raises SettingError that says what was expected.
        """
        try:
            found = converted(value, self.annotation)
        except Mismatch:
            if not self.is_default(value):
                raise mismatch_error(value, self.annotation) from None
            return self.default
        if (
            isinstance(self.default, tuple)
            and isinstance(found, list)
            and allows_tuples(self.annotation)
        ):
            return restore_tuples(found, self.default)
        if self.required or not is_loose(self.annotation):
            return found
        if (
            self.annotation is not Any
            and isinstance(found, list)
            and isinstance(self.default, tuple)
        ):
            return restore_tuples(found, list(self.default))
        return restore_tuples(found, self.default)


def allows_tuples(annotation: Any) -> bool:
    """Whether a list and a tuple are both of an annotated type, as of Sequence."""
    return any(get_origin(strip(each)) in (Sequence, Iterable) for each in members(annotation))


def names_parts(default: Any) -> bool:
    """Whether the default of a part's setting is in names and mappings, as a config has them."""
    if isinstance(default, list | tuple):
        return all(names_parts(item) for item in default)
    return default is None or isinstance(default, str | Mapping)


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


def read_settings(
    part: Callable, given: Names = (), hide: Names = (), types: Types = None, strict: bool = True
) -> dict[str, Setting]:
    """Return the settings of a part by name: each parameter that is not given by the framework and can be configured.

    `types` replaces annotations (for classes that are not ours); `hide` leaves parameters out. `strict` refuses a
    default that contradicts its annotation.
    Raises ContractError when a required parameter has a type that no config can express.
    """
    left_out = {*given, *hide}
    documented = parameter_docs(part)
    own = signature(part).parameters
    parameters = parameters_of(part)
    for name in types or {}:
        if name not in parameters:
            raise ContractError(f"`types` names {name!r}; {name_of(part)} has no such parameter")
    found = {}
    for parameter in parameters.values():
        if parameter.name in left_out:
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
        inherited = parameter.name not in own
        setting = Setting(parameter.name, annotation, parameter.default, doc, inherited)
        if strict and not inherited and contradicts(setting):
            raise ContractError(
                f"parameter {parameter.name!r} of {name_of(part)} has the default {readable(parameter.default)}, "
                f"which is not {describe_type(annotation)}: correct the default or the annotation"
            )
        found[parameter.name] = setting
    return found


def contradicts(setting: Setting) -> bool:
    """Whether the default has none of the annotated types. None is allowed, and what a dataclass makes anew."""
    if setting.required or setting.part is not None or setting.default is None:
        return False
    if makes_anew(setting.default) or not fully_expressible(setting.annotation):
        return False
    of_numpy = (
        type(setting.default).__module__ == "numpy"
    )  # a scalar, which is a number like any other
    types = [strip(each) for each in members(setting.annotation)]
    if (of_numpy or isinstance(setting.default, bool)) and (int in types or float in types):
        return False
    try:
        converted = convert(setting.default, without_marks(setting.annotation))
    except SettingError:
        return True
    return is_other_text(converted, setting.default)


def is_other_text(converted: Any, default: Any) -> bool:
    """Whether a default that is no text became one, as a number under `str` does."""
    return isinstance(converted, str | Path) and not isinstance(default, str | Path)


def without_marks(annotation: Any) -> Any:
    """Return an annotation without its ranges and patterns."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return without_marks(strip(annotation))
    if origin is None or origin is Literal:
        return annotation
    arguments = [each if each is Ellipsis else without_marks(each) for each in get_args(annotation)]
    if origin in (Union, types.UnionType):
        return reduce(operator.or_, arguments)
    return origin[tuple(arguments)]


def makes_anew(default: Any) -> bool:
    """Whether a default stands for the `default_factory` of a dataclass field."""
    return type(default).__module__ == "dataclasses"


def fully_expressible(annotation: Any) -> bool:
    """Whether every alternative in an annotation is a type that a config can express."""
    if get_origin(annotation) is Literal:
        return expressible(annotation)
    if get_origin(annotation) is Annotated:
        return fully_expressible(strip(annotation))
    arguments = [each for each in get_args(annotation) if each is not Ellipsis]
    return expressible(annotation) and all(fully_expressible(each) for each in arguments)


def parameters_of(part: Callable) -> dict[str, inspect.Parameter]:
    """Return the named parameters of a part, and those that a class hands on to its base class as **kwargs."""
    own = signature(part).parameters
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {name: each for name, each in own.items() if each.kind not in variable}
    if isinstance(part, type) and takes_kwargs(part):
        for name, parameter in inherited_parameters(part.__mro__).items():
            named.setdefault(name, parameter)
    return named


def inherited_parameters(ancestors: Sequence[type]) -> dict[str, inspect.Parameter]:
    """Return the parameters that the first `__init__` of some classes hands on to the next one as **kwargs."""
    owners = [each for each in ancestors if "__init__" in vars(each)]
    if len(owners) < 2:
        return {}
    init, base = vars(owners[0])["__init__"], vars(owners[1])["__init__"]
    already = handed_on(init)
    if already is None or owners[1] is object:
        return {}
    count, names = already
    found: dict[str, inspect.Parameter] = {}
    takes_more = False
    after_self = list(signature(base).parameters.values())[1:]
    for position, parameter in enumerate(after_self):
        if parameter.kind is parameter.VAR_KEYWORD:
            takes_more = True
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            continue
        if position >= count and parameter.name not in names:
            found[parameter.name] = parameter.replace(kind=parameter.KEYWORD_ONLY)
    if takes_more:
        rest = inherited_parameters(ancestors[ancestors.index(owners[1]) :])
        for name in rest.keys() - names:
            found.setdefault(name, rest[name])
    return found


def handed_on(init: Callable) -> tuple[int, set[str]] | None:
    """Return how many arguments, and which by name, an `__init__` gives `super().__init__` beside its **kwargs.

    Return None when it has no such call, or when its source cannot be read.
    """
    try:
        function: Any = ast.parse(textwrap.dedent(inspect.getsource(init))).body[0]
        more = function.args.kwarg
    except (OSError, TypeError, SyntaxError, AttributeError, IndexError):
        return None
    if more is None:
        return None
    for node in ast.walk(function):
        if not is_super_init(node) or any(isinstance(each, ast.Starred) for each in node.args):
            continue
        unpacked = [each.value for each in node.keywords if each.arg is None]
        if any(isinstance(each, ast.Name) and each.id == more.arg for each in unpacked):
            return len(node.args), {each.arg for each in node.keywords if each.arg is not None}
    return None


def is_super_init(node: ast.AST) -> TypeGuard[ast.Call]:
    """Whether a node of a syntax tree is a call of `super().__init__`."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    owner = node.func.value
    of_super = (
        isinstance(owner, ast.Call)
        and isinstance(owner.func, ast.Name)
        and owner.func.id == "super"
    )
    return of_super and node.func.attr == "__init__"


def call_arguments(
    part: Callable, arguments: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Return arguments by name as those to give by position (where a signature wants that) and those by name."""
    named = dict(arguments)
    positional: list[Any] = []
    skipped: list[Any] = []  # defaults that count only when a later argument is given
    for parameter in signature(part).parameters.values():
        if parameter.kind is not parameter.POSITIONAL_ONLY:
            break
        if parameter.name in named:
            positional += [*skipped, named.pop(parameter.name)]
            skipped = []
        elif parameter.default is REQUIRED:
            break  # Python says what is missing
        else:
            skipped.append(parameter.default)
    return positional, named


def signature(part: Callable) -> inspect.Signature:
    """Return the signature with its annotations evaluated, also under `from __future__ import annotations`."""
    try:
        return inspect.signature(part, eval_str=True)
    except (NameError, SyntaxError) as error:
        raise ContractError(
            f"the annotations of {name_of(part)} cannot be read: {error}"
        ) from error
    except (ValueError, TypeError) as error:
        raise ContractError(
            f"{name_of(part)} has no signature that Python can read: {error}"
        ) from error


def unwrapped(part: Any) -> Any:
    """Return the class or function behind a `functools.partial`."""
    while isinstance(part, partial):
        part = part.func
    return part


def name_of(part: Any) -> str:
    return getattr(unwrapped(part), "__qualname__", None) or repr(part)


def infer(parameter: inspect.Parameter) -> Any:
    """The annotation, or for a bare parameter (as in much of torch) the type of its default."""
    if parameter.annotation is not parameter.empty:
        if parameter.default is None and type(None) not in get_args(strip(parameter.annotation)):
            return parameter.annotation | None if parameter.annotation is not Any else Any
        return parameter.annotation
    if isinstance(parameter.default, PurePath):
        return Path
    if type(parameter.default) in SCALARS or isinstance(parameter.default, Enum):
        return type(parameter.default)
    return Any


def parameter_docs(part: Callable) -> dict[str, str]:
    """Return the first sentence on each parameter in an `Args:` section (Google style, as torch's).

    Of a class, that of the class itself, of its `__init__`, and of the class that it inherits `__init__` from.
    """
    part = unwrapped(part)
    if not isinstance(part, type):
        return documented_args(inspect.getdoc(part) or "")
    owners = [ancestor for ancestor in part.__mro__ if "__init__" in vars(ancestor)]
    docs = [part.__doc__]
    for owner in owners if takes_kwargs(part) else owners[:1]:
        docs += [vars(owner)["__init__"].__doc__, owner.__doc__]
    found: dict[str, str] = {}
    for doc in reversed(docs):
        found |= documented_args(inspect.cleandoc(doc or ""))
    return found


def takes_kwargs(part: Callable) -> bool:
    return any(each.kind is each.VAR_KEYWORD for each in signature(part).parameters.values())


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
    if origin is dict:
        key, value = get_args(annotation)
        return (key in KEYS or is_enum(key)) and expressible(value)
    if origin in (list, tuple, Sequence, Iterable):
        return all(expressible(a) for a in get_args(annotation) if a is not Ellipsis)
    if origin is Literal:
        return all(
            isinstance(choice, bool | int | str | Enum | None) for choice in get_args(annotation)
        )
    return is_enum(annotation) or annotation in (*SCALARS, None, type(None), Any, list, tuple, dict)


def is_enum(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Enum)


def is_loose(annotation: Any) -> bool:
    """Whether an annotation leaves open what a value, or an item of it, is."""
    if annotation is Any or annotation in (list, tuple, dict):
        return True
    if get_origin(annotation) is Literal:
        return False
    return any(is_loose(each) for each in get_args(annotation))


def describe_type(annotation: Any) -> str:
    """Return a type in words: "float in (0, 1]", "one of mean, sum", "int or list of int"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        text = describe_type(arguments[0])
        for mark in annotation.__metadata__:
            if isinstance(mark, PartOf):
                return f"name of {'an' if mark.kind[0] in 'aeiou' else 'a'} {mark.kind}"
            text = (
                mark.form
                if isinstance(mark, Pattern)
                else f"{text} in {mark}"
                if isinstance(mark, Range)
                else text
            )
        return text
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe_type(a) for a in arguments if expressible(a)))
    if origin is Literal:
        names = [choice.name if isinstance(choice, Enum) else str(choice) for choice in arguments]
        return "one of " * (len(arguments) > 1) + ", ".join(map(str, names))
    if is_enum(annotation):
        return "one of " * (len(annotation) > 1) + ", ".join(annotation.__members__)
    if origin is tuple and Ellipsis not in arguments:
        return "[" + ", ".join(describe_type(a) for a in arguments) + "]"
    if origin in (list, tuple, Sequence, Iterable):
        return f"list of {describe_type(arguments[0])}"
    if origin is dict:
        keys = f"{describe_type(arguments[0])} to " if arguments[0] not in (str, Any) else ""
        return f"dict of {keys}{describe_type(arguments[1])}"
    if annotation in (None, type(None)):
        return "null"
    return (
        "path"
        if annotation is Path
        else getattr(annotation, "__name__", str(annotation)).replace("Any", "any")
    )


def convert(value: Any, annotation: Any) -> Any:
    """Return `value` as the annotated type: 3.0 as int 3, 1 as float 1.0, a list as tuple.

    Raises SettingError: "should be float in (0, 1], not 'fast'".
    """
    try:
        return converted(value, annotation)
    except Mismatch:
        raise mismatch_error(value, annotation) from None


def mismatch_error(value: Any, annotation: Any) -> SettingError:
    return SettingError(
        f"should be {describe_type(annotation)}, not {value!r}{close_member(value, annotation)}"
    )


def close_member(value: Any, annotation: Any) -> str:
    """Return "; did you mean 'SOFT'?" for a misspelt member of an enumeration."""
    names = [name for each in members(annotation) if is_enum(each) for name in each.__members__]
    close = nearest(value, names) if isinstance(value, str) else None
    return f"; did you mean {close!r}?" if close is not None else ""


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
        for mark in annotation.__metadata__:
            if isinstance(mark, Range | Pattern) and number is not None and number not in mark:
                raise Mismatch
        return number
    if origin in (Union, types.UnionType):
        return convert_union(value, arguments)
    if is_enum(annotation):
        return convert_enum(value, annotation)
    if origin is Literal:
        same = [choice for choice in arguments if value == choice and type(value) is type(choice)]
        same += [
            choice for choice in arguments if isinstance(choice, Enum) and choice.name == value
        ]
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
    exact = sorted(
        alternatives, key=lambda a: (strip(a) is not type(value), strip(a) in (str, Path))
    )  # 3 is no text
    for alternative in exact:
        with suppress(Mismatch):
            return converted(value, alternative)
    raise Mismatch


def convert_enum(value: Any, annotation: type[Enum]) -> Enum:
    """Return the member of that name; of flags also "READ|WRITE"."""
    if isinstance(value, annotation):
        return value
    names = value.split("|") if isinstance(value, str) and issubclass(annotation, Flag) else [value]
    matching(value, all(isinstance(name, str) and name in annotation.__members__ for name in names))
    found: Any = annotation[names[0]]
    for name in names[1:]:
        found |= annotation[name]
    return found


def convert_container(value: Any, kind: Any, inner: Sequence[Any]) -> Any:
    if kind is dict:
        matching(value, isinstance(value, Mapping))
        key_type, item_type = inner or (Any, Any)
        return {
            convert_key(key, key_type): converted(item, item_type) for key, item in value.items()
        }
    matching(value, isinstance(value, Sequence) and not isinstance(value, str))
    if kind is tuple and inner and Ellipsis not in inner:
        matching(value, len(value) == len(inner))
        return tuple(converted(item, each) for item, each in zip(value, inner, strict=True))
    items = [converted(item, inner[0] if inner else Any) for item in value]
    return tuple(items) if kind is tuple else items


def convert_key(key: Any, annotation: Any) -> Any:
    return str(key) if annotation is str else converted(key, annotation)


def convert_scalar(value: Any, annotation: Any) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is None or annotation is type(None):
        fits = value is None
    elif annotation is bool:
        fits = isinstance(value, bool)
    elif annotation is int:  # 1e3 is an int, in words
        fits = is_number and (isinstance(value, int) or value.is_integer())
    elif annotation is float:
        fits = is_number
    elif annotation in (str, Path):
        fits = isinstance(value, str | Path) or (is_number and isinstance(value, int))
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


class NotPlain(Exception):
    """A value, or something in it, is none that a config can hold."""


def plain_value(value: Any, depth: int = 0) -> Any:
    """Return a value as a config holds it: a tuple as list, a path as text, a member of an enumeration by its name.

    Raises NotPlain for any other object.
    """
    if depth > DEEPEST:
        raise NotPlain
    if isinstance(value, Enum):
        return plain_value(value.name, depth)
    if isinstance(value, PurePath):
        return str(value)
    if type(value) is str:
        try:
            value.encode()
        except UnicodeEncodeError:  # half of a surrogate pair
            raise NotPlain from None
        return value
    if value is None or type(value) in (bool, int, float):
        return value
    if type(value) in (list, tuple):
        return [plain_value(item, depth + 1) for item in value]
    if type(value) is dict:
        return {plain_key(key): plain_value(item, depth + 1) for key, item in value.items()}
    raise NotPlain


def plain_key(key: Any) -> Any:
    if isinstance(key, Enum):
        return plain_key(key.name)
    if type(key) not in (str, int, float, bool):
        raise NotPlain
    return key


def is_builtin(value: Any, depth: int = 0) -> bool:
    """Whether a value consists of Python's own plain types alone, none of them subclassed."""
    if depth > DEEPEST:
        return False
    if type(value) in (list, tuple):
        return all(is_builtin(item, depth + 1) for item in value)
    if type(value) is dict:
        return all(is_builtin(item, depth + 1) for item in [*value.keys(), *value.values()])
    return value is None or type(value) in (bool, int, float, str)


def identical_values(one: Any, other: Any) -> bool:
    """Whether two plain values are equal in all their types, NaN and the signs of zeros included."""
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(
            identical_values(a, b) for a, b in zip(one, other, strict=True)
        )
    if isinstance(one, dict):
        pairs = zip(one.items(), other.items(), strict=False)
        return len(one) == len(other) and all(identical_values(a, b) for a, b in pairs)
    if isinstance(one, float):
        return repr(one) == repr(other)
    return bool(one == other)


def restore_tuples(value: Any, like: Any) -> Any:
    """Return a value in which what is a tuple in `like`, and a list in a config, is a tuple."""
    if isinstance(value, dict) and type(like) is dict:
        return {key: restore_tuples(item, like.get(key)) for key, item in value.items()}
    if not isinstance(value, list | tuple) or type(like) not in (list, tuple):
        return value
    last = like[-1] if like else None
    items = [
        restore_tuples(item, like[n] if n < len(like) else last) for n, item in enumerate(value)
    ]
    return tuple(items) if isinstance(value, tuple) or type(like) is tuple else items


READABLE = Repr()  # of an object, a few items and characters
READABLE.maxlevel, READABLE.maxstring, READABLE.maxother = 2, 40, 60


def readable(default: Any) -> str:
    """Return a default for people: a function by its name, an object as it shows itself, without an address."""
    if makes_anew(default):
        return "made anew"
    if isinstance(default, Enum):
        return str(default)
    name = getattr(default, "__name__", None)
    if callable(default) and isinstance(name, str):
        module = getattr(default, "__module__", None)
        return f"{module}.{name}" if module and module != "builtins" else name
    try:
        text = " ".join(READABLE.repr(default).split())
    except Exception:  # its own __repr__ may fail
        text = "<"
    return type(default).__name__ if text.startswith("<") or " at 0x" in text else text


def means_default(value: Any, setting: Setting) -> bool:
    """Whether a value in a config stands for a default that the config itself cannot hold.

    setting: one whose default is not typeable.
    """
    if setting.required:
        return False
    if makes_anew(setting.default):
        return value == str(setting.default) and not accepts(
            setting, value
        )  # of an earlier version
    try:
        return identical_values(value, plain_value(setting.default))
    except NotPlain:
        return False


def accepts(setting: Setting, value: Any) -> bool:
    """Whether a value fits a setting."""
    try:
        setting.convert(value)
    except SettingError:
        return False
    return True


def is_old_text(value: Any, setting: Setting) -> bool:
    """Whether a text, or a list or dict, is what an earlier version wrote for a default that a config cannot hold.

    It does not tell whether the run was trained with the default or with that text.
    """
    if setting.required:
        return False
    try:
        written = old_text(setting.default)
        if identical_values(written, plain_value(setting.default)):
            return False
    except NotPlain:
        pass
    except Exception:  # a __str__ that fails
        return False
    return without_address(repr(value)) == without_address(repr(written))


def old_text(default: Any) -> Any:
    """Return what earlier versions wrote into a config for any default."""
    if isinstance(default, list | tuple):
        return [old_text(item) for item in default]
    if isinstance(default, Mapping):
        return {str(key): old_text(item) for key, item in default.items()}
    return default if isinstance(default, int | float | str | None) else str(default)


def without_address(text: str) -> str:
    return re.sub(r"0x[0-9a-f]+", "0x", text)
