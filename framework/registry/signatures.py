"""Signatures and docstrings of classes and functions: parameters, arguments, descriptions."""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeGuard

from framework.errors import ContractError

Part = Callable[..., Any]
VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
ARGUMENT = re.compile(r"\s{1,8}\**(\w+)\s*(?:\([^)]*\))?\s*:(?:\s+(.*))?$")
SENTENCE_END = re.compile(r"(?<!e\.g|i\.e| al| cf| vs)\. (?=[^a-z0-9])")
MATH = {"leq": "≤", "le": "≤", "geq": "≥", "ge": "≥", "times": "×", "cdot": "·", "in": "in"}


def signature(part: Part) -> inspect.Signature:
    """Return the signature with its annotations evaluated.

    Annotations are texts under `from __future__ import annotations`.
    """
    try:
        return inspect.signature(part, eval_str=True)
    except (NameError, SyntaxError) as error:
        name = qualified_name(part)
        raise ContractError(f"the annotations of {name} cannot be read: {error}") from error
    except (ValueError, TypeError) as error:
        name = qualified_name(part)
        raise ContractError(f"{name} has no signature that Python can read: {error}") from error


def signature_parameters(part: Part) -> dict[str, inspect.Parameter]:
    """Return the named parameters of a part.

    For a class these include parameters that it forwards to its base class as **kwargs.
    """
    parameters = signature(part).parameters
    named = {name: each for name, each in parameters.items() if each.kind not in VARIABLE}
    if isinstance(part, type) and takes_kwargs(part):
        for name, parameter in forwarded_parameters(part.__mro__).items():
            named.setdefault(name, parameter)
    return named


def takes_kwargs(part: Part) -> bool:
    """Return whether a part has a parameter such as **kwargs."""
    parameters = signature(part).parameters.values()
    return any(each.kind is each.VAR_KEYWORD for each in parameters)


def forwarded_parameters(ancestors: Sequence[type]) -> dict[str, inspect.Parameter]:
    """Return the parameters that an `__init__` forwards to the next one as **kwargs.

    Args:
        ancestors: a class and its base classes, in the method resolution order.
    """
    owners = [each for each in ancestors if "__init__" in vars(each)]
    if len(owners) < 2 or owners[1] is object:
        return {}
    base = owners[1]
    fixed = super_init_arguments(vars(owners[0])["__init__"])
    if fixed is None:
        return {}
    fixed_count, fixed_names = fixed
    found: dict[str, inspect.Parameter] = {}
    forwards_kwargs = False
    after_self = list(signature(vars(base)["__init__"]).parameters.values())[1:]
    for position, parameter in enumerate(after_self):
        if parameter.kind is parameter.VAR_KEYWORD:
            forwards_kwargs = True
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            continue
        if position >= fixed_count and parameter.name not in fixed_names:
            found[parameter.name] = parameter.replace(kind=parameter.KEYWORD_ONLY)
    if forwards_kwargs:
        inherited = forwarded_parameters(ancestors[ancestors.index(base) :])
        for name, parameter in inherited.items():
            if name not in fixed_names:
                found.setdefault(name, parameter)
    return found


def super_init_arguments(init: Part) -> tuple[int, set[str]] | None:
    """Return the arguments that an `__init__` passes to `super().__init__` besides its **kwargs.

    Returns:
        The number of positional arguments and the names of the others; None if there is no such
        call or the source cannot be read.
    """
    try:
        function: Any = ast.parse(textwrap.dedent(inspect.getsource(init))).body[0]
        kwargs = function.args.kwarg
    except (OSError, TypeError, SyntaxError, AttributeError, IndexError):
        return None
    if kwargs is None:
        return None
    for node in ast.walk(function):
        if not is_super_init(node) or any(isinstance(each, ast.Starred) for each in node.args):
            continue
        names = set()
        passes_kwargs = False
        for keyword in node.keywords:
            if keyword.arg is not None:
                names.add(keyword.arg)
            elif isinstance(keyword.value, ast.Name) and keyword.value.id == kwargs.arg:
                passes_kwargs = True
        if passes_kwargs:
            return len(node.args), names
    return None


def is_super_init(node: ast.AST) -> TypeGuard[ast.Call]:
    """Return whether a node of a syntax tree is a call of `super().__init__`."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    owner = node.func.value
    if node.func.attr != "__init__" or not isinstance(owner, ast.Call):
        return False
    return isinstance(owner.func, ast.Name) and owner.func.id == "super"


def call_arguments(part: Part, arguments: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Return the positional and the named arguments for a call, from arguments by name."""
    named = dict(arguments)
    positional: list[Any] = []
    skipped: list[Any] = []  # defaults that are needed only if a later argument is given
    for parameter in signature(part).parameters.values():
        if parameter.kind is not parameter.POSITIONAL_ONLY:
            break
        if parameter.name in named:
            positional += [*skipped, named.pop(parameter.name)]
            skipped = []
        elif parameter.default is parameter.empty:
            break  # Python's own error names the missing argument
        else:
            skipped.append(parameter.default)
    return positional, named


def unwrapped(part: Any) -> Any:
    """Return the class or function in a `functools.partial`."""
    while isinstance(part, partial):
        part = part.func
    return part


def qualified_name(part: Any) -> str:
    """Return the name of a class or function for a message."""
    return getattr(unwrapped(part), "__qualname__", None) or repr(part)


def parameter_docs(part: Part) -> dict[str, str]:
    """Return the first sentence on each parameter in an `Args:` section (Google style, as torch's).

    For a class the sections of the class, of its `__init__`, and of the class that defines the
    inherited `__init__` count, in this order.
    """
    part = unwrapped(part)
    if not isinstance(part, type):
        return documented_arguments(inspect.getdoc(part) or "")
    owners = [ancestor for ancestor in part.__mro__ if "__init__" in vars(ancestor)]
    if not takes_kwargs(part):
        owners = owners[:1]
    docs = [part.__doc__]
    for owner in owners:
        docs += [vars(owner)["__init__"].__doc__, owner.__doc__]
    found: dict[str, str] = {}
    for doc in reversed(docs):
        found |= documented_arguments(inspect.cleandoc(doc or ""))
    return found


def documented_arguments(doc: str) -> dict[str, str]:
    """Return the first sentence of each entry in the `Args:` section of a docstring."""
    texts: dict[str, str] = {}
    name = ""
    entry_depth = 0
    for line in args_section(doc):
        depth = len(line) - len(line.lstrip())
        match = ARGUMENT.match(line)
        if match and (depth <= entry_depth or not entry_depth):
            name = match[1]
            entry_depth = depth
            texts[name] = match[2] or ""
        elif name and depth > entry_depth:
            texts[name] += " " + line.strip()
    return {name: first_sentence(text) for name, text in texts.items()}


def args_section(doc: str) -> Iterator[str]:
    """Yield the lines below `Args:`, up to the next line that is not indented."""
    inside = False
    for line in doc.split("\n"):
        if inside and line and not line[0].isspace():
            return
        if inside:
            yield line
        elif line.strip() in ("Args:", "Arguments:"):
            inside = True


def plain_math(text: str) -> str:
    """Return a formula of LaTeX, as in the docstrings of torch, as text."""
    text = re.sub(r"\\(?:text|mathrm|operatorname)\{([^}]*)\}", r"\1", text)
    for command, symbol in MATH.items():
        text = re.sub(rf"\\{command}\b", symbol, text)
    return text.replace("\\", "")


def first_sentence(text: str) -> str:
    """Return the first sentence of a paragraph, without reStructuredText marks and defaults."""
    sentence = SENTENCE_END.split(" ".join(text.split()))[0]
    sentence = re.sub(r"\s*\([Dd]efaults?\b[^)]*\)", "", sentence)
    sentence = re.sub(r":\w+:`([^`]*)`", lambda match: plain_math(match[1]), sentence)
    return sentence.replace("``", "`").strip().rstrip(".:")
