"""TensorBoard on the folder of runs, on 127.0.0.1."""

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
from framework.system.signals import ending_signals

MOST_TICKED = 40  # runs; of more, TensorBoard's charts are empty at first


def serve_board(root: Path, port: int) -> int:
    """Start TensorBoard, print its address, and wait for SIGINT, SIGTERM or SIGHUP; returns the exit status 0.

    Event files that are links, FIFOs or devices, and folders behind links that lead out of `root`, are not shown. If
    there are any at the start, TensorBoard's slower loader is used, which is told to skip them, also those that appear
    later; the fast one follows links.

    Raises RunError when the folder is missing, FrameworkError when the port is taken.
    """
    if not root.is_dir():
        raise RunError(
            f"there is no folder of runs {root}: train something first, or name it with --root"
        )
    check_port(port)
    runs, odd = look_through(root)
    from tensorboard import program

    server = program.TensorBoard()
    options = ["--logdir", str(root), "--host", "127.0.0.1", "--port", str(port)]
    if odd:
        said = f"{odd[0]} leads out of {root}, or is not a regular file"
        note(f"not shown: {said}; {len(odd)} such entries in all")
        options.append("--load_fast=false")
        use_plain_files()
    server.configure(argv=["", *options])
    try:
        address = server.launch()
    except program.TensorBoardServerException as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FrameworkError(f"TensorBoard cannot start: {why} (--port chooses another)") from error
    done = threading.Event()
    for (
        number
    ) in ending_signals():  # before the address is printed: who reads it may end the server at once
        signal.signal(number, lambda *_: done.set())
    print_line(f"TensorBoard shows {root} at {address} (Ctrl-C ends it)", flush=True)
    if runs > MOST_TICKED:
        why = f"of more than {MOST_TICKED} TensorBoard shows none by itself"
        print_line(f"tick some of the {runs} runs to see curves: {why}", flush=True)
    done.wait()
    return 0


def look_through(root: Path) -> tuple[int, list[Path]]:
    """Return how many runs a folder has, and the entries that TensorBoard must not follow or read."""
    runs = 0
    odd: list[Path] = []
    inside = real_path(root)
    for folder, below, files in os.walk(root):
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
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1


def use_plain_files() -> None:
    """Let TensorBoard's own loader follow no links, and read regular files only."""
    from tensorboard.backend.event_processing import io_wrapper

    def is_event_file(path: str) -> bool:
        return "tfevents" in os.path.basename(path) and is_plain_file(path)

    def walk(top: str) -> Iterator[tuple[str, list[str]]]:
        for folder, _, names in os.walk(top):
            yield folder, [os.path.join(folder, name) for name in names]

    io_wrapper.IsTensorFlowEventsFile = is_event_file
    io_wrapper.ListRecursivelyViaWalking = walk


def check_port(port: int) -> None:
    """Raise FrameworkError when the port is taken or none: before TensorBoard, which takes seconds to say so."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
    except OverflowError:
        raise FrameworkError(f"--port should be 0 to 65535, not {port}") from None
    except OSError as error:
        raise FrameworkError(
            f"--port {port}: {error.strerror}; another one, or 0 for any free one?"
        ) from error
