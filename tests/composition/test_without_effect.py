"""Settings without effect are reported before a run starts."""

import json

import pytest

from framework.composition.compose import CommandLine
from framework.composition.sources import Sources
from framework.composition.spec import read_spec
from framework.errors import ConfigError, FrameworkError
from framework.tuning.search.space import Space
from runs import run_line

TREE = {
    "model": "mlp",
    "data": "digits",
    "task": "classification",
    "optimizer": "adamw",
    "trainer": {"max_steps": 1},
}
SMALL = "trainer.max_steps=1 loader.limit=1 model.width=4 model.depth=1 loggers=[json_lines]"


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def problems_of(line, multirun=False):
    """Return the problems of a command line."""
    with pytest.raises(FrameworkError) as raised:
        run_line(CommandLine(line.split(), multirun=multirun), lambda job: None)
    return getattr(raised.value, "problems", [str(raised.value)])


def composed(*overrides, multirun=False):
    """Return the spec of each job."""
    specs = []
    run_line(CommandLine(list(overrides), multirun=multirun), lambda job: specs.append(job.spec))
    return specs


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("hydra.run.dir=x", "run.root=DIR and run.name=NAME"),
        ("activation=tanh model.activation=gelu", "model.activation overrides it (command line)"),
        ("experiment=digits_transformer activation=tanh", "digits_transformer.yaml"),
        ("resume=runs/default/x run.name=y", "in the folder of that run"),
    ],
)
def test_a_setting_without_effect_is_a_problem(line, reason, tmp_path):
    if "digits_transformer" in line:
        (tmp_path / "conf/experiment").mkdir(parents=True)
        file = tmp_path / "conf/experiment/digits_transformer.yaml"
        file.write_text("model: {name: mlp, activation: relu}\n")
    (problem,) = problems_of(line)
    assert "has no effect" in problem
    assert reason in problem
    assert {path.name for path in tmp_path.iterdir()} <= {"conf"}, "no run folder"


@pytest.mark.parametrize(
    "path",
    [
        "callbacks.non_finite",
        "callbacks.early_stop",
        "metrics.accuracy",
        "transforms.crop",
        "loggers.tensorboard",
        "loader",
    ],
)
@pytest.mark.parametrize("value", ["null", "3", "true"])
def test_a_part_or_section_has_settings_instead_of_a_value(path, value, tmp_path):
    (problem,) = problems_of(f"{path}={value}")
    facts = problem.facts
    assert (facts.setting, facts.expected) == (path, "a mapping of settings")
    key, _, name = path.partition(".")
    removes = bool(name) and value == "null"
    assert (f"~{key}={name}" in problem) == removes
    folder = tmp_path / "conf/experiment"
    folder.mkdir(parents=True)
    line = f"{key}: {{{name}: {value}}}" if name else f"{key}: {value}"
    (folder / "mine.yaml").write_text(line)
    (problem,) = problems_of("experiment=mine")
    assert problem.facts.source.endswith("mine.yaml:1")
    assert (f"~{key}={name}" in problem) == removes


def test_an_unknown_part_without_settings_is_unknown():
    (problem,) = problems_of("callbacks.non_finit=null")
    assert problem.facts.suggestion == "non_finite"


def test_the_command_line_may_override_the_choice_of_a_file(tmp_path):
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/mine.yaml").write_text("activation: tanh\n")
    (spec,) = composed("experiment=mine", "model.activation=gelu")
    assert spec.tree["model"]["activation"]["name"] == "gelu"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("seed=1,1", "seed=1 is given 2 times"),
        ("optimizer.lr=1e-3,0.001", "optimizer.lr=0.001 is given 2 times"),
        (
            "seed=0,0 optimizer.lr=1,1 sweep.zip=[seed,optimizer.lr]",
            "seed=0 optimizer.lr=1 is given 2 times",
        ),
        ("loss=cross_entropy,null", "are the same experiment"),
        ("optimizer=glob(zzz*)", "there are no values"),
        ("seed=0,1 hydra.sweep.dir=x", "run.root=DIR and sweep.name=NAME"),
    ],
)
def test_a_sweep_with_equal_trials_is_a_problem(line, message, tmp_path):
    (problem,) = problems_of(line, multirun=True)
    assert message in problem
    assert not list(tmp_path.iterdir()), "no sweep folder"


def test_trials_may_differ_in_one_value_of_a_pair():
    overrides = ["seed=0,0", "optimizer.lr=1,2", "sweep.zip=[seed,optimizer.lr]"]
    assert len(composed(*overrides, multirun=True)) == 2


def test_an_override_without_effect_that_does_no_harm_is_noted(command, tmp_path, capsys):
    (tmp_path / "conf/experiment").mkdir(parents=True)
    file = tmp_path / "conf/experiment/rates.yaml"
    file.write_text("hydra: {sweeper: {params: {seed: '0,1'}}}\n")
    line = f"train experiment=rates seed=1 seed=2 {SMALL}"
    status, _, err = command(line)
    assert status == 0
    notes = [text for text in err.splitlines() if "has no effect" in text]
    assert notes[0].startswith("framework: seed=1 has no effect: seed=2")
    assert notes[1] == "framework: hydra.sweeper.params has no effect without -m: seed"
    assert len(notes) == 2
    (spec,) = composed("optimizer={name: sgd, lr: 1}", "optimizer.lr=2")
    assert spec.tree["optimizer"]["lr"] == 2.0
    note = "lr in optimizer={name: sgd, lr: 1} has no effect: optimizer.lr=2"
    assert note in capsys.readouterr().err
    (run,) = (tmp_path / "runs/rates").glob("2*")
    for override in ("run.name=y", "init_from=z", "resume=auto"):
        status, _, err = command(f"resume {run} {override}")
        assert status == 2
        assert f"{override}: has no effect" in err


@pytest.mark.parametrize("flag", ["--plugins empty", "--config-dir empty", "--inexact"])
def test_an_option_without_effect_is_a_problem(command, tmp_path, flag):
    (tmp_path / "empty").mkdir()
    status, _, err = command(f"train {flag} {SMALL}")
    assert status == 2
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("chosen", "optimizer"),
    [
        ("optimizer={name: sgd, lr: 0.1}", ("sgd", 0.1)),
        ("optimizer={lr: 0.25}", ("adamw", 0.25)),
    ],
)
def test_a_part_with_its_settings_in_one_override(chosen, optimizer):
    (spec,) = composed(chosen)
    found = spec.tree["optimizer"]
    assert (found["name"], found["lr"]) == optimizer
    assert ("momentum" in found) == (found["name"] == "sgd")


def test_parts_of_a_list_with_their_settings():
    (spec,) = composed(
        "callbacks=[non_finite,{name: checkpoint, every: 7steps}]",
        "+callbacks={name: ema, decay: 0.5}",
    )
    assert list(spec.tree["callbacks"]) == ["non_finite", "checkpoint", "ema"]
    assert spec.tree["callbacks"]["checkpoint"]["every"] == "7steps"
    assert spec.tree["callbacks"]["ema"]["decay"] == 0.5


VALUES = "optimizer={name: sgd, lr: 0.1},{name: sgd, lr: 0.2},adamw"


def test_a_sweep_over_parts_with_their_settings(tmp_path):
    specs = composed(VALUES, "sweep.name=s", multirun=True)
    found = [(spec.tree["optimizer"]["name"], spec.tree["optimizer"]["lr"]) for spec in specs]
    assert found == [("sgd", 0.1), ("sgd", 0.2), ("adamw", 0.001)]
    row = json.loads((tmp_path / "runs/default/s/sweep.jsonl").read_text().splitlines()[0])
    assert row["settings"] == {"optimizer": {"name": "sgd", "lr": 0.1}}


def test_a_search_over_parts_with_their_settings():
    space = Space([VALUES])
    drawn = [space.sample(lambda name, options, n=n: options.choices[n]) for n in range(3)]
    assert drawn[0] == ["optimizer=sgd", "++optimizer={name:'sgd',lr:0.1}"]
    assert drawn[2] == ["optimizer=adamw"]
    with pytest.raises(ConfigError, match=r"sgd is .* twice"):
        Space(["optimizer=sgd,sgd"])


def test_settings_without_a_name_are_of_the_default():
    (spec,) = composed("loss.label_smoothing=0.1")
    assert spec.tree["task"]["loss"]["name"] == "cross_entropy"
    assert spec.tree["task"]["loss"]["label_smoothing"] == 0.1
    (problem,) = problems_of("norm.eps=1")
    assert problem.startswith("norm: ")
    assert "no norm is chosen" in problem
    assert "norm=NAME" in problem


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 0.001), ("true", True), ("1.10", 1.1), ("1_000", 1000), ("+5", 5)]
)
def test_a_text_that_looks_like_a_number_is_refused_with_its_quoted_form(text, value):
    with pytest.raises(ConfigError) as raised:
        read_spec(TREE | {"run": {"name": value}}, Sources({"run.name": f"run.name={text}"}))
    assert f"""run.name="'{text}'\"""" in raised.value.problems[0]


@pytest.mark.parametrize(("text", "value"), [("12", 12), ("${seed}", 12)])
def test_a_number_that_was_typed_in_this_form_may_be_a_text(text, value):
    spec = read_spec(TREE | {"run": {"name": value}}, Sources({"run.name": f"run.name={text}"}))
    assert spec.sections["run"]["name"] == "12"


def test_a_quoted_number_is_a_text():
    assert composed("run.name='1e-3'")[0].sections["run"]["name"] == "1e-3"
    (problem,) = problems_of("run.name=1e-3")
    assert problem.endswith("""run.name="'1e-3'" (command line)""")


def test_the_output_of_a_plugin_goes_to_stderr(command, tmp_path, forget_plugins):
    (tmp_path / "prints.py").write_text("print('loaded')\n")
    status, out, err = command("list activation --json --plugins prints.py")
    assert status == 0
    assert json.loads(out)
    assert err == "loaded\n"


def test_problems_of_overrides_and_settings_are_reported_together():
    with pytest.raises(ConfigError) as raised:
        composed("hydra.run.dir=x", "optimizer.lr=-1")
    assert len(raised.value.problems) == 2
