"""The contract of a transform, which changes training batches on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from framework.data.dataset import Batch
from framework.errors import SettingError, short
from framework.runtime.batch import is_flat, tensors_of
from framework.runtime.memory import versions
from framework.runtime.memory_format import channels_last

from .callback import Callback
from .fields import Fields


class Transform(Callback):
    """Base of all transforms, which are called with each training batch before the model.

    Random numbers come from torch's global generators, whose state is in checkpoints: a resumed run
    draws the same numbers. Batches of validation and test are not transformed. A transform is a
    callback: it may keep state and listen to events, and a Trainer takes it among its callbacks.

        class Noise(Transform):
            def __call__(self, batch: Batch) -> Batch:
                inputs, *others = batch
                return inputs + 0.1 * torch.randn_like(inputs), *others

    Attributes:
        takes_fields: whether `__call__` takes and returns batches as the loader gives them, such as
            dicts. If not, it gets (inputs, targets), the two fields that the task names.
    """

    takes_fields: bool = False

    def __call__(self, batch: Batch) -> Batch:
        """Return a changed batch in new tensors.

        Args:
            batch: tensors of shape (samples, ...) on the device. They must not be changed, since
                they may belong to the data set.
        """
        raise NotImplementedError


def transforms_of(callbacks: Sequence[Callback]) -> list[Transform]:
    """Return the callbacks that are transforms."""
    return [callback for callback in callbacks if isinstance(callback, Transform)]


def transformed_all(
    batches: Sequence[Batch], transforms: Sequence[Transform], fields: Fields
) -> list[Batch]:
    """Return the batches of a step after all transforms.

    Args:
        batches: those of the step.
        transforms: in order.
        fields: of the task, which name the inputs and targets.

    Raises:
        SettingError: the transforms of one batch have changed the tensors of an earlier one.
    """
    results = [transformed(batches[0], transforms, fields)]
    for batch in batches[1:]:
        last = results[-1]
        before = versions([last])
        results.append(transformed(batch, transforms, fields))
        tensors = zip(tensors_of(last), tensors_of(results[-1]), before, strict=False)
        for old, new, version in tensors:
            if old.data_ptr() == new.data_ptr() and versions([(old,)]) != [version]:
                names = ", ".join(type(transform).__name__ for transform in transforms)
                raise SettingError(
                    f"transforms={names}: a transform overwrites the batch that it returned "
                    "before; expected new tensors"
                )
    return results


@torch.no_grad()
def transformed(batch: Batch, transforms: Sequence[Transform], fields: Fields) -> Batch:
    """Return a batch after all transforms, in order; images in channels-last format keep it."""
    named = fields.named or not is_flat(batch)
    for transform in transforms:
        if named and not transform.takes_fields:
            pair = transformed_pair(fields.inputs_and_targets(batch), transform)
            batch = fields.with_inputs_and_targets(batch, *pair)
            continue
        if not named:
            batch = transformed_pair(batch, transform)
            continue
        batch = transform(batch)
        if not tensors_of(batch):
            raise SettingError(
                f"the transform {type(transform).__name__}: expected a batch, got {short(batch)}"
            )
    return batch


def transformed_pair(batch: Batch, transform: Transform) -> Batch:
    """Return a tuple of tensors after a transform."""
    is_channels_last = batch[0].stride()[1:2] == (1,)
    result = transform(batch)
    if not isinstance(result, tuple | list):
        raise SettingError(
            f"the transform {type(transform).__name__}: expected a batch (a tuple of tensors), "
            f"got {short(result)}"
        )
    if is_channels_last:
        return (channels_last(result[0]), *result[1:])
    return tuple(result)
