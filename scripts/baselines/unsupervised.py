"""What the autoencoders, the adversarial network and the contrastive model of Fashion-MNIST are measured against.

    python scripts/baselines/unsupervised.py [RUN ...]

Principal components for `autoencoder`, the mean picture for `vae`; for `gan` a Gaussian fitted to the pixels, white
noise, training pictures, and those of half of the classes; for `contrastive` pixels, principal components and the same
network untrained. On the very same splits. A RUN is measured beside them, on the test pictures: what a linear map tells
of its features, or how evenly its samples are spread over the classes in the eyes of a logistic regression.
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
from framework.experiment.load import open_run
from framework_plugins.callbacks.generated_images import discrepancy, neighbours
from framework_plugins.tasks.representation import least_squares


def splits(normalize, *names):
    data = fw.datasets.build("fashion_mnist", normalize=normalize)
    return [getattr(data, name).tensors for name in names]


def components(count=32):
    (train, _), (test, _) = splits(True, "train", "test")
    train, test = train.flatten(1).numpy(), test.flatten(1).numpy()
    fitted = PCA(count, random_state=0).fit(train)
    return float(np.square(test - fitted.inverse_transform(fitted.transform(test))).mean())


def mean_picture():
    (train, _), (test, _) = splits(False, "train", "test")
    mean = train.flatten(1).mean(0).clamp(1e-4, 1 - 1e-4).expand(len(test), -1)
    return float(F.binary_cross_entropy(mean, test.flatten(1), reduction="sum") / len(test))


def other_samples(count=1000):
    """Samples to compare those of a model with, by name."""
    ((train, classes),) = splits(False, "train")
    pixels = train.flatten(1).double()
    moments = pixels.mean(0).numpy(), np.cov(pixels.numpy().T)
    drawn = np.random.default_rng(0).multivariate_normal(*moments, count, method="eigh")
    noise = pixels.mean() + pixels.std() * torch.randn(count, pixels.shape[1], dtype=torch.float64)
    half = pixels[classes < 5][:count]
    return {
        "a Gaussian": torch.from_numpy(drawn),
        "white noise": noise,
        "training": pixels[:count],
        "5 classes": half,
    }


def quality(made, count=1000):
    """What the callback `sample_distance` logs: distance, precision, coverage, by the validation pictures."""
    ((real, _),) = splits(False, "val")
    rows = made.flatten(1), real[:count].flatten(1).double()
    return [float(value) for value in (discrepancy(*rows), *neighbours(*rows))]


def probes(features, counts=(2000, None)):
    """Accuracies on the test pictures of linear maps of features, fitted by `linear_probe`'s rule to so many labels."""
    (train, classes), (test, truth) = splits(True, "train", "test")
    with torch.no_grad():
        seen, held = (
            torch.cat([features(part).flatten(1) for part in pictures.split(1000)]).double()
            for pictures in (train, test)
        )
    for count in counts:
        mean, deviation = seen[:count].mean(0), seen[:count].std(0) + 1e-6
        weights = least_squares(
            (seen[:count] - mean) / deviation, F.one_hot(classes[:count]).double()
        )
        found = (held - mean) / deviation @ weights[:-1] + weights[-1]
        yield float((found.argmax(1) == truth).double().mean())


def untrained():
    """The network of `contrastive` as it begins, its batch norms fitted to the data."""
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


def kinds(made):
    """How often each class is seen, and the exponential of the entropy of that: 10 for classes that come evenly."""
    ((train, classes),) = splits(False, "train")
    judge = LogisticRegression(C=0.1, max_iter=300).fit(
        train.flatten(1)[:20000].numpy(), classes[:20000].numpy()
    )
    shares = np.bincount(judge.predict(made.flatten(1).numpy()), minlength=10) / len(made)
    entropy = -sum(share * np.log(share) for share in shares if share)
    return float(np.exp(entropy)), " ".join(f"{share:.2f}" for share in shares)


def measure(run):
    """A line on a run: of a model that makes samples, or of one with features."""
    trained = open_run(Path(run))
    model, data = trained.model.eval(), trained.facts["data"]
    if not hasattr(model, "sample"):
        return "linear map of its features, 2,000 labels and all  {:.4f}  {:.4f}".format(
            *probes(model.blocks)
        )
    torch.manual_seed(0)
    with torch.no_grad():
        made = (
            model.sample(1000).double() * data["std"] + data["mean"]
        ) / 255  # as pixels, from 0 to 1
    number, shares = kinds(made)
    values = "distance {:.4f} precision {:.3f} coverage {:.3f}".format(*quality(made))
    return f"{values}  kinds {number:.2f} of 10 ({shares})"


if __name__ == "__main__":
    fw.discover()
    for run in sys.argv[1:]:
        print(f"{run}: {measure(run)}")
    print(f"autoencoder  mean squared error of 32 principal components  {components():.4f}")
    print(f"vae          nats a picture of the mean picture             {mean_picture():.1f}")
    for name, made in other_samples().items():
        print(
            "gan          {:11s}  distance {:.4f} precision {:.3f} coverage {:.3f}".format(
                name, *quality(made)
            )
        )
    for name, features in {
        "pixels": lambda x: x,
        "64 components": principal(),
        "untrained": untrained(),
    }.items():
        print(
            "contrastive  {:13s}  2,000 labels {:.4f}  all labels {:.4f}".format(
                name, *probes(features)
            )
        )
