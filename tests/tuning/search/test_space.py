"""What a search chooses from, written as Hydra overrides."""

import random
import re

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from framework.errors import ConfigError
from framework.tuning.search.space import Space


def axes(*overrides):
    return {axis.key: axis.distribution for axis in Space(overrides).axes}


def drawn(*overrides, seed=0):
    """The overrides of one trial, drawn at random, without those that are the same for all."""
    generator, space = random.Random(seed), Space(overrides)

    def choose(name, distribution):
        if isinstance(distribution, CategoricalDistribution):
            return generator.choice(distribution.choices)
        if isinstance(distribution, IntDistribution):
            return generator.randrange(distribution.low, distribution.high + 1, distribution.step)
        return generator.uniform(distribution.low, distribution.high)

    return dict(text.split("=") for text in space.sample(choose))


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("++optimizer.lr=interval(0.01, 0.1)", FloatDistribution(0.01, 0.1)),
        ("++optimizer.lr=tag(log, interval(1e-5, 1e-1))", FloatDistribution(1e-5, 1e-1, log=True)),
        ("++optimizer.lr=interval(1, 2)", FloatDistribution(1, 2)),
        (
            "++model.depth=interval(1, 4)",
            IntDistribution(1, 4),
        ),  # because that setting is a whole number
        ("++loader.batch_size=tag(log, interval(8, 128))", IntDistribution(8, 128, log=True)),
        ("++model.width=range(32, 257, step=32)", IntDistribution(32, 256, step=32)),
        (
            "++model.width=range(32, 256, step=32)",
            IntDistribution(32, 224, step=32),
        ),  # as in Python
        ("++model.width=tag(log, range(16, 129))", IntDistribution(16, 128, log=True)),
        ("++model.dropout=range(0, 0.5, 0.25)", FloatDistribution(0, 0.25, step=0.25)),
        ("optimizer=sgd,adamw", CategoricalDistribution(["sgd", "adamw"])),
        ("++model.width=choice([32],[64,64])", CategoricalDistribution(["[32]", "[64,64]"])),
        ("++trainer.precision=choice(a, b)", CategoricalDistribution(["a", "b"])),
    ],
)
def test_an_override_with_several_values_is_a_distribution(override, meant):
    assert list(axes(override).values()) == [meant]


def test_a_trial_gets_one_value_of_each_and_all_that_is_given():
    trial = drawn(
        "optimizer=sgd,adamw",
        "++optimizer.lr=tag(log, interval(1e-3, 1e-1))",
        "++trainer.max_epochs=2",
    )
    assert trial.keys() == {"optimizer", "++optimizer.lr", "++trainer.max_epochs"}
    assert 1e-3 <= float(trial["++optimizer.lr"]) <= 1e-1
    assert len(trial["++optimizer.lr"]) < 12, "digits that matter, no more"


def test_a_setting_is_asked_for_where_the_chosen_part_has_it():
    space = ["optimizer=sgd,adamw", "++optimizer.momentum=interval(0, 0.99)"]
    trials = [drawn(*space, seed=seed) for seed in range(20)]
    assert {trial["optimizer"] for trial in trials} == {"sgd", "adamw"}
    assert all(
        ("++optimizer.momentum" in trial) == (trial["optimizer"] == "sgd") for trial in trials
    )


def test_so_is_a_setting_of_a_part_in_a_part():
    space = [
        "++model.activation.name=relu,leaky_relu",
        "++model.activation.negative_slope=interval(0.01, 0.3)",
    ]
    trials = [drawn(*space, seed=seed) for seed in range(20)]
    slopes = {
        trial["++model.activation.name"]: "++model.activation.negative_slope" in trial
        for trial in trials
    }
    assert slopes == {"relu": False, "leaky_relu": True}


def test_each_layer_has_a_width_of_its_own():
    space = ["++model.depth=range(1, 4)", "++model.width=tag(per model.depth, log, range(8, 129))"]
    for seed in range(10):
        trial = drawn(*space, seed=seed)
        assert len(trial["++model.width"].strip("[]").split(",")) == int(trial["++model.depth"])
    widths = drawn("++model.depth=3", space[1])[
        "++model.width"
    ]  # the number of them may also be given
    assert widths.count(",") == 2


def test_what_is_given_later_counts():
    assert "optimizer.lr" not in axes(
        "++optimizer.lr=interval(0, 1)", "++optimizer.lr=0.1", "++seed=1,2"
    )
    assert Space(["++optimizer.lr=0.1", "++optimizer.lr=interval(0, 1)"]).fixed == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["++seed=1"], "a search needs something to choose"),
        (
            ["++optimizer.lr=tag(log, interval(0, 1))"],
            "optimizer.lr=tag(log, interval(0, 1)): `low > 0`",
        ),
        (["++optimizer.lr=interval(2, 1)"], "optimizer.lr=interval(2, 1): "),
        (
            ["++optimizer.lr=tag(lgo, interval(1, 2))"],
            "the tag 'lgo' is none of: log, 'per SETTING'",
        ),
        (["++model.width=tag(log, range(8, 64, 8))"], "log goes with a step of 1"),
        (["optimizer=tag(log, choice(sgd, adamw))"], "log goes with interval(...) and range(...)"),
        (
            ["optimizer=sgd,adamw", "++optimizer.momentm=interval(0, 1)"],
            "none of sgd, adamw has a setting 'momentm'",
        ),
        (
            ["++fold=1/2,2/2", "optimizer=sgd,adamw"],
            "fold=1/2,2/2: a search would choose the easiest fold",
        ),
        (
            ["++model.width=tag(per model.dept, range(3, 9))", "++model.depth=1,2"],
            "did you mean 'model.depth'?",
        ),
    ],
)
def test_what_cannot_be_searched_is_told(overrides, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        Space(overrides)
