"""Reads the files and the output of a sweep, for the tests of sweeps."""

import json
from pathlib import Path


def rows(name="s"):
    """Return the rows of sweep.jsonl: one at the start and one at the end of each trial."""
    text = Path(f"runs/default/{name}/sweep.jsonl").read_text()
    return list(map(json.loads, text.splitlines()))


def trials(name="s"):
    """Return the last row of each trial."""
    last = {row["number"]: row for row in rows(name)}
    return [last[number] for number in sorted(last)]


def table_of(out):
    """Return the header and the rows of the printed table, as lists of words."""
    for block in out.strip().split("\n\n"):
        header, *lines = map(str.split, block.splitlines())
        if header[-1:] == ["state"]:
            return header, lines
    raise AssertionError(f"no table in {out!r}")
