"""TensorBoard on the folder of runs, on 127.0.0.1."""

import signal
import socket
import threading
from pathlib import Path

from .errors import FrameworkError, RunError
from .signals import ending_signals
from .terminal import print_line

MOST_TICKED = 40  # runs; of more, TensorBoard's charts are empty at first


def serve(root: Path, port: int) -> int:
    """Start TensorBoard, print its address, and wait for SIGINT, SIGTERM or SIGHUP; returns the exit status 0.

    Raises RunError when the folder is missing, FrameworkError when the port is taken.
    """
    if not root.is_dir():
        raise RunError(f"there is no folder of runs {root}: train something first, or name it with --root")
    check_port(port)
    from tensorboard import program

    server = program.TensorBoard()
    server.configure(argv=["", "--logdir", str(root), "--host", "127.0.0.1", "--port", str(port)])
    try:
        address = server.launch()
    except program.TensorBoardServerException as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FrameworkError(f"TensorBoard cannot start: {why} (--port chooses another)") from error
    print_line(f"TensorBoard shows {root} at {address} (Ctrl-C ends it)", flush=True)
    runs = len({file.parent for file in root.rglob("*tfevents*")})
    if runs > MOST_TICKED:
        why = f"of more than {MOST_TICKED} TensorBoard shows none by itself"
        print_line(f"tick some of the {runs} runs to see curves: {why}", flush=True)
    done = threading.Event()
    for number in ending_signals():
        signal.signal(number, lambda *_: done.set())
    done.wait()
    return 0


def check_port(port: int) -> None:
    """Raise FrameworkError when the port is taken or none: before TensorBoard, which takes seconds to say so."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
    except OverflowError:
        raise FrameworkError(f"--port should be 0 to 65535, not {port}") from None
    except OSError as error:
        raise FrameworkError(f"--port {port}: {error.strerror}; another one, or 0 for any free one?") from error
