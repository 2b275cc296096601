"""Runs with several processes: `trainer.devices=N`, and processes that a launcher has started."""

import hashlib
import json
import socket
import textwrap

import pytest
import torch

from distributed_runs import run_command, run_commands
from framework.composition.compose import Job
from framework.errors import DataError, SettingError
from framework.experiment.distributed import check_processes
from framework.experiment.launch import (
    ProcessFailed,
    Request,
    check_cores,
    launch,
    read_errors,
    read_result,
    status_of_failure,
    write_error,
    write_result,
)
from framework.experiment.result import Result
from framework.runtime.processes import LostProcess
from framework.tuning.vectorized.launcher import find_groups
from runs import composed, logged

PLUGIN = textwrap.dedent(
    """
    import os, signal, warnings
    import framework as fw

    warnings.warn("the plugin is old")

    @fw.callbacks.register("fails")
    class Fails(fw.Callback):
        changes_training = False

        def __init__(self, kind: str, rank: int, marker: str):
            self.kind = kind
            self.rank = rank
            self.marker = marker

        def on_step_end(self, trainer):
            if trainer.state.step != 13 or int(os.environ["RANK"]) != self.rank:
                return
            if os.path.exists(self.marker):
                return
            open(self.marker, "w").close()
            if self.kind == "exception":
                raise ValueError("this process fails")
            if self.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.kind == "term":
                os.kill(os.getpid(), signal.SIGTERM)
    """
)
SMALL = ("model.width=8", "trainer.max_steps=30", "trainer.max_epochs=null", "loggers=json_lines")
SAVING = ("callbacks=[checkpoint]", "callbacks.checkpoint.every=5steps", "resume=auto")
TWO = "trainer.devices=2"


def errors_in(output):
    return [line for line in output.splitlines() if line.startswith("framework:")]


def weights(run):
    newest = max((run / "checkpoints").glob("step-*"))
    return hashlib.sha256((newest / "model.safetensors").read_bytes()).hexdigest()


def status(run):
    return json.loads((run / "status.json").read_text())


@pytest.mark.parametrize("strategy", ["single", "ddp"])
def test_a_run_with_several_processes_needs_a_strategy_for_them(strategy):
    spec = composed([f"strategy={strategy}"])
    check_processes(spec, 1)
    if strategy == "ddp":
        check_processes(spec, 2)
    else:
        with pytest.raises(SettingError, match="strategy=single"):
            check_processes(spec, 2)


def test_a_mesh_of_another_number_of_processes_is_refused_before_they_start():
    spec = composed(["strategy=fsdp", "strategy.mesh=[2,2]"])
    check_processes(spec, 4)
    with pytest.raises(SettingError, match=r"strategy\.mesh"):
        check_processes(spec, 2)


def test_the_devices_of_a_launcher_are_its_processes():
    with pytest.raises(SettingError, match=r"trainer\.devices=4: expected 2"):
        check_processes(composed(["trainer.devices=4"]), 2)


def test_a_batch_smaller_than_the_number_of_processes_is_refused_before_they_start():
    spec = composed(["loader.batch_size=3"])
    check_processes(spec, 3)
    with pytest.raises(DataError, match="batch_size=3: expected at least one sample for each of"):
        check_processes(spec, 4)


def test_the_parent_checks_before_it_starts_processes():
    spec = composed([TWO, "strategy=single"])
    with pytest.raises(SettingError, match="strategy=single"):
        launch(Request(spec, "default", [], 0.0))


def test_trials_with_several_processes_are_not_stacked():
    jobs = []
    for devices in (1, 2):
        spec = composed([f"trainer.devices={devices}"])
        jobs.append([Job(spec, "default", []), Job(spec, "default", [])])
    assert len(find_groups(jobs[0])) == 1
    assert len(find_groups(jobs[1])) == 2


def test_the_first_error_of_a_process_is_the_error_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, error in enumerate([LostProcess("lost"), ValueError("first"), ValueError("next")]):
        monkeypatch.setenv("RANK", str(rank))
        write_error(tmp_path, error, [str(error)], 1)
    assert [each["rank"] for each in read_errors(tmp_path)] == [0, 1, 2]
    with pytest.raises(ProcessFailed, match=r"^first$"):
        status_of_failure(tmp_path, 3, {0: 1, 1: 1}, [])


def test_a_killed_process_is_named_before_the_errors_of_its_connections(tmp_path, monkeypatch):
    write_error(tmp_path, LostProcess("lost"), ["lost"], 1)
    with pytest.raises(ProcessFailed, match="process 1 of 2 was killed by SIGKILL"):
        status_of_failure(tmp_path, 2, {0: 1, 1: -9}, [])
    with pytest.raises(ProcessFailed, match=r"^lost$"):
        status_of_failure(tmp_path, 2, {0: 1}, [])
    assert status_of_failure(tmp_path, 2, {1: -9}, [15]) == 143
    assert status_of_failure(tmp_path, 2, {0: 1, 1: 143}, []) == 143


def test_a_process_that_exits_by_itself_is_named(tmp_path):
    with pytest.raises(ProcessFailed, match="process 1 of 2 has ended with exit status 3"):
        status_of_failure(tmp_path, 2, {1: 3}, [])


def test_a_result_is_read_as_it_was_written(tmp_path):
    result = Result(tmp_path / "run", {"val/loss": float("inf")}, signal=15, steps=3)
    write_result(tmp_path, result)
    assert read_result(tmp_path) == result


def failing(kind, name):
    """Return the command of a run whose second process fails in step 13, once."""
    fails = [f"callbacks.fails.kind={kind}", "callbacks.fails.rank=1"]
    fails += [f"callbacks.fails.marker={name}.marker", f"run.name={name}"]
    return ["train", "--plugins", "plugin.py", *SMALL, *SAVING, TWO, "+callbacks=fails", *fails]


@pytest.fixture
def whole(tmp_path):
    """Return the folder of a run without a fault; the plugin is in the same folder."""
    (tmp_path / "plugin.py").write_text(PLUGIN)
    (tmp_path / "whole.marker").touch()
    done = run_command(*failing("none", "whole"), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("30 steps in") == 1
    assert done.stderr.count("UserWarning: the plugin is old") == 1
    return tmp_path / "runs/default/whole"


def check_resumes(command, run, whole):
    """Resume a run, and check that it equals that without a fault."""
    resumed = run_command(*command, folder=whole.parents[2])
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("resuming") == 1
    assert weights(run) == weights(whole)
    assert logged(run) == logged(whole)
    assert status(run)["status"] == "done"


def test_an_error_in_one_process_is_printed_once_and_the_run_resumes(whole):
    command = failing("exception", "exception")
    run = whole.with_name("exception")
    ended = run_command(*command, folder=whole.parents[2])
    assert ended.returncode == 1
    (error,) = errors_in(ended.stderr)
    assert "this process fails" in error
    assert "Traceback" not in ended.stderr
    assert status(run)["status"] == "failed"
    assert "this process fails" in status(run)["reason"]
    check_resumes(command, run, whole)


@pytest.mark.slow
def test_a_run_with_a_killed_or_stopped_process_resumes(whole):
    for kind, expected in {"kill": 1, "term": 143}.items():
        command = failing(kind, kind)
        run = whole.with_name(kind)
        ended = run_command(*command, folder=whole.parents[2])
        assert ended.returncode == expected, ended.stderr
        if kind == "term":
            assert errors_in(ended.stderr) == []
            assert status(run)["status"] == "stopped"
            assert (run / "checkpoints/step-00000013").is_dir()
        else:
            (error,) = errors_in(ended.stderr)
            assert "process 1 of 2 was killed by SIGKILL" in error
            assert status(run)["status"] == "failed"
        check_resumes(command, run, whole)


@pytest.mark.slow
def test_a_sweep_trains_each_trial_in_its_own_processes(tmp_path):
    swept = run_command("train", "-m", "seed=0,1", *SMALL, TWO, "sweep.name=s", folder=tmp_path)
    assert swept.returncode == 0, swept.stderr
    rows = (tmp_path / "runs/default/s/sweep.jsonl").read_text().splitlines()
    ended = [json.loads(row) for row in rows if json.loads(row)["state"] == "done"]
    assert len(ended) == 2
    assert all("val/loss" in row["metrics"] for row in ended)
    assert (tmp_path / "runs/default/s" / ended[0]["folder"] / "output.txt").stat().st_size


def test_processes_without_a_launcher_report_each_error_in_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        with pytest.MonkeyPatch.context() as patched:
            for name, value in (variables | {"MASTER_PORT": port}).items():
                patched.setenv(name, value)
            ended = run_command("train", *SMALL, folder=tmp_path)
    assert ended.returncode == 2
    assert f"MASTER_PORT={port}" in errors_in(ended.stderr)[0]
    assert not (tmp_path / "runs").exists()
    small = run_commands("train", *SMALL, "loader.batch_size=1", folder=tmp_path)
    assert [each.returncode for each in small] == [2, 2]
    lines = [line for each in small for line in errors_in(each.stderr)]
    assert "batch_size=1" in lines[0]
    assert not (tmp_path / "runs/default").exists()


def test_more_processes_than_the_cores_can_run_are_refused(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    check_cores(8, torch.device("cpu"))
    check_cores(1000, torch.device("cuda"))
    with pytest.raises(SettingError, match="at most 8 processes on the 2 cores"):
        check_cores(9, torch.device("cpu"))
