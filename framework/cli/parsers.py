"""The arguments that verbs of the command line have in common."""

import argparse
import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from framework.errors import FrameworkError
from framework.errors.paths import expanded

TRACEBACK = "--traceback"
RUN: dict[str, Any] = {"type": expanded, "help": "the folder of a run"}
CHECKPOINT: dict[str, Any] = {"metavar": "WHICH"}
CHECKPOINT["help"] = "best (default), last, or the folder of a checkpoint"
TRUST: dict[str, Any] = {
    "action": "store_true",
    "help": "load the plugins that conf/config.yaml names, this once",
}
JSON: dict[str, Any] = {"action": "store_true", "help": "for programs"}


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are ours."""

    def __init__(self, verb: str, does: str, epilog: str):
        super().__init__(f"framework {verb}", description=does, epilog=epilog, allow_abbrev=False)
        self.formatter_class = argparse.RawDescriptionHelpFormatter
        self.repeated("--plugins", metavar="FILE", help="parts of your own, or a module")
        self.repeated(
            "--without-plugin",
            metavar="NAME",
            help="leave an installed plugin out, such as a broken one",
        )
        self.add_argument(TRACEBACK, action="store_true", help="show where an error arose")

    def repeated(self, flag: str, **about: Any) -> None:
        self.add_argument(flag, action="append", default=[], **about)

    def error(self, message: str) -> NoReturn:
        raise FrameworkError(f"{message} (`{self.prog} --help` shows how)")


def composing(verb: str, does: str, epilog: str) -> Parser:
    parser = Parser(verb, does, epilog)
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="what differs from the default experiment"
    )
    about = "a folder with experiment/*.yaml"
    parser.repeated("--config-dir", type=expanded, metavar="DIR", help=about)
    parser.add_argument(
        "--cfg", choices=["job", "hydra", "all"], help="print the composed config and stop"
    )
    parser.add_argument("--resolve", action="store_true", help="with --cfg: fill in the references")
    shown = ("defaults", "defaults-tree", "searchpath", "config", "plugins", "all")
    parser.add_argument(
        "--info", choices=shown, metavar="WHAT", help=f"print and stop: {', '.join(shown)}"
    )
    parser.set_defaults(multirun=False, inexact=False)
    return parser


def command_line(parser: Parser, given: argparse.Namespace) -> Any:
    if bool(given.multirun) + bool(given.cfg) + bool(given.info) > 1:
        parser.error("-m runs a sweep, --cfg and --info only show: give one of them")
    if given.resolve and not given.cfg:
        parser.error("--resolve goes with --cfg")
    with importing_torch():
        from framework.composition.compose import CommandLine
    flags = ("multirun", "cfg", "resolve", "info", "inexact", "traceback")
    chosen = {flag: vars(given)[flag] for flag in flags}
    return CommandLine(
        given.overrides, given.plugins, given.config_dir, **chosen, without=given.without_plugin
    )


@contextmanager
def importing_torch() -> Iterator[None]:
    """Do not look for garbage: of the million objects that torch makes none is, and a look takes half a second."""
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def swept(
    parser: Parser,
    given: argparse.Namespace,
    flag: str,
    key: str,
    count: int,
    values: Sequence[Any],
) -> None:
    """Make the command a sweep over so many values of a key."""
    if count < 2:
        parser.error(f"{flag} {count}: should be 2 or more")
    if any(word.lstrip("+").startswith(f"{key}=") for word in given.overrides):
        parser.error(f"{flag} {count} says which {key}s there are: leave {key}= out")
    given.overrides.append(f"{key}={','.join(map(str, values))}")
    given.multirun = True
