"""The search space: Hydra overrides with several values."""

import random
import re

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from framework.errors import ConfigError
from framework.tuning.search.space import Space


def axes(*overrides):
    return {axis.key: axis.distribution for axis in Space(overrides).axes}


def sample(*overrides, seed=0):
    """Return the overrides of one random trial, by key."""
    generator = random.Random(seed)

    def choose(name, distribution):
        if isinstance(distribution, CategoricalDistribution):
            return generator.choice(distribution.choices)
        if isinstance(distribution, IntDistribution):
            return generator.randrange(distribution.low, distribution.high + 1, distribution.step)
        return generator.uniform(distribution.low, distribution.high)

    return dict(text.split("=") for text in Space(overrides).sample(choose))


@pytest.mark.parametrize(
    ("override", "distribution"),
    [
        ("++optimizer.lr=interval(0.01, 0.1)", FloatDistribution(0.01, 0.1)),
        ("++optimizer.lr=tag(log, interval(1e-5, 1e-1))", FloatDistribution(1e-5, 1e-1, log=True)),
        ("++optimizer.lr=interval(1, 2)", FloatDistribution(1, 2)),
        # the setting takes only integers
        ("++model.depth=interval(1, 4)", IntDistribution(1, 4)),
        ("++loader.batch_size=tag(log, interval(8, 128))", IntDistribution(8, 128, log=True)),
        ("++model.width=range(32, 257, step=32)", IntDistribution(32, 256, step=32)),
        # without its end, as in Python
        ("++model.width=range(32, 256, step=32)", IntDistribution(32, 224, step=32)),
        ("++model.width=tag(log, range(16, 129))", IntDistribution(16, 128, log=True)),
        ("++model.dropout=range(0, 0.5, 0.25)", FloatDistribution(0, 0.25, step=0.25)),
        ("optimizer=sgd,adamw", CategoricalDistribution(["sgd", "adamw"])),
        ("++model.width=choice([32],[64,64])", CategoricalDistribution(["[32]", "[64,64]"])),
        ("++trainer.precision=choice(a, b)", CategoricalDistribution(["a", "b"])),
    ],
)
def test_an_override_with_several_values_is_a_distribution(override, distribution):
    assert list(axes(override).values()) == [distribution]


def test_a_trial_has_a_value_of_each_axis_and_the_fixed_overrides():
    trial = sample(
        "optimizer=sgd,adamw",
        "++optimizer.lr=tag(log, interval(1e-3, 1e-1))",
        "++trainer.max_epochs=2",
    )
    assert trial.keys() == {"optimizer", "++optimizer.lr", "++trainer.max_epochs"}
    assert 1e-3 <= float(trial["++optimizer.lr"]) <= 1e-1
    assert len(trial["++optimizer.lr"]) < 12, "significant digits only"


def test_a_setting_is_drawn_only_if_the_chosen_part_has_it():
    space = ["optimizer=sgd,adamw", "++optimizer.momentum=interval(0, 0.99)"]
    trials = [sample(*space, seed=seed) for seed in range(20)]
    assert {trial["optimizer"] for trial in trials} == {"sgd", "adamw"}
    for trial in trials:
        assert ("++optimizer.momentum" in trial) == (trial["optimizer"] == "sgd")


def test_a_setting_of_a_nested_part_is_drawn_only_if_the_chosen_part_has_it():
    space = [
        "++model.activation.name=relu,leaky_relu",
        "++model.activation.negative_slope=interval(0.01, 0.3)",
    ]
    trials = [sample(*space, seed=seed) for seed in range(20)]
    assert {trial["++model.activation.name"] for trial in trials} == {"relu", "leaky_relu"}
    for trial in trials:
        has_slope = "++model.activation.negative_slope" in trial
        assert has_slope == (trial["++model.activation.name"] == "leaky_relu")


def test_a_list_has_as_many_values_as_the_setting_of_its_tag_says():
    space = ["++model.depth=range(1, 4)", "++model.width=tag(per model.depth, log, range(8, 129))"]
    for seed in range(10):
        trial = sample(*space, seed=seed)
        assert len(trial["++model.width"].strip("[]").split(",")) == int(trial["++model.depth"])
    fixed_depth = sample("++model.depth=3", space[1])
    assert fixed_depth["++model.width"].count(",") == 2


def test_the_last_override_of_a_key_counts():
    assert "optimizer.lr" not in axes(
        "++optimizer.lr=interval(0, 1)", "++optimizer.lr=0.1", "++seed=1,2"
    )
    assert Space(["++optimizer.lr=0.1", "++optimizer.lr=interval(0, 1)"]).fixed == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["++seed=1"], "a search needs a hyperparameter with several values"),
        (
            ["++optimizer.lr=tag(log, interval(0, 1))"],
            "optimizer.lr=tag(log, interval(0, 1)): `low > 0`",
        ),
        (["++optimizer.lr=interval(2, 1)"], "optimizer.lr=interval(2, 1): "),
        (["++optimizer.lr=tag(lgo, interval(1, 2))"], "unknown tag 'lgo', available: log"),
        (["++model.width=tag(log, range(8, 64, 8))"], "a step of 1"),
        (["optimizer=tag(log, choice(sgd, adamw))"], "interval(...) or range(...)"),
        (
            ["optimizer=sgd,adamw", "++optimizer.momentm=interval(0, 1)"],
            "none of sgd, adamw has a setting 'momentm'",
        ),
        (
            ["++fold=1/2,2/2", "optimizer=sgd,adamw"],
            "fold=1/2,2/2: expected one fold",
        ),
        (
            ["++model.width=tag(per model.dept, range(3, 9))", "++model.depth=1,2"],
            "did you mean 'model.depth'?",
        ),
    ],
)
def test_an_invalid_space_is_reported(overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Space(overrides)
