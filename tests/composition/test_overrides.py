"""What is typed, and what Hydra gets instead."""

import pytest

from framework.composition.overrides import as_typed, expand_job, rewrite


@pytest.mark.parametrize(
    ("typed", "given"),
    [
        ("optimizer=sgd", "optimizer=sgd"),
        ("+optimizer=sgd", "optimizer=sgd"),
        ("optimizer.lr=0.1", "++optimizer.lr=0.1"),
        ("+nobody.knows=1", "++nobody.knows=1"),  # for our own check, with the rest
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
            "callbacks=[non_finite,{name: checkpoint, every: 7steps}]",
            "callbacks=[non_finite,checkpoint] ++callbacks.checkpoint={name:'checkpoint',every:'7steps'}",
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
def test_one_override(typed, given):
    found = rewrite([typed], [])
    assert " ".join(found.arguments) == given
    assert found.problems == []


@pytest.mark.parametrize(
    ("typed", "given"),
    [
        ("optimizer=sgd,adam", "optimizer=sgd,adam"),
        ("scheduler=null,cosine", "scheduler=_none_,cosine"),
        ("seed=range(3)", "++seed=range(3)"),
        ("model.activation=relu,gelu", "++model.activation.name=relu,gelu"),
        ("metrics=[accuracy],[accuracy,f1]", "metrics=[accuracy],[accuracy,f1]"),
        ("optimizer=glob(ada*)", "optimizer=glob(ada*)"),
    ],
)
def test_one_override_of_a_sweep(typed, given):
    found = rewrite([typed], [], multirun=True)
    assert " ".join(found.arguments) == given
    assert found.swept == [typed.partition("=")[0]]
    (problem,) = rewrite([typed], []).problems
    assert f"{typed}: has several values: add -m to try each" in problem


@pytest.mark.parametrize(
    "launched", ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweeper.params.a=1"]
)
def test_settings_of_hydra_are_for_sweeps(launched):
    assert rewrite([launched], [], multirun=True).arguments == [launched]
    assert rewrite([launched], [], shows=True).arguments == [launched]
    (problem,) = rewrite([launched], []).problems
    assert "add -m for one" in problem


@pytest.mark.parametrize(
    ("typed", "given"),
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
def test_overrides_that_add_up(typed, given):
    found = rewrite(typed.split(), [])
    assert " ".join(found.arguments) == given
    assert found.problems == found.notes == []


def test_a_sweep_that_is_replaced_by_a_value_is_none():
    assert rewrite(["seed=0,1", "seed=3"], [], multirun=True).swept == []


@pytest.mark.parametrize(
    ("of_a_sweep", "of_a_job"),
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
def test_what_a_job_of_a_sweep_gets(of_a_sweep, of_a_job):
    assert expand_job(of_a_sweep) == of_a_job


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("hydra.job.chdir=true", "has no effect"),
        ("hydra.verbose=true", "has no effect"),
        ("hydra.run.dir=x", "run.root=DIR and run.name=NAME"),
        ("seed=range(0)", "there is no value in this range"),
        ("callbacks=[progress,progress]", "progress is there twice"),
    ],
)
def test_what_has_no_effect_is_a_problem(typed, said):
    (problem,) = rewrite([typed], [], multirun="range" in typed).problems
    assert said in problem


def test_each_of_several_parts_needs_its_name():
    (problem,) = rewrite(["metrics=[{k: 3}]"], []).problems
    assert "should be the name of a metric, or a list of names" in problem
    assert "or {name: NAME, KEY: VALUE}" in problem


@pytest.mark.parametrize(
    ("typed", "given", "without_effect"),
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
def test_of_two_overrides_of_one_key_the_last_counts_and_it_is_said(typed, given, without_effect):
    found = rewrite(typed.split(), [])
    assert " ".join(found.arguments) == given
    assert found.notes == [f"{without_effect} has no effect: {typed.split()[1]} follows it"]


def test_a_part_goes_before_its_settings_whatever_was_typed_first():
    typed = ["model.activation.alpha=2", "optimizer.lr=1", "model.activation=elu", "optimizer=sgd"]
    arguments = rewrite(typed, []).arguments
    assert arguments.index("++model.activation.name=elu") < arguments.index(
        "++model.activation.alpha=2"
    )
    assert arguments[0] == "optimizer=sgd"


def test_a_faulty_override_is_told_and_left_out():
    found = rewrite(["optimizer=sgdd", "seed=1", "nonsense"], [])
    assert found.arguments == ["++seed=1"]
    assert found.problems == [
        "optimizer=sgdd: there is no optimizer 'sgdd'; did you mean 'sgd'? (command line)",
        "nonsense: should be KEY=VALUE (command line)",
    ]


@pytest.mark.parametrize("key", ["_target_", "optimizer._partial_", "hydra.launcher._target_"])
@pytest.mark.parametrize(
    "form", ["{}=os.system", "+{}=os.system", "++model={{a: {{{}: x}}}}", "x=${{{}}}"]
)
def test_nothing_to_import_in_any_place(key, form):
    (problem,) = rewrite([form.format(key)], []).problems
    assert "is refused: a config names registered parts" in problem


def test_options_are_also_the_yaml_files_of_a_config_folder(tmp_path):
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "mine.yaml").write_text("name: sgd\n")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "spam.yaml").write_text("seed: 1\n")
    assert rewrite(["optimizer=mine", "experiment=spam"], [tmp_path]).problems == []
    assert "did you mean 'spam'?" in rewrite(["experiment=spm"], [tmp_path]).problems[0]
    for name in ("../optimizer/mine", "/etc/passwd", "[spam,spam]"):
        assert rewrite([f"experiment={name}"], [tmp_path]).problems


@pytest.mark.parametrize(
    ("of_a_job", "typed"),
    [
        ("++seed=3", "seed=3"),
        ("++model.activation.name=gelu", "model.activation=gelu"),
        ("also/callbacks=early_stop", "+callbacks=early_stop"),
        ("scheduler=_none_", "scheduler=null"),
        ("++run.name=a-$\\{seed\\}", "run.name=a-${seed}"),
        ("optimizer=sgd", "optimizer=sgd"),
    ],
)
def test_an_override_of_a_job_is_shown_as_typed(of_a_job, typed):
    assert as_typed(of_a_job) == typed
