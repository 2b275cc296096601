"""A sweep from its command line to its table: `framework train -m`."""

import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from framework.composition.cached_composer import Composer
from framework.composition.compose import CommandLine, Composing, Job, notes, opened, to_tree
from framework.composition.hydra_internals import compose_config, launcher_in_use, set_up_sweeper
from framework.composition.override_checks import hydra_fault
from framework.composition.override_syntax import of_hydra
from framework.composition.sections import HYDRA_PLUGINS, section_settings
from framework.composition.spec import Reader
from framework.errors import ConfigError, DiskFull, FrameworkError, RunError, did_you_mean
from framework.errors.terminal import print_line
from framework.experiment.experiment import Result
from framework.registry.registry import Registry
from framework.runtime.console import console
from framework.system.signals import interruptible

from .folder import SweepFolder, Trial
from .hydra_plugins import build
from .settings import Sweep
from .table import ending, table
from .trials import Plan, Trials

Explain = Callable[[Exception], Sequence[str]]
NOT_ASKED = re.compile(
    r"\+*(resume|sweep\.name|run\.root|hydra/launcher|hydra\.(?!sweeper\.params))"
)
"""What may differ between a command and the same command that goes on."""
ANY_TIME = ("resume", "sweep.", "run.", "hydra.", "hydra/", "loggers", "trainer.device")
"""What may differ in a command that goes on with a sweep by its name."""


def sweep(
    line: CommandLine,
    task: Callable[[Job], Result | None],
    explain: Explain = lambda error: [str(error)],
    plan: Plan | None = None,
) -> None:
    """Compose a sweep, run a task on each of its jobs, and show what came of them.

    All jobs are checked before the first runs; then one that fails does not stop the others.

    Args:
        line: the command line.
        task: trains a job.
        explain: gives the lines that say why a job failed.
        plan: yields lines on the jobs, which are printed; then none is run.

    Raises ConfigError before the first runs, with all that is wrong; PluginError for plugins that do not load; and
    FrameworkError that counts failed trials.
    """
    with opened(line) as (composing, hydra):
        notes(composing.overrides.notes)
        config = compose_config(hydra, composing.arguments, multirun=True)
        typed = composing.overrides.typed
        sweeper = build(config, "sweeper", "hydra.sweeper" in typed)
        launcher = build(config, "launcher", "hydra.launcher" in typed)
        check_hydra(composing, config.hydra.runtime.choices["hydra/launcher"])
        if plan is not None and config.hydra.runtime.choices["hydra/sweeper"] not in (
            "basic",
            "grid",
        ):
            raise ConfigError(
                ["plan -m tells the trials of a grid; a search draws its trials while it runs"]
            )
        trials = prepare_sweep(composing, config, task, explain)
        trials.composer = Composer(hydra.config_loader, config, composing)
        trials.gives_value = sweeper is None
        trials.plan = plan
        overrides: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
        with nullcontext() if launcher is None else launcher_in_use(launcher):
            sweeper = set_up_sweeper(sweeper, hydra, config, trials)
            try:
                with interruptible() as interrupt:
                    sweeper.sweep(overrides)
            finally:
                show_table(trials)
                if trials.opened is not None:
                    trials.opened.release()
    settle(trials, interrupt.received)


def check_hydra(composing: Composing, launcher: str) -> None:
    """Raise ConfigError for Hydra's own settings that only a launcher of Hydra's would use."""
    plugin = HYDRA_PLUGINS.get(("launcher", launcher))
    if launcher != "basic" and (plugin is None or plugin.replaces is not None):
        return
    problems = []
    for key, text in composing.overrides.typed.items():
        if of_hydra(key) and not key.startswith(("hydra.launcher", "hydra.sweeper")):
            problems.append(f"{text}: {hydra_fault(key, True)} (command line)")
    if problems:
        raise ConfigError(problems)


def prepare_sweep(composing: Composing, config: Any, task: Any, explain: Explain) -> Trials:
    """Read what the config says of the sweep as a whole. Raises ConfigError."""
    experiment = config.hydra.runtime.choices.get("experiment") or "default"
    rest = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    raw: Any = OmegaConf.to_container(rest)
    raw_name = raw["run"].get("name")
    tree = to_tree(rest, composing.sources)
    reader = Reader(tree, composing.sources)
    sections = {
        name: reader.settings(name, section_settings(name), tree[name], name)
        for name in ("sweep", "run")
    }
    metrics = reader.many(Registry.every["metric"].kind)
    if tree.get("resume") not in ("never", "auto"):
        reader.problem(
            "resume", tree["resume"], "goes on with one run; a sweep goes on with resume=auto"
        )
    if (
        raw_name is not None
        and "${" not in str(raw_name)
        and "run.name" not in composing.overrides.swept
    ):
        reader.problem(
            "run.name", raw_name, "each trial has a name of its own; sweep.name=... names the sweep"
        )
    if reader.problems:
        raise ConfigError(reader.problems)
    section = Sweep(**sections["sweep"])
    names = (
        {}
        if "metrics" in composing.overrides.swept
        else {m.name: m.better for m in (make() for make in metrics)}
    )
    by = objectives(section, names)
    line = composing.line
    asked = {
        "command": line.overrides,
        "plugins": line.plugins,
        "by": by,
        "swept": sorted(composing.overrides.swept),
    }
    opening = partial(
        open_sweep, Path(sections["run"]["root"]), experiment, section.name, tree["resume"], asked
    )
    return Trials(composing, task, explain, section, by, opening)


def objectives(section: Sweep, better: Mapping[str, str]) -> dict[str, str]:
    """Return "min" or "max" for each metric that trials are compared by. Raises ConfigError for one that no trial will
    have; those of callbacks are not known beforehand.

    better: "higher" or "lower", by name of a metric of the experiment; empty when those are swept.
    """
    if len(section.modes) != len(section.metrics):
        counts = f"{len(section.metrics)} metrics and {len(section.modes)} modes"
        raise ConfigError(
            [f"sweep.mode: should be one, or one for each sweep.metric; there are {counts}"]
        )
    by = {}
    for metric, mode in zip(section.metrics, section.modes, strict=True):
        split, _, name = metric.partition("/")
        known = [f"{each}/{measure}" for each in ("val", "test") for measure in ("loss", *better)]
        if metric not in known and better and split in ("val", "test"):
            raise ConfigError(
                [f"sweep.metric={metric}: no trial measures it; {did_you_mean(metric, known)}"]
            )
        if not name:
            raise ConfigError(
                [
                    f"sweep.metric={metric}: should be like val/{metric}; {did_you_mean(metric, known)}"
                ]
            )
        if mode == "auto" and name not in ("loss", *better):
            raise ConfigError(
                [f"sweep.metric={metric}: say what is better with sweep.mode=min or max"]
            )
        found = "min" if name == "loss" or better.get(name) == "lower" else "max"
        by[metric] = found if mode == "auto" else mode
    return by


def open_sweep(
    root: Path, experiment: str, name: str | None, resume: str, asked: Mapping[str, Any]
) -> SweepFolder:
    """Return the folder of a new sweep, or with resume=auto of that which is to go on. Raises RunError."""
    found = find_sweep(root / experiment, name, asked) if resume == "auto" else None
    folder = SweepFolder.claim(root, experiment, name, asked) if found is None else found
    folder.conduct()
    if found is not None:
        over = sum(trial.over for trial in folder.trials())
        print_line(f"going on with {folder.path}, of which {over} trials are done")
    return folder


def find_sweep(parent: Path, name: str | None, asked: Mapping[str, Any]) -> SweepFolder | None:
    """Return the sweep of that name, or else the newest of the same command."""
    if name is None:
        folders = [SweepFolder(file.parent) for file in parent.glob("*/sweep.json")]
        same = [each for each in folders if as_asked(each.asked()) == as_asked(asked)]
        return max(same, key=lambda each: each.asked().get("began", 0.0), default=None)
    folder = SweepFolder(parent / name)
    if not (folder.path / "sweep.json").is_file():
        return None
    before = folder.asked().get("swept", [])
    if before != asked["swept"]:
        said = (
            f"{folder.path} tries values of {', '.join(before)}, not of {', '.join(asked['swept'])}"
        )
        raise RunError(f"{said}: choose another sweep.name")
    was, now = fixed(folder.asked()), fixed(asked)
    other = {"with": " ".join(sorted(was - now)), "without": " ".join(sorted(now - was))}
    if was != now:
        said = " and ".join(f"{how} {texts}" for how, texts in other.items() if texts)
        raise RunError(
            f"{folder.path} was begun {said}: leave that as it was, or choose another sweep.name"
        )
    return folder


def as_asked(asked: Mapping[str, Any]) -> Any:
    command = [text for text in asked.get("command", ()) if not NOT_ASKED.match(text)]
    return sorted(command), asked.get("plugins")


def fixed(asked: Mapping[str, Any]) -> set[str]:
    """Return the settings in a command that all trials have in common, and their outcomes depend on."""
    keys = {text: text.lstrip("+~").partition("=")[0] for text in asked.get("command", ())}
    own = {*asked.get("swept", ())}
    return {text for text, key in keys.items() if key not in own and not key.startswith(ANY_TIME)}


def show_table(trials: Trials) -> None:
    """Print the table of a sweep, if it has begun."""
    rows = trials.opened.trials() if trials.opened is not None else []
    if rows and trials.opened is not None:
        out = console()
        out.print()
        out.print(table(rows, trials.by))
        out.print()
        for line in ending(trials.opened, rows, trials.by):
            print_line(line)


def settle(trials: Trials, received: int | None) -> None:
    """Exit as a signal asks for.

    Raises DiskFull when a trial found no room, and FrameworkError when trials failed, or none was measured by the
    metric.

    received: the signal that came, perhaps after the last step of the last trial.
    """
    rows: list[Trial] = [] if trials.opened is None else trials.opened.trials()
    if received is not None:
        sys.exit(128 + received)
    stopped = [
        trial for trial in rows if trial.state == "stopped"
    ]  # perhaps in a launcher's process
    for trial in stopped:
        if trial.error:
            raise DiskFull(trial.error)
    if stopped:
        sys.exit(max(trial.exit_status for trial in stopped) or 128 + signal.SIGINT)
    failed = [trial for trial in rows if trial.state == "failed"]
    done, metric = (
        [trial for trial in rows if trial.state == "done" and trial.metrics],
        next(iter(trials.by)),
    )
    if failed:
        counted = FrameworkError(f"{len(failed)} of {len(rows)} trials failed")
        counted.exit_status = 2 if all(trial.exit_status == 2 for trial in failed) else 1
        raise counted
    if done and not any(metric in trial.metrics for trial in done):
        measured = did_you_mean(metric, [name for name in done[0].metrics if "/" in name])
        raise FrameworkError(f"sweep.metric={metric}: no trial measured it; {measured}")
