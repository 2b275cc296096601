"""Sources of values, and the content that config files may have."""

import pytest

from framework.composition.config_files import check_file, chosen_in, expand_choices, experiments_in
from framework.composition.sources import Sources, line_of, read_config_file
from framework.errors import ConfigError

TEXT = """\
# @package _global_
defaults:
  - override /optimizer: sgd

optimizer:
  lr: 0.1
model:
  blocks:
    - conv2d
    - name: linear
      features: 3
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spam.yaml").write_text(TEXT)
    return tmp_path / "spam.yaml"


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("optimizer", 5),
        ("optimizer.lr", 6),
        ("model.blocks.0", 9),
        ("model.blocks.1.features", 11),
        ("optimizer.x", None),
    ],
)
def test_the_line_of_a_key(file, path, line):
    assert line_of(file, path.split(".")) == line


def test_the_command_line_comes_before_the_files(file):
    sources = Sources(
        {"optimizer.lr": "optimizer.lr=1", "unknown.key": "+unknown.key=1"}, [(file, "")]
    )
    assert sources("optimizer.lr") == "command line"
    assert sources("unknown") == "command line"
    assert sources("optimizer") == "command line"
    assert sources("model.blocks.0") == "spam.yaml:9"
    assert sources("trainer.max_epochs") == ""


def test_an_override_of_a_part_is_the_source_of_settings_that_no_file_has(file):
    sources = Sources({"optimizer": "optimizer=adam", "model": "model={blocks: [x]}"}, [(file, "")])
    assert sources("optimizer.lr") == "spam.yaml:6"
    assert sources("optimizer.eps") == "command line"
    assert sources("model.blocks.0") == "command line"


def test_the_last_file_comes_first_and_a_file_of_a_group_lies_below_its_key(file, tmp_path):
    (tmp_path / "mine.yaml").write_text("name: sgd\nmomentum: 0.9\nlr: 2\n")
    sources = Sources({}, [(file, ""), (tmp_path / "mine.yaml", "optimizer")])
    assert sources("optimizer.momentum") == "mine.yaml:2"
    assert sources("optimizer.lr") == "mine.yaml:3"
    assert sources("momentum") == ""


@pytest.mark.parametrize(
    ("content", "chosen", "rest"),
    [
        ({"optimizer": "sgd"}, ["_self_", {"override /optimizer": "sgd"}], {}),
        (
            {"optimizer": {"name": "sgd", "lr": 1}},
            ["_self_", {"override /optimizer": "sgd"}],
            {"optimizer": {"lr": 1}},
        ),
        ({"scheduler": None, "seed": 1}, ["_self_", {"override /scheduler": None}], {"seed": 1}),
        ({"optimizer": {"lr": 1}}, None, {"optimizer": {"lr": 1}}),
        (
            {"defaults": ["a", {"override /model": "cnn"}], "data": "digits"},
            ["a", "_self_", {"override /model": "cnn"}, {"override /data": "digits"}],
            {},
        ),
        ({"callbacks": {"progress": {}}}, None, {"callbacks": {"progress": {}}}),
    ],
)
def test_the_choice_of_a_part_moves_to_the_defaults_list(content, chosen, rest):
    """The command line can then choose another part, and the settings of the first are removed."""
    made = expand_choices(content)
    assert made.pop("defaults", None) == chosen
    assert made == rest


@pytest.mark.parametrize(
    ("path", "package", "content"),
    [
        ("experiment/x", "_global_", {"hydra": {"callbacks": {"x": {"a": 1}}}}),
        (
            "experiment/x",
            "_global_",
            {"hydra": {"job_logging": {"handlers": {"x": {"class": "logging.FileHandler"}}}}},
        ),
        ("experiment/x", "_global_", {"hydra": {"job": {"env_set": {"PATH": "/tmp"}}}}),
        ("experiment/x", "_global_", {"hydra": {"searchpath": ["/tmp"]}}),
        ("experiment/x", "_global_", {"hydra": {"launcher": {"setup": ["rm -r /"]}}}),
        (
            "experiment/x",
            "_global_",
            {"hydra": {"sweeper": {"params": {"hydra.job.env_set.A": "1,2"}}}},
        ),
        (
            "experiment/x",
            "_global_",
            {"hydra": {"sweeper": {"params": {"++hydra/job_logging": "a,b"}}}},
        ),
        ("experiment/x", "_global_", {"defaults": [{"override hydra/job_logging": "mine"}]}),
        ("experiment/x", "_global_", {"defaults": [{"override /hydra/job_logging": "mine"}]}),
        ("experiment/x", "_global_", {"defaults": ["/hydra/job_logging/mine"]}),
        ("experiment/x", "_global_", {"defaults": [{"optional hydra/env": "x"}]}),
        ("experiment/x", "_global_", {"defaults": [{"/optimizer@hydra.callbacks": "mine"}]}),
        ("experiment/x", "_global_", {"defaults": [{"/optimizer@_global_.hydra": "mine"}]}),
        ("experiment/x", "_global_", {"defaults": [{"/optimizer@${x}": "mine"}]}),
        ("experiment/x", "_global_", {"defaults": [{"/optimizer@_name_": "hydra"}]}),
        ("experiment/x", "_global_", {"defaults": [{"override /hydra/launcher": "../mine"}]}),
        ("experiment/x", "_global_", {"model": {"_target_": "os.system"}}),
        ("experiment/x", "_global_", {"model": {"blocks": [{"a": {"_partial_": True}}]}}),
        ("experiment/x", "hydra.job_logging", {"version": 1}),
        ("experiment/x", "_global_.hydra", {"version": 1}),
        ("hydra/job_logging/mine", "hydra.job_logging", {"version": 1}),
        ("optimizer/adamw", "optimizer", {"lr": 1}),
        ("experiment/x", "_global_", ["a", "list"]),
    ],
)
def test_a_config_file_cannot_change_hydra_or_import_code(file, path, package, content):
    problems = list(check_file(file, path, package, content))
    assert problems
    assert all("spam.yaml" in problem for problem in problems)


@pytest.mark.parametrize(
    "content",
    [
        {"optimizer": "sgd", "defaults": [{"override /model": "cnn"}, "_self_"]},
        {
            "hydra": {
                "sweeper": {"params": {"optimizer.lr": "1e-3,1e-2"}, "n_trials": 20},
                "launcher": {"n_jobs": 2},
            }
        },
        {
            "defaults": [
                {"override /hydra/launcher": "joblib"},
                {"override /hydra/sweeper": "optuna"},
            ]
        },
        {"defaults": [{"override hydra/launcher": "joblib"}]},
        {},
    ],
)
def test_a_config_file_may_choose_parts_sweepers_and_launchers(file, content):
    assert list(check_file(file, "experiment/x", "_global_", content)) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\nb: 2\n", "x.yaml:2: cannot be read as YAML: expected ',' or ']', but got ':'"),
        ("a: 1\n\tb: 2\n", "x.yaml:2: cannot be read as YAML: found character '\\t'"),
        ("- a\n", "x.yaml: expected lines of the form `key: value`"),
    ],
)
def test_a_syntax_error_is_reported_with_its_line(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"x\.yaml") as error:
        read_config_file(tmp_path / "x.yaml")
    assert message in str(error.value)


def test_experiments_and_default_parts_are_found_for_completion(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "spam.yaml").write_text("seed: 1\n")
    (tmp_path / "config.yaml").write_text(
        "defaults: [_self_, {model: cnn}, {override /metrics: [f1]}, {norm: null}]\n"
    )
    assert experiments_in([tmp_path]) == ["spam"]
    assert chosen_in([tmp_path]) == {"model": "cnn", "metrics": ["f1"]}


def test_a_list_of_parts_moves_to_the_defaults_list():
    assert expand_choices({"metrics": ["accuracy", "f1"], "seed": 1}) == {
        "seed": 1,
        "defaults": ["_self_", {"override /metrics": ["accuracy", "f1"]}],
    }
    assert expand_choices({"metrics": {"f1": {}}}) == {"metrics": {"f1": {}}}


def test_the_settings_of_parts_in_a_list_stay_in_the_content():
    assert expand_choices({"metrics": ["accuracy", {"name": "top_k", "k": 3}]}) == {
        "metrics": {"top_k": {"k": 3}},
        "defaults": ["_self_", {"override /metrics": ["accuracy", "top_k"]}],
    }


def test_a_part_in_a_list_needs_a_name(file):
    (problem,) = check_file(file, "experiment/spam", "", {"metrics": ["accuracy", {"k": 3}]})
    assert "metrics: " in problem
    assert "{'k': 3}" in problem
