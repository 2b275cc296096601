"""TensorBoard on a folder of runs, for this machine only."""

import os
import signal
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

from framework.errors import FrameworkError, RunError
from framework.errors.paths import real_path
from framework.errors.terminal import note, print_line
from framework.runs.run_bin import BIN
from framework.system.signals import ending_signals

MOST_SELECTED = 40  # TensorBoard selects no run at first if there are more


def serve_board(root: Path, port: int) -> int:
    """Start TensorBoard, print its address, and wait for SIGINT, SIGTERM or SIGHUP.

    Event files that are links, FIFOs or devices are not shown, and neither are folders behind links
    out of `root`, nor removed runs. If there are any at the start, TensorBoard's slower loader is
    used and skips them, also those that appear later. The fast loader follows links.

    Returns:
        The exit status 0.

    Raises:
        RunError: if the folder does not exist.
        FrameworkError: if the port cannot be used.
    """
    if not root.is_dir():
        advice = "train an experiment first, or give another --root"
        raise RunError(f"--root {root}: no such folder; {advice}")
    check_port(port)
    runs, odd = look_through(root)
    from tensorboard import program

    server = program.TensorBoard()
    options = ["--logdir", str(root), "--host", "127.0.0.1", "--port", str(port)]
    if odd:
        reason = f"{odd[0]} is outside of {root} or not a regular file"
        note(f"{len(odd)} entries are not shown: {reason}")
    if odd or (root / BIN).is_dir():
        options.append("--load_fast=false")
        use_plain_files()
    server.configure(argv=["", *options])
    try:
        address = server.launch()
    except program.TensorBoardServerException as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FrameworkError(f"TensorBoard cannot start: {reason} (see --port)") from error
    done = threading.Event()
    # before the address is printed: a program that reads it may end the server at once
    for number in ending_signals():
        signal.signal(number, lambda *_: done.set())
    print_line(f"TensorBoard shows {root} at {address} (Ctrl-C ends it)", flush=True)
    if runs > MOST_SELECTED:
        reason = f"TensorBoard selects none if there are more than {MOST_SELECTED}"
        print_line(f"select some of the {runs} runs to see curves: {reason}", flush=True)
    done.wait()
    return 0


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


def use_plain_files() -> None:
    """Make TensorBoard's slower loader follow no links and read only regular files."""
    from tensorboard.backend.event_processing import io_wrapper

    def is_event_file(path: str) -> bool:
        removed = BIN in Path(path).parts
        return "tfevents" in os.path.basename(path) and is_plain_file(path) and not removed

    def walk(top: str) -> Iterator[tuple[str, list[str]]]:
        for folder, below, names in os.walk(top):
            if BIN in below:
                below.remove(BIN)
            yield folder, [os.path.join(folder, name) for name in names]

    io_wrapper.IsTensorFlowEventsFile = is_event_file
    io_wrapper.ListRecursivelyViaWalking = walk


def check_port(port: int) -> None:
    """Raise FrameworkError if the port cannot be used; TensorBoard needs seconds to find out."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
    except OverflowError:
        raise FrameworkError(f"--port {port}: expected an integer from 0 to 65535") from None
    except OSError as error:
        advice = "choose another port, or 0 for a free one"
        raise FrameworkError(f"--port {port}: {error.strerror}; {advice}") from error
