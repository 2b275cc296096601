"""The time of each process of a run, and what it sends, on two processes."""

import time

import pytest
import torch
from torch import distributed, nn

import framework as fw
from distributed_runs import run_in_processes
from fits import SPLIT, VAL, Record, smooth_network
from framework.contracts.strategy import Memory, Strategy
from framework.runtime.clock import COMMUNICATION
from framework.training.process_times import PROCESS_SCALARS, ProcessTimes

EPOCHS = 3
STEPS = 15  # of 70 samples in batches of 16


class Slow(fw.Callback):
    """Waits in each step of one process."""

    def __init__(self, rank):
        self.rank = rank

    def on_step_start(self, trainer):
        if trainer.strategy.rank == self.rank:
            time.sleep(0.01)


class SlowData(torch.utils.data.Dataset):
    """Takes time for each sample in one process."""

    def __init__(self, rank):
        self.rank = rank

    def __len__(self):
        return len(SPLIT)

    def __getitem__(self, index):
        if distributed.get_rank() == self.rank:
            time.sleep(0.001)
        return SPLIT[index]


class Sent(fw.Callback):
    """Counts the bytes of the gradients that the process passes to `all_reduce` in a step."""

    def __init__(self):
        self.bytes = 0

    def on_fit_start(self, trainer):
        self.all_reduce = distributed.all_reduce
        distributed.all_reduce = self.counted

    def on_fit_end(self, trainer):
        distributed.all_reduce = self.all_reduce

    def counted(self, tensor, *args, **kwargs):
        if tensor.dtype == torch.float32:  # counters are float64
            self.bytes += tensor.nbytes
        return self.all_reduce(tensor, *args, **kwargs)


def fit(strategy=None, *callbacks, data=SPLIT):
    model = smooth_network()
    record = Record()
    trainer = fw.Trainer(
        max_epochs=EPOCHS,
        log_every="5steps",
        device="cpu",
        strategy=strategy or Strategy(),
        callbacks=callbacks,
        loggers=[record],
    )
    optimizer = torch.optim.AdamW(model.parameters())
    task = nn.CrossEntropyLoss()
    trainer.fit(model, data, val=VAL, task=task, optimizer=optimizer, batch_size=16)
    trainer.record = record
    return trainer


def memory_of(model):
    size = sum(parameter.nbytes for parameter in model.parameters())
    return Memory(size, 0, size, 2 * size, 0)


def local_bytes(tensors):
    return sum(tensor.to_local().nbytes for tensor in tensors)


def two_processes():
    """Return what the tests below check."""
    fw.discover()
    sent = Sent()
    trainer = fit(fw.strategies.build("ddp"), Slow(1), sent)
    times = trainer.process_times
    slow_data = fit(fw.strategies.build("ddp"), data=SlowData(0)).process_times

    sharded = fit(fw.strategies.build("fsdp", units=["0"]))
    parameters = list(sharded.model.parameters())
    state = [sharded.optimizer.state[each]["exp_avg"] for each in parameters]
    return {
        "slowest": times.slowest(),
        "slower": times.slower(),
        "by data": times.is_slow_by_data(),
        "waiting": times.waiting(),
        "work": times.work(),
        "elapsed": times.seconds,
        "share": trainer.clock.shares()[COMMUNICATION],
        "records": trainer.record.lines,
        "samples": trainer.state.samples,
        "slow data": (slow_data.slowest(), slow_data.is_slow_by_data()),
        "sent": sent.bytes,
        "sharded": (local_bytes(parameters), 2 * local_bytes(state)),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_in_processes(two_processes, 2, tmp_path_factory.mktemp("processes"))


def test_all_processes_know_the_slowest_one(ranks):
    for found in ranks:
        assert found["slowest"] == 1
        assert found["slower"] > 0.1
        assert not found["by data"]
        assert found["waiting"][1] == 0
        assert STEPS * 0.005 < found["waiting"][0] < found["elapsed"][0]
        assert found["work"][1] > STEPS * 0.01
    assert ranks[0]["elapsed"] == ranks[1]["elapsed"]
    assert ranks[0]["share"] > ranks[1]["share"] > 0


def test_a_process_that_waits_for_data_is_named_as_such(ranks):
    assert [found["slow data"] for found in ranks] == [(0, True)] * 2


def test_the_main_process_logs_the_shares_and_the_samples_of_all(ranks):
    names = {f"train/{name}" for name in PROCESS_SCALARS}
    rows = [values for _, values in ranks[0]["records"] if "train/loss" in values]
    assert len(rows) == EPOCHS
    for values in rows:
        assert names <= values.keys()
        assert 0 < values["train/communication"] + values["train/waiting"] < 1
        assert values["train/slowest_process"] == 1
    assert ranks[1]["records"] == []
    assert [found["samples"] for found in ranks] == [EPOCHS * len(SPLIT)] * 2


def test_one_process_logs_no_shares():
    trainer = fit()
    assert trainer.process_times is None
    assert COMMUNICATION not in trainer.clock.shares()
    for _, values in trainer.record.lines:
        assert not values.keys() & {f"train/{name}" for name in PROCESS_SCALARS}


def test_the_estimate_of_ddp_is_what_a_process_sends(ranks):
    model = smooth_network()
    estimate = fw.strategies.build("ddp").estimate(model, memory_of(model), 2)
    passed_on = STEPS * estimate.sent  # with two processes: 2 (N - 1) / N = 1
    others = 1 + len(list(model.parameters()))  # float32: the loss, and which gradients exist
    assert {found["sent"] for found in ranks} == {passed_on + STEPS * 4 * others}


def test_the_estimate_of_fsdp_is_the_memory_of_a_process(ranks):
    model = smooth_network()
    estimate = fw.strategies.build("fsdp", units=["0"]).estimate(model, memory_of(model), 2)
    assert ranks[0]["sharded"] == (estimate.memory.parameters, estimate.memory.optimizer)


def test_times_name_the_slowest_process_and_the_waiting_of_the_others():
    times = ProcessTimes([10.0, 10.0, 10.0], [4.0, 1.0, 4.0], [0.0, 2.5, 0.5])
    assert times.slowest() == 1
    assert times.slower() == pytest.approx(9 / 7 - 1)
    assert times.is_slow_by_data()
    assert times.waiting() == [3.0, 0.0, 3.0]
    assert times.transfer_share() == pytest.approx(0.1)
    assert times.waiting_share() == pytest.approx(0.2)
