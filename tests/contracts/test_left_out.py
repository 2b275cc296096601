"""Parts that a fit would ignore, and states that cannot be saved, are errors before training."""

import collections
import warnings

import pytest
import torch
from torch import nn

import framework as fw
from framework import Callback, Schedule, TensorSplit, Trainer
from framework.errors import CheckpointError, SettingError
from framework.runs.checkpoint import listed, load

INPUTS = torch.linspace(-1, 1, 24).reshape(12, 2)
SPLIT = TensorSplit(INPUTS, INPUTS.sum(1, keepdim=True))
SGD = torch.optim.SGD


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))


def fit(model, optimizer, *callbacks, steps=3, folder=None, **settings):
    trainer = Trainer(max_steps=steps, callbacks=callbacks, folder=folder, device="cpu")
    trainer.fit(model, SPLIT, task=nn.MSELoss(), optimizer=optimizer, batch_size=12, **settings)
    return trainer


# parameters of the optimizer


def test_a_head_replaced_after_building_the_optimizer_is_an_error():
    model = network()
    optimizer = SGD(model.parameters())
    model[1] = nn.Linear(4, 1)
    with pytest.raises(
        SettingError, match=r"2 of its 4 parameters do not belong .*2 of the model's 4 .*1\.weight"
    ):
        fit(model, optimizer)


def test_foreign_parameters_give_a_warning():
    model = network()
    scale = nn.Parameter(torch.ones(()))
    with pytest.warns(UserWarning, match="1 of its 5 parameters do not belong to the model"):
        fit(model, SGD([*model.parameters(), scale]))


@pytest.mark.parametrize("chosen", ["all", "head", "head, rest frozen"])
def test_training_a_part_of_the_model_gives_no_warning(chosen):
    model = network()
    parameters = list(model.parameters() if chosen == "all" else model[1].parameters())
    if "frozen" in chosen:
        model[0].requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(model, SGD(parameters, lr=0.1))


# schedules that depend on validation


def test_a_plateau_without_validation_is_an_error():
    model = network()
    schedule = fw.schedulers.build("reduce_on_plateau", 9)
    with pytest.raises(SettingError, match="no validation split"):
        fit(model, SGD(model.parameters()), schedule=schedule)
    fit(model, SGD(model.parameters()), schedule=schedule, val=SPLIT)


def test_a_plateau_without_validation_is_an_error_before_a_run_exists(command, tmp_path):
    status, _, err = command("train scheduler=reduce_on_plateau data.val_fraction=0")
    assert (status, "no validation split" in err) == (2, True)
    assert not (tmp_path / "runs").exists()


# states of optimizers


class Momentum(SGD):
    """Has a state of the optimizer in addition to that of the parameters, as MADGRAD does."""

    def step(self, closure=None):
        count = self.state.setdefault("k", torch.zeros((), dtype=torch.long))
        count += 1
        super().step()


def test_an_optimizer_with_additional_state_resumes(tmp_path):
    def one(folder, steps, resume=None):
        model = network()
        optimizer = Momentum(model.parameters(), lr=0.1, momentum=0.9)
        saving = fw.callbacks.build("checkpoint", every="2steps", monitor=None)
        trainer = fit(model, optimizer, saving, steps=steps, folder=folder, resume=resume)
        return trainer, [parameter.detach().clone() for parameter in model.parameters()]

    whole, expected = one(tmp_path / "whole", 5)
    one(tmp_path / "cut", 2)
    weights, training = load(listed(tmp_path / "cut" / "checkpoints")[-1])
    rest, found = one(tmp_path / "rest", 5, training | {"model": weights})
    assert int(whole.optimizer.state["k"]) == int(rest.optimizer.state["k"]) == 5
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


class Queued(SGD):
    """Keeps a queue for each parameter."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("past", collections.deque()).append(0)
        super().step()


class Picky(Queued):
    """An optimizer that cannot be built with a single parameter."""

    def __init__(self, params, **settings):
        params = list(params)
        if len(params) == 1:
            raise ValueError("more parameters, please")
        super().__init__(params, **settings)


class CountSteps(Callback):
    changes_training = False
    done = 0

    def on_step_end(self, trainer):
        self.done += 1


class Set(Callback):
    def state_dict(self):
        return {"seen": {1, 2}}


class Odd(Schedule):
    def __call__(self, step):
        return 1.0

    def state_dict(self):
        return {"seen": {1, 2}}


@pytest.mark.parametrize(
    ("make", "callbacks", "path", "steps"),
    [
        (
            lambda p: SGD([{"params": p, "kind": torch.float32}]),
            [],
            r"optimizer\.param_groups\.0\.kind",
            0,
        ),
        (lambda p: Queued(p, lr=0.1), [], r"optimizer\.state\.0\.past", 0),
        (lambda p: Picky(p, lr=0.1), [], r"optimizer\.state\.0\.past", 1),
        (lambda p: SGD(p, lr=0.1), [Set()], r"callbacks\.0:Set\.seen", 1),
    ],
    ids=["setting", "state", "state of an optimizer that cannot be tried", "callback"],
)
def test_a_training_state_that_cannot_be_saved_is_an_error_in_the_first_step(
    make, callbacks, path, steps, tmp_path
):
    model = network()
    counting = CountSteps()
    saving = fw.callbacks.build("checkpoint", monitor=None)
    with pytest.raises(CheckpointError, match=f"^{path} is a "):
        fit(model, make(list(model.parameters())), *callbacks, saving, counting, folder=tmp_path)
    assert counting.done == steps


def test_a_schedule_whose_state_cannot_be_saved_is_found_before_the_first_step(tmp_path):
    model = network()
    counting = CountSteps()
    saving = fw.callbacks.build("checkpoint", monitor=None)
    with pytest.raises(CheckpointError, match=r"^schedule\.seen is a set"):
        fit(model, SGD(model.parameters()), saving, counting, folder=tmp_path, schedule=Odd())
    assert counting.done == 0


class Extra(nn.Module):
    def get_extra_state(self):
        return {"calls": 3}


def with_buffer(make):
    model = network()
    model[0].register_buffer("odd", make())
    return model


def with_extra_state():
    return network().append(Extra())


BUFFERS = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor(
        [torch.ones(2), torch.ones(3)], layout=torch.jagged
    ),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
    "complex128": lambda: torch.ones(3, dtype=torch.complex128),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("kind", [*BUFFERS, "dict"])
def test_a_buffer_that_cannot_be_saved_is_found_before_the_first_step(kind, background, tmp_path):
    model = with_buffer(BUFFERS[kind]) if kind in BUFFERS else with_extra_state()
    counting = CountSteps()
    saving = fw.callbacks.build("checkpoint", monitor=None, background=background)
    name = r"0\.odd" if kind in BUFFERS else r"2\._extra_state"
    with pytest.raises(CheckpointError, match=f"^{name} of the model's state is a .*{kind}"):
        fit(model, SGD(model.parameters()), saving, counting, folder=tmp_path)
    assert counting.done == 0


def test_a_buffer_without_values_is_an_error():
    model = with_buffer(lambda: torch.empty(3, device="meta"))
    with pytest.raises(SettingError, match=r"model: 0\.odd is on the device meta"):
        fit(model, SGD(model.parameters()))


class Views(nn.Module):
    """Buffers that are views of a weight and of each other."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(2, 1)
        self.register_buffer("row", self.linear.weight.detach()[0])
        turns = torch.randn(4, dtype=torch.complex64)
        self.register_buffer("turns", turns)
        self.register_buffer("pairs", torch.view_as_real(turns))
        self.register_buffer("middle", turns[1:3])
        self.register_buffer("conjugate", turns.conj())
        self.register_buffer("empty", torch.empty(0))

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize("background", [True, False])
def test_views_are_saved_equally_in_the_background_and_in_the_foreground(background, tmp_path):
    model = Views()
    saving = fw.callbacks.build("checkpoint", monitor=None, background=background)
    fit(model, SGD(model.parameters(), lr=0.1), saving, folder=tmp_path)
    saved, _ = load(listed(tmp_path / "checkpoints")[-1])
    for name, tensor in model.state_dict().items():
        assert torch.equal(saved[name], tensor.resolve_conj()), name


def test_a_lazy_layer_is_saved_with_the_shape_of_its_first_call(tmp_path):
    model = nn.Sequential(nn.LazyLinear(1))
    optimizer = SGD(model.parameters(), lr=0.1)
    saving = fw.callbacks.build("checkpoint", monitor=None)
    fit(model, optimizer, saving, folder=tmp_path)
    assert load(listed(tmp_path / "checkpoints")[-1])[0]["0.weight"].shape == (1, 2)
