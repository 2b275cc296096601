"""All shipped experiments, with small data in place of data sets that are fetched."""

from functools import cache
from pathlib import Path

import torch

import framework as fw
import framework_conf
from framework import Data, TensorSplit
from shipped import shipped

FOLDER = Path(next(iter(framework_conf.__path__))) / "experiment"
EXPERIMENTS = [file.stem for file in shipped(FOLDER, "*.yaml")]
IMAGES = ["data=digits", "data.image=true", "data.size=28"]  # in place of Fashion-MNIST
TEXTS = ["data=docstrings"]
SOUNDS = ["data=sounds_of_tests"]
SENTENCES = ["data.characters=60000", "data.length=64", "model.depth=1", "model.buckets=500"]
DATA = {
    "autoencoder": IMAGES,
    "bible": ["data=stdlib_source", "data.tokenizer=char", *SENTENCES],
    "contrastive": [*IMAGES, "task.views=[]"],  # the views are random
    "diamonds": ["data=diabetes"],
    "diamonds_transformer": ["data=diabetes"],
    "electricity": ["data=seasonal"],
    "fashion_mnist_cnn": IMAGES,
    "fashion_mnist_cnn_quick": IMAGES,
    "fashion_mnist_resnet": IMAGES,
    "fine_tune_digits": ["init_from=null"],
    "flights": ["data=breast_cancer"],
    "gan": [*IMAGES, "data.normalize=false"],
    "languages": SOUNDS,
    "languages_2d": SOUNDS,
    "languages_transformer": SOUNDS,
    "lm_bpe": ["data.tokenizer=char", *SENTENCES],
    "lm_char": SENTENCES,
    "spam": TEXTS,
    "spam_lstm": [*TEXTS, "loss.weight=null"],
    "spam_transformer": [*TEXTS, "loss.weight=null"],
    "vae": [*IMAGES, "data.normalize=false"],
    "vowels": ["data=vowels_of_tests"],
}


class Sequences(Data):
    """Sequences of unequal length with a mask as last channel."""

    def __init__(self, channels=12, length=20):
        generator = torch.Generator().manual_seed(1)
        values = torch.randn(42, channels, length, generator=generator)
        lengths = torch.randint(length // 2, length + 1, (42, 1, 1), generator=generator)
        mask = (torch.arange(length) < lengths).float()
        inputs = torch.cat([values * mask, mask], 1)
        self.train = TensorSplit(inputs, torch.arange(42) % 5)
        self.val = self.train
        self.in_shape = (channels + 1, length)
        self.out_shape = (5,)
        self.classes = "abcde"


@cache
def docstrings():
    """Return the data of several experiments, which takes seconds to read."""
    return fw.datasets.build("docstrings")


def register_data():
    fw.discover()
    if "sounds_of_tests" not in fw.datasets:
        fw.datasets.register("vowels_of_tests")(lambda: Sequences())
        fw.datasets.register("sounds_of_tests")(lambda: Sequences(1, 8000))
