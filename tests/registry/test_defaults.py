"""A part gets the default of its signature in every way to choose it, and in a reopened run."""

# ruff: noqa: B006, B008  # unusual defaults are what is tested

import dataclasses
import enum
import functools
import inspect
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import framework as fw
from framework.composition.compose import CommandLine
from framework.composition.spec import config_value, plain_settings, read_spec
from framework.errors import BuildError, ConfigError, ContractError
from framework.experiment.resumption.resume_overrides import apply_overrides
from framework.registry.annotations import Range
from framework.registry.plain_values import identical_values, plain_value
from framework.registry.registry import Registry
from framework.registry.schema import Setting
from framework.runs.folder import dump
from runs import run_line


class Mode(enum.Enum):
    SOFT = 1
    HARD = 2


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Access(enum.Flag):
    READ = 1
    WRITE = 2


UNSET = object()
TENSOR = torch.ones(2)
RECEIVED: list[dict[str, Any]] = []


def odd_init(
    self,
    function=torch.relu,
    builtin=max,
    cls=nn.ReLU,
    dtype=torch.float64,
    unset=UNSET,
    tensor=TENSOR,
    number=np.float64(0.5),
    whole=np.int64(3),
    array=TENSOR.numpy(),
    made=functools.partial(max, 1),
    span=range(3),
    several={1, 2},
    frozen=frozenset([1]),
    raw=b"x",
    imaginary=1j,
    functions=[torch.relu, {"a": torch.tanh}],
    keyed={"a": (1, 2), "f": max},
    pair=(1, 2),
    pairs={"a": (1, 2), "b": [(3, 4)]},
    counts: dict[int, float] = {0: 1.0},
    bare_counts={0: 1.0},
    nan=math.nan,
    beyond: Annotated[float, Range("[0, 1]")] = math.inf,
    rate: float = 1,
    text: str = "${nothing}/{y}",
    seed_text: str = "\\${seed}",
    missing: str = "???",
    path=Path("a/b"),
    any_path: Any = Path("a"),
    mode: Mode = Mode.SOFT,
    bare_mode=Mode.HARD,
    level: Level = Level.HIGH,
    number_level: int = Level.LOW,
    access: Access = Access.READ | Access.WRITE,
    modes: list[Mode] = [Mode.HARD],
    either: float | torch.Tensor = TENSOR,
    activation: fw.Activation = nn.GELU,
):
    arguments = dict(locals())
    del arguments["self"]
    RECEIVED.append(arguments)
    if isinstance(self, nn.Module):
        nn.Module.__init__(self)


class OddActivation(nn.Module):
    __init__ = odd_init

    def forward(self, x):
        return x.relu()


class OddLoss(nn.Module):
    __init__ = odd_init

    def forward(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets)


class OddCallback(fw.Callback):
    __init__ = odd_init


PARTS = {"activation": OddActivation, "loss": OddLoss, "callback": OddCallback}


@pytest.fixture(autouse=True)
def _forget():
    """Remove the parts that a test registers, and the arguments that they received."""
    before = {kind: (dict(r._entries), dict(r._aliases)) for kind, r in Registry.every.items()}
    RECEIVED.clear()
    yield
    for kind, (entries, aliases) in before.items():
        Registry.every[kind]._entries = entries
        Registry.every[kind]._aliases = aliases


@pytest.fixture
def odd():
    for kind, part in PARTS.items():
        Registry.every[kind].register("odd", part)


def composed(*overrides, multirun=False):
    """Return the specs that a command line composes."""
    specs = []
    run_line(CommandLine(list(overrides), multirun=multirun), lambda job: specs.append(job.spec))
    return specs


def built(spec, kind):
    """Build the odd part of a spec; return its arguments."""
    RECEIVED.clear()
    if kind == "callback":
        for maker in spec.parts["callback"]:
            if maker.entry.name == "odd":
                maker()
    elif kind == "loss":
        spec.parts["task"]()
    else:
        spec.parts["model"]((64,), (10,))
    return RECEIVED[0]


def is_default(value, default):
    """Return whether a value is the default itself, or an equal one of plain types."""
    if value is default:
        return True
    if type(value) is not type(default):
        return False
    if isinstance(default, dict):
        return list(value) == list(default) and all(
            is_default(value[k], default[k]) for k in default
        )
    if isinstance(default, list | tuple):
        return len(value) == len(default) and all(map(is_default, value, default))
    return value == default or (value != value and default != default)


def check_received(arguments):
    for name, parameter in inspect.signature(odd_init).parameters.items():
        if name == "rate":
            assert identical_values(arguments[name], 1.0), (
                "1 is given as the float that the annotation asks for"
            )
        elif name == "activation":
            assert arguments[name] is nn.GELU
        elif name != "self":
            assert is_default(arguments[name], parameter.default), name


@pytest.mark.parametrize(
    "overrides",
    [
        ["activation=odd"],
        ["model.activation=odd", "task.loss=odd", "callbacks=[odd]"],
        ["model.activation={name: odd}", "loss=odd", "+callbacks={name: odd}"],
        ["model=stack", "model.blocks=[{name: linear, activation: odd}]"],
    ],
)
def test_a_part_receives_its_defaults_in_every_way_to_choose_it(odd, overrides):
    (spec,) = composed(*overrides)
    text = dump("config.yaml", spec.tree)
    assert " at 0x" not in text
    kept = yaml.safe_load(text)
    evaluated = read_spec(kept)
    resumed = read_spec(apply_overrides(kept, ["trainer.max_epochs=3"]))
    for kind in PARTS if len(overrides) == 3 else ["activation"]:
        check_received(built(spec, kind))
        check_received(built(evaluated, kind))
        check_received(built(resumed, kind))


def test_a_part_receives_its_defaults_in_a_sweep(odd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    specs = composed("activation=odd,relu", multirun=True)
    check_received(built(specs[0], "activation"))
    assert specs[0].tree != specs[1].tree


def test_a_part_receives_its_defaults_in_python(odd):
    fw.activations.build("odd")
    Registry.every["activation"].maker("odd")()
    for arguments in RECEIVED:
        check_received(arguments)


def test_overrides_replace_unusual_defaults(odd):
    overrides = ["activation.pair=[3,4,5]", "activation.counts={5: 2}", "activation.mode=HARD"]
    overrides += ["activation.text=${seed}", "activation.access=READ", "activation.function=3"]
    (spec,) = composed("activation=odd", "seed=7", *overrides)
    arguments = built(spec, "activation")
    assert arguments["pair"] == (3, 4, 5)
    assert arguments["counts"] == {0: 1.0, 5: 2.0}
    assert (arguments["mode"], arguments["access"]) == (Mode.HARD, Access.READ)
    assert (arguments["text"], arguments["function"]) == ("7", 3)
    again = built(read_spec(yaml.safe_load(dump("config.yaml", spec.tree))), "activation")
    assert {name: again[name] for name in ("pair", "counts", "mode", "access", "text")} == {
        name: arguments[name] for name in ("pair", "counts", "mode", "access", "text")
    }


@pytest.mark.parametrize(
    "entry", [*itertools.chain.from_iterable(Registry.every.values())], ids=str
)
def test_the_defaults_of_every_part_are_restored_from_a_file(entry):
    kept = yaml.safe_load(dump("config.yaml", plain_settings({}, entry.settings)))
    for name, setting in entry.settings.items():
        if not setting.required and setting.part is None:
            assert identical_values(setting.convert(kept[name]), setting.initial()), name


def test_a_run_with_unusual_defaults_can_be_reopened(command, tmp_path, forget_plugins):
    (tmp_path / "parts.py").write_text(
        """
import dataclasses
import torch
from torch import nn
from framework import Callback, activations, callbacks

UNSET = object()

@activations.register("kept")
@dataclasses.dataclass(eq=False)
class Kept(nn.Module):
    names: list[str] = dataclasses.field(default_factory=lambda: ["a", "b"])
    function: object = torch.tanh
    unset = UNSET
    def __post_init__(self):
        super().__init__()
        assert self.names == ["a", "b"], self.names
    def forward(self, x):
        return self.function(x)

@callbacks.register("watching")
@dataclasses.dataclass
class Watching(Callback):
    names: list[str] = dataclasses.field(default_factory=list)
    reduce: object = max
    def on_fit_start(self, trainer):
        assert self.names == [] and self.reduce is max
"""
    )
    small = "trainer.max_steps=1 loader.limit=1 model.width=4 loggers=[json_lines]"
    for key in ("activation", "model.activation"):
        name = key.partition(".")[0]
        line = f"train --plugins parts.py {key}=kept +callbacks=watching run.name={name} {small}"
        status, _, err = command(line)
        assert status == 0, err
        status, out, err = command(f"eval --plugins parts.py runs/default/{name} --json")
        assert status == 0, err
        rows = (tmp_path / f"runs/default/{name}/metrics.jsonl").read_text().splitlines()
        logged = json.loads(rows[-1])
        assert json.loads(out)["metrics"]["test/loss"] == pytest.approx(logged["test/loss"])
        status, _, err = command(
            f"resume --plugins parts.py runs/default/{name} trainer.max_steps=2"
        )
        assert status == 0, err


def number(k: int = "auto") -> nn.Module: ...
def tensor(x: float = torch.tensor(0.5)) -> nn.Module: ...
def texts(sizes: list[int] = ("a",)) -> nn.Module: ...
def member(mode: Mode = "SOFTLY") -> nn.Module: ...
def sentinel(x: int | None = UNSET) -> nn.Module: ...


@pytest.mark.parametrize("part", [number, tensor, texts, member, sentinel])
def test_a_default_that_contradicts_its_annotation_is_refused_with_its_place(part):
    with pytest.raises(
        ContractError, match=r"test_defaults.py:\d+\): parameter '\w+' of \w+ has the default"
    ):
        fw.activations.register("wrong", part)
    assert "wrong" not in fw.activations


def test_a_contradicting_default_of_a_library_is_kept():
    class Others(nn.Module):
        def __init__(self, k: int = "auto"):
            super().__init__()
            self.k = k

    Others.__module__ = "somewhere.else"
    fw.activations.register("others", Others)
    (spec,) = composed("model.activation=others")
    for each in (spec, read_spec(spec.tree)):
        assert each.parts["model"].settings["activation"]().k == "auto"


def listing(defaults: float = 1.0) -> nn.Module: ...


def test_a_setting_may_not_be_called_defaults():
    with pytest.raises(ContractError, match="no setting may be called 'defaults'"):
        fw.activations.register("listing", listing)


class Base(nn.Module):
    """A base.

    Args:
        alpha: of the base.
    """

    def __init__(self, alpha: float = 1.0, gamma: fw.PositiveInt = 3):
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma


class Middle(Base):
    def __init__(self, delta: int = 5, **kwargs):
        super().__init__(**kwargs)
        self.delta = delta


class Sub(Middle):
    def __init__(self, beta: float = 2.0, **kwargs):
        super().__init__(gamma=4, **kwargs)
        self.beta = beta


class Swallows(Base):
    def __init__(self, beta: float = 2.0, **kwargs):
        super().__init__()
        self.beta = beta
        self.more = kwargs


def test_settings_of_a_base_class_are_those_it_receives_as_kwargs():
    fw.activations.register("sub", Sub)
    settings = fw.activations.get("sub").settings
    assert settings.keys() == {"beta", "delta", "alpha"}, "gamma is fixed by the class"
    assert settings["alpha"].doc == "of the base"
    (spec,) = composed("activation=sub", "activation.alpha=0.5")
    made = spec.parts["model"].settings["activation"]()
    assert (made.alpha, made.beta, made.gamma, made.delta) == (0.5, 2.0, 4, 5)
    assert spec.tree["model"]["activation"] == {"name": "sub", "beta": 2.0, "alpha": 0.5}
    (spec,) = composed("activation=sub", "activation.alpha=1.0")
    assert spec.parts["model"].settings["activation"].settings["alpha"] == 1.0, (
        "it was given, although it equals the default"
    )
    fw.activations.register("swallows", Swallows)
    assert fw.activations.get("swallows").settings.keys() == {"beta"}


class ByPosition(nn.Module):
    def __init__(self, a: float = 1.0, b: float = 2.0, /, c: float = 3.0):
        super().__init__()
        self.values = a, b, c


@pytest.mark.parametrize(
    ("settings", "values"),
    [({}, (1.0, 2.0, 3.0)), ({"b": 5.0}, (1.0, 5.0, 3.0)), ({"a": 0.0, "c": 4.0}, (0.0, 2.0, 4.0))],
)
def test_positional_parameters_are_passed_by_position(settings, values):
    fw.activations.register("by_position", ByPosition)
    assert fw.activations.build("by_position", **settings).values == values


def test_a_partial_is_described_by_its_class():
    entry_name = "partial_leaky"
    fw.activations.register(entry_name, functools.partial(nn.LeakyReLU, negative_slope=0.3))
    entry = fw.activations.get(entry_name)
    assert entry.summary == fw.activations.get("leaky_relu").summary
    assert entry.settings["negative_slope"].default == 0.3
    assert entry.settings["negative_slope"].doc
    assert fw.activations.build(entry_name).negative_slope == 0.3


def problem_of(*overrides):
    with pytest.raises(ConfigError) as raised:
        composed(*overrides)
    (problem,) = raised.value.problems
    return problem


def test_the_error_of_an_enumeration_names_its_members(odd):
    said = "expected one of SOFT, HARD, got 'HRD'; did you mean 'HARD'?"
    assert said in problem_of("activation=odd", "activation.mode=HRD")


class Outer(nn.Module):
    def __init__(self, inner: fw.Activation, other: fw.Activation = "gelu"):
        super().__init__()
        self.inner = inner()
        self.other = other()


def test_a_part_may_have_a_part_of_its_own_kind():
    fw.activations.register("outer", Outer)
    (spec,) = composed("activation=outer", "activation.inner=relu")
    made = spec.parts["model"].settings["activation"]()
    assert (type(made.inner), type(made.other)) == (nn.ReLU, nn.GELU)
    assert "activation.inner: needs an activation" in problem_of("activation=outer")


def hooked(hook: type[nn.Module] = nn.ReLU, height: float = 1.0) -> nn.Module: ...


def test_setting_a_parameter_that_no_config_can_hold_is_an_error():
    fw.activations.register("hooked", hooked)
    said = "the parameter hook of hooked has a type that no config can hold"
    assert said in problem_of("activation=hooked", "activation.hook=relu")


OLD = "<built-in method relu of type object at 0x7fb0fb4cea40>"


def test_the_text_of_an_object_in_an_old_config_is_an_error(odd):
    (spec,) = composed("model.activation=odd")
    functions = [OLD, {"a": OLD.replace("relu", "tanh")}]
    spec.tree["model"]["activation"] |= {
        "function": OLD,
        "dtype": "torch.float64",
        "functions": functions,
    }
    with pytest.raises(ConfigError) as raised:
        read_spec(spec.tree)
    assert len(raised.value.problems) == 3
    assert all("earlier version" in problem for problem in raised.value.problems)


@dataclasses.dataclass(eq=False)
class Listed(nn.Module):
    names: list[str] = dataclasses.field(default_factory=lambda: ["a"])

    def __post_init__(self):
        super().__init__()


def test_an_old_config_with_a_default_factory_can_be_read():
    fw.activations.register("listed", Listed)
    (spec,) = composed("model.activation=listed")
    spec.tree["model"]["activation"]["names"] = "<factory>"
    assert read_spec(spec.tree).parts["model"].settings["activation"]().names == ["a"]


def test_an_object_is_not_written_into_a_config():
    fw.activations.register("odd", OddActivation)
    maker = fw.activations.maker("odd", function=torch.tanh)
    with pytest.raises(fw.FrameworkError, match="cannot be written"):
        plain_settings(maker.settings, maker.entry.settings)
    assert plain_value({"a": (Path("b"), Mode.SOFT)}) == {"a": ["b", "SOFT"]}


def test_an_error_of_a_part_about_its_arguments_is_shown():
    class Refusing(nn.Module):
        def __init__(self, a: int = 1, /):
            raise ValueError("no")

    fw.activations.register("refusing", Refusing)
    with pytest.raises(BuildError, match="cannot be built: ValueError: no"):
        fw.activations.build("refusing", a=2)


class Unit(enum.Enum):
    METRE = 1


@pytest.mark.parametrize(
    ("annotation", "default", "typed", "arrives"),
    [
        (Sequence[int], (8, 16), [1, 2], (1, 2)),
        (int | Sequence[int], (3, 3), [4, 5], (4, 5)),
        (Sequence[float], (0, 1), [2], (2.0,)),
        (list[int], (1, 2), [3], [3]),
        (dict[Unit, float], {Unit.METRE: 1.0}, {"METRE": 2}, {Unit.METRE: 2.0}),
    ],
    ids=str,
)
def test_a_container_has_the_type_of_its_default_if_the_annotation_allows_it(
    annotation, default, typed, arrives
):
    setting = Setting("x", annotation, default)
    assert setting.convert(typed) == arrives
    initial = setting.initial()
    assert type(initial) is type(arrives)
    assert config_value(initial) == config_value(default)


def test_a_number_is_not_a_default_of_a_text():
    def part(s: str = 3): ...

    with pytest.raises(ContractError, match="has the default 3, which is not str"):
        fw.activations.register("number_as_text", part)
    assert Setting("s", str, 3).initial() == 3, "for a class of a library it is unchanged"
