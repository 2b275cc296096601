"""Collect the messages of the framework and its plugins from the source.

    python tests/messages.py        write messages.txt beside this file

Each line of messages.txt has the class of an error, or the function that prints or returns the
text, and the wording with the inserted values in braces. A local variable that holds a part of the
text is replaced by its text; alternatives are written (one | other).
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SNAPSHOT = Path(__file__).with_name("messages.txt")
BUILT_IN_ERRORS = {
    "AttributeError",
    "NotImplementedError",
    "RuntimeError",
    "SystemExit",
    "TypeError",
    "ValueError",
}
PRINTED = {"warn", "note", "print_line", "print_message", "print_note"}
DEPTH = 4  # limit for variables that contain other variables


def source_files() -> list[Path]:
    files = []
    for folder in ("framework", "plugins"):
        files += sorted((ROOT / folder).rglob("*.py"))
    return [file for file in files if "template" not in file.parts]


def error_classes(trees: dict[Path, ast.Module]) -> set[str]:
    """Return the names of all classes of errors."""
    bases: dict[str, set[str]] = defaultdict(set)
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                bases[node.name].update(name_of(base) for base in node.bases)
    errors = BUILT_IN_ERRORS | {"Exception", "Warning", "UserWarning"}
    while True:
        found = {name for name, parents in bases.items() if parents & errors} - errors
        if not found:
            return errors
        errors |= found


def name_of(node: ast.expr) -> str:
    """Return the last name of `a.b.c`, or an empty text."""
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Name):
        return node.id
    return ""


class Function:
    """A function, with the expressions that are assigned to its local variables."""

    def __init__(self, node: ast.AST):
        self.node = node
        self.values: dict[str, list[ast.expr]] = defaultdict(list)
        for child in own_nodes(node):
            if isinstance(child, ast.Assign) and isinstance(child.targets[0], ast.Name):
                self.values[child.targets[0].id].append(child.value)
            elif isinstance(child, ast.AugAssign) and isinstance(child.target, ast.Name):
                self.values[child.target.id].append(child.value)

    def text(self, node: ast.expr, depth: int = 0) -> str | None:
        """Return the text of an expression, or None if the source does not show it."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join(self.part(part, depth) for part in node.values)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            if self.text(node.left, depth) is None and self.text(node.right, depth) is None:
                return None
            return self.inserted(node.left, depth) + self.inserted(node.right, depth)
        if isinstance(node, ast.IfExp):
            return self.alternatives([node.body, node.orelse], depth)
        if isinstance(node, ast.Name) and node.id in self.values and depth < DEPTH:
            return self.alternatives(self.values[node.id], depth + 1)
        return None

    def alternatives(self, nodes: list[ast.expr], depth: int) -> str | None:
        found = [self.text(node, depth) for node in nodes]
        if None in found:
            return None
        texts = list(dict.fromkeys(filter(None, found)))
        if not texts:
            return ""
        optional = "" in found
        if len(texts) == 1 and not optional:
            return texts[0]
        wording = " | ".join(texts)
        if optional:
            wording += " |"
        return f"({wording})"

    def part(self, node: ast.expr, depth: int) -> str:
        """Return the text of a part of an f-string."""
        if isinstance(node, ast.FormattedValue):
            return self.inserted(node.value, depth)
        return str(node.value) if isinstance(node, ast.Constant) else ""

    def inserted(self, node: ast.expr, depth: int) -> str:
        text = self.text(node, depth)
        return f"{{{ast.unparse(node)}}}" if text is None else text


def own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a function in order, without those of inner functions."""
    for child in ast.iter_child_nodes(function):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            continue
        yield child
        yield from own_nodes(child)


def messages_of(tree: ast.Module, errors: set[str]) -> list[str]:
    """Return "class: wording" for each message of a file, in the order of the source."""
    found = []
    functions: list[ast.AST] = [tree]
    functions += [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    for node in functions:
        function = Function(node)
        for child in own_nodes(node):
            if isinstance(child, ast.Call) and child.args:
                name = name_of(child.func)
                if name in errors or name in PRINTED:
                    found.append((child.lineno, name, function.text(child.args[0])))
            elif isinstance(child, ast.Return) and child.value is not None and returns_text(node):
                found.append((child.lineno, node.name, function.text(child.value)))
    lines = []
    for _, name, text in sorted(found, key=lambda message: message[0]):
        if text is not None and " " in text.strip():
            wording = text.strip().replace("\n", "\\n")
            lines.append(f"{name}: {wording}")
    return list(dict.fromkeys(lines))


def returns_text(node: ast.AST) -> bool:
    if not isinstance(node, ast.FunctionDef) or node.returns is None:
        return False
    return "str" in ast.unparse(node.returns).split(" | ")


def collected() -> str:
    """Return all messages, by file."""
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in source_files()}
    errors = error_classes(trees)
    sections = []
    for file, tree in trees.items():
        lines = messages_of(tree, errors)
        if lines:
            sections.append("\n".join([f"[{file.relative_to(ROOT).as_posix()}]", *lines]))
    return "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    SNAPSHOT.write_text(collected(), encoding="utf-8")
