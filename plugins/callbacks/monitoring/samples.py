"""Samples of a run for callbacks that show them, with their labels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from framework import (
    Batch,
    Batches,
    Context,
    RaggedSplit,
    WindowSplit,
    class_names,
    count_rows,
    join_rows,
    read_spread_samples,
    seeds,
    select_rows,
)

ROWS = 256  # of a forward pass


def measured_batches(trainer: Context) -> Batches:
    """Return the batches of the validation split, or of the training split without one."""
    return trainer.train_batches if trainer.val_batches is None else trainer.val_batches


def measured_samples(trainer: Context, count: int) -> Batch:
    """Return evenly spaced samples of `measured_batches`."""
    return read_spread_samples(measured_batches(trainer), count, trainer.device)


def model_outputs(trainer: Context, batch: Batch) -> Any:
    """Return the outputs of the model in evaluation mode, on the device (collective)."""
    outputs = []
    with torch.no_grad(), trainer.precision.inference(trainer.model), seeds.undisturbed():
        for first in range(0, count_rows(batch), ROWS):
            part = select_rows(batch, first, first + ROWS)
            call = trainer.task.model_outputs
            outputs.append(trainer.strategy.forward(call, trainer.model, part))
    return outputs[0] if len(outputs) == 1 else join_rows(outputs)


def labels_of(trainer: Context, batch: Batch) -> list[str]:
    """Return the target of each sample as a short text: the class if it has one, or a number."""
    fields = trainer.task.fields
    targets = fields.targets(batch) if fields.has_targets(batch) else None
    if not isinstance(targets, Tensor):
        return [""] * count_rows(batch)
    return target_texts(targets, class_names(trainer.folder))


def target_texts(targets: Tensor, names: Sequence[str]) -> list[str]:
    """Return targets as texts: names of classes, numbers, or the largest shares of classes.

    Args:
        targets: classes or numbers (N,) or (N, 1), or shares of the classes (N, classes).
        names: of the classes; may be empty.
    """

    def name(index: int) -> str:
        return names[index] if 0 <= index < len(names) else str(index)

    targets = targets.detach().cpu()
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]
    if targets.ndim == 1 and targets.is_floating_point():
        return [f"{value:.4g}" for value in targets.tolist()]
    if targets.ndim == 1:
        return [name(int(index)) for index in targets.tolist()]
    if targets.ndim != 2 or not targets.is_floating_point() or targets.shape[1] != len(names):
        return [""] * len(targets)
    texts = []
    for row in targets:
        shares, classes = row.topk(min(2, len(row)))
        pairs = zip(shares.tolist(), classes.tolist(), strict=True)
        mixed = [f"{name(index)} {share:.0%}" for share, index in pairs if share >= 0.01]
        texts.append("\n".join(mixed))
    return texts


def token_texts(trainer: Context, tokens: Sequence[int]) -> list[str]:
    """Return the text of each token; their numbers if the tokenizer of the data has no text.

    A space is "·", a line break "\\n", an unknown character or word "[?]", and a token without text
    "[]": the font of images has these.
    """
    tokenizer = tokenizer_of(trainer)
    size = 0 if tokenizer is None else tokenizer.size
    texts = []
    for token in tokens:
        if token >= size:
            texts.append(str(token))
            continue
        text = str(tokenizer.decode([token]))
        text = text.replace("\n", "\\n").replace(" ", "·").replace("\ufffd", "[?]")
        texts.append(text or "[]")
    return texts


def tokenizer_of(trainer: Context) -> Any:
    """Return the tokenizer of the training data, or None."""
    split = trainer.train_batches.split
    if isinstance(split, WindowSplit | RaggedSplit):
        return split.facts.get("tokenizer")
    return None


def last_linear(model: nn.Module) -> nn.Linear | None:
    """Return the last linear layer of the head, or of the model without a head."""
    head = getattr(model, "head", model)
    found = None
    for module in head.modules():
        if isinstance(module, nn.Linear):
            found = module
    return found
