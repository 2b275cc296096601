"""Strategies: how the processes of a run share its work.

    @strategies.register("ddp")
    class DDP(Strategy): ...

All communication between processes goes through the strategy of a run. `Strategy` itself is that of
a single process: nothing is sent. A strategy for several processes overrides all methods but
`sum_pairwise` and `from_main`, which use `gather`, and `state_saver` if it shards the state.

The methods marked "collective" must be called by every process of the run, in the same order.
Otherwise the processes wait for each other until the timeout. So they may depend only on values
that are the same in all processes, such as `state.step` or `state.metrics`, and never on the time,
a signal, or an error in one process.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from framework.runtime.dtensors import TensorPart
from framework.runtime.pairwise import pairwise_sum


@dataclass
class Memory:
    """Estimated bytes of training in a process, without the buffers of kernels and the allocator.

    Attributes:
        optimizer: its state after a step; None if it is unknown.
        activations: kept by the forward pass of a batch, or of the part of a batch that the process
            has, for the backward pass, with the batch.
        communication: other tensors for it, such as gathered parameters.
    """

    parameters: int
    buffers: int
    gradients: int
    optimizer: int | None
    activations: int
    total: int = 0
    communication: int = 0

    def __post_init__(self) -> None:
        self.total = self.parameters + self.buffers + self.gradients + self.activations
        self.total += (self.optimizer or 0) + self.communication


@dataclass
class Estimate:
    """What a run with several processes needs.

    Attributes:
        memory: of the process that needs most.
        sent: bytes that a process sends in a step with ring algorithms, without the statistics of
            batch normalization and other small values.
    """

    memory: Memory
    sent: int


class StateSaver(Protocol):
    """Writes the parts of sharded tensors from all processes.

    Its methods are collective. A background thread of each process calls them while the processes
    train, so they must not use the connections of the strategy.
    """

    def gather(self, value: Any) -> list[Any]:
        """Return a value of each process in plain types, in the order of their ranks."""

    def write(self, folder: Path, parts: Sequence[TensorPart]) -> dict[str, list[str]]:
        """Write the parts of all processes into safetensors files.

        Each file has the offsets of its parts in its metadata, as a JSON text in
        "DCP_SHARDING_INFO": {name: {"saved_offsets": [...]}}.

        Args:
            folder: an existing one, the same for all processes.
            parts: those of this process, of the same tensors in all processes.

        Returns:
            The files that this process has written, with the names of their tensors. A file has
            either tensors of the model or others.

        Raises:
            Exception: that of the first process that cannot write, in all processes.
        """


class Strategy:
    """Runs in a single process, and is the base of strategies for several processes.

    Attributes:
        rank: the number of this process, from 0.
        world_size: the number of processes.
        forward_is_collective: whether a forward pass in training communicates, so that all
            processes must run the same number of them; known after `prepare`.
    """

    rank: int = 0
    world_size: int = 1
    forward_is_collective: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this is the main process, which writes files and prints."""
        return self.rank == 0

    def estimate(
        self,
        model: nn.Module,
        memory: Memory,
        processes: int,
        *,
        passes: float = 1.0,
        pairwise: bool = False,
    ) -> Estimate:
        """Return what a run with several processes needs; for `framework plan`, before `start`.

        Args:
            model: in a single process; it stays unchanged.
            memory: of a process that has the whole model and its part of a batch.
            processes: their number.
            passes: forward and backward passes in a step.
            pairwise: whether gradients are summed by `sum_pairwise`.

        Raises:
            SettingError: the strategy cannot train the model in this number of processes.
        """
        return Estimate(memory, 0)

    def check_processes(self, count: int) -> None:
        """Check that the strategy is one for some number of processes, before `start`.

        Args:
            count: the number of processes of the run.

        Raises:
            SettingError: it is not.
        """

    def start(self, device: torch.device) -> torch.device:
        """Connect the processes before anything else is called; return the device of this one.

        Args:
            device: the device that the user has chosen; one without an index stands for all of its
                type, such as cuda.

        Raises:
            SettingError: the processes or their devices are not available.
        """
        return device

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Check the settings of a Trainer, after `start`.

        Raises:
            SettingError: the strategy does not support one of them.
        """

    def close(self) -> None:
        """Disconnect this process. The other processes need not be ready."""

    def prepare(self, model: nn.Module, optimizer: Optimizer, *, in_shards: bool = False) -> None:
        """Give all processes the same weights, or each its part of them (collective).

        It is called once in each fit, before a resumed state is loaded.

        Args:
            model: the model in training.
            optimizer: over its parameters.
            in_shards: whether the step is computed in shards (`trainer.shards`). Each of them has
                its own statistics of batch normalization and buffers; otherwise the processes share
                these.

        Raises:
            SettingError: the strategy does not support the model or the optimizer.
        """

    def finish(self, model: nn.Module) -> None:
        """Undo what `prepare` has changed in the modules of the model, after the fit."""

    def forward(self, function: Callable[..., Any], model: Any, *args: Any) -> Any:
        """Return function(model, *args), which runs the model (collective for a sharded model).

        Each call of the model goes through this method, so that a strategy can provide its
        parameters meanwhile. If gradients are enabled, a backward pass must follow.

        Args:
            function: any function of the model, such as `task.step`.
            model: that of the fit, or any other one.
            args: the further arguments of the function.
        """
        return function(model, *args)

    def full(self, value: Any, everywhere: bool = False) -> Any:
        """Return a value with full tensors in place of sharded ones (collective).

        Args:
            value: plain types and tensors; dicts, lists and tuples of them.
            everywhere: whether all processes need the result; if not, sharded tensors become None
                in all processes but the main one.
        """
        return value

    def state_saver(self) -> StateSaver | None:
        """Return the object that saves a sharded state from all processes (collective).

        None: the main process saves the state, after `full` has gathered it.
        """
        return None

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes (collective)."""
        return tensor

    def sum_pairwise(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes, added in fixed order (collective).

        Neighboring processes are added first: ((0 + 1) + (2 + 3)), as in `PairwiseSum`. The number
        of processes is a power of two.
        """
        if self.world_size == 1:
            return tensor
        return pairwise_sum(self.gather(tensor)).to(tensor.device)

    def gather(self, value: Any) -> list[Any]:
        """Return a value of each process, in the order of their ranks (collective).

        Args:
            value: plain types and tensors of any size; the results are on the CPU.
        """
        return [value]

    def from_main(self, value: Any) -> Any:
        """Return the value of the main process (collective)."""
        return self.gather(value)[0]

    def gather_rows(self, tensor: Tensor) -> Tensor:
        """Return the rows of all processes, in the order of their ranks (collective).

        Gradients flow to the rows of each process; the backward pass is collective too.
        """
        return tensor

    def share_buffers(self) -> None:
        """Give all processes the buffers that the main one has changed in a step (collective).

        The statistics of batch normalization are left out: they are equal already.
        """

    def sum_gradients(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        """Sum the gradients of all processes in place; return the sum of the losses (collective).

        Args:
            parameters: those of the optimizer. A parameter has no gradient afterwards if it had
                none in any process.
            loss: shape (), the share of this process in the mean loss.
        """
        return loss


@runtime_checkable
class BatchStatistics(Protocol):
    """A module that normalizes by sums over the batch in training.

    A strategy for several processes replaces the method by one that sums over the batches of all
    processes (collective), so that the statistics are those of the global batch.
    """

    def sum_over_batch(self, sums: Tensor) -> Tensor:
        """Return the sums over the global batch, with gradients; here the argument.

        Args:
            sums: over the batch of this process.
        """


@runtime_checkable
class RowBatchNorm(Protocol):
    """A batch norm of torch with a `forward` of its own, which calls `normalize` for the rows.

    A strategy for several processes replaces the method by one that uses the rows of all processes.
    """

    def normalize(self, rows: Tensor) -> Tensor:
        """Return the result for rows (rows, channels)."""
