"""Printed commands work when they are pasted, also with spaces and quotes in the paths."""

import json
import shlex
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from framework.cli.output import root_option, run_arguments
from framework.cli.parts.tables import find_part, overrides_for
from framework.composition.catalogue import build_index
from framework.errors.paths import typed
from framework.experiment.trained.load import open_run
from framework.registry.registry import Registry
from framework.runs.folder import run_advice

TINY = "trainer.max_steps=1 model.depth=1 model.width=4 loader.limit=1 loggers=[json_lines]"
PLUGIN = """\
from torch import nn
from framework import PositiveFloat, activations

@activations.register("own_relu")
class OwnReLU(nn.ReLU):
    def __init__(self, text: str = "it's 1e-3, so {x}", height: PositiveFloat = 2.0):
        super().__init__()
        assert text == "it's 1e-3, so {x}"
"""
ROOT = "my runs/it's"


@pytest.fixture
def plugin(tmp_path):
    file = tmp_path / "my parts" / "own.py"
    file.parent.mkdir()
    file.write_text(PLUGIN)
    return file


@pytest.fixture
def run(plugin, command, monkeypatch, forget_plugins):
    """Train in a folder with spaces and quotes, and return the output."""
    monkeypatch.setattr(
        "framework.cli.board.serve_board",
        lambda root, port, selections: 0 if any(root.rglob("config.yaml")) else 1,
    )
    words = f"train {TINY} activation=own_relu run.name=first --plugins 'my parts/own.py'"
    status, out, err = command(f'{words} "run.root=\\"{ROOT}\\""')
    assert status == 0, err
    return out


def advice(out, label):
    """Return the command on the line that begins with a label."""
    line = next(line for line in out.splitlines() if line.startswith(f"{label} "))
    return line[line.index("framework ") + len("framework ") :]


def test_the_commands_that_a_run_prints_work(run, command):
    assert advice(run, "watch") == f"board --root {shlex.quote(ROOT)}"
    for label in ("measure", "watch"):
        assert command(advice(run, label))[0] == 0
    arguments = run_arguments(Path(ROOT, "default/first"))
    assert command(f"resume {arguments} trainer.max_steps=2")[0] == 0


def test_the_default_root_needs_no_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "linked").symlink_to("runs")
    (tmp_path / "runs/default/a").mkdir(parents=True)
    absolute = tmp_path / "runs/default/a"
    for run in ("runs/default/a", "./runs/default/a", absolute, "linked/default/a"):
        assert root_option(Path(run)) == ""
    assert root_option(Path("other/default/a")) == " --root other"
    monkeypatch.chdir(tmp_path / "runs/default")
    assert root_option(Path("a")) == f" --root {tmp_path}/runs"


def test_the_commands_that_a_sweep_prints_work(run, command):
    _, out, _ = command(f'train -m {TINY} seed=0,1 "run.root=\\"{ROOT}\\"" sweep.name=two')
    assert command(advice(out, "watch"))[0] == 0
    status, out, err = command(f"eval {shlex.quote(ROOT)}/default/two")
    assert status == 2
    assert f"{ROOT}/default/two/best" in err
    assert command(f"eval {shlex.quote(ROOT)}/default/two/best")[0] == 0


def test_the_checkpoint_that_eval_prints_is_an_argument_of_commands(run, command):
    given = f"--plugins {shlex.quote('my parts/own.py')}"
    _, out, _ = command(advice(run, "measure"))
    checkpoint = out.splitlines()[-1].removeprefix("from").strip()
    again = command(f"eval {shlex.quote(checkpoint)} {given}")
    assert again[:2] == (0, out)
    step = Path(ROOT, "default/first/checkpoints/step-00000001")
    for line in (
        f"eval {shlex.quote(str(step))} {given}",
        f"eval {shlex.quote(ROOT + '/default/first')} --checkpoint {step.name} {given}",
    ):
        status, out, err = command(line)
        assert (status, err) == (0, "")
        assert str(step) in out
    assert open_run(checkpoint).run == Path(ROOT, "default/first")
    status, _, err = command(f"eval {shlex.quote(checkpoint)} --checkpoint last {given}")
    assert (status, "leave out --checkpoint last" in err) == (2, True)
    status, out, err = command(f"resume {shlex.quote(checkpoint)} {given}")
    assert status == 0, err
    assert f"resuming {ROOT}/default/first after step" in out
    _, _, err = command(f"eval {shlex.quote(ROOT)}/default/first/checkpoints {given}")
    assert f"did you mean {ROOT}/default/first?" in err


def test_a_missing_plugin_is_the_only_problem_that_is_printed(run, command, request):
    request.getfixturevalue("forget_plugins")
    forget()
    for verb in ("eval", "resume"):
        status, _, err = command(f"{verb} {shlex.quote(ROOT)}/default/first")
        assert status == 2
        assert len(err.splitlines()) == 1
        assert err.endswith("give --plugins 'my parts/own.py'\n")
    advised = err[err.index("--plugins") :]
    assert command(f"eval {shlex.quote(ROOT)}/default/first {advised}")[0] == 0


def test_a_plugin_that_is_loaded_is_not_advised(run, command, plugin):
    config = Path(ROOT, "default/first/config.yaml")
    config.write_text(config.read_text().replace("width: 4", "width: -4"))
    for given in ("'my parts/own.py'", "'./my parts'", shlex.quote(str(plugin))):
        status, _, err = command(f"eval {shlex.quote(ROOT)}/default/first --plugins {given}")
        assert status == 2
        assert "model.width=-4" in err
        assert "--plugins" not in err


def test_plugins_in_an_untrusted_run_folder_are_only_named(run, command):
    forget()
    names = ["~nosuch/x.py", "\x1b[2J", "\0", "a.b; rm -r x", "/usr/lib/no.py"]
    file = Path(ROOT, "default/first/provenance.json")
    file.write_text(json.dumps({"plugins": names}))
    status, _, err = command(f"eval {shlex.quote(ROOT)}/default/first")
    assert status == 2
    given = "--plugins '~nosuch/x.py' --plugins 'a.b; rm -r x' --plugins /usr/lib/no.py"
    assert err.endswith(f"give {given}\n")
    assert len(err.splitlines()) == 1


def forget():
    """Unload the plugins, as in another process."""
    for module in [name for name in sys.modules if name.startswith("framework_plugin_")]:
        del sys.modules[module]
    for registry in Registry.every.values():
        registry.forget_unloaded()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (1e-05, "1e-05"),
        ("1epoch", "1epoch"),
        ("1e-3", "'1e-3'"),
        ("null", "'null'"),
        ("", "''"),
        ("a, b", "'a, b'"),
        ("it's", r"'it\'s'"),
    ],
)
def test_a_value_is_written_in_a_form_that_is_parsed_as_the_same_value(value, text):
    assert typed(value) == text
    read = OverridesParser.create().parse_override(f"key={text}").value()
    assert (read, type(read)) == (value, type(value))


@pytest.fixture(scope="module")
def index():
    return build_index([], [])[0]


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("callback/histograms", ["+callbacks=histograms", "callbacks.histograms.every=1epoch"]),
        ("callback/checkpoint", ["callbacks.checkpoint.every=1epoch"]),
        ("callback/freeze", ["+callbacks=freeze", "callbacks.freeze.patterns=..."]),
        ("metric/f1", ["+metrics=f1", "metrics.f1.average=macro"]),
        ("transform/flip", ["+transforms=flip", "transforms.flip.p=0.5"]),
        ("logger/tensorboard", ["loggers.tensorboard.graph=true"]),
        ("activation/gelu", ["activation=gelu", "activation.approximate=none"]),
        ("block/linear", ["model=stack", "model.blocks=[linear]"]),
        ("head/mlp", ["model=stack", "head=mlp", "head.width=128"]),
        ("tokenizer/byte", ["data=docstrings", "tokenizer=byte"]),
    ],
)
def test_the_example_of_show_chooses_the_part_and_keeps_the_others(part, words, index):
    assert overrides_for(find_part(index, part), index) == words


def test_the_example_of_show_quotes_a_default(plugin, command, forget_plugins):
    """The default has quotes, commas and brackets; the part checks the value that it gets."""
    _, out, _ = command("show own_relu --plugins 'my parts/own.py'")
    status, _, err = command(advice(out, "try").replace("train", "plan", 1))
    assert status == 0, err


def test_a_setting_may_be_a_text_in_one_part_and_a_part_in_another(command):
    _, _, err = command("plan task=adversarial task.loss=hinge")
    assert "task.loss" not in err
    assert "model=gan" in err


def test_the_example_of_show_keeps_the_default_callbacks(command):
    _, out, _ = command("show histograms")
    line = advice(out, "try").replace("train", f"train {TINY}", 1)
    status, out, _ = command(line)
    assert status == 0
    assert advice(out, "measure").startswith("eval runs/default/"), "there is a checkpoint"


def test_a_sweep_without_a_finished_run_has_no_best_run_to_advise(tmp_path):
    (tmp_path / "sweep.json").write_text("{}")
    assert "best" not in run_advice(tmp_path)
    (tmp_path / "best").mkdir()
    assert f"{tmp_path}/best" in run_advice(tmp_path)
