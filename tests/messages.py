"""Collect the messages of the framework and its plugins from the source.

    python tests/messages.py        write messages.txt beside this file

Each line of messages.txt has a label and a wording. The label is the class of the error, the
function that prints the text, or else the function or constant that contains it. Inserted values
are in braces. A local variable that holds a part of the text is replaced by its text; alternatives
are written (one | other). Docstrings, patterns and texts of one or two words are left out.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
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
REPORTS = {
    "error",  # of a parser
    "note",
    "print",
    "print_line",
    "print_message",
    "print_note",
    "problem",  # of the reader of a config
    "say",
    "stop",  # of a trainer
    "warn",
    "warning",
}
PATTERNS = {"compile", "filterwarnings", "findall", "fullmatch", "match", "search", "sub"}
FEWEST_WORDS = 3  # of a text that is not known to be a message
WORD = re.compile(r"[A-Za-z][a-z]+")


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


class Scope:
    """A function, class or module, with the expressions that are assigned to its variables."""

    def __init__(self, node: ast.AST, label: str):
        self.node = node
        self.label = label
        self.is_function = isinstance(node, ast.FunctionDef)
        self.returns_text = False
        if isinstance(node, ast.FunctionDef) and node.returns is not None:
            self.returns_text = "str" in ast.unparse(node.returns).split(" | ")
        self.values: dict[str, list[ast.expr]] = defaultdict(list)
        self.inlined: set[str] = set()  # variables whose texts are parts of other texts
        self.open: set[str] = set()  # variables whose texts are being read
        self.find_values(node)

    def find_values(self, node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                continue
            target, value = assignment(child)
            if value is not None:
                self.values[target].append(value)
            self.find_values(child)

    def text(self, node: ast.expr) -> str | None:
        """Return the text of an expression, or None if the source does not show it."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join(self.part(part) for part in node.values)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            if self.text(node.left) is None and self.text(node.right) is None:
                return None
            return self.inserted(node.left) + self.inserted(node.right)
        if isinstance(node, ast.IfExp):
            return self.alternatives([node.body, node.orelse])
        if isinstance(node, ast.Name) and node.id in self.values and node.id not in self.open:
            self.open.add(node.id)
            text = self.alternatives(self.values[node.id])
            self.open.remove(node.id)
            if text is not None:
                self.inlined.add(node.id)
            return text
        return None

    def alternatives(self, nodes: list[ast.expr]) -> str | None:
        found = [self.text(node) for node in nodes]
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

    def part(self, node: ast.expr) -> str:
        """Return the text of a part of an f-string."""
        if isinstance(node, ast.FormattedValue):
            return self.inserted(node.value)
        return str(node.value) if isinstance(node, ast.Constant) else ""

    def inserted(self, node: ast.expr) -> str:
        text = self.text(node)
        return f"{{{ast.unparse(node)}}}" if text is None else text


def assignment(node: ast.AST) -> tuple[str, ast.expr | None]:
    """Return the name of the variable that a statement assigns to, and the value."""
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id, node.value
    changes = isinstance(node, ast.AugAssign | ast.AnnAssign | ast.NamedExpr)
    if changes and isinstance(node.target, ast.Name):
        return node.target.id, node.value
    return "", None


def children(node: ast.AST) -> Iterable[ast.AST]:
    """Return the child nodes, without docstrings, annotations and patterns."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return []
    if isinstance(node, ast.arg):
        return []
    if isinstance(node, ast.AnnAssign):
        return [node.value] if node.value is not None else []
    if isinstance(node, ast.Subscript):
        return [node.value]  # without a key, or the texts of a Literal
    if isinstance(node, ast.Call) and name_of(node.func) in PATTERNS:
        return []
    return ast.iter_child_nodes(node)


@dataclass(frozen=True)
class Message:
    line: int
    label: str
    text: str


class Collector:
    """Collects the messages of one file."""

    def __init__(self, errors: set[str]):
        self.reports = errors | REPORTS
        self.found: list[Message] = []

    def collect(self, scope: Scope) -> None:
        for child in ast.iter_child_nodes(scope.node):
            self.visit(child, scope, scope.label, is_message=False)
        for name, values in scope.values.items():
            if scope.is_function and name in scope.inlined:
                continue
            label = scope.label if scope.is_function else name
            for value in values:
                self.visit(value, scope, label, is_message=False)

    def visit(self, node: ast.AST, scope: Scope, label: str, *, is_message: bool) -> None:
        """Collect the texts of a node.

        Args:
            is_message: the text is reported or returned, so that a variable stands for its text.
        """
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            self.collect(Scope(node, node.name))
            return
        if assignment(node)[1] is not None:
            return  # `collect` visits the values of variables that are not inlined
        if isinstance(node, ast.expr) and (is_message or not isinstance(node, ast.Name)):
            text = scope.text(node)
            if text is not None:
                self.add(node.lineno, label, text, is_message)
                return
        if isinstance(node, ast.Call):
            name = name_of(node.func)
            is_message = name in self.reports
            label = name if is_message else label
        elif isinstance(node, ast.Return):
            is_message = scope.returns_text
        elif isinstance(node, ast.Yield):
            is_message = True
        for child in children(node):
            self.visit(child, scope, label, is_message=is_message)

    def add(self, line: int, label: str, text: str, is_message: bool) -> None:
        wording = text.strip().replace("\n", "\\n")
        words = WORD.findall(re.sub(r"\{[^{}]*\}", " {} ", wording))
        fewest = 1 if is_message else FEWEST_WORDS
        if len(words) < fewest or " " not in wording:
            return
        self.found.append(Message(line, label, wording))


def messages_of(tree: ast.Module, errors: set[str]) -> list[str]:
    """Return "label: wording" for each message of a file, in the order of the source."""
    collector = Collector(errors)
    collector.collect(Scope(tree, "module"))
    found = sorted(collector.found, key=lambda message: message.line)
    return list(dict.fromkeys(f"{message.label}: {message.text}" for message in found))


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
