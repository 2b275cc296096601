"""Number formats: bf16 and fp16 against plain loops, inference, and a GPU."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fits import OPTIMIZERS, SPLIT, X, Y, fit, network, same
from framework import Callback, Step, Task, Trainer
from framework.runtime.precision import Precision

CPU = torch.device("cpu")


def test_bf16_is_equal_to_a_loop_with_autocast():
    model = network()
    optimizer = OPTIMIZERS["sgd"](model)
    torch.manual_seed(0)
    batches = list(zip(X.split(35), Y.split(35), strict=True))
    for x, y in batches:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model[:3](x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    fitted = network()
    first_layers = nn.Sequential(*fitted[:3])
    trainer = Trainer(max_epochs=1, precision="bf16", device="cpu")
    trainer.fit(
        first_layers, batches, task=nn.CrossEntropyLoss(), optimizer=OPTIMIZERS["sgd"](first_layers)
    )
    assert same(fitted, model)
    assert {p.dtype for p in fitted.parameters()} == {torch.float32}
    assert trainer.predict(X).dtype == torch.float32


class Exploding(Task):
    """A task with infinite gradients in its second step, after the scaling of fp16."""

    def __init__(self):
        self.steps = 0

    def step(self, model, batch):
        self.steps += 1
        outputs = model(batch[0])
        loss = F.cross_entropy(outputs, batch[1])
        return Step(loss * 1e36 if self.steps == 2 else loss, outputs, batch[1])


class Norms(Callback):
    """Records the norm of the gradients, as a clipping callback sees them, and the weights."""

    def __init__(self):
        self.norms = []
        self.weights = []

    def on_gradients(self, trainer):
        gradients = [parameter.grad for parameter in trainer.model.parameters()]
        self.norms.append(nn.utils.get_total_norm(gradients).item())

    def on_step_end(self, trainer):
        self.weights.append(copy.deepcopy(trainer.model.state_dict()))


def linear():
    torch.manual_seed(3)
    return nn.Linear(6, 3)


def test_fp16_shows_unscaled_gradients_and_skips_a_step_that_overflows():
    fp16 = Norms()
    fp32 = Norms()
    limit = {"max_epochs": None, "max_steps": 4}
    trainer, _ = fit(model=linear(), task=Exploding(), precision="fp16", callbacks=[fp16], **limit)
    fit(model=linear(), callbacks=[fp32], **limit)
    assert fp16.norms[0] == pytest.approx(fp32.norms[0], rel=1e-2), "not 65,536 times as much"
    assert not math.isfinite(fp16.norms[1])
    first, second, third = (weights["weight"] for weights in fp16.weights[:3])
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


def test_inference_restores_modes_and_generators():
    model = network()
    model[3].eval()
    random = torch.get_rng_state()
    with Precision("fp32", CPU).inference(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        torch.rand(3)
    assert [module.training for module in model] == [True, True, True, False, True]
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_on_a_gpu_gives_the_weights_of_the_cpu(precision):
    def run(device, **settings):
        return fit(model=linear(), val=SPLIT, max_epochs=2, device=device, **settings)

    cpu, _ = run("cpu")
    gpu, record = run("cuda", precision=precision, deterministic=True)
    again, same_record = run("cuda", precision=precision, deterministic=True)
    assert gpu.model.weight.is_cuda
    torch.testing.assert_close(gpu.model.weight.cpu(), cpu.model.weight, rtol=0.05, atol=0.02)
    assert same(gpu.model, again.model)
    assert record.of("train/loss") == same_record.of("train/loss")
