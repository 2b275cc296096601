"""Every shipped experiment has the same gradients on two processes as on one."""

import pytest
import torch
from torch import nn

from distributed_runs import run_in_processes
from framework import Callback, TensorSplit
from framework.experiment.experiment import Experiment
from runs import composed, run_training
from substitutes import DATA, EXPERIMENTS, docstrings, register_data

IN_FLOAT64 = {"fashion_mnist_resnet"}  # its batch norms amplify the rounding of float32
RANDOM = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


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


def ramp(*shape, **settings):
    """Return numbers that are the same for each row, in place of random ones."""
    shape = shape[0] if isinstance(shape[0], tuple | torch.Size) else shape
    return torch.linspace(-1, 1, shape[-1]).expand(*shape).clone()


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
