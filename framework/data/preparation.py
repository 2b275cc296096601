"""How raw inputs become inputs of a model, in a form that can be exported with the model.

A data set describes in `Data.preparation` what it does with raw inputs (pixels, cells of a table,
token ids): a module for the part that a graph can contain, and files and an example in plain Python
for the rest, such as a tokenizer or the reading of files.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Axis(NamedTuple):
    """An axis whose size may differ from call to call.

    Attributes:
        name: such as "length".
        smallest, largest: its size, at least 2 and at most `largest`.
    """

    name: str
    smallest: int
    largest: int


class RawInput(NamedTuple):
    """One of the tensors that an exported model takes.

    Attributes:
        dtype: its type.
        shape: its shape, without the batch axis.
        text: what it contains, in a line.
    """

    dtype: torch.dtype
    shape: tuple[int | Axis, ...]
    text: str

    @property
    def is_dynamic(self) -> bool:
        """Whether an axis besides that of the batch may differ from call to call."""
        return any(isinstance(size, Axis) for size in self.shape)

    @property
    def smallest_shape(self) -> tuple[int, ...]:
        """The shape with the smallest size of each axis."""
        return tuple(size.smallest if isinstance(size, Axis) else size for size in self.shape)

    @property
    def largest_shape(self) -> tuple[int, ...]:
        """The shape with the largest size of each axis."""
        return tuple(size.largest if isinstance(size, Axis) else size for size in self.shape)


RESULT = """\
for name, values in zip(about["outputs"], outputs):
    rows = np.asarray(values).tolist()
    if name == "class_index" and about["classes"]:
        print(json.dumps({"class": [about["classes"][index] for index in rows]}))
    print(json.dumps({name: rows}))"""


class Preparation(nn.Module):
    """Turns raw inputs into inputs of the model; `forward` must be exportable by torch.export.

    `forward` returns a tensor, or a dict of tensors by field if `task.inputs` names several fields.

    Attributes:
        raw: the tensors that `forward` takes, by name, in order.
        files: further files of the export, by name, such as the vocabulary of a tokenizer.
        metadata: what the example needs, as JSON types.
        imports: modules that the example imports.
        example: Python statements without the framework: they read `file`, the path of a file of
            the user, and set `raw`, a dict of NumPy arrays. They may use `np`, `json`, `here` (the
            folder of the export) and `about` (its metadata.json, with `metadata` in it).
        result: Python statements of the example that print `outputs`.
    """

    raw: Mapping[str, RawInput]
    files: Mapping[str, str] = MappingProxyType({})
    metadata: Mapping[str, Any] = MappingProxyType({})
    imports: Sequence[str] = ()
    example: str = ""
    result: str = RESULT

    def recover(self, inputs: Any) -> tuple[Tensor, ...]:
        """Return raw inputs that become these inputs, up to rounding; to verify an export.

        Args:
            inputs: of the model, as `forward` returns them, shape (samples, ...).
        """
        raise NotImplementedError

    def select(self, fields: Sequence[str]) -> "Preparation":
        """Return the preparation of some fields of a batch; by default that of all fields.

        Args:
            fields: those of `task.inputs`; a batch of the data set may have others.
        """
        return self


class UnchangedInputs(Preparation):
    """The raw inputs are the inputs of the model.

    Args:
        raw: the inputs by name; if there are several, by field of `task.inputs`.
    """

    def __init__(self, raw: Mapping[str, RawInput]):
        super().__init__()
        self.raw = raw
        if len(raw) == 1:
            (name,) = raw
            self.example = f"raw = {{{name!r}: np.load(file)}}  # a .npy file"
        else:
            names = tuple(raw)
            self.example = "arrays = np.load(file)  # a .npz file\n"
            self.example += f"raw = {{name: arrays[name] for name in {names!r}}}"

    def forward(self, *raw: Tensor) -> Tensor | dict[str, Tensor]:
        """Return the raw inputs."""
        return raw[0] if len(raw) == 1 else dict(zip(self.raw, raw, strict=True))

    def recover(self, inputs: Any) -> tuple[Tensor, ...]:
        """Return the inputs."""
        return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs[name] for name in self.raw)
