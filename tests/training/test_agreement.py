"""What the processes of a run agree on, without processes."""

import warnings

import pytest
import torch

from framework.data.foreign_loader import checksum
from framework.errors import DataError
from framework.training.agreement import check_first_batch

INPUTS = torch.arange(6.0).view(3, 2)
TARGETS = torch.tensor([0, 1, 2])


def checksums(*tensors):
    return [checksum(tensor) for tensor in tensors]


def test_equal_first_batches_are_accepted():
    first = checksums(INPUTS, TARGETS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_first_batch([first, checksums(INPUTS.clone(), TARGETS.clone())], warns=True)
        check_first_batch([[], []], warns=True)


def test_other_inputs_with_the_same_targets_are_a_warning():
    first = [checksums(INPUTS, TARGETS), checksums(INPUTS + 1, TARGETS)]
    with pytest.warns(UserWarning, match="process 1 reads other inputs"):
        check_first_batch(first, warns=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_first_batch(first, warns=False)


@pytest.mark.parametrize(
    "other",
    [
        (INPUTS, TARGETS.flip(0)),
        (INPUTS[:2], TARGETS[:2]),
        (INPUTS[:, :1], TARGETS),
        (INPUTS,),
        (),
    ],
)
def test_other_targets_and_shapes_are_an_error(other):
    same = checksums(INPUTS, TARGETS)
    with pytest.raises(DataError, match="process 2 reads other batches than process 0"):
        check_first_batch([same, same, checksums(*other)], warns=True)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(1.0),
        torch.zeros(0, 3),
        torch.ones(2, 3, dtype=torch.bfloat16).T,
        torch.ones(2, dtype=torch.complex64, requires_grad=True),
        torch.eye(3).to_sparse(),
    ],
)
def test_any_tensor_has_a_checksum(tensor):
    assert checksum(tensor).shape == tuple(tensor.shape)
    assert checksum(tensor) == checksum(tensor.clone())
