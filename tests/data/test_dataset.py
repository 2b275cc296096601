"""Data sets from arrays: targets, splits, standardisation, files."""

import json

import numpy as np
import pytest
import torch

from framework.data.dataset import Data, TensorSplit, check_data
from framework.errors import DataError, SettingError
from framework_plugins.datasets.array_data import ArrayData
from framework_plugins.datasets.readers.arrays import as_batch_of, numbers, read_array
from framework_plugins.datasets.readers.scaling import moments, standardize
from framework_plugins.datasets.readers.splits import split_rows
from framework_plugins.datasets.readers.targets import as_targets


def test_the_kind_of_targets_follows_from_their_values():
    assert as_targets(["cat", "ant", "cat"]).classes == ["ant", "cat"]
    assert as_targets(["cat", "ant", "cat"]).tensor.tolist() == [1, 0, 1]
    assert as_targets([10, 2, 10]).classes == ["2", "10"], "ordered as numbers, not as texts"
    assert as_targets([True, False]).classes == ["False", "True"]
    assert as_targets([[3], [4]]).kind == "class"
    assert as_targets([2.0, 1.0], kind="class").classes == ["1", "2"]
    values = as_targets([0.5, 1.5])
    assert (values.kind, values.out_shape, values.tensor.dtype) == ("value", (1,), torch.float32)
    assert as_targets(range(21)).kind == "value"  # too many different integers for classes
    assert as_targets(range(21), kind="class").out_shape == (21,)
    assert as_targets([[1.0, 2.0], [3.0, 4.0]]).out_shape == (2,)
    labels = as_targets([[1, 0], [1, 1]], kind="labels", classes=["dog", "cat"])
    assert (labels.out_shape, labels.classes) == ((2,), ["dog", "cat"])


@pytest.mark.parametrize(
    ("values", "options", "said"),
    [
        ([1.0, float("nan")], {}, "target of row 2 is nan"),
        (["cat", "cat"], {}, "every target is 'cat'"),
        ([0, 3], {"classes": ["a", "b"]}, "labels range from 0 to 3, but classes has 2 names"),
        ([[0, 2]], {"kind": "labels"}, "must be 0 or 1"),
        ([[0.5, 2]], {"kind": "class"}, "one number or text for each row"),
    ],
)
def test_invalid_targets_are_an_error(values, options, said):
    with pytest.raises(DataError, match=said):
        as_targets(values, **options)


def test_splits_are_disjoint_stratified_and_repeatable():
    strata = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)
    rows = split_rows(strata, 0.2, 0.1, seed=3)
    assert {part: len(r) for part, r in rows.items()} == {"train": 700, "test": 100, "val": 200}
    assert sorted(torch.cat(list(rows.values())).tolist()) == list(range(1000))
    for part, share in (("val", 0.2), ("test", 0.1)):
        counts = torch.bincount(strata[rows[part]], minlength=3)
        assert (counts - share * torch.tensor([900, 90, 10])).abs().max() <= 1.5
    again = split_rows(strata, 0.2, 0.1, seed=3)
    other = split_rows(strata, 0.2, 0.1, seed=4)
    assert all(torch.equal(rows[part], again[part]) for part in rows)
    assert not torch.equal(rows["val"], other["val"])


def test_a_class_of_one_row_stays_in_train():
    rows = split_rows(torch.tensor([0] * 50 + [1]), 0.4, 0.4)
    assert 50 in rows["train"].tolist()


def test_every_split_has_a_row_or_is_an_error():
    assert list(split_rows(torch.zeros(5), 0.0, 0.0)) == ["train"]
    rows = split_rows(torch.zeros(5), 0.1, 0.1)
    assert {part: len(found) for part, found in rows.items()} == {"train": 3, "test": 1, "val": 1}
    with pytest.raises(SettingError, match="expected a sum below 1"):
        split_rows(torch.zeros(5), 0.5, 0.5)
    with pytest.raises(DataError, match="2 rows are too few"):
        split_rows(torch.zeros(2), 0.3, 0.3)


@pytest.mark.parametrize(
    ("shape", "axes", "kept"),
    [((50, 3), 0, (3,)), ((50, 7, 3), (0, 1), (3,)), ((50, 3, 4, 5), (0, 2, 3), (3, 1, 1))],
)
def test_moments_are_per_feature_or_channel(shape, axes, kept):
    array = np.random.default_rng(0).normal(3, 2, shape)
    mean, std = moments(torch.tensor(array))
    np.testing.assert_allclose(np.array(mean), array.mean(axes).reshape(kept), rtol=1e-5)
    np.testing.assert_allclose(np.array(std), array.std(axes).reshape(kept), rtol=1e-5)
    assert moments(torch.tensor(array), per="all")[0] == pytest.approx(array.mean(), rel=1e-5)


def test_a_constant_feature_becomes_zero():
    mean, std = moments(torch.full((1000, 1), 0.1))
    assert standardize(torch.full((2, 1), 0.1), {"mean": mean, "std": std}).abs().max() < 1e-6


def test_statistics_are_measured_on_the_training_split_only():
    rng = np.random.default_rng(0)
    inputs = rng.normal(5, 3, (200, 4))
    targets = rng.integers(0, 3, 200)
    data = ArrayData(inputs, targets, split_seed=1)
    x, y = data.train.tensors
    assert (len(data.train), len(data.val), len(data.test)) == (140, 30, 30)
    assert (x.dtype, y.dtype, x.is_contiguous()) == (torch.float32, torch.int64, True)
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(x.std(0, correction=0), 1, atol=1e-6)
    assert data.val.tensors[0].mean(0).abs().max() > 1e-3
    changed = inputs.copy()
    rows = split_rows(torch.tensor(targets), 0.15, 0.15, 1)
    changed[rows["test"]] += 100
    assert ArrayData(changed, targets, split_seed=1).facts() == data.facts()
    assert json.loads(json.dumps(data.facts())) == data.facts()


def test_an_official_test_split_is_kept():
    x = np.arange(40.0).reshape(20, 2)
    y = np.arange(20) % 2
    data = ArrayData(x, y, test=(x[:3] + 1000, y[:3]), val_fraction=0.0, normalize=False, unit=2.0)
    assert data.val is None
    assert data.test.tensors[0].tolist() == ((x[:3] + 1000) / 2).tolist()
    assert len(data.train) == 20


@pytest.mark.parametrize(
    ("inputs", "targets", "said"),
    [
        (np.zeros((3, 2)), [0, 1], "3 train inputs, but 2 targets"),
        (np.array([["a"], ["b"]]), [0, 1], "got <U1"),
        (np.array([[1.0], [np.nan]]), [0, 1], "row 2 contains NaN or infinity"),
        (np.array([[1.0], [1e300]]), [0, 1], "row 2 contains NaN or infinity"),
        (np.zeros((0, 2)), [], "empty"),
    ],
)
def test_invalid_arrays_are_an_error(inputs, targets, said):
    with pytest.raises(DataError, match=said):
        ArrayData(inputs, targets, name="mine")


def test_every_number_type_is_read():
    for kind in ("bool", "uint8", "int8", "uint16", "uint32", ">i4", "float16", ">f8"):
        array = np.ones((2, 3), kind)
        assert numbers(array, "x").tolist() == array.tolist(), kind


def test_inputs_for_prediction_are_prepared_as_in_training(tmp_path):
    raw = np.random.default_rng(0).normal(5, 3, (200, 4))
    data = ArrayData(raw, np.arange(200) % 2, val_fraction=0, test_fraction=0)
    facts = json.loads(json.dumps(data.facts()))
    np.save(tmp_path / "x.npy", raw)
    assert torch.equal(ArrayData.read_inputs(tmp_path / "x.npy", facts), data.train.tensors[0])
    np.savez(tmp_path / "x.npz", other=raw[:1], x=raw[:7].reshape(7, 2, 2))
    assert torch.equal(ArrayData.read_inputs(tmp_path / "x.npz", facts), data.train.tensors[0][:7])
    np.save(tmp_path / "one.npy", raw[0])
    assert torch.equal(
        ArrayData.read_inputs(tmp_path / "one.npy", facts), data.train.tensors[0][:1]
    )
    with pytest.raises(DataError, match=r"rows have shape \(3,\); the model takes \(4,\)"):
        as_batch_of(torch.zeros(5, 3), facts["in_shape"], tmp_path)


def test_files_without_arrays_are_an_error(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "whole.npz", x=np.arange(10000.0))
    content = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[:5000])
    (tmp_path / "flipped.npz").write_bytes(
        content[:500] + bytes([content[500] ^ 1]) + content[501:]
    )
    (tmp_path / "text.npz").write_text("a,b\n1,2\n")
    (tmp_path / "empty.npz").write_bytes(b"")
    for name in ("objects.npy", "cut.npz", "flipped.npz", "text.npz", "empty.npz"):
        with pytest.raises(DataError, match=f"{name} cannot be read as an array"):
            read_array(tmp_path / name)
    with pytest.raises(DataError, match=r"no such file"):
        read_array(tmp_path / "none.npy")
    with pytest.raises(DataError, match=r"expected a \.npy or \.npz file, got \.csv"):
        read_array(tmp_path / "x.csv")


def test_missing_and_empty_splits_are_an_error():
    data = Data()
    with pytest.raises(DataError, match="no train split"):
        check_data(data)
    data.train = TensorSplit(torch.zeros(2))
    data.val = TensorSplit(torch.zeros(0))
    with pytest.raises(DataError, match="val split of Data is empty"):
        check_data(data)
    with pytest.raises(DataError, match=r"one length .*\[2, 3\]"):
        TensorSplit(torch.zeros(2), torch.zeros(3))
