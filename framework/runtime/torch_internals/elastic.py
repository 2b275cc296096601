"""torch's elastic agent, which starts the processes of a run on this machine and watches them.

Private over `torch.distributed.launcher`: how long the agent waits for processes to end. It waits
30 s after one has failed, and as long after a signal, in which a run may still write a large
checkpoint. Without the private names it does that.
"""

import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch.distributed.elastic.agent.server.api import WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from framework.system.signals import blocked

POLL_SECONDS = 0.1
PATIENCE = 8.0
"""Seconds from the end of the first process to the moment when the others are killed."""


class Agent(LocalElasticAgent):
    """Starts processes, and ends all of them soon after one has failed.

    Args:
        poll: called regularly while the processes run.
        settings: as for LocalElasticAgent.
    """

    def __init__(self, poll: Callable[[], None], **settings: Any):
        super().__init__(**settings)
        self.poll = poll
        self.closed: set[int] = set()
        """The ranks of the processes that this object has ended because of another one."""

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        with blocked():  # a process that is starting inherits this, see `guard_start`
            pids: dict[int, Any] = super()._start_workers(worker_group)
            context: Any = self._pcontext

            def close(death_sig: signal.Signals | None = None, timeout: float = 0.0) -> None:
                processes = processes_of(context)
                for rank, process in enumerate(processes):
                    if process.poll() is None:
                        self.closed.add(rank)
                end_processes(processes, death_sig or signal.SIGTERM)

            if hasattr(context, "subprocess_handlers"):
                context.close = close
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> Any:
        self.poll()
        return super()._monitor_workers(worker_group)

    def kill(self) -> None:
        """Kill the processes that still run, and the workers of those that were killed."""
        for process in processes_of(self._pcontext):
            status = process.poll()
            if status is None or status < 0:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def processes_of(context: Any) -> list[Any]:
    """Return the processes of a context of the agent."""
    handlers: Mapping[int, Any] = getattr(context, "subprocess_handlers", {})
    return [handlers[rank].proc for rank in sorted(handlers)]


def end_processes(processes: Sequence[Any], number: int) -> None:
    """Send a signal to processes, and wait for their end.

    Soon after the first has ended the others are killed: they cannot continue without it.
    """
    for process in processes:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
    deadline = None
    while True:
        running = [process for process in processes if process.poll() is None]
        if not running:
            return
        if deadline is None and len(running) < len(processes):
            deadline = time.monotonic() + PATIENCE
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS / 2)
    for process in running:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_processes(
    number: int, arguments: Sequence[str], logs: str, poll: Callable[[], None]
) -> dict[int, int]:
    """Run this Python in several processes, and wait for their end.

    Args:
        number: of processes.
        arguments: of Python.
        logs: a folder for files of the agent.
        poll: called regularly while they run.

    Returns:
        The exit status by rank of the processes that have failed, without those that were ended
        because of them. That of a process that was killed is the negative number of the signal.

    Raises:
        SignalException: a handler of this process raised it.
    """
    silence_loggers("torch.distributed.")
    rendezvous = RendezvousParameters(
        backend="c10d",
        endpoint="127.0.0.1:0",
        run_id=uuid.uuid4().hex,
        min_nodes=1,
        max_nodes=1,
        local_addr="127.0.0.1",
        is_host="true",
    )
    spec = WorkerSpec(
        role="default",
        local_world_size=number,
        entrypoint=sys.executable,
        args=tuple(arguments),
        rdzv_handler=get_rendezvous_handler(rendezvous),
        max_restarts=0,
        monitor_interval=POLL_SECONDS,
        local_addr="127.0.0.1",
    )
    agent = Agent(poll, spec=spec, logs_specs=DefaultLogsSpecs(log_dir=logs))
    try:
        result = agent.run()
    finally:
        agent.kill()
        with suppress(Exception):  # it closes a store in this process
            spec.rdzv_handler.shutdown()
    statuses = {}
    for rank, failure in result.failures.items():
        if rank not in agent.closed:
            statuses[rank] = failure.exitcode
    return statuses


def silence_loggers(prefix: str) -> None:
    """Let loggers print nothing: each has a level of its own, so that of a parent has no effect."""
    for name, logger in logging.Logger.manager.loggerDict.items():
        if name.startswith(prefix) and isinstance(logger, logging.Logger):
            logger.setLevel(logging.CRITICAL)


__all__ = ["SignalException", "run_processes"]
