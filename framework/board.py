"""TensorBoard on the folder of runs, on 127.0.0.1."""

import signal
import threading
from pathlib import Path

from .errors import FrameworkError, RunError


def serve(root: Path, port: int) -> int:
    """Start TensorBoard, print its address, and wait for SIGINT or SIGTERM; returns the exit status 0.

    Raises RunError when the folder is missing, FrameworkError when the port is taken.
    """
    if not root.is_dir():
        raise RunError(f"there is no folder of runs {root}: train something first, or name it with --root")
    from tensorboard import program

    server = program.TensorBoard()
    server.configure(argv=["", "--logdir", str(root), "--host", "127.0.0.1", "--port", str(port)])
    try:
        address = server.launch()
    except program.TensorBoardServerException as error:
        raise FrameworkError(f"TensorBoard cannot start: {str(error).splitlines()[0]} (--port chooses another)") from error
    print(f"TensorBoard shows {root} at {address} (Ctrl-C ends it)", flush=True)
    done = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: done.set())
    done.wait()
    return 0
