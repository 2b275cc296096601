"""Which combinations a sweep over a grid tries: all of them, some settings in pairs, those for which a rule holds.

sweep.zip=[optimizer.lr,loader.batch_size]     their values go in pairs: the first with the first ...
sweep.where=model=rnn -> norm=layer            a rule; of rnn only with layer (and, or, =, !=, <, <=, >, >=)
"""

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
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
TEST = re.compile(r"([\w.]+)\s*(!=|<=|>=|=|<|>)\s*(.+)")
FORM = "should be like model=rnn -> norm=layer, or like model!=rnn or norm=layer"
Axes = Mapping[str, Sequence[str]]
"""By key as typed: the overrides that give its values, one each."""


def combinations(axes: Axes, zipped: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Return every combination of overrides, the last key changing fastest. Raises ConfigError for a wrong `zip`."""
    problems = [problem for keys in zipped for problem in zip_faults(axes, keys)]
    twice = {key for key in axes if sum(keys.count(key) for keys in zipped) > 1}
    problems += [f"sweep.zip: {key} stands there twice" for key in twice]
    if problems:
        raise ConfigError(problems)
    joined: list[list[tuple[str, ...]]] = []
    for key in axes:
        group = next((keys for keys in zipped if key in keys), [key])
        if key == next(each for each in axes if each in group):  # its first stands for all
            members = [each for each in axes if each in group]
            joined.append(list(zip(*(axes[each] for each in members), strict=True)))
    return [
        tuple(text for chosen in combination for text in chosen) for combination in product(*joined)
    ]


def zip_faults(axes: Axes, keys: Sequence[str]) -> Iterable[str]:
    """Yield what is wrong with settings that are to go in pairs."""
    unknown = [key for key in keys if key not in axes]
    yield from (
        f"sweep.zip: {key} has no list of values here; {did_you_mean(key, axes)}" for key in unknown
    )
    lengths = {key: len(axes[key]) for key in keys if key in axes}
    if len(keys) < 2:
        yield f"sweep.zip: pairs need two settings, as in [optimizer.lr, seed]; there is: {', '.join(keys) or 'none'}"
    elif len(set(lengths.values())) > 1:
        counted = ", ".join(f"{key} {length}" for key, length in lengths.items())
        yield f"sweep.zip: as many values of each are needed; there are of {counted}"


@dataclass(frozen=True)
class Test:
    """One comparison of a setting with a value."""

    key: str
    compare: str
    value: Any

    def holds(self, settings: Mapping[str, Any]) -> bool:
        given, compare = settings[self.key], COMPARE[self.compare]
        numbers = [
            each
            for each in (given, self.value)
            if isinstance(each, int | float) and not isinstance(each, bool)
        ]
        if len(numbers) == 2:
            return compare(*numbers)
        return self.compare in ("=", "!=") and compare(given, self.value)


class Rule:
    """A condition on the settings of a trial: `A -> B`, where A and B are comparisons joined by `and` and `or`."""

    def __init__(self, text: str, known: Iterable[str]):
        """Read it. Raises ConfigError with what is wrong; `known`: the keys that it may speak of."""
        self.text, self.known = text, sorted(known)
        sides = re.split(r"\s*->\s*", text.strip())
        if len(sides) > 2:
            raise ConfigError([f"sweep.where={text}: {FORM}"])
        self.sides = [self._alternatives(side) for side in sides]

    def _alternatives(self, text: str) -> list[list[Test]]:
        return [
            [self._test(test) for test in re.split(r"\s+and\s+", each)]
            for each in re.split(r"\s+or\s+", text)
        ]

    def _test(self, text: str) -> Test:
        match = TEST.fullmatch(text.strip())
        if match is None:
            raise ConfigError(
                [f"sweep.where={self.text}: {text.strip()!r} cannot be read; it {FORM}"]
            )
        key, compare, value = match.groups()
        if key not in self.known:
            advice = did_you_mean(key, self.known)
            raise ConfigError(
                [f"sweep.where={self.text}: {key} is not given in this sweep; {advice}"]
            )
        return Test(key, compare, scalar(value))

    def holds(self, settings: Mapping[str, Any]) -> bool:
        *premise, conclusion = [
            any(all(t.holds(settings) for t in ts) for ts in side) for side in self.sides
        ]
        return conclusion or premise == [False]


def scalar(text: str) -> Any:
    """Return the number, truth value, null or text that a person wrote; 1e-3 is a number, as in an override."""
    try:
        number = float(text)
        return (
            int(number)
            if re.fullmatch(r"[+-]?\d+", text)
            else number
            if math.isfinite(number)
            else text
        )
    except ValueError:
        value = (
            yaml.safe_load(text) if re.fullmatch(r"null|true|false", text, re.IGNORECASE) else text
        )
        return value.strip("'\"") if isinstance(value, str) else value
