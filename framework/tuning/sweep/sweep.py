"""A sweep from its command line to its table: `framework train -m`."""

import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from hydra.plugins.sweeper import Sweeper
from omegaconf import OmegaConf

from framework.composition.cached_composer import Composer
from framework.composition.compose import (
    CommandLine,
    Composing,
    Job,
    opened_composition,
    print_override_notes,
    to_tree,
)
from framework.composition.hydra_internals import compose_config, launcher_in_use, set_up_sweeper
from framework.composition.override_checks import hydra_fault
from framework.composition.override_syntax import (
    of_hydra,
    override_key,
    parse,
    swept_values,
)
from framework.composition.sections import HYDRA_PLUGINS, section_settings
from framework.composition.spec import Reader
from framework.contracts.direction import Direction, metric_directions
from framework.errors import ConfigError, DiskFull, FrameworkError, RunError, did_you_mean
from framework.errors.terminal import print_line
from framework.experiment.result import Result
from framework.registry.registry import Registry
from framework.runs.sweep_files import REQUEST, Trial
from framework.runtime.display.console import console
from framework.system.signals import Interrupt, interruptible

from .folder import SweepFolder
from .hydra_plugins import build_plugin
from .settings import ObjectiveMode, Sweep
from .table import Objectives, results_table, summary
from .trial_runner import PlanLines, TrialRunner

Explain = Callable[[Exception], Sequence[str]]
Report = Callable[[Path, Sequence[Trial], Objectives], None]
MAX_FOLDER = 64  # characters of the joined names of experiments
NOT_COMPARED = re.compile(
    r"\+*(resume|sweep\.name|run\.root|hydra/launcher|hydra\.(?!sweeper\.params))"
)
"""Overrides that may differ between a command and the one that resumes its sweep without a name."""
NOT_COMPARED_BY_NAME = ("resume", "sweep.", "run.", "hydra.", "loggers", "trainer.device")
"""Keys that may differ between a command and one that resumes its sweep by name."""


def sweep(
    line: CommandLine,
    task: Callable[[Job], Result | None],
    explain: Explain = lambda error: [str(error)],
    plan: PlanLines | None = None,
    report: Report | None = None,
) -> None:
    """Compose a sweep, run a task on each of its jobs, and print a table of the results.

    All jobs are checked before the first runs. A failed job does not stop the others.

    Args:
        line: the command line.
        task: trains a job.
        explain: returns the lines of an error message.
        plan: yields lines about the jobs, which are printed instead of running them.
        report: called with the folder, the trials and the objectives at the end.

    Raises:
        ConfigError: the experiment, the sweep or one of its jobs has problems.
        PluginError: a plugin cannot be loaded.
        DiskFull: a trial found a full disk.
        FrameworkError: trials failed, or none measured the metric.
    """
    with opened_composition(line) as (composing, hydra):
        print_override_notes(composing.overrides.notes)
        config = compose_config(hydra, composing.arguments, multirun=True)
        typed = composing.overrides.typed
        sweeper = build_plugin(config, "sweeper", "hydra.sweeper" in typed)
        launcher = build_plugin(config, "launcher", "hydra.launcher" in typed)
        choices = config.hydra.runtime.choices
        check_hydra(composing, choices["hydra/launcher"])
        if plan is not None and choices["hydra/sweeper"] not in ("basic", "grid"):
            raise ConfigError(
                ["plan -m lists the trials of a grid; a search samples its trials while it runs"]
            )
        runner = prepare_sweep(composing, config, task, explain)
        runner.composer = Composer(hydra.config_loader, config, composing)
        runner.returns_metric = sweeper is None
        runner.plan = plan
        overrides: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
        with nullcontext() if launcher is None else launcher_in_use(launcher):
            sweeper = set_up_sweeper(sweeper, hydra, config, runner)
            interrupt = run_sweeper(sweeper, runner, overrides, report)
    exit_or_raise(runner, interrupt.received)


def run_sweeper(
    sweeper: Sweeper, runner: TrialRunner, overrides: list[str], report: Report | None
) -> Interrupt:
    """Run a sweeper, and print the results also after an error; return the signal handler."""
    try:
        with interruptible() as interrupt:
            sweeper.sweep(overrides)
    finally:
        if runner.opened is not None:
            print_results(runner.opened, runner.objectives)
            if report is not None:
                report(runner.opened.path, runner.opened.trials(), runner.objectives)
            runner.opened.release()
    return interrupt


def check_hydra(composing: Composing, launcher: str) -> None:
    """Raise ConfigError for settings of Hydra that only Hydra's own launchers use."""
    plugin = HYDRA_PLUGINS.get(("launcher", launcher))
    if launcher != "basic" and (plugin is None or plugin.replaces is not None):
        return
    problems = []
    for key, text in composing.overrides.typed.items():
        if of_hydra(key) and not key.startswith(("hydra.launcher", "hydra.sweeper")):
            problems.append(f"{text}: {hydra_fault(key)} (command line)")
    if problems:
        raise ConfigError(problems)


def prepare_sweep(composing: Composing, config: Any, task: Any, explain: Explain) -> TrialRunner:
    """Return the runner for a composed config.

    Raises:
        ConfigError: settings of the sweep are invalid.
    """
    rest = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    tree = to_tree(rest, composing.sources)
    raw: Any = OmegaConf.to_container(rest)
    swept = composing.overrides.swept
    reader = Reader(tree, composing.sources)
    sections = {}
    for name in ("sweep", "run"):
        sections[name] = reader.settings(name, section_settings(name), tree[name], name)
    metrics = reader.many(Registry.every["metric"].kind)
    if tree.get("resume") not in ("never", "auto"):
        reader.problem(
            "resume", tree["resume"], "continues a single run; use resume=auto for a sweep"
        )
    run_name = raw["run"].get("name")
    if run_name is not None and "${" not in str(run_name) and "run.name" not in swept:
        reader.problem(
            "run.name",
            run_name,
            "each trial has its own run name; name the sweep with sweep.name=...",
        )
    if reader.problems:
        raise ConfigError(reader.problems)
    section = Sweep(**sections["sweep"])
    directions: dict[str, Direction] = {}
    if "metrics" not in swept:
        directions = metric_directions(make() for make in metrics)
    objectives = read_objectives(section, directions)
    request = {
        "command": composing.line.overrides,
        "plugins": composing.line.plugins,
        "by": objectives,
        "swept": sorted(swept),
    }
    root = Path(sections["run"]["root"])
    experiment = config.hydra.runtime.choices.get("experiment") or "default"
    if "experiment" in swept:
        experiment = joined_experiments(composing.overrides.typed["experiment"])
    open_folder = partial(open_sweep, root, experiment, section.name, tree["resume"], request)
    return TrialRunner(composing, task, explain, section, objectives, open_folder)


def joined_experiments(override: str) -> str:
    """Return the name of the folder of a sweep over experiments: base+wide, or base+9_more.

    Args:
        override: such as "experiment=base,wide".
    """
    names = [str(name) for name in swept_values(parse(override)[1])]
    if not names:  # of glob(*)
        return "experiments"
    joined = "+".join(names)
    return joined if len(joined) <= MAX_FOLDER else f"{names[0]}+{len(names) - 1}_more"


def read_objectives(section: Sweep, directions: Mapping[str, Direction]) -> dict[str, Direction]:
    """Return the direction of each metric that trials are compared by.

    Args:
        section: the section `sweep`.
        directions: the direction of the loss and of each metric of the experiment; empty if the
            metrics are swept. Metrics that callbacks log are not known.

    Raises:
        ConfigError: no trial measures a metric, or its direction is unknown.
    """
    if len(section.modes) != len(section.metrics):
        counts = f"{len(section.modes)} for {len(section.metrics)} metrics"
        raise ConfigError([f"sweep.mode: expected one, or one for each sweep.metric, got {counts}"])
    objectives: dict[str, Direction] = {}
    for metric, mode in zip(section.metrics, section.modes, strict=True):
        check_objective(metric, directions)
        objectives[metric] = objective_direction(metric, mode, directions)
    return objectives


def check_objective(metric: str, directions: Mapping[str, Direction]) -> None:
    """Raise ConfigError if no trial measures a metric.

    Args:
        metric: a name such as "val/loss".
        directions: as for `read_objectives`.
    """
    known = []
    for split in ("val", "test"):
        known += [f"{split}/{name}" for name in (directions or ["loss"])]
    split, _, name = metric.partition("/")
    has_metrics = len(directions) > 1  # otherwise only trials know their metrics
    if has_metrics and metric not in known and split in ("val", "test"):
        raise ConfigError(
            [f"sweep.metric={metric}: no trial measures it; {did_you_mean(metric, known)}"]
        )
    if not name:
        raise ConfigError(
            [f"sweep.metric={metric}: expected e.g. val/{metric}; {did_you_mean(metric, known)}"]
        )


def objective_direction(
    metric: str, mode: ObjectiveMode, directions: Mapping[str, Direction]
) -> Direction:
    """Return the direction of a metric: that of `mode`, or for "auto" the metric's own.

    Raises:
        ConfigError: the direction of the metric is unknown.
    """
    name = metric.partition("/")[2]
    if mode != "auto":
        return mode
    if name == "loss":
        return "min"
    if name in directions:
        return directions[name]
    raise ConfigError(
        [f"sweep.metric={metric}: set the better direction with sweep.mode=min or max"]
    )


def open_sweep(
    root: Path, experiment: str, name: str | None, resume: str, request: Mapping[str, Any]
) -> SweepFolder:
    """Return the folder of a new sweep, or with resume=auto that of the one to continue.

    Raises:
        RunError: the folder cannot be created, or belongs to another sweep or process.
    """
    found = find_sweep(root / experiment, name, request) if resume == "auto" else None
    folder = found or SweepFolder.claim(root, experiment, name, request)
    folder.acquire()
    if found is not None:
        finished = sum(trial.is_finished for trial in folder.trials())
        print_line(f"resuming {folder.path}, of which {finished} trials are finished")
    return folder


def find_sweep(parent: Path, name: str | None, request: Mapping[str, Any]) -> SweepFolder | None:
    """Return the sweep of a name, or without a name the newest of the same command.

    Raises:
        RunError: the named sweep was started by a command with other trials.
    """
    if name is None:
        return newest_sweep(parent, request)
    folder = SweepFolder(parent / name)
    if not (folder.path / REQUEST).is_file():
        return None
    check_same_sweep(folder.path, folder.request(), request)
    return folder


def check_same_sweep(folder: Path, before: Mapping[str, Any], request: Mapping[str, Any]) -> None:
    """Raise RunError if a command would run other trials than the sweep that it resumes.

    Args:
        folder: the folder of the sweep.
        before: the request of the command that started it.
        request: the request of the command that resumes it.
    """
    if before.get("swept", []) != request["swept"]:
        raise RunError(
            f"{folder} is a sweep of {', '.join(before.get('swept', []))}, "
            f"got {', '.join(request['swept'])}: choose another sweep.name"
        )
    shared = shared_settings(before)
    other_shared = shared_settings(request)
    differences = []
    if shared - other_shared:
        differences.append(f"with {' '.join(sorted(shared - other_shared))}")
    if other_shared - shared:
        differences.append(f"without {' '.join(sorted(other_shared - shared))}")
    if differences:
        raise RunError(
            f"{folder} was started {' and '.join(differences)}: "
            "use the same settings, or choose another sweep.name"
        )


def newest_sweep(parent: Path, request: Mapping[str, Any]) -> SweepFolder | None:
    """Return the newest sweep of the same command."""
    newest = None
    newest_time = -1.0
    for file in parent.glob(f"*/{REQUEST}"):
        folder = SweepFolder(file.parent)
        before = folder.request()
        began = before.get("began", 0.0)
        if began > newest_time and command_key(before) == command_key(request):
            newest = folder
            newest_time = began
    return newest


def command_key(request: Mapping[str, Any]) -> tuple[list[str], Any]:
    """Return the parts of a request that are the same in a command that resumes its sweep."""
    command = [text for text in request.get("command", ()) if not NOT_COMPARED.match(text)]
    return sorted(command), request.get("plugins")


def shared_settings(request: Mapping[str, Any]) -> set[str]:
    """Return the overrides of a command that all trials share and that affect their results."""
    swept = request.get("swept", ())
    shared = set()
    for text in request.get("command", ()):
        key = override_key(text)
        if key not in swept and not key.startswith(NOT_COMPARED_BY_NAME):
            shared.add(text)
    return shared


def print_results(folder: SweepFolder, objectives: Objectives) -> None:
    """Print the table of a sweep, if it has trials."""
    trials = folder.trials()
    if not trials:
        return
    out = console()
    out.print()
    out.print(results_table(trials, objectives))
    out.print()
    for line in summary(folder, trials, objectives):
        print_line(line)


def exit_or_raise(runner: TrialRunner, received: int | None) -> None:
    """Exit with the status of a signal, or raise the error of a sweep.

    Args:
        runner: the runner of the sweep.
        received: the signal that was received, perhaps after the last step of the last trial.

    Raises:
        DiskFull: a trial found a full disk.
        FrameworkError: trials failed, or none measured the metric.
    """
    if received is not None:
        sys.exit(128 + received)
    trials = runner.opened.trials() if runner.opened is not None else []
    stopped = [trial for trial in trials if trial.state == "stopped"]  # by a launcher's process
    for trial in stopped:
        if trial.error:
            raise DiskFull(trial.error)
    if stopped:
        sys.exit(max(trial.exit_status for trial in stopped) or 128 + signal.SIGINT)
    failed = [trial for trial in trials if trial.state == "failed"]
    if failed:
        error = FrameworkError(f"{len(failed)} of {len(trials)} trials failed")
        error.exit_status = 2 if all(trial.exit_status == 2 for trial in failed) else 1
        raise error
    done = [trial for trial in trials if trial.state == "done" and trial.metrics]
    metric = next(iter(runner.objectives))
    if done and not any(metric in trial.metrics for trial in done):
        measured = [name for name in done[0].metrics if "/" in name]
        raise FrameworkError(
            f"sweep.metric={metric}: no trial measured it; {did_you_mean(metric, measured)}"
        )
