"""Runs a function in several processes that are connected by gloo."""

import os
import socket
from datetime import timedelta

import torch
from torch import multiprocessing

import framework


def run_in_processes(function, number, *arguments):
    """Call a function of a test module in some processes with the variables of torchrun.

    An error in one of them is raised here.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    multiprocessing.spawn(call, (number, port, function, arguments), nprocs=number)


def call(rank, number, port, function, arguments):
    """Set the variables of torchrun, and call the function."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(number),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    framework.discover()
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    try:
        function(*arguments)
    finally:
        torch.distributed.destroy_process_group()
