"""Where names become objects: a checked Spec is built into parts, run in a folder, and read back from one."""

import json
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, seeds
from .batches import count_steps, count_total
from .data import Batch, Data, Loader, check_data
from .errors import BuildError, DataError, FrameworkError, RunError
from .metric import Metric
from .optimizer import build_optimizer
from .plan import Plan, make_plan
from .registry import Maker
from .run import RunFolder, dump, provenance, read_config
from .shapes import dry_run
from .spec import Spec, read_spec
from .status import Status
from .task import Task
from .trainer import Trainer


class Experiment:
    """The objects of a Spec: data, task, metrics, model, optimizer, schedule, trainer.

    Raises DataError or BuildError when parts do not fit each other.
    """

    def __init__(self, spec: Spec):
        self.spec = spec
        self.data = build_data(spec)
        self.task: Task = spec.parts["task"]()
        self.task.check(self.data)
        self.metrics = build_metrics(spec, self.data)
        self.model = build_model(spec, self.data.in_shape, self.data.out_shape)
        check_fit(self.model, self.data)
        self.optimizer = build_optimizer(spec.parts["optimizer"], self.model.parameters())
        self.train_batches = self.batches("train")
        self.schedule = build_schedule(spec, count_steps(self.train_batches, spec.sections["trainer"]["accumulate"]))

    def batches(self, split: str) -> Loader:
        """Return the reader of a split. Raises DataError when the data has none of that name."""
        chosen = getattr(self.data, split, None)
        if chosen is None:
            raise DataError(f"{type(self.data).__name__} has no {split} split")
        return Loader(chosen, **self.spec.sections["loader"], shuffle=split == "train", seed=self.spec.seed)

    def trainer(self, folder: Path | None = None) -> Trainer:
        parts = self.spec.parts
        return Trainer(
            **self.spec.sections["trainer"],
            seed=self.spec.seed,
            callbacks=[*(maker() for maker in parts["callback"]), *([] if folder is None else [Status(folder)])],
            loggers=[maker() for maker in parts["logger"]],
            folder=folder,
        )

    def plan(self) -> Plan:
        """Return what a run would be, without training."""
        limits = self.spec.sections["trainer"]
        steps_per_epoch = count_steps(self.train_batches, limits["accumulate"])
        return make_plan(
            self.model,
            first_batch(self.train_batches),
            steps_per_epoch=steps_per_epoch,
            total_steps=count_total(steps_per_epoch, limits["max_epochs"], limits["max_steps"]),
            task=self.task,
            optimizer=self.optimizer,
            schedule=self.schedule,
            data=self.data,
        )


@dataclass
class Result:
    """What a run came to: its folder, final metrics, and why it ended before its last step, if it did."""

    folder: Path
    metrics: dict[str, float] = field(default_factory=dict)
    stopped: str | None = None
    signal: int | None = None
    seconds: float = 0.0
    steps: int = 0


def train(spec: Spec, experiment: str, overrides: Sequence[str], started: float | None = None) -> Result:
    """Build and run an experiment in a new run folder: fit, then measure the best checkpoint on the test split."""
    started = time.monotonic() if started is None else started
    built = Experiment(spec)
    folder = RunFolder(**spec.sections["run"], experiment=experiment)
    describe_run(folder, built, list(overrides))
    trainer = built.trainer(folder.path)
    has_val = built.data.val is not None
    with trainer, stopping(trainer) as stopped:
        introduce(trainer, built)
        state = trainer.fit(
            built.model,
            built.train_batches,
            val=built.batches("val") if has_val else None,
            task=built.task,
            optimizer=built.optimizer,
            schedule=built.schedule,
            metrics=built.metrics,
        )
        if not stopped and built.data.test is not None:
            load_weights(built.model, folder.path)
            trainer.evaluate(built.batches("test"))
        for logger in trainer.loggers:
            logger.hparams(spec.tree, state.metrics)
    return Result(
        folder.path,
        dict(state.metrics),
        state.stop,
        stopped[0] if stopped else None,
        time.monotonic() - started,
        state.step,
    )


def describe_run(folder: RunFolder, built: Experiment, overrides: list[str]) -> None:
    """Write what the run is made of, before it starts."""
    parts = [maker for made in built.spec.parts.values() for maker in (made if isinstance(made, list) else [made])]
    sources = {str(maker.entry): str(maker.entry.source) for maker in parts if maker is not None}
    facts = {"in_shape": list(built.data.in_shape), "out_shape": list(built.data.out_shape)}
    facts |= {"classes": list(built.data.classes), "data": built.data.facts()}
    folder.write("config.yaml", built.spec.tree)
    folder.write("overrides.yaml", overrides)
    folder.write("facts.json", facts)
    folder.write("provenance.json", provenance(sources) | {"plugins": built.spec.plugins})


def introduce(trainer: Trainer, built: Experiment) -> None:
    """Show the loggers what runs: the config, the layers, the graph."""
    inputs = first_batch(built.train_batches)[0][:2]
    for logger in trainer.loggers:
        logger.text("config", indented(dump("config.yaml", built.spec.tree)))
        logger.text("layers", layers_in_markdown(built.plan()))
        logger.graph(built.model, inputs)


def indented(text: str) -> str:
    """Return a text as a code block of markdown."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def layers_in_markdown(plan: Plan) -> str:
    rows = ["| layer | type | output | parameters | FLOPs |", "|---|---|---|--:|--:|"]
    for layer in plan.layers:
        shape = " × ".join(map(str, layer.out_shape))
        rows.append(f"| {layer.name} | {layer.type} | {shape} | {layer.parameters:,} | {layer.flops:,} |")
    return "\n".join([*rows, f"| total | | | {plan.parameters:,} | {plan.flops:,} |"])


def build_data(spec: Spec) -> Data:
    data = spec.parts["data"]()
    check_data(data)
    return data


def build_metrics(spec: Spec, data: Data) -> list[Metric]:
    """Build the metrics. Raises DataError for one that does not measure the data's kind of target."""
    metrics = [maker() for maker in spec.parts["metric"]]
    for maker, metric in zip(spec.parts["metric"], metrics, strict=True):
        if data.target not in metric.targets:
            fitting = [e.name for e in all_metrics(maker) if data.target in e.part.targets]  # type: ignore[attr-defined]
            raise DataError(
                f"metrics={maker.entry.name}: it measures {' or '.join(metric.targets)} targets, but "
                f"{type(data).__name__} has {data.target} targets: choose from {', '.join(fitting)}"
            )
    return metrics


def all_metrics(maker: Maker) -> Iterator[Any]:
    from .registry import Registry

    return (entry for entry in Registry.every[maker.entry.kind.name] if isinstance(entry.part, type))


def build_model(spec: Spec, in_shape: Sequence[int], out_shape: Sequence[int]) -> nn.Module:
    """Build the model from the seed's own stream, and fill its weights if an initializer is chosen."""
    torch.manual_seed(seeds.derive(spec.seed, "init"))
    model = spec.parts["model"](tuple(in_shape), tuple(out_shape))
    if spec.parts["initializer"] is not None:
        for weight in model.parameters():
            if weight.ndim >= 2:  # the rest are biases and scales of norms
                spec.parts["initializer"](weight)
    return model


def check_fit(model: nn.Module, data: Data) -> None:
    """Run one training sample through the model. Raises BuildError when the output has not the targets' shape."""
    sample = torch.as_tensor(data.train[0][0]).unsqueeze(0)
    try:
        shape = tuple(dry_run(model, sample).shape[1:])
    except FrameworkError:
        raise
    except Exception as error:
        raise BuildError(f"{type(model).__name__} cannot take a sample of {type(data).__name__}: {error}") from error
    if shape != tuple(data.out_shape):
        raise BuildError(f"{type(model).__name__} gives outputs of shape {shape}; the data needs {data.out_shape}")


def build_schedule(spec: Spec, steps_per_epoch: int) -> Any:
    if spec.parts["scheduler"] is None:
        return None
    limits = spec.sections["trainer"]
    return spec.parts["scheduler"](count_total(steps_per_epoch, limits["max_epochs"], limits["max_steps"]))


def first_batch(batches: Loader) -> Batch:
    """Return the first batch of the first epoch, without moving any generator."""
    with seeds.undisturbed():
        return next(iter(batches.epoch()))


@contextmanager
def stopping(trainer: Trainer) -> Iterator[list[int]]:
    """On the first SIGINT or SIGTERM, let the run finish its step and its checkpoint; a second ends it at once."""
    got: list[int] = []

    def stop(number: int, frame: Any) -> None:
        if got:
            raise KeyboardInterrupt
        got.append(number)
        trainer.state.stop = f"{signal.Signals(number).name}"

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, stop)
    except ValueError:  # not the main thread: its owner handles signals
        pass
    try:
        yield got
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def load_weights(model: nn.Module, run: Path, which: str = "best") -> Path | None:
    """Load the best (or last, or a named) checkpoint's weights; returns which one, None when there is none."""
    folder = run / "checkpoints"
    chosen = Path(which) if which not in ("best", "last") else folder / "best"
    if which == "last" or (which == "best" and not chosen.exists()):
        newest, _ = checkpoint.newest(folder) if folder.is_dir() else (None, [])
        if newest is None:
            return None
        chosen = newest
    weights, _ = checkpoint.load(chosen.resolve())
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise RunError(f"{chosen} does not fit the model of {run}: {' '.join(str(error).split())[:300]}") from error
    return chosen


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
        chosen = getattr(data, split, None)
        if chosen is None:
            raise DataError(f"{type(data).__name__} has no {split} split")
        loader = Loader(chosen, **self.spec.sections["loader"], seed=self.spec.seed)
        metrics = build_metrics(self.spec, data)
        return self.trainer().evaluate(loader, model=self.model, task=self.task, metrics=metrics, name=split)

    def read_inputs(self, file: Path) -> Tensor:
        """Read a file of inputs as the run's data set reads it. Raises DataError when it does not fit the model."""
        if not file.exists():
            raise DataError(f"there is no file {file}")
        inputs = self.spec.parts["data"].entry.part.read_inputs(file, self.facts["data"])
        if list(inputs.shape[1:]) != self.facts["in_shape"]:
            raise DataError(f"{file}: a row has shape {tuple(inputs.shape[1:])}; the model takes {self.facts['in_shape']}")
        return inputs

    def predict(self, inputs: Tensor) -> dict[str, Any]:
        """Return the task's predictions, columns by name."""
        outputs = self.trainer().predict(inputs, model=self.model, batch_size=self.spec.sections["loader"]["eval_batch_size"])
        return self.task.predict(outputs)


def open_run(run: Path, which: str = "best") -> Trained:
    """Read a run folder back. Raises RunError when it is none or has no checkpoint, ConfigError when a part is gone."""
    spec = read_spec(read_config(run), lambda path: f"{run}/config.yaml")
    try:
        facts = json.loads((run / "facts.json").read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{run}/facts.json cannot be read: {error}") from error
    model = build_model(spec, facts["in_shape"], facts["out_shape"])
    chosen = load_weights(model, run, which)
    if chosen is None:
        raise RunError(f"{run} has no checkpoint: was it trained with callbacks.checkpoint?")
    return Trained(spec, run, model, spec.parts["task"](), facts, chosen)
