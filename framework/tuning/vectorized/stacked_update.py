"""The parameters, gradients and optimizer state of many trials as rows of matrices.

The model and optimizer of a trial hold views of the rows, so that checkpoints, validation and
callbacks see the tensors of a single trial.
"""

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from framework.contracts.pure_optimizer import PureUpdate, pure_updates, tensors_of
from framework.errors import FrameworkError
from framework.errors.user_code import text_of
from framework.runtime.torch_internals import foreach
from framework.runtime.torch_internals.module_contents import (
    direct_buffers,
    direct_parameters,
    has_gradient_hooks,
)
from framework.runtime.torch_internals.optimizer_hooks import has_step_hooks
from framework.training.acceleration.fused_update import FusedUpdate

CACHE_NUMBERS = 2**16  # numbers updated at once on a CPU: with their state they fit in its cache
ADVICE = "which is not possible for stacked trials: use hydra/launcher=one_by_one"
TensorSlot = tuple[MutableMapping[str, Any], str]
"""A mapping in which a module holds a tensor, and its key."""
NOT_SETTINGS = ("params", "param_names")  # keys of an optimizer's group


class NotStackable(FrameworkError):
    """Trials cannot be trained as one stacked model; the message gives the reason."""


class ParameterSlot(NamedTuple):
    """The place of a parameter in a row."""

    name: str  # in the model
    shape: torch.Size
    columns: slice


class GroupSlot(NamedTuple):
    """The place of an optimizer's parameter group in a row."""

    columns: slice
    first: int  # index of its first parameter
    size: int  # number of parameters


class TrialTensors:
    """The model and optimizer of a trial, and where they hold tensors."""

    def __init__(self, model: nn.Module, optimizer: Optimizer):
        self.model = model
        self.optimizer = optimizer
        self.parameters = trained_parameters(optimizer)
        self.slots = tensor_slots(model)

    def set_buffer(self, name: str, tensor: Tensor) -> None:
        """Replace a buffer in all modules that share it."""
        for owner, key in self.slots[name]:
            owner[key] = tensor

    def release(self, buffers: Iterable[str]) -> None:
        """Replace views of the rows by own tensors."""
        for parameter in self.model.parameters():
            parameter.data = parameter.data.clone()
            parameter.grad = None
        for name in buffers:
            self.set_buffer(name, self.model.get_buffer(name).clone())
        for state in self.optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    state[name] = value.clone()


class StackedState:
    """Takes over the tensors of models and optimizers; row r of each matrix belongs to trial r.

    Attributes:
        trials: the models and optimizers.
        weights: the trained parameters, (trials, numbers).
        gradients: their gradients, (trials, numbers).
        fixed: parameters that are not trained, (trials, ...) by name.
        buffers: the buffers, (trials, ...) by name.
        leaves: the trained parameters as (trials, ...) by name, for autograd.
        per_number: optimizer state of each number, (trials, numbers) by name.
        per_parameter: optimizer state of each parameter, (trials, parameters) by name.
        kernel_arguments: views for the fused kernel, cached between steps.

    Raises:
        NotStackable: the tensors of trials do not match, or their optimizer has no update for rows.
    """

    def __init__(self, models: Sequence[nn.Module], optimizers: Sequence[Optimizer]):
        self.update_rows = find_update(optimizers[0])
        check_optimizers(models, optimizers)
        self.slots = list(parameter_slots(models[0], optimizers[0]))
        self.trials = list(map(TrialTensors, models, optimizers))
        first = self.trials[0]
        check_same_shapes(self.trials)
        self.weights = torch.stack([to_vector(trial.parameters) for trial in self.trials])
        self.gradients = torch.zeros_like(self.weights)
        trained = set(first.parameters)
        self.fixed: dict[str, Tensor] = {}
        for name, parameter in first.model.named_parameters():
            if parameter not in trained:
                values = [model.get_parameter(name).detach() for model in models]
                self.fixed[name] = torch.stack(values)
        self.buffers: dict[str, Tensor] = {}
        for name, _ in first.model.named_buffers():
            self.buffers[name] = torch.stack([model.get_buffer(name) for model in models])
        self.per_number: dict[str, Tensor] = {}
        self.per_parameter: dict[str, Tensor] = {}
        self.has_state = any(map(has_tensors, optimizers))  # true for a resumed sweep
        self._attach()
        if self.has_state:
            self.adopt_state()

    def __len__(self) -> int:
        return len(self.trials)

    def _attach(self) -> None:
        """Make the tensors of the trials views of the rows, and create the leaves."""
        self.groups = list(self._group_slots())
        self.leaves: dict[str, Tensor] = {}
        for slot in self.slots:
            self.leaves[slot.name] = self._all_trials(self.weights, slot).detach().requires_grad_()
        self.gradient_views = [self._all_trials(self.gradients, slot) for slot in self.slots]
        for row, trial in enumerate(self.trials):
            for parameter, slot in zip(trial.parameters, self.slots, strict=True):
                parameter.data = self._one_trial(self.weights, row, slot)
            for name, stacked in self.fixed.items():
                trial.model.get_parameter(name).data = stacked[row]
            for name, stacked in self.buffers.items():
                trial.set_buffer(name, stacked[row])
        self._attach_state()

    def _group_slots(self) -> Iterator[GroupSlot]:
        first = 0
        for group in self.trials[0].optimizer.param_groups:
            size = len(group["params"])
            start = self.slots[first].columns.start
            stop = self.slots[first + size - 1].columns.stop
            yield GroupSlot(slice(start, stop), first, size)
            first += size

    def _all_trials(self, matrix: Tensor, slot: ParameterSlot) -> Tensor:
        return matrix[:, slot.columns].view(len(self), *slot.shape)

    def _one_trial(self, matrix: Tensor, row: int, slot: ParameterSlot) -> Tensor:
        return matrix[row, slot.columns].view(slot.shape)

    # gradients

    def differentiate(self, losses: Tensor, add: bool = False) -> None:
        """Compute the gradients of each trial's loss in its row.

        Args:
            losses: shape (trials,).
            add: whether to add the gradients to those in the row.
        """
        leaves = list(self.leaves.values())
        gradients = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
        targets = []
        sources = []
        for target, gradient in zip(self.gradient_views, gradients, strict=True):
            if gradient is not None:
                targets.append(target)
                sources.append(gradient)
            elif not add:
                target.zero_()
        if add:
            foreach.add_(targets, sources)
        else:
            foreach.copy_(targets, sources)

    def attach_gradients(self, row: int) -> None:
        """Set the `grad` of a trial's parameters, for a callback that reads or changes it."""
        for parameter, slot in zip(self.trials[row].parameters, self.slots, strict=True):
            parameter.grad = self._one_trial(self.gradients, row, slot)

    def detach_gradients(self, row: int) -> bool:
        """Read and remove the `grad` of a trial's parameters.

        Returns:
            Whether they have one: without gradients, a trial is not updated.

        Raises:
            FrameworkError: only some of them have one.
        """
        parameters = self.trials[row].parameters
        has_gradients = any(parameter.grad is not None for parameter in parameters)
        for parameter, slot in zip(self.trials[row].parameters, self.slots, strict=True):
            view = self._one_trial(self.gradients, row, slot)
            if has_gradients and parameter.grad is None:
                raise FrameworkError(f"the gradient of {slot.name} was removed, {ADVICE}")
            if parameter.grad is not None and parameter.grad.data_ptr() != view.data_ptr():
                view.copy_(parameter.grad)
            parameter.grad = None
        return has_gradients

    # update

    @torch.no_grad()
    def update(self, skipped: Sequence[int] = ()) -> None:
        """Apply the optimizer update to all trials except the rows in `skipped`."""
        if not self.has_state:
            self._first_update(skipped)
            return
        rows = [row for row in range(len(self)) if row not in skipped]
        for number, slot in enumerate(self.groups):
            groups = [trial.optimizer.param_groups[number] for trial in self.trials]
            self.update_rows(self, groups, rows, slot)
        for counts in self.per_parameter.values():
            counts.copy_(counts[:, self._first_of_group()])

    def _first_of_group(self) -> list[int]:
        """Return for each parameter the first one of its group, whose state all of them have."""
        owners: list[int] = []
        for slot in self.groups:
            owners += [slot.first] * slot.size
        return owners

    def _first_update(self, skipped: Sequence[int]) -> None:
        """Call each `optimizer.step()`, which creates the state, and take the state over."""
        for row, trial in enumerate(self.trials):
            before = self.weights[row].clone()
            self.attach_gradients(row)
            trial.optimizer.step()
            self.detach_gradients(row)
            if row in skipped:  # it needs the state before a first step
                self.weights[row] = before
                for state in trial.optimizer.state.values():
                    for tensor in tensors_of(state).values():
                        tensor.zero_()
        self.adopt_state()
        self.has_state = True

    def adopt_state(self) -> None:
        """Take over the state of the optimizers; all of them have made a step, or none has."""
        states = []  # by trial and parameter
        for each in self.trials:
            state = each.optimizer.state
            states.append([tensors_of(state.get(parameter)) for parameter in each.parameters])
        names = set(states[0][0])
        for trial in states:
            if any(set(tensors) != names for tensors in trial):
                raise NotStackable("their optimizer keeps different state for some parameters")
        for name in names:
            values = []
            for trial in states:
                of_trial = [tensors[name] for tensors in trial]
                values.append(of_trial)
            self._adopt(name, values)
        self._attach_state()

    def _adopt(self, name: str, values: Sequence[list[Tensor]]) -> None:
        """Take over one tensor of the optimizer state of each parameter."""
        first = values[0]
        pairs = zip(first, self.slots, strict=True)
        if all(value.shape == slot.shape for value, slot in pairs):
            self.per_number[name] = torch.stack([to_vector(trial) for trial in values])
            return
        if any(value.ndim > 0 for value in first):
            raise NotStackable(f"the optimizer state {name} has another shape than the parameters")
        stacked = torch.stack([torch.stack(trial) for trial in values])
        stacked = stacked.to(self.weights.device)
        if not torch.equal(stacked, stacked[:, self._first_of_group()]):
            raise NotStackable("some of their parameters had fewer optimizer steps than others")
        self.per_parameter[name] = stacked

    def _attach_state(self) -> None:
        """Make the state of the optimizers views of the rows."""
        self.kernel_arguments: dict[Any, Any] = {}
        for row, trial in enumerate(self.trials):
            slots = enumerate(self.slots)
            for parameter, (number, slot) in zip(trial.parameters, slots, strict=True):
                state = {}
                for name, matrix in self.per_number.items():
                    state[name] = self._one_trial(matrix, row, slot)
                for name, matrix in self.per_parameter.items():
                    state[name] = matrix[row, number]
                if state:
                    trial.optimizer.state[parameter].update(state)

    # selection of trials

    def select(self, rows: Sequence[int]) -> None:
        """Keep some of the trials; the others get their own tensors."""
        for row, trial in enumerate(self.trials):
            if row not in rows:
                trial.release(self.buffers)
        self.trials = [self.trials[row] for row in rows]
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.weights.device)
        self.weights = self.weights.index_select(0, index)
        self.gradients = self.gradients.index_select(0, index)
        for stacked in (self.fixed, self.buffers, self.per_number, self.per_parameter):
            for name, tensor in stacked.items():
                stacked[name] = tensor.index_select(0, index)
        if rows:
            self._attach()


def to_vector(tensors: Iterable[Tensor]) -> Tensor:
    """Return the numbers of tensors as a vector."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def trained_parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """Return the parameters of all groups of an optimizer."""
    parameters: list[nn.Parameter] = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    return parameters


def has_tensors(optimizer: Optimizer) -> bool:
    """Return whether an optimizer has state."""
    return any(map(tensors_of, optimizer.state.values()))


def check_optimizers(models: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> None:
    """Raise NotStackable when one update cannot serve all optimizers."""
    signature = update_signature(optimizers[0])
    if any(update_signature(optimizer) != signature for optimizer in optimizers):
        raise NotStackable("their optimizers, or settings that select the algorithm, differ")
    if any(map(has_update_hooks, optimizers)):
        raise NotStackable("their optimizers or parameters have hooks for the updates of one trial")
    if len(set(map(layout, models, optimizers))) > 1:
        raise NotStackable("their optimizers have other parameters, or in another order")


def check_same_shapes(trials: Sequence[TrialTensors]) -> None:
    """Raise NotStackable when the parameters of trials do not fit into rows."""
    signatures = set()
    for trial in trials:
        signatures.add(tuple((each.shape, each.dtype, each.device) for each in trial.parameters))
    if len(signatures) > 1:
        raise NotStackable("their parameters differ in shape")
    if len({(each.dtype, each.device) for each in trials[0].parameters}) > 1:
        raise NotStackable("the parameters differ in number format or device")


def tensor_slots(model: nn.Module) -> dict[str, list[TensorSlot]]:
    """Return for each parameter and buffer, by its first name, all slots that hold it."""
    slots: dict[Tensor, list[TensorSlot]] = {}
    for module in model.modules():
        for owner in (direct_parameters(module), direct_buffers(module)):
            for key, tensor in owner.items():
                if tensor is not None:
                    slots.setdefault(tensor, []).append((owner, key))
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: slots[tensor] for name, tensor in named}


def parameter_slots(model: nn.Module, optimizer: Optimizer) -> Iterator[ParameterSlot]:
    """Yield the slots of an optimizer's parameters in a row, group after group.

    Raises:
        NotStackable: a parameter is not trained, or not in the model.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    start = 0
    for parameter in trained_parameters(optimizer):
        if parameter not in names or not parameter.requires_grad:
            raise NotStackable(
                "their optimizer has parameters that are not trained, or not in the model"
            )
        stop = start + parameter.numel()
        yield ParameterSlot(names[parameter], parameter.shape, slice(start, stop))
        start = stop


def update_signature(optimizer: Optimizer) -> list[Any]:
    """Return a value that is equal for optimizers with a common update.

    It has the class, the settings that are not numbers, and the names of the state, found by a step
    with a single number: SGD without momentum has no state.

    Raises:
        NotStackable: the step fails.
    """
    signature: list[Any] = [type(optimizer)]
    for group in optimizer.param_groups:
        settings = {name: value for name, value in group.items() if name not in NOT_SETTINGS}
        choices = [each for each in settings.items() if isinstance(each[1], bool | str | None)]
        signature.append(choices)  # the settings that are not numbers may select the algorithm
        number = nn.Parameter(torch.zeros_like(group["params"][0].reshape(-1)[:1]))
        number.grad = torch.zeros_like(number)
        make: Callable[..., Optimizer] = type(optimizer)
        try:
            trial_optimizer = make([number])
            trial_optimizer.param_groups[0].update(settings)
            trial_optimizer.step()
        except Exception as error:
            raise NotStackable(
                f"a trial step of {type(optimizer).__name__} failed: {text_of(error)}"
            ) from error
        signature.append(sorted(tensors_of(trial_optimizer.state[number])))
    return signature


def layout(model: nn.Module, optimizer: Optimizer) -> Any:
    """Return the sizes of an optimizer's groups, and the names and shapes of its parameters."""
    sizes = tuple(len(group["params"]) for group in optimizer.param_groups)
    slots = parameter_slots(model, optimizer)
    return sizes, tuple((slot.name, slot.shape) for slot in slots)


def has_update_hooks(optimizer: Optimizer) -> bool:
    """Return whether an optimizer has hooks of steps, or parameters with hooks of gradients."""
    return has_step_hooks(optimizer) or any(map(has_gradient_hooks, trained_parameters(optimizer)))


Groups = Sequence[dict[str, Any]]
"""The same parameter group of each trial's optimizer."""
Update = Callable[[StackedState, Groups, Sequence[int], GroupSlot], None]
"""Updates some rows of a parameter group in place."""


def find_update(optimizer: Optimizer) -> Update:
    """Return the update of rows: the optimizer's fused kernel on a CPU, or its pure update.

    Raises:
        NotStackable: it has none of these.
    """
    fused = FusedUpdate(optimizer)
    if fused.kernel is not None and optimizer.param_groups[0]["params"][0].device.type == "cpu":
        return kernel_update(fused)
    pure = pure_updates.find(optimizer)
    if pure is None:
        raise NotStackable(f"{type(optimizer).__name__} has no update for stacked trials")
    return pure_update(pure)


def kernel_update(fused: FusedUpdate) -> Update:
    """Return an update by the fused kernel, one call for all rows with the same settings.

    On a CPU it reads each row and its state once; composed operations read them several times.
    """
    kernel = fused.kernel
    assert kernel is not None

    def update(state: StackedState, groups: Groups, rows: Sequence[int], slot: GroupSlot) -> None:
        for equal_rows in rows_by_settings(groups, rows):
            key = (slot.first, *equal_rows)
            if key not in state.kernel_arguments:
                arguments = kernel_arguments(state, fused.state_names, equal_rows, slot)
                state.kernel_arguments[key] = arguments
            kernel(groups[equal_rows[0]], *state.kernel_arguments[key])

    return update


def rows_by_settings(groups: Groups, rows: Sequence[int]) -> Iterable[list[int]]:
    """Return the rows, in lists of those whose groups have equal settings."""
    settings = itemgetter(*(name for name in groups[0] if name not in NOT_SETTINGS))
    found: dict[Any, list[int]] = {}
    for row in rows:
        found.setdefault(settings(groups[row]), []).append(row)
    return found.values()


def kernel_arguments(
    state: StackedState, names: Sequence[str], rows: Sequence[int], slot: GroupSlot
) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]]]:
    """Return the arguments of a fused kernel: weights, gradients and optimizer state of rows."""
    optimizer_state = []
    for name in names:
        if name in state.per_number:
            optimizer_state.append(views(state.per_number[name], rows, slot.columns))
        elif name in state.per_parameter:
            optimizer_state.append(views(state.per_parameter[name], rows, slot.first))
    weights = views(state.weights, rows, slot.columns)
    gradients = views(state.gradients, rows, slot.columns)
    return weights, gradients, optimizer_state or [[] for _ in rows]


def views(matrix: Tensor, rows: Sequence[int], columns: slice | int) -> list[Tensor]:
    """Return some columns of each row."""
    return [matrix[row, columns] for row in rows]


def pure_update(pure: PureUpdate) -> Update:
    """Return an update by a pure update; on a CPU for as many rows at once as its cache holds."""

    def update(state: StackedState, groups: Groups, rows: Sequence[int], slot: GroupSlot) -> None:
        width = slot.columns.stop - slot.columns.start
        is_cpu = state.weights.device.type == "cpu"
        size = max(CACHE_NUMBERS // width if is_cpu else len(rows), 1)
        for start in range(0, len(rows), size):
            update_block(pure, state, groups, rows[start : start + size], slot)

    return update


def update_block(
    pure: PureUpdate, state: StackedState, groups: Groups, rows: Sequence[int], slot: GroupSlot
) -> None:
    """Apply a pure update to some rows of a parameter group."""
    block: Any = rows
    if rows[-1] - rows[0] + 1 == len(rows):
        block = slice(rows[0], rows[-1] + 1)  # without a copy
    columns = slot.columns
    first = slice(slot.first, slot.first + 1)
    optimizer_state = {}
    for name, matrix in state.per_number.items():
        optimizer_state[name] = matrix[block, columns]
    for name, matrix in state.per_parameter.items():
        optimizer_state[name] = matrix[block, first]
    weights, new_state = pure(
        state.weights[block, columns],
        state.gradients[block, columns],
        optimizer_state,
        settings_of([groups[row] for row in rows], state.weights),
    )
    state.weights[block, columns] = weights
    for name, tensor in new_state.items():
        if name in state.per_number:
            state.per_number[name][block, columns] = tensor
        else:
            state.per_parameter[name][block, first] = tensor


def settings_of(groups: Groups, like: Tensor) -> dict[str, Any]:
    """Return the settings of groups as those of one, with columns for numbers that differ."""
    settings = {}
    for name in groups[0]:
        if name not in NOT_SETTINGS:
            settings[name] = column([group[name] for group in groups], like)
    return settings


def column(values: Sequence[Any], like: Tensor) -> Any:
    """Return the common value, or a column (trials, 1) of numbers that differ."""
    if all(value == values[0] for value in values):
        return values[0]
    if isinstance(values[0], tuple | list):
        return tuple(column(each, like) for each in zip(*values, strict=True))
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)
