"""Optimizers: torch's own by table, and Lion and Muon. `lr` is the rate that the schedule multiplies.

Left out: LBFGS, which evaluates the loss several times a step, and SparseAdam, which needs sparse gradients.
"""

import math
from collections.abc import Callable
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

HIDDEN = (
    "maximize",
    "capturable",
    "differentiable",
    "foreach",
    "fused",
)  # the framework's business
COMMON = {"lr": PositiveFloat, "weight_decay": NonNegativeFloat}
BETAS = COMMON | {"betas": tuple[Rate, Rate], "eps": PositiveFloat}

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


def adam(p: Tensor, g: Tensor, state: State, settings: Settings) -> tuple[Tensor, State]:
    """Adam (Kingma and Ba 2015, arXiv:1412.6980, algorithm 1), with decoupled weight decay where it is set."""
    (beta1, beta2), lr, weight_decay = settings["betas"], settings["lr"], settings["weight_decay"]
    if settings.get("decoupled_weight_decay"):
        p = p * (1 - lr * weight_decay)
    else:
        g = decayed(p, g, weight_decay)
    step = state["step"] + 1
    average = state["exp_avg"] + (g - state["exp_avg"]) * (1 - beta1)
    square = state["exp_avg_sq"] * beta2 + g * g * (1 - beta2)
    new = {"step": step, "exp_avg": average, "exp_avg_sq": square}
    if settings["amsgrad"]:
        square = new["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], square)
    number = step.to(p.dtype)
    scale = lr / (1 - beta1**number)
    return p - scale * (
        average / (square.sqrt() / (1 - beta2**number).sqrt() + settings["eps"])
    ), new


def sgd(p: Tensor, g: Tensor, state: State, settings: Settings) -> tuple[Tensor, State]:
    """SGD with momentum, classical or Nesterov's (Sutskever et al. 2013, as torch writes it)."""
    g, momentum = decayed(p, g, settings["weight_decay"]), settings["momentum"]
    if is_zero(momentum):
        return p - settings["lr"] * g, {}
    buffer = state["momentum_buffer"] * momentum + g * (1 - settings["dampening"])
    return p - settings["lr"] * (g + momentum * buffer if settings["nesterov"] else buffer), {
        "momentum_buffer": buffer
    }


def rmsprop(p: Tensor, g: Tensor, state: State, settings: Settings) -> tuple[Tensor, State]:
    """RMSprop (Hinton 2012, lecture 6e), centred (Graves 2013, arXiv:1308.0850, equations 38 to 45) if wanted."""
    g, alpha = decayed(p, g, settings["weight_decay"]), settings["alpha"]
    square = variance = state["square_avg"] * alpha + g * g * (1 - alpha)
    new = {"step": state["step"] + 1, "square_avg": square}
    if settings["centered"]:
        average = new["grad_avg"] = state["grad_avg"] + (g - state["grad_avg"]) * (1 - alpha)
        variance = square - average * average
    move = g / (variance.sqrt() + settings["eps"])
    if not is_zero(settings["momentum"]):
        move = new["momentum_buffer"] = state["momentum_buffer"] * settings["momentum"] + move
    return p - settings["lr"] * move, new


def adagrad(p: Tensor, g: Tensor, state: State, settings: Settings) -> tuple[Tensor, State]:
    """Adagrad (Duchi et al. 2011, JMLR 12), with a rate that falls by `lr_decay`, as torch has it."""
    g = decayed(p, g, settings["weight_decay"])
    lr = settings["lr"] / (1 + state["step"].to(p.dtype) * settings["lr_decay"])
    total = state["sum"] + g * g
    return p - lr * (g / (total.sqrt() + settings["eps"])), {
        "step": state["step"] + 1,
        "sum": total,
    }


def decayed(p: Tensor, g: Tensor, weight_decay: Any) -> Tensor:
    return g if is_zero(weight_decay) else g + weight_decay * p


def is_zero(value: Any) -> bool:
    return not isinstance(value, Tensor) and value == 0


for written, update in (
    (optim.Adam, adam),
    (optim.AdamW, adam),
    (optim.SGD, sgd),
    (optim.RMSprop, rmsprop),
    (optim.Adagrad, adagrad),
):
    pure_updates.register(written, update)


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """Return the closure's loss, with gradients, or None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


@optimizers.register("lion")
class Lion(PureOptimizer):
    """The sign of an interpolated momentum, with decoupled weight decay (Chen et al. 2023, arXiv:2302.06675, alg. 2).

    Every number moves by `lr` a step: the authors take a rate 3 to 10 times lower, and a weight decay as much higher,
    than AdamW's.

    Args:
        lr: learning rate.
        betas: weight of the momentum in the step's direction, and in the momentum's own update.
        weight_decay: decay of the parameters a step, times lr.
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
        lr, (beta1, beta2) = settings["lr"], settings["betas"]
        momentum = state["momentum"]
        direction = (momentum + (g - momentum) * (1 - beta1)).sign()
        p = p * (1 - lr * settings["weight_decay"]) - lr * direction
        return p, {"momentum": momentum + (g - momentum) * (1 - beta2)}


@optimizers.register("muon")
class Muon(optim.Optimizer):
    """Orthogonalised momentum for hidden weights, AdamW for the rest.

    The source is Jordan et al. 2024, kellerjordan.github.io/posts/muon. Hidden weights are the matrices (of a
    convolution, one row a filter), but the last, which is taken to be the output layer's.

    Args:
        lr: learning rate.
        weight_decay: decay of all parameters a step, times lr.
        momentum: share of the momentum that is kept, of the hidden weights.
        nesterov: look ahead by one step of the momentum.
        ns_steps: Newton-Schulz iterations.
        adjust_lr: match_rms_adamw makes updates as large as AdamW's, whose rates then fit (Liu et al. 2025,
            arXiv:2502.16982, section 2.2); original is Jordan's, with rates near 0.02.
        embedding: the first matrix is an embedding table, and AdamW's too.
        adamw_lr: learning rate of the rest; null: lr.
        betas: AdamW's.
        eps: AdamW's.
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
        of_hidden = {
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "adjust_lr": adjust_lr,
        }
        of_all = {
            "lr": lr,
            "weight_decay": weight_decay,
            "betas": betas,
            "eps": eps,
            "hidden": False,
        }
        super().__init__(
            params, of_all | of_hidden
        )  # all in the groups: a copied optimizer keeps nothing else
        if any(p.is_complex() for group in self.param_groups for p in group["params"]):
            raise SettingError("optimizer=muon: expected real parameters, got complex ones")
        matrices = [p for group in self.param_groups for p in group["params"] if is_matrix(p)]
        hidden = {id(p) for p in matrices[embedding : len(matrices) - 1]}
        self.param_groups = [
            part for group in self.param_groups for part in split(group, hidden, adamw_lr)
        ]

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step; returns the closure's loss, if there is one."""
        loss = loss_of(closure)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                (self.step_hidden if group["hidden"] else self.step_adamw)(params, group)
        return loss

    def step_hidden(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            momentum = self.state[p]["momentum"].lerp_(p.grad, 1 - group["momentum"])
            direction = p.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
            direction = orthogonalise(direction.flatten(1), group["ns_steps"])
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(
                direction.reshape(p.shape),
                alpha=-group["lr"] * scale(group["adjust_lr"], *direction.shape),
            )

    def step_adamw(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            if not self.state[p]:
                zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                self.state[p].update(step=torch.zeros((), dtype=torch.float32), **zeros)
        states = [self.state[p] for p in params]
        averages, squares, steps = (
            [s[name] for s in states] for name in ("exp_avg", "exp_avg_sq", "step")
        )
        beta1, beta2 = group["betas"]
        settings = {name: group[name] for name in ("lr", "weight_decay", "eps")}
        adamw(
            params,
            [p.grad for p in params],
            averages,
            squares,
            [],
            steps,
            amsgrad=False,
            maximize=False,
            beta1=beta1,
            beta2=beta2,
            **settings,
        )


def scale(adjust_lr: str, rows: int, columns: int) -> float:
    if adjust_lr == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


def is_matrix(p: Tensor) -> bool:
    """Whether a parameter has rows and columns; a single row has nothing to be orthogonal to."""
    return p.ndim >= 2 and len(p) > 1 and p.numel() > len(p)


def split(group: dict[str, Any], hidden: set[int], adamw_lr: float | None) -> list[dict[str, Any]]:
    """Return the group's hidden weights and its other parameters as two groups, or one where the other is empty."""
    parts = []
    for is_hidden in (True, False):
        chosen = [(id(p) in hidden) == is_hidden for p in group["params"]]
        part = group | {"hidden": is_hidden}
        for key in {"params", "param_names"} & group.keys():
            part[key] = [item for item, wanted in zip(group[key], chosen, strict=True) if wanted]
        if adamw_lr is not None and not is_hidden:
            part["lr"] = adamw_lr
        if part["params"]:
            parts.append(part)
    return parts


def orthogonalise(matrix: Tensor, steps: int) -> Tensor:
    """Return nearly U V^T of matrix = U S V^T: five quintic Newton-Schulz steps take S into about [0.7, 1.2].

    In bfloat16 on an accelerator, as by Jordan et al.; a CPU is faster in float32.
    """
    x = matrix.bfloat16() if matrix.device.type != "cpu" else matrix
    x = x.T if len(matrix) > matrix.shape[1] else x
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if len(matrix) > matrix.shape[1] else x).to(matrix.dtype)
