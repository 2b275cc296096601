"""Baselines of the unsupervised experiments on Fashion-MNIST, with their splits.

    python scripts/baselines/unsupervised.py [RUN ...]

- `autoencoder`: principal components.
- `vae`: the mean image.
- `gan`: a Gaussian fitted to the pixels, white noise, training images, and those of 5 classes.
- `contrastive`: pixels, principal components, and the same network without training.

Each RUN is measured on the test images: the accuracy of a linear map of its features, or the
quality of its samples and their distribution over the classes according to a logistic regression.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

import framework as fw
import framework_conf
from framework.experiment.trained.load import open_run
from framework_plugins.callbacks.monitoring.generated_images import (
    discrepancy,
    precision_and_coverage,
)
from framework_plugins.tasks.representation import least_squares


def splits(normalize, *names):
    data = fw.datasets.build("fashion_mnist", normalize=normalize)
    return [getattr(data, name).tensors for name in names]


def component_error(count=32):
    """Return the mean squared error of a reconstruction from principal components."""
    (train, _), (test, _) = splits(True, "train", "test")
    pixels = test.flatten(1).numpy()
    fitted = PCA(count, random_state=0).fit(train.flatten(1).numpy())
    reconstructed = fitted.inverse_transform(fitted.transform(pixels))
    return float(np.square(pixels - reconstructed).mean())


def mean_image_nats():
    """Return the cross-entropy of the test images with the mean training image, per image."""
    (train, _), (test, _) = splits(False, "train", "test")
    mean = train.flatten(1).mean(0).clamp(1e-4, 1 - 1e-4).expand(len(test), -1)
    return float(F.binary_cross_entropy(mean, test.flatten(1), reduction="sum") / len(test))


def other_samples(count=1000):
    """Return samples by name, for a comparison with those of a model."""
    ((train, classes),) = splits(False, "train")
    pixels = train.flatten(1).double()
    mean = pixels.mean(0).numpy()
    covariance = np.cov(pixels.numpy().T)
    generator = np.random.default_rng(0)
    drawn = generator.multivariate_normal(mean, covariance, count, method="eigh")
    noise = pixels.mean() + pixels.std() * torch.randn(count, pixels.shape[1], dtype=torch.float64)
    half = pixels[classes < 5][:count]
    return {
        "a Gaussian": torch.from_numpy(drawn),
        "white noise": noise,
        "training": pixels[:count],
        "5 classes": half,
    }


def quality(samples, count=1000):
    """Return distance, precision and coverage, as the callback `sample_distance` logs them."""
    ((real, _),) = splits(False, "val")
    generated = samples.flatten(1)
    expected = real[:count].flatten(1).double()
    values = [discrepancy(generated, expected), *precision_and_coverage(generated, expected)]
    return "distance {:.4f} precision {:.3f} coverage {:.3f}".format(*map(float, values))


@torch.no_grad()
def features_of(network, images):
    return torch.cat([network(part).flatten(1) for part in images.split(1000)]).double()


def probes(network, counts=(2000, None)):
    """Yield the test accuracy of linear maps of features, fitted as in `linear_probe`.

    Args:
        network: Function from images to features.
        counts: Numbers of labels; None for all.
    """
    (train, classes), (test, test_classes) = splits(True, "train", "test")
    features = features_of(network, train)
    test_features = features_of(network, test)
    for count in counts:
        inputs = features[:count]
        mean = inputs.mean(0)
        deviation = inputs.std(0) + 1e-6
        targets = F.one_hot(classes[:count]).double()
        weights = least_squares((inputs - mean) / deviation, targets)
        outputs = (test_features - mean) / deviation @ weights[:-1] + weights[-1]
        yield float((outputs.argmax(1) == test_classes).double().mean())


def untrained():
    """Return the untrained network of `contrastive`, with the batch statistics of the data."""
    file = Path(next(iter(framework_conf.__path__)), "experiment", "contrastive.yaml")
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))["model"]
    torch.manual_seed(0)
    network = fw.models.build(settings.pop("name"), (1, 28, 28), (64,), **settings).train()
    ((train, _),) = splits(True, "train")
    with torch.no_grad():
        for batch in train[:20000].split(250):
            network(batch)
    return network.eval().blocks


def principal(count=64):
    ((train, _),) = splits(True, "train")
    fitted = PCA(count, random_state=0).fit(train.flatten(1).numpy())
    return lambda part: torch.from_numpy(fitted.transform(part.flatten(1).numpy()))


def classes_of(samples):
    """Describe the distribution of samples over the classes.

    The number of classes is the exponential of the entropy: 10 for equal frequencies.
    """
    ((train, classes),) = splits(False, "train")
    pixels = train[:20000].flatten(1).numpy()
    classifier = LogisticRegression(C=0.1, max_iter=300).fit(pixels, classes[:20000].numpy())
    predicted = classifier.predict(samples.flatten(1).numpy())
    shares = np.bincount(predicted, minlength=10) / len(samples)
    entropy = -sum(share * np.log(share) for share in shares if share)
    text = " ".join(f"{share:.2f}" for share in shares)
    return f"classes {float(np.exp(entropy)):.2f} of 10 ({text})"


def measure(run):
    """Return a line on the samples of a run's model, or on its features."""
    trained = open_run(Path(run))
    model = trained.model.eval()
    data = trained.facts["data"]
    if not hasattr(model, "sample"):
        few, every = probes(model.blocks)
        return f"linear map of its features, 2,000 labels and all  {few:.4f}  {every:.4f}"
    torch.manual_seed(0)
    with torch.no_grad():
        samples = model.sample(1000).double()
    samples = (samples * data["std"] + data["mean"]) / 255  # pixels from 0 to 1
    return f"{quality(samples)}  {classes_of(samples)}"


def main(runs):
    fw.discover()
    for run in runs:
        print(f"{run}: {measure(run)}")
    print(f"autoencoder  mean squared error of 32 principal components  {component_error():.4f}")
    print(f"vae          nats per image of the mean image               {mean_image_nats():.1f}")
    for name, samples in other_samples().items():
        print(f"gan          {name:11s}  {quality(samples)}")
    networks = {
        "pixels": lambda x: x,
        "64 components": principal(),
        "untrained": untrained(),
    }
    for name, network in networks.items():
        few, every = probes(network)
        print(f"contrastive  {name:13s}  2,000 labels {few:.4f}  all labels {every:.4f}")


if __name__ == "__main__":
    main(sys.argv[1:])
