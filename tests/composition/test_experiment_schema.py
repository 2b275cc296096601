"""`framework schema`: shipped experiments are valid, files with mistakes are not."""

import json
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

import framework_conf
from framework.composition.catalogue import read_index, setting_as_dict
from framework.composition.experiment_schema import choice_files, experiment_schema
from framework.composition.sections import SECTIONS, section_settings
from framework.composition.spec import PLAIN
from shipped import shipped

jsonschema = pytest.importorskip("jsonschema")
EXPERIMENTS = shipped(Path(framework_conf.__path__[0], "experiment"), "*.yaml")


def index():
    settings = {name: section_settings(name) for name in SECTIONS} | {name: {} for name in PLAIN}
    found = read_index(settings, [file.stem for file in EXPERIMENTS])
    found.plain = {name: setting_as_dict(setting) for name, setting in PLAIN.items()}
    return found


@pytest.fixture(scope="module")
def validator():
    schema = json.loads(json.dumps(experiment_schema(index()), allow_nan=False))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def problems(validator, text):
    content = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    return [(error.json_path, error.message) for error in validator.iter_errors(content)]


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_shipped_experiments_are_valid(validator, file):
    assert problems(validator, file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "optimizer: {lr: 1e-3}",  # of the optimizer that another file chooses
        "seed: ${loader.batch_size}",
        "model: {name: mlp, activation: {alpha: 0.5}, norm: null}",
        "model: {name: mlp, activation: swish, width: 8.0}",  # an alias; a whole number
        "scheduler: null",
        "callbacks: {ema: null, early_stop: {patience: 3}}",
        "callbacks: [ema, {name: early_stop, patience: 3}]",
        "defaults: [digits_cnn, override /optimizer: sgd, override /metrics: [f1], _self_]",
        "defaults: [override hydra/sweeper: optuna]",
        "trainer: {max_steps: null, validate_every: 3 steps}",
        "data: {name: csv, path: 7}",  # a number is a text
        "sweep: {metric: [val/loss, val/accuracy], mode: [min, max]}",
        "plugins: [parts.py]",
    ],
)
def test_valid_files(validator, text):
    assert problems(validator, text) == []


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("model: mpl", "$.model"),
        ("optimzer: sgd", "$"),
        ("optimizer: {name: sgd, lr: fast}", "$.optimizer.lr"),
        ("optimizer: {name: sgd, lr: -1}", "$.optimizer.lr"),
        ("optimizer: {name: adamw, momentum: 0.9}", "$.optimizer"),
        ("optimizer: {lrr: 0.1}", "$.optimizer"),
        ("optimizer: {name: adamw, betas: [0.9]}", "$.optimizer.betas"),
        ("model: {name: mlp, activation: reluu}", "$.model.activation"),
        ("model: {name: mlp, activation: {name: elu, alfa: 1}}", "$.model.activation"),
        ("model: {name: stack, blocks: [convv]}", "$.model.blocks[0]"),
        ("model: {name: stack, blocks: [{channels: 3}]}", "$.model.blocks[0]"),
        ("model: {name: stack, blocks: [{name: conv2d, chanels: 3}]}", "$.model.blocks[0]"),
        ("model: null", "$.model"),
        ("metrics: [acuracy]", "$.metrics[0]"),
        ("metrics: accuracy", "$.metrics"),
        ("callbacks: {checkpont: {}}", "$.callbacks"),
        ("callbacks: {early_stop: {patience: -3}}", "$.callbacks.early_stop.patience"),
        ("trainer: {max_epoch: 3}", "$.trainer"),
        ("trainer: {validate_every: 3 apples}", "$.trainer.validate_every"),
        ("loader: {batch_size: 0}", "$.loader.batch_size"),
        ("loader: {batch_size: 1.5}", "$.loader.batch_size"),
        ("seed: many", "$.seed"),
        ("sweep: {mode: up}", "$.sweep.mode"),
        ("hydra: {sweeper: {trials: 0}}", "$.hydra.sweeper.trials"),
        ("hydra: {job: {}}", "$.hydra"),
        ("defaults: [spiral]", "$.defaults[0]"),
        ("defaults: [override /optimizer: sdg]", "$.defaults[0]['override /optimizer']"),
    ],
)
def test_wrong_files(validator, text, path):
    assert path in [place for place, _ in problems(validator, text)]


def test_an_editor_gets_descriptions_and_defaults(validator):
    definitions = validator.schema["$defs"]
    rate = definitions["optimizer.sgd"]["properties"]["momentum"]
    assert rate["default"] == 0
    assert "description" in rate
    names = definitions["optimizer.name"]["else"]
    assert len(names["enum"]) == len(names["enumDescriptions"])
    assert all(definitions["optimizer.name"]["else"]["enumDescriptions"])


def test_config_files_of_a_project_can_be_chosen_like_parts(tmp_path):
    Path(tmp_path, "optimizer").mkdir()
    Path(tmp_path, "optimizer", "mine.yaml").write_text("name: sgd\n")
    parts = index()
    files = choice_files([tmp_path], parts)
    assert files == {"optimizer": ["mine"]}
    schema = experiment_schema(parts, files)
    validator = jsonschema.Draft202012Validator(json.loads(json.dumps(schema)))
    assert problems(validator, "optimizer: mine") == []


def test_parts_of_plugins_are_in_the_schema(command, forget_plugins):
    Path("parts.py").write_text(
        "from typing import Annotated\n"
        "from torch import nn\n"
        "import framework as fw\n\n"
        "@fw.activations.register('schema_test')\n"
        "class Own(nn.Module):\n"
        "    '''Own.'''\n"
        "    def __init__(self, slope: Annotated[float, fw.Range('[0, 2]')] = 0.5): ...\n"
    )
    status, out, err = command("schema --plugins parts.py")
    assert (status or 0) == 0, err
    slope = json.loads(out)["$defs"]["activation.schema_test"]["properties"]["slope"]
    assert slope["else"] == {"type": "number", "minimum": 0, "maximum": 2}


def test_the_schema_is_written_to_a_file(command):
    Path("conf/experiment").mkdir(parents=True)
    status, out, err = command("schema --output conf/experiment.schema.json")
    assert (status or 0) == 0, err
    assert "# yaml-language-server: $schema=../experiment.schema.json" in out
    assert yaml.safe_load(Path("conf/experiment.schema.json").read_text())["title"] == "experiment"
    status, _, err = command("schema --output missing/x.json")
    assert (status, "no folder missing" in err) == (2, True)
