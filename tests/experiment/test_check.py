"""`framework check`: a step on two processes."""

import textwrap

import pytest

from framework.errors import FrameworkError, RunError
from framework.experiment.dry_runs.check import run_check
from runs import composed

SMALL = ("model.width=8", "loader.batch_size=20", "callbacks=[]")
PLUGIN = textwrap.dedent(
    """
    import os
    import torch
    import framework as fw
    from framework.contracts.task import Phase

    @fw.losses.register("of_the_batch")
    class OfTheBatch(torch.nn.Module):
        targets = ("classes",)

        def forward(self, outputs, targets):
            loss = torch.nn.functional.cross_entropy(outputs, targets)
            return loss * (1 + outputs.mean().square() * len(outputs))

    @fw.callbacks.register("speaking")
    class Speaking(fw.Callback):
        def on_step_end(self, trainer):
            print("a step")

    @fw.losses.register("noisy")
    class Noisy(OfTheBatch):
        def forward(self, outputs, targets):
            noisy = outputs + 0.01 * torch.randn_like(outputs)
            return torch.nn.functional.cross_entropy(noisy, targets)

    @fw.tasks.register("opposed")
    class Opposed(fw.Task):
        phases = [Phase("fit", ["*"]), Phase("undo", ["*"])]

        def step(self, model, batch):
            inputs, targets = batch
            outputs = model(inputs)
            loss = torch.nn.functional.cross_entropy(outputs, targets)
            return fw.Step(loss, outputs, targets)

        def phase(self, name, model, batch):
            result = self.step(model, batch)
            return result if name == "fit" else result._replace(loss=-result.loss)

    @fw.callbacks.register("fails_in_check")
    class Fails(fw.Callback):
        def on_step_start(self, trainer):
            if trainer.strategy.rank == 1:
                raise ValueError("this process fails")
    """
)


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """Return the path of a plugin with the parts of these tests."""
    path = tmp_path_factory.mktemp("plugin") / "parts_of_check.py"
    path.write_text(PLUGIN)
    return str(path)


def checked(*overrides, plugins=()):
    """Return the lines of a check."""
    lines = []

    def say(text, seconds=None):
        lines.append(text if seconds is None else f"{text:<26}{seconds:8.1f} s")

    run_check(composed([*SMALL, *overrides], plugins), say)
    return lines


def test_the_gradients_of_two_processes_are_compared():
    several = ("trainer.devices=2", "strategy=fsdp", "strategy.units=[]")
    *_, timed, compared = checked(*several, "model.dropout=0.1", "model.width=64")
    assert timed.startswith("a step on 2 processes")
    assert timed.endswith(" s")
    difference = compared.partition("one process by ")[2].partition(" ")[0]
    assert float(difference) < 1e-5
    assert compared.endswith("the weights of the processes are equal")


def test_random_gradients_are_not_compared(plugin):
    line = checked("task.loss=noisy", plugins=[plugin])[-1]
    assert line.startswith("2 processes have equal weights; the gradients are not compared")


def test_each_phase_of_a_task_learns_one_batch_alone(plugin):
    """Together the phases would leave the loss as it is."""
    lines = checked("task=opposed", "metrics=[]", plugins=[plugin])
    assert [line.partition(" of one batch: ")[0] for line in lines if "at first" in line] == [
        "loss of phase fit",
        "loss of phase undo",
    ]
    with pytest.raises(RunError, match=r"^loss of phase fit of one batch: .* is not learned"):
        checked("task=opposed", "metrics=[]", "optimizer.lr=1e-9", plugins=[plugin])


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("strategy=single", "strategy=single: expected a strategy for 2 processes, such as ddp"),
        ("loader.batch_size=1", "batch_size=1: expected at least one sample for each of the 2"),
    ],
)
def test_an_experiment_for_one_process_is_not_checked_on_two(setting, reason):
    assert f"a step on 2 processes      skipped: {reason}" in checked(setting)[-1]


def test_a_loss_that_depends_on_other_samples_is_found(plugin):
    with pytest.raises(RunError, match="on 2 processes differ from those of one process by"):
        checked("task.loss=of_the_batch", plugins=[plugin])


def test_an_error_of_a_process_is_that_of_the_check(plugin):
    with pytest.raises(FrameworkError, match="this process fails"):
        checked("callbacks=[fails_in_check]", plugins=[plugin])


def test_one_batch_is_overfitted_without_the_callbacks(plugin, capsys):
    """A callback that prints a line for each step would print a hundred."""
    lines = checked("callbacks=[speaking]", "strategy=single", plugins=[plugin])
    assert any("overfit one batch" in line for line in lines)
    assert 3 <= capsys.readouterr().out.count("a step") <= 6
