"""Compare the config of a run with a new one."""

import json
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from framework.composition.spec import Spec
from framework.contracts.callback import Callback, changes_training, follows_metrics
from framework.contracts.schedule import observes
from framework.registry.registry import Maker, Registry
from framework.registry.schema import members, strip

JUDGED_BY = ("monitor", "mode", "min_delta")  # settings of a callback that decides by logged values
SAME_BITS = (  # what may differ in a resumed run without a bit of its weights being another
    *(
        "run.",
        "plugins",
        "init_from",
        "loggers.",
        "metrics.",
        "loader.workers",
        "loader.eval_batch_size",
    ),
    *(
        "trainer.max_epochs",
        "trainer.max_steps",
        "trainer.log_every",
        "trainer.validate_every",
        "trainer.profile",
    ),
)


def fingerprint(tree: Mapping[str, Any]) -> str:
    """Return a hash of what makes two runs the same experiment: all but where it lies and how it is watched."""
    same = {
        path: value
        for path, value in setting_leaves(tree)
        if not path.startswith(("run.", "plugins"))
    }
    return sha256(json.dumps(same, sort_keys=True, default=str).encode()).hexdigest()


def changed_values(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (path, "optimizer.lr=0.1 (was 0.001)") for every setting that differs."""
    before, after = dict(setting_leaves(old)), dict(setting_leaves(new))
    changed = [path for path in {**before, **after} if not same(before.get(path), after.get(path))]
    return [(path, f"{path}={after.get(path)} (was {before.get(path)})") for path in changed]


def same(one: Any, other: Any) -> bool:
    """Whether two settings are equal. NaN equals NaN, also in lists; JSON writes both alike."""
    return one == other or json.dumps(one, default=str) == json.dumps(other, default=str)


def setting_leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every setting with its path; an empty mapping counts as one, so that a part without settings shows."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from setting_leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def keeps_bits(path: str) -> bool:
    """Whether a setting may change in a resumed run. A callback says for itself whether it changes the training."""
    if path.startswith("callbacks."):
        name = path.split(".")[1]
        entry = Registry.every["callback"]
        return name in entry and not changes_training(entry.get(name).part)
    return path.startswith(SAME_BITS)


def is_path_of_data(path: str, spec: Spec) -> bool:
    """Whether a setting of the data says where a file or folder lies."""
    section, _, name = path.partition(".")
    setting = spec.parts["data"].entry.settings.get(name)
    if section != "data" or setting is None:
        return False
    return any(strip(kind) is Path for kind in members(strip(setting.annotation)))


def observed_changes(
    changed: Sequence[tuple[str, str]],
    before: Mapping[str, Any],
    spec: Spec,
) -> Iterator[str]:
    """Yield the changes that matter only because a part of the run reacts to them.

    A schedule or a callback that decides by measured values decides otherwise when these are
    measured differently, or at other times.
    """
    watching = list(observers(spec))
    for path, text in changed:
        parts = [part for part, monitor in watching if measures(path, monitor, spec)]
        for maker in spec.parts["callback"]:
            parts += [str(maker.entry)] if path.startswith(prefixes(maker)) else []
        if parts:
            yield f"{text}, used by {' and '.join(parts)}"
    for maker in spec.parts["callback"]:
        name = maker.entry.name
        known = name in (before.get("callbacks") or {})
        if not known or not follows_metrics(maker.entry.part):
            continue
        for path, text in changed:
            if path.startswith(f"callbacks.{name}.") and path.endswith(JUDGED_BY):
                yield text


def prefixes(maker: Maker) -> tuple[str, ...]:
    """Return the prefixes of the settings that a callback depends on."""
    part = maker.entry.part
    if not isinstance(part, type) or not issubclass(part, Callback):
        return ()
    return tuple(part.depends_on(maker.settings))


def observers(spec: Spec) -> Iterator[tuple[str, str | None]]:
    """Yield the parts that decide by measured values, with what they monitor (None: unknown)."""
    makers = [maker for maker in spec.parts["callback"] if follows_metrics(maker.entry.part)]
    scheduler = spec.parts["scheduler"]
    if scheduler is not None and observes(scheduler.entry.part):
        makers.append(scheduler)
    for maker in makers:
        setting = maker.entry.settings.get("monitor")
        default = None if setting is None else setting.default
        yield str(maker.entry), maker.settings.get("monitor", default)


def measures(path: str, monitor: str | None, spec: Spec) -> bool:
    """Whether a setting has a say in the monitored value, or in when it is measured."""
    split, _, name = (monitor or "").partition("/")
    if path == "trainer.log_every":
        return split in ("train", "")
    if path in ("trainer.validate_every", "loader.eval_batch_size"):
        return split != "train"
    if path.startswith("metrics.") and name != "loss":
        known = [maker.entry.name for maker in spec.parts["metric"]]
        return path.split(".")[1] == name or name not in known
    return False
