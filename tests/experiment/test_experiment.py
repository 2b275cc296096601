"""From a checked specification to a run on disk, and back."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import framework as fw
from framework import Callback, TensorSplit, callbacks
from framework.composition.compose import CommandLine, run_composed
from framework.errors import BuildError, DataError, RunError
from framework.experiment.build import check_smallest_batch
from framework.experiment.experiment import Experiment, train
from framework.experiment.trained.load import open_run
from framework.runs.folder import RunFolder
from runs import logged

QUICK = [
    "trainer.max_epochs=2",
    "trainer.device=cpu",
    "loggers=json_lines",
    "~callbacks.progress",
    "model.width=16",
]


def composed(*overrides):
    jobs = []
    run_composed(CommandLine(list(overrides)), jobs.append)
    return jobs[0]


def trained(root, *overrides):
    job = composed(f"run.root={root}", *QUICK, *overrides)
    return train(job.spec, job.experiment, job.overrides)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs"))


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_folder_describes_the_run(result):
    names = {path.name for path in result.folder.glob("[!.]*")}
    description = {"config.yaml", "overrides.yaml", "provenance.json", "facts.json"}
    assert names == description | {"metrics.jsonl", "status.json", "checkpoints"}
    facts = json.loads((result.folder / "facts.json").read_text())
    assert (facts["in_shape"], facts["out_shape"], facts["classes"][:2]) == ([64], [10], ["0", "1"])
    provenance = json.loads((result.folder / "provenance.json").read_text())
    assert provenance["parts"]["model/mlp"].endswith(
        f"feedforward.py:{fw.models.get('mlp').source.line}"
    )
    assert json.loads((result.folder / "status.json").read_text())["status"] == "done"


def test_the_result_holds_the_metrics_of_all_splits(result):
    for split in ("train", "val", "test"):
        assert {f"{split}/loss", f"{split}/accuracy"} <= result.metrics.keys()
    assert (result.steps, result.stopped, result.signal) == (80, None, None)
    assert lines(result.folder)[-1]["test/accuracy"] == result.metrics["test/accuracy"]


def test_a_loaded_run_evaluates_and_predicts_the_same(result):
    opened = open_run(result.folder)
    assert opened.evaluate() == {
        name: value for name, value in result.metrics.items() if name.startswith("test/")
    }
    assert opened.evaluate("val")["val/loss"] == pytest.approx(
        result.metrics["val/loss"], rel=1e-6
    )  # the best is the last
    test = fw.datasets.build("digits").test
    assert isinstance(test, TensorSplit)
    predicted = opened.predict(test.tensors[0])["class_index"]
    assert (predicted == test.tensors[1]).float().mean().item() == pytest.approx(
        result.metrics["test/accuracy"]
    )
    assert open_run(result.folder, "last").checkpoint.name == "step-00000080"
    assert (
        open_run(result.folder, result.folder / "checkpoints" / "step-00000040").checkpoint.name
        == "step-00000040"
    )


def test_a_run_that_cannot_be_loaded_gives_the_reason(result, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(result.folder, copy, symlinks=True)
    with pytest.raises(RunError, match="there is no run folder"):
        open_run(tmp_path / "none")
    with pytest.raises(DataError, match="has no other split"):
        open_run(copy).evaluate("other")
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("width: 16", "width: 17"))
    with pytest.raises(RunError, match=r"does not fit the model of .*copy: .*size mismatch"):
        open_run(copy)
    for saved in (copy / "checkpoints").glob("step-*"):
        (saved / "model.safetensors").unlink()
    with pytest.raises(RunError, match=r"no undamaged checkpoint: .*model\.safetensors is missing"):
        open_run(copy, "last")
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(RunError, match="has no checkpoint: was it trained"):
        open_run(copy)
    status = copy / "status.json"
    status.write_text(status.read_text().replace('"done"', '"failed"'))
    with pytest.raises(RunError, match="ended before the first one was saved"):
        open_run(copy)
    status.write_text(status.read_text().replace('"failed"', '"running"'))
    folder = RunFolder.existing(copy)
    with pytest.raises(RunError, match="no checkpoint yet: it is running"):
        open_run(copy)
    folder.release()
    with pytest.raises(RunError, match="there is no checkpoint"):
        open_run(copy, copy / "checkpoints" / "step-00000040")
    (copy / "facts.json").write_text("{")
    with pytest.raises(RunError, match=r"facts\.json is not valid JSON"):
        open_run(copy)


# one command, one result


def test_one_command_in_two_processes_gives_the_same_bytes(tmp_path):
    def one(name):
        command = [
            sys.executable,
            "-m",
            "framework",
            "train",
            *QUICK,
            "model.dropout=0.2",
            f"run.name={name}",
        ]
        subprocess.run(
            command,
            cwd=tmp_path,
            check=True,
            capture_output=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        folder = tmp_path / "runs" / "default" / name
        weights = folder / "checkpoints" / "step-00000080" / "model.safetensors"
        return hashlib.sha256(weights.read_bytes()).hexdigest(), logged(folder)

    assert one("first") == one("second")


def test_initial_weights_depend_only_on_the_seed_and_the_model():
    def weights(*overrides):
        return list(Experiment(composed(*QUICK, *overrides).spec).model.parameters())

    first = weights()
    for other in (weights("optimizer=sgd", "loader.batch_size=8"), weights("data.split_seed=1")):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0], weights("seed=1")[0])


def test_an_initializer_fills_matrices_and_leaves_biases():
    model = Experiment(composed(*QUICK, "initializer=zeros").spec).model
    assert all(weight.count_nonzero() == 0 for weight in model.parameters() if weight.ndim > 1)
    assert all(bias.count_nonzero() > 0 for bias in model.parameters() if bias.ndim == 1)


# parts that do not fit are reported before training, and leave no files


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (
            ["metrics=mae"],
            DataError,
            r"metrics=mae: .* Digits has class targets; available: .*f1",
        ),
        (["task=regression"], DataError, r"task=classification"),
        (["model=cnn"], BuildError, r"\(64,\)"),
        (
            ["model.norm=batch", "loader.batch_size=157"],
            DataError,
            r"one sample|batch norm: expected at least 2 rows",
        ),
        (
            ["loader.batch_size=2000", "loader.drop_last=true"],
            DataError,
            r"drop_last leaves no batch: 1257 samples",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(overrides, error, message, tmp_path):
    quick = [each for each in QUICK if "=cnn" not in str(overrides) or "width" not in each]
    with pytest.raises(error, match=message):
        job = composed(f"run.root={tmp_path}", *quick, *overrides)
        train(job.spec, job.experiment, job.overrides)
    assert not list(tmp_path.iterdir())


def test_a_last_batch_of_one_sample_is_left_out_on_request(tmp_path):
    result = trained(tmp_path, "model.norm=batch", "loader.batch_size=157", "loader.drop_last=true")
    assert result.steps == 2 * (1257 // 157)


def test_a_batch_norm_of_torch_is_detected_too():
    experiment = Experiment(composed(*QUICK, "loader.batch_size=157").spec)
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 10))
    with pytest.raises(
        DataError,
        match=r"batch_size=157 makes a batch of one sample \(the last of 1,257.*drop_last=true",
    ):
        check_smallest_batch(model, experiment.train_batches)
    assert model[0].num_batches_tracked == 0
    check_smallest_batch(torch.nn.Sequential(torch.nn.Linear(64, 10)), experiment.train_batches)


# signals


@pytest.fixture
def interrupt():
    """A callback that sends signals to its own process, like a user or a scheduler."""

    class Interrupt(Callback):
        """Sends signals."""

        def __init__(self, number: int = 2, step: int = 5, twice: bool = False):
            self.number = number
            self.step = step
            self.times = 1 + twice

        def on_fit_start(self, trainer):
            for _ in range(self.times * (self.step == 0)):
                os.kill(os.getpid(), self.number)

        def on_step_end(self, trainer):
            for _ in range(self.times * (trainer.state.step == self.step)):
                os.kill(os.getpid(), self.number)

    callbacks.register("interrupt", Interrupt)
    yield
    del callbacks._entries["interrupt"]


@pytest.mark.parametrize(
    ("number", "step"), [(signal.SIGINT, 5), (signal.SIGTERM, 5), (signal.SIGTERM, 0)]
)
def test_a_signal_stops_a_run_after_the_step(interrupt, tmp_path, number, step):
    before = signal.getsignal(number)
    sent = [f"callbacks.interrupt.number={int(number)}", f"callbacks.interrupt.step={step}"]
    result = trained(tmp_path, "+callbacks=interrupt", *sent)
    assert (result.signal, result.stopped.signal, result.steps) == (number, number, step)
    assert (result.folder / "checkpoints" / f"step-{step:08d}" / "MANIFEST.json").exists()
    assert json.loads((result.folder / "status.json").read_text())["status"] == "stopped"
    assert "test/loss" not in result.metrics
    assert signal.getsignal(number) is before


def test_a_second_signal_stops_a_run_at_once(interrupt, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, "+callbacks=interrupt", "callbacks.interrupt.twice=true")
    [folder] = (tmp_path / "default").glob("[!.]*")
    assert json.loads((folder / "status.json").read_text())["status"] == "failed"


def test_loggers_know_the_metrics_before_they_open():
    experiment = Experiment(composed(*QUICK, "+metrics=f1").spec)
    assert [metric.name for metric in experiment.trainer().metrics] == ["accuracy", "f1"]


@pytest.mark.parametrize(("setting", "fused"), [("true", True), ("false", None)])
def test_trainer_fused_false_leaves_the_implementation_to_torch(setting, fused):
    job = composed("data=blobs", f"trainer.fused={setting}", "optimizer=adamw")
    assert Experiment(job.spec).optimizer.defaults["fused"] is fused
