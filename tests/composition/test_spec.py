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


def test_a_section_is_whole_whatever_the_tree_says():
    spec = read_spec(SMALL)
    for name in SECTIONS:
        assert spec.sections[name].keys() == section_settings(name).keys()
    assert spec.sections["trainer"]["accumulate"] == 1


@pytest.mark.parametrize(
    "callbacks", [["early_stop"], {"early_stop": None}, {"early_stop": {"patience": 3}}]
)
def test_parts_of_which_there_may_be_several(callbacks):
    (maker,) = read_spec(SMALL | {"callbacks": callbacks}).parts["callback"]
    assert maker.entry.name == "early_stop"
    assert maker().patience == (
        3 if isinstance(callbacks, dict) and callbacks["early_stop"] else maker().patience
    )


@pytest.mark.parametrize(
    ("tree", "built"),
    [
        ({}, "ReLU"),  # the default of mlp itself
        ({"activation": "gelu"}, "GELU"),  # the experiment's choice, for whoever asks
        (
            {"activation": "gelu", "model": {"name": "mlp", "activation": "tanh"}},
            "Tanh",
        ),  # the model's own goes first
        ({"activation": {"name": "elu", "alpha": 0.5}}, "ELU(alpha=0.5)"),
        ({"model": {"name": "mlp", "activation": {"name": "elu", "alpha": 0.5}}}, "ELU(alpha=0.5)"),
        (
            {"activation": "elu", "model": {"name": "mlp", "activation": {"alpha": 0.5}}},
            "ELU(alpha=0.5)",
        ),
    ],
)
def test_which_activation_a_model_gets(tree, built):
    model = read_spec(SMALL | tree).parts["model"]((64,), (10,))
    assert built in str(model)


def test_a_list_of_blocks():
    blocks = ["linear", {"name": "linear", "width": 7}]
    tree = {"model": {"name": "stack", "blocks": blocks}}
    widths = [
        p.shape[0]
        for p in read_spec(SMALL | tree).parts["model"]((64,), (10,)).parameters()
        if p.ndim == 2
    ]
    assert widths[1:] == [7, 10]


def test_the_complete_tree_gives_the_same_spec_again():
    """What config.yaml in the run folder keeps is enough, and plain."""
    spec = read_spec(
        SMALL
        | {"activation": {"name": "elu", "alpha": 0.5}, "callbacks": ["checkpoint"], "seed": 4}
    )
    assert spec.tree["model"]["activation"] == {"name": "elu", "alpha": 0.5}
    again = read_spec(spec.tree)
    assert again.tree == spec.tree
    assert str(again.parts["model"]((64,), (10,))) == str(spec.parts["model"]((64,), (10,)))


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (
            {"optimizer": {"name": "sgd", "lr": 0}},
            ["optimizer.lr=0: expected float in (0, inf), got 0 (here)"],
        ),
        ({"optimizer": 3}, ["optimizer=3: should be the name of an optimizer, or a mapping"]),
        (
            {"optimizer": None},
            ["optimizer: an experiment needs an optimizer: choose one with optimizer=NAME (here)"],
        ),
        (
            {"callbacks": "progress"},
            ["callbacks=progress: should be a list of names of callbacks, or a mapping"],
        ),
        ({"callbacks": [{"progress": {}}]}, ["should be a list of names of callbacks"]),
        ({"callbacks": {"progress": 3}}, ["callbacks.progress=3: should be a mapping of settings"]),
        ({"metrics": ["acuracy"]}, ["there is no metric 'acuracy'; did you mean 'accuracy'?"]),
        (
            {"model": {"name": "mlp", "activation": None}},
            ["model.activation: should be a name of an activation, not null"],
        ),
        (
            {"model": {"name": "stack", "blocks": "linear"}},
            ["model.blocks=linear: should be a list of name of a block"],
        ),
        ({"trainer": 3}, ["trainer=3: should be a mapping of settings"]),
        ({"trainer": {}}, ["trainer: needs a limit"]),
        (
            {"trainer": {"max_steps": 1, "device": "cuda:99"}},
            ["trainer.device=cuda:99: ", "not on this machine"],
        ),
        (
            {"data": {"_target_": "os.system"}},
            ["these are settings of no data yet: choose one with data=NAME"],
        ),
        (
            {"data": {"name": "digits", "_target_": "os.system"}},
            ["data._target_=os.system: is refused"],
        ),
        ({"_target_": "os.system"}, ["_target_=os.system: is refused"]),
        ({"a": {"b": {"c": 1}}}, ["a.b.c=1: there is no key 'a' in an experiment"]),
        (
            {"model": "rnn", "block": "conv2d"},
            ["block=conv2d: reaches nothing: neither rnn nor classification asks for a block"],
        ),
        ({"plugins": "x.py"}, ["plugins=x.py: expected list of str"]),
    ],
)
def test_problems(tree, said):
    text = "\n".join(problems(**tree))
    for each in said:
        assert each in text


def test_every_problem_is_told_once():
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
    from_tree = read_spec(SMALL | {"optimizer": {"name": "sgd", "momentum": 0.9}}).parts[
        "optimizer"
    ](weights)
    assert from_tree.defaults == fw.optimizers.build("sgd", weights, momentum=0.9).defaults
