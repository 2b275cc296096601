"""Composes the jobs of a sweep: by Hydra once for each choice of parts, after which values are put in.

Hydra takes 90 ms for a job. What differs between most trials is a number; then the tree of the same parts, composed
once, gets that number, and is checked as always. Where that might not be the same, Hydra composes.
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
from .overrides import value_of
from .spec import followed_kind

Path = tuple[str, ...]


@dataclass
class Base:
    """A composed tree, and whether it may be changed by putting in values."""

    tree: dict[str, Any]
    experiment: str | None
    plain: bool


class Composer:
    """Makes jobs from overrides as Hydra's sweepers give them."""

    def __init__(self, loader: ConfigLoader, master: DictConfig, composing: Composing):
        self.loader, self.master, self.composing = loader, master, composing
        self.bases: dict[tuple[str, ...], Base] = {}
        self.swept = tuple(f"++{key}=" for key in composing.overrides.swept)

    def job(self, overrides: Sequence[str], number: int) -> Job:
        """Return a checked job. Raises ConfigError."""
        base, values = self._split(overrides)
        if values is None:
            base = self._compose(tuple(overrides), number)
        tree = with_values(base.tree, values or {})
        return self.composing.checked(tree, base.experiment, list(overrides), number)

    def _split(self, overrides: Sequence[str]) -> tuple[Base, dict[Path, Any] | None]:
        """Return the tree of a job's parts and the values that make the job of it; None when Hydra has to compose."""
        swept = {
            key_path(text): value_of(text) for text in overrides if text.startswith(self.swept)
        }
        rest = tuple(text for text in overrides if not text.startswith(self.swept))
        base = self._base(rest)
        fixed = [key_path(text) for text in rest if text[0] in "+~"]
        alone = not any(
            related(path, other) for path in swept for other in (*fixed, *swept.keys() - {path})
        )
        fits = (
            base.plain
            and alone
            and all(put_in(base.tree, path, value) for path, value in swept.items())
        )
        return base, (swept if fits else None)

    def _base(self, overrides: tuple[str, ...]) -> Base:
        if overrides not in self.bases:
            self.bases[overrides] = self._compose(overrides, 0)
        return self.bases[overrides]

    def _compose(self, overrides: tuple[str, ...], number: int) -> Base:
        config = compose_job(self.loader, self.master, overrides, number)
        experiment = config.hydra.runtime.choices.get("experiment")
        with current_config(config):
            rest = without_hydra(config)
            tree = to_tree(rest, self.composing.sources)
        return Base(tree, experiment, not list(references(OmegaConf.to_container(rest))))


def key_path(override: str) -> Path:
    return tuple(re.split(r"[./]", override.lstrip("+~").partition("=")[0]))


def related(one: Path, other: Path) -> bool:
    """Whether one lies in the other."""
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


def put_in(tree: Mapping[str, Any], path: Path, value: Any) -> bool:
    """Whether putting in a value does what Hydra would do: a number or word in the place of another."""
    for key in path[:-1]:
        tree = tree.get(key) if isinstance(tree, Mapping) else None  # type: ignore[assignment]
    if not isinstance(tree, Mapping) or path[-1] not in tree:
        return False
    values = [tree[path[-1]], *(value if isinstance(value, list) else [value])]
    return all(isinstance(each, int | float | str | None) and not refers(each) for each in values)


def refers(value: Any) -> bool:
    return isinstance(value, str) and ("${" in value or "\\" in value)


def with_values(tree: Mapping[str, Any], values: Mapping[Path, Any]) -> dict[str, Any]:
    """Return a copy of a tree with values in their places; what is not changed is shared."""
    changed = dict(tree)
    for (key, *deeper), value in values.items():
        changed[key] = with_values(changed[key], {tuple(deeper): value}) if deeper else value
    return changed


def references(tree: Any) -> Iterator[str]:
    """Yield every reference to another key but those by which a part follows the experiment's choice of a kind."""
    following = {followed_kind(kind) for kind in Registry.every}
    texts = re.findall(r'"((?:[^"\\]|\\.)*)"', json.dumps(tree, default=str))
    yield from (text for text in texts if "${" in text and text not in following)
