"""compile=auto: steps of both kinds in turn, then the faster kind."""

import pytest
import torch
from torch import nn

import framework as fw
from fits import SPLIT, same, smooth_network
from framework import Trainer
from framework.contracts.task import Phase
from framework.errors import FrameworkError, SettingError
from framework.runtime.torch_internals.compiler import CompilationError
from framework.training.acceleration import compile_choice
from framework.training.acceleration.compile_choice import (
    TIMED_PER_KIND,
    WARM_UP_PER_KIND,
    CompileChoice,
    MeasuredStep,
)
from framework.training.acceleration.compiled_step import Compiled

MEASURED = 2 * (WARM_UP_PER_KIND + TIMED_PER_KIND)


class Steps:
    """Steps of both kinds, and a clock that they move on."""

    def __init__(self, monkeypatch, seconds):
        self.now = 0.0
        self.seconds = seconds
        self.called = []
        monkeypatch.setattr(compile_choice, "perf_counter", lambda: self.now)

    def step(self, kind):
        def run(batch, share, phase):
            self.called.append(kind)
            self.now += self.seconds[kind]
            if len(self.called) < 4 and kind == "compiled":
                self.now += 20.0  # compilation
            return kind, kind == "compiled"

        return run

    def measured(self, choice):
        return MeasuredStep(self.step("eager"), self.step("compiled"), choice, torch.device("cpu"))


@pytest.mark.parametrize(("eager", "compiled"), [(0.3, 0.2), (0.2, 0.3)])
def test_steps_take_turns_and_then_the_faster_kind_runs(monkeypatch, capsys, eager, compiled):
    steps = Steps(monkeypatch, {"eager": eager, "compiled": compiled})
    choice = CompileChoice()
    step = steps.measured(choice)
    for _ in range(MEASURED + 10):
        kind, updated = step(None, None)
        assert updated == (kind == "compiled")
    faster = "compiled" if compiled < eager else "eager"
    assert steps.called[:MEASURED] == ["compiled", "eager"] * (MEASURED // 2)
    assert set(steps.called[MEASURED + 1 :]) == {faster}
    assert choice.state_dict() == {"kind": faster}
    note = f"{compiled * 1e3:.3g} ms compiled, {eager * 1e3:.3g} ms eager: {faster} from now on"
    assert note in capsys.readouterr().err


def test_a_known_choice_is_not_measured_again(monkeypatch):
    steps = Steps(monkeypatch, {"eager": 0.1, "compiled": 0.2})
    choice = CompileChoice()
    choice.load_state_dict({"kind": "compiled"})
    step = steps.measured(choice)
    for _ in range(MEASURED + 2):
        step(None, None)
    assert set(steps.called) == {"compiled"}


def test_a_step_that_torch_cannot_compile_runs_eagerly(monkeypatch, capsys):
    steps = Steps(monkeypatch, {"eager": 0.1})

    def fail(batch, share, phase):
        raise FrameworkError("compile=auto: use compile=off") from CompilationError("planned")

    choice = CompileChoice()
    step = MeasuredStep(steps.step("eager"), fail, choice, torch.device("cpu"))
    assert [step(None, None)[0] for _ in range(3)] == ["eager"] * 3
    assert choice.kind == "eager"
    assert "torch cannot compile: planned" in capsys.readouterr().err


def test_another_error_of_a_compiled_step_is_raised(monkeypatch):
    steps = Steps(monkeypatch, {"eager": 0.1})

    def fail(batch, share, phase):
        raise FrameworkError("planned")

    step = MeasuredStep(steps.step("eager"), fail, CompileChoice(), torch.device("cpu"))
    with pytest.raises(FrameworkError, match="planned"):
        step(None, None)


def test_steps_of_several_batches_are_eager_and_not_measured(monkeypatch):
    steps = Steps(monkeypatch, {"eager": 0.1, "compiled": 0.2})
    choice = CompileChoice()
    step = steps.measured(choice)
    for _ in range(2 * MEASURED):
        step(None, 0.5)
    assert choice.kind is None
    assert set(steps.called) == {"eager"}


@pytest.fixture
def uncompiled(monkeypatch):
    """Run functions without compiling them."""
    monkeypatch.setattr(Compiled, "__call__", lambda self, *inputs: self.run(*inputs))

    def init(self, function, setting, clock):
        self.run = function

    monkeypatch.setattr(Compiled, "__init__", init)


def fit(steps, resume=None, task=None, **settings):
    model = smooth_network()
    trainer = Trainer(max_steps=steps, device="cpu", **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    task = task or nn.CrossEntropyLoss()
    trainer.fit(model, SPLIT, task=task, optimizer=optimizer, batch_size=16, resume=resume)
    return trainer


def test_a_fit_chooses_and_its_state_has_the_choice(uncompiled, capsys):
    trainer = fit(MEASURED + 5, compile="auto")
    chosen = trainer.step_kind
    state = trainer.state_dict()
    assert chosen in ("compiled", "eager")
    assert state["compile"] == {"kind": chosen}
    for parameter, other in zip(
        trainer.model.parameters(), fit(MEASURED + 5).model.parameters(), strict=True
    ):
        torch.testing.assert_close(parameter, other, rtol=1e-4, atol=1e-5)
    for kind in ("compiled", "eager"):
        resumed = fit(MEASURED + 9, {**state, "compile": {"kind": kind}}, compile="auto")
        assert resumed.step_kind == kind
        assert f"compile=auto: {kind} steps, as in the resumed run" in capsys.readouterr().err
        expected = fit(MEASURED + 9, state, compile={"compiled": "step", "eager": "off"}[kind])
        assert same(resumed.model, expected.model)
        assert expected.step_kind is None


class OfPhases(fw.Task):
    phases = (Phase("all", ("*",)),)

    def phase(self, name, model, batch):
        outputs = model(batch[0])
        return fw.Step(nn.functional.cross_entropy(outputs, batch[1]), outputs, batch[1])


def test_a_task_with_phases_has_eager_steps(capsys):
    assert fit(1, task=OfPhases(), compile="auto").step_kind == "eager"
    assert "compile=auto: eager steps, as OfPhases" in capsys.readouterr().err


def test_auto_is_refused_where_results_must_not_depend_on_time():
    with pytest.raises(SettingError, match="compile=auto: expected off, model or step"):
        Trainer(max_epochs=1, compile="auto", deterministic=True)


def test_a_damaged_choice_is_an_error():
    state = fit(3).state_dict()
    with pytest.raises(SettingError, match="does not fit this trainer"):
        fit(6, {**state, "compile": {"kind": "fast"}})
