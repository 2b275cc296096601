"""Benchmarks: ratios against something run in the same minute, interleaved, medians.

startup: from process start to the first step done, `framework train` against a plain script; scripts/bench.py startup
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
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


def seconds(command: list[str], folder: str) -> float:
    """Run a command that prints the seconds since STARTED as its last line."""
    environment = os.environ | {"STARTED": str(time.monotonic())}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def startup(rounds: int) -> None:
    """Print the seconds to the first step of both, and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "plain.py").write_text(PLAIN)
        (Path(folder) / "first_step.py").write_text(FIRST_STEP)
        commands = {
            "plain script": [sys.executable, "plain.py"],
            "framework train": [
                *(sys.executable, "-m", "framework", "train"),
                *("--plugins", "first_step.py", "+callbacks=first_step"),
            ],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(rounds + 1):  # the first round warms the disk cache
            for name, command in commands.items():
                took = seconds(command, folder)
                times[name] += [took] if number else []
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    for name, median in medians.items():
        print(f"{name:<16} {median:6.2f} s   (of {rounds}: {min(times[name]):.2f} to {max(times[name]):.2f})")
    print(f"{'ratio':<16} {medians['framework train'] / medians['plain script']:6.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["startup"])
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    startup(given.rounds)


if __name__ == "__main__":
    main()
