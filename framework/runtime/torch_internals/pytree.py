"""Nested outputs of a model: tuples, lists and dicts of tensors.

Gain: torch's functions support classes that a library has registered, such as the outputs of
Hugging Face models. torch has no public module for them.
"""

from collections.abc import Callable
from typing import Any

try:
    from torch.utils import _pytree as torch_pytree
except ImportError:
    torch_pytree = None  # type: ignore[assignment]  # instead of the module


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Return a tree of the same structure with the results of `function` as leaves."""
    if torch_pytree is not None:
        return torch_pytree.tree_map(function, tree)
    return builtin_tree_map(function, tree)


def tree_leaves(tree: Any) -> list[Any]:
    """Return the leaves of a tree from left to right."""
    if torch_pytree is not None:
        leaves: list[Any] = torch_pytree.tree_leaves(tree)
        return leaves
    return builtin_tree_leaves(tree)


def builtin_tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Map tuples, named tuples, lists and dicts; anything else is a leaf."""
    if isinstance(tree, dict):
        mapped = {key: builtin_tree_map(function, value) for key, value in tree.items()}
        return mapped if type(tree) is dict else type(tree)(mapped)
    if isinstance(tree, tuple | list):
        items = [builtin_tree_map(function, value) for value in tree]
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
