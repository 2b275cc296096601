"""The confusion matrix, compared with scikit-learn's."""

import pytest
import torch
from sklearn.metrics import confusion_matrix

import framework as fw
from framework.errors import SettingError


class LastLogged(fw.Logger):
    """Stores the last image and text."""

    def images(self, tag, images, step):
        self.image = images

    def text(self, tag, markdown, step=0):
        self.table = markdown


def fit(data, task, outputs, **more):
    logged = LastLogged()
    model = torch.nn.Linear(data.in_shape[0], outputs)
    trainer = fw.Trainer(callbacks=[fw.callbacks.build("confusion")], loggers=[logged], **more)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer.fit(model, data, task=task, optimizer=optimizer, batch_size=20)
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
    assert logged.image.shape == (1, 1, 48, 48)
    shares = torch.tensor(expected / expected.sum(1, keepdims=True))
    torch.testing.assert_close(logged.image[0, 0, 8::16, 8::16].double(), shares)


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
