"""Where the settings of an experiment are written, and what they replace."""

import pytest

from framework.composition.compose import CommandLine, opened_composition, run_composed
from framework.composition.origins import Origins
from framework.composition.sources import in_merge_order
from framework.errors import ConfigError
from runs import composed

BASE = """\
optimizer: {name: sgd, lr: 0.5, momentum: 0.3}
callbacks: [progress, {name: ema, decay: 0.5}]
trainer: {max_epochs: 4}
"""
CHILD = """\
defaults:
  - base
optimizer:
  lr: 0.25
activation: {name: elu, alpha: 2.0}
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "base.yaml").write_text(BASE)
    (folder / "child.yaml").write_text(CHILD)
    monkeypatch.chdir(tmp_path)
    return folder


def places(spec, path):
    return [(each["place"], each["value"]) for each in spec.origins[path]]


def test_the_chain_of_config_files_and_overrides(project):
    spec = composed(["experiment=child", "optimizer.lr=0.1", "optimizer.lr=0.2"])
    assert spec.tree["optimizer"]["lr"] == 0.2
    assert places(spec, "optimizer.lr") == [
        ("conf/experiment/base.yaml:1", 0.5),
        ("conf/experiment/child.yaml:4", 0.25),
        ("command line", 0.1),
        ("command line", 0.2),
    ]
    assert spec.origins["optimizer.lr"][-1]["by"] == "optimizer.lr=0.2"


def test_a_default_has_the_line_of_its_parameter(project):
    origins = Origins(composed([]))
    default = origins.default("model.depth")
    file, _, line = default.place.rpartition(":")
    assert default.value == 2
    assert default.by == "default of model/mlp"
    with open(file) as source:
        assert "depth" in source.read().splitlines()[int(line) - 1]


def test_the_choice_of_a_part(project):
    spec = composed(["experiment=child"])
    assert places(spec, "optimizer.name")[-1] == ("conf/experiment/base.yaml:1", "sgd")
    assert places(spec, "optimizer.name")[0][1] == "adamw"  # in the defaults list of config.yaml
    chosen = composed(["optimizer=sgd"])
    assert places(chosen, "optimizer.name")[-1] == ("command line", "sgd")


def test_a_setting_of_another_part_is_not_used(project):
    spec = composed(["experiment=base", "optimizer=adamw"])
    [origin] = spec.origins["optimizer.lr"]
    assert origin["other_part"] == "sgd"
    assert spec.tree["optimizer"]["lr"] == 0.001


def test_parts_of_lists_and_their_settings(project):
    spec = composed(["experiment=base", "+callbacks=early_stop"])
    assert places(spec, "callbacks.ema.decay") == [("conf/experiment/base.yaml:2", 0.5)]
    assert places(spec, "callbacks.early_stop") == [("command line", "early_stop")]
    listed = composed(["callbacks=[{name: ema, decay: 0.25}]"])
    assert places(listed, "callbacks.ema.decay") == [("command line", 0.25)]


def test_a_part_that_follows_the_choice_of_the_experiment(project):
    spec = composed(["experiment=child"])
    assert spec.tree["model"]["activation"]["alpha"] == 2.0
    assert places(spec, "model.activation.alpha") == [("conf/experiment/child.yaml:5", 2.0)]
    assert places(spec, "activation")[-1] == ("conf/experiment/child.yaml:5", "elu")
    own = composed(["model.activation=gelu"])
    assert places(own, "model.activation.name") == [("command line", "gelu")]
    assert "activation" not in own.origins  # null in config.yaml: the default of each part


def test_a_removed_part_and_null(project):
    assert places(composed(["scheduler=null"]), "scheduler")[-1] == ("command line", None)
    assert places(composed(["~scheduler"]), "scheduler")[-1] == ("command line", None)


def test_the_settings_that_differ_between_trials_come_from_the_sweep(project):
    spec = composed(["optimizer.lr=0.3"])
    origins = Origins(spec, overrides=["optimizer.lr=0.3", "seed=1"], swept=["optimizer.lr"])
    assert [each.place for each in origins.written("optimizer.lr")] == ["sweep"]
    assert [each.place for each in origins.written("seed")] == ["command line"]


def test_an_error_names_the_experiment_that_gives_the_value(project):
    """Hydra reads child.yaml before base.yaml, and merges it afterwards."""
    (project / "child.yaml").write_text(CHILD.replace("lr: 0.25", "momentum: 7"))
    with pytest.raises(ConfigError, match=r"child\.yaml:4"):
        run_composed(CommandLine(["experiment=child"]), lambda job: None)


def test_a_config_of_the_project_is_merged_after_experiments(project):
    text = "defaults: [framework, _self_]\ntrainer: {max_epochs: 1}\n"
    (project.parent / "config.yaml").write_text(text)
    spec = composed(["experiment=base"])
    assert spec.tree["trainer"]["max_epochs"] == 1
    assert [value for _, value in places(spec, "trainer.max_epochs")] == [30, 4, 1]
    assert places(spec, "model.name")[0][1] == "mlp"


@pytest.mark.parametrize(
    ("defaults", "order"),
    [
        ("[base]", ["config", "base", "child"]),
        ("[base, _self_]", ["config", "base", "child"]),
        ("[_self_, base]", ["config", "child", "base"]),
    ],
)
def test_the_order_of_config_files_is_that_of_hydra(project, defaults, order):
    (project / "child.yaml").write_text(f"defaults: {defaults}\ntrainer: {{max_epochs: 7}}\n")
    with opened_composition(CommandLine(["experiment=child"])) as (composing, hydra):
        from framework.composition.compose import compose

        job = compose(composing, hydra)
        assert [file.stem for file, _ in in_merge_order(composing.files)] == order
    value = job.spec.tree["trainer"]["max_epochs"]
    assert value == (4 if order[-1] == "base" else 7)
    assert job.spec.origins["trainer.max_epochs"][-1]["value"] == value
