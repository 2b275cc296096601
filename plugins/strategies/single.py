"""One process, and the choice by the number of processes."""

from torch import nn

from framework import SettingError, Strategy, processes, strategies
from framework.contracts.strategy import Estimate, Memory

from .ddp import DDP


@strategies.register("single")
class Single(Strategy):
    """One process."""

    def check_processes(self, count: int) -> None:
        if count > 1:
            raise SettingError(
                f"strategy=single: expected a strategy for {count} processes, such as ddp"
            )


class Alone(Strategy):
    """One process of strategy=auto, which would use ddp for several."""

    def estimate(
        self,
        model: nn.Module,
        memory: Memory,
        processes: int,
        *,
        passes: float = 1.0,
        pairwise: bool = False,
    ) -> Estimate:
        return DDP().estimate(model, memory, processes, passes=passes, pairwise=pairwise)


@strategies.register("auto")
def auto() -> Strategy:
    """Choose single for one process, and ddp for several."""
    return DDP() if processes.launched().world_size > 1 else Alone()
