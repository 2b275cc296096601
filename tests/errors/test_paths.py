"""A leading `~` is the home folder in every path that a user types."""

import os
from pathlib import Path

import numpy as np
import pytest
import yaml

import framework as fw
from framework import TensorSplit, Trainer
from framework.cli.main import main
from framework.errors import SettingError
from framework.errors.paths import expanded, pasted, with_homes
from framework.experiment.trained.load import open_run
from framework.runs.folder import dump

TINY = "trainer.max_steps=1 model.depth=1 model.width=4 loader.limit=1 loggers=[json_lines]"
PLUGIN = """\
from pathlib import Path
import torch
from framework import activations

@activations.register("homely")
class Homely(torch.nn.ReLU):
    def __init__(self, file: Path = Path("none"), files: list[Path] = []):
        super().__init__()
        assert file == Path("none") or file.read_text() == "here", file
        assert all(each.read_text() == "here" for each in files), files
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home of a user"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.fixture
def trained(home, command):
    assert command(f"train {TINY} run.root=~/runs run.name=first")[0] == 0
    return home / "runs/default/first"


def test_a_run_lies_in_the_home_folder_and_is_found_there(home, trained, command):
    assert (trained / "config.yaml").is_file()
    np.savez(home / "x.npz", inputs=np.zeros((2, 64), "float32"))
    for line in (
        "eval '~/runs/default/first'",
        "predict '~/runs/default/first' --input='~/x.npz' --output='~/y.csv'",
        "resume '~/runs/default/first' trainer.max_steps=2",
        f"train {TINY} resume=~/runs/default/first trainer.max_steps=2",
        (
            f"train {TINY} \"run.root='~/runs'\" init_from=~/runs/default/first "
            "task=distillation task.teacher=~/runs/default/first"
        ),
        f"train -m {TINY} run.root=~/runs sweep.name=two seed=0,1",
    ):
        status, out, err = command(line)
        assert status == 0, f"{line}\n{out}\n{err}"
    assert (home / "y.csv").is_file()
    assert (home / "runs/default/two/sweep.json").is_file()
    assert open_run("~/runs/default/first").checkpoint.is_dir()
    assert not list(Path.cwd().glob("~*")), "no folder has the name ~"


def test_the_config_keeps_the_typed_path_so_that_a_run_can_be_resumed(home, command):
    np.savez(
        home / "x.npz", x_train=np.random.rand(20, 3).astype("float32"), y_train=np.arange(20) % 2
    )
    line = f"train {TINY} data=npz data.path=~/x.npz run.name=first"
    assert command(line)[0] == 0
    assert "path: ~/x.npz" in Path("runs/default/first/config.yaml").read_text()
    assert command(f"{line} resume=auto trainer.max_steps=2")[0] == 0


def test_plugins_config_folders_and_settings_of_plugins(home, command, forget_plugins):
    (home / "homely.py").write_text(PLUGIN)
    (home / "here.txt").write_text("here")
    (home / "more/experiment").mkdir(parents=True)
    (home / "more/experiment/own.yaml").write_text("plugins: ['~/homely.py']\nactivation: homely\n")
    chosen = "activation=homely activation.file=~/here.txt activation.files=[~/here.txt]"
    assert command(f"plan --plugins='~/homely.py' {chosen}")[0] == 0
    status, out, err = command("plan --config-dir='~/more' experiment=own --cfg job")
    assert (status, "name: homely" in out) == (0, True), err


def test_an_unknown_user_is_an_error(home, command):
    said = "names the home folder of an unknown user 'nosuch'"
    for line in (
        f"train {TINY} run.root=~nosuch/x",
        "eval '~nosuch/x'",
        f"train {TINY} init_from=~nosuch/x",
    ):
        status, _, err = command(line)
        assert status == 2
        assert said in err
    with pytest.raises(SettingError, match=said):
        expanded("~nosuch/x")
    Path("~nosuch").mkdir()
    assert expanded("~nosuch/x") == Path("~nosuch/x"), "a folder with this name exists"


def test_a_root_that_is_not_utf_8_is_refused(tmp_path, command):
    root = os.fsdecode(b"gr\xf6\xdfe")  # the name of a folder on an old disk
    status, _, err = command(f"train {TINY} \"run.root='{root}'\" run.name=first")
    assert (status, "expected a path in UTF-8" in err) == (2, True)
    assert not Path(root).exists()
    tree = {"run": {"root": root, "other": "größe"}}
    assert yaml.safe_load(dump("config.yaml", tree)) == tree, "the path of data may be any text"


def test_paths_given_in_python_are_expanded(home):
    trainer = Trainer(max_steps=1, folder="~/out")
    assert trainer.folder == home / "out"
    np.savez(
        home / "x.npz", x_train=np.random.rand(20, 3).astype("float32"), y_train=np.arange(20) % 2
    )
    assert isinstance(fw.datasets.build("npz", path="~/x.npz").train, TensorSplit)
    assert with_homes([Path("~/a"), ("~/b", 3)]) == [home / "a", ("~/b", 3)], "a text is not a path"


def test_the_cache_is_in_the_home_folder(home, command, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "~/cache")
    _, _, err = command("train data=diamonds")
    assert f"{home}/cache/framework/diamonds" in err


def test_a_pasted_path_is_one_argument_of_a_command():
    assert pasted("runs/a") == "runs/a"
    assert pasted("my runs/it's") == "'my runs/it'\"'\"'s'"
    assert pasted("-odd") == "./-odd"
    assert os.sep == "/"


def test_circular_links_are_no_internal_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("conf", "runs", "loop"):
        (tmp_path / name).symlink_to(name)
    for line in (
        "list",
        "eval loop",
        "resume loop",
        "train data=blobs trainer.max_steps=1",
        "board --root loop",
    ):
        with pytest.raises(SystemExit) as end:
            main(line.split())
        assert end.value.code in (0, 2), line
    assert "internal error" not in capsys.readouterr().err
