"""Gradient clipping."""

from collections.abc import Sequence

from torch import Tensor, nn

from framework import (
    Callback,
    Context,
    PositiveFloat,
    SettingError,
    callbacks,
    dtensors,
    gradient_numbers,
)


@callbacks.register("clip_gradients", aliases=["gradient_clipping"])
class ClipGradients(Callback):
    """Clips the gradients before each update, and logs their norm before clipping.

    By norm: g · min(1, norm / ‖g‖₂) over all parameters together (Pascanu et al. 2013,
    arXiv:1211.5063, section 3.2). The norm is logged as train/gradient_norm; only logging reads
    values from the device. With both limits, gradients are clipped by norm first.

    Args:
        norm: the largest 2-norm of all gradients together; null for no limit.
        value: the largest absolute value of a single component (the real or imaginary part of
            a complex number); null for no limit.
    """

    alone = False
    recordable = True
    follows_metrics = False

    def __init__(self, norm: PositiveFloat | None = 1.0, value: PositiveFloat | None = None):
        if norm is None and value is None:
            raise SettingError("clip_gradients has no effect: set `norm` or `value`")
        self.norm = norm
        self.value = value
        self.measured: Tensor | None = None

    def reset(self) -> None:
        super().reset()
        self.measured = None

    def on_gradients(self, trainer: Context) -> None:
        parameters: list[Tensor] = []
        for group in trainer.optimizer.param_groups:
            parameters += group["params"]
        if self.norm is not None:
            self.measured = clip_norm(parameters, self.norm)
        if self.value is not None:
            clip_values(parameters, self.value)

    @staticmethod
    def clip_rows(callbacks: Sequence[Callback], gradients: Tensor) -> None:
        """Clip one row of gradients for each of the callbacks."""
        for row, callback in zip(gradients, callbacks, strict=True):
            assert isinstance(callback, ClipGradients)
            if callback.norm is not None:
                callback.measured = row.norm()
                row.mul_(clip_factor(callback.norm, callback.measured))
            if callback.value is not None:
                row.clamp_(-callback.value, callback.value)

    def on_log(self, trainer: Context) -> None:
        if self.measured is not None:
            trainer.log({"train/gradient_norm": self.measured})


def clip_norm(parameters: Sequence[Tensor], norm: float) -> Tensor:
    """Scale gradients so that their 2-norm is at most `norm`; return the norm before."""
    try:
        return dtensors.full_tensor(nn.utils.clip_grad_norm_(parameters, norm))
    except NotImplementedError:  # torch does not clip sparse gradients
        gradients = gradient_numbers(parameters)
    measured = nn.utils.get_total_norm(gradients)
    factor = clip_factor(norm, measured)
    for gradient in gradients:
        gradient.mul_(factor)
    return measured


def clip_factor(norm: float, measured: Tensor) -> Tensor:
    """Return the factor of `nn.utils.clip_grad_norm_` for gradients with the norm `measured`."""
    return (norm / (measured + 1e-6)).clamp(max=1.0)


def clip_values(parameters: Sequence[Tensor], value: float) -> None:
    """Limit the absolute value of each component of the gradients."""
    try:
        nn.utils.clip_grad_value_(parameters, value)
    except NotImplementedError:  # torch clips neither sparse nor complex gradients
        for gradient in gradient_numbers(parameters):
            gradient.clamp_(-value, value)
