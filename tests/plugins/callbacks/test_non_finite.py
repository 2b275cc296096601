"""Losses and gradients that are not finite, by policy; in real runs of a tiny regression."""

import math

import pytest
import torch
from torch import nn

import framework as fw
from framework import Callback, Logger, Metric, TensorSplit, Trainer
from framework.errors import FrameworkError, SettingError
from framework.registry.registry import Registry
from framework.runs.checkpoint import newest

INPUTS = torch.linspace(-1, 1, 24).reshape(12, 2)
SPLIT = TensorSplit(INPUTS, INPUTS.sum(1, keepdim=True))


class Record(Logger):
    def __init__(self):
        self.values = {}

    def scalars(self, values, *, step, epoch, wall_seconds):
        for name, value in values.items():
            self.values.setdefault(name, {})[step] = value


class Poison(Callback):
    """Makes what an update would be made of not finite, at some steps (counted from 1)."""

    def __init__(self, *steps, where="gradient", value=math.nan):
        self.steps, self.where, self.value = steps, where, value

    def on_step_start(self, trainer):
        self.now = trainer.state.step + 1 in self.steps

    def on_gradients(self, trainer):
        if self.now and self.where == "gradient":
            trainer.model[2].weight.grad[0, 0] = self.value


class Weights(Callback):
    """Keeps the state of model and optimizer after each step."""

    def __init__(self):
        self.model, self.optimizer = {}, {}

    def on_step_end(self, trainer):
        step = trainer.state.step
        self.model[step] = {
            name: tensor.clone() for name, tensor in trainer.model.state_dict().items()
        }
        self.optimizer[step] = [tensor.clone() for tensor in momenta(trainer.optimizer)]


def momenta(optimizer):
    return [
        tensor
        for state in optimizer.state.values()
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor)
    ]


def same(a, b):
    if isinstance(a, dict):
        a, b = a.values(), b.values()
    return all(torch.equal(one, two) for one, two in zip(a, b, strict=True))


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
    """Three steps an epoch; returns (trainer, logged values)."""
    record, model = Record(), model or network()
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        loggers=[record],
        folder=folder,
        device="cpu",
        **options,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=fused)
    settings = {"task": nn.MSELoss(), "optimizer": optimizer, "batch_size": 4, "resume": resume}
    trainer.fit(model, split, metrics=[Mean()], **settings)
    return trainer, record.values


class Mean(Metric):
    name = "mean"

    def sums(self, outputs, targets):
        return torch.stack([outputs.sum(), torch.tensor(float(len(outputs)))])

    def compute(self, sums):
        return float(sums[0] / sums[1])


class Broken(torch.utils.data.Dataset):
    """Sample 7 has a NaN."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        inputs, targets = SPLIT[index]
        return inputs * (math.nan if index == 7 else 1.0), targets


def batch_with_seven(epoch):
    return fw.seeds.order(0, epoch, 12).tolist().index(7) // 4


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_it_is_found_before_the_update_and_named(value):
    seen = Weights()
    with pytest.raises(
        FrameworkError, match=r"is 0\.\d+ at step 5; .*gradient .* 2.weight"
    ) as found:
        fit(Poison(5, value=value), build(), seen)
    assert found.value.exit_status == 3
    assert max(seen.model) == 4


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_samples_of_the_batch_are_named(accumulate):
    step = batch_with_seven(0) // accumulate
    indices = fw.seeds.order(0, 0, 12).tolist()[step * 4 * accumulate : (step + 1) * 4 * accumulate]
    listed = ", ".join(map(str, indices))
    message = rf"loss is nan at step {step + 1}; .*gradient .* 0\.weight; .* samples {listed}"
    with pytest.raises(FrameworkError, match=message):
        fit(build(), split=Broken(), accumulate=accumulate)


def test_a_loss_that_is_not_finite_is_enough():
    class Loss(nn.MSELoss):
        def forward(self, outputs, targets):
            return super().forward(outputs, targets) + math.inf

    trainer = Trainer(max_steps=3, callbacks=[build()], device="cpu")
    model = network()
    with pytest.raises(FrameworkError, match="loss is inf at step 1; all gradients are finite"):
        trainer.fit(
            model, SPLIT, task=Loss(), optimizer=torch.optim.SGD(model.parameters(), lr=0.1)
        )


def test_a_skipped_update_changes_nothing_but_the_counters():
    seen, policy = Weights(), build(policy="skip")
    trainer, logged = fit(policy, seen, split=Broken(), log_every="1steps")
    bad = [1 + 3 * epoch + batch_with_seven(epoch) for epoch in range(4)]
    assert trainer.state.step == 12
    for step in range(2, 13):
        unchanged = same(seen.model[step], seen.model[step - 1])
        assert unchanged == (step in bad)
        assert step == bad[0] or same(seen.optimizer[step], seen.optimizer[step - 1]) == (
            step in bad
        )
    assert all(
        tensor.isfinite().all() for tensor in seen.model[12].values()
    )  # the running statistics too
    assert policy.skipped == 4
    assert [
        step for step, value in logged["train/loss"].items() if math.isnan(value)
    ] == bad  # nothing was measured
    assert list(logged["train/skipped_steps"].values()) == [
        sum(b <= step for b in bad) for step in range(1, 13)
    ]


def test_what_was_measured_before_a_skipped_step_stays():
    _, logged = fit(build(policy="skip"), split=Broken(), epochs=1)
    assert math.isfinite(logged["train/loss"][3])
    assert math.isfinite(logged["train/mean"][3])


def test_too_many_in_a_row_end_the_run_and_others_do_not():
    fit(Poison(2, 3, 5, 6, 8, 9), build(policy="skip", most_skips=2))
    with pytest.raises(
        FrameworkError,
        match=r"at step 7; .*; 2 updates .*\(most_skips\)",
    ):
        fit(Poison(2, 3, 5, 6, 7), build(policy="skip", most_skips=2))


@pytest.mark.parametrize("policy", ["skip", "rewind"])
@pytest.mark.parametrize("background", [True, False])
def test_a_resumed_run_goes_on_as_if_it_had_not_been_cut(tmp_path, policy, background):
    class Stop(Callback):
        def on_step_end(self, trainer):
            if trainer.state.step == 7:
                trainer.state.stop = "enough"

    def parts():
        saving = fw.callbacks.build(
            "checkpoint", monitor=None, every="2steps", keep=9, background=background
        )
        return Poison(4, 6, 9), build(policy=policy), saving

    whole, _ = fit(*parts(), folder=tmp_path / "whole")
    cut, _ = fit(*parts(), Stop(), folder=tmp_path / "cut")
    again, _ = fit(*parts(), folder=tmp_path / "cut", resume=cut.state_dict())
    assert same(whole.model.state_dict(), again.model.state_dict())
    assert same(momenta(whole.optimizer), momenta(again.optimizer))
    assert again.callbacks[1].skipped == whole.callbacks[1].skipped == 3


def test_a_rewind_takes_weights_and_momenta_of_the_newest_good_checkpoint_and_goes_on(tmp_path):
    seen = Weights()
    saving = fw.callbacks.build("checkpoint", monitor=None, every="3steps", keep=9)
    trainer, _ = fit(Poison(5), build(policy="rewind"), saving, seen, folder=tmp_path)
    assert same(seen.model[5], seen.model[3])
    assert same(seen.optimizer[5], seen.optimizer[3])
    assert not same(seen.model[4], seen.model[3])
    assert (trainer.state.step, trainer.state.samples) == (12, 48)


def test_there_must_be_something_to_rewind_to(tmp_path):
    with pytest.raises(SettingError, match="needs a folder"):
        fit(build(policy="rewind"))
    with pytest.raises(FrameworkError, match=r"at step 2; .*no good checkpoint"):
        fit(Poison(2), build(policy="rewind"), folder=tmp_path)


def test_divergence_leaves_no_checkpoint_of_it(tmp_path):
    with pytest.raises(FrameworkError, match=r"loss is (inf|nan) at step 2"):
        fit(build(), fw.callbacks.build("checkpoint", monitor=None), lr=1e30, folder=tmp_path)
    assert newest(tmp_path / "checkpoints") == (None, [])


def test_a_device_that_leaves_out_updates_by_itself_is_asked_at_the_next_look():
    """What an accelerator does with a fused optimizer, whose step torch has for the CPU too."""

    class Late(Callback):
        def on_fit_start(self, trainer):
            policy.deferred = True

    seen, policy = Weights(), build()
    with pytest.raises(
        FrameworkError, match="not finite in a step from 4 to 6; the weights are those before it"
    ):
        fit(Poison(5), policy, Late(), seen, fused=True)
    weight = {step: model["0.weight"] for step, model in seen.model.items()}
    assert torch.equal(weight[5], weight[4])
    assert not torch.equal(weight[4], weight[3])
    assert same(seen.optimizer[5], seen.optimizer[4])


def test_a_scaler_looks_after_gradients_that_overflow():
    class Overflow(Callback):
        def on_fit_start(self, trainer):
            weight = trainer.model[2].weight
            weight.register_hook(lambda grad: grad * math.inf if trainer.state.step < 2 else grad)

    seen = Weights()
    trainer, _ = fit(Overflow(), build(), seen, precision="fp16")
    assert trainer.state.step == 12
    assert same([seen.model[1]["0.weight"]], [seen.model[2]["0.weight"]])
    assert not same([seen.model[2]["0.weight"]], [seen.model[3]["0.weight"]])


def test_sparse_and_complex_gradients_are_looked_at():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(4, 2, sparse=True)
            self.turn = nn.Parameter(torch.ones(2, dtype=torch.complex64))

        def forward(self, x):
            return (self.table(x.long().clamp(0, 3)[:, 0]) * self.turn.abs()).sum(1, keepdim=True)

    for name in ("table.weight", "turn"):

        class Spoil(Callback):
            def on_gradients(self, trainer, name=name):
                grad = trainer.model.get_parameter(name).grad
                (grad._values() if grad.is_sparse else grad).view(-1)[0] = math.nan

        model = Odd()
        trainer = Trainer(max_steps=1, callbacks=[Spoil(), build()], device="cpu")
        with pytest.raises(FrameworkError, match=f"of {name}"):
            trainer.fit(
                model,
                SPLIT,
                task=nn.MSELoss(),
                optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            )


@pytest.mark.parametrize("name", [entry.name for entry in Registry.every["optimizer"]])
def test_without_gradients_no_optimizer_changes_anything(name):
    """What skipping rests on."""
    weights = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))]
    optimizer = fw.optimizers.build(name, weights)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    before = [t.clone() for t in (*weights, *momenta(optimizer))]
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()
    assert same(before, [*weights, *momenta(optimizer)])
