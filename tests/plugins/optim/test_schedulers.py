import math

import pytest
import torch
from torch.optim import lr_scheduler as torchs

import framework as fw
from framework.errors import SettingError

NAMES = fw.schedulers.names()


def factors(name: str, total_steps: int, more: int = 0, **settings) -> list[float]:
    schedule = fw.schedulers.build(name, total_steps, **settings)
    return [schedule(step) for step in range(total_steps + more)]


def torch_factors(scheduler: type, steps: int, **settings) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = scheduler(optimizer, **settings)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(
    ("ours", "settings", "theirs", "their_settings"),
    [
        ("constant", {}, torchs.ConstantLR, {"factor": 1.0}),
        (
            "linear",
            {"final": 0.1},
            torchs.LinearLR,
            {"start_factor": 1, "end_factor": 0.1, "total_iters": 60},
        ),
        ("cosine", {"final": 0.2}, torchs.CosineAnnealingLR, {"T_max": 60, "eta_min": 0.2}),
        ("polynomial", {"power": 3}, torchs.PolynomialLR, {"total_iters": 60, "power": 3}),
        ("exponential", {"final": 0.01}, torchs.ExponentialLR, {"gamma": 0.01 ** (1 / 60)}),
        ("step", {"period": 13, "gamma": 0.5}, torchs.StepLR, {"step_size": 13, "gamma": 0.5}),
        ("step", {"period": 0.25}, torchs.StepLR, {"step_size": 15, "gamma": 0.1}),
        ("multi_step", {}, torchs.MultiStepLR, {"milestones": [30, 45], "gamma": 0.1}),
        (
            "multi_step",
            {"milestones": [7, 0.5, 40]},
            torchs.MultiStepLR,
            {"milestones": [7, 30, 40], "gamma": 0.1},
        ),
        (
            "one_cycle",
            {},
            torchs.OneCycleLR,
            {"max_lr": 1.0, "total_steps": 61, "pct_start": 18 / 61},
        ),
        ("cosine_restarts", {"period": 20}, torchs.CosineAnnealingWarmRestarts, {"T_0": 20}),
        (
            "cosine_restarts",
            {"period": 8, "growth": 2},
            torchs.CosineAnnealingWarmRestarts,
            {"T_0": 8, "T_mult": 2},
        ),
    ],
)
def test_a_run_has_the_factors_of_torchs_scheduler(ours, settings, theirs, their_settings):
    steps = 60
    if ours == "one_cycle":  # torch refuses a step after the last one
        their_settings = their_settings | {"pct_start": 0.3, "total_steps": 60}
        steps = 59
    expected = torch_factors(theirs, steps, **their_settings)
    assert factors(ours, 60, **settings)[:steps] == pytest.approx(expected, abs=1e-12)


def test_one_cycle_ends_at_its_final_factor():
    found = factors("one_cycle", 100, start=0.1, final=0.01)
    assert (found[0], found[29], found[99]) == pytest.approx((0.1, 1.0, 0.01))
    assert max(found) == 1


def test_inverse_sqrt_is_the_transformers_schedule():
    warmup = 9  # with n = step + 1: min(n^-0.5, n w^-1.5), here 1 at its highest
    expected = [min((s + 1) ** -0.5, (s + 1) * 10**-1.5) * 10**0.5 for s in range(60)]
    assert factors("noam", 60, warmup=warmup) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shape", "half"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - math.sqrt(0.5))]
)
def test_wsd_warms_up_holds_and_decays(shape, half):
    found = factors("wsd", 100, more=1, warmup=0.1, decay=20, shape=shape)
    assert found[:10] == pytest.approx([(s + 1) / 11 for s in range(10)])
    assert found[10:81] == [1.0] * 71
    assert (found[90], found[100]) == pytest.approx((half, 0), abs=1e-12)
    assert factors("wsd", 100, decay=0) == [1.0] * 100


@pytest.mark.parametrize("name", sorted({*NAMES} - {"one_cycle"}))
def test_a_warmup_rises_in_a_line_to_what_follows(name):
    for warmup, rise in ((8, 8), (0.1, 10), (1, 1)):
        found = factors(name, 100, warmup=warmup)
        assert found[:rise] == pytest.approx([(step + 1) / (rise + 1) for step in range(rise)])
        assert found[rise] == pytest.approx(1.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("total_steps", [0, 1, 2, 7])
def test_every_schedule_is_defined_for_any_step(name, total_steps):
    for warmup in (0, 0.5, 3, 50):
        found = factors(name, total_steps, more=20, warmup=warmup)
        assert all(0 <= factor <= 1 and math.isfinite(factor) for factor in found)
        assert found[0] > 0 or total_steps == 0


class TestReduceOnPlateau:
    def test_it_reduces_the_rate_in_the_steps_of_torch(self):
        generator = torch.Generator().manual_seed(5)
        losses = [*(1 + torch.rand(200, generator=generator)).tolist(), math.nan, 0.1, 0.2]
        settings = {"factor": 0.5, "patience": 3, "threshold": 0.01, "cooldown": 2}
        for mode in ("min", "max"):
            optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
            theirs = torchs.ReduceLROnPlateau(optimizer, mode=mode, min_lr=0.001, eps=0, **settings)
            ours = fw.schedulers.build("plateau", 1000, mode=mode, min_factor=0.001, **settings)
            for loss in losses:
                theirs.step(loss)
                ours.observe({"val/loss": loss})
                assert ours(0) == pytest.approx(optimizer.param_groups[0]["lr"])

    def test_a_state_dict_restores_it(self):
        first, second = (fw.schedulers.build("reduce_on_plateau", 10, patience=1) for _ in range(2))
        for loss in (1.0, 1.0):
            first.observe({"val/loss": loss})
        second.load_state_dict(first.state_dict())
        second.observe({"val/loss": 1.0})
        assert (first(5), second(5)) == pytest.approx((1.0, 0.1))

    def test_a_missing_monitored_value_is_an_error_with_a_suggestion(self):
        schedule = fw.schedulers.build("reduce_on_plateau", 10, monitor="val/acuracy")
        with pytest.raises(SettingError, match="did you mean 'val/accuracy'"):
            schedule.observe({"val/loss": 1.0, "val/accuracy": 0.5})
