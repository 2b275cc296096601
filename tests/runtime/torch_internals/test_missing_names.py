"""The framework trains with a release of torch without the private kernels."""

import subprocess
import sys

SCRIPT = """
import torch

KERNELS = [
    "_fused_adam_", "_fused_adamw_", "_fused_sgd_", "_amp_foreach_non_finite_check_and_unscale_"
]
for name in KERNELS:
    delattr(torch, name)
import framework.training.trainer
import framework as fw

fw.discover()
model = torch.nn.Linear(5, 3)
callbacks = [fw.callbacks.build(name) for name in ("non_finite", "ema")]
trainer = fw.Trainer(max_steps=6, device="cpu", callbacks=callbacks)
optimizer = fw.optimizers.build("sgd", list(model.parameters()), lr=0.1)
data = fw.TensorSplit(torch.randn(64, 5), torch.arange(64) % 3)
trainer.fit(model, data, task=torch.nn.CrossEntropyLoss(), optimizer=optimizer, batch_size=16)
print(trainer.state.step)
"""


def test_missing_kernels_are_replaced(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "6\n"
