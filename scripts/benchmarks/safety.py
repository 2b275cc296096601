"""What safety costs: a durable and checked checkpoint, the look for NaN in each step, the order as a function."""

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
    with tempfile.TemporaryDirectory(
        dir=folder, ignore_cleanup_errors=True
    ) as place:  # a save may still be under way
        print(saving(megabytes, rounds, Path(place)), end="\n\n", flush=True)
    print(health(rounds * 5), end="\n\n", flush=True)
    print(order(rounds * 5))
    return 0


def state_of(megabytes: int) -> State:
    """A model's weights and what an Adam keeps of them, together of that size, in tensors of about 1 MB and less."""
    width = 256
    layers = max(1, round(megabytes * 2**20 / (3 * 4 * width * width)))
    weights = {f"layer{number}.weight": torch.randn(width, width) for number in range(layers)}
    moments = {
        number: {"step": torch.tensor(1.0), "exp_avg": weight * 0.1, "exp_avg_sq": weight**2}
        for number, weight in enumerate(weights.values())
    }
    return weights, {
        "optimizer": {"state": moments, "param_groups": [{"lr": 1e-3, "params": list(moments)}]}
    }


def saving(megabytes: Sequence[int], rounds: int, folder: Path) -> str:
    """Return the milliseconds of a save, by size: torch's, that and fsync, ours, and what training waits for ours."""
    rows = []
    for size in megabytes:
        times = take_turns(saves(state_of(size), folder), rounds)
        base = times["torch.save"]
        ratios = [f"{ratio(times[name], base):.2f}" for name in ("fsync", "ours", "waiting")]
        rows.append([f"{size} MB", *(f"{median(each):.1f}" for each in times.values()), *ratios])
    header = ["save, ms", "torch.save", "and fsync", "ours", "ours, wait beside training"]
    return table([*header, "fsync/torch.save", "ours/torch.save", "wait/torch.save"], rows)


def saves(state: State, folder: Path) -> dict[str, Callable[[], float]]:
    """Return the four ways to save; each begins when nothing is being written any more."""
    writer = Writer()

    def ours_beside() -> None:
        writer.submit(folder / "beside", *state, 1, then=lambda path: None)

    def after(call: Callable[[], object]) -> float:
        writer.join()
        os.sync()
        return timed(call)

    return {
        "torch.save": partial(after, partial(torch.save, state, folder / "plain.pt")),
        "fsync": partial(after, partial(save_and_sync, state, folder / "synced.pt")),
        "ours": partial(after, lambda: save(folder / "ours", state[0], state[1], 1)),
        "waiting": partial(after, ours_beside),
    }


def save_and_sync(state: State, path: Path) -> None:
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def timed(call: Callable[[], Any]) -> float:
    """The milliseconds of a call."""
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


def health(rounds: int) -> str:
    """Return the microseconds of a small step without and with `non_finite`, in blocks that take turns."""
    fw.discover()
    with stepping([]) as bare, stepping([fw.callbacks.build("non_finite")]) as looking:
        times = take_turns({"without": bare, "with": looking}, rounds, warm=3)
    share = ratio(times["with"], times["without"]) - 1
    row = [
        "non_finite",
        f"{median(times['without']):.0f}",
        f"{median(times['with']):.0f}",
        f"{share:+.1%}",
    ]
    return table(
        ["health check, µs a step of the tiny MLP", "without", "with", "share of the step"], [row]
    )


@contextmanager
def stepping(callbacks: Sequence[fw.Callback], block: int = 90) -> Iterator[Callable[[], float]]:
    """Yield a function that makes a block of steps of one training and returns the microseconds of a step."""
    steps = training(callbacks, block)
    yield lambda: next(steps)
    steps.close()


def training(callbacks: Sequence[fw.Callback], block: int) -> Generator[float]:
    """A training cut into fits of a block each, resumed from one another, so that two can take turns."""
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    clock = Clock(block)
    data = fw.TensorSplit(
        torch.randn(32 * (block + 10), 64), torch.randint(0, 10, (32 * (block + 10),))
    )
    while True:
        trainer = fw.Trainer(
            max_epochs=1, device="cpu", callbacks=[*callbacks, clock], log_every="1epoch"
        )
        trainer.fit(model, data, task=nn.CrossEntropyLoss(), optimizer=optimizer)
        yield clock.microseconds


class Clock(fw.Callback):
    """Times the last `block` steps of an epoch of `block` + 10, before its end is logged."""

    def __init__(self, block: int):
        self.block, self.began, self.microseconds = block, 0.0, 0.0

    def on_step_start(self, trainer: fw.Context) -> None:
        if trainer.state.step == 10:
            self.began = time.perf_counter()
        elif trainer.state.step == self.block + 9:
            self.microseconds = (time.perf_counter() - self.began) / (self.block - 1) * 1e6


def order(rounds: int, samples: int = 60_000, batch_size: int = 32) -> str:
    """Return the microseconds that getting a batch takes: by our order, and from a permutation that is there."""
    inputs, targets = torch.randn(samples, 64), torch.randint(0, 10, (samples,))
    loader = Loader(fw.TensorSplit(inputs, targets), batch_size, shuffle=True)
    ready = torch.randperm(samples)
    epochs = iter(range(10**6))

    def ours() -> float:
        return timed(lambda: exhaust(loader.epoch(next(epochs)))) * 1e3 / len(loader)

    def gathered() -> float:
        return (
            timed(lambda: exhaust(gather(inputs, targets, ready, batch_size))) * 1e3 / len(loader)
        )

    times = take_turns({"ours": ours, "ready": gathered}, rounds)
    difference = median(
        mine - other for mine, other in zip(times["ours"], times["ready"], strict=True)
    )
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
    for index in order.split(batch_size):
        yield inputs.index_select(0, index), targets.index_select(0, index)


def exhaust(batches: Iterator[Any]) -> None:
    for _ in batches:
        pass
