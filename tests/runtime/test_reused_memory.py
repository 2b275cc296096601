"""Loaders that overwrite the previous batch, and parameters that are replaced during training.

A batch is not read after the next one was requested, and a replaced object is not used again.
"""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import framework as fw
from framework import Callback, Metric, TensorSplit, Trainer, Transform
from framework.data.dataset import ForeignLoader, Loader
from framework.data.token_splits import GatheredSplit, WindowSplit
from framework.runtime import seeds
from framework.runtime.copy_stream import CopyStream
from framework.tuning.vectorized.trainer import StackedTrainer

torch.manual_seed(5)
X = torch.randn(22, 5)
Y = torch.randint(0, 3, (22,))
SIZE = 4


class Reused:
    """Yields batches in the same two tensors, filled with NaN and -1 before each batch."""

    def __init__(self, inputs=X, targets=Y):
        self.parts = list(zip(inputs.split(SIZE), targets.split(SIZE), strict=True))
        self.inputs = torch.empty_like(self.parts[0][0])
        self.targets = torch.empty_like(self.parts[0][1])

    def __iter__(self):
        for inputs, targets in self.parts:
            self.inputs.fill_(torch.nan)
            self.targets.fill_(-1)
            self.inputs[: len(inputs)] = inputs
            self.targets[: len(inputs)] = targets
            yield self.inputs[: len(inputs)], self.targets[: len(inputs)]
        self.inputs.fill_(torch.nan)
        self.targets.fill_(-1)


class Sized(Reused):
    def __len__(self):
        return len(self.parts)


class Stream(IterableDataset):
    """The same batches for torch's DataLoader, which does not copy them."""

    def __iter__(self):
        return iter(Reused())


def through_data_loader():
    return DataLoader(Stream(), batch_size=None)


LOADERS = {"no length": Reused, "length": Sized, "DataLoader": through_data_loader}


def network(norm=False):
    torch.manual_seed(3)
    second = nn.BatchNorm1d(8) if norm else nn.Identity()
    return nn.Sequential(nn.Linear(5, 8), second, nn.Tanh(), nn.Linear(8, 3))


def fit(data, *callbacks, model=None, val=None, metrics=(), resume=None, max_epochs=2, **settings):
    model = network() if model is None else model
    trainer = Trainer(max_epochs=max_epochs, device="cpu", callbacks=callbacks, **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    parts = {"optimizer": optimizer, "val": val, "metrics": metrics, "resume": resume}
    trainer.fit(model, data, task=nn.CrossEntropyLoss(), **parts)
    return trainer


def by_hand(accumulate=1, epochs=2):
    """Return the model of a plain loop; a step has the samples of `accumulate` batches."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    size = SIZE * accumulate
    for _ in range(epochs):
        for inputs, targets in zip(X.split(size), Y.split(size), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    return model


def assert_same(one, other, tolerance=0.0):
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


SETTINGS = [{}, {"accumulate": 3}, {"micro_batch": 3}, {"accumulate": 2, "micro_batch": "auto"}]


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["two loaders", "one loader"])
def test_training_is_equal_to_a_plain_loop(loader, settings, shared):
    """A validation in the middle of an epoch may read the same loader."""
    data = loader()
    val = data if shared else loader()
    settings = {"validate_every": "2steps", "metrics": [fw.metrics.build("accuracy")]} | settings
    trainer = fit(data, val=val, **settings)
    assert_same(trainer.model, by_hand(settings.get("accumulate", 1)), tolerance=1e-5)
    expected = trainer.evaluate(TensorSplit(X, Y), batch_size=SIZE)
    assert trainer.state.metrics["val/loss"] == pytest.approx(expected["test/loss"], rel=1e-6)
    assert trainer.state.metrics["val/accuracy"] == pytest.approx(expected["test/accuracy"])


class First(nn.Module):
    """Returns its input or a part of it, in the memory of the batch."""

    def __init__(self, size=None):
        super().__init__()
        self.size = size

    def forward(self, inputs):
        return inputs if self.size is None else inputs[:, : self.size]


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_outputs_in_the_memory_of_the_inputs_are_copied(loader):
    trainer = Trainer(max_steps=1, device="cpu")
    assert torch.equal(trainer.predict(loader(), model=First()), X)
    metrics = [fw.metrics.build("accuracy")]
    values = trainer.evaluate(loader(), model=First(3), task=F.cross_entropy, metrics=metrics)
    assert values["test/loss"] == pytest.approx(F.cross_entropy(X[:, :3], Y).item())
    assert values["test/accuracy"] == pytest.approx(share_right())


def share_right():
    """Return the accuracy of the largest of the first three inputs as a prediction."""
    return (X[:, :3].argmax(1) == Y).float().mean().item()


class OneOutput(nn.Module):
    """Writes its outputs into the same memory, like a module replayed by a CUDA graph."""

    def __init__(self):
        super().__init__()
        self.outputs = torch.empty(SIZE, 3)

    def forward(self, inputs):
        self.outputs[: len(inputs)] = inputs[:, :3]
        return self.outputs[: len(inputs)]


def test_outputs_in_the_same_memory_each_time_are_not_buffered():
    trainer = Trainer(max_steps=1, device="cpu")
    parts = {"task": F.cross_entropy, "metrics": [fw.metrics.build("accuracy")]}
    for size in (SIZE, 1):
        values = trainer.evaluate(TensorSplit(X, Y), model=OneOutput(), batch_size=size, **parts)
        assert values["test/accuracy"] == pytest.approx(share_right())
    assert torch.equal(trainer.predict(X, model=OneOutput(), batch_size=SIZE), X[:, :3])


class OneLoss(nn.Module):
    """Returns its loss in the same memory each time."""

    def __init__(self):
        super().__init__()
        self.memory = torch.zeros(())

    def forward(self, outputs, targets):
        return self.memory.copy_(F.cross_entropy(outputs, targets))


@pytest.mark.parametrize("metrics", [[], ["accuracy"]])
def test_losses_in_the_same_memory_each_time_are_not_buffered(metrics):
    trainer = Trainer(max_steps=1, device="cpu")
    metrics = [fw.metrics.build(name) for name in metrics]
    parts = {"task": OneLoss(), "metrics": metrics, "batch_size": SIZE}
    values = trainer.evaluate(TensorSplit(X, Y), model=First(3), **parts)
    assert values["test/loss"] == pytest.approx(F.cross_entropy(X[:, :3], Y).item())


def test_a_hook_may_change_the_gradient_of_the_loss_in_place():
    """This gradient of 1 is cached from step to step."""

    class Halved(fw.Task):
        def step(self, model, batch):
            loss = F.cross_entropy(model(batch[0]), batch[1])
            if loss.requires_grad:
                loss.register_hook(lambda gradient: gradient.mul_(0.5))
            return fw.Step(loss, loss, loss)

    model = network()
    trainer = Trainer(max_epochs=2, device="cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    batches = list(zip(X.split(SIZE), Y.split(SIZE), strict=True))
    trainer.fit(model, batches, task=Halved(), optimizer=optimizer)
    assert_same(model, by_hand(), tolerance=1e-6)


class SumOfOutputs(Metric):
    """Returns sums in the memory of the outputs."""

    name = "output"

    def sums(self, outputs, targets):
        return outputs[-1]

    def compute(self, sums):
        return float(sums.sum())


def test_sums_of_a_metric_in_the_memory_of_a_batch_are_copied():
    trainer = Trainer(max_steps=1, device="cpu")
    inputs = X.double()
    parts = {"task": F.cross_entropy, "metrics": [SumOfOutputs()]}
    values = trainer.evaluate(Reused(inputs), model=First(3), **parts)
    expected = sum(part[-1, :3].sum() for part in inputs.split(SIZE))
    assert values["test/output"] == pytest.approx(float(expected))


@pytest.mark.parametrize("loader", [Reused, Sized], ids=["no length", "length"])
def test_swa_measures_statistics_on_each_batch(loader):
    def averaged(data):
        return fit(data, fw.callbacks.build("swa", start=0), model=network(norm=True)).model

    batches = list(zip(X.split(SIZE), Y.split(SIZE), strict=True))
    assert_same(averaged(loader()), averaged(batches))


CALLBACKS = {
    "clip_gradients": {},
    "ema": {"decay": 0.5},
    "swa": {"start": 0},
    "lookahead": {"k": 2},
    "schedule_free": {},
    "sam": {},
    "noise_scale": {"every": "1steps", "parts": 2},
    "freeze": {"patterns": ["0.*"], "epochs": 1},
    "non_finite": {},
    "linear_probe": {"layer": "0"},
    "confusion": {},
    "worst": {"count": 5},
    "curves": {},
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_every_callback_gives_the_result_of_a_list_of_batches(name):
    """The loader is also read for validation and by the callback."""
    ends = []
    for data in (Reused(), list(zip(X.split(SIZE), Y.split(SIZE), strict=True))):
        callback = fw.callbacks.build(name, **CALLBACKS[name])
        model = network(norm=name != "noise_scale")
        settings = {"accumulate": 2, "validate_every": "2steps", "log_every": "1steps"}
        parts = {"metrics": [fw.metrics.build("f1")], "val": data, "model": model}
        trainer = Trainer(max_epochs=2, device="cpu", callbacks=[callback], **settings)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer.fit(data=data, task=nn.CrossEntropyLoss(), optimizer=optimizer, **parts)
        metrics = dict(trainer.state.metrics)
        del metrics["train/samples_per_second"]
        ends.append((model, metrics))
    (model, metrics), (expected, expected_metrics) = ends
    assert_same(model, expected)
    assert metrics == expected_metrics


class ImageLogger(fw.Logger):
    def __init__(self):
        self.logged = []

    def images(self, tag, images, step):
        self.logged.append(images.clone())


def test_callbacks_that_keep_batches_keep_copies():
    from framework_plugins.callbacks.monitoring.generated_images import held_out
    from framework_plugins.tasks.representation import LinearProbe

    images = X[:, :4].reshape(22, 1, 2, 2)
    shown = []
    for data in (Reused(images), list(zip(images.split(SIZE), Y.split(SIZE), strict=True))):
        logger = ImageLogger()
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        model[1].weight.data.fill_(0.1)
        augmented = fw.callbacks.build("augmented")
        trainer = Trainer(max_epochs=1, device="cpu", callbacks=[augmented], loggers=[logger])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer.fit(model, data, task=nn.CrossEntropyLoss(), optimizer=optimizer, val=data)
        shown.append(logger.logged)
        assert torch.equal(held_out(trainer, 10), images[:10])
        features, classes = LinearProbe("0")._features(trainer, trainer.val_batches, None)
        assert torch.equal(features, images.flatten(1).double())
        assert torch.equal(classes, Y)
    for images, expected in zip(*shown, strict=True):
        assert torch.equal(images, expected)


class InPlace(nn.Module):
    """Changes its inputs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, inputs):
        return self.layer(inputs.sub_(1).relu_())


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_model_that_changes_its_inputs_does_not_change_the_data(shuffle):
    from framework_plugins.callbacks.monitoring.generated_images import held_out

    split = TensorSplit(X.clone(), Y.clone())
    trainer = fit(Loader(split, SIZE, SIZE, shuffle=shuffle), val=split, model=InPlace())
    trainer.predict(split.tensors[0])
    trainer.model(held_out(trainer, 10))
    assert torch.equal(split.tensors[0], X)


def test_inputs_and_targets_of_a_window_do_not_share_memory():
    split = WindowSplit(torch.arange(50), 8)
    for count in (1, 2):
        inputs, targets = split.gather(torch.arange(count))
        expected = targets.clone()
        inputs.fill_(-5)
        assert torch.equal(targets, expected)


class FullOnce(InPlace):
    """Raises an error for more than two samples, after it has changed its inputs."""

    def forward(self, inputs):
        outputs = super().forward(inputs)
        if len(inputs) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return outputs


@pytest.mark.filterwarnings("ignore:memory is full")
def test_a_changed_batch_is_not_run_again_after_memory_was_full():
    with pytest.raises(fw.FrameworkError, match="changes its inputs in place"):
        fit(Reused(), model=FullOnce(), micro_batch="auto")
    trainer = Trainer(max_steps=1, device="cpu", micro_batch="auto")
    with pytest.raises(fw.FrameworkError, match="changes its inputs in place"):
        trainer.evaluate(Reused(), model=FullOnce(), task=nn.CrossEntropyLoss())


class Full(nn.Linear):
    def forward(self, inputs):
        if len(inputs) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().forward(inputs)


@pytest.mark.filterwarnings("ignore:memory is full")
def test_an_evaluation_in_smaller_parts_skips_no_batch_of_a_generator():
    model = Full(5, 3)
    trainer = Trainer(max_steps=1, device="cpu", micro_batch="auto")
    values = trainer.evaluate(iter(Reused()), model=model, task=nn.CrossEntropyLoss())
    expected = F.cross_entropy(F.linear(X, model.weight, model.bias), Y).item()
    assert values["test/loss"] == pytest.approx(expected, rel=1e-6)


def test_keep_copies_only_batches_in_reused_memory():
    separate = ForeignLoader(DataLoader(TensorDataset(X, Y), SIZE))
    batch = next(iter(separate.epoch()))
    assert separate.keep(batch)[0] is batch[0]
    reused = ForeignLoader(Reused())
    batch = next(iter(reused.epoch()))
    assert reused.keep(batch)[0].data_ptr() != batch[0].data_ptr()


class SameMemory(Transform):
    """Writes each batch into the same memory."""

    def __init__(self):
        self.inputs = torch.empty(SIZE, 5)
        self.targets = torch.empty(SIZE, dtype=torch.long)

    def __call__(self, batch):
        count = len(batch[0])
        self.inputs[:count] = batch[0]
        self.targets[:count] = batch[1]
        return self.inputs[:count], self.targets[:count]


def in_order():
    return Loader(TensorSplit(X, Y), SIZE, SIZE)


def test_a_transform_may_reuse_its_memory_if_a_step_has_one_batch():
    metrics = [fw.metrics.build("accuracy")]
    reusing = fit(in_order(), SameMemory(), metrics=metrics, log_every="1epoch")
    expected = fit(in_order(), metrics=metrics, log_every="1epoch")
    assert_same(reusing.model, expected.model)
    accuracy = expected.state.metrics["train/accuracy"]
    assert reusing.state.metrics["train/accuracy"] == pytest.approx(accuracy)
    with pytest.raises(fw.errors.SettingError, match=r"transforms=SameMemory: .* overwrites"):
        fit(in_order(), SameMemory(), accumulate=2)


class Gathered(GatheredSplit):
    """Makes all batches in the same memory."""

    def __init__(self):
        self.memory = SameMemory()

    def __len__(self):
        return len(X)

    def gather(self, indices):
        self.memory.inputs.fill_(torch.nan)
        return self.memory((X[indices], Y[indices]))


@pytest.mark.parametrize("settings", [{}, {"accumulate": 3}], ids=str)
def test_a_split_may_gather_batches_into_the_same_memory(settings):
    metrics = [fw.metrics.build("accuracy")]
    reusing = fit(Loader(Gathered(), SIZE, SIZE), metrics=metrics, log_every="1epoch", **settings)
    expected = fit(in_order(), metrics=metrics, log_every="1epoch", **settings)
    assert_same(reusing.model, expected.model)
    accuracy = expected.state.metrics["train/accuracy"]
    assert reusing.state.metrics["train/accuracy"] == pytest.approx(accuracy)


def test_stacked_trials_may_read_a_split_that_reuses_its_memory():
    split = Gathered()

    def trial(lr):
        model = network()
        trainer = Trainer(max_epochs=2, device="cpu", accumulate=3)
        trainer.metrics = [fw.metrics.build("accuracy")]
        fit = {"model": model, "data": Loader(split, SIZE, SIZE), "task": nn.CrossEntropyLoss()}
        fit |= {"optimizer": torch.optim.SGD(model.parameters(), lr=lr), "val": None}
        fit |= {"schedule": None, "metrics": trainer.metrics, "batch_size": SIZE, "resume": None}
        return trainer, fit

    alone, parts = trial(0.3)
    alone.fit(parts.pop("model"), parts.pop("data"), **parts)
    trainers, fits = zip(trial(0.1), trial(0.3), strict=True)
    StackedTrainer(trainers, fits).run()
    assert_same(trainers[1].model, alone.model, tolerance=1e-5)
    accuracy = alone.state.metrics["train/accuracy"]
    assert trainers[1].state.metrics["train/accuracy"] == pytest.approx(accuracy)


class FakeStream:
    """Replaces a CUDA stream; a copy is complete at once."""

    def __init__(self, *args):
        self.waits = 0

    def record_event(self):
        return self

    def synchronize(self):
        self.waits += 1

    def wait_event(self, event): ...


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("reused", [True, False])
def test_copies_to_a_gpu_are_complete_before_the_next_batch_is_read(loader, reused, monkeypatch):
    """Runs without a GPU. The control `reused=False` reads the memory too late."""
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    foreign = ForeignLoader(loader())
    foreign.copies = CopyStream(torch.device("cpu"), reused=reused)
    batches = list(foreign.epoch())
    found = torch.cat([foreign.keep(batch)[0] for batch in batches])
    assert torch.equal(found, X) == reused
    assert foreign.copies.stream.waits == (6 if reused else 0)


# parameters that are replaced during training


class Surgery(Callback):
    """Replaces the last layer in the model and the optimizer by a new one of the same shapes."""

    def __init__(self, step=3):
        self.step = step

    def on_step_end(self, trainer):
        if trainer.state.step == self.step:
            replace_head(trainer.model, trainer.optimizer)


def replace_head(model, optimizer):
    old = list(model[3].parameters())
    torch.manual_seed(9)
    model[3] = nn.Linear(8, 3)
    removed = set(old)
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p not in removed]
        group["params"] += list(model[3].parameters())
    for parameter in old:
        optimizer.state.pop(parameter, None)


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.5, "momentum": 0.9}),
    "dampened sgd": (
        torch.optim.SGD,
        {"lr": 0.5, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    ),
    "sgd without state": (torch.optim.SGD, {"lr": 0.5}),
    "adamw": (torch.optim.AdamW, {"lr": 0.05}),
}


def loop_with_surgery(make, settings, steps, change):
    """Return the model of a plain loop that calls `change(model, optimizer)` after step 3."""
    model = network()
    optimizer = make(list(model.parameters()), **settings)
    for step in range(1, steps + 1):
        rows = seeds.order(0, (step - 1) // 6, len(X)).split(SIZE)[(step - 1) % 6]
        optimizer.zero_grad()
        F.cross_entropy(model(X[rows]), Y[rows]).backward()
        optimizer.step()
        if step == 3:
            change(model, optimizer)
    return model


def clear_state(model, optimizer):
    optimizer.state.clear()


def new_buffers(model, optimizer):
    """Reset the averages of the gradients, in new tensors."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if torch.is_tensor(value) and value.ndim:
                state[name] = torch.zeros_like(value)


def maximize(model, optimizer):
    optimizer.param_groups[0]["maximize"] = True


def foreach(model, optimizer):
    """Switch to another implementation of the optimizer."""
    optimizer.param_groups[0]["fused"] = False


CHANGES = [replace_head, clear_state, new_buffers, maximize, foreach]


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_an_update_uses_the_present_parameters_and_states(optimizer, change, fused):
    class Change(Callback):
        def on_step_end(self, trainer):
            if trainer.state.step == 3:
                change(trainer.model, trainer.optimizer)

    make, settings = OPTIMIZERS[optimizer]
    model = network()
    trainer = Trainer(max_steps=8, device="cpu", callbacks=[Change()])
    new_optimizer = make(list(model.parameters()), **settings, fused=fused)
    parts = {"task": nn.CrossEntropyLoss(), "optimizer": new_optimizer, "batch_size": SIZE}
    trainer.fit(model, TensorSplit(X, Y), **parts)
    expected = loop_with_surgery(make, settings, 8, change)
    assert_same(trainer.model, expected, tolerance=1e-5 if fused else 0.0)


@pytest.mark.parametrize("fused", [False, True])
def test_an_unfrozen_layer_follows_the_schedule(fused):
    class Unfreeze(Callback):
        def on_step_end(self, trainer):
            if trainer.state.step == 3:
                unfreeze(trainer.model, trainer.optimizer)

    def unfreeze(model, optimizer):
        model[0].requires_grad_(True)
        optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.2})

    def make(model):
        model[0].requires_grad_(False)
        settings = {"lr": 0.5, "momentum": 0.9, "fused": fused}
        return torch.optim.SGD(model[3].parameters(), **settings)

    def schedule(step):
        return 1 / (1 + step)

    expected = network()
    optimizer = make(expected)
    for step, (inputs, targets) in enumerate(zip(X.split(SIZE), Y.split(SIZE), strict=True)):
        if step == 3:
            unfreeze(expected, optimizer)
        for group, rate in zip(optimizer.param_groups, (0.5, 0.2), strict=False):
            group["lr"] = rate * schedule(step)
        expected.zero_grad()
        F.cross_entropy(expected(inputs), targets).backward()
        optimizer.step()
    model = network()
    trainer = Trainer(max_epochs=1, device="cpu", callbacks=[Unfreeze()])
    parts = {"task": nn.CrossEntropyLoss(), "optimizer": make(model), "schedule": schedule}
    trainer.fit(model, in_order(), **parts)
    assert_same(model, expected, tolerance=1e-6)


AVERAGES = {
    "ema": {"decay": 0.5, "warmup": False},
    "swa": {"start": 0},
    "lookahead": {},
    "schedule_free": {},
}


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_follows_replaced_parameters(name):
    """After the fit the model has the average, and the callback has the trained weights."""
    model = network()
    average = fw.callbacks.build(name, **AVERAGES[name])
    saves = Saves(average)
    trainer = Trainer(max_epochs=2, device="cpu", callbacks=[average, Surgery(), saves])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    parts = {"task": nn.CrossEntropyLoss(), "optimizer": optimizer, "batch_size": SIZE}
    trainer.fit(model, TensorSplit(X, Y), **parts)
    assert all(a is b for a, b in zip(average.parameters, model.parameters(), strict=True))
    assert not torch.equal(average.others[2], model[3].weight)
    for model_state, own_state in saves.saved:
        for key, weights in own_state["weights"].items():
            assert model_state[key].shape == weights.shape


class Saves(Callback):
    """Records the content of a checkpoint after each step."""

    def __init__(self, average):
        self.average = average
        self.saved = []

    def on_step_done(self, trainer):
        model_state = trainer.model.state_dict()
        own_state = self.average.state_dict()
        self.average.on_save(model_state, own_state)
        self.saved.append((model_state, own_state))


def test_an_average_follows_a_layer_of_another_shape():
    """A checkpoint right after the replacement contains the average of the new layer."""

    class Wider(Callback):
        def on_step_end(self, trainer):
            if trainer.state.step == 3:
                trainer.model[1] = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    average = fw.callbacks.build("ema", decay=0.5, warmup=False)
    saves = Saves(average)
    fit(Loader(TensorSplit(X, Y), SIZE, shuffle=True), average, Wider(), saves)
    names = [set(own_state["weights"]) for _, own_state in saves.saved]
    assert "1.0.weight" not in names[1]
    assert "1.0.weight" in names[2]


def test_two_runs_can_resume_from_one_state():
    """The first run does not write into the optimizer state from which the second one resumes."""
    saved = copy.deepcopy(fit(TensorSplit(X, Y), max_epochs=1).state_dict())
    first = fit(TensorSplit(X, Y), resume=saved)
    second = fit(TensorSplit(X, Y), resume=saved)
    assert_same(first.model, second.model)


def test_freezing_follows_a_replaced_module():
    class Replace(Callback):
        def on_epoch_end(self, trainer):
            if trainer.state.epoch == 1:
                trainer.model[1] = nn.BatchNorm1d(8)
                trainer.optimizer.add_param_group({"params": list(trainer.model[1].parameters())})

    freeze = fw.callbacks.build("freeze", patterns=["1.*"])
    trainer = fit(TensorSplit(X, Y), freeze, Replace(), model=network(norm=True), max_epochs=3)
    assert trainer.model[1].num_batches_tracked == 0
    assert torch.equal(trainer.model[1].weight, torch.ones(8))


@pytest.mark.parametrize("part", ["model", "optimizer", "task"])
def test_a_callback_cannot_replace_the_model_optimizer_or_task(part):
    class Replace(Callback):
        def on_step_end(self, trainer):
            other = network()
            optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
            task = type(trainer.task)(None)
            setattr(trainer, part, {"model": other, "optimizer": optimizer, "task": task}[part])

    with pytest.raises(fw.FrameworkError, match=f"trainer.{part} was replaced"):
        fit(TensorSplit(X, Y), Replace())
