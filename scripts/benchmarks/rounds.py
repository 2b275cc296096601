"""Contenders take turns: their processes, and what is made of their times."""

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
    """A contender ended before its time; the text is the last that it said."""


class Contender(NamedTuple):
    """A name in the table, the Python that runs it, and its function."""

    name: str
    python: str
    module: str
    function: str


class Process:
    """A contender under way. Its stderr is a terminal, since bars are drawn for terminals; what it says is kept."""

    def __init__(self, contender: Contender, threads: int, device: str):
        self.contender = contender
        self.said: deque[bytes] = deque(maxlen=200)
        mine, its = pty.openpty()
        hidden = (
            {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        )  # peers take an accelerator wherever it is
        environment = (
            os.environ
            | hidden
            | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), "TERM": "xterm"}
        )
        command = [
            contender.python,
            "-m",
            "benchmarks.contender",
            contender.module,
            contender.function,
        ]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": its}
        self.child = subprocess.Popen(command, env=environment, text=True, **pipes)  # type: ignore[call-overload]
        os.close(its)
        self.reader = threading.Thread(target=self._listen, args=(mine,), daemon=True)
        self.reader.start()

    def _listen(self, terminal: int) -> None:
        with contextlib.suppress(OSError), open(terminal, "rb", buffering=0) as stream:
            while chunk := stream.read(65536):
                self.said.append(chunk)

    def tell(self, line: Any) -> None:
        """Send a line; `hear` has the answer."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(line), file=self.child.stdin, flush=True)

    def hear(self) -> dict[str, Any]:
        """Wait for the answer to one `tell`. Raises Failed when it is that something went wrong, or there is none."""
        line = self.child.stdout.readline()
        said = json.loads(line) if line else {"failed": self._last_words()}
        if "failed" in said:
            raise Failed(said["failed"])
        return said

    def _last_words(self) -> str:
        self.child.wait()
        self.reader.join(1)
        words = [
            each
            for each in b"".join(self.said).decode(errors="replace").splitlines()
            if each.strip()
        ]
        return (words or ["it ended without a word"])[-1].strip()[:200]

    def close(self) -> None:
        """End it."""
        self.child.stdin.close()
        try:
            self.child.wait(10)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self.child.stdout.close()


def take_turns(
    parts: Mapping[str, Callable[[], float]], rounds: int, warm: int = 1
) -> dict[str, list[float]]:
    """Call each in turn, again and again; return what they gave after the first `warm` times."""
    given: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(rounds + warm):
        for name, part in parts.items():
            value = part()
            given[name] += [value] if number >= warm else []
    return given


def ratio(others: Sequence[float], mine: Sequence[float]) -> float:
    """The median over the rounds of other / mine, taken within a round, when the machine was as it was for both."""
    return statistics.median(other / own for other, own in zip(others, mine, strict=True))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of text in Markdown; all columns but the first are numbers."""
    rows = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        return f"| {' | '.join(cells)} |"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([line(rows[0]), f"|{rule}|", *map(line, rows[1:])])
