"""The commands before a long run: find a learning rate or a batch size, and check."""

import itertools
import json
import math
import re

import pytest
import torch

from framework.errors import RunError
from framework.experiment.dry_runs.check import OVERFIT_STEPS
from framework.experiment.dry_runs.find import Speed, select_steps, suggested

pytestmark = pytest.mark.usefixtures("one_thread")


def found(command, words=""):
    status, out, err = command(f"find lr --json {words}")
    assert status in (0, None), err
    return json.loads(out)


def test_the_suggested_rate_trains_and_the_highest_does_not(command):
    test = found(command)
    rates = test["rates"]
    losses = test["losses"]
    assert rates[0] == pytest.approx(1e-7)
    ratios = [b / a for a, b in itertools.pairwise(rates)]
    assert ratios == pytest.approx([1e8 ** (1 / 99)] * len(ratios))  # each step the same factor
    assert losses[-1] > 4 * min(losses) or rates[-1] == pytest.approx(10)
    assert losses[0] == pytest.approx(math.log(10), abs=0.3)
    assert 1e-4 < test["suggestion"] < test["lowest"] < 1
    status, out, err = command(f"train trainer.max_epochs=3 optimizer.lr={test['suggestion']}")
    assert status in (0, None), err
    tested = re.search(r"^test \(.*\) +\S+ +(\S+)$", out, re.MULTILINE)
    assert float(tested[1]) > 0.9


def test_the_suggested_rate_depends_on_the_optimizer(command):
    assert found(command, "optimizer=sgd")["suggestion"] > 5 * found(command)["suggestion"]


def test_the_curve_begins_at_its_lowest_loss(command):
    _, out, err = command("find lr --json optimizer=sgd")
    losses = json.loads(out)["losses"]
    labels = re.findall(r"^ +([\d.]+) [\u2800-\u28ff]", err, re.MULTILINE)
    assert labels[-1] == f"{min(losses):.3g}"
    assert float(labels[0]) == pytest.approx(2 * losses[0] - min(losses), rel=0.01)


def test_groups_keep_their_factors_on_the_rate(command):
    """If all parameters have a tenth of the rate, the optimizer's own rate is ten times as high."""
    slower = found(command, "'parameters.rates={*: 0.1}'")
    assert 5 < slower["suggestion"] / found(command)["suggestion"] < 20


@pytest.mark.parametrize("words", ["experiment=spirals", "experiment=spirals loader.batch_size=16"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_noisy_loss_gets_no_rate_at_which_it_is_flat(command, words, seed):
    test = found(command, f"{words} seed={seed}")
    assert 2e-4 < test["suggestion"] < test["lowest"] < 0.05


def curve(noise, seed, fall=60):
    """Return the losses of a range test that fall from 1 to 0.5 at a step, and then diverge."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.arange(100.0)
    losses = 1 - 0.5 * torch.sigmoid((steps - fall) / 3) + ((steps - 85) / 5).clamp(min=0) ** 2
    return (losses + noise * torch.randn(100, generator=generator)).tolist()


def smoothed(losses):
    mean = 0.0
    means = []
    for step, loss in enumerate(losses, start=1):
        mean = 0.9 * mean + 0.1 * loss
        means.append(mean / (1 - 0.9**step))
    return means


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.1])
@pytest.mark.parametrize("fall", [30, 60])
def test_the_steepest_step_is_where_the_loss_falls(noise, fall):
    for seed in range(10):
        losses = curve(noise, seed, fall)
        steepest, lowest = select_steps(losses, smoothed(losses))
        assert fall - 5 <= steepest <= fall + 15
        assert fall <= lowest < 95


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_loss_that_does_not_fall_has_no_steepest_step(noise):
    losses = curve(noise, 0, fall=1000)
    with pytest.raises(RunError):
        select_steps(losses, smoothed(losses))


def test_find_needs_lr_or_batch_size(command):
    status, _, err = command("find width")
    assert status == 2
    assert "find width: expected one of lr, batch_size" in err


def test_find_and_check_leave_no_files(command, tmp_path):
    for line in ("find lr", "check"):
        status, _, err = command(line)
        assert status in (0, None), err
    assert not (tmp_path / "runs").exists()


def test_batch_sizes_are_measured_up_to_the_data(command):
    status, out, err = command("find batch_size --json")
    assert status in (0, None), err
    result = json.loads(out)
    assert [each["batch_size"] for each in result["measured"]] == [
        8 * 2**n for n in range(8)
    ]  # 1,257 samples
    assert all(each["samples_per_second"] > 0 for each in result["measured"])
    assert result["suggestion"] >= 64


@pytest.mark.parametrize(
    ("speeds", "best"),
    [
        ([100, 200, 390, 395, 400], 32),  # doubling gains less than 5 %
        ([100, 200, None], 16),  # then memory is full
        ([100, 90, 80], 8),
    ],
)
def test_the_smallest_batch_size_that_is_nearly_as_fast_is_suggested(speeds, best):
    assert suggested([Speed(8 * 2**n, speed) for n, speed in enumerate(speeds)]).batch_size == best


def test_a_check_prints_all_its_parts(command):
    status, out, err = command("check data.image=true model=cnn +transforms=crop model.dropout=0.2")
    assert status in (0, None), err
    assert "the same weights, bit for bit" in out
    first, last = (
        float(text.split()[0].rstrip(","))
        for text in (out.split("one batch: ")[1], out.split("at first, ")[1])
    )
    assert last < first / 4


def test_a_check_detects_a_part_that_loses_its_state(command, forget_plugins, tmp_path):
    (tmp_path / "forgetful.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "from framework import blocks\n"
        "@blocks.register('forgetful')\n"
        "class Forgetful(nn.Module):\n"
        "    '''Scales by how often it was called, which no checkpoint knows.'''\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.calls = 0\n"
        "    def forward(self, x):\n"
        "        self.calls += self.training\n"
        "        return x * (1 + self.calls)\n"
    )
    status, _, err = command(
        "check --plugins forgetful.py model=stack 'model.blocks=[linear,forgetful]'"
    )
    assert status == 2
    assert "differs from that of the uninterrupted run" in err


def test_a_check_detects_an_experiment_that_does_not_learn(command):
    status, _, err = command("check optimizer.lr=1e-12 optimizer.weight_decay=0")
    assert status == 2
    assert "the batch is not learned" in err
    assert f"after {OVERFIT_STEPS} steps" in err
