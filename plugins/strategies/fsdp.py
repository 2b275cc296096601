"""Fully sharded data parallel training: each process has a part of the parameters."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from framework import (
    PositiveFloat,
    PositiveInt,
    SettingError,
    Step,
    dtensors,
    processes,
    pytree,
    strategies,
    without_view,
)
from framework.contracts.strategy import Estimate, Memory, StateSaver

from .ddp import DDP

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WAIT_FACTOR = 10  # a process waits longer for the disks of the others than for their steps
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@strategies.register("fsdp")
class FSDP(DDP):
    """Each process has a part of the parameters, their gradients and the optimizer's state.

    It uses torch's `fully_shard` (FSDP2). The parameters of a unit of the model are gathered while
    it runs; their gradients are summed over all processes in the backward pass. Batch normalization
    uses the samples of all processes. Each process builds the whole model before its parameters are
    sharded, and reads a whole checkpoint before it resumes; each one saves its own part of a
    checkpoint. After the fit the parameters remain sharded: `Trainer.evaluate` and
    `predict` run the model, other code cannot; `Trainer.state_dict` has the full weights.

    Args:
        mesh: [shards], or [replicas, shards] to shard the parameters within each replica only;
            null: one part for each process.
        reshard: free the gathered parameters after the forward pass, and gather them again in the
            backward pass; auto: except those outside of all units, which are used first in it.
        units: which modules are gathered one at a time: patterns of their names, or the smallest
            number of parameters of a module. Then the units are the outermost modules of this size
            that are items of an nn.Sequential, nn.ModuleList or nn.ModuleDict, and not such a
            container themselves. A task that computes gradients in its step, such as a gradient
            penalty, needs [] if it uses a unit.
        param_dtype: number format of the gathered parameters and of the model's computations
            (inputs are converted to it, outputs to float32); null: that of the parameters. For
            autocast, use trainer.precision.
        reduce_dtype: number format in which gradients are summed; null: that of the gathered
            parameters.
        sync_batch_norm: as of `ddp`.
        timeout_seconds: longest time to wait for the other processes; ten times as long while a
            checkpoint is saved in the background.
    """

    def __init__(
        self,
        mesh: list[PositiveInt] | None = None,
        reshard: bool | Literal["auto"] = "auto",
        units: PositiveInt | list[str] = 1_000_000,
        param_dtype: Literal["fp32", "bf16"] | None = None,
        reduce_dtype: Literal["fp32", "bf16"] | None = None,
        sync_batch_norm: bool = True,
        timeout_seconds: PositiveFloat = 300.0,
    ):
        super().__init__(sync_batch_norm, timeout_seconds)
        if mesh is not None and len(mesh) not in (1, 2):
            raise SettingError(
                f"strategy.mesh={mesh}: expected [shards] or [replicas, shards], got {len(mesh)} "
                "numbers"
            )
        self.mesh = mesh
        self.reshard = reshard
        self.units = units
        self.param_dtype = None if param_dtype is None else DTYPES[param_dtype]
        self.reduce_dtype = None if reduce_dtype is None else DTYPES[reduce_dtype]
        self.root: Root | None = None  # of the model of the last fit
        self.saver: StateSaver | None = None

    def check_processes(self, count: int) -> None:
        if self.mesh is not None and math.prod(self.mesh) != count:
            raise SettingError(
                f"strategy.mesh={self.mesh}: expected numbers whose product is the number of "
                f"processes, {count}, got {math.prod(self.mesh)}"
            )

    def estimate(
        self,
        model: nn.Module,
        memory: Memory,
        processes: int,
        *,
        passes: float = 1.0,
        pairwise: bool = False,
    ) -> Estimate:
        self.check_processes(processes)
        check_model(model)
        replicas, shards = (1, processes) if self.mesh is None else (1, *self.mesh)[-2:]
        units = units_of(model, self.units)
        sizes = [self._gathered_bytes(list(unit.parameters())) for unit in units]
        parameters = list(model.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        all_bytes = self._gathered_bytes(parameters)
        root_bytes = all_bytes - sum(sizes)
        gradients = self._reduced_bytes(trained)

        gathered = all_bytes  # in the forward pass
        kept = all_bytes
        if self.reshard is not False:
            gathered += sum(sizes)  # in the backward pass
            kept = root_bytes + sum(sorted(sizes)[-2:])  # a unit, and the next one
        if self.reshard is True:
            gathered += root_bytes
        sent = (shards - 1) / shards * (gathered + gradients)
        sent += 2 * (replicas - 1) / replicas * gradients / shards

        own = largest_part(parameters, shards)
        share = own / max(sum(parameter.nbytes for parameter in parameters), 1)
        needed = replace(
            memory,
            parameters=own,
            gradients=largest_part(trained, shards),
            optimizer=None if memory.optimizer is None else round(memory.optimizer * share),
            communication=kept + max([root_bytes, *sizes]),  # and the gradients of a unit
        )
        return Estimate(needed, round(passes * sent))

    def _gathered_bytes(self, parameters: Sequence[nn.Parameter]) -> int:
        """Return the bytes of whole parameters, as they are gathered."""
        size = None if self.param_dtype is None else self.param_dtype.itemsize
        return sum(each.numel() * (size or each.element_size()) for each in parameters)

    def _reduced_bytes(self, parameters: Sequence[nn.Parameter]) -> int:
        """Return the bytes of whole gradients, as they are summed."""
        if self.reduce_dtype is None:
            return self._gathered_bytes(parameters)
        return sum(each.numel() * self.reduce_dtype.itemsize for each in parameters)

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        if self.world_size == 1:
            return
        if settings["compile"] != "off":
            raise SettingError(
                f"compile={settings['compile']}: expected off with strategy=fsdp, which gathers "
                "parameters during the forward pass"
            )
        if settings["micro_batch"] is not None:
            raise SettingError(
                f"micro_batch={settings['micro_batch']}: expected null with strategy=fsdp, whose "
                "processes must run the same number of forward passes; use a smaller batch with "
                "trainer.accumulate"
            )

    def prepare(self, model: nn.Module, optimizer: Optimizer, *, in_shards: bool = False) -> None:
        if self.world_size == 1:
            return
        if self.root is None or self.root.model is not model:
            check_model(model)
            check_optimizer(model, optimizer)
            self.share_weights(model, optimizer)
            self._shard(model, optimizer)
        if not in_shards:
            self.share_statistics(model)
        self.forward_is_collective = True

    def _shard(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Shard the parameters of a model, and replace them in the groups of its optimizer."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        first = next(model.parameters())
        names = {parameter: name for name, parameter in model.named_parameters()}
        shape = [self.world_size] if self.mesh is None else self.mesh
        dimensions = ("replicate", "shard")[-len(shape) :]
        mesh = init_device_mesh(first.device.type, tuple(shape), mesh_dim_names=dimensions)
        policy = MixedPrecisionPolicy(
            param_dtype=self.param_dtype,
            reduce_dtype=self.reduce_dtype,
            cast_forward_inputs=False,
        )
        units = units_of(model, self.units)
        root = Root(model, self.param_dtype)
        for unit in units:
            unit.register_forward_hook(outputs_without_views)
        for module in [*reversed(units), root]:  # a unit before the one that contains it
            reshard = module is not root if self.reshard == "auto" else self.reshard
            fully_shard(module, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
        for module in root.modules():
            if isinstance(module, FSDPModule):
                # The loss of a process is its share of the mean, so gradients are summed.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
                root.sharded_modules.append(module)
        parts = dict(model.named_parameters())
        replace_parameters(optimizer, {old: parts[name] for old, name in names.items()})
        self.root = root

    def forward(self, function: Callable[..., Any], model: Any, *args: Any) -> Any:
        if self.root is None or model is not self.root.model:
            return function(model, *args)
        with processes.broken_connections():
            return self.root.run(function, args)

    def full(self, value: Any, everywhere: bool = False) -> Any:
        return dtensors.full_values(value, keep=everywhere or self.is_main)

    def close(self) -> None:
        self.saver = None
        super().close()

    def state_saver(self) -> StateSaver | None:
        if self.saver is None and self.world_size > 1:
            from framework import distributed_checkpoint  # slow to import

            self.saver = distributed_checkpoint.DistributedSaver(WAIT_FACTOR * self.timeout_seconds)
        return self.saver

    def sum_gradients(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        return self.sum(loss.detach())  # the backward pass has summed the gradients


class Root(nn.Module):
    """Runs functions of a sharded model, such as the step of a task, as one forward pass.

    The parameters outside of all units are gathered while the function runs. So the function may
    call any method of the model, and not only its `forward`.

    Args:
        model: its parameters are sharded afterwards.
        dtype: to which the inputs of the model are converted; None to leave them unchanged.

    Attributes:
        sharded_modules: this one, and the units.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None):
        super().__init__()
        self.model = model
        self.sharded_modules: list[Any] = []
        self.running = False
        self.result: Any = None
        model.register_forward_pre_hook(self._check_running)
        if dtype is not None:
            model.register_forward_pre_hook(partial(converted_inputs, dtype), with_kwargs=True)
            model.register_forward_hook(converted_outputs)

    def run(self, function: Callable[..., Any], args: Sequence[Any]) -> Any:
        """Return the result of a function of the model and other arguments."""
        loss = self(function, args)
        result = self.result
        self.result = None
        if not torch.is_grad_enabled():  # otherwise the backward pass does it
            for module in self.sharded_modules:
                module.reshard()
        return result._replace(loss=loss) if isinstance(result, Step) else result

    def forward(self, function: Callable[..., Any], args: Sequence[Any]) -> Tensor | None:
        """Call a function; return the loss, whose backward pass begins that of the model."""
        self.running = True
        try:
            self.result = function(self.model, *args)
        finally:
            self.running = False
        if isinstance(self.result, Step) and isinstance(self.result.loss, Tensor):
            loss: Tensor = without_view(self.result.loss)
            return loss
        return None

    def _check_running(self, module: nn.Module, inputs: Any) -> None:
        if not self.running:
            raise SettingError(
                "strategy=fsdp: the model was called outside of a step, where each process has "
                "only a part of its parameters; call `trainer.strategy.forward(function, model, "
                "...)` in all processes"
            )


def outputs_without_views(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    """Return the outputs of a unit, on which the hooks of its backward pass are not lost."""
    return pytree.tree_map(without_view, outputs)


def converted_inputs(
    dtype: torch.dtype, module: nn.Module, args: Any, kwargs: Any
) -> tuple[Any, Any]:
    """Return the arguments of a model with floating-point tensors in another dtype."""
    return pytree.tree_map(partial(converted, dtype), args), pytree.tree_map(
        partial(converted, dtype), kwargs
    )


def converted_outputs(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    """Return the outputs of a model with floating-point tensors in float32."""
    return pytree.tree_map(partial(converted, torch.float32), outputs)


def converted(dtype: torch.dtype, value: Any) -> Any:
    """Return a floating-point tensor in another dtype; any other value as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    return value


def units_of(model: nn.Module, units: int | Sequence[str]) -> list[nn.Module]:
    """Return the modules whose parameters are gathered one module at a time.

    A module that shares a parameter with another part of the model is none.

    Args:
        model: the whole model.
        units: as for `FSDP`.

    Raises:
        SettingError: a pattern matches no module.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if isinstance(units, int):
        names = [name for name in modules if is_large_item(model, name, units)]
        names = [name for name in names if not is_inside(name, names)]
    else:
        names = []
        for pattern in units:
            matches = [name for name in modules if fnmatchcase(name, pattern)]
            if not matches:
                raise SettingError(f"strategy.units: no module of the model matches {pattern!r}")
            names += [name for name in matches if name not in names]
        names = [name for name in modules if name in names]  # in the order of the model
    owners: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, []).append(name)
    return [modules[name] for name in names if can_be_unit(name, modules[name], owners)]


def largest_part(parameters: Sequence[nn.Parameter], shards: int) -> int:
    """Return the bytes of the first part of parameters that are sharded along their first axis."""
    total = 0
    for parameter in parameters:
        rows = math.ceil(len(parameter) / shards)
        total += parameter.nbytes * rows // max(len(parameter), 1)
    return total


def is_large_item(model: nn.Module, name: str, smallest: int) -> bool:
    """Return whether a module is a large item of a container, and not a container itself."""
    parent = model.get_submodule(name.rpartition(".")[0])
    module = model.get_submodule(name)
    if not isinstance(parent, CONTAINERS) or isinstance(module, CONTAINERS):
        return False
    return sum(parameter.numel() for parameter in module.parameters()) >= smallest


def is_inside(name: str, names: Sequence[str]) -> bool:
    """Return whether a module is inside of one of several others."""
    return any(name.startswith(f"{other}.") for other in names)


def can_be_unit(name: str, module: nn.Module, owners: Mapping[nn.Parameter, Sequence[str]]) -> bool:
    """Return whether a module has parameters, and shares none with another part of the model."""
    if type(module).forward is nn.Module.forward:
        return False
    parameters = list(module.parameters())
    for parameter in parameters:
        if not all(owner.startswith(f"{name}.") for owner in owners[parameter]):
            return False
    return bool(parameters)


def check_model(model: nn.Module) -> None:
    """Raise SettingError for a model whose parameters cannot be sharded."""
    problem = None
    dtypes = set()
    for name, parameter in model.named_parameters():
        dtypes.add(parameter.dtype)
        if is_lazy(parameter):
            problem = f"{name} is uninitialized (a lazy module): call the model on a batch first"
        elif dtensors.is_dtensor(parameter):
            problem = f"{name} is sharded already, by another strategy"
        elif parameter.ndim == 0:
            problem = f"{name} has no axis to shard: give it the shape (1,)"
        elif parameter.is_complex():
            problem = f"{name} is complex"
        if problem is not None:
            break
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
    if problem is None and len(dtypes) > 1:
        problem = f"they have several dtypes: {', '.join(sorted(map(str, dtypes)))}"
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            problem = f"{name} has sparse gradients (sparse=True)"
    if problem is not None:
        raise SettingError(f"strategy=fsdp cannot shard the parameters of this model: {problem}")


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """Raise SettingError for an optimizer whose parameters cannot be replaced by sharded ones."""
    own = set(model.parameters())
    for group in optimizer.param_groups:
        if not own.issuperset(group["params"]):
            raise SettingError(
                "strategy=fsdp: the optimizer has parameters that are not the model's, which it "
                "cannot shard"
            )
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.ndim > 0 and value.shape != parameter.shape:
                raise SettingError(
                    f"strategy=fsdp cannot shard the state of {type(optimizer).__name__}: {name} "
                    f"has the shape {tuple(value.shape)}, its parameter {tuple(parameter.shape)}"
                )


def replace_parameters(optimizer: Optimizer, parts: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Replace the parameters of an optimizer and their state by the parts of this process.

    Args:
        optimizer: over the parameters of a model, or some of them.
        parts: the sharded parameter of each of its parameters.
    """
    for group in optimizer.param_groups:
        group["params"] = [parts[parameter] for parameter in group["params"]]
        if group.get("fused") and not isinstance(optimizer, dtensors.FUSED_OPTIMIZERS):
            group["fused"] = False
    for parameter, values in list(optimizer.state.items()):
        part = parts[parameter]
        del optimizer.state[parameter]
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == part.shape:
                values[name] = dtensors.distribute_like(value, part)
        optimizer.state[part] = values
