"""Compose the jobs of a sweep faster: Hydra composes each choice of parts once.

Hydra needs 90 ms for a job. Most trials differ in numbers only. Their tree is the composed tree of
the same parts with the numbers replaced, and is checked as always. Where this might give another
result, Hydra composes the job.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from framework.registry.registry import Registry

from .compose import Composing, Job, to_tree, without_hydra
from .hydra_internals import ConfigLoader, compose_job, current_config
from .override_syntax import override_key, value_of
from .spec import followed_kind

KeyPath = tuple[str, ...]


@dataclass
class Base:
    """A composed tree; `plain` if it has no references to the values that a job may replace."""

    tree: dict[str, Any]
    experiment: str | None
    plain: bool


class Composer:
    """Makes jobs from overrides in the form in which Hydra's sweepers give them."""

    def __init__(self, loader: ConfigLoader, master: DictConfig, composing: Composing):
        self.loader = loader
        self.master = master
        self.composing = composing
        self.bases: dict[tuple[str, ...], Base] = {}
        self.swept = tuple(f"++{key}=" for key in composing.overrides.swept)

    def job(self, overrides: Sequence[str], number: int) -> Job:
        """Return a checked job.

        Args:
            overrides: the overrides of the job.
            number: the number of the job.

        Raises:
            ConfigError: with all problems.
        """
        base, values = self._split(overrides)
        if values is None:
            base = self._compose(tuple(overrides), number)
            values = {}
        tree = with_values(base.tree, values)
        return self.composing.checked(tree, base.experiment, list(overrides), number)

    def _split(self, overrides: Sequence[str]) -> tuple[Base, dict[KeyPath, Any] | None]:
        """Split the overrides of a job into the tree of its parts and the values to replace in it.

        The values are None if Hydra has to compose the job.
        """
        values: dict[KeyPath, Any] = {}
        rest: list[str] = []
        for text in overrides:
            if text.startswith(self.swept):
                values[key_path(text)] = value_of(text)
            else:
                rest.append(text)
        base = self._base(tuple(rest))
        fixed = [key_path(text) for text in rest if text[0] in "+~"]
        if not base.plain or overlap(values, fixed):
            return base, None
        for path, value in values.items():
            if not can_replace(base.tree, path, value):
                return base, None
        return base, values

    def _base(self, overrides: tuple[str, ...]) -> Base:
        if overrides not in self.bases:
            self.bases[overrides] = self._compose(overrides, 0)
        return self.bases[overrides]

    def _compose(self, overrides: tuple[str, ...], number: int) -> Base:
        config = compose_job(self.loader, self.master, overrides, number)
        experiment = config.hydra.runtime.choices.get("experiment")
        with current_config(config):
            rest = without_hydra(config)
            tree = to_tree(rest, self.composing.sources_of_job(overrides))
        plain = not any(references(OmegaConf.to_container(rest)))
        return Base(tree, experiment, plain)


def key_path(override: str) -> KeyPath:
    """Return the key of an override as a path: ("model", "norm") for `++model.norm=batch`."""
    return tuple(override_key(override).split("."))


def overlap(values: Mapping[KeyPath, Any], fixed: Sequence[KeyPath]) -> bool:
    """Return whether one of the values lies in another one or in a fixed path, or contains it."""
    for path in values:
        others = [other for other in values if other != path]
        for other in [*fixed, *others]:
            shorter = min(len(path), len(other))
            if path[:shorter] == other[:shorter]:
                return True
    return False


def can_replace(tree: Mapping[str, Any], path: KeyPath, value: Any) -> bool:
    """Return whether replacing a value in the tree gives the same as composing with the override.

    It does where a number or word replaces a number or word.
    """
    node: Any = tree
    for key in path[:-1]:
        node = node.get(key) if isinstance(node, Mapping) else None
    if not isinstance(node, Mapping) or path[-1] not in node:
        return False
    values = [node[path[-1]], *(value if isinstance(value, list) else [value])]
    return all(isinstance(each, int | float | str | None) and not refers(each) for each in values)


def refers(value: Any) -> bool:
    """Return whether a value is a text that OmegaConf may resolve."""
    return isinstance(value, str) and ("${" in value or "\\" in value)


def with_values(tree: Mapping[str, Any], values: Mapping[KeyPath, Any]) -> dict[str, Any]:
    """Return a copy of a tree with other values; unchanged branches are shared."""
    changed = dict(tree)
    for (key, *deeper), value in values.items():
        changed[key] = with_values(changed[key], {tuple(deeper): value}) if deeper else value
    return changed


def references(tree: Any) -> Iterator[str]:
    """Yield all references to other keys, except those to the experiment's choice of a kind."""
    following = {followed_kind(kind) for kind in Registry.every}
    for text in re.findall(r'"((?:[^"\\]|\\.)*)"', json.dumps(tree, default=str)):
        if "${" in text and text not in following:
            yield text
