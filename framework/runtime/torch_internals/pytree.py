"""Nested batches and outputs: tuples, lists, dicts, dataclasses and other mappings of tensors.

Gain: torch's functions support classes that a library has registered, such as the outputs of
Hugging Face models. torch has no public module for them. Mappings that are not registered, such as
`BatchEncoding` of Hugging Face, and dataclasses are nested here too.
"""

from collections.abc import Callable, Mapping, MutableMapping
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

try:
    from torch.utils import _pytree as torch_pytree
except ImportError:
    torch_pytree = None  # type: ignore[assignment]  # instead of the module


def tree_map(
    function: Callable[[Any], Any],
    tree: Any,
    is_leaf: Callable[[Any], bool] | None = None,
) -> Any:
    """Return a tree of the same structure with the results of `function` as leaves.

    Args:
        function: of a leaf.
        tree: nested tuples, lists, mappings and dataclasses.
        is_leaf: which of them are leaves too; None for none.
    """

    def of_leaf(leaf: Any) -> Any:
        branches = named_branches(leaf)
        if branches is None or (is_leaf is not None and is_leaf(leaf)):
            return function(leaf)
        mapped = {name: tree_map(function, each, is_leaf) for name, each in branches.items()}
        return with_branches(leaf, mapped)

    if torch_pytree is not None:
        return torch_pytree.tree_map(of_leaf, tree, is_leaf=is_leaf)
    return builtin_tree_map(of_leaf, tree, is_leaf)


def tree_leaves(tree: Any) -> list[Any]:
    """Return the leaves of a tree from left to right."""
    leaves: list[Any] = []
    found = builtin_tree_leaves(tree) if torch_pytree is None else torch_pytree.tree_leaves(tree)
    for leaf in found:
        branches = named_branches(leaf)
        if branches is None:
            leaves.append(leaf)
            continue
        for branch in branches.values():
            leaves += tree_leaves(branch)
    return leaves


def named_branches(value: Any) -> dict[Any, Any] | None:
    """Return the items of a mapping or the fields of a dataclass; None for any other value."""
    if isinstance(value, Tensor):  # first, as this is compiled too
        return None
    if isinstance(value, Mapping):
        return dict(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return None


def with_branches(value: Any, branches: Mapping[Any, Any]) -> Any:
    """Return a copy of a mapping or dataclass with other items; no `__init__` is called.

    A mapping that cannot be changed becomes a dict.
    """
    if isinstance(value, Mapping) and not isinstance(value, MutableMapping):
        return dict(branches)
    result = copy(value)
    for name, branch in branches.items():
        if isinstance(value, Mapping):
            result[name] = branch
        else:
            object.__setattr__(result, name, branch)  # the class may be frozen
    return result


def builtin_tree_map(
    function: Callable[[Any], Any],
    tree: Any,
    is_leaf: Callable[[Any], bool] | None = None,
) -> Any:
    """Map tuples, named tuples, lists and dicts; anything else is a leaf."""
    if is_leaf is not None and is_leaf(tree):
        return function(tree)
    if isinstance(tree, dict):
        mapped = {key: builtin_tree_map(function, each, is_leaf) for key, each in tree.items()}
        return mapped if type(tree) is dict else type(tree)(mapped)
    if isinstance(tree, tuple | list):
        items = [builtin_tree_map(function, value, is_leaf) for value in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return function(tree)


def builtin_tree_leaves(tree: Any) -> list[Any]:
    """Return the leaves of tuples, named tuples, lists and dicts; anything else is a leaf."""
    if isinstance(tree, dict):
        branches = list(tree.values())
    elif isinstance(tree, tuple | list):
        branches = list(tree)
    else:
        return [tree]
    leaves: list[Any] = []
    for branch in branches:
        leaves += builtin_tree_leaves(branch)
    return leaves
