"""The command line: verbs, their arguments and help, exit statuses. What they do is said elsewhere."""

import argparse
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import framework.tuning.sections  # noqa: F401  registers the section `sweep`, sweepers and launchers
from framework.composition import trust as trusting
from framework.composition.trust import (
    entries_in,
    escaped_path,
    importing_from_elsewhere,
    is_trusted,
    problem_of_file,
)
from framework.errors import ConfigError, FrameworkError, did_you_mean
from framework.errors.exits import no_exit
from framework.errors.paths import expanded, real_path, shorter
from framework.errors.terminal import (
    completed,
    message_lines,
    note,
    print_line,
    print_message,
    print_traceback,
    printable_lines,
    printable_warnings,
)
from framework.errors.user_code import describe, internal_place, user_place
from framework.system.signals import interruptible
from framework.system.streams import prepare_streams, silence_broken_streams

from .help_texts import (
    BOARD,
    CHECK,
    EVAL,
    FIND,
    HELP,
    LIST,
    PLAN,
    PREDICT,
    RESUME,
    SHOW,
    TRAIN,
    TRUSTING,
)
from .parsers import (
    CHECKPOINT,
    JSON,
    RUN,
    TRACEBACK,
    TRUST,
    Parser,
    command_line,
    composing,
    importing_torch,
    swept,
)

STARTED = time.monotonic()
RUNNING = ("train", "resume", "plan", "check", "find", "eval", "predict")
"""Verbs that run parts, also those in the working folder, as far as Python finds them there."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    prepare_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    arguments.sort(key=TRACEBACK.__eq__)  # it may stand anywhere, also before the verb
    with interruptible() as interrupt:
        status = exit_status_of(arguments)
    if (
        interrupt.received is not None and status == 0
    ):  # after the last of the work, or its exception was lost
        status = 128 + interrupt.received
    sys.exit(status)


def exit_status_of(arguments: list[str]) -> int:
    """Run a verb; print the error that ends it. Returns the exit status."""
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
        if user_place(error) is None:  # nobody reads the output any more
            silence_broken_streams()
            status = 128 + signal.SIGPIPE
        else:
            status = complain(error, TRACEBACK in arguments)
    except Exception as error:
        status = complain(error, TRACEBACK in arguments)
    return status


@contextmanager
def importing_safely(arguments: list[str]) -> Iterator[None]:
    """Import no module from the working folder in a command that only informs, unless the user trusts the folder."""
    verb = arguments[0] if arguments else "--help"
    informs = verb not in RUNNING or "--help" in arguments or "-h" in arguments
    if not informs or "--trust" in arguments or not entries_in(os.curdir) or is_trusted(Path.cwd()):
        yield
        return
    named = [word for before, word in pairwise(arguments) if before == "--plugins"]
    named += [word.partition("=")[2] for word in arguments if word.startswith("--plugins=")]
    with importing_from_elsewhere(os.curdir, named) as left_out:
        if left_out and verb in ("list", "show") and os.environ.get("PYTHONPATH"):
            entries = ", ".join(escaped_path(shorter(entry)) for entry in left_out)
            note(
                f"no module is imported from {entries}, since this folder is not trusted (`framework trust`)"
            )
        yield


def complain(error: Exception, with_traceback: bool) -> int:
    """Print an error with its place, in user code or in the framework; return the exit status."""
    if with_traceback:
        print_traceback(error)
    lines = [f"framework: {line}" for line in message_lines(error_lines(error))]
    if not with_traceback and has_calls(error):
        lines[-1] += f"; {TRACEBACK} shows the calls"
    try:
        print("\n".join(lines), file=sys.stderr, flush=True)
    except BrokenPipeError:
        silence_broken_streams()
    return error.exit_status if isinstance(error, FrameworkError) else 1


def has_calls(error: Exception) -> bool:
    """Whether a traceback says more than the message: of errors in user code and internal ones."""
    if not isinstance(error, FrameworkError):
        return True
    cause = error.__cause__
    place = None if cause is None or isinstance(cause, FrameworkError) else user_place(cause)
    return place is not None and str(place) in str(error)


def error_lines(error: Exception) -> list[str]:
    """Return the lines of an error, with its location: one for each problem of a ConfigError, else one."""
    if isinstance(error, ConfigError) and error.problems:
        return error.problems
    if isinstance(error, FrameworkError):
        return [str(error) or type(error).__name__]
    place = internal_place(error) if user_place(error) is None else None
    return [describe(error) if place is None else f"{describe(error)}; internal error at {place}"]


def run(arguments: list[str]) -> int:
    """Run a verb and return the exit status."""
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if verb in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if verb in ("-V", "--version", "version"):
        from importlib.metadata import version

        print(version("framework"))
        return 0
    if verb == "complete":  # what the scripts of `completion` call at each TAB
        from .completion import answer

        words = answer(rest[1:] if rest[:1] == ["--"] else rest)
        print("\n".join(completed(words)))
        return 0
    if verb not in VERBS:
        raise FrameworkError(f"there is no verb {verb!r}; {did_you_mean(verb, VERBS)}")
    return VERBS[verb](rest) or 0


def print_json_or_table(as_json: bool, value: Any, table: Callable[[], Any]) -> None:
    """Print a value for programs, or the table of it for people."""
    if as_json:
        print(json.dumps(value, indent=2))
    else:
        from framework.runtime.console import console

        console().print(table())


def train(arguments: list[str]) -> None:
    parser = composing("train", "Compose an experiment and train it.", TRAIN)
    about = "sweep: try every combination of a,b,c or range(3)"
    parser.add_argument("-m", "--multirun", action="store_true", help=about)
    parser.add_argument(
        "--inexact", action="store_true", help="resume though settings would change the outcome"
    )
    parser.add_argument(
        "--repeat", type=int, metavar="N", help="sweep over N seeds: mean and standard error"
    )
    parser.add_argument(
        "--folds", type=int, metavar="N", help="cross-validation: sweep over N folds"
    )
    given = parser.parse_intermixed_args(arguments)
    if given.repeat is not None:
        swept(parser, given, "--repeat", "seed", given.repeat, range(given.repeat))
    if given.folds is not None:
        swept(
            parser,
            given,
            "--folds",
            "fold",
            given.folds,
            [f"{k}/{given.folds}" for k in range(1, given.folds + 1)],
        )
    line = command_line(parser, given)
    from framework.composition.compose import Job, run_composed as compose

    def job(composed: Job) -> Any:
        from framework.experiment.experiment import train as train_experiment

        started = STARTED if composed.number is None else None
        what = composed.spec, composed.experiment, composed.overrides
        result = train_experiment(*what, started, inexact=composed.inexact)
        if composed.number is None:
            from .output import print_result

            print_result(result)
            if result.signal is not None:
                sys.exit(128 + result.signal)
        return result

    if line.multirun:
        from framework.tuning.sweep.sweep import sweep

        sweep(line, job, error_lines)
    else:
        compose(line, job)


def resume(arguments: list[str]) -> int:
    parser = Parser("resume", "Go on with a run that was cut off, as if it had not been.", RESUME)
    parser.add_argument(
        "run", **RUN | {"help": "the folder of a run, or of the checkpoint of one to go on from"}
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="what is to differ from here on"
    )
    parser.add_argument(
        "--inexact", action="store_true", help="though settings would change the outcome"
    )
    given = parser.parse_intermixed_args(arguments)
    with importing_torch():
        from framework.experiment.experiment import train as train_experiment
        from framework.registry.discovery import discover
    from framework.experiment.find_run import run_to_resume
    from framework.experiment.load import read_spec_of
    from framework.experiment.resume_overrides import apply_overrides
    from framework.runs.folder import read_config

    from .output import print_result

    discover(given.plugins, given.without_plugin)
    run = run_to_resume(given.run)
    spec = read_spec_of(run, apply_overrides(read_config(run), given.overrides))
    spec.resume, spec.without = str(given.run), given.without_plugin
    result = train_experiment(spec, real_path(run).parent.name, [], STARTED, inexact=given.inexact)
    print_result(result)
    return 0 if result.signal is None else 128 + result.signal


def plan(arguments: list[str]) -> None:
    parser = composing("plan", "Show what an experiment would be, without training.", PLAN)
    parser.add_argument("--json", **JSON)
    about = "sweep: how many trials there would be, and which can train as one"
    parser.add_argument("-m", "--multirun", action="store_true", help=about)
    given = parser.parse_intermixed_args(arguments)
    if given.json and given.multirun:
        parser.error("--json is for one experiment, not for a sweep")
    line = command_line(parser, given)
    from framework.composition.compose import Job, run_composed as compose

    def job(composed: Job) -> None:
        from framework.experiment.experiment import Experiment
        from framework.experiment.plan_text import render
        from framework.registry.discovery import output_for_programs

        with output_for_programs(given.json):
            made = Experiment(composed.spec).plan()
        print_json_or_table(given.json, asdict(made), lambda: render(made))

    if line.multirun:
        from framework.tuning.sweep.sweep import sweep
        from framework.tuning.vectorized.launcher import describe_groups

        sweep(line, job, plan=describe_groups)
    else:
        compose(line, job)


def check(arguments: list[str]) -> None:
    parser = composing(
        "check", "Try an experiment in seconds: build, step, validate, save, resume, learn.", CHECK
    )
    line = command_line(parser, parser.parse_intermixed_args(arguments))
    from framework.composition.compose import run_composed as compose
    from framework.experiment.check import run_check as check_experiment

    compose(line, lambda job: check_experiment(job.spec, print_message))


def find(arguments: list[str]) -> None:
    parser = composing("find", "Find a learning rate, or a batch size, by trying them out.", FIND)
    parser.add_argument("--json", **JSON)
    given = parser.parse_intermixed_args(arguments)
    what = given.overrides.pop(0) if given.overrides else ""
    if what not in ("lr", "batch_size"):
        parser.error(f"what is to be found comes first: lr or batch_size{what and f', not {what}'}")
    line = command_line(parser, given)
    from framework.composition.compose import run_composed as compose
    from framework.experiment import find as finders

    show = finders.show_learning_rates if what == "lr" else finders.show_batch_sizes
    compose(line, lambda job: show(job.spec, given.json))


def evaluate(arguments: list[str]) -> None:
    parser = Parser("eval", "Measure a trained run on a split of its data.", EVAL)
    parser.add_argument("run", **RUN)
    parser.add_argument("--split", choices=["train", "val", "test"], default="test")
    parser.add_argument("--checkpoint", **CHECKPOINT)
    parser.add_argument("--json", **JSON)
    given = parser.parse_args(arguments)
    from framework.registry.discovery import (
        output_for_programs,
    )  # not at the top: `--help` does without it

    with output_for_programs(given.json):
        trained = opened_run(given)
        values = trained.evaluate(given.split)
    if given.json:
        print(json.dumps(values))
    else:
        from .output import print_values

        print_values(values, trained.checkpoint)


def predict(arguments: list[str]) -> None:
    parser = Parser(
        "predict",
        "Run a trained model on a file, or let a language model go on with a text.",
        PREDICT,
    )
    parser.add_argument("run", **RUN)
    like = "like those that the run's data set reads"
    parser.add_argument("--input", type=expanded, metavar="FILE", help=like)
    parser.add_argument(
        "--output", metavar="FILE", help=".csv, .jsonl, .npz, or - for the terminal"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="what a language model is to go on with")
    parser.add_argument(
        "--length", type=int, metavar="N", help="with --prompt: tokens (default 200)"
    )
    parser.add_argument(
        "--temperature", type=float, metavar="X", help="with --prompt: 0 is greedy (default 0.8)"
    )
    parser.add_argument(
        "--top-k", type=int, metavar="K", help="with --prompt: draw from the K likeliest tokens"
    )
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="with --prompt: and from those that make up P"
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="with --prompt: of the draws (default 0)"
    )
    parser.add_argument("--checkpoint", **CHECKPOINT)
    given = parser.parse_args(arguments)
    chosen = {
        name: getattr(given, name) for name in ("length", "temperature", "top_k", "top_p", "seed")
    }
    sampling = {name: value for name, value in chosen.items() if value is not None}
    if (given.prompt is None) == (given.input is None) or (given.input is None) != (
        given.output is None
    ):
        parser.error("give --input FILE --output FILE, or --prompt TEXT for a language model")
    if given.prompt is not None:
        return write_on(given, sampling)
    if sampling:
        parser.error(f"--{next(iter(sampling)).replace('_', '-')} goes with --prompt")
    from framework.registry.discovery import output_for_programs

    from .output import check_output, write_predictions

    check_output(given.output)
    with output_for_programs(given.output == "-"):
        trained = opened_run(given)
        columns = trained.predict(trained.read_inputs(given.input))
    rows = write_predictions(columns, trained.facts["classes"], given.output)
    if given.output != "-":
        print_line(f"{rows} predictions in {given.output}")


def write_on(given: argparse.Namespace, sampling: dict[str, Any]) -> None:
    """Print a prompt and what the run's language model puts after it."""
    known, text = opened_run(given).generate(given.prompt, **sampling)
    if known != given.prompt:
        note(f"the model knows a part of the prompt only; it reads {known!r}")
    print(printable_lines(text))


def opened_run(given: argparse.Namespace) -> Any:
    with importing_torch():
        from framework.experiment.load import open_run
        from framework.registry.discovery import discover
    for problem in discover(given.plugins, given.without_plugin, tolerant=True):
        note(f"{problem}; its parts are left out")
    return open_run(given.run, given.checkpoint)


def list_parts(arguments: list[str]) -> None:
    parser = Parser("list", "List the kinds of parts, or the parts of one kind.", LIST)
    parser.add_argument("kind", nargs="?")
    parser.add_argument("--json", **JSON)
    parser.add_argument("--trust", **TRUST)
    given = parser.parse_args(arguments)
    from . import part_tables

    index = index_of(given)
    kind = given.kind and part_tables.kind_of(index, given.kind)
    parts = {
        each: list(index.kinds[each]["parts"].values())
        for each in ([kind] if kind else index.kinds)
    }
    print_json_or_table(
        given.json,
        parts,
        lambda: part_tables.parts_table(index, kind) if kind else part_tables.list_kinds(index),
    )


def show(arguments: list[str]) -> None:
    parser = Parser("show", "Show a part: what it does, its settings, where it is written.", SHOW)
    parser.add_argument("part", metavar="KIND/NAME")
    parser.add_argument("--json", **JSON)
    parser.add_argument("--trust", **TRUST)
    given = parser.parse_args(arguments)
    from . import part_tables

    index = index_of(given)
    part = part_tables.find_part(index, given.part)
    print_json_or_table(
        given.json,
        part,
        lambda: part_tables.part_page(part, index, given.plugins, given.without_plugin),
    )


def index_of(given: argparse.Namespace) -> Any:
    """Return the index of all parts; notes say which plugins are not in it."""
    from framework.composition.catalogue import find_index

    index = find_index(given.plugins, without=given.without_plugin, trusted=given.trust)
    for problem in index.broken:
        note(f"{problem}; its parts are left out")
    if index.not_trusted:
        plugins = ", ".join(
            dict.fromkeys(escaped_path(shorter(plugin)) for plugin in index.not_trusted)
        )
        problem = problem_of_file() or "this folder is not trusted"
        note(
            f"plugins of conf/config.yaml are not loaded: {plugins}: {problem}. `framework trust` allows it"
        )
    return index


def trust(arguments: list[str]) -> int:
    parser = Parser(
        "trust", "Let `list`, `show` and TAB run the plugins of a project, too.", TRUSTING
    )
    about = "the folder of the project (default: this one)"
    parser.add_argument("folder", nargs="?", type=expanded, metavar="FOLDER", help=about)
    parser.add_argument("--trust", action="store_true", help="do not ask, for scripts")
    parser.add_argument("--list", action="store_true", help="print the trusted folders")
    parser.add_argument(
        "--remove", type=expanded, metavar="FOLDER", help="trust a folder no longer"
    )
    given = parser.parse_args(arguments)
    if sum([given.list, given.remove is not None, given.folder is not None or given.trust]) > 1:
        parser.error("give a folder, --list or --remove FOLDER")
    if given.list:
        for folder in sorted(trusting.read_trusted()):
            print_line(folder)
    elif given.remove is not None:
        trusting.untrust(given.remove)
        print_line(f"{os.path.realpath(given.remove)} is no longer trusted")
    else:
        return trust_folder((given.folder or Path.cwd()).resolve(), given.trust)
    return 0


def trust_folder(folder: Path, agreed: bool) -> int:
    """Trust a folder if the user agrees; return 1 if not."""
    if not folder.is_dir():
        raise FrameworkError(f"trust {escaped_path(str(folder))}: there is no such folder")
    print_line(folder)
    for line in trusting.description(folder):
        print_line(f"  {line}")
    if not agreed:
        if not sys.stdin.isatty():
            raise FrameworkError("trust: there is no terminal to ask on; --trust answers yes")
        agreed = answer_of(
            f"Trust {escaped_path(str(folder))}? `list`, `show` and TAB will run its plugins. [y/N] "
        )
    if not agreed:
        print("not trusted")
        return 1
    trusting.trust(folder)
    print_line(f"trusted; `framework trust --remove {shlex.quote(str(folder))}` takes it back")
    return 0


def answer_of(question: str) -> bool:
    """Ask on the terminal; whether the answer is yes."""
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False


def board(arguments: list[str]) -> int:
    parser = Parser(
        "board", "Start TensorBoard on the runs, on this machine alone, until Ctrl-C.", BOARD
    )
    about = "the folder of runs (default: runs)"
    parser.add_argument("--root", type=expanded, default=Path("runs"), help=about)
    parser.add_argument("--port", type=int, default=6006, help="0 takes any free one")
    given = parser.parse_args(arguments)
    from .board import serve_board

    return serve_board(given.root, given.port)


def completion(arguments: list[str]) -> None:
    from .completion import SCRIPTS

    example = "source <(framework completion bash)"
    parser = Parser("completion", "Print a script that completes words with TAB.", example)
    parser.add_argument("shell", choices=SCRIPTS)
    print(SCRIPTS[parser.parse_args(arguments).shell])


VERBS: dict[str, Callable[[list[str]], int | None]] = {
    "train": train,
    "resume": resume,
    "plan": plan,
    "check": check,
    "find": find,
    "eval": evaluate,
    "predict": predict,
    "list": list_parts,
    "show": show,
    "trust": trust,
    "board": board,
    "completion": completion,
}

if __name__ == "__main__":
    main()
