"""`framework rerun` trains a new run with the config of another one, and reports what differs."""

import json
from pathlib import Path

import pytest

from framework.errors import ConfigError, RunError
from framework.experiment.experiment import train
from framework.experiment.recorded.rerun import prepare_rerun
from framework.runs.run_files import RunFiles

SMALL = "trainer.max_steps=5 model.width=16 callbacks=[checkpoint]"


@pytest.fixture
def first(command):
    """The command, in a folder with the run runs/default/first."""
    assert command(f"train {SMALL} run.name=first")[0] == 0
    return command


def change(file, **content):
    path = Path("runs/default/first", file)
    path.write_text(json.dumps(json.loads(path.read_text()) | content))


def test_a_rerun_has_the_same_config_and_the_same_metrics(first):
    status, out, _ = first("rerun runs/default/first")
    assert status == 0
    assert "runs/default/first_rerun" in out
    before = RunFiles("runs/default/first")
    after = RunFiles("runs/default/first_rerun")
    assert after.last("val/loss") == before.last("val/loss")
    assert after.settings | {"run.name": "first"} == before.settings
    assert after.overrides == ["trainer.max_steps=5", "model.width=16", "callbacks=[checkpoint]"]


def test_overrides_change_the_new_run_only(first):
    overrides = "seed=3 optimizer=sgd +callbacks=ema '~callbacks=checkpoint' run.name=again"
    assert first(f"rerun runs/default/first {overrides}")[0] == 0
    settings = RunFiles("runs/default/again").settings
    assert (settings["seed"], settings["optimizer"]) == (3, "sgd")
    assert "callbacks.ema" in settings
    assert "callbacks.checkpoint" not in settings
    assert RunFiles("runs/default/first").settings["seed"] == 0


def test_each_rerun_has_a_folder_of_its_own(first):
    """Also if the second one is prepared before the first one trains."""
    plans = [prepare_rerun("runs/default/first", []) for _ in range(2)]
    names = [plan.spec.sections["run"]["name"] for plan in plans]
    assert names == ["first_rerun", "first_rerun-2"]
    assert plans[0].experiment == "default"
    for plan in plans:
        train(plan.spec, plan.experiment, plan.overrides, data=plan.data, say=lambda line: None)
        plan.release()
    for name in names:
        assert RunFiles(f"runs/default/{name}").settings["run.name"] == name
    elsewhere = prepare_rerun("runs/default/first", ["run.root=elsewhere"])
    assert elsewhere.claimed == Path("elsewhere/default/first_rerun")


def test_a_rerun_that_fails_before_training_leaves_no_folder(first):
    status, _, err = first("rerun runs/default/first init_from=missing")
    assert status == 2, err
    assert [path.name for path in Path("runs/default").glob("first*")] == ["first"]


def test_differences_of_code_versions_and_data_are_reported(first):
    lines = prepare_rerun("runs/default/first", []).differences
    assert lines == [
        "code: runs/default/first has no git commit, so that its code cannot be compared"
    ]
    packages = json.loads(Path("runs/default/first/provenance.json").read_text())["packages"]
    change("provenance.json", git_commit="abc123", packages=packages | {"torch": "1.0"})
    change("facts.json", content={"train": "sha256:0"})
    text = "\n".join(prepare_rerun("runs/default/first", []).differences)
    assert "was commit abc123" in text
    assert "versions: torch" in text
    assert "was 1.0" in text
    assert "data: the content of the train split differs" in text


def test_wrong_overrides_and_folders(first):
    for override in ("optimzer.lr=1", "lr", "optimizer.lr=1,2", "sweep.name=x", "~callbacks=emma"):
        with pytest.raises(ConfigError):
            prepare_rerun("runs/default/first", [override])
    with pytest.raises(RunError):
        prepare_rerun("runs/default/second", [])
    assert [path.name for path in Path("runs/default").glob("[!.]*")] == ["first"]
