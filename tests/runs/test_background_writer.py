"""Saving in the background: the checkpoints that are written, and the cost in time and memory."""

import itertools
import threading
import time

import pytest
import torch

from framework.errors import CheckpointError
from framework.runs.background_writer import Writer
from framework.runs.checkpoint import listed, load, step_of, writing
from waiting import wait_for


class Held(Writer):
    """A writer whose thread rests after each write until it must write at once."""

    rest = 1e9


def steps(folder):
    return [step_of(path) for path in listed(folder)]


def submit(writer, folder, step, size=10, **more):
    state = {"w": torch.full((size,), float(step))}
    writer.submit(
        folder, state, {"step": step}, step, then=more.pop("then", lambda written: None), **more
    )


def test_a_waiting_state_that_is_replaced_is_never_written(tmp_path):
    writer = Held()
    submit(writer, tmp_path, 1)
    wait_for(lambda: steps(tmp_path) == [1] and not writer.jobs, seconds=10, pause=0.001)
    for step in (2, 3, 4, 5):
        submit(writer, tmp_path, step, stays={3})
    writer.join()
    assert steps(tmp_path) == [1, 3, 5]
    assert [load(path)[1]["step"] for path in listed(tmp_path)] == [1, 3, 5]
    assert load(listed(tmp_path)[-1])[0]["w"].eq(5).all()


def test_without_stays_all_states_are_written(tmp_path):
    writer = Held()
    for step in range(6):
        submit(writer, tmp_path, step)
    writer.join()
    assert steps(tmp_path) == list(range(6))


def test_writing_takes_at_most_a_fifth_of_the_time(tmp_path):
    writer = Writer()
    spans = []
    writer.pause = 0

    def slow(written):
        began = time.monotonic()
        time.sleep(0.02)
        spans.append((began, time.monotonic()))

    def four_are_written():
        submit(writer, tmp_path, time.monotonic_ns(), then=slow, stays=())
        return len(spans) >= 4

    wait_for(four_are_written, seconds=30, pause=0.002)
    rests = [after[0] - before[1] for before, after in itertools.pairwise(spans[:4])]
    assert all(rest >= 4 * 0.02 for rest in rests)
    writer.join()


def test_there_is_at_most_one_write_per_pause(tmp_path):
    writer = Writer()
    assert writer.pause == 1
    writer.pause = 60
    submit(writer, tmp_path, 0, stays=())
    wait_for(lambda: steps(tmp_path) == [0] and not writer.jobs)
    for step in range(1, 100):
        submit(writer, tmp_path, step, stays=())
        time.sleep(0.002)
    assert steps(tmp_path) == [0]
    began = time.monotonic()
    writer.join()  # does not rest
    assert time.monotonic() - began < 30
    assert steps(tmp_path) == [0, 99]


def test_a_submission_waits_if_the_copies_need_too_much_memory(tmp_path, monkeypatch):
    writer = Held()
    go_on = threading.Event()
    writer.most_bytes = 1000
    submit(writer, tmp_path, 1, size=10_000, then=lambda written: go_on.wait(10))
    threading.Timer(0.2, go_on.set).start()
    began = time.monotonic()
    submit(writer, tmp_path, 2, size=10_000)
    assert time.monotonic() - began > 0.1  # it waited for the first
    assert len(writer.jobs) == 1
    writer.join()
    assert steps(tmp_path) == [1, 2]


def test_submissions_of_small_states_do_not_wait(tmp_path):
    writer = Held()
    go_on = threading.Event()
    submit(writer, tmp_path, 1, then=lambda written: go_on.wait(10))
    for step in range(2, 20):
        submit(writer, tmp_path, step)
    assert len(writer.jobs) == 19
    go_on.set()
    writer.join()
    assert steps(tmp_path) == list(range(1, 20))


def test_the_memory_of_copies_is_reused(tmp_path):
    writer = Writer()
    for step in range(5):
        submit(writer, tmp_path, step)
        writer.join()
    assert len(writer.spare) == 1


def test_after_an_error_nothing_is_written_until_it_is_raised(tmp_path, monkeypatch):
    writer = Held()
    real = writing.write

    def write(folder, taken):
        if taken.step == 2:
            raise OSError(28, "No space left on device")
        real(folder, taken)

    monkeypatch.setattr(writing, "write", write)
    for step in (1, 2, 3):
        submit(writer, tmp_path, step)
    with pytest.raises(CheckpointError, match="step 2 cannot be saved"):
        writer.join()
    assert steps(tmp_path) == [1]
    submit(writer, tmp_path, 4)
    writer.join()
    assert steps(tmp_path) == [1, 4]
