"""Representation learning: contrastive task, distillation, multi-task learning, linear probe."""

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
    read_spread_samples,
    seeds,
    tasks,
    whole_batches,
)
from framework.contracts.loss import ignored_index, without_ignored
from framework.contracts.metric import predicted_classes
from framework.contracts.task import check_tensor_output

from .supervised import Classification

SIMCLR_VIEWS = ("resized_crop", "flip", "brightness_contrast")


@tasks.register("contrastive", aliases=["simclr"])
class Contrastive(Task):
    """Finds the other view of an input among the views of a batch (SimCLR).

    (Chen et al. 2020, arXiv:2002.05709.) The outputs of the model are embeddings; labels are
    ignored. It also logs `found`, the share of embeddings whose nearest one is that of the other
    view. Evaluation draws the same views each time, from its own generator. The loss compares the
    samples of a batch with each other. Therefore `trainer.micro_batch` cannot split batches, and
    `trainer.accumulate` does not compare samples of different batches.

    Args:
        views: transforms that make a view of an input, in this order.
        dimensions: of the embeddings, which are the outputs of the model.
        temperature: divides the cosine similarities.
    """

    splits_batches = False

    def __init__(
        self,
        views: list[Augmentation] = SIMCLR_VIEWS,  # type: ignore[assignment]
        dimensions: PositiveInt = 64,
        temperature: PositiveFloat = 0.5,
    ):
        self.views = list(views)
        self.dimensions = dimensions
        self.temperature = temperature
        self.transforms: list[Any] | None = None  # built for the shape of the first batch

    def targets_of(self, data: Data) -> tuple[Target, Shape]:
        return "value", (self.dimensions,)

    def step(self, model: nn.Module, batch: Batch) -> Step:
        inputs = batch[0]
        with torch.random.fork_rng(enabled=not model.training):
            if not model.training:
                torch.manual_seed(0)
            views = torch.cat([self.random_view(inputs), self.random_view(inputs)])
        outputs = model(views)
        check_tensor_output(model, outputs)
        if model.training:
            loss, found = self.loss_among_processes(outputs)
        else:  # each process has the whole batch
            loss, found = nt_xent(outputs, self.temperature)
        return Step(loss, outputs, torch.zeros_like(outputs), {"found": found})

    def loss_among_processes(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of the rows of this process among those of all processes."""
        if self.strategy.world_size == 1:
            return nt_xent(outputs, self.temperature)
        views = [self.strategy.gather_rows(view) for view in outputs.chunk(2)]
        counts = self.strategy.gather(len(outputs) // 2)
        first = sum(counts[: self.strategy.rank])
        own = torch.arange(first, first + counts[self.strategy.rank], device=outputs.device)
        own = torch.cat([own, own + len(views[0])])
        return nt_xent(torch.cat(views), self.temperature, own)

    def pictures(self, model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
        """Return two views of each input, one after the other."""
        views = torch.stack([self.random_view(inputs), self.random_view(inputs)], 1)
        return {"views": views.flatten(0, 1)}

    def random_view(self, inputs: Tensor) -> Tensor:
        """Apply the transforms to the inputs."""
        if self.transforms is None:
            shape = tuple(inputs.shape[1:])
            self.transforms = [view(shape, (1,)) for view in self.views]
        batch: Batch = (inputs, torch.zeros(len(inputs), dtype=torch.long, device=inputs.device))
        with torch.no_grad():
            for transform in self.transforms:
                batch = transform(batch)
        return batch[0]


def nt_xent(
    embeddings: Tensor, temperature: float, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the NT-Xent loss (Chen et al. 2020, equation 1).

    Args:
        embeddings: shape (2 n, D); rows i and i + n are views of one input.
        temperature: divides the cosine similarities.
        rows: the indices of the rows whose loss is computed; None for all.

    Returns:
        The mean loss, and the share of rows whose nearest row is the other view.
    """
    unit = F.normalize(embeddings.float(), dim=1)
    similarity = unit @ unit.T / temperature
    itself = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    similarity = similarity.masked_fill(itself, -math.inf)
    other = torch.arange(len(similarity), device=similarity.device).roll(len(similarity) // 2)
    if rows is not None:
        similarity = similarity[rows]
        other = other[rows]
    loss = F.cross_entropy(similarity, other)
    return loss, (predicted_classes(similarity) == other).float().mean()


@tasks.register("distillation")
class Distillation(Classification):
    """Classification with a teacher: adds T² KL(teacher ‖ student) of outputs softened by T.

    (Hinton et al. 2015, arXiv:1503.02531.) It also logs `distillation`, the teacher's part of the
    loss. Class weights and ignored targets of the loss apply to the samples of both parts.

    Args:
        teacher: run folder of a trained classifier of the same inputs and classes.
        temperature: T, which softens the outputs of teacher and student.
        weight: of the teacher's part of the loss; the labels have the rest.
        loss: of logits and class indices.
    """

    def __init__(
        self,
        teacher: Path | None = None,
        temperature: PositiveFloat = 4.0,
        weight: Fraction = 0.9,
        loss: Loss = "cross_entropy",
    ):
        super().__init__(loss)
        self.path = teacher
        self.temperature = temperature
        self.weight = weight
        self.teacher: nn.Module | None = None

    def check(self, data: Data) -> None:
        super().check(data)
        run = self.open_teacher_run()
        shape = tuple(run.facts["in_shape"])
        classes = run.facts["classes"]
        if shape != tuple(data.in_shape) or list(classes) != list(data.classes):
            raise DataError(
                f"task.teacher={self.path}: expected inputs of shape {shape} and the classes "
                f"{', '.join(classes)}, got {tuple(data.in_shape)} and {', '.join(data.classes)} "
                f"({type(data).__name__})"
            )
        self.teacher = run.model.eval().requires_grad_(False)

    def open_teacher_run(self) -> Any:
        """Return the run of the teacher.

        Raises:
            SettingError: there is no teacher, or its run cannot be opened.
        """
        from framework import open_run  # a slow import that only this task needs

        if self.path is None:
            raise SettingError(
                "distillation needs a teacher: task.teacher=RUN, the folder of a trained classifier"
            )
        return open_run(self.path)

    def step(self, model: nn.Module, batch: Batch) -> Step:
        step = super().step(model, batch)
        if self.teacher is None:
            self.teacher = self.open_teacher_run().model.eval().requires_grad_(False)
        with torch.no_grad():
            teacher_outputs = self.teacher.to(batch[0].device)(batch[0])
        student = (step.outputs / self.temperature).float().log_softmax(1)
        teacher = (teacher_outputs / self.temperature).float().log_softmax(1)
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
    """Predicts the class and reconstructs the input at once (multi-task learning, Caruana 1997).

    The outputs of the model are the logits, followed by the numbers of the input, flat; metrics get
    the logits. It also logs the parts of the loss without their weights: `classification` and
    `reconstruction` (mean squared error). Class weights and ignored targets of the loss apply to
    the samples of both parts.

    Args:
        classification: weight of the loss of the classes.
        reconstruction: weight of the mean squared error of the input's numbers.
        loss: of logits and class indices.
    """

    def __init__(
        self,
        classification: NonNegativeFloat = 1.0,
        reconstruction: NonNegativeFloat = 1.0,
        loss: Loss = "cross_entropy",
    ):
        super().__init__(loss)
        self.weights = {"classification": classification, "reconstruction": reconstruction}

    def targets_of(self, data: Data) -> tuple[Target, Shape]:
        return "class", (data.out_shape[0] + math.prod(data.in_shape),)

    def step(self, model: nn.Module, batch: Batch) -> Step:
        inputs = batch[0]
        outputs = model(inputs)
        check_tensor_output(model, outputs)
        logits, numbers = self.split_outputs(outputs, inputs[0].numel())
        first = super().step(lambda _: logits, batch)  # type: ignore[arg-type]
        error = self.reconstruction_error(numbers, inputs.flatten(1), batch[1])
        values = {"classification": first.loss, "reconstruction": error}
        loss = sum(self.weights[name] * value for name, value in values.items())
        return Step(torch.as_tensor(loss), logits, first.targets, values)

    def reconstruction_error(self, numbers: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean squared error of the input's numbers, weighted like the targets."""
        weights = self.item_weights(targets)
        if weights is None:
            return F.mse_loss(numbers, inputs)
        return weighted_mean(F.mse_loss(numbers, inputs, reduction="none").mean(1), weights)

    def split_outputs(self, outputs: Tensor, numbers: int) -> Sequence[Tensor]:
        """Return the logits and the numbers of the input."""
        return outputs.split([outputs.shape[1] - numbers, numbers], 1)

    def predict(self, outputs: Tensor) -> dict[str, Any]:
        return {"output": outputs}  # the number of classes is unknown here


RIDGES = tuple(10.0**power for power in range(-1, 5))


@callbacks.register("linear_probe")
class LinearProbe(Callback):
    """Logs val/probe_accuracy, the accuracy of a linear classifier on the model's features.

    The classifier is a ridge regression on standardized features, fitted to samples of the training
    split and measured on the validation split. The model itself does not learn the classes.

    Args:
        layer: name of the module whose outputs are the features, as `framework plan` shows it.
        count: samples of the training split for the fit.
        ridge: added to the diagonal of the features' mean second moments, in thousandths; null:
            the power of ten from 0.1 to 10,000 with the smallest leave-one-out error.
    """

    changes_training = False
    runs_model = True

    def __init__(
        self, layer: str = "blocks", count: PositiveInt = 2000, ridge: PositiveFloat | None = None
    ):
        self.layer = layer
        self.count = count
        self.ridge = ridge

    def on_fit_start(self, trainer: Context) -> None:
        check_read_again(trainer.train_batches, "callbacks.linear_probe")
        if trainer.val_batches is not None:
            check_read_again(trainer.val_batches, "callbacks.linear_probe")
        names = [name for name, _ in trainer.model.named_children()]
        if self.layer not in dict(trainer.model.named_modules()):
            suggestion = did_you_mean(self.layer, names)
            raise SettingError(f"callbacks.linear_probe.layer={self.layer}: {suggestion}")
        targets = read_spread_samples(trainer.train_batches, 1, trainer.device)[1]
        if targets.ndim != 1 or targets.is_floating_point():
            raise SettingError(
                "callbacks.linear_probe: expected one class for each sample, got targets "
                f"{targets.dtype} {tuple(targets.shape[1:])}"
            )

    def cost(self) -> str:
        return (
            f"runs the model on {self.count:,} training samples and the validation split, in each "
            "validation"
        )

    @torch.no_grad()
    def on_validation_end(self, trainer: Context) -> None:
        assert trainer.val_batches is not None
        with seeds.undisturbed():
            features, classes = self._features(trainer, trainer.train_batches, self.count)
            val_features, val_classes = self._features(trainer, trainer.val_batches, None)
        mean = features.mean(0)
        deviation = features.std(0) + 1e-6
        targets = F.one_hot(classes).to(features)
        weights = least_squares((features - mean) / deviation, targets, self.ridge)
        scores = ((val_features - mean) / deviation) @ weights[:-1] + weights[-1]
        accuracy = (predicted_classes(scores) == val_classes).double().mean()
        # a number, not a tensor: a later callback may monitor it in this event
        trainer.log({"val/probe_accuracy": float(accuracy)})

    def _features(self, trainer: Context, batches: Any, count: int | None) -> tuple[Tensor, Tensor]:
        """Return the features (rows, D) in float64 and the classes of the first samples of a split.

        Samples with a negative class, or a class that the loss of the task ignores, are left out.
        """
        outputs: list[Tensor] = []
        classes: list[Tensor] = []

        def keep_output(module: nn.Module, inputs: Any, output: Tensor) -> None:
            outputs.append(output.clone())

        hook = trainer.model.get_submodule(self.layer).register_forward_hook(keep_output)
        try:
            with trainer.precision.inference(trainer.model), whole_batches(batches):
                for batch in batches.epoch():
                    trainer.model(batch[0].to(trainer.device))
                    # a copy: a loader may reuse its memory
                    classes.append(batch[1].to(trainer.device, copy=True))
                    if count is not None and sum(map(len, classes)) >= count:
                        break
        finally:
            hook.remove()
        features = torch.cat(outputs).flatten(1).double()
        targets = torch.cat(classes)
        criterion = trainer.task.criterion
        ignored = None if criterion is None else ignored_index(criterion)
        known = without_ignored(targets, ignored) >= 0
        return features[known], targets[known]


def least_squares(inputs: Tensor, outputs: Tensor, ridge: float | None = None) -> Tensor:
    """Fit a ridge regression.

    Args:
        inputs: shape (n, D), of mean 0.
        outputs: shape (n, K).
        ridge: see `LinearProbe`.

    Returns:
        Weights of shape (D + 1, K); the last row is the intercept, to which no ridge applies.
    """
    mean = outputs.mean(0)
    left, singular_values, right = torch.linalg.svd(inputs, full_matrices=False)
    projection = left.T @ (outputs - mean)

    def shrinkage(ridge: float) -> Tensor:
        squares = singular_values.square()
        return squares / (squares + ridge * 1e-3 * len(inputs))

    def leave_one_out_error(ridge: float) -> float:
        """Return the mean squared error of each row for a fit to the others (PRESS: Allen 1974)."""
        errors = outputs - mean - left @ (shrinkage(ridge)[:, None] * projection)
        leverage = left.square() @ shrinkage(ridge) + 1 / len(inputs)
        return float((errors / (1 - leverage)[:, None]).square().mean())

    if ridge is None:
        ridge = min(RIDGES, key=leave_one_out_error)
    scale = shrinkage(ridge) / singular_values.clamp_min(1e-12)
    weights = right.T @ (scale[:, None] * projection)
    return torch.cat([weights, mean[None]])
