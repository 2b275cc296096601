"""The base of loggers for experiment trackers (W&B, MLflow, Trackio).

A tracker cannot take values back, but a run that is killed and resumed logs the values after its
last checkpoint again. Therefore each value is first appended to a journal in the run folder. A
thread sends the lines up to the newest checkpoint, and at the end of the run the rest. A resumed
run drops the lines after its checkpoint, which were not sent, and continues the same tracker run.

If such lines were sent (the run ended with an error, or resumes from an older checkpoint that the
user chose), the resumed run begins a new tracker run, which receives the complete journal.
"""

import base64
import json
import re
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from framework import (
    Logger,
    PositiveFloat,
    RunError,
    SettingError,
    checkpoints,
    drawing,
    files,
    user_code,
)

from .journal import Record, is_of_test, journal_name, journal_size, read_journal, rewind_journal
from .tensorboard import flatten_settings, histogram_bars
from .text import warn_of_no_folder

MOST_IMAGES_BYTES = 8 * 2**20  # of the images of one call; more are left out, with a warning
MOST_STATE_BYTES = 2**16
WAIT_SECONDS = 2.0  # between two looks at the journal
MOST_WAIT_SECONDS = 60.0  # after failures


@dataclass
class TrackedRun:
    """A run as the tracker shows it.

    Attributes:
        id: of the tracker run; the same after a resume.
        folder: of the run.
        project: that the run belongs to.
        name: that is shown.
        group: the name of the sweep; "" for a run of its own.
        tags: short words.
        config: the composed config; empty without one.
        resumed: whether the tracker has the run already.
        sent: the last step that was sent; -1 for none.
    """

    id: str
    folder: Path
    project: str
    name: str
    group: str
    tags: Sequence[str]
    config: dict[str, Any]
    resumed: bool
    sent: int

    def hyperparameters(self) -> dict[str, bool | int | float | str]:
        """Return the config with dotted keys, without the settings of the folder and loggers."""
        return flatten_settings(
            {key: value for key, value in self.config.items() if key not in ("run", "loggers")}
        )


class Tracker(Logger):
    """Base of loggers that send to an experiment tracker.

    A subclass defines `service`, `package`, `connect`, `send` and `finish`, which a thread calls.
    Their errors give a warning; the thread tries again, and the run is not affected.

    Args:
        project: the group of runs in the tracker; null: the name of the experiment.
        run_name: the name of the run in the tracker; null: the name of the run folder.
        tags: short words that the tracker shows and filters by.
        timeout: seconds to wait at the end of the run until everything is sent.
    """

    service: str
    package: str

    def __init__(
        self,
        project: str | None = None,
        run_name: str | None = None,
        tags: Sequence[str] = (),
        timeout: PositiveFloat = 60.0,
    ):
        if find_spec(self.package) is None:
            raise SettingError(
                f"loggers={self.service} needs {self.package}: "
                f"pip install 'framework[{self.service}]'"
            )
        self.project = project
        self.run_name = run_name
        self.tags = tags
        self.timeout = timeout
        self._journal: files.AppendFile | None = None
        self._sender: Sender | None = None
        self._outcome = Outcome()

    def connect(self, run: TrackedRun) -> int:
        """Begin or continue a run.

        Returns:
            The last step that the tracker has; later records are sent. -1 if it has none.
        """
        raise NotImplementedError

    def send(self, record: Record) -> None:
        """Send what was logged at a step. The steps do not decrease."""
        raise NotImplementedError

    def flush(self) -> None:
        """Return when the tracker has stored what was sent."""

    def finish(self, outcome: "Outcome") -> None:
        """End the run in the tracker."""
        raise NotImplementedError

    def open(self, folder: Path | None, step: int, metrics: Sequence[str]) -> None:
        """Open the journal, without the lines that a resumed run logs again."""
        if folder is None:
            warn_of_no_folder(self.service)
            return
        folder = Path(folder)
        self._outcome = Outcome()
        try:
            files.make_folder(folder)
            state = read_state(folder, self.service)
            rewind_journal(folder, self.service, step)
            self._journal = files.AppendFile(folder, journal_name(self.service))
        except (OSError, RunError) as error:
            self._give_up(error)
            return
        sent = state.get("sent", -1)
        run_id = state.get("id")
        resumed = run_id is not None and sent <= step and step > 0
        if not resumed:
            run_id, sent = uuid.uuid4().hex, -1
        run = self._tracked_run(folder, str(run_id), resumed, sent)
        self._sender = Sender(self, run)
        self._sender.start()

    def scalars(
        self, values: dict[str, float], *, step: int, epoch: int, wall_seconds: float
    ) -> None:
        """Append values to the journal."""
        numbers = {tag: float(value) for tag, value in values.items()}
        self._append(step, scalars=numbers)

    def text(self, tag: str, markdown: str, step: int = 0) -> None:
        """Append a text to the journal."""
        self._append(step, texts={tag: markdown})

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        """Append the distribution of the finite values to the journal."""
        if self._journal is None:
            return
        bars = histogram_bars(values, bins=48).tolist()
        if bars:
            self._append(step, histograms={tag: bars})

    def images(self, tag: str, images: Tensor, step: int) -> None:
        """Append images (N, C, H, W) in [0, 1] to the journal, as PNG."""
        if self._journal is None:
            return
        encoded = []
        size = 0
        for image in images.detach().cpu():
            content = drawing.encode_png(image)
            size += len(content)
            if size > MOST_IMAGES_BYTES:
                warnings.warn(
                    f"loggers.{self.service}: {tag} at step {step}: only {len(encoded)} of "
                    f"{len(images)} images are logged ({MOST_IMAGES_BYTES:,} bytes at most)",
                    stacklevel=2,
                )
                break
            encoded.append(base64.b64encode(content).decode())
        self._append(step, images={tag: encoded})

    def hparams(self, settings: dict[str, Any], metrics: dict[str, float]) -> None:
        """Keep the settings and final metrics for the end of the run."""
        self._outcome.settings = flatten_settings(settings)
        self._outcome.metrics = dict(metrics)

    def close(self) -> None:
        """Send the rest, and end the run in the tracker; wait for at most `timeout` seconds."""
        sender = self._sender
        self._sender = None
        if self._journal is not None:
            self._journal.close()
        self._journal = None
        if sender is None:
            return
        self._outcome.failed = sys.exception() is not None
        sender.end(self._outcome, self.timeout)
        self._warn(sender)
        if sender.unsent:
            warnings.warn(
                f"loggers.{self.service}: not everything was sent; "
                f"{sender.run_info.folder / journal_name(self.service)} has all values",
                stacklevel=1,
            )

    def _tracked_run(self, folder: Path, run_id: str, resumed: bool, sent: int) -> TrackedRun:
        """Return the run, named after its folder; a trial of a sweep is in a group."""
        folder = folder.absolute()
        sweep = folder.parent if (folder.parent / "sweep.json").is_file() else None
        above = folder.parent if sweep is None else sweep.parent
        return TrackedRun(
            id=run_id,
            folder=folder,
            project=self.project or above.name or "framework",
            name=self.run_name or folder.name,
            group="" if sweep is None else sweep.name,
            tags=self.tags,
            config=read_config(folder),
            resumed=resumed,
            sent=sent,
        )

    def _append(self, step: int, **content: Any) -> None:
        """Append a line to the journal."""
        if self._journal is None:
            return
        line = json.dumps({"step": step, "time": time.time(), **content})
        try:
            self._journal.append(line.encode() + b"\n")
        except (OSError, RunError) as error:
            self._give_up(error)
            return
        if self._sender is not None:
            self._warn(self._sender)

    def _give_up(self, error: Exception) -> None:
        """Warn that nothing more is recorded; the run goes on."""
        reason = user_code.describe(error)
        warnings.warn(
            f"loggers.{self.service} records nothing from here on: {reason}", stacklevel=1
        )
        if self._journal is not None:
            self._journal.close()
        self._journal = None

    def _warn(self, sender: "Sender") -> None:
        """Warn of the first error of the thread; later ones have the same cause, as a rule."""
        if sender.error is not None and not sender.warned:
            sender.warned = True
            warnings.warn(
                f"loggers.{self.service}: {user_code.describe(sender.error)}; the training goes "
                "on, and the logger tries again",
                stacklevel=1,
            )


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        failed: whether an error ended it.
        settings: hyperparameters with dotted keys; empty if the run did not end regularly.
        metrics: the final values by tag.
    """

    failed: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


class Sender(threading.Thread):
    """Sends the lines of a journal.

    Attributes:
        run_info: the run in the tracker.
        error: the last error of the tracker.
        warned: whether the user knows about an error.
        unsent: whether something is left when the thread ends, or does not end in time.
    """

    def __init__(self, tracker: Tracker, run: TrackedRun):
        super().__init__(name=tracker.service, daemon=True)
        self.tracker = tracker
        self.run_info = run
        self.error: Exception | None = None
        self.warned = False
        self.unsent = False
        self._outcome: Outcome | None = None
        self._wake = threading.Event()
        self._connected = False
        self._has = -1  # the last step that the tracker had when it was connected
        self._position = 0  # of the journal, in bytes
        self._old_bytes = journal_size(run.folder, tracker.service)  # of the run before a resume

    def run(self) -> None:
        """Send at intervals, which become longer while the tracker fails, and at the end."""
        seconds = WAIT_SECONDS
        while self._outcome is None:
            self._wake.wait(seconds)
            try:
                if self._outcome is None:
                    self._send(newest_checkpoint(self.run_info.folder))
                seconds = WAIT_SECONDS
            except Exception as error:  # of the tracker, of any kind
                self.error = error
                seconds = min(2 * seconds, MOST_WAIT_SECONDS)
        self.unsent = True
        try:
            self._send(None)
            if self._connected:
                self.tracker.finish(self._outcome)
            self.unsent = False
        except Exception as error:
            self.error = error

    def end(self, outcome: Outcome, timeout: float) -> None:
        """Send the rest, and end the run in the tracker; wait for at most `timeout` seconds."""
        self._outcome = outcome
        self._wake.set()
        self.join(timeout)
        self.unsent |= self.is_alive()

    def _send(self, last: int | None) -> None:
        """Send the lines up to a step; None for all."""
        run = self.run_info
        sent = run.sent
        for record, start, end in self._records(last):
            if not self._connected:
                self._has = self.tracker.connect(run)
                self._connected = True
                write_state(run, self.tracker.service)
            if start >= self._old_bytes or record.step > self._has:
                self.tracker.send(record)
            self._position = end
            sent = max(sent, record.step)
        if sent > run.sent:
            self.tracker.flush()
            run.sent = sent
            write_state(run, self.tracker.service)

    def _records(self, last: int | None) -> Iterator[tuple[Record, int, int]]:
        """Yield the next records up to a step, one for each step, with their place in bytes.

        The values of the test are sent at the end, since a run that is killed in the test repeats
        it.
        """
        record: Record | None = None
        start = end = self._position
        for line, line_end in read_journal(self.run_info.folder, self.tracker.service, end):
            if last is not None and (line.step > last or is_of_test(line)):
                break
            joins = record is not None and record.step == line.step and end != self._old_bytes
            if record is not None and joins:
                record.update(line)
            else:
                if record is not None:
                    yield record, start, end
                record = line
                start = end
            end = line_end
        if record is not None:
            yield record, start, end


def newest_checkpoint(folder: Path) -> int:
    """Return the step of the newest checkpoint that a resume may start from; -1 if there is none.

    A checkpoint with NaN in the weights is not resumed.
    """
    for checkpoint in reversed(checkpoints.listed(folder / "checkpoints")):
        try:
            if not checkpoints.read_manifest(checkpoint)["nan"]:
                return checkpoints.step_of(checkpoint)
        except (OSError, RunError, LookupError):
            continue
    return -1


def read_state(folder: Path, service: str) -> dict[str, Any]:
    """Return the id of the tracker run, and the last step that was sent; empty for a new run."""
    try:
        state = files.read_json(folder, f"{service}.json", MOST_STATE_BYTES)
    except (OSError, RunError):
        return {}
    if not isinstance(state, dict) or type(state.get("sent")) is not int:
        return {}
    known = isinstance(state.get("id"), str) and re.fullmatch(r"[\w-]{1,64}", state["id"])
    return state if known else {}


def write_state(run: TrackedRun, service: str) -> None:
    """Write what `read_state` reads."""
    content = {"id": run.id, "sent": run.sent}
    files.write_file(run.folder, f"{service}.json", json.dumps(content) + "\n")


def read_config(folder: Path) -> dict[str, Any]:
    """Return the composed config of a run; empty without one."""
    try:
        config = files.read_yaml(folder, "config.yaml")
    except (OSError, RunError):
        return {}
    return config if isinstance(config, dict) else {}
