"""Tasks that learn from more, or from less, than labels: two views of an input, a teacher, a second goal."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from framework import (
    Augmentation,
    Batch,
    Callback,
    Context,
    Data,
    DataError,
    Fraction,
    Loss,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    SettingError,
    Shape,
    Step,
    Target,
    Task,
    callbacks,
    check_read_again,
    did_you_mean,
    seeds,
    tasks,
)
from framework.contracts.loss import ignored_index, without_ignored
from framework.contracts.task import check_tensor_output

from .supervised import Classification


@tasks.register("contrastive", aliases=["simclr"])
class Contrastive(Task):
    """Find the other view of an input among those of a batch (SimCLR: Chen et al. 2020, arXiv:2002.05709).

    The model's outputs are the embeddings; labels are not looked at. Logged beside the loss is `found`: how often an
    embedding's nearest one is that of the other view. Evaluation draws its views from a generator of its own.
    The loss compares the samples of a batch with each other. So batches cannot be split by
    `trainer.micro_batch`, and with `trainer.accumulate` samples of different batches are not compared.
    """

    splits_batches = False

    def __init__(
        self,
        views: list[Augmentation] = ("resized_crop", "flip", "brightness_contrast"),  # type: ignore[assignment]
        dimensions: PositiveInt = 64,
        temperature: PositiveFloat = 0.5,
    ):
        """Say how the views come about.

        Args:
            views: transforms that make a view of an input, in this order.
            dimensions: of the embeddings, which are the model's outputs.
            temperature: divides the cosine similarities.
        """
        self.views, self.dimensions, self.temperature = list(views), dimensions, temperature
        self.made: list[Any] | None = None

    def targets_of(self, data: Data) -> tuple[Target, Shape]:
        return "value", (self.dimensions,)

    def step(self, model: nn.Module, batch: Batch) -> Step:
        inputs = batch[0]
        with torch.random.fork_rng(enabled=not model.training):
            if not model.training:
                torch.manual_seed(0)
            both = torch.cat([self.view(inputs), self.view(inputs)])
        outputs = model(both)
        check_tensor_output(model, outputs)
        loss, found = contrast(outputs, self.temperature)
        return Step(loss, outputs, torch.zeros_like(outputs), {"found": found})

    def pictures(self, model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
        """Return what a person should see: two views of each input, side by side."""
        return {"views": torch.stack([self.view(inputs), self.view(inputs)], 1).flatten(0, 1)}

    def view(self, inputs: Tensor) -> Tensor:
        if self.made is None:
            shape = tuple(inputs.shape[1:])
            self.made = [view(shape, (1,)) for view in self.views]
        batch: Batch = (inputs, torch.zeros(len(inputs), dtype=torch.long, device=inputs.device))
        with torch.no_grad():
            for view in self.made:
                batch = view(batch)
        return batch[0]


def contrast(embeddings: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the mean NT-Xent loss (Chen et al. 2020, equation 1), and the share whose nearest is the other view.

    embeddings: (2 n, D); row i and row i + n are views of one input.
    """
    unit = F.normalize(embeddings.float(), dim=1)
    similar = unit @ unit.T / temperature
    similar = similar.masked_fill(
        torch.eye(len(similar), dtype=torch.bool, device=similar.device), -math.inf
    )
    other = torch.arange(len(similar), device=similar.device).roll(len(similar) // 2)
    return F.cross_entropy(similar, other), (similar.argmax(1) == other).float().mean()


@tasks.register("distillation")
class Distillation(Classification):
    """Classification with a teacher: T² KL(teacher ‖ student) of outputs softened by T, beside the loss of the labels
    (Hinton et al. 2015, arXiv:1503.02531).

    Logged beside the loss: `distillation`, the teacher's part of it. Class weights and ignored targets of the loss
    weight the samples of both parts.
    """

    def __init__(
        self,
        teacher: Path | None = None,
        temperature: PositiveFloat = 4.0,
        weight: Fraction = 0.9,
        loss: Loss = "cross_entropy",
    ):
        """Say who teaches.

        Args:
            teacher: the run folder of a trained classifier of the same inputs and classes.
            temperature: T, which softens the outputs of both.
            weight: of the teacher's part; the labels have the rest.
            loss: of logits and class indices.
        """
        super().__init__(loss)
        self.path, self.temperature, self.weight = teacher, temperature, weight
        self.teacher: nn.Module | None = None

    def check(self, data: Data) -> None:
        super().check(data)
        trained = self.read()
        shape, classes = tuple(trained.facts["in_shape"]), trained.facts["classes"]
        if shape != tuple(data.in_shape) or list(classes) != list(data.classes):
            raise DataError(
                f"task.teacher={self.path}: it takes {shape} and knows the classes {', '.join(classes)}; "
                f"{type(data).__name__} has {tuple(data.in_shape)} and {', '.join(data.classes)}"
            )
        self.teacher = trained.model.eval().requires_grad_(False)

    def read(self) -> Any:
        from framework import open_run  # here: only who trains so needs it

        if self.path is None:
            raise SettingError(
                "distillation needs a teacher: task.teacher=RUN, the folder of a trained classifier"
            )
        return open_run(self.path)

    def step(self, model: nn.Module, batch: Batch) -> Step:
        step = super().step(model, batch)
        if self.teacher is None:
            self.teacher = self.read().model.eval().requires_grad_(False)
        with torch.no_grad():
            taught = self.teacher.to(batch[0].device)(batch[0])
        logarithms = (each / self.temperature for each in (step.outputs, taught))
        student, teacher = (each.float().log_softmax(1) for each in logarithms)
        weights = self.item_weights(batch[1])
        if weights is None:
            distance = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        else:
            distances = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
            distance = weighted_mean(distances, weights)
        distance = self.temperature**2 * distance
        loss = (1 - self.weight) * step.loss + self.weight * distance
        return step._replace(loss=loss, values={"distillation": distance})


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Return the mean of values by their weights; 0 when all weights are 0."""
    weights = weights.reshape(values.shape)
    total = weights.sum()
    return (values * weights).sum() / torch.where(total == 0, 1, total)


@tasks.register("multi_task", aliases=["multitask"])
class MultiTask(Classification):
    """Two goals at once: the class, and the input itself, each with a weight (Caruana 1997).

    The model's outputs are the logits of the classes, and behind them the numbers of the input, flat; metrics see the
    logits. Logged beside the loss: `classification` and `reconstruction` (mean squared error), before their weights.
    Class weights and ignored targets of the loss weight the samples of both parts.
    """

    def __init__(
        self,
        classification: NonNegativeFloat = 1.0,
        reconstruction: NonNegativeFloat = 1.0,
        loss: Loss = "cross_entropy",
    ):
        """Weigh the goals.

        Args:
            classification: weight of the classes' loss.
            reconstruction: weight of the mean squared error of the input's numbers.
            loss: of logits and class indices.
        """
        super().__init__(loss)
        self.weights = {"classification": classification, "reconstruction": reconstruction}

    def targets_of(self, data: Data) -> tuple[Target, Shape]:
        return "class", (data.out_shape[0] + math.prod(data.in_shape),)

    def step(self, model: nn.Module, batch: Batch) -> Step:
        inputs = batch[0]
        outputs = model(inputs)
        check_tensor_output(model, outputs)
        logits, given = self.apart(outputs, inputs[0].numel())
        first = super().step(lambda _: logits, batch)  # type: ignore[arg-type]
        error = self.error(given, inputs.flatten(1), batch[1])
        values = {"classification": first.loss, "reconstruction": error}
        loss = sum(self.weights[name] * value for name, value in values.items())
        return Step(torch.as_tensor(loss), logits, first.targets, values)

    def error(self, given: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean squared error of the input's numbers, over the samples that count."""
        weights = self.item_weights(targets)
        if weights is None:
            return F.mse_loss(given, inputs)
        return weighted_mean(F.mse_loss(given, inputs, reduction="none").mean(1), weights)

    def apart(self, outputs: Tensor, numbers: int) -> Sequence[Tensor]:
        """Return the logits and the input's numbers."""
        return outputs.split([outputs.shape[1] - numbers, numbers], 1)

    def predict(self, outputs: Tensor) -> dict[str, Any]:
        return {"output": outputs}  # who has but these does not know how many classes there are


RIDGES = tuple(10.0**power for power in range(-1, 5))


@callbacks.register("linear_probe")
class LinearProbe(Callback):
    """Logs val/probe_accuracy: how many classes a linear map of the model's features tells, though none was taught.

    The map is the least-squares one to the classes (ridge regression on standardised features), fitted to samples of
    the training split and measured on the validation split.
    """

    changes_training = False

    def __init__(
        self, layer: str = "blocks", count: PositiveInt = 2000, ridge: PositiveFloat | None = None
    ):
        """Say where the features are.

        Args:
            layer: name of the module of the model whose outputs are the features, as `framework plan` shows it.
            count: samples of the training split that the map is fitted to.
            ridge: added to the diagonal of the features' mean second moments, in thousandths; null: of 0.1 to 10,000
                the power of ten that predicts each of these samples best when it is left out.
        """
        self.layer, self.count, self.ridge = layer, count, ridge

    def on_fit_start(self, trainer: Context) -> None:
        check_read_again(trainer.train_batches, "callbacks.linear_probe")
        if trainer.val_batches is not None:
            check_read_again(trainer.val_batches, "callbacks.linear_probe")
        names = [name for name, _ in trainer.model.named_children()]
        if self.layer not in dict(trainer.model.named_modules()):
            raise SettingError(
                f"callbacks.linear_probe.layer={self.layer}: {did_you_mean(self.layer, names)}"
            )

    @torch.no_grad()
    def on_validation_end(self, trainer: Context) -> None:
        assert trainer.val_batches is not None
        with seeds.undisturbed():
            features, classes = self._features(trainer, trainer.train_batches, self.count)
            seen, truth = self._features(trainer, trainer.val_batches, None)
        mean, deviation = features.mean(0), features.std(0) + 1e-6
        weights = least_squares(
            (features - mean) / deviation, F.one_hot(classes).to(features), self.ridge
        )
        found = ((seen - mean) / deviation) @ weights[:-1] + weights[-1]
        right = (found.argmax(1) == truth).double().mean()
        trainer.log(
            {"val/probe_accuracy": float(right)}
        )  # a number at once: callbacks after this one may watch it

    def _features(self, trainer: Context, batches: Any, count: int | None) -> tuple[Tensor, Tensor]:
        """Return the features (rows, D) in float64, and the classes, of a split's first samples.

        Samples whose class is negative, or ignored by the loss of the task, are left out.
        """
        kept: list[Tensor] = []
        classes: list[Tensor] = []
        hook = trainer.model.get_submodule(self.layer).register_forward_hook(
            lambda *called: kept.append(called[2].clone())
        )
        try:
            with trainer.precision.inference(trainer.model):
                for batch in batches.epoch():
                    trainer.model(batch[0].to(trainer.device))
                    # copies: a loader may reuse its memory
                    classes.append(batch[1].to(trainer.device, copy=True))
                    if count is not None and sum(map(len, classes)) >= count:
                        break
        finally:
            hook.remove()
        features = torch.cat(kept).flatten(1).double()
        targets = torch.cat(classes)
        criterion = trainer.task.criterion
        ignored = None if criterion is None else ignored_index(criterion)
        known = without_ignored(targets, ignored) >= 0
        return features[known], targets[known]


def least_squares(inputs: Tensor, outputs: Tensor, ridge: float | None = None) -> Tensor:
    """Return the weights (D + 1, K) of the ridge regression; the last row is the intercept, which is not shrunk.

    inputs: (n, D), of mean 0. ridge: see `LinearProbe`.
    """
    mean = outputs.mean(0)
    left, scales, right = torch.linalg.svd(inputs, full_matrices=False)
    along = left.T @ (outputs - mean)

    def shrunk(ridge: float) -> Tensor:
        return scales.square() / (scales.square() + ridge * 1e-3 * len(inputs))

    def left_out(ridge: float) -> float:
        """The mean squared error of each row by a fit to the others (PRESS: Allen 1974)."""
        errors = outputs - mean - left @ (shrunk(ridge)[:, None] * along)
        leverage = left.square() @ shrunk(ridge) + 1 / len(inputs)
        return float((errors / (1 - leverage)[:, None]).square().mean())

    kept = shrunk(min(RIDGES, key=left_out) if ridge is None else ridge)
    weights = right.T @ ((kept / scales.clamp_min(1e-12))[:, None] * along)
    return torch.cat([weights, mean[None]])
