"""Evaluation of a trained run with details: its worst samples and its curves.

The results are files in the folder `evaluation` of the run, and records for TensorBoard.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from framework.contracts.logger import Logger
from framework.data.dataset import Data
from framework.errors import wrong_option
from framework.errors.terminal import note
from framework.experiment.build import build_loader
from framework.experiment.trained.load import Trained, facts_that_fit
from framework.registry.kinds import loggers
from framework.runs import checkpoint
from framework.runs.run_files import RunFiles, number_in
from framework.runs.run_state import is_written
from framework.runtime.display.drawing import encode_png, side_by_side
from framework.system.files import make_folder, write_file

from .curves import DecisionCurves, compute_curves, curves_csv, draw_curves, positives, scores
from .decisions import Decision, read_decisions
from .worst import MOST_SHOWN, WorstSamples, describe, find_worst, show_function

FOLDER = "evaluation"  # in the folder of a run
MOST_PR_CURVES = 20  # cards on the page of TensorBoard
MOST_STEP = 2**63 - 2  # in a file of TensorBoard, which has steps of 64 bits, and one more


def worst_of_run(trained: Trained, data: Data, split: str, count: int) -> WorstSamples:
    """Return the samples of a split with the highest loss.

    Args:
        trained: an open run.
        data: its data.
        split: the name of the split.
        count: how many samples, at least 1.

    Raises:
        FrameworkError: there are not so many samples, or a sample has no loss of its own.
    """
    loader = build_loader(trained.spec, trained.model, data, split)
    samples = len(loader.split)
    if count > samples:
        raise wrong_option("--worst", count, f"at most {samples}, the number of samples")
    evaluator = trained.trainer()
    with evaluator.reading(loader, model=trained.model, task=trained.task) as batches:
        found = find_worst(evaluator, batches, count)
    part = trained.spec.parts["data"].entry.part
    with facts_that_fit(trained.run):
        return describe(
            found,
            trained.task,
            trained.facts["classes"],
            trained.scale,
            show_function(part, trained.facts["data"]),
            partial(data.sample_names, split),
        )


def decisions_of_run(trained: Trained, data: Data, split: str) -> Decision:
    """Return the probabilities and true classes of a split.

    Raises:
        DataError: the task has neither classes nor labels.
    """
    loader = build_loader(trained.spec, trained.model, data, split)
    evaluator = trained.trainer()
    with evaluator.reading(loader, model=trained.model, task=trained.task) as batches:
        return read_decisions(evaluator, batches)


def curves_of_run(trained: Trained, decision: Decision) -> DecisionCurves:
    """Return the curves of decisions, with the names of the classes of the run."""
    return compute_curves(decision, trained.facts["classes"])


def save_worst(trained: Trained, worst: WorstSamples, split: str) -> list[Path]:
    """Write the samples as JSON, and images of them as a PNG; return the files."""
    written = [write(trained.run, f"worst-{split}.json", as_json(worst.rows()))]
    picture = worst.picture()
    if picture is not None:
        written.append(write(trained.run, f"worst-{split}.png", encode_png(picture[0])))
    return written


def save_curves(trained: Trained, curves: DecisionCurves, split: str) -> list[Path]:
    """Write the points as CSV and JSON, and the charts as a PNG; return the files."""
    content = curves.summary() | {"curves": asdict(curves)}
    picture = side_by_side(draw_curves(curves))
    return [
        write(trained.run, f"curves-{split}.png", encode_png(picture[0])),
        write(trained.run, f"curves-{split}.csv", curves_csv(curves)),
        write(trained.run, f"curves-{split}.json", as_json(content)),
    ]


def write(run: Path, name: str, content: bytes | str) -> Path:
    """Write a file into the folder of results of a run; return its path.

    Raises:
        RunError: it cannot be written, or the folder is a link.
    """
    make_folder(run / FOLDER)
    write_file(run, f"{FOLDER}/{name}", content)  # refuses a folder that is a link
    return run / FOLDER / name


def as_json(content: Any) -> str:
    """Return JSON, in which numbers that are not finite are null."""
    return json.dumps(finite(content), indent=2, ensure_ascii=False, default=str) + "\n"


def finite(content: Any) -> Any:
    """Return plain types in which numbers that are not finite are None."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return content


@contextmanager
def run_logger(trained: Trained) -> Iterator[tuple[Logger, int] | None]:
    """Open the TensorBoard logger on the folder of a run; yield it with the step to record at.

    Its new event file discards nothing of the run, and a resumed run discards of it, as of its own
    files, what is after the step that it resumes from. While another process trains the run, no
    logger is opened, because TensorBoard would read its event file no further; None then.
    """
    run = trained.run
    if is_written(run):
        note(f"{run} is being trained: the results are files, but not in TensorBoard")
        yield None
        return
    if "tensorboard" not in loggers:
        yield None
        return
    step = checkpoint.step_in(checkpoint.target_of(trained.checkpoint))
    metrics = ["loss", *(maker().name for maker in trained.spec.parts["metric"])]
    logger: Logger = loggers.maker("tensorboard")()
    logger.open(run, max(step, last_step(run)), metrics)
    try:
        yield logger, step
    finally:
        logger.close()


def last_step(run: Path) -> int:
    """Return the last step that a run has recorded, at most `MOST_STEP`."""
    files = RunFiles(run)
    last = int(number_in(files.status, "step") or 0)
    for row in files.rows():
        last = max(last, row.step)
    for each in checkpoint.listed(run / "checkpoints"):
        last = max(last, checkpoint.step_of(each))
    return min(last, MOST_STEP)


def log_worst(logger: Logger, worst: WorstSamples, tag: str, step: int) -> None:
    """Record samples: images with captions, sounds, and a table of everything else.

    Args:
        logger: the logger.
        worst: the samples.
        tag: such as "worst" or "test/worst".
        step: the optimizer steps done.
    """
    shown = worst.shown
    # TensorBoard shows a tag on one page only
    logger.text(f"{tag}/table", worst.markdown(), step)
    picture = worst.picture()
    if picture is not None:
        logger.images(f"{tag}/images", picture, step)
    if shown.waves is not None and len(worst):
        waves = nn.utils.rnn.pad_sequence(list(shown.waves[:MOST_SHOWN]), batch_first=True)
        logger.audio(f"{tag}/sounds", waves, shown.rate, step)


def log_curves(
    logger: Logger, curves: DecisionCurves, decision: Decision, tag: str, step: int
) -> None:
    """Record the charts as three images, and the curves of precision and recall of the classes.

    Args:
        logger: the logger.
        curves: of all classes.
        decision: that they are computed from.
        tag: such as "curves" or "test/curves".
        step: the optimizer steps done.
    """
    logger.images(tag, torch.cat(draw_curves(curves)), step)
    for index, each in enumerate(curves.classes[:MOST_PR_CURVES]):
        if each.positives:
            labels = positives(decision, index)
            logger.pr_curve(f"{tag}/{each.name}", labels, scores(decision, index), step)
