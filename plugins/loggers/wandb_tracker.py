"""The logger for Weights & Biases."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from framework import PositiveFloat, RunError, loggers

from .journal import Record, as_image, counts_and_edges
from .tracker import Outcome, TrackedRun, Tracker

LOGIN_SECONDS = 10  # that W&B may wait at a terminal for a key; without one there is a warning


@loggers.register("wandb")
class Wandb(Tracker):
    """Sends scalars, texts, histograms, images and config to Weights & Biases (W&B).

    Values are sent when a checkpoint is saved, and the rest at the end of the run, so that a
    resumed run continues the same W&B run without duplicates. In offline mode, W&B's files are in
    the folder wandb of the run; `wandb sync RUN/wandb/offline-run-*` uploads them.

    Args:
        project: null: the name of the experiment.
        run_name: name of the run in the tracker; null: the name of the run folder. Trials of a
            sweep have its name as group.
        tags: of the run.
        entity: the user or team that owns the project; null: your default.
        mode: online, offline, or null: the environment variable WANDB_MODE if it is set, otherwise
            online if WANDB_API_KEY is set, otherwise offline. After `wandb login`, give online.
        timeout: seconds to wait at the end of the run until everything is sent.
    """

    service = "wandb"
    package = "wandb"

    def __init__(
        self,
        project: str | None = None,
        run_name: str | None = None,
        tags: Sequence[str] = (),
        entity: str | None = None,
        mode: Literal["online", "offline"] | None = None,
        timeout: PositiveFloat = 60.0,
    ):
        super().__init__(project, run_name, tags, timeout)
        self.entity = entity
        self.mode = mode
        self._run: Any = None

    def connect(self, run: TrackedRun) -> int:
        import wandb

        mode = self.mode or os.environ.get("WANDB_MODE")
        if mode is None:
            mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
        files = run.folder / "wandb"
        if files.is_symlink():
            raise RunError(f"{files} is a symbolic link")
        before = sorted(files.glob(f"offline-run-*-{run.id}")) if run.resumed else []
        exit_hooks = sys.exit, sys.excepthook
        self._run = wandb.init(
            project=run.project,
            entity=self.entity,
            id=run.id,
            name=run.name,
            group=run.group or None,
            tags=list(run.tags),
            config=run.config,
            dir=str(run.folder),
            mode=mode,
            resume="allow" if run.resumed else None,
            reinit="create_new",  # several runs in a process: trials of a sweep
            settings=wandb.Settings(console="off", silent=True, login_timeout=LOGIN_SECONDS),
        )
        sys.exit, sys.excepthook = exit_hooks  # W&B replaces them to learn of an error
        if mode != "offline":
            return self._run.starting_step - 1 if self._run.resumed else -1
        if any(is_uploaded(each) for each in before):
            return run.sent
        # The files of a killed process lack its last values: new ones are written from the journal.
        for each in before:
            shutil.rmtree(each)
        return -1

    def send(self, record: Record) -> None:
        import wandb

        values: dict[str, Any] = dict(record.scalars)
        for tag, text in record.texts.items():
            values[tag] = wandb.Html(as_html(text), inject=False)
        for tag, bars in record.histograms.items():
            values[tag] = wandb.Histogram(np_histogram=counts_and_edges(bars))
        for tag, images in record.images.items():
            values[tag] = [wandb.Image(as_image(image)) for image in images]
        self._run.log(values, step=record.step)

    def finish(self, outcome: Outcome) -> None:
        if outcome.settings and not dict(self._run.config):
            self._run.config.update(outcome.settings)
        self._run.summary.update(outcome.metrics)
        self._run.finish(exit_code=int(outcome.failed))


def is_uploaded(folder: Path) -> bool:
    """Return whether `wandb sync` has uploaded an offline run."""
    return any(folder.glob("*.synced"))


def as_html(markdown: str) -> str:
    """Return a text in Markdown as preformatted HTML."""
    from html import escape

    return f"<pre>{escape(markdown)}</pre>"
