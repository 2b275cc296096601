"""Resuming moved and copied runs, from a chosen checkpoint, and with data at another path."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from framework.errors import CheckpointError, RunError
from framework.experiment.experiment import train
from framework.experiment.weights import find_checkpoint
from framework.runs.checkpoint import link_to, listed
from framework.runs.run_state import status_of
from runs import composed, cut_off_at, logged

SMALL = [
    "data=blobs",
    "scheduler=null",
    "model.width=16",
    "model.dropout=0.1",
    "trainer.max_epochs=3",
    "trainer.validate_every=10steps",
]
SMALL += [
    "loggers=[json_lines]",
    "callbacks=[checkpoint]",
    "callbacks.checkpoint.every=10steps",
    "callbacks.checkpoint.keep=20",
]


@pytest.fixture(autouse=True)
def _in_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def spec_of(*overrides):
    return composed([*SMALL, *overrides])


def train_run(*overrides, **more):
    messages = []
    return train(spec_of(*overrides), "default", [], say=messages.append, **more), messages


def cut_off(name, step, monkeypatch, *overrides):
    with cut_off_at(step, monkeypatch):
        train_run(f"run.name={name}", *overrides)
    return Path("runs/default") / name


def weights(run):
    return (listed(Path(run) / "checkpoints")[-1] / "model.safetensors").read_bytes()


def best_of(run):
    """Return the step and the weights of the best checkpoint."""
    best = (Path(run) / "checkpoints/best").resolve()
    return best.name, (best / "model.safetensors").read_bytes()


def assert_same_end(run, uninterrupted):
    assert weights(run) == weights(uninterrupted)
    assert logged(run) == logged(uninterrupted)
    assert best_of(run) == best_of(uninterrupted)
    assert status_of(Path(run)) == "done"


def rename(run):
    target = Path("elsewhere/other")
    target.parent.mkdir()
    run.rename(target)
    return target


def copy_without_links(run):
    """Copy a run without links, like cp -rL or a download from an object store."""
    target = Path("elsewhere/default/cut")
    shutil.copytree(run, target, symlinks=False, copy_function=shutil.copyfile)
    assert (target / "checkpoints/best").is_dir()
    assert not (target / "checkpoints/best").is_symlink()
    (target / ".lock").unlink()
    for file in sorted(target.rglob("*")):
        os.utime(file, (0, 0))
        file.chmod(0o755 if file.is_dir() else 0o644)
    shutil.rmtree(run)
    return target


@pytest.mark.parametrize("move", [rename, copy_without_links])
def test_a_moved_or_copied_run_resumes_exactly(move, monkeypatch):
    uninterrupted, _ = train_run("run.name=uninterrupted")
    run = move(cut_off("cut", 23, monkeypatch))
    resumed, messages = train_run(f"resume={run}")
    assert messages[0] == f"resuming {run} after step 20"
    assert resumed.folder == run
    assert_same_end(run, uninterrupted.folder)
    assert (run / "checkpoints/best").is_symlink()


def test_a_copy_without_links_can_be_evaluated_and_resumed_with_more_epochs():
    uninterrupted, _ = train_run("run.name=uninterrupted", "trainer.max_epochs=4")
    finished, _ = train_run("run.name=cut")
    before = best_of(finished.folder)[0]
    run = copy_without_links(finished.folder)
    again, _ = train_run(f"resume={run}")
    assert again.weights["test"].endswith(f"step {int(before.partition('-')[2])}")
    train_run(f"resume={run}", "trainer.max_epochs=4")
    assert weights(run) == weights(uninterrupted.folder)
    assert best_of(run) == best_of(uninterrupted.folder)


def test_a_link_replaces_a_folder_without_other_files(tmp_path):
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / "best").mkdir()
    (tmp_path / "best/model.safetensors").write_text("a copy")
    (tmp_path / "best/notes.txt").write_text("mine")
    link_to(tmp_path / "step-00000002", "best")
    assert os.readlink(tmp_path / "best") == "step-00000002"
    kept = [file.read_text() for file in tmp_path.rglob("notes.txt")]
    assert kept == ["mine"]
    link_to(tmp_path / "step-00000002", "best")
    assert os.readlink(tmp_path / "best") == "step-00000002"


# a chosen checkpoint


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_resumes_exactly_from_a_chosen_checkpoint(finished, monkeypatch):
    uninterrupted, _ = train_run("run.name=uninterrupted")
    run = train_run("run.name=a")[0].folder if finished else cut_off("a", 58, monkeypatch)
    later = [each.name for each in listed(run / "checkpoints")][4:]
    resumed, messages = train_run(f"resume={run}/checkpoints/step-00000040")
    assert messages[0] == f"resuming {run} after step 40"
    assert any("set aside" in line and later[0] in line for line in messages)
    assert resumed.folder == run
    assert_same_end(run, uninterrupted.folder)
    assert sorted(each.name for each in (run / "checkpoints").glob("*.aside")) == [
        f"{name}.aside" for name in later
    ]


def test_checkpoints_set_aside_are_not_used_after_another_interruption(monkeypatch):
    uninterrupted, _ = train_run("run.name=uninterrupted")
    run = train_run("run.name=a")[0].folder
    chosen = f"resume={run}/checkpoints/step-00000040"
    with cut_off_at(42, monkeypatch):
        train_run(chosen)
    assert [each.name for each in listed(run / "checkpoints")][-1] == "step-00000040"
    _, messages = train_run(f"resume={run}")
    assert messages[0] == f"resuming {run} after step 40"
    assert_same_end(run, uninterrupted.folder)
    train_run(chosen)  # once more: the names of those set aside are taken
    assert_same_end(run, uninterrupted.folder)
    assert list((run / "checkpoints").glob("step-*.aside-2"))


def test_a_run_killed_after_setting_checkpoints_aside_resumes(monkeypatch):
    uninterrupted, _ = train_run("run.name=uninterrupted")
    run = train_run("run.name=a")[0].folder
    with monkeypatch.context() as patched:
        patched.setattr("framework.experiment.experiment.Prepared.log_start", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_run(f"resume={run}/checkpoints/step-00000040")
    _, messages = train_run(f"resume={run}")
    assert messages[0] == f"resuming {run} after step 40"
    assert_same_end(run, uninterrupted.folder)


def test_the_best_checkpoint_can_be_resumed_as_a_link_and_as_a_folder(monkeypatch):
    worse_later = ["optimizer.lr=0.5", "callbacks.checkpoint.keep=1"]
    uninterrupted, _ = train_run("run.name=uninterrupted", *worse_later)
    run = train_run("run.name=a", *worse_later)[0].folder
    step = int(best_of(run)[0].partition("-")[2])
    _, messages = train_run(f"resume={run}/checkpoints/best", *worse_later)
    assert messages[0] == f"resuming {run} after step {step}"
    assert weights(run) == weights(uninterrupted.folder)
    assert best_of(run) == best_of(uninterrupted.folder)
    is_last = listed(run / "checkpoints")[-1].name == best_of(run)[0]
    copied = copy_without_links(run)
    if not is_last:
        shutil.rmtree(copied / f"checkpoints/step-{step:08d}")
    _, messages = train_run(f"resume={copied}/checkpoints/best", *worse_later)
    assert messages[0] == f"resuming {copied} after step {step}"
    assert weights(copied) == weights(uninterrupted.folder)
    assert best_of(copied) == best_of(uninterrupted.folder)


def test_the_best_checkpoint_is_chosen_anew_after_it_is_set_aside(monkeypatch):
    run = train_run("run.name=a")[0].folder
    best = int(best_of(run)[0].partition("-")[2])
    chosen = listed(run / "checkpoints")[0]
    assert best > 10
    train_run(
        f"resume={chosen}",
        "trainer.max_steps=16",
        "callbacks.checkpoint.monitor=null",
        inexact=True,
    )
    assert not (run / "checkpoints/best").is_symlink()
    assert find_checkpoint(run).name == "step-00000016"


def test_a_missing_or_damaged_checkpoint_is_refused_and_the_run_is_unchanged():
    run = train_run("run.name=a")[0].folder
    before = sorted((run / "checkpoints").iterdir())
    with pytest.raises(
        RunError, match=r"there is no checkpoint .*step-00000041; did you mean 'step-"
    ):
        train_run(f"resume={run}/checkpoints/step-00000041")
    damaged = run / "checkpoints/step-00000040/model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match=r"step-00000040/model.safetensors is damaged"):
        train_run(f"resume={damaged.parent}")
    with pytest.raises(RunError, match=r"optimizer.lr=0.1 .*--inexact"):
        train_run(f"resume={run}/checkpoints/step-00000050", "optimizer.lr=0.1")
    assert sorted((run / "checkpoints").iterdir()) == before
    assert status_of(run) == "done"


def test_the_resume_command_accepts_a_checkpoint(command):
    assert command(f"train {' '.join(SMALL)} run.name=a")[0] == 0
    before = weights("runs/default/a")
    status, out, err = command("resume runs/default/a/checkpoints/step-00000080")
    assert status == 0, err
    assert "resuming runs/default/a after step 80" in out
    assert weights("runs/default/a") == before
    assert json.loads(Path("runs/default/a/status.json").read_text())["status"] == "done"


def test_a_sweep_copied_without_links_resumes(command):
    swept = f"train {' '.join(SMALL)} -m seed=0,1 sweep.name=s sweep.metric=val/loss"
    assert command(swept)[0] == 0
    sweep = Path("copy/default/s")
    shutil.copytree("runs/default/s", sweep, symlinks=False)
    ended = sweep.joinpath("sweep.jsonl").read_text().splitlines(keepends=True)
    before = (sweep / "best/config.yaml").read_text()
    assert not (sweep / "best/config.yaml").is_symlink()
    kept = [line for line in ended if json.loads(line)["number"] == 0]
    sweep.joinpath("sweep.jsonl").write_text("".join(kept))  # one trial is to be run again
    shutil.rmtree(next(sweep.glob("001_*")))
    status, out, err = command(f"{swept} resume=auto run.root=copy")
    assert status == 0, err
    assert "of which 1 trials are finished" in out
    assert (sweep / "best/config.yaml").resolve().parent.parent == sweep.resolve()
    assert (sweep / "best/config.yaml").resolve().parent.name.startswith("00")
    assert "seed: " + before.partition("seed: ")[2][0] in (sweep / "best/config.yaml").read_text()


# data at another place


def write_table(folder, rows=120, value="0.5"):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{row % 7},{row * 0.1:.1f},{value if row == 50 else row % 5},{'ab'[row % 2]}"
        for row in range(rows)
    ]
    (folder / "t.csv").write_text("\n".join(["x,y,z,label", *lines]) + "\n")
    return folder / "t.csv"


def table_at(path):
    return ["data=table", f"data.path={path}", "data.target=label", "loader.batch_size=4"]


def test_data_with_the_same_content_may_move_to_another_path(monkeypatch):
    old = write_table(Path("old"))
    new = write_table(Path("new/place"))
    uninterrupted, _ = train_run("run.name=uninterrupted", *table_at(old))
    cut_off("cut", 23, monkeypatch, *table_at(old))
    shutil.rmtree("old")
    resumed, messages = train_run("run.name=cut", "resume=auto", *table_at(new))
    assert f"from here on data.path={new} (was {old})" in messages
    assert_same_end(resumed.folder, uninterrupted.folder)
    assert f"path: {new}" in (resumed.folder / "config.yaml").read_text()


OTHER = {
    "one_value": (
        {"value": "0.25"},
        r"data .*has changed since it began \(.*the content of the .* split differs.*--inexact",
    ),
    "fewer_rows": ({"rows": 100}, r"has changed since it began \(.*samples: .*--inexact"),
}


@pytest.mark.parametrize(("other", "expected"), OTHER.values(), ids=OTHER)
def test_other_data_at_another_path_is_refused_with_the_difference(other, expected, monkeypatch):
    old = write_table(Path("old"))
    new = write_table(Path("new"), **other)
    cut_off("cut", 23, monkeypatch, *table_at(old))
    with pytest.raises(RunError, match=expected):
        train_run("run.name=cut", "resume=auto", *table_at(new))
    train_run("run.name=cut", "resume=auto", *table_at(new), inexact=True)


def test_other_content_at_the_same_path_gives_a_note(monkeypatch):
    """A repaired file is an example: the other facts of the data are the same."""
    lines = ["run.name=cut", "data=npz", "data.path=x.npz", "data.normalize=false", "model.width=4"]
    rows = np.arange(80, dtype=np.float32).reshape(40, 2)
    np.savez("x.npz", x=rows, y=np.arange(40) % 2)
    cut_off("cut", 2, monkeypatch, *lines[1:])
    rows[7] += 1
    np.savez("x.npz", x=rows, y=np.arange(40) % 2)
    _, messages = train_run(*lines, "resume=auto")
    assert (
        "the data has changed since the run began: the content of the train split differs"
        in messages
    )


def test_the_data_of_a_run_of_an_older_version_may_not_move(monkeypatch):
    old = write_table(Path("old"))
    new = write_table(Path("new"))
    run = cut_off("cut", 23, monkeypatch, *table_at(old))
    facts = json.loads((run / "facts.json").read_text())
    del facts["content"]
    (run / "facts.json").write_text(json.dumps(facts))
    with pytest.raises(
        RunError, match=r"data.path=new/t.csv \(was old/t.csv\) \(the run is of an older version"
    ):
        train_run("run.name=cut", "resume=auto", *table_at(new))
    train_run("run.name=cut", "resume=auto", *table_at(old))


def test_other_settings_of_the_data_may_not_change(monkeypatch):
    old = write_table(Path("old"))
    cut_off("cut", 23, monkeypatch, *table_at(old))
    with pytest.raises(RunError, match=r"data.split_seed=1 .*--inexact"):
        train_run("run.name=cut", "resume=auto", *table_at(old), "data.split_seed=1")
