"""Folders of an earlier version, interrupted in mid-epoch: this version reads and resumes them.

`make.py` wrote them, and `NAME.expected.json` with the results of the same commands without an
interruption. A resumed run must give the same bits if plain PyTorch does (`plain_training.sha256`);
with another processor or release of torch, rounding errors are allowed.
"""

import hashlib
import json
import shlex
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from framework.runs.checkpoint import listed, load, save, step_of

OLDER = Path(__file__).parent
RUNS = ["run", "plugin_run"]
FOLDERS = [*RUNS, "sweep", "vectorized_sweep", "search"]
TIMES = ("wall_seconds", "train/samples_per_second", "train/seconds_per_epoch")
TRIAL = ("number", "folder", "state", "settings", "steps")
ROUNDING = 1e-4
WEIGHTS = "weights"


def expected_of(name):
    return json.loads((OLDER / f"{name}.expected.json").read_text())


def copied(name, folder):
    """Copy a folder of that version into a working folder; return its relative path."""
    run = Path("runs/default") / name
    shutil.copytree(OLDER / name, folder / run, symlinks=True)
    shutil.copy(OLDER / "mine.py", folder)
    return run


def without_times(values):
    return {key: value for key, value in values.items() if key not in TIMES}


def run_outcome(run):
    """Return the logged values of a run, and a checksum of the newest weights."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    weights = (listed(run / "checkpoints")[-1] / "model.safetensors").read_bytes()
    checksum = hashlib.sha256(weights).hexdigest()
    return {"metrics": [without_times(line) for line in lines], WEIGHTS: checksum}


def outcome(folder):
    """Return the result of a run, or of each trial of a sweep."""
    if (folder / "metrics.jsonl").is_file():
        return run_outcome(folder)
    last = {}
    for line in (folder / "sweep.jsonl").read_text().splitlines():
        row = json.loads(line)
        last[row["number"]] = row
    trials = []
    for number in sorted(last):
        trial = {key: last[number][key] for key in TRIAL}
        trials.append(trial | {"metrics": without_times(last[number]["metrics"])})
    runs = {trial["folder"]: run_outcome(folder / trial["folder"]) for trial in trials}
    return {"trials": trials, "runs": runs}


def assert_close(found, expected, path=""):
    """Compare nested values, floats up to rounding, without the checksums of weights."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key, value in expected.items():
            if key != WEIGHTS:
                assert_close(found[key], value, f"{path}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), path
        for index, value in enumerate(expected):
            assert_close(found[index], value, f"{path}[{index}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=ROUNDING, abs=ROUNDING), path
    else:
        assert found == expected, path


def compare(found, expected, exact):
    if exact:
        assert found == expected
    else:
        assert_close(found, expected)


@pytest.fixture
def succeed(command):
    """Run a command that must succeed in the working folder; return its output."""

    def run(arguments):
        status, out, err = command(shlex.join(arguments))
        assert status == 0, err
        return out

    return run


def checksum_of_plain_training():
    """Return a checksum of weights that plain PyTorch trains.

    It depends on the processor and the release of torch.
    """
    torch.manual_seed(0)
    inputs = torch.randn(48, 13)
    targets = torch.randint(3, (48,))
    weights = hashlib.sha256()
    optimizers = (partial(torch.optim.Adam, amsgrad=True), partial(torch.optim.SGD, momentum=0.9))
    for make in optimizers:
        hidden = [nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.1)]
        model = nn.Sequential(nn.Linear(13, 8), *hidden, nn.Linear(8, 3))
        optimizer = make(model.parameters(), lr=0.02)
        for start in range(0, 480, 16):
            rows = slice(start % 48, start % 48 + 16)
            loss = nn.functional.cross_entropy(model(inputs[rows]), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for tensor in model.state_dict().values():
            weights.update(tensor.numpy().tobytes())
    return weights.hexdigest()


@pytest.fixture
def is_exact(one_thread):
    """Whether this machine gives the same bits as the machine that wrote the folders."""
    return checksum_of_plain_training() == (OLDER / "plain_training.sha256").read_text().strip()


@pytest.mark.usefixtures("one_thread", "forget_plugins")
@pytest.mark.parametrize("name", FOLDERS)
def test_an_older_folder_resumes_exactly(name, succeed, is_exact, tmp_path):
    expected = expected_of(name)
    folder = copied(name, tmp_path)
    before = outcome(folder)
    succeed(expected["resume"])
    found = outcome(folder)
    assert found != before
    compare(found, {key: expected[key] for key in found}, is_exact)


@pytest.mark.usefixtures("one_thread", "forget_plugins")
@pytest.mark.parametrize("name", RUNS)
def test_an_older_run_is_evaluated_and_predicts(name, succeed, is_exact, tmp_path):
    expected = expected_of(name)
    run = str(copied(name, tmp_path))
    plugins = ["--plugins", "mine.py"] if name == "plugin_run" else []
    found = {}
    for split in ("val", "test"):
        printed = succeed(["eval", run, "--split", split, "--json", *plugins])
        found.update(json.loads(printed)["metrics"])
    compare(found, expected["eval"], is_exact)
    (tmp_path / "inputs.csv").write_text(expected["inputs"])
    files = ["--input", "inputs.csv", "--output", "predicted.jsonl"]
    succeed(["predict", run, *files, *plugins])
    lines = (tmp_path / "predicted.jsonl").read_text().splitlines()
    predicted = [json.loads(line) for line in lines]
    compare(predicted, expected["predicted"], is_exact)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["sweep", "search"])
def test_the_best_run_of_an_older_sweep_is_evaluated(name, succeed, tmp_path):
    best = expected_of(name)["trials"][0]  # the only one that was done
    printed = succeed(["eval", str(copied(name, tmp_path) / "best"), "--json"])
    for key, value in json.loads(printed)["metrics"].items():
        assert value == pytest.approx(best["metrics"][key], rel=ROUNDING)


@pytest.mark.usefixtures("one_thread")
def test_one_changed_number_in_a_checkpoint_gives_another_result(succeed, tmp_path):
    """A control: the comparison detects one number in the optimizer's state."""
    expected = expected_of("run")
    run = copied("run", tmp_path)
    newest = listed(run / "checkpoints")[-1]
    model, training = load(newest)
    moments = training["optimizer"]["state"][0]["exp_avg"]
    moments.view(-1)[0] += 0.1
    step = step_of(newest)
    manifest = json.loads((newest / "MANIFEST.json").read_text())
    shutil.rmtree(newest)
    save(newest.parent, model, training, step, manifest["run"])
    succeed(expected["resume"])
    found = outcome(run)
    with pytest.raises(AssertionError):
        assert_close(found, {key: expected[key] for key in found})
    assert found[WEIGHTS] != expected[WEIGHTS]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(checksum_of_plain_training())
