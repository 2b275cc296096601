"""Data sets in Arrow files: `arrow` and `hf_dataset`."""

import copy
import io
import json
import pickle
import random
import shutil
import wave
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

import framework as fw
from framework.data.content import digests_of
from framework.data.dataset import Loader, splits_of
from framework.data.folds import take_fold
from framework.errors import DataError, FrameworkError
from framework_plugins.datasets.readers.arrow_files import MappedTable, read_column

RNG = np.random.default_rng(0)
ROWS = 60
PETS = Path(__file__).parent / "hf_pets"  # written by `save_to_disk` of datasets 5.2


def write(path, columns, batch_rows=17, stream=False, compression=None):
    """Write columns to an Arrow file in several record batches."""
    table = pa.table(columns)
    options = pa.ipc.IpcWriteOptions(compression=compression)
    opened = pa.ipc.new_stream if stream else pa.ipc.new_file
    with opened(str(path), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=batch_rows)
    return path


def fixed(array):
    """Return an array (rows, ...) as fixed-size lists."""
    column = pa.array(array.reshape(-1))
    for size in reversed(array.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, size)
    return column


def build(path, **settings):
    return fw.datasets.build("arrow", path=path, **settings)


WHOLE = {"val_fraction": 0.0, "test_fraction": 0.0}
RAW = {**WHOLE, "normalize": False}


def all_inputs(split):
    return Loader(split, eval_batch_size=len(split)).epoch().__next__()[0]


@pytest.fixture
def labels():
    return pa.array(np.arange(ROWS) % 3)


@pytest.fixture
def numbers(tmp_path, labels):
    x = RNG.normal(3, 2, (ROWS, 4)).astype(np.float32)
    return write(tmp_path / "numbers.arrow", {"x": fixed(x), "label": labels}), x


# values


@pytest.mark.parametrize(
    "dtype",
    ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "float16", "float32"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_numbers_of_each_type_are_read_from_each_record_batch(tmp_path, labels, dtype, stream):
    info = np.iinfo(dtype) if dtype[0] in "iu" else np.finfo("float16")
    high = min(int(info.max), 2**24)
    x = RNG.integers(0, high, (ROWS, 2, 3)).astype(dtype)
    path = write(tmp_path / "a.arrow", {"x": fixed(x), "label": labels}, stream=stream)
    data = build(path, **RAW)
    assert data.in_shape == (2, 3)
    order = torch.randperm(ROWS)
    inputs, targets = data.train.gather(order)
    np.testing.assert_array_equal(inputs.numpy(), x[order.numpy()].astype(np.float32))
    assert torch.equal(targets, order % 3)


def test_columns_are_joined_in_the_order_of_inputs(tmp_path, labels):
    a = RNG.normal(size=ROWS)
    lists = [[float(i), 1.0] for i in range(ROWS)]
    flags = RNG.random(ROWS) < 0.5
    columns = {"a": a, "b": lists, "c": flags, "text": ["t"] * ROWS, "label": labels}
    path = write(tmp_path / "a.arrow", columns)
    data = build(path, inputs=["c", "b", "a"], **RAW)
    expected = np.column_stack([flags, lists, a]).astype(np.float32)
    np.testing.assert_array_equal(all_inputs(data.train).numpy(), expected)
    assert data.in_shape == (4,)


def test_nested_lists_with_offsets_are_read_by_shape(tmp_path, labels):
    x = RNG.normal(size=(ROWS, 3, 2)).astype(np.float32)
    kind = pa.list_(pa.list_(pa.float32()))
    path = write(tmp_path / "a.arrow", {"x": pa.array(x.tolist(), kind), "label": labels})
    data = build(path, **RAW)
    assert data.in_shape == (3, 2)
    np.testing.assert_array_equal(all_inputs(data.train).numpy(), x)


def test_the_splits_and_the_scaling_are_those_of_npz(tmp_path, numbers):
    path, x = numbers
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(ROWS) % 3)
    expected = fw.datasets.build("npz", path=tmp_path / "a.npz")
    data = build(path)
    for name, split in splits_of(expected).items():
        found = getattr(data, name).gather(torch.arange(len(split)))
        assert torch.equal(found[0], split.tensors[0])
        assert torch.equal(found[1], split.tensors[1])


def test_shape_reshapes_inputs(tmp_path, labels):
    x = RNG.integers(0, 255, (ROWS, 12)).astype(np.uint8)
    path = write(tmp_path / "a.arrow", {"x": fixed(x), "label": labels})
    data = build(path, shape=[1, 3, 4], **RAW)
    assert all_inputs(data.train).shape == (ROWS, 1, 3, 4)
    with pytest.raises(DataError, match="rows of 12 numbers cannot be reshaped"):
        build(path, shape=[5])


def test_token_ids_of_unequal_length_are_padded(tmp_path, labels):
    ids = [list(range(1, 2 + row % 5)) for row in range(ROWS)]
    path = write(tmp_path / "a.arrow", {"ids": ids, "label": labels})
    data = build(path, max_length=4, **WHOLE)
    assert data.in_shape == (4,)
    inputs, _ = data.train.gather(torch.tensor([0, 4, 2]))
    assert inputs.tolist() == [[1, 0, 0, 0], [1, 2, 3, 4], [1, 2, 3, 0]]
    part, _ = data.train.gather_part(torch.tensor([0]), torch.tensor([0, 2]))
    assert part.tolist() == [[1, 0, 0]], "padded like the whole batch of several processes"


def test_token_ids_are_batched_like_those_in_memory(tmp_path, labels):
    ids = [[1 + row % 3] * (1 + row * 7 % 5) for row in range(ROWS)]
    path = write(tmp_path / "a.arrow", {"ids": ids, "label": labels})
    data = build(path, bucket=2, **WHOLE)
    in_memory = fw.RaggedSplit([torch.tensor(row) for row in ids], torch.arange(ROWS) % 3, bucket=2)
    settings = {"batch_size": 8, "shuffle": True, "seed": 3}
    expected = list(Loader(in_memory, **settings).epoch(1))
    found = list(Loader(data.train, **settings).epoch(1))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_texts_are_encoded(tmp_path, labels):
    texts = [f"word{row % 4} common" for row in range(ROWS)]
    path = write(tmp_path / "a.arrow", {"text": texts, "label": labels})
    data = build(path, max_length=3, **WHOLE)
    tokens, target = data.train[5]
    assert data.tokenizer.decode(tokens.tolist()) == "word1 common"
    assert (tokens.shape, int(target)) == ((3,), 2)


def png(pixels):
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "png")
    return content.getvalue()


def test_images_are_decoded(tmp_path, labels):
    pixels = RNG.integers(0, 255, (ROWS, 5, 5, 3)).astype(np.uint8)
    path = write(tmp_path / "a.arrow", {"image": [png(one) for one in pixels], "label": labels})
    data = build(path, size=5, **RAW)
    np.testing.assert_allclose(data.train[7][0] * 255, pixels[7].transpose(2, 0, 1), atol=1e-4)
    assert torch.equal(data.train.labels, torch.arange(ROWS) % 3)


def wav(samples):
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(samples.astype("<i2").tobytes())
    return content.getvalue()


def test_sounds_are_decoded(tmp_path, labels):
    samples = RNG.integers(-999, 999, (ROWS, 80))
    path = write(tmp_path / "a.arrow", {"sound": [wav(one) for one in samples], "label": labels})
    data = build(path, sample_rate=8000, seconds=0.01)
    assert data.in_shape == (2, 80)
    rows = data.rows["train"]
    torch.testing.assert_close(data.train[3][0][0], torch.tensor(samples[rows[3]] / 2**15).float())
    with pytest.raises(DataError, match="8000 samples per second, expected 16000"):
        build(path).train[0]


# targets and parts


def test_targets_may_be_texts_values_or_vectors(tmp_path, numbers):
    x = fixed(numbers[1])
    names = ["no", "yes"] * (ROWS // 2)
    values = RNG.normal(100, 5, ROWS)
    vectors = RNG.normal(size=(ROWS, 2)).astype(np.float32)
    coded = pa.array(names).dictionary_encode()
    columns = {"x": x, "names": names, "coded": coded, "v": values, "w": fixed(vectors)}
    path = write(tmp_path / "t.arrow", columns, batch_rows=ROWS)
    for target in ("names", "coded"):
        data = build(path, inputs=["x"], target=target, **WHOLE)
        assert (data.classes, data.target) == (["no", "yes"], "class")
        assert torch.equal(data.train.labels, torch.arange(ROWS) % 2)
    data = build(path, inputs=["x"], target="v", scale_target="standard", **WHOLE)
    assert data.target == "value"
    restored = data.scale.inverse_transform(data.train.labels)[:, 0]
    np.testing.assert_allclose(restored.numpy(), values, rtol=1e-5)
    data = build(path, inputs=["x"], target="w", **WHOLE)
    np.testing.assert_array_equal(data.train.labels.numpy(), vectors)


def test_a_folder_may_have_official_parts_and_shards(tmp_path, labels):
    x = fixed(RNG.normal(size=(ROWS, 2)).astype(np.float32))
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation", "test"):
        write(folder / f"{name}.arrow", {"x": x, "label": labels})
    data = build(folder)
    assert [len(split) for split in splits_of(data).values()] == [2 * ROWS, ROWS, ROWS]
    rows = torch.tensor([ROWS + 3, 3, 2 * ROWS - 1])
    inputs, _ = data.train.gather(rows)
    assert torch.equal(inputs[0], inputs[1])
    single = build(folder / "test.arrow", val_path=folder / "validation.arrow", test_fraction=0.0)
    assert [len(split) for split in splits_of(single).values()] == [ROWS, ROWS]


def test_a_folder_of_hugging_face_is_read_without_its_package():
    data = fw.datasets.build("hf_dataset", path=PETS, size=4, color="gray", normalize=False)
    assert [len(split) for split in splits_of(data).values()] == [8, 2, 2]
    assert data.classes == ["cat", "dog"]
    assert data.train.labels.tolist() == [0, 1] * 4
    # The first pixels that numpy.random.default_rng(0) draws.
    expected = np.random.default_rng(0).integers(0, 255, (4, 4), dtype=np.uint8)
    np.testing.assert_allclose(data.train[0][0][0] * 255, expected, atol=1e-4)
    with pytest.raises(DataError, match="use data=hf_dataset"):
        build(PETS)


def test_a_folder_of_hugging_face_names_only_its_own_files(tmp_path):
    folder = tmp_path / "pets"
    shutil.copytree(PETS / "test", folder)
    assert len(fw.datasets.build("hf_dataset", path=folder, **WHOLE).train) == 2
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"] = [{"filename": "../../secret.arrow"}]
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match="is not the name of a file"):
        fw.datasets.build("hf_dataset", path=folder)
    (folder / "state.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"state\.json is not JSON"):
        fw.datasets.build("hf_dataset", path=folder)


# reading


def test_batches_do_not_depend_on_the_start(numbers):
    data = build(numbers[0])
    loader = Loader(data.train, batch_size=5, shuffle=True)
    assert loader.description == "memory-mapped, 9 batches per read"
    expected = list(loader.epoch(2))
    for start in (0, 1, 5, 8):
        found = list(loader.epoch(2, start))
        assert len(found) == len(expected) - start
        for one, other in zip(expected[start:], found, strict=True):
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1], other[1])
    loader.bytes_per_read = 1  # batch by batch
    for one, other in zip(expected, loader.epoch(2), strict=True):
        assert torch.equal(one[0], other[0])


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_decode_the_same_images(tmp_path, workers):
    data = fw.datasets.build("hf_dataset", path=PETS, size=4)
    expected = Loader(data.train, batch_size=3, shuffle=True).epoch(1)
    found = Loader(data.train, batch_size=3, shuffle=True, workers=workers).epoch(1)
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_splits_can_be_copied_and_pickled(tmp_path, numbers, labels):
    texts = [f"word{row % 4}" for row in range(ROWS)]
    path = write(tmp_path / "texts.arrow", {"text": texts, "label": labels})
    for data in (build(numbers[0]), build(path)):
        for split in (pickle.loads(pickle.dumps(data.train)), copy.deepcopy(data).train):
            assert torch.equal(split[4][0], data.train[4][0])


def test_a_fold_measures_its_own_rows(numbers):
    data = build(numbers[0], test_fraction=0.0)
    take_fold(data, "1/3")
    assert [len(data.train), len(data.val)] == [40, 20]
    inputs, _ = data.train.gather(torch.arange(40))
    torch.testing.assert_close(inputs.mean(0), torch.zeros(4), atol=1e-5, rtol=0)


def test_the_content_is_that_of_the_file(tmp_path, numbers):
    path, x = numbers
    moved = tmp_path / "moved.arrow"
    shutil.copy(path, moved)
    assert digests_of(build(moved)) == digests_of(build(path))
    write(moved, {"x": fixed(x + 1), "label": pa.array(np.arange(ROWS) % 3)})
    assert digests_of(build(moved)) != digests_of(build(path))


def test_inputs_to_predict_are_those_of_training(tmp_path, numbers, labels):
    path, x = numbers
    data = build(path)
    facts = json.loads(json.dumps(data.facts()))
    inputs = type(data).read_inputs(path, facts)
    assert torch.equal(inputs[data.rows["test"]], data.test.gather(torch.arange(len(data.test)))[0])
    np.save(tmp_path / "x.npy", x)
    assert torch.equal(type(data).read_inputs(tmp_path / "x.npy", facts), inputs)
    pets = fw.datasets.build("hf_dataset", path=PETS, size=4)
    file = PETS / "test/data-00000-of-00001.arrow"
    inputs = type(pets).read_inputs(file, json.loads(json.dumps(pets.facts())))
    assert torch.equal(inputs[1], pets.test[1][0])
    ids = write(tmp_path / "ids.arrow", {"ids": [[1, 2], [3]] * 30, "label": labels})
    facts = build(ids).facts()
    assert type(data).read_inputs(ids, facts)[:2].tolist() == [[1, 2], [3, 0]]


# errors


def test_wrong_columns_are_named(tmp_path, numbers, labels):
    path = numbers[0]
    wrong_target = "^data.target=lable: expected a column .* in .*; did you mean 'label'"
    with pytest.raises(DataError, match=wrong_target):
        build(path, target="lable")
    with pytest.raises(DataError, match=r"^data\.inputs=\[x,y\]: expected a column 'y' in "):
        build(path, inputs=["x", "y"])
    with pytest.raises(DataError, match="is the target"):
        build(path, inputs=["x", "label"])
    mixed = {"a": [1.0] * ROWS, "text": ["t"] * ROWS, "label": labels}
    several = write(tmp_path / "b.arrow", mixed)
    with pytest.raises(DataError, match=r"data\.inputs=\[text,a\]"):
        build(several)
    with pytest.raises(DataError, match=wrong_target):
        build(several, target="lable")
    with pytest.raises(DataError, match="expected one column of texts"):
        build(several, inputs=["a", "text"])
    ragged = {"a": [[1.0] * (1 + row % 2) for row in range(ROWS)], "label": labels}
    with pytest.raises(DataError, match=r"^data\.inputs=\[a\]: .* got lists of 1 to 2 items"):
        build(write(tmp_path / "c.arrow", ragged))
    dates = {"a": pa.array([0] * ROWS, pa.timestamp("s")), "label": labels}
    path = write(tmp_path / "d.arrow", dates)
    with pytest.raises(DataError, match=r"^data\.inputs=\[a\]: expected numbers, texts, bytes"):
        build(path, inputs=["a"])
    with pytest.raises(DataError, match=r"^data\.target=a: expected numbers or texts .* timestamp"):
        build(path, inputs=["label"], target="a")


def test_empty_cells_and_nan_are_errors(tmp_path, labels):
    values = [1.0] * ROWS
    empty = write(tmp_path / "a.arrow", {"a": [*values[1:], None], "label": labels})
    with pytest.raises(DataError, match="column 'a' has 1 empty cells"):
        build(empty)
    invalid = write(tmp_path / "b.arrow", {"a": [*values[1:], float("nan")], "label": labels})
    with pytest.raises(DataError, match=f"row {ROWS} has NaN"):
        build(invalid, **WHOLE)
    inner = pa.array([[1.0, None]] * ROWS, pa.list_(pa.float64(), 2))
    with pytest.raises(DataError, match="empty cells"):
        build(write(tmp_path / "c.arrow", {"a": inner, "label": labels}))


def test_a_compressed_file_is_refused_with_advice(tmp_path, numbers, labels):
    columns = {"x": fixed(numbers[1]), "label": labels}
    path = write(tmp_path / "z.arrow", columns, compression="zstd", batch_rows=ROWS)
    with pytest.raises(DataError, match=r"compressed.*framework data convert"):
        build(path)


def test_a_missing_or_foreign_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.arrow: no such file"):
        build(tmp_path / "none.arrow")
    for content in (b"", b"x", b"ARROW1\0\0", b"a,b\n1,2\n" * 100):
        (tmp_path / "bad.arrow").write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.arrow"):
            build(tmp_path / "bad.arrow")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no files"):
        build(tmp_path / "empty")


def test_offsets_out_of_the_data_are_an_error_of_the_row(tmp_path, labels):
    ids = [[7] * 5] * ROWS
    path = write(tmp_path / "a.arrow", {"ids": ids, "label": labels}, batch_rows=ROWS)
    content = bytearray(path.read_bytes())
    offsets = np.arange(0, 5 * ROWS + 1, 5, dtype=np.int32).tobytes()
    place = content.index(offsets)
    for wrong in (2**31 - 1, -5):
        content[place + 40 : place + 44] = np.int32(wrong).tobytes()
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.arrow is damaged: column 'ids' of row 1"):
            build(path)


@pytest.mark.parametrize("stream", [False, True])
def test_a_damaged_file_is_an_error_or_read_within_its_bounds(tmp_path, labels, stream):
    columns = {
        "x": fixed(RNG.normal(size=(ROWS, 4)).astype(np.float32)),
        "ids": [[1] * (1 + row % 3) for row in range(ROWS)],
        "text": ["word"] * ROWS,
        "label": labels,
    }
    original = write(tmp_path / "a.arrow", columns, stream=stream).read_bytes()
    path = tmp_path / "b.arrow"
    rng = random.Random(0)
    outcomes = set()
    messages = []
    for number in range(150):
        content = bytearray(original)
        if number % 3 == 0:
            del content[rng.randrange(len(content)) :]
        for _ in range(rng.choice([1, 4, 16])):
            if content:
                content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        for inputs in (["x"], ["ids"], ["text"]):
            try:
                data = build(path, inputs=inputs, tokenizer="byte", **RAW)
                for row in range(0, len(data.train), 7):
                    data.train[row]
                outcomes.add("read")
            except FrameworkError as error:
                messages.append(str(error))
                outcomes.add("refused")
    assert not any("\n" in message for message in messages)
    assert outcomes == {"read", "refused"}


def test_a_column_that_is_read_as_a_whole_is_checked_completely(tmp_path):
    path = write(tmp_path / "a.arrow", {"t": ["abcd"] * ROWS, "x": range(ROWS)}, batch_rows=ROWS)
    content = bytearray(path.read_bytes())
    place = content.index(np.arange(0, 4 * ROWS + 1, 4, dtype=np.int32).tobytes())
    content[place + 40 : place + 44] = np.int32(2**31 - 1).tobytes()
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a readable Arrow IPC file"):
        read_column(MappedTable([path], ["x"]).files, "t")
