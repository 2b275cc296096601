"""A search goes on where it was killed, to the same trials; what is bad, fails or is not a number ends no search."""

import json
import math
import random

import pytest
from optuna.trial import TrialState

from framework.errors import ConfigError, RunError
from framework.tuning.search.importance import importances, pictures, report
from framework.tuning.search.search import Campaign
from framework.tuning.search.settings import read_search
from framework.tuning.search.space import Space
from framework.tuning.search.study import (
    FILE,
    Journal,
    Judge,
    create_study,
    make_pruner,
    storage_in,
)
from framework.tuning.sweep.folder import SweepFolder, Trial

SPACE = [
    "optimizer=sgd,adamw",
    "++optimizer.lr=tag(log, interval(1e-5, 1e-1))",
    "++model.depth=range(1, 4)",
]
METRICS = ["val/loss"]


class Killed(BaseException):
    """As a SIGKILL: nobody catches it."""


def loss(overrides):
    """The better, the nearer the learning rate is to 0.003 and the fewer layers there are; adamw is better."""
    given = dict(text.lstrip("+").split("=") for text in overrides)
    rate = math.log10(float(given["optimizer.lr"]) / 3e-3)
    return rate**2 + 0.3 * (given["optimizer"] == "sgd") + 0.1 * int(given["model.depth"])


class Launcher:
    """Trains nothing: it records what a trial would come to."""

    def __init__(self, folder, outcome=loss, before=lambda: None):
        self.folder, self.outcome, self.before, self.launched = folder, outcome, before, []

    def __call__(self, batch):
        for number, overrides in batch.items():
            self.before()
            self.launched.append(number)
            row = Trial(number, {}, f"{number:03}")
            self.folder.record(row)
            self.before()
            value = self.outcome(overrides)
            state = value if isinstance(value, str) else "done"
            metrics = {} if isinstance(value, str) else {"val/loss": value}
            self.folder.record(Trial(number, {}, f"{number:03}", state, metrics, 1.0, 10))


def campaign(path, **settings):
    storage_in.cache_clear()  # as in a new process
    path.mkdir(exist_ok=True)
    search, space = read_search(settings, METRICS), Space(SPACE)
    study = create_study(path, ["minimize"], {"metric": METRICS, "space": space.texts})
    return Campaign(search, study, space, SweepFolder(path), METRICS)


def searched(path, outcome=loss, **settings):
    found = campaign(path, **settings)
    found.reason = found.run(Launcher(found.folder, outcome))
    return found


def choices(found):
    return [(trial.number, trial.params, trial.values) for trial in found.study.get_trials()]


@pytest.mark.parametrize("sampler", ["tpe", "cma_es", "random", "nsga2"])
def test_a_search_finds_what_is_good(sampler, tmp_path):
    found = searched(tmp_path, sampler=sampler, trials=40)
    assert len(found.study.trials) == 40
    assert found.study.best_value < 0.35
    assert [row.number for row in found.folder.trials()] == list(range(40))


@pytest.mark.parametrize("sampler", ["tpe", "cma_es", "random", "nsga2"])
@pytest.mark.parametrize("parallel", [1, 4])
def test_a_killed_search_comes_to_the_same_trials(sampler, parallel, tmp_path):
    settings = {"sampler": sampler, "trials": 24, "parallel": parallel, "startup": 6, "seed": 3}
    whole = searched(tmp_path / "whole", **settings)

    generator, kills = random.Random(parallel), 0

    def perhaps():
        if generator.random() < 0.12:
            raise Killed

    while True:
        part = campaign(tmp_path / "killed", **settings)
        try:
            part.study._storage._backend.append_logs = dying(part.study._storage._backend, perhaps)
            part.run(Launcher(part.folder, before=perhaps))
            break
        except Killed:
            kills += 1
    assert kills >= 10
    assert choices(part) == choices(whole)
    assert [row.state for row in part.folder.trials()] == ["done"] * 24


def dying(journal, perhaps):
    """Write as the journal does, but be killed now and then: before a line, or with half of it on the disk."""
    whole = type(journal).append_logs

    def append(logs):
        try:
            perhaps()
        except Killed:
            with journal.path.open("a") as file:
                file.write(json.dumps(logs[0])[: random.Random(len(str(logs))).randrange(20)])
            raise
        whole(journal, logs)

    return append


def test_more_trials_may_be_asked_for_later(tmp_path):
    searched(tmp_path, trials=5)
    later = campaign(tmp_path, trials=8)
    launcher = Launcher(later.folder)
    later.run(launcher)
    assert launcher.launched == [5, 6, 7]


def test_a_finished_search_trains_nothing(tmp_path):
    searched(tmp_path, trials=5)
    later = campaign(tmp_path, trials=5)
    launcher = Launcher(later.folder)
    later.run(launcher)
    assert launcher.launched == []


def test_another_space_is_another_search(tmp_path):
    searched(tmp_path, trials=2)
    with pytest.raises(RunError, match="cannot go on with space"):
        create_study(tmp_path, ["minimize"], {"space": Space(["seed=1,2"]).texts})


@pytest.mark.parametrize("bad", [math.nan, math.inf, "failed"])
def test_a_trial_that_comes_to_nothing_ends_no_search(bad, tmp_path):
    """It counts, the sampler learns nothing from it, and it is not tried again."""
    seen = []

    def outcome(overrides):
        seen.append(overrides)
        return bad if len(seen) % 3 == 0 else loss(overrides)

    found = searched(tmp_path, outcome, trials=9)
    states = [trial.state for trial in found.study.trials]
    assert states == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.FAIL] * 3
    assert len(found.folder.trials()) == 9


def test_an_interrupted_trial_is_gone_on_with(tmp_path):
    outcomes = iter([1.0, 2.0, "stopped"])
    part = searched(tmp_path, lambda _: next(outcomes), trials=5)
    assert part.study.trials[2].state == TrialState.RUNNING
    rest = campaign(tmp_path, trials=5)
    launcher = Launcher(rest.folder)
    rest.run(launcher)
    assert launcher.launched == [2, 3, 4]


def test_a_search_ends_early(tmp_path):
    reached = searched(tmp_path / "target", trials=40, target=1.0)
    assert len(reached.study.trials) < 40
    assert "reaches the target" in reached.reason
    stale = searched(tmp_path / "patience", lambda _: 1.0, trials=40, patience=7)
    assert len(stale.study.trials) == 8
    slow = searched(tmp_path / "timeout", trials=40, timeout="0.001s")
    assert len(slow.study.trials) < 40


@pytest.mark.parametrize(
    ("given", "metrics", "said"),
    [
        ({"trials": 0}, METRICS, r"hydra.sweeper.trials=0: expected int in \[1, inf\)"),
        (
            {"trails": 9},
            METRICS,
            "hydra.sweeper.trails: there is no such setting; did you mean 'trials'",
        ),
        ({"sampler": "tbe"}, METRICS, "hydra.sweeper.sampler=tbe: expected one of auto, tpe"),
        (
            {"timeout": "1 week"},
            METRICS,
            "hydra.sweeper.timeout=1 week: expected a duration like 90s",
        ),
        (
            {"pruner": "median"},
            ["val/loss", "val/accuracy"],
            "goes with one sweep.metric, not with 2",
        ),
        ({"pruner": "median"}, ["test/loss"], "test/loss is measured when a trial is over"),
    ],
)
def test_settings_are_checked(given, metrics, said):
    with pytest.raises(ConfigError, match=said):
        read_search(given, metrics)


def test_a_journal_reads_what_is_whole(tmp_path):
    journal = Journal(tmp_path / FILE)
    logs = [{"op_code": 4, "worker_id": "1", "n": number} for number in range(1, 5)]
    journal.append_logs(logs[:2])
    assert journal.read_logs(0) == logs[:2]
    with journal.path.open("a") as file:
        file.write('{"op_code": 4, "n": 3')  # a kill cut it off
    assert journal.read_logs(2) == []
    Journal(journal.path).append_logs(logs[3:])
    assert journal.read_logs(2) == logs[3:]
    assert Journal(journal.path).read_logs(1) == [logs[1], logs[3]]


def test_a_bad_trial_is_told_to_end(tmp_path):
    found = campaign(tmp_path, trials=9)
    rule = make_pruner("median", startup=2, warmup=0)
    for number, values in enumerate([[3.0, 2.0, 1.0], [3.0, 2.0, 1.1]]):
        found.asking.ask()
        judge = Judge(tmp_path, number, rule)
        assert not any(judge.prunes(value, point) for point, value in enumerate(values, 1))
        found.study.tell(number, values[-1])
    found.asking.ask()
    judge = Judge(tmp_path, 2, rule)
    assert not judge.prunes(2.5, 1)
    assert judge.prunes(2.4, 2)
    storage_in.cache_clear()
    again = Judge(tmp_path, 2, rule)  # a resumed run comes by the same points
    assert [again.prunes(9.9, 1), again.prunes(9.9, 2)] == [False, True]
    assert found.study.trials[2].intermediate_values == {1: 2.5, 2: 2.4}, "what was reported stays"
    assert not Judge(tmp_path, 0, rule).prunes(99.0, 4), "a trial that is over goes on as it likes"


def test_a_judge_needs_a_search(tmp_path):
    with pytest.raises(RunError, match="is not the folder of a search"):
        Judge(tmp_path, 0, make_pruner("median", 5, 0))


def test_what_matters_is_told_and_drawn(tmp_path):
    found = searched(tmp_path, trials=30)
    shares = importances(found.study)
    assert max(shares, key=shares.get) == "optimizer.lr"
    assert sum(shares.values()) == pytest.approx(1)
    lines = list(report(found.study, METRICS))
    assert "matters for val/loss" in lines[1]
    assert lines[2].startswith("optimizer.lr")
    drawn = pictures(found.study, METRICS)
    assert [picture.shape[:2] for picture in drawn.values()] == [(1, 3)] * 2
    assert all(0 <= picture.min() < picture.max() <= 1 for picture in drawn.values())


def test_of_too_few_trials_nothing_is_said(tmp_path):
    assert list(report(searched(tmp_path, trials=2).study, METRICS)) == []
