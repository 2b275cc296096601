"""Explain a setting: its value, the place that gives it, and the values that this one replaces."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from framework.composition.origins import Origins
from framework.composition.spec import Spec
from framework.errors import ConfigError, FrameworkError, did_you_mean
from framework.errors.paths import shorter
from framework.experiment.resumption.config_changes import setting_leaves
from framework.experiment.trained.load import read_spec_of
from framework.runs.run_files import RunFiles, setting_named

MOST_PLACES = 100  # of a setting in a provenance.json
USED = "used"
REPLACED = "replaced"


@dataclass
class Place:
    """A place that gives a setting a value.

    Attributes:
        value: in plain values.
        source: such as "conf/experiment/spam.yaml:7", "command line", or a line of a signature.
        by: the override as typed, or "default of optimizer/adamw"; "" for a config file.
        effect: "used", "replaced", or "not used: ...".
    """

    value: Any
    source: str
    by: str
    effect: str

    @property
    def text(self) -> str:
        """The place for a table."""
        if self.by.startswith("default"):
            return f"{self.by} ({self.source})" if self.source else self.by
        return f"{self.source}: {self.by}" if self.by else self.source


@dataclass
class Explained:
    """The value of a setting, and the places that give it one.

    Attributes:
        setting: the path, such as "optimizer.lr".
        value: in plain values.
        places: the one that is used first, the default last.
        note: what is not known.
    """

    setting: str
    value: Any
    places: list[Place] = field(default_factory=list)
    note: str = ""

    @property
    def source(self) -> str:
        """The place that gives the value; "" if it is not known."""
        for place in self.places:
            if place.effect == USED:
                return place.text
        return ""


def explain_setting(spec: Spec, setting: str) -> list[Explained]:
    """Explain a setting of a composed experiment, or all settings of a part or section.

    Args:
        spec: the experiment.
        setting: a path such as "optimizer.lr", or "optimizer".

    Raises:
        FrameworkError: the experiment has no such setting.
    """
    return explained(spec.tree, setting, spec.origins, spec)


def explain_setting_of_run(run: RunFiles, setting: str) -> list[Explained]:
    """Explain a setting of a run, from the files in its folder.

    The defaults are those of the parts now; they are left out if a part is not available.

    Raises:
        FrameworkError: the run has no config, or no such setting.
    """
    if not run.config:
        raise FrameworkError(f"{run.path}: {'; '.join(run.problems)}")
    try:
        spec = read_spec_of(run.path, run.config)
    except ConfigError:
        spec = None
    recorded = recorded_origins(run)
    if recorded is None and spec is not None:
        recorded = Origins(spec, overrides=run.overrides).all_written()
    found = explained(run.config, setting, recorded, spec)
    if "settings" not in run.provenance:
        for each in found:
            if not each.source:
                each.note = "the run does not record in which config file this was written"
    return found


def recorded_origins(run: RunFiles) -> dict[str, list[dict[str, Any]]] | None:
    """Return where the settings of a run were written; None in a run of an older version."""
    recorded = run.provenance.get("settings")
    if not isinstance(recorded, dict):
        return None
    found = {}
    for path, places in recorded.items():
        if isinstance(places, list):
            found[path] = [place for place in places[:MOST_PLACES] if isinstance(place, dict)]
    return found


def explained(
    tree: Mapping[str, Any],
    setting: str,
    written: Mapping[str, Iterable[Mapping[str, Any]]] | None,
    spec: Spec | None,
) -> list[Explained]:
    """Explain the settings at and below a path.

    Args:
        tree: the experiment.
        setting: the path, see `setting_named`.
        written: by path, the places in config files and on the command line; None if not recorded.
        spec: of the experiment; None if it cannot be checked.

    Raises:
        FrameworkError: there is no such setting.
    """
    setting = setting.replace("/", ".")
    leaves = dict(setting_leaves(tree))
    for path in written or ():
        if path not in leaves:  # a part in a list of parts, or a kind that only parts use
            leaves[path] = value_at(tree, path, written[path] if written else ())
    names = [f"{setting}.name", setting]
    chosen = [path for path in leaves if path in names]
    chosen += [path for path in leaves if path.startswith(f"{setting}.") and path not in names]
    if not chosen:
        known = {path.removesuffix(".name") for path in leaves}
        known |= {path.partition(".")[0] for path in leaves}
        complete = setting_named(setting, sorted(known), "explain")
        if complete is not None:
            return explained(tree, complete, written, spec)
        raise FrameworkError(
            f"explain {setting}: the experiment has no such setting; {did_you_mean(setting, known)}"
        )
    origins = None if spec is None else Origins(spec)
    found = []
    for path in chosen:
        places = None if written is None else written.get(path, ())
        found.append(explain_path(path, leaves[path], places, origins))
    return found


def value_at(tree: Any, path: str, places: Iterable[Mapping[str, Any]]) -> Any:
    """Return the value at a path that is no leaf of the tree."""
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    if isinstance(tree, Mapping):
        return path.rpartition(".")[2]  # the name of the part
    used = [place.get("value") for place in places if "other_part" not in place]
    return used[-1] if used else tree


def explain_path(
    path: str,
    value: Any,
    written: Iterable[Mapping[str, Any]] | None,
    origins: Origins | None,
) -> Explained:
    """Explain one setting; see `explained` for the arguments."""
    result = Explained(path.removesuffix(".name") or path, value)
    effect = USED
    for place in reversed(list(written or ())):
        other_part = place.get("other_part")
        text = f"not used: of {other_part}" if other_part is not None else effect
        source = shorter(str(place.get("place", "")))
        result.places.append(Place(place.get("value"), source, str(place.get("by", "")), text))
        if other_part is None:
            effect = REPLACED
    default = None if origins is None else origins.default(path)
    if default is not None:
        source = default.place
        if not result.places and value != default.value:
            effect = REPLACED
        result.places.append(Place(default.value, source, default.by, effect))
    if not result.source:
        result.note = "where it was written is not known"
    return result
