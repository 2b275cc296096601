"""Losses and gradients that are not finite, by policy, in fits of a tiny regression."""

import copy
import math

import pytest
import torch
from torch import nn

import framework as fw
from framework import Callback, Logger, Metric, TensorSplit, Trainer
from framework.errors import FrameworkError, SettingError
from framework.registry.registry import Registry
from framework.runs.checkpoint import newest
from regressions import StopAt, assert_same_weights

INPUTS = torch.linspace(-1, 1, 24).reshape(12, 2)
SPLIT = TensorSplit(INPUTS, INPUTS.sum(1, keepdim=True))


class Record(Logger):
    """Stores logged values by name and step."""

    def __init__(self):
        self.values = {}

    def scalars(self, values, *, step, epoch, wall_seconds):
        for name, value in values.items():
            self.values.setdefault(name, {})[step] = value


class Poison(Callback):
    """Sets a gradient to a value at some steps (counted from 1)."""

    def __init__(self, *steps, value=math.nan):
        self.steps = steps
        self.value = value

    def on_gradients(self, trainer):
        if trainer.state.step + 1 in self.steps:
            trainer.model[2].weight.grad[0, 0] = self.value


class States(Callback):
    """Stores the state of model and optimizer after each step."""

    def __init__(self):
        self.model = {}
        self.optimizer = {}

    def on_step_end(self, trainer):
        step = trainer.state.step
        self.model[step] = copy.deepcopy(list(trainer.model.state_dict().values()))
        self.optimizer[step] = copy.deepcopy(momenta(trainer.optimizer))

    def first_weight(self, step):
        return self.model[step][0]


def momenta(optimizer):
    tensors = []
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return tensors


def same(tensors, others):
    return all(torch.equal(one, other) for one, other in zip(tensors, others, strict=True))


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def build(**settings):
    return fw.callbacks.build("non_finite", **settings)


def fit(
    *callbacks,
    epochs=4,
    split=SPLIT,
    model=None,
    folder=None,
    resume=None,
    fused=False,
    lr=0.01,
    **options,
):
    """Fit with three steps per epoch; return (trainer, logged values)."""
    record = Record()
    model = model or network()
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        loggers=[record],
        folder=folder,
        device="cpu",
        **options,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=fused)
    trainer.fit(
        model,
        split,
        task=nn.MSELoss(),
        optimizer=optimizer,
        metrics=[Mean()],
        batch_size=4,
        resume=resume,
    )
    return trainer, record.values


class Mean(Metric):
    name = "mean"

    def sums(self, outputs, targets):
        return torch.stack([outputs.sum(), torch.tensor(float(len(outputs)))])

    def compute(self, sums):
        return float(sums[0] / sums[1])


class Broken(torch.utils.data.Dataset):
    """A data set whose sample 7 is NaN."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        inputs, targets = SPLIT[index]
        return inputs * (math.nan if index == 7 else 1.0), targets


def batch_with_seven(epoch):
    return fw.seeds.order(0, epoch, 12).tolist().index(7) // 4


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_gradient_ends_the_run_before_the_update(value):
    states = States()
    message = r"is 0\.\d+ at step 5; .*gradient .* 2.weight"
    with pytest.raises(FrameworkError, match=message) as raised:
        fit(Poison(5, value=value), build(), states)
    assert raised.value.exit_status == 3
    assert max(states.model) == 4


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_error_names_the_samples_of_the_batch(accumulate):
    step = batch_with_seven(0) // accumulate
    samples_per_step = 4 * accumulate
    first = step * samples_per_step
    indices = fw.seeds.order(0, 0, 12).tolist()[first : first + samples_per_step]
    listed = ", ".join(map(str, indices))
    message = rf"loss is nan at step {step + 1}; .*gradient .* 0\.weight; .* samples {listed}"
    with pytest.raises(FrameworkError, match=message):
        fit(build(), split=Broken(), accumulate=accumulate)


def test_a_bad_loss_with_finite_gradients_ends_the_run():
    class Loss(nn.MSELoss):
        def forward(self, outputs, targets):
            return super().forward(outputs, targets) + math.inf

    trainer = Trainer(max_steps=3, callbacks=[build()], device="cpu")
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(FrameworkError, match="loss is inf at step 1; all gradients are finite"):
        trainer.fit(model, SPLIT, task=Loss(), optimizer=optimizer)


def test_a_skipped_step_changes_neither_model_nor_optimizer():
    states = States()
    policy = build(policy="skip")
    trainer, _ = fit(policy, states, split=Broken())
    bad = [1 + 3 * epoch + batch_with_seven(epoch) for epoch in range(4)]
    assert trainer.state.step == 12
    assert policy.skipped == 4
    for step in range(2, 13):
        assert same(states.model[step], states.model[step - 1]) == (step in bad)
        if step != bad[0]:
            assert same(states.optimizer[step], states.optimizer[step - 1]) == (step in bad)
    for tensor in states.model[12]:  # the running statistics too
        assert tensor.isfinite().all()


def test_a_skipped_step_is_counted_and_not_measured():
    _, logged = fit(build(policy="skip"), split=Broken(), log_every="1steps")
    bad = [1 + 3 * epoch + batch_with_seven(epoch) for epoch in range(4)]
    not_measured = [step for step, value in logged["train/loss"].items() if math.isnan(value)]
    assert not_measured == bad
    for step, skipped in logged["train/skipped_steps"].items():
        assert skipped == sum(bad_step <= step for bad_step in bad)


def test_values_measured_before_a_skipped_step_are_kept():
    _, logged = fit(build(policy="skip"), split=Broken(), epochs=1)
    assert math.isfinite(logged["train/loss"][3])
    assert math.isfinite(logged["train/mean"][3])


def test_more_than_most_skips_in_a_row_end_the_run():
    fit(Poison(2, 3, 5, 6, 8, 9), build(policy="skip", most_skips=2))
    with pytest.raises(FrameworkError, match=r"at step 7; .*; 2 updates .*\(most_skips\)"):
        fit(Poison(2, 3, 5, 6, 7), build(policy="skip", most_skips=2))


@pytest.mark.parametrize("policy", ["skip", "rewind"])
@pytest.mark.parametrize("background", [True, False])
def test_a_resumed_run_equals_the_uninterrupted_run(tmp_path, policy, background):
    def parts():
        settings = {"monitor": None, "every": "2steps", "keep": 9, "background": background}
        checkpoint = fw.callbacks.build("checkpoint", **settings)
        return Poison(4, 6, 9), build(policy=policy), checkpoint

    folder = tmp_path / "interrupted"
    uninterrupted, _ = fit(*parts(), folder=tmp_path / "uninterrupted")
    interrupted, _ = fit(*parts(), StopAt(7), folder=folder)
    resumed, _ = fit(*parts(), folder=folder, resume=interrupted.state_dict())
    assert_same_weights(uninterrupted.model, resumed.model)
    assert same(uninterrupted.model.buffers(), resumed.model.buffers())
    assert same(momenta(uninterrupted.optimizer), momenta(resumed.optimizer))
    assert resumed.callbacks[1].skipped == uninterrupted.callbacks[1].skipped == 3


def test_a_rewind_restores_weights_and_momenta_from_the_newest_good_checkpoint(tmp_path):
    states = States()
    checkpoint = fw.callbacks.build("checkpoint", monitor=None, every="3steps", keep=9)
    trainer, _ = fit(Poison(5), build(policy="rewind"), checkpoint, states, folder=tmp_path)
    assert same(states.model[5], states.model[3])
    assert same(states.optimizer[5], states.optimizer[3])
    assert not same(states.model[4], states.model[3])
    assert (trainer.state.step, trainer.state.samples) == (12, 48)


def test_a_rewind_without_a_good_checkpoint_is_an_error(tmp_path):
    with pytest.raises(SettingError, match="needs a folder"):
        fit(build(policy="rewind"))
    with pytest.raises(FrameworkError, match=r"at step 2; .*no good checkpoint"):
        fit(Poison(2), build(policy="rewind"), folder=tmp_path)


def test_a_diverged_run_saves_no_checkpoint(tmp_path):
    with pytest.raises(FrameworkError, match=r"loss is (inf|nan) at step 2"):
        fit(build(), fw.callbacks.build("checkpoint", monitor=None), lr=1e30, folder=tmp_path)
    assert newest(tmp_path / "checkpoints") == (None, [])


def test_a_fused_optimizer_omits_updates_and_the_next_log_raises_the_error():
    """torch's fused step for the CPU omits updates in the same way as that for accelerators."""
    states = States()
    policy = build()

    class Defer(Callback):
        def on_fit_start(self, trainer):
            policy.deferred = True

    with pytest.raises(FrameworkError, match="not finite in a step from 4 to 6; the weights"):
        fit(Poison(5), policy, Defer(), states, fused=True)
    assert torch.equal(states.first_weight(5), states.first_weight(4))
    assert not torch.equal(states.first_weight(4), states.first_weight(3))
    assert same(states.optimizer[5], states.optimizer[4])


def test_with_a_scaler_gradients_may_overflow():
    class Overflow(Callback):
        def on_fit_start(self, trainer):
            weight = trainer.model[2].weight
            weight.register_hook(lambda grad: grad * math.inf if trainer.state.step < 2 else grad)

    states = States()
    trainer, _ = fit(Overflow(), build(), states, precision="fp16")
    assert trainer.state.step == 12
    assert torch.equal(states.first_weight(1), states.first_weight(2))
    assert not torch.equal(states.first_weight(2), states.first_weight(3))


@pytest.mark.parametrize("name", ["table.weight", "turn"])
def test_sparse_and_complex_gradients_are_checked(name):
    class SparseAndComplex(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(4, 2, sparse=True)
            self.turn = nn.Parameter(torch.ones(2, dtype=torch.complex64))

        def forward(self, x):
            return (self.table(x.long().clamp(0, 3)[:, 0]) * self.turn.abs()).sum(1, keepdim=True)

    class SetNan(Callback):
        def on_gradients(self, trainer):
            grad = trainer.model.get_parameter(name).grad
            numbers = grad._values() if grad.is_sparse else grad
            numbers.view(-1)[0] = math.nan

    model = SparseAndComplex()
    trainer = Trainer(max_steps=1, callbacks=[SetNan(), build()], device="cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(FrameworkError, match=f"of {name}"):
        trainer.fit(model, SPLIT, task=nn.MSELoss(), optimizer=optimizer)


@pytest.mark.parametrize("name", [entry.name for entry in Registry.every["optimizer"]])
def test_an_optimizer_changes_nothing_without_gradients(name):
    """The policies skip and rewind rely on it."""
    weights = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))]
    optimizer = fw.optimizers.build(name, weights)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    before = [t.clone() for t in (*weights, *momenta(optimizer))]
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()
    assert same(before, [*weights, *momenta(optimizer)])
