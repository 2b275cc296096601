"""A killed search goes on with the same trials; failed trials do not end it."""

import json
import math
import random

import pytest
from optuna.trial import TrialState

from framework.errors import ConfigError, RunError
from framework.runs.sweep_files import Trial
from framework.tuning.search.importance import charts, importance_table, importances, value_range
from framework.tuning.search.search import SearchLoop
from framework.tuning.search.settings import read_search
from framework.tuning.search.space import Space
from framework.tuning.search.study import (
    JOURNAL_FILE,
    Journal,
    Judge,
    cached_storage,
    create_study,
    make_pruner,
)
from framework.tuning.sweep.folder import SweepFolder

SPACE = [
    "optimizer=sgd,adamw",
    "++optimizer.lr=tag(log, interval(1e-5, 1e-1))",
    "++model.depth=range(1, 4)",
]
METRICS = ["val/loss"]


class Killed(BaseException):
    """Stands for a SIGKILL: no code catches it."""


def loss(overrides):
    """Return a loss that is best for a learning rate of 0.003, few layers, and adamw."""
    settings = dict(text.lstrip("+").split("=") for text in overrides)
    rate = math.log10(float(settings["optimizer.lr"]) / 3e-3)
    return rate**2 + 0.3 * (settings["optimizer"] == "sgd") + 0.1 * int(settings["model.depth"])


class Launcher:
    """Trains nothing: it records a loss or a state for each trial."""

    def __init__(self, folder, outcome=loss, before=lambda: None):
        self.folder = folder
        self.outcome = outcome
        self.before = before
        self.launched = []

    def __call__(self, batch):
        for number, overrides in batch.items():
            self.before()
            self.launched.append(number)
            row = Trial(number, {}, f"{number:03}")
            self.folder.record(row)
            self.before()
            value = self.outcome(overrides)
            if isinstance(value, str):
                row = Trial(number, {}, f"{number:03}", value, {}, 1.0, 10)
            else:
                row = Trial(number, {}, f"{number:03}", "done", {"val/loss": value}, 1.0, 10)
            self.folder.record(row)


def open_search(path, **settings):
    cached_storage.cache_clear()  # as in a new process
    path.mkdir(exist_ok=True)
    search = read_search(settings, METRICS)
    space = Space(SPACE)
    study = create_study(path, ["minimize"], {"metric": METRICS, "space": space.texts})
    return SearchLoop(search, study, space, SweepFolder(path), METRICS)


def run_search(path, outcome=loss, **settings):
    search = open_search(path, **settings)
    search.reason = search.run(Launcher(search.folder, outcome))
    return search


def resume_search(path, **settings):
    """Return the numbers of the trials that a resumed search trains."""
    search = open_search(path, **settings)
    launcher = Launcher(search.folder)
    search.run(launcher)
    return launcher.launched


def choices(search):
    return [(trial.number, trial.params, trial.values) for trial in search.study.get_trials()]


@pytest.mark.parametrize("sampler", ["tpe", "cma_es", "random", "nsga2"])
def test_a_search_finds_good_trials(sampler, tmp_path):
    search = run_search(tmp_path, sampler=sampler, trials=40)
    assert len(search.study.trials) == 40
    assert search.study.best_value < 0.35
    assert [row.number for row in search.folder.trials()] == list(range(40))


@pytest.mark.parametrize("sampler", ["tpe", "cma_es", "random", "nsga2"])
@pytest.mark.parametrize("parallel", [1, 4])
def test_a_killed_search_goes_on_with_the_same_trials(sampler, parallel, tmp_path):
    settings = {"sampler": sampler, "trials": 24, "parallel": parallel, "startup": 6, "seed": 3}
    expected = run_search(tmp_path / "uninterrupted", **settings)
    generator = random.Random(parallel)

    def maybe_kill():
        if generator.random() < 0.12:
            raise Killed

    kills = 0
    while True:
        search = open_search(tmp_path / "killed", **settings)
        journal = search.study._storage._backend
        journal.append_logs = killed_append(journal, maybe_kill)
        try:
            search.run(Launcher(search.folder, before=maybe_kill))
            break
        except Killed:
            kills += 1
    assert kills >= 10
    assert choices(search) == choices(expected)
    assert [row.state for row in search.folder.trials()] == ["done"] * 24


def killed_append(journal, maybe_kill):
    """Return a method that appends to a journal, or is killed before or in the middle of a line."""

    def append(logs):
        try:
            maybe_kill()
        except Killed:
            length = random.Random(len(str(logs))).randrange(20)
            with journal.path.open("a") as file:
                file.write(json.dumps(logs[0])[:length])
            raise
        Journal.append_logs(journal, logs)

    return append


def test_a_finished_search_goes_on_with_a_higher_number_of_trials(tmp_path):
    run_search(tmp_path, trials=5)
    assert resume_search(tmp_path, trials=8) == [5, 6, 7]


def test_a_finished_search_trains_nothing(tmp_path):
    run_search(tmp_path, trials=5)
    assert resume_search(tmp_path, trials=5) == []


def test_a_search_does_not_go_on_with_another_space(tmp_path):
    run_search(tmp_path, trials=2)
    with pytest.raises(RunError, match="cannot be resumed with space"):
        create_study(tmp_path, ["minimize"], {"space": Space(["seed=1,2"]).texts})


@pytest.mark.parametrize("bad", [math.nan, math.inf, "failed"])
def test_a_trial_without_a_finite_value_counts_as_failed(bad, tmp_path):
    outcomes = []

    def outcome(overrides):
        outcomes.append(bad if len(outcomes) % 3 == 2 else loss(overrides))
        return outcomes[-1]

    search = run_search(tmp_path, outcome, trials=9)
    states = [trial.state for trial in search.study.trials]
    assert states == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.FAIL] * 3
    assert len(search.folder.trials()) == 9


def test_the_generation_of_a_trial_has_the_key_of_older_journals(tmp_path):
    """Optuna derives it from the name of the sampler's class."""
    search = run_search(tmp_path, sampler="nsga2", startup=2, trials=4)
    generations = [trial.system_attrs["Generations:generation"] for trial in search.study.trials]
    assert generations == [0, 0, 1, 1]


def test_an_interrupted_trial_runs_again(tmp_path):
    outcomes = iter([1.0, 2.0, "stopped"])
    search = run_search(tmp_path, lambda overrides: next(outcomes), trials=5)
    assert search.study.trials[2].state == TrialState.RUNNING
    assert resume_search(tmp_path, trials=5) == [2, 3, 4]


def test_a_search_ends_early(tmp_path):
    reached = run_search(tmp_path / "target", trials=40, target=1.0)
    assert len(reached.study.trials) < 40
    assert "reaches the target" in reached.reason
    stale = run_search(tmp_path / "patience", lambda overrides: 1.0, trials=40, patience=7)
    assert len(stale.study.trials) == 8
    slow = run_search(tmp_path / "timeout", trials=40, timeout="0.001s")
    assert len(slow.study.trials) < 40


TWO_METRICS = ["val/loss", "val/accuracy"]


@pytest.mark.parametrize(
    ("settings", "metrics", "message"),
    [
        ({"trials": 0}, METRICS, r"hydra\.sweeper\.trials=0: .*\[1, inf\)"),
        ({"trails": 9}, METRICS, r"hydra\.sweeper\.trails: .* did you mean 'trials'"),
        ({"sampler": "tbe"}, METRICS, r"hydra\.sweeper\.sampler=tbe: .* auto, tpe"),
        ({"timeout": "1 week"}, METRICS, r"hydra\.sweeper\.timeout=1 week: .* like 90s"),
        ({"pruner": "median"}, TWO_METRICS, "pruner=median: expected one sweep.metric, got 2"),
        ({"pruner": "median"}, ["test/loss"], "pruner=median: test/loss is measured after"),
    ],
)
def test_settings_are_checked(settings, metrics, message):
    with pytest.raises(ConfigError, match=message):
        read_search(settings, metrics)


def test_a_journal_skips_incomplete_lines(tmp_path):
    journal = Journal(tmp_path / JOURNAL_FILE)
    logs = [{"op_code": 4, "worker_id": "1", "n": number} for number in range(1, 5)]
    journal.append_logs(logs[:2])
    assert journal.read_logs(0) == logs[:2]
    with journal.path.open("a") as file:
        file.write('{"op_code": 4, "n": 3')  # left by a kill
    assert journal.read_logs(2) == []
    Journal(journal.path).append_logs(logs[3:])
    assert journal.read_logs(2) == logs[3:]
    assert Journal(journal.path).read_logs(1) == [logs[1], logs[3]]


def test_a_bad_trial_is_pruned(tmp_path):
    search = open_search(tmp_path, trials=9)
    pruner = make_pruner("median", startup=2, warmup=0)
    for number, values in enumerate([[3.0, 2.0, 1.0], [3.0, 2.0, 1.1]]):
        search.proposer.propose()
        judge = Judge(tmp_path, number, pruner)
        assert not any(judge.prunes(value, point) for point, value in enumerate(values, 1))
        search.study.tell(number, values[-1])
    search.proposer.propose()
    judge = Judge(tmp_path, 2, pruner)
    assert not judge.prunes(2.5, 1)
    assert judge.prunes(2.4, 2)
    cached_storage.cache_clear()
    resumed = Judge(tmp_path, 2, pruner)  # the run reports the same points again
    assert [resumed.prunes(9.9, 1), resumed.prunes(9.9, 2)] == [False, True]
    assert search.study.trials[2].intermediate_values == {1: 2.5, 2: 2.4}, "the first reports stay"
    assert not Judge(tmp_path, 0, pruner).prunes(99.0, 4), "a finished trial is not pruned"


def test_a_judge_needs_the_folder_of_a_search(tmp_path):
    with pytest.raises(RunError, match="is not the folder of a search"):
        Judge(tmp_path, 0, make_pruner("median", 5, 0))


def test_importances_are_printed_and_drawn(tmp_path):
    study = run_search(tmp_path, trials=30).study
    shares = importances(study)
    assert max(shares, key=shares.get) == "optimizer.lr"
    assert sum(shares.values()) == pytest.approx(1)
    lines = list(importance_table(study, METRICS))
    assert "matters for val/loss" in lines[1]
    assert lines[2].startswith("optimizer.lr")
    drawn = list(charts(study, METRICS).values())
    assert [chart.shape[:2] for chart in drawn] == [(1, 3)] * 2
    assert all(0 <= chart.min() < chart.max() <= 1 for chart in drawn)


def test_too_few_trials_give_no_importances(tmp_path):
    study = run_search(tmp_path, trials=2).study
    assert list(importance_table(study, METRICS)) == []


def test_choices_are_listed_by_frequency():
    choices = ["relu", "tanh", "elu", "tanh"]
    trials = [FrozenTrialStub({"activation": choice}) for choice in choices]
    assert value_range(trials, "activation") == "tanh, relu, elu"


class FrozenTrialStub:
    """The part of Optuna's FrozenTrial that a value range needs."""

    def __init__(self, params):
        self.params = params
