"""What could go wrong unseen when trials train as one: it comes out as alone, or is refused, or ends with an error."""

import random
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import framework as fw
from framework import Callback
from framework.contracts.task import Step, Task
from framework.data.dataset import Loader
from framework.runtime import seeds
from framework.tuning.vectorized import rehearsal, stacked_forward
from framework.tuning.vectorized.stacked_update import NotStackable
from framework.tuning.vectorized.trainer import StackedTrainer
from stacked import OPTIMIZERS, TRAIN, VAL, alone, assert_same, together, trial

fw.discover()


class Own(nn.Module):
    """A linear model that does more than that."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(6, 3).double()
        self.prepare()

    def prepare(self): ...


class Words(Own):
    def prepare(self):
        self.table, self.last = (
            nn.Embedding(5, 4, padding_idx=2).double(),
            nn.Linear(24, 3).double(),
        )

    def forward(self, inputs):
        return self.last(self.table((inputs * 2).long().clamp(0, 4)).flatten(1))


class Counts(Own):
    def prepare(self):
        self.calls = 0

    def forward(self, inputs):
        self.calls += self.training
        return self.last(inputs) * (1 + 0.1 * self.calls)


class BeginsWithData(Own):
    def prepare(self):
        self.begun = False

    def forward(self, inputs):
        if not self.begun:
            self.begun = True
            with torch.no_grad():
                self.last.bias.copy_(inputs.mean(0)[:3])
        return self.last(inputs)


class Shares(Own):
    """Two layers have one buffer."""

    def prepare(self):
        self.one, self.other = nn.BatchNorm1d(6).double(), nn.BatchNorm1d(6).double()
        self.other.running_mean = self.one.running_mean

    def forward(self, inputs):
        return self.last(self.other(self.one(inputs)))


class Reassigns(Own):
    def prepare(self):
        self.register_buffer("mean", torch.zeros(6).double())

    def forward(self, inputs):
        self.mean = 0.9 * self.mean + 0.1 * inputs.mean(0).detach()
        return self.last(inputs - self.mean)


class Unused(Own):
    def prepare(self):
        self.more = nn.Linear(2, 2).double()

    def forward(self, inputs):
        return self.last(inputs)


class Renormalises(Own):
    def prepare(self):
        self.table = nn.Embedding(5, 4, padding_idx=2, max_norm=1.0).double()
        self.last = nn.Linear(24, 3).double()

    forward = Words.forward


class Follows(Own):
    """A part that no gradient trains follows another, as a momentum encoder does."""

    def prepare(self):
        self.slow = nn.Linear(6, 3).double().requires_grad_(False)

    def forward(self, inputs):
        if self.training:
            with torch.no_grad():
                self.slow.weight.mul_(0.9).add_(0.1 * self.last.weight)
        return self.last(inputs) + self.slow(inputs)


class InEval(Own):
    def prepare(self):
        self.norm = nn.BatchNorm1d(6).double()
        self.eval()

    def forward(self, inputs):
        return self.last(self.norm(inputs))


def of(model, seed):
    torch.manual_seed(seed)
    return model()


@pytest.mark.parametrize("model", [Words, Shares, InEval])
def test_models_of_all_kinds_come_out_as_alone(model):
    sgd = {"optimizer": OPTIMIZERS[1], "max_epochs": 3}
    trained, outcomes = together(*(trial(seed, model=of(model, seed), **sgd) for seed in (1, 2, 3)))
    assert outcomes == [None] * 3
    for trainer, seed in zip(trained, (1, 2, 3), strict=True):
        assert_same(trainer, alone(trial(seed, model=of(model, seed), **sgd)))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Counts, "a pass changes model.calls"),
        (Reassigns, "another tensor in the place of a buffer"),
        (Unused, "does not reach more.weight"),
        (Renormalises, "padding_idx and max_norm"),
    ],
)
def test_models_that_would_train_otherwise_are_refused(model, why):
    with pytest.raises(NotStackable, match=why):
        together(*(trial(seed, model=of(model, seed)) for seed in (1, 2)))


def test_a_model_that_begins_with_its_first_batch_is_refused_and_left_as_it_was():
    made = [trial(seed, model=of(BeginsWithData, seed)) for seed in (1, 2)]
    with pytest.raises(NotStackable, match=r"a pass changes model\.begun"):
        together(*made)
    assert not made[0][0].model.begun
    assert torch.equal(made[0][0].model.last.bias, of(BeginsWithData, 1).last.bias)


def test_a_part_that_follows_another_comes_out_as_alone():
    def made(seed):
        trainer, fit = trial(seed, model=of(Follows, seed), max_epochs=3)
        return trainer, fit | {
            "optimizer": torch.optim.SGD(fit["model"].last.parameters(), lr=0.1 * seed)
        }

    trained, _ = together(*(made(seed) for seed in (1, 2)))
    for trainer, seed in zip(trained, (1, 2), strict=True):
        assert_same(trainer, alone(made(seed)))


class Tempered(nn.CrossEntropyLoss):
    """A loss with a frozen parameter."""

    def __init__(self, temperature):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(temperature).double(), requires_grad=False)

    def forward(self, outputs, targets):
        return super().forward(outputs / self.temperature, targets)


def test_a_loss_may_have_frozen_parameters_of_its_own():
    recipes = [{"loss": lambda: Tempered(1.0)}] * 10
    recipes[1] = {"loss": lambda: Tempered(3.0)}  # not among those that the rehearsal compares
    trained, _ = together(*(trial(max_epochs=2, **recipe) for recipe in recipes))
    for row in (0, 1):
        assert_same(trained[row], alone(trial(max_epochs=2, **recipes[row])))


class HoldsAModule(Task):
    def __init__(self):
        self.library = F

    def step(self, model, batch):
        inputs, targets = batch
        outputs = model(inputs)
        return Step(self.library.cross_entropy(outputs, targets), outputs, targets)


def test_a_task_that_cannot_be_copied_is_refused():
    with pytest.raises(NotStackable, match="cannot be copied: cannot pickle 'module' object"):
        together(*(trial(seed, task=HoldsAModule) for seed in (1, 2)))


class Listed:
    """Samples that are read one by one."""

    def __len__(self):
        return len(TRAIN)

    def __getitem__(self, index):
        return tuple(tensor[index] for tensor in TRAIN.tensors)


def test_samples_read_one_by_one_are_read_once_for_all():
    def made(seed):
        trainer, fit = trial(seed, max_epochs=2)
        return trainer, fit | {
            "data": Loader(Listed(), 32, 64, shuffle=True, seed=seed, read="memory")
        }

    trained, _ = together(*(made(seed) for seed in (1, 2)))
    assert trained[0].train_batches.tensors[0] is trained[1].train_batches.tensors[0]
    for trainer, seed in zip(trained, (1, 2), strict=True):
        assert_same(trainer, alone(made(seed)))


def test_a_rehearsal_moves_no_generator(monkeypatch):
    begun, begin = [], StackedTrainer._begin
    monkeypatch.setattr(
        StackedTrainer, "_begin", lambda self: begun.append((begin(self), str(seeds.capture())))
    )
    made = [trial(seed, task=Draws) for seed in (1, 2)]
    StackedTrainer([trainer for trainer, _ in made], [fit for _, fit in made])
    assert begun == [(None, str(seeds.capture()))]


class Draws(Task):
    def step(self, model, batch):
        inputs, targets = batch
        outputs = model(inputs + random.random() + torch.rand(()))
        return Step(F.cross_entropy(outputs, targets), outputs, targets)


def test_one_infinite_gradient_hides_no_other_difference():
    tensors = torch.tensor([1.0, torch.inf]), torch.tensor([5.0, torch.inf])
    assert rehearsal.differ(*tensors, rehearsal.size(tensors[0]), torch.float32)
    assert not rehearsal.differ(tensors[0], tensors[0].clone(), 1.0, torch.float32)


class Noisy(Task):
    """Measures with the same noise each time."""

    def step(self, model, batch):
        inputs, targets = batch
        if not model.training:
            noise = torch.randn(
                inputs.shape, generator=torch.Generator().manual_seed(7), dtype=inputs.dtype
            )
            inputs = inputs + noise
        outputs = model(inputs)
        return Step(F.cross_entropy(outputs, targets), outputs, targets)


class AsksItsMode(nn.CrossEntropyLoss):
    def forward(self, outputs, targets):
        return super().forward(outputs, targets) * (2 if self.training else 1)


@pytest.mark.parametrize("more", [{"task": Noisy}, {"loss": AsksItsMode}], ids=["noise", "mode"])
def test_measuring_is_as_alone(more):
    trained, _ = together(*(trial(seed, max_epochs=3, **more) for seed in (1, 2)))
    for trainer, seed in zip(trained, (1, 2), strict=True):
        assert_same(trainer, alone(trial(seed, max_epochs=3, **more)))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ignored", [[], [1], [0, 1, 2, 3]], ids=["none", "one", "all"])
@pytest.mark.parametrize(
    "weight", [None, torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)], ids=["even", "weighted"]
)
def test_the_form_of_cross_entropy_for_many_is_that_of_torch(smoothing, ignored, weight):
    targets = torch.tensor([0, 2, 1, 2])
    targets[ignored] = -100
    found = []
    for function in (F.cross_entropy, stacked_forward.cross_entropy):
        outputs = torch.randn(
            4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        ).requires_grad_()
        loss = function(outputs, targets, weight, label_smoothing=smoothing)
        found.append((loss, *torch.autograd.grad(torch.where(loss.isnan(), 0.0, loss), outputs)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


def test_what_is_ignored_may_have_a_logit_of_minus_infinity():
    outputs = torch.tensor([[-torch.inf, 1.0, 2.0], [-torch.inf, 0.0, 1.0]])
    targets = torch.tensor([1, -100])
    assert torch.equal(
        stacked_forward.cross_entropy(outputs, targets), F.cross_entropy(outputs, targets)
    )


def test_a_dropout_that_drops_all_may_stand_beside_another():
    trained, outcomes = together(*(trial(model=dropped(p), max_epochs=2) for p in (1.0, 0.0)))
    assert outcomes == [None, None]
    for trainer, p in zip(trained, (1.0, 0.0), strict=True):
        assert_same(trainer, alone(trial(model=dropped(p), max_epochs=2)))


def dropped(p):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Dropout(p), nn.Linear(5, 3)).double()


def altered(alter, number):
    made = trial(number)
    if number == 2:
        alter(*made)
    return made


def reverse(trainer, fit):
    fit["optimizer"].param_groups[0]["params"].reverse()


@pytest.mark.parametrize(
    ("alter", "why"),
    [
        (reverse, "hold other parameters"),
        (lambda _, fit: fit["model"][0].weight.requires_grad_(False), "not trained"),
        (
            lambda _, fit: fit["model"][0].weight.register_hook(lambda g: 2 * g),
            "told of each update",
        ),
        (
            lambda _, fit: fit["optimizer"].register_step_post_hook(lambda *_: None),
            "told of each update",
        ),
        (
            lambda _, fit: fit["model"][0].register_full_backward_hook(lambda *_: None),
            "_backward_hooks",
        ),
        (
            lambda _, fit: fit.update(
                data=Loader(fw.TensorSplit(*TRAIN[:]), 32, 32, shuffle=False)
            ),
            "sampling",
        ),
        (
            lambda _, fit: fit.update(data=Loader(shifted(TRAIN), 32, 64, shuffle=True)),
            "data is not the same",
        ),
        (lambda _, fit: fit.update(val=None), "some have none"),
        (
            lambda _, fit: fit.update(val=Loader(fw.TensorSplit(VAL[:][0] + 1, VAL[:][1]), 32, 64)),
            "val is not the same",
        ),
    ],
)
def test_what_one_trial_has_and_the_other_not_is_refused(alter, why):
    with pytest.raises(NotStackable, match=why):
        together(*(altered(alter, number) for number in (1, 2)))


def shifted(split):
    inputs, targets = split[:]
    return fw.TensorSplit(inputs + 1, targets)


class Writes(Callback):
    alone = False

    def on_step_end(self, trainer):
        with torch.no_grad():
            next(trainer.model.parameters()).add_(0.01 * trainer.loss)


class OwnClip(fw.callbacks.get("clip_gradients").part):
    def on_gradients(self, trainer):
        for parameter in trainer.model.parameters():
            parameter.grad.clamp_(-0.01, 0.01)


class Replaces(Callback):
    alone = False

    def on_gradients(self, trainer):
        for parameter in trainer.model.parameters():
            parameter.grad = 3 * parameter.grad


CALLBACKS = {
    "the loss": lambda: [Writes()],
    "another clipping": lambda: [OwnClip(norm=1.0)],
    "other gradients": lambda: [Replaces(), fw.callbacks.build("clip_gradients", norm=0.1)],
}


@pytest.mark.parametrize("which", CALLBACKS)
def test_callbacks_see_and_do_what_they_would_alone(which):
    more = {"optimizer": OPTIMIZERS[0], "max_epochs": 3}
    trained, _ = together(*(trial(seed, callbacks=CALLBACKS[which](), **more) for seed in (1, 2)))
    for trainer, seed in zip(trained, (1, 2), strict=True):
        assert_same(trainer, alone(trial(seed, callbacks=CALLBACKS[which](), **more)))


def take_away(trainer):
    if trainer.seed == 2:
        trainer.model[0].weight.grad = None


def test_a_gradient_that_is_gone_ends_that_trial_alone():
    trained, outcomes = together(
        *(trial(seed, callbacks=[that_does(take_away)()], max_epochs=3) for seed in (1, 2, 3))
    )
    with pytest.raises(
        fw.errors.FrameworkError, match=r"the gradient of 0\.weight is gone, .*launcher=one_by_one$"
    ):
        raise outcomes[1]
    assert outcomes[::2] == [None, None]
    assert_same(trained[2], alone(trial(3, max_epochs=3)))


@cache
def that_does(what, event="on_gradients", alone=False, changes_training=True):
    said = {"alone": alone, "changes_training": changes_training}
    return type("Does", (Callback,), {event: lambda _, trainer: what(trainer), **said})


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"alone": None}, "Does may change training .* `alone = False`"),
        ({"alone": True}, "Does works with a trial of its own"),
        ({"alone": True, "changes_training": False}, "works with a trial of its own"),
    ],
)
def test_a_callback_must_say_that_it_can_serve_trials_that_train_as_one(said, why):
    with pytest.raises(NotStackable, match=why):
        together(*(trial(seed, callbacks=[that_does(print, **said)()]) for seed in (1, 2)))


def more_decay(trainer):
    for group in trainer.optimizer.param_groups:
        group["weight_decay"] = 0.1 * trainer.seed


def test_settings_of_the_optimizer_may_change_on_the_way():
    more = {"optimizer": OPTIMIZERS[3], "max_epochs": 3}
    event = "on_epoch_end"
    trained, _ = together(
        *(trial(seed, callbacks=[that_does(more_decay, event)()], **more) for seed in (1, 2))
    )
    for trainer, seed in zip(trained, (1, 2), strict=True):
        assert_same(trainer, alone(trial(seed, callbacks=[that_does(more_decay, event)()], **more)))
