"""Every shipped experiment is exported, and its files give the outputs of the run without it.

    .venv/bin/python -m pytest -m slow -s tests/experiment/test_export_experiments.py

prints the table of plugins/exporters/README.md. Data sets that are fetched are replaced.
"""

import json

import pytest
import torch

import framework as fw
from exports import measure, save_case
from framework.experiment.trained.export import export_run
from framework.experiment.trained.load import open_run
from framework.experiment.trained.pipeline import build_pipeline, choose_split, real_batches
from runs import run_training
from substitutes import DATA, EXPERIMENTS, register_data

FORMATS = ("safetensors", "torch_export", "onnx")
SMALL = ["loader.batch_size=13", "loader.limit=2", "trainer.max_steps=3", "trainer.max_epochs=null"]
MONITORS = ("contrastive", "gan")  # experiments whose checkpoints follow values of other callbacks


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    register_data()
    overrides = [f"run.root={folder}", "run.name=teacher", "callbacks=[checkpoint]"]
    return run_training(*overrides, "trainer.max_steps=3").folder


def trained_run(name, folder, teacher):
    """Train an experiment for three steps, and return the folder of its run."""
    overrides = [f"experiment={name}", f"run.root={folder}", *DATA.get(name, []), *SMALL]
    if name == "distillation":
        overrides.append(f"task.teacher={teacher}")
    if name in MONITORS:
        overrides += ["callbacks.checkpoint.monitor=val/loss", "callbacks.checkpoint.mode=min"]
    return run_training(*overrides).folder


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_exported(name, tmp_path, teacher, capsys):
    pytest.importorskip("onnxruntime")
    run = trained_run(name, tmp_path, teacher)
    exported = {}
    for to in FORMATS:
        trained = open_run(run)
        exported[to] = export_run(trained, to, tmp_path / to)
        assert exported[to].difference <= 1e-5
        save_samples(trained, exported[to].folder)
    (tmp_path / "alone").mkdir()
    measured = measure(tmp_path / "alone", *[each.folder for each in exported.values()])
    row = [f"{name:<24}"]
    for to, each in exported.items():
        milliseconds, difference = measured[to][0] * 1000, measured[to][1]
        assert difference <= 1e-5
        largest = max(difference, each.difference)
        size = sum(size for file, size in each.files.items() if file.startswith("model"))
        row.append(f"{size / 1000:,.0f} kB, {each.seconds:.0f} s, {milliseconds:.2f} ms")
        row.append(f"{largest:.0e}")
    with capsys.disabled():
        print("\n| " + " | ".join(row) + " |")


def save_samples(trained, folder):
    """Write raw inputs of seven real samples, and the outputs of the run for them."""
    _, rows = choose_split(trained.read_data())
    pipeline = build_pipeline(trained, rows)
    inputs = real_batches(pipeline, rows)[2]
    with torch.no_grad():
        expected = pipeline.named_outputs(inputs)
    about = json.loads((folder / "metadata.json").read_text())
    raw = {}
    for name, tensor in zip(about["inputs"], pipeline.preparation.recover(inputs), strict=True):
        padding = []
        for least, size in zip(about["inputs"][name]["smallest"], tensor.shape[1:], strict=True):
            padding = [0, max(0, least - size), *padding]
        raw[name] = torch.nn.functional.pad(tensor, padding)
    save_case(folder, raw, expected)


def test_all_experiments_are_known():
    assert len(EXPERIMENTS) == 32
    assert set(DATA) <= set(EXPERIMENTS)
    assert set(FORMATS) <= {entry.name for entry in fw.exporters}
