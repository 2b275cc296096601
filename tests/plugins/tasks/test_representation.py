"""Contrastive learning, distillation, multi-task learning: formulas and learning."""

import math
import re
from pathlib import Path

import numpy
import pytest
import torch
from sklearn.linear_model import Ridge, RidgeCV
from torch.nn import functional as F

import framework as fw
from framework.experiment.trained.load import open_run
from regressions import assert_same_weights

pytestmark = pytest.mark.usefixtures("one_thread")


def nt_xent_by_pairs(embeddings, temperature):
    """Return the loss of equation 1 of Chen et al. 2020, one pair at a time."""
    n = len(embeddings) // 2
    losses = []
    for i in range(2 * n):
        other = (i + n) % (2 * n)
        similarities = F.cosine_similarity(embeddings[i][None], embeddings) / temperature
        exponentials = similarities.exp()
        losses.append(-math.log(exponentials[other] / (exponentials.sum() - exponentials[i])))
    return sum(losses) / len(losses)


def test_the_contrastive_loss_equals_that_of_the_paper():
    from framework_plugins.tasks.representation import nt_xent

    embeddings = torch.randn(10, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss, found = nt_xent(embeddings, 0.3)
    assert float(loss) == pytest.approx(nt_xent_by_pairs(embeddings, 0.3), rel=1e-5)
    twins = torch.cat([embeddings, embeddings + 1e-6])
    _, all_found = nt_xent(twins, 0.3)
    assert all_found == 1
    assert 0 <= found < 1


def fit_contrastive(resume=None, **limits):
    data = fw.datasets.build("digits", image=True)
    # without flips: a mirrored digit is no digit
    views = [{"name": "resized_crop", "smallest": 0.5}, "brightness_contrast"]
    task = fw.tasks.build("contrastive", views=views, dimensions=32)
    torch.manual_seed(0)
    model = fw.models.build("cnn", data.in_shape, (32,), channels=[16, 32])
    probe = fw.callbacks.build("linear_probe", count=300)
    trainer = fw.Trainer(callbacks=[probe], device="cpu", **limits)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    trainer.fit(model, data, task=task, optimizer=optimizer, batch_size=128, resume=resume)
    return trainer


def test_features_learned_without_labels_separate_the_classes():
    trainer = fit_contrastive(max_epochs=8)
    metrics = trainer.state.metrics
    assert metrics["train/found"] > 0.35  # untrained: 0.17
    assert metrics["val/probe_accuracy"] > 0.955  # untrained: 0.94


def test_evaluation_draws_the_same_views_each_time():
    trainer = fit_contrastive(max_steps=1)
    split = fw.datasets.build("digits", image=True).val
    assert trainer.evaluate(split) == trainer.evaluate(split)


def test_pictures_are_pairs_of_views():
    task = fw.tasks.build("contrastive")
    inputs = fw.datasets.build("digits", image=True).val.tensors[0][:3]
    views = task.pictures(None, inputs)["views"]
    assert views.shape == (6, 1, 8, 8)
    assert not torch.equal(views[::2], views[1::2])
    distances = torch.cdist(views.flatten(1), inputs.flatten(1))
    assert distances[:2, 0].sum() < distances[:2, 1:].sum() / 2


def test_a_resumed_contrastive_run_equals_the_uninterrupted_run():
    uninterrupted = fit_contrastive(max_epochs=2)
    # `state_dict` before the next fit, since it contains the state of the global generators
    state = fit_contrastive(max_epochs=2, max_steps=13).state_dict()
    resumed = fit_contrastive(max_epochs=2, resume=state)
    assert_same_weights(resumed.model, uninterrupted.model)


def test_the_probe_equals_a_ridge_regression():
    from framework_plugins.tasks.representation import least_squares

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    x = x - x.mean(0)
    y = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    reference = Ridge(alpha=2.0 * 50 * 1e-3).fit(x.numpy(), y.numpy())
    ours = least_squares(x, y, 2.0).numpy()
    numpy.testing.assert_allclose(ours[:-1], reference.coef_.T, rtol=1e-8)
    numpy.testing.assert_allclose(ours[-1], reference.intercept_, rtol=1e-8)


@pytest.mark.parametrize("noise", [0.01, 1.0, 20.0])
def test_the_default_ridge_has_the_smallest_leave_one_out_error(noise):
    from framework_plugins.tasks.representation import RIDGES, least_squares

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 50, generator=generator, dtype=torch.float64)
    x = x - x.mean(0)
    truth = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    y = x @ truth + noise * torch.randn(60, 3, generator=generator, dtype=torch.float64)
    reference = RidgeCV([ridge * 60 * 1e-3 for ridge in RIDGES]).fit(x.numpy(), y.numpy())
    numpy.testing.assert_allclose(least_squares(x, y).numpy()[:-1], reference.coef_.T, rtol=1e-6)


@pytest.fixture
def teacher(command):
    status, _, err = command("train model.width=64 trainer.max_epochs=6 run.name=teacher")
    assert status in (0, None), err
    return "runs/default/teacher"


def test_a_student_learns_from_a_teacher_without_labels(command, teacher):
    task = f"task=distillation task.teacher={teacher} task.weight=1"
    status, _, err = command(f"train {task} model.width=16 trainer.max_epochs=20 run.name=student")
    assert status in (0, None), err
    student = open_run(Path("runs/default/student"))
    inputs, targets = fw.datasets.build("digits").test.tensors
    step = student.task.step(student.model.eval(), (inputs, targets))
    with torch.no_grad():
        teacher_outputs = open_run(Path(teacher)).model.eval()(inputs)
    soft = (teacher_outputs / 4).softmax(1)
    divergence = soft * (soft.log() - (step.outputs / 4).log_softmax(1))
    expected = 16 * divergence.sum(1).mean()
    torch.testing.assert_close(step.loss, expected, rtol=1e-4, atol=1e-6)
    agreement = (step.outputs.argmax(1) == teacher_outputs.argmax(1)).float().mean()
    assert agreement > 0.9


PROBE = (
    "task=contrastive data.image=true model=cnn metrics=[] "
    "+callbacks=linear_probe callbacks.linear_probe.layer=block"
)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("task=distillation", "needs a teacher: task.teacher=RUN"),
        ("task=distillation task.teacher=runs/none", "runs/none"),
        (
            "task=distillation task.teacher=runs/default/teacher data=wine",
            r"shape \(64,\) .* got \(13,\) .*Wine",
        ),
        (PROBE, "mean 'blocks'"),
    ],
)
def test_parts_that_do_not_fit_together_are_errors(command, teacher, overrides, message):
    status, _, err = command(f"train {overrides}")
    assert status == 2
    assert re.search(message, err), err


def test_the_multi_task_loss_is_the_weighted_sum_of_its_parts():
    data = fw.datasets.build("digits")
    task = fw.tasks.build("multi_task", classification=2.0, reconstruction=0.5)
    target, shape = task.targets_of(data)
    assert (target, shape) == ("class", (74,))
    torch.manual_seed(0)
    model = fw.models.build("mlp", (64,), shape)
    inputs, classes = data.train[:20]
    step = task.step(model, (inputs, classes))
    outputs = model(inputs)
    entropy = F.cross_entropy(outputs[:, :10], classes)
    error = F.mse_loss(outputs[:, 10:], inputs)
    torch.testing.assert_close(step.loss, 2 * entropy + 0.5 * error)
    torch.testing.assert_close(step.values["classification"], entropy)
    torch.testing.assert_close(step.values["reconstruction"], error)
    assert torch.equal(step.outputs, outputs[:, :10])


def test_a_multi_task_run_learns_both_parts():
    data = fw.datasets.build("digits")
    task = fw.tasks.build("multi_task")
    torch.manual_seed(0)
    model = fw.models.build("mlp", (64,), task.targets_of(data)[1], width=128)
    trainer = fw.Trainer(max_epochs=12, device="cpu")
    metrics = [fw.metrics.build("accuracy")]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    trainer.fit(model, data, task=task, optimizer=optimizer, metrics=metrics)
    assert trainer.state.metrics["val/accuracy"] > 0.93
    assert trainer.state.metrics["val/reconstruction"] < 0.25  # of a variance of 1


def test_multi_task_trials_with_different_weights_can_be_vectorized(command):
    swept = "optimizer.lr=0.001,0.002 task.reconstruction=0.5,2"
    status, out, err = command(f"plan -m task=multi_task {swept} hydra/launcher=auto")
    assert status in (0, None), err
    assert "   4  as one" in out
