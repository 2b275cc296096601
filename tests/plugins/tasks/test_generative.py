"""Autoencoders, variational autoencoders, adversarial networks: formulas and learning."""

import re
from itertools import permutations, product

import numpy
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.nn import functional as F

import framework as fw
from framework.errors import BuildError, SettingError
from regressions import assert_same_weights

IMAGES = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(4))


pytestmark = pytest.mark.usefixtures("one_thread")


def digits(**settings):
    return fw.datasets.build("digits", image=True, **settings)


def fit(model, task, data, *callbacks, epochs=10, lr=3e-3, resume=None, **limits):
    if isinstance(task, str):
        task = fw.tasks.build(task)
    _, out_shape = task.targets_of(data)
    torch.manual_seed(0)
    network = fw.models.build(model.pop("name"), data.in_shape, out_shape, **model)
    trainer = fw.Trainer(max_epochs=epochs, callbacks=callbacks, device="cpu", **limits)
    optimizer = torch.optim.Adam(network.parameters(), lr=lr, betas=(0.5, 0.999))
    trainer.fit(network, data, task=task, optimizer=optimizer, batch_size=64, resume=resume)
    return trainer


def test_an_autoencoder_is_close_to_the_best_linear_one():
    data = digits()
    trainer = fit({"name": "autoencoder", "code": 8}, "reconstruction", data, epochs=30)
    train = data.train.tensors[0].flatten(1).numpy()
    val = data.val.tensors[0].flatten(1).numpy()
    linear = PCA(8).fit(train)
    best = numpy.square(val - linear.inverse_transform(linear.transform(val))).mean()
    mean = numpy.square(val - train.mean(0)).mean()
    ours = trainer.evaluate(data.val)["test/loss"]
    assert ours < 1.1 * best < 0.7 * mean


def test_noise_is_added_in_training_only():
    task = fw.tasks.build("reconstruction", noise=1.0)
    model = nn.Identity()
    assert task.step(model, (IMAGES,)).loss > 0.5
    evaluated = task.step(model.eval(), (IMAGES,))
    assert evaluated.loss == 0
    assert torch.equal(evaluated.outputs, IMAGES)


@pytest.mark.parametrize("network", ["mlp", "conv"])
@pytest.mark.parametrize("name", ["autoencoder", "vae", "gan"])
def test_outputs_and_samples_have_the_expected_shapes(name, network):
    out_shape = (1,) if name == "gan" else (1, 8, 8)
    model = fw.models.build(name, (1, 8, 8), out_shape, network=network, widths=[8, 16])
    assert model(IMAGES).shape == (6, *out_shape)
    if name != "autoencoder":
        assert model.sample(5).shape == (5, 1, 8, 8)


def test_the_variational_loss_equals_the_bound_of_the_distributions():
    torch.manual_seed(0)
    model = fw.models.build("vae", (1, 8, 8), (1, 8, 8), code=3)
    step = fw.tasks.build("variational").step(model.eval(), (IMAGES,))
    mean, log_variance = model.posterior(IMAGES)
    posterior = Normal(mean, (log_variance / 2).exp())
    generator = torch.Generator().manual_seed(0)
    code = mean + posterior.scale * torch.randn(mean.shape, generator=generator)
    divergence = kl_divergence(posterior, Normal(0.0, 1.0)).sum(1).mean()
    distribution = Bernoulli(logits=model.decode(code), validate_args=False)
    likelihood = distribution.log_prob(IMAGES).flatten(1).sum(1).mean()
    torch.testing.assert_close(step.values["divergence"], divergence)
    torch.testing.assert_close(step.values["reconstruction"], -likelihood)
    torch.testing.assert_close(step.loss, divergence - likelihood)


def test_a_variational_autoencoder_learns_to_sample_from_the_data():
    data = digits(normalize=False)
    distance = fw.callbacks.build("sample_distance", count=250)
    trainer = fit({"name": "vae", "code": 8}, "variational", data, distance, epochs=25)
    val = data.val.tensors[0]
    average = data.train.tensors[0].mean(0, keepdim=True).clamp(1e-3, 1 - 1e-3).expand_as(val)
    trivial = F.binary_cross_entropy(average, val, reduction="sum") / len(val)
    assert trainer.state.metrics["val/loss"] < trivial - 2  # nats per image
    assert trainer.state.metrics["val/sample_distance"] < 0.2  # untrained: 0.91


def test_the_adversarial_losses_equal_those_of_the_paper():
    torch.manual_seed(0)
    model = fw.models.build("gan", (1, 8, 8), (1,))
    task = fw.tasks.build("adversarial")
    torch.manual_seed(1)
    step = task.phase("discriminator", model, (IMAGES,))
    torch.manual_seed(1)
    real = model(IMAGES).sigmoid()
    fake = model(model.sample(6).detach()).sigmoid()
    torch.testing.assert_close(step.loss, -(real.log().mean() + (1 - fake).log().mean()))
    torch.manual_seed(1)
    step = task.phase("generator", model, (IMAGES,))
    torch.manual_seed(1)
    fake = model(model.sample(6)).sigmoid()
    torch.testing.assert_close(step.loss, -fake.log().mean())


def test_samples_are_in_the_range_of_the_output_activation():
    torch.manual_seed(0)
    settings = {"network": "conv", "widths": [8, 8], "norm": "batch", "output": "sigmoid"}
    model = fw.models.build("gan", (1, 8, 8), (1,), **settings)
    with torch.no_grad():
        model.generator[-2].weight *= 100
        samples = model.sample(50)
    assert 0 <= samples.min() < 0.01 < 0.99 < samples.max() <= 1


def slope_by_differences(discriminator, x, step=1e-4):
    """Return the mean squared norm of the gradient, by differences of one number at a time."""
    squares = 0.0
    for number in range(x[0].numel()):
        change = torch.zeros_like(x).flatten(1)
        change[:, number] = step
        change = change.reshape(x.shape)
        difference = discriminator(x + change) - discriminator(x - change)
        squares += (difference / (2 * step)).square().mean()
    return squares


def test_the_penalty_is_the_squared_slope_at_the_inputs():
    torch.manual_seed(0)
    model = fw.models.build("gan", (1, 8, 8), (1,), widths=[16], activation="tanh").double()
    model.sample = lambda count: torch.zeros(count, 1, 8, 8, dtype=torch.float64)
    task = fw.tasks.build("adversarial", penalty=3.0)
    x = IMAGES.double()
    plain = fw.tasks.build("adversarial").step(model, (x,))
    step = task.step(model, (x,))
    slope = slope_by_differences(model, x)
    torch.testing.assert_close(step.values["slope"], slope, rtol=1e-5, atol=0)
    torch.testing.assert_close(step.loss, plain.loss + 1.5 * step.values["slope"])
    weight = model.discriminator[1].weight
    (gradient,) = torch.autograd.grad(step.loss - plain.loss, weight)
    with torch.no_grad():
        weight[2, 3] += 1e-4
        above = slope_by_differences(model, x)
        weight[2, 3] -= 2e-4
        below = slope_by_differences(model, x)
    expected = 1.5 * (above - below) / 2e-4
    torch.testing.assert_close(gradient[2, 3], expected, rtol=1e-4, atol=1e-9)
    assert x.grad is None
    evaluated = task.step(model.eval(), (x,))
    assert "slope" not in evaluated.values
    assert evaluated.loss == evaluated.values["discriminator_loss"]


def train_gan(steps=None, resume=None, **settings):
    """Train on digits with the callbacks of the experiment, for 12 epochs of 20 steps."""
    return fit(
        {"name": "gan"},
        fw.tasks.build("adversarial", penalty=1.0),
        digits(),
        fw.callbacks.build("sample_distance", count=250),
        fw.callbacks.build("ema", decay=0.98),
        epochs=12,
        lr=2e-3,
        resume=resume,
        max_steps=steps,
        **settings,
    )


def test_an_adversarial_network_learns_and_resumes_exactly():
    uninterrupted = train_gan()
    assert uninterrupted.state.metrics["val/sample_coverage"] > 0.3  # untrained, and noise: 0
    resumed = train_gan(resume=train_gan(101).state_dict())  # in the middle of an epoch
    assert_same_weights(resumed.model, uninterrupted.model)


def test_micro_batches_give_the_same_adversarial_step_with_a_penalty():
    whole = train_gan(3).model
    in_parts = train_gan(3, micro_batch=16).model
    for one, other in zip(whole.parameters(), in_parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


def test_the_sample_distance_needs_more_samples_than_neighbors():
    data = digits()
    data.val = fw.TensorSplit(*(tensor[:5] for tensor in data.val.tensors))
    with pytest.raises(SettingError, match=r"sample_distance: expected at least 6 samples .* 5$"):
        fit({"name": "gan"}, "adversarial", data, fw.callbacks.build("sample_distance"), epochs=1)
    with pytest.raises(SettingError, match=r"count.*\[6, inf\)"):
        fw.callbacks.build("sample_distance", count=5)


def test_the_sample_distance_equals_its_formula():
    from framework_plugins.callbacks.monitoring.generated_images import discrepancy

    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    inputs = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    nearest = []
    for number, row in enumerate(inputs):
        others = torch.cat([inputs[:number], inputs[number + 1 :]])
        nearest.append((others - row).norm(dim=1).min())
    width = torch.stack(nearest).median().square()

    def mean_kernel(pairs):
        kernels = [torch.exp(-(a - b).square().sum() / (2 * width)) for a, b in pairs]
        return float(torch.stack(kernels).mean())

    among_samples = mean_kernel(permutations(samples, 2))
    among_inputs = mean_kernel(permutations(inputs, 2))
    expected = among_samples + among_inputs - 2 * mean_kernel(product(samples, inputs))
    assert float(discrepancy(samples, inputs)) == pytest.approx(expected, rel=1e-6)


def test_precision_and_coverage_equal_those_of_the_papers():
    from framework_plugins.callbacks.monitoring.generated_images import precision_and_coverage

    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(40, 3, generator=generator, dtype=torch.float64) + 0.5
    inputs = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    precision, coverage = precision_and_coverage(samples, inputs, 4)
    # five, because each input is its own nearest neighbour
    nearest = NearestNeighbors(n_neighbors=5).fit(inputs.numpy())
    radius = nearest.kneighbors(inputs.numpy())[0][:, 4]
    distances = numpy.linalg.norm(samples[:, None].numpy() - inputs[None].numpy(), axis=2)
    assert float(precision) == pytest.approx((distances <= radius).any(1).mean())
    assert float(coverage) == pytest.approx((distances <= radius).any(0).mean())
    assert 0.3 < coverage < precision < 1


@pytest.mark.parametrize(
    ("kind", "precision_range", "coverage_range"),
    [
        ("data", (0.9, 1), (0.9, 1)),
        ("half of the classes", (0.9, 1), (0.4, 0.65)),
        ("noise", (0, 0), (0, 0)),
    ],
)
def test_precision_and_coverage_detect_noise_and_missing_classes(
    kind, precision_range, coverage_range
):
    from framework_plugins.callbacks.monitoring.generated_images import precision_and_coverage

    data = fw.datasets.build("digits", val_fraction=0.3)
    train, classes = data.train.tensors
    inputs, _ = data.val.tensors
    samples = {
        "data": train,
        "half of the classes": train[classes < 5],
        "noise": noise_like(inputs),
    }
    precision, coverage = precision_and_coverage(samples[kind], inputs)
    assert precision_range[0] <= precision <= precision_range[1]
    assert coverage_range[0] <= coverage <= coverage_range[1]


def test_the_sample_distance_of_noise_is_small():
    """It detects samples that are too similar, not samples that are far from all inputs."""
    from framework_plugins.callbacks.monitoring.generated_images import discrepancy

    data = fw.datasets.build("digits", val_fraction=0.3)
    inputs, _ = data.val.tensors
    assert discrepancy(data.train.tensors[0], inputs) < 0.02
    assert discrepancy(noise_like(inputs), inputs) < 0.3


def noise_like(inputs):
    return torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0))


class Images(fw.Logger):
    """Stores the last images of each tag."""

    def __init__(self):
        self.by_tag = {}

    def images(self, tag, images, step):
        self.by_tag[tag] = images


def fit_autoencoder(*callbacks, lr=1e-3, **limits):
    """Return the data, the model and the last reconstructions that were logged."""
    data = digits()
    logger = Images()
    torch.manual_seed(0)
    model = fw.models.build("autoencoder", data.in_shape, data.in_shape)
    trainer = fw.Trainer(callbacks=callbacks, loggers=[logger], device="cpu", **limits)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    with trainer:
        trainer.fit(model, data, task=fw.tasks.build("reconstruction"), optimizer=optimizer)
    return data, model, logger.by_tag["reconstructions"]


def tiles(image):
    """Return the 8 images of 8x8 pixels in a logged image, in two rows of 87x80 pixels each."""
    rows = image[0, :1, :, :348].unfold(1, 80, 80).unfold(2, 87, 87)[..., 8:76:9, 8:76:9]
    return rows.flatten(1, 2).transpose(0, 1)


def test_inputs_are_logged_before_their_reconstructions_between_0_and_1():
    pictures = fw.callbacks.build("pictures", count=4, every="1step")
    data, _, images = fit_autoencoder(pictures, max_steps=2)
    assert images.shape == (1, 3, 160, 350)
    inputs = data.val.tensors[0][:4]
    expected = (inputs - inputs.min()) / (inputs.max() - inputs.min())
    torch.testing.assert_close(tiles(images)[::2], expected, atol=0.004, rtol=0)


def test_logged_images_come_from_the_evaluated_weights():
    pictures = fw.callbacks.build("pictures", count=4)
    ema = fw.callbacks.build("ema", decay=0.9)
    data, averaged, images = fit_autoencoder(pictures, ema, lr=1e-2, max_epochs=2)
    inputs = data.val.tensors[0][:4]
    low = inputs.min()
    high = inputs.max()
    with torch.no_grad():
        expected = ((averaged.eval()(inputs) - low) / (high - low)).clamp(0, 1)
    torch.testing.assert_close(tiles(images)[1::2], expected, atol=0.004, rtol=0)


@pytest.mark.parametrize(
    ("overrides", "message"),
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
        ("+callbacks=pictures", "Classification generates no images"),
        ("+callbacks=sample_distance", "Stack generates no samples"),
    ],
)
def test_parts_that_do_not_fit_together_are_errors(command, overrides, message):
    status, _, err = command(f"train {overrides}")
    assert status == 2
    assert re.search(message, err), err


def test_a_conv_network_for_sizes_that_cannot_be_halved_is_an_error():
    with pytest.raises(BuildError, match="halves images"):
        fw.models.build("autoencoder", (1, 10, 10), (1, 10, 10), network="conv", widths=[4, 8])
