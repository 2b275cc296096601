"""The progress callback: what a person sees, in a terminal and without one."""

import io
import os
import pty
import re
import sys
import threading
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import framework as fw
from framework import Callback, TensorSplit, Trainer

SPLIT = TensorSplit(torch.linspace(-1, 1, 24).reshape(12, 2), torch.ones(12, 1))
SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"


def fit(*callbacks, val=SPLIT, epochs=2, **limits):
    model = nn.Linear(2, 1)
    trainer = Trainer(max_epochs=epochs, callbacks=callbacks, device="cpu", **limits)
    trainer.fit(
        model,
        SPLIT,
        task=nn.MSELoss(),
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        val=val,
        batch_size=4,
    )
    return trainer


@contextmanager
def terminal(monkeypatch):
    """A real terminal as stderr; gives a list that has all that was shown once the block is left."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "140")
    master, slave = pty.openpty()
    shown, content = [], bytearray()

    def read():
        try:
            while chunk := os.read(master, 4096):
                content.extend(chunk)
        except OSError:  # how a terminal that was hung up answers
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(slave, "w") as stream, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stream)
        try:
            yield shown
        finally:
            shown.append(sys.stderr is stream)
    reader.join()
    os.close(master)
    shown.insert(0, content.decode())


def lines(monkeypatch, *callbacks, **settings) -> list[str]:
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    fit(fw.callbacks.build("progress"), *callbacks, **settings)
    return written.getvalue().splitlines()


def test_without_a_terminal_each_epoch_is_one_plain_line(monkeypatch):
    first, last = lines(monkeypatch)
    assert re.fullmatch(
        r"epoch 1/2  step 3/6  train/loss [\d.e-]+  val/loss [\d.e-]+  [\d,]+ samples/s  ETA \d+:\d\d",
        first,
    )
    assert re.fullmatch(
        r"epoch 2/2  step 6/6  train/loss [\d.e-]+  val/loss [\d.e-]+  [\d,]+ samples/s", last
    )


def test_without_a_validation_split_and_in_the_middle_of_an_epoch(monkeypatch):
    assert [line.split("  ")[:2] for line in lines(monkeypatch, val=None, max_steps=4)] == [
        ["epoch 1/2", "step 3/4"],
        ["epoch 2/2", "step 4/4"],
    ]


def test_validations_within_an_epoch_have_their_line(monkeypatch):
    steps = [line.split()[3] for line in lines(monkeypatch, validate_every="2steps", epochs=2)]
    assert steps == ["2/6", "3/6", "4/6", "6/6"]


def test_a_terminal_gets_a_live_bar_and_its_cursor_and_stderr_back(monkeypatch):
    with terminal(monkeypatch) as screen:
        fit(fw.callbacks.build("progress", per_second=1e6))
    shown, same_stderr = screen
    assert all(
        words in shown for words in ("step 0/6", "step 6/6", "validating", "val", "loss", "━")
    )
    assert shown.index(HIDE_CURSOR) < shown.rindex(SHOW_CURSOR)
    assert HIDE_CURSOR not in shown[shown.rindex(SHOW_CURSOR) :]
    assert same_stderr


def test_the_cursor_comes_back_after_an_exception(monkeypatch):
    class Fail(Callback):
        def on_gradients(self, trainer):
            raise ZeroDivisionError

    with terminal(monkeypatch) as screen, pytest.raises(ZeroDivisionError):
        fit(fw.callbacks.build("progress"), Fail())
    assert SHOW_CURSOR in screen[0]


def test_the_bar_is_not_drawn_with_every_step(monkeypatch):
    with terminal(monkeypatch) as screen:
        fit(fw.callbacks.build("progress", per_second=0.01), val=None, epochs=20)
    assert set(re.findall(r"step (\d+)/60", screen[0])) == {"0", "60"}


def test_printing_does_not_break_the_bar(monkeypatch):
    class Print(Callback):
        def on_epoch_end(self, trainer):
            print("a line of its own", file=sys.stderr)

    with terminal(monkeypatch) as screen:
        fit(fw.callbacks.build("progress"), Print())
    assert screen[0].count("a line of its own\r\n") == 2


def test_a_dumb_terminal_gets_lines_and_nothing_of_rich_is_needed_for_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.live", None)  # an import of it would fail
    with terminal(monkeypatch) as screen:
        monkeypatch.setenv("TERM", "dumb")
        fit(fw.callbacks.build("progress"))
    assert screen[0].count("\r\n") == 2
    assert "\x1b" not in screen[0]


def test_a_process_without_stderr_shows_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    assert fit(fw.callbacks.build("progress")).state.epoch == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("workers", "advised"), [(0, True), (1, False)])
def test_advice_on_a_slow_data_loader(workers, advised, monkeypatch, capsys):
    monkeypatch.setattr("framework.runtime.clock.SLOW_SECONDS", 0.0)
    monkeypatch.setattr("framework.runtime.clock.SLOW_SHARE", 0.0)
    loader = DataLoader(TensorDataset(*SPLIT.tensors), batch_size=4, num_workers=workers)
    model = nn.Linear(2, 1)
    trainer = Trainer(max_epochs=1, callbacks=[fw.callbacks.build("progress")], device="cpu")
    trainer.fit(
        model, loader, task=nn.MSELoss(), optimizer=torch.optim.SGD(model.parameters(), 0.1)
    )
    assert ("DataLoader(..., num_workers=2) reads ahead" in capsys.readouterr().err) == advised
