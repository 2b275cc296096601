"""Run exported files in a process that can import neither the framework nor transformers."""

import json
import os
import subprocess
import sys

import numpy as np

MISSING = ("framework", "framework_plugins", "framework_conf", "transformers")
ALONE = """
import json, sys, time
from pathlib import Path
import numpy as np, torch

results = {}
for folder in map(Path, sys.argv[1:]):
    format = json.loads((folder / "metadata.json").read_text())["format"]
    if format == "onnx":
        import onnxruntime
        session = onnxruntime.InferenceSession(folder / "model.onnx")
        run = lambda raw: session.run(None, raw)
    else:
        if format == "torch_export":
            forward = torch.export.load(folder / "model.pt2").module()
        else:
            from functools import partial
            from safetensors.torch import load_file
            space = {}
            exec((folder / "model.py").read_text(), space)
            forward = partial(space["forward"], load_file(folder / "model.safetensors"))
        run = lambda raw: forward(*map(torch.from_numpy, raw.values()))
    worst = 0.0
    for case in folder.glob("raw*.npz"):
        raw = dict(np.load(case))
        run(raw)
        times = []
        for _ in range(5):
            started = time.perf_counter()
            outputs = run(raw)
            times.append(time.perf_counter() - started)
        expected = np.load(case.with_name(case.name.replace("raw", "expected")))
        for name, found in zip(expected, outputs, strict=True):
            value = expected[name]
            error = np.abs(np.asarray(found)[tuple(map(slice, value.shape))] - value).max()
            worst = max(worst, float(error / max(1, np.abs(value).max())))
    results[folder.name] = [min(times), worst]
print(json.dumps(results))
"""


def run_alone(folder, *arguments):
    """Run Python with arguments in a process without the framework; return its lines of JSON.

    Args:
        folder: an empty folder for modules that cannot be imported.

    Returns:
        The dict that the lines are parts of; the text of stderr if the process fails.
    """
    for name in MISSING:
        (folder / f"{name}.py").write_text("raise ImportError('not installed')\n")
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        return done.stderr
    outputs = {}
    for line in done.stdout.splitlines():
        outputs.update(json.loads(line))
    return outputs


def measure(folder, *exports):
    """Run the cases of exports in a process without the framework.

    Returns:
        For each name of an export, the seconds of a call and the largest difference.
    """
    found = run_alone(folder, "-c", ALONE, *exports)
    assert isinstance(found, dict), found
    return found


def save_case(folder, raw, expected, name=""):
    """Write raw inputs for an export, and the outputs of the run, for `measure`."""
    np.savez(folder / f"raw{name}.npz", **{key: each.numpy() for key, each in raw.items()})
    arrays = {key: each.numpy() for key, each in expected.items()}
    np.savez(folder / f"expected{name}.npz", **arrays)
