"""Repeat the step of a run whose loss or gradient was not finite, and find where that began.

The order of the samples and the random numbers of a step depend only on the seed and the step, so
the steps since the last checkpoint can be repeated exactly, and checked one by one. The repetition
only reads the folder of the run.
"""

import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from framework.composition.spec import Spec
from framework.contracts.callback import changes_training
from framework.contracts.strategy import Strategy
from framework.errors import CheckpointError, RunError, short
from framework.errors.terminal import print_message
from framework.experiment.experiment import Experiment
from framework.experiment.resumption.resume import threads_in
from framework.experiment.steering import OptimizerSettings, Steering
from framework.experiment.trained.load import read_spec_of
from framework.experiment.weights import initialize_from
from framework.runs import checkpoint
from framework.runs.file_names import NON_FINITE
from framework.runs.requests import EVENTS
from framework.runs.run_files import RunFiles
from framework.runtime.threads import intra_op_threads
from framework.system.files import read_bytes, read_json, write_file
from framework.training.trainer import Trainer

from .finder import Finder, Finding, Found
from .saved_step import write_step

MOST_RECORD = 2**20  # bytes
EXACT = {"compile": "off", "cuda_graph": "off", "profile": False, "devices": None}


@dataclass(frozen=True)
class Record:
    """The steps of which one was not finite: a single one, unless the check was deferred.

    Attributes:
        first: the number of the first step, from 1.
        last: that of the last one.
    """

    first: int
    last: int


@dataclass
class Replay:
    """The result of `replay`.

    Attributes:
        run: the folder of the run.
        start: the step of the checkpoint from which the run was repeated; 0 without one.
        last: the last step that was repeated.
        finding: None if no step was found that is not finite.
        notes: differences between the run and its repetition.
        files: the files that repeat the step alone.
    """

    run: Path
    start: int
    last: int
    finding: Finding | None = None
    notes: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)


def replay(run: RunFiles, output: Path | None = None) -> Replay:
    """Repeat a run from its last checkpoint to the step that was not finite, and examine it.

    Args:
        run: the files of the run.
        output: the folder for the files that repeat the step alone; None to write none.

    Raises:
        RunError: the run was not stopped by a step that is not finite.
        FrameworkError: the run cannot be repeated.
    """
    record = read_record(run)
    spec = read_spec_of(run.path, run.config)
    start, state, threads = last_state(run, record)
    first = record.first if record is not None else start + 1
    last = record.last if record is not None else steps_of(run) + 1
    if last <= start:
        raise RunError(f"{run.path} has not been stopped by a step that is not finite")
    result = Replay(run.path, start, last, notes=list(differences(run, spec)))
    spec = replace(spec, sections=spec.sections | {"trainer": spec.sections["trainer"] | EXACT})
    print_message(f"repeating steps {start + 1:,} to {last:,} of {run.path}")
    built = Experiment(spec)
    if state is None and spec.init_from is not None:
        print_message(initialize_from(built.model, spec.init_from))
    batch_size = spec.sections["loader"]["batch_size"]
    finder = Finder(first, last, batch_size, spec.sections["trainer"]["shards"])
    with TemporaryDirectory(prefix="framework-replay-") as name:
        folder = Path(name)
        copy_needed_files(run, folder, spec)
        trainer = make_trainer(built, finder, folder)
        with intra_op_threads(threads or built.threads()), finder.recording(built.task):
            try:
                with trainer:
                    trainer.fit(**built.fit_arguments(), resume=state)
            except Found:
                pass
    result.finding = finder.finding
    if finder.call is not None and output is not None:
        result.files = write_step(output, run, spec, finder, finder.call)
    return result


def read_record(run: RunFiles) -> Record | None:
    """Return the steps that the callback `non_finite` has recorded; None without a record.

    A record does not count if the run has failed at another step: it is that of an earlier failure,
    after which the run was resumed.

    Raises:
        RunError: the run has not failed, or the record is damaged.
    """
    if run.state != "failed":
        raise RunError(
            f"{run.path} has not been stopped by a step that is not finite: it is {run.state}"
        )
    file = run.path / NON_FINITE
    try:
        content = read_json(run.path, NON_FINITE, MOST_RECORD)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"{file} cannot be read: {error.strerror}") from error
    recorded = content if isinstance(content, dict) else {}
    first = recorded.get("first")
    last = recorded.get("last")
    if type(first) is not int or type(last) is not int or not 1 <= first <= last:
        raise RunError(f"{file}: expected first and last step, got {short(content)}")
    is_of_this_failure = first - 1 <= steps_of(run) <= last
    return Record(first, last) if is_of_this_failure else None


def steps_of(run: RunFiles) -> int:
    """Return the number of steps that a run has done."""
    step = run.status.get("step")
    return step if type(step) is int and step >= 0 else 0


def last_state(
    run: RunFiles, record: Record | None
) -> tuple[int, dict[str, Any] | None, int | None]:
    """Return the step, the state and the number of threads of the last good earlier checkpoint.

    Without one it is step 0, and no state: the run is repeated from its beginning.
    """
    checkpoints = run.path / "checkpoints"
    checkpoint.refuse_links(checkpoints)
    saved = checkpoint.listed(checkpoints) if checkpoints.is_dir() else []
    for path in reversed(saved):
        if record is not None and checkpoint.step_of(path) >= record.first:
            continue
        try:
            if checkpoint.verify(path)["nan"]:
                continue
            weights, training = checkpoint.load(path)
            threads = threads_in(checkpoint.read_manifest(path))
        except CheckpointError as error:
            print_message(f"skipped {error}")
            continue
        return checkpoint.step_in(path), training | {"model": weights}, threads
    return 0, None, None


def differences(run: RunFiles, spec: Spec) -> Iterator[str]:
    """Yield what the repetition does differently from the run."""
    trainer = spec.sections["trainer"]
    changed = [f"trainer.{name}={trainer[name]}" for name in ("compile", "cuda_graph")]
    for text in changed:
        if not text.endswith("=off"):
            yield f"{text} is off in the repetition, so that each layer can be checked"
    several = run.processes is not None and run.processes > 1
    if several and trainer["shards"] is None:  # with shards, their number does not matter
        yield f"the run had {run.processes} processes, the repetition has one: sums differ by bits"
    version = run.provenance.get("packages")
    before = version.get("torch") if isinstance(version, dict) else None
    if before is not None and before != torch.__version__:
        yield f"torch is {torch.__version__}, was {short(before, quote=False)}"


def copy_needed_files(run: RunFiles, folder: Path, spec: Spec) -> None:
    """Copy what the repeated steps read: changes by `framework tell`, and a good checkpoint."""
    with suppress(FileNotFoundError):
        write_file(folder, EVENTS, read_bytes(run.path, EVENTS))
    rewinds = [
        maker for maker in spec.parts["callback"] if maker.settings.get("policy") == "rewind"
    ]
    source = run.path / "checkpoints"
    if rewinds and source.is_dir():
        newest, _ = checkpoint.newest(source)
        if newest is not None:
            shutil.copytree(newest, folder / "checkpoints" / newest.name, symlinks=True)


def make_trainer(built: Experiment, finder: Finder, folder: Path) -> Trainer:
    """Return a trainer with the callbacks that change the training, and no loggers."""
    makers = [m for m in built.spec.parts["callback"] if changes_training(m.entry.part)]
    decays_all = built.spec.sections["parameters"]["decay"] == "all"
    settings = OptimizerSettings(built.spec.parts["optimizer"], decays_all)
    callbacks = [maker() for maker in makers]
    steering = Steering(settings, built.status)
    return Trainer(
        **built.spec.sections["trainer"],
        seed=built.spec.seed,
        strategy=Strategy(),
        callbacks=[finder, *built.transforms, *callbacks, steering],
        folder=folder,
    )
