"""Going on: with a run that was cut off (exactly), or from what another has learned (`init_from`)."""

import copy
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from framework.composition.spec import Spec
from framework.contracts.callback import Callback, changes_training, follows_metrics
from framework.contracts.schedule import observes
from framework.errors import CheckpointError, ConfigError, RunError, did_you_mean, short
from framework.errors.paths import expanded, override
from framework.errors.terminal import note
from framework.registry.registry import Maker, Registry
from framework.registry.schema import members, strip
from framework.runs import checkpoint
from framework.runs.folder import (
    RunFolder,
    dump,
    read_config,
    read_facts,
    run_behind,
    run_of_checkpoint,
)
from framework.system.files import open_file, parse_yaml, read_bytes, read_rows
from framework.training.optimizer_state import (
    check_state,
    group_settings,
    merged_groups,
    older_settings,
)

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

MOST_STATUS = 2**20  # bytes
MOST_PARSED = 500  # configs that `resume=auto` reads; one takes 2 ms
MOST_NOTES = 3
MOST_THREADS = 1024

NOT_OF_A_RESUMED_RUN = ("run", "init_from", "resume", "plugins", "sweep", "hydra")


@dataclass
class Resumed:
    """A run to go on with: its folder (locked), and its newest good checkpoint (None: it was cut off before one).

    data_moved: whether the data has another path than before.
    chosen: the checkpoint that the user named, if it is not to be the newest good one.
    """

    folder: RunFolder
    step: int = 0
    training: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    changed: dict[str, str] = field(default_factory=dict)
    threads: int | None = None  # of an operation, when it was cut off
    config: dict[str, Any] = field(default_factory=dict)  # as it was until now
    chosen: Path | None = None
    data_moved: bool = False

    @property
    def done(self) -> bool:
        """Whether the run has nothing left to do, test included, and nothing new was asked of it."""
        return status_of(self.folder.path) == "done" and not self.changed and self.chosen is None

    def rewind(self) -> None:
        """Let the chosen checkpoint be the newest one, also for whoever resumes the run after a kill."""
        if self.chosen is None:
            return
        reason = f"goes on from step {self.step}"
        self.folder.write("status.json", {"status": "stopped", "reason": reason, "step": self.step})
        checkpoint.set_aside(self.folder.path / "checkpoints", self.chosen)

    def changes(self, path: str) -> bool:
        return path in self.changed


def find_run(spec: Spec, experiment: str) -> Path | None:
    """Return the folder that `resume=` means: the run of a path; for auto the run of this name, or else the newest
    unfinished run of the same config; None when a new run is to begin. Raises RunError for a path that is no run, and
    no checkpoint of one.
    """
    if spec.resume == "never":
        return None
    if spec.resume != "auto":
        run = run_meant_by(expanded(spec.resume))
        read_config(run)
        return run
    root, name = Path(spec.sections["run"]["root"]) / experiment, spec.sections["run"]["name"]
    if name is not None:
        return root / name if (root / name / "config.yaml").is_file() else None
    return find_unfinished(root, spec.tree)


class Candidate(NamedTuple):
    """A run folder that `resume=auto` looks at, and when its config was written."""

    path: Path
    written: int


def find_unfinished(root: Path, tree: Mapping[str, Any]) -> Path | None:
    """Return the newest unfinished run of a config below a folder of runs.

    What is broken is skipped with a note. Of a run that is not done, status.json tells the fingerprint of its config;
    the config of an older one, which does not, is read if its text is that of this config, and of the newest
    `MOST_PARSED` in any case.
    """
    skipped: list[str] = []
    wanted, own = fingerprint(tree), comparable(dump("config.yaml", tree).encode())
    parsed = 0
    found = None
    for run in resumable_runs(root, skipped):
        try:
            status = read_status(run.path)
            if status.get("status") == "done" or status.get("config", wanted) != wanted:
                continue
            text = read_bytes(run.path, "config.yaml")
            if "config" not in status and comparable(text) != own:
                parsed += 1
                if parsed > MOST_PARSED:
                    continue
            config = parse_yaml(text, run.path / "config.yaml")
            if isinstance(config, dict) and fingerprint(config) == wanted:
                found = run.path
                break
        except (OSError, RunError, RecursionError, ValueError) as error:
            skipped.append(f"skipped {run.path}: {error}")
    if parsed > MOST_PARSED:
        skipped.append(
            f"not compared: {parsed - MOST_PARSED} older runs, whose status.json has no config"
        )
    print_notes(skipped)
    return found


def resumable_runs(root: Path, skipped: list[str]) -> list[Candidate]:
    """Return the runs below a folder, the newest first; what is no run is added to `skipped` if it looks like one."""
    found = []
    try:
        entries = list(os.scandir(root))
    except OSError:
        return []
    for entry in entries:
        config = f"{entry.path}/config.yaml"
        try:
            if not entry.is_dir(follow_symlinks=False):
                if entry.is_symlink() and entry.is_dir():
                    skipped.append(
                        f"skipped {entry.path}: it is a symbolic link (resume={entry.path} follows it)"
                    )
                continue
            about = os.lstat(config)
        except FileNotFoundError:
            continue
        except OSError as error:
            skipped.append(f"skipped {entry.path}: {error.strerror}")
            continue
        if stat.S_ISREG(about.st_mode):
            found.append(Candidate(Path(entry.path), about.st_mtime_ns))
        else:
            skipped.append(f"skipped {entry.path}: its config.yaml is not a regular file")
    return sorted(found, key=lambda run: run.written, reverse=True)


def read_status(run: Path) -> dict[str, Any]:
    """Return the content of status.json; nothing when it is missing or something else.

    It tells the fingerprint of the config only if it is not older than the config.
    """
    try:
        with open_file(run, "status.json", most=MOST_STATUS) as file:
            updated = os.fstat(file.fileno()).st_mtime_ns
            status = json.loads(file.read(MOST_STATUS))
    except (OSError, RunError, ValueError, RecursionError):
        return {}
    if not isinstance(status, dict):
        return {}
    if "config" in status and updated < os.lstat(run / "config.yaml").st_mtime_ns:
        del status["config"]
    return status


def comparable(config: bytes) -> bytes:
    """Return the text of a config without the sections that may differ between two runs of one experiment."""
    return re.sub(rb"(?m)^(run|plugins):.*\n(?:[ -].*\n)*", b"", config)


def print_notes(notes: Sequence[str]) -> None:
    """Print notes on the standard error, a few of them."""
    for each in notes[:MOST_NOTES]:
        note(each)
    if len(notes) > MOST_NOTES:
        note(f"{len(notes) - MOST_NOTES} more notes of this kind")


def run_meant_by(path: Path) -> Path:
    """Return the run that is to go on: a folder itself, or the run of a checkpoint."""
    path = run_behind(path)
    return run_of_checkpoint(path) or path


def read_resumable(path: Path) -> dict[str, Any]:
    """Return the config of a run to go on with, by its path or that of a checkpoint. Raises RunError for no run."""
    return read_config(run_meant_by(path))


def named_checkpoint(resume: str) -> Path | None:
    """Return the checkpoint that `resume=RUN/checkpoints/step-00000040` names; None for a run.

    `best` is the checkpoint that the link leads to. Raises RunError if there is none, CheckpointError if it is damaged.
    """
    path = run_behind(expanded(resume))
    run = run_of_checkpoint(path)
    if run is None:
        return None
    path = checkpoint.target_of(path)
    if not path.is_dir():
        known = [each.name for each in checkpoint.listed(run / "checkpoints")]
        raise RunError(f"there is no checkpoint {path}; {did_you_mean(path.name, known)}")
    beside = path.with_name(checkpoint.folder_name(checkpoint.step_in(path)))
    chosen = beside if beside.is_dir() else path
    spoiled = checkpoint.verify(chosen)["nan"]
    if spoiled:
        raise RunError(
            f"{chosen} cannot be resumed: {str(spoiled[0])[:200]} holds NaN; choose an earlier checkpoint"
        )
    return chosen


def open_folder(run: Path, spec: Spec, inexact: bool = False) -> Resumed:
    """Lock a run's folder and read its newest good checkpoint.

    Raises RunError when another process writes there, and when the spec differs from the run's own where its weights
    would come out otherwise (unless `inexact`).
    """
    folder = RunFolder.existing(run)
    before = read_config(run)
    changed = changed_values(before, spec.tree)
    breaking: list[str] = []
    data_moved = False
    for path, text in changed:
        if is_path_of_data(path, spec):
            data_moved = True
            breaking += unknown_content(
                run, text
            )  # if it is known, the data are compared when they are read
        elif not keeps_bits(path):
            breaking.append(text)
    breaking += list(observed_changes(changed, before, spec))
    if breaking and not inexact:
        advice = "leave it as it was, or allow it with --inexact"
        raise RunError(f"{run} cannot go on exactly with {'; '.join(breaking)}: {advice}")
    resumed = Resumed(folder)
    for path, text in changed:
        if not path.startswith(("run.", "plugins")):
            resumed.changed[path] = text
    resumed.config, resumed.data_moved = before, data_moved
    resumed.notes = [f"from here on {text}" for text in resumed.changed.values()]
    checkpoints = run / "checkpoints"
    checkpoint.refuse_links(checkpoints)
    if not checkpoints.is_dir():
        return resumed
    checkpoint.clean(checkpoints)
    newest = None if spec.resume == "auto" else named_checkpoint(spec.resume)
    if newest is not None:
        resumed.chosen = newest
        resumed.notes += later_notes(checkpoints, checkpoint.step_in(newest))
    else:
        newest, skipped = checkpoint.newest(checkpoints)
        resumed.notes += [f"skipped {why}" for why in skipped[:MOST_NOTES]]
        if len(skipped) > MOST_NOTES:
            resumed.notes.append(f"skipped {len(skipped) - MOST_NOTES} more checkpoints")
    if newest is not None:
        weights, resumed.training = checkpoint.load(newest)
        resumed.training["model"] = weights
        resumed.step = checkpoint.step_in(newest)
        manifest = checkpoint.read_manifest(newest)
        resumed.threads = threads_of(manifest)
        if manifest.get("torch") != torch.__version__:
            other = f"torch is {torch.__version__}, was {short(manifest.get('torch'))}"
            resumed.notes.append(f"{other}: the last bits may come out otherwise")
    return resumed


def later_notes(checkpoints: Path, step: int) -> Iterator[str]:
    """Yield what becomes of the checkpoints after the one that a run is resumed from."""
    later = [
        each.name for each in checkpoint.listed(checkpoints) if checkpoint.step_of(each) > step
    ]
    if later:
        yield f"set aside in {checkpoints}: {', '.join(later)} (now named *.aside; delete what you do not need)"


def threads_of(manifest: Mapping[str, Any]) -> int | None:
    """Return how many threads a checkpoint's run had, None if its manifest has no sensible number."""
    run = manifest.get("run")
    threads = run.get("threads") if isinstance(run, dict) else None
    return threads if type(threads) is int and 1 <= threads <= MOST_THREADS else None


def check_fits(resumed: Resumed, model: nn.Module, optimizer: Optimizer) -> None:
    """Raise RunError when its checkpoint is of another model or optimizer, which --inexact cannot mend."""
    if resumed.training is None:
        return
    check_form(resumed.training)
    saved, own = map(shapes, (resumed.training["model"], model.state_dict()))
    wrong = next((name for name in {**saved, **own} if saved.get(name) != own.get(name)), None)
    other = None
    if wrong is not None:
        other = f"another model: {wrong} has shape {saved.get(wrong)} in its checkpoint, and {own.get(wrong)} here"
    elif sizes(resumed.training["optimizer"]) != sizes(optimizer.state_dict()) or resumed.changes(
        "optimizer.name"
    ):
        other = "another optimizer, or other groups of parameters, of which something else is kept"
    if other is not None:
        run = resumed.folder.path
        weights = override("init_from", str(run))
        advice = f"A new run can begin with its weights: {weights}"
        raise RunError(f"{run} cannot go on with {other}. {advice}")


def check_form(training: Mapping[str, Any]) -> None:
    """Raise RunError when the training state of a checkpoint is of another form than what was saved."""
    state = training.get("optimizer")
    groups = state.get("param_groups") if isinstance(state, dict) else None
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise RunError("its newest checkpoint is damaged: it holds no state of an optimizer")
    if not all(isinstance(group.get("params"), list) for group in groups):
        raise RunError(
            "its newest checkpoint is damaged: its optimizer has groups without parameters"
        )


def check_optimizer(resumed: Resumed, model: nn.Module, optimizer: Optimizer) -> None:
    """Raise SettingError when the optimizer cannot continue with the changed settings.

    A checkpoint of an earlier version does not hold the settings that the run was started with:
    they are derived from the changes in the config.
    """
    training = resumed.training
    if training is None:
        return
    groups, now = training["optimizer"]["param_groups"], group_settings(optimizer, model)
    if "optimizer_settings" not in training:
        changed = changed_settings(resumed)
        before = older_settings(groups, now)
        for each in before:
            for name in changed & each["settings"].keys():
                del each["settings"][name]
        training["optimizer_settings"] = before
    merged, names = merged_groups(groups, training["optimizer_settings"], now)
    if names:
        check_state(optimizer, training["optimizer"]["state"], merged, names)


def changed_settings(resumed: Resumed) -> set[str]:
    """Return the settings of parameter groups that the changes in the config may concern."""
    found: set[str] = set()
    for path in resumed.changed:
        section, _, setting = path.partition(".")
        if section == "optimizer":
            found.add(setting.partition(".")[0])
        if section == "parameters":
            found |= {"weight_decay", "name"}
    return found - {"lr"}


def shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def sizes(optimizer: Mapping[str, Any]) -> list[int]:
    return [len(group["params"]) for group in optimizer["param_groups"]]


def altered(tree: Mapping[str, Any], typed: Sequence[str]) -> dict[str, Any]:
    """Return a run's config with overrides such as trainer.max_epochs=50 put in. Raises ConfigError for no override."""
    from hydra.errors import HydraException

    from framework.composition.override_syntax import parse

    changed = copy.deepcopy(
        dict(tree)
    )  # not through JSON, in which the keys of all dicts are texts
    for text in typed:
        try:
            _, override = parse(text)
            *parents, key = override.key_or_group.replace("/", ".").split(".")
            value = override.value()
        except HydraException as error:
            raise ConfigError([f"{text}: cannot be read as KEY=VALUE"]) from error
        if override.is_sweep_override():
            raise ConfigError([f"{text}: a run goes on with one value; a sweep is for new ones"])
        if (parents or [key])[0] in NOT_OF_A_RESUMED_RUN:
            raise ConfigError(
                [f"{text}: has no effect on a run that goes on: it keeps its folder and weights"]
            )
        place = changed
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigError([f"{text}: {parent} has no settings"])
        if override.is_delete():
            place.pop(key, None)
        else:
            place[key] = value
    return changed


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


def unknown_content(run: Path, change: str) -> Iterator[str]:
    """Yield why the data of a run cannot be compared with data at another path, if so."""
    content = read_facts(run).get("content")
    if not isinstance(content, dict):
        yield f"{change} (the run is of an older version, which did not note the content of its data)"
        return
    unknown = [split for split, digest in content.items() if digest is None]
    if unknown:
        yield f"{change} (the content of the {' and '.join(unknown)} split is unknown or too large to be compared)"


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


def fingerprint(tree: Mapping[str, Any]) -> str:
    """Return a hash of what makes two runs the same experiment: all but where it lies and how it is watched."""
    same = {
        path: value
        for path, value in setting_leaves(tree)
        if not path.startswith(("run.", "plugins"))
    }
    return sha256(json.dumps(same, sort_keys=True, default=str).encode()).hexdigest()


def status_of(run: Path) -> str | None:
    """Return the status of a run, such as "done"; None when it has none."""
    status = read_status(run).get("status")
    return status if isinstance(status, str) else None


def last_values(run: Path) -> tuple[dict[str, float], dict[str, int]]:
    """Return the last value of everything in a run's metrics.jsonl, and by split their step."""
    values: dict[str, float] = {}
    steps: dict[str, int] = {}
    try:
        for row in read_rows(run, "metrics.jsonl"):
            step = row.get("step")
            if type(step) is not int:
                continue
            for key, value in row.items():
                split, slash, _ = key.partition("/")
                if slash and isinstance(value, int | float | None):
                    values[key] = float("nan") if value is None else value
                    steps[split] = step
    except FileNotFoundError:
        pass
    return values, steps


def start_from(model: nn.Module, source: str) -> str:
    """Fill a model with the weights of a run (its best checkpoint), a checkpoint or a .safetensors file, where names
    and shapes match; returns a report of what did not.

    Raises RunError when there is no such thing, when nothing matches, and when no matrix of the
    model does: biases and norms are useless without the weights that they belong to.
    """
    weights = read_weights(expanded(source))
    state = model.state_dict()
    own = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    fitting = {
        name: tensor
        for name, tensor in weights.items()
        if name in own and own[name].shape == tensor.shape
    }
    if not fitting:
        raise RunError(
            f"init_from={source}: none of its {len(weights)} tensors has the name and shape of one here"
        )
    matrices = [name for name, tensor in own.items() if tensor.ndim > 1]
    if matrices and not fitting.keys() & set(matrices):
        raise RunError(
            f"init_from={source}: only {len(fitting)} of {len(own)} tensors match, and none of the "
            f"{len(matrices)} weight matrices: {matrices[0]} is {shape_text(own[matrices[0]])} "
            f"here, and {shape_text(weights.get(matrices[0]))} there"
        )
    model.load_state_dict(fitting, strict=False)
    taken = sum(tensor.numel() for tensor in fitting.values())
    share = taken / max(sum(tensor.numel() for tensor in own.values()), 1)
    shapes = [
        f"{n} {tuple(weights[n].shape)} for {tuple(own[n].shape)}"
        for n in weights
        if n in own.keys() - fitting
    ]
    groups = {
        "of another shape": shapes,
        "left as initialized": sorted(own.keys() - weights.keys()),
        "not used": sorted(weights.keys() - own.keys()),
    }
    said = [f"{what}: {', '.join(names)}" for what, names in groups.items() if names]
    count = f"{len(fitting)} of {len(own)} tensors from {source}"
    if share < 0.5:
        count = f"only {count}, {share:.1%} of the model's numbers"
    return "; ".join([count, *said])


def shape_text(tensor: Tensor | None) -> str:
    return "no such tensor" if tensor is None else str(tuple(tensor.shape))


def read_weights(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            if not path.is_file():
                raise RunError(f"init_from={path}: there is no such file")
            checkpoint.check_memory(path, path.stat().st_size)
            return load_file(path)
        path = run_behind(path)
        if (path / "checkpoints").is_dir():
            chosen = chosen_checkpoint(path)
            if chosen is None:
                raise RunError(f"init_from={path}: the run has no good checkpoint")
            path = chosen
        return checkpoint.load_model(path)
    except (OSError, SafetensorError, CheckpointError) as error:
        raise RunError(
            f"init_from={path}: should be a run, a checkpoint or a .safetensors file: {error}"
        ) from error


def chosen_checkpoint(run: Path, which: str = "best") -> Path | None:
    """Return a run's best checkpoint, or else its newest good one (`last`: at once).

    Any other word is the folder of a checkpoint, or the name of one of this run.
    """
    folder = run / "checkpoints"
    if which not in ("best", "last"):
        named = folder / which
        return named if named.is_dir() else run_behind(expanded(which))
    checkpoint.refuse_links(folder)
    if (
        which == "best"
        and os.path.lexists(folder / "best")
        and checkpoint.target_of(folder / "best").is_dir()
    ):
        return folder / "best"
    return checkpoint.newest(folder)[0] if folder.is_dir() else None
