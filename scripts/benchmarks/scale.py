"""Speed of training in several processes on one machine, against one process and torch's DDP.

All contenders train the CNN of `experiment=fashion_mnist_cnn` (with batch normalization) on random
images of the same shape, with the same global batches. They take turns; between its rounds a
contender waits.
"""

import os
import socket
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

import framework as fw
from benchmarks.rounds import table

SAMPLES = 2560
BATCH_SIZE = 128
EPOCHS = 10**6  # a training that does not end by itself
SHAPE = (1, 28, 28)
CLASSES = 10


class Contender(NamedTuple):
    """A training in some processes.

    Attributes:
        name: for the table.
        processes: the number of processes.
        train: trains, and calls its argument at the end of each epoch.
    """

    name: str
    processes: int
    train: Callable[[Callable[[], None]], None]


def data() -> tuple[Tensor, Tensor]:
    """Return random images and classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(SAMPLES, *SHAPE, generator=generator)
    return images, torch.randint(CLASSES, (SAMPLES,), generator=generator)


def network() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = fw.models.build("cnn", in_shape=SHAPE, out_shape=(CLASSES,))
    return model


def handwritten(epoch_end: Callable[[], None]) -> None:
    """Train with torch's DistributedDataParallel, or without it in one process."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    images, targets = data()
    network_ = network()
    model = network_ if world_size == 1 else DistributedDataParallel(network_)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    criterion = nn.CrossEntropyLoss()
    model.train()
    for epoch in range(EPOCHS):
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(BATCH_SIZE):
            own = batch.tensor_split(world_size)[rank]
            loss = criterion(model(images[own]), targets[own])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        epoch_end()


class EpochEnd(fw.Callback):
    """Calls a function at the end of each epoch."""

    def __init__(self, function: Callable[[], None]):
        self.function = function

    def on_epoch_end(self, trainer: fw.Context) -> None:
        self.function()


class Ours:
    """A training with our Trainer.

    Args:
        strategy: the name of the strategy; None for a Trainer that gets none.
        settings: of the strategy.
    """

    def __init__(self, strategy: str | None, **settings: Any):
        self.strategy = strategy
        self.settings = settings

    def __call__(self, epoch_end: Callable[[], None]) -> None:
        strategy = (
            None if self.strategy is None else fw.strategies.build(self.strategy, **self.settings)
        )
        model = network()
        trainer = fw.Trainer(
            max_epochs=EPOCHS,
            strategy=strategy,
            device="cpu",
            callbacks=[EpochEnd(epoch_end), fw.callbacks.build("non_finite")],
        )
        trainer.fit(
            model,
            fw.TensorSplit(*data()),
            task=nn.CrossEntropyLoss(),
            optimizer=torch.optim.AdamW(model.parameters()),
            batch_size=BATCH_SIZE,
        )


CONTENDERS = [
    Contender("hand-written, 1 process", 1, handwritten),
    Contender("ours, 1 process", 1, Ours(None)),
    Contender("ours, 1 process, strategy=single", 1, Ours("single")),
    Contender("hand-written DDP, 2 processes", 2, handwritten),
    Contender("ours, strategy=ddp, 2 processes", 2, Ours("ddp")),
    Contender("ours, ddp, sync_batch_norm=false", 2, Ours("ddp", sync_batch_norm=False)),
    Contender("ours, strategy=fsdp, 2 processes", 2, Ours("fsdp")),
]


class Stopped(Exception):
    """Ends the training of a contender."""


def process(contender: Contender, rank: int, port: int, orders: Connection) -> None:
    """Train in one process: an epoch for each message, and an answer with its seconds."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(contender.processes),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    fw.discover()
    distributed.init_process_group("gloo")
    began = time.perf_counter()

    def epoch_end() -> None:
        nonlocal began
        orders.send(time.perf_counter() - began)
        if orders.recv() == "stop":
            raise Stopped
        began = time.perf_counter()

    try:
        contender.train(epoch_end)
    except Stopped:
        orders.close()
    os._exit(0)  # the other processes need not be ready to disconnect


class Group:
    """The processes of a contender, which wait between rounds."""

    def __init__(self, contender: Contender):
        self.contender = contender
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self.members: list[tuple[Any, Connection]] = []
        for rank in range(contender.processes):
            mine, theirs = context.Pipe()
            child = context.Process(target=process, args=(contender, rank, port, theirs))
            child.start()
            theirs.close()
            self.members.append((child, mine))
        self.wait()  # for the first epoch, which is slower

    def wait(self) -> float:
        """Return the seconds of the slowest process for the epoch."""
        seconds: list[float] = [connection.recv() for _, connection in self.members]
        return max(seconds)

    def epoch(self) -> float:
        """Train an epoch, and return its seconds."""
        for _, connection in self.members:
            connection.send("go")
        return self.wait()

    def stop(self) -> None:
        """End the processes."""
        for _, connection in self.members:
            connection.send("stop")
        for child, _ in self.members:
            child.join(10)
            child.kill()


def scale(rounds: int, threads: int) -> int:
    """Measure, and print a table.

    Args:
        rounds: the number of epochs of each contender.
        threads: of each process.
    """
    groups = [Group(contender) for contender in CONTENDERS]
    try:
        seconds: list[list[float]] = [[] for _ in groups]
        for _ in range(rounds):
            for group, own in zip(groups, seconds, strict=True):
                own.append(group.epoch())
    finally:
        for group in groups:
            group.stop()
    print(
        f"CNN of fashion_mnist_cnn, batches of {BATCH_SIZE}, {threads} thread in each process, "
        f"{rounds} rounds; {os.cpu_count()} cores, gloo\n"
    )
    rows = []
    for group, own in zip(groups, seconds, strict=True):
        alone = ratio_of(seconds[1], own)
        same = seconds[0] if group.contender.processes == 1 else seconds[3]
        speed = SAMPLES / statistics.median(own)
        rows.append(
            [group.contender.name, f"{speed:,.0f}", f"{alone:.2f}", f"{ratio_of(same, own):.2f}"]
        )
    heading = ["", "samples/s", "speed / ours, 1 process", "speed / hand-written"]
    print(table(heading, rows))
    return 0


def ratio_of(base: list[float], own: list[float]) -> float:
    """Return the median of the ratios of two contenders in the same round."""
    return statistics.median([first / second for first, second in zip(base, own, strict=True)])
