"""The samples with the highest loss, for a trained run and within a fit."""

import json
import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import framework as fw
from framework.contracts.task import LossTask
from framework.errors import DataError, SettingError
from framework.experiment.evaluation.reports import worst_of_run
from framework.experiment.evaluation.samples import read_rows, row_losses
from framework.experiment.evaluation.worst import MOST_SHOWN, find_worst
from framework.experiment.trained.load import open_run
from framework.runs.folder import RunFolder
from runs import TIMES, cut_off_at, logged, run_training

torch.manual_seed(3)
X = torch.randn(23, 4)
CLASSES = torch.randint(0, 3, (23,))
WEIGHT = torch.tensor([1.0, 5.0, 0.5])


class Own(nn.Module):
    """A loss that is not one of torch."""

    def forward(self, outputs, targets):
        return F.cross_entropy(outputs, targets)


LOSSES = {
    "cross entropy": nn.CrossEntropyLoss(),
    "with label smoothing": nn.CrossEntropyLoss(label_smoothing=0.2),
    "with class weights": nn.CrossEntropyLoss(weight=WEIGHT),
    "a function": F.cross_entropy,
    "an own module": Own(),
    "of the framework": fw.losses.build("cross_entropy", weight=WEIGHT.tolist()),
}


def evaluator():
    return fw.Trainer(max_steps=1, device="cpu")


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_a_sample_is_that_of_a_batch_of_one(name):
    model = network()
    task = LossTask(LOSSES[name])
    trainer = evaluator()
    with trainer.reading(fw.TensorSplit(X, CLASSES), model=model, task=task, batch_size=7) as read:
        losses = [row_losses(trainer, rows) for rows in read_rows(trainer, read)]
    model.eval()
    expected = []
    for row in range(len(X)):
        step = task.step(model, (X[row : row + 1], CLASSES[row : row + 1]))
        expected.append(step.loss.item())
    torch.testing.assert_close(
        torch.cat(losses), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", ["cross entropy", "with class weights", "of the framework"])
def test_a_loss_of_torch_and_its_subclasses_need_no_further_forward_pass(name):
    model = network()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    task = LossTask(LOSSES[name])
    trainer = evaluator()
    with trainer.reading(fw.TensorSplit(X, CLASSES), model=model, task=task, batch_size=7) as read:
        find_worst(trainer, read, 3)
    assert len(calls) == 4, "one for each batch"


@pytest.mark.parametrize("name", ["cross entropy", "a function", "an own module"])
def test_the_mean_of_the_losses_is_the_loss_of_the_evaluation(name):
    model = network()
    trainer = evaluator()
    split = fw.TensorSplit(X, CLASSES)
    value = trainer.evaluate(split, model=model, task=LOSSES[name], metrics=(), batch_size=7)
    task = LossTask(LOSSES[name])
    with trainer.reading(split, model=model, task=task, batch_size=7) as read:
        losses = torch.cat([row_losses(trainer, rows) for rows in read_rows(trainer, read)])
    assert losses.mean().item() == pytest.approx(value["test/loss"], rel=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(),
        F.cross_entropy,
        fw.losses.build("cross_entropy", weight=WEIGHT.tolist(), ignore_index=-100),
    ],
)
def test_a_sample_whose_class_is_ignored_is_not_among_the_worst(loss):
    targets = CLASSES.clone()
    targets[::2] = -100
    trainer = evaluator()
    split = fw.TensorSplit(X, targets)
    with trainer.reading(split, model=network(), task=LossTask(loss), batch_size=7) as read:
        worst = find_worst(trainer, read, 23)
    assert sorted(worst.numbers.tolist()) == list(range(1, 23, 2))


def test_nan_is_the_highest_loss_and_ties_are_in_the_order_of_the_samples():
    inputs = torch.ones(6, 4)
    inputs[4] = torch.nan
    trainer = evaluator()
    split = fw.TensorSplit(inputs, torch.zeros(6, dtype=torch.int64))
    task = LossTask(nn.CrossEntropyLoss())
    with trainer.reading(split, model=nn.Linear(4, 3), task=task, batch_size=4) as read:
        worst = find_worst(trainer, read, 3)
    assert worst.numbers.tolist() == [4, 0, 1]


def test_a_task_that_compares_samples_has_no_loss_of_a_sample():
    class Compares(LossTask):
        splits_batches = False

    trainer = evaluator()
    split = fw.TensorSplit(X, CLASSES)
    task = Compares(nn.CrossEntropyLoss())
    reading = trainer.reading(split, model=network(), task=task)
    with reading as read, pytest.raises(DataError, match="no loss of its own"):
        find_worst(trainer, read, 3)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return run_training(
        f"run.root={root}", "trainer.max_epochs=2", "loggers=[json_lines,tensorboard]"
    )


def worst_of(folder, count, split="test"):
    trained = open_run(folder)
    data = trained.read_data()
    return worst_of_run(trained, data, split, count), trained, data


def test_the_worst_samples_of_a_run_are_those_of_its_predictions(digits):
    worst, trained, data = worst_of(digits.folder, 5)
    inputs, targets = data.test.tensors
    probabilities = trained.predict(inputs)["probabilities"]
    losses = -probabilities.double()[range(len(targets)), targets].log()
    expected = losses.argsort(descending=True)[:5].tolist()
    assert worst.columns["sample"] == expected
    torch.testing.assert_close(
        torch.tensor(worst.columns["loss"]).double(), losses[expected], rtol=1e-4, atol=1e-5
    )
    assert worst.columns["label"] == [str(targets[row].item()) for row in expected]
    highest, chosen = probabilities[expected].max(1)
    assert worst.columns["prediction"] == [str(index) for index in chosen.tolist()]
    assert worst.columns["probability"] == pytest.approx(highest.tolist())
    assert worst.measured == len(targets)


def test_a_picture_has_a_limited_number_of_samples(digits):
    worst, _, _ = worst_of(digits.folder, 250)
    fewer, _, _ = worst_of(digits.folder, MOST_SHOWN)
    assert len(worst.rows()) == 250
    assert worst.picture().shape == fewer.picture().shape
    assert len(worst.markdown().splitlines()) == MOST_SHOWN + 2


def test_a_sample_is_identified_by_its_row_in_the_source_and_shown_as_its_image(digits):
    from sklearn.datasets import load_digits

    worst, _, _ = worst_of(digits.folder, 3)
    pixels = load_digits().images
    for row, image in zip(worst.columns["row"], worst.shown.images, strict=True):
        expected = torch.tensor(pixels[row - 1] / 16).float()
        torch.testing.assert_close(image[0], expected, atol=1e-5, rtol=0)


def test_the_command_writes_files_and_records_for_tensorboard(digits, command):
    before = set(digits.folder.glob("events.out.tfevents.*"))
    status, out, err = command(f"eval {digits.folder} --worst 4 --curves --json")
    assert status == 0, err
    document = json.loads(out)
    assert len(document["worst"]) == 4
    assert [row["loss"] for row in document["worst"]] == sorted(
        (row["loss"] for row in document["worst"]), reverse=True
    )
    names = {file.rpartition("/")[2] for file in document["files"]}
    curves = {"curves-test.png", "curves-test.csv", "curves-test.json"}
    assert names == {"worst-test.json", "worst-test.png"} | curves
    assert {file.name for file in (digits.folder / "evaluation").iterdir()} == names
    (added,) = set(digits.folder.glob("events.out.tfevents.*")) - before
    assert added.name > max(file.name for file in before)


def events_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    return events


def scalars_of(folder):
    """Return the steps of each tag that TensorBoard shows."""
    events = events_of(folder)
    found = {}
    for tag in events.Tags()["scalars"]:
        if tag not in TIMES:
            found[tag] = [event.step for event in events.Scalars(tag)]
    return found


def test_tensorboard_keeps_the_records_of_the_run(digits, command):
    scalars = scalars_of(digits.folder)
    assert max(scalars["train/loss"]) == 80
    status, _, err = command(
        f"eval {digits.folder} --worst 2 --curves --split val --checkpoint step-00000040"
    )
    assert status == 0, err
    assert scalars_of(digits.folder) == scalars
    events = events_of(digits.folder)
    plugins = {
        "val/worst/table": "text",
        "val/worst/images": "images",
        "val/curves": "images",
        "val/curves/3": "pr_curves",
    }
    for tag, plugin in plugins.items():
        assert events.SummaryMetadata(tag).plugin_data.plugin_name == plugin
        assert [event.step for event in events.Tensors(tag)] == [40]


@pytest.mark.parametrize("file", ["metrics.jsonl", "status.json"])
def test_a_run_with_impossible_steps_is_evaluated(digits, tmp_path, command, file):
    run = tmp_path / "run"
    shutil.copytree(digits.folder, run, symlinks=True)
    if file == "metrics.jsonl":
        with (run / file).open("a") as metrics:
            metrics.write(f'{{"step": {2**63 - 1}, "val/loss": 1}}\n')
    else:
        status = json.loads((run / file).read_text())
        (run / file).write_text(json.dumps(status | {"step": 10**400}))
    status, _, err = command(f"eval {run} --worst 2")
    assert status == 0, err
    assert "val/loss" in scalars_of(run)


def test_no_event_file_is_added_while_the_run_is_being_trained(digits, command):
    before = set(digits.folder.glob("events.out.tfevents.*"))
    trains = RunFolder.existing(digits.folder)
    try:
        status, out, err = command(f"eval {digits.folder} --worst 2")
    finally:
        trains.release()
    assert status == 0, err
    assert "is being trained" in err
    assert "2 largest losses" in out
    assert set(digits.folder.glob("events.out.tfevents.*")) == before


def test_a_run_that_is_evaluated_resumes_bit_for_bit(tmp_path, command, monkeypatch):
    overrides = ["trainer.max_epochs=3", "loggers=[json_lines,tensorboard]"]
    whole = run_training(f"run.root={tmp_path}/a", *overrides).folder
    with cut_off_at(90, monkeypatch):
        run_training(f"run.root={tmp_path}/b", "run.name=part", *overrides)
    part = tmp_path / "b" / "default" / "part"
    status, _, err = command(f"eval {part} --worst 2 --curves")
    assert status == 0, err
    status, _, err = command(f"resume {part}")
    assert status == 0, err
    weights = [open_run(run, "last").model.state_dict() for run in (whole, part)]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name])
    assert logged(whole) == logged(part)
    assert scalars_of(whole) == scalars_of(part)


def test_the_document_of_a_wrong_number_has_its_facts(digits, command):
    status, out, _ = command(f"eval {digits.folder} --worst 9999 --json")
    error = json.loads(out)["error"]
    assert (status, error["setting"], error["value"]) == (2, "--worst", 9999)
    assert "270" in error["expected"]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ("--worst 0", "--worst 0: expected at least 1"),
        ("--worst 271", "expected at most 270, the number of samples"),
        ("--worst x", "expected an integer"),
        ("--worst 3 --split valid", "did you mean 'val'?"),
    ],
)
def test_wrong_options_are_errors_in_one_line(digits, command, options, part):
    status, _, err = command(f"eval {digits.folder} {options}")
    assert status == 2
    assert part in err
    assert len(err.splitlines()) == 1


def test_a_link_instead_of_the_folder_of_results_is_refused(tmp_path, command):
    """The results are printed nevertheless, as for a run that cannot be written."""
    run = run_training(f"run.root={tmp_path}/runs", "trainer.max_epochs=1").folder
    (tmp_path / "elsewhere").mkdir()
    (run / "evaluation").symlink_to(tmp_path / "elsewhere")
    for line in (f"eval {run} --worst 2 --curves", f"landscape {run} --points 3"):
        status, out, err = command(line)
        assert status == 2
        assert "symbolic link" in err
        assert "loss" in out
        status, out, _ = command(f"{line} --json")
        document = json.loads(out)
        assert status == 2
        assert "symbolic link" in document["error"]["message"]
        assert len(document.get("worst", document.get("landscapes"))) > 0
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_regression_is_shown_in_the_unit_of_its_targets(tmp_path):
    run = run_training(f"run.root={tmp_path}", "experiment=diabetes", "trainer.max_epochs=1").folder
    worst, _, data = worst_of(run, 4)
    targets = data.scale.inverse_transform(data.test.tensors[1])
    for sample, label in zip(worst.columns["sample"], worst.columns["label"], strict=True):
        assert label == pytest.approx(targets[sample].item())
        assert 20 < label < 400, "the disease progression of the data set"
    cells = worst.shown.columns
    assert {"age", "sex", "bmi"} <= set(cells)


def test_cells_of_a_table_are_those_of_its_file(tmp_path):
    lines = ["size,color,kind"]
    colors = ["red", "green", "blue", ""]
    lines += [f"{row / 7:.3f},{colors[row % 4]},{'ab'[row % 2]}" for row in range(80)]
    path = tmp_path / "t.csv"
    path.write_text("\n".join(lines) + "\n")
    run = run_training(
        f"run.root={tmp_path}/runs",
        "data=table",
        f"data.path={path}",
        "data.target=kind",
        "trainer.max_epochs=1",
    ).folder
    worst, _, _ = worst_of(run, 8)
    for row in worst.rows():
        size, color, kind = lines[row["row"]].split(",")
        assert row["size"] == pytest.approx(float(size), abs=1e-5)
        assert row["color"] == (color or None)
        assert row["label"] == kind


def test_texts_are_shown_with_their_row(tmp_path):
    words = ["alpha", "beta", "gamma", "delta"]
    lines = ["text,label"]
    for row in range(60):
        text = " ".join(words[(row + i) % 4] for i in range(1 + row % 5))
        lines.append(f"{text},{'xy'[row % 2]}")
    path = tmp_path / "t.csv"
    path.write_text("\n".join(lines) + "\n")
    run = run_training(
        f"run.root={tmp_path}/runs",
        "data=text_table",
        f"data.path={path}",
        "model=embedding_bag",
        "trainer.max_epochs=1",
    ).folder
    worst, _, _ = worst_of(run, 6)
    for row in worst.rows():
        text, label = lines[row["row"]].split(",")
        assert row["text"] == text
        assert row["label"] == label


def test_sounds_are_shown_with_their_length():
    data = fw.datasets.build("tones", samples=20)
    inputs, _ = data.test[:3]
    shown = type(data).show(inputs, data.facts())
    assert shown.rate == 8000
    sounds = zip(shown.waves, shown.columns["seconds"], inputs, strict=True)
    for wave, seconds, (whole, mask) in sounds:
        length = int(mask.sum())
        assert torch.equal(wave, whole[:length])
        assert seconds == pytest.approx(length / 8000)


class Logged(fw.Logger):
    def __init__(self):
        self.texts = []
        self.pictures = []

    def text(self, tag, markdown, step=0):
        if tag == "worst/table":
            self.texts.append((step, markdown))

    def images(self, tag, images, step):
        if tag == "worst/images":
            self.pictures.append((step, images.shape))


def fit(data, task, **settings):
    torch.manual_seed(0)
    records = Logged()
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.LazyLinear(3))
    model(data[0][:1])
    callback = fw.callbacks.build("worst", count=3, **settings)
    trainer = fw.Trainer(max_epochs=2, callbacks=[callback], loggers=[records], device="cpu")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    split = fw.TensorSplit(*data)
    trainer.fit(model, split, val=split, task=task, optimizer=optimizer, batch_size=8)
    return records, model


def test_the_callback_shows_the_worst_samples_of_the_validation_at_its_cadence():
    records, model = fit((X, CLASSES), nn.CrossEntropyLoss())
    assert [step for step, _ in records.texts] == [3, 6]
    losses = F.cross_entropy(model.eval()(X), CLASSES, reduction="none")
    rows = [line.split(" | ")[0].strip("| ") for line in records.texts[-1][1].splitlines()[2:]]
    assert [int(row) for row in rows] == losses.argsort(descending=True)[:3].tolist()
    records, _ = fit((X, CLASSES), nn.CrossEntropyLoss(), every="2epochs")
    assert [step for step, _ in records.texts] == [6]


def test_the_callback_shows_images_with_captions():
    records, _ = fit((torch.rand(23, 1, 8, 8), CLASSES), nn.CrossEntropyLoss())
    assert [shape[:2] for _, shape in records.pictures] == [(1, 3), (1, 3)]


def test_the_callback_does_not_change_training():
    _, model = fit((X, CLASSES), nn.CrossEntropyLoss())
    _, other = fit((X, CLASSES), nn.CrossEntropyLoss(), every="100epochs")
    assert torch.equal(model[2].weight, other[2].weight)


def test_the_callback_needs_a_validation_split():
    trainer = fw.Trainer(max_epochs=1, callbacks=[fw.callbacks.build("worst")], device="cpu")
    model = network()
    with pytest.raises(SettingError, match=r"callbacks\.worst: expected a validation split"):
        trainer.fit(
            model,
            fw.TensorSplit(X, CLASSES),
            task=nn.CrossEntropyLoss(),
            optimizer=torch.optim.SGD(model.parameters(), 0.1),
        )
