"""The journal of a tracker in the run folder: a line for each call of the logger, see `Tracker`."""

import base64
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from framework import files

from .text import keep_lines, read_lines


@dataclass
class Record:
    """What was logged at a step.

    Attributes:
        step: the optimizer steps done.
        time: seconds since 1970.
        scalars: numbers by tag.
        texts: Markdown by tag.
        images: PNG files by tag.
        histograms: (left edge, right edge, count) of each bar, by tag.
    """

    step: int
    time: float
    scalars: dict[str, float] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    images: dict[str, list[bytes]] = field(default_factory=dict)
    histograms: dict[str, list[list[float]]] = field(default_factory=dict)

    def update(self, other: "Record") -> None:
        """Add the values of another record of the same step."""
        self.scalars |= other.scalars
        self.texts |= other.texts
        self.images |= other.images
        self.histograms |= other.histograms

    def named_images(self) -> Iterator[tuple[str, Any]]:
        """Yield each image as one of Pillow, with its name: the tag, and a number if several."""
        for tag, images in self.images.items():
            for number, png in enumerate(images):
                yield tag if len(images) == 1 else f"{tag}/{number}", as_image(png)


def journal_name(service: str) -> str:
    """Return the name of the journal in the run folder."""
    return f"{service}.jsonl"


def journal_size(folder: Path, service: str) -> int:
    """Return the bytes of the journal."""
    try:
        return (folder / journal_name(service)).stat().st_size
    except OSError:
        return 0


def rewind_journal(folder: Path, service: str, step: int) -> None:
    """Drop the lines of the journal that a resumed run writes again."""

    def stays(line: bytes) -> bool:
        record = parse_line(line)
        if record is None or is_of_test(record):
            return False
        return step > 0 and 0 <= record.step <= step

    keep_lines(folder, journal_name(service), stays)


def read_journal(folder: Path, service: str, position: int) -> Iterator[tuple[Record, int]]:
    """Yield the records after a position, each with the position of its end."""
    try:
        file: BinaryIO = files.open_file(folder, journal_name(service), most=files.MOST_ROWS_BYTES)
    except FileNotFoundError:
        return
    with file:
        file.seek(position)
        for line in read_lines(file):
            position += len(line)
            record = parse_line(line)
            if record is not None:
                yield record, position


def parse_line(line: bytes) -> Record | None:
    """Return the record of a line; None if it is incomplete or damaged."""
    if not line.endswith(b"\n"):
        return None
    try:
        content = json.loads(line)
        record = Record(int(content["step"]), float(content["time"]))
        for tag, value in content.get("scalars", {}).items():
            record.scalars[tag] = float(value)
        for tag, text in content.get("texts", {}).items():
            record.texts[tag] = str(text)
        for tag, images in content.get("images", {}).items():
            record.images[tag] = [base64.b64decode(image) for image in images]
        for tag, bars in content.get("histograms", {}).items():
            record.histograms[tag] = [
                [float(left), float(right), float(count)] for left, right, count in bars
            ]
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
        return None
    return record if math.isfinite(record.time) else None


def is_of_test(record: Record) -> bool:
    """Return whether a record has values of the test."""
    tags = [*record.scalars, *record.texts, *record.images, *record.histograms]
    return any(tag.startswith("test/") for tag in tags)


def counts_and_edges(bars: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Return the bars of a histogram as `numpy.histogram` does: counts, and one more edge."""
    counts = [count for _, _, count in bars]
    return counts, [bars[0][0], *(right for _, right, _ in bars)]


def as_image(png: bytes) -> Any:
    """Return a PNG file as an image of Pillow.

    Raises:
        OSError: it is no PNG file. Other formats are not read: for EPS, Pillow runs Ghostscript.
    """
    from PIL import Image

    return Image.open(io.BytesIO(png), formats=["PNG"])
