"""`framework tour`: lessons on deep learning that run in the terminal.

A lesson is a Markdown file of `conf/tour`: a title, an explanation, the commands, what to look at,
a question and its answer. The experiments of the commands are in `conf/tour/experiment`.
"""

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from rich.markdown import Markdown
from rich.table import Table

from framework.errors import FrameworkError, RunError, wrong_option
from framework.errors.terminal import note, printable_lines
from framework.runtime.display.console import console

from . import help_texts
from .json_output import print_json
from .parsers import JSON, Parser

LESSON = re.compile(
    r"# (?P<title>[^\n]+)\n+"
    r"(?P<text>.*?)\n*"
    r"```bash\n(?P<commands>.*?)\n```\n+"
    r"(?P<notes>.*?)\n+"
    r"\*\*Answer\.\*\* (?P<answer>.*)",
    re.DOTALL,
)
KEYS = "[Enter] next   b back   r [KEY=VALUE ...] repeat with other settings   q quit"


@dataclass(frozen=True)
class Lesson:
    """A lesson of the tour.

    Attributes:
        number: its place in the tour, from 1.
        title: one line.
        text: the explanation, in Markdown.
        commands: such as "framework train activation=relu", in their order; RUN stands for the run
            that was trained last.
        notes: what to look at, and a question, in Markdown.
        answer: of the question, in Markdown.
    """

    number: int
    title: str
    text: str
    commands: Sequence[str]
    notes: str
    answer: str


def read_lessons() -> list[Lesson]:
    """Return all lessons, in their order."""
    lessons = []
    folder = files("framework_conf") / "tour"
    pages = sorted(page.name for page in folder.iterdir() if re.match(r"\d\d_.*\.md$", page.name))
    for number, name in enumerate(pages, 1):
        parts = LESSON.fullmatch((folder / name).read_text(encoding="utf-8").strip())
        assert parts is not None, f"conf/tour/{name} has not the parts of a lesson"
        commands = parts["commands"].splitlines()
        lessons.append(
            Lesson(number, parts["title"], parts["text"], commands, parts["notes"], parts["answer"])
        )
    return lessons


def tour(arguments: list[str]) -> int:
    """Run `framework tour`.

    Returns:
        The exit status: 2 without a terminal after a command with a user error, otherwise 0.
    """
    parser = Parser("tour", "Learn deep learning in ten short lessons.", help_texts.TOUR)
    first = "begin with this lesson; without a terminal, run only this one"
    parser.add_argument("--lesson", type=int, metavar="N", help=first)
    parser.add_argument("--list", action="store_true", help="list the lessons")
    parser.add_argument("--json", **JSON | {"help": "with --list: print it as JSON"})
    overrides = "settings for all commands of the first lesson"
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help=overrides)
    args = parser.parse_intermixed_args(arguments)
    lessons = read_lessons()
    if args.json and not args.list:
        parser.error("--json requires --list")
    if args.lesson is not None and not 1 <= args.lesson <= len(lessons):
        raise wrong_option("--lesson", args.lesson, f"an integer from 1 to {len(lessons)}")
    wrong = [word for word in args.overrides if "=" not in word]
    if wrong:
        parser.error(f"expected KEY=VALUE, got {wrong[0]}")
    if args.list:
        print_list(lessons, args.json)
    elif sys.stdin.isatty() and sys.stdout.isatty():
        Guide(lessons, run_command).run((args.lesson or 1) - 1, args.overrides)
    else:
        chosen = lessons if args.lesson is None else [lessons[args.lesson - 1]]
        for lesson in chosen:
            print_lesson(lesson, len(lessons))
            status = run_all(lesson, args.overrides, run_command)
            if status:
                return status
            print_markdown(f"{lesson.notes}\n\n**Answer.** {lesson.answer}\n")
    return 0


def print_list(lessons: Sequence[Lesson], as_json: bool) -> None:
    """Print number and title of each lesson."""
    if as_json:
        rows = [
            {"lesson": each.number, "title": each.title, "commands": list(each.commands)}
            for each in lessons
        ]
        print_json({"lessons": rows})
        return
    table = Table(box=None, show_header=False)
    for each in lessons:
        table.add_row(str(each.number), each.title)
    console().print(table)


def print_lesson(lesson: Lesson, count: int) -> None:
    """Print the title and the explanation of a lesson."""
    print_markdown(f"## {lesson.number} of {count}. {lesson.title}\n\n{lesson.text}\n")


def print_markdown(text: str) -> None:
    """Print Markdown: formatted on a terminal, as it is elsewhere."""
    screen = console()
    if screen.is_terminal:
        screen.print(Markdown(text))
    else:
        print(printable_lines(text))


def run_all(lesson: Lesson, overrides: Sequence[str], run: Callable[[str], int]) -> int:
    """Run the commands of a lesson, with further settings for those that train.

    Returns:
        0; or 2 after a command with a user error, such as a folder that cannot be written. The
        commands after it are not run. A training that fails is part of a lesson.
    """
    for command in lesson.commands:
        changed = command
        if command.startswith("framework train "):
            changed = " ".join([command, *map(shlex.quote, overrides)])
        elif " RUN" in command:
            run_folder = newest_run()
            if run_folder is None:
                raise RunError(f"{command}: no run has been trained in the folder runs")
            changed = command.replace("RUN", shlex.quote(str(run_folder)))
        console().print(f"$ {changed}", style="bold")
        sys.stdout.flush()  # before the output of the command
        started = time.monotonic()
        status = run(changed)
        seconds = time.monotonic() - started
        ended = f"exit status {status}, " if status else ""
        console().print(f"({ended}{seconds:.0f} s)", style="dim")
        print()
        if status == FrameworkError.exit_status:
            return status
    return 0


def newest_run() -> Path | None:
    """Return the folder of the run that was trained last; None if there is none."""
    configs = Path("runs").glob("*/*/config.yaml")
    newest = max(configs, key=lambda file: file.stat().st_mtime, default=None)
    return None if newest is None else newest.parent


def run_command(command: str) -> int:
    """Run a command of the framework on the same terminal; return its exit status."""
    words = shlex.split(command)[1:]
    with subprocess.Popen([sys.executable, "-P", "-m", "framework", *words]) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # the command has received it too, and ends
                continue


class Guide:
    """Leads through the lessons on a terminal.

    Args:
        lessons: in their order.
        run: runs a command and returns its exit status.
    """

    def __init__(self, lessons: Sequence[Lesson], run: Callable[[str], int]):
        self.lessons = lessons
        self.run_command = run

    def run(self, position: int, overrides: Sequence[str]) -> None:
        """Show lessons from a position on, until the user quits or the last one is done."""
        while position < len(self.lessons):
            lesson = self.lessons[position]
            print_lesson(lesson, len(self.lessons))
            if read_line("[Enter] run the commands") is None:
                return
            try:
                run_all(lesson, overrides, self.run_command)
            except RunError as error:  # the training was interrupted before it began
                note(str(error))
            print_markdown(lesson.notes)
            if read_line("[Enter] the answer") is None:
                return
            print_markdown(f"**Answer.** {lesson.answer}\n")
            moved = self.ask()
            if moved is None:
                return
            step, overrides = moved
            position = max(0, position + step)

    def ask(self) -> tuple[int, Sequence[str]] | None:
        """Ask where to go: steps to the next lesson to show, and settings; None to quit."""
        while True:
            line = read_line(KEYS)
            if line is None:
                return None
            try:
                words = shlex.split(line)
            except ValueError as error:
                console().print(f"{line}: {error}")
                continue
            action, *settings = words or ["n"]
            if action == "r" and all("=" in word for word in settings):
                return 0, settings
            if not settings and action in ("n", "b"):
                return (1, []) if action == "n" else (-1, [])
            console().print(f"expected one of: {KEYS}")


def read_line(prompt: str) -> str | None:
    """Read a line from the terminal; None for q, the end of the input, or Ctrl-C."""
    console().print(prompt, style="dim")
    try:
        line = input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    return None if line in ("q", "quit", "exit") else line
