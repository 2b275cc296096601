"""Every shipped experiment is exported, and its files give the outputs of the run without it.

    .venv/bin/python -m pytest -m slow -s tests/experiment/test_export_experiments.py

prints the table of plugins/exporters/README.md. Data sets that are fetched are replaced.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import framework as fw
from framework.experiment.trained import export
from framework.experiment.trained.export import export_run
from framework.experiment.trained.load import open_run
from runs import run_training
from substitutes import DATA, EXPERIMENTS, register_data

FORMATS = ("safetensors", "torch_export", "onnx")
SMALL = ["loader.batch_size=13", "loader.limit=2", "trainer.max_steps=3", "trainer.max_epochs=null"]
MONITORS = ("contrastive", "gan")  # experiments whose checkpoints follow values of other callbacks
ALONE = """
import json, sys, time
from pathlib import Path
import numpy as np, torch
try:
    import framework
    sys.exit("the framework can be imported")
except ImportError:
    pass
results = {}
for folder in map(Path, sys.argv[1:]):
    raw = dict(np.load(folder / "raw.npz"))
    tensors = [torch.from_numpy(each) for each in raw.values()]
    format = json.loads((folder / "metadata.json").read_text())["format"]
    if format == "onnx":
        import onnxruntime
        session = onnxruntime.InferenceSession(folder / "model.onnx")
        run = lambda: session.run(None, raw)
    elif format == "torch_export":
        program = torch.export.load(folder / "model.pt2").module()
        run = lambda: program(*tensors)
    else:
        from safetensors.torch import load_file
        space = {}
        exec((folder / "model.py").read_text(), space)
        weights = load_file(folder / "model.safetensors")
        run = lambda: space["forward"](weights, *tensors)
    run()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        outputs = run()
        times.append(time.perf_counter() - started)
    worst = 0.0
    expected = np.load(folder / "expected.npz")
    for name, found in zip(expected, outputs):
        value = expected[name]
        error = np.abs(np.asarray(found)[tuple(map(slice, value.shape))] - value).max()
        worst = max(worst, float(error / max(1, np.abs(value).max())))
    results[folder.name] = [min(times), worst]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def isolated(tmp_path_factory):
    """Run the code `ALONE` for folders of exports, in a process without the framework."""
    folder = tmp_path_factory.mktemp("isolated")
    (folder / "framework.py").write_text("raise ImportError('not installed')\n")
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}

    def run(*folders):
        command = [sys.executable, "-W", "ignore", "-c", ALONE, *map(str, folders)]
        output = subprocess.run(
            command, env=environment, capture_output=True, text=True, cwd=folder
        )
        assert output.returncode == 0, output.stderr
        return json.loads(output.stdout)

    return run


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
def test_an_experiment_is_exported(name, tmp_path, teacher, isolated, capsys):
    pytest.importorskip("onnxruntime")
    run = trained_run(name, tmp_path, teacher)
    exported = {}
    for to in FORMATS:
        trained = open_run(run)
        exported[to] = export_run(trained, to, tmp_path / to)
        assert exported[to].difference <= 1e-5
        save_samples(trained, exported[to].folder)
    measured = isolated(*[each.folder for each in exported.values()])
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
    _, rows = export.choose_split(trained.read_data())
    pipeline = export.build_pipeline(trained, rows)
    inputs = export.real_batches(pipeline, rows)[2]
    with torch.no_grad():
        expected = pipeline.named_outputs(inputs)
    about = json.loads((folder / "metadata.json").read_text())
    raw = {}
    for name, tensor in zip(about["inputs"], pipeline.preparation.recover(inputs), strict=True):
        array = tensor.numpy()
        smallest = about["inputs"][name]["smallest"]
        pairs = zip(smallest, array.shape[1:], strict=True)
        padding = [(0, max(0, least - size)) for least, size in pairs]
        raw[name] = np.pad(array, [(0, 0), *padding])
    np.savez(folder / "raw.npz", **raw)
    np.savez(folder / "expected.npz", **{name: each.numpy() for name, each in expected.items()})


def test_all_experiments_are_known():
    assert len(EXPERIMENTS) == 32
    assert set(DATA) <= set(EXPERIMENTS)
    assert set(FORMATS) <= {entry.name for entry in fw.exporters}
