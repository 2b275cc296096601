"""The fields of a batch that a task reads: the inputs of the model, the targets, and the output.

A batch may be a tuple, a dict, or nested (see `runtime/batch.py`). Settings name its fields:
`task.inputs=[input_ids,attention_mask] task.target=labels task.output=logits`.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from framework.errors import DataError, SettingError, suggestion
from framework.runtime.batch import Batch, describe_fields, is_flat, named_parts, tensors_of
from framework.runtime.torch_internals.pytree import tree_leaves, with_branches

Field = str | int
"""The name of a field, such as "labels", an index in a tuple, or a path such as "image.pixels"."""
Inputs = str | int | Sequence[str | int] | dict[str, str | int]
"""The fields that the model is called with.

One field is the only argument of the model. Of a list, names are keyword arguments and indices are
positional arguments. A mapping is from the names of the model's arguments to fields.
"""


class Fields:
    """The fields of a batch that a task reads.

    Args:
        inputs: the fields that the model is called with; None: all fields with tensors except the
            target, or the first tensor of a batch (inputs, targets) without a target.
        target: the field with the targets; None for the second tensor of (inputs, targets).
        output: the field of the model's outputs that the loss and the metrics receive; None for all
            outputs.
        with_target: whether the target is one of the inputs that None stands for.

    Attributes:
        named: whether fields are named; if not, batches are (inputs, targets).
    """

    def __init__(
        self,
        inputs: Inputs | None = None,
        target: Field | None = None,
        output: Field | None = None,
        with_target: bool = False,
    ):
        if inputs is not None and not isinstance(inputs, str | int) and not inputs:
            raise SettingError("task.inputs: expected at least one field, got an empty list")
        if isinstance(inputs, Sequence) and not isinstance(inputs, str):
            repeated = [name for name in inputs if list(inputs).count(name) > 1]
            if repeated:
                raise SettingError(f"task.inputs: the field {repeated[0]} is named twice")
        self.inputs = inputs
        self.target = target
        self.output = output
        self.with_target = with_target
        self.named = with_target or inputs is not None or target is not None

    def call(self, model: nn.Module, batch: Batch) -> Any:
        """Return the outputs of a model for the inputs of a batch; of several the named one.

        Args:
            model: the model, or a compiled function that computes the same.
            batch: a batch, whose target may be missing.

        Raises:
            DataError: the batch has no such fields, the model does not take them, or its outputs
                have no such field.
        """
        if not self.named:
            return self.select_output(model(first_tensor(batch)))
        positional, by_name = self.arguments(batch)
        if torch.compiler.is_compiling():
            return self.select_output(model(*positional, **by_name))
        try:
            outputs = model(*positional, **by_name)
        except TypeError as error:
            check_arguments(model, positional, by_name, error)
            raise
        return self.select_output(outputs)

    def arguments(self, batch: Batch) -> tuple[list[Any], dict[str, Any]]:
        """Return the positional and the keyword arguments of the model."""
        inputs = self.inputs
        if inputs is None:
            inputs = self.other_fields(batch)
        if isinstance(inputs, str | int):
            return [field_of(batch, inputs, "task.inputs")], {}
        if isinstance(inputs, Mapping):
            named = inputs.items()
            return [], {name: field_of(batch, field, "task.inputs") for name, field in named}
        positional = []
        by_name = {}
        for field in inputs:
            value = field_of(batch, field, "task.inputs")
            if isinstance(field, int):
                positional.append(value)
            else:
                by_name[field.rpartition(".")[2]] = value
        return positional, by_name

    def other_fields(self, batch: Batch) -> list[Field]:
        """Return the fields with tensors, except the target."""
        parts = named_parts(batch) or {}
        target = None if self.with_target else self.target
        if isinstance(target, int) and target < 0:
            target += len(parts)
        found: list[Field] = []
        for name, part in parts.items():
            if name != target and any(isinstance(leaf, Tensor) for leaf in tree_leaves(part)):
                found.append(name)
        return found

    def targets(self, batch: Batch) -> Any:
        """Return the targets of a batch.

        Raises:
            DataError: the batch does not have them.
        """
        if self.target is not None:
            return field_of(batch, self.target, "task.target")
        if self.named and not isinstance(batch, tuple):
            raise DataError(
                "task.target: expected the name of the field with the targets; the batch has "
                f"{describe_fields(batch)}"
            )
        return pair(batch)[1]

    def has_targets(self, batch: Batch) -> bool:
        """Return whether `targets` finds those of a batch."""
        return self.target is not None or (isinstance(batch, tuple) and len(batch) == 2)

    def known_targets(self, batch: Batch) -> Tensor | None:
        """Return the targets of all samples of a split; None if it is not known which they are."""
        if self.target is not None:
            targets = self.targets(batch)
            return targets if isinstance(targets, Tensor) else None
        return batch[1] if is_flat(batch) and len(batch) == 2 else None

    def inputs_and_targets(self, batch: Batch) -> tuple[Any, Any]:
        """Return the only input of the model and the targets, as for a transform.

        Raises:
            DataError: the model has several inputs.
        """
        if not self.named:
            return pair(batch)
        positional, by_name = self.arguments(batch)
        values = [*positional, *by_name.values()]
        if len(values) != 1:
            raise DataError(
                f"task.inputs: expected one field for a transform of (inputs, targets), got "
                f"{len(values)}; a Transform with `takes_fields = True` gets the whole batch"
            )
        return values[0], self.targets(batch)

    def without_missing_target(self, batch: Batch) -> "Fields":
        """Return fields without the target among the inputs if a batch does not have it."""
        if self.inputs is None or self.target in (named_parts(batch) or {}):
            return self
        inputs = self.inputs
        if isinstance(inputs, Mapping):
            kept: Inputs = {name: each for name, each in inputs.items() if each != self.target}
        elif isinstance(inputs, str | int):
            return self
        else:
            kept = [field for field in inputs if field != self.target]
        return Fields(kept, self.target, self.output)

    def only_input(self, batch: Batch) -> Tensor:
        """Return the first input of the model in a batch."""
        if not self.named:
            return first_tensor(batch)
        positional, by_name = self.arguments(batch)
        first: Tensor = [*positional, *by_name.values()][0]
        return first

    def with_inputs_and_targets(self, batch: Batch, inputs: Tensor, targets: Any) -> Batch:
        """Return a batch with another input of the model and other targets.

        Args:
            batch: as for `inputs_and_targets`.
            inputs: of the model.
            targets: of the batch.
        """
        if not self.named:
            return inputs, targets
        field = self.input_fields(batch)[0]
        batch = with_field(batch, field, inputs)
        return with_field(batch, 1 if self.target is None else self.target, targets)

    def used(self, batch: Batch) -> Batch:
        """Return a dict with only the fields that the task names; another batch unchanged.

        Compiled code depends on the values of texts and numbers, and would be compiled for each.
        """
        if not self.named or not isinstance(batch, Mapping):
            return batch
        names = [*self.input_fields(batch)]
        if self.target is not None:
            names.append(self.target)
        used = {}
        for name in names:
            first = name
            if first not in batch and isinstance(first, str):
                first = first.partition(".")[0]
            if first in batch:
                used[first] = batch[first]
        return used

    def input_fields(self, batch: Batch) -> list[Field]:
        """Return the names of the fields that the model is called with."""
        inputs = self.inputs
        if inputs is None:
            return self.other_fields(batch)
        if isinstance(inputs, str | int):
            return [inputs]
        return list(inputs.values() if isinstance(inputs, Mapping) else inputs)

    def select_inputs(self, batch: Batch) -> dict[Field, Any]:
        """Return the fields that the model is called with to predict, without the target.

        Raises:
            DataError: the batch does not have them.
        """
        names = [field for field in self.input_fields(batch) if field != self.target]
        return {field: field_of(batch, field, "task.inputs") for field in names}

    def select_output(self, outputs: Any) -> Any:
        """Return the named field of outputs; all of them without a name."""
        return outputs if self.output is None else field_of(outputs, self.output, "task.output")


def with_field(batch: Batch, field: Field, value: Any) -> Batch:
    """Return a copy of a batch with another value of a field (see `field_of`)."""
    parts = named_parts(batch) or {}
    key: Field = field
    if isinstance(field, int) and not isinstance(batch, Mapping):
        key = list(parts)[field]
    if key not in parts and isinstance(field, str):
        first, _, rest = field.partition(".")
        key = key_of(batch, first)
        value = with_field(parts[key], int(rest) if rest.isdigit() else rest, value)
    if not isinstance(batch, tuple | list):
        return with_branches(batch, {key: value})
    items = list((parts | {key: value}).values())
    return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)


def first_tensor(batch: Batch) -> Tensor:
    """Return the first tensor of a batch (inputs, targets) or (inputs,).

    Raises:
        DataError: the batch is nested.
    """
    if type(batch) is tuple and isinstance(batch[0], Tensor):
        return batch[0]
    parts = named_parts(batch)
    if parts and isinstance(batch, tuple):
        first: Any = batch[0]
        if isinstance(first, Tensor):
            return first
    raise unnamed_error(batch)


def pair(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the two tensors of a batch.

    Raises:
        DataError: the batch has more or fewer tensors, or is nested.
    """
    if not isinstance(batch, tuple) or len(batch) != 2 or not is_flat(tuple(batch)):
        raise unnamed_error(batch)
    return batch[0], batch[1]


def unnamed_error(batch: Batch) -> DataError:
    """Return the error of a batch that is not a pair of tensors, for a task without fields."""
    parts = named_parts(batch) or {}
    names = [str(name) for name, part in parts.items() if tensors_of(part)]
    advice = "task.inputs=... task.target=..."
    if len(names) > 1:
        inputs = names[0] if len(names) == 2 else f"[{','.join(names[:-1])}]"
        advice = f"task.inputs={inputs} task.target={names[-1]}"
    has = f"{len(batch)} tensors" if is_flat(batch) else f"the fields {describe_fields(batch)}"
    return DataError(
        f"a batch has {has}, but this task takes (inputs, targets): name its fields, such as "
        f"{advice} (in Python fw.tasks.build(..., inputs=..., target=...)), or write a Task"
    )


def field_of(value: Any, field: Field, setting: str) -> Any:
    """Return a field of a batch or of outputs by its name, index or path.

    Args:
        value: the batch or the outputs.
        field: the name, the index in a tuple, or a path with dots.
        setting: for the message, such as task.target.

    Raises:
        DataError: there is no such field.
    """
    parts = named_parts(value)
    if parts is not None:
        if isinstance(field, int) and not isinstance(value, Mapping):
            items = list(parts.values())
            if -len(items) <= field < len(items):
                return items[field]
        elif field in parts:
            return parts[field]
        elif isinstance(field, str) and "." in field:
            first, _, rest = field.partition(".")
            key = key_of(value, first)
            if key in parts:
                return field_of(parts[key], int(rest) if rest.isdigit() else rest, setting)
    owner = "the model's outputs have" if setting == "task.output" else "a batch has"
    if parts is None:
        kind = type(value).__name__
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        raise DataError(f"{setting}={field}: expected one of several fields, got a {kind}{shape}")
    similar = suggestion(str(field), map(str, parts))
    raise DataError(
        f"{setting}={field}: there is no such field; {owner} {describe_fields(value)}{similar}"
    )


def key_of(value: Any, text: str) -> Field:
    """Return a part of a path as the key of a value: an index for a tuple, otherwise a name."""
    return int(text) if isinstance(value, tuple | list) and text.isdigit() else text


def check_arguments(
    model: Callable[..., Any], positional: list[Any], by_name: dict[str, Any], error: Exception
) -> None:
    """Raise DataError if a model does not take the arguments that it was called with."""
    function = model.forward if isinstance(model, nn.Module) else model
    try:
        signature = inspect.signature(function)
        signature.bind(*positional, **by_name)
    except ValueError:  # it has no signature
        return
    except TypeError as mismatch:
        names = [str(parameter) for parameter in signature.parameters.values()]
        described = [name.partition(":")[0].partition("=")[0].strip() for name in names]
        called = ", ".join([*("*" for _ in positional), *by_name])
        raise DataError(
            f"task.inputs: the model {type(model).__name__} cannot be called with ({called}): "
            f"{mismatch}; it takes ({', '.join(described)}). task.inputs={{ARGUMENT: FIELD}} maps "
            "other names"
        ) from error
