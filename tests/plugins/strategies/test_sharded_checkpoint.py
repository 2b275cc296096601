"""Checkpoints of `strategy=fsdp`, of which each process writes its parts of the tensors."""

import errno
import json
import math
import os
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import framework as fw
from distributed_runs import run_command, run_in_processes
from fits import SPLIT, VAL
from framework.contracts.strategy import Strategy
from framework.errors import CheckpointDiskFull, CheckpointError
from framework.runs.checkpoint import FILES, MANIFEST, MODEL, TRAINING, own_sha256, sharded

STEPS = 15  # of a fit; a checkpoint each 5


class Network(nn.Module):
    """A network with tied weights, a frozen parameter, and buffers of several dtypes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(6, 7)
        self.second = nn.Linear(7, 7)
        self.third = nn.Linear(7, 7)
        self.norm = nn.BatchNorm1d(7)
        self.last = nn.Linear(7, 3)
        self.third.weight = self.second.weight
        self.first.bias.requires_grad_(False)
        self.register_buffer("flags", torch.tensor([True, False, True]))

    def forward(self, inputs):
        hidden = self.norm(torch.tanh(self.first(inputs)))
        return self.last(torch.tanh(self.third(torch.tanh(self.second(hidden)))))


def fsdp(**settings):
    return fw.strategies.build("fsdp", units=["first", "last"], timeout_seconds=60.0, **settings)


def fit(strategy, folder=None, *, resume=None, **checkpoint):
    """Fit the network with an average and AdamW, and save checkpoints in a folder."""
    callbacks = [fw.callbacks.build("ema", decay=0.9)]
    if folder is not None:
        settings = {"every": "5steps", "keep": 9, **checkpoint}
        callbacks.append(fw.callbacks.build("checkpoint", **settings))
    trainer = fw.Trainer(
        max_epochs=3, strategy=strategy, callbacks=callbacks, folder=folder, device="cpu"
    )
    model = Network()
    trainer.fit(
        model,
        SPLIT,
        val=VAL,
        task=nn.CrossEntropyLoss(),
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.01),
        batch_size=16,
        resume=resume,
    )
    return trainer


def at_step(folder, step):
    return Path(folder) / "checkpoints" / fw.checkpoints.folder_name(step)


def loaded(folder, step):
    model, training = fw.checkpoints.load(at_step(folder, step))
    return training | {"model": model}


def equal(one, other):
    """Return whether two states are equal in model, optimizer and callbacks, bit for bit."""
    values = [contents(state) for state in (one, other)]
    return values[0].keys() == values[1].keys() and all(
        torch.equal(torch.as_tensor(value), torch.as_tensor(values[1][path]))
        for path, value in values[0].items()
    )


def contents(state):
    """Return the numbers and tensors of a state that two fits must have in common, by path."""
    found = {}
    optimizer = state["optimizer"]["state"]
    waiting = [(("model",), dict(state["model"])), (("optimizer",), optimizer)]
    waiting.append((("ema",), state["callbacks"]["0:Ema"]))
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [((*path, key), item) for key, item in value.items()]
        else:
            found[path] = value
    return found


def two_processes(folder):
    """Save checkpoints with each strategy, and resume them; return the results."""
    fw.discover()
    found = {}
    straight = fit(fsdp(), f"{folder}/fsdp")
    found["state"] = straight.state_dict()
    found["middle"] = equal(
        fit(fsdp(), resume=loaded(f"{folder}/fsdp", 5)).state_dict(), found["state"]
    )
    for name, strategy in {"ddp": fw.strategies.build("ddp"), "fsdp": fsdp()}.items():
        state = loaded(f"{folder}/fsdp", STEPS)
        found["fsdp", name] = equal(fit(strategy, resume=state).state_dict(), found["state"])
    fit(fw.strategies.build("ddp"), f"{folder}/ddp")
    for name in ("single", "ddp"):
        state = loaded(f"{folder}/{name}", STEPS)
        found[name, "fsdp"] = equal(fit(fsdp(), resume=state).state_dict(), state)
    fit(fsdp(), f"{folder}/waiting", background=False)
    found["errors"] = {rank: failed_write(f"{folder}/full{rank}", rank) for rank in (0, 1)}
    return found


def failed_write(folder, rank):
    """Return the error of a fit of which a process cannot write its parts from the 2nd save on."""
    commit = sharded.ShardedCommit.run
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(self, then):
        if self.state.step == 10 and os.environ["RANK"] == str(rank):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        commit(self, then)

    sharded.ShardedCommit.run = limited
    try:
        # The steps wait for the disk: otherwise the other process may lose this one before its
        # thread has the error.
        fit(fsdp(), folder, background=False)
    except Exception as error:
        return type(error), str(error)
    finally:
        sharded.ShardedCommit.run = commit
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def four_processes(folder):
    """Return whether four processes resume the checkpoint of two, and replicate their own."""
    fw.discover()
    state = loaded(f"{folder}/fsdp", STEPS)
    resumed = equal(fit(fsdp(), resume=state).state_dict(), state)
    replicated = fit(fsdp(mesh=[2, 2]), f"{folder}/replicas").state_dict()
    return resumed, equal(loaded(f"{folder}/replicas", STEPS), replicated)


def killed(folder, place):
    """Kill a process in its second save."""
    from framework.runtime import distributed_checkpoint

    fw.discover()
    rank, owner, name = {
        "parts": (1, distributed_checkpoint.FileWriter, "write_data"),
        "model": (0, sharded, "write_joined_model"),
        "rename": (0, sharded, "publish"),
    }[place]
    function = getattr(owner, name)
    calls = []

    def kill(*arguments):
        calls.append(name)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)

    if os.environ["RANK"] == str(rank):
        setattr(owner, name, kill)
    fit(fsdp(), f"{folder}/{place}")


def resumed_after_kills(folder):
    """Resume the fits that were killed; return whether each equals the one without a kill."""
    fw.discover()
    results = {}
    for place in ("parts", "model", "rename"):
        state = loaded(f"{folder}/{place}", 5)
        trainer = fit(fsdp(), f"{folder}/{place}", resume=state)
        results[place] = equal(trainer.state_dict(), loaded(f"{folder}/fsdp", STEPS))
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def found(folder):
    fit(Strategy(), folder / "single")
    return run_in_processes(two_processes, 2, folder, str(folder))


@pytest.fixture
def checkpoint(found, folder, tmp_path):
    """Return a copy of the last checkpoint."""
    return Path(shutil.copytree(at_step(folder / "fsdp", STEPS), tmp_path / "step-00000015"))


def sign(checkpoint):
    """Give a changed checkpoint a manifest that fits its files."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    del manifest["sha256"]
    manifest["files"] = {
        path.name: fw.checkpoints.writing.measured(path)
        for path in checkpoint.iterdir()
        if path.name != MANIFEST
    }
    manifest["sha256"] = own_sha256(manifest)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


def test_the_model_file_has_the_full_weights_and_every_other_tensor(found, checkpoint):
    weights = found[0]["state"]["model"]
    stored = load_file(checkpoint / MODEL)
    assert weights.keys() - stored.keys() == {"third.weight"}  # tied
    assert fw.checkpoints.load_model(checkpoint).keys() == weights.keys()
    for name, tensor in stored.items():
        assert tensor.dtype == weights[name].dtype
        assert torch.equal(tensor, weights[name]), name
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    assert fw.checkpoints.read_shapes(checkpoint) == shapes


def test_the_manifest_has_all_files_and_each_process_has_written_its_own(found, checkpoint):
    manifest = fw.checkpoints.verify(checkpoint)
    files = set(os.listdir(checkpoint))
    assert {MANIFEST, *manifest["files"]} == files
    assert files - set(FILES) == {"training-00000-0.safetensors", "training-00001-0.safetensors"}
    assert manifest["nan"] == []


def test_the_file_of_the_main_process_has_no_sharded_tensor(found, checkpoint):
    training = torch.load(checkpoint / TRAINING, weights_only=True)
    state = found[0]["state"]["optimizer"]["state"][0]
    assert state["exp_avg"].shape == (7, 6)
    assert training["optimizer"]["state"][0]["exp_avg"] is None
    parts = [load_file(checkpoint / f"training-0000{rank}-0.safetensors") for rank in (0, 1)]
    (name,) = [name for name in parts[0] if name.endswith(".optimizer.state.0.exp_avg")]
    assert torch.equal(torch.cat([part[name] for part in parts]), state["exp_avg"])


def test_a_loaded_state_is_that_of_the_fit(found, folder):
    state = loaded(folder / "fsdp", STEPS)
    assert all(equal(state, each["state"]) for each in found)
    assert equal(loaded(folder / "waiting", STEPS), state)


def test_one_process_resumes_the_checkpoint_of_two(found, folder):
    state = loaded(folder / "fsdp", STEPS)
    assert equal(fit(Strategy(), resume=state).state_dict(), state)


@pytest.mark.parametrize(
    ("before", "after"),
    [("fsdp", "ddp"), ("fsdp", "fsdp"), ("ddp", "fsdp"), ("single", "fsdp")],
)
def test_a_checkpoint_of_one_strategy_resumes_with_another(found, before, after):
    assert all(each[before, after] for each in found)


def test_a_resumed_fit_equals_an_uninterrupted_one(found):
    assert all(each["middle"] for each in found)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_any_process_is_the_error_of_all(found, folder, rank):
    for each in found:
        kind, text = each["errors"][rank]
        assert kind is CheckpointDiskFull
        assert os.strerror(errno.EFBIG) in text
        assert "\n" not in text
    names = os.listdir(folder / f"full{rank}/checkpoints")
    assert sorted(names) == ["best", "step-00000005"]
    assert loaded(folder / f"full{rank}", 5)["counters"]["step"] == 5


def test_a_kill_in_a_save_leaves_the_checkpoint_before(found, folder):
    for place in ("parts", "model", "rename"):
        with pytest.raises(AssertionError):
            run_in_processes(killed, 2, folder, str(folder), place)
        for error in folder.glob("error*"):
            error.unlink()
        checkpoints = folder / place / "checkpoints"
        if place != "parts":  # otherwise the main process may have removed its hidden folder
            assert list(checkpoints.glob(".step-00000010-*"))
        assert fw.checkpoints.listed(checkpoints) == [at_step(folder / place, 5)]
        fw.checkpoints.clean(checkpoints)
        assert sorted(os.listdir(checkpoints)) == ["best", "step-00000005"]
    for results in run_in_processes(resumed_after_kills, 2, folder, str(folder)):
        assert results == {"parts": True, "model": True, "rename": True}


def test_a_damaged_or_missing_part_is_detected(checkpoint):
    path = checkpoint / "training-00001-0.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="sha256"):
        fw.checkpoints.load(checkpoint)
    path.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        fw.checkpoints.load(checkpoint)
    sign(checkpoint)
    with pytest.raises(CheckpointError, match="is stored with"):
        fw.checkpoints.load(checkpoint)


def test_a_shape_that_the_files_do_not_have_takes_no_memory(checkpoint):
    training = torch.load(checkpoint / TRAINING, weights_only=True)
    training["sharded"][0]["shape"] = [10**9, 10**9]
    torch.save(training, checkpoint / TRAINING)
    sign(checkpoint)
    with pytest.raises(CheckpointError, match="is stored with"):
        fw.checkpoints.load(checkpoint)


@pytest.mark.parametrize("offset", [-100, 1, 10**9])
def test_a_part_outside_of_its_tensor_is_refused(checkpoint, offset):
    path = checkpoint / "training-00001-0.safetensors"
    with safe_open(path, "pt") as file:
        offsets = json.loads(file.metadata()["DCP_SHARDING_INFO"])
    for entry in offsets.values():
        entry["saved_offsets"][0] += offset
    save_file(load_file(path), path, metadata={"DCP_SHARDING_INFO": json.dumps(offsets)})
    sign(checkpoint)
    with pytest.raises(CheckpointError, match="does not fit"):
        fw.checkpoints.load(checkpoint)


def test_removing_a_checkpoint_removes_its_parts(checkpoint):
    fw.checkpoints.remove(checkpoint)
    assert not checkpoint.exists()


def test_commands_of_one_process_read_the_checkpoint_of_two(tmp_path):
    small = ["optimizer=adamw", "trainer.max_epochs=1", "loader.batch_size=64", "run.name=two"]
    sharding = ["trainer.devices=2", "strategy=fsdp", "strategy.units=[]"]
    done = run_command("train", *small, *sharding, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs/default/two"
    (last,) = run.glob("checkpoints/step-*")
    assert list(last.glob("training-*.safetensors"))
    np.savez(tmp_path / "x.npz", inputs=np.zeros((2, 64), np.float32))
    for command in (
        ["eval", run],
        ["predict", run, "--input", "x.npz", "--output", "-"],
        ["resume", run, "trainer.max_epochs=2", "trainer.devices=null", "strategy=auto"],
    ):
        done = run_command(*map(str, command), folder=tmp_path)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_four_processes_resume_two_and_one_of_equal_parts_is_saved(found, folder):
    for resumed, replicated in run_in_processes(four_processes, 4, folder, str(folder)):
        assert resumed
        assert replicated
    checkpoint = at_step(folder / "replicas", STEPS)
    stored = 0
    for path in checkpoint.glob("training-*"):
        stored += sum(tensor.numel() for tensor in load_file(path).values())
    training = torch.load(checkpoint / TRAINING, weights_only=True)
    assert stored == sum(math.prod(each["shape"]) for each in training["sharded"])
