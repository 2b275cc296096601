"""Private names of torch and Hydra are used in one place for each library."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import dataloader

import framework
from shipped import shipped

ROOT = Path(framework.__file__).parent.parent
ALLOWED = {
    "torch": "framework/runtime/torch_internals/",
    "hydra": "framework/composition/hydra_internals.py",
    "omegaconf": "framework/composition/hydra_internals.py",
}
CLASSES = (
    nn.Module,
    torch.Tensor,
    torch.optim.Optimizer,
    torch.optim.SGD,
    LRScheduler,
    torch.amp.GradScaler,
    torch.autograd.Variable,
    dataloader.DataLoader,
    dataloader._BaseDataLoaderIter,
    dataloader._MultiProcessingDataLoaderIter,
)
# the name of a module as a text, such as a key of sys.modules
TEXT = re.compile(rf"({'|'.join(ALLOWED)})(\.\w+)+")
ATTRIBUTE_FUNCTIONS = ("getattr", "setattr", "hasattr", "delattr")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def members_of(cls: type) -> set[str]:
    """Return the private attributes of a class, and those that its methods use."""
    names = set(dir(cls))
    for method in vars(cls).values():
        names.update(getattr(getattr(method, "__code__", None), "co_names", ()))
    return set(filter(is_private, names))


def defined_in(tree: ast.AST) -> Iterator[str]:
    """Yield the names that a file defines itself; they are not torch's."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and on_self(node):
            yield node.attr


def on_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def imported_in(tree: ast.AST) -> dict[str, str]:
    """Return the imported objects of a file by their names in it: {"F": "torch.nn.functional"}."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                package = alias.name.partition(".")[0]
                names[alias.asname or alias.name] = alias.name
                if not alias.asname:
                    names[package] = package
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def path_of(node: ast.expr, imported: dict[str, str]) -> str:
    """Return the dotted path of an expression, or "" if its first name is not imported."""
    if isinstance(node, ast.Name):
        return imported.get(node.id, "")
    if isinstance(node, ast.Attribute):
        owner = path_of(node.value, imported)
        return owner and f"{owner}.{node.attr}"
    return ""


def private_names(tree: ast.AST, members: set[str]) -> Iterator[tuple[str, str]]:
    """Yield the library and the name for each use of a private name.

    Args:
        tree: The code.
        members: Private attributes of torch's objects; they are reported for any object.
    """
    imported = imported_in(tree)
    paths = list(imported.values())
    attributes = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            path = path_of(node, imported)
            paths.append(path)
            if not path:
                attributes.append(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if TEXT.fullmatch(node.value):
                paths.append(node.value)
            attributes.append(node.value)
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ATTRIBUTE_FUNCTIONS
        ):
            name = node.args[1]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                owner = path_of(node.args[0], imported)
                paths.append(owner and f"{owner}.{name.value}")
    for path in paths:
        library = path.partition(".")[0]
        if library in ALLOWED and any(map(is_private, path.split("."))):
            yield library, path
    for name in attributes:
        if name in members:
            yield "torch", f".{name}"


def read(file: Path) -> ast.AST:
    return ast.parse(file.read_text(encoding="utf-8"))


FILES = [*sorted((ROOT / "framework").rglob("*.py")), *shipped(ROOT / "plugins", "**/*.py")]


@pytest.fixture(scope="module")
def trees():
    return {str(file.relative_to(ROOT)): read(file) for file in FILES}


@pytest.fixture(scope="module")
def members(trees):
    own = set().union(*map(defined_in, trees.values()))
    return set().union(*map(members_of, CLASSES)) - own


def test_private_names_are_used_in_one_place_for_each_library(trees, members):
    forbidden = {}
    for file, tree in trees.items():
        used = private_names(tree, members)
        names = {name for library, name in used if not file.startswith(ALLOWED[library])}
        if names:
            forbidden[file] = sorted(names)
    places = " or ".join(sorted(set(ALLOWED.values())))
    assert forbidden == {}, f"use a function of {places}"


CODE = """
import torch, torch.nn.functional as F
from torch import optim
from torch.utils._pytree import tree_map
from torch.optim.optimizer import _global_optimizer_pre_hooks as hooks
from hydra import _internal
import torch._dynamo
torch._foreach_add_(a, b)
getattr(torch, "_fused_adam_")
F._Reduction
module._parameters["weight"]
getattr(module, "_buffers")
for name in ("_forward_hooks",): vars(module)[name]
iterator._workers
tensor._version
"torch._inductor" in sys.modules
"""
ALLOWED_CODE = """
import torch
class Part(torch.nn.Module):
    def _mine(self): return self._mine, torch.__version__, self._theirs
"torch is fine", "a._version of this"
"""


def test_the_search_finds_private_names(members):
    found = {name for _, name in private_names(ast.parse(CODE), members)}
    assert found == {
        "torch.utils._pytree.tree_map",
        "torch.optim.optimizer._global_optimizer_pre_hooks",
        "hydra._internal",
        "torch._dynamo",
        "torch._foreach_add_",
        "torch._fused_adam_",
        "torch.nn.functional._Reduction",
        "._parameters",
        "._buffers",
        "._forward_hooks",
        "._workers",
        "._version",
        "torch._inductor",
    }


def test_the_search_ignores_other_names(members):
    assert list(private_names(ast.parse(ALLOWED_CODE), members)) == []
