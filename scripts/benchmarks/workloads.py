"""The workloads: models and data, the same for every contender.

At the top only torch is imported, because the environment of a peer may lack other packages.
"""

import sys
import sysconfig
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

CLASSES = 10
SIDE = 28
CONTEXT = 64
CHARACTERS = 128
Tensors = tuple[Tensor, Tensor]


class Workload(NamedTuple):
    """A model with its settings and numbers of samples; one round takes one or two seconds."""

    model: Callable[[], nn.Module]
    batch_size: int
    lr: float
    epochs_per_round: int
    train: int
    val: int


def mlp() -> nn.Module:
    return dense(64, 128, 128)


def wide() -> nn.Module:
    return dense(SIDE * SIDE, 2048, 2048)


def dense(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, CLASSES),
    )


class CharacterTransformer(nn.Module):
    """Predict each character from the previous ones; outputs are (batch, characters, places)."""

    def __init__(self, width: int = 64, depth: int = 2, heads: int = 4):
        super().__init__()
        self.characters = nn.Embedding(CHARACTERS, width)
        self.places = nn.Embedding(CONTEXT, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, CHARACTERS)
        self.register_buffer(
            "mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False
        )
        self.register_buffer("position", torch.arange(CONTEXT), persistent=False)

    def forward(self, text: Tensor) -> Tensor:
        hidden = self.characters(text) + self.places(self.position)
        hidden = self.blocks(hidden, mask=self.mask, is_causal=True)
        outputs: Tensor = self.head(hidden)
        return outputs.transpose(1, 2)


# model, batch size, learning rate, epochs per round, training samples, validation samples
WORKLOADS = {
    "mlp": Workload(mlp, 32, 1e-3, 25, 1437, 360),
    "cnn": Workload(cnn, 32, 1e-3, 1, 1920, 256),
    "transformer": Workload(CharacterTransformer, 16, 1e-3, 1, 640, 128),
    "wide": Workload(wide, 256, 1e-3, 3, 5120, 512),
}


def split(inputs: Tensor, targets: Tensor, train: int, val: int) -> dict[str, Tensors]:
    """Return the first samples of a fixed shuffle for training, the next ones for validation."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    parts = {"train": order[:train], "val": order[train : train + val]}
    return {
        name: (inputs[index].contiguous(), targets[index].contiguous())
        for name, index in parts.items()
    }


def read(name: str) -> tuple[dict[str, Tensors], str]:
    """Return the splits of a workload, and the name of the data."""
    workload = WORKLOADS[name]
    source = {"mlp": digits, "transformer": source_code}.get(name, pictures)
    inputs, targets, title = source()
    if name == "wide":
        inputs = inputs.flatten(1)
    return split(inputs, targets, workload.train, workload.val), title


def digits() -> tuple[Tensor, Tensor, str]:
    from sklearn.datasets import load_digits

    inputs, targets = load_digits(return_X_y=True)
    return torch.tensor(inputs / 16, dtype=torch.float32), torch.tensor(targets), "digits"


def pictures() -> tuple[Tensor, Tensor, str]:
    """Return Fashion-MNIST if available, else noise with a bright square at a place per class."""
    import framework as fw
    from framework.errors import DataError

    fw.discover()
    try:
        inputs, targets = fw.datasets.build("fashion_mnist").train[:8192]
        return inputs.reshape(-1, 1, SIDE, SIDE), targets, "Fashion-MNIST"
    except DataError:
        generator = torch.Generator().manual_seed(0)
        targets = torch.randint(0, CLASSES, (8192,), generator=generator)
        inputs = torch.randn(8192, 1, SIDE, SIDE, generator=generator)
        for number in range(CLASSES):
            row, column = divmod(number, 5)
            top = 14 * row
            left = 5 * column
            inputs[targets == number, :, top : top + 5, left : left + 5] += 1.0
        return inputs, targets, "noise in the shape of Fashion-MNIST"


def source_code() -> tuple[Tensor, Tensor, str]:
    """Return windows of the standard library's source, and the same windows one character later."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]
    text = b"".join(file.read_bytes() for file in files)
    codes = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().clamp(max=CHARACTERS - 1)
    starts = torch.arange(0, len(codes) - CONTEXT - 1, CONTEXT)
    windows = codes[starts.unsqueeze(1) + torch.arange(CONTEXT + 1)]
    version = ".".join(map(str, sys.version_info[:2]))
    return windows[:, :-1], windows[:, 1:], f"source of Python {version}'s standard library"
