"""The output and the errors of `framework diff` and `framework explain`."""

import json

import pytest

from run_folders import write_run, write_sweep
from runs import run_training


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("diff runs/a", "expected 2 to 8 runs, got 1"),
        ("diff runs/a runs/b", "there is no run folder runs/a"),
        ("explain optimizer.lr=1", "expected a setting before the overrides"),
        ("explain speed", "expected the folder of one run"),
        ("explain nan runs/a runs/b", "expected the folder of one run"),
        ("explain optimizer.lr seed=1 --run runs/a", "expected no overrides"),
    ],
)
def test_errors_are_one_line(command, line, expected):
    status, out, err = command(line)
    assert status == 2
    assert not out
    assert expected in err
    assert err.count("\n") == 1


def test_a_source_in_an_installed_package_is_relative_to_it(command, tmp_path):
    for name, place in (("one", "/home/x/lib/site-packages/mine/a.yaml:3"), ("two", "/b.yaml:2")):
        run = write_run(tmp_path / name, lr=len(name + place))
        settings = {"optimizer.lr": [{"place": place, "value": 1, "by": ""}]}
        (run / "provenance.json").write_text(json.dumps({"settings": settings}))
    out = command("diff one two")[1]
    assert "(mine/a.yaml:3)" in out
    assert "(/b.yaml:2)" in out


def test_of_sweeps_the_best_trials_are_compared(command, tmp_path):
    write_sweep(tmp_path / "runs/default/wide", (0.1, [0.5]), (0.2, [0.3]))
    write_sweep(tmp_path / "runs/default/deep", (0.3, [0.4]))
    write_run(tmp_path / "runs/default/single", lr=0.4)
    status, out, err = command("diff default/wide default/single")
    assert (status, out) == (2, "")
    assert "runs/default/wide/000_lr-0.1, runs/default/wide/001_lr-0.2" in err
    for sweep, best in (("wide", "001_lr-0.2"), ("deep", "000_lr-0.3")):
        (tmp_path / f"runs/default/{sweep}/best").mkdir()
        link = tmp_path / f"runs/default/{sweep}/best/config.yaml"
        link.symlink_to(f"../{best}/config.yaml")
    status, out, err = command("diff default/wide default/deep default/single")
    assert status == 0
    assert out.splitlines()[0].split() == ["settings", "001_lr-0.2", "000_lr-0.3", "single"]
    assert "runs/default/wide is a sweep: its best trial 001_lr-0.2 is compared" in err


def test_the_output_of_two_runs(command):
    small = ("model.width=8", "loader.batch_size=400", "trainer.max_epochs=1")
    run_training(*small, "run.name=one")
    run_training(*small, "run.name=two", "optimizer.lr=0.1", "callbacks=[progress]")
    runs = "runs/default/one runs/default/two"
    status, out, _ = command(f"diff {runs}")
    assert status == 0
    assert "0.1  (command line: optimizer.lr=0.1)" in out
    assert "0.001  (default of optimizer/adamw)" in out
    assert "callbacks.checkpoint" in out
    assert "val/loss" in out
    status, out, _ = command(f"diff {runs} --json")
    names = [row["name"] for row in json.loads(out)["settings"]]
    assert "optimizer.lr" in names
    assert "run" not in names
    status, _, err = command(f"diff {runs} --curves val/los")
    assert (status, "did you mean 'val/loss'" in err) == (2, True)
    status, out, _ = command("explain speed runs/default/one")
    assert "steps" in out
    status, out, _ = command("explain optimizer.lr --run runs/default/two --json")
    assert json.loads(out)["settings"][0]["places"][0]["source"] == "command line"
    _, short_name, _ = command("explain lr --run default/two")
    assert short_name.startswith("optimizer.lr = 0.1\n")
    assert "steps" in command("explain speed --run default/one")[1]
    _, _, err = command("explain name --run default/one")
    assert err.count("\n") == 1
    assert command("explain nan runs/default/two")[0] != 0
