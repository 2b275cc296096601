"""Completion with TAB: candidates from the registries, and the script in bash."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from typing import Literal

import pytest

from framework import Activation, Block, PositiveInt
from framework.cli.completion import SCRIPTS, completions
from framework.cli.main import COMMANDS, run
from framework.composition.catalogue import Index, read_index
from framework.errors import FrameworkError
from framework.registry.registry import Kind, Registry
from framework.registry.schema import Setting


@pytest.fixture(scope="module")
def index() -> Index:
    """Return an index of a few parts."""
    every = Registry.every
    Registry.every = {}
    activation = Registry(Kind("activation"))
    block = Registry(Kind("block"))
    model = Registry(Kind("model"))
    optimizer = Registry(Kind("optimizer"))
    callback = Registry(Kind("callback", many=True))

    def leaky(slope: float = 0.1): ...
    def plain(): ...
    def mlp(width: int = 32, activation: Activation = "leaky", blocks: list[Block] = ()): ...
    def sgd(lr: float = 0.1, nesterov: bool = False): ...
    def adam(lr: float = 0.1, fused: bool | None = None, mode: Literal["a", "b"] = "a"): ...
    def early_stop(patience: PositiveInt = 3): ...
    def checkpoint(every: str = "1epoch"): ...

    parts = {
        activation: [leaky, plain],
        block: [plain],
        model: [mlp],
        optimizer: [sgd, adam],
        callback: [early_stop, checkpoint],
    }
    for registry, functions in parts.items():
        for function in functions:
            registry.register(function.__name__, function)
    sections = {"trainer": {"max_epochs": Setting("max_epochs", int, 10)}, "seed": {}}
    chosen = {"optimizer": "adam", "model": "mlp", "callbacks": ["checkpoint"]}
    try:
        return read_index(sections, ["spam", "digits_cnn"], chosen)
    finally:
        Registry.every = every


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", " ".join(COMMANDS)),
        ("pl", "plan"),
        ("list c", "callbacks"),
        ("list exp", "experiment"),
        ("eval x --sp", "--split"),
        ("eval x --split t", "train test"),
        ("eval x --json --ch", "--checkpoint"),
        ("eval x --checkpoint b", "best"),
        ("predict x --format np", "npy npz"),
        ("train --fo", "--folds"),
        ("train optimizer=adam --fo", "--folds"),
        ("train --folds ", ""),  # any number
        ("find lr --js", "--json"),
        ("show opt", "optimizer/"),
        ("show optimizer/", "optimizer/adam optimizer/sgd"),
        ("show optimizer/sgd optimizer.l", "optimizer.lr="),
        ("show model/mlp optimizer.l", ""),
        ("completion z", "zsh"),
        ("data c", "convert"),
        ("data convert ", ""),  # the shell completes files
        ("eval ", ""),  # the shell completes the folder of a run
        ("train tr", "trainer."),
        ("train trainer.", "trainer.max_epochs="),
        ("train se", "seed="),
        ("plan optimizer", "optimizer. optimizer="),
        ("train optimizer=", "optimizer=adam optimizer=sgd"),
        ("train optimizer=s", "optimizer=sgd"),
        ("train -m optimizer=sgd,a", "optimizer=sgd,adam"),
        ("train optimizer.", "optimizer.lr= optimizer.fused= optimizer.mode="),
        ("train optimizer=sgd optimizer.", "optimizer.lr= optimizer.nesterov="),
        ("train optimizer=no_such optimizer.", ""),
        (
            "train optimizer.fused=",
            "optimizer.fused=false optimizer.fused=true optimizer.fused=null",
        ),
        ("train optimizer.mode=", "optimizer.mode=a optimizer.mode=b"),
        ("train callbacks=", "callbacks=[checkpoint callbacks=[early_stop"),
        ("train callbacks=[checkpoint,", "callbacks=[checkpoint,early_stop"),
        ("train callbacks.", "callbacks.checkpoint."),
        ("train callbacks=[early_stop] callbacks.", "callbacks.early_stop."),
        ("train callbacks.early_stop.", "callbacks.early_stop.patience="),
        ("train +callbacks=[e", "+callbacks=[early_stop"),
        ("train +callbacks=e", "+callbacks=early_stop"),
        ("train model.activation=", "model.activation=leaky model.activation=plain"),
        ("train model/activation=p", "model/activation=plain"),
        ("train model.activation.", "model.activation.slope="),
        ("train model.activation=plain model.activation.", ""),
        ("train model.blocks=[", "model.blocks=[plain"),
        ("train experiment=", "experiment=digits_cnn experiment=spam"),
        ("train nonsense.", ""),
        ("nonsense ", ""),
    ],
)
def test_the_last_word_is_completed(index, line, expected):
    assert completions(line.split(" "), index, COMMANDS) == expected.split()


def test_the_index_of_the_registries_is_json():
    index = read_index()
    assert "optimizer=adamw" in completions(["train", "optimizer=ad"], index, COMMANDS)
    words = ["train", "optimizer=adamw", "optimizer.weight"]
    assert completions(words, index, COMMANDS) == ["optimizer.weight_decay="]
    assert Index(**json.loads(json.dumps(asdict(index)))) == index


def test_an_unknown_shell_is_an_error():
    with pytest.raises(
        FrameworkError, match=r"completion zhs: expected one of .*did you mean 'zsh'"
    ):
        run(["completion", "zhs"])


def test_fish_completes_files_for_the_commands_without_own_words(index):
    lines = re.findall("-F -n '__fish_seen_subcommand_from (.*)'", SCRIPTS["fish"])
    files = lines[-1].split()
    assert files == [name for name in COMMANDS if not completions([name, ""], index, COMMANDS)]


@pytest.mark.parametrize("shell", SCRIPTS)
def test_the_shell_can_parse_its_script(shell, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    file = tmp_path / "script"
    file.write_text(SCRIPTS[shell])
    subprocess.run([shell, "-n", file], check=True)


@pytest.fixture(scope="module")
def bash(index, tmp_path_factory):
    """Return a function that completes a line in bash, with a program that reads the index."""
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    folder = tmp_path_factory.mktemp("bash")
    (folder / "index.json").write_text(json.dumps(asdict(index)))
    program = folder / "framework"
    answer = folder / "answer.py"
    python = shlex.quote(sys.executable)
    program.write_text(f'#!/bin/sh\nexec {python} {shlex.quote(str(answer))} "$@"\n')
    answer.write_text(
        "import json, sys\n"
        "from framework.cli.completion import completions\n"
        "from framework.cli.main import COMMANDS\n"
        "from framework.composition.catalogue import Index\n"
        "assert sys.argv[1:3] == ['complete', '--'] and 'torch' not in sys.modules\n"
        f"index = Index(**json.load(open({str(folder / 'index.json')!r})))\n"
        "print('\\n'.join(completions(sys.argv[3:], index, COMMANDS)))\n"
    )
    program.chmod(0o755)
    (folder / "script").write_text(SCRIPTS["bash"])

    def complete(line: str, path: str = "") -> list[str]:
        tab = 'source "$1/script"; COMP_LINE="$2"; COMP_POINT=${#2}; _framework_complete'
        script = f'PATH="$3$1:$PATH"; {tab}; printf "%s\\n" "${{COMPREPLY[@]}}"'
        command = ["bash", "-c", script, "bash", str(folder), line, path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    return complete


@pytest.mark.parametrize(
    ("line", "replies"),
    [
        ("framework pl", ["plan"]),
        ("framework train optimizer=s", ["sgd"]),  # bash splits words at =
        ("framework train optimizer=sgd optimizer.l", ["optimizer.lr="]),
        ("framework train 'callbacks=[e", ["callbacks=[early_stop"]),  # but not inside a quote
        ("framework train callbacks=[e", ["[early_stop"]),
        ("framework train ", ["activation="]),
    ],
)
def test_bash_completes_a_line(bash, line, replies):
    assert bash(line)[: len(replies)] == replies


@pytest.mark.parametrize("path", ["", ".:", ":"])
def test_tab_runs_no_program_in_the_working_folder(bash, tmp_path, monkeypatch, path):
    program = tmp_path / "framework"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/proof\n")
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    assert bash("./framework pl", path)[:1] == ([] if path else ["plan"])
    assert bash("framework pl", path)[:1] == ([] if path else ["plan"])
    assert not (tmp_path / "proof").exists()


def test_commands_of_tell_are_completed(index):
    def complete(*words):
        return completions(list(words), index, COMMANDS)

    assert complete("tell", "runs/a", "p") == ["pause"]
    assert complete("tell", "runs/a", "set", "op") == ["optimizer."]
    assert "optimizer.lr=" in complete("tell", "runs/a", "set", "optimizer.l")
