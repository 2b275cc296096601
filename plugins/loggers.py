"""Loggers that write plain text: metrics.jsonl for programs, lines on the terminal for people."""

import json
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from framework import Logger, PositiveInt, loggers
from framework.terminal import print_line


@loggers.register("json_lines", aliases=["jsonl"])
class JsonLines(Logger):
    """Writes `metrics.jsonl` in the run folder, a line for each logged step, on disk as soon as it is logged.

    {"step": 450, "epoch": 10, "wall_seconds": 3.2, "val/loss": 0.08}; NaN and infinity, which JSON lacks, as null.
    """

    def __init__(self) -> None:
        self._file: IO[str] | None = None

    def open(self, folder: Path | None, step: int, metrics: Sequence[str]) -> None:
        """Go on with the file; what a resumed run writes again goes: lines after `step` and of the test."""
        if folder is None:
            warnings.warn("the run has no folder, so the json_lines logger records nothing", stacklevel=2)
            return
        path = Path(folder) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            keep_lines(path, step)
        self._file = path.open("a", encoding="utf-8")

    def scalars(self, values: dict[str, float], *, step: int, epoch: int, wall_seconds: float) -> None:
        """Append a line."""
        if self._file is None:
            return
        numbers = {key: float(value) for key, value in values.items()}
        row: dict[str, float | None] = {"step": step, "epoch": epoch, "wall_seconds": round(wall_seconds, 3)}
        row |= {key: value if math.isfinite(value) else None for key, value in numbers.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; further calls record nothing."""
        if self._file is not None:
            self._file.close()
        self._file = None


def keep_lines(path: Path, step: int) -> None:
    """Drop the lines after `step`, of the test, and those that are no JSON; the old file stands until the end."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n") and 0 < step_of(line) <= step]
    kept = [line for line in whole if '"test/' not in line]
    if len(kept) < len(lines):
        beside = path.with_suffix(".jsonl.new")
        beside.write_text("".join(kept), encoding="utf-8")
        os.replace(beside, path)


def step_of(line: str) -> int:
    """Return the step of a line, -1 of one that has none."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


@loggers.register("console")
class Console(Logger):
    """Prints a line for each logged step: `step 450  epoch 10  3.2 s  val/loss 0.08  val/accuracy 0.97`."""

    def __init__(self, digits: PositiveInt = 4):
        """Print to the standard output, flushed line by line.

        Args:
            digits: significant digits of a value.
        """
        self.digits = digits

    def scalars(self, values: dict[str, float], *, step: int, epoch: int, wall_seconds: float) -> None:
        """Print a line."""
        shown = "".join(f"  {key} {float(value):.{self.digits}g}" for key, value in values.items())
        print_line(f"step {step}  epoch {epoch}  {wall_seconds:.1f} s{shown}", flush=True)
