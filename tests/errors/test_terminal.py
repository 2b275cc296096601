"""Names and values from files cannot control the terminal or forge lines of the output."""

import ast
import builtins
import csv
import fcntl
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import unicodedata
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import framework
from framework.cli import main, predict
from framework.cli.output import print_values
from framework.cli.parts import tables
from framework.cli.predict import text_pieces
from framework.errors import ConfigError, FrameworkError, terminal
from framework.errors.paths import override, pasted
from framework.errors.terminal import (
    completed,
    message_line,
    message_lines,
    printable,
    printable_lines,
    shortened,
)
from framework.experiment.plan import Memory, ParameterGroup, Plan
from framework.experiment.plan_text import render
from framework.experiment.trained.prediction_columns import Form
from framework.experiment.trained.prediction_files import write_predictions
from framework.runs.sweep_files import Trial
from framework.runtime.display.console import Console, console
from framework.training.layer_table import Layer
from framework.tuning.sweep.display import LineDisplay
from framework.tuning.sweep.table import results_table
from shipped import shipped

FORGED = "framework: all is well"
COLOUR = "\x1b[31m"
CLIPBOARD = "\x1b]52;c;aGk=\x07"
TITLE = "\x1b]0;pwned\x9c"
HOSTILE = (
    f"x{COLOUR}{CLIPBOARD}{TITLE}\x9b31m\u202e\u2066\u200b\u200f\U000e0041\x7f\x08\r"
    f"{FORGED}\u2028{FORGED}\n{FORGED}"
)
NAME = HOSTILE.replace("/", "")  # of a file
MARKUP = "[bold]bold[/bold][link=https://example.org]link[/link]"
TINY = (
    "model.depth=1 model.width=4 loader.limit=8 trainer.max_steps=1 data=npz data.path=x.npz "
    "run.name=r"
)


def faults(output):
    """Yield characters that must not reach a terminal, and forged lines."""
    for character in set(output) - {"\n"}:
        if unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp"):
            yield repr(character)
    yield from (line for line in output.splitlines() if line.startswith(FORGED))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Train a run with hostile names of classes; return its working folder."""
    folder = tmp_path_factory.mktemp("finished")
    before = Path.cwd()
    os.chdir(folder)
    try:
        rows = np.random.default_rng(0).random((40, 3)).astype("float32")
        np.savez("x.npz", x=rows, y=np.array([HOSTILE, f"{HOSTILE}{MARKUP}"])[np.arange(40) % 2])
        with pytest.raises(SystemExit) as end:
            main.main(shlex.split(f"train {TINY} loggers=[json_lines] callbacks=[checkpoint]"))
    finally:
        os.chdir(before)
    assert end.value.code == 0
    return folder


@pytest.fixture
def run(command, finished):
    """Copy that run into the working folder."""
    shutil.copytree(finished, Path.cwd(), dirs_exist_ok=True, symlinks=True)
    return Path("runs/default/r")


def changed(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


# places of a run folder that may be untrusted


def nothing(run):
    """Change nothing: the classes are hostile already."""


def metrics(run):
    file = run / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[-1] |= {f"val/{HOSTILE}{MARKUP}": 0.5, f"test/{HOSTILE}": 0.5}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def plugins(run):
    changed(
        run / "provenance.json",
        lambda content: content.update(plugins=[f"{HOSTILE}; touch PWNED #.py"]),
    )


def config_value(run):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("name: mlp", f"name: {json.dumps(HOSTILE)}"))


def config_key(run):
    with (run / "config.yaml").open("a") as file:
        file.write(f"{json.dumps(HOSTILE)}: {json.dumps(HOSTILE)}\n")


def broken_config(run):
    (run / "config.yaml").write_text(f"a: [\n{HOSTILE}")


def manifest(run):
    for file in (run / "checkpoints").glob("*/MANIFEST.json"):
        changed(file, lambda content: content.update(torch=HOSTILE, format=HOSTILE))


def facts(run):
    changed(
        run / "facts.json", lambda content: content.update({HOSTILE: HOSTILE, "classes": HOSTILE})
    )


PLACES = [nothing, metrics, plugins, config_value, config_key, broken_config, manifest, facts]
VERBS = [
    "eval runs/default/r",
    "eval runs/default/r --json",
    "resume runs/default/r",
    "resume runs/default/r --traceback",
    "predict runs/default/r --input x.npz --output -",
    f"train {TINY} init_from=runs/default/r run.name=s",
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_an_untrusted_run_controls_nothing(run, command, place):
    place(run)
    for line in VERBS:
        _, out, err = command(line)
        assert not list(faults(out + err)), line


def test_without_escapes_an_untrusted_run_controls_the_terminal(run, command, monkeypatch):
    """Control: these places reach the terminal."""
    metrics(run)
    monkeypatch.setattr(terminal, "UNSAFE", re.compile("(?!)"))
    assert list(faults(command("resume runs/default/r")[1]))
    assert list(faults(command("predict runs/default/r --input x.npz --output -")[1]))
    config_key(run)
    assert list(faults(command("eval runs/default/r")[2]))


def test_the_holder_in_a_lock_file_is_escaped(run, command, monkeypatch):
    monkeypatch.setattr("framework.system.locks.PATIENCE", 0.0)
    with (run / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(f"process 1 on {HOSTILE}")
        file.flush()
        status, out, err = command("resume runs/default/r trainer.max_steps=2")
    assert (status, list(faults(out + err))) == (2, [])
    assert "process 1 on x\\x1b" in err


# names and contents of other files of the user

MODULE = '''
import torch
from framework import Callback, callbacks, models

@callbacks.register("evil")
class Evil(Callback):
    """HOSTILE MARKUP

    Second paragraph.
    """

    def __init__(self, text: str = "HOSTILE", color: str = "MARKUP"):
        """Keep it.

        Args:
            text: HOSTILE MARKUP.
        """

    def on_fit_start(self, trainer):
        trainer.log({"val/HOSTILE MARKUP": 1.0})

    def on_fit_end(self, trainer):
        raise ValueError("HOSTILE MARKUP")

@models.register("evil")
def evil(in_shape, out_shape):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(in_shape[0], out_shape[0]))
    model[1].__class__ = type("HOSTILE", (torch.nn.Linear,), {})
    return model
'''


def write_module():
    """Write a plugin with hostile docstrings, defaults, values, errors and classes."""
    coded = "".join(f"\\U{ord(character):08x}" for character in HOSTILE)
    Path("evil.py").write_text(MODULE.replace("HOSTILE", coded).replace("MARKUP", MARKUP))


PLUGIN_COMMANDS = {
    "list": "list callback --plugins evil.py",
    "show": "show callback/evil --plugins evil.py",
    "plan": f"plan {TINY} model=evil --plugins evil.py".replace("model.depth=1 model.width=4 ", ""),
    "train": f"train {TINY} callbacks=[evil,progress] loggers=[console] --plugins evil.py",
    "sweep": f"train -m {TINY} seed=0,1 run.name=null callbacks=[evil] --plugins evil.py",
    "sweep with traceback": (
        f"train -m {TINY} seed=0,1 run.name=null callbacks=[evil] --plugins evil.py --traceback"
    ),
}


@pytest.mark.parametrize("line", PLUGIN_COMMANDS.values(), ids=PLUGIN_COMMANDS)
def test_texts_of_a_plugin_are_escaped(command, finished, forget_plugins, line):
    shutil.copy(finished / "x.npz", "x.npz")
    write_module()
    _, out, err = command(line)
    assert not list(faults(out + err))
    assert "\\x1b[31m" in out + err
    if line.startswith(("list", "show")):
        assert MARKUP in out, "square brackets are no markup"
    if line.startswith("show"):
        assert " --plugins evil.py written in " in " ".join(out.split())


COMMANDS = {
    "a file that is missing": "train data=npz data.path={hostile}",
    "a plugin that is missing": "list --plugins {hostile}",
    "a run that is missing": "eval {hostile}",
    "the root of a board": "board --root {hostile}",
    "a part": "show {hostile}",
    "a kind": "list {hostile}",
    "a verb": "{hostile}",
    "a key": "train {hostile}=1",
    "a value": "train model={hostile}",
    "a value with quotes": "train init_from={quoted}",
    "the values of a sweep": "train -m init_from={quoted},{quoted}2 trainer.max_steps=1",
    "the name of a sweep": "train -m seed=0,1 sweep.name={quoted}",
    "a config folder": "plan --config-dir {hostile}",
    "a composed config": "plan --cfg job init_from={quoted}",
    "what Hydra knows": "plan --info config init_from={quoted}",
    "an option": "eval --{hostile}",
    "an output": "predict r --input x --output {hostile}",
    "a quantity to find": "find {hostile}",
}


@pytest.mark.parametrize("line", COMMANDS.values(), ids=COMMANDS)
def test_arguments_of_a_command_are_escaped(command, line):
    quoted = "'" + HOSTILE.replace("'", "") + "'"
    words = [word.format(hostile=HOSTILE, quoted=quoted) for word in line.split()]
    _, out, err = command(shlex.join(words))
    assert not list(faults(out + err))
    assert len(out + err) > 20


def test_an_environment_variable_is_escaped(command, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", f"/tmp/{NAME}")
    status, out, err = command("train data=diamonds")
    assert (status, list(faults(out + err))) == (2, [])


def write_csv(rows):
    with Path("t.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


@pytest.mark.parametrize(
    "rows",
    [
        [[f"{HOSTILE}{MARKUP}", "y"], *[[number % 2, number % 3] for number in range(30)]],
        [["a", HOSTILE], *[[number, ""] for number in range(30)]],
        [["a", "y"], *[[f"{HOSTILE}{number}", number] for number in range(300)]],
        [["a", "y"], *[[number, HOSTILE] for number in range(30)], ["a", "b", "c"]],
    ],
    ids=["a column", "an empty target", "cells", "a row of another length"],
)
def test_cells_of_a_table_are_escaped(command, rows):
    write_csv(rows)
    tiny = (
        "model.depth=1 model.width=4 trainer.max_steps=1 data=table data.path=t.csv data.target=y"
    )
    _, out, err = command(f"train {tiny}")
    assert not list(faults(out + err))


def test_names_of_image_files_are_escaped(command):
    for name in (f"a{NAME}", "b"):
        folder = Path("img", "train", name)
        folder.mkdir(parents=True)
        (folder / f"{NAME}.png").write_bytes(b"no picture")
    status, out, err = command("train data=image_folder data.path=img trainer.max_steps=1")
    assert (status, list(faults(out + err))) == (2, [])


def test_a_generated_text_keeps_its_line_breaks_and_tabs(command, monkeypatch, capsys):
    trained = SimpleNamespace(generate=lambda prompt, **settings: (prompt, f"a\tb\n{COLOUR}"))
    monkeypatch.setattr(predict, "opened_run", lambda given: trained)
    _, out, err = command("predict r --prompt x")
    assert out == "a\tb\n\\x1b[31m\n"
    assert not list(faults(err))


def test_completion_offers_no_code(command):
    Path("conf/experiment").mkdir(parents=True)
    for name in (NAME, "$(touch PWNED)", "a`touch PWNED`", "a;b", "a b", "fine"):
        Path("conf/experiment", f"{name}.yaml").write_text("seed: 1\n")
    _, out, _ = command("complete -- train experiment=")
    found = out.split("\n")
    assert "experiment=fine" in found
    assert not [word for word in found if re.search(r"[$`; \\\x1b]|all is well", word)]
    assert completed(
        ["model=mlp", "callbacks=[a,b", "+callbacks.", "~model", "größe", "a&b", "a\x1b"]
    ) == [
        "model=mlp",
        "callbacks=[a,b",
        "+callbacks.",
        "~model",
        "größe",
    ]


# tables and displays


def printed(renderable):
    out = io.StringIO()
    console(out).print(renderable)
    return out.getvalue()


def test_markup_in_tables_is_shown_as_text():
    trials = [
        Trial(
            n,
            {f"a{HOSTILE}{MARKUP}": f"{n}{MARKUP}", "b": n},
            metrics={f"val/{MARKUP}{HOSTILE}": 0.5},
        )
        for n in (0, 1)
    ]
    shown = printed(results_table(trials, {"val/loss": "min"}))
    assert not list(faults(shown))
    assert "[bold]" in shown
    layer = Layer(f"{MARKUP}{HOSTILE}", f"{MARKUP}{HOSTILE}", (3,), 1, 1)
    plan = Plan(
        f"{MARKUP}{HOSTILE}", [layer], 1, 1, [HOSTILE], 1, 1, 1, 1, Memory(1, 1, 1, 1, 1), HOSTILE
    )
    plan.groups = [
        ParameterGroup(f"{MARKUP}{HOSTILE}", 1, 1.0, 0.0),
        ParameterGroup("second", 1, 1.0, 0.0),
    ]
    plan.transforms = [HOSTILE]
    plan.loader = HOSTILE
    shown = printed(render(plan))
    assert not list(faults(shown))
    assert "[bold]" in shown
    assert re.search(r"\n +second: 1,", shown), "groups have lines of their own"


def test_the_console_escapes_texts_of_tables():
    shown = printed(tables.Group(HOSTILE, tables.Text(HOSTILE.replace("\n", "")), MARKUP))
    assert not list(faults(shown))
    assert MARKUP in shown
    assert list(faults(render_plainly(HOSTILE))), "rich escapes nothing"


def test_the_console_writes_to_its_file_in_a_notebook(monkeypatch):
    class ZMQInteractiveShell:  # by its name, rich knows a notebook
        pass

    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    assert printed("text") == "text\n"
    assert Console(file=io.StringIO()).is_jupyter, "rich sees no notebook"


def render_plainly(text):
    out = io.StringIO()
    Console(file=out, highlight=False).print(text)
    return out.getvalue()


def test_lines_of_a_sweep_are_escaped_and_short(capsys):
    LineDisplay({"val/loss": "min"}).trial_ended(
        Trial(1, {HOSTILE: HOSTILE}, state="failed", error=HOSTILE * 100)
    )
    out = capsys.readouterr().out
    assert not list(faults(out))
    assert out.count("\n") == 1
    assert len(out) < 4_000


def test_values_and_predictions_are_escaped_on_the_terminal_only(capsys, tmp_path):
    print_values({f"test/{HOSTILE}": 0.5, "x" * 100_000: 1.0}, Path(HOSTILE))
    out = capsys.readouterr().out
    values = {"class": [HOSTILE, "größe"], "probabilities": torch.eye(2)}
    chunks = [({"file": [HOSTILE, "=x"]}, values)]
    form = Form([HOSTILE, "größe"])
    out += "".join(text_pieces("csv", chunks, form))
    assert not list(faults(out))
    assert "größe" in out
    assert len(out) < 4_000
    write_predictions(chunks, form, str(tmp_path / "y.csv"))
    assert HOSTILE.encode() in (tmp_path / "y.csv").read_bytes(), "a file has the original text"


# the functions


def test_printable_escapes_controls_and_keeps_writing_systems():
    assert printable("a\x1b[31m\n\t\r") == "a\\x1b[31m\\n\\t\\r"
    assert (
        printable("\u202e\u2028\x85\x9b\x7f\U000e0041")
        == "\\u202e\\u2028\\x85\\x9b\\x7f\\U000e0041"
    )
    assert printable(printable(HOSTILE)) == printable(HOSTILE)
    for text in (
        "größe 大 ± α→β",
        "\N{HEAVY BLACK HEART}\ufe0f",
        "नमस्ते",
        "\U0001f468\u200d\U0001f469",
        "می\u200cخواهم",
        "\\n",
        "　",
    ):
        assert printable(text) == text
    assert printable("ad\u200dmin") == "ad\\u200dmin"
    assert printable_lines("a\tb\r\nc\x1b\n") == "a\tb\nc\\x1b\n"
    for number in (*range(32), *range(127, 160)):
        assert printable(chr(number)) != chr(number)


def test_bytes_of_file_names_that_are_not_utf_8_are_kept():
    name = os.fsdecode(b"caf\xe9")
    assert printable(name) == name, "printed as in the folder"
    assert printable("\udc9b31m") == "\\udc9b31m", (
        "some terminals begin a control sequence by this byte"
    )
    assert printable("\udcc2\udc9b\udce2\udc80\udcae") == "\\x9b\\u202e", "these bytes are UTF-8"
    assert printable("\ud800") == "\\ud800"


@pytest.mark.parametrize(
    ("is_terminal", "environment", "expected"),
    [
        (True, {"TERM": "xterm"}, True),
        (False, {"TERM": "xterm"}, False),
        (True, {"TERM": "dumb"}, False),
        (True, {"TERM": "xterm", "MPLBACKEND": "agg"}, True),
        (True, {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}, False),
    ],
    ids=["terminal", "pipe", "dumb terminal", "backend", "cell of a notebook"],
)
def test_a_display_is_redrawn_in_terminals_that_move_the_cursor(
    monkeypatch, is_terminal, environment, expected
):
    for name, value in ({"TERM": "xterm", "MPLBACKEND": ""} | environment).items():
        monkeypatch.setenv(name, value)
    stream = SimpleNamespace(isatty=lambda: is_terminal)
    assert terminal.can_redraw(stream) == expected


def test_long_texts_are_shortened_in_the_middle():
    assert shortened("x" * 100_000, 9) == "xxx...xxx"
    line = message_line("column " + "x" * 100_000 + " is empty")
    assert line.startswith("column xxx")
    assert line.endswith("xxx is empty")
    assert len(line) < 400
    assert len(message_line("a b " * 100_000)) <= terminal.LONGEST_LINE
    assert message_lines(["x"] * 60)[-1] == "... and 10 more"


def test_a_problem_is_one_line():
    error = ConfigError([f"a=1\n{FORGED}", "b=2"])
    assert str(error) == f"a=1\\n{FORGED}\nb=2"
    assert main.error_lines(error) == error.problems
    assert main.error_lines(FrameworkError(f"a\n{FORGED}")) == [f"a\n{FORGED}"], (
        "escaped when printed"
    )


def test_tracebacks_and_warnings_are_escaped(capsys):
    try:
        raise ValueError(HOSTILE) from KeyError(HOSTILE)
    except ValueError as error:
        main.complain(error, [main.TRACEBACK])
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert not list(faults(err))
    with terminal.printable_warnings():
        text = warnings.formatwarning(UserWarning(HOSTILE), UserWarning, f"{NAME}.py", 1, HOSTILE)
    assert not list(faults(text))
    assert list(faults(warnings.formatwarning(UserWarning(HOSTILE), UserWarning, "x.py", 1))), (
        "the format is restored"
    )


@pytest.mark.parametrize(
    "name", ["a b", "it's", "-x", "$(touch x)", "~x", f"a'\\{NAME}", os.fsdecode(b"caf\xe9\x1b")]
)
def test_a_path_in_a_suggested_command_is_one_argument(tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).touch()
    word = pasted(name)
    assert not list(faults(word))
    done = subprocess.run(
        ["bash", "-c", f"ls -d {word} && rm {word}"], cwd=folder, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir())


def test_an_override_in_a_suggested_command_is_one_argument():
    assert override("data.path", "runs/x.csv") == "data.path=runs/x.csv"
    assert override("ignore", ["name"]) == "ignore=[name]"
    assert shlex.split(override("ignore", ["a b; touch x"])) == ["ignore=['a b; touch x']"]
    assert not list(faults(override("ignore", [HOSTILE])))


# the rule: every printed text passes through this module

PRINTING = {
    "print",
    "sys.stdout.write",
    "sys.stderr.write",
    "traceback.print_exception",
    "traceback.print_exc",
}
SAFE = {"printable", "printable_lines", "message_line", "json.dumps", "as_json", "version"}


def unescaped(tree):
    """Yield the lines that print a text without escaping it, or that pass `print` as a function."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    called = {id(call.func) for call in calls}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "print" and id(node) not in called:
            yield f"{node.lineno}: print"
    for call in calls:
        for argument in call.args if ast.unparse(call.func) in PRINTING else ():
            maker = ast.unparse(argument.func) if isinstance(argument, ast.Call) else None
            if not isinstance(argument, ast.Constant) and maker not in SAFE:
                yield f"{call.lineno}: {ast.unparse(argument)}"


ALLOWED = {  # numbers and constant texts
    "main.py": {
        "HELP",
        "'\\n'.join(lines)",
        "'\\n'.join(completed(words))",
        "SCRIPTS[parser.parse_args(arguments).shell]",
    },
    "best.py": {"printable(path) if sys.stdout.isatty() else path"},
    "predict.py": {"first", "piece"},  # `text_pieces` escapes them
    "find.py": None,
    "terminal.py": None,
}


def test_every_print_is_escaped():
    root = Path(framework.__file__).parent
    files = [*root.rglob("*.py"), *shipped(root.parent / "plugins", "**/*.py")]
    for file in files:
        allowed = ALLOWED.get(file.name, set())
        if allowed is not None:
            found = list(unescaped(ast.parse(file.read_text(encoding="utf-8"))))
            assert {each.partition(": ")[2] for each in found} <= allowed, (
                f"{file}: use framework.errors.terminal: {found}"
            )
    assert list(unescaped(ast.parse("print(f'{name}', file=x)"))) == ["1: f'{name}'"]
    assert list(unescaped(ast.parse("say = print"))) == ["1: print"]
