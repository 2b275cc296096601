"""The benchmarks, in short runs: what is measured is right, whatever the figures are."""

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

from benchmarks import loops, machine, ours, overhead, safety, speed, startup, sweep  # noqa: E402
from benchmarks.contender import Enough, Job, Watch  # noqa: E402
from benchmarks.rounds import Failed, ratio, table, take_turns  # noqa: E402
from benchmarks.speed import Course  # noqa: E402
from benchmarks.workloads import WORKLOADS, read  # noqa: E402


def bench(*arguments):
    command = [sys.executable, str(ROOT / "scripts/bench"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def rows(printed):
    """The tables of a text: first cell to the other cells."""
    lines = [line.strip("| ").split("|") for line in printed.splitlines() if line.startswith("|")]
    return {
        line[0].strip(): [cell.strip() for cell in line[1:]]
        for line in lines
        if not line[0].startswith("--")
    }


@pytest.fixture
def job(tmp_path):
    splits, _ = read("mlp")
    torch.save(splits, tmp_path / "data.pt")
    return Job(
        "mlp",
        False,
        "cpu",
        str(tmp_path),
        str(tmp_path / "data.pt"),
        warm_epochs=1,
        epochs_per_round=2,
    )


class Asked:
    """Stands for the other end of a contender's pipes: gives orders, keeps answers."""

    def __init__(self, monkeypatch, *orders):
        self.orders, self.answers = [json.dumps(order) for order in orders], []
        monkeypatch.setattr(sys, "stdin", self)

    def readline(self):
        return self.orders.pop(0)

    def write(self, text):
        self.answers += [json.loads(text)] if text.strip() else []

    def flush(self):
        pass


@pytest.mark.parametrize("typical", [False, True], ids=["bare", "typical"])
@pytest.mark.parametrize(
    "train",
    [loops.handwritten, loops.tight, ours.eager, ours.channels_first],
    ids=["handwritten", "tight", "ours", "channels first"],
)
def test_every_loop_trains_the_same_model_equally_far(train, typical, job, monkeypatch):
    pipes = Asked(monkeypatch, "go", "go", "stop")
    with pytest.raises(Enough):
        train(job._replace(typical=typical), Watch(job, pipes))
    assert [said["steps"] for said in pipes.answers] == [45, 90, 90], (
        "45 to warm up, then 2 epochs a round"
    )
    assert [said["epochs"] for said in pipes.answers] == [1, 3, 5]
    assert pipes.answers[-1]["loss"] == pytest.approx(0.16, abs=0.05), (
        "after 5 epochs with this learning rate"
    )
    written = {
        path.name.partition(".tfevents")[0]
        for path in Path(job.folder).rglob("*")
        if path.is_file()
    }
    assert ("events.out" in written) is typical


def test_a_round_takes_whole_epochs_with_everything_in_them(job, monkeypatch):
    pipes = Asked(monkeypatch, "go", "stop")
    watch = Watch(job, pipes)
    watch.updates, watch.loss, ends = (lambda: 45 * watch.epochs), (lambda: 0.5), []
    with pytest.raises(Enough):
        for _ in range(10):
            ends.append(watch.round_ends)
            watch.epoch_end()
    assert ends == [True, False, True]
    assert [said["steps"] for said in pipes.answers] == [45, 90]


def test_speed_prints_a_row_for_each_contender():
    names = ["handwritten", "ours"]
    done = bench(
        *(
            "speed",
            "--workloads",
            "mlp",
            "--modes",
            "bare",
            "--rounds",
            "1",
            "--contenders",
            *names,
            "--seconds",
            "5",
        )
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = rows(done.stdout)
    assert list(found) == ["contender", *names]
    assert float(found["handwritten"][1]) == 1.0, "against itself"
    assert float(found["ours"][0].replace(",", "")) > 0


def course(loss, steps=450, failed=""):
    return Course([100.0], [steps], [loss], failed)


@pytest.mark.parametrize(
    ("suspect", "problem"),
    [
        (course(2.3), "suspect brought the loss from 2.31 to 2.3; usual was 0.12"),
        (course(0.1, steps=0), "suspect made [0] steps in its rounds, not 450 in each"),
        (course(0.1, failed="ValueError: no"), "suspect failed: ValueError: no"),
    ],
    ids=["does not learn", "does not step", "fails"],
)
def test_a_contender_that_does_not_train_is_found(suspect, problem, job):
    courses = {"one": course(0.1), "another": course(0.12), "suspect": suspect}
    assert speed.unsound(courses, job._replace(epochs_per_round=10)) == [problem]
    assert (
        speed.unsound(
            {"one": course(0.1), "another": course(0.12)}, job._replace(epochs_per_round=10)
        )
        == []
    )


def test_what_a_contender_fails_of_is_told(tmp_path):
    (tmp_path / "broken.py").write_text(
        "def train(job, watch):\n    raise ValueError('no such thing')\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'scripts'}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-m", "benchmarks.contender", "broken", "train"]
    job = Job("mlp", False, "cpu", str(tmp_path), "", 1, 1)
    said = subprocess.run(
        command,
        input=json.dumps(job._asdict()) + "\n",
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(said.stdout) == {"failed": "ValueError: no such thing"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["speed", "--contenders", "sklearn"],
            "bench: no contender 'sklearn'; there are 'handwritten'",
        ),
        (
            ["speed", "--peers", "/nowhere"],
            "bench: --peers /nowhere: /nowhere/bin/python does not run",
        ),
        (["speed", "--rounds", "0"], "argument --rounds: 0 is not 1 or more"),
        (["sped"], "invalid choice: 'sped'"),
    ],
)
def test_a_wrong_command_line_is_told(arguments, said):
    done = bench(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_startup_says_what_a_command_fails_of(tmp_path):
    with pytest.raises(Failed, match=r"-c exit\('no room'\) ended with status 1: no room"):
        startup.seconds([sys.executable, "-c", "exit('no room')"], str(tmp_path))
    started = [sys.executable, "-c", startup.PLAIN.replace("FUSED", "")]
    assert 0.1 < startup.seconds_to_first_step(started, str(tmp_path)) < 120


def test_safety_compares_saves_of_the_size_asked_for(tmp_path):
    weights, training = safety.state_of(10)
    moments = training["optimizer"]["state"].values()
    whole = sum(t.nbytes for t in weights.values()) + sum(
        t.nbytes for each in moments for t in each.values()
    )
    assert whole == pytest.approx(10 * 2**20, rel=0.05)
    found = rows(safety.saving([1], 1, tmp_path))
    assert len(found["1 MB"]) == 7
    assert (tmp_path / "ours" / "step-00000001" / "MANIFEST.json").exists()


def test_overhead_prints_its_three_tables(capsys):
    overhead.overhead(rounds=1, steps=200, epochs=10)
    found = rows(capsys.readouterr().out)
    assert {"0", "0 again", "5", "20", "200", "10"} <= found.keys()
    assert found["0"][1] == "1.000"


@pytest.mark.parametrize("model", sweep.MODELS)
def test_sweep_counts_the_trials_of_each_launcher(model, monkeypatch, capsys):
    monkeypatch.setattr(
        sweep,
        "LAUNCHERS",
        {name: sweep.LAUNCHERS[name] for name in ("vectorized", "Hydra's basic")},
    )
    assert sweep.sweep([model], trials=[2], rounds=1, epochs=1) == 0
    found = rows(capsys.readouterr().out)
    assert float(found[f"{model}, 2 trials, vectorized"][0]) > 0
    assert found[f"{model}, 2 trials, Hydra's basic"][1] == "1.00"


def test_threads_prints_where_all_cores_begin_to_win(monkeypatch, capsys):
    cases = {name: machine.threads_cases()[name] for name in ("MLP 64-128-128", "MLP 64-64-64")}
    monkeypatch.setattr(machine, "threads_cases", lambda: cases)
    monkeypatch.setattr(machine, "SECONDS", 0.0)
    before = torch.get_num_threads()
    machine.threads(rounds=1)
    torch.set_num_threads(before)
    printed = capsys.readouterr().out
    assert list(rows(printed)) == ["step", "MLP 64-64-64", "MLP 64-128-128"], "the smallest first"
    assert rows(printed)["MLP 64-128-128"][0] == "0.8", (
        "(64·128 + 128·128 + 128·10) weights times 32 samples"
    )
    assert "threads are 1.05 times as fast or more" in printed


@pytest.mark.parametrize(
    ("found", "size"),
    [([(1, 0.5), (3, 1.2), (2, 1.0)], 3), ([(1, 2.0), (2, 2.0)], 1), ([(1, 2.0), (2, 1.0)], None)],
)
def test_more_threads_pay_from_the_size_on_above_which_none_loses(found, size):
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
    ids=lambda c: str(c.shape),
)
def test_every_model_of_threads_and_formats_takes_its_batch(case):
    with torch.no_grad():
        assert case.model()(torch.zeros(2, *case.shape[1:])).shape == (2, 10)


def test_contenders_take_turns_and_ratios_are_of_the_same_round():
    calls = []
    parts = {
        "a": lambda: calls.append("a") or 2.0 * len(calls),
        "b": lambda: calls.append("b") or 1.0 * len(calls),
    }
    times = take_turns(parts, rounds=2, warm=1)
    assert calls == ["a", "b"] * 3
    assert {name: len(taken) for name, taken in times.items()} == {"a": 2, "b": 2}
    assert ratio([2.0, 40.0, 6.0], [1.0, 20.0, 2.0]) == 2.0, (
        "whatever slowed the second round slowed both"
    )
    assert table(["what", "µs"], [["loop", "1"]]).splitlines()[2] == "| loop |  1 |"


def test_every_workload_is_offered_and_fits_its_model():
    loader = importlib.machinery.SourceFileLoader("bench_script", str(ROOT / "scripts/bench"))
    script = importlib.util.module_from_spec(
        importlib.util.spec_from_loader("bench_script", loader)
    )
    loader.exec_module(script)
    assert tuple(WORKLOADS) == script.WORKLOADS
    for name, workload in WORKLOADS.items():
        (inputs, targets), _ = read(name)[0].values()
        outputs = workload.model()(inputs[:2])
        assert (len(inputs), outputs.shape[0], outputs.shape[2:]) == (
            workload.train,
            2,
            targets[:2].shape[1:],
        ), name
