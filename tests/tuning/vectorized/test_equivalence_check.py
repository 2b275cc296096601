"""Stacked trials give the results of single trials, or are refused, or end with an error."""

import random
from functools import cache, partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import framework as fw
from framework import Callback
from framework.contracts.task import Step, Task
from framework.data.dataset import Loader
from framework.runtime import seeds
from framework.tuning.vectorized.equivalence_check import exceeds_rounding, largest_number
from framework.tuning.vectorized.stacked_forward import vmap_cross_entropy
from framework.tuning.vectorized.trainer import StackedTrainer
from stacked import (
    OPTIMIZERS,
    TRAIN,
    VAL,
    alone,
    assert_not_stackable,
    assert_same,
    assert_stacked_as_alone,
    together,
    trial,
)

fw.discover()

TWO_SEEDS = [{"seed": 1}, {"seed": 2}]


class Base(nn.Module):
    """A linear model, to which subclasses add something."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(6, 3).double()
        self.prepare()

    def prepare(self): ...


class Embeds(Base):
    def prepare(self):
        self.table = nn.Embedding(5, 4, padding_idx=2).double()
        self.last = nn.Linear(24, 3).double()

    def forward(self, inputs):
        return self.last(self.table((inputs * 2).long().clamp(0, 4)).flatten(1))


class CountsCalls(Base):
    def prepare(self):
        self.calls = 0

    def forward(self, inputs):
        self.calls += self.training
        return self.last(inputs) * (1 + 0.1 * self.calls)


class InitializesFromData(Base):
    def prepare(self):
        self.is_initialized = False

    def forward(self, inputs):
        if not self.is_initialized:
            self.is_initialized = True
            with torch.no_grad():
                self.last.bias.copy_(inputs.mean(0)[:3])
        return self.last(inputs)


class SharesBuffer(Base):
    """Two layers have one buffer."""

    def prepare(self):
        self.one = nn.BatchNorm1d(6).double()
        self.other = nn.BatchNorm1d(6).double()
        self.other.running_mean = self.one.running_mean

    def forward(self, inputs):
        return self.last(self.other(self.one(inputs)))


class ReplacesBuffer(Base):
    def prepare(self):
        self.register_buffer("mean", torch.zeros(6).double())

    def forward(self, inputs):
        self.mean = 0.9 * self.mean + 0.1 * inputs.mean(0).detach()
        return self.last(inputs - self.mean)


class HasUnusedLayer(Base):
    def prepare(self):
        self.unused = nn.Linear(2, 2).double()

    def forward(self, inputs):
        return self.last(inputs)


class Renormalizes(Base):
    def prepare(self):
        self.table = nn.Embedding(5, 4, padding_idx=2, max_norm=1.0).double()
        self.last = nn.Linear(24, 3).double()

    forward = Embeds.forward


class HasMomentumLayer(Base):
    """A layer without gradients follows another one, as in a momentum encoder."""

    def prepare(self):
        self.slow = nn.Linear(6, 3).double().requires_grad_(False)

    def forward(self, inputs):
        if self.training:
            with torch.no_grad():
                self.slow.weight.mul_(0.9).add_(0.1 * self.last.weight)
        return self.last(inputs) + self.slow(inputs)


class StaysInEvaluation(Base):
    def prepare(self):
        self.norm = nn.BatchNorm1d(6).double()
        self.eval()

    def forward(self, inputs):
        return self.last(self.norm(inputs))


def seeded(model, seed, **settings):
    torch.manual_seed(seed)
    return trial(seed, model=model(), **settings)


@pytest.mark.parametrize("model", [Embeds, SharesBuffer, StaysInEvaluation])
def test_models_of_several_kinds_give_the_results_of_single_trials(model):
    make = partial(seeded, model, optimizer=OPTIMIZERS[1], max_epochs=3)
    assert_stacked_as_alone(*TWO_SEEDS, {"seed": 3}, make=make)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (CountsCalls, r"changes model\.calls"),
        (ReplacesBuffer, "replaces a buffer"),
        (HasUnusedLayer, r"does not depend on unused\.weight"),
        (Renormalizes, "padding_idx and max_norm"),
    ],
)
def test_a_model_that_would_train_differently_is_refused(model, reason):
    assert_not_stackable(reason, *TWO_SEEDS, make=partial(seeded, model))


def test_a_model_that_initializes_from_data_is_refused_and_not_changed():
    trials = [seeded(InitializesFromData, seed) for seed in (1, 2)]
    recipes = [{"built": built} for built in trials]
    assert_not_stackable(r"changes model\.is_initialized", *recipes, make=lambda built: built)
    model = trials[0][0].model
    assert not model.is_initialized
    assert torch.equal(model.last.bias, seeded(InitializesFromData, 1)[1]["model"].last.bias)


def test_a_momentum_layer_gives_the_results_of_a_single_trial():
    def make(seed):
        trainer, fit = seeded(HasMomentumLayer, seed, max_epochs=3)
        optimizer = torch.optim.SGD(fit["model"].last.parameters(), lr=0.1 * seed)
        return trainer, fit | {"optimizer": optimizer}

    assert_stacked_as_alone(*TWO_SEEDS, make=make)


class TemperedLoss(nn.CrossEntropyLoss):
    """A loss with a frozen parameter."""

    def __init__(self, temperature):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(temperature).double(), requires_grad=False)

    def forward(self, outputs, targets):
        return super().forward(outputs / self.temperature, targets)


def test_the_frozen_parameters_of_losses_may_differ():
    recipes = [{"loss": lambda: TemperedLoss(1.0), "max_epochs": 2}] * 10
    recipes[1] = {"loss": lambda: TemperedLoss(3.0), "max_epochs": 2}  # not among the compared ones
    trained, _ = together(*[trial(**recipe) for recipe in recipes])
    for row in (0, 1):
        assert_same(trained[row], alone(trial(**recipes[row])))


class HoldsModule(Task):
    def __init__(self):
        self.library = F

    def step(self, model, batch):
        inputs, targets = batch
        outputs = model(inputs)
        return Step(self.library.cross_entropy(outputs, targets), outputs, targets)


def test_a_task_that_cannot_be_copied_is_refused():
    reason = "cannot be copied: cannot pickle 'module' object"
    assert_not_stackable(reason, *TWO_SEEDS, task=HoldsModule)


class SingleSamples:
    """A split whose samples are read one by one."""

    def __len__(self):
        return len(TRAIN)

    def __getitem__(self, index):
        return tuple(tensor[index] for tensor in TRAIN.tensors)


def test_samples_read_one_by_one_are_read_once_for_all_trials():
    def make(seed):
        trainer, fit = trial(seed, max_epochs=2)
        loader = Loader(SingleSamples(), 32, 64, shuffle=True, seed=seed, read="memory")
        return trainer, fit | {"data": loader}

    first, second = assert_stacked_as_alone(*TWO_SEEDS, make=make)
    assert first.train_batches.tensors[0] is second.train_batches.tensors[0]


class DrawsNumbers(Task):
    def step(self, model, batch):
        inputs, targets = batch
        outputs = model(inputs + random.random() + torch.rand(()))
        return Step(F.cross_entropy(outputs, targets), outputs, targets)


def test_the_check_restores_random_generators(monkeypatch):
    before_check = []
    check_fits = StackedTrainer._check_fits

    def recording(self):
        check_fits(self)
        before_check.append(str(seeds.capture()))

    monkeypatch.setattr(StackedTrainer, "_check_fits", recording)
    trainers, fits = zip(*[trial(seed, task=DrawsNumbers) for seed in (1, 2)], strict=True)
    StackedTrainer(trainers, fits)
    assert before_check == [str(seeds.capture())]


def test_an_infinite_gradient_does_not_hide_other_differences():
    one = torch.tensor([1.0, torch.inf])
    other = torch.tensor([5.0, torch.inf])
    assert exceeds_rounding(one, other, largest_number(one), torch.float32)
    assert not exceeds_rounding(one, one.clone(), 1.0, torch.float32)


class NoisyEvaluation(Task):
    """Adds the same noise in each evaluation."""

    def step(self, model, batch):
        inputs, targets = batch
        if not model.training:
            generator = torch.Generator().manual_seed(7)
            inputs = inputs + torch.randn(inputs.shape, generator=generator, dtype=inputs.dtype)
        outputs = model(inputs)
        return Step(F.cross_entropy(outputs, targets), outputs, targets)


class LossWithMode(nn.CrossEntropyLoss):
    def forward(self, outputs, targets):
        return super().forward(outputs, targets) * (2 if self.training else 1)


@pytest.mark.parametrize(
    "settings", [{"task": NoisyEvaluation}, {"loss": LossWithMode}], ids=["noise", "mode"]
)
def test_validation_gives_the_values_of_single_trials(settings):
    assert_stacked_as_alone(*TWO_SEEDS, max_epochs=3, **settings)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ignored", [[], [1], [0, 1, 2, 3]], ids=["none", "one", "all"])
@pytest.mark.parametrize("weight", [None, [1.0, 2.0, 0.5]], ids=["even", "weighted"])
def test_cross_entropy_for_stacked_trials_is_that_of_torch(smoothing, ignored, weight):
    targets = torch.tensor([0, 2, 1, 2])
    targets[ignored] = -100
    if weight is not None:
        weight = torch.tensor(weight, dtype=torch.float64)
    results = []
    for function in (F.cross_entropy, vmap_cross_entropy):
        generator = torch.Generator().manual_seed(1)
        outputs = torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_()
        loss = function(outputs, targets, weight, label_smoothing=smoothing)
        finite = torch.where(loss.isnan(), 0.0, loss)
        results.append((loss, *torch.autograd.grad(finite, outputs)))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True)


def test_an_ignored_target_may_have_a_logit_of_minus_infinity():
    outputs = torch.tensor([[-torch.inf, 1.0, 2.0], [-torch.inf, 0.0, 1.0]])
    targets = torch.tensor([1, -100])
    assert torch.equal(vmap_cross_entropy(outputs, targets), F.cross_entropy(outputs, targets))


def test_a_dropout_rate_of_one_may_be_stacked_with_another():
    def make(p):
        torch.manual_seed(0)
        layers = [nn.Linear(6, 5), nn.Dropout(p), nn.Linear(5, 3)]
        return trial(model=nn.Sequential(*layers).double(), max_epochs=2)

    assert_stacked_as_alone({"p": 1.0}, {"p": 0.0}, make=make)


def reverse_parameters(fit):
    fit["optimizer"].param_groups[0]["params"].reverse()


def freeze(fit):
    fit["model"][0].weight.requires_grad_(False)


def hook_gradient(fit):
    fit["model"][0].weight.register_hook(lambda gradient: 2 * gradient)


def hook_step(fit):
    fit["optimizer"].register_step_post_hook(lambda *arguments: None)


def hook_backward(fit):
    fit["model"][0].register_full_backward_hook(lambda *arguments: None)


def read_in_order(fit):
    fit["data"] = Loader(fw.TensorSplit(*TRAIN[:]), 32, 32, shuffle=False)


def shift_data(fit):
    fit["data"] = Loader(shifted(TRAIN), 32, 64, shuffle=True)


def shift_validation(fit):
    fit["val"] = Loader(shifted(VAL), 32, 64)


def remove_validation(fit):
    fit["val"] = None


def shifted(split):
    inputs, targets = split[:]
    return fw.TensorSplit(inputs + 1, targets)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (reverse_parameters, "have other parameters"),
        (freeze, "not trained"),
        (hook_gradient, "hooks for the updates"),
        (hook_step, "hooks for the updates"),
        (hook_backward, "_backward_hooks"),
        (read_in_order, "sampling"),
        (shift_data, "data differs"),
        (remove_validation, "only some of them have validation data"),
        (shift_validation, "val differs"),
    ],
)
def test_a_difference_between_two_trials_is_refused(change, reason):
    def make(seed):
        trainer, fit = trial(seed)
        if seed == 2:
            change(fit)
        return trainer, fit

    assert_not_stackable(reason, *TWO_SEEDS, make=make)


class WritesWeights(Callback):
    alone = False

    def on_step_end(self, trainer):
        with torch.no_grad():
            next(trainer.model.parameters()).add_(0.01 * trainer.loss)


class ClampsGradients(fw.callbacks.get("clip_gradients").part):
    def on_gradients(self, trainer):
        for parameter in trainer.model.parameters():
            parameter.grad.clamp_(-0.01, 0.01)


class ReplacesGradients(Callback):
    alone = False

    def on_gradients(self, trainer):
        for parameter in trainer.model.parameters():
            parameter.grad = 3 * parameter.grad


CALLBACKS = {
    "uses the loss": lambda: [WritesWeights()],
    "overrides a built-in one": lambda: [ClampsGradients(norm=1.0)],
    "replaces gradients": lambda: [
        ReplacesGradients(),
        fw.callbacks.build("clip_gradients", norm=0.1),
    ],
}


@pytest.mark.parametrize("kind", CALLBACKS)
def test_a_callback_has_the_effect_that_it_has_in_a_single_trial(kind):
    def make(seed):
        callbacks = CALLBACKS[kind]()
        return trial(seed, callbacks=callbacks, optimizer=OPTIMIZERS[0], max_epochs=3)

    assert_stacked_as_alone(*TWO_SEEDS, make=make)


@cache
def callback_class(call, event="on_gradients", alone=False, changes_training=True):
    """Return a callback class that calls a function at an event."""
    members = {
        "alone": alone,
        "changes_training": changes_training,
        event: lambda self, trainer: call(trainer),
    }
    return type("Calls", (Callback,), members)


def remove_gradient(trainer):
    if trainer.seed == 2:
        trainer.model[0].weight.grad = None


def test_a_callback_that_removes_one_gradient_ends_only_its_trial():
    callbacks = [callback_class(remove_gradient)()]
    trained, errors = together(
        *[trial(seed, callbacks=callbacks, max_epochs=3) for seed in (1, 2, 3)]
    )
    reason = r"the gradient of 0\.weight was removed, .*launcher=one_by_one$"
    with pytest.raises(fw.errors.FrameworkError, match=reason):
        raise errors[1]
    assert errors[::2] == [None, None]
    assert_same(trained[2], alone(trial(3, max_epochs=3)))


@pytest.mark.parametrize(
    ("declared", "reason"),
    [
        ({"alone": None}, "Calls may change training .* `alone = False`"),
        ({"alone": True}, "Calls works with a single trial"),
        ({"alone": True, "changes_training": False}, "works with a single trial"),
    ],
)
def test_a_callback_without_a_declaration_for_stacked_trials_is_refused(declared, reason):
    callbacks = [callback_class(print, **declared)()]
    assert_not_stackable(reason, *TWO_SEEDS, callbacks=callbacks)


def change_decay(trainer):
    for group in trainer.optimizer.param_groups:
        group["weight_decay"] = 0.1 * trainer.seed


def test_a_callback_may_change_settings_of_the_optimizer():
    callbacks = [callback_class(change_decay, "on_epoch_end")()]
    settings = {"optimizer": OPTIMIZERS[3], "max_epochs": 3}
    assert_stacked_as_alone(*TWO_SEEDS, callbacks=callbacks, **settings)
