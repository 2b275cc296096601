"""Optimizers: those of torch under their usual names, Lion and Muon. The schedule multiplies `lr`.

LBFGS is not registered, since it evaluates the loss several times per step, nor SparseAdam, since
it needs sparse gradients.
"""

import math
from collections.abc import Callable
from itertools import compress
from typing import Any, Literal

import torch
from torch import Tensor, optim
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from framework import (
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    PureOptimizer,
    Rate,
    SettingError,
    optimizers,
)
from framework.contracts.pure_optimizer import Settings, State, pure_updates

HIDDEN = ("maximize", "capturable", "differentiable", "foreach", "fused")  # set by the framework
COMMON = {"lr": PositiveFloat, "weight_decay": NonNegativeFloat}
BETAS = COMMON | {"betas": tuple[Rate, Rate], "eps": PositiveFloat}

NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)  # of x, x^3 and x^5 (Jordan et al. 2024)

optimizers.register(
    "adadelta", optim.Adadelta, hide=HIDDEN, types=COMMON | {"rho": Rate, "eps": PositiveFloat}
)
optimizers.register(
    "adafactor",
    optim.Adafactor,
    hide=HIDDEN,
    types=COMMON
    | {"beta2_decay": float, "eps": tuple[PositiveFloat | None, PositiveFloat], "d": PositiveFloat},
)
optimizers.register(
    "adagrad",
    optim.Adagrad,
    hide=HIDDEN,
    types=COMMON
    | {
        "lr_decay": NonNegativeFloat,
        "initial_accumulator_value": NonNegativeFloat,
        "eps": PositiveFloat,
    },
)
optimizers.register("adam", optim.Adam, hide=HIDDEN, types=BETAS)
optimizers.register("adamw", optim.AdamW, hide=HIDDEN, types=BETAS)
optimizers.register("adamax", optim.Adamax, hide=HIDDEN, types=BETAS)
optimizers.register(
    "asgd",
    optim.ASGD,
    hide=HIDDEN,
    types=COMMON | {"lambd": NonNegativeFloat, "alpha": PositiveFloat, "t0": NonNegativeFloat},
)
optimizers.register(
    "nadam", optim.NAdam, hide=HIDDEN, types=BETAS | {"momentum_decay": NonNegativeFloat}
)
optimizers.register("radam", optim.RAdam, hide=HIDDEN, types=BETAS)
optimizers.register(
    "rmsprop",
    optim.RMSprop,
    hide=HIDDEN,
    types=COMMON | {"alpha": Rate, "eps": PositiveFloat, "momentum": Rate},
)
optimizers.register(
    "rprop",
    optim.Rprop,
    hide=HIDDEN,
    types={
        "lr": PositiveFloat,
        "etas": tuple[Rate, PositiveFloat],
        "step_sizes": tuple[PositiveFloat, PositiveFloat],
    },
)
optimizers.register(
    "sgd", optim.SGD, hide=HIDDEN, types=COMMON | {"momentum": Rate, "dampening": NonNegativeFloat}
)

# Pure updates: the step of an optimizer of torch as a function without side effects. Compiled steps
# and stacked trials call it instead of `step()`.


def adam(p: Tensor, g: Tensor, state: State, settings: Settings) -> tuple[Tensor, State]:
    """Adam (Kingma and Ba 2015, arXiv:1412.6980, algorithm 1), or AdamW with decoupled decay."""
    beta1, beta2 = settings["betas"]
    lr = settings["lr"]
    weight_decay = settings["weight_decay"]
    if settings.get("decoupled_weight_decay"):
        p = p * (1 - lr * weight_decay)
    else:
        g = add_weight_decay(p, g, weight_decay)
    step = state["step"] + 1
    average = state["exp_avg"] + (g - state["exp_avg"]) * (1 - beta1)
    square = state["exp_avg_sq"] * beta2 + g * g * (1 - beta2)
    new = {"step": step, "exp_avg": average, "exp_avg_sq": square}
    if settings["amsgrad"]:
        square = torch.maximum(state["max_exp_avg_sq"], square)
        new["max_exp_avg_sq"] = square
    corrections = settings
    if "bias_correction1" not in settings:
        corrections = bias_corrections(step.to(p.dtype), settings)
    scale = lr / corrections["bias_correction1"]
    denominator = square.sqrt() / corrections["bias_correction2_sqrt"] + settings["eps"]
    return p - scale * (average / denominator), new


def bias_corrections(step: Any, settings: Settings) -> dict[str, Any]:
    """Return the corrections of Adam for averages that start at 0 (algorithm 1, see `adam`).

    The second one is the square root, as the denominator uses it.

    Args:
        step: the number of the step, from 1 on; a number or a tensor.
        settings: of the parameter group.
    """
    beta1, beta2 = settings["betas"]
    return {"bias_correction1": 1 - beta1**step, "bias_correction2_sqrt": (1 - beta2**step) ** 0.5}


def sgd(p: Tensor, g: Tensor, state: State, settings: Settings) -> tuple[Tensor, State]:
    """SGD with classical or Nesterov momentum (Sutskever et al. 2013), in the form of torch."""
    g = add_weight_decay(p, g, settings["weight_decay"])
    momentum = settings["momentum"]
    if is_zero(momentum):
        return p - settings["lr"] * g, {}
    buffer = state["momentum_buffer"] * momentum + g * (1 - settings["dampening"])
    direction = g + momentum * buffer if settings["nesterov"] else buffer
    return p - settings["lr"] * direction, {"momentum_buffer": buffer}


def rmsprop(p: Tensor, g: Tensor, state: State, settings: Settings) -> tuple[Tensor, State]:
    """RMSprop (Hinton 2012, lecture 6e), or its centered variant.

    The variant is from Graves 2013, arXiv:1308.0850, equations 38 to 45.
    """
    g = add_weight_decay(p, g, settings["weight_decay"])
    alpha = settings["alpha"]
    square = state["square_avg"] * alpha + g * g * (1 - alpha)
    variance = square
    new = {"step": state["step"] + 1, "square_avg": square}
    if settings["centered"]:
        average = state["grad_avg"] + (g - state["grad_avg"]) * (1 - alpha)
        new["grad_avg"] = average
        variance = square - average * average
    direction = g / (variance.sqrt() + settings["eps"])
    if not is_zero(settings["momentum"]):
        direction = state["momentum_buffer"] * settings["momentum"] + direction
        new["momentum_buffer"] = direction
    return p - settings["lr"] * direction, new


def adagrad(p: Tensor, g: Tensor, state: State, settings: Settings) -> tuple[Tensor, State]:
    """Adagrad (Duchi et al. 2011, JMLR 12) with a decaying rate, in the form of torch."""
    g = add_weight_decay(p, g, settings["weight_decay"])
    lr = settings["lr"] / (1 + state["step"].to(p.dtype) * settings["lr_decay"])
    total = state["sum"] + g * g
    p = p - lr * (g / (total.sqrt() + settings["eps"]))
    return p, {"step": state["step"] + 1, "sum": total}


def add_weight_decay(p: Tensor, g: Tensor, weight_decay: Any) -> Tensor:
    """Return the gradient of the loss with an L2 penalty."""
    return g if is_zero(weight_decay) else g + weight_decay * p


def is_zero(value: Any) -> bool:
    """Return whether a setting is 0. A tensor (one value per trial) is never taken to be 0."""
    return not isinstance(value, Tensor) and value == 0


pure_updates.register(optim.Adam, adam, bias_corrections)
pure_updates.register(optim.AdamW, adam, bias_corrections)
pure_updates.register(optim.SGD, sgd)
pure_updates.register(optim.RMSprop, rmsprop)
pure_updates.register(optim.Adagrad, adagrad)


def evaluate_closure(closure: Callable[[], Any] | None) -> Any:
    """Evaluate the closure with gradients; return None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


@optimizers.register("lion")
class Lion(PureOptimizer):
    """The sign of an interpolated momentum, with decoupled weight decay (Chen et al. 2023).

    arXiv:2302.06675, algorithm 2. Each step changes every parameter by `lr`: compared with AdamW,
    the authors use a learning rate 3 to 10 times lower, and a weight decay 3 to 10 times higher.

    Args:
        lr: learning rate.
        betas: weight of the momentum in the direction of the step, and in the update of the
            momentum.
        weight_decay: coefficient of weight decay; each step multiplies the parameters by
            1 - lr * weight_decay.
    """

    kept = ("momentum",)

    def __init__(
        self,
        params: ParamsT,
        lr: PositiveFloat = 1e-4,
        betas: tuple[Rate, Rate] = (0.9, 0.99),
        weight_decay: NonNegativeFloat = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @staticmethod
    def update(p: Tensor, g: Tensor, state: State, settings: Settings) -> tuple[Tensor, State]:
        """Return the parameter and its momentum after a step."""
        lr = settings["lr"]
        beta1, beta2 = settings["betas"]
        momentum = state["momentum"]
        direction = (momentum + (g - momentum) * (1 - beta1)).sign()
        p = p * (1 - lr * settings["weight_decay"]) - lr * direction
        return p, {"momentum": momentum + (g - momentum) * (1 - beta2)}


@optimizers.register("muon")
class Muon(optim.Optimizer):
    """Orthogonalized momentum for hidden weights, AdamW for all other parameters.

    Jordan et al. 2024, kellerjordan.github.io/posts/muon. Hidden weights are all matrices but the
    last one, which is taken to be the output layer; the weight of a convolution is a matrix with
    one row per filter.

    Args:
        lr: learning rate.
        weight_decay: coefficient of weight decay; each step multiplies all parameters by
            1 - lr * weight_decay.
        momentum: momentum factor of the hidden weights.
        nesterov: use Nesterov momentum.
        ns_steps: number of Newton-Schulz iterations.
        adjust_lr: match_rms_adamw: updates have the size of those of AdamW, so that learning rates
            of AdamW can be used (Liu et al. 2025, arXiv:2502.16982, section 2.2); original: as
            Jordan et al., for learning rates near 0.02.
        embedding: the first matrix is an embedding table and is updated by AdamW.
        adamw_lr: learning rate of AdamW; null: lr.
        betas: betas of AdamW.
        eps: eps of AdamW.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: PositiveFloat = 5e-3,
        weight_decay: NonNegativeFloat = 0.01,
        momentum: Rate = 0.95,
        nesterov: bool = True,
        ns_steps: PositiveInt = 5,
        adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
        embedding: bool = False,
        adamw_lr: PositiveFloat | None = None,
        betas: tuple[Rate, Rate] = (0.9, 0.999),
        eps: PositiveFloat = 1e-8,
    ):
        # All settings are in the groups, since a copy of an optimizer has nothing else.
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "betas": betas,
            "eps": eps,
            "hidden": False,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "adjust_lr": adjust_lr,
        }
        super().__init__(params, defaults)
        matrices: list[Tensor] = []
        for group in self.param_groups:
            if any(p.is_complex() for p in group["params"]):
                raise SettingError("optimizer=muon: expected real parameters, got complex ones")
            matrices += filter(is_matrix, group["params"])
        first = 1 if embedding else 0
        hidden = set(matrices[first : len(matrices) - 1])
        groups = []
        for group in self.param_groups:
            groups += split_group(group, hidden, adamw_lr)
        self.param_groups = groups

    @torch.no_grad()
    def step(self, closure=None):
        """Perform a single optimization step and return the loss of the closure, if any."""
        loss = evaluate_closure(closure)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            if group["hidden"]:
                self.step_hidden(params, group)
            else:
                self.step_adamw(params, group)
        return loss

    def step_hidden(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Update hidden weights by Muon."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            momentum = self.state[p]["momentum"].lerp_(p.grad, 1 - group["momentum"])
            direction = p.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
            direction = orthogonalize(direction.flatten(1), group["ns_steps"])
            lr = group["lr"] * lr_factor(group["adjust_lr"], *direction.shape)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(direction.reshape(p.shape), alpha=-lr)

    def step_adamw(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Update all other parameters by AdamW."""
        grads = []
        averages = []
        squares = []
        steps = []
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
            grads.append(p.grad)
            averages.append(state["exp_avg"])
            squares.append(state["exp_avg_sq"])
            steps.append(state["step"])
        beta1, beta2 = group["betas"]
        adamw(
            params,
            grads,
            averages,
            squares,
            [],
            steps,
            amsgrad=False,
            maximize=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )


def lr_factor(adjust_lr: str, rows: int, columns: int) -> float:
    """Return the factor of the learning rate for a matrix."""
    if adjust_lr == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


def is_matrix(p: Tensor) -> bool:
    """Return whether a parameter has several rows and columns, else there is no orthogonality."""
    return p.ndim >= 2 and len(p) > 1 and p.numel() > len(p)


def split_group(
    group: dict[str, Any], hidden: set[Tensor], adamw_lr: float | None
) -> list[dict[str, Any]]:
    """Split a group into hidden weights and other parameters, without empty groups."""
    parts = []
    for is_hidden in (True, False):
        selected = [(p in hidden) == is_hidden for p in group["params"]]
        part = group | {"hidden": is_hidden}
        for key in {"params", "param_names"} & group.keys():
            part[key] = list(compress(group[key], selected))
        if adamw_lr is not None and not is_hidden:
            part["lr"] = adamw_lr
        if part["params"]:
            parts.append(part)
    return parts


def orthogonalize(matrix: Tensor, steps: int) -> Tensor:
    """Approximate U V^T for matrix = U S V^T by quintic Newton-Schulz iterations.

    Five iterations map the singular values to about [0.7, 1.2]. Accelerators use bfloat16, as
    Jordan et al. do; a CPU is faster in float32.
    """
    x = matrix.bfloat16() if matrix.device.type != "cpu" else matrix
    tall = len(matrix) > matrix.shape[1]
    if tall:
        x = x.T
    x = x / x.norm().clamp_min(1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    if tall:
        x = x.T
    return x.to(matrix.dtype)
