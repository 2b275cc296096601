"""The trials of a grid; the cached composition of jobs gives the configs of Hydra."""

import re
from itertools import product

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from framework.composition import cached_composer
from framework.composition.compose import CommandLine, run_composed, to_tree
from framework.composition.sources import Sources
from framework.errors import ConfigError, FrameworkError
from framework.runs.sweep_files import Trial
from framework.tuning.sweep.grid import Grid, trial_numbers
from framework.tuning.sweep.grid_rules import Rule, combinations
from framework.tuning.sweep.launcher import OneByOne
from framework.tuning.sweep.sweep import sweep as run_sweep

AXES = {
    "lr": ["lr=1", "lr=2"],
    "size": ["size=8", "size=9"],
    "seed": ["seed=0", "seed=1", "seed=2"],
}


def test_a_grid_has_all_combinations_with_the_last_key_changing_fastest():
    found = combinations({"lr": AXES["lr"], "seed": AXES["seed"]}, [])
    assert found[:4] == [
        ("lr=1", "seed=0"),
        ("lr=1", "seed=1"),
        ("lr=1", "seed=2"),
        ("lr=2", "seed=0"),
    ]
    assert len(found) == 6


def test_zipped_settings_are_paired_and_crossed_with_the_others():
    found = combinations(AXES, [["size", "lr"]])
    assert len(found) == 6
    assert found[0] == ("lr=1", "size=8", "seed=0")
    assert {each[:2] for each in found} == {("lr=1", "size=8"), ("lr=2", "size=9")}


@pytest.mark.parametrize(
    ("zipped", "message"),
    [
        ([["lr", "seed"]], "expected equally many values of each, got lr 2, seed 3"),
        ([["lr", "siez"]], "siez has no list of values; did you mean 'size'?"),
        ([["lr"]], "expected two settings"),
        ([["lr", "size"], ["lr", "size"]], "lr is listed twice"),
    ],
)
def test_an_invalid_zip_is_reported(zipped, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        combinations(AXES, zipped)


@pytest.mark.parametrize(
    ("rule", "left"),
    [
        ("model=rnn -> norm=layer", ["rnn layer 1", "mlp layer 1", "mlp null 1"]),
        ("model!=rnn or norm=layer", ["rnn layer 1", "mlp layer 1", "mlp null 1"]),
        ("model=rnn and norm=null", ["rnn null 1"]),
        ("norm=null", ["rnn null 1", "mlp null 1"]),
        ("model=rnn -> lr<0.5", ["mlp layer 1", "mlp null 1"]),
        ("lr>=1e0", ["rnn layer 1", "rnn null 1", "mlp layer 1", "mlp null 1"]),
        ("model > 3", []),
    ],
)
def test_a_rule_leaves_combinations_out(rule, left):
    kept = []
    for model, norm in product(("rnn", "mlp"), ("layer", None)):
        settings = {"model": model, "norm": norm, "lr": 1}
        if Rule(rule, settings).holds(settings):
            kept.append(f"{model} {norm or 'null'} 1")
    assert kept == left


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("modle=rnn", "modle is not set in this sweep; did you mean 'model'?"),
        ("model is rnn", "cannot parse 'model is rnn'"),
        ("__import__('os').getcwd()", "cannot parse"),
        ("model=a -> model=b -> model=c", "expected a rule like model=rnn -> norm=layer"),
    ],
)
def test_an_invalid_rule_is_reported(rule, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Rule(rule, ["model", "norm"])


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Return a function that composes a sweep, and returns the settings of its trials."""
    monkeypatch.chdir(tmp_path)

    def sweep(*overrides):
        jobs = []
        run_sweep(CommandLine(list(overrides), multirun=True), jobs.append)
        return [job.settings for job in jobs]

    return sweep


def test_zip_and_where_on_the_command_line(sweep):
    zipped = sweep(
        "optimizer.lr=1e-3,1e-2",
        "loader.batch_size=16,32",
        "sweep.zip=[optimizer.lr,loader.batch_size]",
    )
    assert [tuple(each.values()) for each in zipped] == [(1e-3, 16), (1e-2, 32)]
    ruled = sweep("optimizer=sgd,adam", "seed=1,2", "sweep.where=optimizer=sgd -> seed=1")
    assert [tuple(each.values()) for each in ruled] == [("sgd", 1), ("adam", 1), ("adam", 2)]
    assert sweep("seed=range(4)", "sweep.where=[seed>0,seed!=2]") == [{"seed": 1}, {"seed": 3}]
    with pytest.raises(ConfigError, match="excludes all 2 combinations"):
        sweep("seed=1,2", "sweep.where=seed>5")


def test_a_grid_in_an_experiment_file(sweep, tmp_path):
    (tmp_path / "conf/experiment").mkdir(parents=True)
    params = "{optimizer.lr: '1e-3,1e-2', model.activation: 'relu,elu', seed: 'range(2)'}"
    rules = "{zip: [optimizer.lr, seed], where: ['model.activation=elu -> seed=0']}"
    text = f"hydra: {{sweeper: {{params: {params}}}}}\nsweep: {rules}\n"
    (tmp_path / "conf/experiment/grid.yaml").write_text(text)
    found = sweep("experiment=grid")
    assert [tuple(each.values()) for each in found] == [
        (1e-3, "relu", 0),
        (1e-3, "elu", 0),
        (1e-2, "relu", 1),
    ]
    typed = sweep("experiment=grid", "optimizer.lr=3,4")
    rates = {each["optimizer.lr"] for each in typed}
    assert rates == {3, 4}, "the command line replaces values of the file"
    (tmp_path / "conf/experiment/grid.yaml").write_text(
        "hydra: {sweeper: {params: {modle: 'a,b'}}}\n"
    )
    with pytest.raises(ConfigError, match="no key 'modle'"):
        sweep("experiment=grid")


COMMANDS = [
    (
        "optimizer=adam optimizer.weight_decay=0.1 optimizer.lr=1e-3,3 seed=-1,7 "
        "sweep.zip=[optimizer.lr,seed]"
    ),
    (
        "trainer.precision=fp32,bf16 trainer.max_steps=null,5 "
        "sweep.zip=[trainer.precision,trainer.max_steps]"
    ),
    "model.activation=relu,elu model.activation.alpha=0.5,1.5 sweep.where=model.activation=elu",
    (
        "+callbacks=early_stop callbacks.early_stop.patience=1,2 ~callbacks=progress "
        "activation=elu activation.alpha=0.5"
    ),
    "model.norm=null,layer activation=elu",
    "optimizer={name:sgd,momentum:0.5},{name:adamw,weight_decay:0} optimizer.lr=0.3",
    "model.activation=relu,{name:elu,alpha:2}",
    "seed=1,2 run.name=n-${seed} model.width=${seed}",
    (
        "callbacks=[progress],[checkpoint,progress] scheduler=null,cosine "
        "sweep.zip=[callbacks,scheduler]"
    ),
    "model=stack model.blocks=[flatten],[flatten,linear] optimizer.betas=[0.8,0.9] init_from=a-b",
    "experiment=one,two model.dropout=0,0.5 sweep.zip=[experiment,model.dropout]",
]


@pytest.mark.parametrize("typed", COMMANDS)
def test_the_cached_composition_gives_the_config_of_hydra(typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/one.yaml").write_text(
        "optimizer: {name: sgd, momentum: 0.5}\nmodel: {width: 16}\n"
    )
    (tmp_path / "conf/experiment/two.yaml").write_text(
        "defaults: [one]\nmodel: {dropout: 0.1}\nseed: 4\n"
    )
    compared = []

    def job(self, overrides, number):
        cached = real_job(self, overrides, number)
        config = self.loader.load_sweep_config(self.master, list(overrides))
        HydraConfig.instance().set_config(config)
        experiment = config.hydra.runtime.choices.get("experiment")
        keys = [key for key in config if key != "hydra"]
        tree = to_tree(OmegaConf.masked_copy(config, keys), Sources({}, []))
        full = self.composing.checked(tree, experiment, list(overrides), number)
        assert cached.spec.tree == full.spec.tree
        assert cached.experiment == full.experiment
        assert cached.settings == full.settings
        compared.append(overrides)
        return cached

    real_job = cached_composer.Composer.job
    monkeypatch.setattr(cached_composer.Composer, "job", job)
    run_sweep(CommandLine(typed.split(), multirun=True), lambda job: None)
    assert len(compared) >= 2


def test_hydra_composes_once_for_each_choice_of_parts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    composed = []
    compose = cached_composer.Composer._compose

    def counted(self, overrides, number):
        composed.append(overrides)
        return compose(self, overrides, number)

    monkeypatch.setattr(cached_composer.Composer, "_compose", counted)
    overrides = ["optimizer=sgd,adam", "optimizer.lr=0.1,0.2", "seed=range(8)"]
    run_sweep(CommandLine(overrides, multirun=True), lambda job: None)
    assert composed == [("optimizer=sgd",), ("optimizer=adam",)]


def test_all_problems_of_all_jobs_are_reported_together(sweep):
    with pytest.raises(ConfigError) as error:
        sweep("optimizer.lr=0.1,fast", "seed=1,x", "modle.width=3")
    assert len(error.value.problems) == 3
    with pytest.raises(ConfigError) as error:
        sweep("seed=1,2", "sweep.metrc=a", "resume=runs/x", "run.name=a")
    places = [problem.partition(":")[0] for problem in error.value.problems]
    assert places == ["sweep.metrc=a", "resume=runs/x", "run.name=a"]
    with pytest.raises(ConfigError) as error:
        sweep("optimizer.lr=interval(0,1)", "model.dropout=interval(0,1)", "seed=range(0)")
    assert len(error.value.problems) == 3


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("sweep.metric=val/acuracy", "sweep.metric=val/acuracy: no trial measures it; did you"),
        ("sweep.metric=accuracy", "sweep.metric=accuracy: expected e.g. val/accuracy"),
        ("sweep.metric=weights/norm", "sweep.metric=weights/norm: set the better direction with"),
        ("sweep.mode=[min,max]", "sweep.mode: expected one, or one for each sweep.metric"),
        ("sweep.mode=low", "sweep.mode=low: "),
        ("sweep.name=a,b", "sweep.name=a,b: "),
        ("optimizer.lr=interval(0,1)", "interval(...) is for a sweeper that samples values"),
        ("hydra/launcher=jobib", "hydra/launcher=jobib: "),
    ],
)
def test_an_invalid_setting_of_a_sweep_is_reported(sweep, typed, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        sweep("seed=1,2", typed)


def test_a_single_run_has_no_section_sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jobs = []
    run_composed(CommandLine([]), jobs.append)
    assert "sweep" not in jobs[0].spec.tree
    with pytest.raises(ConfigError, match=r"sweep\.name=a: .* add -m"):
        run_composed(CommandLine(["sweep.name=a"]), jobs.append)


def test_a_resumed_sweep_recognizes_equal_numbers_of_another_type():
    rows = [Trial(3, {"seed": 0, "optimizer.lr": 1.0}), Trial(4, {"seed": 1, "optimizer.lr": 0.5})]
    settings = [{"optimizer.lr": 1, "seed": 0.0}, {"optimizer.lr": 0.5, "seed": 2}]
    assert trial_numbers(settings, rows) == {0: 3, 1: 0}


@pytest.mark.parametrize("plugin", [Grid, OneByOne])
def test_a_sweeper_or_launcher_of_another_program_is_an_error(plugin):
    with pytest.raises(FrameworkError, match="framework train -m"):
        plugin().setup(hydra_context=None, task_function=print, config=None)
