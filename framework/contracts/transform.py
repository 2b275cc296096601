"""The contract of a transform: a training batch in, a training batch out, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from framework.data.dataset import Batch
from framework.errors import SettingError, short
from framework.runtime.memory import versions
from framework.runtime.memory_format import channels_last

from .callback import Callback


class Transform(Callback):
    """Base of all transforms: each is called with every training batch, before the model sees it.

    What is random is drawn from torch's global generators, whose state is in checkpoints: a resumed run draws what it
    would have drawn. Validation and test never see one. It is a callback, and may keep state and listen to
    events: a Trainer takes it among its callbacks.
    """

    def __call__(self, batch: Batch) -> Batch:
        """Return a changed batch, in new tensors; those of the given batch stay as they are.

        They may belong to the data set.
        """
        raise NotImplementedError


def transforms_of(callbacks: Sequence[Callback]) -> list[Transform]:
    """Return those of the callbacks that are transforms."""
    return [callback for callback in callbacks if isinstance(callback, Transform)]


def transformed_all(batches: Sequence[Batch], transforms: Sequence[Transform]) -> list[Batch]:
    """Return the batches of a step after all transforms.

    Raises SettingError where one of them was changed by the transforms of a later one.
    """
    made = [transformed(batches[0], transforms)]
    for batch in batches[1:]:
        last = made[-1]
        before = versions([last])
        made.append(transformed(batch, transforms))
        for old, new, version in zip(last, made[-1], before, strict=False):
            if old.data_ptr() == new.data_ptr() and versions([(old,)]) != [version]:
                names = ", ".join(type(transform).__name__ for transform in transforms)
                said = "one writes into the batch that it returned before"
                raise SettingError(f"transforms={names}: {said}; expected new tensors")
    return made


@torch.no_grad()
def transformed(batch: Batch, transforms: Sequence[Transform]) -> Batch:
    """Return a batch after all transforms, in their order; images that were in the format channels last still are."""
    pixels_whole = batch[0].stride()[1:2] == (1,)
    for transform in transforms:
        batch = transform(batch)
        if not isinstance(batch, tuple | list):
            name = type(transform).__name__
            expected = "expected a batch (a tuple of tensors)"
            raise SettingError(f"the transform {name}: {expected}, got {short(batch)}")
    return (channels_last(batch[0]), *batch[1:]) if pixels_whole else batch
