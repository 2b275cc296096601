"""Every shipped experiment has the same gradients on two processes as on one."""

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import framework as fw
import framework_conf
from distributed_runs import run_in_processes
from framework import Callback, Data, TensorSplit
from framework.experiment.experiment import Experiment
from runs import composed, run_training
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
IN_FLOAT64 = {"fashion_mnist_resnet"}  # its batch norms amplify the rounding of float32
RANDOM = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


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


class Gradients(Callback):
    """Copies the gradients of each update, and switches random layers off."""

    def __init__(self):
        self.steps = []

    def on_step_start(self, trainer):
        for module in trainer.model.modules():
            if isinstance(module, RANDOM) or type(module).__name__ == "SpecAugment":
                module.training = False
            for name in ("p", "dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
            if isinstance(module, nn.RNNBase):
                module.dropout = 0.0

    def on_gradients(self, trainer):
        named = trainer.model.named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


@cache
def docstrings():
    """Return the data of several experiments, which takes seconds to read."""
    return fw.datasets.build("docstrings")


def ramp(*shape, **settings):
    """Return numbers that are the same for each row, in place of random ones."""
    shape = shape[0] if isinstance(shape[0], tuple | torch.Size) else shape
    return torch.linspace(-1, 1, shape[-1]).expand(*shape).clone()


def register_data():
    fw.discover()
    if "sounds_of_tests" not in fw.datasets:
        fw.datasets.register("vowels_of_tests")(lambda: Sequences())
        fw.datasets.register("sounds_of_tests")(lambda: Sequences(1, 8000))


def gradients_of(name, teacher):
    """Return the gradients of one step of an experiment."""
    overrides = [f"experiment={name}", *DATA.get(name, [])]
    if name == "distillation":
        overrides.append(f"task.teacher={teacher}")
    small = ["loader.batch_size=13", "trainer.max_steps=1", "trainer.max_epochs=null"]
    spec = composed([*overrides, *small])
    strategy = spec.parts["strategy"]()
    texts = ["data=docstrings"] if name == "docstrings" else overrides
    built = Experiment(spec, docstrings() if "data=docstrings" in texts else None)
    if name in IN_FLOAT64:
        built.model.double()
        inputs, targets = built.train_batches.split.tensors
        built.train_batches.split = TensorSplit(inputs.double(), targets)
    trainer = built.trainer(strategy)
    gradients = Gradients()
    trainer.callbacks = [gradients]
    trainer.loggers = []
    trainer.fit(built.model, built.train_batches, task=built.task, optimizer=built.optimizer)
    return gradients.steps


def all_gradients(teacher):
    """Return the gradients of each experiment, or the error."""
    register_data()
    before = torch.randn
    results = {}
    for name in EXPERIMENTS:
        try:
            torch.randn = ramp if name in ("gan", "vae") else before
            results[name] = gradients_of(name, teacher)
        except Exception as error:
            results[name] = repr(error)
        finally:
            torch.randn = before
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    register_data()
    run = [f"run.root={folder}", "run.name=teacher", "trainer.max_steps=3"]
    teacher = str(run_training(*run, "callbacks=[checkpoint]").folder)
    two = run_in_processes(all_gradients, 2, folder, teacher)
    return all_gradients(teacher), *two


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_has_the_same_gradients_on_two_processes(name, results):
    one, main, other = (each[name] for each in results)
    assert isinstance(one, list), one
    assert isinstance(main, list), main
    assert len(one) == len(main) > 0
    for expected, found, second in zip(one, main, other, strict=True):
        assert expected.keys() == found.keys()
        total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
        assert total > 0
        for key, gradient in expected.items():
            error = (found[key] - gradient).norm()
            assert error <= 1e-5 * total, key
            assert error <= 1e-4 * (gradient.norm() + 0.01 * total), key  # also of small ones
            assert torch.equal(found[key], second[key]), key
