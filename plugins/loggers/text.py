"""Loggers that write plain text: metrics.jsonl for programs, terminal output for users."""

import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from framework import Logger, PositiveInt, files, loggers, terminal

METRICS = "metrics.jsonl"


@loggers.register("json_lines", aliases=["jsonl"])
class JsonLines(Logger):
    """Writes `metrics.jsonl` in the run folder: a line for each logged step, without buffering.

    A line: {"step": 450, "epoch": 10, "wall_seconds": 3.2, "val/loss": 0.08}. NaN and infinity,
    which JSON lacks, are written as null.
    """

    def __init__(self) -> None:
        self._file: files.AppendFile | None = None

    def open(self, folder: Path | None, step: int, metrics: Sequence[str]) -> None:
        """Open the file to append; drop the lines that a resumed run writes again.

        These are the lines after `step` and those of the test.

        Raises:
            RunError: the file cannot be written.
        """
        if folder is None:
            warn_of_no_folder("json_lines")
            return
        files.make_folder(Path(folder))
        keep_lines(Path(folder), METRICS, lambda line: is_kept(line, step))
        self._file = files.AppendFile(Path(folder), METRICS)

    def scalars(
        self, values: dict[str, float], *, step: int, epoch: int, wall_seconds: float
    ) -> None:
        """Append a complete line.

        Raises:
            RunError: the line cannot be written.
        """
        if self._file is None:
            return
        row: dict[str, float | None] = {
            "step": step,
            "epoch": epoch,
            "wall_seconds": round(wall_seconds, 3),
        }
        for key, value in values.items():
            number = float(value)
            row[key] = number if math.isfinite(number) else None
        self._file.append(json.dumps(row, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        """Close the file; further calls record nothing."""
        if self._file is not None:
            self._file.close()
        self._file = None


def warn_of_no_folder(logger: str) -> None:
    """Warn that a logger records nothing, at the caller of its `open`."""
    warnings.warn(f"the run has no folder, so the {logger} logger records nothing", stacklevel=3)


def keep_lines(folder: Path, name: str, is_kept: Callable[[bytes], bool]) -> None:
    """Drop the lines of a file that a resumed run writes again.

    Lines at the end are truncated in place, which works on a full disk. Otherwise a new file is
    written, which replaces the old one when it is complete. The file is read line by line.
    """
    kept = 0  # bytes of the lines at the beginning that all stay
    end = 0
    truncates = True  # whether all dropped lines are at the end
    try:
        with files.open_file(folder, name, most=files.MOST_ROWS_BYTES) as file:
            for line in read_lines(file):
                end += len(line)
                if is_kept(line):
                    truncates = truncates and end == kept + len(line)
                    kept += len(line)
            if not truncates:
                file.seek(0)
                kept_lines = (line for line in read_lines(file) if is_kept(line))
                files.write_file(folder, name, kept_lines)
            elif kept < end:
                with files.open_file(folder, name, "r+") as changed:
                    changed.truncate(kept)
    except FileNotFoundError:
        return
    except OSError as error:
        raise files.unwritable(folder / name, error) from error


def read_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file with their line ends; a line of more than 16 MB in pieces."""
    while line := file.readline(files.MOST_LINE_BYTES):
        yield line


def is_kept(line: bytes, step: int) -> bool:
    """Return whether a resumed run keeps a line: a complete one up to `step`, not of the test."""
    row = files.parse_row(line) if line.endswith(b"\n") else None
    if row is None or any(name.startswith("test/") for name in row):
        return False
    row_step = row.get("step")
    return isinstance(row_step, int) and 0 < row_step <= step


@loggers.register("console")
class Console(Logger):
    """Prints a line for each logged step: `step 450  epoch 10  3.2 s  val/loss 0.08`.

    The lines go to the standard output without buffering.

    Args:
        digits: significant digits of a value.
    """

    def __init__(self, digits: PositiveInt = 4):
        self.digits = digits

    def scalars(
        self, values: dict[str, float], *, step: int, epoch: int, wall_seconds: float
    ) -> None:
        """Print a line."""
        line = f"step {step}  epoch {epoch}  {wall_seconds:.1f} s"
        for key, value in values.items():
            line += f"  {key} {float(value):.{self.digits}g}"
        terminal.print_line(line, flush=True)
