"""A fit keeps the modes that the user has set, and other state of torch."""

import copy
import random

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import framework as fw
from framework import Callback, TensorSplit, Trainer
from framework.runtime import seeds
from framework.runtime.modes import restored_modes
from framework.runtime.precision import Precision
from framework.runtime.shapes import dry_run

X = torch.randn(24, 5, generator=torch.Generator().manual_seed(5)) * 3 + 1
Y = torch.arange(24) % 3
BATCHES = list(zip(X.split(8), Y.split(8), strict=True))


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def fit(model, *callbacks, **settings):
    settings = {"max_epochs": 2, "validate_every": "1steps"} | settings
    trainer = Trainer(device="cpu", callbacks=callbacks, **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer.fit(model, BATCHES, task=nn.CrossEntropyLoss(), optimizer=optimizer, val=BATCHES)
    return trainer


def moved(model, norm=1):
    """Return whether the statistics of a batch norm were updated."""
    return bool(model[norm].num_batches_tracked)


class Watch(Callback):
    """Records the modes in each step."""

    def __init__(self):
        self.seen = []

    def on_gradients(self, trainer):
        self.seen.append([module.training for module in trainer.model])


def test_modules_in_eval_mode_stay_in_it_and_the_others_train_as_in_a_plain_loop():
    expected = network()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    expected[1].eval()
    expected[2].eval()
    for _ in range(2):
        for inputs, targets in BATCHES:
            optimizer.zero_grad()
            F.cross_entropy(expected(inputs), targets).backward()
            optimizer.step()
    model = network()
    watch = Watch()
    model[1].eval()
    model[2].eval()
    fit(model, watch)
    assert watch.seen == [[True, False, False, True]] * 6
    assert not any(module.training for module in model.modules())
    for one, other in zip(model.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("between", ["nothing", "new head", "another model", "failed fit"])
def test_a_second_fit_trains_the_modules_of_the_first_one(between):
    """The first fit leaves all modules in eval mode, which the user has not chosen."""
    model = network()
    model[1].eval()
    fit(model, max_epochs=1)
    if between == "new head":
        model[3] = nn.Linear(8, 3)
    elif between == "another model":
        model = nn.Sequential(*model[:3], nn.Linear(8, 3))
    elif between == "failed fit":
        with pytest.raises(ZeroDivisionError):
            fit(model, Fails())
        assert not model.training
    watch = Watch()
    fit(model, watch)
    assert watch.seen == [[True, False, True, True]] * 6
    assert not moved(model)


class Fails(Callback):
    def on_step_end(self, trainer):
        raise ZeroDivisionError


def test_modes_set_between_two_fits_are_respected():
    model = network()
    model[1].eval()
    fit(model, max_epochs=1)
    model.train()
    model[2].eval()
    watch = Watch()
    fit(model, watch, max_epochs=1)
    assert watch.seen == [[True, True, False, True]] * 3
    assert moved(model)


@pytest.mark.parametrize("fitted", [False, True])
def test_a_model_whose_modules_are_all_in_eval_mode_is_trained(fitted):
    model = network()
    if fitted:
        fit(model, max_epochs=1)
        model = copy.deepcopy(model)
    model.eval()
    watch = Watch()
    fit(model, watch, max_epochs=1)
    assert watch.seen == [[True] * 4] * 3


def test_callbacks_may_change_modes_at_the_start_of_a_fit_or_epoch():
    class Choose(Callback):
        def on_fit_start(self, trainer):
            trainer.model[1].eval()
            trainer.model[2].eval()

        def on_epoch_start(self, trainer):
            if trainer.state.epoch == 1:
                trainer.model[1].train()

        def on_validation_end(self, trainer):  # like callbacks that generate samples
            trainer.model.eval()
            trainer.model.train(trainer.state.epoch == 0)

    model = network()
    watch = Watch()
    fit(model, Choose(), watch, max_epochs=3, validate_every="1epoch")
    first_epoch = [True, False, False, True]
    later_epochs = [True, True, False, True]
    assert watch.seen == [first_epoch] * 3 + [later_epochs] * 6
    without = Watch()
    fit(model, without, max_epochs=1)
    assert without.seen == [[True] * 4] * 3, "the choice of a callback ends with the fit"


def test_a_model_may_override_train():
    class Still(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[1].training = False
            return self

    watch = Watch()
    model = Still(*network())
    for _ in range(2):
        fit(model, watch, max_epochs=1)
    assert watch.seen == [[True, False, True, True]] * 6
    assert not moved(model)


@pytest.mark.parametrize("name", ["freeze", "swa", "ema"])
def test_callbacks_keep_modules_in_eval_mode(name):
    settings = {"freeze": {"patterns": ["0.*"], "epochs": 1}, "swa": {"start": 0}, "ema": {}}
    model = network()
    watch = Watch()
    model[1].eval()
    fit(model, fw.callbacks.build(name, **settings[name]), watch)
    assert not moved(model)
    assert watch.seen[-1] == [True, False, True, True]


def test_generating_text_restores_the_modes():
    from framework_plugins.tasks.language_modelling import sample

    class Model(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Embedding(4, 6), nn.Dropout(0.5), nn.Linear(6, 4))

    model = Model()
    model[1].eval()
    sample(model, [1, 2], 3, length=4)
    assert [module.training for module in model] == [True, False, True]


def test_stacked_trials_keep_modules_in_eval_mode():
    from framework.tuning.vectorized.stacked_update import NotStackable
    from framework.tuning.vectorized.trainer import StackedTrainer

    def pair(seed, still=True):
        torch.manual_seed(seed)
        model = network()
        model[1].train(not still)
        trainer = Trainer(max_epochs=2, device="cpu", seed=seed)
        data = fw.Loader(TensorSplit(X, Y), 8, shuffle=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        fit = {"model": model, "data": data, "task": nn.CrossEntropyLoss(), "optimizer": optimizer}
        rest = {"val": None, "schedule": None, "metrics": [], "batch_size": 8, "resume": None}
        return trainer, fit | rest

    trainers, fits = zip(pair(0), pair(1), strict=True)
    StackedTrainer(trainers, fits).run()
    for parts in fits:
        assert not moved(parts["model"])
        assert parts["model"][1].weight.ne(1).all()
    trainers, fits = zip(pair(0), pair(1, still=False), strict=True)
    with pytest.raises(NotStackable, match="evaluation mode"):
        StackedTrainer(trainers, fits)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_fit_works_where_gradients_are_disabled(mode):
    model = network()
    other = network()
    fit(model)
    with mode():
        fit(other)
        assert not torch.is_grad_enabled()
    for one, two in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two)


def test_a_diverged_fit_leaves_no_flag_in_the_optimizer():
    """On an accelerator `non_finite` sets a flag that lets the optimizer skip updates."""
    model = network()
    watch = fw.callbacks.build("non_finite")
    trainer = Trainer(max_epochs=1, device="cpu", callbacks=[watch])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    bad = [(torch.full((8, 5), torch.inf), Y[:8])]

    class Late(Callback):
        def on_fit_start(self, trainer):
            watch.deferred = True  # as on an accelerator

    trainer = Trainer(max_epochs=1, device="cpu", callbacks=[watch, Late()])
    with pytest.raises(fw.FrameworkError, match="not finite"):
        trainer.fit(model, bad, task=nn.CrossEntropyLoss(), optimizer=optimizer)
    assert getattr(optimizer, "found_inf", None) is None


class Merging(nn.Linear):
    """Does more in `train` than set a flag, like a layer that merges weights for inference."""

    merged = False

    def train(self, mode=True):
        self.merged = not mode
        return super().train(mode)

    def forward(self, inputs):
        assert self.merged == (not self.training)
        random.random()
        numpy.random.rand()
        return super().forward(inputs) + torch.rand(1)


def draws():
    return random.random(), numpy.random.rand(), torch.rand(1).item()


def run_by_precision(model):
    with Precision("fp32", torch.device("cpu")).inference(model):
        model(X)


def run_undisturbed(model):
    with fw.model_undisturbed(model):
        model(X)


RUNS = {
    "dry run": lambda model: dry_run(model, X),
    "inference": run_by_precision,
    "model_undisturbed": run_undisturbed,
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_running_a_model_in_eval_mode_restores_its_modes_and_all_generators(run):
    model = nn.Sequential(Merging(5, 3), nn.Dropout())
    model[1].eval()
    state = seeds.capture()
    run(model)
    drawn = draws()
    assert [module.training for module in model.modules()] == [True, True, False]
    assert not model[0].merged
    seeds.restore(state)
    assert draws() == drawn


def test_modes_are_restored_after_an_error():
    model = network()
    model[1].eval()
    with pytest.raises(ZeroDivisionError), restored_modes(model):
        model.eval()
        raise ZeroDivisionError
    assert [module.training for module in model] == [True, False, True, True]
