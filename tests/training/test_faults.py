"""Faults: workers that die or hang, unreadable samples, signals to the process group."""

import multiprocessing
import os
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import framework as fw
from framework import Callback, TensorSplit, Trainer
from framework.data.dataset import Loader
from framework.errors import CheckpointError, DataError
from framework.runs import checkpoint
from framework.runs.background_writer import Writer
from framework.runs.checkpoint import clean, load, newest, writing
from framework.system.signals import stopping
from waiting import wait_for

SIZE = 23


class Squares(Dataset):
    """Reads numbers and their squares; at some indices it runs a function first."""

    def __init__(self, at=(), fault=None):
        self.at = at
        self.fault = fault

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        if index in self.at:
            self.fault()
        return torch.tensor([float(index)]), torch.tensor([float(index**2)])


def corrupt():
    raise OSError("truncated file")


def numbers(loader, epoch=0, start=0):
    return [inputs.flatten().int().tolist() for inputs, _ in loader.epoch(epoch, start)]


# workers


@pytest.mark.parametrize(
    ("fault", "how"),
    [
        (lambda: os._exit(3), "exited with status 3"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"SIGKILL \(out of memory\?\)"),
        (lambda: os.kill(os.getpid(), signal.SIGUSR2), "SIGUSR2"),
    ],
)
def test_the_error_of_a_dead_worker_has_its_sample_and_its_exit_status(fault, how):
    with pytest.raises(DataError, match=f"^data worker reading sample 17 .*{how}$"):
        numbers(Loader(Squares([17], fault), eval_batch_size=5, workers=2))
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_during_a_step_is_an_error_of_the_next_batch():
    batches = Loader(Squares(), eval_batch_size=1, workers=1).epoch()
    next(batches)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    wait_for(lambda: not multiprocessing.active_children())  # nothing is raised here
    with pytest.raises(
        DataError, match=r"^(a data worker|data worker reading .*) was killed by SIGKILL"
    ):
        list(batches)


def test_a_worker_that_hangs_is_an_error_after_the_timeout():
    began = time.monotonic()
    loader = Loader(
        Squares([17], lambda: time.sleep(60)), eval_batch_size=5, workers=2, timeout_seconds=0.6
    )
    with pytest.raises(DataError, match=r"timeout_seconds=0\.6: .*data worker .*sample 17 hangs"):
        numbers(loader)
    assert time.monotonic() - began < 30  # it would have hung for 60
    assert not multiprocessing.active_children()


def test_workers_die_with_their_parent():
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        batches = Loader(Squares([9], lambda: time.sleep(60)), eval_batch_size=1, workers=2).epoch()
        next(batches)
        pids = [str(process.pid) for process in multiprocessing.active_children()]
        os.write(write, " ".join(pids).encode())
        time.sleep(60)
    workers = [int(pid) for pid in os.read(read, 100).split()]
    assert len(workers) == 2
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    wait_for(lambda: not any(alive(pid) for pid in workers), seconds=30)


def alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().split()[2] != "Z"


# samples


@pytest.mark.filterwarnings("ignore:sample")
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_bad_samples_are_skipped_and_counted_equally_with_workers_and_after_a_restart(
    workers,
):
    def loader(split, **settings):
        return Loader(split, batch_size=4, workers=workers, shuffle=True, seed=3, **settings)

    def without_bad(batch):
        return [index for index in batch if index not in (2, 11)]

    expected = [without_bad(batch) for batch in numbers(loader(Squares()), 1)]
    skipping = loader(Squares([2, 11], corrupt), on_bad_sample="skip")
    assert numbers(skipping, 1) == expected
    assert skipping.skipped == 2
    for start in (2, 4):
        assert (
            numbers(loader(Squares([2, 11], corrupt), on_bad_sample="skip"), 1, start)
            == expected[start:]
        )


def test_a_skipped_sample_gives_a_warning():
    message = r"^sample 2 cannot be read: OSError: truncated file \(.*\); the sample is skipped$"
    with pytest.warns(UserWarning, match=message):
        numbers(Loader(Squares([2], corrupt), on_bad_sample="skip"))


@pytest.mark.filterwarnings("ignore:sample")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_with_bad_samples_only_is_an_error(workers):
    loader = Loader(
        Squares([4, 5], corrupt), eval_batch_size=2, workers=workers, on_bad_sample="skip"
    )
    with pytest.raises(
        DataError, match=r"^no sample of a batch can be read: sample 4 cannot be read: OSError"
    ):
        numbers(loader)


# the run


def fit(folder, split, *callbacks, epochs=3, batch_size=4, resume=None, **settings):
    torch.manual_seed(1)
    model = nn.Linear(1, 1)
    trainer = Trainer(
        max_epochs=epochs, callbacks=callbacks, folder=folder, device="cpu", log_every="100epochs"
    )
    loader = Loader(split, batch_size, shuffle=True, **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    with stopping([trainer]) as stopped:
        trainer.fit(model, loader, task=nn.MSELoss(), optimizer=optimizer, resume=resume)
    return trainer, stopped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("background", [True, False])
def test_a_signal_to_the_process_group_ends_the_run_with_a_checkpoint_of_its_last_step(
    tmp_path, number, background
):
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        saving = fw.callbacks.build(
            "checkpoint", monitor=None, every="1epoch", background=background
        )
        trainer, stopped = fit(tmp_path, Squares(), saving, epochs=10**4, workers=1)
        (tmp_path / "ended").write_text(f"{trainer.state.step} {stopped} {trainer.state.stop}")
        os._exit(0)
    wait_for(lambda: any((tmp_path / "checkpoints").glob("step-*")))
    os.killpg(child, number)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    step, *words = (tmp_path / "ended").read_text().split()
    assert words == [f"[{int(number)}]", number.name]
    assert newest(tmp_path / "checkpoints") == (
        tmp_path / "checkpoints" / checkpoint.folder_name(int(step)),
        [],
    )


class Boundary(Callback):
    """Sets `at_boundary` as if a step were in progress from its start to its end."""

    def on_step_start(self, trainer):
        trainer.at_boundary = False

    def on_step_end(self, trainer):
        trainer.at_boundary = True


class Fail(Callback):
    def __init__(self, event, error):
        self.event = event
        self.error = error

    def fail(self, trainer):
        if trainer.state.step == 3:
            raise self.error

    def on_gradients(self, trainer):
        if self.event == "in a step":
            self.fail(trainer)

    def on_epoch_end(self, trainer):
        if self.event == "between steps":
            self.fail(trainer)


@pytest.mark.parametrize(
    ("event", "error", "saved"),
    [
        ("between steps", ZeroDivisionError, 3),
        ("in a step", ZeroDivisionError, 2),
        ("between steps", KeyboardInterrupt, 2),  # the second signal must not wait for a save
    ],
)
def test_a_run_that_fails_between_two_steps_is_saved(tmp_path, event, error, saved):
    saving = fw.callbacks.build("checkpoint", monitor=None, every="2steps")
    with pytest.raises(error):
        fit(tmp_path, Squares(), saving, Boundary(), Fail(event, error), batch_size=8)
    assert newest(tmp_path / "checkpoints")[0].name == checkpoint.folder_name(saved)


def test_a_run_that_fails_at_a_bad_sample_is_saved_after_the_last_step(tmp_path):
    saving = fw.callbacks.build("checkpoint", monitor=None, every="9epochs")
    with pytest.raises(DataError, match="sample 17"):
        fit(tmp_path, Squares([17], corrupt), saving, Boundary())
    batches = numbers(Loader(Squares(), batch_size=4, shuffle=True))
    reached = [17 in batch for batch in batches].index(True)
    assert newest(tmp_path / "checkpoints")[0].name == checkpoint.folder_name(reached)


class Fill(Callback):
    """Adds a state of that many numbers to each checkpoint."""

    def __init__(self, size):
        self.content = torch.zeros(size)

    def on_step_end(self, trainer):
        self.content.fill_(float(trainer.state.step))

    def state_dict(self):
        return {"content": self.content}


def test_a_kill_while_saving_in_the_background_leaves_the_previous_checkpoint(tmp_path):
    """A forked child, which forks workers, trains and saves without pause; it is killed 8 times."""
    for number in range(8):
        folder = tmp_path / str(number)
        child = os.fork()
        if child == 0:
            saving = fw.callbacks.build("checkpoint", monitor=None, every="1steps", background=True)
            fit(folder, Squares(), Fill(300_000), saving, epochs=10**6, workers=number % 3)
            os._exit(0)
        wait_for(lambda folder=folder: newest(folder / "checkpoints")[0] is not None)
        time.sleep(0.05 + 0.017 * number)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        clean(folder / "checkpoints")
        found, skipped = newest(folder / "checkpoints")
        assert skipped == []
        _, training = load(found)
        content = training["callbacks"]["0:Fill"]["content"]
        assert content.eq(training["counters"]["step"]).all()


def test_a_missing_link_to_the_best_checkpoint_is_created_on_resume(tmp_path):
    def saving():
        return fw.callbacks.build("checkpoint", monitor="train/loss", background=False)

    trainer, _ = fit(tmp_path, Squares(), saving())
    best = tmp_path / "checkpoints" / "best"
    _, step = trainer.callbacks[0].best.ranked[0]
    target = best.readlink()
    best.unlink()
    best.symlink_to("step-00000001")  # its earlier target, which is deleted
    resumed = Trainer(max_epochs=3, callbacks=[saving()], folder=tmp_path, device="cpu")
    model, training = load(newest(tmp_path / "checkpoints")[0])
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1e-6)
    loader = Loader(Squares(), 4, shuffle=True)
    resumed.fit(
        trainer.model,
        loader,
        task=nn.MSELoss(),
        optimizer=optimizer,
        resume=training | {"model": model},
    )
    assert str(best.readlink()) == str(target) == checkpoint.folder_name(step)


@pytest.mark.parametrize("background", [True, False])
def test_an_error_in_saving_ends_the_run_and_leaves_the_previous_checkpoint(
    tmp_path, monkeypatch, background
):
    real = writing.write
    steps = []

    def write(folder, taken):
        steps.append(taken.step)
        if taken.step >= 3:
            raise OSError(28, "No space left on device")
        real(folder, taken)

    monkeypatch.setattr(writing, "write", write)
    saving = fw.callbacks.build("checkpoint", monitor=None, every="1steps", background=background)
    with pytest.raises(
        CheckpointError, match=r"step \d+ cannot be saved in .*: No space left on device"
    ):
        fit(tmp_path, Squares(), saving)
    # In the background, not every step is saved if the disk is slow.
    good = [step for step in steps if step < 3]
    assert background or steps == [1, 2, 3]
    assert steps[len(good)] >= 3
    found = newest(tmp_path / "checkpoints")[0]
    assert found == (tmp_path / "checkpoints" / checkpoint.folder_name(good[-1]) if good else None)


def test_workers_are_forked_safely_while_a_checkpoint_is_written(tmp_path):
    """Ten epochs with new workers, while a thread writes without pause, neither hang nor differ."""
    writer = Writer()
    expected = numbers(Loader(Squares(), eval_batch_size=5))
    state = {"w": torch.ones(500_000)}
    for step in range(10):
        writer.submit(tmp_path, state, {}, step, then=lambda written: None)
        loader = Loader(Squares(), eval_batch_size=5, workers=2, timeout_seconds=10)
        assert numbers(loader) == expected
    writer.join()
    assert newest(tmp_path)[0].name == "step-00000009"


def test_bad_samples_are_skipped_in_a_run(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer, _ = fit(tmp_path, Squares([17], corrupt), on_bad_sample="skip")
    assert trainer.train_batches.skipped == trainer.state.epoch == 3
    assert trainer.state.samples == 3 * (SIZE - 1)


@pytest.mark.filterwarnings("ignore:sample")
def test_a_resumed_run_continues_to_count_skipped_samples(tmp_path):
    half, _ = fit(tmp_path, Squares([17], corrupt), epochs=2, on_bad_sample="skip")
    whole, _ = fit(tmp_path, Squares([17], corrupt), resume=half.state_dict(), on_bad_sample="skip")
    assert (half.train_batches.skipped, whole.train_batches.skipped) == (2, 3)


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_second_signal_ends_the_run_at_once_with_its_status(tmp_path, number, raised):
    class Twice(Callback):
        def on_step_start(self, trainer):
            for _ in range(2):
                os.kill(os.getpid(), number)

    with pytest.raises(raised) as caught:
        fit(tmp_path, Squares(), Twice())
    assert number == signal.SIGINT or caught.value.code == 143


def test_data_in_memory_may_have_the_settings_of_workers():
    loader = Loader(TensorSplit(torch.arange(3.0)), on_bad_sample="skip", timeout_seconds=1)
    assert len(list(loader.epoch())) == 1
