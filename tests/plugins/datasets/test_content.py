"""The digest of the content of data does not depend on paths, but on each sample."""

import os
import time

import numpy
import pytest
import torch
from test_data_copies import BUILDERS
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from framework.data import content
from framework.data.content import digest_of, digests_of
from framework.data.dataset import Data, TensorSplit


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_data_at_another_path_has_the_same_content(build, tmp_path, monkeypatch):
    found = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr("test_images.RNG", numpy.random.default_rng(0))  # the same images
        found.append(digests_of(build(tmp_path / name)))
    assert found[0] == found[1]
    assert all(digest.startswith("sha256:") for digest in found[0].values())
    assert len(set(found[0].values())) > 1


NUMBERS = torch.arange(12.0).view(6, 2)
CLASSES = torch.arange(6) % 2


class Files(Dataset):
    def __init__(self, files):
        self.files = files

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return torch.tensor(list(self.files[index].read_bytes()))

    def content(self):
        return list(self.files)


OTHERS = {
    "one_bit": (NUMBERS.nextafter(torch.tensor(99.0)), CLASSES),
    "negative_zero": (torch.where(NUMBERS == 0, -0.0, NUMBERS), CLASSES),
    "order": (NUMBERS.flip(0), CLASSES.flip(0)),
    "labels": (NUMBERS, 1 - CLASSES),
    "shape": (NUMBERS.view(6, 1, 2), CLASSES),
    "dtype": (NUMBERS.int(), CLASSES),
    "fewer": (NUMBERS[:5], CLASSES[:5]),
    "more": (NUMBERS, CLASSES, CLASSES),
}


@pytest.mark.parametrize("tensors", OTHERS.values(), ids=OTHERS)
def test_other_samples_have_another_digest(tensors):
    assert digest_of(TensorSplit(*tensors)) != digest_of(TensorSplit(NUMBERS, CLASSES))
    assert digest_of(TensorSplit(NUMBERS.clone(), CLASSES)) == digest_of(
        TensorSplit(NUMBERS, CLASSES)
    )


def test_a_digest_does_not_depend_on_the_memory_of_a_tensor(monkeypatch):
    before = digest_of(TensorSplit(NUMBERS, CLASSES))
    strided = NUMBERS.t().contiguous().t()
    assert digest_of(TensorSplit(strided, CLASSES)) == before
    long = torch.arange(1000)
    monkeypatch.setattr(content, "CHUNK_BYTES", 64)
    assert digest_of(TensorSplit(long)) == digest_of(TensorSplit(long.clone()))
    assert digest_of(TensorSplit(long)) != digest_of(TensorSplit(long.flip(0)))


def test_the_digest_of_files_depends_on_their_content_only(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    for number in range(200):
        (tmp_path / f"a/{number:03}").write_bytes(bytes([number] * 3))
        (tmp_path / f"b/other{number:03}").write_bytes(bytes([number] * 3))
    first, second = (Files(sorted((tmp_path / folder).iterdir())) for folder in ("a", "b"))
    assert digest_of(first) == digest_of(second)
    assert digest_of(Files(second.files[::-1])) != digest_of(first)
    second.files[150].write_bytes(bytes([150, 150, 151]))
    assert digest_of(second) != digest_of(first)


def test_files_that_are_missing_or_too_large_have_no_digest(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"123")
    assert digest_of(Files([tmp_path / "a"])) is not None
    assert digest_of(Files([tmp_path / "b"])) is None
    monkeypatch.setattr(content, "MOST_FILE_BYTES", 2)
    assert digest_of(Files([tmp_path / "a"])) is None


def test_the_content_of_torch_data_sets_is_that_of_their_parts():
    plain = TensorDataset(NUMBERS, CLASSES)
    assert digest_of(Subset(plain, [0, 1])) == digest_of(
        Subset(TensorSplit(NUMBERS, CLASSES), [0, 1])
    )
    assert digest_of(Subset(plain, [0, 1])) != digest_of(Subset(plain, [1, 0]))
    assert digest_of(ConcatDataset([plain, plain])) != digest_of(plain)


def test_a_split_with_its_own_getitem_has_no_digest_without_a_content_method():
    class Own(TensorSplit):
        def __getitem__(self, index):
            return super().__getitem__(index)

    class WithContent(Own):
        def content(self):
            return [*self.tensors, "mine", {"scale": 2.0}]

    for unknown in (
        Own(NUMBERS),
        [NUMBERS],
        Subset(Own(NUMBERS), [0]),
        TensorSplit(NUMBERS.to_sparse()),
    ):
        assert digest_of(unknown) is None
    assert digest_of(WithContent(NUMBERS)) is not None


def test_a_digest_is_computed_once():
    data = Data()
    data.train = TensorSplit(NUMBERS, CLASSES)
    first = digests_of(data)
    data.train = None
    assert digests_of(data) is first


def test_a_digest_is_fast(tmp_path):
    """For 5,000 files and 40 MB of numbers; other programs may run at the same time."""
    names = [tmp_path / f"{number:04}" for number in range(5000)]
    for name in names:
        name.write_bytes(os.urandom(500))
    table = TensorSplit(torch.rand(1_000_000, 10))
    began = time.process_time()
    assert digest_of(Files(names)) is not None
    assert digest_of(table) is not None
    assert time.process_time() - began < 3.0


def test_a_pipe_has_no_digest_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")

    class Files:
        def content(self):
            return [tmp_path / "fifo"]

    assert digest_of(Files()) is None
