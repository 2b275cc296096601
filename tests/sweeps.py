"""Reads what a sweep left and printed, for the tests of sweeps."""

import json
from pathlib import Path


def rows(name="s"):
    """The lines of sweep.jsonl, a row at the beginning and one at the end of each trial."""
    return [
        json.loads(line)
        for line in Path(f"runs/default/{name}/sweep.jsonl").read_text().splitlines()
    ]


def trials(name="s"):
    """The last row of each trial."""
    last = {row["number"]: row for row in rows(name)}
    return [last[number] for number in sorted(last)]


def table_of(out):
    """The lines of the table, in words."""
    blocks = [[line.split() for line in block.splitlines()] for block in out.strip().split("\n\n")]
    (lines,) = [block for block in blocks if block[0][-1:] == ["state"]]
    return lines[0], lines[1:]
