"""The Trainer equals a loop written by hand, bit for bit; its limits, events and errors."""

import inspect
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import framework as fw
from fits import OPTIMIZERS, SPLIT, VAL, At, Record, Three, X, Y, fit, network, same
from framework import Callback, TensorSplit, Trainer
from framework.contracts.callback import EVENTS
from framework.contracts.state import Stop
from framework.data.dataset import Loader
from framework.errors import DataError, SettingError
from framework.runtime import seeds


class Events(Callback):
    """Records every event."""

    def __init__(self):
        self.seen = []


for _event in EVENTS:
    setattr(Events, f"on_{_event}", lambda self, trainer, event=_event: self.seen.append(event))


def by_hand(model, optimizer, epochs, batches, *, factor=None, clip=None, seed=0):
    """Train in plain PyTorch and return the loss of each step; `batches(epoch)` yields batches."""
    base = optimizer.param_groups[0]["lr"]
    losses = []
    torch.manual_seed(seeds.derive(seed, "train"))
    model.train()
    for epoch in range(epochs):
        for x, y in batches(epoch):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            if factor:
                optimizer.param_groups[0]["lr"] = base * factor(len(losses))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def in_order(epoch, seed=0, size=16):
    for rows in seeds.order(seed, epoch, len(X)).split(size):
        yield X[rows], Y[rows]


# training equals a loop written by hand


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "extra",
    [{}, {"factor": lambda step: 1 / (1 + step)}, {"clip": 0.5}],
    ids=["", "factor", "clip"],
)
def test_fit_is_the_loop_written_by_hand(optimizer, extra):
    model = network()
    losses = by_hand(model, OPTIMIZERS[optimizer](model), 3, in_order, **extra)
    clip = [fw.callbacks.build("clip_gradients", norm=extra["clip"])] if "clip" in extra else []
    trainer, record = fit(optimizer=optimizer, schedule=extra.get("factor"), callbacks=clip)
    assert same(trainer.model, model)
    assert record.of("train/loss") == losses
    assert len(losses) == trainer.state.step == trainer.state.total_steps == 15
    assert trainer.state.samples == 3 * 70
    assert not trainer.model.training


def test_a_data_loader_is_read_as_in_a_loop_written_by_hand():
    def loader():
        return DataLoader(
            TensorDataset(X, Y), 16, shuffle=True, generator=torch.Generator().manual_seed(5)
        )

    model = network()
    batches = loader()
    losses = by_hand(model, OPTIMIZERS["adamw"](model), 3, lambda epoch: batches)
    trainer, record = fit(loader(), optimizer="adamw")
    assert same(trainer.model, model)
    assert record.of("train/loss") == losses


@pytest.mark.parametrize(
    "change",
    [
        {"val": VAL, "metrics": [fw.metrics.build("accuracy")]},
        {"val": VAL, "validate_every": "2steps"},
        {
            "val": DataLoader(TensorDataset(*VAL.tensors), 7, shuffle=True),
            "validate_every": "1steps",
        },
        {"log_every": "4steps", "metrics": [fw.metrics.build("f1")]},
        {"log_every": "1h"},
        {"data": Loader(SPLIT, 16, shuffle=True)},
        {"data": TensorDataset(X, Y)},
        {"callbacks": [fw.callbacks.build("gradient_norm"), Events()]},
        {"deterministic": True},
    ],
    ids=lambda change: "-".join(change),
)
def test_measuring_and_logging_do_not_change_training(change):
    assert same(fit(**change)[0].model, fit()[0].model)
    assert not torch.are_deterministic_algorithms_enabled()


def test_seeds_change_the_order_and_the_dropout():
    assert not same(fit(seed=1)[0].model, fit(seed=2)[0].model)


# limits, cadences, events


@pytest.mark.parametrize(
    ("limits", "steps", "epochs"),
    [
        ({"max_epochs": None, "max_steps": 7}, 7, 1),
        ({"max_epochs": 2, "max_steps": 7}, 7, 1),
        ({"max_epochs": 1, "max_steps": 7}, 5, 1),
        ({"max_epochs": None, "max_steps": 10}, 10, 2),
        ({"max_epochs": 2, "accumulate": 2}, 6, 2),
    ],
)
def test_a_run_ends_at_the_first_limit(limits, steps, epochs):
    trainer, record = fit(val=VAL, log_every="100steps", **limits)
    state = trainer.state
    assert (state.step, state.epoch, state.total_steps) == (steps, epochs, steps)
    assert record.steps("val/loss")[-1] == record.steps("train/loss")[-1] == steps
    assert state.batch == (0 if steps % state.steps_per_epoch == 0 else 2)


@pytest.mark.parametrize(
    ("validate", "log", "validated", "logged"),
    [
        ("1epoch", "1epoch", [5, 10, 15], [5, 10, 15]),
        ("2epochs", "4steps", [10, 15], [4, 5, 8, 10, 12, 15]),
        ("4 steps", "100steps", [4, 8, 12, 15], [5, 10, 15]),
        ("1h", "1h", [15], [5, 10, 15]),
    ],
)
def test_validation_and_logging_follow_their_cadences(validate, log, validated, logged):
    _, record = fit(val=VAL, validate_every=validate, log_every=log)
    assert record.steps("val/loss") == validated
    assert record.steps("train/loss") == logged


def test_the_events_have_the_order_of_the_docstring():
    events = Events()
    fit(batch_size=35, max_epochs=1, max_steps=2, val=VAL, log_every="1epoch", callbacks=[events])
    expected = "fit_start epoch_start step_start gradients step_end step_done "
    expected += "step_start gradients log validation_start validation_end step_end epoch_end "
    expected += "step_done train_end fit_end close"
    assert events.seen == expected.split()
    documented = inspect.getdoc(sys.modules["framework.contracts.callback"])
    for event in EVENTS:
        assert f"{event} " in documented or f"{event}\n" in documented
    assert list(EVENTS) == sorted(EVENTS, key=lambda event: documented.index(event))


class Misspelt(Callback):
    def on_epoch_ends(self, trainer): ...


class SavesWithoutBase(Callback):
    def finish_saving(self): ...


class Nameless(fw.Metric): ...


LOSS = nn.CrossEntropyLoss()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"callbacks": ["progress"]},
            "callbacks: .* got 'progress'; build one with fw.callbacks.build",
        ),
        (
            {"callbacks": [Misspelt()]},
            "on_epoch_ends would never be called: .*did you mean 'on_epoch_end'",
        ),
        (
            {"callbacks": [SavesWithoutBase()]},
            "SavesWithoutBase.finish_saving would never be called: .* from SavingCallback",
        ),
        (
            {"metrics": ["accuracy"]},
            r"metrics: .* got 'accuracy'; .*fw\.metrics\.build\('accuracy'\)",
        ),
        ({"metrics": [Nameless()]}, "Nameless has no `name`"),
        ({"metrics": [fw.metrics.build("accuracy")] * 2}, "two metrics have the name 'accuracy'"),
        ({"task": "classification"}, r"task: .* got 'classification'; .*fw\.tasks\.build"),
        ({"task": 3}, "task: .* got 3;"),
        (
            {"optimizer": "sgd"},
            r"optimizer: .* got 'sgd'; .*fw\.optimizers\.build\('sgd', model\.parameters\(\)\)",
        ),
        (
            {"optimizer": torch.optim.SGD(network().parameters())},
            "it holds no parameter of this model",
        ),
        ({"schedule": 0.5}, "schedule: expected a function .*, got 0.5$"),
        (
            {
                "schedule": torch.optim.lr_scheduler.StepLR(
                    torch.optim.SGD(network().parameters()), 1
                )
            },
            "a scheduler of torch cannot be used",
        ),
    ],
)
def test_invalid_arguments_of_fit_are_errors(arguments, message):
    model = network()
    parts = {"task": LOSS, "optimizer": torch.optim.SGD(model.parameters())} | arguments
    callbacks = parts.pop("callbacks", ())
    with pytest.raises(SettingError, match=message):
        Trainer(max_steps=1, device="cpu", callbacks=callbacks).fit(model, SPLIT, **parts)


def test_a_folder_may_be_a_text_and_is_for_one_fit(tmp_path):
    def fit_once():
        model = network()
        trainer = Trainer(
            max_steps=1,
            device="cpu",
            folder=str(tmp_path),
            callbacks=[fw.callbacks.build("checkpoint")],
        )
        trainer.fit(model, SPLIT, task=LOSS, optimizer=torch.optim.SGD(model.parameters()))

    fit_once()
    with pytest.raises(
        SettingError,
        match=r"checkpoints already has checkpoints of another fit",
    ):
        fit_once()


def test_sums_that_are_not_a_tensor_are_an_error_with_the_name_of_the_metric():
    class Floats(fw.Metric):
        name = "floats"

        def sums(self, outputs, targets):
            return 1.0

    with pytest.raises(SettingError, match=r"Floats\.sums: expected a tensor, got float"):
        fit(metrics=[Floats()])


def test_a_method_that_is_not_overridden_is_not_called():
    trainer, _ = fit(callbacks=[Callback(), At(99, None)])
    assert {event for event, methods in trainer._listeners.items() if methods} == {"step_end"}


def test_callbacks_that_are_added_after_the_constructor_are_called():
    events = Events()
    model = network()
    trainer = Trainer(max_steps=1, device="cpu")
    trainer.callbacks.append(events)
    trainer.fit(model, SPLIT, task=LOSS, optimizer=OPTIMIZERS["sgd"](model))
    assert events.seen[0] == "fit_start"
    trainer.callbacks.append("progress")
    with pytest.raises(SettingError, match=r"callbacks: .* got 'progress'"):
        trainer.fit(model, SPLIT, task=LOSS, optimizer=OPTIMIZERS["sgd"](model))


def test_a_callback_stops_a_run_with_a_reason():
    def stop(trainer):
        trainer.stop("at", "enough")
        trainer.stop("other", "more than enough")

    events = Events()
    trainer, record = fit(callbacks=[At(7, stop), events], val=VAL, log_every="1epoch")
    assert (trainer.state.step, trainer.state.stop) == (7, Stop("at", "enough"))
    assert record.steps("train/loss") == record.steps("val/loss") == [5, 7]
    assert events.seen[-2:] == ["fit_end", "close"]
    assert "exception" not in events.seen


def test_a_stop_before_the_first_fit_holds_and_one_during_a_fit_ends_with_it():
    trainer = Trainer(max_epochs=1, device="cpu")
    model = network()
    parts = {"task": nn.CrossEntropyLoss(), "optimizer": OPTIMIZERS["sgd"](model)}
    trainer.stop("signal", "SIGTERM", signal.SIGTERM)
    assert trainer.fit(model, SPLIT, **parts).step == 0

    def stop(trainer):
        trainer.state.stop = "enough"

    trainer = Trainer(max_epochs=1, device="cpu", callbacks=[At(2, stop)])
    assert trainer.fit(model, SPLIT, **parts).step == 2
    trainer.callbacks[0].step = 99
    assert trainer.fit(model, SPLIT, **parts).step == 3


def test_an_error_is_an_event_and_closes_the_loggers():
    def fail(trainer):
        raise ZeroDivisionError

    events = Events()
    records = [Record(), Record()]
    model = network()
    trainer = Trainer(max_epochs=1, device="cpu", callbacks=[At(2, fail), events], loggers=records)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(model, SPLIT, task=nn.CrossEntropyLoss(), optimizer=OPTIMIZERS["sgd"](model))
    assert events.seen[-2:] == ["exception", "close"]
    assert "fit_end" not in events.seen
    assert [record.closed for record in records] == [1, 1]
    assert not model.training


def test_a_logger_that_cannot_open_closes_the_others():
    class Broken(Record):
        def open(self, folder, step, metrics):
            raise OSError("disk full")

    good = Record()
    with pytest.raises(OSError, match="disk full"), Trainer(max_steps=1, loggers=[good, Broken()]):
        pass
    assert good.closed == 1


def test_a_value_that_a_callback_logs_belongs_to_its_step():
    _, record = fit(
        log_every="1epoch",
        callbacks=[At(3, lambda trainer: trainer.log({"mine": torch.tensor(2.0)}))],
    )
    assert (3, {"mine": 2.0}) in record.lines


def test_modules_in_evaluation_mode_stay_in_it_after_a_validation():
    class Freeze(Callback):
        def on_epoch_start(self, trainer):
            trainer.model[1].eval()

        def on_step_end(self, trainer):
            assert [module.training for module in trainer.model] == [True, False, True, True, True]

    trainer, _ = fit(callbacks=[Freeze()], val=VAL, validate_every="1steps")
    assert trainer.model[1].num_batches_tracked == 0


# evaluate and predict


def test_evaluate_and_predict_before_and_after_a_fit():
    model = network().eval()
    logits = model(X).detach()
    trainer = Trainer(max_steps=1, device="cpu")
    accuracy = fw.metrics.build("accuracy")
    with pytest.raises(SettingError, match="pass `model=`"):
        trainer.evaluate(SPLIT)
    with pytest.raises(SettingError, match="pass `task=`"):
        trainer.evaluate(SPLIT, model=model)
    values = trainer.evaluate(
        SPLIT, model=model, task=nn.CrossEntropyLoss(), metrics=[accuracy], batch_size=32
    )
    assert values["test/loss"] == pytest.approx(F.cross_entropy(logits, Y).item(), rel=1e-6)
    assert values["test/accuracy"] == pytest.approx((logits.argmax(1) == Y).float().mean().item())
    torch.testing.assert_close(trainer.predict(X, batch_size=32), logits)
    torch.testing.assert_close(trainer.predict(SPLIT), logits)
    with pytest.raises(DataError, match="no batch"):
        trainer.evaluate(TensorSplit(X[:0], Y[:0]))
    with pytest.raises(DataError, match="predict: expected at least one sample"):
        trainer.predict(X[:0])


class WithoutTest(Three):
    test = property(lambda self: None, lambda self, split: None)


def test_a_data_set_is_trained_validated_and_tested_on_its_splits():
    trainer, record = fit(Three())
    assert record.steps("val/loss") == [5, 10, 15]
    assert trainer.evaluate(Three()) == trainer.evaluate(Three().test)
    assert trainer.evaluate(Three(), name="val")["val/loss"] == pytest.approx(
        record.of("val/loss")[-1]
    )
    with pytest.raises(DataError, match="several splits"):
        trainer.predict(Three())
    with pytest.raises(DataError, match="no test split"):
        trainer.evaluate(WithoutTest())


def test_values_measured_while_the_trainer_is_open_are_logged():
    record = Record()
    model = network()
    with Trainer(max_steps=2, device="cpu", loggers=[record]) as trainer:
        trainer.fit(model, SPLIT, task=nn.CrossEntropyLoss(), optimizer=OPTIMIZERS["sgd"](model))
        trainer.evaluate(VAL)
        assert record.closed == 0
    assert record.steps("test/loss") == [2]
    assert (record.closed, len(record.opened)) == (1, 1)


# the constructor


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_epochs": 0}, r"max_epochs: expected int in \[1, inf\).* got 0"),
        ({"max_epochs": None}, "needs max_epochs or max_steps"),
        ({"accumulate": 0}, "accumulate: expected"),
        ({"precision": "fp8"}, "precision: expected one of fp32, bf16, fp16"),
        ({"log_every": "often"}, "log_every.* a cadence"),
        ({"validate_every": "0steps"}, "validate_every.* a cadence"),
        ({"validate_every": "0.5epochs"}, "validate_every.*whole steps or epochs"),
        ({"device": "gpu"}, "expected device"),
    ],
)
def test_invalid_settings_are_errors(wrong, message):
    with pytest.raises(SettingError, match=message):
        Trainer(**({"max_epochs": 1} | wrong))


def test_the_constructor_has_at_most_20_arguments():
    assert len(inspect.signature(Trainer).parameters) <= 20


def test_plain_pytorch_needs_no_hydra_and_no_registry():
    script = """
import sys, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from framework import Trainer
model = nn.Linear(3, 2)
data = DataLoader(TensorDataset(torch.randn(20, 3), torch.randint(0, 2, (20,))), 5)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
trainer = Trainer(max_epochs=2, device="cpu")
state = trainer.fit(model, data, task=nn.functional.cross_entropy, optimizer=optimizer, val=data)
print(state.step, *(name in sys.modules for name in ("hydra", "framework_plugins", "tensorboard")))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["8", "False", "False", "False"], done.stderr
