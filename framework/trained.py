"""A trained model, read back from its run folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .building import build_data, build_loader, build_metrics, build_model
from .data import Scale
from .errors import DataError, RunError
from .experiment import load_weights
from .paths import expanded
from .run import read_config, read_facts
from .spec import Spec, read_spec
from .task import Task
from .trainer import Trainer


@dataclass
class Trained:
    """A model read back from a run folder, with what prediction needs; the training data is not read."""

    spec: Spec
    run: Path
    model: nn.Module
    task: Task
    facts: dict[str, Any]
    checkpoint: Path

    def trainer(self) -> Trainer:
        wanted = {name: self.spec.sections["trainer"][name] for name in ("device", "precision", "deterministic")}
        return Trainer(max_steps=1, **wanted, seed=self.spec.seed)

    def evaluate(self, split: str = "test") -> dict[str, float]:
        """Return the loss and metrics on a split of the run's data."""
        data = build_data(self.spec)
        self.task.check(data)
        loader = build_loader(self.spec, self.model, data, split)
        metrics = build_metrics(self.spec, data, self.task)
        return self.trainer().evaluate(loader, model=self.model, task=self.task, metrics=metrics, name=split)

    def read_inputs(self, file: Path) -> Tensor:
        """Read a file of inputs as the run's data set reads it. Raises DataError when it does not fit the model."""
        if not file.exists():
            raise DataError(f"there is no file {file}")
        inputs = self.spec.parts["data"].entry.part.read_inputs(file, self.facts["data"])
        row, wanted = tuple(inputs.shape[1:]), self.facts["in_shape"]
        if list(row) != wanted:
            raise DataError(f"{file}: a row has shape {row}; the model takes {wanted}")
        return inputs

    def predict(self, inputs: Tensor) -> dict[str, Any]:
        """Return the task's predictions, columns by name."""
        batch_size = self.spec.sections["loader"]["eval_batch_size"]
        outputs = self.trainer().predict(inputs, model=self.model, batch_size=batch_size)
        scale = self.facts.get("scale")
        return self.task.predict(outputs if scale is None else Scale(*scale).back(outputs))


def open_run(run: Path, which: str = "best") -> Trained:
    """Read a run folder back. Raises RunError when it is none or has no checkpoint, ConfigError when a part is gone."""
    run = expanded(run)
    spec = read_spec(read_config(run), lambda path: f"{run}/config.yaml")
    facts = read_facts(run)
    model = build_model(spec, facts["in_shape"], facts["out_shape"], facts.get("columns", ()))
    chosen = load_weights(model, run, which)
    if chosen is None:
        raise RunError(f"{run} has no checkpoint: was it trained with callbacks.checkpoint?")
    return Trained(spec, run, model, spec.parts["task"](), facts, chosen)
