"""The strategy fsdp on two and four processes, against one process."""

import os
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import framework as fw
from distributed_runs import run_in_processes
from fits import SPLIT, VAL, Record, smooth_network
from framework.contracts.strategy import Strategy
from framework.errors import FrameworkError
from framework.training.process_times import PROCESS_SCALARS

CALLBACKS = {
    "none": [],
    "clip_norm": [("clip_gradients", {"norm": 0.3})],
    "clip_value": [("clip_gradients", {"norm": None, "value": 0.02})],
    "gradient_norm": [("gradient_norm", {})],
    "non_finite": [("non_finite", {"policy": "skip"})],
    "ema": [("ema", {"decay": 0.9})],
    "lookahead": [("lookahead", {"k": 2})],
    "swa": [("swa", {"start": 1})],
    "freeze": [("freeze", {"patterns": ["0.*"], "epochs": 1})],
    "histograms": [("histograms", {})],
    "confusion": [("confusion", {}), ("per_class", {}), ("worst", {"count": 3}), ("curves", {})],
    "embeddings": [("embeddings", {}), ("histograms", {"activations": True})],
    "health": [("health", {"every": "2steps"})],
}
OPTIMIZERS = ("adadelta", "adagrad", "adam", "adamax", "adamw", "asgd", "lion", "muon", "nadam")
OPTIMIZERS = (*OPTIMIZERS, "radam", "rmsprop", "sgd")
SETTINGS = {
    "accumulate": {"trainer": {"accumulate": 2}},
    "not_fused": {"trainer": {"fused": False}},
    "reshard": {"strategy": {"reshard": True}},
    "no_reshard": {"strategy": {"reshard": False}},
    "no_units": {"strategy": {"units": []}},
}


VIEWS = (nn.Unflatten(1, (1, 7)), nn.Flatten())


class Tied(nn.Module):
    """A network with a tied weight, a frozen parameter, an unused one, and a batch norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Linear(6, 7)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(7, 7), nn.Tanh(), *VIEWS) for _ in range(2)]
        )
        self.norm = nn.BatchNorm1d(7)
        self.unused = nn.Linear(2, 2)
        self.last = nn.Linear(7, 3)
        self.blocks[1][0].weight = self.blocks[0][0].weight
        self.first.bias.requires_grad_(False)

    def features(self, inputs):
        return torch.tanh(self.norm(self.first(inputs)))

    def forward(self, inputs):
        hidden = self.features(inputs)
        for block in self.blocks:
            hidden = block(hidden)
        return self.last(hidden)


class OfFeatures(fw.Task):
    """A task that calls another method of the model than `forward`."""

    def step(self, model, batch):
        outputs = model.last(model.features(batch[0]))
        return fw.Step(nn.functional.cross_entropy(outputs, batch[1]), outputs, batch[1])


class Gradients(fw.Callback):
    """Keeps the gradients of the first step."""

    def __init__(self):
        self.first = None

    def on_gradients(self, trainer):
        if self.first is None:
            named = trainer.model.named_parameters()
            gradients = {name: p.grad for name, p in named if p.grad is not None}
            self.first = trainer.strategy.full(gradients, everywhere=True)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def fit(strategy=None, *, model=None, optimizer=sgd, callbacks=(), resume=None, **settings):
    """Fit a network with 70 samples in batches of 16, the last one of 6; return the trainer."""
    model = model or smooth_network()
    record = Record()
    task = settings.pop("task", nn.CrossEntropyLoss())
    trainer_settings = {"max_epochs": 3, "log_every": "1steps", "device": "cpu", **settings}
    trainer = fw.Trainer(
        strategy=strategy or Strategy(),
        callbacks=callbacks,
        loggers=[record],
        **trainer_settings,
    )
    trainer.fit(
        model,
        SPLIT,
        val=VAL,
        task=task,
        optimizer=optimizer(model.parameters()),
        batch_size=16,
        resume=resume,
    )
    trainer.record = record
    return trainer


def fsdp(**settings):
    return fw.strategies.build("fsdp", **{"units": ["0", "2"], **settings})


def built(callbacks):
    return [fw.callbacks.build(name, **settings) for name, settings in callbacks]


def difference(one, other):
    """Return the largest differences of two trainers: weights, optimizer's state, logged values."""
    first = one.state_dict()
    second = other.state_dict()
    weights = [(first["model"][name], value) for name, value in second["model"].items()]
    state = []
    for index, values in second["optimizer"]["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                state.append((first["optimizer"]["state"][index][name], value))
    logged = []
    for (_, values), (_, expected) in zip(one.record.lines, other.record.lines, strict=False):
        keys = [key for key in expected if "per_second" not in key]
        assert values.keys() - {f"train/{name}" for name in PROCESS_SCALARS} == expected.keys()
        logged += [(torch.tensor(values[key]), torch.tensor(expected[key])) for key in keys]
    return [max([largest(a, b) for a, b in pairs] or [0.0]) for pairs in (weights, state, logged)]


def largest(one, other):
    return float((one.double() - other.double()).abs().max()) if other.numel() else 0.0


def states_equal(one, other):
    """Return whether weights and optimizer's state of two results of `state_dict` are equal."""
    if any(not torch.equal(one["model"][name], other["model"][name]) for name in other["model"]):
        return False
    for index, values in other["optimizer"]["state"].items():
        for name, value in values.items():
            same = one["optimizer"]["state"][index][name]
            if not torch.equal(torch.as_tensor(same), torch.as_tensor(value)):
                return False
    return True


def error_of(function):
    try:
        function()
    except FrameworkError as error:
        return str(error)
    return None


def two_processes(folder):
    """Return the results of all cases, which the tests below check."""
    fw.discover()
    warnings.filterwarnings("error", message="FSDP2-wrapped module")
    found = {"differences": {}, "errors": {}}
    for name, callbacks in CALLBACKS.items():
        one = fit(callbacks=built(callbacks))
        found["differences"][name] = difference(fit(fsdp(), callbacks=built(callbacks)), one)
    for name in OPTIMIZERS:
        one = fit(optimizer=lambda p, name=name: fw.optimizers.build(name, p))
        two = fit(fsdp(), optimizer=lambda p, name=name: fw.optimizers.build(name, p))
        found["differences"][name] = difference(two, one)
    for name, each in SETTINGS.items():
        trainer = each.get("trainer", {})
        two = fit(fsdp(**each.get("strategy", {})), **trainer)
        found["differences"][name] = difference(two, fit(**trainer))
    found["bf16"] = difference(fit(fsdp(param_dtype="bf16", reduce_dtype="fp32")), fit())
    found["gradients"] = gradients()
    found["health"] = health()
    found["tied"] = tied()
    found["resumed"] = resumed(folder)
    found["evaluated"] = evaluated()
    found["errors"] = errors(folder)
    found["checkpoint"] = saved(folder)
    return found


def health():
    """Return what `health` observed with one process and with this one of two."""
    histories = []
    for strategy in (None, fsdp()):
        callback = fw.callbacks.build("health", every="4steps")
        fit(strategy, callbacks=[callback])
        histories.append(callback.history)
    return histories


def gradients():
    """Return the gradients of two tasks in one process and in this one of two."""
    results = {}
    for name, task in {"forward": nn.CrossEntropyLoss(), "features": OfFeatures()}.items():
        for kind in ("single", "fsdp"):
            kept = Gradients()
            strategy = fsdp(units=["blocks.*.0", "first"]) if kind == "fsdp" else None
            if kind == "fsdp" and name == "features":
                strategy = fsdp(units=["blocks.*"])
            fit(strategy, model=Tied(), task=task, callbacks=[kept], max_steps=1)
            results[name, kind] = kept.first
    return results


def tied():
    """Return the names of the tensors that are tied, in the state of a sharded model."""
    trainer = fit(fsdp(units=["blocks.*"]), model=Tied(), max_steps=2)
    state = trainer.state_dict()["model"]
    model = trainer.model
    same = model.blocks[0][0].weight is model.blocks[1][0].weight
    return same, torch.equal(state["blocks.0.0.weight"], state["blocks.1.0.weight"])


def resumed(folder):
    """Resume states of each strategy with each other one; return whether they are equal."""
    kinds = {
        "single": Strategy,
        "ddp": lambda: fw.strategies.build("ddp"),
        "fsdp": fsdp,
    }
    adam = {"optimizer": lambda p: torch.optim.AdamW(p, lr=0.01)}
    equal = {}
    for before, make in kinds.items():
        state = fit(make(), max_steps=7, callbacks=built(CALLBACKS["ema"]), **adam).state_dict()
        for after, make_other in kinds.items():
            trainer = fit(
                make_other(),
                max_steps=7,
                callbacks=built(CALLBACKS["ema"]),
                resume=state,
                **adam,
            )
            equal[before, after] = states_equal(trainer.state_dict(), state)
        if before == "fsdp":
            # The model has the average after a fit, as in a checkpoint.
            rest = fit(make(), callbacks=built(CALLBACKS["ema"]), resume=state, **adam)
            straight = fit(make(), callbacks=built(CALLBACKS["ema"]), **adam)
            equal["rest"] = states_equal(rest.state_dict(), straight.state_dict())
            if os.environ["RANK"] == "0":
                torch.save(state, f"{folder}/state")
    return equal


def evaluated():
    """Return values and outputs for 33 samples, of which one process has no row of the last."""
    results = []
    for strategy in (None, fsdp()):
        trainer = fit(strategy, max_steps=2)
        split = fw.TensorSplit(*SPLIT[torch.arange(33)])
        values = trainer.evaluate(split, batch_size=32, metrics=[fw.metrics.build("accuracy")])
        results.append((values, trainer.predict(SPLIT.tensors[0][:5])))
    return results


def errors(folder):
    """Return the messages of fits that are refused."""

    class Scalar(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = smooth_network()
            self.scale = nn.Parameter(torch.tensor(1.0))

        def forward(self, inputs):
            return self.net(inputs) * self.scale

    two = built([("checkpoint", {}), ("checkpoint", {"keep": 1})])
    trainer = fit(fsdp(), max_steps=1)
    return {
        "mesh": error_of(lambda: fit(fsdp(mesh=[2, 2]))),
        "axes": error_of(lambda: fsdp(mesh=[1, 1, 2])),
        "compile": error_of(lambda: fit(fsdp(), compile="model")),
        "micro_batch": error_of(lambda: fit(fsdp(), micro_batch=4)),
        "units": error_of(lambda: fit(fsdp(units=["other"]))),
        "scalar": error_of(lambda: fit(fsdp(units=[]), model=Scalar())),
        "sam": error_of(lambda: fit(fsdp(), callbacks=built([("sam", {})]))),
        "adafactor": error_of(lambda: fit(fsdp(), optimizer=torch.optim.Adafactor)),
        "outside": error_of(lambda: trainer.model(SPLIT.tensors[0])),
        "checkpoint": error_of(lambda: fit(fsdp(), callbacks=two, folder=f"{folder}/two")),
    }


def saved(folder):
    """Save checkpoints in a fit with an average; return the weights and that state."""
    callbacks = built([*CALLBACKS["ema"], ("checkpoint", {"every": "1epoch"})])
    trainer = fit(fsdp(), callbacks=callbacks, folder=f"{folder}/run")
    return trainer.state_dict()


def four_processes(folder):
    """Fit on a mesh of 2 x 2, and resume the state of two processes on four."""
    fw.discover()
    adam = {"optimizer": lambda p: torch.optim.AdamW(p, lr=0.01)}
    state = torch.load(f"{folder}/state", weights_only=False)
    again = fit(fsdp(), max_steps=7, callbacks=built(CALLBACKS["ema"]), resume=state, **adam)
    hybrid = fit(fsdp(mesh=[2, 2]))
    return SimpleNamespace(
        equal=states_equal(again.state_dict(), state), difference=difference(hybrid, fit())
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def found(folder):
    return run_in_processes(two_processes, 2, folder, str(folder))[0]


@pytest.mark.parametrize("name", [*CALLBACKS, *OPTIMIZERS, *SETTINGS])
def test_two_processes_give_the_numbers_of_one(found, name):
    weights, state, logged = found["differences"][name]
    assert weights < 2e-6
    assert state < 2e-6
    assert logged < 2e-5  # of values such as the norm


def test_computing_in_bf16_differs_by_its_rounding(found):
    weights, _, logged = found["bf16"]
    assert 1e-5 < weights < 1e-2
    assert 0 < logged < 0.1


def test_health_measures_sharded_layers_as_whole_ones(found):
    """The activations are those of the rows of the main process."""
    one, two = found["health"]
    assert one.isfinite().any(0).any(1).all()
    torch.testing.assert_close(two[:, 3:], one[:, 3:], rtol=1e-4, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(two[:, :2], one[:, :2], rtol=0.9, atol=0.9, equal_nan=True)


@pytest.mark.parametrize("task", ["forward", "features"])
def test_the_gradients_are_those_of_one_process(found, task):
    single = found["gradients"][task, "single"]
    sharded = found["gradients"][task, "fsdp"]
    assert sharded.keys() == single.keys()  # no gradient of frozen and unused parameters
    assert "unused.weight" not in single
    for name, gradient in single.items():
        assert torch.allclose(sharded[name], gradient, atol=1e-6, rtol=1e-5), name


def test_tied_weights_stay_tied(found):
    assert found["tied"] == (True, True)


@pytest.mark.parametrize("before", ["single", "ddp", "fsdp"])
@pytest.mark.parametrize("after", ["single", "ddp", "fsdp"])
def test_a_state_of_one_strategy_resumes_with_another(found, before, after):
    assert found["resumed"][before, after]


def test_a_resumed_fit_equals_an_uninterrupted_one(found):
    assert found["resumed"]["rest"]


def test_a_process_without_rows_takes_part_in_an_evaluation(found):
    (single, outputs), (sharded, sharded_outputs) = found["evaluated"]
    assert sharded == pytest.approx(single, rel=1e-6)
    assert torch.allclose(sharded_outputs, outputs, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("mesh", "strategy.mesh=[2, 2]"),
        ("axes", "strategy.mesh=[1, 1, 2]"),
        ("compile", "compile=model"),
        ("micro_batch", "micro_batch=4"),
        ("units", "'other'"),
        ("scalar", "scale"),
        ("sam", "Sam"),
        ("adafactor", "optimizer=Adafactor"),
        ("outside", "outside of a step"),
        ("checkpoint", "expected one such callback"),
    ],
)
def test_what_cannot_be_sharded_is_refused(found, name, part):
    assert found["errors"][name] is not None
    assert part in found["errors"][name]
    assert "\n" not in found["errors"][name]


def test_a_checkpoint_has_the_full_weights(found, folder):
    checkpoint, _ = fw.checkpoints.newest(folder / "run" / "checkpoints")
    model, training = fw.checkpoints.load(checkpoint)
    state = found["checkpoint"]
    assert fw.checkpoints.step_of(checkpoint) == 15
    for name, tensor in state["model"].items():
        assert torch.equal(model[name], tensor), name
    resumed = fit(callbacks=built(CALLBACKS["ema"]), resume=training | {"model": model})
    assert states_equal(resumed.state_dict(), state)


@pytest.mark.slow
def test_four_processes_resume_two_and_replicate_shards(found, folder):
    results = run_in_processes(four_processes, 4, folder, str(folder))
    weights, state, logged = results[0].difference
    assert max(weights, state, logged) < 2e-5
    assert all(each.equal for each in results)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_cuda_devices_give_the_numbers_of_one(tmp_path):
    weights, state, _ = run_in_processes(on_cuda, 2, tmp_path)[0]
    assert max(weights, state) < 1e-4


def on_cuda():
    fw.discover()
    return difference(fit(fsdp(), device="cuda"), fit(device="cuda"))
