"""The facts of the data of a run (facts.json), and their comparison with the data now."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from framework.contracts.task import Task
from framework.data.content import digests_of
from framework.data.dataset import Data, splits_of
from framework.errors import short
from framework.runs.folder import read_facts

from .build import scale_of


def data_facts(data: Data, task: Task, out_shape: Sequence[int]) -> dict[str, Any]:
    """Return the content of facts.json.

    Args:
        out_shape: of the outputs that the task needs.
    """
    facts: dict[str, Any] = {"in_shape": list(data.in_shape), "out_shape": list(out_shape)}
    if data.columns:
        facts["columns"] = list(data.columns)
    scale = scale_of(data, task)
    if scale is not None:
        facts["scale"] = list(scale)
    if data.fold is not None:
        facts["fold"] = data.fold
    facts["classes"] = list(data.classes)
    facts["samples"] = {name: len(split) for name, split in splits_of(data).items() if len(split)}
    facts["data"] = data.facts()
    facts["content"] = digests_of(data)
    return facts


def fact_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield the differences between two facts, without those of the content."""
    for name in {**before, **now}:
        if name != "content" and before.get(name) != now.get(name):
            old_text = short(before.get(name), 100)
            new_text = short(now.get(name), 100)
            yield f"{name}: {new_text}, was {old_text}"


def content_changes(before: Any, now: Mapping[str, Any]) -> Iterator[str]:
    """Yield the splits whose content differs.

    Args:
        before: the digest of each split from facts.json; None in a run of an older version.
        now: the digest of each split now.
    """
    if not isinstance(before, dict):
        return
    for split in {**before, **now}:
        if before.get(split) != now.get(split):
            yield f"the content of the {split} split differs"


def unknown_content(run: Path) -> str | None:
    """Return why the data of a run cannot be compared by content; None if it can."""
    content = read_facts(run).get("content")
    if not isinstance(content, dict):
        return "the run is of an older version, which did not record the content of its data"
    unknown = [split for split, digest in content.items() if digest is None]
    if unknown:
        splits = " and ".join(unknown)
        return f"the content of the {splits} split is unknown or too large to be compared"
    return None
