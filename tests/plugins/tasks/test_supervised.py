"""Supervised tasks: targets, counts, predictions, and checks before training."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import framework as fw
from framework import Data, TensorSplit
from framework.errors import DataError


def make_data(
    target: str, targets: Tensor, out_shape: tuple[int, ...], *, in_memory: bool = True
) -> Data:
    class Flowers(Data):
        pass

    data = Flowers()
    split = TensorSplit if in_memory else TensorDataset
    data.train = split(torch.randn(len(targets), 3), targets)
    data.in_shape = (3,)
    data.target = target
    data.out_shape = out_shape
    return data


CLASS = torch.randint(4, (16,), generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(2, (16, 4), generator=torch.Generator().manual_seed(0)).float()
VALUES = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("task", "settings", "targets"),
    [
        ("classification", {}, CLASS),
        ("classification", {"loss": {"name": "cross_entropy", "weight": [0.1, 1, 2, 5]}}, CLASS),
        ("classification", {"loss": {"name": "cross_entropy", "ignore_index": 2}}, CLASS),
        (
            "classification",
            {"loss": {"name": "label_smoothing", "weight": [0.1, 1, 2, 5], "ignore_index": 1}},
            CLASS,
        ),
        (
            "classification",
            {"loss": {"name": "cross_entropy", "ignore_index": -1}},
            torch.where(CLASS == 3, -1, CLASS),
        ),
        ("classification", {"loss": {"name": "nll", "weight": [0.1, 1, 2, 5]}}, CLASS),
        (
            "classification",
            {"loss": lambda: nn.CrossEntropyLoss(torch.tensor([0.1, 1, 2, 5]))},
            CLASS,
        ),
        ("classification", {"loss": "focal"}, CLASS),
        ("classification", {"loss": "dice"}, CLASS),
        ("classification", {}, VALUES.softmax(1)),
        ("multilabel", {}, LABELS),
        ("multilabel", {"loss": "focal"}, LABELS),
        ("regression", {}, VALUES),
        ("regression", {"loss": "huber"}, VALUES),
    ],
)
def test_micro_batches_weighted_by_count_have_the_gradient_of_the_batch(task, settings, targets):
    task = fw.tasks.build(task, **settings)
    task.criterion.double()
    model = nn.Linear(3, 4).double()
    inputs = torch.randn(16, 3).double()
    if targets.is_floating_point():
        targets = targets.double()
    task.step(model, (inputs, targets)).loss.backward()
    whole = model.weight.grad.clone()
    model.zero_grad()
    batches = list(zip(inputs.split([3, 1, 7, 5]), targets.split([3, 1, 7, 5]), strict=True))
    counts = [task.count(batch) for batch in batches]
    for batch, count in zip(batches, counts, strict=True):
        (task.step(model, batch).loss * (count / sum(counts))).backward()
    torch.testing.assert_close(model.weight.grad, whole, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["classification", "multilabel", "regression"])
def test_the_count_of_plain_targets_runs_no_kernel(name):
    batch = (torch.zeros(5, 3), torch.zeros(5, dtype=torch.long))
    count = fw.tasks.build(name).count(batch)
    assert isinstance(count, int)
    assert count == 5


@pytest.mark.parametrize(
    "setting",
    [{}, {"weight": [1, 2, 3]}, {"ignore_index": 1}, {"weight": [1, 2, 3], "ignore_index": 1}],
)
def test_a_step_reads_no_values_from_the_device(setting):
    outputs = torch.zeros(4, 3, device="meta")  # reading a value is an error
    for name in ("multilabel", "regression"):
        fw.tasks.build(name).step(nn.Identity(), (outputs, outputs))
    task = fw.tasks.build("classification", loss={"name": "cross_entropy", **setting})
    task.criterion.to("meta")
    batch = (outputs, outputs[:, 0].long())
    task.step(nn.Identity(), batch)
    task.count(batch)


class TestTargets:
    @pytest.mark.parametrize("shape", [(4,), (4, 1)])
    def test_one_value_per_sample_is_not_broadcast(self, shape):
        targets = torch.arange(4.0).reshape(shape)
        step = fw.tasks.build("regression").step(nn.Identity(), (torch.zeros(4, 1), targets))
        assert step.loss == targets.square().mean()
        assert step.targets.shape == (4, 1)

    @pytest.mark.parametrize(
        ("task", "targets"),
        [
            ("regression", torch.zeros(4)),
            ("multilabel", torch.zeros(4, 2)),
            ("classification", torch.zeros(3, dtype=torch.long)),
            ("classification", torch.zeros(4, 2)),
        ],
    )
    def test_targets_of_another_shape_are_errors(self, task, targets):
        with pytest.raises(DataError, match=r"targets have shape .* the model's outputs"):
            fw.tasks.build(task).step(nn.Identity(), (torch.zeros(4, 3), targets))

    def test_outputs_without_classes_are_errors(self):
        batch = (torch.zeros(4), torch.zeros(4, dtype=torch.long))
        with pytest.raises(DataError, match=r"expected shape \(batch, classes\), got \(4,\)"):
            fw.tasks.build("classification").step(nn.Identity(), batch)

    def test_integers_of_any_width_are_classes_and_numbers(self):
        model = nn.Identity()
        narrow = torch.tensor([[0], [2]], dtype=torch.uint8)
        step = fw.tasks.build("classification").step(model, (torch.zeros(2, 3), narrow))
        assert step.targets.tolist() == [0, 2]
        step = fw.tasks.build("regression").step(model, (torch.zeros(2, 1), narrow))
        assert step.loss == 2
        step = fw.tasks.build("multilabel").step(model, (torch.zeros(2, 1), narrow > 0))
        assert step.loss > 0

    def test_metrics_get_the_most_likely_of_mixed_classes(self):
        mixed = torch.tensor([[0.3, 0.7], [0.9, 0.1]])
        step = fw.tasks.build("classification").step(nn.Identity(), (torch.zeros(2, 2), mixed))
        assert step.targets.tolist() == [1, 0]
        assert float(step.loss) == pytest.approx(0.6931472)


OUTPUTS = torch.tensor([[0.0, 2.0, 1.0], [3.0, -1.0, 0.0]], dtype=torch.bfloat16)


def test_predictions_of_classification_are_class_and_probabilities():
    columns = fw.tasks.build("classification").predict(OUTPUTS)
    assert columns["class_index"].tolist() == [1, 0]
    torch.testing.assert_close(columns["probabilities"].sum(1), torch.ones(2))
    torch.testing.assert_close(columns["probability"], columns["probabilities"].amax(1))


def test_predictions_of_multilabel_are_labels_and_probabilities():
    columns = fw.tasks.build("multi_label").predict(OUTPUTS)
    assert columns["labels"].tolist() == [[0, 1, 1], [1, 0, 0]]
    torch.testing.assert_close(columns["probabilities"], OUTPUTS.float().sigmoid())


def test_predictions_of_regression_are_a_column_per_value():
    regression = fw.tasks.build("regression")
    assert regression.predict(torch.tensor([[1.0], [2.0]]))["value"].tolist() == [1, 2]
    columns = regression.predict(OUTPUTS)
    assert list(columns) == ["value_0", "value_1", "value_2"]
    assert columns["value_2"].tolist() == [1, 0]


class TestCheck:
    @pytest.mark.parametrize(
        "loss", ["cross_entropy", "focal", "dice", "multi_margin", "label_smoothing"]
    )
    @pytest.mark.parametrize("classes", [2, 3, 4])
    def test_classification_accepts_classes(self, loss, classes):
        data = make_data("class", torch.arange(12) % classes, (classes,))
        fw.tasks.build("classification", loss=loss).check(data)

    def test_multilabel_accepts_labels(self):
        fw.tasks.build("multilabel").check(make_data("labels", LABELS, (4,)))

    def test_regression_accepts_values(self):
        fw.tasks.build("regression").check(make_data("value", VALUES, (4,)))

    def test_an_error_for_other_targets_names_the_matching_task(self):
        with pytest.raises(DataError, match=r"Flowers has values .*: task=regression"):
            fw.tasks.build("classification").check(make_data("value", VALUES, (4,)))

    @pytest.mark.parametrize("loss", ["mse", "bce_with_logits", "huber"])
    @pytest.mark.parametrize("classes", [2, 3, 10])
    def test_a_loss_that_does_not_accept_the_targets_is_an_error(self, loss, classes):
        with pytest.raises(DataError, match=r"the loss \w+ cannot take classes"):
            fw.tasks.build("classification", loss=loss).check(make_data("class", CLASS, (classes,)))

    @pytest.mark.parametrize(
        ("loss", "message"),
        [
            ({"name": "cross_entropy", "weight": [1, 2]}, "weight"),
            (
                lambda: nn.CrossEntropyLoss(reduction="none"),
                r"expected one real number, .* of shape \(2,\)",
            ),
        ],
    )
    def test_too_few_weights_and_a_loss_without_a_mean_are_errors(self, loss, message):
        data = make_data("class", CLASS, (4,))
        with pytest.raises(DataError, match=message):
            fw.tasks.build("classification", loss=loss).check(data)

    def test_a_target_that_is_no_class_is_an_error(self):
        data = make_data("class", torch.tensor([0, 4, 1]), (4,))
        with pytest.raises(
            DataError, match=r"train split of Flowers has a target 4: .* from 0 to 3"
        ):
            fw.tasks.build("classification").check(data)

    def test_a_negative_target_is_an_error_unless_the_loss_ignores_it(self):
        data = make_data("class", torch.tensor([0, -100, 1]), (4,))
        with pytest.raises(DataError, match="-100"):
            fw.tasks.build("classification").check(data)
        loss = {"name": "cross_entropy", "ignore_index": -100}
        fw.tasks.build("classification", loss=loss).check(data)

    def test_only_targets_in_memory_are_checked(self):
        data = make_data("class", torch.tensor([0, 4, 1]), (4,), in_memory=False)
        fw.tasks.build("classification").check(data)
