"""The course of `framework tour`: its lessons, the commands that run, and the answers to a user."""

import os
import shlex
import shutil
from pathlib import Path

import pytest

from framework.cli import tour
from framework.errors import RunError

LESSONS = [
    tour.Lesson(1, "one", "text one", ["framework train a=1", "framework find RUN"], "", "first"),
    tour.Lesson(2, "two", "text two", ["framework train a=2"], "", "second"),
]


def add_run(name, seconds):
    """Add the folder of a run to the working folder, with the time of its config."""
    config = Path("runs/default", name, "config.yaml")
    config.parent.mkdir(parents=True)
    config.touch()
    os.utime(config, (seconds, seconds))


@pytest.fixture
def guided(tmp_path, monkeypatch):
    """Return a function that answers the questions of a tour; the commands that it has run."""
    monkeypatch.chdir(tmp_path)
    add_run("only", seconds=1)

    def run(*answers):
        left = list(answers)
        commands = []

        def read(prompt):
            if not left:
                raise EOFError
            return left.pop(0)

        monkeypatch.setattr("builtins.input", read)
        guide = tour.Guide(LESSONS, lambda command: commands.append(command) or 0)
        guide.run(0, ["b=3"])
        assert not left
        return commands

    return run


def test_the_lessons_follow_each_other_and_the_settings_belong_to_the_first(guided, capsys):
    commands = guided("", "", "", "", "", "")
    assert commands == [
        "framework train a=1 b=3",
        "framework find runs/default/only",
        "framework train a=2",
    ]
    out = capsys.readouterr().out
    places = [out.index(text) for text in ("text one", "first", "text two", "second")]
    assert places == sorted(places)


def test_a_lesson_is_repeated_with_settings_and_the_tour_goes_back(guided):
    repeated = guided("", "", "r lr='0.1 2'", "", "", "wrong", "r lr", "'", "q")
    first = ["framework train a=1 b=3", "framework find runs/default/only"]
    assert repeated == [*first, "framework train a=1 'lr=0.1 2'", first[1]]
    assert guided("", "", "", "", "", "b", "", "", "q")[2:] == [
        "framework train a=2",
        "framework train a=1",
        first[1],
    ]
    assert guided("q") == []


def test_a_command_gets_the_newest_run(guided):
    add_run("new run", seconds=20)
    add_run("old", seconds=10)
    assert shlex.split(guided("", "q")[1]) == ["framework", "find", "runs/default/new run"]
    shutil.rmtree("runs")
    with pytest.raises(RunError, match="framework find RUN: no run has been trained"):
        guided("", "q")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lesson 11", "--lesson 11: expected an integer from 1 to 10"),
        ("--json", "--json requires --list"),
        ("lr", "expected KEY=VALUE, got lr"),
    ],
)
def test_wrong_options_are_errors(command, words, message):
    status, _, err = command(f"tour {words}")
    assert status == 2
    assert message in err
