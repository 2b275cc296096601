"""The combinations of a grid: all of them, some settings in pairs, those that satisfy rules.

sweep.zip=[optimizer.lr,loader.batch_size]     pairs their values: first with first, ...
sweep.where=model=rnn -> norm=layer            a rule: with model=rnn only norm=layer
                                               (also: and, or, !=, <, <=, >, >=)
"""

import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

import yaml

from framework.errors import ConfigError, did_you_mean

COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
COMPARISON = re.compile(r"([\w.]+)\s*(!=|<=|>=|=|<|>)\s*(.+)")
RULE_FORM = "a rule like model=rnn -> norm=layer, or like model!=rnn or norm=layer"
Axes = Mapping[str, Sequence[str]]
"""By key as typed: an override for each of its values."""


def combinations(axes: Axes, zipped: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Return all combinations of overrides, the last key changing fastest.

    Args:
        axes: the overrides with several values.
        zipped: groups of keys whose values are paired.

    Raises:
        ConfigError: `zipped` is invalid.
    """
    problems: list[str] = []
    for keys in zipped:
        problems += zip_problems(axes, keys)
    for key in axes:
        if sum(keys.count(key) for keys in zipped) > 1:
            problems.append(f"sweep.zip: {key} is listed twice")
    if problems:
        raise ConfigError(problems)
    joined: list[list[tuple[str, ...]]] = []
    seen: set[str] = set()
    for key in axes:
        if key in seen:
            continue
        group = next((keys for keys in zipped if key in keys), [key])
        members = [axes[each] for each in axes if each in group]
        joined.append(list(zip(*members, strict=True)))
        seen.update(group)
    return [tuple(chain(*combination)) for combination in product(*joined)]


def zip_problems(axes: Axes, keys: Sequence[str]) -> Iterator[str]:
    """Yield the problems of a group of settings that are paired."""
    for key in keys:
        if key not in axes:
            yield f"sweep.zip: {key} has no list of values; {did_you_mean(key, axes)}"
    lengths = {key: len(axes[key]) for key in keys if key in axes}
    if len(keys) < 2:
        listed = ", ".join(keys) or "none"
        yield f"sweep.zip: expected two settings, as in [optimizer.lr, seed], got {listed}"
    elif len(set(lengths.values())) > 1:
        counts = ", ".join(f"{key} {length}" for key, length in lengths.items())
        yield f"sweep.zip: expected equally many values of each, got {counts}"


def is_number(value: Any) -> bool:
    """Return whether a value is a number, not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Comparison:
    """One comparison of a setting with a value."""

    key: str
    operator: str
    value: Any

    def holds(self, settings: Mapping[str, Any]) -> bool:
        value = settings[self.key]
        compare = COMPARE[self.operator]
        if is_number(value) and is_number(self.value):
            return compare(value, self.value)
        return self.operator in ("=", "!=") and compare(value, self.value)


class Side:
    """One side of a rule: comparisons joined by `and`, and those joined by `or`."""

    def __init__(self, alternatives: Sequence[Sequence[Comparison]]):
        self.alternatives = alternatives

    def holds(self, settings: Mapping[str, Any]) -> bool:
        for comparisons in self.alternatives:
            if all(comparison.holds(settings) for comparison in comparisons):
                return True
        return False


class Rule:
    """A condition on the settings of a trial, `A -> B` or `B`.

    A and B are comparisons joined by `and` and `or`.
    """

    def __init__(self, text: str, known: Iterable[str]):
        """Parse a rule.

        Args:
            known: the keys that it may contain.

        Raises:
            ConfigError: the rule has another form or an unknown key.
        """
        self.text = text
        self.known = sorted(known)
        sides = re.split(r"\s*->\s*", text.strip())
        if len(sides) > 2:
            raise ConfigError([f"sweep.where={text}: expected {RULE_FORM}"])
        self.sides = [self._side(side) for side in sides]

    def _side(self, text: str) -> Side:
        alternatives = []
        for alternative in re.split(r"\s+or\s+", text):
            comparisons = re.split(r"\s+and\s+", alternative)
            alternatives.append([self._comparison(each) for each in comparisons])
        return Side(alternatives)

    def _comparison(self, text: str) -> Comparison:
        match = COMPARISON.fullmatch(text.strip())
        if match is None:
            raise ConfigError(
                [f"sweep.where={self.text}: expected {RULE_FORM}; cannot parse {text.strip()!r}"]
            )
        key, symbol, value = match.groups()
        if key not in self.known:
            problem = f"{key} is not set in this sweep; {did_you_mean(key, self.known)}"
            raise ConfigError([f"sweep.where={self.text}: {problem}"])
        return Comparison(key, symbol, parse_value(value))

    def holds(self, settings: Mapping[str, Any]) -> bool:
        *premise, conclusion = self.sides
        if premise and not premise[0].holds(settings):
            return True
        return conclusion.holds(settings)


def parse_value(text: str) -> Any:
    """Return the number, truth value, null or text; 1e-3 is a number, as in an override."""
    if re.fullmatch(r"null|true|false", text, re.IGNORECASE):
        return yaml.safe_load(text)
    try:
        if re.fullmatch(r"[+-]?\d+", text):
            return int(text)
        number = float(text)
    except ValueError:
        return text.strip("'\"")
    return number if math.isfinite(number) else text
