"""Networks built to fail: the warning of `health` names the layer, and its remedy removes it."""

import math
import re
import warnings
from collections import deque
from copy import deepcopy

import pytest
import torch
from torch import nn

import framework as fw
import substitutes
from framework.composition.compose import CommandLine, run_composed
from framework.experiment.experiment import train
from framework_plugins.callbacks.health.layers import QUANTITIES, Layer, find_layers
from framework_plugins.callbacks.health.problems import (
    VANISHING,
    Observation,
    Watch,
    vanishing_gradients,
)
from framework_plugins.callbacks.health.responses import response_of
from runs import composed, run_training

HEALTH = ["callbacks=[health]", "trainer.max_epochs=4", "trainer.validate_every=100epochs"]
DEEP = ["model.depth=8", "model.width=64"]
CASES = {
    "vanishing": {
        "bad": [*DEEP, "model.activation=sigmoid"],
        "warning": r"layer 1 of 9, blocks\.0\.linear \(sigmoid\), also 2.*: vanishing gradients",
        "remedies": ["activation=relu", "norm=batch"],
    },
    "saturated": {
        "bad": ["model.activation=sigmoid", "initializer={name: normal, std: 1.0}"],
        "warning": r"layer 2 of 3, blocks\.1\.linear \(sigmoid\).*: \d+ % of its outputs saturated",
        "remedies": ["activation=relu", "norm=batch", "initializer=xavier_uniform"],
    },
    "dead": {
        "bad": ["optimizer=adam", "optimizer.lr=0.3", "scheduler=null"],
        "warning": r"layer 1 of 3, blocks\.0\.linear \(relu\), also 2: \d+ % of its units dead",
        "remedies": ["optimizer.lr=0.001", "activation=leaky_relu", "norm=batch"],
    },
    "activations": {
        "bad": ["model.depth=6", "initializer={name: normal, std: 1.0}"],
        "warning": r"layer 3 of 7, blocks\.2\.linear \(relu\).*: exploding activations",
        "remedies": ["initializer=kaiming_normal", "norm=batch"],
    },
    "gradients": {
        "bad": ["model.depth=6", "initializer={name: normal, std: 1.0}"],
        "warning": r"layer 1 of 7, blocks\.0\.linear \(relu\).*: exploding gradients",
        "remedies": ["initializer=kaiming_normal"],
    },
    "small": {
        "bad": ["optimizer.lr=1e-9"],
        "warning": r"the learning rate is too small: .* try optimizer\.lr=0\.0001 \(now 1e-09\)",
        "remedies": ["optimizer.lr=0.0001"],
    },
    "small_sgd": {
        "bad": ["optimizer=sgd", "optimizer.lr=1e-4"],
        "warning": r"the learning rate is too small: .* try optimizer\.lr=0\.01 \(now 0\.0001\)",
        "remedies": ["optimizer.lr=0.01"],
    },
    "large": {
        "bad": ["optimizer=sgd", "optimizer.lr=30", "model.activation=tanh"],
        "warning": r"the learning rate is too large: .* try optimizer\.lr=0\.01 \(now 30\)",
        "remedies": ["optimizer.lr=0.01"],
    },
    "inputs": {
        "bad": ["data=unscaled_of_tests"],
        "warning": r"the inputs have mean .* layer 1 of 3, blocks\.0\.linear \(relu\)",
        "remedies": ["data.normalize=true"],
    },
}
NORMALIZE = "data.normalize=true"


def unscaled(normalize: bool = False) -> fw.Data:
    """Digits with pixels from 0 to 255."""
    data = deepcopy(fw.datasets.build("digits", normalize=normalize))
    if not normalize:
        inputs, *rest = data.train.tensors
        data.train = fw.TensorSplit(inputs * 255, *rest)
    return data


@pytest.fixture(autouse=True, scope="module")
def unscaled_data():
    fw.discover()
    if "unscaled_of_tests" not in fw.datasets:
        fw.datasets.register("unscaled_of_tests")(unscaled)


def warnings_of(folder, *overrides):
    """Train, and return the warnings of `health` and of status.json."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run_training(f"run.root={folder}", *HEALTH, *overrides)
    texts = [str(each.message) for each in caught]
    recorded = (result.folder / "status.json").read_text()
    found = [text for text in texts if text.startswith("health: ")]
    for text in found[-3:]:  # the file has the last ones, shortened
        assert text[:80] in recorded
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_network_built_to_fail_gives_a_warning_with_a_remedy(name, tmp_path):
    case = CASES[name]
    texts = warnings_of(tmp_path, *case["bad"])
    matching = [text for text in texts if re.search(case["warning"], text)]
    assert len(matching) == 1, texts
    for remedy in case["remedies"]:
        setting, _, value = remedy.partition("=")
        assert setting in matching[0]
        assert setting == "optimizer.lr" or value in matching[0]


@pytest.mark.parametrize(
    ("name", "remedy"),
    [(name, remedy) for name, case in CASES.items() for remedy in case["remedies"]],
)
def test_the_remedy_removes_the_warning(name, remedy, tmp_path):
    case = CASES[name]
    setting = remedy.partition("=")[0]
    kept = [
        each for each in case["bad"] if each.partition("=")[0].removeprefix("model.") != setting
    ]
    texts = warnings_of(tmp_path, *kept, remedy)
    kind = case["warning"].rpartition(": ")[2].partition(r"\d")[0][:20]
    assert not [text for text in texts if re.search(case["warning"], text)], (kind, texts)


@pytest.mark.parametrize(("largest", "rows"), [(1e6, [1, 2]), (math.inf, [])])
def test_an_infinite_gradient_does_not_make_others_vanish(largest, rows):
    numbers = {"gradient": [largest, 1.0, 2.0]}
    seen = Observation(step=1, layers=[], numbers=numbers, loss=1.0, rate=0.1, factor=1.0)
    assert vanishing_gradients(seen, VANISHING) == rows


def test_a_bias_that_kills_relus_is_named():
    """Without a config, the layer with the wrong bias is the only one that is named."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)
    )
    with torch.no_grad():
        model[2].bias[:28] = -50.0
    inputs = torch.randn(640, 6)
    data = fw.TensorSplit(inputs, (inputs[:, 0] > 0).long())
    trainer = fw.Trainer(max_epochs=2, callbacks=[fw.callbacks.build("health", every="10steps")])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with pytest.warns(UserWarning, match=r"layer 2 of 3, 2 \(relu\): 88 % of its units dead"):
        trainer.fit(model, data, task=nn.CrossEntropyLoss(), optimizer=optimizer, batch_size=16)


class WithoutRate(torch.optim.Optimizer):
    """Descends with a step size that is no `lr`."""

    def __init__(self, parameters, size):
        super().__init__(parameters, {"size": size})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["size"] * parameter.grad


@pytest.mark.parametrize(
    ("size", "words"),
    [(0.0, "too small: .*try a higher learning rate$"), (30.0, "large.*try a lower learning rate")],
)
def test_an_optimizer_without_a_learning_rate_gets_advice_without_one(size, words):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    inputs = torch.randn(640, 6)
    data = fw.TensorSplit(inputs, (inputs[:, 0] > 0).long())
    trainer = fw.Trainer(max_epochs=2, callbacks=[fw.callbacks.build("health", every="10steps")])
    optimizer = WithoutRate(model.parameters(), size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, data, task=nn.CrossEntropyLoss(), optimizer=optimizer, batch_size=16)
    assert any(re.search(words, str(each.message)) for each in caught)


class Branch(nn.Module):
    """A network whose first layer is cut off from the loss, frozen, or not used."""

    def __init__(self, change):
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.second = nn.Linear(16, 3)
        self.change = change
        if change == "frozen":
            self.first.requires_grad_(False)

    def forward(self, x):
        hidden = self.first(x)
        if self.change == "detached":
            hidden = hidden.detach()
        if self.change == "unused":
            hidden = torch.cat([x, x, x[:, :4]], 1)
        return self.second(hidden.relu())


def deep(activation, depth):
    layers = []
    for _ in range(depth):
        layers += [nn.Linear(6, 6), activation()]
    return nn.Sequential(*layers, nn.Linear(6, 3))


def with_zeros(model):
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def texts_of_fit(model, rate=0.01, scale=1.0):
    """Train a classifier with plain SGD for 80 steps; return the warnings of `health`."""
    inputs = torch.randn(640, 6, generator=torch.Generator().manual_seed(0))
    data = fw.TensorSplit(inputs * scale, (inputs[:, 0] > 0).long())
    trainer = fw.Trainer(max_epochs=2, callbacks=[fw.callbacks.build("health", every="10steps")])
    optimizer = torch.optim.SGD(model.parameters(), rate)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, data, task=nn.CrossEntropyLoss(), optimizer=optimizer, batch_size=16)
    return [str(each.message) for each in caught]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU])
def test_layers_of_zeros_need_an_initializer(activation):
    (text,) = texts_of_fit(with_zeros(deep(activation, 2)))
    assert re.search(r"layer 1 of 3, 0 .*also 2: all weights are 0 .*initializer=kaiming", text)


@pytest.mark.parametrize(
    ("change", "found"), [("detached", True), ("unused", True), ("frozen", False), (None, False)]
)
def test_a_layer_without_a_gradient_is_named_unless_it_is_frozen(change, found):
    torch.manual_seed(0)
    texts = texts_of_fit(Branch(change))
    assert len(texts) == found
    assert not found or "layer 1 of 2, first (Linear): its weights get no gradient" in texts[0]


def test_vanishing_gradients_of_sigmoids_cannot_be_initialized_away():
    torch.manual_seed(0)
    (text,) = texts_of_fit(deep(nn.Sigmoid, 5))
    assert re.search(r"layer 1 of 6, 0 \(sigmoid\).*: vanishing .*activation=relu, or norm", text)
    assert not texts_of_fit(deep(nn.ReLU, 5), rate=0.1)


def test_inputs_that_saturate_the_first_layer_are_the_problem():
    torch.manual_seed(0)
    (text,) = texts_of_fit(deep(nn.Tanh, 2), scale=1e4)
    assert "layer 1 of 3, 0 (tanh) are saturated" in text
    assert "data.normalize=true" in text


SATURATED = {"stuck": [0.0, 0.6]}
DEAD = {"stuck": [0.9, 0.0], "gradient": [0.0, 1.0], "update": [1e-8, 1e-8]}
EXPLODING = {"gradient": [1e6, 1.0]}
LARGE = {"update": [0.02, 0.02]}


@pytest.mark.parametrize(
    ("numbers", "since", "losses", "expected"),
    [
        (SATURATED, 3, [2.0, 1.5, 1.0, 0.5, 0.4, 0.3], None),  # the network has become sure
        (SATURATED, 0, [2.0, 1.5, 1.0, 0.5, 0.4, 0.3], "saturated"),
        (SATURATED, 3, [2.0] * 6, "saturated"),
        (DEAD, 3, [2.0, 1.5, 1.0, 0.5, 0.4, 0.3], None),
        (DEAD, 3, [2.0, 9.0, 5.0, 2.0, 2.0, 2.0], "dead"),  # and not a rate that is too small
        (EXPLODING, 0, [2.0] * 6, "exploding gradients"),  # and no vanishing ones
        (LARGE, 0, [2.0, 0.5, 0.5, 0.6, 0.5, 0.6], None),
        (LARGE, 0, [2.0, 0.5, 0.5, 0.5, 1.8, 1.8, 1.8], "learning rate is too large"),
    ],
)
def test_a_problem_counts_if_the_loss_agrees(numbers, since, losses, expected):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    layers = find_layers(model)[:2]
    for layer, activation in zip(layers, (model[1], model[3]), strict=True):
        layer.response = response_of(activation)
    healthy = {quantity: [1.0, 1.0] for quantity in QUANTITIES}
    healthy |= {"stuck": [0.0, 0.0], "update": [1e-3, 1e-3]}
    watch = Watch(first_loss=losses[0])
    watch.dead[0] = deque([torch.arange(8) < 7] * 3)
    texts = []
    for number, loss in enumerate(losses):
        changed = numbers if number >= since else {}
        step = 16 * (number + 1)
        seen = Observation(step, layers, healthy | changed, loss=loss, rate=0.1, factor=1.0)
        texts += watch.messages(seen)
    assert len(texts) == (expected is not None)
    assert expected is None or expected in texts[0]


class Stuck(nn.Module):
    """A GAN whose generator ignores the noise."""

    def __init__(self, scale):
        super().__init__()
        torch.manual_seed(1)
        self.discriminator = nn.Sequential(nn.Linear(4, 16), nn.LeakyReLU(), nn.Linear(16, 1))
        self.generator = nn.Sequential(nn.Linear(2, 4))
        self.scale = scale

    def forward(self, x):
        return self.discriminator(x)

    def sample(self, count):
        return self.generator(torch.randn(count, 2) * self.scale)


@pytest.mark.parametrize(("scale", "collapses"), [(0.001, True), (1.0, False)])
def test_a_generator_without_variety_has_collapsed(scale, collapses):
    torch.manual_seed(0)
    data = fw.TensorSplit(torch.randn(640, 4))
    model = Stuck(scale)
    optimizer = torch.optim.SGD(model.parameters(), 0.001)
    trainer = fw.Trainer(max_epochs=2, callbacks=[fw.callbacks.build("health", every="10steps")])
    task = fw.tasks.build("adversarial")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, data, task=task, optimizer=optimizer, batch_size=16)
    texts = [str(each.message) for each in caught]
    assert any("generator has collapsed" in text for text in texts) == collapses
    assert not collapses or len(texts) == 1


def test_the_variety_of_a_single_sample_is_not_known():
    model = Stuck(1.0)
    health = fw.callbacks.build("health", every="1steps", samples=1)
    trainer = fw.Trainer(max_steps=2, callbacks=[health])
    optimizer = torch.optim.SGD(model.parameters(), 0.001)
    task = fw.tasks.build("adversarial")
    trainer.fit(model, fw.TensorSplit(torch.randn(8, 4)), task=task, optimizer=optimizer)
    assert math.isnan(health.seen.spread)
    assert not math.isnan(health.seen.numbers["mean"][0])


def test_a_discriminator_that_recognizes_all_samples_is_reported():
    torch.manual_seed(0)
    data = fw.TensorSplit(torch.randn(640, 4) + 6)
    model = Stuck(1.0)
    optimizer = torch.optim.Adam(model.discriminator.parameters(), 0.05)
    callbacks = [fw.callbacks.build("health", every="10steps")]
    trainer = fw.Trainer(max_epochs=3, log_every="10steps", callbacks=callbacks)
    task = fw.tasks.build("adversarial")
    task.phases = task.phases[:1]
    expected = r"health: the discriminator recognizes all samples, .*task\.penalty=1"
    with pytest.warns(UserWarning, match=expected):
        trainer.fit(model, data, task=task, optimizer=optimizer, batch_size=16)


@pytest.mark.parametrize(
    ("update", "factor", "losses", "warns"),
    [
        (5e-5, 1.0, (2.3, 2.29, 2.3), True),
        (5e-5, 1.0, (2.3, 2.1, 2.0), False),  # it falls
        (5e-5, 1.0, (4.0, 2.9, 3.1), False),  # that of a trained model varies
        (5e-5, 0.3, (2.3, 2.29, 2.3), False),  # the schedule reduces the rate
        (2e-4, 1.0, (2.3, 2.29, 2.3), False),
    ],
)
def test_updates_are_too_small_if_the_loss_stays(update, factor, losses, warns):
    watch = Watch(first_loss=2.3)
    texts = []
    for step, loss in zip((16, 32, 64), losses, strict=True):
        numbers = {name: [math.nan] for name in QUANTITIES} | {"gradient": [1.0]}
        numbers |= {"update": [update], "weight": [1.0]}
        layer = Layer("linear", nn.Linear(1, 1), [])
        texts += watch.messages(Observation(step, [layer], numbers, loss, 0.1, factor))
    assert ["the learning rate is too small" in text for text in texts] == [True] * warns


def test_a_warning_is_given_once_also_after_a_resume(tmp_path):
    lines = [*CASES["vanishing"]["bad"], "callbacks=[checkpoint,health]", "trainer.max_epochs=9"]
    name = [f"run.root={tmp_path}", "run.name=one"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_training(*name, *lines, "trainer.max_steps=130")
        result = run_training(*name, *lines, "trainer.max_steps=400", "resume=auto")
    assert result.steps == 360
    texts = [str(each.message) for each in caught if "vanishing" in str(each.message)]
    assert len(texts) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default", *substitutes.EXPERIMENTS])
def test_a_shipped_experiment_gives_no_warning(name, tmp_path):
    if name == "search_mlp":
        pytest.skip("a search, whose trials may fail")
    substitutes.register_data()
    overrides = [f"run.root={tmp_path}", *substitutes.DATA.get(name, [])]
    if name == "distillation":
        teacher = run_training(*overrides, "trainer.max_epochs=3", "run.name=teacher").folder
        overrides.append(f"task.teacher={teacher}")
    if name != "default":
        overrides.insert(0, f"experiment={name}")
    overrides += ["trainer.max_steps=300", "callbacks.health.every=20steps"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = []
        line = CommandLine(["loggers=json_lines", *overrides])
        run_composed(
            line, lambda job: results.append(train(job.spec, job.experiment, job.overrides))
        )
    assert composed(overrides) is not None
    assert results[0].steps > 10
    assert not [text for each in caught if "health" in (text := str(each.message))]
