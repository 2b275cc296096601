"""Callbacks for generative tasks: what they make, as pictures, and how far it is from the data."""

import torch
from torch import Tensor

from framework import (
    Callback,
    Context,
    Every,
    PositiveInt,
    SettingError,
    callbacks,
    is_in_memory,
    seeds,
)
from framework.contracts.model import GenerativeModel
from framework.contracts.state import Cadence
from framework.contracts.task import PictureTask


@callbacks.register("pictures")
class Pictures(Callback):
    """Gives the loggers pictures of what the task makes: reconstructions (each input, then what became of it), samples.

    The inputs are the first ones of the validation split, or of the training split. After a step that validates, the
    pictures are of the weights that were measured: an average's, if the callback that keeps it stands behind this one.
    """

    changes_training = False

    def __init__(self, count: PositiveInt = 16, every: Every = "1epoch"):
        """Say how many.

        Args:
            count: pictures of each kind.
            every: how often.
        """
        self.count, self.cadence = count, Cadence(every)
        self.asked = -1  # the last step after which it was asked whether to show some

    def reset(self) -> None:
        super().reset()
        self.asked = -1

    def on_fit_start(self, trainer: Context) -> None:
        if not isinstance(trainer.task, PictureTask):
            raise SettingError(
                f"callbacks.pictures: {type(trainer.task).__name__} has no pictures to show"
            )

    def on_validation_end(self, trainer: Context) -> None:
        self._show_if_due(trainer)

    def on_step_end(self, trainer: Context) -> None:
        self._show_if_due(trainer)

    def _show_if_due(self, trainer: Context) -> None:
        state = trainer.state
        if self.asked == state.step:
            return
        self.asked = state.step
        if self.cadence.due(state, epoch_end=state.batch == 0):
            self._show(trainer)

    @torch.no_grad()
    def _show(self, trainer: Context) -> None:
        inputs = held_out(trainer, self.count)
        assert isinstance(trainer.task, PictureTask)
        with trainer.precision.inference(trainer.model), seeds.undisturbed():
            shown = trainer.task.pictures(trainer.model, inputs)
        low, high = inputs.min(), inputs.max()
        for tag, pictures in shown.items():
            pictures = ((pictures.float() - low) / (high - low)).clamp(0, 1)
            for logger in trainer.loggers:
                logger.images(tag, as_images(pictures), trainer.state.step)


@callbacks.register("sample_distance")
class SampleDistance(Callback):
    """Logs how samples of the model compare with the validation split, by the distances of their numbers (pixels).

    val/sample_precision is the share of the samples that lie among the inputs, val/sample_coverage the share of the
    inputs that have a sample nearby, nearer than their own fifth neighbour (see `neighbours`): 0.97 for the data's own
    distribution, less for samples that are unlike inputs, or of some kinds alone.

    val/sample_distance is the unbiased estimate of the squared maximum mean discrepancy under a Gaussian kernel
    (Gretton et al. 2012, JMLR 13, equation 3), whose width is the median distance of an input to its nearest one:
    about 0 for samples of the data's own distribution, 2 at most. It tells that samples are too much alike, and is
    blind to samples that are far from all inputs and from each other: these, white noise as well, come to no more
    than the mean similarity of two inputs, 0.07 for pictures of clothes.
    """

    changes_training = False

    def __init__(self, count: PositiveInt = 1000):
        """Say how many.

        Args:
            count: samples, and inputs that they are compared with; the time grows with its square.
        """
        self.count = count

    def on_fit_start(self, trainer: Context) -> None:
        if not isinstance(trainer.model, GenerativeModel):
            raise SettingError(
                f"callbacks.sample_distance: {type(trainer.model).__name__} makes no samples"
            )

    @torch.no_grad()
    def on_validation_end(self, trainer: Context) -> None:
        inputs = held_out(trainer, self.count)
        assert isinstance(trainer.task, PictureTask)
        with trainer.precision.inference(trainer.model), seeds.undisturbed():
            torch.manual_seed(seeds.derive(trainer.seed, "samples"))  # the same draws each time
            made = trainer.task.pictures(trainer.model, inputs)["samples"]
        made, inputs = made.float().flatten(1), inputs.float().flatten(1)
        precision, coverage = neighbours(made, inputs)
        values = {
            "distance": discrepancy(made, inputs),
            "precision": precision,
            "coverage": coverage,
        }
        trainer.log(
            {f"val/sample_{name}": float(value) for name, value in values.items()}
        )  # numbers, to be watched


def held_out(trainer: Context, count: int) -> Tensor:
    """Return the first inputs of the validation split, or of the training split where there is none, on the device."""
    batches = trainer.train_batches if trainer.val_batches is None else trainer.val_batches
    split = batches.split
    if split is not None and is_in_memory(split):
        inputs = split.tensors[0][:count]
        return inputs.to(trainer.device, copy=True)  # a model may change its inputs
    found: list[Tensor] = []
    with seeds.undisturbed():
        for batch in batches.epoch():
            found.append(batch[0].to(trainer.device, copy=True))  # a loader may reuse its memory
            if sum(map(len, found)) >= count:
                break
    return torch.cat(found)[:count]


def as_images(rows: Tensor) -> Tensor:
    """Return rows of any shape as pictures (N, C, H, W): what is no image, as one line of pixels each."""
    return rows if rows.ndim == 4 else rows.flatten(1)[:, None, None]


def discrepancy(made: Tensor, real: Tensor) -> Tensor:
    """Return the unbiased squared maximum mean discrepancy of two samples, (m, D) and (n, D)."""
    among = torch.cdist(real, real)
    nearest = among.clone().fill_diagonal_(torch.inf).min(1).values
    width = nearest.median().square()

    def mean_similarity(distances: Tensor, itself: bool) -> Tensor:
        similar = torch.exp(-distances.square() / (2 * width))
        if not itself:
            return similar.mean()
        return (similar.sum() - similar.diagonal().sum()) / (len(similar) * (len(similar) - 1))

    pairs = mean_similarity(torch.cdist(made, real), itself=False)
    return (
        mean_similarity(torch.cdist(made, made), itself=True)
        + mean_similarity(among, itself=True)
        - 2 * pairs
    )


def neighbours(made: Tensor, real: Tensor, count: int = 5) -> tuple[Tensor, Tensor]:
    """Return precision and coverage of samples, (m, D) and (n, D).

    With the distance from an input to its `count`-th nearest one as a radius: the share of samples within the radius of
    some input (Kynkäänniemi et al. 2019, arXiv:1904.06991), and the share of inputs that have a sample within theirs
    (Naeem et al. 2020, arXiv:2002.09797), 1 - 2^-count for as many samples of the same distribution.
    """
    among = torch.cdist(real, real).fill_diagonal_(torch.inf)
    within = torch.cdist(made, real) <= among.kthvalue(count, 1).values
    return within.any(1).double().mean(), within.any(0).double().mean()
