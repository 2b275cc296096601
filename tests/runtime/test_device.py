"""Devices by name, number formats, full memory: on the CPU as far as it goes, and on a GPU where there is one."""

import copy
import math
import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fits import OPTIMIZERS, SPLIT, Record, X, Y, fit, network, same
from framework import Callback, FrameworkError, Step, Task, Trainer
from framework.errors import SettingError
from framework.runtime.determinism import deterministic_algorithms
from framework.runtime.device import find_device
from framework.runtime.memory import OutOfMemory, memory_errors
from framework.runtime.memory_format import chosen_layout
from framework.runtime.precision import Precision
from framework.runtime.threads import intra_op_threads, suitable_threads

CPU = torch.device("cpu")


def test_auto_is_the_fastest_device_there_is():
    fastest = (
        "cuda"
        if torch.cuda.is_available()
        else "mps"
        if torch.backends.mps.is_available()
        else "cpu"
    )
    assert find_device("auto").type == fastest
    assert find_device("cpu") == CPU


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cuda:-1"])
def test_what_is_no_device(name):
    with pytest.raises(
        SettingError, match=f"device should be auto, cpu, cuda, cuda:N or mps, not '{name}'"
    ):
        find_device(name)


@pytest.mark.parametrize("name", ["cuda:64", "cpu:1", "xpu", "meta"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(SettingError, match=f"device {name} is not on this machine"):
        find_device(name)


# memory format of images


@pytest.mark.parametrize(("channels", "is_last"), [(4, False), (7, False), (8, True)])
def test_a_strided_shortcut_of_few_channels_keeps_images_channels_first(channels, is_last):
    """oneDNN for AVX2 corrupts memory in its backward pass; see `overruns_memory`."""
    shortcut = nn.Conv2d(channels, 16, 1, stride=2)
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3), nn.Conv2d(channels, channels, 3, stride=2), shortcut
    )
    assert chosen_layout("auto", model)[0] is is_last
    assert chosen_layout(True, model)[0]


# number formats


def test_bf16_is_autocast_written_by_hand():
    model = network()
    optimizer = OPTIMIZERS["sgd"](model)
    torch.manual_seed(0)
    for x, y in zip(X.split(35), Y.split(35), strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model[:3](x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ours = network()
    whole = nn.Sequential(*ours[:3])
    batches = list(zip(X.split(35), Y.split(35), strict=True))
    trainer = Trainer(max_epochs=1, precision="bf16", device="cpu")
    trainer.fit(whole, batches, task=nn.CrossEntropyLoss(), optimizer=OPTIMIZERS["sgd"](ours))
    assert same(ours, model)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert trainer.predict(X).dtype == torch.float32


class Exploding(Task):
    """A loss whose second step has an infinite gradient in fp16's scale."""

    def __init__(self):
        self.steps = 0

    def step(self, model, batch):
        self.steps += 1
        outputs = model(batch[0])
        loss = F.cross_entropy(outputs, batch[1])
        return Step(loss * 1e36 if self.steps == 2 else loss, outputs, batch[1])


class Norms(Callback):
    """Notes the weights and the norm of the gradients, as a clipping callback would see it."""

    def __init__(self):
        self.norms, self.weights = [], []

    def on_gradients(self, trainer):
        self.norms.append(
            nn.utils.get_total_norm([p.grad for p in trainer.model.parameters()]).item()
        )

    def on_step_end(self, trainer):
        self.weights.append(copy.deepcopy(trainer.model.state_dict()))


def linear():
    torch.manual_seed(3)
    return nn.Linear(6, 3)


def test_fp16_shows_unscaled_gradients_and_skips_a_step_that_overflows():
    seen, plain = Norms(), Norms()
    model = linear()
    trainer, _ = fit(
        model=model,
        task=Exploding(),
        precision="fp16",
        max_epochs=None,
        max_steps=4,
        callbacks=[seen],
    )
    fit(model=linear(), max_epochs=None, max_steps=1, callbacks=[plain])
    assert seen.norms[0] == pytest.approx(plain.norms[0], rel=1e-2)  # of 65,536 times as much
    assert not math.isfinite(seen.norms[1])
    first, second, third = (weights["weight"] for weights in seen.weights[:3])
    assert torch.equal(first, second)
    assert not torch.equal(second, third)
    assert trainer.state.step == 4
    assert trainer.state_dict()["scaler"]["scale"] == 65536 / 2

    resumed, _ = fit(
        model=linear(), precision="fp16", max_epochs=None, max_steps=6, resume=trainer.state_dict()
    )
    assert resumed.precision.scaler.get_scale() == 65536 / 2


def test_fp16_accumulates_and_clips_like_fp32():
    def clipped(precision, **settings):
        class Clip(Callback):
            def on_gradients(self, trainer):
                nn.utils.clip_grad_norm_(trainer.model.parameters(), 0.1)

        model = linear()
        fit(model=model, precision=precision, max_epochs=1, callbacks=[Clip()], **settings)
        return model.weight

    torch.testing.assert_close(
        clipped("fp16", batch_size=8, accumulate=4),
        clipped("fp32", batch_size=32),
        rtol=0.01,
        atol=1e-3,
    )


def test_inference_leaves_modes_and_generators_as_they_are():
    model = network()
    model[3].eval()
    random = torch.get_rng_state()
    with Precision("fp32", CPU).inference(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        torch.rand(3)
    assert [module.training for module in model] == [True, True, True, False, True]
    assert torch.equal(random, torch.get_rng_state())


def test_deterministic_algorithms_are_wanted_only_inside(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with deterministic_algorithms(True):
        assert torch.are_deterministic_algorithms_enabled()
        with deterministic_algorithms(False):
            assert torch.are_deterministic_algorithms_enabled()  # somebody else wants them
    assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"]


# full memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        None,
    ],
    ids=["cuda", "python", "cpu"],
)
def test_full_memory_is_said_with_what_takes_less(error):
    with (
        pytest.raises(
            OutOfMemory, match=r"a smaller batch, micro_batch=auto .* takes less"
        ) as caught,
        memory_errors(CPU),
    ):
        if error is not None:
            raise error
        torch.empty(2**59)
    assert isinstance(caught.value, FrameworkError)
    assert isinstance(caught.value, torch.OutOfMemoryError)  # for loops that try again with less


def test_other_errors_pass_as_they_are():
    with pytest.raises(RuntimeError, match="cannot be multiplied") as caught, memory_errors(CPU):
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not isinstance(caught.value, FrameworkError)


def test_a_step_that_does_not_fit_ends_as_an_error_of_the_run():
    class Greedy(nn.Linear):
        def forward(self, x):
            return torch.empty(2**59)

    record, model = Record(), Greedy(1, 1)
    trainer = Trainer(max_steps=1, device="cpu", loggers=[record])
    with pytest.raises(OutOfMemory):
        trainer.fit(model, SPLIT, task=nn.MSELoss(), optimizer=OPTIMIZERS["sgd"](model))
    assert record.closed == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_learns_what_the_cpu_learns(precision):
    parts = {"val": SPLIT, "max_epochs": 2}
    cpu, _ = fit(**(parts | {"model": linear()}))
    gpu, record = fit(
        **(parts | {"model": linear()}), device="cuda", precision=precision, deterministic=True
    )
    again, same_record = fit(
        **(parts | {"model": linear()}), device="cuda", precision=precision, deterministic=True
    )
    assert gpu.model.weight.is_cuda
    torch.testing.assert_close(gpu.model.weight.cpu(), cpu.model.weight, rtol=0.05, atol=0.02)
    assert same(gpu.model, again.model)
    assert record.of("train/loss") == same_record.of("train/loss")


# threads


def test_a_small_model_gets_one_thread_and_a_large_one_all_but_those_of_its_workers(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    small, large = nn.Linear(64, 128), nn.Linear(2000, 1000)
    assert suitable_threads(small, rows=32) == 1
    assert suitable_threads(large, rows=32) == 8
    assert suitable_threads(large, rows=32, workers=3) == 5
    assert suitable_threads(large, rows=32, workers=20) == 1
    assert suitable_threads(small, rows=32 * 10_000) == 8
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert suitable_threads(small, rows=32) == 8


def test_threads_are_as_before_afterwards():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), intra_op_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == before
