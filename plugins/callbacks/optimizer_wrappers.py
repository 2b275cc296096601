"""Ways to train with any optimizer: sharpness-aware, with slow weights beside it, or free of a schedule."""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from framework import (
    Batch,
    Context,
    Every,
    Fraction,
    PositiveFloat,
    PositiveInt,
    Range,
    Rate,
    SettingError,
    Transform,
    callbacks,
    foreach,
    seeds,
)
from framework.contracts.loss import share_of
from framework.contracts.pure_optimizer import as_real
from framework.contracts.state import Cadence

from .averaging import Averaging, matched


class Again(Transform):
    """Base of callbacks that need the step's batches once more; it hands them on as they are."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def on_fit_start(self, trainer: Context) -> None:
        if trainer.precision.scaler is not None:
            who = type(self).__name__
            raise SettingError(
                f"{who} takes gradients twice a step, for which fp16's scaler has no place: use bf16"
            )

    def on_step_start(self, trainer: Context) -> None:
        self.batches = []

    def __call__(self, batch: Batch) -> Batch:
        self.batches.append(batch)
        return batch

    def again(self, trainer: Context, parts: Sequence[Batch]) -> None:
        """Put the gradients of the mean loss of the parts into the parameters; running statistics stay."""
        buffers = [buffer.clone() for buffer in trainer.model.buffers()]
        counts = [trainer.task.count(part) for part in parts]
        total = sum(counts)
        for p in trained(trainer):
            p.grad = None
        for part, count in zip(parts, counts, strict=True):
            with trainer.precision.autocast():
                loss = trainer.task.step(trainer.model, part).loss
            (loss * share_of(count, total)).backward()
        for buffer, kept in zip(trainer.model.buffers(), buffers, strict=True):
            buffer.copy_(kept)

    def split(self, trainer: Context) -> list[Batch]:
        return [part for batch in self.batches for part in trainer.micro_batches.split(batch)]


def trained(trainer: Context) -> list[Tensor]:
    """Return the parameters that have a gradient."""
    return [
        p for group in trainer.optimizer.param_groups for p in group["params"] if p.grad is not None
    ]


def dense(parameter: Tensor) -> Tensor:
    """Return the gradient of a parameter as a dense tensor; zeros where it has none."""
    if parameter.grad is None:
        return parameter.new_zeros(parameter.shape)
    return parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad


@callbacks.register("sam", aliases=["sharpness_aware"])
class Sam(Again):
    """Sharpness-aware minimisation: updates w by the gradient at w + rho g / |g| (Foret et al. 2021, arXiv:2010.01412).

    A step costs two forward and backward passes. The second one draws dropout masks of its own, and leaves the running
    statistics of batch norms alone; what is logged is the loss of the first. Put `sam` before `clip_gradients`.

    Args:
        rho: how far away the gradient is taken, as a 2-norm over all parameters together.
    """

    def __init__(self, rho: PositiveFloat = 0.05):
        super().__init__()
        self.rho = rho

    def on_gradients(self, trainer: Context) -> None:
        parameters = trained(trainer)
        before = [p.detach().clone() for p in parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if any(gradient.is_sparse for gradient in gradients):
            cause = "a gradient is sparse (an embedding with sparse=True)"
            raise SettingError(f"sam: {cause}, which it cannot follow")
        norm = nn.utils.get_total_norm(gradients)
        with torch.no_grad():
            foreach.add_(parameters, foreach.mul(gradients, self.rho / (norm + 1e-12)))
        self.again(trainer, self.split(trainer))
        with torch.no_grad():
            foreach.copy_(parameters, before)


@callbacks.register("noise_scale", aliases=["gradient_noise_scale"])
class NoiseScale(Again):
    """Logs how many samples a batch needs until more of them gain little (McCandlish et al. 2018, arXiv:1812.06162).

    That is tr(Σ) / |G|², with the covariance Σ of a sample's gradient and the true gradient G, as
    train/gradient_noise_scale; both are estimated from the squared norms of the gradients of a batch and of parts of it
    (appendix A.1), as moving averages. A measurement costs another forward and backward pass. Training is not changed.
    """

    changes_training = False

    def __init__(
        self,
        every: Every = "10steps",
        parts: Annotated[int, Range("[2, inf)")] = 4,
        decay: Rate = 0.9,
    ):
        """Say how often and how finely.

        Args:
            every: how often to measure.
            parts: parts of the first batch of the step, whose gradients are compared with that of the whole.
            decay: share of the old averages that stays at each measurement.
        """
        super().__init__()
        self.cadence, self.parts, self.decay = Cadence(every), parts, decay
        self.trace, self.squared, self.measured = 0.0, 0.0, 0

    def needs_gradients(self, trainer: Context) -> bool:
        return self.due(trainer)

    def due(self, trainer: Context) -> bool:
        return self.cadence.due(trainer.state, epoch_end=trainer.state.batch == 0)

    def on_gradients(self, trainer: Context) -> None:
        if not self.due(trainer) or len(self.batches[0][0]) < self.parts:
            return
        parameters = trained(trainer)
        kept = [p.grad for p in parameters]
        size = len(self.batches[0][0]) // self.parts
        pieces = [
            tuple(t[i * size : (i + 1) * size] for t in self.batches[0]) for i in range(self.parts)
        ]
        with seeds.undisturbed():
            gradients = [self.of(trainer, parameters, piece) for piece in pieces]
        for p, gradient in zip(parameters, kept, strict=True):
            p.grad = gradient
        small = float(torch.stack([gradient.square().sum() for gradient in gradients]).mean())
        large = float(torch.stack(gradients).mean(0).square().sum())
        self.take(small, large, size, size * self.parts)

    def of(self, trainer: Context, parameters: Sequence[Tensor], piece: Batch) -> Tensor:
        self.again(trainer, [piece])
        return torch.cat([as_real(dense(p)).reshape(-1) for p in parameters])

    def take(self, small: float, large: float, size: int, whole: int) -> None:
        """Take in squared norms of the gradients of `size` samples and of `whole` (equations A.2 and A.3)."""
        squared = (whole * large - size * small) / (whole - size)
        trace = (small - large) / (1 / size - 1 / whole)
        self.squared = self.decay * self.squared + (1 - self.decay) * squared
        self.trace = self.decay * self.trace + (1 - self.decay) * trace
        self.measured += 1

    def on_log(self, trainer: Context) -> None:
        if (
            self.measured and self.squared > 0
        ):  # both averages began at 0, which their ratio does not show
            trainer.log({"train/gradient_noise_scale": self.trace / self.squared})

    def state_dict(self) -> dict[str, Any]:
        return {"trace": self.trace, "squared": self.squared, "measured": self.measured}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


@callbacks.register("lookahead")
class Lookahead(Averaging):
    """Slow weights s ← s + alpha (w - s) every k steps, from which w goes on (Zhang et al. 2019, arXiv:1907.08610).

    What is evaluated are the slow weights, as in the paper; the state of the optimizer stays as it is.

    Args:
        k: steps of the optimizer between two of the slow weights.
        alpha: how far these go.
    """

    alone = True

    def __init__(self, k: PositiveInt = 5, alpha: Fraction = 0.5):
        super().__init__()
        self.k, self.alpha = k, alpha

    def take_in(self, trainer: Context) -> None:
        if trainer.state.step % self.k == 0:
            foreach.lerp_(self.others, self.parameters, self.alpha)
            foreach.copy_(self.parameters, self.others)


@callbacks.register("schedule_free")
class ScheduleFree(Averaging):
    """An average in the place of schedule and momentum (Defazio et al. 2024, arXiv:2405.15682, equations 3 to 5).

    Gradients are taken at y = (1 - beta) z + beta x, the optimizer moves z, and x ← (1 - c) x + c z with
    c = lr² / (the sum of lr² so far) is what is evaluated. It goes with an optimizer without momentum, for the paper's
    AdamW with optimizer=adamw optimizer.betas=[0,0.999], and a learning rate that is constant after a warm-up.

    Args:
        beta: how near to the average gradients are taken.
    """

    alone = True

    def __init__(self, beta: Fraction = 0.9):
        super().__init__()
        self.beta, self.total = beta, 0.0
        self.z: list[Tensor] = []

    def on_fit_start(self, trainer: Context) -> None:
        for group in trainer.optimizer.param_groups:
            if "lr" not in group:
                name = type(trainer.optimizer).__name__
                said = f"schedule_free weighs by the learning rate, which {name} does not have"
                raise SettingError(said)
            momentum = group.get("betas", (group.get("momentum", 0.0),))[0]
            if momentum:
                name = "betas=[0,0.999]" if "betas" in group else "momentum=0"
                raise SettingError(
                    f"schedule_free is a momentum of its own: it needs optimizer.{name}"
                )
        super().on_fit_start(trainer)

    def restore(self) -> None:
        kept, self.total = self.saved.get("z", {}), self.saved.get("total", 0.0)
        super().restore()
        pairs = zip(self.names, self.parameters, strict=True)
        self.z = [kept.get(name, p).detach().to(p.device, copy=True) for name, p in pairs]

    def keep_in_step(self, before: list[Tensor]) -> None:
        super().keep_in_step(before)
        self.z = matched(self.parameters, before, self.z)

    def take_in(self, trainer: Context) -> None:
        """Carry the optimizer's move of y over to z, and make the new x and y."""
        before = foreach.lerp(self.z, self.others, self.beta)
        foreach.add_(self.z, foreach.sub(self.parameters, before))
        weight = float(trainer.optimizer.param_groups[0]["lr"]) ** 2
        self.total += weight
        foreach.lerp_(self.others, self.z, weight / self.total if self.total else 1.0)
        foreach.copy_(self.parameters, foreach.lerp(self.z, self.others, self.beta))

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.trainer is None:
            return state
        return state | {"z": dict(zip(self.names, self.z, strict=True)), "total": self.total}
