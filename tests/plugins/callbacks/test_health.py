"""The numbers of the callback `health`, compared with hooks of torch, and what it leaves alone."""

import itertools
import warnings

import pytest
import torch
from torch import nn

import framework as fw
from fits import SPLIT, Record, X, Y, fit, network, same
from framework.contracts.state import SHARED_TIME
from framework.errors.terminal import printable
from framework_plugins.callbacks.health.callback import is_due_by_default
from framework_plugins.callbacks.health.layers import find_layers
from framework_plugins.callbacks.health.responses import response_of
from stacked import alone, together, trial


class Shown(Record):
    """Records the texts and images too."""

    def __init__(self):
        super().__init__()
        self.texts = []
        self.shown = []

    def text(self, tag, markdown, step=0):
        self.texts.append((step, tag, markdown))

    def images(self, tag, images, step):
        self.shown.append((step, tag, images))


def health(**settings):
    return fw.callbacks.build("health", **{"scalars": True, "samples": 16, **settings})


def of_step(record, step):
    """Return the numbers of a step by tag, without "health/"."""
    found = {}
    for at, values in record.lines:
        if at == step:
            found |= {tag[7:]: value for tag, value in values.items() if tag.startswith("health/")}
    return found


class Reference(fw.Callback):
    """Measures one step with hooks of torch and copies, as a user would."""

    def __init__(self, step):
        self.step = step
        self.numbers = {}
        self.hooks = []

    def on_step_start(self, trainer):
        if trainer.state.step + 1 != self.step:
            return
        self.before = {}
        for key, value in trainer.model.named_parameters():
            self.before[key] = value.detach().clone()
        for name, _, module in self.layers(trainer.model):
            self.hooks.append(module.register_forward_hook(self.hook(name)))

    def layers(self, model):
        return [("0", model[0], model[1]), ("2", model[2], model[2])]

    def hook(self, name):
        def measure(module, inputs, output):
            output = output.detach().float()
            self.numbers[f"mean/{name}"] = float(output.mean())
            self.numbers[f"std/{name}"] = float(output.std(correction=0))
            if isinstance(module, nn.Tanh):
                flat = 1 - output.square() < 0.01
                self.numbers[f"stuck/{name}"] = float(flat.float().mean())
            if isinstance(module, nn.ReLU):
                self.numbers[f"stuck/{name}"] = float((output == 0).all(0).float().mean())

        return measure

    def on_gradients(self, trainer):
        for hook in self.hooks:
            hook.remove()
        if trainer.state.step + 1 == self.step:
            for name, layer, _ in self.layers(trainer.model):
                gradients = torch.cat([p.grad.flatten() for p in layer.parameters()])
                self.numbers[f"gradient/{name}"] = float(gradients.norm())

    def on_step_end(self, trainer):
        if trainer.state.step != self.step:
            return
        for name, layer, _ in self.layers(trainer.model):
            old = [self.before[f"{name}.{key}"] for key, _ in layer.named_parameters()]
            change = [p.detach() - o for p, o in zip(layer.parameters(), old, strict=True)]
            size = torch.cat([each.flatten() for each in old]).norm()
            self.numbers[f"weight/{name}"] = float(size)
            moved = torch.cat([each.flatten() for each in change]).norm()
            self.numbers[f"update/{name}"] = float(moved / size)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("settings", [{}, {"precision": "bf16"}], ids=["fp32", "bf16"])
def test_the_numbers_are_those_of_hooks_and_copies(activation, settings):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 16), activation(), nn.Linear(16, 3))
    with torch.no_grad():
        model[0].weight.mul_(4)  # some units are saturated or dead
        model[0].bias[:5] -= 9
    reference = Reference(3)
    _, record = fit(model=model, callbacks=[reference, health(every="3steps")], **settings)
    numbers = of_step(record, 3)
    assert numbers == pytest.approx(reference.numbers, rel=1e-4)
    assert 0.05 < numbers["stuck/0"] < 0.95
    assert set(of_step(record, 6)) == set(numbers)
    assert of_step(record, 4) == {}


def test_an_activation_that_overwrites_its_inputs_does_not_change_the_numbers():
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        layers = [nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)]
        model = nn.Sequential(nn.Dropout(0.1), nn.ReLU(inplace), *layers)
        with torch.no_grad():
            model[2].weight.mul_(20)
        _, record = fit(model=model, callbacks=[health(every="2steps")])
        found.append(of_step(record, 2))
    assert 0 < found[0]["stuck/2"] < 1
    assert found[0] == found[1]


class Adds(nn.Module):
    """Changes the outputs of a layer and of an activation, in place or not."""

    def __init__(self, inplace):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.activation = nn.LeakyReLU()
        self.last = nn.Linear(6, 3)
        self.add = torch.Tensor.add_ if inplace else torch.add

    def forward(self, x):
        hidden = self.add(self.first(x), 100.0)
        hidden = self.activation(self.second(hidden))
        return self.last(self.add(hidden, 100.0))


def test_the_numbers_are_those_before_a_change_in_place():
    found = []
    for inplace in (False, True):
        _, record = fit(model=Adds(inplace), callbacks=[health(every="2steps")])
        found.append(of_step(record, 2))
    assert abs(found[0]["mean/first"]) < 10
    assert found[0] == found[1]


def test_a_step_of_several_batches_is_measured_as_one():
    """The activations are those of the first batch; the gradient is that of the step."""
    reference = Reference(2)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    settings = {"accumulate": 2, "max_epochs": 1, "model": model}
    _, record = fit(callbacks=[reference, health(every="2steps")], **settings)
    numbers = of_step(record, 2)
    for quantity in ("gradient", "weight", "update"):
        for name in ("0", "2"):
            tag = f"{quantity}/{name}"
            assert numbers[tag] == pytest.approx(reference.numbers[tag], rel=1e-4)


def test_the_default_steps_become_rarer():
    due = [step for step in range(1, 3000) if is_due_by_default(step, 1)]
    assert due == [16, 32, 64, 256, 1024, 2048]
    stacked = [step for step in range(1, 5000) if is_due_by_default(step, 8)]
    assert stacked == [16, 64, 256, 1024, 4096]


def test_a_cadence_in_minutes_needs_gradients_at_its_steps_only(monkeypatch):
    clock = itertools.count(step=100)  # seconds
    monkeypatch.setattr(SHARED_TIME, "now", lambda: float(next(clock)))
    callback = health(every="15min")
    needed = []

    class Ask(fw.Callback):
        def on_step_start(self, trainer):
            if callback.needs_gradients(trainer):
                needed.append(trainer.state.step + 1)

    fit(callbacks=[callback, Ask()])
    assert needed == [1, *callback.steps], "the first one for the first loss"
    assert 0 < len(callback.steps) < 7


class Unusual(nn.Module):
    """Has a tied weight, a shared layer, a frozen one, dict outputs, and functional activations."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(9, 8, sparse=True)
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.shared = nn.Linear(8, 8)
        self.act = nn.ReLU(inplace=True)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.last = nn.Linear(8, 9, bias=False)
        self.tied = nn.Linear(8, 9, bias=False)
        self.tied.weight = self.last.weight

    def forward(self, x):
        hidden = self.rnn(self.tokens(x))[0]
        hidden = self.attention(hidden, hidden, hidden)[0]
        for _ in range(2):
            hidden = self.act(self.shared(hidden))
        hidden = torch.relu(self.frozen(hidden))
        return {"logits": self.last(hidden).mean(1) + self.tied(hidden).mean(1)}


def test_unusual_layers_are_measured():
    tokens = torch.randint(0, 9, (64, 5), generator=torch.Generator().manual_seed(1))
    data = fw.TensorSplit(tokens, tokens[:, 0])
    fw.discover()
    loss = nn.CrossEntropyLoss()
    task = fw.contracts.task.LossTask(loss, output="logits")
    record = Shown()
    trainer = fw.Trainer(max_epochs=1, callbacks=[health(every="2steps")], loggers=[record])
    model = Unusual()
    trainer.fit(
        model, data, task=task, optimizer=torch.optim.SGD(model.parameters(), 0.1), batch_size=16
    )
    numbers = of_step(record, 2)
    names = [layer.name for layer in find_layers(model)]
    expected = ["tokens", "rnn", "attention", "attention.out_proj", "shared", "frozen"]
    assert names == [*expected, "last", "tied"]
    for name in ("tokens", "rnn", "attention", "shared", "last"):
        assert numbers[f"gradient/{name}"] > 0
        assert numbers[f"update/{name}"] > 0
        assert numbers[f"std/{name}"] > 0
    assert "gradient/frozen" not in numbers
    assert numbers["update/frozen"] == 0
    assert "gradient/tied" not in numbers, "its weight is that of `last`"
    assert numbers["std/tied"] > 0
    assert 0 <= numbers["stuck/shared"] <= 1
    assert "stuck/frozen" not in numbers, "its activation is no module"


class Noisy(nn.Module):
    """Draws random numbers, counts its calls in a buffer, and has a batch norm."""

    def __init__(self):
        super().__init__()
        self.layers = network()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.layers(x + 0.1 * torch.randn_like(x))


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}, {"precision": "bf16"}], ids=str)
def test_it_does_not_change_training(settings):
    models = []
    states = []
    for callbacks in ([], [health(every="1steps")]):
        torch.manual_seed(0)
        model = Noisy()
        trainer, _ = fit(model=model, callbacks=callbacks, **settings)
        models.append(model)
        states.append(trainer.state.metrics["train/loss"])
    assert same(*models)
    assert states[0] == states[1]
    assert not any(module._forward_hooks for module in models[1].modules())


def test_a_resumed_run_logs_the_same_numbers():
    class Stop(fw.Callback):
        changes_training = False

        def on_step_done(self, trainer):
            if trainer.state.step == 7:
                self.state = trainer.state_dict()
                trainer.stop("test", "enough")

    _, whole = fit(callbacks=[health(every="2steps")])
    stop = Stop()
    fit(callbacks=[health(every="2steps"), stop])
    resumed = health(every="2steps")
    _, rest = fit(callbacks=[resumed], resume=stop.state)
    for step in (8, 10, 14):
        assert of_step(rest, step) == of_step(whole, step) != {}
    assert resumed.steps == [2, 4, 6, 8, 10, 12, 14]


def test_a_table_and_images_are_shown(monkeypatch):
    record = Shown()
    callback = health(every="1steps", scalars=False)
    model = network()
    trainer = fw.Trainer(max_steps=100, callbacks=[callback], loggers=[record])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    callback.drawing_seconds = 0.0
    monkeypatch.setattr("framework_plugins.callbacks.health.callback.FIRST_DRAWING", 0.0)
    trainer.fit(model, SPLIT, task=nn.CrossEntropyLoss(), optimizer=optimizer, batch_size=16)
    assert not of_step(record, 5)
    step, tag, table = record.texts[-1]
    assert (step, tag) == (100, "health")
    assert "| 1 `0` | relu |" in table
    assert len(callback.steps) <= 64
    assert callback.steps[-1] == 100
    tags = {tag for _, tag, _ in record.shown}
    quantities = ("mean", "std", "stuck", "gradient", "update", "weight")
    assert tags == {f"health/{quantity}" for quantity in quantities}
    for _, _, image in record.shown:
        assert image.ndim == 4
        assert image.shape[1] == 3
        assert 0 <= image.min() < image.max() <= 1


def test_a_short_run_draws_no_images():
    record = Shown()
    model = network()
    callbacks = [health(every="1steps", scalars=False)]
    trainer = fw.Trainer(max_steps=10, callbacks=callbacks, loggers=[record])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    trainer.fit(model, SPLIT, task=nn.CrossEntropyLoss(), optimizer=optimizer, batch_size=16)
    assert [(step, tag) for step, tag, _ in record.texts] == [(10, "health")]
    assert record.shown == []


def test_the_numbers_are_shown_at_the_step_that_they_are_of(monkeypatch):
    record = Shown()
    model = network()
    callback = health(every="7steps", scalars=False)
    monkeypatch.setattr("framework_plugins.callbacks.health.callback.FIRST_DRAWING", 0.0)
    trainer = fw.Trainer(max_steps=10, callbacks=[callback], loggers=[record])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    trainer.fit(model, SPLIT, task=nn.CrossEntropyLoss(), optimizer=optimizer, batch_size=16)
    assert [step for step, _, _ in record.texts] == [7]
    assert {step for step, _, _ in record.shown} <= {7}


def test_a_model_that_cannot_run_outside_of_its_step_gives_one_warning():
    class Once(nn.Linear):
        """Refuses a second forward pass in a step."""

        fresh = True

        def forward(self, x):
            if not self.fresh:
                raise RuntimeError("called twice")
            self.fresh = False
            return super().forward(x)

    class Refresh(fw.Callback):
        def on_step_start(self, trainer):
            trainer.model.fresh = True

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        _, record = fit(
            fw.TensorSplit(X, Y), model=Once(6, 3), callbacks=[Refresh(), health(every="1steps")]
        )
    messages = [str(each.message) for each in found if "health" in str(each.message)]
    assert len(messages) == 1
    assert "activations are not measured" in messages[0]
    assert "called twice" in messages[0]
    assert of_step(record, 3)["gradient/Once"] > 0
    assert printable(messages[0]) == messages[0]


KINDS = {
    "saturates": ["sigmoid", "tanh", "hardtanh", "hardsigmoid", "softsign"],
    "dies": ["relu", "relu6", "gelu", "silu", "elu", "selu", "softplus", "relu_squared", "mish"],
    "open": ["leaky_relu", "prelu"],
    None: ["identity", "softmax", "glu", "swiglu"],
}


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for kind, names in KINDS.items() for name in names]
)
def test_the_derivative_of_an_activation_shows_its_kind(name, kind):
    response = response_of(fw.activations.build(name))
    assert (None if response is None else response.kind) == kind


def test_every_registered_activation_has_a_known_response():
    for entry in fw.activations:
        response = response_of(entry.build({}, {}))
        if response is not None:
            assert response.largest > 0


@pytest.mark.parametrize("module", [nn.Dropout(), nn.BatchNorm1d(3), nn.Flatten(), nn.LayerNorm(4)])
def test_other_modules_have_no_response(module):
    assert response_of(module) is None


def test_saturation_depends_on_the_derivative():
    response = response_of(nn.Sigmoid())
    assert response.largest == pytest.approx(0.25)
    inputs = torch.tensor([-9.0, -5.9, 0.0, 5.9, 9.0])  # f'(5.98) is a hundredth of f'(0)
    assert response.stuck(nn.Sigmoid(), inputs).tolist() == [True, False, False, False, True]
    assert response.stuck(nn.Sigmoid(), torch.full((2, 3), 6.1)).all()


def test_settings_of_an_activation_count():
    wide = fw.activations.build("elu", alpha=3.0)
    assert response_of(wide).largest == pytest.approx(3.0, rel=0.1)


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)], ids=["one order", "two orders"])
def test_stacked_trials_are_observed_as_single_ones(seeds):
    def recipe(seed, lr):
        callbacks = [health(every="5steps", samples=8)]
        return trial(seed, lr, model=stackable(seed), callbacks=callbacks, max_epochs=5)

    settings = list(zip(seeds, (0.3, 1.0), strict=True))
    trainers, failures = together(*(recipe(*each) for each in settings))
    assert failures == [None, None]
    for trainer, each in zip(trainers, settings, strict=True):
        expected = alone(recipe(*each))
        for step in (5, 15):
            numbers = stacked_numbers(trainer, step)
            assert len(numbers) == 11
            assert numbers == pytest.approx(stacked_numbers(expected, step), rel=1e-4)


def stackable(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).double()


def stacked_numbers(trainer, step):
    found = {}
    for at, _, values in trainer.recorder.lines:
        if at == step:
            found |= {tag: number for tag, number in values.items() if tag.startswith("health")}
    return found
