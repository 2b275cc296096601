import math

import numpy
import pytest
import torch
from sklearn import metrics as sk

import framework as fw
from framework import Metric

CLASSES = 6  # of which one never occurs, neither as a target nor as a prediction


def value(
    metric: Metric, outputs: torch.Tensor, targets: torch.Tensor, sizes=(7, 1, 40, 52)
) -> float:
    """Return the metric over batches of unequal size, as the framework adds them up."""
    pieces = zip(outputs.split(sizes), targets.split(sizes), strict=True)
    sums = [metric.sums(output, target) for output, target in pieces]
    assert len({part.shape for part in sums}) == 1
    return metric.compute(torch.stack([part.double() for part in sums]).sum(0))


@pytest.fixture
def classes() -> tuple[torch.Tensor, torch.Tensor]:
    targets = torch.multinomial(torch.tensor([5.0, 3, 0, 1, 1, 0.2]), 100, replacement=True)
    outputs = torch.randn(100, CLASSES) + 1.5 * torch.nn.functional.one_hot(targets, CLASSES)
    outputs[:, 2] = -20
    return outputs, targets


@pytest.fixture
def labels() -> tuple[torch.Tensor, torch.Tensor]:
    targets = (torch.rand(100, 4) < torch.tensor([0.5, 0.2, 0.05, 0.9])).float()
    return torch.randn(100, 4) + 2 * targets - 1, targets


@pytest.fixture
def values() -> tuple[torch.Tensor, torch.Tensor]:
    targets = torch.randn(100, 3) * torch.tensor([1.0, 10.0, 0.1]) + 1000
    return targets + torch.randn(100, 3) * torch.tensor([0.5, 20.0, 0.01]), targets


@pytest.mark.parametrize("name", ["precision", "recall", "f1"])
@pytest.mark.parametrize("average", ["macro", "micro", "weighted"])
def test_scores_of_classes_and_labels_are_those_of_scikit_learn(name, average, classes, labels):
    metric = fw.metrics.build(name, average=average)
    reference = getattr(sk, f"{name}_score")
    outputs, targets = classes
    expected = reference(targets, outputs.argmax(1), average=average, zero_division=0)
    assert value(metric, outputs, targets) == pytest.approx(expected)
    outputs, targets = labels
    expected = reference(targets, outputs.sigmoid() > 0.5, average=average, zero_division=0)
    assert value(metric, outputs, targets) == pytest.approx(expected)
    assert metric.name == (name if average == "macro" else f"{name}_{average}")


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("accuracy", sk.accuracy_score),
        ("balanced_accuracy", sk.balanced_accuracy_score),
        ("matthews", sk.matthews_corrcoef),
    ],
)
def test_class_metrics_are_those_of_scikit_learn(name, reference, classes):
    outputs, targets = classes
    assert value(fw.metrics.build(name), outputs, targets) == pytest.approx(
        reference(targets, outputs.argmax(1))
    )


def test_top_k_is_that_of_scikit_learn_and_1_when_there_are_no_more_classes(classes):
    outputs, targets = classes
    for k in (1, 2, 5):
        metric = fw.metrics.build("top_k", k=k)
        assert metric.name == f"top{k}"
        expected = sk.top_k_accuracy_score(targets, outputs, k=k, labels=range(CLASSES))
        assert value(metric, outputs, targets) == pytest.approx(expected)
    assert value(fw.metrics.build("top_k", k=50), outputs, targets) == 1


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("accuracy", sk.accuracy_score),
        ("top_k", sk.accuracy_score),
        ("balanced_accuracy", lambda t, p: sk.recall_score(t, p, average="macro", labels=range(5))),
        ("matthews", sk.matthews_corrcoef),
        ("precision", lambda t, p: sk.precision_score(t, p, average="macro", labels=range(5))),
        ("recall", lambda t, p: sk.recall_score(t, p, average="macro", labels=range(5))),
        ("f1", lambda t, p: sk.f1_score(t, p, average="micro", labels=range(5))),
    ],
)
def test_outputs_of_nan_are_no_predictions(name, reference):
    targets = torch.arange(100) % 5
    outputs = torch.randn(100, 5) + 2 * torch.nn.functional.one_hot(targets, 5)
    predicted = outputs.argmax(1)
    for row, column in ((0, 0), (5, 1), (51, 4)):
        outputs[row, column] = math.nan
        predicted[row] = 5  # no class
    outputs[60] = math.nan
    predicted[60] = 5
    settings = {"top_k": {"k": 1}, "f1": {"average": "micro"}}.get(name, {})
    metric = fw.metrics.build(name, **settings)
    assert value(metric, outputs, targets) == pytest.approx(reference(targets, predicted))


def test_labels_of_nan_are_wrong():
    targets = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    outputs = torch.tensor([[math.nan, 1.0], [-1.0, math.nan]])
    assert value(fw.metrics.build("accuracy"), outputs, targets, (1, 1)) == 0.5
    assert value(fw.metrics.build("exact_match"), outputs, targets, (1, 1)) == 0
    assert value(fw.metrics.build("recall"), outputs, targets, (1, 1)) == 0.5


def test_perplexity_is_the_exponential_of_the_log_loss(classes):
    outputs, targets = classes
    expected = math.exp(sk.log_loss(targets, outputs.double().softmax(1), labels=range(CLASSES)))
    metric = fw.metrics.build("perplexity")
    assert value(metric, outputs, targets) == pytest.approx(expected)
    assert metric.compute(torch.tensor([1e6, 1.0])) == math.inf


def test_label_metrics_count_single_labels_or_whole_samples(labels):
    outputs, targets = labels
    predicted = outputs.sigmoid() > 0.5
    accuracy = (predicted.numpy() == targets.numpy()).mean()
    assert value(fw.metrics.build("accuracy"), outputs, targets) == pytest.approx(accuracy)
    exact = sk.accuracy_score(targets, predicted)
    assert value(fw.metrics.build("exact_match"), outputs, targets) == pytest.approx(exact)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("mae", sk.mean_absolute_error),
        ("mse", sk.mean_squared_error),
        ("rmse", lambda t, o: math.sqrt(sk.mean_squared_error(t, o))),
        ("r2", sk.r2_score),
    ],
)
def test_metrics_of_values_are_those_of_scikit_learn(name, reference, values):
    outputs, targets = values
    expected = reference(targets.double(), outputs.double())
    assert value(fw.metrics.build(name), outputs, targets) == pytest.approx(expected)
    # (batch,) and (batch, 1) are not broadcast to a table.
    one = value(fw.metrics.build(name), outputs[:, 1], targets[:, 1:2])
    assert one == pytest.approx(reference(targets[:, 1].double(), outputs[:, 1].double()))


def test_r2_of_targets_without_variation_is_that_of_scikit_learn():
    r2 = fw.metrics.build("r2")
    targets = torch.full((100, 1), 1e3)
    assert value(r2, targets, targets) == sk.r2_score(targets, targets) == 1
    assert value(r2, targets + 1, targets) == sk.r2_score(targets, targets + 1) == 0
    assert math.isnan(value(r2, torch.ones(1, 1), torch.ones(1, 1), sizes=(1,)))


@pytest.mark.parametrize("entry", fw.metrics, ids=lambda entry: entry.name)
def test_negative_class_targets_are_ignored(entry, classes):
    metric = entry.build({}, {})
    if "class" not in metric.targets:
        return
    outputs, targets = classes
    ignored = torch.rand(100) < 0.3
    masked = torch.where(ignored, -100, targets)
    kept = value(metric, outputs[~ignored], targets[~ignored], sizes=(int((~ignored).sum()),))
    assert value(metric, outputs, masked) == pytest.approx(kept)
    assert math.isnan(metric.compute(metric.sums(outputs, torch.full_like(targets, -100)).double()))


@pytest.mark.parametrize("entry", fw.metrics, ids=lambda entry: entry.name)
def test_maps_of_classes_are_counted_by_pixel(entry):
    metric = entry.build({}, {})
    if "class" not in metric.targets:
        return
    outputs = torch.randn(2, 4, 3, 5)
    targets = torch.randint(4, (2, 3, 5))
    flat = metric.sums(outputs.movedim(1, -1).reshape(-1, 4), targets.flatten())
    torch.testing.assert_close(metric.sums(outputs, targets), flat)


@pytest.mark.parametrize("entry", fw.metrics, ids=lambda entry: entry.name)
def test_every_metric_has_a_name_and_the_right_direction(entry, classes, labels, values):
    metric = entry.build({}, {"k": 1} if "k" in entry.settings else {})
    assert metric.name
    kinds = {"class": classes, "labels": labels, "value": values, "none": classes}
    for kind in metric.targets:
        outputs, targets = kinds[kind]
        if kind == "none":  # tokens: -log p, and characters
            surprise = torch.nn.functional.cross_entropy(outputs, targets, reduction="none")
            outputs = torch.stack([surprise, torch.ones_like(surprise)], 1)
            good = outputs * torch.tensor([0.5, 1.0])
        elif kind == "value":
            good = targets.float()
        else:
            good = 20 * (2 * outputs.new_tensor(one_hot(targets)) - 1)
        better = value(metric, good, targets)
        worse = value(metric, outputs, targets)
        assert better > worse if metric.better == "higher" else better < worse


def one_hot(targets: torch.Tensor) -> numpy.ndarray:
    return targets.numpy() if targets.is_floating_point() else numpy.eye(CLASSES)[targets]


def test_half_precision_outputs_add_up_in_full(values):
    metric = fw.metrics.build("mse")
    outputs = torch.zeros(4000, 1, dtype=torch.bfloat16)
    targets = torch.ones(4000, 1)
    assert metric.sums(outputs, targets).tolist() == [4000.0, 4000.0]


@pytest.mark.parametrize("entry", fw.metrics, ids=lambda entry: entry.name)
def test_sums_do_not_read_values_from_the_device(entry):
    metric = entry.build({}, {})
    meta = torch.zeros(4, 3, device="meta")  # has no values: reading one is an error
    for kind in metric.targets:
        metric.sums(meta, meta[:, 0].long() if kind == "class" else meta)
