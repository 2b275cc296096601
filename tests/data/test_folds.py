"""Cross-validation and repetition: every sample is validated once."""

import json
import re
import statistics

import numpy as np
import pytest
import torch
from sklearn.model_selection import StratifiedKFold

import framework as fw
from framework.composition.compose import CommandLine, run_composed as compose
from framework.data.folds import fold_of, take_fold
from framework.errors import DataError
from framework.experiment.experiment import train
from framework.experiment.trained.load import open_run


def folds(count, **settings):
    for number in range(1, count + 1):
        data = fw.datasets.build("digits", **settings)
        take_fold(data, f"{number}/{count}")
        yield data


def rows_of(split):
    return {tuple(row) for row in split.tensors[0].tolist()}


def test_every_sample_is_validated_once():
    whole = fw.datasets.build("digits", normalize=False)
    all_rows = rows_of(whole.train) | rows_of(whole.val)
    validated = []
    for data in folds(4, normalize=False):
        train = rows_of(data.train)
        val = rows_of(data.val)
        assert not train & val
        assert train | val == all_rows
        assert rows_of(data.test) == rows_of(whole.test)
        validated += val
    assert len(validated) == len(all_rows)
    assert set(validated) == all_rows


def test_classes_are_spread_as_evenly_as_those_of_scikit_learn():
    strata = torch.randint(0, 3, (100,), generator=torch.Generator().manual_seed(0))
    reference = StratifiedKFold(5, shuffle=True, random_state=0).split(torch.zeros(100), strata)
    largest = max(torch.bincount(strata[val], minlength=3).tolist() for _, val in reference)
    for number in range(1, 6):
        inside, outside = fold_of(strata, number, 5)
        assert len(inside) == 20
        assert sorted([*inside.tolist(), *outside.tolist()]) == list(range(100))
        counts = torch.bincount(strata[inside], minlength=3)
        assert (counts - torch.tensor(largest)).abs().max() <= 2


def test_refitted_folds_have_the_same_samples_as_folds_without_refit():
    refitted = fw.datasets.build("digits", normalize=False)
    cut = fw.datasets.build("digits", normalize=False)
    take_fold(refitted, "2/3")
    take_fold(cut, "2/3", refit=False)
    for name in ("train", "val"):
        pairs = zip(getattr(refitted, name).tensors, getattr(cut, name).tensors, strict=True)
        assert all(torch.equal(*pair) for pair in pairs)


def outliers():
    """Return 60 numbers; five are large, so that the deviation of a fold depends on them."""
    numbers = np.random.default_rng(0).normal(size=60)
    numbers[::12] *= 100
    return numbers


def npz(folder):
    np.savez(folder / "d.npz", x=outliers()[:, None], y=np.arange(60) % 2)
    return fw.datasets.build("npz", path=folder / "d.npz")


def table(folder):
    lines = [f"{x},{y}" for x, y in zip(outliers(), 5 + outliers()[::-1], strict=True)]
    (folder / "d.csv").write_text("\n".join(["x,y", *lines]))
    return fw.datasets.build("table", path=folder / "d.csv", target="y")


def ts_files(folder):
    cases = [f"{x},{x}:{'ab'[row % 2]}" for row, x in enumerate(outliers())]
    (folder / "d.ts").write_text("\n".join(["@classLabel true a b", "@data", *cases]))
    return fw.datasets.build("ts_files", path=folder / "d.ts")


@pytest.mark.parametrize("build", [npz, table, ts_files], ids=lambda build: build.__name__)
def test_a_fold_is_normalised_by_its_own_training_rows(build, tmp_path):
    deviations = []
    for number in (1, 2, 3):
        data = build(tmp_path)
        not_refitted = build(tmp_path)
        take_fold(data, f"{number}/3")
        take_fold(not_refitted, f"{number}/3", refit=False)
        normalised = [first_column(data.train.tensors[0])]
        if data.target == "value":
            normalised.append(first_column(data.train.tensors[1]))
        for values in normalised:
            assert values.mean().item() == pytest.approx(0, abs=1e-6)
            assert values.std(correction=0).item() == pytest.approx(1, abs=1e-6)
        deviation = first_column(not_refitted.train.tensors[0]).std(correction=0).item()
        deviations.append(abs(deviation - 1))
    assert max(deviations) > 0.1, "a control: without refit the statistics are those of all rows"


def first_column(tensor):
    return tensor.flatten(1)[:, 0]


def words_of(texts):
    return set(" ".join(texts).split())


def test_the_vocabulary_of_a_fold_is_that_of_its_own_training_texts(tmp_path):
    lines = [f"word{row} word{row} common,{'ab'[row % 2]}" for row in range(30)]
    (tmp_path / "d.csv").write_text("\n".join(["text,label", *lines]))
    validated = []
    for number in (1, 2, 3):
        data = fw.datasets.build(
            "text_table", path=tmp_path / "d.csv", val_fraction=0.2, test_fraction=0.2
        )
        take_fold(data, f"{number}/3")
        vocabulary = set(data.tokenizer.state()["tokens"])
        assert words_of(data.texts["train"]) <= vocabulary
        assert not (words_of(data.texts["val"]) - {"common"}) & vocabulary
        validated += data.texts["val"]
        assert len(data.val) == len(data.texts["val"]) == 8
    assert len(set(validated)) == 24


def amounts(data, tensor):
    return set(data.scale.inverse_transform(tensor).round().int().flatten().tolist())


def test_folds_of_a_series_are_blocks_of_time_outside_the_training_split(tmp_path):
    lines = ["v", *map(str, range(100))]
    (tmp_path / "d.csv").write_text("\n".join(lines))
    for number in (1, 2, 4):
        data = fw.datasets.build(
            "series", path=tmp_path / "d.csv", target="v", lookback=5, horizon=2
        )
        take_fold(data, f"{number}/4")
        train = amounts(data, data.train.tensors[0]) | amounts(data, data.train.tensors[1])
        val = amounts(data, data.val.tensors[1])
        test = amounts(data, data.test.tensors[1])
        block = set(range(round(85 * (number - 1) / 4 + 0.49), round(85 * number / 4 + 0.49)))
        lookback = set(range(5)) if number == 1 else set()  # no earlier rows
        assert val == block - lookback
        assert not train & block
        assert min(test) == 85
        measured = torch.tensor([float(row) for row in range(85) if row not in block])
        assert data.scale.mean == pytest.approx(measured.mean().item())
        assert data.scale.std == pytest.approx(measured.std(correction=0).item())


def test_a_fold_too_short_for_a_window_is_an_error():
    data = fw.datasets.build("seasonal", weeks=3, lookback=96, horizon=48)
    with pytest.raises(DataError, match="fold=1/20: 42 rows are too few"):
        take_fold(data, "1/20")


@pytest.mark.usefixtures("one_thread")
def test_a_run_of_a_fold_is_evaluated_with_the_statistics_of_the_fold(tmp_path):
    table(tmp_path)
    settings = [
        "data=table",
        f"data.path={tmp_path / 'd.csv'}",
        "data.target=y",
        "task=regression",
        "metrics=[r2]",
    ]
    settings += [
        "fold=2/3",
        "trainer.max_epochs=2",
        "trainer.device=cpu",
        "loggers=[]",
        "model.depth=1",
    ]
    results = []
    line = CommandLine([*settings, f"run.root={tmp_path / 'runs'}"])
    compose(line, lambda job: results.append(train(job.spec, job.experiment, job.overrides)))
    metrics = results[0].metrics
    folder = results[0].folder
    run = open_run(folder)
    measured = run.evaluate("test")
    assert measured == {name: metrics[name] for name in metrics if name.startswith("test/")}

    data = fw.datasets.build("table", path=tmp_path / "d.csv", target="y")
    old = {"columns": data.facts()["columns"], "scale": list(data.scale)}
    take_fold(data, "2/3")
    facts = json.loads((folder / "facts.json").read_text())
    assert facts["fold"] == "2/3"
    assert facts["scale"] == list(data.scale)
    assert facts["data"]["columns"] == data.facts()["columns"]
    inputs = run.read_inputs(tmp_path / "d.csv")
    for row in data.val.tensors[0]:
        assert (row == inputs).all(1).any()

    facts["data"]["columns"][0]["mean"] += 1
    (folder / "facts.json").write_text(json.dumps(facts))
    with pytest.warns(UserWarning, match="has changed since it was trained"):
        open_run(folder).evaluate("test")

    del facts["fold"]  # an older version measured the statistics on the whole training split
    facts |= {"scale": old["scale"], "data": facts["data"] | {"columns": old["columns"]}}
    (folder / "facts.json").write_text(json.dumps(facts))
    assert open_run(folder).evaluate("test")["test/loss"] != metrics["test/loss"]


class Samples(torch.utils.data.Dataset):
    def __init__(self, numbers):
        self.numbers = list(numbers)

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        return torch.tensor([float(self.numbers[index])]), torch.tensor(0)


def test_samples_that_are_not_in_memory_are_cut_with_a_warning():
    validated = []
    for number in (1, 2, 3):
        data = fw.Data()
        data.train = Samples(range(7))
        data.val = Samples(range(7, 10))
        with pytest.warns(UserWarning, match=f"^fold={number}/3: Data has no `refit`: "):
            take_fold(data, f"{number}/3")
        validated += [float(data.val[index][0]) for index in range(len(data.val))]
        assert len(data.val) + len(data.train) == 10
    assert sorted(validated) == list(range(10))


@pytest.mark.parametrize("fold", ["0/5", "6/5", "1/1", "half", "1/9999"])
def test_an_invalid_fold_is_an_error(fold):
    with pytest.raises(DataError, match=f"fold={fold}"):
        take_fold(fw.datasets.build("digits"), fold)


def test_cross_validation_is_a_sweep_with_mean_and_error(command):
    status, out, err = command("train --folds 3 trainer.max_epochs=1 loader.limit=4")
    assert status in (0, None), err
    table = out[out.index("\nfolds") :]
    assert re.search(r"^3 +[\d.]+ ± [\d.]+", table.splitlines()[2])
    values = [float(text) for text in re.findall(r"fold=\d/3  val/loss ([\d.]+)", out)]
    error = statistics.stdev(values) / 3**0.5
    printed = re.search(r"^3 +([\d.]+) ± ([\d.]+)", table.splitlines()[2])
    assert float(printed[1]) == pytest.approx(statistics.mean(values), rel=1e-3)
    assert float(printed[2]) == pytest.approx(error, rel=0.1)


def test_repetition_is_a_sweep_over_seeds(command):
    status, out, err = command("train --repeat 2 trainer.max_epochs=1 loader.limit=2")
    assert status in (0, None), err
    assert "000 seed=0" in out
    assert "001 seed=1" in out
    assert "±" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--folds 1", "--folds 1: expected at least 2"),
        ("--repeat 0", "--repeat 0: expected at least 2"),
        ("--repeat 3 seed=5", "--repeat 3 sets seed; remove seed="),
        ("--folds 3 fold=1/3", "remove fold="),
        ("fold=7/5", "fold=7/5: expected K/N"),
    ],
)
def test_wrong_folds_and_repetitions_are_an_error(command, words, said):
    status, _, err = command(f"train {words}")
    assert status == 2
    assert said in err


def test_a_limit_shortens_epochs(command):
    status, out, err = command("train loader.limit=3 trainer.max_epochs=2")
    assert status in (0, None), err
    assert "6 steps in" in out
