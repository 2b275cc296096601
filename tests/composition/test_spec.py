"""From a composed tree to a checked Spec, without Hydra."""

import pytest

import framework as fw
from framework.composition.sections import SECTIONS, section_settings
from framework.composition.sources import Sources
from framework.composition.spec import read_spec
from framework.errors import ConfigError
from framework.registry.registry import Maker

SMALL = {
    "model": "mlp",
    "data": "digits",
    "task": "classification",
    "optimizer": "adamw",
    "trainer": {"max_steps": 1},
}


def problems(**changes):
    """Return the problems of the small experiment with changes."""
    with pytest.raises(ConfigError) as error:
        read_spec(SMALL | changes, Sources(fallback="here"))
    return error.value.problems


def test_a_tree_becomes_makers_and_checked_settings():
    spec = read_spec(SMALL | {"optimizer": {"name": "sgd", "lr": 1, "momentum": 0.9}, "seed": 3.0})
    optimizer = spec.parts["optimizer"]
    assert isinstance(optimizer, Maker)
    assert optimizer.entry.name == "sgd"
    assert optimizer.settings["lr"] == 1.0
    assert type(optimizer.settings["lr"]) is float
    assert spec.seed == 3
    assert spec.parts["scheduler"] is None
    assert spec.parts["metric"] == spec.parts["callback"] == []


def test_a_section_has_all_its_settings():
    spec = read_spec(SMALL)
    for name in SECTIONS:
        assert spec.sections[name].keys() == section_settings(name).keys()
    assert spec.sections["trainer"]["accumulate"] == 1


@pytest.mark.parametrize(
    "callbacks", [["early_stop"], {"early_stop": {}}, {"early_stop": {"patience": 3}}]
)
def test_a_list_of_parts_may_be_a_mapping_with_their_settings(callbacks):
    (maker,) = read_spec(SMALL | {"callbacks": callbacks}).parts["callback"]
    assert maker.entry.name == "early_stop"
    if callbacks == {"early_stop": {"patience": 3}}:
        assert maker().patience == 3
    else:
        assert maker.settings == {}


@pytest.mark.parametrize(
    ("tree", "built"),
    [
        ({}, "ReLU"),  # the default of mlp itself
        ({"activation": "gelu"}, "GELU"),  # the experiment's choice
        # the model's own choice comes first
        ({"activation": "gelu", "model": {"name": "mlp", "activation": "tanh"}}, "Tanh"),
        ({"activation": {"name": "elu", "alpha": 0.5}}, "ELU(alpha=0.5)"),
        ({"model": {"name": "mlp", "activation": {"name": "elu", "alpha": 0.5}}}, "ELU(alpha=0.5)"),
        (
            {"activation": "elu", "model": {"name": "mlp", "activation": {"alpha": 0.5}}},
            "ELU(alpha=0.5)",
        ),
    ],
)
def test_a_model_gets_its_own_activation_or_that_of_the_experiment(tree, built):
    model = read_spec(SMALL | tree).parts["model"]((64,), (10,))
    assert built in str(model)


def test_each_part_of_a_list_may_have_settings():
    blocks = ["linear", {"name": "linear", "width": 7}]
    tree = {"model": {"name": "stack", "blocks": blocks}}
    model = read_spec(SMALL | tree).parts["model"]((64,), (10,))
    widths = [weight.shape[0] for weight in model.parameters() if weight.ndim == 2]
    assert widths[1:] == [7, 10]


def test_the_complete_tree_gives_the_same_spec_again():
    """It is the content of config.yaml in the run folder."""
    spec = read_spec(
        SMALL
        | {"activation": {"name": "elu", "alpha": 0.5}, "callbacks": ["checkpoint"], "seed": 4}
    )
    assert spec.tree["model"]["activation"] == {"name": "elu", "alpha": 0.5}
    again = read_spec(spec.tree)
    assert again.tree == spec.tree
    assert str(again.parts["model"]((64,), (10,))) == str(spec.parts["model"]((64,), (10,)))


@pytest.mark.parametrize(
    ("tree", "facts"),
    [
        ({"optimizer": {"name": "sgd", "lr": 0}}, ["optimizer.lr=0: ", "(0, inf)", "(here)"]),
        ({"optimizer": 3}, ["optimizer=3: expected the name of an optimizer, or a mapping"]),
        (
            {"optimizer": None},
            ["optimizer: an experiment needs an optimizer", "optimizer=NAME (here)"],
        ),
        (
            {"callbacks": "progress"},
            ["callbacks=progress: expected a list of names of callbacks, or a mapping"],
        ),
        ({"callbacks": [{"progress": {}}]}, ["expected a list of names of callbacks"]),
        ({"callbacks": {"progress": 3}}, ["callbacks.progress=3: expected a mapping"]),
        ({"metrics": ["acuracy"]}, ["metrics.acuracy=acuracy: ", "did you mean 'accuracy'?"]),
        (
            {"model": {"name": "mlp", "activation": None}},
            ["model.activation: expected ", "name of an activation", "null"],
        ),
        (
            {"model": {"name": "stack", "blocks": "linear"}},
            ["model.blocks=linear: expected list of name of a block"],
        ),
        ({"trainer": 3}, ["trainer=3: expected a mapping"]),
        ({"trainer": {}}, ["trainer: needs a limit"]),
        (
            {"trainer": {"max_steps": 1, "device": "cuda:99"}},
            ["trainer.device=cuda:99: ", "is not available"],
        ),
        (
            {"trainer": {"max_steps": 1, "shards": 3}},
            ["trainer.shards=3: expected a power of two"],
        ),
        (
            {"trainer": {"max_steps": 1, "compile": "auto", "deterministic": True}},
            ["trainer.compile=auto: expected off, model or step"],
        ),
        (
            {"trainer": {"max_steps": 1, "cuda_graph": "on"}},
            ["trainer.cuda_graph=on: expected "],
        ),
        (
            {"trainer": {"max_steps": 1, "log_every": "1.5steps"}},
            ["trainer.log_every=1.5steps: expected a cadence like 10steps"],
        ),
        (
            {"data": {"_target_": "os.system"}},
            ["data: ", "no data is chosen", "data=NAME"],
        ),
        (
            {"data": {"name": "digits", "_target_": "os.system"}},
            ["data._target_=os.system: is refused"],
        ),
        ({"_target_": "os.system"}, ["_target_=os.system: is refused"]),
        ({"a": {"b": {"c": 1}}}, ["a.b.c=1: an experiment has no key 'a'"]),
        (
            {"model": "rnn", "block": "conv2d"},
            ["block=conv2d: has no effect: neither model rnn nor task classification uses a block"],
        ),
        ({"plugins": "x.py"}, ["plugins=x.py: ", "list of str"]),
    ],
)
def test_a_problem_has_the_setting_the_value_and_the_reason(tree, facts):
    text = "\n".join(problems(**tree))
    for fact in facts:
        assert fact in text


def test_a_choice_of_a_wrong_type_is_reported():
    """Settings without a name follow the experiment's choice, which is invalid here."""
    text = "\n".join(problems(model={"name": "mlp", "activation": {"alpha": 1}}, activation=3))
    assert "model.activation=3" in text


def test_every_problem_is_reported_once():
    found = problems(
        seed="x",
        optimizer={"name": "adam", "momentum": 1, "lr": "y"},
        nope=1,
        metrics=["none_such"],
    )
    assert len(found) == len(set(found)) == 5


def test_a_long_value_is_cut():
    (problem,) = problems(seed="x" * 500)
    assert len(problem) < 700
    assert problem.startswith("seed=" + "x" * 37 + "..." + "x" * 20 + ": expected int")


def test_a_tree_and_python_build_the_same():
    weights = list(fw.models.build("mlp", (4,), (2,)).parameters())
    spec = read_spec(SMALL | {"optimizer": {"name": "sgd", "momentum": 0.9}})
    from_tree = spec.parts["optimizer"](weights)
    assert from_tree.defaults == fw.optimizers.build("sgd", weights, momentum=0.9).defaults


@pytest.mark.parametrize(
    ("value", "typed"),
    [("fsdp", "strategy=fsdp"), ({"mesh": [2, 4]}, "'strategy.mesh=[2, 4]'")],
)
def test_a_key_of_its_own_in_a_section_is_advised(value, typed):
    (problem,) = problems(trainer={"max_steps": 1, "strategy": value})
    assert problem.endswith(f": strategy is a key of its own: write {typed} (here)")
