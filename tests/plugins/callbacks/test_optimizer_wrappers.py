"""SAM, lookahead and schedule-free training, each against its formulas in a plain loop."""

import copy

import pytest
import torch
from torch import nn

import framework as fw
from compiler import needs_compiler
from framework import Callback, TensorSplit, Trainer
from framework.errors import SettingError
from framework.tuning.vectorized.stacked_update import NotStackable
from framework.tuning.vectorized.trainer import check_equal_settings

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
    """One step an epoch, of all the data, unless the batch is smaller."""
    model = network() if model is None else model
    trainer = Trainer(max_epochs=epochs, callbacks=callbacks, device="cpu", **settings)
    optimizer = adamw(model) if optimizer is None else optimizer(model)
    trainer.fit(
        *(model, SPLIT),
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


def assert_same_weights(found, expected, **tolerance):
    for one, two in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, two, **tolerance)


class Cut(Callback):
    """Keeps the state of the run after a step, and ends it."""

    def __init__(self, step):
        self.step, self.kept = step, None

    def on_step_end(self, trainer):
        if trainer.state.step == self.step:
            self.kept, trainer.state.stop = copy.deepcopy(trainer.state_dict()), "cut"


class Validated(Callback):
    """Keeps the weights that each validation sees."""

    def __init__(self):
        self.weights = []

    def on_validation_start(self, trainer):
        self.weights.append([p.detach().clone() for p in trainer.model.parameters()])


# --- SAM --------------------------------------------------------------------------------------------------------------


def sam_by_hand(rho, steps):
    model = network()
    optimizer = adamw(model, momentum=0.9)
    for _ in range(steps):
        first = gradients(model)
        norm = torch.sqrt(sum(g.square().sum() for g in first))
        away = copy.deepcopy(model)
        with torch.no_grad():
            for p, g in zip(away.parameters(), first, strict=True):
                p += rho * g / norm
        for p, g in zip(model.parameters(), gradients(away), strict=True):
            p.grad = g
        optimizer.step()
    return model


@pytest.mark.parametrize(
    "manner",
    [
        {},
        {"batch_size": 10, "accumulate": 3},
        {"micro_batch": 7},
        pytest.param({"compile": "step"}, marks=needs_compiler),
    ],
)
def test_sam_takes_the_gradient_where_the_loss_is_steepest(manner):
    found = fit(build("sam", rho=0.3), optimizer=lambda model: adamw(model, 0.9), **manner)
    assert_same_weights(found.model, sam_by_hand(0.3, 12), rtol=1e-3, atol=1e-4)
    plain = fit(optimizer=lambda model: adamw(model, 0.9), **manner)
    assert (
        max(
            float((a - b).detach().abs().max())
            for a, b in zip(found.model.parameters(), plain.model.parameters(), strict=True)
        )
        > 0.01
    )


def test_sam_sees_the_batch_that_transforms_made_and_leaves_statistics_alone():
    class Negated(fw.Transform):
        def __call__(self, batch):
            return -batch[0], batch[1]

    model = network(nn.BatchNorm1d(8))
    fit(Negated(), build("sam"), model=model, epochs=1)
    expected = network(nn.BatchNorm1d(8))
    expected(-INPUTS)
    torch.testing.assert_close(model[1].running_mean, expected[1].running_mean)
    assert int(model[1].num_batches_tracked) == 1


# --- lookahead --------------------------------------------------------------------------------------------------------


def test_lookahead_goes_half_the_way_after_every_k_steps():
    seen, fast = Validated(), network()
    found = fit(build("lookahead", k=5, alpha=0.25), seen, epochs=12)
    slow, optimizer, expected = copy.deepcopy(fast), adamw(fast), []
    for step in range(1, 13):
        for p, g in zip(fast.parameters(), gradients(fast), strict=True):
            p.grad = g
        optimizer.step()
        if step % 5 == 0:
            with torch.no_grad():
                for s, w in zip(slow.parameters(), fast.parameters(), strict=True):
                    s += 0.25 * (w - s)
                    w.copy_(s)
        expected.append([p.detach().clone() for p in slow.parameters()])
    for found_there, wanted in zip(seen.weights, expected, strict=True):
        torch.testing.assert_close(found_there, wanted, rtol=1e-4, atol=1e-5)
    assert_same_weights(found.model, slow, rtol=1e-4, atol=1e-5)


# --- schedule-free ----------------------------------------------------------------------------------------------------


def schedule_free_by_hand(beta, rates):
    """Algorithm 1 of the paper: AdamW's normalised gradient at y, no momentum, decay at y."""
    z, x = ([p.detach().clone() for p in network().parameters()] for _ in range(2))
    square, total, model = [torch.zeros_like(p) for p in z], 0.0, network()
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
    found = fit(build("schedule_free", beta=0.8), schedule=factors.__getitem__)
    expected = schedule_free_by_hand(0.8, [0.05 * factor for factor in factors])
    for p, x in zip(found.model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), x, rtol=1e-3, atol=1e-4)


def test_schedule_free_refuses_a_momentum():
    with pytest.raises(SettingError, match=r"it needs optimizer\.betas=\[0,0\.999\]"):
        fit(build("schedule_free"), optimizer=lambda model: adamw(model, 0.9))
    with pytest.raises(SettingError, match=r"it needs optimizer\.momentum=0"):
        fit(
            build("schedule_free"),
            optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.5),
        )


# --- gradient noise scale ---------------------------------------------------------------------------------------------


def test_the_noise_scale_of_single_samples_is_the_trace_of_their_covariance_by_the_square_of_the_mean():
    model = network()
    each = []
    for x, y in zip(INPUTS, TARGETS, strict=True):
        loss = nn.functional.mse_loss(model(x[None]), y[None])
        each.append(
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])
        )
    gradients = torch.stack(each).double()
    trace = float(torch.cov(gradients.T).trace())
    squared = (
        float(gradients.mean(0).square().sum()) - trace / 24
    )  # of the true gradient, without the noise in the mean
    noise = build("noise_scale", every="1steps", parts=24, decay=0.0)
    trainer = fit(noise, epochs=1, log_every="1steps")
    assert (noise.trace, noise.squared) == pytest.approx((trace, squared), rel=1e-4)
    assert trainer.state.metrics["train/gradient_noise_scale"] == pytest.approx(
        trace / squared, rel=1e-3
    )


def test_measuring_the_noise_scale_changes_no_bit():
    def run(*callbacks):
        model = network(nn.BatchNorm1d(8), nn.Dropout(0.3))
        return fit(*callbacks, model=model, batch_size=8, epochs=3).model.state_dict()

    plain, measured = run(), run(build("noise_scale", every="1steps", parts=2))
    assert all(torch.equal(plain[name], measured[name]) for name in plain)


# --- all of them ------------------------------------------------------------------------------------------------------

ALL = ["sam", "lookahead", "schedule_free", "noise_scale"]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("step", [3, 6, 11])
def test_a_run_cut_off_goes_on_bit_for_bit(name, step):
    """Three steps an epoch, with dropout."""
    settings = {"batch_size": 8, "epochs": 5}
    whole = fit(build(name), model=network(nn.Dropout(0.3)), **settings)
    cut = Cut(step)
    fit(build(name), cut, model=network(nn.Dropout(0.3)), **settings)
    resumed = fit(build(name), model=network(nn.Dropout(0.3)), resume=cut.kept, **settings)
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    )


@pytest.mark.parametrize("name", ALL)
def test_many_trials_as_one_refuse_it_by_name(name):
    trainers = [Trainer(max_epochs=1, callbacks=[build(name)]) for _ in range(2)]
    with pytest.raises(NotStackable, match="works with a single trial"):
        check_equal_settings(trainers)


def test_two_sets_of_weights_to_evaluate_are_refused():
    with pytest.raises(
        SettingError, match="Ema and Lookahead each have their own weights to evaluate: choose one"
    ):
        fit(build("ema"), build("lookahead"))
