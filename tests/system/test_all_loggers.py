"""One run with all loggers that is killed and resumed: equal values, and none twice.

Each logger is read back with its own API: TensorBoard, csv, the records of W&B's offline file,
MlflowClient, and Trackio's storage. A tracker whose package is not installed is left out.
"""

import csv
import json
import os
import signal
import struct
import subprocess
import sys
from importlib.util import find_spec

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SETTINGS = {
    "wandb": "loggers.wandb.mode=offline",
    "mlflow": "loggers.mlflow.uri=sqlite:///mlflow.db",
}
SERVICES = [name for name in ("wandb", "mlflow", "trackio") if find_spec(name) is not None]
PARTS = """
import json, os, signal, time

import framework as fw


def sent(folder, service):
    file = folder / f"{service}.json"
    return json.loads(file.read_text())["sent"] if file.exists() else -1


@fw.callbacks.register("kill")
class Kill(fw.Callback):
    changes_training = False

    def __init__(self, at: int = 0):
        self.at = at

    def on_step_done(self, trainer):
        if trainer.state.step == self.at:
            deadline = time.monotonic() + 240
            saved = trainer.folder / "checkpoints/step-00000120"
            while any(sent(trainer.folder, name) < 120 for name in SERVICES) or not saved.exists():
                assert time.monotonic() < deadline
                time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)
"""
BLOCK = 2**15
FIRST, LAST = 1, 4  # types of a piece in a log of LevelDB: complete, and the last of several


def start(folder, *arguments):
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TRACKIO_DIR": str(folder / "trackio"),
        "HOME": str(folder),  # no account of W&B
    }
    command = [sys.executable, "-m", "framework", *arguments, "--plugins", "parts.py"]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that was killed after step 135 of 200, and resumed after step 120."""
    folder = tmp_path_factory.mktemp("loggers")
    (folder / "parts.py").write_text(f"SERVICES = {SERVICES}\n{PARTS}")
    killed = start(
        folder,
        "train",
        "trainer.max_epochs=5",
        "run.name=first",
        f"+loggers=[{','.join(['csv', *SERVICES])}]",
        *(SETTINGS[name] for name in SERVICES if name in SETTINGS),
        "+callbacks=[confusion,kill]",
        "callbacks.kill.at=135",
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    path = folder / "runs/default/first"
    for service in SERVICES:
        assert json.loads((path / f"{service}.json").read_text())["sent"] == 120, service
    resumed = start(folder, "resume", str(path), "callbacks.kill.at=0")
    assert resumed.returncode == 0, resumed.stderr
    assert "after step 120" in resumed.stdout + resumed.stderr
    return path


@pytest.fixture(scope="module")
def expected(run):
    """The values of metrics.jsonl by tag and step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return by_tag_and_step((row.pop("step"), row) for row in rows)


def by_tag_and_step(rows):
    """Return values by tag and step; fail if one is there twice."""
    found = {}
    for step, values in rows:
        for tag, value in values.items():
            if "/" not in tag or not isinstance(value, int | float):
                continue
            assert (tag, step) not in found, f"{tag} is logged twice at step {step}"
            found[tag, step] = value
    return found


def test_tensorboard(run, expected):
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            assert (tag, event.step) not in found
            found[tag, event.step] = event.value
    shown = {each: value for each, value in expected.items() if not each[0].startswith("test/")}
    assert found == pytest.approx(shown, rel=1e-6)  # in float32


def test_csv(run, expected):
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    numbers = [
        (int(row["step"]), {tag: float(cell) for tag, cell in row.items() if cell}) for row in rows
    ]
    assert by_tag_and_step(numbers) == expected


def test_wandb(run, expected):
    pytest.importorskip("wandb")
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")  # of one process: no row is repeated
    run_id = json.loads((run / "wandb.json").read_text())["id"]
    assert file.name == f"run-{run_id}.wandb"
    rows = []
    configs = []
    for record in wandb_records(file):
        values = {}
        for item in record.history.item:
            if len(item.nested_key) < 2:  # the others are parts of an image or a text
                values[item.key or item.nested_key[0]] = json.loads(item.value_json)
        if values:
            rows.append((values["_step"], values))
        configs += [item for item in record.run.config.update if item.key == "optimizer"]
    assert by_tag_and_step(rows) == expected
    assert json.loads(configs[0].value_json)["name"] == "adamw"
    assert list(run.glob("wandb/offline-run-*/files/media/images/confusion*.png"))


def wandb_records(file):
    """Yield the records of an offline run: a log of LevelDB after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = file.read_bytes()
    position = 7
    content = b""
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        content += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (FIRST, LAST):
            yield Record.FromString(content)
            content = b""


@pytest.mark.filterwarnings("ignore")  # SQLAlchemy warns of how MLflow uses it
def test_mlflow(run, expected):
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{run.parents[2]}/mlflow.db")
    experiment = client.get_experiment_by_name("default")
    (found,) = client.search_runs([experiment.experiment_id])
    rows = []
    for tag in found.data.metrics:
        history = client.get_metric_history(found.info.run_id, tag)
        rows += [(metric.step, {tag: metric.value}) for metric in history]
    assert by_tag_and_step(rows) == expected
    assert found.data.params["optimizer"] == "adamw"
    assert found.info.status == "FINISHED"
    artifacts = {artifact.path for artifact in client.list_artifacts(found.info.run_id)}
    assert {"config.md", "layers.md", "images"} <= artifacts


def test_trackio(run, expected, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(run.parents[2] / "trackio"))
    code = (
        "import json, sys; from trackio.sqlite_storage import SQLiteStorage as S;"
        "(name,) = S.get_runs('default');"
        "print(json.dumps([S.get_logs('default', name), S.get_run_config('default', name)]))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    rows, config = json.loads(output.stdout)
    assert by_tag_and_step((row["step"], row) for row in rows) == expected
    assert config["optimizer"] == "adamw"
    images = [row for row in rows for tag in row if tag == "confusion"]
    assert len(images) == len({row["step"] for row in images}) == 5
