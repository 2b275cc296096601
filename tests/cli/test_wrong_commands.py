"""What a person gets to read after a mistake: each wrong command, what it says, and that nothing is left behind."""

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra

from framework.cli.main import main
from framework.registry.registry import Registry

PART = "from framework import activations\nfrom torch import nn\n"
FILES = {
    "header.csv": "a,b,label\n",
    "plugins/syntax.py": "def f(:\n",
    "plugins/crash.py": "import nothing_of_that_name\n",
    "plugins/twice.py": PART + '@activations.register("relu")\nclass Other(nn.Module): ...\n',
    "plugins/contract.py": PART
    + '@activations.register("oops")\nclass Oops:\n    """Not a module."""\n',
    "plugins/required.py": PART + '@activations.register("oops")\nclass Oops(nn.Module):\n'
    "    def __init__(self, f: object): ...\n",
    "conf/experiment/keys.yaml": "trainer:\n  max_epocs: 3\noptimizer:\n  lr: fast\nnope: 1\n",
    "conf/experiment/broken.yaml": "trainer:\n  max_epochs: [3\nseed: 1\n",
    "conf/experiment/list.yaml": "- optimizer\n- sgd\n",
    "conf/experiment/option.yaml": "seed: 1\ndefaults:\n  - override /optimizer: sgdd\n",
    "conf/experiment/name.yaml": "seed: 1\noptimizer: sgdd\n",
    "conf/experiment/group.yaml": "defaults:\n  - override /optimizr: sgd\n",
    "conf/experiment/target.yaml": "model:\n  blocks:\n    - _target_: os.system\n",
    "conf/experiment/momentum.yaml": "optimizer: {name: sgd, momentum: 0.9}\n",
    "file": "in the way",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refuse(folder, capsys):
    """Run a command that cannot work; check what every refusal has in common, and that it says the texts."""

    def run(line, *said, problems=1):
        before = surroundings(folder)
        with pytest.raises(SystemExit) as exit:
            main(shlex.split(line))
        _out, err = capsys.readouterr()
        assert exit.value.code == 2, err
        lines = err.splitlines()
        assert problems <= len(lines) <= 3 * problems
        assert all(line.startswith("framework: ") and len(line) < 420 for line in lines)
        for text in said:
            assert text in err
        for text in ("Traceback", "append", "HYDRA_FULL_ERROR", "Exception"):
            assert text not in err
        assert before == surroundings(folder), "nothing is left behind"

    return run


def surroundings(folder):
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("TORCH")
    }
    files = sorted(file for file in folder.rglob("*") if "__pycache__" not in file.parts)
    return files, list(sys.argv), environment, GlobalHydra.instance().is_initialized()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        # names
        (
            "optimizr=sgd",
            [
                "optimizr=sgd: there is no key 'optimizr' in an experiment; did you mean 'optimizer'?"
            ],
        ),
        ("optimizer=sgdd", ["optimizer=sgdd: there is no optimizer 'sgdd'; did you mean 'sgd'?"]),
        (
            "model=relu optimizer= scheduler=[cosine,linear] +callbacks=early_stp 'loggers=[tensorboard,jsonlines]'",
            [
                "model=relu: there is no model 'relu'; 'relu' is an activation",
                "optimizer=: there is no optimizer ''",
                "should be the name of a scheduler (-m scheduler=a,b tries each)",
                "+callbacks=early_stp: there is no callback 'early_stp'; did you mean 'early_stop'?",
                "there is no logger 'jsonlines'; did you mean 'json_lines'?",
            ],
        ),
        (
            "callbacks={checkpoint:3} optimizer@here=sgd experiment=keyz",
            [
                "should be the name of a callback, or a list of names; settings follow as callbacks.NAME.KEY=VALUE",
                "optimizer@here=sgd: each part has its place: write optimizer=sgd",
                "experiment=keyz: there is no experiment 'keyz'; did you mean 'keys'?",
            ],
        ),
        (
            "model.activation=leaky model/norm=relu",
            [
                "model.activation=leaky: there is no activation 'leaky'; did you mean 'leaky_relu'?",
                "model.norm=relu: there is no norm 'relu'; 'relu' is an activation",
            ],
        ),
        (
            "model=stack 'model.blocks=[dens]'",
            ["model.blocks.0=dens: there is no block 'dens'; did you mean 'dense'?"],
        ),
        # settings
        (
            "optimizer.lrr=1 model.activation.slope=1 loader.batchsize=3 model.momentum=2",
            [
                "optimizer.lrr=1: adamw has no setting 'lrr'; did you mean 'lr'?",
                "model.activation.slope=1: relu has no settings",
                "loader.batchsize=3: loader has no setting 'batchsize'; did you mean 'batch_size'?",
                "model.momentum=2: mlp has no setting 'momentum'; available: ",
            ],
        ),
        (
            "optimizer=adam optimizer.momentum=0.9",
            ["momentum is a setting of muon, rmsprop, sgd, not of adam"],
        ),
        (
            "lr=0.1 max_epochs=3 +unknown.key=1 ++x.y=1",
            [
                "lr=0.1: is a setting of optimizer: write optimizer.lr=0.1",
                "max_epochs=3: is a setting of trainer: write trainer.max_epochs=3",
                "unknown.key=1: there is no key 'unknown' in an experiment; available: activation, ",
                "x.y=1: there is no key 'x' in an experiment",
            ],
        ),
        ("trainer=big", ["trainer=big: should be a mapping of settings"]),
        # values
        (
            "optimizer.lr=fast 'optimizer.betas=[0.9,2]' model.width=1.5 trainer.max_epochs=0"
            " trainer.precision=fp8 seed=",
            [
                "optimizer.lr=fast: expected float in (0, inf), got 'fast'",
                "optimizer.betas=[0.9, 2]: expected [float in [0, 1), float in [0, 1)], got [0.9, 2]",
                "model.width=1.5: expected int in [1, inf)",
                "trainer.max_epochs=0: expected int in [1, inf) or null, got 0",
                "trainer.precision=fp8: expected one of fp32, bf16, fp16, got 'fp8'",
                "seed=: expected int, got ''",
            ],
        ),
        (
            "optimizer.lr=-1 optimizer.amsgrad=2 trainer.log_every=often run.name=[a] loader.batch_size=null",
            [
                "optimizer.lr=-1: expected float in (0, inf), got -1",
                "optimizer.amsgrad=2: expected bool, got 2",
                "trainer.log_every=often: expected a cadence like 10steps, 1epoch or 5min, got 'often'",
                "run.name=['a']: expected str or null, got ['a']",
                "loader.batch_size: expected int in [1, inf), got None",
            ],
        ),
        (
            "trainer.log_every=0steps trainer.device=cuda:77",
            [
                "trainer.log_every=0steps: ",
                "trainer.device=cuda:77: device cuda:77 is not available",
            ],
        ),
        (
            "trainer.max_epochs=null",
            ["trainer: needs a limit: give it with trainer.max_epochs=... or"],
        ),
        ("'seed=${nope}'", ["seed=${nope}: refers to nope, which is not there"]),
        ("'seed=${seed}'", ["seed=${seed}: refers to itself"]),
        # nothing to import, and nothing that has another door
        (
            "optimizer._target_=os.system model.activation={_target_:os.system} +hydra.callbacks.x._target_=os.system"
            " hydra.searchpath=[x] plugins=[x.py]",
            [
                "optimizer._target_=os.system: is refused: a config names registered parts (`name: ...`), never",
                "model.activation={_target_:os.system}: is refused",
                "hydra.callbacks.x._target_=os.system: is refused",
                "hydra.searchpath=[x]: config folders are given with --config-dir",
                "plugins=[x.py]: plugins are given with --plugins",
            ],
        ),
        # the form
        (
            "optimizer sgd =3 a=b=c model.width=32,64 'seed=range(3)'",
            [
                "optimizer: should be KEY=VALUE: optimizer=NAME",
                "sgd: should be KEY=VALUE: optimizer=sgd",
                "=3: should be KEY=VALUE; the key is missing",
                "a=b=c: should be KEY=VALUE; quote",
                "model.width=32,64: has several values: add -m to try each; as one list, write model.width=[32,64]",
                "seed=range(3): has several values: add -m",
            ],
        ),
    ],
)
def test_an_override_that_cannot_be(refuse, overrides, said):
    refuse(f"train {overrides}", *said, *["(command line)"], problems=len(said))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("~callbacks.nope", "~callbacks.nope: there is no callbacks.nope to take away"),
        (
            "~optimizer",
            "optimizer: an experiment needs an optimizer: choose one with optimizer=NAME",
        ),
        (
            "block=conv2d",
            "block=conv2d: reaches nothing: neither mlp nor classification asks for a block (command",
        ),
        ("data=csv data.target=x", "table needs data.path: give it with data.path=... (path)"),
        ("data=csv data.target=x data.path=no.csv", "no.csv"),
        ("data=csv data.target=label data.path=header.csv", "header.csv has no rows"),
        ("model=cnn", "cnn expects images (C, H, W), gets (64,)"),
        ("model=stack 'model.blocks=[dense,conv2d]'", "block 2 (conv2d) expects (C, H, W), gets ("),
        (
            "task=regression",
            "Digits has classes as targets; regression needs values: task=classification",
        ),
        (
            "metrics=[mse]",
            "metrics=mse: it measures value targets, but Digits has class targets; available: accuracy",
        ),
        ("loss=mse", "cannot take classes with outputs of shape (10,)"),
        (
            "run.name=../x",
            "run.name should be letters, digits, '.', '_' and '-' (at most 128), not '../x'",
        ),
        ("run.root=file", "the run folder file/default/"),
        ("run.root=/proc/nope", "the run folder /proc/nope/default/"),
        (
            "-m hydra/launcher=jobs",
            "hydra/launcher=jobs: not installed (hydra-jobs-launcher?); there is: auto, basic",
        ),
        (
            "-m hydra.sweeper.nope=1",
            "hydra.sweeper.nope: Hydra has no such setting (--cfg hydra shows them)",
        ),
        # experiment files, by line
        (
            "experiment=broken",
            "conf/experiment/broken.yaml:3: cannot be read as YAML: expected ',' or ']'",
        ),
        ("experiment=list", "conf/experiment/list.yaml: should hold `key: value` lines"),
        (
            "experiment=option",
            "conf/experiment/option.yaml:3: there is no optimizer 'sgdd'; did you mean 'sgd'?",
        ),
        (
            "experiment=name",
            "conf/experiment/name.yaml:2: there is no optimizer 'sgdd'; did you mean 'sgd'?",
        ),
        (
            "experiment=group",
            "conf/experiment/group.yaml:2: there is no group 'optimizr' of parts; did you mean",
        ),
        ("experiment=target", "model.blocks.0._target_: is refused"),
        ("experiment=target", "(conf/experiment/target.yaml:3)"),
        (
            "experiment=momentum optimizer=adam optimizer.momentum=0.8",
            "sgd, not of adam (command line)",
        ),
    ],
)
def test_an_experiment_that_cannot_be(refuse, overrides, said):
    refuse(f"train {overrides}", said)


def test_all_problems_are_told_at_once(refuse):
    refuse(
        "train optimizer=sgdd seed=x trainer.max_epocs=0 model.width=a,b experiment=keys",
        "optimizer=sgdd: there is no optimizer 'sgdd'; did you mean 'sgd'? (command line)",
        "model.width=a,b: has several values: add -m",
        "seed=x: expected int, got 'x' (command line)",
        "trainer.max_epocs=0: trainer has no setting 'max_epocs'; did you mean 'max_epochs'? (command line)",
        "optimizer.lr=fast: expected float in (0, inf), got 'fast' (conf/experiment/keys.yaml:4)",
        "nope=1: there is no key 'nope' in an experiment; available: ",
        problems=6,
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("trian", "there is no verb 'trian'; did you mean 'train'?"),
        (
            "train --epochs=3",
            "unrecognized arguments: --epochs=3 (`framework train --help` shows how)",
        ),
        ("train --cfg tree", "invalid choice: 'tree'"),
        ("train --cfg job optimizer=sgdd", "there is no optimizer 'sgdd'"),
        ("train -m --cfg job", "give one of them"),
        ("train --info config --cfg job", "give one of them"),
        ("plan --resolve", "--resolve goes with --cfg"),
        ("train --config-dir nowhere", "--config-dir nowhere: no such folder"),
        ("train --plugins nowhere.py", "plugin nowhere.py: no such file or folder"),
        (
            "train --plugins no_such_module",
            "no_such_module (reached by --plugins or the config's `plugins`) cannot be",
        ),
        ("train --plugins plugins/syntax.py", "SyntaxError"),
        ("train --plugins plugins/syntax.py", "plugins/syntax.py:1"),
        ("train --plugins plugins/crash.py", "'nothing_of_that_name' (plugins/crash.py:1)"),
        ("train --plugins plugins/twice.py", "two parts are called activation/relu: "),
        ("train --plugins plugins/contract.py", "is not a torch.nn"),
        ("train --plugins plugins/required.py", "parameter 'f' of Oops has type"),
        ("plan -m --json seed=1,2", "--json is for one experiment, not for a sweep"),
        ("train -m seed=1,x", "seed=x: expected int, got 'x' (command line)"),
        ("train -m 'seed=range(a)'", "cannot be read; sweeps are written a,b,c or range(3)"),
        (
            "train -m seed=1,2 run.name=one",
            "run.name=one: each trial has its own run name; ",
        ),
        ("train -m 'seed=interval(0,1)'", "interval(...) is for a sweeper that draws values"),
        (
            "train -m hydra/sweeper=ax seed=1,2",
            "hydra/sweeper=ax: not installed (hydra-ax-sweeper?)",
        ),
        ("list optimiser", "there is no kind of part 'optimiser'; did you mean 'optimizer'?"),
        ("show optimizer/adamm", "there is no optimizer 'adamm'; did you mean 'adam'?"),
        ("show nonesuch", "there is no part 'nonesuch'"),
        ("completion ksh", "invalid choice: 'ksh'"),
        ("board", "there is no folder of runs runs: train something first, or name it with --root"),
        ("eval", "the following arguments are required: run"),
        ("eval nowhere", "there is no run folder nowhere"),
        ("eval conf", "conf is not the folder of a run: it has no config.yaml"),
        (
            "predict nowhere",
            "give --input FILE --output FILE, or --prompt TEXT for a language model",
        ),
        (
            "predict nowhere --input x --output y.txt",
            "--output y.txt: the suffix should be .csv, .jsonl or .npz",
        ),
        ("predict nowhere --input x --output no/y.csv", "--output no/y.csv: no folder no"),
        ("predict nowhere --input x --output -", "there is no run folder nowhere"),
    ],
)
def test_a_command_that_cannot_be(refuse, forget_plugins, line, said):
    refuse(line, said)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs: a good one, one without a checkpoint, one with a part of a plugin that is gone."""
    root = tmp_path_factory.mktemp("runs")
    plugin = root / "mine.py"
    plugin.write_text(
        PART
        + '@activations.register("mine")\nclass Mine(nn.Module):\n    def forward(self, x): return x\n'
    )
    quick = f"trainer.max_steps=2 loggers=[] run.root={root}"
    for line in (
        f"train {quick} callbacks=[checkpoint] run.name=good",
        f"train {quick} callbacks=[] run.name=bare",
        f"train {quick} callbacks=[checkpoint] run.name=mine --plugins {plugin} activation=mine",
    ):
        with pytest.raises(SystemExit) as exit:
            main(shlex.split(line))
        assert exit.value.code == 0
    for module in [name for name in sys.modules if name.startswith("framework_plugin_")]:
        del sys.modules[module]
    for registry in Registry.every.values():
        registry.forget_unloaded()
    np.savez(root / "wide.npz", x=np.zeros((2, 65), "float32"))
    np.savez(root / "named.npz", inputs=np.zeros((2, 64), "float32"), other=np.zeros(2))
    (root / "text.npz").write_text("not an archive")
    return root


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "train run.root={runs} run.name=good",
            "default/good exists already: choose another run.name, or",
        ),
        ("eval {runs}/default/bare", "has no checkpoint"),
        ("eval {runs}/default/good --checkpoint nowhere", "nowhere"),
        ("eval {runs}/default/good --split validation", "invalid choice: 'validation'"),
        ("eval {runs}/default/mine", "was trained with plugins: give --plugins {runs}/mine.py"),
        ("predict {runs}/default/good --input no.npz --output y.csv", "no.npz"),
        ("predict {runs}/default/good --input {runs}/wide.npz --output y.csv", "65"),
        ("predict {runs}/default/good --input {runs}/text.npz --output y.csv", "text.npz"),
        ("predict {runs}/default/good --input {runs}/mine.py --output y.csv", "mine.py"),
    ],
)
def test_a_run_that_cannot_be_used(refuse, runs, line, said):
    refuse(line.format(runs=runs), said.format(runs=runs))


def test_a_port_that_is_taken(refuse, runs):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refuse(
            f"board --root {runs} --port {port}",
            f"--port {port}: Address already in use; another one, or 0 for any free one?",
        )
        refuse(f"board --root {runs} --port 99999", "--port should be 0 to 65535, not 99999")


def test_a_mistake_in_a_real_process(folder):
    command = [
        str(Path(sys.executable).with_name("framework")),
        "train",
        "optimizer.lrr=1",
        "seed=x",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "framework: optimizer.lrr=1: adamw has no setting 'lrr'; did you mean 'lr'? (command line)\n"
        "framework: seed=x: expected int, got 'x' (command line)\n"
    )
    assert not (folder / "runs").exists()
