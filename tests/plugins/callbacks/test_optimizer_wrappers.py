"""SAM, lookahead, schedule-free training and noise scale, compared with plain loops."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import framework as fw
from compiler import needs_compiler
from framework import Callback, TensorSplit, Trainer
from framework.errors import SettingError
from framework.tuning.vectorized.stacked_update import NotStackable
from framework.tuning.vectorized.trainer import check_equal_settings
from regressions import StopAt, assert_same_weights

INPUTS = torch.randn(24, 2, generator=torch.Generator().manual_seed(3))
TARGETS = INPUTS.prod(1, keepdim=True)
SPLIT = TensorSplit(INPUTS, TARGETS)


def network(*more):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 8), *more, nn.Tanh(), nn.Linear(8, 1))


def adamw(model, momentum=0.0):
    return torch.optim.AdamW(model.parameters(), lr=0.05, betas=(momentum, 0.99), weight_decay=0.1)


def fit(
    *callbacks,
    model=None,
    optimizer=None,
    epochs=12,
    batch_size=24,
    resume=None,
    schedule=None,
    **settings,
):
    """Fit with one step per epoch, of all samples, unless the batch is smaller."""
    model = network() if model is None else model
    trainer = Trainer(max_epochs=epochs, callbacks=callbacks, device="cpu", **settings)
    optimizer = adamw(model) if optimizer is None else optimizer(model)
    trainer.fit(
        model,
        SPLIT,
        task=nn.MSELoss(),
        optimizer=optimizer,
        val=SPLIT,
        batch_size=batch_size,
        resume=resume,
        schedule=schedule,
    )
    return trainer


def build(name, **settings):
    return fw.callbacks.build(name, **settings)


def gradients(model):
    loss = nn.functional.mse_loss(model(INPUTS), TARGETS)
    return torch.autograd.grad(loss, list(model.parameters()))


def assert_close_weights(model, expected, **tolerance):
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def set_gradients(model, gradients):
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient


class ValidatedWeights(Callback):
    """Stores the weights of each validation."""

    def __init__(self):
        self.weights = []

    def on_validation_start(self, trainer):
        self.weights.append([p.detach().clone() for p in trainer.model.parameters()])


# SAM


def sam_in_a_loop(rho, steps):
    model = network()
    optimizer = adamw(model, momentum=0.9)
    for _ in range(steps):
        first = gradients(model)
        norm = torch.sqrt(sum(g.square().sum() for g in first))
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p, g in zip(moved.parameters(), first, strict=True):
                p += rho * g / norm
        set_gradients(model, gradients(moved))
        optimizer.step()
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"batch_size": 10, "accumulate": 3},
        {"micro_batch": 7},
        pytest.param({"compile": "step"}, marks=needs_compiler),
    ],
)
def test_sam_computes_the_gradient_in_the_direction_of_the_steepest_loss(settings, eager_backend):
    optimizer = partial(adamw, momentum=0.9)
    trained = fit(build("sam", rho=0.3), optimizer=optimizer, **settings).model
    assert_close_weights(trained, sam_in_a_loop(0.3, 12), rtol=1e-3, atol=1e-4)
    plain = fit(optimizer=optimizer, **settings).model
    with pytest.raises(AssertionError):
        assert_close_weights(trained, plain, rtol=0, atol=0.01)


def test_sam_uses_transformed_batches_and_keeps_running_statistics():
    class Negated(fw.Transform):
        def __call__(self, batch):
            return -batch[0], batch[1]

    model = network(nn.BatchNorm1d(8))
    fit(Negated(), build("sam"), model=model, epochs=1)
    expected = network(nn.BatchNorm1d(8))
    expected(-INPUTS)
    torch.testing.assert_close(model[1].running_mean, expected[1].running_mean)
    assert int(model[1].num_batches_tracked) == 1


# lookahead


def test_lookahead_moves_the_slow_weights_after_every_k_steps():
    validated = ValidatedWeights()
    trainer = fit(build("lookahead", k=5, alpha=0.25), validated, epochs=12)
    fast = network()
    slow = copy.deepcopy(fast)
    optimizer = adamw(fast)
    expected = []
    for step in range(1, 13):
        set_gradients(fast, gradients(fast))
        optimizer.step()
        if step % 5 == 0:
            with torch.no_grad():
                for s, w in zip(slow.parameters(), fast.parameters(), strict=True):
                    s += 0.25 * (w - s)
                    w.copy_(s)
        expected.append([p.detach().clone() for p in slow.parameters()])
    torch.testing.assert_close(validated.weights, expected, rtol=1e-4, atol=1e-5)
    assert_close_weights(trainer.model, slow, rtol=1e-4, atol=1e-5)


# schedule-free


def schedule_free_in_a_loop(beta, rates):
    """Run algorithm 1 of the paper: AdamW's normalised gradient at y, no momentum, decay at y."""
    model = network()
    z = [p.detach().clone() for p in model.parameters()]
    x = [p.clone() for p in z]
    square = [torch.zeros_like(p) for p in z]
    total = 0.0
    for step, lr in enumerate(rates, 1):
        y = [(1 - beta) * a + beta * b for a, b in zip(z, x, strict=True)]
        with torch.no_grad():
            for p, value in zip(model.parameters(), y, strict=True):
                p.copy_(value)
        total += lr**2
        for i, g in enumerate(gradients(model)):
            square[i] = 0.99 * square[i] + 0.01 * g**2
            direction = g / ((square[i] / (1 - 0.99**step)).sqrt() + 1e-8)
            z[i] = z[i] - lr * direction - lr * 0.1 * y[i]
            x[i] = (1 - lr**2 / total) * x[i] + lr**2 / total * z[i]
    return x


@pytest.mark.parametrize("warmup", [1, 6])
def test_schedule_free_evaluates_the_average_of_the_paper(warmup):
    factors = [min(1.0, (step + 1) / warmup) for step in range(12)]
    trainer = fit(build("schedule_free", beta=0.8), schedule=factors.__getitem__)
    expected = schedule_free_in_a_loop(0.8, [0.05 * factor for factor in factors])
    for parameter, x in zip(trainer.model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("optimizer", "advice"),
    [
        (partial(adamw, momentum=0.9), r"optimizer\.betas=\[0,0\.999\]"),
        (lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.5), r"optimizer\.momentum=0"),
    ],
)
def test_schedule_free_with_momentum_is_an_error(optimizer, advice):
    with pytest.raises(SettingError, match=advice):
        fit(build("schedule_free"), optimizer=optimizer)


# gradient noise scale


def test_the_noise_scale_is_the_trace_of_the_covariance_by_the_squared_norm_of_the_mean():
    model = network()
    rows = []
    for x, y in zip(INPUTS, TARGETS, strict=True):
        loss = nn.functional.mse_loss(model(x[None]), y[None])
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.reshape(-1) for g in gradient]))
    gradients = torch.stack(rows).double()
    trace = float(torch.cov(gradients.T).trace())
    noise_of_mean = trace / 24
    squared = float(gradients.mean(0).square().sum()) - noise_of_mean
    noise = build("noise_scale", every="1steps", parts=24, decay=0.0)
    trainer = fit(noise, epochs=1, log_every="1steps")
    assert (noise.trace, noise.squared) == pytest.approx((trace, squared), rel=1e-4)
    logged = trainer.state.metrics["train/gradient_noise_scale"]
    assert logged == pytest.approx(trace / squared, rel=1e-3)


def test_measuring_the_noise_scale_does_not_change_training():
    def state(*callbacks):
        model = network(nn.BatchNorm1d(8), nn.Dropout(0.3))
        return fit(*callbacks, model=model, batch_size=8, epochs=3).model.state_dict()

    plain = state()
    measured = state(build("noise_scale", every="1steps", parts=2))
    for name, tensor in plain.items():
        assert torch.equal(tensor, measured[name]), name


# all of them

ALL = ["sam", "lookahead", "schedule_free", "noise_scale"]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("step", [3, 6, 11])
def test_a_resumed_run_equals_the_uninterrupted_run(name, step):
    settings = {"batch_size": 8, "epochs": 5}  # three steps per epoch
    uninterrupted = fit(build(name), model=network(nn.Dropout(0.3)), **settings)
    stop = StopAt(step)
    fit(build(name), stop, model=network(nn.Dropout(0.3)), **settings)
    resumed = fit(build(name), model=network(nn.Dropout(0.3)), resume=stop.state, **settings)
    assert_same_weights(resumed.model, uninterrupted.model)


@pytest.mark.parametrize("name", ALL)
def test_vectorized_trials_do_not_support_it(name):
    trainers = [Trainer(max_epochs=1, callbacks=[build(name)]) for _ in range(2)]
    with pytest.raises(NotStackable, match="works with a single trial"):
        check_equal_settings(trainers)


def test_two_callbacks_that_evaluate_their_own_weights_are_an_error():
    with pytest.raises(SettingError, match=r"Ema and Lookahead .*: choose one"):
        fit(build("ema"), build("lookahead"))
