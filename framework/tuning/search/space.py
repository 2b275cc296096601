"""What a search chooses from: overrides with several values, as Optuna's distributions.

    optimizer.lr=tag(log, interval(1e-5, 1e-1))            a number between two, here evenly on a logarithmic scale
    model.width=range(32, 257, step=32)                    one of a series (Hydra leaves out the end)
    optimizer=sgd,adamw   trainer.precision=choice(a, b)   one of these
    model.width=tag(per model.depth, log, range(8, 129))   a list: as many numbers as model.depth says

A setting that only some of the parts to choose from have (momentum, of sgd and adamw) is asked for where it belongs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from framework.composition.hydra_groups import NONE
from framework.composition.hydra_internals import (
    ConfigLoader,
    IntervalSweep,
    Override,
    RangeSweep,
    parse_overrides,
)
from framework.composition.overrides import as_typed, expand_job
from framework.composition.sections import SECTIONS, section_settings
from framework.errors import ConfigError, did_you_mean
from framework.registry.registry import Registry
from framework.registry.schema import Setting, accepts

LOG, PER = "log", "per "
Choose = Callable[[str, BaseDistribution], Any]
"""Gives a value of a hyperparameter, by its name and distribution."""


@dataclass(frozen=True)
class Axis:
    """One hyperparameter: its key, what Hydra's override of it begins with, and what it may be."""

    key: str
    written: str
    distribution: BaseDistribution
    per: str | None = None  # the setting that says how many of them there are, in a list

    @property
    def options(self) -> list[str]:
        chosen = self.distribution
        return (
            [str(name) for name in chosen.choices]
            if isinstance(chosen, CategoricalDistribution)
            else []
        )


class Space:
    """The hyperparameters of a search, and the overrides that all its trials share.

    Raises ConfigError with what is wrong with them.
    """

    def __init__(self, arguments: Sequence[str], loader: ConfigLoader | None = None):
        """Read Hydra's overrides, of a key the last one."""
        parsed = parse_overrides(arguments, loader)
        by_key = {typed_key(override): override for override in parsed}
        self.problems: list[str] = []
        sweeps = {key for key, override in by_key.items() if override.is_sweep_override()}
        self.fixed = [
            str(each.input_line)
            for each in parsed
            if not each.is_sweep_override() and typed_key(each) not in sweeps
        ]
        axes = [self._axis(key, by_key[key]) for key in by_key if key in sweeps]
        self.given = {key: each.value() for key, each in by_key.items() if key not in sweeps}
        self.axes = sorted(
            [axis for axis in axes if axis],
            key=lambda axis: (axis.per is not None, key_depth(axis.key)),
        )
        for axis in self.axes:
            self._check_reach(axis)
        if "fold" in sweeps:
            self.problems.append(
                f"{as_typed(str(by_key['fold'].input_line))}: a search would choose the easiest fold: "
                "expected one fold, such as fold=1/5; for all folds of some settings, sweep without optuna"
            )
        if not axes:
            self.problems.append(
                "a search needs something to choose: optimizer.lr='tag(log, interval(1e-5, 1e-1))'"
            )
        if self.problems:
            raise ConfigError(self.problems)

    @property
    def texts(self) -> list[str]:
        """What is searched, in plain words: a search goes on with the same space."""
        return sorted(
            f"{axis.key}{f' per {axis.per}' if axis.per else ''}: {axis.distribution}"
            for axis in self.axes
        )

    def _axis(self, key: str, override: Override) -> Axis | None:
        value, written = override.value(), str(override.input_line).partition("=")[0]
        tags = {str(tag) for tag in getattr(value, "tags", ())}
        per = next((tag.removeprefix(PER).strip() for tag in tags if tag.startswith(PER)), None)
        try:
            for tag in tags:
                if tag != LOG and not tag.startswith(PER):
                    raise ValueError(f"the tag {tag!r} is none of: log, 'per SETTING'")
            return Axis(key, written, distribution_of(key, override, LOG in tags), per)
        except (ValueError, TypeError) as error:
            self.problems.append(
                f"{as_typed(str(override.input_line))}: {' '.join(str(error).split())}"
            )
            return None

    def _check_reach(self, axis: Axis) -> None:
        """Find what no choice of a part has, and a count that is nowhere."""
        owner = self._axis_of(parent(axis.key))
        last = axis.key.rpartition(".")[2]
        if owner is not None and not any(
            has_setting(owner.key, option, last) for option in owner.options
        ):
            self.problems.append(
                f"{axis.key}: none of {', '.join(owner.options)} has a setting {last!r}"
            )
        if axis.per is not None and axis.per not in self.given and self._axis_of(axis.per) is None:
            known = [each.key for each in self.axes if each.per is None]
            self.problems.append(
                f"{axis.key}: nothing says how many: per {axis.per}; {did_you_mean(axis.per, known)}"
            )

    def _axis_of(self, key: str) -> Axis | None:
        return next((axis for axis in self.axes if axis.key == key), None)

    def sample(self, choose: Choose) -> list[str]:
        """Return the overrides of one trial; only what its parts have is asked for."""
        chosen: dict[str, Any] = {}
        for axis in self.axes:
            owner = parent(axis.key)
            if self._axis_of(owner) is not None and not has_setting(
                owner, str(chosen.get(owner)), axis.key.rpartition(".")[2]
            ):
                continue
            if axis.per is None:
                chosen[axis.key] = choose(axis.key, axis.distribution)
            else:
                count: Any = chosen.get(axis.per, self.given.get(axis.per))
                chosen[axis.key] = [
                    choose(f"{axis.key}.{number}", axis.distribution)
                    for number in range(int(count))
                ]
        own: list[str] = []
        for axis in self.axes:
            if axis.key in chosen:
                own += expand_job(f"{axis.written}={value_text(chosen[axis.key], axis)}")
        return [*self.fixed, *own]


def typed_key(override: Override) -> str:
    """Return the key as a person types it: `optimizer`, `model.activation`."""
    return as_typed(f"{override.key_or_group}=_").partition("=")[0].replace("/", ".")


def parent(key: str) -> str:
    return key.rpartition(".")[0]


def key_depth(key: str) -> int:
    return key.count(".")


def distribution_of(key: str, override: Override, log: bool) -> BaseDistribution:
    """Return what an override with several values stands for. Raises ValueError for what cannot be."""
    value: Any = override.value()
    if isinstance(value, IntervalSweep):
        low, high = float(value.start or 0), float(value.end or 0)
        whole = isinstance(value.start, int) or takes_whole_numbers(key, low, high)
        return (
            IntDistribution(int(low), int(high), log=log)
            if whole
            else FloatDistribution(low, high, log=log)
        )
    if isinstance(value, RangeSweep):
        series, step = sorted(value.range()), abs(value.step)
        if log and step != 1:
            raise ValueError("log goes with a step of 1, or with interval(...)")
        if not series:
            raise ValueError("nothing is in this range")
        make: Any = IntDistribution if isinstance(series[0], int) else FloatDistribution
        return make(
            series[0], series[-1], log=log, step=None if log and make is FloatDistribution else step
        )
    if log:
        raise ValueError("log goes with interval(...) and range(...)")
    choices = list(override.sweep_string_iterator())
    twice = next((choice for choice in choices if choices.count(choice) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is there twice")
    return CategoricalDistribution(choices)


def takes_whole_numbers(key: str, low: float, high: float) -> bool:
    """Whether the setting takes whole numbers alone, whichever part it is of."""
    settings, between = list(settings_at(key)), math.floor(low) + 0.5
    return bool(settings) and not any(accepts(setting, between) for setting in settings)


def settings_at(key: str) -> list[Setting]:
    """Return the settings that a key may mean, of a section or of any part of the kind."""
    owner, last = parent(key), key.rpartition(".")[2]
    if owner in SECTIONS:
        return [setting for name, setting in section_settings(owner).items() if name == last]
    return [
        e.settings[last]
        for registry in registries_at(owner)
        for e in registry
        if last in e.settings
    ]


def registries_at(path: str) -> list[Registry]:
    """Return the kinds of the part at a path: `optimizer` is one, `model.activation` names an activation."""
    if path in Registry.by_key():
        return [Registry.by_key()[path]]
    if parent(path) in Registry.by_key() and Registry.by_key()[parent(path)].kind.many:
        return [Registry.by_key()[parent(path)]]
    last = path.rpartition(".")[2]
    settings = [
        e.settings[last]
        for registry in Registry.every.values()
        for e in registry
        if last in e.settings
    ]
    return [Registry.every[kind] for kind in dict.fromkeys(s.part for s in settings) if kind]


def has_setting(path: str, name: str, setting: str) -> bool:
    """Whether the part of that name, chosen at that path, has such a setting."""
    found = [
        registry.get(name) for registry in registries_at(path) if name != NONE and name in registry
    ]
    return any(setting in entry.settings for entry in found)


def value_text(value: Any, axis: Axis) -> str:
    """Write a value as an override does, a real number with the digits that matter."""
    if isinstance(value, list):
        return f"[{','.join(value_text(each, axis) for each in value)}]"
    drawn = axis.distribution
    if isinstance(value, float) and isinstance(drawn, FloatDistribution) and drawn.step is None:
        return repr(min(max(rounded(value, drawn), drawn.low), drawn.high))
    return str(value)


def rounded(value: float, drawn: FloatDistribution) -> float:
    """Round to a ten-thousandth of the interval, or of the value on a logarithmic scale."""
    size = abs(value) if drawn.log else drawn.high - drawn.low
    return value if size == 0 else round(value, 4 - math.floor(math.log10(size)))
