"""Autoencoders, variational autoencoders, adversarial networks: their formulas, and that they learn."""

import re

import numpy
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.nn import functional as F

import framework as fw
from framework.errors import BuildError

IMAGES = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(4))


pytestmark = pytest.mark.usefixtures("one_thread")


def digits(**settings):
    return fw.datasets.build("digits", image=True, **settings)


def fit(model, task, data, *callbacks, epochs=10, lr=3e-3, resume=None, **limits):
    made = fw.tasks.build(task) if isinstance(task, str) else task
    torch.manual_seed(0)
    settings = model if isinstance(model, dict) else {}
    name = settings.pop("name") if settings else model
    network = fw.models.build(name, data.in_shape, made.targets_of(data)[1], **settings)
    trainer = fw.Trainer(max_epochs=epochs, callbacks=callbacks, device="cpu", **limits)
    optimizer = torch.optim.Adam(network.parameters(), lr=lr, betas=(0.5, 0.999))
    trainer.fit(network, data, task=made, optimizer=optimizer, batch_size=64, resume=resume)
    return trainer


def test_an_autoencoder_comes_near_to_the_best_linear_one():
    data = digits()
    trainer = fit({"name": "autoencoder", "code": 8}, "reconstruction", data, epochs=30)
    train, val = (split.tensors[0].flatten(1).numpy() for split in (data.train, data.val))
    linear = PCA(8).fit(train)
    best = numpy.square(val - linear.inverse_transform(linear.transform(val))).mean()
    mean = numpy.square(val - train.mean(0)).mean()
    ours = trainer.evaluate(data.val)["test/loss"]
    assert ours < 1.1 * best < 0.7 * mean


def test_noise_is_added_in_training_alone():
    task = fw.tasks.build("reconstruction", noise=1.0)
    given = []

    class Copy(nn.Module):
        def forward(self, x):
            given.append(x)
            return x

    model = Copy()
    assert task.step(model, (IMAGES,)).loss > 0.5
    assert task.step(model.eval(), (IMAGES,)).loss == 0
    assert torch.equal(given[1], IMAGES)


@pytest.mark.parametrize("network", ["mlp", "conv"])
@pytest.mark.parametrize("name", ["autoencoder", "vae", "gan"])
def test_shapes(name, network):
    out = (1,) if name == "gan" else (1, 8, 8)
    model = fw.models.build(name, (1, 8, 8), out, network=network, widths=[8, 16])
    assert model(IMAGES).shape == (6, *out)
    if name != "autoencoder":
        assert model.sample(5).shape == (5, 1, 8, 8)


def test_the_bound_is_that_of_the_distributions():
    torch.manual_seed(0)
    model = fw.models.build("vae", (1, 8, 8), (1, 8, 8), code=3)
    step = fw.tasks.build("variational").step(model.eval(), (IMAGES,))
    mean, log_variance = model.posterior(IMAGES)
    posterior = Normal(mean, (log_variance / 2).exp())
    code = mean + posterior.scale * torch.randn(
        mean.shape, generator=torch.Generator().manual_seed(0)
    )
    divergence = kl_divergence(posterior, Normal(0.0, 1.0)).sum(1).mean()
    likelihood = (
        Bernoulli(logits=model.decode(code), validate_args=False)
        .log_prob(IMAGES)
        .flatten(1)
        .sum(1)
        .mean()
    )
    torch.testing.assert_close(step.values["divergence"], divergence)
    torch.testing.assert_close(step.values["reconstruction"], -likelihood)
    torch.testing.assert_close(step.loss, divergence - likelihood)


def test_a_variational_autoencoder_learns_and_makes_samples_like_the_data():
    data = digits(normalize=False)
    distance = fw.callbacks.build("sample_distance", count=250)
    trainer = fit({"name": "vae", "code": 8}, "variational", data, distance, epochs=25)
    val = data.val.tensors[0]
    average = data.train.tensors[0].mean(0, keepdim=True).clamp(1e-3, 1 - 1e-3).expand_as(val)
    trivial = F.binary_cross_entropy(average, val, reduction="sum") / len(val)
    assert trainer.state.metrics["val/loss"] < trivial - 2  # nats a picture
    assert trainer.state.metrics["val/sample_distance"] < 0.2  # untrained: 0.91


def test_the_game_is_that_of_the_paper():
    torch.manual_seed(0)
    model = fw.models.build("gan", (1, 8, 8), (1,))
    task = fw.tasks.build("adversarial")
    torch.manual_seed(1)
    step = task.phase("discriminator", model, (IMAGES,))
    torch.manual_seed(1)
    real, fake = model(IMAGES), model(model.sample(6).detach())
    expected = -(real.sigmoid().log().mean() + (1 - fake.sigmoid()).log().mean())
    torch.testing.assert_close(step.loss, expected)
    torch.manual_seed(1)
    generator = task.phase("generator", model, (IMAGES,)).loss
    torch.testing.assert_close(
        generator, -model(model.sample(6)).sigmoid().log().mean(), atol=1, rtol=1
    )
    torch.manual_seed(1)
    torch.testing.assert_close(generator, -model(model.sample(6)).sigmoid().log().mean())


def test_samples_stay_within_the_range_of_an_output_activation():
    torch.manual_seed(0)
    model = fw.models.build(
        "gan", (1, 8, 8), (1,), network="conv", widths=[8, 8], norm="batch", output="sigmoid"
    )
    with torch.no_grad():
        model.generator[-2].weight *= 100
        made = model.sample(50)
    assert 0 <= made.min() < 0.01 < 0.99 < made.max() <= 1


def slope_by_differences(judge, x, small=1e-4):
    """The mean squared norm of the judge's gradient, a number of an input at a time."""
    squares = 0.0
    for place in range(x[0].numel()):
        moved = torch.zeros_like(x).flatten(1)
        moved[:, place] = small
        moved = moved.reshape(x.shape)
        squares += ((judge(x + moved) - judge(x - moved)) / (2 * small)).square().mean()
    return squares


def test_the_penalty_is_the_squared_slope_at_the_inputs():
    torch.manual_seed(0)
    model = fw.models.build("gan", (1, 8, 8), (1,), widths=[16], activation="tanh").double()
    model.sample = lambda count: torch.zeros(count, 1, 8, 8, dtype=torch.float64)
    plain, task = (fw.tasks.build("adversarial", penalty=penalty) for penalty in (0.0, 3.0))
    x = IMAGES.double()
    first, step = plain.step(model, (x,)), task.step(model, (x,))
    torch.testing.assert_close(
        step.values["slope"], slope_by_differences(model, x), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(step.loss, first.loss + 1.5 * step.values["slope"])
    weight = model.discriminator[1].weight
    (gradient,) = torch.autograd.grad(step.loss - first.loss, weight)
    with torch.no_grad():
        slopes = []
        for moved in (1e-4, -2e-4):
            weight[2, 3] += moved
            slopes.append(slope_by_differences(model, x))
    torch.testing.assert_close(
        gradient[2, 3], 1.5 * (slopes[0] - slopes[1]) / 2e-4, rtol=1e-4, atol=1e-9
    )
    assert x.grad is None
    evaluated = task.step(model.eval(), (x,))
    assert "slope" not in evaluated.values
    assert evaluated.loss == evaluated.values["discriminator_loss"]


def play(steps=None, resume=None, **settings):
    """An adversarial network of digits with all that its experiment has, for 12 epochs of 20 steps."""
    data = digits()
    callbacks = [
        fw.callbacks.build("sample_distance", count=250),
        fw.callbacks.build("ema", decay=0.98),
    ]
    task = fw.tasks.build("adversarial", penalty=1.0)
    return fit(
        "gan",
        task,
        data,
        *callbacks,
        epochs=12,
        lr=2e-3,
        resume=resume,
        max_steps=steps,
        **settings,
    )


def test_an_adversarial_network_comes_nearer_to_the_data_and_resumes_exactly():
    whole = play()
    assert whole.state.metrics["val/sample_coverage"] > 0.3  # untrained, and noise: 0
    resumed = play(resume=play(101).state_dict())  # in the middle of an epoch
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_game_with_a_penalty_may_be_played_in_parts():
    whole, parts = play(3), play(3, micro_batch=16)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def test_the_sample_distance_is_that_of_the_formula():
    from framework_plugins.callbacks.generated_images import discrepancy

    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (5, 7))
    nearest = sorted(
        min(float((a - b).norm()) for j, b in enumerate(y) if i != j) for i, a in enumerate(y)
    )
    width = nearest[len(y) // 2] ** 2

    def kernel(a, b):
        return float(torch.exp(-(a - b).square().sum() / (2 * width)))

    def among(rows):
        pairs = [kernel(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
        return sum(pairs) / len(pairs)

    between = sum(kernel(a, b) for a in x for b in y) / 35
    assert float(discrepancy(x, y)) == pytest.approx(among(x) + among(y) - 2 * between, rel=1e-6)


def test_precision_and_coverage_are_those_of_the_papers():
    from framework_plugins.callbacks.generated_images import neighbours

    generator = torch.Generator().manual_seed(0)
    made, real = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (40, 60))
    precision, coverage = neighbours(made + 0.5, real, 4)
    nearest = NearestNeighbors(n_neighbors=5).fit(real.numpy())  # each is the nearest to itself
    radius = nearest.kneighbors(real.numpy())[0][:, 4]
    distances = numpy.linalg.norm((made + 0.5)[:, None].numpy() - real[None].numpy(), axis=2)
    assert float(precision) == pytest.approx((distances <= radius).any(1).mean())
    assert float(coverage) == pytest.approx((distances <= radius).any(0).mean())
    assert 0.3 < coverage < precision < 1


def test_coverage_tells_what_the_distance_is_blind_to():
    from framework_plugins.callbacks.generated_images import discrepancy, neighbours

    data = fw.datasets.build("digits", val_fraction=0.3)
    (train, classes), (real, _) = data.train.tensors, data.val.tensors
    noise = torch.randn(len(real), 64, generator=torch.Generator().manual_seed(0))
    few = train[classes < 5]
    distances = [float(discrepancy(rows, real)) for rows in (train, noise)]
    assert distances[0] < 0.02
    assert distances[1] < 0.3
    precisions, coverages = zip(
        *(map(float, neighbours(rows, real)) for rows in (train, few, noise)), strict=True
    )
    assert precisions[0] > 0.9
    assert precisions[1] > 0.9
    assert precisions[2] == 0
    assert coverages[0] > 0.9
    assert 0.4 < coverages[1] < 0.65  # half of the classes
    assert coverages[2] == 0


class Shown(fw.Logger):
    def __init__(self):
        self.tags = {}

    def images(self, tag, images, step):
        self.tags[tag] = images


def test_pictures_are_what_a_person_can_look_at():
    data, shown = digits(), Shown()
    task = fw.tasks.build("reconstruction")
    model = fw.models.build("autoencoder", data.in_shape, data.in_shape)
    trainer = fw.Trainer(
        max_steps=2,
        callbacks=[fw.callbacks.build("pictures", count=4, every="1step")],
        loggers=[shown],
    )
    with trainer:
        trainer.fit(model, data, task=task, optimizer=torch.optim.Adam(model.parameters()))
    pictures = shown.tags["reconstructions"]
    assert pictures.shape == (8, 1, 8, 8)
    assert pictures.min() >= 0
    assert pictures.max() == 1
    given = data.val.tensors[0][:4]
    torch.testing.assert_close(pictures[::2], (given - given.min()) / (given.max() - given.min()))


def test_pictures_are_of_the_weights_that_are_measured():
    data, shown = digits(), Shown()
    task = fw.tasks.build("reconstruction")
    torch.manual_seed(0)
    model = fw.models.build("autoencoder", data.in_shape, data.in_shape)
    parts = [fw.callbacks.build("pictures", count=4), fw.callbacks.build("ema", decay=0.9)]
    trainer = fw.Trainer(max_epochs=2, callbacks=parts, loggers=[shown], device="cpu")
    with trainer:
        trainer.fit(model, data, task=task, optimizer=torch.optim.Adam(model.parameters(), lr=1e-2))
    given = data.val.tensors[0][:4]
    low, high = given.min(), given.max()
    with torch.no_grad():
        averaged = ((model.eval()(given) - low) / (high - low)).clamp(
            0, 1
        )  # the model keeps the average
    torch.testing.assert_close(shown.tags["reconstructions"][1::2], averaged)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "model=mlp task=adversarial metrics=[]",
            "no `generator` and `discriminator`.*: model=gan",
        ),
        (
            "model=mlp task=variational data.normalize=false metrics=[]",
            "no `posterior`.*: model=vae",
        ),
        ("model=vae task=variational metrics=[]", "takes inputs from 0 to 1: data.normalize=false"),
        (
            "model=autoencoder task=reconstruction",
            "Reconstruction has value targets; available: .*mae",
        ),
        ("model=gan task=adversarial metrics=[] model.network=conv", "halves images"),
        ("+callbacks=pictures", "Classification has no pictures to show"),
        ("+callbacks=sample_distance", "Stack makes no samples"),
    ],
)
def test_what_does_not_fit_is_said(command, words, said):
    status, _, err = command(f"train {words}")
    assert status == 2
    assert re.search(said, err), err


def test_conv_networks_need_sizes_that_halve():
    with pytest.raises(BuildError, match="halves images"):
        fw.models.build("autoencoder", (1, 10, 10), (1, 10, 10), network="conv", widths=[4, 8])
