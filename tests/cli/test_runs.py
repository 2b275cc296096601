"""`framework runs` and `framework best`, as a user calls them."""

import json
import shutil
from pathlib import Path

import pytest

from framework.cli import runs as runs_module
from framework.system.locks import WriterLock
from run_folders import write_run, write_sweep


@pytest.fixture
def runs(command):
    """Run a command in a folder with runs; return exit status, stdout and stderr."""
    times = [f"2026-12-01T09:0{minute}:00+0000" for minute in range(6)]
    root = Path("runs/default")
    write_run(root / "first", [0.5, 0.2, 0.3], lr=0.1, started=times[0])
    write_run(root / "second", [0.4, 0.35], lr=0.01, started=times[1], processes=2)
    write_run(root / "größe 漢字", [0.6], lr=0.01, started=times[2], status="stopped")
    write_run(root / "no metrics", [], started=times[3], status="failed")
    write_sweep(root / "grid", (0.1, [0.5]), (0.2, [0.1, 0.3]), (0.3, [0.25, 0.4]))
    return command


def names(out):
    """Return the first column of a table without its heading."""
    return [line.split("  ")[0] for line in out.splitlines()[1:]]


def test_the_newest_run_comes_first_and_sweeps_are_collapsed(runs):
    status, out, err = runs("runs")
    assert (status, err) == (0, "")
    expected = ["default/no metrics", "default/größe 漢字", "default/second"]
    assert names(out)[:3] == expected
    assert "default/grid/ (3 trials)" in out
    heading = out.splitlines()[0].split()
    assert heading[:3] == ["name", "state", "lr"]
    assert {"val/loss:best", "val/loss:last", "val/accuracy:best", "processes"} <= set(heading)
    [first] = [line for line in out.splitlines() if line.startswith("default/first")]
    assert first.split()[1:5] == ["done", "0.1", "0.2", "0.3"]
    [sweep] = [line for line in out.splitlines() if "grid" in line]
    assert "3 done" in sweep
    assert "0.1, 0.2, 0.3" in sweep
    assert sweep.split()[-5:-2] == ["0.3", "0.9", "7.5"]  # of the trial with the lowest last value


def test_sorting_by_a_metric_puts_the_best_first(runs):
    _, out, _ = runs("runs --expand --sort val/loss --columns name,val/loss")
    assert names(out) == [
        "default/grid/001_lr-0.2",
        "default/first",
        "default/grid/002_lr-0.3",
        "default/second",
        "default/grid/000_lr-0.1",
        "default/größe 漢字",
        "default/no metrics",
    ]
    _, out, _ = runs("runs --expand --sort val/accuracy --limit 1 --columns name")
    assert names(out) == ["default/grid/001_lr-0.2"]
    _, out, _ = runs("runs --sort val/loss:last --reverse --limit 1 --columns name")
    assert names(out) == ["default/größe 漢字"]


def test_filters(runs):
    _, out, _ = runs("runs --where 'lr=0.01 and val/loss<0.5' --columns name")
    assert names(out) == ["default/second"]
    _, out, _ = runs("runs --where 'state=failed or state=stopped' --columns name --sort name")
    assert names(out) == ["default/größe 漢字", "default/no metrics"]
    _, out, _ = runs("runs --where lr>=0.2 --columns name,state")
    assert names(out) == ["default/grid/ (2 of 3 trials)"]
    status, out, err = runs("runs --where lr=7")
    assert (status, out) == (0, "")
    assert "none of the 7 runs" in err


@pytest.mark.parametrize(
    "line",
    [
        "runs --where optimzer=adamw",
        "runs --where 'lr=1 and'",
        "runs --sort nothing",
        "runs --columns name,val/los",
        "runs --columns val/loss:mean",
        "runs --columns ,",
        "runs --limit -1",
        "runs --limit x",
        "runs nowhere",
        "runs runs/default/first",
        "runs tag default/first",
        "runs tag default/first 'two words'",
        "runs tag default/first absent --remove",
        "runs tag nowhere x",
        "runs note default x",
        "runs remove nowhere",
        "runs remove runs",
        "runs restore default/first",
        "best nowhere",
        "best --metric lr",
        "best --metric val/los",
        "best --where lr=7",
        "best --mode up",
    ],
)
def test_wrong_arguments_give_one_line_and_exit_status_2(line, runs):
    status, out, err = runs(line)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1


def test_an_unknown_column_is_named_with_its_position_and_the_nearest_one(runs):
    _, _, err = runs("runs --where 'lr=1 and val/los<1'")
    assert "position 10" in err
    assert "did you mean 'val/loss'" in err


def test_json_has_the_documented_form(runs):
    _, out, _ = runs("runs --json --sort val/loss")
    content = json.loads(out)
    assert (content["schema"], content["root"]) == (1, "runs")
    by_name = {row["name"]: row for row in content["runs"]}
    first = by_name["default/first"]
    assert first["settings"]["optimizer.lr"] == 0.1
    assert first["metrics"]["val/loss"] == {
        "last": 0.3,
        "last_step": 30,
        "best": 0.2,
        "best_step": 20,
        "direction": "min",
    }
    assert (first["kind"], first["state"], first["processes"]) == ("run", "done", 1)
    sweep = by_name["default/grid"]
    assert (sweep["kind"], sweep["states"]) == ("sweep", {"done": 3})
    assert sweep["best"]["name"] == "default/grid/001_lr-0.2"
    assert len(sweep["trials"]) == 3


def test_json_refuses_an_unknown_column(runs):
    status, out, _ = runs("runs --json --columns name,val/los")
    error = json.loads(out)["error"]
    assert (status, error["setting"], error["value"]) == (2, "--columns", "val/los")
    assert error["suggestion"] == "val/loss"
    assert runs("runs --json --columns name,val/loss")[0] == 0


def test_json_of_a_config_with_keys_that_json_lacks(runs):
    config = Path("runs/default/first/config.yaml")
    config.write_text(config.read_text() + "days: [{2026-12-01: 1, null: 2, 3: .nan}]\n")
    first = json.loads(runs("runs --json --where name=default/first")[1])["runs"][0]
    assert first["settings"]["days"] == [{"2026-12-01": 1, "null": 2, "3": None}]
    rows = json.loads(runs("diff default/first default/second --json")[1])["settings"]
    [days] = [row["values"][0]["value"] for row in rows if row["name"] == "days"]
    assert days == [{"2026-12-01": 1, "null": 2, "3": None}]


def test_a_narrow_terminal_keeps_the_important_columns(runs, monkeypatch):
    monkeypatch.setattr(runs_module.sys.stdout, "isatty", lambda: True, raising=False)
    for width in (200, 80, 40):
        monkeypatch.setenv("COLUMNS", str(width))
        status, out, _ = runs("runs")
        assert status == 0
        lines = out.splitlines()
        rows = [line for line in lines if line.startswith(("name", "default"))]
        assert all(len(line) <= width for line in rows)
        assert "val/loss:best" in lines[0] or width == 40
    assert "left out for lack of width" in out


def test_damaged_runs_are_listed_with_notes(runs):
    Path("runs/default/first/config.yaml").write_text("a: *x")
    Path("runs/default/second/status.json").write_text("{")
    Path("runs/default/grid/sweep.json").write_text("[")
    shutil.rmtree("runs/default/größe 漢字")
    Path("runs/default/größe 漢字").symlink_to("/etc")
    status, out, err = runs("runs")
    assert status == 0
    assert len(err.splitlines()) == 3
    assert "config.yaml" in err
    assert "größe 漢字: a symbolic link, not followed" in err
    [second] = [line for line in out.splitlines() if line.startswith("default/second")]
    assert second.split()[1] == "unknown"


def test_an_empty_folder(command, tmp_path):
    (tmp_path / "runs").mkdir()
    for line in ("runs", "runs --where lr=1", "runs --columns lr,val/loss", "runs --bin"):
        status, out, err = command(line)
        assert (status, out, len(err.splitlines())) == (0, "", 1)


def test_names_cannot_control_the_terminal(runs):
    Path("runs/default/first").rename("runs/default/\x1b[31mred")
    _, out, _ = runs("runs")
    assert "\x1b" not in out
    assert "\\x1b[31mred" in out


def test_tags_and_notes_are_shown_and_filtered(runs):
    assert runs("runs tag default/first baseline good")[1] == "runs/default/first: baseline, good\n"
    runs("runs tag default/first good --remove")
    runs("runs note runs/default/first 'labels were shuffled'")
    _, out, _ = runs("runs --where 'tags=baseline and note~SHUFFLED'")
    assert names(out) == ["default/first"]
    assert "baseline" in out
    assert "labels were shuffled" in out
    assert "good" not in out


def test_labels_of_a_sweep_are_those_of_its_trials(runs):
    assert runs("runs tag default/grid wide")[1] == "runs/default/grid: wide\n"
    runs("runs tag default/grid/000_lr-0.1 first")
    runs("runs note default/grid 'three rates'")
    runs("runs note default/grid/000_lr-0.1 'the lowest'")
    _, out, _ = runs("runs --where 'tags=wide and tags!=first'")
    assert names(out) == ["default/grid/ (2 of 3 trials)"]
    assert "three rates" in out
    _, out, _ = runs("runs --where tags=wide --expand --columns name,tags,note --sort name")
    assert out.splitlines()[1].split("  ") == [
        "default/grid/000_lr-0.1",
        "wide, first",
        "the lowest",
    ]
    assert "wide         three rates" in out.splitlines()[2]
    [sweep] = json.loads(runs("runs --where tags=wide --json")[1])["runs"]
    assert (sweep["tags"], sweep["note"]) == (["wide"], "three rates")
    assert "has no tag 'first'" in runs("runs tag default/grid first --remove")[2]


def test_the_common_time_of_stacked_trials_counts_once(command):
    write_sweep("runs/default/stack", *[(0.1 * number, [0.5]) for number in range(1, 5)])
    write_run("runs/default/alone")
    status = Path("runs/default/alone/status.json")
    status.write_text(status.read_text().replace('"wall_seconds": 2.5', '"wall_seconds": 4'))
    for trial in Path("runs/default/stack").glob("00*/status.json"):
        content = json.loads(trial.read_text()) | {"wall_seconds": 6.0, "time": {"stacked": 3}}
        if trial.parent.name.startswith("003"):  # it trained alone, after the others
            content = json.loads(trial.read_text())
        trial.write_text(json.dumps(content))
    _, out, _ = command("runs --columns name,time --sort time")
    assert [line.split("  ")[-1].strip() for line in out.splitlines()[1:]] == ["4.0 s", "8.5 s"]
    _, out, _ = command("runs runs/default/stack --columns name,time --sort name")
    assert out.splitlines()[1].endswith("6.0 s (3 trials)")
    assert out.splitlines()[4].endswith(" 2.5 s")
    sweep, alone = json.loads(command("runs --json --sort time --reverse")[1])["runs"]
    assert (sweep["seconds"], alone["seconds"], alone["stacked"]) == (8.5, 4, 1)


def test_removed_runs_can_be_listed_restored_and_deleted(runs):
    runs("runs remove default/first default/grid")
    assert "first" not in runs("runs")[1]
    assert "default/first" in runs("runs --bin")[1]
    runs("runs restore runs/default/first")
    assert "default/first" in runs("runs")[1]
    status, _, err = runs("runs empty")
    assert status == 2
    assert "--yes" in err
    assert runs("runs empty --yes")[1] == "1 runs deleted\n"
    assert "the bin of runs is empty" in runs("runs empty")[2]


def test_a_running_run_is_not_removed(runs):
    run = write_run("runs/default/live", status="running")
    lock = WriterLock(run)
    status, _, err = runs("runs remove default/first default/live")
    lock.close()
    assert status == 2
    assert "is running" in err
    assert Path("runs/default/first").is_dir()


@pytest.mark.parametrize("state", ["running", "paused", "testing"])
def test_all_commands_name_the_same_state(state, runs):
    run = write_run("runs/default/live", status=state)
    lock = WriterLock(run)
    [listed] = json.loads(runs(f"runs --where state={state} --json")[1])["runs"]
    [watched] = json.loads(runs("watch default/live --json")[1])["runs"]
    compared = json.loads(runs("diff default/live default/first --json")[1])["runs"][0]
    _, _, refused = runs("runs remove default/live")
    lock.close()
    assert listed["name"] == "default/live"
    assert {listed["state"], watched["state"], compared["state"]} == {state}
    assert "is running" in refused


def test_best_prints_only_the_folder(runs):
    status, out, err = runs("best")
    assert (status, out) == (0, "runs/default/grid/001_lr-0.2\n")
    assert "val/loss 0.1 after step 10, the best of 6 runs" in err
    assert runs("best --where 'lr=0.01'")[1] == "runs/default/second\n"
    assert runs("best --metric val/loss --mode max")[1] == "runs/default/größe 漢字\n"
    content = json.loads(runs("best --json")[1])
    assert (content["metric"], content["value"], content["compared"]) == ("val/loss", 0.1, 6)


def test_lists_take_the_name_of_a_sweep(runs):
    for command in ("runs --json", "best --json", "runs --columns name,lr"):
        assert runs(f"{command} default/grid") == runs(f"{command} runs/default/grid")
    assert runs("best default/grid")[0] == 0
    assert runs("runs default/absent")[0] == 2


def test_best_skips_runs_without_a_checkpoint(runs):
    shutil.rmtree("runs/default/grid/001_lr-0.2/checkpoints")
    status, out, err = runs("best")
    assert (status, out) == (0, "runs/default/first\n")
    assert "1 run with better values" in err


def test_best_skips_runs_whose_config_cannot_be_read(runs):
    Path("runs/default/grid/001_lr-0.2/config.yaml").write_text("a: [1")
    status, out, err = runs("best --root runs")
    assert (status, out) == (0, "runs/default/first\n")
    assert "config cannot be read: 1 run\n" in err


def test_a_root_is_given_by_position_or_by_option(runs):
    expected = runs("runs runs/default/grid")[1]
    assert "001_lr-0.2" in expected
    assert runs("runs --root runs/default/grid")[1] == expected
    assert "there is no folder nowhere" in runs("runs --root nowhere")[2]


def test_an_unknown_column_is_explained(runs):
    assert "did you mean 'lr'?" in runs("runs --where lrr=1")[2]
    _, _, err = runs("runs --sort zzzzzz")
    assert "one of name, experiment, state" in err
    assert "val/loss" in err


def test_a_reason_is_complete_in_a_pipe(runs):
    reason = "Diverged: the loss is nan at step 3; a lower learning rate may help"
    write_run("runs/default/nan", [], status="failed", reason=reason)
    assert reason in runs("runs --where reason~nan --columns name,reason")[1]


def test_runs_are_found_by_the_names_of_the_list(runs):
    status, out, _ = runs("diff default/first default/grid/001_lr-0.2")
    assert status == 0
    assert out.splitlines()[0].split() == ["settings", "first", "001_lr-0.2"]
    assert "no run folder default/third" in runs("diff default/first default/third")[2]


def test_best_refuses_to_compare_different_data(runs):
    write_run("runs/spam/a", [0.01], data="spam")
    status, _, err = runs("best")
    assert status == 2
    assert "cannot be compared" in err
    assert runs("best --where data=spam")[1] == "runs/spam/a\n"
    assert runs("best runs/spam")[1] == "runs/spam/a\n"
