"""A resumed run continues exactly as if it had not been interrupted, or is refused."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import framework as fw
from framework.errors import RunError
from framework.experiment.experiment import train
from framework.experiment.resumption.config_changes import compare_configs, fingerprint
from framework.experiment.weights import initialize_from
from framework.runs.checkpoint import listed, load
from framework.runs.run_state import status_of
from runs import composed, cut_off_at, logged

PLUGINS = []
SMALL = [
    "model.width=16",
    "model.dropout=0.1",
    "trainer.max_epochs=2",
    "callbacks=[checkpoint,gradient_norm]",
]


@pytest.fixture(autouse=True)
def _in_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def spec_of(*overrides):
    return composed([*SMALL, *overrides], PLUGINS)


def train_run(*overrides, **more):
    """Train, and return the result and the printed lines."""
    messages = []
    return train(spec_of(*overrides), "default", [], say=messages.append, **more), messages


def weights(run):
    return (listed(Path(run) / "checkpoints")[-1] / "model.safetensors").read_bytes()


def cut_off(name, step, monkeypatch, *overrides):
    """Run until a step, then fail."""
    with cut_off_at(step, monkeypatch):
        train_run(f"run.name={name}", *overrides)


def with_callback(trainer, callback):
    trainer.callbacks.append(callback)
    return trainer


@pytest.mark.parametrize("step", [3, 25, 40, 61])
def test_the_same_command_resumes_an_interrupted_run_exactly(step, monkeypatch):
    often = "callbacks.checkpoint.every=5steps"
    uninterrupted, _ = train_run("run.name=uninterrupted", often)
    cut_off("cut", step, monkeypatch, often)
    resumed, messages = train_run("run.name=cut", "resume=auto", often)
    assert messages[0] == f"resuming runs/default/cut after step {step // 5 * 5}"
    assert weights(resumed.folder) == weights(uninterrupted.folder)
    assert logged(resumed.folder) == logged(uninterrupted.folder)
    assert status_of(resumed.folder) == "done"


class StopAtTheEnd(fw.Callback):
    """Ends the process of training after the last values are logged."""

    def on_fit_end(self, trainer):
        raise KeyboardInterrupt


def stopped_at_the_end(trainer):
    trainer.callbacks.insert(0, StopAtTheEnd())  # before the checkpoint callback
    return trainer


def test_a_run_killed_after_its_last_step_logs_nothing_twice(monkeypatch):
    from framework.experiment.experiment import Experiment

    odd = ["trainer.max_steps=17", "trainer.log_every=7steps", "trainer.validate_every=5steps"]
    odd += ["callbacks.checkpoint.every=1steps", "callbacks.checkpoint.background=false"]
    uninterrupted, _ = train_run("run.name=uninterrupted", *odd)
    make = Experiment.trainer
    with monkeypatch.context() as patched:
        patched.setattr(Experiment, "trainer", lambda *args: stopped_at_the_end(make(*args)))
        with pytest.raises(KeyboardInterrupt):
            train_run("run.name=cut", *odd)
    resumed, messages = train_run("run.name=cut", "resume=auto", *odd)
    assert messages[0] == "resuming runs/default/cut after step 17"
    assert logged(resumed.folder) == logged(uninterrupted.folder)


def test_a_run_with_images_in_channels_last_format_resumes_exactly(monkeypatch):
    """`loader.channels_last=auto` of a convolutional model chooses the same after a resume."""
    images = ["data.image=true", "model=cnn", "model.channels=[4,8]", "transforms=[flip]"]
    monkeypatch.setitem(globals(), "SMALL", [*images, *SMALL[2:]])
    often = "callbacks.checkpoint.every=5steps"
    uninterrupted, _ = train_run("run.name=uninterrupted", often)
    cut_off("cut", 23, monkeypatch, often)
    resumed, messages = train_run("run.name=cut", "resume=auto", often)
    assert messages[0] == "resuming runs/default/cut after step 20"
    assert weights(resumed.folder) == weights(uninterrupted.folder)


@pytest.mark.parametrize(("inputs", "workers"), [("x", 0), ("image", 0), ("image", 2)])
def test_a_run_on_an_arrow_file_resumes_exactly(inputs, workers, monkeypatch):
    numpy = pytest.importorskip("numpy")
    image = pytest.importorskip("PIL.Image")
    pyarrow = pytest.importorskip("pyarrow")
    pixels = numpy.random.default_rng(0).integers(0, 255, (90, 4, 4), dtype=numpy.uint8)
    encoded = []
    for one in pixels:
        content = io.BytesIO()
        image.fromarray(one).save(content, "png")
        encoded.append(content.getvalue())
    x = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(pixels.reshape(-1)), 16)
    table = pyarrow.table({"x": x, "image": encoded, "label": numpy.arange(90) % 2})
    with pyarrow.ipc.new_file("rows.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=20)
    settings = ["data=arrow", "data.path=rows.arrow", f"data.inputs=[{inputs}]", "data.size=4"]
    settings += ["loader.batch_size=8", f"loader.workers={workers}"]
    settings += ["callbacks.checkpoint.every=3steps"]
    uninterrupted, _ = train_run("run.name=uninterrupted", *settings)
    cut_off("cut", 11, monkeypatch, *settings)
    resumed, messages = train_run("run.name=cut", "resume=auto", *settings)
    assert messages[0] == "resuming runs/default/cut after step 9"
    assert weights(resumed.folder) == weights(uninterrupted.folder)
    if workers:
        alone = [*settings, "loader.workers=0"]
        assert weights(train_run("run.name=alone", *alone)[0].folder) == weights(resumed.folder)


COUNTS = """\
import torch
from framework import Callback, callbacks

@callbacks.register("counts")
class Counts(Callback):
    alone = True

    def __init__(self):
        self.epochs = self.steps = 0

    def on_step_end(self, trainer):
        self.steps += 1

    def on_epoch_end(self, trainer):
        self.epochs += 1
        trainer.log({"count": self.epochs + self.steps})
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.mul_(1 - 0.01 * self.epochs)

    def state_dict(self):
        return {"epochs": self.epochs, "steps": self.steps}

    def load_state_dict(self, state):
        self.epochs, self.steps = state["epochs"], state["steps"]
"""


@pytest.mark.parametrize("step", [23, 40, 61])
def test_the_state_of_a_callback_after_the_checkpoint_callback_is_restored(
    step, monkeypatch, tmp_path, forget_plugins
):
    (tmp_path / "counts.py").write_text(COUNTS)
    counting = ["+callbacks=counts", "callbacks.checkpoint.every=5steps", "scheduler=null"]
    monkeypatch.setitem(globals(), "PLUGINS", ["counts.py"])
    uninterrupted, _ = train_run("run.name=uninterrupted", *counting)
    cut_off("cut", step, monkeypatch, *counting)
    resumed, _ = train_run("run.name=cut", "resume=auto", *counting)
    assert weights(resumed.folder) == weights(uninterrupted.folder)
    assert logged(resumed.folder) == logged(uninterrupted.folder)


@pytest.mark.parametrize(
    ("override", "expected", "advises_weights"),
    [
        (
            "model.width=8",
            r"another model: .*bias has shape \(16,\) in the checkpoint and \(8,\) in the config",
            False,
        ),
        ("model.depth=3", r"another model: its .* is not in the checkpoint", True),
        ("model.depth=1", r"another model: it has no ", True),
        ("optimizer=sgd", "another optimizer", True),
        ("parameters.decay=all", "other groups of parameters", True),
    ],
)
@pytest.mark.parametrize("inexact", [False, True])
def test_another_model_or_optimizer_is_refused_and_the_run_is_unchanged(
    override, expected, advises_weights, inexact
):
    """The advice works: --inexact would not allow the change, and weights are used if any fit."""
    run, _ = train_run("run.name=a", "trainer.max_epochs=1")
    before = {
        file: file.read_bytes()
        for file in run.folder.iterdir()
        if file.is_file() and file.name != ".lock"
    }
    with pytest.raises(RunError, match=f"cannot be resumed with .*{expected}") as refused:
        train_run("run.name=a", "resume=auto", override, inexact=inexact)
    assert {file: file.read_bytes() for file in before} == before
    advice = str(refused.value)
    assert "--inexact" not in advice
    assert "start a new run with `framework train" in advice
    assert ("init_from=runs/default/a" in advice) == advises_weights
    new = ["run.name=new", override, "init_from=runs/default/a"]
    if advises_weights:
        train_run(*new)
    else:
        with pytest.raises(RunError, match="init_from"):
            train_run(*new)


class Signalled(fw.Callback):
    """Gets a signal after step 31."""

    def on_step_end(self, trainer):
        if trainer.state.step == 31:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_adds_no_validation_that_a_schedule_observes(monkeypatch):
    from framework.experiment.experiment import Experiment

    plateau = [
        "scheduler=reduce_on_plateau",
        "scheduler.patience=0",
        "scheduler.factor=0.5",
        "scheduler.threshold=0.3",
    ]
    uninterrupted, _ = train_run("run.name=uninterrupted", *plateau)
    trainer_of = Experiment.trainer
    with monkeypatch.context() as patched:
        patched.setattr(
            Experiment, "trainer", lambda *args: with_callback(trainer_of(*args), Signalled())
        )
        assert train_run("run.name=cut", *plateau)[0].steps == 31
    resumed, messages = train_run("run.name=cut", "resume=auto", *plateau)
    assert messages[0] == "resuming runs/default/cut after step 31"
    assert weights(resumed.folder) == weights(uninterrupted.folder)
    assert logged(resumed.folder) == logged(uninterrupted.folder)


def test_without_a_name_the_newest_unfinished_run_of_the_same_config_is_resumed(monkeypatch):
    train_run("run.name=finished")
    cut_off("cut", 45, monkeypatch)
    resumed, _ = train_run("resume=auto")
    assert resumed.folder.name == "cut"
    fresh, messages = train_run("resume=auto")
    assert fresh.folder.name not in ("cut", "finished")
    assert not messages


def test_a_finished_run_is_not_changed():
    finished, _ = train_run("run.name=a")
    before = weights(finished.folder)
    again, messages = train_run("run.name=a", "resume=auto")
    assert messages == ["runs/default/a is complete: nothing is left to train"]
    assert again.metrics["test/accuracy"] == finished.metrics["test/accuracy"]
    assert weights(again.folder) == before


def test_only_settings_that_change_the_weights_are_refused(monkeypatch):
    cut_off("a", 45, monkeypatch)
    with pytest.raises(RunError, match=r"optimizer.lr=0.1 \(was 0.001\).*--inexact"):
        train_run("run.name=a", "resume=auto", "optimizer.lr=0.1")
    with pytest.raises(RunError, match="seed=1"):
        train_run("run.name=a", "resume=auto", "seed=1")
    resumed, messages = train_run(
        "run.name=a", "resume=auto", "trainer.log_every=7steps", "trainer.max_epochs=3"
    )
    assert resumed.steps == 120
    assert "from here on trainer.max_epochs=3 (was 2)" in messages
    changed, _ = train_run(
        "run.name=a", "resume=auto", "trainer.max_epochs=4", "optimizer.lr=0.01", inexact=True
    )
    training = load(listed(changed.folder / "checkpoints")[-1])[1]
    assert training["optimizer"]["param_groups"][0]["initial_lr"] == 0.01


def test_a_finished_run_can_be_resumed_with_more_epochs():
    train_run("run.name=a")
    longer, messages = train_run("run.name=a", "resume=auto", "trainer.max_epochs=3")
    assert longer.steps == 120
    assert messages[0] == "resuming runs/default/a after step 80"


def test_a_run_is_resumed_by_its_path():
    first, _ = train_run("run.name=a")
    with pytest.raises(RunError, match="there is no run folder nope"):
        train_run("resume=nope")
    again, _ = train_run(f"resume={first.folder}")
    assert again.folder == first.folder


def test_a_damaged_checkpoint_is_skipped_with_a_note(monkeypatch):
    uninterrupted, _ = train_run("run.name=uninterrupted", "callbacks.checkpoint.every=5steps")
    cut_off("a", 33, monkeypatch, "callbacks.checkpoint.every=5steps")
    newest = listed(Path("runs/default/a/checkpoints"))[-1] / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"!")
    resumed, messages = train_run("run.name=a", "resume=auto", "callbacks.checkpoint.every=5steps")
    assert any(line.startswith("skipped") and "step-00000030" in line for line in messages)
    assert weights(resumed.folder) == weights(uninterrupted.folder)


def test_changed_data_is_refused(monkeypatch):
    cut_off("a", 45, monkeypatch)
    facts = Path("runs/default/a/facts.json")
    facts.write_text(facts.read_text().replace("4.88", "4.89"))
    with pytest.raises(RunError, match="the data of runs/default/a has changed"):
        train_run("run.name=a", "resume=auto")


def test_only_one_process_writes_to_a_run(monkeypatch):
    cut_off("a", 45, monkeypatch)
    hold = (
        "import sys; from framework.runs.folder import RunFolder; from pathlib import Path\n"
        "held = RunFolder.existing(Path('runs/default/a')); print('held', flush=True)\n"
        "sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunError, match=f"is being written by process {holder.pid}"):
        train_run("run.name=a", "resume=auto")
    holder.kill()  # a lock dies with its holder
    holder.wait()
    assert train_run("run.name=a", "resume=auto")[0].steps == 80


def test_a_run_is_initialized_from_the_weights_of_another_run():
    first, _ = train_run("run.name=first")
    second, messages = train_run(
        "run.name=second", f"init_from={first.folder}", "trainer.max_steps=1"
    )
    assert messages == [f"6 of 6 tensors from {first.folder}"]
    assert second.metrics["val/loss"] < first.metrics["val/loss"] + 0.05
    _, messages = train_run(
        f"init_from={first.folder}", "model.width=[16,24]", "trainer.max_steps=1"
    )
    assert "3 of 6 tensors" in messages[0]
    assert "of another shape" in messages[0]
    with pytest.raises(
        RunError,
        match=r"only 1 of 6 tensors match, .*of the 3 weight matrices: .*the source has \(16, 64\)",
    ):
        train_run(f"init_from={first.folder}", "model.width=8", "trainer.max_steps=1")
    with pytest.raises(RunError, match=r"init_from=nope: there is no such run"):
        train_run("init_from=nope")
    with pytest.raises(RunError, match="none of its"):
        initialize_from(torch.nn.Linear(3, 3), str(first.folder))


def test_the_fingerprint_ignores_the_folder_of_a_run():
    one = spec_of("run.name=a").tree
    other = spec_of("run.name=b").tree
    assert fingerprint(one) == fingerprint(other)
    assert fingerprint(one) != fingerprint(spec_of("optimizer.lr=0.1").tree)
    assert compare_configs({"a": {"b": 1}}, {"a": {"b": 2, "c": {}}}) == {
        "a.b": "a.b=2 (was 1)",
        "a.c": "a.c={} (was None)",
    }


def test_a_setting_that_is_newer_than_a_run_had_its_default():
    assert (
        compare_configs(
            {"trainer": {"max_epochs": 1}}, {"trainer": {"max_epochs": 1, "fused": True}}
        )
        == {}
    )
    changed = compare_configs({"seed": 1}, {"seed": 1, "trainer": {"fused": False}})
    assert list(changed) == ["trainer.fused"]


def test_the_same_command_resumes_a_killed_process(tmp_path):
    command = [sys.executable, "-m", "framework", "train", *SMALL, "run.name=a", "resume=auto"]
    command += ["trainer.max_epochs=10", "callbacks.checkpoint.every=3steps"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoints = Path("runs/default/a/checkpoints")
    deadline = time.monotonic() + 60
    while not (checkpoints.is_dir() and listed(checkpoints)) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    second = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "resuming runs/default/a after step" in second.stdout
    assert status_of(Path("runs/default/a")) == "done"


def test_a_short_campaign_of_kills_finds_no_difference():
    script = Path(fw.__file__).parent.parent / "scripts" / "fault_campaign"
    done = subprocess.run(
        [sys.executable, script, "--runs", "3", "--kills", "4"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 runs bitwise equal after" in done.stdout


def test_the_campaign_detects_a_lost_random_state():
    script = Path(fw.__file__).parent.parent / "scripts" / "fault_campaign"
    arguments = ["--runs", "1", "--kills", "4", "--control"]
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    assert done.returncode == 1
    assert "other weights" in done.stdout
