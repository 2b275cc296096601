"""Samples of a run for callbacks that show them, with their labels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from framework import (
    Batch,
    Batches,
    Context,
    DataError,
    GatheredSplit,
    RaggedSplit,
    WindowSplit,
    class_names,
    count_rows,
    is_in_memory,
    join_rows,
    map_rows,
    move_batch,
    seeds,
    whole_batches,
)
from framework.contracts.state import Cadence, State


def is_due(cadence: Cadence, state: State) -> bool:
    """Return whether a cadence is due after a step, or the step is the last one of the run."""
    due = cadence.due(state)
    return due or (state.total_steps > 0 and state.step == state.total_steps)


def spread_samples(trainer: Context, count: int, batches: Batches | None = None) -> Batch:
    """Return evenly spaced samples of the validation split, or of training without one.

    Data of unknown length gives its first samples. All processes return the same samples.

    Args:
        count: the largest number of samples.
        batches: those of another split.

    Returns:
        One batch on the device, in memory that no loader uses again.
    """
    if batches is None:
        batches = trainer.train_batches if trainer.val_batches is None else trainer.val_batches
    split = batches.split
    if split is not None and len(split):
        chosen = torch.linspace(0, len(split) - 1, min(count, len(split))).round().long()
        if is_in_memory(split):
            return move_batch(split[chosen.to(split.tensors[0].device)], trainer.device)
        if isinstance(split, GatheredSplit) and not isinstance(split, WindowSplit):
            return move_batch(split.gather(chosen), trainer.device)
    stride = 1 if split is None else max(1, len(split) // count)
    found: list[Batch] = []
    position = 0
    missing = count
    with seeds.undisturbed(), whole_batches(batches):
        for batch in batches.epoch():
            rows = count_rows(batch)
            part = slice(-position % stride, None, stride)
            kept = map_rows(lambda column, part=part: clone(column[part]), batch)  # type: ignore[misc]
            position += rows
            if count_rows(kept):
                found.append(move_batch(kept, trainer.device))
                missing -= count_rows(kept)
            if missing <= 0:
                break
    if not found:
        raise DataError("the data has no sample")
    joined = found[0] if len(found) == 1 else join_rows(found)
    return map_rows(lambda column: column[:count], joined)


def clone(column: Any) -> Any:
    """Return a copy of a tensor, since a loader may reuse its memory; other values unchanged."""
    return column.clone() if isinstance(column, Tensor) else column


def model_outputs(trainer: Context, batch: Batch, rows: int = 256) -> Any:
    """Return the outputs of the model in evaluation mode, on the device (collective)."""
    outputs = []
    with torch.no_grad(), trainer.precision.inference(trainer.model), seeds.undisturbed():
        for first in range(0, count_rows(batch), rows):
            last = first + rows
            part = map_rows(lambda column, a=first, b=last: column[a:b], batch)  # type: ignore[misc]
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


def as_pictures(inputs: Any) -> Tensor | None:
    """Return images (N, 1 or 3, H, W) in [0, 1] on the CPU; None for other inputs.

    The values of all images are scaled together; channels other than 1 or 3 are averaged.
    """
    if not isinstance(inputs, Tensor) or inputs.ndim != 4:
        return None
    images = inputs.detach().float().cpu()
    if images.shape[1] not in (1, 3):
        images = images.mean(1, keepdim=True)
    low, high = images.aminmax()
    return (images - low) / (high - low).clamp(min=1e-6)


def token_texts(trainer: Context, tokens: Sequence[int]) -> list[str]:
    """Return the text of each token; their numbers if the tokenizer of the data has no text."""
    tokenizer = tokenizer_of(trainer)
    size = 0 if tokenizer is None else tokenizer.size
    texts = []
    for token in tokens:
        if token >= size:
            texts.append(str(token))
            continue
        text = str(tokenizer.decode([token]))
        texts.append(text.replace("\n", "⏎").replace(" ", "␣") or "·")
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
