"""`data.batch=dict`: a batch of an Arrow file has its columns by name."""

import copy
import json
import pickle
import random
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from torch import nn

import framework as fw
from fits import Record
from framework.data.content import digests_of
from framework.data.dataset import Loader
from framework.data.folds import take_fold
from framework.errors import DataError
from framework.runs import checkpoint
from runs import cut_off_at, logged, run_training

ROWS = 90
DRAW = random.Random(0)
LENGTHS = [DRAW.randint(2, 9) for _ in range(ROWS)]
IDS = [[DRAW.randint(1, 50) for _ in range(length)] for length in LENGTHS]
POINTS = [[DRAW.gauss(5, 3), DRAW.gauss(0, 1)] for _ in range(ROWS)]
COLUMNS = {
    "input_ids": IDS,
    "attention_mask": [[1] * length for length in LENGTHS],
    "point": pa.array(POINTS, pa.list_(pa.float32())),
    "is_long": [length > 5 for length in LENGTHS],
    "label": [length % 3 for length in LENGTHS],
}
INPUTS = ["input_ids", "attention_mask"]
WHOLE = {"val_fraction": 0.0, "test_fraction": 0.0}
PLUGIN = '''
from torch import nn

import framework as fw


@fw.models.register("masked_mean")
class MaskedMean(nn.Module):
    """The mean of the embeddings under a mask."""

    def __init__(self, in_shape: fw.Shape, out_shape: fw.Shape, width: int = 8):
        super().__init__()
        self.embedding = nn.Embedding(51, width)
        self.head = nn.Linear(width, out_shape[0])

    def forward(self, input_ids, attention_mask):
        mask = attention_mask.unsqueeze(-1).float()
        vectors = self.embedding(input_ids) * mask
        return self.head(vectors.sum(1) / mask.sum(1))
'''

MIXED = '''
import torch
from torch import nn

import framework as fw


@fw.models.register("mixed")
class Mixed(nn.Module):
    """A linear layer over the mean token id and three columns."""

    def __init__(self, in_shape: fw.Shape, out_shape: fw.Shape):
        super().__init__()
        self.head = nn.Linear(5, out_shape[0])

    def forward(self, input_ids, attention_mask, point, age, is_long):
        mean = (input_ids * attention_mask).sum(1) / attention_mask.sum(1)
        columns = [mean / 50, age, is_long.float()]
        return self.head(torch.cat([point, torch.stack(columns, 1)], 1))
'''


def write(path, columns):
    table = pa.table(columns)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=17)
    return path


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "rows.arrow", COLUMNS)


def build(path, inputs=INPUTS, **settings):
    return fw.datasets.build("arrow", path=path, inputs=inputs, batch="dict", **settings)


def epoch(split):
    return list(Loader(split, batch_size=8, shuffle=True, seed=3).epoch(1))


def test_each_column_is_a_field(path):
    data = build(path, [*INPUTS, "point", "is_long"], normalize=False, **WHOLE)
    assert (data.in_shape, data.out_shape) == ((9,), (3,))
    batch = data.train.gather(torch.arange(ROWS))
    assert list(batch) == [*INPUTS, "point", "is_long", "label"]
    padded = torch.tensor([ids + [0] * (9 - len(ids)) for ids in IDS])
    assert torch.equal(batch["input_ids"], padded)
    assert torch.equal(batch["attention_mask"], (padded > 0).long())
    assert torch.equal(batch["point"], torch.tensor(POINTS))
    assert torch.equal(batch["is_long"], torch.tensor(COLUMNS["is_long"]).long())
    assert torch.equal(batch["label"], torch.tensor(COLUMNS["label"]))
    assert data.train[4]["input_ids"].tolist() == IDS[4]


def test_a_folder_of_hugging_face_has_the_same_fields(path, tmp_path):
    folder = tmp_path / "saved"
    folder.mkdir()
    path.rename(folder / "data-00000-of-00001.arrow")
    files = [{"filename": "data-00000-of-00001.arrow"}]
    (folder / "state.json").write_text(json.dumps({"_data_files": files}))
    data = fw.datasets.build("hf_dataset", path=folder, inputs=INPUTS, batch="dict", **WHOLE)
    batch = data.train.gather(torch.arange(4))
    assert batch["attention_mask"].sum(1).tolist() == LENGTHS[:4]
    assert batch["label"].tolist() == COLUMNS["label"][:4]


def test_lists_are_batched_like_token_ids_of_a_tuple(path):
    alone = fw.datasets.build("arrow", path=path, inputs=["input_ids"], bucket=2, **WHOLE)
    data = build(path, bucket=2, **WHOLE)
    for batch, (ids, labels) in zip(epoch(data.train), epoch(alone.train), strict=True):
        assert torch.equal(batch["input_ids"], ids)
        assert torch.equal(batch["attention_mask"], (ids > 0).long())
        assert torch.equal(batch["label"], labels)


def test_numbers_are_standardized_like_those_of_a_tuple(path):
    alone = fw.datasets.build("arrow", path=path, inputs=["point"], **WHOLE)
    data = build(path, [*INPUTS, "point"], bucket=0, **WHOLE)
    for batch, (points, _) in zip(epoch(data.train), epoch(alone.train), strict=True):
        assert torch.equal(batch["point"], points)


def test_lists_are_cut_to_max_length(path):
    data = build(path, max_length=4, **WHOLE)
    batch = data.train.gather(torch.arange(ROWS))
    assert data.in_shape == (4,)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (ROWS, 4)


class WithMask(nn.Module):
    """Makes the mask of token ids itself, for batches that are tuples."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids, (input_ids > 0).long())


def test_training_is_the_same_as_with_tuples(path, forget_plugins, one_thread):
    names = {"__name__": "framework_plugin_masked_mean"}
    exec(PLUGIN, names)

    def fitted(data, model, **task):
        record = Record()
        trainer = fw.Trainer(max_steps=20, loggers=[record], log_every="1step")
        with trainer:
            trainer.fit(
                model,
                Loader(data.train, batch_size=8, shuffle=True),
                task=fw.tasks.build("classification", **task),
                optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
            )
        return record.of("train/loss"), model.parameters()

    model = names["MaskedMean"]((9,), (3,))
    alone = fw.datasets.build("arrow", path=path, inputs=["input_ids"], **WHOLE)
    expected, expected_weights = fitted(alone, WithMask(copy.deepcopy(model)))
    losses, weights = fitted(build(path, **WHOLE), model, inputs=INPUTS, target="label")
    assert losses == expected
    assert len(set(losses)) == 20
    for one, other in zip(weights, expected_weights, strict=True):
        assert torch.equal(one, other)


def test_a_run_resumes_bit_for_bit(command, path, forget_plugins, one_thread, monkeypatch):
    Path("conf/experiment").mkdir(parents=True)
    Path("conf/experiment/masked.yaml").write_text("plugins: [masked_mean.py]\n")
    Path("masked_mean.py").write_text(PLUGIN)
    inputs = f"[{','.join(INPUTS)}]"
    line = ["experiment=masked", "data=arrow", f"data.path={path}", f"data.inputs={inputs}"]
    line += ["data.batch=dict", "model=masked_mean", f"task.inputs={inputs}", "task.target=label"]
    line += ["loader.batch_size=8", "trainer.max_epochs=3", "callbacks=[checkpoint]"]
    line += ["callbacks.checkpoint.every=1step"]
    whole = run_training(*line, "run.name=whole").folder
    with cut_off_at(11, monkeypatch):
        run_training(*line, "run.name=part")
    part = Path("runs/masked/part")
    assert max((part / "checkpoints").glob("step-*")).name == "step-00000011"
    status, _, err = command("resume runs/masked/part")
    assert status == 0, err
    assert logged(part)[-1] == logged(whole)[-1]
    last = [max((run / "checkpoints").glob("step-*")) for run in (part, whole)]
    weights = [checkpoint.load(folder)[0] for folder in last]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
    status, out, err = command(f"predict runs/masked/part --input {path} --output -")
    assert len(out.splitlines()) == 1 + ROWS, err
    classes = fw.load(part).predict([path, path])["class"]
    assert classes == [line.split(",")[1] for line in out.splitlines()[1:]] * 2
    status, out, err = command(f"eval runs/masked/part --data {path}")
    assert "data/accuracy" in out, err


def test_an_export_takes_the_columns_of_the_model_as_they_are(command, tmp_path, forget_plugins):
    Path("conf/experiment").mkdir(parents=True)
    Path("conf/experiment/mixed.yaml").write_text("plugins: [mixed.py]\n")
    Path("mixed.py").write_text(MIXED)
    ages = pa.array([DRAW.gauss(40, 9) for _ in range(ROWS)], pa.float64())
    unused = [[1.0, 2.0]] * ROWS
    path = write(tmp_path / "rows.arrow", {**COLUMNS, "age": ages, "unused": unused})
    inputs = "task.inputs=[input_ids,attention_mask,point,age,is_long]"
    line = ["experiment=mixed", "data=arrow", f"data.path={path}", "data.batch=dict"]
    run = run_training(*line, "model=mixed", inputs, "task.target=label").folder
    for form in ("safetensors", "torch_export"):
        status, _, err = command(f"export {run} --to {form} --output {form}")
        assert status == 0, err
    about = json.loads(Path("torch_export/metadata.json").read_text())["inputs"]
    assert list(about) == ["input_ids", "attention_mask", "point", "age", "is_long"]
    assert [about[name]["shape"] for name in about] == [
        ["batch", "8 to 9"],
        ["batch", "8 to 9"],
        ["batch", 2],
        ["batch"],
        ["batch"],
    ]
    padded = torch.tensor([ids + [0] * (9 - len(ids)) for ids in IDS])
    raw = [padded, (padded > 0).long(), torch.tensor(POINTS)]
    raw += [torch.tensor(ages.to_pylist()), torch.tensor(COLUMNS["is_long"]).long()]
    program = torch.export.load("torch_export/model.pt2").module()
    index, probability, _ = program(*raw)
    status, out, err = command(f"predict {run} --input {path} --output - --format jsonl")
    assert status == 0, err
    rows = [json.loads(row) for row in out.splitlines()]
    assert index.tolist() == [row["class_index"] for row in rows]
    expected = torch.tensor([row["probability"] for row in rows])
    torch.testing.assert_close(probability, expected, atol=1e-6, rtol=1e-5)
    loaded = fw.load(run)
    columns = {name: list(column) for name, column in COLUMNS.items() if name != "point"}
    columns |= {"point": POINTS, "age": ages.to_pylist(), "unused": unused}
    samples = [
        dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)
    ]
    for inputs in (path, columns, samples):
        found = loaded.predict(inputs)
        assert list(found["class_index"]) == index.tolist()
        torch.testing.assert_close(torch.as_tensor(found["probability"]), expected)
    with pytest.raises(DataError, match=r"expected a column .* in predict: the table"):
        loaded.predict([{"input_ids": [1], "attention_mask": [1], "unused": [1.0, 2.0]}])


def test_a_column_of_one_number_is_standardized(tmp_path):
    ages = torch.randn(ROWS) * 9 + 40
    columns = {"age": pa.array(ages.tolist(), pa.float32()), "label": COLUMNS["label"]}
    path = write(tmp_path / "rows.arrow", columns)
    data = build(path, ["age"], **WHOLE)
    found = data.train.gather(torch.arange(ROWS))["age"]
    torch.testing.assert_close(found, (ages - ages.mean()) / ages.std(correction=0))
    assert found.shape == (ROWS,)


def test_a_fold_measures_its_own_rows(path):
    data = build(path, ["point"], test_fraction=0.0)
    take_fold(data, "1/3")
    points = data.train.gather(torch.arange(60))["point"]
    torch.testing.assert_close(points.mean(0), torch.zeros(2), atol=1e-5, rtol=0)


def test_splits_are_copied_pickled_and_compared_by_content(path):
    data = build(path, **WHOLE)
    for split in (pickle.loads(pickle.dumps(data.train)), copy.deepcopy(data).train):
        assert torch.equal(split[4]["input_ids"], data.train[4]["input_ids"])
    assert digests_of(build(path, **WHOLE)) == digests_of(data)
    assert digests_of(build(path, max_length=4, **WHOLE)) != digests_of(data)


def test_a_column_of_texts_is_refused(tmp_path):
    path = write(tmp_path / "texts.arrow", {"text": ["a", "b"], "label": [0, 1]})
    with pytest.raises(DataError, match=r"expected columns of numbers with data\.batch=dict"):
        build(path, ["text"])


def test_empty_cells_and_nan_name_the_column(tmp_path):
    numbers = [[1.0, 2.0], [float("nan"), 1.0], [3.0, 4.0]]
    path = write(tmp_path / "nan.arrow", {"x": numbers, "label": [0, 1, 0]})
    with pytest.raises(DataError, match=r"row 2 has NaN or infinity .* in column 'x'"):
        build(path, ["x"], **WHOLE)
