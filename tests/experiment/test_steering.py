"""`framework tell`: commands to a running run, recorded, and repeated when it resumes."""

import json
import os
import threading
from pathlib import Path

import pytest
import torch

import framework as fw
from distributed_runs import run_in_processes
from framework.errors import FrameworkError, RunError
from framework.experiment import steering
from framework.experiment.experiment import Experiment, train
from framework.runs import requests
from framework.runs.checkpoint import listed, load
from framework.runs.requests import Command, Request, parse_commands, record, send
from framework.runs.status_file import Status
from runs import Stop, composed, cut_off_at, logged

SMALL = [
    "model.width=16",
    "model.dropout=0.1",
    "trainer.max_epochs=2",
    "callbacks=[checkpoint]",
    "loggers=json_lines",
    "run.root=runs",
]
RUN = Path("runs/default/first")


@pytest.fixture(autouse=True)
def _in_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(steering, "CHECK_SECONDS", 0.0)  # at each step
    monkeypatch.setattr(steering, "CHECK_SECONDS_PER_TRIAL", 0.0)
    monkeypatch.setattr(steering, "PAUSE_SECONDS", 0.01)


class Tells(Stop):
    """Sends requests as `framework tell` does, at some steps."""

    changes_training = False

    def __init__(self, requests_by_step, run=None):
        super().__init__(None)
        self.requests_by_step = requests_by_step
        self.run = run

    def on_step_done(self, trainer):
        words = self.requests_by_step.get(trainer.state.step)
        if words is not None and trainer.strategy.is_main:
            send(self.run or trainer.folder, Request(parse_commands(words.split())))


def spec_of(*overrides):
    return composed([*SMALL, *overrides])


def told(monkeypatch, words_by_step, *overrides, name="first", callbacks=()):
    """Train a run to which commands are told at some steps; return the result."""
    make_trainer = Experiment.trainer

    def with_tells(*args):
        trainer = make_trainer(*args)
        trainer.callbacks += [*callbacks, Tells(words_by_step)]
        return trainer

    with monkeypatch.context() as patched:
        patched.setattr(Experiment, "trainer", with_tells)
        spec = spec_of(f"run.name={name}", *overrides)
        return train(spec, "default", [], say=lambda line: None)


def resumed(name="first", *overrides):
    """Resume a run; return its folder."""
    spec = spec_of(f"run.name={name}", "resume=auto", *overrides)
    return train(spec, "default", [], say=lambda line: None, inexact=True).folder


def events(run=RUN):
    return [json.loads(line) for line in (Path(run) / "events.jsonl").read_text().splitlines()]


def weights(run=RUN):
    return (listed(Path(run) / "checkpoints")[-1] / "model.safetensors").read_bytes()


def optimizer_of(run=RUN):
    return load(listed(Path(run) / "checkpoints")[-1])[1]["optimizer"]["param_groups"]


def base_rates(run=RUN):
    return {group["initial_lr"] for group in optimizer_of(run)}


def rates(run):
    return {row["step"]: row["train/learning_rate"] for row in logged(run) if "train/loss" in row}


SET = "set optimizer.lr=1e-4 optimizer.betas=[0.8,0.99] set optimizer.weight_decay=0.1"


@pytest.mark.parametrize("scheduler", ["null", "cosine"])
def test_a_run_killed_after_a_change_and_resumed_before_it_makes_the_change_again(
    scheduler, monkeypatch
):
    chosen = [f"scheduler={scheduler}", "callbacks.checkpoint.every=20steps"]
    told(monkeypatch, {31: SET}, *chosen, name="whole")
    plain = train(spec_of("run.name=plain", *chosen), "default", [], say=lambda line: None).folder
    killed = [Stop(37)]
    with pytest.raises(KeyboardInterrupt):
        told(monkeypatch, {31: SET}, *chosen, name="first", callbacks=killed)
    whole = RUN.parent / "whole"
    assert [path.name for path in listed(RUN / "checkpoints")] == ["step-00000020"]
    before = events()
    resumed("first", *chosen)
    assert weights() == weights(whole)
    assert weights() != weights(plain)  # the control: the change has an effect
    assert logged(RUN) == logged(whole)
    assert optimizer_of() == optimizer_of(whole)
    assert events() == before  # it is not written twice
    assert [(row["step"], row["do"], row["setting"]) for row in before] == [
        (31, "set", "optimizer.lr"),
        (31, "set", "optimizer.betas"),
        (31, "set", "optimizer.weight_decay"),
    ]
    assert [(row["old"], row["new"]) for row in before] == [
        (1e-3, 1e-4),
        ([0.9, 0.999], [0.8, 0.99]),
        (1e-2, 0.1),
    ]


def test_a_run_resumed_at_the_step_of_a_change_makes_it_once(monkeypatch):
    told(monkeypatch, {40: SET}, name="whole")
    with pytest.raises(KeyboardInterrupt):  # the checkpoint of step 40 is older than the change
        told(monkeypatch, {40: SET}, callbacks=[Stop(44)])
    resumed()
    assert weights() == weights(RUN.parent / "whole")


def test_a_run_killed_before_its_first_checkpoint_makes_the_change_again(monkeypatch):
    told(monkeypatch, {7: SET}, name="whole")
    with pytest.raises(KeyboardInterrupt):
        told(monkeypatch, {7: SET}, callbacks=[Stop(9)])
    assert listed(RUN / "checkpoints") == []
    resumed()
    assert weights() == weights(RUN.parent / "whole")


def test_a_checkpoint_after_a_change_contains_it(monkeypatch):
    told(monkeypatch, {7: SET}, name="whole")
    with pytest.raises(KeyboardInterrupt):
        told(monkeypatch, {7: SET}, callbacks=[Stop(43)])
    (RUN / "events.jsonl").unlink()  # it is not needed
    resumed()
    assert weights() == weights(RUN.parent / "whole")


def test_a_request_to_an_earlier_process_of_the_run_is_dropped(monkeypatch):
    told(monkeypatch, {13: "stop"})
    send(RUN, Request([Command("stop")]))  # its sender was killed while it waited
    os.utime(RUN / "request.json", (0, 0))
    resumed()
    assert json.loads((RUN / "status.json").read_text())["status"] == "done"
    assert [row["do"] for row in events()] == ["stop"]


def test_a_setting_that_the_user_changes_when_resuming_is_not_changed_again(monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        told(monkeypatch, {45: "set optimizer.lr=1e-4"}, callbacks=[Stop(47)])
    resumed("first", "optimizer.lr=0.5")
    assert base_rates() == {0.5}
    assert [row["do"] for row in events()] == ["set", "discard"]
    assert list(requests.changes(RUN)) == []


def test_the_schedule_applies_to_a_changed_learning_rate(monkeypatch):
    chosen = ("scheduler=cosine", "trainer.log_every=1steps")
    told(monkeypatch, {30: "set optimizer.lr=0.01"}, *chosen)
    plain = train(spec_of("run.name=plain", *chosen), "default", [], say=lambda line: None).folder
    steered = rates(RUN)
    usual = rates(plain)
    assert steered[30] == usual[30]
    assert steered[31] == pytest.approx(10 * usual[31])
    assert steered[79] == pytest.approx(10 * usual[79])


def test_groups_keep_their_factors(monkeypatch):
    told(monkeypatch, {10: "set optimizer.lr=0.01"}, "parameters.rates={head.*: 0.5}")
    assert base_rates() == {0.01, 0.005}
    assert {group["weight_decay"] for group in optimizer_of()} == {0.0, 0.01}
    assert events()[0]["old"] == 1e-3


def test_a_requested_checkpoint_is_kept_and_changes_nothing(monkeypatch):
    told(monkeypatch, {13: "checkpoint"})
    plain = train(spec_of("run.name=plain"), "default", [], say=lambda line: None).folder
    assert (RUN / "checkpoints/step-00000013").is_dir()
    assert events()[0]["checkpoint"] == "checkpoints/step-00000013"
    assert weights() == weights(plain)
    assert json.loads((RUN / "status.json").read_text())["checkpoint_step"] == 80


def test_a_stopped_run_saves_and_resumes(monkeypatch):
    result = told(monkeypatch, {13: "stop"})
    plain = train(spec_of("run.name=plain"), "default", [], say=lambda line: None).folder
    assert (result.steps, result.signal, result.stopped.by) == (13, 15, "tell")
    status = json.loads((RUN / "status.json").read_text())
    assert (status["status"], status["reason"]) == ("stopped", "framework tell")
    assert [path.name for path in listed(RUN / "checkpoints")] == ["step-00000013"]
    resumed()
    assert weights() == weights(plain)


def test_a_paused_run_waits_and_continues(monkeypatch):
    seen = []
    paused = Status.paused

    def note(status, trainer):
        paused(status, trainer)
        seen.append(json.loads((RUN / "status.json").read_text())["status"])
        words = ["set", "optimizer.lr=1e-4", "continue"]
        threading.Timer(0.3, send, (RUN, Request(parse_commands(words)))).start()

    monkeypatch.setattr(Status, "paused", note)
    told(monkeypatch, {20: "pause"})
    assert seen == ["paused"]
    assert [(row["step"], row["do"]) for row in events()] == [
        (20, "pause"),
        (20, "set"),
        (20, "continue"),
    ]
    assert base_rates() == {1e-4}


def test_a_paused_run_can_be_stopped(monkeypatch):
    paused = Status.paused

    def stop(status, trainer):
        paused(status, trainer)
        trainer.stop("signal", "SIGTERM", 15)

    monkeypatch.setattr(Status, "paused", stop)
    assert told(monkeypatch, {20: "pause"}).steps == 20


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("set optimizer.lr=-1", "optimizer.lr=-1: expected float in (0, inf), got -1"),
        ("set optimizer.lr=[1,2]", "optimizer.lr=[1,2]: expected float in (0, inf)"),
        ("set optimizer.betas=[0.5]", "optimizer.betas=[0.5]: expected"),
        ("set optimizer.lrr=1", "did you mean 'optimizer.lr'?"),
        ("set optimizer.amsgrad=1", "optimizer.amsgrad: is used only when"),
        ("set trainer.max_epochs=9", "trainer.max_epochs: cannot be changed in a running run"),
        ("set model.width=9", "model.width: only numbers of the optimizer"),
        ("continue", "continue: the run is not paused"),
        ("set optimizer.lr=0.5 set optimizer.lrr=1", "optimizer.lrr"),
    ],
)
def test_a_refused_request_changes_nothing(words, reason, monkeypatch):
    told(monkeypatch, {3: words}, "trainer.max_steps=5")
    [row] = events()
    assert (row["do"], row["step"]) == ("refused", 3)
    assert reason in row["reason"]
    assert base_rates() == {1e-3}


def test_a_change_that_needs_other_state_is_refused(monkeypatch):
    sgd = ("optimizer=sgd", "trainer.max_steps=5")
    told(monkeypatch, {3: "set optimizer.momentum=0.5"}, *sgd, "optimizer.momentum=0")
    assert "the optimizer would need other state" in events()[0]["reason"]
    told(monkeypatch, {3: "set optimizer.momentum=0.5"}, *sgd, "optimizer.momentum=0.9", name="b")
    assert events(RUN.parent / "b")[0]["new"] == 0.5
    told(monkeypatch, {3: "set optimizer.weight_decay=0.5"}, *sgd, name="c")
    assert "began without weight decay" in events(RUN.parent / "c")[0]["reason"]


def test_a_request_of_another_user_is_refused(monkeypatch):
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    told(monkeypatch, {3: "set optimizer.lr=0.5"}, "trainer.max_steps=5")
    assert "from another user" in events()[0]["reason"]
    assert base_rates() == {1e-3}
    with pytest.raises(RunError, match="belongs to another user"):
        requests.check_owner(RUN)


def test_a_folder_that_any_user_may_write_takes_no_requests(monkeypatch):
    class Opens(Stop):
        def on_fit_start(self, trainer):
            trainer.folder.chmod(0o777)

    told(monkeypatch, {3: "stop"}, "trainer.max_steps=5", callbacks=[Opens(None)])
    assert "can be written by any user" in events()[0]["reason"]
    with pytest.raises(RunError, match="can be written by any user"):
        requests.check_owner(RUN)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"id": "a", "commands": [{"do": "delete"}]}', b"\xff", b"[" * 10000]
)
def test_a_damaged_request_is_refused(content, tmp_path):
    (tmp_path / "request.json").write_bytes(content)
    with pytest.raises(requests.Refused):
        requests.take(tmp_path)
    assert not (tmp_path / "request.json").exists()


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_text(json.dumps({"id": "a", "commands": [{"do": "stop"}]}))
    (tmp_path / "request.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(requests.Refused, match="symbolic link"):
        requests.take(tmp_path)


@pytest.mark.parametrize(
    "row",
    [
        {"step": -1, "request": "a", "do": "set", "setting": "optimizer.lr", "new": 1.0},
        {"step": 1, "request": "a", "do": "set", "setting": "optimizer.lr", "new": "1"},
        {"step": 1, "request": "a", "do": "set", "setting": ["optimizer.lr"], "new": 1.0},
        {"step": 50, "request": "a", "do": "set", "setting": "optimizer.lr", "new": -1.0},
        {"step": 50, "request": "a", "do": "set", "setting": "model.width", "new": 8},
    ],
)
def test_events_that_cannot_be_repeated_are_reported(row, monkeypatch):
    with cut_off_at(43, monkeypatch):
        train(spec_of("run.name=first"), "default", [], say=lambda line: None)
    record(RUN, [row])
    with pytest.raises(RunError, match="events"):
        resumed()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("halt", "there is no command 'halt'"),
        ("optimizer.lr=1", "write `set optimizer.lr=1`"),
        ("set", "set: expected KEY=VALUE"),
        ("set stop", "set: expected KEY=VALUE, got 'stop'"),
        ("set optimizer.lr=fast", "optimizer.lr=fast: expected a number"),
        ("set optimizer.lr=nan", "optimizer.lr=nan: expected a number"),
        ("set optimizer.lr=1e999", "expected a number"),
        ("set optimizer.lr=true", "expected a number"),
        ("stop stop", "stop is given 2 times"),
    ],
)
def test_wrong_commands_are_refused_before_they_are_sent(words, message):
    with pytest.raises(FrameworkError) as error:
        parse_commands(words.split())
    assert message in str(error.value)


def test_texts_of_other_settings_are_refused_with_the_command_that_changes_them():
    with pytest.raises(FrameworkError) as error:
        parse_commands(["set", "mode=max"], ["callbacks.checkpoint.mode", "optimizer.lr"])
    assert "`framework resume RUN callbacks.checkpoint.mode=max`" in str(error.value)
    assert error.value.facts.setting == "callbacks.checkpoint.mode"
    assert error.value.facts.expected == "a number of the optimizer"
    with pytest.raises(FrameworkError, match="only numbers of the optimizer") as error:
        parse_commands(["set", "nothing=max"], ["optimizer.lr"])
    assert "resume" not in str(error.value)


def test_commands_in_any_order():
    assert parse_commands(["checkpoint", "set", "a=.5", "b=[1,2]", "set", "c=1e-4", "pause"]) == [
        Command("checkpoint"),
        Command("set", "a", 0.5),
        Command("set", "b", [1, 2]),
        Command("set", "c", 1e-4),
        Command("pause"),
    ]


def test_stacked_trials_are_told_one_by_one(monkeypatch):
    from framework.composition.compose import CommandLine
    from framework.tuning.sweep.sweep import sweep

    make_trainer = Experiment.trainer

    def with_tells(*args):
        trainer = make_trainer(*args)
        told = {5: "pause", 7: "set optimizer.lr=0.5", 20: "stop"}
        trainer.callbacks.append(Tells(told if args[0].spec.seed == 1 else {}))
        return trainer

    monkeypatch.setattr(Experiment, "trainer", with_tells)
    line = ["seed=0,1,2", "hydra/launcher=vectorized", "sweep.name=trials", *SMALL]
    line += ["trainer.log_every=1steps", "scheduler=null"]
    sweep(CommandLine(line, [], multirun=True), lambda job: None, lambda error: [str(error)])
    trials = sorted(Path("runs/default/trials").glob("0*"))
    assert [len(listed(trial / "checkpoints")) > 0 for trial in trials] == [True] * 3
    assert [row["do"] for row in events(trials[1])] == ["refused", "set", "stop"]
    assert rates(trials[1])[8] == 0.5
    assert rates(trials[0])[8] == 1e-3
    assert rates(trials[0])[80] == 1e-3  # the others go on
    rows = Path("runs/default/trials/sweep.jsonl").read_text().splitlines()
    states = {json.loads(row)["number"]: json.loads(row)["state"] for row in rows}
    assert states == {0: "done", 1: "pruned", 2: "done"}


def steered_by_two_processes(folder):
    """Train a run to its end, one that is killed and resumed, and one that is paused and stopped.

    It runs in each process; returns the weights of the first two, and the end of the third.
    """
    fw.discover()
    os.chdir(folder)
    steering.CHECK_SECONDS = 0.0
    steering.PAUSE_SECONDS = 0.01
    paused = Status.paused

    def continued_later(status, trainer):
        paused(status, trainer)
        threading.Timer(0.2, send, (trainer.folder, Request([Command("continue")]))).start()

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Status, "paused", continued_later)
        chosen = ("callbacks.checkpoint.every=20steps", "trainer.max_steps=44")
        told(monkeypatch, {31: SET}, *chosen, name="whole")
        with pytest.raises(KeyboardInterrupt):
            told(monkeypatch, {31: SET}, *chosen, callbacks=[Stop(37)])
        resumed("first", *chosen)
        result = told(monkeypatch, {5: "pause checkpoint", 12: "stop"}, *chosen, name="stopped")
    return weights(RUN), weights(RUN.parent / "whole"), (result.steps, result.signal)


def test_two_processes_carry_out_a_request_after_the_same_step(tmp_path):
    ends = run_in_processes(steered_by_two_processes, 2, tmp_path, tmp_path)
    for run, whole, (steps, number) in ends:
        assert run == whole
        assert (steps, number) == (12, 15)
    stopped = events(tmp_path / "runs/default/stopped")
    assert [(row["step"], row["do"]) for row in stopped] == [
        (5, "pause"),
        (5, "checkpoint"),
        (5, "continue"),
        (12, "stop"),
    ]


@pytest.mark.slow  # it compiles several steps
def test_compiled_steps_use_a_changed_setting(monkeypatch):
    pytest.importorskip("torch._dynamo")
    # without dropout, whose random numbers differ in compiled code
    compiled = ("trainer.compile=step", "trainer.max_steps=8", "model.dropout=0.0")
    told(monkeypatch, {4: SET}, *compiled)
    told(monkeypatch, {4: SET}, *compiled[1:], name="eager")
    ours = load(listed(RUN / "checkpoints")[-1])[0]
    eager = load(listed(RUN.parent / "eager" / "checkpoints")[-1])[0]
    for name, value in eager.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-5)
