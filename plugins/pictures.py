"""Callbacks for generative tasks: what they make, as pictures, and how far it is from the data."""

import torch
from torch import Tensor

from framework import Callback, Every, PositiveInt, Trainer, callbacks, seeds
from framework.data import TensorSplit
from framework.errors import SettingError
from framework.state import Cadence


@callbacks.register("pictures")
class Pictures(Callback):
    """Gives the loggers pictures of what the task makes: reconstructions (each input, then what became of it), samples.

    The inputs are the first ones of the validation split, or of the training split.
    """

    changes_training = False

    def __init__(self, count: PositiveInt = 16, every: Every = "1epoch"):
        """Say how many.

        Args:
            count: pictures of each kind.
            every: how often.
        """
        self.count, self.cadence = count, Cadence(every)

    def on_fit_start(self, trainer: Trainer) -> None:
        if not hasattr(trainer.task, "pictures"):
            raise SettingError(f"callbacks.pictures: {type(trainer.task).__name__} has no pictures to show")

    def on_step_end(self, trainer: Trainer) -> None:
        if self.cadence.due(trainer.state, epoch_end=trainer.state.batch == 0):
            self._show(trainer)

    @torch.no_grad()
    def _show(self, trainer: Trainer) -> None:
        inputs = held_out(trainer, self.count)
        with trainer.precision.inference(trainer.model), seeds.undisturbed():
            shown = trainer.task.pictures(trainer.model, inputs)  # type: ignore[attr-defined]
        low, high = inputs.min(), inputs.max()
        for tag, pictures in shown.items():
            pictures = ((pictures.float() - low) / (high - low)).clamp(0, 1)
            for logger in trainer.loggers:
                logger.images(tag, as_images(pictures), trainer.state.step)


@callbacks.register("sample_distance")
class SampleDistance(Callback):
    """Logs val/sample_distance: how far samples of the model are from the validation split, by the mean discrepancy.

    It is the unbiased estimate of the squared maximum mean discrepancy under a Gaussian kernel (Gretton et al. 2012,
    JMLR 13, equation 3), whose width is the median distance of an input to its nearest one: about 0 for samples of the
    data's own distribution, 2 at most. (With the median of all distances it hardly tells pictures from a Gaussian of
    the same mean and covariance.)
    """

    changes_training = False

    def __init__(self, count: PositiveInt = 1000):
        """Say how many.

        Args:
            count: samples, and inputs that they are compared with; the time grows with its square.
        """
        self.count = count

    def on_fit_start(self, trainer: Trainer) -> None:
        if not hasattr(trainer.model, "sample"):
            raise SettingError(f"callbacks.sample_distance: {type(trainer.model).__name__} makes no samples")

    @torch.no_grad()
    def on_validation_end(self, trainer: Trainer) -> None:
        inputs = held_out(trainer, self.count)
        with trainer.precision.inference(trainer.model), seeds.undisturbed():
            torch.manual_seed(seeds.derive(trainer.seed, "samples"))  # the same draws each time
            made = trainer.task.pictures(trainer.model, inputs)["samples"]  # type: ignore[attr-defined]
        distance = discrepancy(made.float().flatten(1), inputs.float().flatten(1))
        trainer.log({"val/sample_distance": float(distance)})  # a number at once: callbacks after this one may watch it


def held_out(trainer: Trainer, count: int) -> Tensor:
    """Return the first inputs of the validation split, or of the training split where there is none, on the device."""
    batches = trainer.val_batches or trainer.train_batches
    split = getattr(batches, "split", None)
    if isinstance(split, TensorSplit):
        return split.tensors[0][:count].to(trainer.device)
    found: list[Tensor] = []
    with seeds.undisturbed():
        for batch in batches.epoch():
            found.append(batch[0].to(trainer.device))
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
    return mean_similarity(torch.cdist(made, made), itself=True) + mean_similarity(among, itself=True) - 2 * pairs
