"""The section `sweep` of an experiment. Its signature is its schema; a single run does without all of it."""

from collections.abc import Sequence
from typing import Literal

Mode = Literal["auto", "min", "max"]


class Sweep:
    """What a sweep is called, what its best trial is, and which combinations it leaves out."""

    def __init__(
        self,
        name: str | None = None,
        metric: str | Sequence[str] = "val/loss",
        mode: Mode | Sequence[Mode] = "auto",
        zip: Sequence[str] | Sequence[Sequence[str]] = (),
        where: str | Sequence[str] = "",
    ):
        """Keep it, with a list where there may be several.

        Args:
            name: of the sweep's folder; without one, the date and time.
            metric: what trials are compared by; a list for a search with several objectives.
            mode: min, max, or (auto) what is better of the metric; a list where `metric` is one.
            zip: settings whose values go in pairs instead of being crossed: [a, b], or [[a, b], [c, d]].
            where: only combinations for which this holds: "model=rnn -> norm=layer"; a list of such rules.
        """
        self.name = name
        self.metrics = [metric] if isinstance(metric, str) else list(metric)
        self.modes = [mode] * len(self.metrics) if isinstance(mode, str) else list(mode)
        groups = [
            [each for each in zip if isinstance(each, str)],
            *(list(e) for e in zip if not isinstance(e, str)),
        ]
        self.zipped = [group for group in groups if group]
        self.rules = [
            rule for rule in ([where] if isinstance(where, str) else where) if rule.strip()
        ]
