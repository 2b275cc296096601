"""The cost of safety: durable checkpoints, the NaN check in each step, the order of samples."""

import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import framework as fw
from benchmarks.rounds import ratio, table, take_turns
from benchmarks.workloads import mlp
from framework.data.dataset import Loader
from framework.runs.background_writer import Writer
from framework.runs.checkpoint import save

State = tuple[dict[str, Tensor], dict[str, Any]]


def safety(megabytes: Sequence[int], rounds: int, folder: Path | None) -> int:
    """Print the three tables."""
    # errors of the cleanup are ignored because a save may still be running
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as temporary:
        print(saving(megabytes, rounds, Path(temporary)), end="\n\n", flush=True)
    print(health(rounds * 5), end="\n\n", flush=True)
    print(order(rounds * 5))
    return 0


def state_of(megabytes: int) -> State:
    """Return weights and Adam's moments of that total size, in tensors of at most about 1 MB."""
    width = 256
    layers = max(1, round(megabytes * 2**20 / (3 * 4 * width * width)))
    weights = {f"layer{number}.weight": torch.randn(width, width) for number in range(layers)}
    moments = {
        number: {"step": torch.tensor(1.0), "exp_avg": weight * 0.1, "exp_avg_sq": weight**2}
        for number, weight in enumerate(weights.values())
    }
    groups = [{"lr": 1e-3, "params": list(moments)}]
    return weights, {"optimizer": {"state": moments, "param_groups": groups}}


def saving(megabytes: Sequence[int], rounds: int, folder: Path) -> str:
    """Return the milliseconds of a save for each size.

    The columns are torch.save without and with fsync, our save, and the time that training waits
    for our save in the background.
    """
    rows = []
    for size in megabytes:
        times = take_turns(saves(state_of(size), folder), rounds)
        row = [f"{size} MB"]
        row += [f"{median(spent):.1f}" for spent in times.values()]
        base = times.pop("torch.save")
        row += [f"{ratio(spent, base):.2f}" for spent in times.values()]
        rows.append(row)
    header = ["save, ms", "torch.save", "and fsync", "ours", "ours, wait of training"]
    return table([*header, "fsync/torch.save", "ours/torch.save", "wait/torch.save"], rows)


def saves(state: State, folder: Path) -> dict[str, Callable[[], float]]:
    """Return the four kinds of saves; each starts when all earlier writes have ended."""
    writer = Writer()

    def in_background() -> None:
        writer.submit(folder / "background", *state, 1, then=lambda path: None)

    def after(call: Callable[[], object]) -> float:
        writer.join()
        os.sync()
        return timed(call)

    return {
        "torch.save": partial(after, partial(torch.save, state, folder / "plain.pt")),
        "fsync": partial(after, partial(save_and_sync, state, folder / "synced.pt")),
        "ours": partial(after, lambda: save(folder / "ours", state[0], state[1], 1)),
        "waiting": partial(after, in_background),
    }


def save_and_sync(state: State, path: Path) -> None:
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def timed(call: Callable[[], Any]) -> float:
    """Return the milliseconds of a call."""
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


def health(rounds: int) -> str:
    """Return the microseconds of a small step without and with `non_finite`, in blocks by turns."""
    fw.discover()
    with stepping([]) as bare, stepping([fw.callbacks.build("non_finite")]) as checking:
        times = take_turns({"without": bare, "with": checking}, rounds, warm=3)
    share = ratio(times["with"], times["without"]) - 1
    row = [
        "non_finite",
        f"{median(times['without']):.0f}",
        f"{median(times['with']):.0f}",
        f"{share:+.1%}",
    ]
    header = ["health check, µs a step of the tiny MLP", "without", "with", "share of the step"]
    return table(header, [row])


@contextmanager
def stepping(callbacks: Sequence[fw.Callback], block: int = 90) -> Iterator[Callable[[], float]]:
    """Yield a function that runs a block of steps and returns the microseconds of a step."""
    steps = training(callbacks, block)
    yield lambda: next(steps)
    steps.close()


def training(callbacks: Sequence[fw.Callback], block: int) -> Generator[float]:
    """Train in blocks, each a resumed fit, so that two trainings can take turns."""
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    clock = Clock(block)
    samples = 32 * (block + 10)
    data = fw.TensorSplit(torch.randn(samples, 64), torch.randint(0, 10, (samples,)))
    while True:
        trainer = fw.Trainer(
            max_epochs=1, device="cpu", callbacks=[*callbacks, clock], log_every="1epoch"
        )
        trainer.fit(model, data, task=nn.CrossEntropyLoss(), optimizer=optimizer)
        yield clock.microseconds


class Clock(fw.Callback):
    """Measure the last `block` of an epoch's `block` + 10 steps, without the log at its end."""

    def __init__(self, block: int):
        self.block = block
        self.began = 0.0
        self.microseconds = 0.0

    def on_step_start(self, trainer: fw.Context) -> None:
        if trainer.state.step == 10:
            self.began = time.perf_counter()
        elif trainer.state.step == self.block + 9:
            self.microseconds = (time.perf_counter() - self.began) / (self.block - 1) * 1e6


def order(rounds: int, samples: int = 60_000, batch_size: int = 32) -> str:
    """Return the microseconds to get a batch in our order, and with a precomputed permutation."""
    inputs = torch.randn(samples, 64)
    targets = torch.randint(0, 10, (samples,))
    loader = Loader(fw.TensorSplit(inputs, targets), batch_size, shuffle=True)
    ready = torch.randperm(samples)
    epochs = iter(range(10**6))

    def microseconds(batches: Callable[[], Iterator[Any]]) -> float:
        return timed(lambda: exhaust(batches())) * 1e3 / len(loader)

    parts = {
        "ours": partial(microseconds, lambda: loader.epoch(next(epochs))),
        "ready": partial(microseconds, lambda: gather(inputs, targets, ready, batch_size)),
    }
    times = take_turns(parts, rounds)
    pairs = zip(times["ours"], times["ready"], strict=True)
    difference = median(mine - other for mine, other in pairs)
    row = [
        "order and gather",
        f"{median(times['ours']):.1f}",
        f"{median(times['ready']):.1f}",
        f"{difference:+.1f}",
    ]
    header = [
        "in memory, µs a batch",
        "ours, order of (seed, epoch)",
        "ready permutation",
        "difference",
    ]
    return table(header, [row])


def gather(
    inputs: Tensor, targets: Tensor, order: Tensor, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    for index in torch.split(order, batch_size):
        yield inputs.index_select(0, index), targets.index_select(0, index)


def exhaust(batches: Iterator[Any]) -> None:
    for _ in batches:
        pass
