"""Command lines become checked specs: config folders, experiment files, sweeps, refused files."""

import contextlib
import os
import sys

import pytest
from hydra.core.global_hydra import GlobalHydra

from framework.composition.compose import CommandLine, Job
from framework.errors import ConfigError, FrameworkError, PluginError
from runs import run_line


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def compose(*overrides, plugins=(), folders=(), multirun=False) -> list[Job]:
    """Return the jobs of a command line."""
    jobs: list[Job] = []
    run_line(CommandLine(list(overrides), list(plugins), list(folders), multirun), jobs.append)
    return jobs


def tree(*overrides, **more):
    """Return the complete tree of one experiment."""
    (job,) = compose(*overrides, **more)
    return job.spec.tree


def test_the_default_experiment_needs_no_file(write):
    (job,) = compose()
    assert job.experiment == "default"
    assert job.number is None
    assert job.overrides == []
    assert job.spec.tree["model"]["name"] == "mlp"
    assert job.spec.tree["metrics"].keys() == {"accuracy"}
    assert os.listdir() == [], "Hydra leaves no folder, log or file"


def test_overrides_of_every_form(write):
    found = tree(
        "model.activation.alpha=0.5",
        "model/activation=elu",
        "optimizer=sgd",
        "optimizer.lr=3e-4",
        "+callbacks=early_stop",
        "callbacks.early_stop.patience=2",
        "~callbacks=progress",
        "scheduler=null",
        "loggers=[]",
        "initializer=orthogonal",
        "trainer.max_epochs=1e1",
        "seed=7",
    )
    assert found["model"]["activation"] == {"name": "elu", "alpha": 0.5}
    assert (found["optimizer"]["name"], found["optimizer"]["lr"]) == ("sgd", 3e-4)
    assert found["callbacks"].keys() == tree()["callbacks"].keys() - {"progress"} | {"early_stop"}
    assert found["callbacks"]["early_stop"]["patience"] == 2
    assert found["scheduler"] is None
    assert found["loggers"] == {}
    assert found["initializer"]["name"] == "orthogonal"
    assert found["trainer"]["max_epochs"] == 10
    assert found["seed"] == 7


def test_a_reference_is_resolved(write):
    assert tree("seed=3", "run.name=n-${seed}")["run"]["name"] == "n-3"


SPAM = """\
model: {name: cnn, channels: [4]}
data:
  image: true
optimizer: sgd
scheduler: null
activation: gelu
trainer: {max_steps: 5}
"""


def test_the_command_line_overrides_an_experiment_file(write):
    write("conf/experiment/spam.yaml", SPAM)
    (job,) = compose("experiment=spam")
    found = job.spec.tree
    assert job.experiment == "spam"
    assert (found["model"]["name"], found["model"]["channels"]) == ("cnn", [4])
    assert (found["optimizer"]["name"], found["scheduler"]) == ("sgd", None)
    assert found["model"]["activation"]["name"] == "gelu"
    assert found["trainer"]["max_steps"] == 5
    found = tree(
        "experiment=spam",
        "optimizer=adam",
        "activation=relu",
        "scheduler=cosine",
        "trainer.max_steps=6",
    )
    assert (found["optimizer"]["name"], found["scheduler"]["name"]) == ("adam", "cosine")
    assert found["model"]["activation"]["name"] == "relu"
    assert found["trainer"]["max_steps"] == 6


def test_an_experiment_file_may_have_a_header_and_a_defaults_list_of_hydra(write):
    header = "# @package _global_\ndefaults:\n  - override /optimizer: sgd\n"
    write("conf/experiment/old.yaml", f"{header}optimizer:\n  momentum: 0.5\n")
    assert tree("experiment=old")["optimizer"]["momentum"] == 0.5


def test_the_last_config_folder_is_searched_first(write, tmp_path):
    write("conf/experiment/spam.yaml", "seed: 1\n")
    write("a/experiment/spam.yaml", "seed: 2\n")
    write("b/experiment/spam.yaml", "seed: 3\n")
    write("b/experiment/other.yaml", "seed: 4\n")
    assert tree("experiment=spam")["seed"] == 1
    assert tree("experiment=spam", folders=[tmp_path / "a"])["seed"] == 2
    assert tree("experiment=spam", folders=[tmp_path / "b", tmp_path / "a"])["seed"] == 2
    assert tree("experiment=other", folders=[tmp_path / "b", tmp_path / "a"])["seed"] == 4


def test_a_project_has_its_own_config_and_options(write):
    write(
        "conf/config.yaml",
        "defaults: [framework, _self_]\noptimizer: mine\nseed: 9\ntrainer: {max_epochs: 2}\n",
    )
    write("conf/optimizer/mine.yaml", "defaults: [sgd, _self_]\nmomentum: 0.7\n")
    found = tree()
    assert (found["seed"], found["trainer"]["max_epochs"]) == (9, 2)
    assert (found["optimizer"]["name"], found["optimizer"]["momentum"]) == ("sgd", 0.7)
    assert tree("optimizer=adam", "seed=1")["optimizer"]["name"] == "adam"


PART = """\
from framework import activations
from torch import nn
@activations.register("{name}")
class Part(nn.Module):
    def forward(self, x): return x
"""


def test_plugins_of_the_project_the_experiment_and_the_command_line(write, forget_plugins):
    for name in ("one", "two", "three"):
        write(f"{name}.py", PART.format(name=name))
    write("conf/config.yaml", "defaults: [framework, _self_]\nplugins: [one.py]\n")
    write("conf/experiment/spam.yaml", "plugins: [one.py, two.py]\nactivation: two\n")
    (job,) = compose("experiment=spam", plugins=["three.py"])
    assert job.spec.tree["model"]["activation"]["name"] == "two"
    names = [os.path.basename(plugin) for plugin in job.spec.plugins]
    assert names == ["one.py", "one.py", "two.py", "three.py"]
    assert all(os.path.isabs(plugin) for plugin in job.spec.plugins)
    assert tree("model.activation=three")["model"]["activation"]["name"] == "three"
    write("conf/experiment/wider.yaml", "defaults: [spam]\n")
    names = [os.path.basename(plugin) for plugin in compose("experiment=wider")[0].spec.plugins]
    assert names == ["one.py", "one.py", "two.py"]
    write("conf/experiment/bad.yaml", "plugins: one.py\n")
    with pytest.raises(PluginError, match=r"bad\.yaml: plugins: expected a list"):
        compose("experiment=bad")


WITH_SETTINGS = """
optimizer: {name: sgd, lr: 0.5, momentum: 0.9}
model: {name: mlp, width: 24}
"""


def test_settings_with_a_name_belong_to_that_part_only(write):
    write("conf/experiment/fast.yaml", WITH_SETTINGS)
    write("conf/experiment/faster.yaml", "defaults: [fast, _self_]\noptimizer: {lr: 0.7}\n")
    assert tree("experiment=fast")["optimizer"]["lr"] == 0.5
    other = tree("experiment=fast", "optimizer=adamw", "model=cnn", "data.image=true")
    assert other["optimizer"]["lr"] == tree("optimizer=adamw")["optimizer"]["lr"]
    assert "width" not in other["model"] or other["model"]["width"] == 128  # its own default
    assert tree("experiment=fast", "optimizer=adamw", "optimizer.lr=0.1")["optimizer"]["lr"] == 0.1
    assert tree("experiment=fast", "optimizer={name: adamw, lr: 0.1}")["optimizer"]["lr"] == 0.1
    assert tree("experiment=fast", "model.width=32")["model"]["width"] == 32
    assert tree("experiment=faster")["optimizer"]["momentum"] == 0.9
    # settings without a name belong to the chosen part, whichever it is
    assert tree("experiment=faster", "optimizer=adamw")["optimizer"]["lr"] == 0.7
    swept = compose("experiment=fast", "optimizer=sgd,adamw", multirun=True)
    assert [job.spec.tree["optimizer"]["lr"] for job in swept] == [0.5, 0.001]
    values = "optimizer={name: adamw, lr: 0.1},{name: adam},{name: sgd}"
    swept = compose("experiment=fast", values, multirun=True)
    assert [job.spec.tree["optimizer"]["lr"] for job in swept] == [0.1, 0.001, 0.5]


LISTED = """
callbacks: [checkpoint, {name: early_stop, patience: 2}]
transforms: [{name: gaussian_noise, std: 0.3}, {name: mixup, alpha: 0.7}]
"""


def test_choosing_another_list_removes_parts_with_their_settings(write):
    write("conf/experiment/noisy.yaml", LISTED)
    write("conf/experiment/plain.yaml", "defaults: [noisy]\ntransforms: []\n")
    settings = "transforms: {noise: {std: 0.4}}"
    write("conf/experiment/more.yaml", f"defaults: [noisy, _self_]\n{settings}\n")
    both = {"noise": {"std": 0.3}, "mixup": {"alpha": 0.7, "p": 1.0}}
    expected = {
        "experiment=noisy": both,
        "experiment=noisy transforms=[]": {},
        "experiment=noisy transforms=[mixup]": {"mixup": both["mixup"]},
        "experiment=noisy transforms=[flip]": {"flip": {"axis": "horizontal", "p": 0.5}},
        "experiment=noisy transforms=[] transforms.noise.std=0.1": {"noise": {"std": 0.1}},
        "experiment=noisy +transforms=flip": {**both, "flip": {"axis": "horizontal", "p": 0.5}},
        "experiment=plain": {},
        "experiment=more": {**both, "noise": {"std": 0.4}},
    }
    for words, transforms in expected.items():
        assert tree(*words.split())["transforms"] == transforms, words
    assert list(tree("experiment=noisy", "callbacks=[checkpoint]")["callbacks"]) == ["checkpoint"]


def test_a_sweep_runs_each_job(write):
    jobs = compose("seed=1,2", "model.activation=relu,gelu", "optimizer.lr=0.1", multirun=True)
    assert [job.number for job in jobs] == [0, 1, 2, 3]
    assert [job.spec.seed for job in jobs] == [1, 1, 2, 2]
    activations = [job.spec.tree["model"]["activation"]["name"] for job in jobs]
    assert activations == ["relu", "gelu", "relu", "gelu"]
    assert jobs[1].label == "seed=1 model.activation=gelu"
    assert set(jobs[1].overrides) == {"seed=1", "model.activation=gelu", "optimizer.lr=0.1"}
    assert jobs[1].settings == {"seed": 1, "model.activation": "gelu"}
    assert os.listdir() == ["runs"], "Hydra leaves nothing of its own"


def test_a_sweep_written_in_an_experiment_file(write):
    sweeper = "hydra: {sweeper: {params: {optimizer.lr: '1e-3,1e-2'}}}\n"
    write("conf/experiment/grid.yaml", f"{sweeper}seed: 3\n")
    jobs = compose("experiment=grid", multirun=True)
    assert [job.spec.tree["optimizer"]["lr"] for job in jobs] == [1e-3, 1e-2]
    assert jobs[0].label == "optimizer.lr=0.001"


def test_no_job_of_a_sweep_runs_if_one_is_invalid(write):
    jobs: list[Job] = []
    overrides = ["optimizer=sgd,adam", "optimizer.momentum=0.9", "seed=1,x"]
    with pytest.raises(ConfigError) as error:
        run_line(CommandLine(overrides, multirun=True), jobs.append)
    assert jobs == []
    assert len(error.value.problems) == 2


@pytest.mark.parametrize(("kind", "status"), [(FrameworkError, 2), (ZeroDivisionError, 1)])
def test_a_job_that_fails_does_not_stop_the_others(write, kind, status):
    ran = []

    def task(job):
        ran.append(job.spec.seed)
        if job.spec.seed == 2:
            raise kind("no")

    with pytest.raises(FrameworkError, match="1 of 3 trials failed") as error:
        run_line(CommandLine(["seed=1,2,3"], multirun=True), task)
    assert ran == [1, 2, 3]
    assert error.value.exit_status == status
    with pytest.raises(kind, match="no"):
        run_line(CommandLine(["seed=2"]), task)


CREATE = (
    "{{handlers: {{x: {{class: logging.FileHandler, filename: {file}}}}}, "
    "root: {{handlers: [x]}}, version: 1}}"
)
PAYLOADS = {
    "logging": "hydra: {{job_logging: {create}}}\n",
    "hydra_logging": "hydra: {{hydra_logging: {create}}}\n",
    "header": "# @package hydra\njob_logging: {create}\n",
    "callback": "hydra: {{callbacks: {{x: {{_target_: builtins.open, file: {file}, mode: w}}}}}}\n",
    "launcher": "hydra: {{launcher: {{_target_: builtins.open, file: {file}, mode: w}}}}\n",
    "folder": "hydra: {{run: {{dir: {file}}}, sweep: {{dir: {file}}}}}\n",
    "option": "defaults: [{{override hydra/job_logging: evil}}]\n",
    "package": "defaults: [{{/optimizer@hydra.job_logging: evil}}]\n",
    "part": "model: {{_target_: builtins.open, file: {file}, mode: w}}\n",
    "sweep": "hydra: {{sweeper: {{params: {{hydra.run.dir: '{file},{file}'}}}}}}\n",
}


@pytest.mark.parametrize("multirun", [False, True], ids=["run", "sweep"])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_an_experiment_file_cannot_run_code(write, tmp_path, payload, multirun):
    create = CREATE.format(file=tmp_path / "made")
    text = PAYLOADS[payload].format(file=tmp_path / "made", create=create)
    write("conf/experiment/evil.yaml", text)
    write("conf/hydra/job_logging/evil.yaml", create)
    write("conf/optimizer/evil.yaml", create)
    with pytest.raises(ConfigError, match=r"evil\.yaml"):
        compose("experiment=evil", multirun=multirun)
    assert not (tmp_path / "made").exists()


def test_the_payload_works_without_the_check(tmp_path):
    """The control: a logging config of this form creates the file."""
    import logging.config

    import yaml

    with contextlib.suppress(Exception):
        logging.config.dictConfig(yaml.safe_load(CREATE.format(file=tmp_path / "made")))
    for handler in logging.getLogger().handlers[:]:
        if getattr(handler, "baseFilename", "") == str(tmp_path / "made"):
            logging.getLogger().removeHandler(handler)
            handler.close()
    assert (tmp_path / "made").exists()


def test_composing_does_not_change_the_process(write):
    before = (list(sys.argv), dict(os.environ))
    compose()
    with pytest.raises(ConfigError):
        compose("seed=x")
    with pytest.raises(ConfigError):
        compose("~nope")
    assert before == (list(sys.argv), dict(os.environ))
    assert not GlobalHydra.instance().is_initialized()


def test_the_composed_config_is_printed_instead_of_a_run(write, capsys):
    run_line(CommandLine(["optimizer.lr=0.5"], cfg="job"), lambda job: pytest.fail("only shown"))
    assert "  lr: 0.5\n" in capsys.readouterr().out
    run_line(CommandLine([], cfg="job", resolve=True), lambda job: pytest.fail("only shown"))
    assert "${" not in capsys.readouterr().out
    run_line(CommandLine([], info="defaults"), lambda job: pytest.fail("only shown"))
    with pytest.raises(ConfigError, match="did you mean 'sgd'"):
        run_line(CommandLine(["optimizer=sgdd"], cfg="job"), lambda job: None)
