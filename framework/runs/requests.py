"""Requests to a running run, and the file in which the run records what it has done.

`framework tell` writes `request.json` into the folder of a run. The main process of the run takes
it at the end of a step, and appends a row to `events.jsonl` for each command:

    {"step": 120, "time": 1764547200.0, "request": "5f3c1d...", "do": "set",
     "setting": "optimizer.lr", "old": 0.001, "new": 0.0001}

- step: the number of steps done. A changed setting takes effect in the next step.
- time: seconds since 1970. request: the id of the request; its commands have the same.
- do: set (setting, old, new: numbers or lists of numbers), checkpoint (checkpoint: its path in the
  folder of the run), pause, continue, stop; refused (reason) if nothing of the request was done;
  discard (setting) if the run was resumed after `step` with another value of a setting: earlier
  rows of this setting from that step on do not apply.

The rows are in the order in which they were written. A resumed run applies the rows `set` after its
checkpoint again at their steps (see `experiment/steering.py`), and does not write them again.

This module does not import torch, so that `framework tell` starts at once.
"""

import json
import math
import os
import stat
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from framework.errors import Facts, FrameworkError, RunError, did_you_mean, short
from framework.system.files import AppendFile, open_file, parse_json, parse_row, write_file

from .run_files import setting_named

REQUEST = "request.json"
EVENTS = "events.jsonl"
MOST_REQUEST = 2**16  # bytes of a request
MOST_EVENTS = 16 * 2**20  # bytes of the events that are read
MOST_COMMANDS = 64  # of a request
ACTIONS = ("stop", "checkpoint", "pause", "continue")
SET = "set"
REFUSED = "refused"
DISCARD = "discard"

Number = int | float
Value = Number | list[Number]


@dataclass(frozen=True)
class Command:
    """A command of a request.

    Attributes:
        do: one of `ACTIONS`, or "set".
        setting: the setting that "set" changes, such as "optimizer.lr".
        value: its new value, a finite number or a list of them.
    """

    do: str
    setting: str = ""
    value: Value = 0

    def content(self) -> dict[str, Any]:
        """Return the command as an object of JSON."""
        if self.do != SET:
            return {"do": self.do}
        return {"do": SET, "setting": self.setting, "value": self.value}


@dataclass(frozen=True)
class Request:
    """The commands of one call of `framework tell`; all of them are done, or none.

    Attributes:
        commands: in the order in which they are done.
        id: a random text, by which the sender finds the rows of its request.
    """

    commands: Sequence[Command]
    id: str = field(default_factory=lambda: os.urandom(8).hex())


class Refused(FrameworkError):
    """A request that a run does not carry out; the text is the reason.

    Attributes:
        request: the id of the request; "" if it is not known.
    """

    request = ""


def parse_commands(words: Sequence[str], settings: Collection[str] = ()) -> list[Command]:
    """Return the commands of a command line: `stop`, or `set optimizer.lr=1e-4 checkpoint`.

    Args:
        words: of the command line.
        settings: those of the run, by which short names such as `lr` are completed.

    Raises:
        FrameworkError: a word is no command, or a value is no number.
    """
    commands: list[Command] = []
    setting_follows = False
    takes_settings = False
    for word in words:
        if word == SET:
            setting_follows = True
            takes_settings = True
        elif word in ACTIONS and not setting_follows:
            commands.append(Command(word))
            takes_settings = False
        elif takes_settings and "=" in word:
            commands.append(parse_setting(word, settings))
            setting_follows = False
        elif takes_settings:
            raise FrameworkError(f"set: expected KEY=VALUE, got {short(word)}")
        else:
            advice = f"write `set {word}`" if "=" in word else did_you_mean(word, (*ACTIONS, SET))
            raise FrameworkError(f"tell: there is no command {short(word)}; {advice}")
    if setting_follows:
        raise FrameworkError("set: expected KEY=VALUE, such as optimizer.lr=1e-4")
    if len(commands) > MOST_COMMANDS:
        raise FrameworkError(f"tell: expected at most {MOST_COMMANDS} commands at once")
    names = [command.setting or command.do for command in commands]
    for name in names:
        if names.count(name) > 1:
            raise FrameworkError(f"tell: {name} is given {names.count(name)} times")
    return commands


def parse_setting(word: str, settings: Collection[str]) -> Command:
    """Return the command that sets KEY=VALUE.

    Raises:
        FrameworkError: the value is neither a finite number nor a list of finite numbers; no other
            setting can be changed. Or several settings have the name.
    """
    name, _, text = word.partition("=")
    setting = setting_named(name, settings, "set") or name
    value: Any = None
    for parse in (json.loads, float):
        try:
            value = parse(text)
            break
        except (ValueError, RecursionError):
            continue
    if not is_value(value):
        expected = "a number, or a list of numbers such as [0.9,0.99]"
        message = f"expected {expected}"
        if not setting.startswith("optimizer."):
            expected = "a number of the optimizer"
            message = "only numbers of the optimizer can be changed in a running run"
            if setting in settings:
                message += f"; stop it, and `framework resume RUN {setting}={text}`"
        error = FrameworkError(f"{setting}={text}: {message}")
        raise error.with_facts(Facts(setting, text, expected))
    return Command(SET, setting, value)


def is_value(value: Any) -> bool:
    """Return whether a value is a finite number or a list of finite numbers."""
    numbers = value if isinstance(value, list) and value else [value]
    if len(numbers) > MOST_COMMANDS:
        return False
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float):
            return False
        try:
            if not math.isfinite(number):
                return False
        except OverflowError:
            return False
    return True


# the side of `framework tell`


def check_owner(run: Path) -> None:
    """Raise RunError if only another user may give commands to a run."""
    status = os.stat(run)
    if status.st_uid != os.geteuid():
        raise RunError(
            f"{run} belongs to another user (uid {status.st_uid}): only that user may `tell` it"
        )
    if status.st_mode & stat.S_IWOTH:
        raise RunError(f"{run} can be written by any user: {chmod_advice(run)}")


def chmod_advice(run: Path) -> str:
    """Return the advice for a folder that other users may write to."""
    return f"`chmod o-w {run}` allows `framework tell`"


def send(run: Path, request: Request) -> None:
    """Write a request into the folder of a run.

    Raises:
        RunError: another request waits there, or the folder cannot be written.
    """
    if os.path.lexists(run / REQUEST):
        raise RunError(
            f"another request waits in {run / REQUEST}: wait until the run takes it, or delete it"
        )
    content = {
        "id": request.id,
        "time": time.time(),
        "commands": [command.content() for command in request.commands],
    }
    write_file(run, REQUEST, json.dumps(content) + "\n")


def withdraw(run: Path) -> bool:
    """Remove the request that waits in the folder of a run; return False if there is none."""
    try:
        os.unlink(run / REQUEST)
    except OSError:
        return False
    return True


class EventReader:
    """Reads the rows that are appended to the events of a run.

    Args:
        run: the folder of the run.
        from_end: whether to leave out the rows that exist already.
    """

    def __init__(self, run: Path, from_end: bool = False):
        self.run = run
        self.position = 0
        if from_end:
            with suppress(OSError):
                self.position = os.lstat(run / EVENTS).st_size

    def read(self) -> list[dict[str, Any]]:
        """Return the new complete rows; lines that are no objects are left out.

        Raises:
            RunError: the file is a link, not regular, or larger than `MOST_EVENTS`.
        """
        try:
            with open_file(self.run, EVENTS, most=MOST_EVENTS) as file:
                file.seek(self.position)
                content = file.read(MOST_EVENTS)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RunError(f"{self.run / EVENTS} cannot be read: {error.strerror}") from error
        complete = content[: content.rfind(b"\n") + 1]
        self.position += len(complete)
        rows = [parse_row(line) for line in complete.splitlines()]
        return [row for row in rows if row is not None]


# the side of the run


def take(run: Path) -> Request | None:
    """Remove the request in the folder of this process's run, and return it.

    Returns:
        None if there is none, or if its sender has withdrawn it.

    Raises:
        Refused: the request is from another user, or has another form.
    """
    try:
        with open_file(run, REQUEST, most=MOST_REQUEST) as file:
            owner = os.fstat(file.fileno()).st_uid
            content = file.read(MOST_REQUEST)
    except FileNotFoundError:
        return None
    except (OSError, RunError) as error:
        if not withdraw(run):
            return None  # such as a folder of this name
        raise Refused(str(error)) from None
    if not withdraw(run):
        return None
    refused = refusal(run, owner)
    if refused is not None:
        raise Refused(refused)
    return parse_request(content, run / REQUEST)


def drop_older(run: Path, began: float) -> None:
    """Remove a request that was written before a process began, for an earlier process of the run.

    Args:
        run: the folder of the run.
        began: when the process began, in seconds since 1970.
    """
    try:
        written = os.lstat(run / REQUEST).st_mtime
    except OSError:
        return
    if written < began:
        withdraw(run)


def refusal(run: Path, owner: int) -> str | None:
    """Return the reason to refuse a request of a user; None if it is allowed.

    Args:
        run: the folder of the run.
        owner: the user id of the file of the request.
    """
    if owner != os.geteuid():
        return f"the request is from another user (uid {owner}) than the run (uid {os.geteuid()})"
    if os.stat(run).st_mode & stat.S_IWOTH:
        return f"{run} can be written by any user: {chmod_advice(run)}"
    return None


def parse_request(content: bytes, path: Path) -> Request:
    """Return the request in a file.

    Raises:
        Refused: it has another form than `send` writes.
    """
    try:
        parsed = parse_json(content, path)
    except RunError as error:
        raise Refused(str(error)) from None
    name = parsed.get("id") if isinstance(parsed, Mapping) else None
    listed = parsed.get("commands") if isinstance(parsed, Mapping) else None
    if not isinstance(name, str) or not name.isalnum() or len(name) > 64:
        raise Refused(f"{path} has no id")
    commands = []
    for each in listed if isinstance(listed, list) else ():
        command = as_command(each)
        if command is not None:
            commands.append(command)
    if not isinstance(listed, list) or len(commands) != len(listed) or not commands:
        raise with_id(Refused(f"{path} has a command that is not known"), name)
    return Request(commands[:MOST_COMMANDS], name)


def as_command(content: Any) -> Command | None:
    """Return a command of a request; None for another form."""
    if not isinstance(content, Mapping):
        return None
    do = content.get("do")
    setting = content.get("setting")
    value: Any = content.get("value")
    if do in ACTIONS:
        return Command(str(do))
    if do == SET and isinstance(setting, str) and is_value(value):
        return Command(SET, setting, value)
    return None


def with_id(error: Refused, request: str) -> Refused:
    """Return the error with the id of its request."""
    error.request = request
    return error


def event(step: int, request: str, do: str, **more: Any) -> dict[str, Any]:
    """Return a row of the events."""
    return {"step": step, "time": time.time(), "request": request, "do": do, **more}


def record(run: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows to the events of a run, and wait until they are on the disk.

    Raises:
        RunError: they cannot be written.
    """
    lines = [json.dumps(row) + "\n" for row in rows]
    file = AppendFile(run, EVENTS)
    try:
        file.append("".join(lines).encode())
        with suppress(OSError):  # some file systems do not support it
            os.fsync(file.file.fileno())
    finally:
        file.close()


def changes(run: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows `set` that a run applies, in the order of their steps.

    Raises:
        RunError: the file is refused, or a row `set` has another form.
    """
    rows: list[dict[str, Any]] = []
    for row in EventReader(run).read():
        step = row.get("step")
        setting = row.get("setting")
        if row.get("do") not in (SET, DISCARD):
            continue
        if type(step) is not int or step < 0 or not isinstance(setting, str):
            raise RunError(f"{run / EVENTS}: expected a step and a setting, got {short(row)}")
        if row["do"] == DISCARD:
            rows = [each for each in rows if each["setting"] != setting or each["step"] < step]
        elif is_value(row.get("new")) and isinstance(row.get("request"), str):
            rows.append(row)
        else:
            raise RunError(f"{run / EVENTS}: expected a new value, got {short(row)}")
    yield from sorted(rows, key=lambda row: int(row["step"]))


def row_text(row: Mapping[str, Any]) -> str:
    """Return a row of the events for the terminal."""
    if row["do"] == SET:
        return change_text(row)
    texts = {
        "checkpoint": f"saved {row.get('checkpoint')}",
        "stop": f"stops after step {row['step']}",
        "pause": f"paused after step {row['step']}",
        "continue": f"continues after step {row['step']}",
    }
    return texts[row["do"]]


def change_text(row: Mapping[str, Any]) -> str:
    """Return a changed setting for the terminal, such as "optimizer.lr=0.1 from step 5 on"."""
    old = row.get("old")
    was = "" if old is None else f" (was {value_text(old)})"
    return f"{row['setting']}={value_text(row['new'])}{was} from step {row['step'] + 1} on"


def value_text(value: Any) -> str:
    """Return a number or a list of numbers as text."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(str, value))}]"
    return str(value)
