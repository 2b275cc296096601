"""TensorBoard on a folder of runs, for this machine only."""

import os
import re
import signal
import socket
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any

from framework.errors import Facts, FrameworkError, RunError, wrong_option
from framework.errors.paths import real_path
from framework.errors.terminal import note, print_line
from framework.runs.overview.run_index import list_runs
from framework.runs.overview.run_table import RunTable
from framework.runs.run_bin import BIN
from framework.system.signals import ending_signals

from .best import best_runs
from .runs import filtered

MOST_SELECTED = 40  # TensorBoard selects no run at first if there are more
BEST = 10  # runs that --runs best shows
SECONDS = 5.0  # between two looks for runs that --runs selects
GLOB = re.compile(r"[*?\[]")


def serve_board(root: Path, port: int, selections: Sequence[str] = ()) -> int:
    """Start TensorBoard, print its address, and wait for SIGINT, SIGTERM or SIGHUP.

    Event files that are links, FIFOs or devices are not shown, and neither are folders behind links
    out of `root`, nor removed runs. If there are any at the start, TensorBoard's slower loader is
    used and skips them, also those that appear later. The fast loader follows links.

    Args:
        root: the folder of runs.
        port: of 127.0.0.1; 0 for a free one.
        selections: which runs to show (see `selected_runs`); none for all of them. Runs that begin
            later are added.

    Returns:
        The exit status 0.

    Raises:
        RunError: if the folder does not exist, or no run is selected.
        SettingError: a selection is wrong.
        FrameworkError: if the port cannot be used.
    """
    if not root.is_dir():
        advice = "train an experiment first, or give another --root"
        raise RunError(f"--root {root}: no such folder; {advice}")
    check_port(port)
    runs, odd = look_through(root)
    chosen = selected_runs(root, selections) if selections else []
    from tensorboard import program

    server = program.TensorBoard(plugins=pages())
    # its `put` may interrupt its `get`; `set` of an Event that interrupts its `wait` may deadlock
    ending: SimpleQueue[int] = SimpleQueue()
    with ExitStack() as opened:
        shown = root
        if selections:
            runs = len(chosen)
            shown = Path(opened.enter_context(TemporaryDirectory(prefix="framework-board-")))
            link_runs(root, shown, chosen)
        options = ["--logdir", str(shown), "--host", "127.0.0.1", "--port", str(port)]
        if odd:
            reason = f"{odd[0]} is outside of {root} or not a regular file"
            note(f"files not shown: {len(odd)}; {reason}")
        if odd or (root / BIN).is_dir():
            options.append("--load_fast=false")
            use_plain_files(shown if selections else None)
        server.configure(argv=["", *options])
        try:
            address = server.launch()
        except program.TensorBoardServerException as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise FrameworkError(f"TensorBoard cannot start: {reason} (see --port)") from error
        # before the address is printed: a program that reads it may end the server at once
        for number in ending_signals():
            signal.signal(number, lambda number, _: ending.put(number))
        count = f"{runs} of the runs in " if selections else ""
        print_line(f"TensorBoard shows {count}{root} at {address} (Ctrl-C ends it)", flush=True)
        if runs > MOST_SELECTED:
            reason = f"TensorBoard selects none if there are more than {MOST_SELECTED}"
            advice = "or start with --runs best, --runs 'lr=*' or --runs 'SWEEP/*'"
            text = f"select some of the {runs} runs to see curves: {reason}; {advice}"
            print_line(text, flush=True)
        while True:
            with suppress(Empty):
                ending.get(timeout=SECONDS if selections else None)
                return 0
            with suppress(FrameworkError, OSError):  # such as a run that is being removed
                link_runs(root, shown, selected_runs(root, selections))


def selected_runs(root: Path, selections: Sequence[str]) -> list[str]:
    """Return the names of runs, relative to `root`, that match one of the selections.

    A selection is one of:

    - "best": of the runs that the others select, or of all runs, the BEST best ones by the metric
      that they rank checkpoints by.
    - a name or pattern, such as "default/first", "default/sweep3" (all runs in it), "sweep3/*"
      or "lr=*". A pattern is compared with the path, with its last parts, and with the settings
      in the name of a trial: "lr=0.1*" selects 003_lr-0.1_seed-2.
    - a filter of `framework runs --where`, if no name matches.

    Raises:
        RunError: no run matches a selection.
        SettingError: a filter is wrong.
    """
    table = RunTable(list_runs(root))
    if not table.runs:
        raise RunError(f"--runs {selections[0]}: {root} has no runs")
    found: dict[str, None] = {}
    for text in selections:
        if text == "best":
            continue
        names = [run.name for run in table.runs if is_named(run.name, text)]
        if not names and any(operator in text for operator in "=<>~"):
            names = [run.name for run in filtered(table, text, "--runs")]
        if not names:
            message = f"--runs {text}: none of the {len(table.runs):,} runs in {root} matches"
            raise RunError(message).with_facts(Facts("--runs", text))
        found |= dict.fromkeys(names)
    if "best" not in selections:
        return list(found)
    among = [run for run in table.runs if not found or run.name in found]
    return [run.name for run in best_runs(table, among, "--runs")[:BEST]]


def is_named(name: str, pattern: str) -> bool:
    """Return whether a pattern matches a run or a folder that it is in (see `selected_runs`)."""
    parts = name.split("/")
    if not GLOB.search(pattern):
        return f"/{pattern.strip('/')}/" in f"/{name}/"
    tails = ["/".join(parts[start:]) for start in range(len(parts))]
    settings = [field.replace("-", "=", 1) for field in parts[-1].split("_")]
    return any(fnmatchcase(text, pattern) for text in [*tails, *settings])


def link_runs(root: Path, folder: Path, names: Iterable[str]) -> None:
    """Make a folder consist of links to runs, under their names."""
    missing = dict.fromkeys(names)
    for parent, below, _ in os.walk(folder):
        for entry in below:
            link = Path(parent, entry)
            if not link.is_symlink():
                continue
            name = link.relative_to(folder).as_posix()
            if name in missing:
                del missing[name]
            else:
                link.unlink()
    for name in missing:
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(real_path(root / name), target_is_directory=True)


def pages() -> list[Any] | None:
    """Return the plugins of TensorBoard, with another order of metrics on the page HParams.

    None, which stands for its own plugins, with a version that has other modules.
    """
    try:
        from .hparams_page import plugins  # not at the top: it imports TensorBoard
    except ImportError:
        return None
    return plugins()


def look_through(root: Path) -> tuple[int, list[Path]]:
    """Return the number of runs in a folder, and the entries that TensorBoard must not read."""
    runs = 0
    odd: list[Path] = []
    inside = real_path(root)
    for folder, below, files in os.walk(root):
        if BIN in below:
            below.remove(BIN)
        for name in [*below, *files]:
            path = Path(folder, name)
            if path.is_symlink():
                if not real_path(path).is_relative_to(inside):
                    odd.append(path)
            elif "tfevents" in name and name in files and not is_plain_file(path):
                odd.append(path)
        runs += any("tfevents" in name for name in files)
    return runs, odd


def is_plain_file(path: str | Path) -> bool:
    """Return whether a path is a regular file without further hard links."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def use_plain_files(links: Path | None = None) -> None:
    """Make TensorBoard's slower loader follow no links and read only regular files.

    Args:
        links: a folder of links to runs, which are followed (see `link_runs`).
    """
    from tensorboard.backend.event_processing import io_wrapper

    def is_event_file(path: str) -> bool:
        removed = BIN in Path(path).parts
        return "tfevents" in os.path.basename(path) and is_plain_file(path) and not removed

    def walk(top: str) -> Iterator[tuple[str, list[str]]]:
        for folder, below, names in os.walk(top):
            if BIN in below:
                below.remove(BIN)
            yield folder, [os.path.join(folder, name) for name in names]
            for name in below:
                path = Path(folder, name)
                if links is not None and path.is_symlink() and Path(top) == links:
                    yield from walk(str(path))

    io_wrapper.IsTensorFlowEventsFile = is_event_file
    io_wrapper.ListRecursivelyViaWalking = walk


def check_port(port: int) -> None:
    """Raise FrameworkError if the port cannot be used; TensorBoard needs seconds to find out."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
    except OverflowError:
        raise wrong_option("--port", port, "an integer from 0 to 65535") from None
    except OSError as error:
        advice = "choose another port, or 0 for a free one"
        message = f"--port {port}: {error.strerror}; {advice}"
        raise FrameworkError(message).with_facts(Facts("--port", port)) from error
