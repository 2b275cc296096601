"""The progress callback, in a terminal and without one."""

import io
import os
import pty
import re
import sys
import threading
import types
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import framework as fw
from framework import Callback, TensorSplit, Trainer

SPLIT = TensorSplit(torch.linspace(-1, 1, 24).reshape(12, 2), torch.ones(12, 1))
SHOW_CURSOR = "\x1b[?25h"
HIDE_CURSOR = "\x1b[?25l"


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
    """Make a pseudo-terminal stderr; yield a list.

    After the block, the list has the output and whether stderr was unchanged.
    """
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "140")
    master, slave = pty.openpty()
    result = []
    content = bytearray()

    def read():
        try:
            while chunk := os.read(master, 4096):
                content.extend(chunk)
        except OSError:  # the terminal is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(slave, "w") as stream, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stream)
        try:
            yield result
        finally:
            same_stderr = sys.stderr is stream
    reader.join()
    os.close(master)
    result += [content.decode(), same_stderr]


def lines(monkeypatch, *callbacks, **settings) -> list[str]:
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    fit(fw.callbacks.build("progress"), *callbacks, **settings)
    return written.getvalue().splitlines()


def test_without_a_terminal_each_epoch_is_one_plain_line(monkeypatch):
    first, last = lines(monkeypatch)
    values = r"train/loss [\d.e-]+  val/loss [\d.e-]+  [\d,]+ samples/s"
    assert re.fullmatch(rf"epoch 1/2  step 3/6  {values}  ETA \d+:\d\d", first)
    assert re.fullmatch(rf"epoch 2/2  step 6/6  {values}", last)


def test_a_run_without_validation_that_ends_within_an_epoch_prints_its_last_step(monkeypatch):
    counts = [line.split("  ")[:2] for line in lines(monkeypatch, val=None, max_steps=4)]
    assert counts == [["epoch 1/2", "step 3/4"], ["epoch 2/2", "step 4/4"]]


def test_each_validation_within_an_epoch_prints_a_line(monkeypatch):
    steps = [line.split()[3] for line in lines(monkeypatch, validate_every="2steps", epochs=2)]
    assert steps == ["2/6", "3/6", "4/6", "6/6"]


def test_a_terminal_shows_a_live_bar_and_restores_cursor_and_stderr(monkeypatch):
    with terminal(monkeypatch) as screen:
        fit(fw.callbacks.build("progress", per_second=1e6))
    shown, same_stderr = screen
    for text in ("step 0/6", "step 6/6", "validating", "val", "loss", "━"):
        assert text in shown
    assert shown.index(HIDE_CURSOR) < shown.rindex(SHOW_CURSOR)
    assert HIDE_CURSOR not in shown[shown.rindex(SHOW_CURSOR) :]
    assert same_stderr


def test_the_cursor_is_restored_after_an_exception(monkeypatch):
    class Fail(Callback):
        def on_gradients(self, trainer):
            raise ZeroDivisionError

    with terminal(monkeypatch) as screen, pytest.raises(ZeroDivisionError):
        fit(fw.callbacks.build("progress"), Fail())
    assert SHOW_CURSOR in screen[0]


def test_the_bar_is_not_updated_at_every_step(monkeypatch):
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


def test_a_dumb_terminal_shows_plain_lines_without_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.live", None)  # its import fails
    with terminal(monkeypatch) as screen:
        monkeypatch.setenv("TERM", "dumb")
        fit(fw.callbacks.build("progress"))
    assert screen[0].count("\r\n") == 2
    assert "\x1b" not in screen[0]


def test_a_command_in_a_cell_of_a_notebook_prints_lines(monkeypatch):
    with terminal(monkeypatch) as screen:
        monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
        fit(fw.callbacks.build("progress"))
    assert screen[0].count("\r\n") == 2
    assert "\x1b" not in screen[0]


class Notebook:
    """Stands for IPython in a kernel; `outputs` are those below the cell."""

    def __init__(self):
        self.outputs = []
        self.updates = 0
        self.kernel = object()

    def display(self, bundle, raw, display_id):
        assert raw
        assert display_id
        self.outputs.append(bundle)
        return Output(self, len(self.outputs) - 1)


class Output:
    def __init__(self, notebook, index):
        self.notebook = notebook
        self.index = index

    def update(self, bundle, raw):
        assert raw
        self.notebook.updates += 1
        self.notebook.outputs[self.index] = bundle


@pytest.fixture
def notebook(monkeypatch):
    found = Notebook()
    ipython = types.ModuleType("IPython")
    ipython.get_ipython = lambda: found
    ipython.display = types.ModuleType("IPython.display")
    ipython.display.display = found.display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", ipython.display)
    return found


def test_a_notebook_shows_one_bar_for_each_fit(notebook, capsys):
    for _ in range(2):
        fit(fw.callbacks.build("progress", per_second=1e6))
    assert len(notebook.outputs) == 2
    assert notebook.updates >= 12  # of six steps each
    for output in notebook.outputs:
        assert "step 6/6" in output["text/html"]
        assert "step 6/6" in output["text/plain"]
        assert "step 5/6" not in output["text/html"]
        assert "━" in output["text/html"]
    assert capsys.readouterr() == ("", "")


def test_a_notebook_keeps_the_bar_of_a_fit_that_fails(notebook):
    class Fail(Callback):
        def on_gradients(self, trainer):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(fw.callbacks.build("progress"), Fail())
    assert len(notebook.outputs) == 1
    assert "step 0/6" in notebook.outputs[0]["text/html"]


def test_names_are_escaped_in_a_notebook(notebook):
    class Log(Callback):
        def on_step_end(self, trainer):
            trainer.log({"train/<script>": 1.0})

    fit(fw.callbacks.build("progress"), Log())
    assert "&lt;script&gt;" in notebook.outputs[0]["text/html"]
    assert "<script>" not in notebook.outputs[0]["text/html"]


def test_lines_are_printed_in_a_notebook_too(notebook, monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    fit(fw.callbacks.build("progress", style="lines"))
    assert written.getvalue().count("\n") == 2
    assert notebook.outputs == []


def test_ipython_in_a_terminal_is_no_notebook(notebook, monkeypatch):
    notebook.kernel = None
    assert len(lines(monkeypatch)) == 2
    assert notebook.outputs == []


def test_a_process_without_stderr_shows_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    assert fit(fw.callbacks.build("progress")).state.epoch == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("workers", "advised"), [(0, True), (1, False)])
def test_a_slow_data_loader_without_workers_gives_advice(workers, advised, monkeypatch, capsys):
    monkeypatch.setattr("framework.runtime.clock.SLOW_SECONDS", 0.0)
    monkeypatch.setattr("framework.runtime.clock.SLOW_SHARE", 0.0)
    loader = DataLoader(TensorDataset(*SPLIT.tensors), batch_size=4, num_workers=workers)
    model = nn.Linear(2, 1)
    trainer = Trainer(max_epochs=1, callbacks=[fw.callbacks.build("progress")], device="cpu")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer.fit(model, loader, task=nn.MSELoss(), optimizer=optimizer)
    assert ("DataLoader(..., num_workers=2) reads ahead" in capsys.readouterr().err) == advised


def test_a_callback_with_a_live_view_is_shown_below_the_bar(monkeypatch):
    class Counts(Callback):
        changes_training = False

        def live_view(self, columns, rows):
            self.size = (columns, rows)
            return "shown below"

    class Nothing(Counts):
        def live_view(self, columns, rows):
            return None

    counts = Counts()
    with terminal(monkeypatch) as result:
        fit(fw.callbacks.build("progress"), Nothing(), counts)
    output = result[0]
    assert "shown below" in output
    assert output.rindex("val") < output.rindex("shown below")
    columns, rows = counts.size
    assert columns == 140
    assert 0 < rows < 24
    fit(fw.callbacks.build("progress", style="lines"), counts)
