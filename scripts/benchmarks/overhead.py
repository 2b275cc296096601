"""Growth of the overhead with the number of idle callbacks, of steps and of epochs."""

import time
from pathlib import Path
from statistics import median

import torch
from torch import nn

import framework as fw
from benchmarks.rounds import ratio, table, take_turns
from benchmarks.safety import stepping


class Quiet(fw.Callback):
    """Handle only the end of a run."""

    def on_fit_end(self, trainer: fw.Context) -> None:
        pass


class Laps(fw.Callback):
    """Record the time of each lap of steps, and the memory after each lap of epochs."""

    def __init__(self, steps: int = 0, epochs: int = 0):
        self.steps = steps
        self.epochs = epochs
        self.microseconds: list[float] = []
        self.megabytes: list[float] = []

    def on_fit_start(self, trainer: fw.Context) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, trainer: fw.Context) -> None:
        if self.steps and trainer.state.step % self.steps == 0:
            now = time.perf_counter()
            self.microseconds.append((now - self.began) / self.steps * 1e6)
            self.began = now

    def on_epoch_end(self, trainer: fw.Context) -> None:
        if self.epochs and trainer.state.epoch % self.epochs == 0:
            self.megabytes.append(resident())


def overhead(rounds: int, steps: int, epochs: int) -> int:
    """Print the three tables."""
    print(listeners(rounds), end="\n\n", flush=True)
    print(long_run(steps), end="\n\n", flush=True)
    print(many_epochs(epochs))
    return 0


def listeners(rounds: int) -> str:
    """Return the microseconds of a step with 0, 5 and 20 callbacks; 0 twice to show the noise."""
    with (
        stepping([]) as none,
        stepping([]) as again,
        stepping(quiet(5)) as five,
        stepping(quiet(20)) as twenty,
    ):
        times = take_turns({"0": none, "0 again": again, "5": five, "20": twenty}, rounds, warm=3)
    rows = [
        [name, f"{median(spent):.0f}", f"{ratio(spent, times['0']):.3f}"]
        for name, spent in times.items()
    ]
    return table(["callbacks that listen to no step", "µs a step", "against 0"], rows)


def quiet(number: int) -> list[fw.Callback]:
    return [Quiet() for _ in range(number)]


def long_run(steps: int) -> str:
    """Return the cost of a step in the first tenth of a long run and in its last one."""
    laps = Laps(steps=max(1, steps // 100))
    fit(laps, samples=1437, max_steps=steps)
    tenth = max(1, len(laps.microseconds) // 10)
    first = median(laps.microseconds[:tenth])
    last = median(laps.microseconds[-tenth:])
    row = [f"{steps:,}", f"{first:.0f}", f"{last:.0f}", f"{last / first:.3f}"]
    return table(["steps of one run, µs a step", "first tenth", "last tenth", "last/first"], [row])


def many_epochs(epochs: int) -> str:
    """Return the memory of the process after a tenth of many short epochs and after all."""
    laps = Laps(epochs=max(1, epochs // 10))
    fit(laps, samples=96, max_epochs=epochs)
    first = laps.megabytes[0]
    last = laps.megabytes[-1]
    row = [f"{epochs:,}", f"{first:.1f}", f"{last:.1f}", f"{last - first:+.2f}"]
    return table(
        ["epochs of one run, resident MB", "after a tenth", "at the end", "difference"], [row]
    )


def fit(
    laps: Laps, samples: int, max_steps: int | None = None, max_epochs: int | None = None
) -> None:
    """Train a very small model with validation and a metric, to measure mainly the loop."""
    fw.discover()
    model = nn.Linear(8, 10)
    data = fw.TensorSplit(torch.randn(samples, 8), torch.randint(0, 10, (samples,)))
    trainer = fw.Trainer(max_epochs=max_epochs, max_steps=max_steps, device="cpu", callbacks=[laps])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    metrics = [fw.metrics.build("accuracy")]
    trainer.fit(
        model, data, val=data, task=nn.CrossEntropyLoss(), optimizer=optimizer, metrics=metrics
    )


def resident() -> float:
    """Return the resident memory of this process in MB."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no VmRSS")
