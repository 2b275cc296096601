"""Every registered part, also of a new plugin, keeps the contract of its kind."""

import copy
import functools
import json
import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

import framework as fw
from framework.contracts.task import Step
from framework.errors import DataError, FrameworkError
from framework.registry.registry import Registry

# Settings of small parts that have no defaults, by "kind/name".
SETTINGS: dict[str, dict] = {
    "task/variational": {"likelihood": "gaussian"},
    "task/contrastive": {"views": []},
    "callback/freeze": {"patterns": ["*"]},
    "callback/accumulation": {"schedule": {"0": 1}},
    "callback/activation_checkpointing": {"patterns": ["*"]},
}
# Parameters without effect on an output, by the beginning of their names.
UNUSED_PARAMETERS = {"model/gan": "generator."}
# Models of tasks that call parts of the model, and tasks with a trained model (tested elsewhere).
MODELS = {"task/adversarial": "gan", "task/variational": "vae"}
NEED_TRAINED_MODEL = {"task/distillation"}
# Inputs tried in order until one fits: shapes without the batch axis; "tokens" are integers.
SHAPES = [(8,), (4, 8), (3, 8, 8), (1, 28, 28), ("tokens", 8)]
OUT_SHAPE = (5,)
# The number of shapes that each kind of modules takes.
SHAPES_OF_KIND = {"activation": 0, "dropout": 0, "norm": 1, "block": 1, "head": 2, "model": 2}
# Modules whose gradient is not that of finite differences: random in evaluation, or rounded.
NOT_DIFFERENTIABLE: set[str] = set()
TARGETS = ("class", "labels", "value")
# Losses for other targets than these.
LOSS_TARGETS = {"loss/kl_div": ("probabilities",)}
REFUSALS = (FrameworkError, RuntimeError, ValueError, IndexError)  # errors for an unsuitable shape


def entries(*kinds):
    params = []
    for kind in kinds or Registry.every:
        params += [pytest.param(entry, id=str(entry)) for entry in Registry.every[kind]]
    return params


def build(entry, *args):
    torch.manual_seed(0)
    return Registry.every[entry.kind.name].build(entry.name, *args, **SETTINGS.get(str(entry), {}))


def example(shape):
    if shape[0] == "tokens":
        return torch.randint(0, 4, (2, *shape[1:]))
    return torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def for_shape(entry, shape):
    sizes = tuple(size for size in shape if size != "tokens")
    args = (0.3,)
    if entry.kind.name != "dropout":
        args = (sizes, OUT_SHAPE)[: SHAPES_OF_KIND[entry.kind.name]]
    return build(entry, *args).double(), example(shape)


@functools.cache
def shape_for(kind, name):
    """Return the first shape that a part takes."""
    refused = []
    for shape in SHAPES:
        try:
            module, x = for_shape(Registry.every[kind].get(name), shape)
            module(x)
            return shape
        except REFUSALS as error:
            refused.append(f"{shape}: {error}")
    raise AssertionError(f"{kind}/{name} takes none of the shapes:\n" + "\n".join(refused))


def with_input(entry):
    """Return a fresh module in float64, and an input that it takes."""
    return for_shape(entry, shape_for(entry.kind.name, entry.name))


def batch(target, rows):
    outputs, values = torch.randn(2, rows, 4, dtype=torch.float64)
    targets = {
        "class": torch.arange(rows) % 4,
        "labels": (values > 0).double(),
        "probabilities": values.softmax(1),
    }
    return outputs, targets.get(target, values)


# every part


@pytest.mark.parametrize("entry", entries())
def test_a_part_has_a_summary_and_documented_settings(entry):
    assert len(entry.summary) > 3, "the docstring needs a first sentence"
    if entry.source.module.startswith("framework_plugins"):
        silent = [name for name, setting in entry.settings.items() if not setting.doc]
        assert not silent, f"no line in Args: of {entry.source} on {silent}"


@pytest.mark.parametrize("entry", entries())
def test_default_values_have_the_type_of_the_setting(entry):
    for name, setting in entry.settings.items():
        if setting.required:
            continue
        converted = setting.convert(setting.default)
        expected = list(setting.default) if isinstance(converted, list) else setting.default
        assert converted == expected, name
        assert setting.type_text
        if isinstance(setting.default, str) and setting.part:
            assert setting.default in Registry.every[setting.part]
    assert "name" not in entry.settings, (
        "`name` is the key under which a config names the part itself"
    )


# modules

MODULES = entries(*SHAPES_OF_KIND)


@pytest.mark.parametrize("entry", MODULES)
def test_values_and_gradients_are_finite(entry):
    module, x = with_input(entry)
    if x.is_floating_point():
        x.requires_grad_()
    out = module.train()(x)
    assert out.isfinite().all()
    assert len(out) == len(x)
    if entry.kind.name in ("head", "model"):
        assert out.shape[-1:] == OUT_SHAPE
    if not out.requires_grad:
        return
    (out * torch.randn_like(out)).sum().backward()
    for name, tensor in [*module.named_parameters(), ("the input", x)]:
        if tensor.requires_grad and not name.startswith(UNUSED_PARAMETERS.get(str(entry), " ")):
            assert tensor.grad is not None, f"no gradient reaches {name}"
            assert tensor.grad.isfinite().all(), name


@pytest.mark.parametrize("entry", MODULES)
def test_the_gradient_is_that_of_finite_differences(entry):
    module, x = with_input(entry)
    if not x.is_floating_point() or str(entry) in NOT_DIFFERENTIABLE:
        pytest.skip("no derivative")
    random = not torch.equal(module.train()(x), module(x))
    module.train(not random)
    assert gradcheck(module, (x.requires_grad_(),), fast_mode=True)


@pytest.mark.parametrize("entry", MODULES)
def test_a_state_dict_restores_the_module_and_evaluation_is_deterministic(entry):
    module, x = with_input(entry)
    module.train()(x)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.25)
    expected = module.eval()(x)
    fresh, _ = with_input(entry)
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh.eval()(x), expected)
    assert torch.equal(module(x), expected)


# training


@pytest.mark.filterwarnings("ignore:Using a target size")  # of classes, for a loss of values
@pytest.mark.parametrize("entry", entries("loss"))
def test_a_loss_is_a_differentiable_scalar(entry):
    taken = []
    for target in LOSS_TARGETS.get(str(entry), TARGETS):
        outputs, targets = batch(target, 6)
        try:
            value = build(entry).double()(outputs.requires_grad_(), targets)
        except REFUSALS:
            continue
        taken.append(target)
        assert value.shape == ()
        assert value.isfinite()
        assert gradcheck(
            lambda x, targets=targets: build(entry).double()(x, targets), (outputs,), fast_mode=True
        )
    assert taken, "it takes neither classes nor labels nor values"


@pytest.mark.parametrize("entry", entries("metric"))
def test_the_sums_of_a_metric_add_over_batches(entry):
    metric = build(entry)
    assert metric.name
    for target in metric.targets:
        outputs, targets = batch(target, 10)
        whole = metric.sums(outputs, targets).double()
        total = torch.zeros_like(whole)
        for outputs_part, targets_part in zip(outputs.split(3), targets.split(3), strict=True):
            total += metric.sums(outputs_part, targets_part).double()
        torch.testing.assert_close(total, whole)
        assert math.isfinite(metric.compute(whole))


@pytest.mark.parametrize("entry", entries("task"))
def test_a_task_makes_a_loss_and_predictions_of_a_batch(entry):
    class Small(fw.Data):
        def __init__(self, target):
            outputs, targets = batch(target, 6)
            self.target = target
            self.in_shape = (4,)
            self.out_shape = (4,)
            if target != "class":
                targets = targets.float()
            self.train = fw.TensorSplit(outputs.float(), targets)

    if str(entry) in NEED_TRAINED_MODEL:
        pytest.skip("it needs a trained model")
    if str(entry) == "task/model_loss":
        pytest.skip("it needs named fields and a model that returns its loss")
    task = build(entry)
    fitting = []
    for data in map(Small, TARGETS):
        try:
            task.check(data)
        except DataError:
            continue
        fitting.append(data)
        model = fw.models.build(MODELS.get(str(entry), "mlp"), (4,), task.targets_of(data)[1])
        task.check_model(model)
        step = task.step(model, data.train[:])
        assert isinstance(step, Step)
        assert step.loss.shape == ()
        step.loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        assert any(p.grad is not None for p in model.parameters())
        assert float(task.count(data.train[:])) > 0
        outputs = model(data.train[:][0]).detach()
        assert {len(column) for column in task.predict(outputs).values()} == {6}
    assert fitting, "it takes neither classes nor labels nor values"


def quadratic(optimizer, weights):
    loss = sum(((w - 1) ** 2).sum() for w in weights)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("entry", entries("optimizer"))
def test_an_optimizer_descends_and_resumes_bit_for_bit(entry):
    weights = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))]
    optimizer = build(entry, weights)
    losses = [quadratic(optimizer, weights) for _ in range(3)]
    assert losses[1] < losses[0]
    state = copy.deepcopy(optimizer.state_dict())
    resumed = [nn.Parameter(w.detach().clone()) for w in weights]
    other = build(entry, resumed)
    other.load_state_dict(state)
    for _ in range(2):
        quadratic(optimizer, weights)
        quadratic(other, resumed)
    assert all(torch.equal(one, two) for one, two in zip(weights, resumed, strict=True))


@pytest.mark.parametrize("entry", entries("scheduler"))
@pytest.mark.parametrize("total_steps", [0, 1, 100])
def test_a_schedule_gives_finite_factors_also_past_its_end(entry, total_steps):
    schedule = build(entry, total_steps)
    factors = [schedule(step) for step in range(total_steps + 20)]
    assert all(math.isfinite(factor) and factor >= 0 for factor in factors)
    assert max(factors) > 0 or total_steps == 0


@pytest.mark.parametrize("entry", entries("callback"))
def test_the_state_of_a_callback_is_json_and_can_be_loaded(entry):
    state = build(entry).state_dict()
    assert json.loads(json.dumps(state)) == state
    other = build(entry)
    other.load_state_dict(state)
    assert other.state_dict().keys() == state.keys()


@pytest.mark.filterwarnings("ignore:the run has no folder")
@pytest.mark.parametrize("entry", entries("logger"))
@pytest.mark.parametrize("where", ["in a folder", "without one"])
def test_a_logger_accepts_all_kinds_of_records(entry, where, tmp_path):
    if hasattr(entry.part, "package"):
        pytest.skip("it needs an optional package: tests/system/test_all_loggers.py")
    logger = build(entry)
    logger.open(tmp_path if where == "in a folder" else None, 0, ["loss", "accuracy"])
    logger.text("config", "# A title")
    logger.scalars({"train/loss": 0.5, "val/accuracy": math.nan}, step=1, epoch=0, wall_seconds=0.1)
    logger.histogram("weights", torch.randn(10), 1)
    logger.images("inputs", torch.rand(2, 1, 4, 4), 1)
    logger.graph(nn.Linear(4, 2), torch.randn(1, 4))
    logger.hparams({"lr": 0.1, "optimizer": "sgd"}, {"val/accuracy": 0.5})
    logger.close()
