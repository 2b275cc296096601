"""Checkpoints: exact states, detection of damage, and kills at any moment."""

import errno
import hashlib
import json
import os
import resource
import signal
import threading
import time
from collections import OrderedDict
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch
from torch import nn

from framework.errors import CheckpointError
from framework.runs import checkpoint
from framework.runs.background_writer import Writer
from framework.runs.checkpoint import (
    FILES,
    MANIFEST,
    MODEL,
    TRAINING,
    clean,
    load,
    newest,
    read_shapes,
    remove,
    save,
    verify,
    writing,
)
from framework.runtime import seeds

MODEL_STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}


def save_steps(folder: Path, steps: int = 3) -> list[Path]:
    return [
        save(folder, {"w": torch.full((50,), float(step))}, {"step": step}, step)
        for step in range(1, steps + 1)
    ]


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1
    path.write_bytes(content)


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


# saved and loaded


def test_a_model_an_optimizer_and_generators_are_restored_bit_for_bit(tmp_path):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).to(torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    model(torch.randn(5, 4, dtype=torch.float64)).sum().backward()
    optimizer.step()
    training = {
        "optimizer": optimizer.state_dict(),
        "random": seeds.capture(),
        "note": [None, (1, b"x"), 2.5, True],
    }
    written = save(tmp_path, model.state_dict(), training, 12)
    assert written == tmp_path / "step-00000012"
    assert sorted(os.listdir(written)) == sorted(FILES)
    loaded_model, loaded_training = load(written)
    assert same(dict(model.state_dict()), loaded_model)
    assert same(training, loaded_training)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8]
)
def test_every_usual_dtype_is_kept(tmp_path, dtype):
    state = {
        "x": torch.tensor([[0, 1], [1, 0]]).to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "none": torch.zeros(0),
    }
    assert same(state, load(save(tmp_path, state, {}, 1))[0])


def test_tied_weights_are_stored_once_and_loaded_under_every_name(tmp_path):
    embedding = nn.Embedding(100, 8)
    head = nn.Linear(8, 100, bias=False)
    head.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "head": head})
    written = save(tmp_path, model.state_dict(), {}, 1)
    assert list(safetensors.torch.load_file(written / MODEL)) == ["embedding.weight"]
    assert same(dict(model.state_dict()), load(written)[0])


def test_views_of_one_storage_are_restored_and_store_only_their_elements(tmp_path):
    base = torch.arange(100_000.0)
    state = {"row": base[:10], "overlapping": base[5:15], "turned": base[:6].reshape(2, 3).T}
    written = save(tmp_path, state, {"ema": base[:3]}, 1)
    model, training = load(written)
    assert same(state, model)
    assert same({"ema": base[:3]}, training)
    assert sum(path.stat().st_size for path in written.iterdir()) < 5_000


def test_ordered_dicts_and_parameters_are_saved_as_dicts_and_tensors(tmp_path):
    _, training = load(save(tmp_path, {}, {"ema": OrderedDict(w=nn.Parameter(torch.ones(2)))}, 1))
    assert type(training["ema"]) is dict
    assert type(training["ema"]["w"]) is torch.Tensor


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (numpy.float64(0.5), "numpy.float64"),
        (numpy.zeros(3), "numpy.ndarray"),
        (Path("x"), "pathlib"),
        ({1, 2}, "set"),
        (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (Enum("Colour", "RED").RED, "test_checkpoint.Colour"),
        (print, "builtin_function_or_method"),
    ],
)
def test_a_value_that_is_not_plain_is_refused_with_its_path(tmp_path, value, kind):
    with pytest.raises(CheckpointError, match=rf"^callbacks\.early_stop\.best\.1 is a {kind}"):
        save(tmp_path, {}, {"callbacks": {"early_stop": {"best": [0, value]}}}, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "value", [{"a": 1}, torch.zeros(2).to_sparse(), torch.zeros(2, dtype=torch.complex128)]
)
def test_a_model_state_that_safetensors_does_not_support_is_refused(tmp_path, value):
    with pytest.raises(CheckpointError):
        save(tmp_path, {"extra": value}, {}, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_with_code_in_it_is_not_loaded(tmp_path):
    written = save(tmp_path, MODEL_STATE, {}, 1)
    torch.save({"trap": print}, written / TRAINING)
    manifest = json.loads((written / MANIFEST).read_text())
    content = (written / TRAINING).read_bytes()
    manifest["files"][TRAINING] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    del manifest["sha256"]
    (written / MANIFEST).write_text(
        json.dumps(manifest | {"sha256": checkpoint.own_sha256(manifest)})
    )
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(written)


# damage


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_or_a_truncation_is_detected_before_use(tmp_path, name):
    written = save(tmp_path, MODEL_STATE, {"optimizer": torch.randn(20)}, 1)
    whole = (written / name).read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 150)):
        flip(written / name, position)
        with pytest.raises(CheckpointError, match=name):
            verify(written)
        (written / name).write_bytes(whole[:position])
        with pytest.raises(CheckpointError, match=name):
            load(written)
        (written / name).write_bytes(whole)
    verify(written)


def test_reading_the_shapes_of_a_truncated_file_names_it_once(tmp_path):
    written = save(tmp_path, MODEL_STATE, {}, 1)
    whole = (written / MODEL).read_bytes()
    assert read_shapes(written) == {"weight": (2, 3), "bias": (2,)}
    for size in (0, 4, 50, len(whole) - 1):
        (written / MODEL).write_bytes(whole[:size])
        with pytest.raises(CheckpointError) as raised:
            read_shapes(written)
        message = f"{written / MODEL} has {size} bytes instead of {len(whole)}"
        assert str(raised.value) == message
    (written / MODEL).write_bytes(b"?" * 8 + whole[8:])
    with pytest.raises(CheckpointError) as raised:
        read_shapes(written)
    assert str(raised.value).count(str(written)) == 1


def test_the_newest_good_checkpoint_is_found_with_the_reasons_for_skipping_others(tmp_path):
    one, two, three = save_steps(tmp_path)
    four = save(tmp_path, {"ok": torch.ones(1), "w": torch.tensor([1.0, torch.nan])}, {}, 4)
    flip(three / MODEL, -1)
    (two / TRAINING).unlink()
    (tmp_path / "step-00000005").mkdir()
    found, skipped = newest(tmp_path)
    assert found == one
    expected = [
        "not a complete checkpoint",
        f"{four}: w holds NaN",
        f"{three / MODEL} is damaged",
        "training.pt is missing",
    ]
    assert len(skipped) == 4
    assert all(words in said for words, said in zip(expected, skipped, strict=True))
    assert load(four)[1] == {}  # it can be loaded by name


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float8_e4m3fn]
)
def test_nan_is_a_fault_and_infinity_is_not(tmp_path, dtype):
    mask = (
        torch.zeros(4) if dtype.itemsize == 1 else torch.tensor([0.0, -torch.inf, torch.inf, 1.0])
    )
    fine = save(tmp_path, {"mask": mask.to(dtype), "count": torch.tensor(3)}, {}, 1)
    spoiled = save(tmp_path, {"mask": torch.tensor([0.0, torch.nan]).to(dtype)}, {}, 2)
    assert (verify(fine)["nan"], verify(spoiled)["nan"]) == ([], ["mask"])
    assert newest(tmp_path)[0] == fine


def test_a_folder_without_checkpoints_is_no_error(tmp_path):
    assert newest(tmp_path / "nowhere") == (None, [])
    assert newest(tmp_path) == (None, [])


def test_steps_are_sorted_as_numbers(tmp_path):
    for step in (99_999_999, 100_000_000, 3):
        save(tmp_path, MODEL_STATE, {}, step)
    assert newest(tmp_path)[0] == tmp_path / "step-100000000"


def test_the_error_of_a_later_format_names_the_version_that_wrote_it(tmp_path):
    written = save(tmp_path, MODEL_STATE, {}, 1)
    manifest = json.loads((written / MANIFEST).read_text()) | {"schema": 3, "framework": "9.1"}
    (written / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"written by framework 9\.1 \(format 3\)"):
        load(written)


def test_a_second_checkpoint_of_a_step_replaces_the_first(tmp_path):
    save(tmp_path, MODEL_STATE, {"course": 1}, 7)
    assert load(save(tmp_path, MODEL_STATE, {"course": 2}, 7))[1] == {"course": 2}
    assert os.listdir(tmp_path) == ["step-00000007"]


# failures of writing, and kills


@contextmanager
def files_no_larger_than(size: int):
    """Let writes fail as on a full disk."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("place", ["model", "training"])
def test_the_error_of_a_full_disk_has_the_bytes_and_the_earlier_checkpoint_remains(tmp_path, place):
    (earlier,) = save_steps(tmp_path, 1)
    big = {"w": torch.ones(50_000)}
    with (
        files_no_larger_than(20_000),
        pytest.raises(
            CheckpointError,
            match=rf"step 2 .*{tmp_path}.*200,000 bytes are needed, [\d,]+ bytes are free",
        ),
    ):
        save(tmp_path, big if place == "model" else {}, big if place == "training" else {}, 2)
    assert newest(tmp_path) == (earlier, [])
    assert os.listdir(tmp_path) == [earlier.name]


def test_a_full_disk_is_detected_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(
        CheckpointError,
        match=r"No space left on device \(112 bytes are needed, 10 bytes are free\)",
    ):
        save(tmp_path, MODEL_STATE, {"optimizer": [torch.zeros(20)]}, 1)
    assert list(tmp_path.iterdir()) == []


def test_the_error_names_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/checkpoints: Not a directory"):
        save(tmp_path / "file" / "checkpoints", MODEL_STATE, {}, 1)


def test_a_real_kill_while_saving_leaves_a_good_checkpoint(tmp_path):
    """A forked child saves without pause, and is killed at 15 different moments."""
    save_steps(tmp_path, 1)
    for number in range(15):
        child = os.fork()
        if child == 0:
            for step in range(2, 10_000):
                save(tmp_path, {"w": torch.full((20_000,), float(step))}, {"step": step}, step)
            os._exit(0)
        time.sleep(0.011 + 0.0037 * number)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        clean(tmp_path)
        found, skipped = newest(tmp_path)
        assert skipped == []
        model, training = load(found)
        assert model["w"][0] == training["step"]


LARGE_STATE = {"w": torch.arange(2_000_000.0), "tied": torch.ones(3)}
LARGE_TRAINING = {"moments": [torch.rand(1_500_000), torch.rand(7)], "step": 3}


def test_a_large_checkpoint_is_restored_exactly(tmp_path):
    written = save(tmp_path, LARGE_STATE, LARGE_TRAINING, 3)
    files = verify(written)["files"]
    assert {name: writing.measured(written / name) for name in files} == files
    assert all(
        same(one, other)
        for one, other in zip(load(written), (LARGE_STATE, LARGE_TRAINING), strict=True)
    )


@pytest.mark.parametrize("what", ["write_model", "write_training"])
@pytest.mark.parametrize("when", ["at once", "after"])
def test_a_checkpoint_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch, what, when):
    save(tmp_path, MODEL_STATE, {}, 1)
    real = getattr(writing, what)

    def full(path, content):
        if when == "after":
            real(path, content)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writing, what, full)
    threads = threading.active_count()
    with pytest.raises(
        CheckpointError, match=r"step 2 cannot be saved in .*: No space left on device"
    ):
        save(tmp_path, LARGE_STATE, LARGE_TRAINING, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert threading.active_count() == threads


# in the background


def test_changes_after_a_submission_are_not_saved(tmp_path):
    writer = Writer()
    big = 2_000_000
    weight = torch.zeros(big)
    moments = torch.zeros(1000)[::2]
    tied = torch.zeros(3)
    for step in (1, 2, 3):
        weight.fill_(step), moments.fill_(step), tied.fill_(step)
        model = {"w": weight, "tied": tied, "again": tied}
        counters = {"step": step}
        writer.submit(
            tmp_path, model, {"m": moments, "counters": counters}, step, then=lambda written: None
        )
        weight.fill_(-1), moments.fill_(-1), tied.fill_(-1)
        counters["step"] = -1
    writer.join()
    for step, written in enumerate(checkpoint.listed(tmp_path), 1):
        model, training = load(written)
        assert same(
            model,
            {"w": torch.full((big,), float(step))}
            | dict.fromkeys(("tied", "again"), model["tied"]),
        )
        assert model["tied"].eq(step).all()
        assert same(training, {"m": torch.full((500,), float(step)), "counters": {"step": step}})


def test_the_buffers_follow_changes_of_shapes_and_dtypes(tmp_path):
    writer = Writer()
    states = [{"a": torch.ones(3), "b": torch.ones(4)}, {"a": torch.ones(2, 2).bfloat16()}, {}]
    states.append(
        {"a": torch.ones(3), "b": torch.ones(4, dtype=torch.int64), "c": torch.tensor(1.5)}
    )
    for step, state in enumerate(states):
        writer.submit(tmp_path, state, state, step, then=lambda written: None)
    writer.join()
    for written, state in zip(checkpoint.listed(tmp_path), states, strict=True):
        assert all(same(state, loaded) for loaded in load(written))


def test_saves_are_in_order_and_then_is_called_after_a_complete_save(tmp_path):
    writer = Writer()
    seen = []

    def then(written):
        verify(written)
        time.sleep(0.02)
        seen.append(checkpoint.step_of(written))

    for step in range(5):
        writer.submit(tmp_path, MODEL_STATE, {}, step, then=then)
    writer.join()
    assert seen == list(range(5))


def test_an_error_in_the_background_is_raised_once(tmp_path):
    writer = Writer()
    (tmp_path / "file").write_text("")
    writer.submit(tmp_path / "file", MODEL_STATE, {}, 1, then=lambda written: None)
    with pytest.raises(CheckpointError, match="step 1 cannot be saved"):
        writer.join()
    writer.check()
    writer.submit(tmp_path, MODEL_STATE, {}, 2, then=lambda written: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        writer.join()
    with pytest.raises(CheckpointError, match="x is a set"):
        writer.submit(tmp_path, MODEL_STATE, {"x": {1}}, 3, then=lambda written: None)
    assert newest(tmp_path)[0].name == "step-00000002"


def test_a_process_that_ends_writes_its_submitted_states(tmp_path):
    child = os.fork()
    if child == 0:
        Writer().submit(tmp_path, {"w": torch.ones(1_000_000)}, {}, 1, then=lambda written: None)
        threading._shutdown()  # as at the end of every program
        os._exit(0)
    os.waitpid(child, 0)
    assert load(newest(tmp_path)[0])[0]["w"].eq(1).all()


# removal


def test_only_the_files_in_the_manifest_are_removed(tmp_path):
    one, two, _ = save_steps(tmp_path)
    (two / "notes.txt").write_text("mine")
    remove(one)
    remove(two)
    assert not one.exists()
    assert os.listdir(two) == ["notes.txt"]


@pytest.mark.parametrize("what", ["folder", "file"])
def test_symbolic_links_are_not_followed_when_removing(tmp_path, what):
    elsewhere = save(tmp_path / "elsewhere", MODEL_STATE, {}, 1)
    here = tmp_path / "here"
    if what == "folder":
        here.mkdir()
        (here / "step-00000001").symlink_to(elsewhere)
    else:
        save(here, MODEL_STATE, {}, 1)
        (here / "step-00000001" / MODEL).unlink()
        (here / "step-00000001" / MODEL).symlink_to(elsewhere / MODEL)
    with pytest.raises(CheckpointError, match="symbolic link"):
        remove(here / "step-00000001")
    verify(elsewhere)


def test_a_manifest_with_a_file_outside_its_folder_is_refused(tmp_path):
    (written,) = save_steps(tmp_path, 1)
    (tmp_path / "precious").write_text("x")
    manifest = json.loads((written / MANIFEST).read_text())
    manifest["files"]["../precious"] = {"bytes": 1, "sha256": ""}
    del manifest["sha256"]
    (written / MANIFEST).write_text(
        json.dumps(manifest | {"sha256": checkpoint.own_sha256(manifest)})
    )
    with pytest.raises(CheckpointError, match=r"lists '\.\./precious'"):
        remove(written)
    assert (tmp_path / "precious").exists()


@pytest.mark.parametrize(
    "half", [".step-00000002-0123abcd/.tmpA1b2C3", ".step-00000002-0123abcd/training.pt", ".best"]
)
def test_cleaning_removes_the_files_of_a_killed_save(tmp_path, half):
    """The first is a temporary file of safetensors, the last a link before its rename."""
    (whole,) = save_steps(tmp_path, 1)
    (tmp_path / half).parent.mkdir(exist_ok=True)
    (tmp_path / half).write_text("half")
    clean(tmp_path)
    assert list(tmp_path.iterdir()) == [whole]


def test_cleaning_keeps_other_files(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".step-00000001-0123abcd").mkdir()
    (tmp_path / ".step-00000001-0123abcd" / MODEL).write_text("half")
    clean(tmp_path)
    assert os.listdir(tmp_path) == [".git"]
