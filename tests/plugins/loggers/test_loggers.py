"""Files of the loggers, read back by TensorBoard itself and by a JSON parser."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
import wave

import numpy
import pytest
import torch
from google.protobuf.text_format import Parse
from PIL import Image
from sklearn.metrics import precision_recall_curve
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import nn

import framework as fw


def log(folder, name="tensorboard", step=0, metrics=("loss",), **settings):
    logger = fw.loggers.build(name, **settings)
    logger.open(folder, step, metrics)
    return logger


def scalars(logger, values, step, epoch=0, wall_seconds=0.0):
    logger.scalars(values, step=step, epoch=epoch, wall_seconds=wall_seconds)


def read(folder) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0}).Reload()


def tensors(events, tag):
    return [event.tensor_proto for event in events.Tensors(tag)]


def test_tensorboard_reads_the_scalars(tmp_path):
    board = log(tmp_path)
    scalars(board, {"train/loss": 0.5, "train/accuracy": 0.25}, step=10)
    scalars(board, {"train/loss": math.nan, "val/loss": math.inf}, step=20)
    board.close()
    board.close()
    scalars(board, {"late": 1.0}, step=30)  # after close: nothing, and no error
    events = read(tmp_path)
    assert sorted(events.Tags()["scalars"]) == ["train/accuracy", "train/loss", "val/loss"]
    assert [(e.step, e.value) for e in events.Scalars("train/accuracy")] == [(10, 0.25)]
    assert math.isnan(events.Scalars("train/loss")[1].value)
    assert events.Scalars("val/loss")[0].value == math.inf


def test_a_resumed_run_discards_the_records_after_its_checkpoint(tmp_path):
    first = log(tmp_path)
    for step in range(10, 60, 10):
        scalars(first, {"train/loss": 1.0}, step)
    first.close()
    second = log(tmp_path, step=30)
    for step in range(40, 70, 10):
        scalars(second, {"train/loss": 2.0}, step)
    second.close()
    curve = [(e.step, e.value) for e in read(tmp_path).Scalars("train/loss")]
    assert curve == [(10, 1), (20, 1), (30, 1), (40, 2), (50, 2), (60, 2)]


def test_a_run_that_starts_again_discards_all_records(tmp_path):
    for value in (1.0, 2.0):  # killed before its first checkpoint
        logger = log(tmp_path)
        scalars(logger, {"start": value}, 0)
        scalars(logger, {"train/loss": value}, 1)
        logger.close()
    events = plugin_event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    for tag, step in (("start", 0), ("train/loss", 1)):
        points = [(e.step, float(*e.tensor_proto.float_val)) for e in events.Tensors(tag)]
        assert points == [(step, 2.0)], tag


def test_a_killed_run_keeps_all_its_records(tmp_path):
    code = f"""
import framework as fw
from pathlib import Path
fw.registry.discovery.load_plugin("framework_plugins.loggers.tensorboard")
board = fw.loggers.build("tensorboard")
board.open(Path({str(tmp_path)!r}), 0, [])
for step in range(500):
    board.scalars({{"loss": step}}, step=step, epoch=0, wall_seconds=0)
print("done", flush=True)
import time; time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "done\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(read(tmp_path).Scalars("loss")) == 500


def test_each_chart_shows_training_and_validation(tmp_path):
    board = log(tmp_path, metrics=["loss", "f1.macro"])
    scalars(board, {"train/loss": 1, "train/real": 0.5, "train/speed": 3}, step=1)
    scalars(board, {"val/loss": 1, "val/real": 0.4, "val/distance": 7}, step=1)
    board.close()
    layouts = tensors(read(tmp_path), "custom_scalars__config__")
    layout = Layout.FromString(layouts[-1].string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for chart in layout.category[0].chart}
    assert charts == {
        "loss": ["^train/loss$", "^val/loss$"],
        "f1.macro": [r"^train/f1\.macro$", r"^val/f1\.macro$"],
        "real": ["^train/real$", "^val/real$"],
    }


def test_records_of_an_evaluation_leave_the_charts_of_the_run(tmp_path):
    board = log(tmp_path)
    board.charts("classes", {"recall": "recall/"})
    scalars(board, {"train/loss": 1}, step=1)
    board.close()
    board = log(tmp_path)
    board.text("worst/table", "...")
    board.close()
    layouts = tensors(read(tmp_path), "custom_scalars__config__")
    layout = Layout.FromString(layouts[-1].string_val[0])
    assert [category.title for category in layout.category][1:] == ["classes"]


def test_test_values_of_several_steps_are_a_chart(tmp_path):
    board = log(tmp_path)
    for step in (10, 20, 30):
        scalars(board, {"test/loss": 1 / step, "val/loss": 0.5}, step=step)
    board.close()
    events = read(tmp_path)
    assert [event.step for event in events.Scalars("test/loss")] == [10, 20, 30]
    assert "test" not in events.Tags()["tensors"]


def test_hparams_are_in_the_same_run_with_their_types(tmp_path):
    board = log(tmp_path)
    scalars(board, {"val/loss": 0.1}, step=40)
    optimizer = {
        "name": "adamw",
        "lr": 1e-3,
        "betas": [0.9, 0.999],
        "amsgrad": False,
        "momentum": None,
    }
    board.hparams({"optimizer": optimizer, "seed": 3}, {"val/loss": 0.1, "test/accuracy": 0.9})
    board.close()
    assert len(list(tmp_path.rglob("*"))) == 1  # one file, no folder for a second run
    events = read(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("val/loss")] == [(40, pytest.approx(0.1))]
    assert events.Tags()["scalars"] == ["val/loss"]  # no chart with one point
    assert "test" in events.Tags()["tensors"]
    table = tensors(events, "test")[0].string_val[0].decode()
    assert table.splitlines()[2:] == ["| accuracy | 0.9 |"]
    content = {
        tag: HParamsPluginData.FromString(c)
        for tag, c in events.PluginTagToContent("hparams").items()
    }
    recorded = {}
    for name, value in content["_hparams_/session_start_info"].session_start_info.hparams.items():
        kind = value.WhichOneof("kind")
        recorded[name] = (kind, getattr(value, kind))
    assert recorded == {
        "optimizer": ("string_value", "adamw"),
        "optimizer.lr": ("number_value", 1e-3),
        "optimizer.betas": ("string_value", "[0.9, 0.999]"),
        "optimizer.amsgrad": ("bool_value", False),
        "seed": ("number_value", 3),
        "test/accuracy": ("number_value", 0.9),
    }
    assert content["_hparams_/session_end_info"].session_end_info.status == 1  # success


def test_texts_images_and_histograms(tmp_path):
    board = log(tmp_path, bins=10)
    board.text("config", "# Title", step=3)
    pictures = torch.rand(2, 3, 5, 7)
    board.images("inputs", pictures, 4)
    board.images("grey", torch.tensor([[[[0.0, 1.0, 2.0, -1.0, math.nan]]]]), 4)
    values = torch.randn(10_000)
    board.histogram("weights", torch.cat([values, torch.tensor([math.nan, math.inf])]), 5)
    board.histogram("same", torch.ones(4, dtype=torch.bfloat16), 5)
    board.histogram("nothing", torch.tensor([math.nan]), 5)
    board.histogram("large", torch.tensor([1.0, 1e39], dtype=torch.float64), 5)
    board.close()
    events = read(tmp_path)
    assert tensors(events, "config")[0].string_val[0] == b"# Title"
    width, height, *encoded = tensors(events, "inputs")[0].string_val
    assert (width, height, len(encoded)) == (b"7", b"5", 2)
    decoded = numpy.asarray(Image.open(io.BytesIO(encoded[1])))
    assert numpy.array_equal(decoded, (pictures[1] * 255).round().byte().permute(1, 2, 0).numpy())
    grey = numpy.asarray(Image.open(io.BytesIO(tensors(events, "grey")[0].string_val[2])))
    assert grey.tolist() == [[0, 255, 255, 0, 0]]
    bars = numpy.frombuffer(tensors(events, "weights")[0].tensor_content).reshape(-1, 3)
    counts, edges = numpy.histogram(values.numpy(), 10)
    assert numpy.abs(bars[:, 2] - counts).max() <= 1  # a value on an edge may fall either way
    assert bars[:, 2].sum() == 10_000
    assert numpy.allclose(bars[:, 0], edges[:-1])
    assert numpy.frombuffer(tensors(events, "same")[0].tensor_content).tolist() == [1, 1, 4]
    assert tensors(events, "nothing")[0].tensor_content == b""
    assert numpy.frombuffer(tensors(events, "large")[0].tensor_content).tolist() == [1, 1, 1]


def test_a_curve_of_precision_and_recall_is_that_of_scikit_learn(tmp_path):
    labels = torch.rand(2000) < 0.3
    scores = (torch.rand(2000) + labels * 0.3).clamp(0, 1)
    scores = (scores.double() * 126).round() / 126  # on the thresholds, where both count the same
    board = log(tmp_path)
    board.pr_curve("spam", labels, scores, 5)
    board.close()
    value = tensors(read(tmp_path), "spam")[0]
    rows = numpy.frombuffer(value.tensor_content, numpy.float32).reshape(6, 127)
    found = precision_recall_curve(labels.numpy(), scores.numpy())
    for precision, recall, threshold in zip(*found, strict=False):
        column = rows[:, round(threshold * 126)]
        assert column[4:].tolist() == pytest.approx([precision, recall], abs=1e-6)
        assert column[:4].sum() == 2000


def test_a_sound_is_a_wav_file(tmp_path):
    board = log(tmp_path)
    board.audio("tone", torch.tensor([[0.0, 1.0, -1.0, 2.0, math.nan]]), 8000, 3)
    board.close()
    sound, label = tensors(read(tmp_path), "tone")[0].string_val
    with wave.open(io.BytesIO(sound)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (8000, 1, 2)
        samples = numpy.frombuffer(file.readframes(9), "<i2")
    assert samples.tolist() == [0, 32767, -32767, 32767, 0]
    assert label == b""


def test_an_embedding_is_written_for_the_projector(tmp_path):
    board = log(tmp_path)
    for step in (1, 2):  # the second one replaces the first one
        board.embedding(
            "val/x", torch.eye(3) * step, ["a", "b\tc", "d"], step, torch.rand(3, 1, 4, 6)
        )
    board.close()
    config = Parse((tmp_path / "projector_config.pbtxt").read_text(), ProjectorConfig())
    (entry,) = config.embeddings
    assert list(entry.tensor_shape) == [3, 3]
    assert (tmp_path / entry.tensor_path).read_text() == "2\t0\t0\n0\t2\t0\n0\t0\t2\n"
    assert (tmp_path / entry.metadata_path).read_text() == "a\nb c\nd\n"
    assert list(entry.sprite.single_image_dim) == [6, 4]
    assert Image.open(tmp_path / entry.sprite.image_path).size == (12, 8)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.drop = nn.Dropout(0.5)

    def forward(self, inputs):
        return {"logits": self.drop(inputs + self.body(inputs))}


def test_the_graph_shows_modules_and_tracing_changes_nothing(tmp_path):
    model = Residual()
    model.body[1].eval()
    inputs = torch.rand(8, 4)
    board = log(tmp_path)
    random_state = torch.get_rng_state()
    mean = model.body[1].running_mean.clone()
    board.graph(model, inputs)
    board.close()
    graph = GraphDef.FromString(read(tmp_path)._graph)
    nodes = {node.name: list(node.input) for node in graph.node}
    linear_inputs = ["input", "body/0 (Linear)/weight", "body/0 (Linear)/bias"]
    assert nodes["body/0 (Linear)/linear"] == linear_inputs
    assert nodes["add"] == ["input", "body/1 (BatchNorm1d)/batch_norm"]
    assert nodes["output"] == ["drop (Dropout)/dropout"]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(model.body[1].running_mean, mean)
    assert model.training
    assert not model.body[1].training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Sum(nn.Module):
    def forward(self, ids, mask):
        return ids.float() * mask


@pytest.mark.parametrize(
    ("as_inputs", "names"),
    [
        (lambda ids, mask: {"mask": mask, "ids": ids}, ["input/ids", "input/mask"]),
        (lambda ids, mask: (ids, mask), ["input/0", "input/1"]),
    ],
)
def test_the_graph_of_a_model_with_several_inputs(tmp_path, as_inputs, names):
    board = log(tmp_path)
    board.graph(Sum(), as_inputs(torch.arange(6).reshape(2, 3), torch.ones(2, 3)))
    board.close()
    graph = GraphDef.FromString(read(tmp_path)._graph)
    nodes = {node.name: list(node.input) for node in graph.node}
    assert nodes["float"] == [names[0]]
    assert nodes["mul"] == ["float", names[1]]
    shapes = [d.size for d in graph.node[0].attr["_output_shapes"].list.shape[0].dim]
    assert shapes == [1, 3]


class Adversaries(nn.Module):
    def __init__(self):
        super().__init__()
        self.discriminator = nn.Linear(3, 1)
        self.generator = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))

    def forward(self, inputs):
        return self.discriminator(inputs)

    def sample(self, count):
        return self.generator(torch.randn(count, 2))


def nodes_of(folder, model, inputs):
    """Return the inputs of each node in the graph of a model."""
    board = log(folder)
    board.graph(model, inputs)
    board.close()
    graph = GraphDef.FromString(read(folder)._graph)
    return {node.name: list(node.input) for node in graph.node}


def test_the_graph_of_a_gan_has_both_networks(tmp_path):
    model = Adversaries()
    inputs = torch.rand(2, 3)
    random_state = torch.get_rng_state()
    nodes = nodes_of(tmp_path, model, inputs)
    assert nodes["output"] == ["discriminator (Linear)/linear"]
    generator = ["randn", "generator/0 (Linear)/weight", "generator/0 (Linear)/bias"]
    assert nodes["generator/0 (Linear)/linear"] == generator
    assert nodes["samples"] == ["generator/1 (BatchNorm1d)/batch_norm"]
    assert torch.equal(torch.get_rng_state(), random_state)


def test_samples_are_not_drawn_if_the_forward_pass_has_all_parameters(tmp_path):
    model = Adversaries()
    model.generator = nn.Sequential(nn.Tanh())
    nodes = nodes_of(tmp_path, model, torch.rand(2, 3))
    assert "samples" not in nodes
    model.generator = nn.Linear(5, 3)  # fails
    nodes = nodes_of(tmp_path / "failing", model, torch.rand(2, 3))
    assert nodes["output"] == ["discriminator (Linear)/linear"]


def test_a_model_that_fails_in_tracing_leaves_a_text(tmp_path):
    board = log(tmp_path)
    board.graph(nn.Linear(3, 3), torch.rand(2, 4))
    board.close()
    text = tensors(read(tmp_path), "graph")[0].string_val[0]
    assert b"mat1 and mat2 shapes cannot be multiplied" in text
    without_graph = log(tmp_path / "without", graph=False)
    without_graph.graph(nn.Linear(3, 3), torch.rand(2, 3))
    without_graph.close()
    assert not read(tmp_path / "without").Tags()["graph"]


def test_records_equal_those_of_the_record_writer_of_tensorboard(tmp_path):
    board = log(tmp_path)
    for step in range(20):
        scalars(board, {"loss": step / 3}, step)
    board.text("long", "x" * 10_000)
    board.close()
    (file,) = tmp_path.iterdir()
    reference = io.BytesIO()
    writer = RecordWriter(reference)
    for record in RawEventFileLoader(str(file)).Load():
        writer.write(record)
    assert file.read_bytes() == reference.getvalue()


def test_files_of_one_second_are_read_in_order(tmp_path):
    for _ in range(3):
        log(tmp_path).close()
        time.sleep(0.001)
    by_name = sorted(tmp_path.iterdir())
    by_time = sorted(tmp_path.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    assert by_name == by_time


def read_rows(folder):
    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_json_lines_are_written_without_buffering_and_are_valid_json(tmp_path):
    logger = log(tmp_path, "json_lines")
    scalars(logger, {"val/loss": 0.08, "val/accuracy": 1}, step=450, epoch=10, wall_seconds=3.20049)
    assert read_rows(tmp_path) == [
        {"step": 450, "epoch": 10, "wall_seconds": 3.2, "val/loss": 0.08, "val/accuracy": 1.0}
    ]
    scalars(logger, {"a": math.nan, "b": -math.inf, "c": torch.tensor(0.5)}, step=451)
    logger.close()
    assert read_rows(tmp_path)[1] == {
        "step": 451,
        "epoch": 0,
        "wall_seconds": 0.0,
        "a": None,
        "b": None,
        "c": 0.5,
    }


@pytest.mark.parametrize(("resumed_at", "kept"), [(0, []), (2, [1, 2]), (9, [1, 2, 3])])
def test_a_resumed_run_drops_the_lines_after_its_checkpoint(tmp_path, resumed_at, kept):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "tr'
    )
    logger = log(tmp_path, "json_lines", step=resumed_at)
    scalars(logger, {}, step=10)
    logger.close()
    assert [row["step"] for row in read_rows(tmp_path)] == [*kept, 10]


def test_the_console_logger_prints_a_line_per_step(capsys):
    logger = log(None, "console", digits=2)
    scalars(
        logger, {"val/loss": 0.0812, "val/accuracy": 0.97}, step=450, epoch=10, wall_seconds=3.21
    )
    logger.close()
    assert (
        capsys.readouterr().out == "step 450  epoch 10  3.2 s  val/loss 0.081  val/accuracy 0.97\n"
    )


@pytest.mark.parametrize("name", ["tensorboard", "json_lines"])
def test_a_run_without_a_folder_warns_that_nothing_is_recorded(name):
    with pytest.warns(UserWarning, match=f"no folder, so the {name} logger records nothing"):
        logger = log(None, name)
    scalars(logger, {"loss": 1.0}, step=1)
    logger.text("a", "b")
    logger.histogram("a", torch.ones(3), 1)
    logger.images("a", torch.ones(1, 1, 2, 2), 1)
    logger.graph(nn.Linear(1, 1), torch.ones(1, 1))
    logger.hparams({}, {"loss": 1.0})
    logger.close()
