"""Every shipped experiment composes and runs; a slow test checks the value in its first line."""

import json
import math
from pathlib import Path

import pytest

import framework_conf
from framework.composition.compose import CommandLine, run_composed
from framework.errors import DataError
from framework.experiment.experiment import train
from shipped import shipped

FOLDER = Path(next(iter(framework_conf.__path__))) / "experiment"
EXPERIMENTS = shipped(FOLDER, "*.yaml")
SMALLER = {
    "bible": ["data.tokenizer.vocabulary=300", "model.depth=1", "model.buckets=500"],
    "lm_bpe": [
        "data.characters=300000",
        "data.tokenizer.vocabulary=300",
        "model.depth=1",
        "model.buckets=500",
    ],
    "lm_char": ["data.characters=300000", "model.depth=1", "model.buckets=500"],
    "fashion_mnist_cnn": ["model.channels=[2]"],
    "fashion_mnist_cnn_quick": ["model.channels=[2]"],
    "fashion_mnist_resnet": ["model.channels=[8,8,8]"],
    "fine_tune_digits": ["init_from=null"],
}
LARGE = {"diamonds_transformer", "flights", "lm_bpe", "bible"}  # data, or model
LARGE |= {
    "languages",
    "languages_2d",
    "languages_transformer",
    "spam",
    "spam_lstm",
    "spam_transformer",
}
REACHED = {  # a name with "<": at most
    "autoencoder": ("loss", "<", 0.12),
    "contrastive": ("found", 0.4),
    "default": ("accuracy", 0.97),
    "diamonds": ("r2_log", 0.98),
    "diamonds_transformer": ("r2_log", 0.98),
    "distillation": ("accuracy", 0.9),
    "docstrings": ("accuracy", 0.78),
    "electricity": ("mae", "<", 420),
    "flights": ("auroc", 0.77),
    "gan": ("real", 0.3),
    "languages": ("accuracy", 0.95),
    "languages_transformer": ("accuracy", 0.9),
    "bible": ("bits_per_character", "<", 2.1),
    "languages_2d": ("accuracy", 0.95),
    "lm_bpe": ("bits_per_character", "<", 1.7),
    "lm_char": ("bits_per_character", "<", 1.7),
    "spam_lstm": ("accuracy", 0.88),
    "spam_transformer": ("accuracy", 0.88),
    "multi_task": ("accuracy", 0.96),
    "spam": ("accuracy", 0.88),
    "vae": ("loss", "<", 250),
    "vowels": ("accuracy", 0.95),
    "diabetes": ("r2", 0.4),
    "digits_cnn": ("accuracy", 0.98),
    "digits_stack": ("accuracy", 0.98),
    "digits_transformer": ("accuracy", 0.95),
    "fashion_mnist_cnn": ("accuracy", 0.91),
    "fashion_mnist_cnn_quick": ("accuracy", 0.75),
    "fashion_mnist_resnet": ("accuracy", 0.91),
    "fine_tune_digits": ("accuracy", 0.9),
    "search_mlp": ("accuracy", 0.95),
    "spirals": ("accuracy", 0.98),
    "spirals_snake": ("accuracy", 0.98),
}
MEASURED = {
    "contrastive": ("val/probe_accuracy", 0.83),
    "gan": ("val/sample_coverage", 0.45),
}  # by callbacks


def trained(experiment, folder, *overrides):
    chosen = [] if experiment == "default" else [f"experiment={experiment}"]
    results = []
    line = CommandLine([*chosen, f"run.root={folder}", *overrides])
    try:
        run_composed(
            line, lambda job: results.append(train(job.spec, job.experiment, job.overrides))
        )
    except DataError as error:
        if "fetch" in str(error):
            pytest.skip(str(error))
        raise
    return results[0]


def taught(folder):
    """Train a small teacher."""
    return str(trained("default", folder, "trainer.max_epochs=3", "run.name=teacher").folder)


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(file, id=file.stem, marks=[pytest.mark.slow] * (file.stem in LARGE))
        for file in EXPERIMENTS
    ],
)
def test_a_shipped_experiment_runs(file, tmp_path):
    assert file.read_text().startswith("# "), "the first line says what it shows"
    if file.stem in ("lm_bpe", "bible"):
        pytest.importorskip("tokenizers")
    smaller = (
        [f"task.teacher={taught(tmp_path)}"]
        if file.stem == "distillation"
        else SMALLER.get(file.stem, [])
    )
    short = ["trainer.max_steps=3", "loader.limit=2", "loggers=json_lines"]
    result = trained(file.stem, tmp_path, *short, *smaller)
    assert result.steps == 3
    assert result.folder.parent == tmp_path / file.stem
    name, *_ = REACHED[file.stem]
    assert {f"{split}/{name}" for split in ("train", "val", "test")} <= result.metrics.keys()
    assert "test/loss" in json.loads((result.folder / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("experiment", REACHED)
def test_an_experiment_reaches_the_value_in_its_first_line(experiment, tmp_path):
    name, *than, limit = REACHED[experiment]
    words = [f"task.teacher={taught(tmp_path)}"] if experiment == "distillation" else []
    metrics = trained(experiment, tmp_path, *words).metrics
    reached = metrics[f"test/{name}"]
    assert reached <= limit if than else reached >= limit
    measured, at_least = MEASURED.get(experiment, (f"test/{name}", -math.inf))
    assert metrics[measured] >= at_least


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_default_experiment_reaches_its_value_with_any_seed(seed, tmp_path):
    assert (
        trained("default", tmp_path, f"seed={seed}").metrics["test/accuracy"]
        >= REACHED["default"][1]
    )
