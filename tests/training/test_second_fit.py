"""A second fit with the same trainer, callbacks and schedule equals a first fit, bit for bit."""

import copy

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import framework as fw
from framework import Callback, Logger, Schedule, TensorSplit, Trainer
from framework.contracts.strategy import Strategy
from framework.registry.registry import Registry
from framework.runtime.shared_time import SHARED_TIME
from framework.training.agreement import same_time
from runs import logged

torch.manual_seed(5)
IMAGES = torch.rand(12, 1, 4, 4)
CLASSES = torch.arange(12) % 3
SPLIT = TensorSplit(IMAGES, CLASSES)
VALUES = TensorSplit(IMAGES.flatten(1)[:, :3], IMAGES.flatten(1)[:, 3:4])
TIMES = ("train/samples_per_second", "train/seconds_per_epoch")
TIMES += ("speed/data_wait", "speed/memory_gib", "speed/mfu")
LOSS = nn.CrossEntropyLoss()

SETTINGS = {
    "early_stop": {"patience": 1, "min_delta": 0.02},
    "timer": {"limit": "1h"},
    "freeze": {"patterns": ["3.*"], "epochs": 1},
    "accumulation": {"schedule": {"1": 2}},
    "activation_checkpointing": {"patterns": ["3"]},
    "non_finite": {"policy": "skip"},
    "linear_probe": {"layer": "1"},
    "noise_scale": {"every": "1steps", "parts": 2},
    "health": {"every": "2steps", "scalars": True},
    "histograms": {"every": "1steps"},
    "augmented": {"every": "2steps"},
    "ema": {"decay": 0.5},
    "swa": {"start": 1},
    "lookahead": {"k": 2},
    "progress": {"style": "lines"},
    "confusion": {"every": "2epochs"},
    "curves": {"every": "2epochs"},
    "worst": {"count": 3, "every": "2epochs"},
}
OTHER_TASKS = {
    "boundary",
    "pictures",
    "sample_distance",
    "predictions",
    "text_samples",
    "spectrograms",
    "prune",
    "attention",
    "filters",
    "sounds",
}
"""Callbacks that need another task, model or search; a test below covers those that keep state."""


class Record(Logger):
    """Records everything that it receives, except times."""

    def __init__(self):
        self.lines = []

    def scalars(self, values, *, step, epoch, wall_seconds):
        kept = {name: value for name, value in values.items() if name not in TIMES}
        self.lines.append((step, epoch, kept))

    def histogram(self, tag, values, step):
        self.lines.append((step, tag, values.tolist()))

    def images(self, tag, images, step):
        self.lines.append((step, tag, images.tolist()))

    def text(self, tag, markdown, step=0):
        self.lines.append((step, tag, markdown))


class Explode(Callback):
    """Makes the gradients of one step not finite."""

    def on_gradients(self, trainer):
        if trainer.state.step == 2:
            trainer.model[1].weight.grad.fill_(float("nan"))


def network(seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


def fit(trainer, record, *, model=None, optimizer=None, lr=0.5, schedule=None, **settings):
    """Fit a new model; return the logged lines and the weights."""
    model = model or network()
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr)
    record.lines = []
    settings = {"val": SPLIT, "task": LOSS, "batch_size": 4} | settings
    data = settings.pop("data", SPLIT)
    trainer.fit(model, data, optimizer=optimizer, schedule=schedule, **settings)
    return record.lines, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one, two):
    assert repr(one[0]) == repr(two[0])  # NaN is not equal to itself
    for name, tensor in one[1].items():
        assert torch.equal(tensor, two[1][name]), name


def names_of(kind):
    return [
        entry.name
        for entry in Registry.every[kind]
        if entry.source.module.startswith("framework_plugins")
    ]


@pytest.mark.parametrize("name", sorted(set(names_of("callback")) - OTHER_TASKS))
def test_a_second_fit_equals_the_first_for_each_callback(name, tmp_path, capsys):
    record = Record()
    callback = fw.callbacks.build(name, **SETTINGS.get(name, {}))
    callbacks = [Explode(), callback] if name == "non_finite" else [callback]
    trainer = Trainer(
        max_epochs=3, log_every="2steps", callbacks=callbacks, loggers=[record], device="cpu"
    )
    found = []
    for folder in ("first", "second"):
        trainer.folder = tmp_path / folder
        results = fit(trainer, record)
        printed = lines_without_speed(capsys)
        found.append((*results, trainer.state.step, trainer.state.stop, printed))
    assert found[0][2:] == found[1][2:]
    assert_same(*found)


def lines_without_speed(capsys):
    """Return the lines on stderr up to the speed."""
    lines = capsys.readouterr().err.splitlines()
    return [line.partition(" samples/s")[0].rpartition("  ")[0] for line in lines]


@pytest.mark.parametrize("name", names_of("scheduler"))
def test_a_second_fit_equals_the_first_for_each_schedule(name):
    record = Record()
    settings = {"patience": 0, "threshold": 0.5} if name == "reduce_on_plateau" else {}
    schedule = fw.schedulers.build(name, 9, **settings)
    trainer = Trainer(max_epochs=3, log_every="1steps", loggers=[record], device="cpu")
    assert_same(fit(trainer, record, schedule=schedule), fit(trainer, record, schedule=schedule))


def test_pictures_are_shown_in_each_fit():
    record = Record()
    pictures = fw.callbacks.build("pictures", count=2, every="1steps")
    trainer = Trainer(max_steps=1, callbacks=[pictures], loggers=[record], device="cpu")
    data = TensorSplit(IMAGES, IMAGES)
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        model = fw.models.build("autoencoder", (1, 4, 4), (1, 4, 4), widths=[4], code=2)
        task = fw.tasks.build("reconstruction")
        found.append(fit(trainer, record, model=model, data=data, val=data, task=task))
    assert any(line[1] == "reconstructions" for line in found[0][0])
    assert_same(*found)


@pytest.mark.parametrize(
    "folders", [["one", "one"], ["one", "other"]], ids=["the same folder", "another folder"]
)
def test_loggers_write_the_same_values_in_each_fit(folders, tmp_path):
    both = [fw.loggers.build(name) for name in ("json_lines", "tensorboard")]
    trainer = Trainer(max_steps=2, log_every="1steps", loggers=both, device="cpu")
    found = []
    for folder in folders:
        trainer.folder = tmp_path / folder
        with trainer:
            fit(trainer, Record())
            fit(trainer, Record())
            both[1].hparams({}, {"test/loss": 0.5})
        board = EventAccumulator(str(trainer.folder)).Reload()
        curves = {}
        for tag in board.Tags()["scalars"]:
            curves[tag] = [(event.step, event.value) for event in board.Scalars(tag)]
        found.append((logged(trainer.folder), curves.get("train/loss"), curves.get("test/loss")))
    assert found[0][:2] == found[1][:2]
    assert found[0][2] == found[1][2] or folders[0] == folders[1]


def test_progress_prints_in_each_fit(capsys):
    trainer = Trainer(
        max_epochs=1, callbacks=[fw.callbacks.build("progress", style="lines")], device="cpu"
    )
    for _ in range(2):
        fit(trainer, Record())
        assert len(lines_without_speed(capsys)) == 1


def test_micro_batch_size_and_fp16_scale_are_reset():
    trainer = Trainer(max_steps=1, precision="fp16", micro_batch="auto", device="cpu")
    scales = []
    for _ in range(2):
        fit(trainer, Record())
        scales.append(trainer.precision.scaler.get_scale())
        assert trainer.micro_batches.size is None
        trainer.precision.scaler.update(8.0)
        trainer.micro_batches.size = 2
    assert scales[0] == scales[1]


def test_prune_resets_its_count():
    prune = fw.callbacks.build("prune")
    prune.reset()
    prune.load_state_dict({"looks": 7})
    prune.reset()
    assert prune.measurements == 0


class Count(Callback):
    """A third-party callback that logs its state."""

    def __init__(self):
        self.steps = 0

    def on_step_end(self, trainer):
        self.steps += 1
        trainer.log({"count": self.steps})

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


class Late(Count):
    """A third-party callback that creates its state in `on_fit_start`."""

    def __init__(self): ...

    def on_fit_start(self, trainer):
        self.steps = 0


class Halve(Schedule):
    """A third-party schedule with state."""

    def __init__(self):
        self.factor = 1.0

    def __call__(self, step):
        return self.factor

    def observe(self, metrics):
        self.factor /= 2

    def state_dict(self):
        return {"factor": self.factor}

    def load_state_dict(self, state):
        self.factor = state["factor"]


@pytest.mark.parametrize("trainers", [1, 2])
@pytest.mark.parametrize("callback", [Count, Late])
def test_third_party_callbacks_and_schedules_are_reset(trainers, callback):
    counting = callback()
    schedule = Halve()
    record = Record()
    settings = {"max_epochs": 2, "callbacks": [counting], "loggers": [record], "device": "cpu"}
    trainer = Trainer(**settings)
    first = fit(trainer, record, schedule=schedule)
    if trainers == 2:
        trainer = Trainer(**settings)
    assert_same(first, fit(trainer, record, schedule=schedule))


def test_a_fit_after_a_resumed_fit_equals_the_first():
    record = Record()
    early_stop = fw.callbacks.build("early_stop", patience=1)
    callbacks = [early_stop, Count(), fw.callbacks.build("timer")]
    trainer = Trainer(max_epochs=3, callbacks=callbacks, loggers=[record], device="cpu")
    first = fit(trainer, record)
    state = trainer.state_dict()
    fit(trainer, record, resume=state)
    assert_same(first, fit(trainer, record))
    assert trainer.callbacks[2].spent_before == 0


# the learning rate


def halving(step):
    return 0.5**step


def rates(record):
    name = "train/learning_rate"
    return [values[name] for _, _, values in record.lines if name in values]


@pytest.mark.parametrize(
    ("changed", "schedule", "expected"),
    [
        (None, halving, [0.5, 0.25, 0.125]),
        (0.1, halving, [0.1, 0.05, 0.025]),
        (None, None, [0.5, 0.5, 0.5]),
        (0.1, None, [0.1, 0.1, 0.1]),
    ],
)
def test_a_second_fit_with_the_same_optimizer_starts_from_the_rate_without_schedule(
    changed, schedule, expected
):
    record = Record()
    model = network()
    trainer = Trainer(max_steps=3, log_every="1steps", loggers=[record], device="cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    fit(trainer, record, model=model, optimizer=optimizer, schedule=halving)
    assert optimizer.param_groups[0]["lr"] == 0.125
    if changed is not None:
        optimizer.param_groups[0]["lr"] = changed
    fit(trainer, record, model=model, optimizer=optimizer, schedule=schedule)
    assert rates(record) == expected


def test_initial_lr_of_a_torch_scheduler_is_not_used():
    record = Record()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.2)
    assert optimizer.param_groups[0]["initial_lr"] == 0.5
    trainer = Trainer(max_steps=2, log_every="1steps", loggers=[record], device="cpu")
    fit(trainer, record, model=model, optimizer=optimizer, schedule=halving)
    assert rates(record) == [0.1, 0.05]


# gradients


def step_by_hand(model, lr):
    """Return the weights after one step over all samples in plain PyTorch."""
    model = copy.deepcopy(model).train()
    model.zero_grad()
    LOSS(model(IMAGES), CLASSES).backward()
    with torch.no_grad():
        return {name: p - lr * p.grad for name, p in model.named_parameters()}


def leave_by_a_backward(model):
    LOSS(1000 * model(IMAGES), CLASSES).backward()


def leave_by_a_fit_of_the_last_layer(model):
    optimizer = torch.optim.SGD(model[3].parameters(), lr=0.5)
    Trainer(max_epochs=2, device="cpu").fit(
        model, SPLIT, task=LOSS, optimizer=optimizer, batch_size=4
    )
    assert all(parameter.grad is None for parameter in model.parameters())


def leave_by_an_interrupt(model):
    calls = []

    def loss(outputs, targets):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return LOSS(outputs, targets)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer = Trainer(max_epochs=1, accumulate=3, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(model, SPLIT, task=loss, optimizer=optimizer, batch_size=4)


@pytest.mark.parametrize(
    "leave",
    [leave_by_a_backward, leave_by_a_fit_of_the_last_layer, leave_by_an_interrupt],
    ids=lambda f: f.__name__,
)
def test_existing_gradients_are_not_added_to_the_first_step(leave):
    model = network()
    leave(model)
    expected = step_by_hand(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    Trainer(max_steps=1, device="cpu").fit(
        model, SPLIT, task=LOSS, optimizer=optimizer, batch_size=12
    )
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name])


def test_a_time_cadence_starts_with_the_fit(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    record = Record()
    trainer = Trainer(max_steps=2, validate_every="1min", loggers=[record], device="cpu")
    clock[0] = 1000.0
    lines, _ = fit(trainer, record)
    assert [step for step, _, values in lines if "val/loss" in values] == [2]


def test_a_fit_in_a_callback_leaves_the_agreed_time_of_the_outer_fit():
    class Two(Strategy):
        world_size = 2

        def from_main(self, value):
            return value

    with same_time(Two()):
        SHARED_TIME.agreed = 7.0
        with same_time(Strategy()):
            pass
        assert SHARED_TIME.now() == 7.0
    assert SHARED_TIME.agreed is None
