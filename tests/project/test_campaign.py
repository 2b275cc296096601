"""Short versions of the campaigns; the one with random kills is in test_resume.py."""

import importlib.util
import os
import random
import re
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

from framework.runs.checkpoint import reading, writing

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.append(str(SCRIPTS))

import campaign_files  # noqa: E402
import campaign_full  # noqa: E402
import campaign_hostile  # noqa: E402
import campaign_mutations  # noqa: E402
import campaign_sandbox  # noqa: E402
import campaign_saves  # noqa: E402
from campaign_trace import Call, Fault, supported, traced  # noqa: E402

needs_tracing = pytest.mark.skipif(bool(supported()), reason=str(supported()))


def case(name):
    return next(case for case in campaign_saves.cases() if case.name == name)


# files


def test_damage_to_the_files_of_real_checkpoints_is_detected_before_use(capsys):
    assert campaign_files.files(60, seed=0, control=False) == 0
    assert "0 undetected of 69 damages" in capsys.readouterr().out


def test_without_checksums_the_same_damage_goes_undetected(capsys, monkeypatch):
    monkeypatch.setattr(reading, "verify", reading.verify)  # the control replaces it
    assert campaign_files.files(20, seed=0, control=True) == 1
    assert "is selected as the newest good one" in capsys.readouterr().out


# saves


@needs_tracing
@pytest.mark.parametrize(
    ("fault", "number_of_calls", "status", "content"),
    [
        (None, 3, 0, b"1234567890"),
        (Fault(0, "killed before"), 1, -9, None),
        (Fault(0, "killed after"), 1, -9, b""),
        (Fault(2, "killed within", 3), 3, -9, b"12345678"),
        (Fault(1, "no room"), 2, 1, b""),
    ],
)
def test_a_process_is_stopped_at_the_selected_call(
    fault, number_of_calls, status, content, tmp_path
):
    path = tmp_path / "a"

    def write():
        with path.open("wb", buffering=0) as file:
            file.write(b"12345")
            file.write(b"67890")

    calls = [Call("create"), Call("write", 5), Call("write", 5)]
    assert traced(write, tmp_path, fault) == (calls[:number_of_calls], status)
    if content is None:
        assert not path.exists()
    else:
        assert path.read_bytes() == content


@needs_tracing
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("same step again", "killed after"),
        ("rotation, best, background", "killed after"),
        ("rotation, best", "no room"),
        ("new step", "killed within"),
    ],
)
def test_a_fault_at_any_call_of_a_save_leaves_a_good_checkpoint_and_no_other_files(name, kind):
    tally = campaign_saves.disturb(case(name), random.Random(0), [kind], every=2)
    assert tally.wrong == []
    assert tally.points[kind] >= 6
    assert set(tally.newest) <= {"old", "new"}


@needs_tracing
def test_a_full_disk_leaves_a_good_checkpoint_and_no_other_files():
    tally = campaign_saves.fill_up(case("rotation, best"))
    if isinstance(tally, str):
        pytest.skip(tally)
    assert tally.wrong == []
    assert tally.newest["old"] >= 3
    assert tally.newest["new"] == 1


@needs_tracing
def test_a_checkpoint_published_file_by_file_does_not_survive(monkeypatch):
    monkeypatch.setattr(writing, "publish", campaign_saves.in_place)
    tally = campaign_saves.disturb(case("new step"), random.Random(0), ["killed after"], every=3)
    assert any("unreadable under a final name" in problem for problem in tally.wrong)


# starts


def test_of_two_simultaneous_starts_one_writes_and_the_other_is_refused():
    command = [sys.executable, SCRIPTS / "fault_campaign", "--double-starts", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "one writer in 1 of 1 double first starts and 1 of 1 double resumes" in done.stdout


# a full disk


@pytest.mark.parametrize("control", [False, True])
def test_a_full_disk_while_metrics_are_written_is_reported_and_the_run_resumes_exactly(
    capsys, control
):
    status = campaign_full.full_disk(1, seed=0, control=control, only="run, metrics.jsonl 1")
    out = capsys.readouterr().out
    if out.startswith("skipped"):
        pytest.skip(out)
    assert status == control
    assert control or "the disk was full at 1 points" in out


# hostile folders


def hostile(*arguments):
    command = [sys.executable, SCRIPTS / "fault_campaign", "--hostile", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_hostile_folders_execute_and_write_nothing_and_are_refused_in_one_line():
    done = hostile("30", "--commands", "2")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_without_the_protections_the_same_folders_do_harm():
    done = hostile("23", "--control", "--commands", "5")
    assert done.returncode == 1, done.stdout + done.stderr
    found = done.stdout.splitlines()[-1]
    assert found.startswith("without the protections")
    for kind in ("executed", "written", "read", "hang"):
        assert kind in found


@pytest.fixture
def world(tmp_path):
    """A scratch folder without a run."""
    campaign_hostile.make_folders(tmp_path)
    (tmp_path / "outside/secret").write_text(campaign_hostile.TOKEN)
    world = campaign_mutations.World(tmp_path, campaign_hostile.TOKEN, False, random.Random(0))
    world.run.mkdir(parents=True)
    return world


def judge(world, work):
    access = campaign_sandbox.times_of_access(world.root)
    _, problems = campaign_hostile.judge(world, work, access=access)
    return problems


def writes(world):
    (world.outside / "secret").write_text("other")


def reads(world):
    (world.outside / "secret").read_bytes()


def copies(world):
    (world.run / "copy").write_bytes(campaign_hostile.TOKEN.encode())


def ends_with(status, text=""):
    def end(world):
        sys.stderr.write(text)
        return status

    return end


def leaves_a_process(world):
    if os.fork() == 0:
        os.execvp("sleep", ["sleep", "5"])


HARMS = {
    "executed": lambda world: world.proof.touch(),
    "written": writes,
    "written, made": lambda world: (world.outside / "new").touch(),
    "written, removed": lambda world: (world.outside / "secret").unlink(),
    "read": reads,
    "read, copied": copies,
    "read, shown": lambda world: print(campaign_hostile.TOKEN),
    "hang": lambda world: os.read(os.pipe()[0], 1),
    "traceback": lambda world: 1 / 0,
    "traceback, status 1": ends_with(1),
    "traceback, signal": lambda world: os.kill(os.getpid(), 9),
    "traceback, internal": ends_with(2, "framework: x; internal error at y.py:3\n"),
    "memory": lambda world: bytearray(b"x" * 300_000_000).clear(),  # cold pages may be swapped
    "output": lambda world: print("\x1b[31m"),
    "output, forged": ends_with(2, "framework: a\nframework: framework: all is well\n"),
    "output, silent": ends_with(2),
    "output, unquoted": lambda world: print("resume   framework resume x; touch y"),
    "process": leaves_a_process,
}


@pytest.mark.parametrize("harm", HARMS)
def test_each_kind_of_harm_is_detected(world, monkeypatch, harm):
    monkeypatch.setattr(campaign_sandbox, "IDLE", 0.3)
    memory = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    monkeypatch.setattr(campaign_sandbox, "MOST_MEMORY", int(memory[1]) + 20_000)
    kinds = {kind for kind, _ in judge(world, lambda: HARMS[harm](world))}
    assert kinds == {harm.partition(",")[0]}


def test_a_command_that_uses_only_its_run_has_no_problems(world):
    def work():
        (world.run / "file").write_text("text")
        print("loss  0.5")

    assert judge(world, work) == []
    assert judge(world, lambda: ends_with(2, "framework: refused\n")(world)) == []


# SLURM


@pytest.fixture(scope="module")
def slurm_campaign():
    loader = SourceFileLoader("slurm_campaign", str(SCRIPTS / "slurm_campaign"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


def test_the_campaign_says_which_programs_of_slurm_are_missing():
    command = [sys.executable, SCRIPTS / "slurm_campaign"]
    environment = os.environ | {"PATH": "/missing"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2, done.stderr
    assert re.match(r"not installed: .*sbatch", done.stdout)


def test_the_campaign_detects_other_trials_and_other_metrics(slurm_campaign, command):
    trials = "data=blobs model.width=8 trainer.max_steps=4 callbacks=[checkpoint] seed=0,1"
    folder = Path("runs/default")
    for name in ("expected", "same"):
        assert command(f"train -m {trials} sweep.name={name}")[0] == 0
    slurm_campaign.compare_trials(folder / "expected", folder / "same")
    with (folder / "same/001_seed-1/metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 5}\n')
    with pytest.raises(slurm_campaign.Failed, match="001_seed-1: other metrics"):
        slurm_campaign.compare_trials(folder / "expected", folder / "same")
    with (folder / "same/sweep.jsonl").open("a") as rows:
        rows.write('{"number": 1, "settings": {}, "metrics": {}, "state": "failed"}\n')
    with pytest.raises(slurm_campaign.Failed, match="other trials"):
        slurm_campaign.compare_trials(folder / "expected", folder / "same")


@pytest.mark.slow
def test_a_requeued_slurm_job_equals_an_uninterrupted_one(slurm_campaign):
    if slurm_campaign.missing_programs():
        pytest.skip("SLURM is not installed")
    command = [sys.executable, SCRIPTS / "slurm_campaign", "--only", "requeue"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"requeue +equal, resumed after step \d+", done.stdout)
