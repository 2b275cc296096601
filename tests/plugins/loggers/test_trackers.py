"""Loggers for experiment trackers: no duplicates after a kill; a broken tracker has no effect."""

import json
import math
import os
import time

import pytest
import torch

import framework as fw
from framework.errors import SettingError
from framework_plugins.loggers import tracker
from framework_plugins.loggers.journal import as_image, rewind_journal
from framework_plugins.loggers.tracker import Tracker


class Memory(Tracker):
    """A tracker in this process: `runs` has the records of each tracker run by its id."""

    service = "memory"
    package = "json"

    def __init__(self, runs, **settings):
        super().__init__(**settings)
        self.runs = runs
        self.failures = 0
        self.fails = False
        self.run = None
        self.outcome = None

    def connect(self, run):
        self.run = run
        self.runs.setdefault(run.id, [])
        return run.sent

    def send(self, record):
        if self.fails:
            self.failures += 1
            raise OSError("no route to host")
        self.runs[self.run.id].append(record)

    def finish(self, outcome):
        self.outcome = outcome


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(tracker, "WAIT_SECONDS", 0.01)


def opened(folder, step, runs, **settings):
    logger = Memory(runs, **settings)
    logger.open(folder, step, ["loss"])
    return logger


def log(logger, *steps, tag="train/loss"):
    for step in steps:
        logger.scalars({tag: 1 / step}, step=step, epoch=0, wall_seconds=0.0)


def save(folder, step, nan=False):
    """Write what the logger reads of a checkpoint."""
    path = folder / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    manifest = {"format": 1, "step": step, "nan": nan, "files": {}}
    (path / "MANIFEST.json").write_text(json.dumps(manifest))


def kill(logger):
    """End the thread as a kill does: nothing more is sent."""
    logger._sender.tracker = None  # any call fails
    logger._journal.close()
    logger._sender = None


def steps_of(records):
    return [(record.step, *record.scalars) for record in records]


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def manifest(monkeypatch):
    """Read a manifest without the checks of its files, which the checkpoints here do not have."""
    monkeypatch.setattr(
        tracker.checkpoints,
        "read_manifest",
        lambda path: json.loads((path / "MANIFEST.json").read_text()),
    )


def test_only_lines_up_to_a_checkpoint_are_sent_before_the_end(tmp_path, manifest):
    runs = {}
    logger = opened(tmp_path, 0, runs)
    logger.text("config", "lr: 1")
    log(logger, 10, 20, 30)
    time.sleep(0.1)
    assert runs == {}  # nothing is known that a resumed run does not repeat
    save(tmp_path, 20)
    wait_for(lambda: runs)
    time.sleep(0.1)
    (records,) = runs.values()
    assert steps_of(records) == [(0,), (10, "train/loss"), (20, "train/loss")]
    assert records[0].texts == {"config": "lr: 1"}
    logger.close()
    assert [record.step for record in records] == [0, 10, 20, 30]
    assert not logger.outcome.failed
    log(logger, 40)  # after close: nothing, and no error


def test_a_killed_run_continues_the_same_tracker_run_without_duplicates(tmp_path, manifest):
    runs = {}
    first = opened(tmp_path, 0, runs)
    log(first, 10, 20, 30)
    save(tmp_path, 20)
    wait_for(lambda: runs and len(next(iter(runs.values()))) == 2)
    wait_for(lambda: json.loads((tmp_path / "memory.json").read_text())["sent"] == 20)
    kill(first)
    second = opened(tmp_path, 20, runs)
    log(second, 30, 40)
    log(second, 40, tag="test/loss")
    second.close()
    (records,) = runs.values()
    assert [record.step for record in records] == [10, 20, 30, 40]
    assert set(records[-1].scalars) == {"train/loss", "test/loss"}


def test_lines_that_a_killed_run_had_not_sent_are_sent_after_the_resume(tmp_path, manifest):
    runs = {}
    first = opened(tmp_path, 0, runs)
    kill(first)  # the thread ends, the process still writes the journal
    first._journal = tracker.files.AppendFile(tmp_path, "memory.jsonl")
    log(first, 10, 20, 30)
    first._journal.close()
    with (tmp_path / "memory.jsonl").open("a") as journal:
        journal.write('{"step": 35, "ti')  # of the write during which the process was killed
    save(tmp_path, 20)
    second = opened(tmp_path, 20, runs)
    log(second, 30)
    second.close()
    (records,) = runs.values()
    assert [record.step for record in records] == [10, 20, 30]


def test_a_resume_from_before_what_was_sent_begins_a_new_tracker_run(tmp_path, manifest):
    runs = {}
    first = opened(tmp_path, 0, runs)
    log(first, 10, 20, 30)
    first.close()  # after an error without a checkpoint, or at the end
    save(tmp_path, 20)
    second = opened(tmp_path, 20, runs)
    log(second, 30)
    second.close()
    old, new = runs.values()
    assert [record.step for record in old] == [10, 20, 30]
    assert [record.step for record in new] == [10, 20, 30]
    assert new[2].time > old[2].time


def test_a_checkpoint_with_nan_in_the_weights_does_not_count(tmp_path, manifest):
    runs = {}
    logger = opened(tmp_path, 0, runs)
    log(logger, 10, 20)
    save(tmp_path, 10)
    save(tmp_path, 20, nan=True)
    wait_for(lambda: runs)
    time.sleep(0.1)
    (records,) = runs.values()
    assert [record.step for record in records] == [10]
    logger.close()


def test_errors_of_a_tracker_give_one_warning_and_everything_is_sent_later(tmp_path, manifest):
    runs = {}
    logger = opened(tmp_path, 0, runs)
    logger.fails = True
    log(logger, 10)
    save(tmp_path, 10)
    wait_for(lambda: logger.failures >= 2)
    with pytest.warns(UserWarning, match="memory: OSError: no route to host.*tries again"):
        log(logger, 20)
    log(logger, 30)  # no second warning, which would be an error here
    logger.fails = False
    logger.close()
    (records,) = runs.values()
    assert [record.step for record in records] == [10, 20, 30]


def test_a_tracker_that_stays_away_does_not_delay_the_end(tmp_path, manifest):
    logger = opened(tmp_path, 0, {}, timeout=0.2)
    logger.send = lambda record: time.sleep(3)
    log(logger, 10)
    began = time.monotonic()
    with pytest.warns(UserWarning, match=r"not everything was sent; .*memory\.jsonl has all"):
        logger.close()
    assert time.monotonic() - began < 2


def test_a_full_disk_gives_a_warning(tmp_path, manifest, monkeypatch):
    logger = opened(tmp_path, 0, {})
    monkeypatch.setattr(logger._journal, "append", fails_with(OSError(28, "No space left")))
    with pytest.warns(UserWarning, match="memory records nothing from here on: .*No space left"):
        log(logger, 10)
    log(logger, 20)
    logger.close()


def fails_with(error):
    def fail(*_):
        raise error

    return fail


def test_all_kinds_of_records_reach_the_tracker(tmp_path, manifest):
    runs = {}
    logger = opened(tmp_path, 0, runs, tags=["a"])
    values = {"train/loss": math.nan, "val/loss": math.inf, "x": 0.1}
    logger.scalars(values, step=10, epoch=1, wall_seconds=0.0)
    logger.images("val/pictures", torch.rand(2, 3, 4, 4), 10)
    logger.histogram("weights", torch.tensor([0.0, 1.0, 1.0, math.nan]), 10)
    logger.histogram("nothing", torch.tensor([math.nan]), 10)
    logger.hparams({"optimizer": {"name": "adamw", "lr": 0.1}}, {"val/loss": 2.0})
    logger.close()
    (records,) = runs.values()
    (record,) = records
    assert str(record.scalars) == str(values)
    assert [image[1:4] for image in record.images["val/pictures"]] == [b"PNG", b"PNG"]
    assert sum(count for _, _, count in record.histograms["weights"]) == 3
    assert "nothing" not in record.histograms
    assert logger.outcome.settings == {"optimizer": "adamw", "optimizer.lr": 0.1}
    assert logger.outcome.metrics == {"val/loss": 2.0}


@pytest.mark.parametrize("kind", ["scalars", "texts", "images", "histograms"])
def test_a_resumed_run_writes_the_records_of_the_test_again(tmp_path, kind):
    value = {"scalars": 1.0, "texts": "x", "images": [], "histograms": []}[kind]
    kept = json.dumps({"step": 10, "time": 1.0, kind: {"val/a": value}}) + "\n"
    (tmp_path / "memory.jsonl").write_text(kept + kept.replace("val/a", "test/a"))
    rewind_journal(tmp_path, "memory", 20)
    assert (tmp_path / "memory.jsonl").read_text() == kept


def test_only_png_images_of_a_journal_are_opened():
    assert as_image(fw.drawing.encode_png(torch.zeros(1, 4, 4))).size == (4, 4)
    with pytest.raises(OSError, match="cannot identify image file"):
        as_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n")


def test_the_trials_of_a_sweep_are_a_group(tmp_path, manifest):
    run = tmp_path / "digits" / "sweep" / "000_lr=0.1"
    run.mkdir(parents=True)
    (run.parent / "sweep.json").write_text("{}")
    (run / "config.yaml").write_text("optimizer: {name: sgd, lr: 0.1}\nrun: {name: x}\n")
    logger = opened(run, 0, {})
    log(logger, 1)
    logger.close()
    shown = (logger.run.project, logger.run.group, logger.run.name)
    assert shown == ("digits", "sweep", "000_lr=0.1")
    assert logger.run.hyperparameters() == {"optimizer": "sgd", "optimizer.lr": 0.1}


@pytest.mark.parametrize(
    "state", ["", "[]", '{"id": 3, "sent": 20}', '{"id": "../x", "sent": 20}', '{"id": "a"}']
)
def test_a_damaged_state_begins_a_new_tracker_run(tmp_path, state, manifest):
    (tmp_path / "memory.json").write_text(state)
    (tmp_path / "memory.jsonl").write_text('{"step": 10, "time": 1}\n[]\n{"step": []}\n')
    runs = {}
    logger = opened(tmp_path, 20, runs)
    log(logger, 30)
    logger.close()
    ((run_id, records),) = runs.items()
    assert len(run_id) == 32
    assert [record.step for record in records] == [10, 30]


def test_a_journal_that_is_a_link_is_refused(tmp_path, manifest):
    (tmp_path / "other").write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    os.symlink(tmp_path / "other", run / "memory.jsonl")
    with pytest.warns(UserWarning, match="memory records nothing from here on.*symbolic link"):
        logger = opened(run, 0, {})
    log(logger, 10)
    logger.close()
    assert (tmp_path / "other").read_text() == "mine"


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_missing_package_is_an_error_that_names_the_extra(name, monkeypatch):
    monkeypatch.setattr(tracker, "find_spec", lambda package: None)
    with pytest.raises(SettingError, match=rf"loggers={name} needs.*'framework\[{name}\]'"):
        fw.loggers.build(name)
