"""A trained model, read back from its run folder."""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from framework.composition.sources import Sources
from framework.composition.spec import Spec, read_spec
from framework.contracts.task import Task, TextTask
from framework.data.dataset import Data, Scale
from framework.errors import ConfigError, DataError, RunError, short
from framework.errors.paths import expanded, pasted, shorter
from framework.errors.user_code import describe, user_errors
from framework.registry.discovery import is_loaded
from framework.runs import checkpoint
from framework.runs.folder import (
    dump,
    plugins_of,
    read_config,
    read_facts,
    resolve_run,
    run_of_checkpoint,
)
from framework.training.trainer import Trainer
from framework.training.trainer_state import WRONG_FORM

from .build import build_data, build_loader, build_metrics, build_model, scale_of
from .model_limits import model_limits
from .weights import find_checkpoint, load_into


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
        wanted = {
            name: self.spec.sections["trainer"][name]
            for name in ("device", "precision", "deterministic")
        }
        return Trainer(max_steps=1, **wanted, seed=self.spec.seed)

    def evaluate(self, split: str = "test") -> dict[str, float]:
        """Return the loss and metrics on a split of the run's data."""
        data = build_data(self.spec, refit="fold" in self.facts)
        self.task.check(data)
        self.check_scale(data)
        now = json.loads(dump("facts.json", data.facts()))
        if now != self.facts.get("data", now):
            warnings.warn(f"the data of {self.run} has changed since it was trained", stacklevel=2)
        loader = build_loader(self.spec, self.model, data, split)
        metrics = build_metrics(self.spec, data, self.task)
        return self.trainer().evaluate(
            loader, model=self.model, task=self.task, metrics=metrics, name=split
        )

    def check_scale(self, data: Data) -> None:
        """Raise RunError when the targets are scaled in another way than those learnt."""
        learnt = self.facts.get("scale")
        before = None if learnt is None else Scale(*learnt)
        now = scale_of(data, self.task)
        if not nearly_equal(before, now):
            raise RunError(
                f"{self.run}: its targets were scaled by {before}, those of the data now by {now}; "
                "the data has changed, or the run is of an older version: train it again"
            )

    def read_inputs(self, file: Path) -> Tensor:
        """Read a file of inputs as the run's data set reads it. Raises DataError when it does not fit the model."""
        if not file.exists():
            raise DataError(f"there is no file {file}")
        with facts_that_fit(self.run), user_errors(f"reading {file}", DataError):
            inputs = self.spec.parts["data"].entry.part.read_inputs(file, self.facts["data"])
        if not isinstance(inputs, Tensor):
            found = type(inputs).__name__
            raise DataError(f"{file}: `read_inputs` should return a tensor, not a {found}")
        row, wanted = tuple(inputs.shape[1:]), self.facts["in_shape"]
        if list(row) != wanted:
            raise DataError(f"{file}: a row has shape {row}; the model takes {wanted}")
        return inputs

    def predict(self, inputs: Tensor) -> Mapping[str, Any]:
        """Return the task's predictions, columns by name."""
        batch_size = self.spec.sections["loader"]["eval_batch_size"]
        outputs = self.trainer().predict(inputs, model=self.model, batch_size=batch_size)
        scale = self.facts.get("scale")
        columns = self.task.predict(outputs if scale is None else Scale(*scale).back(outputs))
        if not isinstance(columns, Mapping):
            name = type(self.task).__name__
            raise DataError(f"{name}.predict: expected a dict of columns, got {short(columns)}")
        return columns

    def generate(self, prompt: str, **sampling: Any) -> tuple[str, str]:
        """Let a language model continue a text.

        Args:
            prompt: the beginning of the text.
            sampling: settings of the task's `generate`, such as the temperature.

        Returns:
            What the model knows of the prompt, and the prompt with its continuation.
        """
        data = self.spec.parts["data"].entry.part
        with facts_that_fit(self.run):
            tokens = data.encode(prompt, self.facts["data"])
            known = data.decode(tokens.tolist(), self.facts["data"])
        if not isinstance(self.task, TextTask):
            raise RunError(
                f"the task of {self.run} makes no text: --prompt is for task=language_modelling"
            )
        made = self.task.generate(self.model, tokens, self.facts["in_shape"][0], **sampling)
        with facts_that_fit(self.run):
            return known, data.decode([*tokens.tolist(), *made], self.facts["data"])


@contextmanager
def facts_that_fit(run: Path) -> Iterator[None]:
    """Raise RunError when what a run's facts.json tells of the data has another form than its data set gives it."""
    try:
        yield
    except WRONG_FORM as error:
        raise RunError(
            f"{run / 'facts.json'} does not fit the data of the run: {describe(error)}"
        ) from error


def nearly_equal(first: Scale | None, second: Scale | None) -> bool:
    """Whether two scales make the same targets, to within a thousandth of a deviation."""
    if first is None or second is None:
        return first is second
    mean, std, other_mean, other_std = (
        torch.as_tensor(each, dtype=torch.float64) for each in (*first[:2], *second[:2])
    )
    if first.log != second.log or mean.shape != other_mean.shape:
        return False
    apart = (mean - other_mean).abs() + (std - other_std).abs()
    return bool((apart <= 1e-3 * std).all())


def open_run(run: str | Path, which: str | None = None) -> Trained:
    """Read a trained model back.

    Args:
        run: the folder of a run, or of one of its checkpoints.
        which: best, last, or the folder of a checkpoint; None: best, or the checkpoint that `run` is.

    Raises RunError when there is no such run or checkpoint, ConfigError for an unknown part.
    """
    run = resolve_run(expanded(run))
    of_checkpoint = run_of_checkpoint(run)
    if of_checkpoint is not None:
        if which is not None:
            advice = f"leave out --checkpoint {which}, or give the run {of_checkpoint}"
            raise RunError(f"{run} is a checkpoint: {advice}")
        run, which = of_checkpoint, str(run)
    spec = read_spec_of(run, read_config(run))
    facts = read_facts(run)
    chosen = find_checkpoint(run, which or "best")
    if chosen is None:
        raise RunError(f"{run} has no checkpoint: was it trained with callbacks.checkpoint?")
    shapes = facts["in_shape"], facts["out_shape"], facts.get("columns", ())
    try:
        with model_limits(spec, checkpoint.read_shapes(chosen)):
            model = build_model(spec, *shapes, trained=False)
    except (
        RuntimeError,
        TypeError,
        ValueError,
        LookupError,
        ArithmeticError,
        MemoryError,
    ) as error:
        raise RunError(f"the model of {run} cannot be built: {describe(error)}") from error
    load_into(model, chosen, run)
    return Trained(spec, run, model, spec.parts["task"](), facts, chosen)


def read_spec_of(run: Path, tree: Mapping[str, Any]) -> Spec:
    """Check the config of a run, as it is or with overrides.

    Raises ConfigError; when plugins of the run are not loaded, with nothing but how to give them.
    """
    try:
        return read_spec(tree, Sources(fallback=f"{run}/config.yaml"))
    except ConfigError as error:
        missing = [plugin for plugin in plugins_of(run) if not is_loaded(plugin)]
        if not missing:
            raise
        given = " ".join(f"--plugins {pasted(shorter(plugin))}" for plugin in missing)
        raise ConfigError([f"{run} was trained with plugins: give {given}"]) from error
