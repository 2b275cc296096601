"""Frozen parameters, and groups of parameters that differ in decay and rate."""

import pytest
import torch
from torch import nn

import framework as fw
from compiler import needs_compiler
from framework import Callback, TensorSplit, Trainer
from framework.contracts.optimizer import Parameters, build_optimizer
from framework.errors import SettingError

INPUTS = torch.linspace(-1, 1, 48).reshape(24, 2)
SPLIT = TensorSplit(INPUTS, INPUTS.sum(1, keepdim=True))


def network():
    torch.manual_seed(1)
    body = nn.Sequential(
        nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3), nn.Dropout(0.3)
    )
    return nn.Sequential(*body, nn.Linear(3, 1))


class Watch(Callback):
    """Keeps the weights and buffers after every step."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, trainer):
        self.steps.append(
            {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        )


class Cut(Callback):
    """Keeps the state of the run after a step, as a checkpoint would, and ends the run."""

    def __init__(self, step):
        self.step, self.kept = step, None

    def on_step_end(self, trainer):
        if trainer.state.step == self.step:
            state = trainer.state_dict()
            self.kept = torch.utils._pytree.tree_map(
                lambda x: x.clone() if isinstance(x, torch.Tensor) else x, state
            )
            trainer.state.stop = "cut"


def fit(*callbacks, epochs=4, resume=None, model=None, **settings):
    """Four steps an epoch."""
    model = network() if model is None else model
    trainer = Trainer(max_epochs=epochs, callbacks=callbacks, device="cpu", **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    trainer.fit(
        model, SPLIT, task=nn.MSELoss(), optimizer=optimizer, val=SPLIT, batch_size=6, resume=resume
    )
    return trainer


def freeze(*patterns, **settings):
    return fw.callbacks.build("freeze", patterns=list(patterns), **settings)


def moved(watch, name):
    """The epochs, counted from 0, in which a tensor changed."""
    before = [network().state_dict(), *watch.steps[:-1]]
    changed = [not torch.equal(a[name], b[name]) for a, b in zip(before, watch.steps, strict=True)]
    return {step // 4 for step, each in enumerate(changed) if each}


def test_what_is_frozen_stays_and_the_rest_learns():
    watch = Watch()
    trainer = fit(freeze("0.*", "1.*"), watch)
    for name in (
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
        "1.running_mean",
        "1.num_batches_tracked",
    ):
        assert moved(watch, name) == set(), name
    assert moved(watch, "3.weight") == moved(watch, "5.weight") == {0, 1, 2, 3}
    assert trainer.state.metrics["train/frozen_parameters"] == 2 * 3 + 3 + 3 + 3
    assert all(p.requires_grad for p in trainer.model.parameters()), "as it was before"


def test_patterns_thaw_one_after_the_other_from_the_last():
    watch = Watch()
    fit(freeze("0.*", "[13].*", epochs=1, every=2), watch)
    assert moved(watch, "5.weight") == {0, 1, 2, 3}
    assert moved(watch, "3.weight") == moved(watch, "1.running_mean") == {1, 2, 3}
    assert moved(watch, "0.weight") == {3}


def test_all_thaw_together_without_a_distance():
    watch = Watch()
    fit(freeze("0.*", "3.*", epochs=2), watch)
    assert moved(watch, "0.weight") == moved(watch, "3.weight") == {2, 3}


@pytest.mark.parametrize("step", [2, 6, 13])
def test_a_run_cut_off_goes_on_bit_for_bit(step):
    settings = {"epochs": 1, "every": 2}
    whole, cut = fit(freeze("0.*", "[13].*", **settings)), Cut(step)
    fit(freeze("0.*", "[13].*", **settings), cut)
    resumed = fit(freeze("0.*", "[13].*", **settings), resume=cut.kept)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


@needs_compiler
def test_a_compiled_step_freezes_too():
    def plain():  # before a batch norm a bias has no gradient but rounding, which AdamW makes large
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))

    eager, compiled = (
        fit(freeze("0.*", epochs=2), model=plain(), compile=way) for way in ("off", "step")
    )
    assert not torch.equal(compiled.model[0].weight, plain()[0].weight)
    for name, tensor in eager.model.state_dict().items():
        torch.testing.assert_close(tensor, compiled.model.state_dict()[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (["2.*"], r"no parameter matches '2\.\*'"),
        (["*"], "no parameter is left to train"),
        ([], r"patterns=\[\] has no effect"),
    ],
)
def test_what_makes_no_sense_is_refused(patterns, said):
    with pytest.raises(SettingError, match=said):
        fit(freeze(*patterns))


# --- groups -----------------------------------------------------------------------------------------------------------


def groups(model=None, maker=None, **settings):
    model = network() if model is None else model
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = build_optimizer(
        maker or fw.optimizers.maker("adamw", lr=0.1, weight_decay=0.5),
        Parameters(**settings).groups(
            model, maker or fw.optimizers.maker("adamw", lr=0.1, weight_decay=0.5)
        ),
    )
    return {
        names[id(p)]: (g["lr"], g.get("weight_decay"))
        for g in optimizer.param_groups
        for p in g["params"]
    }


def test_biases_and_norms_are_not_decayed():
    expected = {name: (0.1, 0.5 if p.ndim > 1 else 0.0) for name, p in network().named_parameters()}
    assert groups() == expected
    assert groups(decay="all") == dict.fromkeys(expected, (0.1, 0.5))


@pytest.mark.parametrize(
    ("name", "settings"), [("sgd", {}), ("rprop", {}), ("adam", {"weight_decay": 0.0})]
)
def test_where_nothing_is_decayed_there_is_one_group(name, settings):
    maker = fw.optimizers.maker(name, **settings)
    assert len(build_optimizer(maker, Parameters().groups(network(), maker)).param_groups) == 1


def test_rates_go_by_pattern_and_the_first_that_fits_counts():
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
        }
        | {"5.weight": 1.0, "5.bias": 1.0}
    )


def test_rates_fall_from_layer_to_layer_towards_the_input():
    rates = {name: lr for name, (lr, _) in groups(layer_decay=0.5).items()}
    assert rates == pytest.approx(
        {
            f"{layer}.{kind}": 0.1 * 0.5**depth
            for layer, depth in (("0", 3), ("1", 2), ("3", 1), ("5", 0))
            for kind in ("weight", "bias")
        }
    )


def test_groups_keep_the_order_of_the_model_so_that_muon_knows_the_last_matrix():
    maker = fw.optimizers.maker("muon")
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    optimizer = build_optimizer(maker, Parameters(rates={"1.*": 0.5}).groups(model, maker))
    hidden = [p for group in optimizer.param_groups if group["hidden"] for p in group["params"]]
    assert {id(p) for p in hidden} == {id(model[0].weight), id(model[1].weight)}


def test_a_pattern_that_fits_nothing_is_an_error():
    with pytest.raises(
        SettingError, match=r"parameters\.rates: no parameter fits '7\.\*'; there is: 0\.bias"
    ):
        groups(rates={"7.*": 1.0})


def test_a_schedule_moves_every_group_by_its_own_rate():
    model = network()
    maker = fw.optimizers.maker("sgd", lr=0.1)
    optimizer = build_optimizer(maker, Parameters(rates={"0.*": 0.0001}).groups(model, maker))
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
