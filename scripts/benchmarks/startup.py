"""Start-up: time from process start to the end of the first step, and of `framework list`."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.rounds import Failed, ratio, table, take_turns

PLAIN = """
import os, time
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

torch.manual_seed(0)
x, y = load_digits(return_X_y=True)
x, _, y, _ = train_test_split(x, y, test_size=0.3, random_state=0, stratify=y)
x = torch.tensor((x - x.mean()) / x.std(), dtype=torch.float32)
y = torch.tensor(y)
model = nn.Sequential(
    nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
)
optimizer = torch.optim.AdamW(model.parameters(), FUSED)
batch = torch.randperm(len(x))[:32]
loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
loss.backward()
optimizer.step()
print(time.monotonic() - float(os.environ["STARTED"]), flush=True)
os._exit(0)
"""

FIRST_STEP = '''
import os, time
from framework import Callback, callbacks


@callbacks.register("first_step")
class FirstStep(Callback):
    """Print the time of the first step, and end the process."""

    def on_step_end(self, trainer):
        print(time.monotonic() - float(os.environ["STARTED"]), flush=True)
        os._exit(0)
'''

Command = list[str]


def startup(rounds: int, fused: bool) -> int:
    """Print pairs of times: a reference and ours."""
    settings = "fused=True" if fused else ""
    script = f"first step: plain script, AdamW({settings})"
    train = "first step: framework train"
    bare_import = "python -c 'import torch'"
    listing = "framework list"
    framework = [sys.executable, "-m", "framework"]
    training = [*framework, "train", "--plugins", "first_step.py", "+callbacks=first_step"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "plain.py").write_text(PLAIN.replace("FUSED", settings), encoding="utf-8")
        Path(folder, "first_step.py").write_text(FIRST_STEP, encoding="utf-8")
        parts: dict[str, Callable[[], float]] = {
            script: partial(seconds_to_first_step, [sys.executable, "plain.py"], folder),
            train: partial(seconds_to_first_step, training, folder),
            bare_import: partial(seconds, [sys.executable, "-c", "import torch"], folder),
            listing: partial(seconds, [*framework, "list"], folder),
        }
        times = take_turns(parts, rounds)
    rows = []
    for reference, ours in [(script, train), (bare_import, listing)]:
        rows.append(row(reference, times[reference], ""))
        rows.append(row(ours, times[ours], f"{ratio(times[ours], times[reference]):.2f}"))
    print(table(["from process start", "s", "least to most", "against the line above"], rows))
    return 0


def row(name: str, times: Sequence[float], against: str) -> list[str]:
    return [name, f"{median(times):.2f}", f"{min(times):.2f} to {max(times):.2f}", against]


def seconds_to_first_step(command: Command, folder: str) -> float:
    """Run a command that prints the seconds since STARTED as its last line."""
    environment = os.environ | {"STARTED": str(time.monotonic())}
    return float(run(command, folder, environment).split()[-1])


def seconds(command: Command, folder: str) -> float:
    """Return the seconds until a command ends."""
    began = time.monotonic()
    run(command, folder)
    return time.monotonic() - began


def run(command: Command, folder: str, environment: dict[str, str] | None = None) -> str:
    """Return the output of a command.

    Raises:
        Failed: The command failed; the text is its last line of output.
    """
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise Failed(f"{' '.join(command[1:])} ended with status {done.returncode}: {lines[-1]}")
    return done.stdout
