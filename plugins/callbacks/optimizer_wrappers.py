"""Methods around any optimizer: sharpness-aware, lookahead, schedule-free, gradient noise scale."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    count_rows,
    foreach,
    seeds,
    select_rows,
)
from framework.contracts.loss import share_of
from framework.contracts.pure_optimizer import as_real
from framework.contracts.state import Cadence

from .averaging import Averaging, match_tensors
from .gradients import parameters_with_gradient


class GradientsAgain(Transform):
    """Base of callbacks that compute gradients of the batches of a step a second time."""

    runs_model = True
    takes_fields = True

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def on_fit_start(self, trainer: Context) -> None:
        if trainer.precision.scaler is not None:
            name = type(self).__name__
            raise SettingError(
                f"{name} computes gradients twice per step, which the fp16 scaler does not allow: "
                "use bf16"
            )

    def on_step_start(self, trainer: Context) -> None:
        self.batches = []

    def __call__(self, batch: Batch) -> Batch:
        """Store the batch, and return it unchanged."""
        self.batches.append(batch)
        return batch

    def compute_gradients(self, trainer: Context, parts: Sequence[Batch]) -> None:
        """Set the gradients to those of the mean loss of the parts; keep the running statistics.

        With several processes, the parts are those of this process (collective).
        """
        strategy = trainer.strategy
        buffers = [buffer.clone() for buffer in trainer.model.buffers()]
        counts = [trainer.task.count(part) for part in parts]
        total = sum(counts)
        if strategy.world_size > 1:
            total = strategy.sum(torch.as_tensor(total, dtype=torch.float64, device=trainer.device))
        parameters = parameters_with_gradient(trainer.optimizer)
        for parameter in parameters:
            parameter.grad = None
        losses = torch.zeros((), device=trainer.device)
        with self.own_random_numbers(trainer):
            for part, count in zip(parts, counts, strict=True):
                with trainer.precision.autocast():
                    loss = trainer.task.step(trainer.model, part).loss
                share = share_of(count, total)
                if isinstance(share, Tensor):
                    share = share.to(loss)
                (loss * share).backward()
                losses += loss.detach() * share
        strategy.sum_gradients(parameters, losses)
        for buffer, value in zip(trainer.model.buffers(), buffers, strict=True):
            buffer.copy_(value)

    @contextmanager
    def own_random_numbers(self, trainer: Context) -> Iterator[None]:
        """Draw other dropout masks in each process in a block."""
        if trainer.strategy.world_size == 1:
            yield
            return
        seed = seeds.derive(
            trainer.seed, "gradients again", trainer.state.step, trainer.strategy.rank
        )
        with seeds.stream(seed):
            yield


def dense_gradient(parameter: Tensor) -> Tensor:
    """Return the gradient of a parameter as a dense tensor; zeros where it has none."""
    if parameter.grad is None:
        return parameter.new_zeros(parameter.shape)
    return parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad


@callbacks.register("sam", aliases=["sharpness_aware"])
class Sam(GradientsAgain):
    """Sharpness-aware minimization: updates w by the gradient at w + rho · g / ‖g‖₂.

    (Foret et al. 2021, arXiv:2010.01412.) A step costs two forward and backward passes. The second
    pass draws its own dropout masks and does not change the running statistics of batch norms. The
    logged loss is that of the first pass. Put `sam` before `clip_gradients`.

    Args:
        rho: distance at which the gradient is computed, as a 2-norm over all parameters together.
    """

    def __init__(self, rho: PositiveFloat = 0.05):
        super().__init__()
        self.rho = rho

    def on_gradients(self, trainer: Context) -> None:
        parameters = parameters_with_gradient(trainer.optimizer)
        before = [p.detach().clone() for p in parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if any(gradient.is_sparse for gradient in gradients):
            raise SettingError(
                "sam does not support sparse gradients: an embedding has sparse=True"
            )
        norm = nn.utils.get_total_norm(gradients)
        with torch.no_grad():
            foreach.add_(parameters, foreach.mul(gradients, self.rho / (norm + 1e-12)))
        parts: list[Batch] = []
        for batch in self.batches:
            parts += trainer.micro_batches.split(batch)
        self.compute_gradients(trainer, parts)
        with torch.no_grad():
            foreach.copy_(parameters, before)


@callbacks.register("noise_scale", aliases=["gradient_noise_scale"])
class NoiseScale(GradientsAgain):
    """Logs the gradient noise scale: the batch size above which larger batches gain little.

    (McCandlish et al. 2018, arXiv:1812.06162.) It is tr(Σ) / ‖G‖₂², with the covariance Σ of the
    gradients of samples and the true gradient G, logged as train/gradient_noise_scale. Both are
    estimated from the squared norms of the gradients of a batch and of its parts (appendix A.1), as
    moving averages. A measurement costs one forward and backward pass. Training does not change.

    Args:
        every: how often to measure.
        parts: parts of the first batch of the step, whose gradients are compared with the
            gradient of the batch.
        decay: weight of the old averages at each measurement.
    """

    changes_training = False

    def __init__(
        self,
        every: Every = "10steps",
        parts: Annotated[int, Range("[2, inf)")] = 4,
        decay: Rate = 0.9,
    ):
        super().__init__()
        self.cadence = Cadence(every)
        self.parts = parts
        self.decay = decay
        self.trace = 0.0  # estimate of tr(Σ)
        self.squared = 0.0  # estimate of ‖G‖₂²
        self.measured = 0  # measurements

    def on_fit_start(self, trainer: Context) -> None:
        super().on_fit_start(trainer)
        if trainer.strategy.world_size > 1:
            raise SettingError(
                "noise_scale compares parts of a batch in one process: expected a run with one "
                f"process, got {trainer.strategy.world_size}"
            )

    def needs_gradients(self, trainer: Context) -> bool:
        return self._due(trainer)

    def on_gradients(self, trainer: Context) -> None:
        if not self._due(trainer):
            return
        batch = self.batches[0]
        size = count_rows(batch) // self.parts
        if size == 0:
            return
        parameters = parameters_with_gradient(trainer.optimizer)
        step_gradients = [p.grad for p in parameters]
        gradients: list[Tensor] = []
        with seeds.undisturbed():
            for start in range(0, size * self.parts, size):
                part = select_rows(batch, start, start + size)
                self.compute_gradients(trainer, [part])
                flat = [as_real(dense_gradient(p)).reshape(-1) for p in parameters]
                gradients.append(torch.cat(flat))
        for parameter, gradient in zip(parameters, step_gradients, strict=True):
            parameter.grad = gradient
        squared_norms = [gradient.square().sum() for gradient in gradients]
        small = float(torch.stack(squared_norms).mean())
        large = float(torch.stack(gradients).mean(0).square().sum())
        self.update_averages(small, large, size, size * self.parts)

    def update_averages(
        self, small_norm: float, large_norm: float, small_size: int, large_size: int
    ) -> None:
        """Update both averages (equations A.2 and A.3).

        Args:
            small_norm: mean squared norm of the gradients of `small_size` samples.
            large_norm: squared norm of the gradient of `large_size` samples.
            small_size: samples of a part.
            large_size: samples of all parts together.
        """
        squared = (large_size * large_norm - small_size * small_norm) / (large_size - small_size)
        trace = (small_norm - large_norm) / (1 / small_size - 1 / large_size)
        self.squared = self.decay * self.squared + (1 - self.decay) * squared
        self.trace = self.decay * self.trace + (1 - self.decay) * trace
        self.measured += 1

    def on_log(self, trainer: Context) -> None:
        # Both averages begin at 0; this bias cancels in their ratio.
        if self.measured and self.squared > 0:
            trainer.log({"train/gradient_noise_scale": self.trace / self.squared})

    def state_dict(self) -> dict[str, Any]:
        return {"trace": self.trace, "squared": self.squared, "measured": self.measured}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def _due(self, trainer: Context) -> bool:
        return self.cadence.due(trainer.state)


@callbacks.register("lookahead")
class Lookahead(Averaging):
    """Updates slow weights s ← s + alpha (w - s) every k steps, and sets w to them.

    (Zhang et al. 2019, arXiv:1907.08610.) Evaluation uses the slow weights, as in the paper. The
    state of the optimizer does not change.

    Args:
        k: steps of the optimizer per step of the slow weights.
        alpha: step size of the slow weights.
    """

    alone = True

    def __init__(self, k: PositiveInt = 5, alpha: Fraction = 0.5):
        super().__init__()
        self.k = k
        self.alpha = alpha

    def update(self, trainer: Context) -> None:
        if trainer.state.step % self.k == 0:
            foreach.lerp_(self.others, self.parameters, self.alpha)
            foreach.copy_(self.parameters, self.others)


@callbacks.register("schedule_free")
class ScheduleFree(Averaging):
    """Replaces schedule and momentum by an average of the weights.

    (Defazio et al. 2024, arXiv:2405.15682, equations 3 to 5.) Gradients are computed at
    y = (1 - beta) z + beta x, and the optimizer updates z. Evaluation uses x ← (1 - c) x + c z with
    c = lr² / (the sum of lr² so far). It needs an optimizer without momentum (the paper's AdamW:
    optimizer=adamw optimizer.betas=[0,0.999]) and a learning rate that is constant after a warm-up.

    Args:
        beta: weight of the average in y.
    """

    alone = True

    def __init__(self, beta: Fraction = 0.9):
        super().__init__()
        self.beta = beta
        self.total = 0.0  # sum of lr²
        self.z: list[Tensor] = []

    def on_fit_start(self, trainer: Context) -> None:
        for group in trainer.optimizer.param_groups:
            if "lr" not in group:
                name = type(trainer.optimizer).__name__
                raise SettingError(f"schedule_free needs a learning rate, which {name} lacks")
            momentum = group.get("betas", (group.get("momentum", 0.0),))[0]
            if momentum:
                setting = "betas=[0,0.999]" if "betas" in group else "momentum=0"
                raise SettingError(
                    f"schedule_free replaces momentum: it requires optimizer.{setting}"
                )
        super().on_fit_start(trainer)

    def restore(self) -> None:
        z = self.saved.get("z", {})
        self.total = self.saved.get("total", 0.0)
        super().restore()
        self.z = self.copies(z)

    def match_parameters(self, before: list[Tensor]) -> None:
        super().match_parameters(before)
        self.z = match_tensors(self.parameters, before, self.z)

    def update(self, trainer: Context) -> None:
        """Apply the optimizer's update of y to z, and compute the new x and y."""
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
