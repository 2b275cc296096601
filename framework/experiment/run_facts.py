"""The facts of the data of a run."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from framework.contracts.task import Task
from framework.data.content import digests_of
from framework.data.dataset import Data, splits_of
from framework.runs.folder import read_facts

from .build import scale_of


def facts_of(data: Data, task: Task, out_shape: Sequence[int]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "in_shape": list(data.in_shape),
        "out_shape": list(out_shape),
    }
    sizes = {name: len(split) for name, split in splits_of(data).items() if len(split)}
    if data.columns:
        facts["columns"] = list(data.columns)
    if (scale := scale_of(data, task)) is not None:
        facts["scale"] = list(scale)
    if data.fold is not None:
        facts["fold"] = data.fold
    facts |= {"classes": list(data.classes), "samples": sizes, "data": data.facts()}
    facts["content"] = digests_of(data)
    return facts


def fact_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield what differs between the facts of a run's data and those of the data now."""
    for name in {**before, **now}:
        if name != "content" and before.get(name) != now.get(name):
            yield f"{name}: {json.dumps(now.get(name))[:100]}, was {json.dumps(before.get(name))[:100]}"


def content_changes(known: Any, content: Mapping[str, Any]) -> Iterator[str]:
    """Yield the splits whose content is not the one that a run's facts.json keeps."""
    if not isinstance(known, dict):
        return  # a run of an older version
    for split in {**known, **content}:
        if known.get(split) != content.get(split):
            yield f"other content in the {split} split"


def unknown_content(run: Path, change: str) -> Iterator[str]:
    """Yield why the data of a run cannot be compared with data at another path, if so."""
    content = read_facts(run).get("content")
    if not isinstance(content, dict):
        yield f"{change} (the run is of an older version, which did not note the content of its data)"
        return
    unknown = [split for split, digest in content.items() if digest is None]
    if unknown:
        yield f"{change} (the content of the {' and '.join(unknown)} split is unknown or too large to be compared)"
