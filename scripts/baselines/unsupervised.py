"""What the autoencoders, the adversarial network and the contrastive model of Fashion-MNIST are measured against.

    python scripts/baselines/unsupervised.py

Principal components for `autoencoder`, the mean picture for `vae`, a Gaussian fitted to the pixels for `gan`, pixels
and an untrained network for `contrastive`; on the very same splits.
"""

import numpy as np
import torch
from framework_plugins.pictures import discrepancy
from framework_plugins.representation import least_squares
from sklearn.decomposition import PCA
from torch.nn import functional as F

import framework as fw


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


def gaussian(count=1000):
    """The distances of as many samples of a Gaussian, and of training pictures, from the validation pictures."""
    (train, _), (val, _) = splits(True, "train", "val")
    pixels, real = train.flatten(1).double(), val[:count].flatten(1).double()
    made = np.random.default_rng(0).multivariate_normal(
        pixels.mean(0).numpy(), np.cov(pixels.numpy().T), count, method="eigh"
    )
    return float(discrepancy(torch.from_numpy(made), real)), float(discrepancy(pixels[:count], real))


def probe(features, count=2000):
    """The accuracy on the validation pictures of a linear map, fitted as the callback `linear_probe` does."""
    (train, classes), (val, truth) = splits(True, "train", "val")
    with torch.no_grad():
        seen, held = (features(part).flatten(1).double() for part in (train[:count], val))
    mean, deviation = seen.mean(0), seen.std(0) + 1e-6
    weights = least_squares((seen - mean) / deviation, F.one_hot(classes[:count]).double(), 1.0)
    found = (held - mean) / deviation @ weights[:-1] + weights[-1]
    return float((found.argmax(1) == truth).double().mean())


if __name__ == "__main__":
    fw.discover()
    torch.manual_seed(0)
    untrained = fw.models.build("cnn", (1, 28, 28), (64,), channels=[32, 64], width=128).eval().blocks
    print(f"autoencoder  mean squared error of 32 principal components  {components():.4f}")
    print(f"vae          nats a picture of the mean picture             {mean_picture():.1f}")
    print("gan          distance of a Gaussian, of training pictures   {:.4f}  {:.4f}".format(*gaussian()))
    print(
        f"contrastive  linear map of pixels, of an untrained network  {probe(lambda x: x):.4f}  {probe(untrained):.4f}"
    )
