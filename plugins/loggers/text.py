"""Loggers that write plain text: metrics.jsonl for programs, lines on the terminal for people."""

import json
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from framework import Logger, PositiveInt, files, loggers, terminal

METRICS = "metrics.jsonl"


@loggers.register("json_lines", aliases=["jsonl"])
class JsonLines(Logger):
    """Writes `metrics.jsonl` in the run folder, a line for each logged step, on disk as soon as it is logged.

    {"step": 450, "epoch": 10, "wall_seconds": 3.2, "val/loss": 0.08}; NaN and infinity, which JSON lacks, as null.
    """

    def __init__(self) -> None:
        self._file: files.AppendFile | None = None

    def open(self, folder: Path | None, step: int, metrics: Sequence[str]) -> None:
        """Go on with the file; what a resumed run writes again goes: lines after `step` and of the test.

        Raises RunError when the file cannot be written.
        """
        if folder is None:
            warnings.warn(
                "the run has no folder, so the json_lines logger records nothing", stacklevel=2
            )
            return
        files.make_folder(Path(folder))
        keep_lines(Path(folder), step)
        self._file = files.AppendFile(Path(folder), METRICS)

    def scalars(
        self, values: dict[str, float], *, step: int, epoch: int, wall_seconds: float
    ) -> None:
        """Append a line, whole or not at all. Raises RunError when it cannot be written."""
        if self._file is None:
            return
        numbers = {key: float(value) for key, value in values.items()}
        row: dict[str, float | None] = {
            "step": step,
            "epoch": epoch,
            "wall_seconds": round(wall_seconds, 3),
        }
        row |= {key: value if math.isfinite(value) else None for key, value in numbers.items()}
        self._file.append(json.dumps(row, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        """Close the file; further calls record nothing."""
        if self._file is not None:
            self._file.close()
        self._file = None


def keep_lines(folder: Path, step: int) -> None:
    """Drop the lines after `step`, those of the test, and those that are no JSON objects.

    Lines at the end are cut off in place, which a full disk allows. Else the file is written anew, and the old one
    stands until the end. The file is never in memory as a whole.
    """
    kept = 0  # bytes at the beginning of the file, of lines that all stay
    end = 0
    cut = True  # whether all that goes is at the end
    try:
        with files.open_file(folder, METRICS, most=files.MOST_ROWS_BYTES) as file:
            for line in lines_of(file):
                end += len(line)
                if stays(line, step):
                    cut = cut and end == kept + len(line)
                    kept += len(line)
            if not cut:
                file.seek(0)
                files.write_file(
                    folder, METRICS, (line for line in lines_of(file) if stays(line, step))
                )
            elif kept < end:
                with files.open_file(folder, METRICS, "r+") as changed:
                    changed.truncate(kept)
    except FileNotFoundError:
        return
    except OSError as error:
        raise files.unwritable(folder / METRICS, error) from error


def lines_of(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file with their ends; one of more than 16 MB in pieces."""
    while line := file.readline(files.MOST_LINE_BYTES):
        yield line


def stays(line: bytes, step: int) -> bool:
    """Whether a resumed run keeps a line: a whole one, up to a step, and not of the test."""
    row = files.parse_row(line) if line.endswith(b"\n") else None
    if row is None or any(name.startswith("test/") for name in row):
        return False
    found = row.get("step")
    return isinstance(found, int) and 0 < found <= step


@loggers.register("console")
class Console(Logger):
    """Prints a line for each logged step: `step 450  epoch 10  3.2 s  val/loss 0.08  val/accuracy 0.97`."""

    def __init__(self, digits: PositiveInt = 4):
        """Print to the standard output, flushed line by line.

        Args:
            digits: significant digits of a value.
        """
        self.digits = digits

    def scalars(
        self, values: dict[str, float], *, step: int, epoch: int, wall_seconds: float
    ) -> None:
        """Print a line."""
        shown = "".join(f"  {key} {float(value):.{self.digits}g}" for key, value in values.items())
        terminal.print_line(f"step {step}  epoch {epoch}  {wall_seconds:.1f} s{shown}", flush=True)
