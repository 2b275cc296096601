"""Short runs of the benchmarks: they measure the correct work; the figures are not tested."""

import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from benchmarks import (  # noqa: E402
    contender,
    loops,
    machine,
    memory,
    monitoring,
    ours,
    overhead,
    safety,
    speed,
    startup,
    sweep,
)
from benchmarks.contender import Enough, Job, Watch  # noqa: E402
from benchmarks.rounds import (  # noqa: E402
    Contender,
    Failed,
    Process,
    ratio,
    table,
    take_turns,
)
from benchmarks.speed import Course  # noqa: E402
from benchmarks.workloads import WORKLOADS, read  # noqa: E402
from runs import composed  # noqa: E402


def bench(*arguments):
    command = [sys.executable, str(ROOT / "scripts/bench"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def rows(printed):
    """Return the rows of the tables in a text: first cell to the other cells."""
    found = {}
    for line in printed.splitlines():
        if line.startswith("| "):
            first, *others = [cell.strip() for cell in line.strip("| ").split("|")]
            found[first] = others
    return found


@pytest.fixture
def job(tmp_path):
    splits, _ = read("mlp")
    data = tmp_path / "data.pt"
    torch.save(splits, data)
    return Job(
        "mlp",
        typical=False,
        device="cpu",
        folder=str(tmp_path),
        data=str(data),
        warm_epochs=1,
        epochs_per_round=2,
    )


class FakePipes:
    """The other end of a contender's pipes: sends orders and stores answers."""

    def __init__(self, monkeypatch, *orders):
        self.orders = [json.dumps(order) for order in orders]
        self.answers = []
        monkeypatch.setattr(sys, "stdin", self)

    def readline(self):
        return self.orders.pop(0)

    def write(self, text):
        if text.strip():
            self.answers.append(json.loads(text))

    def flush(self):
        pass


LOOPS = {name: place for name, place in speed.API.items() if (name, "mlp") not in speed.UNSUPPORTED}
LOOPS["ours, channels first"] = ("ours", "channels_first")


@pytest.mark.parametrize("typical", [False, True], ids=["bare", "typical"])
@pytest.mark.parametrize("name", [name for name in LOOPS if "compile" not in name])
def test_every_loop_trains_the_same_model_equally_far(name, typical, job, monkeypatch):
    module, function = LOOPS[name]
    train = getattr({"loops": loops, "ours": ours}[module], function)
    pipes = FakePipes(monkeypatch, "go", "go", "stop")
    with pytest.raises(Enough):
        train(job._replace(typical=typical), Watch(job, pipes))
    # one epoch of 45 steps to warm up, then 2 epochs per round
    assert [answer["steps"] for answer in pipes.answers] == [45, 90, 90]
    assert [answer["epochs"] for answer in pipes.answers] == [1, 3, 5]
    assert pipes.answers[-1]["loss"] == pytest.approx(0.16, abs=0.05)
    assert all(answer["cpu_seconds"] > 0 for answer in pipes.answers)
    event_files = list(Path(job.folder).rglob("events.out.tfevents*"))
    assert bool(event_files) is typical


def test_the_handwritten_loop_shows_a_progress_bar(job, monkeypatch, capsys):
    pytest.importorskip("tqdm")
    for typical in (True, False):
        with pytest.raises(Enough):
            loops.handwritten(
                job._replace(typical=typical), Watch(job, FakePipes(monkeypatch, "stop"))
            )
        assert ("epoch 0:   0%" in capsys.readouterr().err) is typical


def test_a_round_consists_of_complete_epochs(job, monkeypatch):
    pipes = FakePipes(monkeypatch, "go", "stop")
    watch = Watch(job, pipes)
    watch.updates = lambda: 45 * watch.epochs
    watch.loss = lambda: 0.5
    ends = []
    with pytest.raises(Enough):
        for _ in range(10):
            ends.append(watch.round_ends)
            watch.epoch_end()
    assert ends == [True, False, True]
    assert [answer["steps"] for answer in pipes.answers] == [45, 90]


def test_speed_prints_a_row_for_each_contender():
    names = ["handwritten", "ours"]
    options = ["--workloads", "mlp", "--modes", "bare", "--rounds", "1", "--seconds", "5"]
    done = bench("speed", *options, "--contenders", *names)
    assert (done.returncode, done.stderr) == (0, "")
    found = rows(done.stdout)
    assert list(found) == ["contender", *names]
    assert "| bare, µs a step |" in done.stdout
    assert found["contender"][0] == "bare, CPU µs a step"  # of the second table
    assert float(found["handwritten"][1]) == 1.0  # against itself
    assert float(found["ours"][0].replace(",", "")) > 0


@pytest.mark.skipif(contender.peak_bytes() is None, reason="needs /proc/self/status")
def test_memory_prints_the_peak_of_each_contender():
    names = ["handwritten", "ours, in memory, adamw by name"]
    options = ["--workloads", "mlp", "--modes", "typical", "--rounds", "1"]
    done = bench("api", "--memory", *options, "--contenders", *names)
    assert (done.returncode, done.stderr) == (0, "")
    found = rows(done.stdout)
    assert list(found) == ["contender", *names]
    assert found["handwritten"][1:] == ["1.00", "+0.00"]  # against itself
    assert 50 < float(found[names[1]][0].replace(",", "")) < 5000


@pytest.mark.skipif(contender.peak_bytes() is None, reason="needs /proc/self/status")
def test_peak_memory_is_that_of_the_process_without_its_parent():
    parent = b"x" * 2**28
    program = """
from benchmarks.contender import peak_bytes
before = peak_bytes()
block = b"x" * 2**27
print(before, peak_bytes())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT / "scripts")},
        capture_output=True,
        text=True,
        check=True,
    )
    before, after = map(int, done.stdout.split())
    assert before < contender.peak_bytes()
    assert after - before == pytest.approx(2**27, rel=0.2)
    assert parent  # kept until here


def test_memory_compares_with_the_checkpoint(job):
    assert memory.checkpoint_bytes(job) == 3 * 4 * (64 * 128 + 128 + 128 * 128 + 128 + 1290)
    peaks = {"handwritten": 100 * 2**20, "other": 130 * 2**20}
    found = rows(memory.comparison({"bare": peaks}, checkpoint=20 * 2**20))
    assert found["other"] == ["130", "1.30", "+1.50"]


def course(loss, steps=450, failed=""):
    return Course([100.0], [90.0], [steps], [loss], failed)


@pytest.mark.parametrize(
    ("suspect", "facts"),
    [
        (course(2.3), ["loss", "2.31", "2.3", "0.12"]),
        (course(0.1, steps=0), ["[0] steps", "450"]),
        (course(0.1, failed="ValueError: no"), ["failed: ValueError: no"]),
    ],
    ids=["does not learn", "does not step", "fails"],
)
def test_a_contender_that_does_not_train_is_reported(suspect, facts, job):
    job = job._replace(epochs_per_round=10)
    courses = {"one": course(0.1), "another": course(0.12)}
    assert speed.find_problems(courses, job) == []
    (problem,) = speed.find_problems(courses | {"suspect": suspect}, job)
    assert problem.startswith("suspect ")
    for fact in facts:
        assert fact in problem


def test_the_error_of_a_contender_is_reported(tmp_path):
    (tmp_path / "broken.py").write_text(
        "def train(job, watch):\n    raise ValueError('no such thing')\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'scripts'}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-m", "benchmarks.contender", "broken", "train"]
    job = Job("mlp", False, "cpu", str(tmp_path), "", 1, 1)
    done = subprocess.run(
        command,
        input=json.dumps(job._asdict()) + "\n",
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == {"failed": "ValueError: no such thing"}


def test_a_contender_that_was_killed_is_reported():
    process = Process(Contender("tight", sys.executable, "benchmarks.loops", "tight"), 1, "cpu")
    process.child.kill()
    process.child.wait()
    process.send({"x": 1})
    with pytest.raises(Failed):
        process.receive()
    process.close()  # the line that was not read causes no error


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["speed", "--contenders", "sklearn"], ["'sklearn'", "'handwritten'"]),
        (["monitoring", "--callbacks", "health,speed"], ["'health,speed'", "'health'"]),
        (
            ["monitoring", "--workloads", "sounds", "--callbacks", "sounds", "filters"],
            ["unknown 'filters'", "'sounds', 'spectrograms'"],
        ),
        (["speed", "--peers", "/nowhere"], ["--peers /nowhere", "/nowhere/bin/python"]),
        (["speed", "--rounds", "0"], ["--rounds", "1 or more", "0"]),
        (["sped"], ["invalid choice: 'sped'"]),
    ],
)
def test_a_wrong_command_line_gives_an_error(arguments, facts):
    done = bench(*arguments)
    assert done.returncode == 2
    for fact in facts:
        assert fact in done.stderr
    assert "Traceback" not in done.stderr


def test_startup_reports_the_error_of_a_command(tmp_path):
    with pytest.raises(Failed, match=r"-c exit\('no room'\) ended with status 1: no room"):
        startup.seconds([sys.executable, "-c", "exit('no room')"], str(tmp_path))
    command = [sys.executable, "-c", startup.PLAIN.replace("FUSED", "")]
    assert 0.1 < startup.seconds_to_first_step(command, str(tmp_path)) < 120


def test_safety_compares_saves_of_the_selected_size(tmp_path):
    weights, training = safety.state_of(10)
    tensors = list(weights.values())
    for moments in training["optimizer"]["state"].values():
        tensors += moments.values()
    size = sum(tensor.nbytes for tensor in tensors)
    assert size == pytest.approx(10 * 2**20, rel=0.05)
    found = rows(safety.saving([1], 1, tmp_path))
    assert len(found["1 MB"]) == 7
    assert (tmp_path / "ours" / "step-00000001" / "MANIFEST.json").exists()


def test_overhead_prints_its_three_tables(capsys):
    overhead.overhead(rounds=1, steps=200, epochs=10)
    found = rows(capsys.readouterr().out)
    assert {"0", "0 again", "5", "20", "200", "10"} <= found.keys()
    assert found["0"][1] == "1.000"


class Fits:
    """A process of `monitoring` in which each callback costs a tenth of the fit."""

    def __init__(self):
        self.lines = []

    def send(self, line):
        self.lines.append(line)

    def receive(self):
        (chosen,) = [each for each in self.lines[-1] if each.startswith("callbacks=")]
        names = [name for name in chosen.removeprefix("callbacks=").strip("[]").split(",") if name]
        return {"cpu_seconds": 1 + 0.1 * len(names), "seconds": 2 + 0.4 * len(names)}


def test_monitoring_compares_fits_with_and_without_each_callback():
    fits = Fits()
    found = rows(monitoring.costs("language_model", fits, None, rounds=2))
    assert found["none again"] == ["1.000", "1.000", "1.000", "0"]
    assert found["the default set"] == ["1.500", "1.500", "2.000", "500"]
    assert found["text_samples"] == ["1.100", "1.100", "1.200", "100"]
    assert "callbacks.attention.every=100steps" in next(
        line for line in fits.lines if "callbacks=[attention]" in line
    )


def test_a_fit_of_monitoring_trains_and_measures_it():
    line = ["data=blobs", "trainer.max_epochs=2", "callbacks=[checkpoint]", "loggers=[]"]
    times = monitoring.fit(line)
    assert 0 < times["cpu_seconds"] < 60
    assert 0 < times["seconds"] < 60


def test_sweep_counts_the_trials_of_each_launcher(monkeypatch, capsys):
    launchers = {name: sweep.LAUNCHERS[name] for name in ("vectorized", "Hydra's basic")}
    monkeypatch.setattr(sweep, "LAUNCHERS", launchers)
    assert sweep.sweep(["mlp"], trials=[2], rounds=1, epochs=1) == 0
    found = rows(capsys.readouterr().out)
    assert float(found["mlp, 2 trials, vectorized"][0]) > 0
    assert found["mlp, 2 trials, Hydra's basic"][1] == "1.00"


@pytest.mark.parametrize("model", sweep.MODELS)
def test_the_settings_of_a_sweep_are_valid(model):
    assert composed(sweep.MODELS[model]).parts["model"]


def test_threads_prints_the_size_from_which_all_cores_win(monkeypatch, capsys):
    cases = {name: machine.threads_cases()[name] for name in ("MLP 64-128-128", "MLP 64-64-64")}
    monkeypatch.setattr(machine, "threads_cases", lambda: cases)
    monkeypatch.setattr(machine, "SECONDS", 0.0)
    before = torch.get_num_threads()
    machine.threads(rounds=1)
    torch.set_num_threads(before)
    printed = capsys.readouterr().out
    assert list(rows(printed)) == ["step", "MLP 64-64-64", "MLP 64-128-128"]  # smallest first
    # (64·128 + 128·128 + 128·10) weights times 32 samples are 0.8 million
    assert rows(printed)["MLP 64-128-128"][0] == "0.8"
    assert "threads are 1.05 times as fast or more" in printed


@pytest.mark.parametrize(
    ("found", "size"),
    [([(1, 0.5), (3, 1.2), (2, 1.0)], 3), ([(1, 2.0), (2, 2.0)], 1), ([(1, 2.0), (2, 1.0)], None)],
)
def test_threads_pay_from_the_size_above_which_no_case_loses(found, size):
    assert machine.pays_from(found) == size


def test_formats_compares_the_same_step_in_two_layouts(monkeypatch, capsys):
    name, case = next(iter(machine.FORMATS.items()))
    monkeypatch.setattr(machine, "FORMATS", {name: case})
    monkeypatch.setattr(machine, "SECONDS", 0.0)
    before = torch.get_num_threads()
    machine.formats(rounds=1, threads=1)
    torch.set_num_threads(before)
    assert len(rows(capsys.readouterr().out)[name]) == 3
    for layout in machine.LAYOUTS.values():
        machine.training_step(case, layout)()


@pytest.mark.parametrize(
    "case",
    [*machine.threads_cases().values(), *machine.FORMATS.values()],
    ids=lambda case: str(case.shape),
)
def test_every_model_of_threads_and_formats_accepts_its_batch(case):
    with torch.no_grad():
        assert case.model()(torch.zeros(2, *case.shape[1:])).shape == (2, 10)


def test_contenders_take_turns():
    calls = []

    def call(name):
        calls.append(name)
        return float(len(calls))

    times = take_turns({"a": lambda: call("a"), "b": lambda: call("b")}, rounds=2, warm=1)
    assert calls == ["a", "b"] * 3
    assert times == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_a_ratio_compares_times_of_the_same_round():
    assert ratio([2.0, 40.0, 6.0], [1.0, 20.0, 2.0]) == 2.0  # the second round was slow for both


def test_a_table_aligns_numbers_to_the_right():
    assert table(["what", "µs"], [["loop", "1"]]).splitlines() == [
        "| what | µs |",
        "|------|---:|",
        "| loop |  1 |",
    ]


def test_bench_offers_every_workload():
    loader = importlib.machinery.SourceFileLoader("bench_script", str(ROOT / "scripts/bench"))
    spec = importlib.util.spec_from_loader("bench_script", loader)
    script = importlib.util.module_from_spec(spec)
    loader.exec_module(script)
    assert tuple(WORKLOADS) == script.WORKLOADS
    assert tuple(monitoring.WORKLOADS) == script.MONITORED


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_data_of_a_workload_fits_its_model(name):
    workload = WORKLOADS[name]
    splits, _ = read(name)
    inputs, targets = splits["train"]
    outputs = workload.model()(inputs[:2])
    assert len(inputs) == workload.train
    assert outputs.shape[0] == 2
    assert outputs.shape[2:] == targets.shape[1:]


def test_the_data_benchmark_prints_speed_and_memory(tmp_path):
    command = ["data", "--gigabytes", "0.01", "--rounds", "1", "--batch-sizes", "64"]
    done = bench(*command, "--folder", str(tmp_path))
    assert done.returncode == 0, done.stderr
    table = rows(done.stdout)
    assert set(table) >= {"reading", "training"}
    assert float(table["reading"][3]) > 0  # the ratio
    assert [file.suffix for file in tmp_path.iterdir()] == [".arrow"]
