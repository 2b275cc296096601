"""The search space: overrides with several values as Optuna's distributions.

    optimizer.lr=tag(log, interval(1e-5, 1e-1))            a number of an interval, on a log scale
    model.width=range(32, 257, step=32)                    a number of a range without its end
    optimizer=sgd,adamw   trainer.precision=choice(a, b)   a choice
    model.width=tag(per model.depth, log, range(8, 129))   a list of model.depth numbers

A setting that only some of the choices of a part have (momentum, of sgd and adamw) is drawn for
those choices only.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.distributions import (
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
from framework.composition.override_syntax import dotted
from framework.composition.overrides import as_typed, expand_job
from framework.composition.sections import SECTIONS, section_settings
from framework.errors import ConfigError, did_you_mean
from framework.registry.registry import Registry
from framework.registry.schema import Setting, accepts

LOG = "log"
PER = "per "
Distribution = CategoricalDistribution | FloatDistribution | IntDistribution
Choose = Callable[[str, Distribution], Any]
"""Returns a value for the name and distribution of a hyperparameter."""


@dataclass(frozen=True)
class Axis:
    """One hyperparameter.

    Attributes:
        key: the key as typed.
        written: the key in Hydra's override.
        distribution: its possible values.
        per: for a list of values, the key of the setting with their number.
    """

    key: str
    written: str
    distribution: Distribution
    per: str | None = None

    @property
    def options(self) -> list[str]:
        if isinstance(self.distribution, CategoricalDistribution):
            return [str(name) for name in self.distribution.choices]
        return []


class Space:
    """The hyperparameters of a search, and the overrides that all its trials share.

    Attributes:
        axes: the hyperparameters, in the order in which they are drawn.
        fixed: the overrides that all trials share.
        fixed_values: the values of these overrides, by key.
    """

    def __init__(self, arguments: Sequence[str], loader: ConfigLoader | None = None):
        """Read Hydra's overrides; the last one of a key counts.

        Args:
            loader: matches glob(...) with the options of a group.

        Raises:
            ConfigError: with all problems.
        """
        parsed = parse_overrides(arguments, loader)
        by_key = {typed_key(override): override for override in parsed}
        self.problems: list[str] = []
        self.fixed: list[str] = []
        self.fixed_values: dict[str, Any] = {}
        self.axes: list[Axis] = []
        swept = {key: each for key, each in by_key.items() if each.is_sweep_override()}
        for override in parsed:
            if not override.is_sweep_override() and typed_key(override) not in swept:
                self.fixed.append(str(override.input_line))
        for key, override in by_key.items():
            if key in swept:
                self._add_axis(key, override)
            else:
                self.fixed_values[key] = override.value()
        self.axes.sort(key=lambda axis: (axis.per is not None, axis.key.count(".")))
        for axis in self.axes:
            self._check_owner(axis)
            self._check_count(axis)
        if "fold" in swept:
            text = as_typed(str(swept["fold"].input_line))
            self.problems.append(
                f"{text}: expected one fold, such as fold=1/5, since a search would select "
                "the fold with the best values; for several folds, sweep without optuna"
            )
        if not swept:
            self.problems.append(
                "a search needs a hyperparameter with several values, such as "
                "optimizer.lr='tag(log, interval(1e-5, 1e-1))'"
            )
        if self.problems:
            raise ConfigError(self.problems)

    @property
    def texts(self) -> list[str]:
        """A text for each axis, by which a resumed search recognizes its space."""
        texts = []
        for axis in self.axes:
            per = f" per {axis.per}" if axis.per else ""
            texts.append(f"{axis.key}{per}: {axis.distribution}")
        return sorted(texts)

    def _add_axis(self, key: str, override: Override) -> None:
        written = str(override.input_line).partition("=")[0]
        per = None
        log = False
        try:
            for tag in sorted(map(str, getattr(override.value(), "tags", ()))):
                if tag == LOG:
                    log = True
                elif tag.startswith(PER):
                    per = tag.removeprefix(PER).strip()
                else:
                    raise ValueError(f"unknown tag {tag!r}, available: log, 'per SETTING'")
            self.axes.append(Axis(key, written, read_distribution(key, override, log), per))
        except (ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            self.problems.append(f"{as_typed(str(override.input_line))}: {reason}")

    def _check_owner(self, axis: Axis) -> None:
        """Check that one of the choices of a part has the setting."""
        owner_key, _, setting = axis.key.rpartition(".")
        owner = self._find_axis(owner_key)
        if owner is None:
            return
        if not any(has_setting(owner.key, option, setting) for option in owner.options):
            self.problems.append(
                f"{axis.key}: none of {', '.join(owner.options)} has a setting {setting!r}"
            )

    def _check_count(self, axis: Axis) -> None:
        """Check that the number of values of a list is known."""
        if axis.per is None or axis.per in self.fixed_values or self._find_axis(axis.per):
            return
        advice = did_you_mean(axis.per, [each.key for each in self.axes if each.per is None])
        self.problems.append(f"{axis.key}: per {axis.per}: {axis.per} is not set; {advice}")

    def _find_axis(self, key: str) -> Axis | None:
        for axis in self.axes:
            if axis.key == key:
                return axis
        return None

    def sample(self, choose: Choose) -> list[str]:
        """Return the overrides of one trial; settings that its parts do not have are not drawn."""
        chosen: dict[str, Any] = {}
        for axis in self.axes:
            owner, _, setting = axis.key.rpartition(".")
            if self._find_axis(owner) and not has_setting(owner, str(chosen.get(owner)), setting):
                continue
            if axis.per is None:
                chosen[axis.key] = choose(axis.key, axis.distribution)
                continue
            count: Any = chosen.get(axis.per, self.fixed_values.get(axis.per))
            names = [f"{axis.key}.{number}" for number in range(int(count))]
            chosen[axis.key] = [choose(name, axis.distribution) for name in names]
        overrides = [*self.fixed]
        for axis in self.axes:
            if axis.key in chosen:
                overrides += expand_job(f"{axis.written}={override_value(chosen[axis.key], axis)}")
        return overrides


def typed_key(override: Override) -> str:
    """Return the key as typed by a user: `optimizer`, `model.activation`."""
    return dotted(as_typed(f"{override.key_or_group}=_").partition("=")[0])


def read_distribution(key: str, override: Override, log: bool) -> Distribution:
    """Return the distribution of an override with several values.

    Args:
        key: the key as typed.
        log: draw numbers on a logarithmic scale.

    Raises:
        ValueError: the values are not those of a distribution.
    """
    value: Any = override.value()
    if isinstance(value, IntervalSweep):
        low = float(value.start or 0)
        high = float(value.end or 0)
        if isinstance(value.start, int) or takes_only_integers(key, low):
            return IntDistribution(int(low), int(high), log=log)
        return FloatDistribution(low, high, log=log)
    if isinstance(value, RangeSweep):
        return range_distribution(sorted(value.range()), abs(value.step), log)
    if log:
        raise ValueError("the tag log needs interval(...) or range(...)")
    choices = list(override.sweep_string_iterator())
    for choice in choices:
        if choices.count(choice) > 1:
            raise ValueError(f"{choice} is listed twice")
    return CategoricalDistribution(choices)


def range_distribution(series: Sequence[Any], step: Any, log: bool) -> Distribution:
    """Return the distribution of a series of numbers in ascending order.

    Raises:
        ValueError: the series is empty, or not one that can be drawn on a logarithmic scale.
    """
    if log and step != 1:
        raise ValueError("the tag log needs a step of 1, or interval(...)")
    if not series:
        raise ValueError("the range is empty")
    low = series[0]
    high = series[-1]
    if isinstance(low, int):
        return IntDistribution(low, high, log=log, step=step)
    return FloatDistribution(low, high, log=log, step=None if log else step)


def takes_only_integers(key: str, low: float) -> bool:
    """Return whether a setting takes only integers, in every part that has it."""
    settings = find_settings(key)
    fraction = math.floor(low) + 0.5
    return bool(settings) and not any(accepts(setting, fraction) for setting in settings)


def find_settings(key: str) -> list[Setting]:
    """Return the settings that a key may refer to: one of a section, or those of all parts."""
    owner, _, name = key.rpartition(".")
    if owner in SECTIONS:
        settings = section_settings(owner)
        return [settings[name]] if name in settings else []
    return settings_named(name, find_registries(owner))


def settings_named(name: str, registries: Sequence[Registry]) -> list[Setting]:
    """Return the settings of that name of all parts."""
    found: list[Setting] = []
    for registry in registries:
        found += [entry.settings[name] for entry in registry if name in entry.settings]
    return found


def find_registries(path: str) -> list[Registry]:
    """Return the registries of the part at a path.

    `optimizer` is a registry itself; `model.activation` is a setting with the name of an
    activation.
    """
    by_key = Registry.by_key()
    if path in by_key:
        return [by_key[path]]
    owner, _, name = path.rpartition(".")
    if owner in by_key and by_key[owner].kind.many:
        return [by_key[owner]]
    found = {}
    for setting in settings_named(name, list(Registry.every.values())):
        if setting.part:
            found[setting.part] = Registry.every[setting.part]
    return list(found.values())


def has_setting(path: str, name: str, setting: str) -> bool:
    """Return whether the part of a name, chosen at a path, has a setting."""
    if name == NONE:
        return False
    for registry in find_registries(path):
        if name in registry and setting in registry.get(name).settings:
            return True
    return False


def override_value(value: Any, axis: Axis) -> str:
    """Return the text of a value in an override, a real number with its significant digits."""
    if isinstance(value, list):
        texts = [override_value(each, axis) for each in value]
        return f"[{','.join(texts)}]"
    distribution = axis.distribution
    if not isinstance(value, float) or not isinstance(distribution, FloatDistribution):
        return str(value)
    if distribution.step is not None:
        return str(value)
    return repr(min(max(rounded(value, distribution), distribution.low), distribution.high))


def rounded(value: float, distribution: FloatDistribution) -> float:
    """Round to a ten-thousandth of the interval, or of the value on a logarithmic scale."""
    size = abs(value) if distribution.log else distribution.high - distribution.low
    return value if size == 0 else round(value, 4 - math.floor(math.log10(size)))
