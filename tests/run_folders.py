"""Write run folders without training."""

import json
import os
import platform
from pathlib import Path

CONFIG = """\
model:
  name: mlp
  width: {width}
optimizer:
  name: {optimizer}
  lr: {lr}
data:
  name: {data}
task:
  name: classification
callbacks:
  checkpoint:
    monitor: val/loss
    mode: auto
run:
  root: runs
  name: null
trainer:
  devices: null
seed: {seed}
"""


def write_run(
    path,
    losses=(0.5, 0.2, 0.3),
    *,
    status="done",
    started="2026-12-01T09:00:00+0000",
    processes=1,
    reason=None,
    **settings,
):
    """Write a run folder with a value of val/loss every 10 steps; return the folder."""
    path = Path(path)
    (path / "checkpoints" / "step-00000010").mkdir(parents=True)
    defaults = {"width": 64, "optimizer": "adamw", "lr": 0.001, "data": "digits", "seed": 0}
    (path / "config.yaml").write_text(CONFIG.format(**(defaults | settings)))
    (path / "overrides.yaml").write_text("- seed=0\n")
    directions = {"loss": "min", "accuracy": "max"}
    provenance = {"time": started, "git_commit": None, "directions": directions}
    (path / "provenance.json").write_text(json.dumps(provenance))
    content = {"status": status, "reason": reason, "step": 10 * len(losses), "wall_seconds": 2.5}
    (path / "status.json").write_text(json.dumps(content | {"processes": processes}))
    with open(path / "metrics.jsonl", "w") as file:
        for number, loss in enumerate(losses, 1):
            row = {"step": 10 * number, "epoch": number, "wall_seconds": number}
            values = {"val/loss": loss, "val/accuracy": None if loss is None else 1 - loss}
            file.write(json.dumps(row | values) + "\n")
    return path


def write_sweep(path, *trials):
    """Write a sweep with trials that differ in optimizer.lr: (lr, losses) of each."""
    path = Path(path)
    path.mkdir(parents=True)
    request = {"command": [], "swept": ["optimizer.lr"], "by": {"val/loss": "min"}}
    (path / "sweep.json").write_text(json.dumps(request))
    with open(path / "sweep.jsonl", "w") as file:
        for number, (lr, losses) in enumerate(trials):
            folder = f"{number:03}_lr-{lr}"
            write_run(path / folder, losses, lr=lr)
            row = {"number": number, "settings": {"optimizer.lr": lr}, "folder": folder}
            file.write(json.dumps(row | {"state": "done", "metrics": {}}) + "\n")
    return path


def lock_file(run, process, host=None):
    """Write a lock file that names a process."""
    (run / ".lock").write_text(f"process {process} on {host or platform.node()}")


def ended_process():
    """Return the id of a process that has ended."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child
