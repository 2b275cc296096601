"""A run with several processes: connecting them, and what all of them must have in common."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from framework import errors
from framework.composition.spec import Spec
from framework.contracts.strategy import Strategy
from framework.errors import RunError
from framework.registry.discovery import package_version
from framework.runtime import processes
from framework.runtime.device import find_device

from .config_changes import fingerprint
from .resume import Resumed, open_folder
from .run_facts import data_facts

if TYPE_CHECKING:
    from .experiment import Experiment

DIFFERENT = {
    "config": "settings",
    "framework": "version of framework",
    "torch": "version of torch",
    "data": "data",
}


@contextmanager
def connected(spec: Spec) -> Iterator[Strategy]:
    """Connect the processes of a run in a block."""
    strategy: Strategy = spec.parts["strategy"]() if spec.parts["strategy"] else Strategy()
    try:
        strategy.start(find_device(spec.sections["trainer"]["device"]))
        yield strategy
    except BaseException as error:
        processes.claim_report(error)  # before the others notice that this process ends
        raise
    finally:
        strategy.close()


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


def check_alike(strategy: Strategy, built: "Experiment") -> None:
    """Raise RunError if the processes have other settings, versions or data (collective)."""
    if strategy.world_size == 1:
        return
    facts = data_facts(built.data, built.task, built.out_shape)
    own: dict[str, Any] = {
        "config": fingerprint(built.spec.tree),
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
