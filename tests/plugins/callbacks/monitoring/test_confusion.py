"""The confusion matrix and the scores of each class, compared with scikit-learn's."""

import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

import framework as fw
from framework.errors import SettingError


class LastLogged(fw.Logger):
    """Stores the last image and text, and all scalars."""

    def __init__(self):
        self.values = {}
        self.tables = {}

    def scalars(self, values, *, step, epoch, wall_seconds):
        self.values |= values

    def charts(self, title, charts):
        self.prefixes = charts

    def images(self, tag, images, step):
        self.image = images

    def text(self, tag, markdown, step=0):
        self.table = markdown
        self.tables[tag] = markdown.splitlines()


def fit(data, task, outputs, names=("confusion",), model=None, metrics=(), **more):
    logged = LastLogged()
    model = model or torch.nn.Linear(data.in_shape[0], outputs)
    callbacks = [fw.callbacks.build(name) for name in names]
    trainer = fw.Trainer(callbacks=callbacks, loggers=[logged], **more)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer.fit(model, data, task=task, optimizer=optimizer, metrics=metrics, batch_size=20)
    return logged, trainer


def test_it_equals_that_of_scikit_learn():
    data = fw.datasets.build("blobs", samples=400, noise=4.0, val_fraction=0.4)
    logged, trainer = fit(data, torch.nn.CrossEntropyLoss(), 3, max_epochs=2)
    expected = confusion_matrix(data.val.tensors[1], trainer.predict(data.val).argmax(1))
    assert 0 < expected.trace() < expected.sum(), "some predictions are right, some wrong"
    rows = []
    for line in logged.table.splitlines()[2:]:
        _, *counts = line.strip("| ").split(" | ")
        rows.append([int(count) for count in counts])
    assert rows == expected.tolist()
    assert logged.image.shape == (1, 3, 350, 350)
    shares = torch.tensor(expected / expected.sum(1, keepdims=True))
    corners = logged.image[0, 0, 30:348:107, 30:348:107].double()  # of the cells, without texts
    white, full = 1.0, 8 / 255
    torch.testing.assert_close((white - corners) / (white - full), shares, atol=0.003, rtol=0)


def test_it_does_not_change_training():
    data = fw.datasets.build("blobs", samples=100)
    weights = []
    for callbacks in ([], [fw.callbacks.build("confusion", every="1steps")]):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Dropout(0.3), torch.nn.Linear(2, 3))
        trainer = fw.Trainer(max_epochs=3, callbacks=callbacks, validate_every="1steps")
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        trainer.fit(
            model, data, task=torch.nn.CrossEntropyLoss(), optimizer=optimizer, batch_size=20
        )
        weights.append(model[1].weight.detach())
    assert torch.equal(*weights)


def test_targets_without_classes_are_an_error():
    data = fw.datasets.build("friedman1", samples=60)
    with pytest.raises(SettingError, match="needs one class for each sample"):
        fit(data, torch.nn.MSELoss(), 1, max_epochs=1)


@pytest.mark.parametrize("name", ["confusion", "per_class"])
def test_tokens_are_an_error_before_the_first_step(name):
    tokens = torch.arange(40).reshape(8, 5) % 4
    data = fw.Data()
    data.train = data.val = fw.TensorSplit(tokens, tokens)
    model = torch.nn.Embedding(4, 4)
    trainer = fw.Trainer(max_epochs=1, callbacks=[fw.callbacks.build(name)])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    task = fw.tasks.build("language_modelling")
    with pytest.raises(SettingError, match=rf"callbacks\.{name} needs one class for each sample"):
        trainer.fit(model, data, task=task, optimizer=optimizer)
    assert trainer.state.step == 0


def test_a_split_without_a_counted_target_has_scores_of_0():
    data = fw.datasets.build("blobs", samples=100)
    data.val = fw.TensorSplit(data.val.tensors[0], torch.full((len(data.val),), -100))
    logged, _ = fit(data, torch.nn.CrossEntropyLoss(), 3, ["confusion", "per_class"], max_epochs=1)
    assert logged.values["val_per_class/recall/0"] == 0
    assert logged.table.count("| 0.000 | 0.000 | 0.000 | 0 |") == 3


def test_the_scores_of_each_class_equal_those_of_scikit_learn():
    data = fw.datasets.build("blobs", samples=400, noise=4.0, val_fraction=0.4)
    loss = torch.nn.CrossEntropyLoss()
    logged, trainer = fit(data, loss, 4, ["per_class"], max_epochs=2)  # one class has no sample
    predicted = trainer.predict(data.val).argmax(1)
    targets = data.val.tensors[1]
    expected = precision_recall_fscore_support(targets, predicted, labels=range(4), zero_division=0)
    for quantity, values in zip(("precision", "recall", "f1"), expected[:3], strict=True):
        assert logged.prefixes[quantity] == f"val_per_class/{quantity}/"
        for index, value in enumerate(values):
            assert logged.values[f"val_per_class/{quantity}/{index}"] == pytest.approx(value)
    rows = [line.strip("| ").split(" | ") for line in logged.table.splitlines()[2:]]
    assert rows[0] == ["3", "0.000", "0.000", "0.000", "0"]  # the worst one first
    assert sorted(int(row[4]) for row in rows) == sorted(targets.bincount(minlength=4).tolist())


class SometimesNaN(torch.nn.Module):
    """Predicts the class of the input, a number, but gives NaN for a negative one."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, inputs):
        outputs = self.scale * torch.nn.functional.one_hot(inputs[:, 0].abs().long(), 3)
        outputs[:, 1] = outputs[:, 1].masked_fill(inputs[:, 0] < 0, torch.nan)
        return outputs


def test_outputs_of_nan_are_no_predictions():
    inputs = torch.tensor([0.0, 0, -1, 1, 1, 2, -2, 1])  # the last one is wrong
    split = fw.TensorSplit(inputs[:, None], torch.tensor([0, 0, 1, 1, 1, 2, 2, 2]))
    data = fw.Data()
    data.train = fw.TensorSplit(*split[:2])
    data.val = split
    data.in_shape = (1,)
    logged, _ = fit(
        data,
        torch.nn.CrossEntropyLoss(),
        3,
        ["confusion", "per_class", "worst"],
        model=SometimesNaN(),
        metrics=[fw.metrics.build("accuracy")],
        max_epochs=1,
    )
    rows = [line.strip("| ").split(" | ") for line in logged.tables["confusion/counts"]]
    assert rows[0][4] == "no prediction (NaN)"
    assert rows[2:] == [list("02000"), list("10201"), list("20111")]
    predicted = [0, 0, 3, 1, 1, 2, 3, 1]
    precision, recall, f1, _ = precision_recall_fscore_support(
        split.tensors[1], predicted, labels=range(3), zero_division=0
    )
    for index in range(3):
        assert logged.values[f"val_per_class/precision/{index}"] == pytest.approx(precision[index])
        assert logged.values[f"val_per_class/recall/{index}"] == pytest.approx(recall[index])
        assert logged.values[f"val_per_class/f1/{index}"] == pytest.approx(f1[index])
    assert logged.values["val/accuracy"] == 5 / 8
    worst = [line.strip("| ").split(" | ") for line in logged.tables["worst/table"]]
    label, prediction = worst[0].index("label"), worst[0].index("prediction")
    assert {(row[label], row[prediction].strip()) for row in worst[2:4]} == {("1", ""), ("2", "")}


def test_with_many_classes_there_is_only_the_table():
    inputs = torch.randn(42, 2)
    split = fw.TensorSplit(inputs, torch.arange(42) % 21)
    data = fw.Data()
    data.train = data.val = split
    data.in_shape = (2,)
    logged, _ = fit(data, torch.nn.CrossEntropyLoss(), 21, ["per_class", "confusion"], max_epochs=1)
    assert not any(tag.startswith("val_per_class") for tag in logged.values)


def test_both_callbacks_read_the_split_once(monkeypatch):
    data = fw.datasets.build("blobs", samples=100)
    calls = []
    from framework_plugins.callbacks.monitoring import confusion

    count_pairs = confusion.count_pairs
    monkeypatch.setattr(
        confusion, "count_pairs", lambda *args: calls.append(1) or count_pairs(*args)
    )
    fit(data, torch.nn.CrossEntropyLoss(), 3, ["confusion", "per_class"], max_epochs=3)
    assert len(calls) == 3


def test_without_a_validation_split_the_error_names_the_callback():
    data = fw.datasets.build("blobs", samples=100)
    data.val = None
    with pytest.raises(SettingError, match=r"callbacks\.per_class: expected .* validation split"):
        fit(data, torch.nn.CrossEntropyLoss(), 3, ["per_class"], max_epochs=1)
