"""`framework tell`: give commands to a running run."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from framework.errors import FrameworkError, RunError, wrong_option
from framework.errors.paths import pasted
from framework.errors.terminal import print_line
from framework.runs.requests import (
    REFUSED,
    Command,
    EventReader,
    Request,
    check_owner,
    parse_commands,
    row_text,
    send,
    withdraw,
)
from framework.runs.run_files import RunFiles, run_files

from . import help_texts
from .json_output import print_json
from .parsers import JSON, RUN, Parser

SECONDS = 60.0  # that the run has to reach the end of a step
POLL_SECONDS = 0.1
STATE_SECONDS = 2.0  # between two checks that the run is alive


def tell(arguments: list[str]) -> None:
    """Run `framework tell`."""
    parser = Parser("tell", "Give commands to a running run.", help_texts.TELL)
    parser.add_argument("run", **RUN | {"help": "folder of a running run"})
    commands = "stop, checkpoint, pause, continue, or set KEY=VALUE ..."
    parser.add_argument("commands", nargs="+", metavar="COMMAND", help=commands)
    timeout = f"how long to wait for the end of a step (default: {SECONDS:.0f})"
    parser.add_argument("--timeout", type=float, default=SECONDS, metavar="SECONDS", help=timeout)
    parser.add_argument("--json", **JSON)
    args = parser.parse_intermixed_args(arguments)
    if not 0 < args.timeout < float("inf"):
        raise wrong_option("--timeout", args.timeout, "a number of seconds above 0")
    files = run_files(args.run)
    run = files.path
    parsed = parse_commands(args.commands, files.settings)
    check_owner(run)
    check_running(run)
    rows = answers(run, parsed, args.timeout)
    if args.json:
        print_json({"run": str(run), "events": rows})
    for row in rows:
        print_line(row_text(row))
        if row["do"] == "stop":
            print_line(f"resume   framework resume {pasted(run)}")


def check_running(run: Path) -> None:
    """Raise RunError if a run is not in training."""
    state = RunFiles(run).state
    if state in ("running", "paused"):
        return
    if state == "testing":
        raise RunError(f"{run} is not in training: it is testing")
    meaning = " (its process ended without a result)" if state == "stale" else ""
    raise RunError(f"{run} is not running: it is {state}{meaning}")


def answers(run: Path, commands: Sequence[Command], seconds: float) -> list[dict[str, Any]]:
    """Send commands to a run; return its rows on them, in their order.

    Args:
        run: its folder.
        commands: those of one request.
        seconds: how long the run has to take the request.

    Raises:
        FrameworkError: the run has refused the request.
        RunError: the run has ended, or has not taken the request in time.
    """
    request = Request(commands)
    reader = EventReader(run, from_end=True)
    send(run, request)
    rows: list[dict[str, Any]] = []
    deadline = time.monotonic() + seconds
    next_check = time.monotonic() + STATE_SECONDS
    taken = False
    try:
        while len(rows) < len(commands):
            time.sleep(POLL_SECONDS)
            rows += [row for row in reader.read() if row.get("request") == request.id]
            if rows and rows[-1].get("do") == REFUSED:
                raise FrameworkError(str(rows[-1].get("reason")))
            now = time.monotonic()
            if not taken and now > deadline:
                taken = not withdraw(run)
                if not taken:
                    raise RunError(
                        f"{run} has not reached the end of a step within {seconds:g} s: the "
                        "request is withdrawn (--timeout SECONDS waits longer)"
                    )
                deadline = now + seconds
            elif taken and now > deadline:
                raise RunError(f"{run} has taken the request, but not answered it")
            if now > next_check and len(rows) < len(commands):
                next_check = now + STATE_SECONDS
                check_running(run)
    finally:
        if not rows:
            withdraw(run)
    return rows
