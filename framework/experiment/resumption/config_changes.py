"""Compare the config of a run with a new one: the changes, and their effect on the weights."""

import json
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from framework.composition.sections import SECTIONS, section_settings
from framework.composition.spec import Spec
from framework.contracts.callback import Callback, changes_training, follows_metrics
from framework.contracts.schedule import observes
from framework.registry.annotations import members, strip
from framework.registry.registry import Maker, Registry

CRITERION = ("monitor", "mode", "min_delta")  # settings of a callback that decides by metrics
SAME_BITS = (  # settings that do not change a bit of the weights of a resumed run
    "run.",
    "plugins",
    "init_from",
    "loggers.",
    "metrics.",
    "loader.workers",
    "loader.eval_batch_size",
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.log_every",
    "trainer.validate_every",
    "trainer.profile",
)
OF_PROCESSES = ("strategy", "trainer.devices")
"""Settings that change the weights of a resumed run by rounding only: a checkpoint from any number
of processes resumes on any other."""


def fingerprint(tree: Mapping[str, Any]) -> str:
    """Return a hash of a config, without the sections `run` and `plugins`."""
    kept = {
        path: value
        for path, value in setting_leaves(tree)
        if not path.startswith(("run.", "plugins"))
    }
    return sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def compare_configs(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings that differ: "optimizer.lr=0.1 (was 0.001)" by path.

    A setting of a section that an older run does not have, since it is newer, had its default.
    """
    before = dict(setting_leaves(old))
    after = dict(setting_leaves(new))
    changed = {}
    for path in {**before, **after}:
        if path not in before and is_section_default(path, after[path]):
            continue
        if not equal_values(before.get(path), after.get(path)):
            changed[path] = f"{path}={after.get(path)} (was {before.get(path)})"
    return changed


def is_section_default(path: str, value: Any) -> bool:
    """Return whether a value is the default of a setting of a section, such as trainer.fused."""
    section, _, name = path.partition(".")
    if section not in SECTIONS:
        return False
    setting = section_settings(section).get(name)
    return setting is not None and not setting.required and setting.default == value


def equal_values(one: Any, other: Any) -> bool:
    """Return whether two settings are equal; NaN is equal to NaN, also in lists, as in JSON."""
    return one == other or json.dumps(one, default=str) == json.dumps(other, default=str)


def setting_leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and value of each setting; a part without settings has an empty mapping."""
    if not isinstance(tree, Mapping) or not tree:
        yield path, tree
        return
    for key, value in tree.items():
        yield from setting_leaves(value, f"{path}.{key}" if path else str(key))


def keeps_bits(path: str) -> bool:
    """Return whether a setting may change in a resumed run without --inexact.

    The weights stay the same, apart from rounding if the number of processes changes.
    """
    if path.startswith("callbacks."):
        name = path.split(".")[1]
        callbacks = Registry.every["callback"]
        return name in callbacks and not changes_training(callbacks.get(name).part)
    return path.startswith((*SAME_BITS, *OF_PROCESSES))


def is_path_of_data(path: str, spec: Spec) -> bool:
    """Return whether a setting of the data is a file or folder."""
    section, _, name = path.partition(".")
    setting = spec.parts["data"].entry.settings.get(name)
    if section != "data" or setting is None:
        return False
    return any(strip(kind) is Path for kind in members(strip(setting.annotation)))


def observed_changes(
    changed: Mapping[str, str], before: Mapping[str, Any], spec: Spec
) -> Iterator[str]:
    """Yield the changes that have an effect only because a part of the run reacts to them.

    A schedule or callback that decides by metrics decides differently if they are measured
    differently or at other times.

    Args:
        changed: the text of each change, by path.
        before: the earlier config.
        spec: the new config.
    """
    observing = list(observers(spec))
    for path, text in changed.items():
        parts = [part for part, monitor in observing if affects(path, monitor, spec)]
        callbacks = [m for m in spec.parts["callback"] if path.startswith(dependencies(m))]
        parts += [str(maker.entry) for maker in callbacks]
        if parts:
            yield f"{text}, used by {' and '.join(parts)}"
    for maker in spec.parts["callback"]:
        name = maker.entry.name
        is_new = name not in (before.get("callbacks") or {})
        if is_new or not follows_metrics(maker.entry.part):
            continue
        for path, text in changed.items():
            if path.startswith(f"callbacks.{name}.") and path.endswith(CRITERION):
                yield text


def dependencies(maker: Maker) -> tuple[str, ...]:
    """Return the prefixes of the settings that a callback depends on."""
    part = maker.entry.part
    if not isinstance(part, type) or not issubclass(part, Callback):
        return ()
    return tuple(part.depends_on(maker.settings))


def observers(spec: Spec) -> Iterator[tuple[str, str | None]]:
    """Yield the parts that decide by metrics, with the metric that they monitor (None: unknown)."""
    makers = [maker for maker in spec.parts["callback"] if follows_metrics(maker.entry.part)]
    scheduler = spec.parts["scheduler"]
    if scheduler is not None and observes(scheduler.entry.part):
        makers.append(scheduler)
    for maker in makers:
        setting = maker.entry.settings.get("monitor")
        default = None if setting is None else setting.default
        yield str(maker.entry), maker.settings.get("monitor", default)


def affects(path: str, monitor: str | None, spec: Spec) -> bool:
    """Return whether a setting affects a monitored value, or the times when it is measured."""
    split, _, name = (monitor or "").partition("/")
    if path == "trainer.log_every":
        return split in ("train", "")
    if path in ("trainer.validate_every", "loader.eval_batch_size"):
        return split != "train"
    if path.startswith("metrics.") and name != "loss":
        known = [maker.entry.name for maker in spec.parts["metric"]]
        return path.split(".")[1] == name or name not in known
    return False
