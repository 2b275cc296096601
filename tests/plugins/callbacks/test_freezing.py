"""Frozen parameters, and parameter groups with their own decay and rate."""

import copy

import pytest
import torch
from torch import nn

import framework as fw
from compiler import needs_compiler
from framework import Callback, TensorSplit, Trainer
from framework.contracts.optimizer import Parameters
from framework.errors import SettingError
from regressions import StopAt

INPUTS = torch.linspace(-1, 1, 48).reshape(24, 2)
SPLIT = TensorSplit(INPUTS, INPUTS.sum(1, keepdim=True))


def network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(2, 3),
        nn.BatchNorm1d(3),
        nn.ReLU(),
        nn.Linear(3, 3),
        nn.Dropout(0.3),
        nn.Linear(3, 1),
    )


class Watch(Callback):
    """Stores the weights and buffers after every step."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, trainer):
        self.steps.append(copy.deepcopy(trainer.model.state_dict()))


def fit(*callbacks, epochs=4, resume=None, model=None, **settings):
    """Fit with four steps per epoch."""
    model = network() if model is None else model
    trainer = Trainer(max_epochs=epochs, callbacks=callbacks, device="cpu", **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    trainer.fit(
        model, SPLIT, task=nn.MSELoss(), optimizer=optimizer, val=SPLIT, batch_size=6, resume=resume
    )
    return trainer


def freeze(*patterns, **settings):
    return fw.callbacks.build("freeze", patterns=list(patterns), **settings)


def changed_epochs(watch, name):
    """Return the epochs, counted from 0, in which a tensor changed."""
    epochs = set()
    before = network().state_dict()
    for step, state in enumerate(watch.steps):
        if not torch.equal(before[name], state[name]):
            epochs.add(step // 4)
        before = state
    return epochs


def assert_same_state(model, expected):
    state = model.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_frozen_parameters_and_buffers_do_not_change_and_the_others_do():
    watch = Watch()
    trainer = fit(freeze("0.*", "1.*"), watch)
    for name in network().state_dict():
        if name.startswith(("0.", "1.")):
            assert changed_epochs(watch, name) == set(), name
    assert changed_epochs(watch, "3.weight") == changed_epochs(watch, "5.weight") == {0, 1, 2, 3}
    assert trainer.state.metrics["train/frozen_parameters"] == 2 * 3 + 3 + 3 + 3


def test_parameters_require_gradients_again_after_the_fit():
    model = fit(freeze("0.*", "1.*")).model
    assert all(p.requires_grad for p in model.parameters())


def test_patterns_thaw_one_after_the_other_from_the_last():
    watch = Watch()
    fit(freeze("0.*", "[13].*", epochs=1, every=2), watch)
    assert changed_epochs(watch, "5.weight") == {0, 1, 2, 3}
    assert changed_epochs(watch, "3.weight") == {1, 2, 3}
    assert changed_epochs(watch, "1.running_mean") == {1, 2, 3}
    assert changed_epochs(watch, "0.weight") == {3}


def test_without_every_all_patterns_thaw_together():
    watch = Watch()
    fit(freeze("0.*", "3.*", epochs=2), watch)
    assert changed_epochs(watch, "0.weight") == changed_epochs(watch, "3.weight") == {2, 3}


@pytest.mark.parametrize("step", [2, 6, 13])
def test_a_resumed_run_equals_the_uninterrupted_run(step):
    def gradual():
        return freeze("0.*", "[13].*", epochs=1, every=2)

    uninterrupted = fit(gradual())
    stop = StopAt(step)
    fit(gradual(), stop)
    resumed = fit(gradual(), resume=stop.state)
    assert_same_state(resumed.model, uninterrupted.model)


@needs_compiler
@pytest.mark.parametrize("setting", ["model", "step"])
def test_a_compiled_model_or_step_freezes_too(setting, eager_backend):
    def plain():  # a bias before a batch norm has only rounding as gradient, which AdamW enlarges
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))

    eager = fit(freeze("0.*", epochs=2), model=plain(), compile="off").model
    compiled = fit(freeze("0.*", epochs=2), model=plain(), compile=setting).model
    assert not torch.equal(compiled[0].weight, plain()[0].weight)
    for name, tensor in eager.state_dict().items():
        torch.testing.assert_close(tensor, compiled.state_dict()[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("patterns", "problem"),
    [
        (["2.*"], r"no parameter matches '2\.\*'"),
        (["*"], "no parameter is left to train"),
        ([], r"patterns=\[\] has no effect"),
    ],
)
def test_invalid_patterns_are_errors(patterns, problem):
    with pytest.raises(SettingError, match=problem):
        fit(freeze(*patterns))


# groups


def groups(**settings):
    """Return the learning rate and the weight decay of each parameter of `network`."""
    model = network()
    names = {id(p): name for name, p in model.named_parameters()}
    maker = fw.optimizers.maker("adamw", lr=0.1, weight_decay=0.5)
    optimizer = maker(Parameters(**settings).groups(model, maker))
    settings_by_name = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            settings_by_name[names[id(parameter)]] = (group["lr"], group["weight_decay"])
    return settings_by_name


def test_biases_and_norms_are_not_decayed():
    expected = {name: (0.1, 0.5 if p.ndim > 1 else 0.0) for name, p in network().named_parameters()}
    assert groups() == expected
    assert groups(decay="all") == dict.fromkeys(expected, (0.1, 0.5))


@pytest.mark.parametrize(
    ("name", "settings"), [("sgd", {}), ("rprop", {}), ("adam", {"weight_decay": 0.0})]
)
def test_without_weight_decay_there_is_one_group(name, settings):
    maker = fw.optimizers.maker(name, **settings)
    assert len(maker(Parameters().groups(network(), maker)).param_groups) == 1


def test_the_first_matching_pattern_sets_the_rate():
    found = groups(rates={"0.bias": 0.1, "0.*": 0.5, "5.*": 10.0})
    rates = {name: lr for name, (lr, _) in found.items()}
    assert rates == pytest.approx(
        {
            "0.weight": 0.05,
            "0.bias": 0.01,
            "1.weight": 0.1,
            "1.bias": 0.1,
            "3.weight": 0.1,
            "3.bias": 0.1,
            "5.weight": 1.0,
            "5.bias": 1.0,
        }
    )


def test_layer_decay_reduces_the_rates_towards_the_input():
    expected = {}
    for layer, depth in {"0": 3, "1": 2, "3": 1, "5": 0}.items():
        expected[f"{layer}.weight"] = 0.1 * 0.5**depth
        expected[f"{layer}.bias"] = 0.1 * 0.5**depth
    rates = {name: lr for name, (lr, _) in groups(layer_decay=0.5).items()}
    assert rates == pytest.approx(expected)


def test_groups_keep_the_order_of_the_model_so_that_muon_knows_the_last_matrix():
    maker = fw.optimizers.maker("muon")
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    optimizer = maker(Parameters(rates={"1.*": 0.5}).groups(model, maker))
    hidden = set()
    for group in optimizer.param_groups:
        if group["hidden"]:
            hidden.update(map(id, group["params"]))
    assert hidden == {id(model[0].weight), id(model[1].weight)}


def test_a_pattern_without_a_match_is_an_error():
    with pytest.raises(
        SettingError, match=r"parameters\.rates: no parameter matches '7\.\*'; available: 0\.bias"
    ):
        groups(rates={"7.*": 1.0})


def test_a_schedule_scales_the_rate_of_every_group():
    model = network()
    maker = fw.optimizers.maker("sgd", lr=0.1)
    optimizer = maker(Parameters(rates={"0.*": 0.0001}).groups(model, maker))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = Trainer(max_steps=1, device="cpu")
    trainer.fit(
        model,
        SPLIT,
        task=nn.MSELoss(),
        optimizer=optimizer,
        schedule=lambda step: 0.5,
        batch_size=24,
    )
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5e-5, 0.05])
    assert (model[0].weight - before["0.weight"]).abs().max().item() < 1e-4
    assert (model[5].weight - before["5.weight"]).abs().max().item() > 1e-3
