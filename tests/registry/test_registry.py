from pathlib import Path
from typing import Literal

import pytest
from torch import nn

import framework as fw
from framework.errors import BuildError, ContractError, DuplicateName, SettingError, UnknownName
from framework.registry.registry import Kind, Maker, Registry

MODULE = "torch.nn.modules.module.Module"
HERE = Path(__file__).name


@pytest.fixture
def fruits():
    """A kind with given parameters that its parts need not have."""
    yield Registry(Kind("fruit", given=("weight", "size")))
    del Registry.every["fruit"]


@pytest.fixture
def layers():
    """A kind of modules that must have the parameter in_shape."""
    yield Registry(Kind("layer", given=("in_shape",), needs=("in_shape",), base=MODULE, many=True))
    del Registry.every["layer"]


class Apple:
    """A fruit. It keeps."""

    def __init__(
        self, weight: float, sweetness: fw.Fraction = 0.5, sort: Literal["red", "green"] = "red"
    ):
        """Grow it.

        Args:
            sweetness: share of sugar.
        """
        self.weight = weight
        self.sweetness = sweetness
        self.sort = sort


def test_a_decorator_registers_a_class_and_does_not_change_it(fruits):
    @fruits.register("pear", aliases=["birne"])
    class Pear:
        """A pear."""

    assert isinstance(Pear(), Pear)
    assert isinstance(fruits.build("birne"), Pear)
    assert fruits.names() == ["pear"]
    assert "birne" in fruits
    assert len(fruits) == 1
    assert [entry.name for entry in fruits] == ["pear"]


def test_an_entry_has_name_summary_settings_and_source(fruits):
    fruits.register("apple", Apple)
    entry = fruits.get("apple")
    assert str(entry) == "fruit/apple"
    assert entry.summary == "A fruit"
    assert entry.settings["sweetness"].doc == "share of sugar"
    assert (Path(entry.registered.file).name, entry.registered.module) == (HERE, __name__)
    source = Path(entry.source.file).read_text().splitlines()
    assert source[entry.source.line - 1] == "class Apple:"


@pytest.mark.parametrize(
    ("doc", "summary"),
    [
        ("x + sin² (Ziyin et al. 2020, eq. 3).\n\nMore.", "x + sin² (Ziyin et al. 2020, eq. 3)"),
        ("Rules, e.g. SGD, of\nthe update. Second.", "Rules, e.g. SGD, of the update"),
        ("Applies :math:`\\alpha` of ``x``. See :class:`Y`.", "Applies alpha of `x`"),
        (None, ""),
    ],
)
def test_the_summary_is_the_first_sentence(fruits, doc, summary):
    class Part(nn.Module):
        __doc__ = doc

    fruits.register("part", Part)
    assert fruits.get("part").summary == summary


def test_given_parameters_are_passed_to_the_parts_that_have_them(fruits):
    fruits.register("apple", Apple)
    fruits.register("stone", lambda: "hard")
    apple = fruits.build("apple", 3.0, 9.0, sweetness=1, sort="green")
    assert (apple.weight, apple.sweetness, apple.sort) == (3.0, 1.0, "green")
    assert fruits.build("apple", weight=2.0).weight == 2.0
    assert fruits.build("stone", 3.0) == "hard"


def test_too_many_positional_arguments_are_refused(fruits):
    fruits.register("apple", Apple)
    with pytest.raises(
        SettingError, match="fruit/apple takes only weight, size by position, not 3 arguments"
    ):
        fruits.build("apple", 1.0, 2.0, 0.5)
    with pytest.raises(SettingError, match="activation/relu takes nothing by position"):
        fw.activations.build("relu", 0.1)


def test_a_duplicate_name_is_an_error_with_both_places(fruits):
    fruits.register("apple", Apple, aliases=["pomme"])
    for name, aliases in [("apple", []), ("pomme", []), ("pear", ["apple"])]:
        with pytest.raises(
            DuplicateName,
            match=rf"two parts are called fruit/(apple|pomme): .*{HERE}:\d+ and .*{HERE}:\d+",
        ):
            fruits.register(name, Apple, aliases=aliases)
    assert fruits.names() == ["apple"]


def test_a_decorator_without_a_name_is_an_error(fruits):
    with pytest.raises(
        ContractError, match=r'a fruit needs a name: register\("\.\.\."\), got Pear'
    ):

        @fruits.register
        class Pear: ...


@pytest.mark.parametrize("name", ["Apple", "my-apple", "1apple", ""])
def test_a_name_is_lower_case(fruits, name):
    with pytest.raises(ContractError, match="use lower-case letters"):
        fruits.register(name, Apple)


def test_an_unknown_name_is_an_error_with_the_most_similar_name():
    for given, meant in [
        ("gellu", "gelu"),
        ("LeakyReLU", "leaky_relu"),
        ("hard-swish", "hardswish"),
        ("swich", "swish"),
    ]:
        with pytest.raises(
            UnknownName, match=f"there is no activation {given!r}; did you mean '(hard_)?{meant}'"
        ):
            fw.activations.build(given)


def test_the_error_of_an_unknown_name_mentions_another_kind_with_this_name():
    with pytest.raises(UnknownName, match="there is no activation 'group'; 'group' is a norm"):
        fw.activations.get("group")
    with pytest.raises(UnknownName, match="there is no norm 'relu'; 'relu' is an activation"):
        fw.norms.get("relu")


def test_the_error_of_an_unknown_name_lists_the_names_if_none_is_similar(fruits):
    fruits.register("apple", Apple)
    fruits.register("pear", Apple)
    with pytest.raises(UnknownName, match="no fruit 'zzz'; available: apple, pear"):
        fruits.get("zzz")


def test_without_any_part_the_error_suggests_to_discover_plugins(fruits):
    with pytest.raises(
        UnknownName, match=r"none is registered. Call framework\.discover\(\) first"
    ):
        fruits.build("apple")


def test_settings_are_checked_before_a_part_is_built(fruits):
    fruits.register("apple", Apple)
    with pytest.raises(
        SettingError, match=r"^fruit/apple: sweetness: expected float in \[0, 1\], got 2$"
    ):
        fruits.build("apple", 1.0, sweetness=2)
    with pytest.raises(
        SettingError, match="fruit/apple: sort: expected one of red, green, got 'blue'"
    ):
        fruits.maker("apple", sort="blue")
    with pytest.raises(
        SettingError, match="fruit/apple has no setting 'sweetnes'; did you mean 'sweetness'"
    ):
        fruits.maker("apple", sweetnes=0.1)


def test_a_missing_required_setting_is_an_error(fruits):
    fruits.register("melon", lambda seeds: seeds)
    with pytest.raises(SettingError, match="fruit/melon needs a value for seeds"):
        fruits.build("melon")
    assert fruits.build("melon", seeds=[1]) == [1]


def test_the_error_of_a_part_that_cannot_be_built_has_its_place(fruits):
    def rotten(softness: float = 1.0):
        raise ValueError("it is too soft")

    fruits.register("rotten", rotten)
    reason = rf"ValueError: it is too soft \(.*{HERE}:\d+ in rotten\)"
    message = rf"fruit/rotten \(.*{HERE}:\d+\) cannot be built: {reason}"
    with pytest.raises(BuildError, match=message):
        fruits.build("rotten")


def test_a_contract_is_checked_at_registration(layers):
    class NoModule:
        def __init__(self, in_shape): ...

    class NoShape(nn.Module):
        def __init__(self, shape: int = 1): ...

    class Strange(nn.Module):
        def __init__(self, in_shape, hook: type[nn.Module]): ...

    class Named(nn.Module):
        def __init__(self, in_shape, name: str = "x"): ...

    for part, said in [
        (NoModule, f"layer/part .* is not a {MODULE}, as every layer must be"),
        (
            NoShape,
            "layer/part .* must have a parameter 'in_shape': the framework passes it to every",
        ),
        (Strange, "layer/part .*parameter 'hook' of .*Strange has type .* no config can express"),
        (Named, "layer/part .*no setting may be called 'name'"),
        (3, "layer/part .* is an int, not a class or function"),
    ]:
        with pytest.raises(ContractError, match=said):
            layers.register("part", part)
    assert len(layers) == 0


def test_the_class_of_a_built_object_is_checked(layers):
    layers.register("function", lambda in_shape: "no module")
    with pytest.raises(
        ContractError, match=rf"layer/function .* builds a str, which is not a {MODULE}"
    ):
        layers.build("function", (3,))


def test_parameters_can_be_hidden_and_annotated_at_registration(fruits):
    fruits.register("dropout", nn.Dropout, hide=["inplace"], types={"p": fw.Fraction})
    assert fruits.get("dropout").settings.keys() == {"p"}
    assert fruits.get("dropout").settings["p"].type_text == "float in [0, 1]"
    with pytest.raises(ContractError, match="`types` names 'q'; Dropout has no such parameter"):
        fruits.register("other", nn.Dropout, types={"q": float})


def test_the_config_key_of_a_kind():
    assert Kind("model").key == "model"
    assert Kind("callback", many=True).key == "callbacks"


# parts of parts


@pytest.fixture
def bowl(fruits):
    @fruits.register("bowl")
    def bowl(
        activation: fw.Activation = "relu",
        norm: fw.Norm | None = None,
        more: list[fw.Activation] = (),
    ):
        return activation, norm, more

    return fruits


def test_a_part_receives_makers_of_its_parts(bowl):
    activation, norm, more = bowl.build("bowl")
    assert isinstance(activation, Maker)
    first = activation()
    second = activation()
    assert isinstance(first, nn.ReLU)
    assert first is not second
    assert norm is None
    assert more == []


def test_a_part_of_a_part_is_a_name_a_mapping_a_list_or_a_callable(bowl):
    activation, norm, more = bowl.build(
        "bowl",
        activation={"name": "leaky_relu", "negative_slope": 0.2},
        norm="layer",
        more=["gelu", {"name": "elu", "alpha": 2}, nn.Tanh],
    )
    assert activation().negative_slope == 0.2
    assert norm((7,)).normalized_shape == (7,)
    assert [type(maker()) for maker in more] == [nn.GELU, nn.ELU, nn.Tanh]
    assert repr(activation) == "activation/leaky_relu(negative_slope=0.2)"


def test_settings_without_a_name_belong_to_the_default_part(fruits):
    @fruits.register("leaky")
    def leaky(activation: fw.Activation = "leaky_relu"):
        return activation()

    assert fruits.build("leaky", activation={"negative_slope": 0.5}).negative_slope == 0.5


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        (
            {"activation": "group"},
            UnknownName,
            "fruit/bowl: activation: there is no activation 'group'; 'group' is a norm",
        ),
        (
            {"activation": 3},
            SettingError,
            "fruit/bowl: activation: expected name of an activation, got 3",
        ),
        ({"norm": {"eps": 1}}, SettingError, "norm: expected the `name` of a norm"),
        (
            {"more": ["elu", {"name": "elu", "alpha": 0}]},
            SettingError,
            r"more: activation/elu: alpha: .*\(0, inf\), got 0",
        ),
        ({"more": "elu"}, SettingError, "more: expected list of name of an activation, got 'elu'"),
        (
            {"activation": {"name": "elu", "alhpa": 1}},
            SettingError,
            "activation/elu has no setting 'alhpa'; did you mean",
        ),
    ],
)
def test_a_wrong_part_of_a_part_is_an_error_before_the_build(bowl, settings, error, said):
    with pytest.raises(error, match=said):
        bowl.build("bowl", **settings)
