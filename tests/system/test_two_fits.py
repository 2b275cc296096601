"""Two fits at the same time in one process are refused in two threads, and may be nested in one."""

import os
import threading

import pytest
import torch
from torch import nn

from framework import Callback, TensorSplit, Trainer
from framework.composition.compose import CommandLine, run_composed as compose
from framework.data.dataset import Loader
from framework.data.workers import SeededSamples
from framework.errors import FrameworkError
from framework.experiment.experiment import Experiment, train
from framework.experiment.trained.load import open_run
from framework.runtime import seeds
from framework.runtime.shapes import dry_run
from framework.training.layer_table import model_undisturbed

INPUTS = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
TARGETS = torch.arange(64) % 3


def model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))


def fit(net, *callbacks, seed=0):
    trainer = Trainer(max_epochs=3, seed=seed, callbacks=callbacks)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    trainer.fit(net, TensorSplit(INPUTS, TARGETS), task=nn.CrossEntropyLoss(), optimizer=optimizer)
    return trainer


def weights(net):
    return [parameter.detach().clone() for parameter in net.parameters()]


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def alone():
    net = model()
    fit(net)
    return weights(net)


class Meanwhile(Callback):
    """Runs a function in another thread during a fit, and waits for it."""

    def __init__(self, function):
        self.function = function
        self.error = None

    def on_epoch_end(self, trainer):
        thread = threading.Thread(target=self._run)
        thread.start()
        thread.join(60)

    def _run(self):
        try:
            self.function()
        except Exception as error:
            self.error = error


def spec():
    specs = []
    compose(
        CommandLine(["data=blobs", "model.dropout=0.1"], []), lambda job: specs.append(job.spec)
    )
    return specs[0]


def build():
    Experiment(spec())


def sample():
    """Read a batch of a split that is not in memory; its samples have their own generators."""
    split = [(INPUTS[row], TARGETS[row]) for row in range(8)]
    next(iter(Loader(split).epoch()))


def measure():
    Trainer(max_steps=1).evaluate(
        TensorSplit(INPUTS, TARGETS), model=NET, task=nn.CrossEntropyLoss()
    )


def probe():
    with model_undisturbed(NET):
        torch.rand(3)


NET = model()
USES = {
    "fit": lambda: fit(NET),
    "evaluate": measure,
    "predict": lambda: Trainer(max_steps=1).predict(INPUTS, model=NET),
    "build": build,
    "read_samples": sample,
    "probe": probe,
    "dry_run": lambda: dry_run(NET, INPUTS[:1]),
    "seed": lambda: seeds.seed_everything(5),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_another_thread_is_refused_during_a_fit_and_does_not_change_it(use):
    expected = alone()
    other = Meanwhile(use)
    net = model()
    fit(net, other)
    assert isinstance(other.error, FrameworkError), other.error
    assert "another thread of this process fits" in str(other.error)
    assert "\n" not in str(other.error)
    assert equal(weights(net), expected)


def test_random_numbers_in_another_thread_would_change_a_fit():
    """Control: the comparison of weights finds uses that are not refused."""
    expected = alone()
    net = model()
    fit(net, Meanwhile(lambda: torch.rand(3)))
    assert not equal(weights(net), expected)


@pytest.mark.parametrize("fails", [False, True])
def test_after_a_fit_another_thread_may_fit(fails):
    class Fails(Callback):
        def on_epoch_end(self, trainer):
            if fails:
                raise ValueError("as a test")

    expected = alone()
    if fails:
        with pytest.raises(ValueError, match="as a test"):
            fit(model(), Fails())
    nets = []

    def later():
        nets.append(model())
        fit(nets[0])

    thread = threading.Thread(target=later)
    thread.start()
    thread.join(60)
    assert equal(weights(nets[0]), expected)


def test_a_fit_is_refused_while_another_thread_predicts():
    """At its end the prediction would restore the generators."""
    errors = []

    class Slow(nn.Module):
        def forward(self, x):
            try:
                thread.start()
                thread.join(60)
            except RuntimeError:  # an earlier batch has started it
                pass
            return x

    def other():
        try:
            fit(model())
        except FrameworkError as error:
            errors.append(str(error))

    thread = threading.Thread(target=other)
    Trainer(max_steps=1).predict(INPUTS, model=Slow())
    assert len(errors) == 1
    assert "evaluates or predicts" in errors[0]


def test_two_threads_may_predict_at_the_same_time():
    net = model()
    both = threading.Barrier(2, timeout=60)
    found = []

    class Together(nn.Module):
        def forward(self, x):
            both.wait()
            return net[0](x)

    def predict():
        found.append(Trainer(max_steps=1).predict(INPUTS, model=Together()))

    threads = [threading.Thread(target=predict) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 2
    assert torch.equal(found[0], found[1])


def test_several_threads_may_open_and_evaluate_runs_at_the_same_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    specs = []
    overrides = [
        "data=blobs",
        "model.width=4",
        "trainer.max_steps=2",
        "run.name=r",
        "callbacks=[checkpoint]",
    ]
    compose(CommandLine(overrides, []), lambda job: specs.append(job.spec))
    train(specs[0], "default", [])
    expected = open_run("runs/default/r").evaluate()
    together = threading.Barrier(4, timeout=60)
    found = []
    errors = []

    def evaluate():
        together.wait()
        try:
            found.append(open_run("runs/default/r").evaluate())
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=evaluate) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert found == [expected] * 4


class Inner(Callback):
    """Fits and measures another model at the end of each epoch."""

    def __init__(self):
        self.found = []

    def on_epoch_end(self, trainer):
        with seeds.undisturbed():
            net = model()
            inner = fit(net)
        inner.evaluate(TensorSplit(INPUTS, TARGETS))
        self.found.append(weights(net))


def test_a_callback_may_fit_another_model_in_the_same_thread():
    expected = alone()
    net = model()
    inner = Inner()
    fit(net, inner)
    assert equal(weights(net), expected)
    assert len(inner.found) == 3
    assert all(equal(found, expected) for found in inner.found)


def test_reading_samples_in_this_thread_is_not_refused_within_a_measurement():
    with seeds.measuring(), seeds.undisturbed():
        samples = SeededSamples([(INPUTS[0], TARGETS[0])], 0)
        assert len(samples.__getitems__([0])[0]) == 1


def test_a_process_forked_during_a_fit_may_fit():
    class Forks(Callback):
        def on_epoch_end(self, trainer):
            child = os.fork()
            if child == 0:
                os._exit(len(seeds.USERS.fits))
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    codes = []
    fit(model(), Forks())
    assert codes == [0, 0, 0]
