"""Random errors in configs and command lines: each gives a short error or another valid config."""

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
    line = CommandLine(["+callbacks=early_stop", "model.norm=layer"])
    compose(line, lambda job: trees.append(job.spec.tree))
    return trees[0]


def mutate_tree(tree, chance):
    """Return a copy with a random key renamed, deleted or duplicated, or with another value."""
    mutant = copy.deepcopy(tree)
    section = mutant
    while True:
        key = chance.choice(list(section))
        is_section = isinstance(section[key], dict) and section[key]
        if not is_section or chance.random() < 0.2:
            break
        section = section[key]
    kind = chance.randrange(4)
    if kind == 0:
        section[misspell(key, chance)] = section.pop(key)
    elif kind == 1:
        del section[key]
    elif kind == 2:
        section[misspell(key, chance)] = chance.choice(VALUES)
    else:
        section[key] = chance.choice(VALUES)
    return mutant


def misspell(text, chance):
    """Return a text with a character inserted, deleted or replaced, or rotated."""
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


def are_short(problems):
    return all(len(problem.splitlines()) <= 3 and len(problem) < 600 for problem in problems)


def problems_of(work):
    """Call a function; return the problems in its error, or an empty list without an error."""
    try:
        work()
    except FrameworkError as error:
        return getattr(error, "problems", [str(error)])
    return []


@pytest.mark.parametrize("number", [500, pytest.param(3_000, marks=pytest.mark.slow)])
def test_a_config_with_an_error_is_refused_or_is_another_valid_config(tree, number):
    chance = random.Random(number)
    refused = 0
    for _ in range(number):
        problems = problems_of(partial(read_spec, mutate_tree(tree, chance)))
        assert are_short(problems)
        refused += bool(problems)
    assert refused > number / 3


@pytest.mark.parametrize("number", [500, pytest.param(2_000, marks=pytest.mark.slow)])
def test_overrides_with_errors_are_rewritten_or_refused(number):
    chance = random.Random(number)
    folders = config_folders()
    for _ in range(number):
        overrides = [misspell(chance.choice(LINES), chance) for _ in range(2)]
        rewritten = rewrite(overrides, folders, False)
        assert are_short(rewritten.problems), rewritten.problems


@pytest.mark.parametrize("number", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_a_command_line_with_an_error_composes_or_is_refused(number):
    chance = random.Random(number)
    jobs = []
    for _ in range(number):
        line = CommandLine([misspell(chance.choice(LINES), chance)])
        assert are_short(problems_of(partial(compose, line, jobs.append))), line
