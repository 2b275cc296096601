"""Overrides as typed, and as they are rewritten for Hydra."""

import pytest

from framework.composition.compose import config_folders
from framework.composition.override_syntax import override_key
from framework.composition.overrides import as_typed, expand_job, rewrite

CHECKPOINTS = "callbacks=[non_finite,{name: checkpoint, every: 7steps}]"


@pytest.mark.parametrize(
    ("typed", "rewritten"),
    [
        ("optimizer=sgd", "optimizer=sgd"),
        ("+optimizer=sgd", "optimizer=sgd"),
        ("optimizer.lr=0.1", "++optimizer.lr=0.1"),
        ("+no_such.key=1", "++no_such.key=1"),  # reported later, with the other problems
        ("seed=3", "++seed=3"),
        ("model.activation=gelu", "++model.activation=gelu ++model.activation.name=gelu"),
        ("model/activation=gelu", "++model.activation=gelu ++model.activation.name=gelu"),
        ("model.activation=null", "++model.activation=null"),
        ("model.activation={name: elu, alpha: 2}", "++model.activation={name: elu, alpha: 2}"),
        ("model.blocks=[conv2d,linear]", "++model.blocks=[conv2d,linear]"),
        ("+callbacks=early_stop", "also/callbacks=early_stop"),
        ("+callbacks=[early_stop,progress]", "also/callbacks=[early_stop,progress]"),
        ("callbacks=[]", "callbacks=[]"),
        ("callbacks=null", "callbacks=[]"),
        ("~callbacks", "callbacks=[]"),
        ("~callbacks=progress", "~callbacks.progress"),
        ("~callbacks.progress", "~callbacks.progress"),
        ("scheduler=null", "scheduler=_none_"),
        ("~scheduler", "scheduler=_none_"),
        ("experiment=null", ""),
        ("~optimizer.lr", "~optimizer.lr"),
        ("optimizer={name: sgd, lr: 0.1}", "optimizer=sgd ++optimizer={name:'sgd',lr:0.1}"),
        ("optimizer={lr: 0.1}", "++optimizer={lr:0.1}"),
        (
            CHECKPOINTS,
            (
                "callbacks=[non_finite,checkpoint] "
                "++callbacks.checkpoint={name:'checkpoint',every:'7steps'}"
            ),
        ),
        (
            "+metrics={name: top_k, k: 3}",
            "also/metrics=[top_k] ++metrics.top_k={name:'top_k',k:3}",
        ),
        ("run.root=d/été", "++run.root='d/été'"),
        ("data.path=[日本,b]", "++data.path=['日本',b]"),
        ("optimizer.lr=", "++optimizer.lr="),
        ("run.name='a b'", "++run.name='a b'"),
    ],
)
def test_an_override_is_rewritten_for_hydra(typed, rewritten):
    found = rewrite([typed], [])
    assert " ".join(found.arguments) == rewritten
    assert found.problems == []


@pytest.mark.parametrize(
    ("typed", "rewritten"),
    [
        ("optimizer=sgd,adam", "optimizer=sgd,adam"),
        ("scheduler=null,cosine", "scheduler=_none_,cosine"),
        ("seed=range(3)", "++seed=range(3)"),
        ("model.activation=relu,gelu", "++model.activation.name=relu,gelu"),
        ("metrics=[accuracy],[accuracy,f1]", "metrics=[accuracy],[accuracy,f1]"),
        ("optimizer=glob(ada*)", "optimizer=glob(ada*)"),
    ],
)
def test_an_override_with_several_values_needs_a_sweep(typed, rewritten):
    found = rewrite([typed], [], multirun=True)
    assert " ".join(found.arguments) == rewritten
    assert found.swept == [typed.partition("=")[0]]
    (problem,) = rewrite([typed], []).problems
    assert problem.startswith(f"{typed}: ")
    assert "several values: add -m" in problem


@pytest.mark.parametrize(
    "override", ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweeper.params.a=1"]
)
def test_settings_of_hydra_need_a_sweep(override):
    folders = config_folders()
    assert rewrite([override], folders, multirun=True).arguments == [override]
    assert rewrite([override], folders, shows=True).arguments == [override]
    (problem,) = rewrite([override], folders).problems
    assert "add -m" in problem


@pytest.mark.parametrize(
    ("typed", "rewritten"),
    [
        ("+callbacks=early_stop +callbacks=ema", "also/callbacks=[early_stop,ema]"),
        (
            "+callbacks=[early_stop] +callbacks=[ema,lookahead]",
            "also/callbacks=[early_stop,ema,lookahead]",
        ),
        (
            "+callbacks=ema +callbacks={name:early_stop,patience:2}",
            "also/callbacks=[ema,early_stop] ++callbacks.early_stop={name:'early_stop',patience:2}",
        ),
        ("~callbacks=progress ~callbacks=checkpoint", "~callbacks.progress ~callbacks.checkpoint"),
        ("seed=1 seed=1", "++seed=1"),
    ],
)
def test_overrides_of_one_list_are_joined(typed, rewritten):
    found = rewrite(typed.split(), [])
    assert " ".join(found.arguments) == rewritten
    assert found.problems == found.notes == []


def test_a_later_value_replaces_a_sweep():
    assert rewrite(["seed=0,1", "seed=3"], [], multirun=True).swept == []


@pytest.mark.parametrize(
    ("override", "rewritten"),
    [
        ("scheduler=null", ["scheduler=_none_"]),
        ("optimizer={name: sgd, lr: 1}", ["optimizer=sgd", "++optimizer={name:'sgd',lr:1}"]),
        (
            "+metrics=[{name: top_k, k: 3}]",
            ["also/metrics=[top_k]", "++metrics.top_k={name:'top_k',k:3}"],
        ),
        ("++optimizer={name: sgd}", ["++optimizer={name: sgd}"]),
        ("optimizer=sgd", ["optimizer=sgd"]),
    ],
)
def test_an_override_of_a_job_is_rewritten_with_its_settings(override, rewritten):
    assert expand_job(override) == rewritten


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("hydra.job.chdir=true", "has no effect"),
        ("hydra.verbose=true", "has no effect"),
        ("hydra.run.dir=x", "run.root=DIR and run.name=NAME"),
        ("seed=range(0)", "no values"),
        ("callbacks=[progress,progress]", "progress is listed twice"),
    ],
)
def test_an_override_without_effect_is_a_problem(typed, message):
    (problem,) = rewrite([typed], [], multirun="range" in typed).problems
    assert message in problem


@pytest.mark.parametrize("key", ["optimizer", "callbacks", "experiment"])
def test_names_cannot_be_drawn_from_an_interval(key):
    (problem,) = rewrite([f"{key}=interval(0,1)"], [], multirun=True).problems
    assert problem.startswith(f"{key}=interval(0,1): expected the name of a")


def test_each_part_of_a_list_needs_a_name():
    (problem,) = rewrite(["metrics=[{k: 3}]"], []).problems
    assert "the name of a metric, or a list of names" in problem
    assert "{name: NAME, KEY: VALUE}" in problem


@pytest.mark.parametrize(
    ("typed", "rewritten", "without_effect"),
    [
        ("seed=1 seed=2", "++seed=2", "seed=1"),
        ("optimizer=sgd optimizer=adam", "optimizer=adam", "optimizer=sgd"),
        ("optimizer.lr=1 ++optimizer.lr=2", "++optimizer.lr=2", "optimizer.lr=1"),
        ("~scheduler scheduler=linear", "scheduler=linear", "~scheduler"),
        (
            "model/activation=elu model.activation=gelu",
            "++model.activation=gelu ++model.activation.name=gelu",
            "model/activation=elu",
        ),
    ],
)
def test_the_last_of_two_overrides_of_one_key_counts(typed, rewritten, without_effect):
    found = rewrite(typed.split(), [])
    assert " ".join(found.arguments) == rewritten
    (note,) = found.notes
    assert note.startswith(f"{without_effect} has no effect: {typed.split()[1]}")


def test_notes_on_settings_come_in_the_order_of_the_overrides():
    names = ["lr", "momentum", "nesterov", "dampening", "weight_decay"]
    settings = ", ".join(f"{name}: 0" for name in names)
    overrides = [f"optimizer={{name: sgd, {settings}}}", *(f"optimizer.{n}=1" for n in names)]
    notes = rewrite(overrides, []).notes
    assert [note.split()[0] for note in notes] == names


def test_a_part_comes_before_its_settings_whatever_was_typed_first():
    typed = ["model.activation.alpha=2", "optimizer.lr=1", "model.activation=elu", "optimizer=sgd"]
    arguments = rewrite(typed, []).arguments
    name = arguments.index("++model.activation.name=elu")
    setting = arguments.index("++model.activation.alpha=2")
    assert name < setting
    assert arguments[0] == "optimizer=sgd"


def test_an_invalid_override_is_reported_and_left_out():
    found = rewrite(["optimizer=sgdd", "seed=1", "nonsense"], [])
    assert found.arguments == ["++seed=1"]
    unknown_name, no_value = found.problems
    assert unknown_name.startswith("optimizer=sgdd: ")
    assert "did you mean 'sgd'?" in unknown_name
    assert no_value == "nonsense: expected KEY=VALUE (command line)"


@pytest.mark.parametrize("key", ["_target_", "optimizer._partial_", "hydra.launcher._target_"])
@pytest.mark.parametrize(
    "form", ["{}=os.system", "+{}=os.system", "++model={{a: {{{}: x}}}}", "x=${{{}}}"]
)
def test_an_override_cannot_import_code(key, form):
    (problem,) = rewrite([form.format(key)], []).problems
    assert "is refused" in problem


def test_the_yaml_files_of_a_config_folder_can_be_chosen(tmp_path):
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "mine.yaml").write_text("name: sgd\n")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "spam.yaml").write_text("seed: 1\n")
    assert rewrite(["optimizer=mine", "experiment=spam"], [tmp_path]).problems == []
    assert "did you mean 'spam'?" in rewrite(["experiment=spm"], [tmp_path]).problems[0]
    for name in ("../optimizer/mine", "/etc/passwd", "[spam,spam]"):
        assert rewrite([f"experiment={name}"], [tmp_path]).problems


@pytest.mark.parametrize(
    ("override", "typed"),
    [
        ("++seed=3", "seed=3"),
        ("++model.activation.name=gelu", "model.activation=gelu"),
        ("also/callbacks=early_stop", "+callbacks=early_stop"),
        ("scheduler=_none_", "scheduler=null"),
        ("++run.name=a-$\\{seed\\}", "run.name=a-${seed}"),
        ("optimizer=sgd", "optimizer=sgd"),
    ],
)
def test_an_override_of_a_job_is_shown_as_typed(override, typed):
    assert as_typed(override) == typed


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optimizer.lr=0.1", "optimizer.lr"),
        ("++model/norm=batch", "model.norm"),
        ("~callbacks.ema", "callbacks.ema"),
        ("data.path=a/b=c", "data.path"),
    ],
)
def test_key_of_an_override(override, key):
    assert override_key(override) == key
