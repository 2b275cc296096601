"""The files of a sweep: its request, and a row for each trial."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from framework.errors import RunError
from framework.system.files import parse_row, read_json

from .folder import FOLDER_NAME

TrialStatus = Literal["running", "done", "pruned", "failed", "stopped"]
REQUEST = "sweep.json"
ROWS = "sweep.jsonl"
Number = (int, float)
REQUIRED_TYPES = {"number": int, "settings": dict, "metrics": dict}
OPTIONAL_TYPES: dict[str, Any] = {
    "folder": str,
    "state": str,
    "error": str,
    "config": str,
    "seconds": Number,
    "steps": int,
    "exit_status": int,
}


@dataclass
class Trial:
    """One row of sweep.jsonl.

    Attributes:
        number: the number of the trial, from 0.
        settings: the settings that differ between trials: {"optimizer.lr": 0.01, "model": "cnn"}.
        folder: the name of its run folder.
        state: running, done, pruned, failed or stopped.
        metrics: its last metrics, by name.
        seconds: its time, including interrupted attempts.
        steps: its number of training steps.
        error: the message of a failed trial.
        exit_status: the exit status of a failed or stopped trial, as of `framework train`.
        config: the fingerprint of its config, by which a resumed sweep recognizes it.
    """

    number: int
    settings: dict[str, Any]
    folder: str = ""
    state: TrialStatus = "running"
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    steps: int = 0
    error: str = ""
    exit_status: int = 0
    config: str = ""

    @property
    def is_finished(self) -> bool:
        """Whether a resumed sweep skips it; failed and stopped trials run again."""
        return self.state in ("done", "pruned")


def read_request(sweep: Path) -> dict[str, Any]:
    """Return the request of a sweep, empty for another folder."""
    try:
        request = read_json(sweep, REQUEST)
    except (OSError, RunError):
        return {}
    return request if is_request(request) else {}


def is_request(content: Any) -> bool:
    """Return whether the content of a sweep.json has the expected types."""
    if not isinstance(content, dict) or not isinstance(content.get("began", 0.0), Number):
        return False
    for name in ("command", "swept", "plugins"):
        texts = content.get(name) or []
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            return False
    return True


def parse_trial(line: bytes) -> Trial | None:
    """Return the trial of a row, or None for an incomplete or invalid one."""
    row = parse_row(line)
    return None if row is None else trial_of_row(row)


def trial_of_row(row: Mapping[str, Any]) -> Trial | None:
    """Return the trial of a JSON object, or None for an invalid one."""
    for name, kind in REQUIRED_TYPES.items():
        if not isinstance(row.get(name), kind):
            return None
    for name, expected in OPTIONAL_TYPES.items():
        if name in row and not isinstance(row[name], expected):
            return None
    values = {each.name: row[each.name] for each in fields(Trial) if each.name in row}
    trial = Trial(**values)
    for name, value in trial.metrics.items():
        trial.metrics[name] = math.nan if value is None else value
    if not all(isinstance(value, Number) for value in trial.metrics.values()):
        return None
    if trial.state not in get_args(TrialStatus):
        return None
    is_name = re.fullmatch(FOLDER_NAME, trial.folder) and ".." not in trial.folder
    return trial if is_name or not trial.folder else None
