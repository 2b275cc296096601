"""The parameters, gradients and optimizer state of many trials as rows of a few matrices, and their update.

A trial's model and optimizer go on holding them, as views: its checkpoint, its validation and whoever looks at it find
what they would find if it trained alone.
"""

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from itertools import pairwise
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
    buffers_of,
    has_gradient_hooks,
    parameters_of,
)
from framework.runtime.torch_internals.optimizer_hooks import has_step_hooks
from framework.training.acceleration.fused_update import FusedUpdate

CACHED = (
    2**16
)  # numbers of a parameter that are updated at once on a CPU: they and their state stay in its cache

CANNOT = "which a trial that trains as one of many cannot follow: hydra/launcher=one_by_one"
Slot = tuple[MutableMapping[str, Any], str]
"""A mapping in which a module keeps a tensor, and its key."""
NO_SETTINGS = ("params", "param_names")  # of what an optimizer's group has


class NotStackable(FrameworkError):
    """Trials that cannot train as one; it says what stands in the way."""


class ParameterSlot(NamedTuple):
    """Where a parameter is in a row: its name in the model, its shape, its columns."""

    name: str
    shape: torch.Size
    columns: slice


class Rows:
    """Takes over the tensors of models and their optimizers; row r of everything is trial r's.

    Raises NotStackable when the trials' tensors are not alike, or their optimizer has no update for rows.
    """

    def __init__(self, models: Sequence[nn.Module], optimizers: Sequence[Optimizer]):
        self.models, self.optimizers = list(models), list(optimizers)
        self.update_of = find_update(optimizers[0])
        if any(form_of(optimizer) != form_of(optimizers[0]) for optimizer in optimizers):
            raise NotStackable(
                "the optimizer is not the same, or its settings make it work in another way"
            )
        if any(map(has_update_hooks, optimizers)):
            raise NotStackable(
                "somebody wants to be told of each update, or gradient, of a trial's own"
            )
        self.places = list(places(models[0], optimizers[0]))
        if len({laid_out(*pair) for pair in zip(models, optimizers, strict=True)}) > 1:
            raise NotStackable("their optimizers hold other parameters, or in another order")
        trained = [[p for group in o.param_groups for p in group["params"]] for o in optimizers]
        if len({tuple((p.shape, p.dtype, p.device) for p in each) for each in trained}) > 1:
            raise NotStackable("their parameters have not the same shapes")
        if len({(p.dtype, p.device) for p in trained[0]}) > 1:
            raise NotStackable("the parameters are not all of one number format and device")
        self.trained = trained
        self.weights = torch.stack(
            [torch.cat([p.detach().reshape(-1) for p in each]) for each in trained]
        )
        self.gradients = torch.zeros_like(self.weights)
        taken = {id(p) for p in trained[0]}
        names = [name for name, p in models[0].named_parameters() if id(p) not in taken]
        self.fixed = {
            name: torch.stack([m.get_parameter(name).detach() for m in models]) for name in names
        }
        self.slots = [slots(model) for model in models]
        self.buffers = {
            n: torch.stack([m.get_buffer(n) for m in models]) for n, _ in models[0].named_buffers()
        }
        self.wide: dict[
            str, Tensor
        ] = {}  # what an optimizer keeps of each number, (trials, numbers)
        self.narrow: dict[str, Tensor] = {}  # what it keeps of each parameter, (trials, parameters)
        self.begun = any(
            tensors_of(state) for o in optimizers for state in o.state.values()
        )  # they are resumed
        self._attach()
        if self.begun:
            self.adopt_state()

    def __len__(self) -> int:
        return len(self.models)

    def __contains__(self, kept: str) -> bool:
        return kept in self.wide or kept in self.narrow

    def _attach(self) -> None:
        """Let the trials' tensors be views of the rows, and make the leaves that gradients are asked of."""
        ends = [
            sum(len(g["params"]) for g in self.optimizers[0].param_groups[:n])
            for n in range(self.groups + 1)
        ]
        columns = [place.columns for place in self.places]
        self.spans = [slice(columns[a].start, columns[b - 1].stop) for a, b in pairwise(ends)]
        self.firsts = ends[:-1]
        self.leaves = {
            place.name: self._whole(self.weights, place).detach().requires_grad_()
            for place in self.places
        }
        self.into = [self._whole(self.gradients, place) for place in self.places]
        for row, (model, parameters) in enumerate(zip(self.models, self.trained, strict=True)):
            for parameter, place in zip(parameters, self.places, strict=True):
                parameter.data = self._of(self.weights, row, place)
            for name, stacked in self.fixed.items():
                model.get_parameter(name).data = stacked[row]
            for name, stacked in self.buffers.items():
                self._set_buffer(row, name, stacked[row])
        self._attach_state()

    @property
    def groups(self) -> int:
        return len(self.optimizers[0].param_groups)

    def _whole(self, matrix: Tensor, place: ParameterSlot) -> Tensor:
        return matrix[:, place.columns].view(len(self), *place.shape)

    def _of(self, matrix: Tensor, row: int, place: ParameterSlot) -> Tensor:
        return matrix[row, place.columns].view(place.shape)

    # gradients

    def differentiate(self, losses: Tensor, add: bool = False) -> None:
        """Put the gradients of each trial's loss into its row, or add them. losses: (trials,)."""
        found = torch.autograd.grad(losses.sum(), list(self.leaves.values()), allow_unused=True)
        pairs = [(into, g) for into, g in zip(self.into, found, strict=True) if g is not None]
        combine = foreach.add_ if add else foreach.copy_
        combine([into for into, _ in pairs], [gradient for _, gradient in pairs])
        for into, gradient in zip(self.into, found, strict=True):
            if gradient is None and not add:
                into.zero_()

    def lend_gradients(self, row: int) -> None:
        """Give a trial's parameters their gradients, for somebody who looks at them or changes them."""
        for parameter, place in zip(self.trained[row], self.places, strict=True):
            parameter.grad = self._of(self.gradients, row, place)

    def take_gradients(self, row: int) -> bool:
        """Take them back; returns whether they are still there: without them a trial is not updated.

        Raises FrameworkError when only some are.
        """
        there = any(parameter.grad is not None for parameter in self.trained[row])
        for parameter, place in zip(self.trained[row], self.places, strict=True):
            mine = self._of(self.gradients, row, place)
            if there and parameter.grad is None:
                raise FrameworkError(f"the gradient of {place.name} is gone, {CANNOT}")
            if parameter.grad is not None and parameter.grad.data_ptr() != mine.data_ptr():
                mine.copy_(parameter.grad)
            parameter.grad = None
        return there

    # update

    @torch.no_grad()
    def update(self, left_out: Sequence[int] = ()) -> None:
        """Do what each trial's `optimizer.step()` would do, but for some."""
        if not self.begun:
            self._first_update(left_out)
            return
        rows = [row for row in range(len(self)) if row not in left_out]
        for number, span in enumerate(self.spans):
            groups = [optimizer.param_groups[number] for optimizer in self.optimizers]
            self.update_of(self, groups, rows, span, self.firsts[number])
        for counts in self.narrow.values():
            counts.copy_(counts[:, self._owners()])

    def _owners(self) -> list[int]:
        """For each parameter the first one of its group, whose counts are those of all."""
        sizes = [len(group["params"]) for group in self.optimizers[0].param_groups]
        return [first for first, size in zip(self.firsts, sizes, strict=True) for _ in range(size)]

    def _first_update(self, left_out: Sequence[int]) -> None:
        """Let each optimizer take its own step, which makes the state that it keeps; then take the state over."""
        for row, optimizer in enumerate(self.optimizers):
            before = self.weights[row].clone()
            self.lend_gradients(row)
            optimizer.step()
            self.take_gradients(row)
            if (
                row in left_out
            ):  # the rows need its state all the same: as it is before a first step
                self.weights[row] = before
                for state in optimizer.state.values():
                    for kept in tensors_of(state).values():
                        kept.zero_()
        self.adopt_state()
        self.begun = True

    def adopt_state(self) -> None:
        """Take over what the optimizers keep; all of them have been through a step, or none."""
        kept = [
            [tensors_of(optimizer.state.get(p)) for p in each] for optimizer, each in self._pairs()
        ]
        names = set(kept[0][0])
        if any(set(state) != names for each in kept for state in each):
            raise NotStackable("their optimizer does not keep the same of every parameter")
        for name in names:
            values = [[state[name] for state in each] for each in kept]
            if all(v.shape == p.shape for v, p in zip(values[0], self.trained[0], strict=True)):
                self.wide[name] = torch.stack(
                    [torch.cat([v.reshape(-1) for v in each]) for each in values]
                )
            elif all(v.ndim == 0 for v in values[0]):
                self.narrow[name] = torch.stack([torch.stack(list(each)) for each in values]).to(
                    self.weights.device
                )
                if not torch.equal(self.narrow[name], self.narrow[name][:, self._owners()]):
                    raise NotStackable(
                        "some of their parameters have been through fewer steps than others"
                    )
            else:
                raise NotStackable(
                    f"their optimizer keeps {name} in another shape than the parameters'"
                )
        self._attach_state()

    def _pairs(self) -> Iterator[tuple[Optimizer, list[Tensor]]]:
        yield from zip(self.optimizers, self.trained, strict=True)

    def _attach_state(self) -> None:
        self.lists: dict[Any, Any] = {}  # of views, kept from step to step
        for row, (optimizer, parameters) in enumerate(self._pairs()):
            for number, (parameter, place) in enumerate(zip(parameters, self.places, strict=True)):
                own = {name: self._of(wide, row, place) for name, wide in self.wide.items()}
                own |= {name: narrow[row, number] for name, narrow in self.narrow.items()}
                if own:
                    optimizer.state[parameter].update(own)

    # coming and going

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the trials; those that leave get tensors of their own."""
        stay, index = (
            set(rows),
            torch.tensor(list(rows), dtype=torch.int64, device=self.weights.device),
        )
        for row in set(range(len(self))) - stay:
            self._release(row)
        for name in ("models", "optimizers", "trained", "slots"):
            setattr(self, name, [getattr(self, name)[row] for row in rows])
        self.weights, self.gradients = (
            m.index_select(0, index) for m in (self.weights, self.gradients)
        )
        for stacked in (self.fixed, self.buffers, self.wide, self.narrow):
            for name, tensor in stacked.items():
                stacked[name] = tensor.index_select(0, index)
        if rows:
            self._attach()

    def _set_buffer(self, row: int, name: str, tensor: Tensor) -> None:
        for owner, key in self.slots[row][name]:
            owner[key] = tensor

    def _release(self, row: int) -> None:
        model, optimizer = self.models[row], self.optimizers[row]
        for parameter in model.parameters():
            parameter.data, parameter.grad = parameter.data.clone(), None
        for name in self.buffers:
            self._set_buffer(row, name, model.get_buffer(name).clone())
        for state in optimizer.state.values():
            state.update(
                {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}
            )


def slots(model: nn.Module) -> dict[str, list[Slot]]:
    """Return for each parameter and buffer, by its first name, all places where modules keep it."""
    kept: dict[int, list[Slot]] = {}
    for module in model.modules():
        for owner in (parameters_of(module), buffers_of(module)):
            for key, tensor in owner.items():
                kept.setdefault(id(tensor), []).append((owner, key))
    return {
        name: kept[id(tensor)]
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }


def places(model: nn.Module, optimizer: Optimizer) -> Iterator[ParameterSlot]:
    """Yield the places of an optimizer's parameters, group after group, in a row."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    start = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names or not parameter.requires_grad:
                raise NotStackable(
                    "their optimizer has parameters that are not trained, or not the model's"
                )
            yield ParameterSlot(
                names[id(parameter)],
                parameter.shape,
                slice(start, start := start + parameter.numel()),
            )


def form_of(optimizer: Optimizer) -> list[Any]:
    """Return what must be the same for one update to serve two optimizers: all but the numbers among the settings,
    and what is kept of a parameter, which a step on a single number tells (SGD without momentum keeps nothing)."""
    form: list[Any] = [type(optimizer)]
    for group in optimizer.param_groups:
        given = {name: value for name, value in group.items() if name not in NO_SETTINGS}
        form.append(
            {name: value for name, value in given.items() if isinstance(value, bool | str | None)}
        )
        number = nn.Parameter(torch.zeros_like(group["params"][0].reshape(-1)[:1]))
        number.grad = torch.zeros_like(number)
        make: Callable[..., Optimizer] = type(optimizer)
        try:
            tried = make([number])
            tried.param_groups[0].update(given)
            tried.step()
        except Exception as error:
            name = type(optimizer).__name__
            raise NotStackable(f"{name} cannot be tried on a number: {text_of(error)}") from error
        form.append(sorted(tensors_of(tried.state[number])))
    return form


def laid_out(model: nn.Module, optimizer: Optimizer) -> Any:
    """Return which parameters an optimizer holds, and in which groups."""
    sizes = tuple(len(group["params"]) for group in optimizer.param_groups)
    return sizes, tuple((place.name, place.shape) for place in places(model, optimizer))


def has_update_hooks(optimizer: Optimizer) -> bool:
    held = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return has_step_hooks(optimizer) or any(map(has_gradient_hooks, held))


Update = Callable[[Rows, list[dict[str, Any]], list[int], slice, int], None]
"""(rows, each trial's group, which rows, the group's columns, the number of its first parameter): in place."""


def find_update(optimizer: Optimizer) -> Update:
    """Return how rows are updated: by the optimizer's own fused kernel, a row at a time, or by its pure update."""
    fused = FusedUpdate(optimizer)
    if fused.kernel is not None and optimizer.param_groups[0]["params"][0].device.type == "cpu":
        return by_kernel(fused)
    pure = pure_updates.find(optimizer)
    if pure is None:
        raise NotStackable(f"{type(optimizer).__name__} has no pure update")
    return by_function(pure)


def by_kernel(fused: FusedUpdate) -> Update:
    """On a CPU torch's fused kernel is one pass over a row and its state, which no composed operations are. Trials
    whose settings are the same take it in one call."""

    def update(
        rows: Rows, groups: list[dict[str, Any]], chosen: list[int], span: slice, first: int
    ) -> None:
        assert fused.kernel is not None
        for alike in rows_alike(groups, chosen):
            key = (first, *alike)
            if key not in rows.lists:
                rows.lists[key] = views(rows, fused.state_names, alike, span, first)
            fused.kernel(groups[alike[0]], *rows.lists[key])

    return update


def rows_alike(groups: list[dict[str, Any]], chosen: list[int]) -> Iterable[list[int]]:
    """Return the chosen rows, those together whose groups have the same settings."""
    settings = itemgetter(*(name for name in groups[0] if name not in NO_SETTINGS))
    found: dict[Any, list[int]] = {}
    for row in chosen:
        found.setdefault(settings(groups[row]), []).append(row)
    return found.values()


def views(
    rows: Rows, names: Sequence[str], some: list[int], span: slice, first: int
) -> tuple[list[Tensor], ...]:
    """Return what a fused kernel takes of some rows: weights, gradients, and lists of what is kept of them."""
    kept = [
        [
            rows.wide[name][row, span] if name in rows.wide else rows.narrow[name][row, first]
            for row in some
        ]
        for name in names
        if name in rows
    ]
    weights, gradients = (
        [matrix[row, span] for row in some] for matrix in (rows.weights, rows.gradients)
    )
    return weights, gradients, kept or [[] for _ in some]  # type: ignore[return-value]


def by_function(pure: PureUpdate) -> Update:
    def update(
        rows: Rows, groups: list[dict[str, Any]], chosen: list[int], span: slice, first: int
    ) -> None:
        width = span.stop - span.start
        at_once = max(CACHED // width, 1) if rows.weights.device.type == "cpu" else len(chosen)
        for start in range(0, len(chosen), at_once):
            some = chosen[start : start + at_once]
            block = slice(some[0], some[-1] + 1) if some[-1] - some[0] + 1 == len(some) else some
            state = {name: wide[block, span] for name, wide in rows.wide.items()}
            state |= {
                name: narrow[block, first : first + 1] for name, narrow in rows.narrow.items()
            }
            settings = settings_of([groups[row] for row in some], rows.weights)
            weights, new = pure(
                rows.weights[block, span], rows.gradients[block, span], state, settings
            )
            rows.weights[block, span] = weights
            for name, tensor in new.items():
                if name in rows.wide:
                    rows.wide[name][block, span] = tensor
                else:
                    rows.narrow[name][block, first : first + 1] = tensor

    return update


def settings_of(groups: Sequence[dict[str, Any]], like: Tensor) -> dict[str, Any]:
    """Return the settings of several groups as those of one: what differs as a column of numbers."""
    return {
        name: column([group[name] for group in groups], like)
        for name in groups[0]
        if name not in NO_SETTINGS
    }


def column(values: Sequence[Any], like: Tensor) -> Any:
    if all(value == values[0] for value in values):
        return values[0]
    if isinstance(values[0], tuple | list):
        return tuple(column(each, like) for each in zip(*values, strict=True))
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)
