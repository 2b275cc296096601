"""The logger that writes a CSV file, for spreadsheets and pandas."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from framework import Logger, files, loggers

from .text import keep_lines, read_lines, warn_of_no_folder

TABLE = "metrics.csv"
FIRST_COLUMNS = ["step", "epoch", "wall_seconds"]


@loggers.register("csv")
class Csv(Logger):
    """Writes `metrics.csv` in the run folder: a row for each logged step, a column for each tag.

    A cell is empty if the tag was not logged with the row. When a new tag is logged, the file is
    written again with one more column. A resumed run drops the rows after its checkpoint.
    """

    def __init__(self) -> None:
        self._file: files.AppendFile | None = None
        self._columns: list[str] = []

    def open(self, folder: Path | None, step: int, metrics: Sequence[str]) -> None:
        """Open the file to append; drop the rows that a resumed run writes again.

        Raises:
            RunError: the file cannot be written.
        """
        if folder is None:
            warn_of_no_folder("csv")
            return
        folder = Path(folder)
        files.make_folder(folder)
        self._columns = read_header(folder)
        if self._columns[:1] == ["step"]:
            rows = RowsToKeep(self._columns, step)
            keep_lines(folder, TABLE, rows.stays)
        else:
            self._columns = [*FIRST_COLUMNS]
            files.write_file(folder, TABLE, csv_line(self._columns))
        self._file = files.AppendFile(folder, TABLE)

    def scalars(
        self, values: dict[str, float], *, step: int, epoch: int, wall_seconds: float
    ) -> None:
        """Append a row.

        Raises:
            RunError: the row cannot be written.
        """
        if self._file is None:
            return
        new = [tag for tag in values if tag not in self._columns]
        if new:
            self._add_columns(new)
        row = {"step": str(step), "epoch": str(epoch), "wall_seconds": f"{wall_seconds:.3f}"}
        row |= {tag: repr(float(value)) for tag, value in values.items()}
        self._file.append(csv_line(row.get(column, "") for column in self._columns))

    def close(self) -> None:
        """Close the file; further calls record nothing."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def _add_columns(self, new: list[str]) -> None:
        """Write the file again with more columns; a full disk leaves it as it was."""
        assert self._file is not None
        folder = self._file.path.parent
        self._file.close()
        self._columns += new
        files.write_file(folder, TABLE, self._widened(folder, len(new)))
        self._file = files.AppendFile(folder, TABLE)

    def _widened(self, folder: Path, more: int) -> Iterator[bytes]:
        yield csv_line(self._columns)
        with files.open_file(folder, TABLE, most=files.MOST_ROWS_BYTES) as file:
            lines = read_lines(file)
            next(lines, None)  # the header
            for line in lines:
                yield line.rstrip(b"\r\n") + b"," * more + b"\n"


class RowsToKeep:
    """Selects the rows that a resumed run keeps.

    Args:
        columns: the header.
        step: the step of the checkpoint.
    """

    def __init__(self, columns: Sequence[str], step: int):
        self.columns = columns
        self.step = step

    def stays(self, line: bytes) -> bool:
        """Return whether a line stays: the header, and rows up to the step, not of the test."""
        cells = parse_line(line)
        if cells == list(self.columns):
            return True
        if len(cells) != len(self.columns) or not line.endswith(b"\n"):
            return False
        row = dict(zip(self.columns, cells, strict=True))
        if any(cell and name.startswith("test/") for name, cell in row.items()):
            return False
        return row["step"].isdecimal() and 0 < int(row["step"]) <= self.step


def read_header(folder: Path) -> list[str]:
    """Return the columns of the file; none if there is no file, or no complete header."""
    try:
        with files.open_file(folder, TABLE, most=files.MOST_ROWS_BYTES) as file:
            line = file.readline(files.MOST_LINE_BYTES)
    except FileNotFoundError:
        return []
    return parse_line(line) if line.endswith(b"\n") else []


def parse_line(line: bytes) -> list[str]:
    """Return the cells of a line; none if it is malformed."""
    try:
        return next(csv.reader([line.decode()]), [])
    except (csv.Error, UnicodeDecodeError):
        return []


def csv_line(cells: Iterable[str]) -> bytes:
    """Return a line; a line break in a cell becomes a space."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow([cell.replace("\n", " ") for cell in cells])
    return buffer.getvalue().encode()
