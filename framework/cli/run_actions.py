"""The actions of `framework runs`: label runs and sweeps, move them to the bin and back."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from framework.errors import FrameworkError, SettingError
from framework.errors.paths import expanded
from framework.errors.terminal import note, print_line
from framework.runs.folder import DEFAULT_ROOT
from framework.runs.run_bin import (
    BIN,
    empty_bin,
    find_run_folder,
    remove_runs,
    removed_runs,
    restore_run,
)
from framework.runs.run_files import MOST_NOTE, MOST_TAGS, TAG, Labels, RunFiles

from . import help_texts
from .json_output import print_json
from .parsers import JSON, Parser, ask

ROOT_OPTION: dict[str, Any] = {
    "type": expanded,
    "default": DEFAULT_ROOT,
    "metavar": "DIR",
    "help": "folder of runs (default: runs)",
}


def tag(arguments: list[str]) -> int:
    """Run `framework runs tag`."""
    parser = Parser("runs tag", "Add tags to a run or sweep.", help_texts.RUNS_TAG)
    parser.add_argument("run", metavar="RUN", help="folder of a run or sweep")
    parser.add_argument("tags", nargs="+", metavar="TAG", help="a word")
    parser.add_argument("--remove", action="store_true", help="remove the tags instead")
    parser.add_argument("--root", **ROOT_OPTION)
    parser.add_argument("--json", **JSON)
    args = parser.parse_intermixed_args(arguments)
    files = RunFiles(find_run_folder(args.root, args.run))
    tags = list(files.labels.tags)
    for word in args.tags:
        if args.remove and word not in tags:
            raise SettingError(
                f"{files.path} has no tag {word!r}; it has {', '.join(tags) or 'none'}"
            )
        if args.remove:
            tags.remove(word)
            continue
        if TAG.fullmatch(word) is None:
            expected = "a word of at most 64 letters, digits and . : / + -"
            raise SettingError(f"tag {word!r}: expected {expected}")
        if word not in tags:
            tags.append(word)
    if len(tags) > MOST_TAGS:
        raise SettingError(f"{files.path}: expected at most {MOST_TAGS} tags")
    write_labels(files, Labels(tags, files.labels.note))
    print_line(f"{files.path}: {', '.join(tags) or 'no tags'}")
    print_labels(args.json, files.path, tags, files.labels.note)
    return 0


def print_labels(as_json: bool, run: Path, tags: Sequence[str], text: str) -> None:
    """Print the tags and the note of a run as JSON, if that is wanted."""
    if as_json:
        print_json({"path": str(run), "tags": list(tags), "note": text or None})


def add_note(arguments: list[str]) -> int:
    """Run `framework runs note`."""
    parser = Parser("runs note", "Write a note on a run or sweep.", help_texts.RUNS_NOTE)
    parser.add_argument("run", metavar="RUN", help="folder of a run or sweep")
    parser.add_argument("text", metavar="TEXT", help="the note; '' removes it")
    parser.add_argument("--root", **ROOT_OPTION)
    parser.add_argument("--json", **JSON)
    args = parser.parse_args(arguments)
    if len(args.text) > MOST_NOTE:
        raise SettingError(f"note: expected at most {MOST_NOTE:,} characters")
    files = RunFiles(find_run_folder(args.root, args.run))
    write_labels(files, Labels(files.labels.tags, args.text))
    print_line(f"{files.path}: {args.text or 'no note'}")
    print_labels(args.json, files.path, files.labels.tags, args.text)
    return 0


def write_labels(files: RunFiles, labels: Labels) -> None:
    """Write tags and note; those of a damaged file are not replaced silently."""
    for problem in files.problems:
        note(f"{files.path}: {problem}")
    files.write_labels(labels)


def remove(arguments: list[str]) -> int:
    """Run `framework runs remove`."""
    parser = Parser("runs remove", "Move runs and sweeps to the bin.", help_texts.RUNS_REMOVE)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run or sweep")
    parser.add_argument("--root", **ROOT_OPTION)
    parser.add_argument("--json", **JSON)
    args = parser.parse_intermixed_args(arguments)
    paths = [find_run_folder(args.root, name) for name in dict.fromkeys(args.runs)]
    moved = []
    for path, target in zip(paths, remove_runs(args.root, paths), strict=True):
        print_line(f"{path} is now {target}")
        moved.append({"path": str(path), "bin": str(target)})
    if args.json:
        print_json({"removed": moved})
    return 0


def restore(arguments: list[str]) -> int:
    """Run `framework runs restore`."""
    parser = Parser("runs restore", "Move runs back from the bin.", help_texts.RUNS_REMOVE)
    name = "name before it was removed, such as default/first"
    parser.add_argument("runs", nargs="+", metavar="NAME", help=name)
    parser.add_argument("--root", **ROOT_OPTION)
    parser.add_argument("--json", **JSON)
    args = parser.parse_intermixed_args(arguments)
    restored = []
    for text in args.runs:
        restored.append(str(restore_run(args.root, relative_name(args.root, text))))
        print_line(f"{restored[-1]} is restored")
    if args.json:
        print_json({"restored": restored})
    return 0


def relative_name(root: Path, name: str) -> str:
    """Return the name of a run below its folder of runs, from its path or its name."""
    path = expanded(name)
    return str(path.relative_to(root)) if path.is_relative_to(root) else name


def empty(arguments: list[str]) -> int:
    """Run `framework runs empty`."""
    parser = Parser("runs empty", "Delete the removed runs.", help_texts.RUNS_REMOVE)
    parser.add_argument("--root", **ROOT_OPTION)
    parser.add_argument("--json", **JSON)
    parser.add_argument("--yes", action="store_true", help="do not ask")
    args = parser.parse_args(arguments)
    count = len(removed_runs(args.root))
    if count == 0:
        note(f"the bin of {args.root} is empty")
        if args.json:
            print_json({"deleted": 0})
        return 0
    if not args.yes:
        if args.json or not sys.stdin.isatty():
            raise FrameworkError(
                "runs empty: cannot ask without a terminal; --yes deletes the runs"
            )
        if not ask(f"Delete {count} removed runs in {args.root / BIN}? [y/N] "):
            print("not deleted")
            return 1
    deleted = empty_bin(args.root)
    print_line(f"{deleted} runs deleted")
    if args.json:
        print_json({"deleted": deleted})
    return 0


ACTIONS: dict[str, Callable[[list[str]], int]] = {
    "tag": tag,
    "note": add_note,
    "remove": remove,
    "restore": restore,
    "empty": empty,
}
