"""The section `sweep` of an experiment; its signature is its schema. A single run ignores it."""

from collections.abc import Sequence
from typing import Literal

ObjectiveMode = Literal["auto", "min", "max"]


class Sweep:
    """The name of a sweep, the objective of its trials, and the combinations that it leaves out.

    Args:
        name: name of the sweep's folder; null: the date and time.
        metric: metric to compare trials by; a list for a search with several objectives.
        mode: min or max; auto: the better direction of the metric; a list if `metric` is one.
        zip: settings whose values are paired instead of crossed: [a, b], or [[a, b], [c, d]].
        where: a rule for combinations: "model=rnn -> norm=layer"; or a list of rules.

    Attributes:
        metrics, modes: one of each for each objective.
        zipped: the groups of settings that are paired.
        rules: the rules for combinations.
    """

    def __init__(
        self,
        name: str | None = None,
        metric: str | Sequence[str] = "val/loss",
        mode: ObjectiveMode | Sequence[ObjectiveMode] = "auto",
        zip: Sequence[str] | Sequence[Sequence[str]] = (),  # noqa: A002  # the name of a setting
        where: str | Sequence[str] = "",
    ):
        self.name = name
        self.metrics = [metric] if isinstance(metric, str) else list(metric)
        self.modes = [mode] * len(self.metrics) if isinstance(mode, str) else list(mode)
        self.zipped: list[list[str]] = []
        keys = [each for each in zip if isinstance(each, str)]
        groups = [list(each) for each in zip if not isinstance(each, str)]
        for group in (keys, *groups):
            if group:
                self.zipped.append(group)
        rules = [where] if isinstance(where, str) else where
        self.rules = [rule for rule in rules if rule.strip()]
