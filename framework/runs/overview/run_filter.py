"""The expression of `--where`: optimizer=adamw and val/accuracy>0.9.

    expression  = term { "or" term }
    term        = factor { "and" factor }
    factor      = "not" factor | "(" expression ")" | comparison
    comparison  = column operator value
    operator    = "=" | "!=" | "<" | "<=" | ">" | ">=" | "~" (contains)

A column or value is a word or a text in quotes. Numbers are compared as numbers, everything else
as text; `null`, `true` and `false` are those of a config. In a word, `*` is any text: model=cnn*. A
list, such as that of the tags, equals each of its items. If a run has no value in a column, the
comparison is false, and != is true.
"""

import math
import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from framework.errors import SettingError

Predicate = Callable[[Callable[[str], Any]], bool]
"""Whether a run matches, from a function that returns its value in a column; None for no value."""
COMPARISONS = ("=", "==", "!=", "<", "<=", ">", ">=", "~")
TOKEN = re.compile(
    r"""\s*(?:(?P<operator>==|!=|<=|>=|[=<>~()])"""
    r"""|"(?P<double>(?:[^"\\]|\\.)*)"|'(?P<single>(?:[^'\\]|\\.)*)'"""
    r"""|(?P<word>[^\s=!<>~()"']+))"""
)
MOST_CHARACTERS = 10_000
END = "the end"
MOST_NESTED = 50  # parentheses and `not`


class Token(NamedTuple):
    """A word, a text in quotes or an operator.

    Attributes:
        position: of its first character in the expression, from 1.
    """

    kind: str
    text: str
    position: int


def parse_filter(
    text: str, resolve: Callable[[str, str], str], option: str = "--where"
) -> Predicate:
    """Return the predicate of an expression.

    Args:
        text: the expression.
        resolve: returns the full name of a column. Its second argument is the beginning of a
            message, with the position, for the error of an unknown column.
        option: the option that has the expression, for messages.

    Raises:
        SettingError: the expression is wrong; the message has the position.
    """
    return Parser(text, resolve, option).parse()


class Parser:
    """A recursive descent parser of expressions."""

    def __init__(self, text: str, resolve: Callable[[str, str], str], option: str):
        self.text = text
        self.option = option
        self.resolve = resolve
        self.nested = 0
        if len(text) > MOST_CHARACTERS:
            raise SettingError(f"{option}: expected at most {MOST_CHARACTERS:,} characters")
        self.tokens = self.split()
        self.next = 0

    def split(self) -> list[Token]:
        """Return the tokens of the expression, and one at its end."""
        tokens = []
        position = 0
        end = len(self.text.rstrip())
        while position < end:
            match = TOKEN.match(self.text, position)
            if match is None:
                blank = len(self.text[position:]) - len(self.text[position:].lstrip())
                position += blank
                character = self.text[position]
                missing = "a closing quote" if character in "\"'" else "a column, value or operator"
                raise self.error(position + 1, missing, character)
            kind = str(match.lastgroup)
            text = match[kind]
            start = match.start(kind) + 1
            if kind in ("double", "single"):
                start -= 1
                text = re.sub(r"\\(.)", r"\1", text)
                kind = "quoted"
            elif kind == "word" and text.lower() in ("and", "or", "not"):
                kind = text.lower()
            tokens.append(Token(kind, text, start))
            position = match.end()
        tokens.append(Token("end", END, len(self.text) + 1))
        return tokens

    def error(self, position: int, expected: str, found: str) -> SettingError:
        """Return the error of an expression that is wrong at a position."""
        got = found if found == END else repr(found)
        return SettingError(f"{self.place(position)}: expected {expected}, got {got}")

    def place(self, position: int) -> str:
        """Return the beginning of a message on a position."""
        return f"{self.option} {self.text!r}, position {position}"

    @property
    def token(self) -> Token:
        """The next token."""
        return self.tokens[self.next]

    def take(self) -> Token:
        """Return the next token and go on."""
        token = self.token
        self.next += 1
        return token

    def parse(self) -> Predicate:
        """Return the predicate of the complete expression."""
        predicate = self.expression()
        if self.token.kind != "end":
            raise self.error(self.token.position, "and, or", self.token.text)
        return predicate

    def expression(self) -> Predicate:
        """Parse terms with `or`."""
        terms = [self.term()]
        while self.token.kind == "or":
            self.take()
            terms.append(self.term())
        if len(terms) == 1:
            return terms[0]
        return lambda value: any(term(value) for term in terms)

    def term(self) -> Predicate:
        """Parse factors with `and`."""
        factors = [self.factor()]
        while self.token.kind == "and":
            self.take()
            factors.append(self.factor())
        if len(factors) == 1:
            return factors[0]
        return lambda value: all(factor(value) for factor in factors)

    def factor(self) -> Predicate:
        """Parse `not`, parentheses or a comparison."""
        opening = self.token
        if opening.kind != "not" and opening.text != "(":
            return self.comparison()
        self.take()
        self.nested += 1
        if self.nested > MOST_NESTED:
            raise self.error(opening.position, f"at most {MOST_NESTED} levels", opening.text)
        if opening.kind == "not":
            inner = self.factor()
            self.nested -= 1
            return lambda value: not inner(value)
        inner = self.expression()
        if self.token.text != ")" or self.token.kind != "operator":
            raise self.error(self.token.position, ")", self.token.text)
        self.take()
        self.nested -= 1
        return inner

    def comparison(self) -> Predicate:
        """Parse a column, an operator and a value."""
        column = self.take()
        if column.kind not in ("word", "quoted"):
            raise self.error(column.position, "a column", column.text)
        name = self.resolve(column.text, self.place(column.position))
        operator = self.take()
        if operator.kind != "operator" or operator.text not in COMPARISONS:
            expected = f"one of {' '.join(COMPARISONS)} after {column.text}"
            raise self.error(operator.position, expected, operator.text)
        operand = self.take()
        if operand.kind not in ("word", "quoted"):
            raise self.error(operand.position, "a value", operand.text)
        is_text = operand.kind == "quoted"
        test = comparison_of(operator.text, operand.text, is_text)
        return lambda value: test(value(name))


def comparison_of(operator: str, text: str, is_text: bool) -> Callable[[Any], bool]:
    """Return a function that compares a value of a run with a value of the expression.

    Args:
        operator: such as "<=".
        text: the value in the expression.
        is_text: it is in quotes, and so neither a number nor null.
    """
    number = None if is_text else parsed_number(text)
    pattern = None if is_text else text.replace("[", "[[]").replace("?", "[?]")

    def equal(value: Any) -> bool:
        if isinstance(value, list):
            return any(equal(item) for item in value)
        if number is not None and is_number(value):
            return bool(value == number)
        if pattern is not None and "*" in pattern:
            return fnmatchcase(plain_text(value), pattern)
        return not is_number(value) and plain_text(value) == text

    def contains(value: Any) -> bool:
        if isinstance(value, list):
            return any(contains(item) for item in value)
        return text.casefold() in plain_text(value).casefold()

    def ordered(value: Any) -> bool:
        if is_number(value):
            if number is None or math.isnan(value):
                return False
            return holds(operator, value, number)
        return isinstance(value, str) and holds(operator, value, text)

    if operator == "!=":
        return lambda value: value is None or not equal(value)
    tests = {"=": equal, "==": equal, "~": contains}
    test = tests.get(operator, ordered)
    return lambda value: value is not None and test(value)


def holds(operator: str, value: Any, other: Any) -> bool:
    """Return whether an order holds between two numbers or two texts."""
    if operator == "<":
        return bool(value < other)
    if operator == "<=":
        return bool(value <= other)
    if operator == ">":
        return bool(value > other)
    return bool(value >= other)


def parsed_number(text: str) -> float | None:
    """Return the number that a text is; None for any other text."""
    try:
        return float(text)
    except ValueError:
        return None


def is_number(value: Any) -> bool:
    """Return whether a value is a number, not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def plain_text(value: Any) -> str:
    """Return a value of a config as it is typed: true, false, text."""
    return str(value).lower() if isinstance(value, bool) else str(value)
