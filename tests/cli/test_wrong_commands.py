"""Each wrong command prints the problems and a suggestion, and leaves no files behind."""

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
    "plugins/contract.py": (
        PART + '@activations.register("oops")\nclass Oops:\n    """Not a module."""\n'
    ),
    "plugins/required.py": (
        PART + '@activations.register("oops")\nclass Oops(nn.Module):\n'
        "    def __init__(self, f: object): ...\n"
    ),
    "conf/experiment/keys.yaml": "trainer:\n  max_epocs: 3\noptimizer:\n  lr: fast\nnope: 1\n",
    "conf/experiment/broken.yaml": "trainer:\n  max_epochs: [3\nseed: 1\n",
    "conf/experiment/list.yaml": "- optimizer\n- sgd\n",
    "conf/experiment/option.yaml": "seed: 1\ndefaults:\n  - override /optimizer: sgdd\n",
    "conf/experiment/name.yaml": "seed: 1\noptimizer: sgdd\n",
    "conf/experiment/group.yaml": "defaults:\n  - override /optimizr: sgd\n",
    "conf/experiment/launcher.yaml": "defaults:\n  - override /hydra/launcher: jobs\n",
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
    """Run an invalid command; check that it prints these texts, and the form of all messages."""

    def run(line, *texts, problems=1):
        before = surroundings(folder)
        with pytest.raises(SystemExit) as raised:
            main(shlex.split(line))
        _out, err = capsys.readouterr()
        assert raised.value.code == 2, err
        lines = err.splitlines()
        assert problems <= len(lines) <= 3 * problems
        assert all(line.startswith("framework: ") and len(line) < 420 for line in lines)
        for text in texts:
            assert text in err
        for text in ("Traceback", "append", "HYDRA_FULL_ERROR", "Exception"):
            assert text not in err
        assert before == surroundings(folder), "no files, and the process is unchanged"

    return run


def surroundings(folder):
    """Return the files of a folder, and the state of the process that commands may change."""
    names = [name for name in os.environ if not name.startswith("TORCH")]
    environment = {name: os.environ[name] for name in names}
    files = sorted(file for file in folder.rglob("*") if "__pycache__" not in file.parts)
    return files, list(sys.argv), environment, GlobalHydra.instance().is_initialized()


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        # names
        (
            "optimizr=sgd",
            ["optimizr=sgd: an experiment has no key 'optimizr'; did you mean 'optimizer'?"],
        ),
        ("optimizer=sgdd", ["optimizer=sgdd: there is no optimizer 'sgdd'; did you mean 'sgd'?"]),
        (
            (
                "model=relu optimizer= scheduler=[cosine,linear] +callbacks=early_stp "
                "'loggers=[tensorboard,jsonlines]'"
            ),
            [
                "model=relu: there is no model 'relu'; 'relu' is an activation",
                "optimizer=: there is no optimizer ''",
                "expected the name of a scheduler (-m scheduler=a,b tries each)",
                "there is no callback 'early_stp'; did you mean 'early_stop'?",
                "there is no logger 'jsonlines'; did you mean 'json_lines'?",
            ],
        ),
        (
            "callbacks={checkpoint:3} optimizer@here=sgd experiment=keyz",
            [
                "expected the name of a callback, or a list of names",
                "optimizer@here=sgd: ",
                "experiment=keyz: there is no experiment 'keyz'; did you mean 'keys'?",
            ],
        ),
        (
            "model.activation=leaky model/norm=relu",
            [
                "there is no activation 'leaky'; did you mean 'leaky_relu'?",
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
                "model.momentum=2: mlp has no setting 'momentum'; ",
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
                "unknown.key=1: an experiment has no key 'unknown'; ",
                "x.y=1: an experiment has no key 'x'",
            ],
        ),
        ("trainer=big", ["trainer=big: expected a mapping of settings"]),
        # values
        (
            (
                "optimizer.lr=fast 'optimizer.betas=[0.9,2]' model.width=1.5 trainer.max_epochs=0"
                " trainer.precision=fp8 seed="
            ),
            [
                "float in (0, inf)",
                "[float in [0, 1), float in [0, 1)]",
                "model.width=1.5: ",
                "int in [1, inf) or null",
                "one of fp32, bf16, fp16",
                "seed=: ",
            ],
        ),
        (
            (
                "optimizer.lr=-1 optimizer.amsgrad=2 trainer.log_every=often run.name=[a] "
                "loader.batch_size=null"
            ),
            [
                "optimizer.lr=-1: ",
                "optimizer.amsgrad=2: ",
                "a cadence like 10steps, 1epoch or 5min (whole steps or epochs)",
                "run.name=['a']: ",
                "loader.batch_size: ",
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
            ["trainer: needs a limit; give trainer.max_epochs=... or trainer.max_steps=..."],
        ),
        ("'seed=${nope}'", ["seed=${nope}: refers to nope, which does not exist"]),
        ("'seed=${seed}'", ["seed=${seed}: refers to itself"]),
        # no import of code, and settings that have an option of the command
        (
            (
                "optimizer._target_=os.system model.activation={_target_:os.system} "
                "+hydra.callbacks.x._target_=os.system hydra.searchpath=[x] plugins=[x.py]"
            ),
            [
                "optimizer._target_=os.system: is refused",
                "model.activation={_target_:os.system}: is refused",
                "hydra.callbacks.x._target_=os.system: is refused",
                "hydra.searchpath=[x]: use --config-dir",
                "plugins=[x.py]: use --plugins",
            ],
        ),
        # syntax
        (
            "optimizer sgd =3 a=b=c model.width=32,64 'seed=range(3)'",
            [
                "optimizer: expected KEY=VALUE: optimizer=NAME",
                "sgd: expected KEY=VALUE: optimizer=sgd",
                "=3: expected KEY=VALUE; the key is missing",
                "a=b=c: expected KEY=VALUE; quote",
                "for one list, write model.width=[32,64]",
                "seed=range(3): has several values: add -m",
            ],
        ),
    ],
)
def test_invalid_overrides_are_reported_together(refuse, overrides, messages):
    refuse(f"train {overrides}", *messages, "(command line)", problems=len(messages))


def test_quotes_are_suggested_only_for_a_text_that_would_be_valid(refuse):
    refuse("train callbacks.confusion.every=3", "got 3 (command line)")
    refuse("train run.name=nan", "got nan; for a text write run.name=\"'nan'\" (command line)")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("~callbacks.nope", "~callbacks.nope: the experiment has no callbacks.nope"),
        (
            "~optimizer",
            "optimizer: an experiment needs an optimizer; choose one with optimizer=NAME",
        ),
        (
            "block=conv2d",
            "block=conv2d: has no effect: neither model mlp nor task classification uses a block",
        ),
        ("data=csv data.target=x", "data.path: csv needs a value (path); give data.path=..."),
        ("data=csv data.target=x data.path=no.csv", "no.csv"),
        ("data=csv data.target=label data.path=header.csv", "header.csv has no rows"),
        ("model=cnn", "got (64,); data.image=true gives images"),
        ("model=rnn", "got (64,); data.image=true gives images"),
        ("transforms=[crop]", "got (64,); data.image=true gives images"),
        ("model=nbeats", "got (64,)\n"),  # images would not help
        ("model=cnn data=blobs", "got (2,)\n"),  # it has no images
        ("model=stack 'model.blocks=[dense,conv2d]'", "block 2 (conv2d)"),
        ("task=regression", "task=classification"),
        ("metrics=[mse]", "metrics=mse: "),
        ("loss=mse", "outputs of shape (10,)"),
        ("run.name=../x", "run.name=../x: expected at most 128 letters"),
        ("run.root=file", "file/default/"),
        ("run.root=/proc/nope", "/proc/nope/default/"),
        (
            "-m hydra/launcher=jobs",
            "hydra/launcher=jobs: not available; did you mean 'joblib'? (or is ",
        ),
        ("-m hydra/launcher=jobs", "(command line)"),
        # also without -m
        (
            "hydra/launcher=jobs",
            "hydra/launcher=jobs: not available; did you mean 'joblib'? (or is ",
        ),
        (
            "experiment=launcher",
            "conf/experiment/launcher.yaml:2: hydra/launcher=jobs: not available; did you mean",
        ),
        ("hydra/sweeper=optun", "hydra/sweeper=optun: not available; did you mean 'optuna'?"),
        ("hydra/sweeper=optun --cfg job", "hydra/sweeper=optun: not available; did you mean 'opt"),
        ("hydra/sweeper=optun --info all", "hydra/sweeper=optun: not available; did you mean"),
        ("hydra/sweeper=ax", "hydra/sweeper=ax: not installed (hydra-ax-sweeper?)"),
        ("hydra/sweeper=optuna", "is a setting of a sweep: add -m"),
        ("-m hydra/sweeper=[optuna] seed=1,2", "expected the name of a sweeper"),
        ("hydra/launcher=", "expected the name of a launcher"),
        ("-m hydra.sweeper=optuna seed=1,2", "write hydra/sweeper=optuna"),
        ("-m hydra/sweper=optuna seed=1,2", "did you mean 'hydra/sweeper'?"),
        ("-m hydra.sweeper.nope=1", "hydra.sweeper.nope: Hydra has no such setting (--cfg hydra"),
        # experiment files, with the line
        ("experiment=broken", "conf/experiment/broken.yaml:3: cannot be read as YAML: "),
        ("experiment=list", "conf/experiment/list.yaml: expected lines of the form `key: value`"),
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
            "conf/experiment/group.yaml:2: there is no kind of parts 'optimizr'; did you mean",
        ),
        ("experiment=target", "model.blocks.0._target_: is refused"),
        ("experiment=target", "(conf/experiment/target.yaml:3)"),
        (
            "experiment=momentum optimizer=adam optimizer.momentum=0.8",
            "sgd, not of adam (command line)",
        ),
    ],
)
def test_an_invalid_experiment_is_refused(refuse, overrides, message):
    refuse(f"train {overrides}", message)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("data=images data.path=x", "data=images: there is no data 'images'"),
        ("model=cn model.chanels=3", "model=cn: there is no model 'cn'"),
        ("callbacks=early_stp callbacks.early_stp.patience=3", "no callback 'early_stp'"),
        ("'callbacks=[ema,early_stp]' callbacks.early_stp.patience=3", "no callback 'early_stp'"),
        ("data=csv data.path=x.csv data.target=y data.foo=1", "data.foo=1: csv has no setting"),
    ],
)
def test_settings_of_an_unknown_part_are_not_compared_with_another_part(refuse, overrides, message):
    refuse(f"train {overrides}", message, problems=1)


def test_wrong_settings_of_the_other_parts_are_still_reported(refuse):
    refuse(
        "train data=images data.path=x +callbacks=early_stp callbacks.ema.dekay=1",
        "data=images: ",
        "+callbacks=early_stp: ",
        "callbacks.ema.dekay=1: ema has no setting 'dekay'",
        problems=3,
    )


def test_problems_of_the_command_line_and_of_files_are_reported_together(refuse):
    refuse(
        "train optimizer=sgdd seed=x trainer.max_epocs=0 model.width=a,b experiment=keys",
        "optimizer=sgdd: there is no optimizer 'sgdd'; did you mean 'sgd'? (command line)",
        "model.width=a,b: has several values: add -m",
        "seed=x: ",
        "trainer.max_epocs=0: trainer has no setting 'max_epocs'; did you mean 'max_epochs'?",
        "optimizer.lr=fast: ",
        "(conf/experiment/keys.yaml:4)",
        "nope=1: an experiment has no key 'nope'; ",
        problems=6,
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian", "there is no command 'trian'; did you mean 'train'?"),
        ("train --epochs=3", "--epochs: there is no such option; "),
        ("train --epochs=3", "(see `framework train --help`)"),
        ("help trian", "there is no command 'trian'; did you mean 'train'?"),
        ("--version foo", "--version: expected no argument foo"),
        ("train --fold 3", "--fold: there is no such option; did you mean '--folds'?"),
        ("train --fold=abc", "--fold: there is no such option; did you mean '--folds'?"),
        ("train --folds abc", "--folds abc: expected an integer"),
        ("train --folds", "--folds: expected a value"),
        ("train --model=cnn", "--model: there is no such option; settings have no dashes"),
        ("train -m=3", "--multirun: takes no value"),
        ("train --cfg tree", "--cfg tree: expected one of job, hydra, all"),
        ("train --cfg jobs", "did you mean 'job'?"),
        ("list --jsno", "--jsno: there is no such option; did you mean '--json'?"),
        ("list optimizer sgd", "list: expected no argument sgd"),
        ("eval x --split foo", "--split foo: expected one of train, val, test (see"),
        ("predict x --prompt a --top-p y", "--top-p y: expected a number"),
        ("board --port x", "--port x: expected an integer"),
        ("train --cfg job optimizer=sgdd", "there is no optimizer 'sgdd'"),
        ("train -m --cfg job", "only one of -m, --cfg and --info"),
        ("train --info config --cfg job", "only one of -m, --cfg and --info"),
        ("plan --resolve", "--resolve requires --cfg"),
        ("train --repeat 1", "--repeat 1: expected at least 2"),
        ("train --folds 3 fold=1/3", "--folds 3 sets fold; remove fold="),
        ("train --config-dir nowhere", "--config-dir nowhere: no such folder"),
        ("train --plugins nowhere.py", "plugin nowhere.py: no such file or folder"),
        ("train --plugins no_such_module", "no_such_module (reached by --plugins"),
        ("train --plugins plugins/syntax.py", "SyntaxError"),
        ("train --plugins plugins/syntax.py", "plugins/syntax.py:1"),
        ("train --plugins plugins/crash.py", "'nothing_of_that_name' (plugins/crash.py:1)"),
        ("train --plugins plugins/twice.py", "two parts are called activation/relu: "),
        ("train --plugins plugins/contract.py", "is not a torch.nn"),
        ("train --plugins plugins/required.py", "parameter 'f' of Oops has type"),
        ("plan -m --json seed=1,2", "--json is for one experiment, not for a sweep"),
        ("train -m seed=1,x", "seed=x: "),
        ("train -m 'seed=range(a)'", "write the values of a sweep as a,b,c or range(3)"),
        ("train -m seed=1,2 run.name=one", "sweep.name="),
        ("train -m 'seed=interval(0,1)'", "seed=interval(0,1): interval(...)"),
        (
            "train -m hydra/sweeper=ax seed=1,2",
            "hydra/sweeper=ax: not installed (hydra-ax-sweeper?)",
        ),
        ("find", "find: expected one of lr, batch_size"),
        ("find width", "find width: expected one of lr, batch_size"),
        ("find lrr", "find lrr: expected one of lr, batch_size; did you mean 'lr'?"),
        ("find optimizer=sgd lr", "find optimizer=sgd: expected one of lr, batch_size"),
        ("list optimiser", "there is no kind of parts 'optimiser'; did you mean 'optimizer'?"),
        ("show optimizer/adamm", "there is no optimizer 'adamm'; did you mean 'adam'?"),
        ("show nonesuch", "there is no part 'nonesuch'"),
        (
            "completion tcsh",
            "completion tcsh: expected one of bash, zsh, fish; did you mean 'zsh'?",
        ),
        ("completion", "completion: missing argument shell"),
        ("board", "--root runs: no such folder"),
        ("eval", "eval: missing argument run"),
        ("resume", "resume: missing argument run (see "),
        ("eval nowhere", "nowhere"),
        ("eval conf", "conf is not the folder of a run"),
        ("predict nowhere", "give --input FILE --output FILE, or --prompt TEXT"),
        ("predict nowhere --input x", "give --input FILE --output FILE, or --prompt TEXT"),
        ("predict nowhere --output x", "give --input FILE --output FILE, or --prompt TEXT"),
        ("predict nowhere --prompt a --output x", "give --input FILE --output FILE, or --prompt"),
        ("predict nowhere --input x --output -  --prompt a", "give --input FILE --output FILE"),
        ("predict nowhere --input x --output - --top-k 3", "--top-k requires --prompt"),
        ("predict nowhere --input x --output y.txt", "--output y.txt: expected a .csv, .jsonl"),
        ("predict nowhere --input x --output no/y.csv", "--output no/y.csv: no folder no"),
        ("predict nowhere --input x --output -", "nowhere"),
    ],
)
def test_an_invalid_command_is_refused(refuse, forget_plugins, line, message):
    refuse(line, message)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return three runs: complete, without a checkpoint, and with a plugin that is not loaded."""
    root = tmp_path_factory.mktemp("runs")
    plugin = root / "mine.py"
    part = (
        '@activations.register("mine")\nclass Mine(nn.Module):\n    def forward(self, x): return x'
    )
    plugin.write_text(f"{PART}{part}\n")
    quick = f"trainer.max_steps=2 loggers=[] run.root={root}"
    for line in (
        f"train {quick} callbacks=[checkpoint] run.name=good",
        f"train {quick} callbacks=[] run.name=bare",
        f"train {quick} callbacks=[checkpoint] run.name=mine --plugins {plugin} activation=mine",
    ):
        with pytest.raises(SystemExit) as raised:
            main(shlex.split(line))
        assert raised.value.code == 0
    for module in [name for name in sys.modules if name.startswith("framework_plugin_")]:
        del sys.modules[module]
    for registry in Registry.every.values():
        registry.forget_unloaded()
    np.savez(root / "wide.npz", x=np.zeros((2, 65), "float32"))
    np.savez(root / "named.npz", inputs=np.zeros((2, 64), "float32"), other=np.zeros(2))
    (root / "text.npz").write_text("not an archive")
    return root


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train run.root={runs} run.name=good", "choose another run.name"),
        ("eval {runs}/default/bare", "has no checkpoint"),
        ("eval {runs}/default/good --checkpoint nowhere", "there is no checkpoint nowhere of"),
        ("eval {runs}/default/good --checkpoint lst", "did you mean 'last'?"),
        ("train init_from=nowhere", "init_from=nowhere: there is no such run"),
        ("resume {runs}/default/good trainer.max_stepz=3", "'max_steps'? (command line)"),
        ("resume {runs}/default/good optimizer.lr=fast", "got 'fast' (command line)"),
        ("eval {runs}/default/good --split validation", "--split validation: expected one of"),
        ("eval {runs}/default/mine", "give --plugins {runs}/mine.py"),
        ("predict {runs}/default/good --input no.npz --output y.csv", "no.npz"),
        ("predict {runs}/default/good --input {runs}/wide.npz --output y.csv", "65"),
        ("predict {runs}/default/good --input {runs}/text.npz --output y.csv", "text.npz"),
        ("predict {runs}/default/good --input {runs}/mine.py --output y.csv", "mine.py"),
    ],
)
def test_a_run_that_cannot_be_used_is_refused(refuse, runs, line, message):
    refuse(line.format(runs=runs), message.format(runs=runs))


def test_an_invalid_or_used_port_is_refused(refuse, runs):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refuse(f"board --root {runs} --port {port}", f"--port {port}: Address already in use; ")
        refuse(f"board --root {runs} --port 99999", "--port 99999: expected an integer")


def test_a_refused_command_prints_only_the_problems(folder):
    program = str(Path(sys.executable).with_name("framework"))
    command = [program, "train", "optimizer.lrr=1", "seed=x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    unknown, invalid = done.stderr.splitlines()
    assert unknown.startswith("framework: optimizer.lrr=1: ")
    assert unknown.endswith("did you mean 'lr'? (command line)")
    assert invalid.startswith("framework: seed=x: ")
    assert invalid.endswith(" (command line)")
    assert not (folder / "runs").exists()
