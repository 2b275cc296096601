"""Where the time of a run went: recorded in status.json by `Status`, and read by `explain speed`.

The times are those of the main process, over all parts of a run that was resumed; steps that were
repeated after a kill count twice, since they took their time twice. This module does not import
torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .run_files import number_in

MOST_PARTS = 50


@dataclass
class RunTime:
    """Seconds of a run by activity.

    Attributes:
        start: from the start of the process to the first step, such as imports and reading data.
        training: from the first step to the end of the training, all activities included.
        test: after the training, such as measuring the test split.
        parts: of the training, by activity, such as "validation"; the rest is that of the steps.
        steps: the number of steps that were trained.
        sessions: the number of processes, one after the other: a run that was resumed once has 2.
        stacked: the number of trials that trained together as one model.
        device: the type of the device, such as "cuda".
        reading: how the training data was read.
        of_a_step: seconds of the parts of one step, such as "forward", with trainer.profile.
    """

    start: float = 0.0
    training: float = 0.0
    test: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    sessions: int = 0
    stacked: int = 1
    device: str = ""
    reading: str = ""
    of_a_step: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """All seconds."""
        return self.start + self.training + self.test

    @property
    def in_steps(self) -> float:
        """The seconds of the training that no activity counts."""
        return max(self.training - sum(self.parts.values()), 0.0)

    def added(self, other: "RunTime") -> "RunTime":
        """Return the sum with the time of a later session, whose other facts count."""
        parts = dict(self.parts)
        for name, seconds in other.parts.items():
            parts[name] = parts.get(name, 0.0) + seconds
        return RunTime(
            start=self.start + other.start,
            training=self.training + other.training,
            test=self.test + other.test,
            parts=parts,
            steps=self.steps + other.steps,
            sessions=self.sessions + other.sessions,
            stacked=other.stacked,
            device=other.device,
            reading=other.reading,
            of_a_step=other.of_a_step or self.of_a_step,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the time as status.json holds it."""
        return {
            "start": round(self.start, 3),
            "training": round(self.training, 3),
            "test": round(self.test, 3),
            "parts": rounded(self.parts, 3),
            "steps": self.steps,
            "sessions": self.sessions,
            "stacked": self.stacked,
            "device": self.device,
            "reading": self.reading,
            "of_a_step": rounded(self.of_a_step, 9),
        }


def rounded(seconds: Mapping[str, float], digits: int) -> dict[str, float]:
    """Return rounded seconds."""
    return {name: round(value, digits) for name, value in seconds.items()}


def read_time(status: Mapping[str, Any]) -> RunTime | None:
    """Return the time in a status.json; None without one, as in a run of an older version.

    The file may be damaged: what is not a number is left out.
    """
    content = status.get("time")
    if not isinstance(content, dict):
        return None
    return RunTime(
        start=seconds_in(content, "start"),
        training=seconds_in(content, "training"),
        test=seconds_in(content, "test"),
        parts=parts_in(content, "parts"),
        steps=int(seconds_in(content, "steps")),
        sessions=int(seconds_in(content, "sessions")),
        stacked=max(int(seconds_in(content, "stacked")), 1),
        device=text_in(content, "device"),
        reading=text_in(content, "reading"),
        of_a_step=parts_in(content, "of_a_step"),
    )


def seconds_in(content: Mapping[str, Any], key: str) -> float:
    """Return a number of at least 0; 0 for anything else."""
    return max(number_in(content, key) or 0.0, 0.0)


def parts_in(content: Mapping[str, Any], key: str) -> dict[str, float]:
    """Return seconds by name."""
    parts = content.get(key)
    if not isinstance(parts, dict):
        return {}
    names = [name for name in parts if isinstance(name, str)][:MOST_PARTS]
    return {name: seconds_in(parts, name) for name in names}


def text_in(content: Mapping[str, Any], key: str) -> str:
    """Return a text; "" for anything else."""
    text = content.get(key)
    return text if isinstance(text, str) else ""
