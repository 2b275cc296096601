"""The confusion matrix, against scikit-learn's."""

import pytest
import torch
from sklearn.metrics import confusion_matrix

import framework as fw
from framework.errors import SettingError


class Kept(fw.Logger):
    """Keeps the last picture and text."""

    def images(self, tag, images, step):
        self.tag, self.picture = tag, images

    def text(self, tag, markdown, step=0):
        self.table = markdown


def fit(data, task, outputs, **more):
    kept, model = Kept(), torch.nn.Linear(data.in_shape[0], outputs)
    trainer = fw.Trainer(callbacks=[fw.callbacks.build("confusion")], loggers=[kept], **more)
    trainer.fit(
        model, data, task=task, optimizer=torch.optim.SGD(model.parameters(), 0.1), batch_size=20
    )
    return kept, trainer


def test_it_is_that_of_scikit_learn():
    data = fw.datasets.build("blobs", samples=400, noise=4.0, val_fraction=0.4)
    kept, trainer = fit(data, torch.nn.CrossEntropyLoss(), 3, max_epochs=2)
    expected = confusion_matrix(data.val.tensors[1], trainer.predict(data.val).argmax(1))
    assert 0 < expected.trace() < expected.sum(), (
        "some are right and some wrong, or it would show nothing"
    )
    rows = [line.strip("| ").split(" | ")[1:] for line in kept.table.splitlines()[2:]]
    assert [list(map(int, row)) for row in rows] == expected.tolist()
    assert kept.picture.shape == (1, 1, 48, 48)
    shares = torch.tensor(expected / expected.sum(1, keepdims=True))
    torch.testing.assert_close(kept.picture[0, 0, 8::16, 8::16].double(), shares)


def test_looking_changes_nothing():
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


def test_values_have_no_confusion():
    data = fw.datasets.build("friedman1", samples=60)
    with pytest.raises(SettingError, match="needs one class for each sample"):
        fit(data, torch.nn.MSELoss(), 1, max_epochs=1)
