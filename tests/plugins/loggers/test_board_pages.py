"""Every page of TensorBoard, through its own HTTP endpoints, for runs with all callbacks."""

import json
import multiprocessing
import os
import signal
import warnings
from urllib.parse import urlencode

import pytest
import torch
from werkzeug.test import Client

import framework as fw
from distributed_runs import run_in_processes
from framework.cli.main import main
from framework.experiment.experiment import Experiment
from framework.tuning.vectorized.trainer import StackedTrainer

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of a library that TensorBoard includes
    from tensorboard import program
    from tensorboard.backend import application
    from tensorboard.backend.event_processing.data_ingester import LocalDataIngester

    from framework.cli.hparams_page import plugins

OBSERVERS = "confusion,per_class,histograms,filters,embeddings,attention,augmented,speed"
OVERRIDES = (
    "data=digits",
    "data.image=true",
    "loader.batch_size=252",
    "model=stack",
    "model.blocks=[{name:conv2d,channels:4},{name:patch_embedding,width:8},transformer_encoder]",
    "model.head.pool=mean",
    "trainer.max_epochs=3",
    "trainer.log_every=2steps",
    f"callbacks=[checkpoint,{OBSERVERS}]",
    "callbacks.histograms.activations=true",
    "loggers=[tensorboard,json_lines]",
)
SESSIONS = {"experimentName": "", "allowedStatuses": ["STATUS_SUCCESS"], "sliceSize": 10}
STEPS = (5, 10, 15)  # the ends of the epochs
KILLED_AT = 12  # two steps after a checkpoint


class Curve(fw.Callback):
    """Logs a curve of precision and recall, and a sound, after each epoch."""

    changes_training = False

    def on_epoch_end(self, trainer):
        labels = torch.tensor([True, False, True, False])
        scores = torch.tensor([0.9, 0.2, 0.6, 0.7])
        for logger in trainer.loggers:
            logger.pr_curve("curve", labels, scores, trainer.state.step)
            logger.audio("tone", torch.linspace(-1, 1, 80)[None], 8000, trainer.state.step)


class Pages:
    """TensorBoard on a folder, in this process."""

    def __init__(self, folder):
        board = program.TensorBoard(plugins=plugins())
        options = ["--logdir", str(folder), "--reload_interval", "0", "--load_fast", "false"]
        board.configure(["", *options, "--reload_task", "blocking"])
        data = LocalDataIngester(board.flags)
        data.start()
        app = application.TensorBoardWSGIApp(
            board.flags, board.plugin_loaders, data.data_provider, board.assets_zip_provider
        )
        self.client = Client(app)
        self.runs = list(self.get("scalars/tags"))

    def raw(self, path, **parameters):
        """Return the body of an answer."""
        answer = self.client.get(f"/data/plugin/{path}?{urlencode(parameters)}")
        assert answer.status_code == 200, (path, answer.get_data(as_text=True))
        return answer.get_data()

    def get(self, path, **parameters):
        """Return the JSON of an answer."""
        return json.loads(self.raw(path, **parameters))

    def post(self, path, content):
        """Return the JSON of an answer to JSON."""
        answer = self.client.post(f"/data/plugin/{path}", json=content)
        assert answer.status_code == 200, (path, answer.get_data(as_text=True))
        return json.loads(answer.get_data())


class Kill(fw.Callback):
    """Ends the process like `kill -9` after a step."""

    changes_training = False

    def on_step_done(self, trainer):
        if trainer.state.step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder, overrides, killed):
    """Run the command `train` in a folder; if `killed`, kill it first, and then resume it.

    Returns:
        The exit status.
    """
    overrides = [*overrides, f"run.root={folder}"]
    if killed:
        arguments = ([Curve(), Kill()], overrides)
        process = multiprocessing.get_context("fork").Process(target=train_with, args=arguments)
        process.start()
        process.join()
        assert process.exitcode != 0
        overrides.append("resume=auto")
    return train_with([Curve()], overrides)


def train_with(callbacks, overrides):
    """Run the command `train` with more callbacks; return the exit status."""
    make_trainer = Experiment.trainer

    def with_callbacks(*args):
        trainer = make_trainer(*args)
        trainer.callbacks.extend(callbacks)
        return trainer

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(Experiment, "trainer", with_callbacks)
        main(["train", *overrides])
    return ended.value.code


def sessions(run):
    """Return the number of times that a run was started or resumed."""
    return len(list(run.glob("events.out.tfevents.*")))


KINDS = ("uninterrupted", "killed", "killed sweep", "killed ddp", "fsdp")


@pytest.fixture(scope="module", params=KINDS)
def pages(request, tmp_path_factory):
    """Train a run, or two trials of a sweep; return the pages."""
    root = tmp_path_factory.mktemp("runs")
    killed = "killed" in request.param
    kind = request.param.split()[-1]
    if kind in ("ddp", "fsdp"):
        folder = tmp_path_factory.mktemp("results")
        overrides = [*OVERRIDES, "run.name=pages", f"strategy={kind}"]
        statuses = run_in_processes(train, 2, folder, root, overrides, killed)
    elif kind == "sweep":
        overrides = [*OVERRIDES, "-m", "optimizer.lr=1e-3,1e-2", "sweep.name=pages"]
        statuses = [train(root, overrides, killed)]
    else:
        overrides = [*OVERRIDES, "run.name=pages"]
        statuses = [train(root, overrides, killed)]
    assert not any(statuses)
    pages = Pages(root)
    trials = ("/000_lr-0.001", "/001_lr-0.01") if kind == "sweep" else ("",)
    assert set(pages.runs) == {f"default/pages{trial}" for trial in trials}
    assert sessions(root / min(pages.runs)) == (2 if killed else 1)
    return pages


def steps_of(points, place=1):
    return [point[place] for point in points]


def test_each_scalar_has_each_step_once(pages):
    for run in pages.runs:
        tags = pages.get("scalars/tags")[run]
        expected = {"train/loss", "val/accuracy", "speed/data_wait", "val_per_class/f1/7"}
        assert expected <= tags.keys()
        assert not any(tag.startswith("test/") for tag in tags)
        for tag in tags:
            points = pages.get("scalars/scalars", run=run, tag=tag)
            logged = [2, 4, 5, 6, 8, 10, 12, 14, 15]
            assert steps_of(points) == (list(STEPS) if tag.startswith("val") else logged), tag


def test_custom_scalars_show_both_splits_and_all_classes(pages):
    layout = pages.get("custom_scalars/layout")
    charts = {}
    for category in layout["category"]:
        for chart in category["chart"]:
            charts[chart["title"]] = chart["multiline"]["tag"]
    assert list(charts) == ["loss", "accuracy", "precision", "recall", "f1"]
    for run in pages.runs:
        for title, count in (("loss", 2), ("recall", 10)):
            lines = {}
            for tag in charts[title]:
                found = pages.get("custom_scalars/scalars", run=run, tag=tag)
                lines |= found["tag_to_events"]
            assert len(lines) == count


def test_images(pages):
    for run in pages.runs:
        tags = pages.get("images/tags")[run]
        expected = {"attention/0", "attention/1", "augmented", "confusion", "filters"}
        assert set(tags) == expected
        for tag in tags:
            found = pages.get("images/images", run=run, tag=tag, sample=0)
            first = {"filters": [0], "augmented": [1]}.get(tag, [])
            assert [image["step"] for image in found] == [*first, *STEPS], tag
            body = pages.client.get(f"/data/plugin/images/individualImage?{found[-1]['query']}")
            assert body.get_data().startswith(b"\x89PNG"), tag


@pytest.mark.parametrize("page", ["histograms", "distributions"])
def test_histograms_and_distributions(pages, page):
    for run in pages.runs:
        tags = pages.get(f"{page}/tags")[run]
        groups = {tag.partition("/")[0] for tag in tags}
        assert groups == {"weights", "gradients", "activations"}
        for tag in ("weights/head.linear.weight", "activations/blocks.0.conv"):
            assert tag in tags
            points = pages.get(f"{page}/{page}", run=run, tag=tag)
            assert steps_of(points) == [1, 6, 11, 15]


def test_texts(pages):
    for run in pages.runs:
        tags = pages.get("text/tags")[run]
        assert set(tags) == {"config", "layers", "confusion/counts", "per_class", "test"}
        for tag, steps in (("config", [0]), ("layers", [0]), ("per_class", list(STEPS))):
            points = pages.get("text/text", run=run, tag=tag)
            assert [point["step"] for point in points] == steps, tag
        (test,) = pages.get("text/text", run=run, tag="test")
        assert "accuracy" in test["text"]


def test_audio(pages):
    for run in pages.runs:
        points = pages.get("audio/audio", run=run, tag="tone", sample=0)
        assert [point["step"] for point in points] == list(STEPS)
        body = pages.client.get(f"/data/plugin/audio/individualAudio?{points[-1]['query']}")
        assert body.get_data().startswith(b"RIFF")


def test_curves_of_precision_and_recall(pages):
    for run in pages.runs:
        found = pages.get("pr_curves/pr_curves", run=run, tag="curve")
        curves = found[run]
        assert [curve["step"] for curve in curves] == list(STEPS)
        assert curves[0]["recall"][0] == 1


def test_projector(pages):
    assert set(pages.get("projector/runs")) == set(pages.runs)
    run = pages.runs[0]
    info = pages.get("projector/info", run=run)
    (embedding,) = info["embeddings"]
    assert embedding["tensorName"] == "features (step 15)"
    rows, features = embedding["tensorShape"]
    name = embedding["tensorName"]
    tensor = pages.raw("projector/tensor", run=run, name=name, num_rows=rows)
    assert len(tensor) == 4 * rows * features
    labels = pages.raw("projector/metadata", run=run, name=name, num_rows=rows).decode()
    assert len(labels.splitlines()) == rows
    assert set(labels.split()) <= set("0123456789")
    sprite = pages.raw("projector/sprite_image", run=run, name=name)
    assert sprite.startswith(b"\x89PNG")


def test_graph(pages):
    for run in pages.runs:
        graph = pages.raw("graphs/graph", run=run, conceptual="false").decode()
        assert "conv2d" in graph
        assert "scaled_dot_product_attention" in graph


def test_hparams_have_the_test_values(pages):
    name = {"experiment_name": "", "hparamsLimit": 0}
    experiment = pages.post("hparams/experiment", name)
    names = [info["name"] for info in experiment["hparamInfos"]]
    assert {"optimizer.lr", "test/accuracy", "test/loss"} <= set(names)
    metrics = [info["name"]["tag"] for info in experiment["metricInfos"]]
    first = ["val/loss", "val/accuracy", "train/loss", "train/accuracy", "val_per_class/f1/0"]
    assert metrics[:5] == first, "the page shows five metrics"
    observed = min(map(metrics.index, ("speed/data_wait", "train/learning_rate")))
    assert observed > metrics.index("val_per_class/recall/9")
    groups = pages.post("hparams/session_groups", SESSIONS)["sessionGroups"]
    assert len(groups) == len(pages.runs)
    for group in groups:
        assert [value["name"]["tag"] for value in group["metricValues"]][:5] == first


@pytest.mark.parametrize("killed", [False, True], ids=["uninterrupted", "killed"])
def test_stacked_trials_have_the_pages_of_a_single_run(killed, tmp_path, monkeypatch):
    stacked = []
    run_stacked = StackedTrainer.run
    monkeypatch.setattr(StackedTrainer, "run", lambda trainer: stacked.append(run_stacked(trainer)))
    callbacks = "confusion,per_class,histograms,curves,worst,embeddings,speed"
    overrides = [
        "data=digits",
        "loader.batch_size=252",
        "trainer.max_epochs=3",
        "trainer.log_every=2steps",
        f"callbacks=[checkpoint,health,{callbacks}]",
        "callbacks.health.every=5steps",
        "loggers=[tensorboard]",
        "-m",
        "optimizer.lr=1e-3,1e-2",
        "hydra/launcher=vectorized",
        "hydra.launcher.processes=1",
        "sweep.name=s",
    ]
    assert train(tmp_path, overrides, killed) == 0
    assert len(stacked) == 1
    pages = Pages(tmp_path / "default/s")
    for run in ("000_lr-0.001", "001_lr-0.01"):
        assert sessions(tmp_path / "default/s" / run) == (2 if killed else 1)
        for tag in pages.get("scalars/tags")[run]:
            points = pages.get("scalars/scalars", run=run, tag=tag)
            logged = [2, 4, 5, 6, 8, 10, 12, 14, 15]
            assert steps_of(points) == (list(STEPS) if tag.startswith("val") else logged), tag
        images = pages.get("images/tags")[run]
        assert {"confusion", "curves", "worst/images"} <= set(images)
        for tag in ("confusion", "curves", "worst/images"):
            found = pages.get("images/images", run=run, tag=tag, sample=0)
            assert [image["step"] for image in found] == list(STEPS), tag
        for tag in pages.get("histograms/tags")[run]:
            points = pages.get("histograms/histograms", run=run, tag=tag)
            first = [1, 6, 11]  # of each epoch; weights are also logged at the end
            assert steps_of(points) == [*first, *([15] if "weights" in tag else [])], tag
        texts = pages.get("text/tags")[run]
        assert set(texts) >= {"config", "layers", "confusion/counts", "per_class", "health"}
        curves = pages.get("pr_curves/pr_curves", run=run, tag="curves/3")[run]
        assert [curve["step"] for curve in curves] == list(STEPS)
        info = pages.get("projector/info", run=run)
        assert info["embeddings"][0]["tensorName"] == "features (step 15)"
