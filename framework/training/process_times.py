"""The time of each process of a run: its own work, communication, and waiting for the others.

Each process counts the seconds that it spends in collective operations (see
`processes.communicating`). Such an operation ends when the last process has joined it, so the
process that spends the least time in them is the slowest one: the others wait for it. Its time is
the estimate of communication proper, and what another process spends more is waiting. If the
processes are slow by turns, a part of the waiting counts as communication.
"""

from dataclasses import dataclass

import torch

from framework.contracts.strategy import Strategy
from framework.runtime.clock import COMMUNICATION, WAITING_FOR_DATA, Clock

PROCESS_SCALARS = ("communication", "waiting", "slowest_process")


@dataclass
class ProcessTimes:
    """Seconds of each process, by rank.

    Attributes:
        seconds: in all.
        collective: in collective operations, waiting included.
        data: waiting for data.
    """

    seconds: list[float]
    collective: list[float]
    data: list[float]

    def work(self) -> list[float]:
        """Return the seconds of each process outside of collective operations."""
        pairs = zip(self.seconds, self.collective, strict=True)
        return [seconds - collective for seconds, collective in pairs]

    def waiting(self) -> list[float]:
        """Return the seconds that each process waits for others."""
        least = min(self.collective)
        return [seconds - least for seconds in self.collective]

    def slowest(self) -> int:
        """Return the rank of the process with the most work."""
        work = self.work()
        return work.index(max(work))

    def slower(self) -> float:
        """Return by which share the work of the slowest process takes longer than the mean."""
        return relative_excess(self.work(), self.slowest())

    def is_slow_by_data(self) -> bool:
        """Return whether most of the slowest process's excess is waiting for data."""
        work = self.work()
        slowest = self.slowest()
        return excess(self.data, slowest) > excess(work, slowest) / 2

    def transfer_share(self) -> float:
        """Return the share of communication, without waiting, in the time of the processes."""
        return len(self.seconds) * min(self.collective) / max(sum(self.seconds), 1e-9)

    def waiting_share(self) -> float:
        """Return the share of waiting for others in the time of the processes."""
        return sum(self.waiting()) / max(sum(self.seconds), 1e-9)

    def scalars(self) -> dict[str, float]:
        """Return the values to log, by the names of `PROCESS_SCALARS`."""
        values = (self.transfer_share(), self.waiting_share(), float(self.slowest()))
        return dict(zip(PROCESS_SCALARS, values, strict=True))


def excess(values: list[float], index: int) -> float:
    """Return by how much a value is larger than the mean."""
    return values[index] - sum(values) / len(values)


def relative_excess(values: list[float], index: int) -> float:
    """Return by which share of the mean a value is larger than the mean."""
    return excess(values, index) / max(sum(values) / len(values), 1e-9)


class ProcessClock:
    """Reads the times of all processes from their clocks.

    Args:
        strategy: of the run.
        clock: of this process.
    """

    def __init__(self, strategy: Strategy, clock: Clock):
        self.strategy = strategy
        self.clock = clock
        self.began = self.read()
        self.last = self.began

    def read(self) -> torch.Tensor:
        """Return the times of this process, since its clock began, in the order of ProcessTimes."""
        spent = self.clock.seconds
        collective = spent.get(COMMUNICATION, 0.0)
        data = spent.get(WAITING_FOR_DATA, 0.0)
        return torch.tensor([self.clock.elapsed, collective, data], dtype=torch.float64)

    def total(self) -> ProcessTimes:
        """Return the times of all processes since this object was made (collective)."""
        return self.gathered(self.read() - self.began)

    def since_last_call(self) -> ProcessTimes:
        """Return the times of all processes since the last call (collective)."""
        now = self.read()
        times = self.gathered(now - self.last)
        self.last = now
        return times

    def gathered(self, own: torch.Tensor) -> ProcessTimes:
        """Return the times of all processes, by one small sum (collective)."""
        table = torch.zeros(self.strategy.world_size, len(own), dtype=torch.float64)
        table[self.strategy.rank] = own
        seconds, collective, data = self.strategy.sum(table).T.tolist()
        return ProcessTimes(seconds, collective, data)
