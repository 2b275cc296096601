"""Callbacks for generative tasks: generated images, and their distance from the data."""

from typing import Annotated

import torch
from torch import Tensor

from framework import (
    Callback,
    Context,
    Every,
    PositiveInt,
    Range,
    SettingError,
    callbacks,
    check_has_validation,
    check_read_again,
    drawing,
    read_first_samples,
    seeds,
)
from framework.contracts.model import GenerativeModel
from framework.contracts.periodic_callback import PeriodicCallback
from framework.contracts.task import PictureTask

from .samples import measured_batches

NEIGHBORS = 5  # of an input, to define its neighborhood


@callbacks.register("pictures")
class Pictures(PeriodicCallback):
    """Logs images of the task: reconstructions (each input before its reconstruction) and samples.

    Each kind is one image with all of them.

    The inputs are the first ones of the validation split, or of the training split without one. In
    a step with a validation, the images come from the validated weights: the average, if the
    callback that averages comes after this one.

    Args:
        count: images of each kind.
        every: how often to log them.
    """

    def __init__(self, count: PositiveInt = 16, every: Every = "1epoch"):
        super().__init__(every)
        self.count = count

    def on_fit_start(self, trainer: Context) -> None:
        if not isinstance(trainer.task, PictureTask):
            name = type(trainer.task).__name__
            raise SettingError(f"callbacks.pictures: task {name} generates no images")
        check_read_again(measured_batches(trainer), "callbacks.pictures")

    def cost(self) -> str:
        return f"runs the model on {self.count:,} samples, {self.cadence}"

    def on_validation_end(self, trainer: Context) -> None:
        self.show_if_due(trainer)

    def on_step_end(self, trainer: Context) -> None:
        self.show_if_due(trainer)

    @torch.no_grad()
    def show(self, trainer: Context) -> None:
        inputs = held_out(trainer, self.count)
        assert isinstance(trainer.task, PictureTask)
        with trainer.precision.inference(trainer.model), seeds.undisturbed():
            rows_by_tag = trainer.strategy.forward(trainer.task.pictures, trainer.model, inputs)
        low = inputs.min()
        high = inputs.max()
        for tag, rows in rows_by_tag.items():
            scaled = (rows.float() - low) / (high - low).clamp(min=1e-6)
            images = as_images(scaled.clamp(0, 1)).cpu()
            image = drawing.captioned(images, [""] * len(images))
            for logger in trainer.loggers:
                logger.images(tag, image, trainer.state.step)


@callbacks.register("sample_distance")
class SampleDistance(Callback):
    """Logs the distance between samples of the model and the validation split, by their numbers.

    val/sample_precision is the share of samples that lie among the inputs. val/sample_coverage is
    the share of inputs with a sample that is nearer than their own fifth neighbor (see
    `precision_and_coverage`): 0.97 for the distribution of the data, less if samples are unlike
    inputs or lack some kinds of inputs.

    val/sample_distance is the unbiased estimate of the squared maximum mean discrepancy with a
    Gaussian kernel (Gretton et al. 2012, JMLR 13, equation 3); the kernel's width is the median
    distance between an input and its nearest one. It is about 0 for the distribution of the data,
    and at most 2. It detects samples that are too similar to each other. It does not detect samples
    that are far from all inputs and from each other, such as white noise: their distance is at most
    the mean similarity of two inputs, 0.07 for images of clothes.

    Args:
        count: number of samples, and of inputs to compare them with; the time grows with its
            square.
    """

    changes_training = False

    def __init__(self, count: Annotated[int, Range("[6, inf)")] = 1000):
        self.count = count

    def on_fit_start(self, trainer: Context) -> None:
        if not isinstance(trainer.model, GenerativeModel):
            name = type(trainer.model).__name__
            raise SettingError(f"callbacks.sample_distance: model {name} generates no samples")
        check_has_validation(trainer.val_batches, "callbacks.sample_distance")
        inputs = len(held_out(trainer, NEIGHBORS + 1))
        if inputs <= NEIGHBORS:
            raise SettingError(
                f"callbacks.sample_distance: expected at least {NEIGHBORS + 1} samples in the "
                f"validation split, got {inputs}"
            )

    def cost(self) -> str:
        return f"runs the model on {self.count:,} samples, in each validation"

    @torch.no_grad()
    def on_validation_end(self, trainer: Context) -> None:
        inputs = held_out(trainer, self.count)
        assert isinstance(trainer.task, PictureTask)
        with trainer.precision.inference(trainer.model), seeds.undisturbed():
            torch.manual_seed(seeds.derive(trainer.seed, "samples"))  # the same draws each time
            rows = trainer.strategy.forward(trainer.task.pictures, trainer.model, inputs)
        samples = rows["samples"].float().flatten(1)
        inputs = inputs.float().flatten(1)
        precision, coverage = precision_and_coverage(samples, inputs)
        # numbers, not tensors: a later callback may monitor them in this event
        trainer.log(
            {
                "val/sample_distance": float(discrepancy(samples, inputs)),
                "val/sample_precision": float(precision),
                "val/sample_coverage": float(coverage),
            }
        )


def held_out(trainer: Context, count: int) -> Tensor:
    """Return the first inputs of the validation split, or of the training split without one."""
    batch = read_first_samples(measured_batches(trainer), count, trainer.device)
    return trainer.task.fields.only_input(batch)


def as_images(rows: Tensor) -> Tensor:
    """Return rows of any shape as images (N, C, H, W); a row of numbers as a line of pixels."""
    return rows if rows.ndim == 4 else rows.flatten(1)[:, None, None]


def discrepancy(samples: Tensor, inputs: Tensor) -> Tensor:
    """Return the unbiased squared maximum mean discrepancy of samples (m, D) and inputs (n, D)."""
    input_distances = torch.cdist(inputs, inputs)
    nearest = input_distances.clone().fill_diagonal_(torch.inf).min(1).values
    width = nearest.median().square()

    def similarities(distances: Tensor) -> Tensor:
        return torch.exp(-distances.square() / (2 * width))

    def mean_of_pairs(similar: Tensor) -> Tensor:
        """Return the mean without the diagonal, where a row is compared with itself."""
        return (similar.sum() - similar.diagonal().sum()) / (len(similar) * (len(similar) - 1))

    between = similarities(torch.cdist(samples, inputs)).mean()
    among_samples = mean_of_pairs(similarities(torch.cdist(samples, samples)))
    among_inputs = mean_of_pairs(similarities(input_distances))
    return among_samples + among_inputs - 2 * between


def precision_and_coverage(
    samples: Tensor, inputs: Tensor, count: int = NEIGHBORS
) -> tuple[Tensor, Tensor]:
    """Return precision and coverage of samples (m, D) and inputs (n, D).

    The radius of an input is the distance to its `count`-th nearest one. Precision is the share of
    samples within the radius of some input (Kynkäänniemi et al. 2019, arXiv:1904.06991). Coverage
    is the share of inputs with a sample within their radius (Naeem et al. 2020, arXiv:2002.09797):
    1 - 2^-count for as many samples of the same distribution.
    """
    input_distances = torch.cdist(inputs, inputs).fill_diagonal_(torch.inf)
    radius = input_distances.kthvalue(count, 1).values
    within = torch.cdist(samples, inputs) <= radius
    return within.any(1).double().mean(), within.any(0).double().mean()
