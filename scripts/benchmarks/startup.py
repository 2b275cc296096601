"""Start-up: from process start to the first step done, and how long a list of parts takes."""

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
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
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
    """Says when the first step was done, and ends the process."""

    def on_step_end(self, trainer):
        print(time.monotonic() - float(os.environ["STARTED"]), flush=True)
        os._exit(0)
'''

Command = list[str]


def startup(rounds: int, fused: bool) -> int:
    """Print the seconds of ours and of what it is compared with, in pairs."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "plain.py").write_text(
            PLAIN.replace("FUSED", "fused=True" if fused else ""), encoding="utf-8"
        )
        Path(folder, "first_step.py").write_text(FIRST_STEP, encoding="utf-8")
        framework = [sys.executable, "-m", "framework"]
        training = [*framework, "train", "--plugins", "first_step.py", "+callbacks=first_step"]
        first_step = partial(seconds_to_first_step, folder=folder)
        parts: dict[str, Callable[[], float]] = {
            f"first step: plain script, AdamW({'fused=True' if fused else ''})": partial(
                first_step, [sys.executable, "plain.py"]
            ),
            "first step: framework train": partial(first_step, training),
            "python -c 'import torch'": partial(
                seconds, [sys.executable, "-c", "import torch"], folder
            ),
            "framework list": partial(seconds, [*framework, "list"], folder),
        }
        times = take_turns(parts, rounds)
    names = list(times)
    rows = [
        row(name, times[name], times[names[number - number % 2]] if number % 2 else None)
        for number, name in enumerate(names)
    ]
    print(table(["from process start", "s", "least to most", "against the line above"], rows))
    return 0


def row(name: str, times: Sequence[float], base: Sequence[float] | None) -> list[str]:
    against = "" if base is None else f"{ratio(times, base):.2f}"
    return [name, f"{median(times):.2f}", f"{min(times):.2f} to {max(times):.2f}", against]


def seconds_to_first_step(command: Command, folder: str) -> float:
    """Run a command that prints the seconds since STARTED as its last line."""
    environment = os.environ | {"STARTED": str(time.monotonic())}
    return float(run(command, folder, environment).split()[-1])


def seconds(command: Command, folder: str) -> float:
    """Return the seconds until a command has ended."""
    began = time.monotonic()
    run(command, folder)
    return time.monotonic() - began


def run(command: Command, folder: str, environment: dict[str, str] | None = None) -> str:
    """Return what a command prints. Raises Failed with its last words."""
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["no word"]
        raise Failed(f"{' '.join(command[1:])} ended with status {done.returncode}: {words[-1]}")
    return done.stdout
