"""Data workers when /dev/shm is full, as it may be in a container."""

import errno
import json
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from framework.data.dataset import Loader
from framework.errors import DataError

PRIVATE = ["unshare", "--mount", "bash", "-c"]
SCRIPT = """
import gc, json, multiprocessing, sys, torch
from framework.data.dataset import Loader
from framework.errors import DataError

class Samples(torch.utils.data.Dataset):
    def __init__(self, sample):
        self.sample = sample

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return self.sample, 1

def read(sample):
    try:
        return len(list(Loader(Samples(sample), eval_batch_size=8, workers=2).epoch()))
    except DataError as error:
        return str(error)

found = [read(torch.zeros(10)), read(torch.zeros(100_000))]
found += [read(torch.zeros(10))]  # the failed reader has left nothing
with open("/dev/shm/other", "wb", buffering=0) as other:
    try:
        while other.write(bytes(4096)):
            pass
    except OSError:
        pass
found += [read(torch.zeros(10)), read(5)]
gc.collect()
print(json.dumps([found, len(multiprocessing.active_children())]))
"""


def has_private_mounts():
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    command = [*PRIVATE, "mount -t tmpfs tmpfs /dev/shm"]
    return subprocess.run(command, capture_output=True).returncode == 0


def in_small_memory(script):
    """Run a script where /dev/shm has 1 MB; return its result and its error output."""
    command = f"mount -t tmpfs -o size=1m tmpfs /dev/shm && exec {shlex.quote(sys.executable)} -"
    project = Path(__file__).parents[2]
    done = subprocess.run(
        [*PRIVATE, command],
        input=script,
        cwd=project,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(done.stdout), done.stderr


@pytest.mark.skipif(not has_private_mounts(), reason="needs root to mount a small /dev/shm")
def test_the_error_for_a_full_dev_shm_is_one_line_with_advice():
    (found, processes), errors = in_small_memory(SCRIPT)
    fits, too_large, fits_again, *full = found
    assert (fits, fits_again) == (8, 8)
    assert len(full) == 2
    for said in (too_large, *full):
        assert said.startswith("/dev/shm is full (")
        assert "loader.workers=0" in said
        assert "--shm-size" in said
        assert "\n" not in said
    assert errors == ""  # no traceback of a `__del__`
    assert processes == 0


def samples():
    return [(torch.zeros(3), torch.tensor(1)) for _ in range(8)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("possible", [0, 1, 2])
def test_a_missing_semaphore_is_an_error_that_leaves_no_process(possible, monkeypatch):
    """A full /dev/shm is simulated: some queues can be created, the next one cannot."""
    queue = multiprocessing.context.BaseContext.Queue
    queues = []

    def full(context):
        if len(queues) == possible:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        queues.append(queue(context))
        return queues[-1]

    monkeypatch.setattr(multiprocessing.context.BaseContext, "Queue", full)
    with pytest.raises(DataError, match="/dev/shm is full"):
        next(iter(Loader(samples(), eval_batch_size=2, workers=2).epoch()))
    assert multiprocessing.active_children() == []


def test_other_errors_at_the_start_of_workers_are_not_changed(monkeypatch):
    def fails(context):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(multiprocessing.context.BaseContext, "Queue", fails)
    with pytest.raises(OSError, match="Too many open files"):
        next(iter(Loader(samples(), eval_batch_size=2, workers=2).epoch()))
