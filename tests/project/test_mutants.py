"""Configs and command lines with random mistakes: each is refused in a few lines, or is a config of its own right."""

import copy
import random
import string
from functools import partial

import pytest

from framework.composition.compose import CommandLine, config_folders, run_composed as compose
from framework.composition.overrides import rewrite
from framework.composition.spec import read_spec
from framework.errors import FrameworkError

VALUES = [
    None,
    "",
    "abc",
    -1,
    0,
    1e400,
    float("nan"),
    True,
    [],
    {},
    [1, "a"],
    {"name": "sgd"},
    {"a": {"b": 1}},
    "${nope}",
]
LINES = [
    "optimizer=sgd",
    "optimizer.lr=0.1",
    "+callbacks=early_stop",
    "model.activation=gelu",
    "model.width=[16,32]",
    "trainer.max_epochs=3",
    "data=blobs",
    "run.name=mine",
    "metrics=[accuracy,f1]",
]


@pytest.fixture(scope="module")
def tree():
    trees = []
    compose(
        CommandLine(["+callbacks=early_stop", "model.norm=layer"]),
        lambda job: trees.append(job.spec.tree),
    )
    return trees[0]


def mutate_tree(tree, chance):
    """Return a copy with a key misspelt, dropped, doubled under another name, or with a value of another type."""
    mutant = copy.deepcopy(tree)
    place = mutant
    while True:
        key = chance.choice(list(place))
        if not (isinstance(place[key], dict) and place[key]) or chance.random() < 0.2:
            break
        place = place[key]
    kind = chance.randrange(4)
    if kind == 0:
        place[misspell(key, chance)] = place.pop(key)
    elif kind == 1:
        del place[key]
    elif kind == 2:
        place[misspell(key, chance)] = chance.choice(VALUES)
    else:
        place[key] = chance.choice(VALUES)
    return mutant


def misspell(text, chance):
    """Return a text with a character changed, dropped, put in or swapped with the next."""
    at = chance.randrange(len(text) + 1)
    letter = chance.choice(string.printable.strip())
    return chance.choice(
        [
            text[:at] + letter + text[at:],
            text[:at] + text[at + 1 :],
            text[:at] + letter + text[at + 1 :],
            text[at:] + text[:at],
        ]
    )


def few_lines(problems):
    return all(len(problem.splitlines()) <= 3 and len(problem) < 600 for problem in problems)


def problems_of(work):
    """Do something; return the problems that it names when it refuses, none when it does not."""
    try:
        work()
    except FrameworkError as error:
        return getattr(error, "problems", [str(error)])
    return []


@pytest.mark.parametrize("number", [500, pytest.param(3_000, marks=pytest.mark.slow)])
def test_a_config_with_a_mistake_is_refused_or_is_another_config(tree, number):
    chance = random.Random(number)
    refusals = [problems_of(partial(read_spec, mutate_tree(tree, chance))) for _ in range(number)]
    assert all(map(few_lines, refusals))
    assert sum(map(bool, refusals)) > number / 3


@pytest.mark.parametrize("number", [500, pytest.param(2_000, marks=pytest.mark.slow)])
def test_a_command_line_with_a_mistake_reaches_hydra_only_when_it_can_be_read(number):
    chance, folders = random.Random(number), config_folders()
    for _ in range(number):
        found = rewrite([misspell(chance.choice(LINES), chance) for _ in range(2)], folders, False)
        assert few_lines(found.problems), found.problems


@pytest.mark.parametrize("number", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_a_command_line_with_a_mistake_composes_or_is_refused(number):
    chance, jobs = random.Random(number), []
    for _ in range(number):
        line = CommandLine([misspell(chance.choice(LINES), chance)])
        assert few_lines(problems_of(partial(compose, line, jobs.append))), line
