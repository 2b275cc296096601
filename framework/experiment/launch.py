"""Start the processes of a run on this machine: `framework train trainer.devices=4`.

torch's elastic launcher starts them, as `torchrun --standalone` does. On several machines, start
`torchrun ... -m framework train ...` on each of them instead.
"""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from framework.composition.spec import Spec
from framework.errors import FrameworkError
from framework.runtime.processes import launched

POLL_SECONDS = 0.1


class ProcessFailed(FrameworkError):
    """A process of the run has ended without a message of its own."""

    exit_status = 1


def is_launcher(spec: Spec) -> bool:
    """Return whether this process has to start those of the run."""
    devices = spec.sections["trainer"]["devices"]
    return devices is not None and devices > 1 and launched().world_size == 1


def launch(devices: int, words: Sequence[str]) -> int:
    """Run `framework train` in several processes, and return the exit status.

    Args:
        devices: the number of processes.
        words: the arguments of the command.

    Raises:
        ProcessFailed: a process was killed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    threads = max(1, (os.cpu_count() or 1) // devices)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=POLL_SECONDS,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "framework", "train", *words)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode  # it has printed its error
        name = signal.Signals(-failure.exitcode).name
        raise ProcessFailed(
            f"process {rank} of {devices} was ended by {name}; the same command with resume=auto "
            "continues the run from its last checkpoint"
        ) from None
    except SignalException as error:
        return 128 + error.sigval
    return 0
