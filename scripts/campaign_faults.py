"""A callback that causes a fault in one process of a run; a plugin of `campaign_processes.py`."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import torch

import framework as fw
from framework import Context

LEFT = 3  # pages of 4 KiB on the full disk


@fw.callbacks.register("fault")
class Fault(fw.Callback):
    """Causes a fault once, after a step.

    Args:
        kind: the name of a method of this class.
        rank: the process.
        step: the step.
        marker: a file that exists after the fault, so that the resumed run has none.
    """

    changes_training = False

    def __init__(self, kind: str, rank: int, step: int, marker: str):
        self.kind = kind
        self.rank = rank
        self.step = step
        self.marker = Path(marker)

    def on_step_end(self, trainer: Context) -> None:
        is_here = int(os.environ.get("RANK", "0")) == self.rank
        if trainer.state.step != self.step or self.marker.exists():
            return
        time.sleep(0.1)  # all processes look for the marker before one writes it
        if not is_here:
            return
        self.marker.write_text(str(time.time()))
        getattr(self, self.kind)()

    def exception(self) -> None:
        raise ValueError("this process fails")

    def memory(self) -> None:
        torch.empty(2**60, dtype=torch.uint8)

    def hang(self) -> None:
        while True:
            time.sleep(1)

    def term(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def interrupt_launcher(self) -> None:
        os.kill(os.getppid(), signal.SIGINT)

    def interrupt_twice(self) -> None:
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(0.5)
        os.kill(os.getppid(), signal.SIGINT)

    def term_launcher(self) -> None:
        os.kill(os.getppid(), signal.SIGTERM)

    def hang_up_launcher(self) -> None:
        os.kill(os.getppid(), signal.SIGHUP)
        os.kill(os.getppid(), signal.SIGHUP)

    def kill_launcher(self) -> None:
        os.kill(os.getppid(), signal.SIGKILL)

    def kill_data_worker(self) -> None:
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, signal.SIGKILL)

    def fill_disk(self) -> None:
        folder = self.marker.parent
        found = os.statvfs(folder)
        free = found.f_bavail * found.f_frsize
        (folder / "filler").write_bytes(bytes(max(free - LEFT * 4096, 0)))


@fw.datasets.register("slow_digits")
class SlowDigits(fw.Data):
    """Digits that data workers read one by one."""

    def __init__(self) -> None:
        digits = fw.datasets.build("digits")
        self.train = Items(digits.train)
        self.val = digits.val
        self.test = digits.test
        self.in_shape = digits.in_shape
        self.out_shape = digits.out_shape
        self.classes = digits.classes


class Items(torch.utils.data.Dataset):
    def __init__(self, split: fw.TensorSplit):
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.split[index]
