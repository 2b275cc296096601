"""The arguments that commands have in common."""

import argparse
import gc
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from framework.errors import (
    Facts,
    FrameworkError,
    did_you_mean,
    nearest,
    short,
    suggestion,
    wrong_option,
)
from framework.errors.paths import expanded
from framework.errors.terminal import note

TRACEBACK = "--traceback"
RUN: dict[str, Any] = {"type": expanded, "help": "folder of a run"}
CHECKPOINT: dict[str, Any] = {
    "metavar": "WHICH",
    "help": "best (default), last, or the folder of a checkpoint",
}
TRUST: dict[str, Any] = {
    "action": "store_true",
    "help": "load the plugins that conf/config.yaml names, for this command only",
}
JSON: dict[str, Any] = {
    "action": "store_true",
    "help": "print one JSON document on stdout, and everything else on stderr",
}
NUMBERS: dict[Any, str] = {int: "an integer", float: "a number"}
NO_FACTS = Facts()
ARGPARSE_MISSING = "the following arguments are required: "


DESCRIBE = "--describe-options"
"""The only argument that makes a parser raise OptionsRequest, for completion with TAB."""


class OptionsRequest(Exception):
    """Carries the options of a command, with the values that each may have."""

    def __init__(self, options: dict[str, list[str] | None]):
        super().__init__()
        self.options = options


@dataclass(frozen=True)
class Command:
    """A command, such as `train`.

    Attributes:
        function: runs it with the arguments that follow its name; may return an exit status.
        summary: one line for `framework --help`.
        composes: whether it takes overrides such as optimizer.lr=0.1.
        runs_parts: whether it runs parts, also of plugins in an untrusted working folder.
    """

    function: Callable[[list[str]], int | None]
    summary: str
    composes: bool = False
    runs_parts: bool = False


class Parser(argparse.ArgumentParser):
    """A parser for one command; its errors are FrameworkErrors."""

    def __init__(self, command: str, description: str, examples: str):
        self.command = command
        self.names: list[str] = []  # of all arguments
        self.options: dict[str, list[str] | None] = {"--help": None}  # with their choices
        super().__init__(
            f"framework {command}",
            description=description,
            epilog=examples,
            allow_abbrev=False,
            exit_on_error=False,  # `parsed` words the errors
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        plugins = "file, folder or module that registers parts; may be repeated"
        self.add_repeated("--plugins", metavar="FILE", help=plugins)
        without = "do not load an installed plugin; may be repeated"
        self.add_repeated("--without-plugin", metavar="NAME", help=without)
        self.add_argument(TRACEBACK, action="store_true", help="print the traceback of an error")

    def add_repeated(self, flag: str, **options: Any) -> None:
        """Add an option that may be repeated; its value is a list."""
        self.add_argument(flag, action="append", default=[], **options)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Add an argument; a wrong choice or number raises FrameworkError."""
        self.names += names
        shown = names[-1] if names[-1].startswith("-") else self.command
        if names[-1].startswith("--") and names[-1] != "--help":
            takes_value = options.get("action") not in ("store_true", "store_false")
            self.options[names[-1]] = list(options.get("choices", ())) if takes_value else None
        if "choices" in options:
            options["type"] = self.one_of(shown, options["choices"])
        elif options.get("type") in NUMBERS:
            options["type"] = self.number(shown, options["type"])
        return super().add_argument(*names, **options)

    def one_of(self, shown: str, choices: Iterable[str]) -> Callable[[str], str]:
        """Return a function that returns one of the choices, or raises FrameworkError.

        Args:
            shown: the option, or the command of a positional argument, for the message.
            choices: the values that it may have.
        """

        def checked(text: str) -> str:
            if text not in choices:
                value = short(text, quote=False)
                advice = suggestion(text, choices)
                expected = f"one of {', '.join(choices)}"
                facts = Facts(shown, text, expected, suggestion=nearest(text, choices))
                self.error(f"{shown} {value}: expected {expected}{advice}", facts)
            return text

        return checked

    def number(self, shown: str, kind: type[int] | type[float]) -> Callable[[str], int | float]:
        """Return a function that converts a text to a number, or raises FrameworkError.

        Args:
            shown: the option, for the message.
            kind: int or float.
        """

        def checked(text: str) -> int | float:
            try:
                return kind(text)
            except ValueError:
                message = f"{shown} {short(text, quote=False)}: expected {NUMBERS[kind]}"
                self.error(message, Facts(shown, text, NUMBERS[kind]))

        return checked

    def parse_args(self, arguments: list[str]) -> argparse.Namespace:  # type: ignore[override]
        """Parse the arguments.

        Raises:
            FrameworkError: an argument is wrong, missing or unknown.
        """
        return self.parsed(self.parse_known_args, arguments)

    def parse_intermixed_args(  # type: ignore[override]
        self, arguments: list[str]
    ) -> argparse.Namespace:
        """Parse the arguments; options may stand between overrides.

        Raises:
            FrameworkError: an argument is wrong, missing or unknown.
        """
        return self.parsed(self.parse_known_intermixed_args, arguments)

    def parsed(
        self,
        parse: Callable[[list[str]], tuple[argparse.Namespace, list[str]]],
        arguments: list[str],
    ) -> argparse.Namespace:
        """Parse arguments with a method of argparse, and report its errors and unknown options."""
        if arguments == [DESCRIBE]:
            raise OptionsRequest(self.options)
        try:
            args, unknown = parse(arguments)
        except argparse.ArgumentError as error:
            if error.argument_name is None:
                self.error(error.message)
            option = error.argument_name.rpartition("/")[2]  # of "-m/--multirun"
            if error.message.startswith("ignored explicit argument"):
                self.error(f"{option}: takes no value", Facts(option))
            self.error(f"{option}: expected a value", Facts(option, expected="a value"))
        if unknown:
            self.unknown_argument(unknown)
        return args

    def unknown_argument(self, unknown: list[str]) -> NoReturn:
        """Raise FrameworkError for arguments that the command does not have."""
        options = [word for word in unknown if word.startswith("-")]
        if not options:
            message = f"{self.command}: expected no argument {short(unknown[0], quote=False)}"
            self.error(message, Facts(value=unknown[0]))
        option = options[0].partition("=")[0]
        known = [name for name in self.names if name.startswith("--")]
        if option.startswith("--") and "overrides" in self.names and nearest(option, known) is None:
            advice = "settings have no dashes: write KEY=VALUE"
        else:
            advice = did_you_mean(option, known)
        facts = Facts(option, suggestion=nearest(option, known))
        self.error(f"{option}: there is no such option; {advice}", facts)

    def error(self, message: str, facts: Facts = NO_FACTS) -> NoReturn:
        """Raise FrameworkError."""
        missing = message.removeprefix(ARGPARSE_MISSING)
        if missing != message:
            message = f"{self.command}: missing argument {missing}"
        raise FrameworkError(f"{message} (see `{self.prog} --help`)").with_facts(facts)


def composing(
    command: str,
    description: str,
    examples: str,
    targets: Sequence[str] = (),
    argument: tuple[str, str] | None = None,
) -> Parser:
    """Return the parser of a command that composes an experiment.

    Args:
        command: its name.
        description: one sentence.
        examples: the text at the end of the help.
        targets: the values of the argument `target`, before the overrides; it may be missing.
        argument: the name and the help of another argument before the overrides.
    """
    parser = Parser(command, description, examples)
    if argument is not None:
        name, text = argument
        parser.add_argument(name.lower(), metavar=name, help=text)
    if targets:
        parser.add_argument("target", nargs="?", choices=targets, help="the setting to find")
    overrides = "changes to the default experiment: parts and settings"
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help=overrides)
    folder = "further folder with config files (experiment/NAME.yaml)"
    parser.add_repeated("--config-dir", type=expanded, metavar="DIR", help=folder)
    cfg = "print the composed config instead of running"
    parser.add_argument("--cfg", choices=["job", "hydra", "all"], help=cfg)
    parser.add_argument("--resolve", action="store_true", help="with --cfg: resolve references")
    choices = ("defaults", "defaults-tree", "searchpath", "config", "plugins", "all")
    info = f"print how Hydra composes the config: {', '.join(choices)}"
    parser.add_argument("--info", choices=choices, metavar="WHAT", help=info)
    parser.set_defaults(multirun=False, inexact=False)
    return parser


def command_line(parser: Parser, args: argparse.Namespace) -> Any:
    """Return the parsed arguments as a `CommandLine`."""
    if bool(args.multirun) + bool(args.cfg) + bool(args.info) > 1:
        parser.error("give only one of -m, --cfg and --info")
    if getattr(args, "json", False) and (args.cfg or args.info):
        parser.error("give only one of --json, --cfg and --info")
    if args.resolve and not args.cfg:
        parser.error("--resolve requires --cfg")
    with importing_torch():
        from framework.composition.compose import CommandLine
    return CommandLine(
        args.overrides,
        args.plugins,
        args.config_dir,
        multirun=args.multirun,
        cfg=args.cfg,
        resolve=args.resolve,
        info=args.info,
        inexact=args.inexact,
        traceback=args.traceback,
        without=args.without_plugin,
    )


@contextmanager
def importing_torch() -> Iterator[None]:
    """Pause the garbage collection, which takes 0.5 s while torch makes a million objects."""
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def sweep_over(
    parser: Parser,
    args: argparse.Namespace,
    flag: str,
    key: str,
    count: int,
    values: Sequence[Any],
) -> None:
    """Turn the command into a sweep over values of a key.

    Args:
        parser: reports errors.
        args: the parsed arguments, which are changed.
        flag: the option that asks for the sweep.
        key: the setting that is varied.
        count: the number of values, as given to the option.
        values: those of the trials.
    """
    if count < 2:
        raise wrong_option(flag, count, "at least 2")
    if any(word.lstrip("+").startswith(f"{key}=") for word in args.overrides):
        parser.error(f"{flag} {count} sets {key}; remove {key}=")
    args.overrides.append(f"{key}={','.join(map(str, values))}")
    args.multirun = True


def opened_run(args: argparse.Namespace) -> Any:
    """Load the plugins and the run that the arguments name."""
    with importing_torch():
        from framework.experiment.trained.load import open_run
        from framework.registry.discovery import discover
    for problem in discover(args.plugins, args.without_plugin, tolerant=True):
        note(f"{problem}; its parts are left out")
    return open_run(args.run, args.checkpoint)


def ask(question: str) -> bool:
    """Ask a question on the terminal; return whether the answer is yes."""
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False
