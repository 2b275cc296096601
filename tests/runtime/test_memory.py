"""Errors for memory that is full."""

import pytest
import torch
from torch import nn

from fits import OPTIMIZERS, SPLIT, Record
from framework import FrameworkError, Trainer
from framework.runtime.memory import OutOfMemory, memory_errors

CPU = torch.device("cpu")
ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "python": MemoryError(),
    "cpu": None,  # the error of an allocation
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_the_error_for_full_memory_has_advice(error):
    with pytest.raises(OutOfMemory, match="micro_batch=auto") as caught, memory_errors(CPU):
        if error is not None:
            raise error
        torch.empty(2**59)
    assert isinstance(caught.value, FrameworkError)
    assert isinstance(caught.value, torch.OutOfMemoryError), "loops that retry can catch it"


def test_other_errors_are_not_changed():
    with pytest.raises(RuntimeError, match="cannot be multiplied") as caught, memory_errors(CPU):
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not isinstance(caught.value, FrameworkError)


def test_a_step_that_does_not_fit_into_memory_ends_the_run_with_an_error():
    class Greedy(nn.Linear):
        def forward(self, x):
            return torch.empty(2**59)

    record = Record()
    model = Greedy(1, 1)
    trainer = Trainer(max_steps=1, device="cpu", loggers=[record])
    with pytest.raises(OutOfMemory):
        trainer.fit(model, SPLIT, task=nn.MSELoss(), optimizer=OPTIMIZERS["sgd"](model))
    assert record.closed == 1
