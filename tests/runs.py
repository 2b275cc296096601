"""Reads what a run left, for the tests that compare runs."""

import json
from pathlib import Path

TIMES = ("wall_seconds", "train/samples_per_second", "train/seconds_per_epoch")


def logged(run):
    """The lines of metrics.jsonl, but for what tells of time."""
    lines = map(json.loads, (Path(run) / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
