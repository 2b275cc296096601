"""Contrastive learning, distillation, several goals: their formulas, and that they learn."""

import math
import re
from pathlib import Path

import numpy
import pytest
import torch
from sklearn.linear_model import Ridge, RidgeCV
from torch.nn import functional as F

import framework as fw
from framework.experiment.load import open_run

pytestmark = pytest.mark.usefixtures("one_thread")


def by_pairs(embeddings, temperature):
    """Equation 1 of Chen et al. 2020, a pair at a time."""
    n = len(embeddings) // 2
    losses = []
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        similar = [
            math.exp(F.cosine_similarity(embeddings[i], e, dim=0) / temperature) for e in embeddings
        ]
        losses.append(-math.log(similar[j] / sum(s for k, s in enumerate(similar) if k != i)))
    return sum(losses) / len(losses)


def test_the_contrastive_loss_is_that_of_the_paper():
    from framework_plugins.tasks.representation import nt_xent

    embeddings = torch.randn(10, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss, found = nt_xent(embeddings, 0.3)
    assert float(loss) == pytest.approx(by_pairs(embeddings, 0.3), rel=1e-5)
    twins = torch.cat([embeddings, embeddings + 1e-6])
    assert float(nt_xent(twins, 0.3)[1]) == 1.0
    assert 0 <= float(found) < 1


def contrastive(folder=None, epochs=10, **settings):
    data = fw.datasets.build("digits", image=True)
    views = [
        {"name": "resized_crop", "smallest": 0.5},
        "brightness_contrast",
    ]  # digits are no mirror images
    task = fw.tasks.build("contrastive", views=views, dimensions=32)
    torch.manual_seed(0)
    model = fw.models.build("cnn", data.in_shape, (32,), channels=[16, 32])
    probe = fw.callbacks.build("linear_probe", count=300)
    trainer = fw.Trainer(max_epochs=epochs, callbacks=[probe], device="cpu", **settings)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    return trainer, {
        "model": model,
        "data": data,
        "task": task,
        "optimizer": optimizer,
        "batch_size": 128,
    }


def test_features_learnt_without_labels_tell_the_classes():
    trainer, arguments = contrastive(epochs=8)
    trainer.fit(**arguments)
    metrics = trainer.state.metrics
    assert metrics["train/found"] > 0.35  # untrained: 0.17
    assert metrics["val/probe_accuracy"] > 0.955  # untrained: 0.94
    assert trainer.evaluate(arguments["data"].val) == trainer.evaluate(arguments["data"].val)


def test_views_are_shown_in_pairs():
    task = fw.tasks.build("contrastive")
    given = fw.datasets.build("digits", image=True).val.tensors[0][:3]
    shown = task.pictures(None, given)["views"]
    assert shown.shape == (6, 1, 8, 8)
    assert not torch.equal(shown[::2], shown[1::2])
    nearest = torch.cdist(shown.flatten(1), given.flatten(1))
    assert nearest[:2, 0].sum() < nearest[:2, 1:].sum() / 2


def test_a_contrastive_run_that_was_cut_off_goes_on_exactly():
    whole, arguments = contrastive(epochs=2)
    whole.fit(**arguments)
    cut, some = contrastive(epochs=2, max_steps=13)
    cut.fit(**some)
    half = cut.state_dict()  # now: it holds the generators as they are
    resumed, rest = contrastive(epochs=2)
    resumed.fit(**rest, resume=half)
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_probe_is_a_ridge_regression():
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
def test_without_a_ridge_the_one_that_predicts_samples_left_out_is_taken(noise):
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


def test_a_student_learns_from_a_teacher(command, teacher):
    words = f"task=distillation task.teacher={teacher} task.weight=1 model.width=16 trainer.max_epochs=20 run.name=pupil"
    status, _, err = command(f"train {words}")
    assert status in (0, None), err
    pupil = open_run(Path("runs/default/pupil"))
    data = fw.datasets.build("digits")
    inputs, targets = data.test.tensors
    step = pupil.task.step(pupil.model.eval(), (inputs, targets))
    with torch.no_grad():
        taught = open_run(Path(teacher)).model.eval()(inputs)
    soft = (taught / 4).softmax(1)
    expected = 16 * (soft * (soft.log() - (step.outputs / 4).log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(step.loss, expected, rtol=1e-4, atol=1e-6)
    agree = (step.outputs.argmax(1) == taught.argmax(1)).float().mean()
    assert agree > 0.9  # though it has seen no label


PROBED = "task=contrastive data.image=true model=cnn metrics=[] +callbacks=linear_probe callbacks.linear_probe.layer=block"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("task=distillation", "needs a teacher: task.teacher=RUN"),
        ("task=distillation task.teacher=runs/none", "runs/none"),
        (
            "task=distillation task.teacher=runs/default/teacher data=wine",
            r"takes \(64,\) .* Wine has \(13,\)",
        ),
        (PROBED, "mean 'blocks'"),
    ],
)
def test_what_does_not_fit_is_said(command, teacher, words, said):
    status, _, err = command(f"train {words}")
    assert status == 2
    assert re.search(said, err), err


def test_two_goals_are_weighed():
    data = fw.datasets.build("digits")
    task = fw.tasks.build("multi_task", classification=2.0, reconstruction=0.5)
    target, shape = task.targets_of(data)
    assert (target, shape) == ("class", (74,))
    torch.manual_seed(0)
    model = fw.models.build("mlp", (64,), shape)
    batch = data.train[:20]
    step, outputs = task.step(model, batch), model(batch[0])
    entropy, error = (
        F.cross_entropy(outputs[:, :10], batch[1]),
        F.mse_loss(outputs[:, 10:], batch[0]),
    )
    torch.testing.assert_close(step.loss, 2 * entropy + 0.5 * error)
    torch.testing.assert_close(
        dict(step.values), {"classification": entropy, "reconstruction": error}
    )
    assert torch.equal(step.outputs, outputs[:, :10])


def test_both_goals_are_learnt():
    data = fw.datasets.build("digits")
    task = fw.tasks.build("multi_task")
    torch.manual_seed(0)
    model = fw.models.build("mlp", (64,), task.targets_of(data)[1], width=128)
    trainer = fw.Trainer(max_epochs=12, device="cpu")
    metrics = [fw.metrics.build("accuracy")]
    trainer.fit(
        model,
        data,
        task=task,
        optimizer=torch.optim.Adam(model.parameters(), lr=3e-3),
        metrics=metrics,
    )
    assert trainer.state.metrics["val/accuracy"] > 0.93
    assert trainer.state.metrics["val/reconstruction"] < 0.25  # of a variance of 1


def test_trials_with_several_goals_and_weights_of_them_can_train_as_one(command):
    swept = "optimizer.lr=0.001,0.002 task.reconstruction=0.5,2"
    status, out, err = command(f"plan -m task=multi_task {swept} hydra/launcher=auto")
    assert status in (0, None), err
    assert "   4  as one" in out
