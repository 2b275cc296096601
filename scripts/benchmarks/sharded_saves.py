"""Time for which training with `strategy=fsdp` waits for a checkpoint, and memory of a process.

Two processes train an MLP of 34 million parameters with AdamW. Each process saves its parts of the
state, or the main process gathers and saves them, as for a strategy without `state_saver`.
"""

import os
import socket
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import multiprocessing, nn

import framework as fw
from benchmarks.rounds import table

WIDTH = 1024
LAYERS = 32
BATCH_SIZE = 32
KINDS = ("no checkpoints", "gathered", "by each process")


class Saves(fw.Callback):
    """Saves each step with the checkpoint callback, and measures for how long it waits.

    The next step begins after the files are written, so that only the wait is measured.

    Args:
        checkpoint: the callback; None to save nothing.
    """

    def __init__(self, checkpoint: fw.SavingCallback | None):
        self.checkpoint = checkpoint
        self.seconds: list[float] = []

    def on_fit_start(self, trainer: fw.Context) -> None:
        if self.checkpoint is not None:
            self.checkpoint.on_fit_start(trainer)

    def on_step_done(self, trainer: fw.Context) -> None:
        if self.checkpoint is None:
            return
        began = time.perf_counter()
        self.checkpoint.on_step_done(trainer)
        self.seconds.append(time.perf_counter() - began)
        self.checkpoint.finish_saving()

    def on_fit_end(self, trainer: fw.Context) -> None:
        if self.checkpoint is not None:
            self.checkpoint.finish_saving()


def process(kind: str, rank: int, port: int, folder: Path, rounds: int, out: Connection) -> None:
    """Train in one process; send the seconds of each save, and the peak memory in MB."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    fw.discover()
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(LAYERS)]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 4))
    strategy = fw.strategies.build("fsdp")
    if kind == "gathered":
        vars(strategy)["state_saver"] = lambda: None
    checkpoint = None
    if kind != "no checkpoints":
        checkpoint = fw.callbacks.build("checkpoint", every="1step", monitor=None)
    saves = Saves(checkpoint)
    trainer = fw.Trainer(
        max_steps=rounds + 1, strategy=strategy, callbacks=[saves], folder=folder, device="cpu"
    )
    trainer.fit(
        model,
        fw.TensorSplit(torch.randn(BATCH_SIZE, WIDTH), torch.arange(BATCH_SIZE) % 4),
        task=nn.CrossEntropyLoss(),
        optimizer=torch.optim.AdamW(model.parameters()),
        batch_size=BATCH_SIZE,
    )
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    out.send((saves.seconds[1:], peak))  # the first save allocates the memory of the copies


def sharded_saves(rounds: int) -> int:
    """Measure, and print a table.

    Args:
        rounds: the number of saves of each kind.
    """
    rows = []
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            (seconds, peak), (_, other_peak) = measured(kind, Path(folder), rounds)
        wait = f"{1000 * statistics.median(seconds):,.0f}" if seconds else ""
        rows.append([kind, wait, f"{peak:,.0f}", f"{other_peak:,.0f}"])
    print(f"MLP of 34 million parameters, AdamW, 2 processes, {rounds} saves\n")
    print(table(["", "ms that training waits", "peak MB, main", "peak MB, other"], rows))
    return 0


def measured(kind: str, folder: Path, rounds: int) -> list[tuple[list[float], float]]:
    """Return the seconds of the saves and the peak memory in MB, of each process."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    children = []
    for rank in range(2):
        mine, theirs = context.Pipe()
        arguments = (kind, rank, port, folder / "run", rounds, theirs)
        child = context.Process(target=process, args=arguments)
        child.start()
        theirs.close()
        children.append((child, mine))
    results = [connection.recv() for _, connection in children]
    for child, _ in children:
        child.join()
    return results
