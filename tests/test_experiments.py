"""Every experiment that is shipped composes and runs; whether it reaches what its first line says is a slow test."""

import json
from pathlib import Path

import framework_conf
import pytest

from framework.compose import CommandLine, run
from framework.errors import DataError
from framework.experiment import train

FOLDER = Path(next(iter(framework_conf.__path__))) / "experiment"
EXPERIMENTS = sorted(FOLDER.glob("*.yaml"))
SMALLER = {"fashion_mnist_cnn": ["model.channels=[2]"], "fashion_mnist_cnn_quick": ["model.channels=[2]"]}
REACHED = {
    "default": ("accuracy", 0.97),
    "diabetes": ("r2", 0.4),
    "digits_cnn": ("accuracy", 0.98),
    "digits_stack": ("accuracy", 0.98),
    "digits_transformer": ("accuracy", 0.95),
    "fashion_mnist_cnn": ("accuracy", 0.91),
    "fashion_mnist_cnn_quick": ("accuracy", 0.75),
    "search_mlp": ("accuracy", 0.95),
    "spirals": ("accuracy", 0.98),
    "spirals_snake": ("accuracy", 0.98),
}


def trained(experiment, folder, *overrides):
    chosen = [] if experiment == "default" else [f"experiment={experiment}"]
    results = []
    line = CommandLine([*chosen, f"run.root={folder}", *overrides])
    try:
        run(line, lambda job: results.append(train(job.spec, job.experiment, job.overrides)))
    except DataError as error:
        if "fashion" in experiment and "fetch" in str(error):
            pytest.skip(str(error))
        raise
    return results[0]


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_a_shipped_experiment_runs(file, tmp_path):
    assert file.read_text().startswith("# "), "the first line says what it shows"
    smaller = SMALLER.get(file.stem, [])
    result = trained(file.stem, tmp_path, "trainer.max_steps=3", "loggers=json_lines", *smaller)
    assert result.steps == 3
    assert result.folder.parent == tmp_path / file.stem
    name, _ = REACHED[file.stem]
    assert {f"{split}/{name}" for split in ("train", "val", "test")} <= result.metrics.keys()
    assert "test/loss" in json.loads((result.folder / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("experiment", REACHED)
def test_it_reaches_what_it_says(experiment, tmp_path):
    name, least = REACHED[experiment]
    assert trained(experiment, tmp_path).metrics[f"test/{name}"] >= least


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_default_reaches_it_with_any_seed(seed, tmp_path):
    assert trained("default", tmp_path, f"seed={seed}").metrics["test/accuracy"] >= REACHED["default"][1]
