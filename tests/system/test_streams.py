"""Characters that a terminal cannot encode and closed streams end no command; files are UTF-8."""

import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

from framework.system import streams
from framework.system.git import commit_and_diff

FRAMEWORK = str(Path(sys.executable).with_name("framework"))
PLUGIN = '''\
import torch
from framework import activations, callbacks, Callback

@activations.register("unicode")
class Unicode(torch.nn.ReLU):
    """x² ± α → 大."""
    def __init__(self, mode: str = "α→β"):
        super().__init__()

@callbacks.register("prints")
class Prints(Callback):
    def on_fit_end(self, trainer):
        print("α→β")
'''
# Runs commands in one process and prints their exit status. Opening a file in the encoding of the
# locale is an error.
SEVERAL = """
import shlex, sys, warnings
warnings.filterwarnings("error", category=EncodingWarning, module="framework")
from framework.cli.main import main
for line in sys.argv[1:]:
    try:
        main(shlex.split(line))
    except SystemExit as end:
        print(f"status {end.code}: {line}", file=sys.stderr, flush=True)
"""
TINY = "model.depth=1 model.width=4 loader.limit=1 trainer.max_steps=1"


def test_every_command_works_in_an_ascii_terminal(tmp_path):
    (tmp_path / "unicode.py").write_text(PLUGIN, encoding="utf-8")
    classes = np.array(["größe", "大"])[np.arange(40) % 2]
    np.savez(tmp_path / "x.npz", x=np.random.rand(40, 3).astype("float32"), y=classes)
    common = f"{TINY} data=npz data.path=x.npz --plugins unicode.py"
    lines = {
        f"train {common} model.activation=unicode +callbacks=prints run.name=first": 0,
        f"train -m {common} seed=0,1 callbacks=[prints]": 0,
        "eval runs/default/first --plugins unicode.py": 0,
        "predict runs/default/first --plugins unicode.py --input x.npz --output -": 0,
        "predict runs/default/first --plugins unicode.py --input x.npz --output y.csv": 0,
        f"plan {common}": 0,
        "show unicode --plugins unicode.py": 0,
        "eval runs/größe/大": 2,
    }
    environment = os.environ | {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "OMP_NUM_THREADS": "1",
    }
    environment |= {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-X", "warn_default_encoding", "-c", SEVERAL, *lines]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    errors = done.stderr.decode("ascii")
    output = done.stdout.decode("ascii")
    ended = [line for line in errors.splitlines() if line.startswith("status ")]
    assert [line.partition(":")[0] for line in ended] == [
        f"status {status}" for status in lines.values()
    ], errors
    assert "a fault at" not in errors
    assert r"gr\xf6\xdfe" in output, "predictions on stdout are complete"
    assert "größe" in (tmp_path / "y.csv").read_text(encoding="utf-8")


def test_commands_work_with_closed_streams(tmp_path):
    for redirected in (">&-", "2>&-", ">&- 2>&- <&-"):
        done = subprocess.run(
            f"{shlex.quote(FRAMEWORK)} show gelu {redirected}",
            shell=True,
            cwd=tmp_path,
            capture_output=True,
        )
        assert (done.returncode, done.stderr) == (0, b"")
    done = subprocess.run(
        f"{shlex.quote(FRAMEWORK)} tour --lesson 1 optimizer.lr=x <&-",
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "optimizer.lr=x: expected float" in done.stderr
    assert done.stdout.count("$ framework train") == 1, "the first error ends the lesson"
    script = "import sys; from framework.system.streams import prepare_streams; prepare_streams()"
    script += "; f = open('x'); print(1); sys.exit(f.fileno())"
    (tmp_path / "x").touch()
    done = subprocess.run(
        f'{shlex.quote(sys.executable)} -c "{script}" >&- 2>&- <&-', shell=True, cwd=tmp_path
    )
    assert done.returncode == 3, (
        "a file opened later does not get the descriptor of a closed stream"
    )


def test_a_reader_that_ends_early_is_no_error(tmp_path):
    done = subprocess.run(
        f"{shlex.quote(FRAMEWORK)} list --json | head -1",
        shell=True,
        cwd=tmp_path,
        capture_output=True,
    )
    assert (done.stdout, done.stderr) == (b"{\n", b"")


def test_only_characters_that_cannot_be_encoded_are_replaced(monkeypatch):
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stream)
    streams.prepare_streams()
    print("größe ± 大", flush=True)
    assert written.getvalue().decode("latin-1") == "größe ± ?\n"
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    streams.prepare_streams()


def test_a_diff_of_another_encoding_is_kept(tmp_path):
    def run(*words):
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)

    run("init")
    (tmp_path / "notes.txt").write_bytes("größe\n".encode("latin-1"))
    run("add", "notes.txt")
    run("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "notes")
    (tmp_path / "notes.txt").write_bytes("größer\n".encode("latin-1"))
    _, diff = commit_and_diff(tmp_path)
    assert "+gr\ufffd\ufffder" in diff
