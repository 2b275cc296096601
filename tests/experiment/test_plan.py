"""The plan of a run: cost by formula, memory by formula and measurement, no side effects."""

import copy
import io
import itertools
import json
import math
from dataclasses import asdict

import pytest
import torch
from rich.console import Console
from torch import nn

import framework as fw
from framework.contracts.optimizer import Parameters
from framework.contracts.strategy import Memory
from framework.contracts.task import Step, Task
from framework.errors import DataError, SettingError
from framework.experiment.experiment import Experiment
from framework.experiment.plan import Curve, make_plan, read_curve
from framework.experiment.plan_text import bytes_text, count_text, curve_text, fold, render
from framework.training.layer_table import (
    Layer,
    activation_bytes,
    model_undisturbed,
    optimizer_bytes,
    read_layers,
    saved_bytes,
)
from runs import composed


class Classify(Task):
    criterion = nn.CrossEntropyLoss()

    def step(self, model, batch):
        outputs = model(batch[0])
        return Step(self.criterion(outputs, batch[1]), outputs, batch[1])


def batch_of(size, *shape, classes=5):
    return torch.randn(size, *shape), torch.randint(0, classes, (size,))


def mlp():
    return nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 5))


class AllKinds(nn.Module):
    """A layer of each kind, tied weights, a parameter of its own and an unused layer."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.position = nn.Parameter(torch.zeros(64, 16))
        self.encoder = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.recurrent = nn.LSTM(16, 8, batch_first=True)
        self.head = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.unused = nn.Linear(3, 3)
        self.again.weight = self.head.weight

    def forward(self, images):
        x = self.norm(self.convolution(images)).flatten(2).transpose(1, 2) + self.position
        x, _ = self.recurrent(self.encoder(x))
        return self.again(self.head(x[:, -1]))


def test_flops_and_parameters_of_layers_follow_the_formulas():
    model = AllKinds()
    layers, unused = read_layers(model, batch_of(2, 3, 8, 8))
    by_name = {layer.name: layer for layer in layers}
    flops = {name: layer.flops for name, layer in by_name.items()}
    assert flops["convolution"] == 2 * 16 * 8 * 8 * 3 * 3 * 3  # a multiply-add is two
    assert flops["encoder.linear1"] == 64 * 2 * 16 * 32
    projections = 64 * 2 * 16 * (48 + 16)
    scores = 2 * 2 * 64 * 64 * 16
    assert flops["encoder.self_attn"] == projections + scores
    assert flops["recurrent"] == 64 * 2 * 4 * 8 * (16 + 8)
    assert flops["head"] == flops["again"] == 2 * 8 * 8
    assert by_name["convolution"].out_shape == (16, 8, 8)
    assert by_name["recurrent"].out_shape == (64, 8)
    assert by_name["convolution"].parameters == 16 * 3 * 3 * 3
    assert by_name["(itself)"].parameters == 64 * 16
    assert by_name["encoder.self_attn"].parameters == sum(
        p.numel() for p in model.encoder.self_attn.parameters()
    )
    assert (by_name["head"].parameters, by_name["again"].parameters) == (
        8 * 8 + 8,
        8,
    )  # tied weights count once
    assert unused == ["unused.weight", "unused.bias"]
    assert sum(layer.parameters for layer in layers) + 12 == sum(
        p.numel() for p in model.parameters()
    )


def test_a_plan_changes_neither_model_nor_optimizer_nor_generators():
    model = nn.Sequential(nn.Linear(10, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 5))
    model[1].eval()
    optimizer = torch.optim.AdamW(model.parameters())
    batch = batch_of(8, 10)
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    modes = [m.training for m in model]
    make_plan(model, batch, task=Classify(), optimizer=optimizer, steps_per_epoch=1, total_steps=1)
    with pytest.raises(ZeroDivisionError), model_undisturbed(model, train=True):
        torch.rand(3)
        model(batch[0])
        _ = 1 / 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model] == modes
    assert not optimizer.state
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model)


def test_activation_memory_of_a_small_model_follows_the_formula():
    # Kept for the backward pass: the inputs, the outputs of relu (shared with the second linear),
    # log-softmax, the targets, and the total weight of cross entropy, one float.
    n = 64
    floats = n * 10 + n * 32 + n * 5 + 1
    assert saved_bytes(mlp(), batch_of(n, 10), Classify(), n) == 4 * floats + 8 * n
    assert (
        activation_bytes(mlp(), batch_of(n, 10), Classify()) == 4 * floats + 8 * n
    )  # from two and four samples


@pytest.mark.parametrize("size", [1, 3, 4, 33])
def test_activation_memory_scales_to_any_batch_size(size):
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GELU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(144, 5)
    )
    batch = batch_of(size, 1, 8, 8)
    assert activation_bytes(model, batch, Classify()) == saved_bytes(model, batch, Classify(), size)


@pytest.mark.parametrize("name", fw.optimizers.names())
def test_optimizer_memory_is_that_of_a_real_step(name):
    model = mlp()
    optimizer = fw.optimizers.build(name, list(model.parameters()))
    estimated = optimizer_bytes(optimizer)
    Classify().step(model, batch_of(4, 10)).loss.backward()
    optimizer.step()
    total = 0
    for state in optimizer.state.values():
        total += sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor))
    assert estimated == total


def test_optimizer_that_cannot_be_tried_is_unknown():
    class Stubborn(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("not today")

    assert optimizer_bytes(Stubborn(mlp().parameters(), lr=0.1)) is None


@pytest.mark.parametrize("total", [1, 7, 1000, 1_000_000])
def test_curve_of_a_warm_up_and_cosine(total):
    optimizer = torch.optim.SGD(mlp().parameters(), lr=0.5)
    warm = total // 10

    def factor(step):
        return (
            (step + 1) / warm
            if step < warm
            else 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))
        )

    curve = read_curve(optimizer, factor, total)
    assert (curve.start, curve.end) == (0.5 * factor(0), 0.5 * factor(total - 1))
    assert curve.peak == pytest.approx(0.5, rel=1e-3)
    assert curve.peak_step == pytest.approx(max(warm - 1, 0), abs=total / 5000)
    assert len(curve.rates) == min(total, 120)


def test_curve_is_drawn_high_where_the_rate_is_high():
    drawn = curve_text(
        Curve(1.0, 1.0, 0, 0.0, [1 - i / 119 for i in range(120)]), 500
    ).plain.splitlines()
    assert drawn[0].startswith("        1 ⠉")
    assert drawn[0].endswith("⠀")
    assert drawn[3].startswith("        0 ⠀")
    assert drawn[3].endswith("⣀")
    assert drawn[4].rstrip().endswith("step 500")
    assert len(drawn[4]) == len(drawn[3]) == 70
    assert drawn[5] == "learning rate  start 1, end 0"


def test_plan_as_json_and_on_a_terminal():
    model = mlp()
    batch = batch_of(32, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model[0].bias.requires_grad_(False)
    split = fw.TensorSplit(*batch_of(100, 10))
    data = fw.Data()
    data.train = split
    data.val = [1, 2, 3]
    plan = make_plan(
        model,
        batch,
        task=Classify(),
        optimizer=optimizer,
        data=data,
        steps_per_epoch=4,
        total_steps=40,
    )
    content = json.loads(json.dumps(asdict(plan)))
    parameters = 10 * 32 + 32 + 32 * 5 + 5
    assert (content["parameters"], content["trainable"]) == (parameters, parameters - 32)
    assert content["flops"] == 2 * (10 * 32 + 32 * 5)
    assert content["memory"]["gradients"] == 4 * (parameters - 32)
    assert content["memory"]["total"] == sum(
        v for k, v in content["memory"].items() if k != "total"
    )
    assert content["splits"] == [
        {"name": "train", "samples": 100, "bytes": 100 * (40 + 8)},
        {"name": "val", "samples": 3, "bytes": None},
    ]
    output = io.StringIO()
    Console(file=output, width=80).print(render(plan))
    shown = output.getvalue()
    assert "train 100 (4.69 KiB), val 3" in shown
    assert "40 = 10 epochs of 4, batches of 32" in shown
    assert "960 FLOPs per sample forward" in shown
    assert "about 3.69 M to train" in shown
    assert "32 of 517 parameters" in shown
    assert max(map(len, shown.splitlines())) <= 80


def shown_of(plan):
    output = io.StringIO()
    Console(file=output, width=100).print(render(plan))
    return output.getvalue()


def test_groups_of_parameters_are_shown_with_their_rates_and_decays():
    model = mlp()
    maker = fw.optimizers.maker("adamw", lr=0.01, weight_decay=0.5)
    optimizer = maker(Parameters(rates={"2.*": 10.0}).groups(model, maker))
    plan = make_plan(
        model,
        batch_of(8, 10),
        task=Classify(),
        optimizer=optimizer,
        steps_per_epoch=1,
        total_steps=9,
    )
    assert [(g.name, g.parameters, g.weight_decay) for g in plan.groups] == [
        ("weights", 320, 0.5),
        ("biases and norms", 32, 0.0),
        ("weights", 160, 0.5),
        ("biases and norms", 5, 0.0),
    ]
    assert [g.lr_factor for g in plan.groups] == pytest.approx([1, 1, 10, 10])
    shown = shown_of(plan)
    assert "weights: 320, weight decay 0.5" in shown
    assert "biases and norms: 5, lr x 10, no weight decay" in shown
    assert "start 0.01" in shown, "the optimizer's own rate"


@pytest.mark.parametrize(
    ("count", "last"), [(8, "8: 2, lr x 8, no weight decay"), (11, "and 3 more groups")]
)
def test_groups_without_names_are_numbered_and_many_are_cut_short(count, last):
    layers = [nn.Linear(2, 1, bias=False) for _ in range(count)]
    groups = [
        {"params": layer.parameters(), "lr": 0.5 * number} for number, layer in enumerate(layers, 1)
    ]
    model = nn.Sequential(*(nn.Sequential(nn.Linear(1, 2), layer) for layer in layers))
    optimizer = torch.optim.SGD(groups, lr=0.5)
    plan = make_plan(
        model, (torch.ones(4, 1),), optimizer=optimizer, steps_per_epoch=1, total_steps=1
    )
    shown = shown_of(plan)
    assert len(plan.groups) == count
    assert "1: 2, no weight decay" in shown
    assert last in shown
    assert f"{count + 1}: " not in shown


def test_a_single_group_and_the_transforms_are_shown():
    optimizer = torch.optim.SGD(mlp().parameters(), lr=0.5, weight_decay=0.25)
    plan = make_plan(
        mlp(),
        batch_of(8, 10),
        task=Classify(),
        optimizer=optimizer,
        steps_per_epoch=1,
        total_steps=1,
    )
    plan.transforms = ["crop(padding=2)", "mixup(alpha=0.2)"]
    shown = shown_of(plan)
    assert "all: 517, weight decay 0.25" in shown
    assert "transforms  crop(padding=2), mixup(alpha=0.2)" in shown


def test_several_batches_per_step_are_shown_and_count_in_the_cost():
    model = mlp()
    batch = batch_of(32, 10)
    plan = make_plan(model, batch, task=Classify(), steps_per_epoch=3, total_steps=30)
    plan.batches_per_step = 4
    shown = shown_of(plan)
    assert "30 = 10 epochs of 3, batches of 32, 4 a step" in shown
    assert f"about {count_text(3 * 2 * (10 * 32 + 32 * 5) * 32 * 30 * 4)} to train" in shown


def test_many_layers_are_folded_with_the_same_totals():
    layers = [
        Layer(f"stage.{i}.{j}", "Linear", (i, j), 1, 2)
        for i, j in itertools.product(range(30), range(3))
    ]
    folded = fold(layers)
    assert [layer.name for layer in folded] == [f"stage.{i}" for i in range(30)]
    assert sum(layer.parameters for layer in folded) == len(layers)
    assert folded[4] == Layer("stage.4", "...", (4, 2), 3, 6)
    assert fold(layers[:30]) == layers[:30]


def test_numbers_have_units():
    assert [count_text(n) for n in (0, 999_999, 23_456_789, 1.5e12)] == [
        "0",
        "999,999",
        "23.5 M",
        "1.5 T",
    ]
    assert [bytes_text(n) for n in (None, 12, 1536, 3 * 2**30)] == [
        "unknown",
        "12 B",
        "1.5 KiB",
        "3 GiB",
    ]


def plan_of(*overrides):
    return Experiment(composed(["model.width=8", "loader.batch_size=20", *overrides])).plan()


def test_the_plan_of_ddp_has_the_whole_model_in_each_process():
    alone = plan_of()
    plan = plan_of("trainer.devices=8")
    size = alone.memory.parameters
    assert (plan.processes, plan.strategy) == (8, "auto")
    assert plan.sent == round(2 * 7 / 8 * size)
    assert plan.memory.parameters == plan.memory.gradients == plan.memory.communication == size
    assert plan.memory.activations == pytest.approx(alone.memory.activations * 3 / 20, rel=0.01)
    assert plan_of("trainer.devices=8", "strategy=ddp").sent == plan.sent
    assert plan_of("trainer.devices=4", "trainer.shards=8").sent == 3 * size
    shown = shown_of(plan)
    assert "per process: parameters" in shown
    assert "8 with strategy=auto, 3 samples of a batch each" in shown


def test_the_plan_of_fsdp_has_a_part_of_the_model_in_each_process():
    model = nn.Sequential(nn.Linear(16, 64), nn.Sequential(nn.Linear(64, 64)), nn.Linear(64, 8))
    size = sum(parameter.nbytes for parameter in model.parameters())
    unit = 4 * (64 * 64 + 64)
    memory = Memory(size, 0, size, 2 * size, 0)

    def estimated(processes, passes=1, **settings):
        strategy = fw.strategies.build("fsdp", **({"units": ["1.0"]} | settings))
        return strategy.estimate(model, memory, processes, passes=passes)

    eighth = estimated(8).memory
    assert (eighth.parameters, eighth.gradients, eighth.optimizer) == (size / 8, size / 8, size / 4)
    assert estimated(8).sent == round(7 / 8 * (2 * size + unit))  # the root is gathered once
    assert estimated(8, reshard=True).sent == round(7 / 8 * 3 * size)
    assert estimated(8, reshard=False).sent == round(7 / 8 * 2 * size)
    assert estimated(8, passes=3).sent == round(3 * 7 / 8 * (2 * size + unit))
    assert estimated(8, param_dtype="bf16").sent == round(7 / 8 * (2 * size + unit) / 2)
    replicated = estimated(8, mesh=[2, 4], reshard=False)
    assert replicated.sent == round(3 / 4 * 2 * size + 1 * size / 4)
    assert replicated.memory.parameters == size / 4
    with pytest.raises(SettingError, match="product is the number of processes, 8, got 6"):
        estimated(8, mesh=[2, 3])


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["strategy=single"], SettingError),
        (["loader.batch_size=4"], DataError),
        (["strategy=fsdp", "strategy.units=[nothing]"], SettingError),
    ],
)
def test_a_plan_that_several_processes_cannot_follow_is_refused(overrides, error):
    with pytest.raises(error):
        plan_of("trainer.devices=8", *overrides)
