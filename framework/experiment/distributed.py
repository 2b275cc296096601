"""A run with several processes: connecting them, and what all of them must have in common."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from framework import errors
from framework.composition.spec import Spec
from framework.contracts.strategy import Strategy
from framework.contracts.task import Task
from framework.data.dataset import Data
from framework.errors import FrameworkError, RunError, SettingError
from framework.errors.user_code import describe
from framework.registry.discovery import package_version
from framework.runtime import processes
from framework.runtime.device import find_device
from framework.training.validation import check_shared_batch

from .resumption.config_changes import fingerprint
from .resumption.resume import Resumed, open_folder
from .run_facts import data_facts

DIFFERENT = {
    "config": "settings",
    "framework": "version of framework",
    "torch": "version of torch",
    "data": "data",
}


def check_processes(spec: Spec, count: int) -> None:
    """Raise SettingError or DataError if an experiment cannot have this number of processes."""
    if spec.parts["strategy"] is not None:
        strategy: Strategy = spec.parts["strategy"]()
        strategy.check_processes(count)
    devices = spec.sections["trainer"]["devices"]
    if devices is not None and devices != count:
        raise SettingError(
            f"trainer.devices={devices}: expected {count}, the number of processes that "
            "torchrun has started; it can be left out"
        )
    check_shared_batch(spec.sections["loader"]["batch_size"], count)


@contextmanager
def connected(spec: Spec) -> Iterator[Strategy]:
    """Connect the processes of a run in a block."""
    check_processes(spec, processes.launched().world_size)
    strategy: Strategy = spec.parts["strategy"]() if spec.parts["strategy"] else Strategy()
    try:
        strategy.start(find_device(spec.sections["trainer"]["device"]))
        yield strategy
    except Exception as error:
        processes.claim_report(error, describe_error(error))  # before the others notice its end
        raise
    except BaseException as error:  # a signal, of which nothing is printed
        processes.claim_report(error)
        raise
    finally:
        strategy.close()


def describe_error(error: Exception) -> str:
    """Return an error in one line."""
    if isinstance(error, FrameworkError):
        return str(error).partition("\n")[0]
    return describe(error)


def be_silent(text: str) -> None:
    """Print nothing, in place of the main process's function."""


def open_shared(run: Path, spec: Spec, strategy: Strategy) -> Resumed:
    """Open the folder of a run in all processes; the main one locks it first (collective)."""
    if strategy.is_main:
        resumed = open_folder(run, spec)
        strategy.from_main(None)
        return resumed
    strategy.from_main(None)
    return open_folder(run, spec, writes=False)


def agreed_signals(strategy: Strategy, received: Sequence[int]) -> Sequence[int]:
    """Return the signals of the first process that has received one (collective).

    Each process calls it after it has written its files. With one process this is its own list,
    which may grow.
    """
    if strategy.world_size == 1:
        return received
    for signals in strategy.gather(list(received)):
        if signals:
            return list(signals)
    return []


def check_alike(
    strategy: Strategy, spec: Spec, data: Data, task: Task, out_shape: Sequence[int]
) -> None:
    """Raise RunError if the processes have other settings, versions or data (collective)."""
    if strategy.world_size == 1:
        return
    facts = data_facts(data, task, out_shape)
    own: dict[str, Any] = {
        "config": fingerprint(spec.tree),
        "framework": package_version("framework"),
        "torch": torch.__version__,
        "data": errors.short(facts.get("content")),
    }
    for rank, other in enumerate(strategy.gather(own)):
        for name, value in own.items():
            if other[name] != value:
                raise RunError(
                    f"process {rank} has another {DIFFERENT[name]} than process {strategy.rank}: "
                    f"{other[name]} in place of {value}"
                )
