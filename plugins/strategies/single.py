"""One process, and the choice by the number of processes."""

from framework import Strategy, processes, strategies

from .ddp import DDP


@strategies.register("single")
class Single(Strategy):
    """One process."""


@strategies.register("auto")
def auto() -> Strategy:
    """Choose single for one process, and ddp for several."""
    return DDP() if processes.launched().world_size > 1 else Single()
