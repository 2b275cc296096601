"""The command line: commands, their arguments, and exit statuses."""

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import framework.tuning.sections  # noqa: F401  registers the section `sweep` and sweepers
from framework.composition import trust as trusting
from framework.composition.trust import (
    entries_in,
    escaped_path,
    importing_from_elsewhere,
    is_trusted,
    problem_of_file,
)
from framework.errors import (
    ConfigError,
    Facts,
    FrameworkError,
    SettingError,
    did_you_mean,
    nearest,
    short,
    wrong_option,
)
from framework.errors.exits import no_exit
from framework.errors.paths import expanded, real_path, shorter
from framework.errors.terminal import (
    completed,
    message_lines,
    note,
    print_line,
    print_message,
    print_traceback,
    printable_warnings,
)
from framework.errors.user_code import describe, internal_place, user_place
from framework.system.signals import interruptible, status_of_signal
from framework.system.streams import prepare_streams, silence_broken_streams

from . import help_texts
from .explain import explain
from .export import export
from .json_output import json_output, print_json, record_error, wants_json
from .parsers import (
    JSON,
    RUN,
    TRACEBACK,
    TRUST,
    Command,
    Parser,
    ask,
    command_line,
    composing,
    importing_torch,
    sweep_over,
)

STARTED = time.monotonic()
MOST_STEPS = 100_000  # of `framework show --steps`


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    prepare_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    arguments.sort(key=TRACEBACK.__eq__)  # to the end: it may also stand before the command
    with interruptible() as interrupt:
        status = exit_status_of(arguments)
    if interrupt.received is not None and status == 0 and is_alone_or_main(arguments):
        status = 128 + interrupt.received  # received at the end, or exception lost
    if arguments[:1] == ["process"]:
        # Seen with torch 2.13 and gloo: a process aborts (SIGABRT) at its end, after its work.
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def is_alone_or_main(arguments: list[str]) -> bool:
    """Return whether the exit status of this process is that of its run.

    The others end with 0 after a signal: a launcher such as torchrun would end the main process.
    """
    return arguments[:1] != ["process"] and os.environ.get("RANK", "0") == "0"


def exit_status_of(arguments: list[str]) -> int:
    """Run a command, print its JSON document if it asks for one, and return the exit status."""
    with json_output(wants_json(arguments)) as output:
        status = status_of_command(arguments)
        if output is None:
            return status
        output.is_main = is_alone_or_main(arguments)
        try:
            output.write(status)
        except BrokenPipeError:
            silence_broken_streams()
            return 128 + signal.SIGPIPE
    return status


def status_of_command(arguments: list[str]) -> int:
    """Run a command, print the error that ends it, and return the exit status."""
    try:
        with no_exit(), printable_warnings(), importing_safely(arguments):
            status = run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except SystemExit as error:
        if not isinstance(error.code, int | None):
            raise
        status = error.code or 0
    except BrokenPipeError as error:
        if user_place(error) is None:  # the reader of the output has ended
            silence_broken_streams()
            status = 128 + signal.SIGPIPE
        else:
            status = complain(error, arguments)
    except ConfigError as error:  # perhaps of OmegaConf, which a signal has interrupted
        status = status_of_signal(error) or complain(error, arguments)
    except Exception as error:
        status = complain(error, arguments)
    return status


@contextmanager
def importing_safely(arguments: list[str]) -> Iterator[None]:
    """Import no module from an untrusted working folder in a command that only prints."""
    name = arguments[0] if arguments else "--help"
    prints_help = "--help" in arguments or "-h" in arguments
    runs_parts = name in COMMANDS and COMMANDS[name].runs_parts and not prints_help
    trusted = "--trust" in arguments
    if runs_parts or trusted or not entries_in(os.curdir) or is_trusted(Path.cwd()):
        yield
        return
    plugins = [word for before, word in pairwise(arguments) if before == "--plugins"]
    plugins += [word.partition("=")[2] for word in arguments if word.startswith("--plugins=")]
    with importing_from_elsewhere(os.curdir, plugins) as left_out:
        if left_out and name in ("list", "show", "schema") and os.environ.get("PYTHONPATH"):
            entries = ", ".join(escaped_path(shorter(entry)) for entry in left_out)
            reason = "this folder is not trusted (see `framework trust`)"
            note(f"no modules are imported from {entries}: {reason}")
        yield


def complain(error: Exception, arguments: list[str]) -> int:
    """Print an error with its location in user code or in the framework; return the exit status.

    Of several processes of a run only the first one that fails prints; one that this program has
    started leaves that to the program.
    """
    status = error.exit_status if isinstance(error, FrameworkError) else 1
    with_traceback = TRACEBACK in arguments
    lines = error_lines(error)
    if not with_traceback and has_calls(error):
        lines[-1] += f"; {TRACEBACK} shows the calls"
    if "WORLD_SIZE" in os.environ:
        from framework.experiment.launch import COMMAND, write_error
        from framework.runtime.processes import claim_report

        is_first = claim_report(error, lines[0])
        if arguments[:1] == [COMMAND]:
            if with_traceback and is_first:
                print_traceback(error)
            write_error(Path(arguments[1]), error, lines, status)
            return status
        if not is_first:
            return status
    record_error(error, status, "; ".join(error_lines(error)))
    if with_traceback:
        print_traceback(error)
    lines = [f"framework: {line}" for line in message_lines(lines)]
    try:
        print("\n".join(lines), file=sys.stderr, flush=True)
    except BrokenPipeError:
        silence_broken_streams()
    return status


def has_calls(error: Exception) -> bool:
    """Return whether a traceback is useful: for errors in user code and internal errors."""
    if not isinstance(error, FrameworkError):
        return True
    cause = error.__cause__
    if cause is None or isinstance(cause, FrameworkError):
        return False
    place = user_place(cause)
    return place is not None and str(place) in str(error)


def error_lines(error: Exception) -> list[str]:
    """Return the lines of an error: one for each problem of a ConfigError, else one."""
    if isinstance(error, ConfigError) and error.problems:
        return error.problems
    if isinstance(error, FrameworkError):
        return [str(error) or type(error).__name__]
    place = internal_place(error) if user_place(error) is None else None
    if place is None:
        return [describe(error)]
    return [f"{describe(error)}; internal error at {place}"]


def run(arguments: list[str]) -> int:
    """Run a command and return the exit status."""
    name = arguments[0] if arguments else "--help"
    rest = arguments[1:]
    further = [word for word in rest if word != TRACEBACK]
    if name in ("-V", "--version", "version") and further:
        raise FrameworkError(f"{name}: expected no argument {short(further[0], quote=False)}")
    if name in ("-h", "--help") or (name == "help" and not further):
        print(HELP)
        return 0
    if name in ("-V", "--version", "version"):
        from importlib.metadata import version

        print(version("framework"))
        return 0
    if name == "complete":  # called at each TAB by the scripts of `framework completion`
        from .completion import answer

        words = answer(rest[1:] if rest[:1] == ["--"] else rest, COMMANDS)
        print("\n".join(completed(words)))
        return 0
    if name == "process":  # one of the processes of a run
        return train_process(rest)
    if name == "help":  # `help train` is `train --help`
        name = further[0]
        rest = ["--help"]
    if name not in COMMANDS:
        error = FrameworkError(f"there is no command {name!r}; {did_you_mean(name, COMMANDS)}")
        facts = Facts(value=name, expected="a command", suggestion=nearest(name, COMMANDS))
        raise error.with_facts(facts)
    if name not in ("train", "resume"):
        check_single_process(name)
    return COMMANDS[name].function(rest) or 0


def check_single_process(command: str) -> None:
    """Raise FrameworkError if a launcher has started a command several times."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise FrameworkError(
            f"{command}: expected one process, got {processes} of a launcher such as torchrun"
        )


def print_json_or_table(as_json: bool, document: dict[str, Any], table: Callable[[], Any]) -> None:
    """Print a document as JSON, or a table."""
    if as_json:
        print_json(document)
    else:
        from framework.runtime.display.console import console

        console().print(table())


# commands that compose an experiment


def train(arguments: list[str]) -> None:
    """Run `framework train`."""
    parser = composing("train", "Train an experiment.", help_texts.TRAIN)
    multirun = "sweep: train all combinations of a,b,c or range(3)"
    parser.add_argument("-m", "--multirun", action="store_true", help=multirun)
    inexact = "resume even if changed settings change the result"
    parser.add_argument("--inexact", action="store_true", help=inexact)
    repeat = "sweep over N seeds; print mean and standard error"
    parser.add_argument("--repeat", type=int, metavar="N", help=repeat)
    folds = "sweep over the N folds of a cross-validation"
    parser.add_argument("--folds", type=int, metavar="N", help=folds)
    parser.add_argument("--json", **JSON)
    args = parser.parse_intermixed_args(arguments)
    if args.repeat is not None:
        sweep_over(parser, args, "--repeat", "seed", args.repeat, range(args.repeat))
    if args.folds is not None:
        values = [f"{fold}/{args.folds}" for fold in range(1, args.folds + 1)]
        sweep_over(parser, args, "--folds", "fold", args.folds, values)
    line = command_line(parser, args)
    from framework.composition.compose import Job, run_composed as compose

    def job(composed: Job) -> Any:
        from framework.experiment.experiment import train as train_experiment
        from framework.experiment.launch import is_launcher

        in_sweep = composed.number is not None
        started = time.monotonic() if in_sweep else STARTED
        if is_launcher(composed.spec):
            result = launch_processes(composed, started)
        else:
            result = train_experiment(
                composed.spec,
                composed.experiment,
                composed.overrides,
                started,
                inexact=composed.inexact,
            )
        if not in_sweep:
            sys.exit(print_end(result, args.json))
        return result

    if line.multirun:
        from framework.tuning.sweep.sweep import sweep

        from .output import sweep_as_dict

        check_single_process("a sweep (each of its trials can have trainer.devices=N)")

        def report(*found: Any) -> None:
            if args.json:
                print_json(sweep_as_dict(*found))

        sweep(line, job, error_lines, report=report)
    else:
        compose(line, job)


def launch_processes(job: Any, started: float) -> Any:
    """Train a job in several processes; return the result."""
    from framework.experiment.launch import Request, launch

    request = Request(job.spec, job.experiment, job.overrides, started, job.inexact, job.traceback)
    request.captured = job.number is not None
    result = launch(request)
    if isinstance(result, int):
        sys.exit(result)
    return result


def print_end(result: Any, as_json: bool, **more: Any) -> int:
    """Print the result of a run, in its main process; return the exit status.

    Args:
        result: of the run.
        as_json: print it also as JSON.
        more: further keys of the JSON document.
    """
    if not result.is_main:
        return 0
    from .output import print_result, result_as_dict

    print_result(result)
    if as_json:
        print_json(result_as_dict(result) | more)
    return 0 if result.signal is None else 128 + result.signal


def train_process(arguments: list[str]) -> int:
    """Run `framework process FOLDER PARENT`, with which `launch` starts the processes of a run."""
    folder = Path(arguments[0])
    with importing_torch():
        from framework.experiment import launch
        from framework.experiment.experiment import train as train_experiment

    launch.redirect_output(folder)
    request = launch.read_request(folder)
    if request.check:
        from framework.experiment.dry_runs.check import step_of_process

        step_of_process(request.spec, folder)
        return 0
    result = train_experiment(
        request.spec,
        request.experiment,
        request.overrides,
        request.started,
        inexact=request.inexact,
    )
    if result.is_main:
        launch.write_result(folder, result)
    return 0


def plan(arguments: list[str]) -> None:
    """Run `framework plan`."""
    parser = composing("plan", "Print the plan of an experiment without training.", help_texts.PLAN)
    parser.add_argument("--json", **JSON)
    multirun = "sweep: print the number of trials, and which train together"
    parser.add_argument("-m", "--multirun", action="store_true", help=multirun)
    args = parser.parse_intermixed_args(arguments)
    if args.json and args.multirun:
        parser.error("--json is for one experiment, not for a sweep")
    line = command_line(parser, args)
    from framework.composition.compose import Job, run_composed as compose

    def job(composed: Job) -> None:
        from framework.experiment.experiment import Experiment
        from framework.experiment.plan_text import render

        made = Experiment(composed.spec).plan()
        print_json_or_table(args.json, asdict(made), lambda: render(made))

    if line.multirun:
        from framework.tuning.sweep.sweep import sweep
        from framework.tuning.vectorized.launcher import describe_groups

        sweep(line, job, plan=describe_groups)
    else:
        compose(line, job)


def check(arguments: list[str]) -> None:
    """Run `framework check`."""
    parser = composing("check", "Test an experiment within seconds.", help_texts.CHECK)
    parser.add_argument("--json", **JSON)
    args = parser.parse_intermixed_args(arguments)
    line = command_line(parser, args)
    from framework.composition.compose import Job, run_composed as compose
    from framework.experiment.dry_runs.check import run_check as check_experiment

    parts: list[dict[str, Any]] = []

    def say(text: str, seconds: float | None = None) -> None:
        parts.append({"text": text, "seconds": seconds})
        print_message(text if seconds is None else f"{text:<26}{seconds:8.1f} s")
        if args.json:
            print_json({"passed": False, "parts": parts})

    def job(composed: Job) -> None:
        check_experiment(composed.spec, say)
        if args.json:
            print_json({"passed": True, "parts": parts})

    compose(line, job)


def find(arguments: list[str]) -> None:
    """Run `framework find`."""
    description = "Find a learning rate or a batch size."
    targets = ("lr", "batch_size")
    parser = composing("find", description, help_texts.FIND, targets)
    parser.add_argument("--json", **JSON)
    args = parser.parse_intermixed_args(arguments)
    if args.target is None:
        parser.error(f"find: expected one of {', '.join(targets)}")
    line = command_line(parser, args)
    from framework.composition.compose import Job, run_composed as compose
    from framework.experiment.dry_runs import find as finders

    show = finders.show_learning_rates if args.target == "lr" else finders.show_batch_sizes

    def job(composed: Job) -> None:
        found = show(composed.spec)
        if args.json:
            print_json(found)

    compose(line, job)


# commands on a run


def resume(arguments: list[str]) -> int:
    """Run `framework resume`."""
    parser = Parser("resume", "Continue a run that was interrupted.", help_texts.RESUME)
    parser.add_argument("run", **RUN | {"help": "folder of a run, or of one of its checkpoints"})
    overrides = "settings to change from here on"
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help=overrides)
    inexact = "resume even if changed settings change the result"
    parser.add_argument("--inexact", action="store_true", help=inexact)
    parser.add_argument("--json", **JSON)
    args = parser.parse_intermixed_args(arguments)
    with importing_torch():
        from framework.experiment.experiment import train as train_experiment
        from framework.registry.discovery import discover
    from framework.composition.compose import Job
    from framework.composition.override_syntax import override_key
    from framework.experiment.launch import is_launcher
    from framework.experiment.resumption.find_run import run_to_resume
    from framework.experiment.resumption.resume_overrides import apply_overrides
    from framework.experiment.trained.load import read_spec_of
    from framework.runs.folder import read_config

    discover(args.plugins, args.without_plugin)
    folder = run_to_resume(args.run)
    typed = {override_key(text): text for text in args.overrides}
    spec = read_spec_of(folder, apply_overrides(read_config(folder), args.overrides), typed)
    spec.resume = str(args.run)
    spec.without = args.without_plugin
    experiment = real_path(folder).parent.name
    if is_launcher(spec):
        job = Job(spec, experiment, [], inexact=args.inexact, traceback=args.traceback)
        return print_end(launch_processes(job, STARTED), args.json)
    result = train_experiment(spec, experiment, [], STARTED, inexact=args.inexact)
    return print_end(result, args.json)


def evaluate(arguments: list[str]) -> None:
    """Run `framework eval`."""
    from .evaluate import evaluate as evaluate_run

    evaluate_run(arguments)


def landscape(arguments: list[str]) -> None:
    """Run `framework landscape`."""
    from .landscape import landscape as draw_landscape

    draw_landscape(arguments)


def predict(arguments: list[str]) -> None:
    """Run `framework predict`."""
    from .predict import predict as predict_files

    predict_files(arguments)


# commands on parts


def list_parts(arguments: list[str]) -> None:
    """Run `framework list`."""
    parser = Parser("list", "List the kinds of parts, or the parts of one kind.", help_texts.LIST)
    parser.add_argument("kind", nargs="?", help="such as optimizer; or experiment")
    folder = "further folder with config files (experiment/NAME.yaml)"
    parser.add_repeated("--config-dir", type=expanded, metavar="DIR", help=folder)
    parser.add_argument("--json", **JSON)
    parser.add_argument("--trust", **TRUST)
    args = parser.parse_args(arguments)
    from .parts import tables

    if args.kind in ("experiment", "experiments"):
        from framework.composition.compose import config_folders
        from framework.composition.config_files import describe_experiments

        found = list(describe_experiments(config_folders(args.config_dir)))
        document: dict[str, Any] = {"experiments": found}
        print_json_or_table(args.json, document, lambda: tables.experiments_table(found))
        return
    index = read_catalogue(args)
    if args.kind:
        kind = tables.kind_of(index, args.kind)
        document = {"parts": {kind: list(index.kinds[kind]["parts"].values())}}
        print_json_or_table(args.json, document, lambda: tables.parts_table(index, kind))
        return
    parts = {name: list(about["parts"].values()) for name, about in index.kinds.items()}
    print_json_or_table(args.json, {"parts": parts}, lambda: tables.list_kinds(index))


def show(arguments: list[str]) -> None:
    """Run `framework show`."""
    description = "Show parts: settings, defaults, source, and curves."
    parser = Parser("show", description, help_texts.SHOW)
    words = "such as optimizer/adamw, or adamw; and settings such as optimizer.lr=0.1"
    parser.add_argument("words", nargs="+", metavar="KIND/NAME", help=words)
    steps = "of schedules (default 1000) and of optimizers (200)"
    parser.add_argument("--steps", type=int, metavar="N", help=steps)
    parser.add_argument("--no-plot", action="store_true", help="without curves")
    parser.add_argument("--json", **JSON)
    parser.add_argument("--trust", **TRUST)
    args = parser.parse_args(arguments)
    from .parts import plots, tables

    if args.steps is not None and not 2 <= args.steps <= MOST_STEPS:
        raise wrong_option("--steps", args.steps, f"an integer from 2 to {MOST_STEPS:,}")
    index = read_catalogue(args)
    overrides = [word for word in args.words if "=" in word]
    names = [word for word in args.words if "=" not in word]
    if not names:
        raise SettingError(f"{overrides[0]}: expected a part before its settings")
    parts = [tables.find_part(index, name) for name in names]
    settings = plots.read_settings(overrides, parts)
    plotted: list[plots.Plotted] = []
    if not args.no_plot and any(part["kind"] in plots.PLOTTED for part in parts):
        from framework.composition.catalogue import load_parts

        with importing_torch():
            load_parts(args.plugins, without=args.without_plugin, trusted=args.trust)
            plotted = plots.plot_parts(parts, settings, args.steps)
    if args.json:
        documents = plots.as_documents(parts, plotted)
        print_json(documents[0] if len(parts) == 1 else {"parts": documents})
        return
    from framework.runtime.display.console import console

    output = console()
    if len(parts) == 1:
        output.print(tables.part_page(parts[0], index, args.plugins, args.without_plugin))
    else:
        output.print(tables.summaries(parts))
    if plotted:
        width = output.width if output.is_terminal else plots.PLAIN_WIDTH
        output.print()
        output.print(plots.render(plotted, width))


def schema(arguments: list[str]) -> None:
    """Run `framework schema`."""
    description = "Print the JSON schema of an experiment file, for editors."
    parser = Parser("schema", description, help_texts.SCHEMA)
    output = "write the schema to a file"
    parser.add_argument("--output", type=expanded, metavar="FILE", help=output)
    parser.add_argument("--json", **JSON)
    parser.add_argument("--trust", **TRUST)
    args = parser.parse_args(arguments)
    index = read_catalogue(args)
    with importing_torch():
        from .schema import print_schema

    print_schema(index, args.output, args.json)


def read_catalogue(args: argparse.Namespace) -> Any:
    """Return the index of all parts; print notes on the plugins that are not in it."""
    from framework.composition.catalogue import find_index

    index = find_index(args.plugins, without=args.without_plugin, trusted=args.trust)
    for problem in index.broken:
        note(f"{problem}; its parts are left out")
    if index.not_trusted:
        paths = [escaped_path(shorter(plugin)) for plugin in index.not_trusted]
        plugins = ", ".join(dict.fromkeys(paths))
        problem = problem_of_file() or "this folder is not trusted"
        message = f"plugins of conf/config.yaml are not loaded: {plugins}: {problem}"
        note(f"{message}. `framework trust` allows it")
    return index


def trust(arguments: list[str]) -> int:
    """Run `framework trust`."""
    description = "Allow `list`, `show` and TAB to run the plugins of a project."
    parser = Parser("trust", description, help_texts.TRUST)
    folder = "folder of the project (default: the current folder)"
    parser.add_argument("folder", nargs="?", type=expanded, metavar="FOLDER", help=folder)
    parser.add_argument("--trust", action="store_true", help="do not ask")
    parser.add_argument("--list", action="store_true", help="print the trusted folders")
    remove = "stop trusting a folder"
    parser.add_argument("--remove", type=expanded, metavar="FOLDER", help=remove)
    args = parser.parse_args(arguments)
    if sum([args.list, args.remove is not None, args.folder is not None or args.trust]) > 1:
        parser.error("give a folder, --list or --remove FOLDER")
    if args.list:
        for trusted in sorted(trusting.read_trusted()):
            print_line(trusted)
        return 0
    if args.remove is not None:
        trusting.untrust(args.remove)
        print_line(f"{os.path.realpath(args.remove)} is no longer trusted")
        return 0
    return trust_folder((args.folder or Path.cwd()).resolve(), args.trust)


def trust_folder(folder: Path, agreed: bool) -> int:
    """Trust a folder if the user agrees; return the exit status, 1 if not."""
    name = escaped_path(str(folder))
    if not folder.is_dir():
        raise FrameworkError(f"trust {name}: no such folder")
    if not agreed and not trusting.named_plugins(folder):
        raise FrameworkError(
            f"trust {name}: its config files (conf/config.yaml, conf/experiment/*.yaml) name no "
            "plugins, so there is nothing to trust; --trust trusts the folder nevertheless"
        )
    print_line(folder)
    for line in trusting.description(folder):
        print_line(f"  {line}")
    if not agreed:
        if not sys.stdin.isatty():
            raise FrameworkError("trust: cannot ask without a terminal; --trust trusts the folder")
        agreed = ask(f"Trust {name}? `list`, `show` and TAB will run its plugins. [y/N] ")
    if not agreed:
        print("not trusted")
        return 1
    trusting.trust(folder)
    print_line(f"trusted; `framework trust --remove {shlex.quote(str(folder))}` reverts it")
    return 0


def rerun(arguments: list[str]) -> int:
    """Run `framework rerun`."""
    parser = Parser("rerun", "Train a new run with the config of another.", help_texts.RERUN)
    parser.add_argument("run", **RUN)
    overrides = "settings to change"
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help=overrides)
    parser.add_argument("--json", **JSON)
    args = parser.parse_intermixed_args(arguments)
    with importing_torch():
        from framework.experiment.recorded.rerun import prepare_rerun
    from framework.composition.compose import Job
    from framework.experiment.experiment import train as train_experiment
    from framework.experiment.launch import is_launcher

    plan = prepare_rerun(args.run, args.overrides, args.plugins, args.without_plugin)
    try:
        for line in plan.differences:
            print_message(line)
        if is_launcher(plan.spec):
            job = Job(plan.spec, plan.experiment, plan.overrides, traceback=args.traceback)
            result = launch_processes(job, STARTED)
        else:
            result = train_experiment(
                plan.spec, plan.experiment, plan.overrides, STARTED, data=plan.data
            )
    finally:
        plan.release()
    return print_end(result, args.json, differences=list(plan.differences))


# commands on folders of runs


def runs(arguments: list[str]) -> int:
    """Run `framework runs`."""
    from .runs import runs as list_runs

    return list_runs(arguments)


def best(arguments: list[str]) -> int:
    """Run `framework best`."""
    from .best import best as best_run

    return best_run(arguments)


def diff(arguments: list[str]) -> None:
    """Run `framework diff`."""
    from .diff import diff as diff_runs  # not at the top: rich takes 0.1 s

    diff_runs(arguments)


# other commands


def board(arguments: list[str]) -> int:
    """Run `framework board`."""
    description = "Start TensorBoard on the runs, for this machine only, until Ctrl-C."
    parser = Parser("board", description, help_texts.BOARD)
    root = "folder of runs (default: runs)"
    parser.add_argument("--root", type=expanded, default=Path("runs"), metavar="DIR", help=root)
    port = "port (default: 6006); 0 takes a free one"
    parser.add_argument("--port", type=int, default=6006, help=port)
    which = "best, names such as 'sweep3/*', or a filter; may be repeated"
    parser.add_repeated("--runs", metavar="WHICH", help=which)
    args = parser.parse_args(arguments)
    from .board import serve_board

    return serve_board(args.root, args.port, args.runs)


def watch(arguments: list[str]) -> None:
    """Run `framework watch`."""
    from .watch import watch as watch_runs

    watch_runs(arguments)


def tell(arguments: list[str]) -> None:
    """Run `framework tell`."""
    from .tell import tell as tell_run

    tell_run(arguments)


def data(arguments: list[str]) -> None:
    """Run `framework data`."""
    parser = Parser("data", "Convert data to memory-mapped Arrow files.", help_texts.DATA)
    parser.add_argument("action", choices=["convert"], help="what to do")
    parser.add_argument(
        "source", type=expanded, metavar="IN", help="a file, or a folder of classes"
    )
    parser.add_argument("target", type=expanded, metavar="OUT", help="the Arrow file or folder")
    overwrite = "replace OUT if it exists"
    parser.add_argument("--overwrite", action="store_true", help=overwrite)
    args = parser.parse_args(arguments)
    from framework.data.convert import convert

    for file, rows in convert(args.source, args.target, args.overwrite).items():
        print_line(f"{rows} rows in {file}")


def tour(arguments: list[str]) -> int:
    """Run `framework tour`."""
    from .tour import tour as run_tour  # not at the top: rich takes 0.1 s

    return run_tour(arguments)


def completion(arguments: list[str]) -> None:
    """Run `framework completion`."""
    from .completion import SCRIPTS

    description = "Print a script for completion with TAB."
    parser = Parser("completion", description, help_texts.COMPLETION)
    parser.add_argument("shell", choices=SCRIPTS, help="the shell that reads the script")
    print(SCRIPTS[parser.parse_args(arguments).shell])


COMMANDS = {
    "train": Command(train, "train an experiment", composes=True, runs_parts=True),
    "resume": Command(resume, "continue a run that was interrupted", runs_parts=True),
    "rerun": Command(rerun, "train a new run with the config of another", runs_parts=True),
    "plan": Command(
        plan,
        "print layers, parameters, steps and memory, without training",
        composes=True,
        runs_parts=True,
    ),
    "check": Command(
        check,
        "test within seconds that an experiment trains, saves and resumes",
        composes=True,
        runs_parts=True,
    ),
    "find": Command(find, "find a learning rate or a batch size", composes=True, runs_parts=True),
    "eval": Command(
        evaluate, "evaluate a trained run on a split or on other data", runs_parts=True
    ),
    "landscape": Command(landscape, "draw the loss around the weights of a run", runs_parts=True),
    "predict": Command(predict, "apply a trained model to files or a prompt", runs_parts=True),
    "export": Command(
        export, "write a trained model as files without the framework", runs_parts=True
    ),
    "runs": Command(runs, "list, label and remove runs"),
    "best": Command(best, "print the folder of the best run"),
    "diff": Command(diff, "print the differences between runs"),
    "explain": Command(
        explain,
        "explain a setting, the speed of a run, or a loss that is NaN",
        composes=True,
        runs_parts=True,
    ),
    "watch": Command(watch, "show runs and sweeps live in the terminal"),
    "tell": Command(tell, "stop, pause, save or change a running run"),
    "board": Command(board, "start TensorBoard on the runs"),
    "tour": Command(tour, "learn deep learning in ten short lessons"),
    "list": Command(list_parts, "list the kinds of parts, or the parts of one kind"),
    "show": Command(show, "show parts: settings, defaults, source, curves"),
    "schema": Command(schema, "print the JSON schema of an experiment file, for editors"),
    "data": Command(data, "convert tables and folders to Arrow files, for data=arrow"),
    "trust": Command(trust, "allow list, show and TAB to run the plugins of a folder"),
    "completion": Command(completion, "print a script for completion with TAB"),
}
"""All commands, in the order of `framework --help`."""
HELP = help_texts.overview(COMMANDS)

if __name__ == "__main__":
    main()
