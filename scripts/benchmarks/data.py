"""Speed of reading an Arrow file in random order, against the same kind of rows in memory."""

# mypy: allow-untyped-calls

import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from .rounds import ratio, table, take_turns

GIGABYTE = 10**9
BYTES_PER_ROUND = 4 * 10**8
ROWS_PER_WRITE = 16_384
CLASSES = 10


class Task(NamedTuple):
    """What a process measures.

    Attributes:
        file: the Arrow file.
        rows: number of rows to hold in memory; 0 reads the file at random.
        width: float32 numbers of a row.
        batch_size: rows of a batch.
        trains: whether each batch is a step of training of a small MLP.
        limit: largest number of bytes of private memory; 0 for no limit.
        threads: threads of torch.
    """

    file: str
    rows: int
    width: int
    batch_size: int
    trains: bool
    limit: int
    threads: int


def data(
    gigabytes: float,
    in_memory: float,
    megabytes: int,
    width: int,
    batch_sizes: Sequence[int],
    rounds: int,
    threads: int,
    folder: Path | None,
) -> int:
    """Print the speed of reading and of training, and the memory of the process."""
    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        rows = int(gigabytes * GIGABYTE / (4 * width))
        known = min(rows, int(in_memory * GIGABYTE / (4 * width)))
        file = write_rows(folder / f"rows-{rows}x{width}.arrow", rows, width)
        print(f"{file.stat().st_size / GIGABYTE:.2f} GB in {file}")
        limit = megabytes * 2**20
        lines = []
        for trains in (False, True):
            for batch_size in batch_sizes:
                task = Task(str(file), 0, width, batch_size, trains, limit, threads)
                lines.append(compare(task, known, rounds))
    header = ["measured", "batch", "in memory", "arrow", "speed", "by CPU", "RssAnon", "RssFile"]
    print(table(header, lines))
    return 0


def compare(task: Task, rows: int, rounds: int) -> list[str]:
    """Return the row of the table for a task: ns per row of both, their ratios, and the memory."""
    file = Reader(task)
    memory = Reader(task._replace(rows=rows, limit=0))
    try:
        times = take_turns({"file": file.seconds, "memory": memory.seconds}, rounds)
        own = ratio(memory.cpu[-rounds:], file.cpu[-rounds:])
    finally:
        file.close()
        memory.close()
    return [
        "training" if task.trains else "reading",
        str(task.batch_size),
        f"{1e9 * statistics.median(times['memory']):.0f} ns",
        f"{1e9 * statistics.median(times['file']):.0f} ns",
        f"{ratio(times['memory'], times['file']):.2f}",
        f"{own:.2f}",
        f"{file.largest['RssAnon'] >> 20} MiB",
        f"{file.largest['RssFile'] >> 20} MiB",
    ]


class Reader:
    """A process that reads batches."""

    def __init__(self, task: Task):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(task, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.largest = {"RssAnon": 0, "RssFile": 0}
        self.cpu: list[float] = []  # seconds of processor time per row, of each round
        self.pipe.recv()  # it is ready

    def seconds(self) -> float:
        """Return the seconds per row of one round."""
        self.pipe.send(True)
        seconds, cpu, memory = self.pipe.recv()
        self.cpu.append(cpu)
        for name, size in memory.items():
            self.largest[name] = max(size, self.largest[name])
        return float(seconds)

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.join(10)
        self.process.kill()


def serve(task: Task, pipe: Connection) -> None:
    """Read a round of batches for each message, and send seconds per row and the memory."""
    if task.limit:
        resource.setrlimit(resource.RLIMIT_DATA, (task.limit, task.limit))
    import torch

    torch.set_num_threads(task.threads)
    batches = batches_of(task)
    step = make_step(task)
    per_round = max(1, BYTES_PER_ROUND // (4 * task.width * task.batch_size))
    if task.trains:
        per_round = min(per_round, 2000)
    pipe.send(None)
    try:
        while pipe.recv():
            start = time.perf_counter()
            start_cpu = time.process_time()
            for _ in range(per_round):
                step(next(batches))
            rows = per_round * task.batch_size
            cpu = (time.process_time() - start_cpu) / rows
            pipe.send(((time.perf_counter() - start) / rows, cpu, memory_now()))
    except EOFError:
        return


def batches_of(task: Task) -> Any:
    """Yield batches in random order without end."""
    import framework as fw
    from framework import Loader, TensorSplit

    fw.discover()
    found = fw.datasets.build("arrow", path=task.file, val_fraction=0.0, test_fraction=0.0)
    split = found.train
    if task.rows:
        import torch

        inputs = torch.empty(task.rows, task.width)
        labels = torch.empty(task.rows, dtype=torch.int64)
        for rows in torch.arange(task.rows).split(ROWS_PER_WRITE):
            inputs[rows], labels[rows] = split.gather(rows)
        split = TensorSplit(inputs, labels)
        del found
    loader = Loader(split, batch_size=task.batch_size, shuffle=True, drop_last=True)
    epoch = 0
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


def make_step(task: Task) -> Callable[[Any], None]:
    """Return a function that uses a batch."""
    import torch
    from torch import nn

    if not task.trains:
        return lambda batch: None
    model = nn.Sequential(nn.Linear(task.width, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step(batch: Any) -> None:
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def memory_now() -> dict[str, int]:
    """Return the resident bytes of this process: private ones, and those of mapped files."""
    sizes = {}
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssFile"):
            sizes[name] = 1024 * int(value.split()[0])
    return sizes


def write_rows(file: Path, rows: int, width: int) -> Path:
    """Write random rows and classes to an Arrow file, if it does not exist."""
    import numpy
    import pyarrow

    if file.exists():
        return file
    generator = numpy.random.default_rng(0)
    kind = pyarrow.list_(pyarrow.float32(), width)
    schema = pyarrow.schema([("x", kind), ("label", pyarrow.int64())])
    temporary = file.with_suffix(".tmp")
    with pyarrow.ipc.new_file(str(temporary), schema) as writer:
        for start in range(0, rows, ROWS_PER_WRITE):
            count = min(ROWS_PER_WRITE, rows - start)
            numbers = generator.random(count * width, dtype=numpy.float32)
            classes = generator.integers(0, CLASSES, count)
            inputs = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(numbers), width)
            columns = [inputs, pyarrow.array(classes)]
            writer.write_batch(pyarrow.record_batch(columns, schema=schema))
    os.replace(temporary, file)
    return file
