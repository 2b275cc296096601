"""Curves of decisions, compared with scikit-learn and with direct computations."""

import csv
import json

import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import nn

import framework as fw
from framework.contracts.task import LossTask
from framework.errors import DataError, SettingError
from framework.experiment.evaluation.curves import compute_curves, curves_csv, draw_curves
from framework.experiment.evaluation.decisions import Decision, decide, read_decisions
from framework.experiment.trained.load import open_run
from runs import run_training


def decisions(samples=200, classes=4):
    generator = torch.Generator().manual_seed(2)
    targets = torch.randint(0, classes, (samples,), generator=generator)
    logits = torch.randn(samples, classes, generator=generator).double()
    logits[range(samples), targets] += 1.5
    return Decision(logits.softmax(1), targets)


def test_areas_are_those_of_one_class_against_all_others():
    decision = decisions()
    curves = compute_curves(decision, ["a", "b", "c", "d"])
    assert [each.name for each in curves.classes] == ["a", "b", "c", "d"]
    for index, each in enumerate(curves.classes):
        truth = (decision.targets == index).numpy()
        score = decision.probabilities[:, index].numpy()
        assert each.positives == truth.sum()
        assert each.average_precision == pytest.approx(average_precision_score(truth, score))
        assert each.auc == pytest.approx(roc_auc_score(truth, score))
    assert curves.mean("auc") == pytest.approx(
        roc_auc_score(decision.targets, decision.probabilities, multi_class="ovr")
    )


def calibration_error(confidence, is_right, bins=15):
    """Return equation 3 of Guo et al. 2017."""
    error = 0.0
    for number in range(bins):
        low, high = number / bins, (number + 1) / bins
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            gap = is_right[inside].double().mean() - confidence[inside].mean()
            error += abs(gap.item()) * inside.sum().item() / len(confidence)
    return error


def test_the_calibration_error_is_that_of_the_most_likely_class():
    decision = decisions()
    confidence, chosen = decision.probabilities.max(1)
    curves = compute_curves(decision, [])
    expected = calibration_error(confidence, chosen == decision.targets)
    assert 0.02 < expected < 0.9
    assert curves.calibration.error == pytest.approx(expected)
    assert sum(curves.calibration.counts) == 200


def test_labels_are_decisions_of_their_own():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(90, 3, generator=generator, dtype=torch.float64)
    targets = (torch.rand(90, 3, generator=generator) < probabilities).long()
    curves = compute_curves(Decision(probabilities, targets), ["x", "y", "z"])
    for index, each in enumerate(curves.classes):
        expected = roc_auc_score(targets[:, index], probabilities[:, index])
        assert each.auc == pytest.approx(expected)
    confidence = torch.maximum(probabilities, 1 - probabilities).flatten()
    is_right = ((probabilities > 0.5) == (targets == 1)).flatten()
    assert curves.calibration.error == pytest.approx(calibration_error(confidence, is_right))
    assert sum(curves.calibration.counts) == 270


@pytest.mark.parametrize("shape", [(40,), (40, 1)])
def test_one_logit_is_one_label(shape):
    logits = torch.linspace(-3, 3, 40).reshape(shape)
    targets = (torch.arange(40) % 3 > 0).float().reshape(shape)
    decision = decide(LossTask(nn.BCEWithLogitsLoss()), logits, targets)
    torch.testing.assert_close(decision.probabilities[:, 0], logits.sigmoid().flatten().double())
    curves = compute_curves(decision, [])
    expected = roc_auc_score(targets.flatten(), logits.flatten())
    assert [each.auc for each in curves.classes] == [pytest.approx(expected)]


def test_targets_of_0_and_1_with_another_loss_are_no_decisions():
    values = torch.tensor([0.0, 1.0, 1.0])
    assert decide(LossTask(nn.MSELoss()), values - 0.2, values) is None


def test_a_class_without_samples_has_no_areas():
    decision = decisions(classes=3)
    absent = Decision(decision.probabilities, decision.targets.clamp(max=1))
    curves = compute_curves(absent, ["a", "b", "c"])
    last = curves.classes[2]
    assert (last.positives, last.average_precision, last.auc) == (0, None, None)
    assert curves.mean("auc") is not None
    shapes = {chart.shape for chart in draw_curves(curves)}
    assert shapes == {(1, 3, 322, 350)}  # the legend takes a row
    only = compute_curves(Decision(torch.tensor([[0.9], [0.8]]), torch.ones(2, 1).long()), [])
    assert only.classes[0].average_precision == 1
    assert only.classes[0].auc is None


def test_probabilities_that_are_nan_have_no_curves():
    decision = decisions()
    decision.probabilities[3] = torch.nan
    curves = compute_curves(decision, [])
    assert curves.mean("auc") is None
    assert curves.calibration.counts == []
    assert all(chart.isfinite().all() for chart in draw_curves(curves))


def test_the_points_are_in_the_csv_file():
    decision = decisions()
    curves = compute_curves(decision, ["a", "b", "c", "d"])
    rows = list(csv.DictReader(curves_csv(curves).splitlines()))
    roc = [row for row in rows if row["curve"] == "roc" and row["class"] == "b"]
    x = torch.tensor([float(row["x"]) for row in roc])
    y = torch.tensor([float(row["y"]) for row in roc])
    assert torch.trapezoid(y, x).item() == pytest.approx(curves.classes[1].auc, abs=1e-6)
    precision = [row for row in rows if row["curve"] == "pr" and row["class"] == "b"]
    assert (precision[0]["x"], precision[-1]["x"]) == ("1.0", "0.0")
    assert precision[-1]["threshold"] == ""


def test_the_decisions_of_a_run_are_its_predictions(tmp_path, command):
    run = run_training(f"run.root={tmp_path}/runs", "trainer.max_epochs=1").folder
    status, out, err = command(f"eval {run} --curves --split val --json")
    assert status == 0, err
    document = json.loads(out)["curves"]
    trained = open_run(run)
    inputs, targets = trained.read_data().val.tensors
    probabilities = trained.predict(inputs)["probabilities"].double()
    expected = roc_auc_score(
        targets, probabilities / probabilities.sum(1, keepdim=True), multi_class="ovr"
    )
    assert document["auc"] == pytest.approx(expected, abs=1e-4)
    assert document["samples"] == len(targets)
    assert [each["class"] for each in document["classes"]] == [str(digit) for digit in range(10)]


def test_a_task_without_classes_has_no_curves(tmp_path, command, capsys):
    overrides = ["experiment=diabetes", "trainer.max_epochs=1"]
    run = run_training(f"run.root={tmp_path}/runs", *overrides).folder
    capsys.readouterr()
    status, _, err = command(f"eval {run} --curves")
    assert status == 2
    assert "expected a task with classes or labels" in err
    assert len(err.splitlines()) == 1
    assert not (run / "evaluation").exists()


class Logged(fw.Logger):
    def __init__(self):
        self.tags = []

    def images(self, tag, images, step):
        self.tags.append((step, tag))

    def pr_curve(self, tag, labels, scores, step):
        self.tags.append((step, tag))


def fit(task, targets, outputs, val=True):
    torch.manual_seed(0)
    records = Logged()
    split = fw.TensorSplit(torch.randn(20, 4), targets)
    model = nn.Sequential(nn.Dropout(0.2), nn.Linear(4, outputs))
    callbacks = [fw.callbacks.build("curves")]
    trainer = fw.Trainer(max_epochs=2, callbacks=callbacks, loggers=[records], device="cpu")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer.fit(
        model, split, val=split if val else None, task=task, optimizer=optimizer, batch_size=10
    )
    return records.tags, model[1].weight.detach()


def test_the_callback_logs_the_charts_and_the_curve_of_each_class():
    tags, weight = fit(nn.CrossEntropyLoss(), torch.arange(20) % 3, 3)
    names = ["curves", "curves/0", "curves/1", "curves/2"]
    assert tags == [(step, name) for step in (2, 4) for name in names]
    torch.manual_seed(0)
    split = fw.TensorSplit(torch.randn(20, 4), torch.arange(20) % 3)
    model = nn.Sequential(nn.Dropout(0.2), nn.Linear(4, 3))
    trainer = fw.Trainer(max_epochs=2, device="cpu")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer.fit(model, split, task=nn.CrossEntropyLoss(), optimizer=optimizer, batch_size=10)
    assert torch.equal(model[1].weight, weight), "the callback changes training"


@pytest.mark.parametrize(
    ("task", "targets", "val", "words"),
    [
        (nn.MSELoss(), torch.randn(20, 2), True, "classes or labels"),
        (nn.CrossEntropyLoss(), torch.zeros(20).long(), False, "validation split"),
    ],
)
def test_the_callback_refuses_other_data_before_the_first_step(task, targets, val, words):
    with pytest.raises(SettingError, match=f"callbacks.curves: .*{words}") as error:
        fit(task, targets, 2, val)
    assert "\n" not in str(error.value)


def test_ignored_targets_are_left_out():
    targets = torch.arange(12) % 3
    targets[4:6] = -100
    trainer = fw.Trainer(max_steps=1, device="cpu")
    task = LossTask(nn.CrossEntropyLoss())
    split = fw.TensorSplit(torch.randn(12, 4), targets)
    with trainer.reading(split, model=nn.Linear(4, 3), task=task, batch_size=5) as read:
        decision = read_decisions(trainer, read)
    assert decision.targets.tolist() == [0, 1, 2, 0, 0, 1, 2, 0, 1, 2]


def test_data_with_ignored_classes_only_is_an_error():
    trainer = fw.Trainer(max_steps=1, device="cpu")
    task = LossTask(nn.CrossEntropyLoss())
    split = fw.TensorSplit(torch.randn(12, 4), torch.full((12,), -100))
    model = nn.Linear(4, 3)
    with (
        trainer.reading(split, model=model, task=task, batch_size=5) as read,
        pytest.raises(DataError, match="no sample with a class"),
    ):
        read_decisions(trainer, read)
