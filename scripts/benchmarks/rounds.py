"""Processes of contenders, measurements in turns, and tables of their times."""

import contextlib
import json
import os
import pty
import statistics
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent


class Failed(Exception):
    """A contender failed; the text is its last line of output."""


class Contender(NamedTuple):
    """A name in the table, the Python that runs it, and its function."""

    name: str
    python: str
    module: str
    function: str


class Process:
    """A running contender; its stderr is a terminal, because only terminals get progress bars.

    Args:
        program: the module that is started; it calls the function of the contender.
    """

    def __init__(
        self,
        contender: Contender,
        threads: int,
        device: str,
        program: str = "benchmarks.contender",
    ):
        self.contender = contender
        self.output: deque[bytes] = deque(maxlen=200)
        ours, theirs = pty.openpty()
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": str(ROOT),
            "TERM": "xterm",
        }
        if device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""  # peers use any accelerator they find
        module = [contender.python, "-m", program]
        self.child = subprocess.Popen(
            [*module, contender.module, contender.function],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=theirs,
        )
        os.close(theirs)
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.stdin = self.child.stdin
        self.stdout = self.child.stdout
        self.reader = threading.Thread(target=self._read, args=(ours,), daemon=True)
        self.reader.start()

    def send(self, line: Any) -> None:
        """Send a line; `receive` returns the answer."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(line), file=self.stdin, flush=True)

    def receive(self) -> dict[str, Any]:
        """Wait for the answer to one `send`.

        Raises:
            Failed: The contender reports an error or has ended.
        """
        line = self.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"failed": self._last_line()}
        if "failed" in answer:
            raise Failed(answer["failed"])
        return answer

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):  # it has ended before it read the last line
            self.stdin.close()
        try:
            self.child.wait(10)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self.stdout.close()

    def _read(self, terminal: int) -> None:
        with contextlib.suppress(OSError), open(terminal, "rb", buffering=0) as stream:
            while chunk := stream.read(65536):
                self.output.append(chunk)

    def _last_line(self) -> str:
        self.child.wait()
        self.reader.join(1)
        lines = b"".join(self.output).decode(errors="replace").strip().splitlines()
        return lines[-1].strip()[:200] if lines else "it ended without output"


def take_turns(
    parts: Mapping[str, Callable[[], float]], rounds: int, warm: int = 1
) -> dict[str, list[float]]:
    """Call the functions in turn; return their values without those of the `warm` first turns."""
    values: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(rounds + warm):
        for name, part in parts.items():
            value = part()
            if number >= warm:
                values[name].append(value)
    return values


def ratio(others: Sequence[float], mine: Sequence[float]) -> float:
    """Return the median over the rounds of other / mine.

    Both times of a ratio are from the same round, so that a change of the machine's speed
    affects both.
    """
    return statistics.median(other / own for other, own in zip(others, mine, strict=True))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are right-aligned."""
    cells = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = [row[0].ljust(widths[0])]
        for cell, width in zip(row[1:], widths[1:], strict=True):
            padded.append(cell.rjust(width))
        lines.append(f"| {' | '.join(padded)} |")
    rule = ["-" * (widths[0] + 2)]
    rule += ["-" * (width + 1) + ":" for width in widths[1:]]
    lines.insert(1, f"|{'|'.join(rule)}|")
    return "\n".join(lines)
