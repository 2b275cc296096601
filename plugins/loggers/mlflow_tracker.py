"""The logger for MLflow."""

import logging
from collections.abc import Sequence
from typing import Any

from framework import PositiveFloat, loggers

from .journal import Record
from .tracker import Outcome, TrackedRun, Tracker

MOST_METRICS = 1000  # of a call of log_batch
MOST_PARAMS = 100
MOST_CHARACTERS = 6000  # of a parameter


@loggers.register("mlflow")
class MLflow(Tracker):
    """Sends scalars, texts, images and config to MLflow, whose tables have no histograms.

    Values are sent when a checkpoint is saved, and the rest at the end of the run, so that a
    resumed run continues the same MLflow run without duplicates.

    Args:
        project: the MLflow experiment; null: the name of the experiment.
        run_name: name of the run in the tracker; null: the name of the run folder. Trials of a
            sweep have its name as tag `sweep`.
        tags: of the run; MLflow gets them with the value "true".
        uri: the store or server, such as sqlite:///mlflow.db or http://127.0.0.1:5000; null: as
            MLflow itself, from the environment variable MLFLOW_TRACKING_URI.
        timeout: seconds to wait at the end of the run until everything is sent.
    """

    service = "mlflow"
    package = "mlflow"

    def __init__(
        self,
        project: str | None = None,
        run_name: str | None = None,
        tags: Sequence[str] = (),
        uri: str | None = None,
        timeout: PositiveFloat = 60.0,
    ):
        super().__init__(project, run_name, tags, timeout)
        self.uri = uri
        self._client: Any = None
        self._id = ""

    def connect(self, run: TrackedRun) -> int:
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it reports that it makes tables
        self._client = MlflowClient(self.uri)
        if run.resumed:
            self._id = run.id
            self._client.update_run(run.id, status="RUNNING")
            return run.sent
        tags = dict.fromkeys(run.tags, "true") | {"folder": str(run.folder)}
        if run.group:
            tags["sweep"] = run.group
        experiment = self._experiment(run.project)
        created = self._client.create_run(experiment, run_name=run.name, tags=tags)
        run.id = self._id = created.info.run_id
        self._log_params(run.hyperparameters())
        return -1

    def send(self, record: Record) -> None:
        from mlflow.entities import Metric

        # A repeated call with the same time adds nothing: the time is part of MLflow's key.
        milliseconds = round(1000 * record.time)
        metrics = []
        for tag, value in record.scalars.items():
            metrics.append(Metric(tag, value, milliseconds, record.step))
        for start in range(0, len(metrics), MOST_METRICS):
            self._client.log_batch(self._id, metrics=metrics[start : start + MOST_METRICS])
        for tag, text in record.texts.items():
            self._client.log_text(self._id, text, f"{tag}.md")
        for name, image in record.named_images():
            self._client.log_image(
                self._id,
                image,
                key=name,
                step=record.step,
                timestamp=milliseconds,
                synchronous=True,
            )

    def finish(self, outcome: Outcome) -> None:
        self._log_params(outcome.settings)
        self._client.set_terminated(self._id, "FAILED" if outcome.failed else "FINISHED")

    def _experiment(self, name: str) -> str:
        """Return the id of the MLflow experiment, which is created if it does not exist."""
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException:  # another trial has created it
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _log_params(self, settings: dict[str, Any]) -> None:
        """Log settings that the run does not have yet; MLflow refuses to change a parameter."""
        from mlflow.entities import Param

        known = self._client.get_run(self._id).data.params
        new = [
            Param(key, str(value)[:MOST_CHARACTERS])
            for key, value in settings.items()
            if key not in known
        ]
        for start in range(0, len(new), MOST_PARAMS):
            self._client.log_batch(self._id, params=new[start : start + MOST_PARAMS])
