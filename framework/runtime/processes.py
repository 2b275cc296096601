"""The processes of a run, as a launcher such as torchrun has started them.

Only torch's own environment variables are read. Nothing is inferred from those of a cluster.
"""

import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib import import_module
from typing import NamedTuple

import torch
from torch import distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # it is public

from framework.errors import FrameworkError, SettingError

from .clock import COMMUNICATION, CURRENT_CLOCK

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
RESUME_ADVICE = "the same command with resume=auto continues the run from its last checkpoint"
GLOO_ERROR = "gloo/transport"  # in the message of each error of a connection of gloo
POLL_SECONDS = 0.05
SECONDS_FOR_CAUSE = 2.0
"""How long a process whose connection broke waits, so that the cause is reported first."""


class Launched(NamedTuple):
    """The place of this process among those of the run.

    Attributes:
        rank: its number, from 0.
        world_size: the number of processes.
        local_rank: its number on this machine, from 0.
    """

    rank: int
    world_size: int
    local_rank: int


class LostProcess(FrameworkError):
    """Another process of the run has ended, or does not answer."""

    exit_status = 1


def launched() -> Launched:
    """Return the place of this process; that of a single process without a launcher.

    Raises:
        SettingError: a variable is missing or not a number.
    """
    present = [name for name in VARIABLES[:2] if name in os.environ]
    if not present:
        return Launched(0, 1, 0)
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise SettingError(
            f"{present[0]} is set in the environment, but {', '.join(missing)} is not: start the "
            "processes with torchrun, which sets all of them"
        )
    rank = environment_number("RANK")
    world_size = environment_number("WORLD_SIZE")
    if rank >= world_size:
        raise SettingError(f"RANK={rank}: expected a number below WORLD_SIZE={world_size}")
    local_rank = environment_number("LOCAL_RANK") if "LOCAL_RANK" in os.environ else rank
    return Launched(rank, world_size, local_rank)


def environment_number(name: str) -> int:
    """Return the number in a variable of the environment.

    Raises:
        SettingError: it is not a whole number of at least 0.
    """
    text = os.environ[name]
    if not text.isdecimal():
        raise SettingError(f"{name}={text}: expected a whole number (set by torchrun)")
    return int(text)


def connect(device: torch.device, timeout_seconds: float) -> None:
    """Connect the processes of the run with each other.

    Raises:
        SettingError: they cannot be connected.
    """
    backend = "gloo"
    if device.type == "cuda":
        if not distributed.is_nccl_available():
            raise SettingError("several CUDA devices need NCCL, which this build of torch lacks")
        backend = "cpu:gloo,cuda:nccl"
    if launched().rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        check_port(environment_number("MASTER_PORT"))
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    with suppress(ImportError):
        # Default arguments of its functions are the process group at the time of the import. A
        # later import, as by an optimizer of torch, would keep the group and its threads until the
        # end of the interpreter, also after `disconnect`.
        import_module("torch.distributed.nn.functional")
    try:
        distributed.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    except (RuntimeError, ValueError) as error:
        cause = str(error).splitlines()[0]
        raise SettingError(
            f"the processes of the run cannot connect at {address} (MASTER_ADDR, MASTER_PORT) "
            f"within {timeout_seconds:g} s: {cause}"
        ) from error


def check_port(port: int) -> None:
    """Raise SettingError if the main process cannot listen at a port: torch would wait forever."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", port))
        except OSError as error:
            raise SettingError(
                f"MASTER_PORT={port}: expected a free port of the main process, got "
                f"{error.strerror!r}"
            ) from None


def disconnect() -> None:
    """Disconnect this process from the others."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


@contextmanager
def communicating() -> Iterator[None]:
    """Count the time of a block as communication; raise LostProcess for an error of it.

    A strategy uses it for all of its collective operations.
    """
    with CURRENT_CLOCK.part(COMMUNICATION), lost_processes():
        yield


@contextmanager
def lost_processes() -> Iterator[None]:
    """Raise LostProcess for an error of a collective operation in a block."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, FrameworkError):
            raise
        cause = reported_cause()
        if cause:
            raise LostProcess(cause) from error
        raise LostProcess(
            f"another process of the run has ended or does not answer; {RESUME_ADVICE} "
            f"(torch: {short_cause(error)})"
        ) from error


@contextmanager
def broken_connections() -> Iterator[None]:
    """Raise LostProcess for an error of a connection in a block, which may raise other errors too.

    Torch itself communicates there, as in the forward and backward passes of a sharded model.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and GLOO_ERROR not in str(error):
            raise
        with lost_processes():
            raise


def short_cause(error: RuntimeError) -> str:
    """Return the first sentence of an error of torch, without the place in its source."""
    line = re.sub(r"^\[[^]]*:\d+\] ", "", str(error).splitlines()[0])
    return line.partition(". ")[0]


def reported_cause() -> str | None:
    """Return the error that another process has reported; wait a moment for it.

    An empty text is that of a signal, for example.
    """
    store = failure_store()
    if store is None:
        return None
    key = failure_key("cause")
    deadline = time.monotonic() + SECONDS_FOR_CAUSE
    try:
        while not store.check([key]):
            if time.monotonic() > deadline:
                return None  # none reports one: it was killed
            time.sleep(POLL_SECONDS)
        cause: str = store.get(key).decode()
    except RuntimeError:  # the store has ended
        return None
    return cause


def claim_report(error: BaseException, text: str = "") -> bool:
    """Return whether this process should print an error: the first process that asks does.

    The processes ask a store that all of them can reach. If it cannot be reached, the main process
    prints, and another process only if the error is its own.

    Args:
        error: the error that ends this process.
        text: tells the other processes the cause of their broken connections.
    """
    rank = launched().rank
    consequence = isinstance(error, LostProcess)
    if launched().world_size == 1:
        return True
    store = failure_store()
    if store is None:
        return rank == 0 or not consequence
    try:
        first: bytes = store.compare_set(failure_key("rank"), "", str(rank))
        if first != str(rank).encode():
            return False
        if not store.check([failure_key("cause")]):
            cause = f"process {rank} has failed: {text}" if text and not consequence else ""
            store.set(failure_key("cause"), cause)
    except RuntimeError:
        return rank == 0 or not consequence
    return True


def failure_store() -> TCPStore | None:
    """Return the store of the processes; None if it cannot be reached, as before they connect."""
    found: list[TCPStore] = []
    patience = SECONDS_FOR_CAUSE

    def connect_to_store() -> None:
        with suppress(RuntimeError, ValueError, OSError):
            address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
            with socket.create_connection(address, patience):
                pass  # torch would repeat the attempt, and print warnings
            wait = timedelta(seconds=patience)
            found.append(TCPStore(*address, is_master=False, timeout=wait))

    thread = threading.Thread(target=connect_to_store, daemon=True)
    thread.start()
    thread.join(2 * patience)  # torch waits forever if another program listens at the port
    return found[0] if found else None


def failure_key(name: str) -> str:
    """Return a key of the store for the failures of this start of the processes."""
    return f"framework/failures/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"
