"""The logger for Trackio."""

import time
from collections.abc import Sequence
from typing import Any

from framework import PositiveFloat, RunError, loggers

from .journal import Record, counts_and_edges
from .tracker import Outcome, TrackedRun, Tracker

STORE_SECONDS = 30.0  # until the thread of Trackio has stored what was sent


@loggers.register("trackio")
class Trackio(Tracker):
    """Sends scalars, texts, histograms, images and config to Trackio on this machine.

    Values are sent when a checkpoint is saved, and the rest at the end of the run, so that a
    resumed run continues the same Trackio run without duplicates. `trackio show` opens them.

    Args:
        project: null: the name of the experiment.
        run_name: name of the run in the tracker; null: the name of the run folder. A number
            follows, since Trackio finds a run by its name. Trials of a sweep have its name as
            group.
        tags: of the run; they are in its config.
        space: a Hugging Face Space, such as user/name, to log to instead of this machine.
        timeout: seconds to wait at the end of the run until everything is sent.
    """

    service = "trackio"
    package = "trackio"

    def __init__(
        self,
        project: str | None = None,
        run_name: str | None = None,
        tags: Sequence[str] = (),
        space: str | None = None,
        timeout: PositiveFloat = 60.0,
    ):
        super().__init__(project, run_name, tags, timeout)
        self.space = space
        self._run: Any = None
        self._last = -1  # the last step that was sent

    def connect(self, run: TrackedRun) -> int:
        import trackio

        be_silent(trackio)
        config = dict(run.hyperparameters()) | ({"tags": list(run.tags)} if run.tags else {})
        self._run = trackio.init(
            project=run.project,
            name=f"{run.name}-{run.id[:8]}",
            group=run.group or None,
            space_id=self.space,
            config=config,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        stored = self._stored_step()
        return run.sent if stored is None else stored

    def send(self, record: Record) -> None:
        import numpy
        import trackio

        values: dict[str, Any] = dict(record.scalars)
        for tag, text in record.texts.items():
            values[tag] = trackio.Markdown(text)
        for tag, bars in record.histograms.items():
            values[tag] = trackio.Histogram(np_histogram=counts_and_edges(bars))
        for name, image in record.named_images():
            values[name] = trackio.Image(numpy.asarray(image))
        self._run.log(values, step=record.step)
        self._last = record.step

    def flush(self) -> None:
        """Wait until the thread of Trackio has stored the last step.

        Raises:
            RunError: that takes too long.
        """
        deadline = time.monotonic() + STORE_SECONDS
        while (stored := self._stored_step()) is not None or self.space is None:
            if stored is not None and stored >= self._last:
                return
            if time.monotonic() > deadline:
                raise RunError(f"Trackio has not stored the values within {STORE_SECONDS:g} s")
            time.sleep(0.05)

    def finish(self, outcome: Outcome) -> None:
        self._run.finish()

    def _stored_step(self) -> int | None:
        """Return the last step that Trackio has stored on this machine; None if it is unknown."""
        from trackio.sqlite_storage import SQLiteStorage

        if self.space is not None:
            return None
        return SQLiteStorage.get_max_step_for_run(self._run.project, self._run.name)


def be_silent(trackio: Any) -> None:
    """Let Trackio print nothing, since its lines would be in the middle of the progress display.

    `redirect_stdout` is no alternative: it would also redirect the output of the training.
    """
    import trackio.run
    import trackio.utils

    for module in (trackio, trackio.run, trackio.utils):
        module.print = lambda *args, **settings: None
