"""Between two log points the loop does not wait for the device by reading a value."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import framework as fw
from framework import Callback, Trainer

SPLIT = fw.TensorSplit(
    torch.randn(640, 6, generator=torch.Generator().manual_seed(1)), torch.arange(640) % 3
)
READS = ("item", "tolist", "numpy", "__float__", "__int__", "__bool__", "__index__")


class Reads(TorchDispatchMode, Callback):
    """Records the step of every read of a tensor's value."""

    def __init__(self):
        super().__init__()
        self.step = 0
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.found.append(self.step)
        return function(*args, **(kwargs or {}))

    def on_step_start(self, trainer):
        self.step = trainer.state.step + 1


@pytest.fixture
def reads(monkeypatch):
    """Return a mode that also records the reads that torch's dispatcher does not see."""
    mode = Reads()

    def recorded(real):
        def read(self, *args, **kwargs):
            mode.found.append(mode.step)
            return real(self, *args, **kwargs)

        return read

    for name in READS:
        monkeypatch.setattr(Tensor, name, recorded(getattr(Tensor, name)))
    return mode


def run(device, *callbacks, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.1), nn.Linear(8, 3))
    parts = [fw.callbacks.build(name) for name in ("clip_gradients", "gradient_norm", "ema")]
    trainer = Trainer(
        max_steps=60, log_every="20steps", callbacks=[*callbacks, *parts], device=device, **settings
    )
    trainer.fit(
        model.to(device),
        SPLIT,
        task=nn.CrossEntropyLoss(),
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.01, fused=True),
        metrics=[fw.metrics.build("accuracy")],
        schedule=lambda step: 1 / (1 + step),
        batch_size=8,
    )
    return trainer


@pytest.mark.parametrize(
    "settings", [{}, {"accumulate": 2}, {"precision": "bf16"}, {"micro_batch": 3}], ids=str
)
def test_values_are_read_at_log_points_only(reads, settings):
    with reads:
        run("cpu", reads, **settings)
    assert set(reads.found) - {0} == {20, 40, 60}


def test_a_read_in_each_step_is_recorded(reads):
    """A control."""

    class Nosy(Callback):
        def on_gradients(self, trainer):
            float(trainer.loss)

    with reads:
        run("cpu", reads, Nosy())
    assert set(range(1, 61)) <= set(reads.found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_the_host_never_waits_between_log_points():
    class Strict(Callback):
        """Makes waiting for the device an error, except in steps that log."""

        def on_step_start(self, trainer):
            step = trainer.state.step + 1
            torch.cuda.set_sync_debug_mode("default" if step % 20 == 0 or step < 3 else "error")

    try:
        run("cuda", Strict(), fw.callbacks.build("non_finite"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
