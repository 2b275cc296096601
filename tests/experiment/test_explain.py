"""What `framework explain` tells about settings, the time and steps that are not finite."""

import json
import math
import runpy
from pathlib import Path

import pytest
import torch

import framework as fw
from framework.errors import FrameworkError, RunError
from framework.experiment.experiment import Experiment
from framework.experiment.recorded.explain import explain_setting, explain_setting_of_run
from framework.experiment.recorded.replay import replay
from framework.experiment.recorded.saved_step import load_step
from framework.runs import checkpoint
from framework.runs.checkpoint import folder_name
from framework.runs.file_names import NON_FINITE
from framework.runs.overview.speed import explain_speed
from framework.runs.run_files import RunFiles
from framework.runs.run_time import read_time
from runs import composed, cut_off_at, run_training

SMALL = ("loader.batch_size=400", "callbacks=[checkpoint,non_finite]")
OFTEN = "callbacks.checkpoint.every=2steps"
HUGE = ("model.width=64", "model.depth=5", "optimizer=sgd", "optimizer.lr=30", "scheduler=null")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)


def failed_run(name, *overrides):
    """Train until a step is not finite; return the files of the run."""
    with pytest.raises(FrameworkError, match="non_finite") as failure:
        run_training(*SMALL, *overrides, f"run.name={name}")
    assert failure.value.exit_status == 3
    return RunFiles(f"runs/default/{name}")


def insert_callback(patched, callback):
    """Train with a callback before those of the experiment."""
    make_trainer = Experiment.trainer

    def changed(*args):
        trainer = make_trainer(*args)
        trainer.callbacks.insert(0, callback)
        return trainer

    patched.setattr(Experiment, "trainer", changed)


# settings


def test_a_setting_and_all_settings_of_a_part():
    spec = composed(["optimizer.lr=0.5"])
    [lr] = explain_setting(spec, "optimizer.lr")
    assert lr.value == 0.5
    assert [(place.value, place.effect) for place in lr.places] == [
        (0.5, "used"),
        (0.001, "replaced"),
    ]
    assert lr.source == "command line: optimizer.lr=0.5"
    settings = {each.setting: each for each in explain_setting(spec, "optimizer")}
    assert settings["optimizer"].value == "adamw"
    assert settings["optimizer.eps"].source.startswith("default of optimizer/adamw (")
    with pytest.raises(FrameworkError, match=r"did you mean 'optimizer\.lr'"):
        explain_setting(spec, "optimizer.lrr")


def test_the_settings_of_a_run_that_was_resumed_with_a_change(monkeypatch):
    with cut_off_at(3, monkeypatch):
        run_training(*SMALL, OFTEN, "run.name=cut", "trainer.max_epochs=9")
    run_training(*SMALL, OFTEN, "run.name=cut", "trainer.max_epochs=2", "resume=auto")
    [epochs] = explain_setting_of_run(RunFiles("runs/default/cut"), "trainer.max_epochs")
    assert [place.value for place in epochs.places] == [2, 9, 30, None]
    assert epochs.source == "resumed after step 2"


def test_a_run_of_an_older_version():
    folder = run_training(*SMALL, "trainer.max_epochs=1", "optimizer.lr=0.01").folder
    content = json.loads((folder / "provenance.json").read_text())
    assert content["settings"].pop("optimizer.lr")
    del content["settings"]
    (folder / "provenance.json").write_text(json.dumps(content))
    [lr] = explain_setting_of_run(RunFiles(folder), "optimizer.lr")
    assert lr.source == "command line: optimizer.lr=0.01"
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("depth: 2", "depth: 3"))
    [depth] = explain_setting_of_run(RunFiles(folder), "model.depth")
    assert depth.value == 3
    assert depth.source == ""
    assert "does not record" in depth.note


# speed


def test_the_time_of_a_resumed_run_is_that_of_both_sessions(monkeypatch):
    settings = (*SMALL, OFTEN, "run.name=cut", "trainer.max_epochs=4", "trainer.log_every=1steps")
    monkeypatch.setattr("framework.runs.status_file.LEAST_SECONDS", 0.0)
    with cut_off_at(5, monkeypatch):
        run_training(*settings)
    run = RunFiles("runs/default/cut")
    before = read_time(run.status)
    assert before.sessions == 1
    assert before.steps == 5
    run_training(*settings, "resume=auto")
    after = read_time(RunFiles(run.path).status)
    assert after.sessions == 2
    assert after.steps == 5 + 16 - 4  # step 5 was trained twice
    assert after.training > before.training
    speed = explain_speed(RunFiles(run.path))
    assert sum(each.seconds for each in speed.activities) == pytest.approx(after.total, abs=0.01)
    assert {"steps", "validation", "test"} <= {each.name for each in speed.activities}


# steps that are not finite


@pytest.mark.parametrize(
    "overrides",
    [
        (OFTEN,),
        ("callbacks.checkpoint.every=99steps",),  # repeated from the first step
        (OFTEN, "model.dropout=0.1", "trainer.micro_batch=90", "optimizer.lr=1000"),
        (OFTEN, "+callbacks=ema", "trainer.compile=off", "model.activation=gelu"),
    ],
)
def test_the_step_is_found_and_repeated(overrides, tmp_path, capsys):
    run = failed_run("bad", *HUGE, *overrides)
    recorded = json.loads((run.path / NON_FINITE).read_text())
    result = replay(run, tmp_path / "step")
    finding = result.finding
    assert finding is not None
    assert finding.step == recorded["first"] == recorded["last"]
    assert finding.step - result.start <= (2 if OFTEN in overrides else finding.step)
    assert not math.isfinite(finding.loss)
    assert finding.layer is not None
    assert finding.layer_inputs_finite
    assert set(finding.layer_samples) <= set(finding.samples)
    step = load_step(tmp_path / "step" / "step.pt")
    assert not math.isfinite(step.forward().loss.item())
    runpy.run_path(str(result.files[0]))
    assert "gradient not finite" in capsys.readouterr().out


def test_the_layer_and_the_samples(tmp_path, forget_plugins):
    """Three samples make the second activation infinite; the others stay finite."""
    (tmp_path / "part.py").write_text(
        "import torch\nfrom torch import nn\nfrom framework import activations\n\n\n"
        "@activations.register('reciprocal')\nclass Reciprocal(nn.Module):\n"
        "    '''1 / (x - x[0]), infinite for the first sample.'''\n\n"
        "    def forward(self, x):\n"
        "        return 1 / (x - x[:1]) if x.shape[1] == 8 else x\n"
    )
    fw.discover(["part.py"])
    run = failed_run("layer", OFTEN, "model.width=8", "activation=reciprocal")
    finding = replay(run).finding
    assert finding.step == 1
    assert finding.layer == "blocks.0.activation"
    assert finding.layer_type == "Reciprocal"
    assert finding.layer_samples == finding.samples[:1]
    assert finding.layer_values == (8, 400 * 8)
    assert finding.parameter == "blocks.0.linear.weight"


SHARDS = ("trainer.shards=4", "trainer.accumulate=2")


@pytest.mark.parametrize(
    "overrides",
    [(), SHARDS, (*SHARDS, "trainer.micro_batch=30"), ("trainer.accumulate=2",)],
    ids=["plain", "shards", "shards of micro-batches", "accumulate"],
)
def test_the_sample_with_a_fault_is_named(overrides, tmp_path, forget_plugins):
    (tmp_path / "part.py").write_text(
        "import math\nfrom framework import datasets\n"
        "from framework_plugins.datasets.builtin import Blobs\n\n\n"
        "@datasets.register('faulty')\nclass Faulty(Blobs):\n"
        "    '''Blobs with a NaN in sample 838.'''\n\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.train[838][0].fill_(math.nan)\n"
    )
    fw.discover(["part.py"])
    run = failed_run("bad", "data=faulty", "loader.batch_size=100", OFTEN, *overrides)
    run.status["processes"] = 2
    result = replay(run)
    assert ("2 processes" in str(result.notes)) == ("trainer.shards=4" not in overrides)
    finding = result.finding
    assert 838 in finding.samples
    assert finding.inputs == finding.layer_samples == [838]


NAMED = """
import math
import framework as fw
from framework_plugins.datasets.builtin import Blobs
from torch import nn


@fw.datasets.register("named")
class Named(Blobs):
    'Blobs by name, with a NaN in sample 838.'

    def __init__(self):
        super().__init__()
        for name in ("train", "val", "test"):
            points, labels = getattr(self, name).tensors
            setattr(self, name, fw.TensorSplit(points=points, labels=labels))
        self.train[838]["points"].fill_(math.nan)


@fw.models.register("named")
class Model(nn.Module):
    'A linear layer, called by a keyword.'

    def __init__(self, in_shape: fw.Shape, out_shape: fw.Shape):
        super().__init__()
        self.linear = nn.Linear(*in_shape, *out_shape)

    def forward(self, points):
        return self.linear(input=points)
"""


@pytest.mark.parametrize("overrides", [(), SHARDS], ids=["plain", "shards"])
def test_the_sample_is_named_in_batches_with_names(overrides, tmp_path, forget_plugins):
    (tmp_path / "part.py").write_text(NAMED)
    fw.discover(["part.py"])
    named = ("data=named", "model=named", "task.inputs=points", "task.target=labels")
    run = failed_run("bad", *named, "loader.batch_size=100", OFTEN, *overrides)
    finding = replay(run, tmp_path / "step").finding
    assert finding.inputs == finding.layer_samples == [838]
    assert (finding.layer, finding.layer_inputs_finite) == ("linear", False)
    assert math.isnan(load_step(tmp_path / "step/step.pt").forward().loss.item())


def test_a_run_that_rewinds_is_repeated(tmp_path):
    """The steps before the last one were skipped: its weights are those of the checkpoint."""
    policy = ("callbacks.non_finite.policy=rewind", "callbacks.non_finite.most_skips=2")
    run = failed_run("bad", *HUGE, "callbacks.checkpoint.every=5steps", *policy)
    last = json.loads((run.path / NON_FINITE).read_text())["last"]
    result = replay(run, tmp_path / "step")
    assert result.finding.step == last
    assert result.start < last - 2
    weights, _ = checkpoint.load(run.path / "checkpoints" / folder_name(result.start))
    for name, tensor in load_step(tmp_path / "step/step.pt").model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("launcher", ["basic", "vectorized"])
def test_a_trial_of_a_sweep_is_repeated(launcher, command):
    words = [*SMALL, *HUGE, OFTEN, "optimizer.lr=0.1,30", f"hydra/launcher={launcher}"]
    assert command(f"train -m {' '.join(words)} loggers=[] sweep.name=s")[0] != 0
    status, out, err = command("explain nan default/s/001_lr-30 --json")
    assert status == 0, err
    finding = json.loads(out)["finding"]
    recorded = json.loads(Path("runs/default/s/001_lr-30", NON_FINITE).read_text())
    assert finding["step"] == recorded["first"]
    assert finding["layer"] is not None


def test_the_record_of_an_earlier_failure_does_not_count(command, monkeypatch):
    """The run goes on from an earlier checkpoint, and fails elsewhere."""
    run = failed_run("bad", *HUGE, OFTEN, "callbacks.checkpoint.keep=9")
    first = json.loads((run.path / NON_FINITE).read_text())["first"]
    assert first > 5
    with monkeypatch.context() as patched:
        insert_callback(patched, Fault())
        line = "resume runs/default/bad/checkpoints/step-00000002 optimizer.lr=0.1 --inexact"
        assert command(line)[0] == 1
    assert (run.path / NON_FINITE).exists()
    result = replay(RunFiles(run.path))
    assert (result.start, result.last, result.finding) == (4, 5, None)
    assert command("resume runs/default/bad")[0] == 0
    with pytest.raises(RunError, match="it is done"):
        replay(RunFiles(run.path))


class Fault(fw.Callback):
    """Fails in step 5, not because of a value that is not finite."""

    def on_step_start(self, trainer):
        if trainer.state.step == 4:
            raise ValueError("a fault")


def test_the_step_is_searched_where_it_is_not_recorded_exactly():
    """With a fused optimizer on an accelerator, several steps are checked at once."""
    run = failed_run("range", *HUGE, OFTEN)
    exact = json.loads((run.path / NON_FINITE).read_text())["first"]
    (run.path / NON_FINITE).write_text(json.dumps({"first": 1, "last": exact + 3}))
    assert replay(run).finding.step == exact
    (run.path / NON_FINITE).unlink()  # an older version
    assert replay(RunFiles(run.path)).finding.step == exact


class Poison(fw.Callback):
    """Makes a gradient NaN, as a fault of the memory would."""

    def on_gradients(self, trainer):
        if trainer.state.step == 4:
            next(trainer.model.parameters()).grad[0] = math.nan


def test_a_failure_without_a_cause_in_the_run_is_not_repeated(monkeypatch):
    with monkeypatch.context() as patched:
        insert_callback(patched, Poison())
        run = failed_run("poisoned", OFTEN)
    result = replay(run)
    assert result.finding is None
    assert (result.start, result.last) == (4, 5)


def test_runs_that_cannot_be_repeated(tmp_path):
    folder = run_training(*SMALL, "trainer.max_epochs=1", "run.name=good").folder
    with pytest.raises(RunError, match="has not been stopped"):
        replay(RunFiles(folder))
    folder = failed_run("bad", *HUGE).path
    for content in (
        "{",
        "[]",
        '{"first": 3, "last": 1}',
        '{"first": "1", "last": 1}',
        '{"first": 1}',
    ):
        (folder / NON_FINITE).write_text(content)
        with pytest.raises(RunError, match=NON_FINITE):
            replay(RunFiles(folder))
    (folder / NON_FINITE).unlink()
    (folder / NON_FINITE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match=NON_FINITE):
        replay(RunFiles(folder))


def test_a_damaged_step_file(tmp_path):
    (tmp_path / "step.pt").write_bytes(b"no zip file")
    with pytest.raises(RunError, match="cannot be read"):
        load_step(tmp_path / "step.pt")
