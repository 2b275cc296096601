"""Full disks, deleted folders and torn files: a one-line error, a status, and an exact resume.

A limit to the size of files (`ulimit -f`) simulates a full disk: the system refuses larger files.
"""

import errno
import itertools
import json
import os
import random
import re
import resource
import shlex
import shutil
import tempfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import framework as fw
import framework.runs.folder
from fits import OPTIMIZERS, SPLIT, At, network
from framework import Callback, Trainer
from framework.cli.main import main
from framework.errors import CheckpointError, RunError
from framework.experiment.result import last_values
from framework.experiment.trained.prediction_columns import Form
from framework.experiment.trained.prediction_files import write_predictions
from framework.runs.checkpoint import writing
from framework.runs.run_state import status_of
from framework.runs.status_file import Status
from framework.runs.sweep_files import Trial
from framework.runtime.clock import write_trace
from framework.system.files import AppendFile
from framework.tuning.search.study import Journal, cached_storage
from framework.tuning.sweep.display import LineDisplay, OutputCapture
from framework.tuning.sweep.folder import SweepFolder
from framework_plugins.loggers.text import is_kept, keep_lines
from runs import logged

FULL = r"cannot be written: .* \([\d,]+ bytes are needed, [\d,]+ bytes are free\)$"
ROWS = b"".join(
    json.dumps({"step": step, "val/loss": 1 / step}).encode() + b"\n" for step in range(1, 6)
)


@contextmanager
def largest_file(size):
    """Limit the size of files to `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Record:
    """Each method returns a function that appends one record."""

    def metrics(self, folder):
        logger = fw.loggers.build("json_lines")
        logger.open(folder, 0, [])
        return lambda: logger.scalars({"train/loss": 0.5}, step=1, epoch=0, wall_seconds=1.0)

    def events(self, folder):
        logger = fw.loggers.build("tensorboard")
        logger.open(folder, 0, [])
        return lambda: logger.scalars({"train/loss": 0.5}, step=1, epoch=0, wall_seconds=1.0)

    def sweep(self, folder):
        return lambda: SweepFolder(folder).record(Trial(1, {"seed": 1}))

    def journal(self, folder):
        journal = Journal(folder / "study.journal")
        return lambda: journal.append_logs([{"op_code": 4, "worker_id": "1", "study_id": 0}])

    def output(self, folder):
        return lambda: OutputCapture(folder, LineDisplay({})).write("a line\n")


RECORDS = ["metrics", "events", "sweep", "journal", "output"]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_on_a_full_disk_is_an_error_and_leaves_no_part_of_it(tmp_path, name):
    append = getattr(Record(), name)(tmp_path)
    append()
    before = contents(tmp_path)
    (size,) = [len(content) for content in before.values() if content]
    with largest_file(size + 3), pytest.raises(RunError, match=FULL) as raised:
        append()
    assert str(tmp_path) in str(raised.value)
    assert contents(tmp_path) == before
    append()  # the disk is no longer full
    (after,) = [content for content in contents(tmp_path).values() if content]
    assert after.startswith(next(filter(None, before.values())))
    assert len(after) > size


def test_a_partial_write_is_truncated(tmp_path):
    """Control: the system writes a part of a record before it refuses the rest."""
    with largest_file(5), (tmp_path / "a").open("wb", buffering=0) as file:
        assert file.write(b"0123456789") == 5
    file = AppendFile(tmp_path, "b")
    with largest_file(5), pytest.raises(RunError, match=FULL):
        file.append(b"0123456789")
    assert (tmp_path / "b").read_bytes() == b""


@pytest.mark.parametrize("name", RECORDS)
def test_a_deleted_folder_is_named_and_not_created_again(tmp_path, name):
    folder = tmp_path / "run"
    folder.mkdir()
    append = getattr(Record(), name)(folder)
    append()
    shutil.rmtree(folder)
    if name == "output":  # waits until the run has a folder
        append()
    else:
        with pytest.raises(RunError, match=f"{folder} no longer exists"):
            append()
    assert not folder.exists()


# runs


def fit(folder, *callbacks, resume=None, **settings):
    torch.manual_seed(1)
    model = network()
    parts = {"callbacks": [*callbacks, Status()], "loggers": [fw.loggers.build("json_lines")]}
    trainer = Trainer(
        max_epochs=2, log_every="1steps", folder=folder, device="cpu", **parts, **settings
    )
    trainer.callbacks[-1].seconds = 0
    trainer.manifest = {"run": str(folder)}
    optimizer = OPTIMIZERS["sgd"](model)
    if resume is not None:
        trainer.state.step = resume["counters"]["step"]  # the loggers continue from this step
    with trainer:
        trainer.fit(
            model,
            SPLIT,
            task=nn.CrossEntropyLoss(),
            optimizer=optimizer,
            batch_size=16,
            resume=resume,
        )
    return trainer


def saving():
    return fw.callbacks.build("checkpoint", monitor=None, every="1steps", background=False)


def status(folder):
    return json.loads((folder / "status.json").read_text())


class Limit(Callback):
    """Limits the size of files from a step on, until the run has failed."""

    changes_training = False

    def __init__(self, step, size):
        self.step = step
        self.size = size

    def on_step_start(self, trainer):
        if trainer.state.step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, -1))


def test_a_run_on_a_full_disk_fails_with_the_reason_and_resumes_exactly(tmp_path):
    uninterrupted = fit(tmp_path, saving())
    folder = tmp_path / "full"
    folder.mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises((RunError, CheckpointError), match="File too large") as raised:
            fit(folder, saving(), Limit(4, 3_500))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    state = status(folder)
    assert state["status"] == "failed"
    assert state["reason"].endswith(str(raised.value)[-40:])
    assert not list(folder.glob("**/.*"))
    found = fw.checkpoints.newest(folder / "checkpoints")[0]
    weights, training = fw.checkpoints.load(found)
    resumed = fit(folder, saving(), resume=training | {"model": weights})
    expected = uninterrupted.model.parameters()
    for one, other in zip(expected, resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert logged(folder) == logged(tmp_path)


@pytest.mark.parametrize("how", ["deleted", "renamed"])
def test_a_run_with_a_deleted_or_renamed_folder_ends_and_creates_no_other(tmp_path, how):
    folder = tmp_path / "run"
    folder.mkdir()

    def act(trainer):
        if how == "deleted":
            shutil.rmtree(folder)
        else:
            folder.rename(tmp_path / "moved")

    with pytest.raises((RunError, CheckpointError), match=f"{folder} no longer exists"):
        fit(folder, saving(), At(4, act))
    assert not folder.exists()


def test_a_failure_is_written_into_the_existing_status_file(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    fit(folder)
    old = (folder / "status.json").stat()
    trainer = Trainer(max_steps=1, folder=folder, device="cpu")
    trainer.state.step = 7
    monkeypatch.setattr(os, "rename", refuse)  # no second file fits on the disk
    raise_in(trainer, RunError("no room " + "é" * 2000))
    state = status(folder)
    assert (state["status"], state["step"]) == ("failed", 7)
    assert state["reason"].startswith("RunError: no room")
    assert (folder / "status.json").stat().st_size == old.st_size
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def refuse(*paths, **folders):
    raise OSError(28, "No space left on device")


def raise_in(trainer, error):
    try:
        raise error
    except RunError:
        Status().on_exception(trainer)


# torn files


def damaged(content, chance, count):
    """Yield a file cut at random places, and with random bits flipped."""
    for _ in range(count):
        yield content[: chance.randrange(len(content))]
        flipped = bytearray(content)
        flipped[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        yield bytes(flipped)
    yield from (
        b"",
        b"\0" * 100,
        b"\xff\xfe\n",
        b"[]\n3\nnull\n" + content,
        content + b'{"step": 40, "ep',
    )


def test_torn_metrics_are_skipped(tmp_path):
    for content in damaged(ROWS, random.Random(1), 100):
        (tmp_path / "metrics.jsonl").write_bytes(content)
        last_values(tmp_path)
        keep_lines(tmp_path, "metrics.jsonl", partial(is_kept, step=4))
        kept = [row["step"] for row in logged(tmp_path)]
        assert kept == sorted(kept)
        assert set(kept) <= {1, 2, 3, 4}
    with pytest.raises(ValueError, match="Unterminated string"):
        json.loads(content.splitlines()[-1])  # control: the skipped line is not valid


def test_torn_rows_of_a_sweep_are_skipped(tmp_path):
    sweep = SweepFolder(tmp_path)
    for number in range(4):
        sweep.record(Trial(number, {"seed": number}, f"00{number}", "done", {"val/loss": 0.5}))
    content = (tmp_path / "sweep.jsonl").read_bytes()
    for torn in damaged(content, random.Random(2), 100):
        (tmp_path / "sweep.jsonl").write_bytes(torn)
        assert len(SweepFolder(tmp_path).trials()) <= 5
        SweepFolder(tmp_path).record(Trial(9, {"seed": 9}))
        assert SweepFolder(tmp_path).trials()[-1].number >= 9


def test_torn_logs_of_a_study_are_skipped(tmp_path):
    journal = Journal(tmp_path / "study.journal")
    logs = [{"op_code": 4, "worker_id": "1", "study_id": number} for number in range(4)]
    journal.append_logs(logs)
    content = journal.path.read_bytes()
    for torn in damaged(content, random.Random(3), 100):
        journal.path.write_bytes(torn)
        found = Journal(journal.path)
        assert len(found.read_logs(0)) <= 4
        found.append_logs(logs[:1])
        assert found.read_logs(0)[-1] == logs[0]
    lines = content.splitlines(keepends=True)
    journal.path.write_bytes(lines[0] + lines[1][:9] + b"\n" + lines[2])
    assert Journal(journal.path).read_logs(0) == [logs[0], logs[2]]
    assert Journal(journal.path).read_logs(1) == [logs[2]]


@pytest.mark.parametrize("name", ["status.json", "sweep.json"])
def test_a_torn_state_is_unknown(tmp_path, name):
    content = b'{"status": "done", "command": ["a=1"], "swept": ["a"], "began": 1.0}'
    for torn in [
        *damaged(content, random.Random(4), 100),
        b'{"status": 3, "command": 5}',
        b"[" * 10**5,
    ]:
        (tmp_path / name).write_bytes(torn)
        assert isinstance(status_of(tmp_path), str | None)
        assert isinstance(SweepFolder(tmp_path).request().get("command", []), list)


def test_last_lines_are_removed_without_writing_a_second_file(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_bytes(ROWS + b'{"step": 6, "tr')
    monkeypatch.setattr(os, "rename", refuse)
    keep_lines(tmp_path, "metrics.jsonl", partial(is_kept, step=3))
    assert [row["step"] for row in logged(tmp_path)] == [1, 2, 3]


# the command line


def test_a_finished_run_with_torn_metrics_is_done_already(command):
    train = "train data=blobs trainer.max_epochs=1 run.name=r loggers=[json_lines]"
    assert command(train)[0] == 0
    run = Path("runs/default/r")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\n{"step": 40, "ep')
    status, out, err = command(f"resume {run}")
    assert (status, err) == (0, "")
    assert "is complete" in out


def test_a_run_that_cannot_start_leaves_no_folder(command):
    with largest_file(200):
        status, _, err = command("train data=blobs trainer.max_epochs=1 run.name=r")
    assert status == 2
    assert "File too large" in err
    assert err.count("\n") == 1
    assert not Path("runs/default/r").exists()


def test_only_the_trial_with_a_deleted_folder_fails(command, tmp_path, monkeypatch):
    from framework.training.trainer import Trainer as Trains

    real = Trains.log_training

    def deleting(self):
        if self.seed == 1:
            shutil.rmtree(self.folder, ignore_errors=True)
        real(self)

    monkeypatch.setattr(Trains, "log_training", deleting)
    small = "data=blobs trainer.max_epochs=1 callbacks=[] loggers=[json_lines]"
    status, out, _ = command(f"train -m {small} seed=0,1,2 sweep.name=s hydra/launcher=basic")
    assert status == 2
    assert [trial.state for trial in SweepFolder(Path("runs/default/s")).trials()] == [
        "done",
        "failed",
        "done",
    ]
    assert "no longer exists" in out
    assert not list(Path("runs/default/s").glob("001*"))


def test_a_sweep_with_a_deleted_folder_ends(command, monkeypatch):
    from framework.training.trainer import Trainer as Trains

    def deleting(self):
        shutil.rmtree("runs/default/s", ignore_errors=True)

    monkeypatch.setattr(Trains, "log_training", deleting)
    small = "data=blobs trainer.max_epochs=1 callbacks=[] loggers=[json_lines]"
    status, _, err = command(f"train -m {small} seed=0,1 sweep.name=s")
    assert status == 2
    assert err.splitlines()[-1].endswith("the folder runs/default/s no longer exists")
    assert err.count("\n") == 1
    assert not Path("runs/default/s").exists()


SEARCH = (
    "train -m data=blobs data.samples=200 trainer.max_epochs=1 loggers=[] resume=auto sweep.name=s "
    "hydra/sweeper=optuna hydra.sweeper.trials=3 hydra.sweeper.startup=2 "
    "optimizer.lr=interval(0.001,0.1)"
)
ONE_BY_ONE = "hydra/launcher=one_by_one"
AS_ONE = "hydra/launcher=vectorized hydra.launcher.processes=1"


def outcomes(folder):
    """Return the values in the rows of a sweep that do not depend on time."""
    rows = SweepFolder(folder).trials()
    return [(row.number, row.settings, row.state, row.metrics.get("val/loss")) for row in rows]


@pytest.fixture
def fresh(command):
    """Run a command as in a new process, without a cached journal."""

    def run(line):
        cached_storage.cache_clear()
        return command(line)

    return run


def no_room(monkeypatch, place, number):
    """Simulate a disk that is full after `number` calls of a function.

    Args:
        place: a module and the name of its function.
    """
    module, name = place
    real = getattr(module, name)
    calls = itertools.count()

    def full(*args, **kwargs):
        if next(calls) >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, full)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The outcomes of the search, by launcher."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for launcher in (ONE_BY_ONE, AS_ONE):
            cached_storage.cache_clear()
            patch.chdir(tmp_path_factory.mktemp("search"))
            with pytest.raises(SystemExit) as end:
                main(shlex.split(f"{SEARCH} {launcher}"))
            assert end.value.code == 0
            found[launcher] = outcomes(Path("runs/default/s"))
    return found


FULL_AT = {
    "checkpoint": (ONE_BY_ONE, (writing, "write"), 1),
    "run-folder": (ONE_BY_ONE, (framework.runs.folder, "WriterLock"), 1),
    "checkpoint-as-one": (AS_ONE, (writing, "write"), 1),
    "run-folder-as-one": (AS_ONE, (framework.runs.folder, "WriterLock"), 1),
}


@pytest.mark.parametrize("case", FULL_AT)
def test_a_search_resumes_exactly_after_a_full_disk(fresh, monkeypatch, undisturbed, case):
    launcher, place, number = FULL_AT[case]
    with monkeypatch.context() as patch:
        no_room(patch, place, number)
        status, _, err = fresh(f"{SEARCH} {launcher}")
    assert status == 2
    assert re.fullmatch(r"framework: .*No space left on device.*", err.splitlines()[-1])
    states = {state for *_, state, _ in outcomes(Path("runs/default/s"))}
    assert "stopped" in states
    assert "failed" not in states
    status, out, err = fresh(f"{SEARCH} {launcher}")
    assert (status, err) == (0, ""), out
    found = outcomes(Path("runs/default/s"))
    if launcher == ONE_BY_ONE:
        assert found == undisturbed[launcher]
    else:  # trials that are resumed one by one differ by rounding
        for one, other in zip(found, undisturbed[launcher], strict=True):
            assert one[:3] == other[:3]
            assert one[3] == pytest.approx(other[3], rel=1e-3)


def test_a_trial_that_fails_for_another_reason_counts_as_ended(fresh, monkeypatch, undisturbed):
    """Control: a trial that counts as failed is not trained again."""

    def fail(*given):
        raise RunError("cannot be written")

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write", fail)
        status, _, err = fresh(f"{SEARCH} {ONE_BY_ONE}")
    assert (status, err) == (2, "framework: 3 of 3 trials failed\n")
    assert fresh(f"{SEARCH} {ONE_BY_ONE}")[0] == 2
    assert {state for *_, state, _ in outcomes(Path("runs/default/s"))} == {"failed"}


def test_a_grid_ends_at_a_full_disk(command, monkeypatch):
    grid = "train -m data=blobs trainer.max_epochs=1 loggers=[json_lines] sweep.name=s seed=0,1,2"
    grid += " resume=auto"
    with monkeypatch.context() as patch:
        no_room(patch, (writing, "write"), 1)
        status, _, err = command(f"{grid} {ONE_BY_ONE}")
    assert status == 2
    assert "cannot be saved in runs/default/s/001_seed-1" in err.splitlines()[-1]
    assert [row[2] for row in outcomes(Path("runs/default/s"))] == ["done", "stopped"]
    assert command(f"{grid} {ONE_BY_ONE}")[0] == 0
    assert [row[2] for row in outcomes(Path("runs/default/s"))] == ["done"] * 3


def test_a_search_with_a_deleted_folder_ends(fresh, monkeypatch):
    from framework.training.trainer import Trainer as Trains

    def deleting(self):
        shutil.rmtree("runs/default/s", ignore_errors=True)

    monkeypatch.setattr(Trains, "log_training", deleting)
    status, _, err = fresh(f"{SEARCH} {ONE_BY_ONE}")
    assert status == 2
    assert err.splitlines()[-1].endswith("/runs/default/s no longer exists")
    assert not Path("runs/default/s").exists()


@pytest.mark.parametrize(("where", "step"), [("graph", 0), ("hparams", 33)])
def test_errors_before_and_after_the_training_are_in_the_status(command, monkeypatch, where, step):
    from framework_plugins.loggers.tensorboard import TensorBoard

    def fail(self, *given):
        raise RunError("events cannot be written")

    real = getattr(TensorBoard, where)
    monkeypatch.setattr(TensorBoard, where, fail)
    train = "train data=blobs trainer.max_epochs=1 run.name=r resume=auto loggers=[tensorboard]"
    assert command(train)[0] == 2
    state = status(Path("runs/default/r"))
    assert (state["status"], state["step"], state["reason"]) == (
        "failed",
        step,
        "RunError: events cannot be written",
    )
    monkeypatch.setattr(TensorBoard, where, real)
    assert command(train)[0] == 0
    assert status(Path("runs/default/r"))["status"] == "done"


def test_an_index_on_a_full_disk_is_not_kept(tmp_path):
    from framework.composition.catalogue import write_cache

    content = {"stamps": {}, "index": "x" * 1000}
    with largest_file(100):
        write_cache(tmp_path / "cache" / "index.json", 2**62, content)
    assert not list((tmp_path / "cache").iterdir())
    write_cache(tmp_path / "cache" / "index.json", 2**62, content)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["index.json"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "npz", "parquet"])
def test_predictions_on_a_full_disk_are_an_error_and_leave_the_file_as_it_was(tmp_path, suffix):
    chunks = [({}, {"value": torch.rand(500)}) for _ in range(4)]
    path = tmp_path / f"y.{suffix}"
    path.write_text("before")
    message = (
        r"cannot be written: .* \(3,000 bytes were written and removed, [\d,]+ bytes are free\)$"
    )
    with largest_file(3000), pytest.raises(fw.errors.FrameworkError, match=message) as raised:
        write_predictions(chunks, Form(), str(path))
    assert str(raised.value).startswith(f"--output {path}: ")
    assert contents(tmp_path) == {path.name: b"before"}
    assert write_predictions(chunks, Form(), str(path)) == 2000
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.filterwarnings("ignore")  # of torch about its own code
@pytest.mark.parametrize("to", ["safetensors", "torch_export", "onnx"])
@pytest.mark.parametrize("size", [300, 12_000])
def test_an_export_on_a_full_disk_is_an_error_and_nothing_is_left(command, to, size):
    for package in fw.exporters.build(to).packages:
        pytest.importorskip(package)
    assert command("train data=blobs trainer.max_steps=2 callbacks=[checkpoint] run.name=r")[0] == 0
    with largest_file(size):
        status, _, err = command(f"export runs/default/r --to {to}")
    assert status == 2, err
    assert "cannot be written: File too large" in err
    assert err.count("\n") == 1
    assert not Path("runs/default/r/exports").exists()


def test_a_full_disk_of_temporary_files_is_named(tmp_path):
    chunks = [({}, {"value": torch.rand(500)}) for _ in range(40)]
    message = f"{tempfile.gettempdir()} cannot be written: .* bytes are free"
    with largest_file(3000), pytest.raises(fw.errors.FrameworkError, match=message):
        write_predictions(chunks, Form(), f"{tmp_path}/y.npy")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("is_new", [True, False])
def test_images_on_a_full_disk_are_an_error_and_none_is_left(tmp_path, is_new):
    pytest.importorskip("PIL.Image")
    small = torch.zeros(1, 1, 8, 8)
    large = torch.rand(1, 1, 80, 80)
    chunks = [({}, {"samples": images}) for images in (small, large)]
    folder = tmp_path / "y"
    if not is_new:
        folder.mkdir()
    with largest_file(3000), pytest.raises(fw.errors.FrameworkError, match=FULL):
        write_predictions(chunks, Form(), f"{folder}/")
    assert folder.exists() != is_new
    assert not list(tmp_path.glob("y/*"))
    assert write_predictions(chunks, Form(), f"{folder}/") == 2
    assert len(list(folder.iterdir())) == 2


def test_a_trace_is_written_atomically(tmp_path):
    class Recorder:
        def export_chrome_trace(self, path):
            Path(path).write_text(self.text)

    recorder = Recorder()
    recorder.text = '{"traceEvents": ['
    with pytest.raises(RunError, match=r"profile\.pt\.trace\.json cannot be written"):
        write_trace(recorder, tmp_path)
    assert not list(tmp_path.iterdir())
    recorder.text = "{}"
    write_trace(recorder, tmp_path)
    assert (tmp_path / "profile.pt.trace.json").read_text() == "{}"
