"""Training with batches that are dicts, nested tuples or dataclasses."""

from collections import UserDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import framework as fw
from distributed_runs import run_in_processes
from framework import Trainer
from framework.contracts.task import LossTask, Step, Task
from framework.contracts.transform import Transform
from framework.data.dataset import Loader, TensorSplit
from framework.errors import DataError, FrameworkError, SettingError
from framework_plugins.strategies.ddp import DDP

torch.manual_seed(4)
WORDS = torch.randint(1, 9, (37, 5))
NUMBERS = torch.randn(37, 3)
LABELS = (NUMBERS.sum(1) > 0).long()
ROWS = [
    {"words": WORDS[row], "numbers": NUMBERS[row], "text": f"row {row}", "labels": LABELS[row]}
    for row in range(len(WORDS))
]
NAMED = {"inputs": ["words", "numbers"], "target": "labels"}


@dataclass(frozen=True)
class Sample:
    words: torch.Tensor
    numbers: torch.Tensor
    labels: torch.Tensor
    note: None = None


class Row(NamedTuple):
    words: torch.Tensor
    numbers: torch.Tensor
    labels: torch.Tensor


@dataclass
class Outputs:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...]
    loss: torch.Tensor | None = None


class Net(nn.Module):
    """Takes two fields by name."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.embedding = nn.EmbeddingBag(9, 4)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(7, 2)

    def forward(self, words, numbers):
        return self.head(self.drop(torch.cat([self.embedding(words), numbers], 1)))


class Several(Net):
    """Returns several outputs, and the loss if it gets labels."""

    def forward(self, words, numbers, labels=None):
        logits = super().forward(words, numbers)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return Outputs(logits, (numbers,), loss)


def flat_batches(size=8):
    """Return batches with the same samples as tuples, for a task that takes them."""
    return list(zip(WORDS.split(size), NUMBERS.split(size), LABELS.split(size), strict=True))


def dicts(size=8):
    batches = []
    for words, numbers, labels in flat_batches(size):
        texts = ["a text"] * len(words)
        batches.append({"words": words, "numbers": numbers, "text": texts, "labels": labels})
    return batches


class Plain(Task):
    """The same step written by hand, for flat batches."""

    def step(self, model, batch):
        words, numbers, labels = batch
        outputs = model(words, numbers)
        return Step(nn.functional.cross_entropy(outputs, labels), outputs, labels)


def fit(data, task, model=None, **settings):
    """Return the model after a fit, and the values of an evaluation."""
    torch.manual_seed(0)
    model = Net() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    trainer = Trainer(**({"max_steps": 7} | settings))
    trainer.fit(model, data, task=task, optimizer=optimizer)
    return model, trainer.evaluate(data, metrics=[fw.metrics.build("accuracy")])


def assert_same(one, other):
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


FORMS = {
    "dict": (dicts, NAMED),
    "user dict": (lambda: [UserDict(batch) for batch in dicts()], NAMED),
    "nested": (
        lambda: [{"x": {"words": w, "numbers": n}, "y": (y, None)} for w, n, y in flat_batches()],
        {"inputs": ["x.words", "x.numbers"], "target": "y.0"},
    ),
    "other names": (
        lambda: [{"a": w, "b": n, "c": y} for w, n, y in flat_batches()],
        {"inputs": {"words": "a", "numbers": "b"}, "target": "c"},
    ),
    "all but the target": (
        lambda: [dict(each, text="all") for each in dicts()],
        {"target": "labels"},
    ),
    "tuple": (flat_batches, {"inputs": [0, 1], "target": 2}),
    "list, all but the last": (lambda: [list(each) for each in flat_batches()], {"target": -1}),
    "named tuple": (lambda: [Row(*each) for each in flat_batches()], NAMED),
    "dataclass": (lambda: [Sample(*each) for each in flat_batches()], NAMED),
    "samples": (lambda: DataLoader(ROWS, batch_size=8), NAMED),
    "samples of a dataclass": (
        lambda: Loader(
            [Sample(*each[:3]) for each in zip(WORDS, NUMBERS, LABELS, strict=True)], 8, 8
        ),
        NAMED,
    ),
    "in memory": (
        lambda: Loader(TensorSplit(words=WORDS, numbers=NUMBERS, labels=LABELS), 8, 8),
        NAMED,
    ),
    "read into memory": (
        lambda: Loader([dict(row, text=torch.zeros(1)) for row in ROWS], 8, 8, read="memory"),
        NAMED,
    ),
    "samples of workers": (lambda: Loader(ROWS, 8, 8, workers=1), NAMED),
}


@pytest.mark.parametrize("settings", [{}, {"micro_batch": 3, "accumulate": 2}, {"shards": 2}])
@pytest.mark.parametrize("form", FORMS)
def test_each_form_trains_as_a_flat_tuple(form, settings):
    make, names = FORMS[form]
    expected, values = fit(flat_batches(), Plain(), **settings)
    task = fw.tasks.build("classification", **names)
    model, measured = fit(make(), task, **settings)
    assert_same(model, expected)
    assert measured == pytest.approx(values)


def test_a_loss_of_torch_takes_fields():
    expected, _ = fit(flat_batches(), Plain())
    model, _ = fit(dicts(), LossTask(nn.CrossEntropyLoss(), **NAMED))
    assert_same(model, expected)


def test_the_loss_of_the_model():
    expected, values = fit(flat_batches(), Plain(), micro_batch=3)
    task = fw.tasks.build("model_loss", inputs=["words", "numbers", "labels"])
    torch.manual_seed(0)
    model, measured = fit(dicts(), task, Several(), micro_batch=3)
    assert measured == pytest.approx(values)
    assert_same(model, expected)
    trainer = Trainer(max_steps=1)
    inputs = {"words": WORDS, "numbers": NUMBERS}
    assert trainer.predict(inputs, model=model, task=task).shape == (37, 2)
    without = fw.tasks.build("model_loss", inputs=["words", "numbers"])
    with pytest.raises(DataError, match=r"Several returns no loss.*task\.inputs"):
        fit(dicts(), without, Several())


@pytest.mark.parametrize("items", ["targets", "next"])
def test_the_loss_of_a_language_model_is_weighted_by_its_targets(items):
    task = fw.tasks.build("model_loss", items=items)
    labels = torch.tensor([[3, 2, -100], [4, -100, -100]])
    assert int(task.count({"labels": labels})) == {"targets": 3, "next": 1}[items]


def test_outputs_are_nested_and_one_of_them_is_named():
    task = fw.tasks.build("classification", **NAMED, output="logits")
    torch.manual_seed(0)
    model, values = fit(dicts(), task, Several())
    trainer = Trainer(max_steps=1)
    logits = trainer.predict(dicts(), model=model, task=task)
    assert values["test/accuracy"] == pytest.approx(
        float((logits.argmax(1) == LABELS).float().mean())
    )
    whole = trainer.predict(
        dicts(), model=model, task=LossTask(lambda outputs, targets: 0, **NAMED)
    )
    assert isinstance(whole, Outputs)
    assert torch.equal(whole.logits, logits)
    assert torch.equal(whole.hidden[0], NUMBERS)
    with pytest.raises(DataError, match=r"returns a Outputs.*task\.output=logits"):
        fit(dicts(), fw.tasks.build("classification", **NAMED), Several())


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            {},
            r"the fields words \(8, 5\), .*task\.inputs=\[words,numbers\] task\.target=labels",
        ),
        ({"inputs": ["words"]}, r"task\.target: expected the name of the field"),
        (NAMED | {"target": "label"}, r"task\.target=label: .*did you mean 'labels'"),
        (NAMED | {"inputs": ["words", "number"]}, r"task\.inputs=number: .*did you mean 'numbers'"),
        (
            {"inputs": {"word": "words", "numbers": "numbers"}, "target": "labels"},
            r"cannot be called with \(word, numbers\): .*it takes \(words, numbers\)",
        ),
        (NAMED | {"output": "logits"}, r"task\.output=logits: .*got a Tensor of shape \(8, 2\)"),
        (NAMED | {"inputs": ["words", "words"]}, "the field words is named twice"),
        (NAMED | {"inputs": []}, "at least one field"),
    ],
)
def test_wrong_names(names, said):
    with pytest.raises(FrameworkError, match=said):
        fit(dicts(), fw.tasks.build("classification", **names))


def test_rows_of_different_lengths_cannot_be_split():
    batches = [dict(batch, numbers=batch["numbers"][:4]) for batch in dicts()]
    with pytest.raises(DataError, match=r"different lengths: words \(8, 5\), numbers \(4, 3\)"):
        fit(batches, fw.tasks.build("classification", **NAMED), micro_batch=2)


class Seen(Task):
    """Records what a step gets."""

    def __init__(self):
        self.seen = []

    def step(self, model, batch):
        self.seen.append({name: part for name, part in batch.items() if name != "numbers"})
        outputs = model(batch["words"], batch["numbers"])
        return Step(outputs.square().mean(), outputs, batch["labels"])


def test_texts_are_split_and_other_values_are_kept():
    task = Seen()
    extra = {"names": list("abcde"), "scale": torch.tensor(2.0), "note": None, "kind": "train"}
    batch = {"words": WORDS[:5], "numbers": NUMBERS[:5], "labels": LABELS[:5], **extra}
    fit([batch], task, micro_batch=3, max_steps=1)
    first, second = task.seen[:2]
    assert (first["names"], second["names"]) == (list("abc"), list("de"))
    for part in (first, second):
        assert (part["note"], part["kind"], float(part["scale"])) == (None, "train", 2.0)


class Negate(Transform):
    def __call__(self, batch):
        inputs, targets = batch
        return -inputs, targets


class Drop(Transform):
    takes_fields = True

    def __call__(self, batch):
        return {name: part for name, part in batch.items() if name != "text"}


def test_transforms_get_the_named_fields():
    task = fw.tasks.build("classification", inputs="numbers", target="labels")
    torch.manual_seed(0)
    model, _ = fit(dicts(), task, nn.Linear(3, 2), callbacks=[Negate(), Drop()])
    torch.manual_seed(0)
    batches = [(-batch["numbers"], batch["labels"]) for batch in dicts()]
    expected, _ = fit(batches, nn.CrossEntropyLoss(), nn.Linear(3, 2))
    assert_same(model, expected)
    with pytest.raises(DataError, match="expected one field for a transform"):
        fit(dicts(), fw.tasks.build("classification", **NAMED), callbacks=[Negate()])


@pytest.mark.parametrize("settings", [{}, {"cuda_graph": "auto"}, {"precision": "bf16"}])
def test_resumed_bit_for_bit(settings, tmp_path):
    def trained(steps, resume=None):
        torch.manual_seed(0)
        model = Net(dropout=0.3)
        split = TensorSplit(words=WORDS, numbers=NUMBERS, labels=LABELS)
        ema = fw.callbacks.build("ema", decay=0.5)
        trainer = Trainer(max_steps=steps, callbacks=[ema], **settings)
        trainer.fit(
            model,
            split,
            task=fw.tasks.build("classification", **NAMED),
            optimizer=torch.optim.AdamW(model.parameters(), lr=0.02),
            batch_size=8,
            resume=resume,
        )
        return model, trainer

    expected, _ = trained(9)
    _, stopped = trained(4)
    torch.save(stopped.state_dict(), tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=False)
    model, _ = trained(9, state)
    assert_same(model, expected)


def test_the_callbacks_that_read_batches():
    names = ["swa", "sam", "noise_scale", "confusion", "worst", "curves"]
    callbacks = [fw.callbacks.build(name) for name in names]
    torch.manual_seed(0)
    model = Net()
    data = TensorSplit(words=WORDS, numbers=NUMBERS, labels=LABELS)
    trainer = Trainer(max_epochs=4, callbacks=callbacks)
    task = fw.tasks.build("classification", **NAMED)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer.fit(model, data, val=data, task=task, optimizer=optimizer, batch_size=8)
    assert trainer.evaluate(data, name="val")["val/loss"] < 0.7


def test_a_split_has_tensors_or_names():
    split = TensorSplit(words=WORDS, labels=LABELS)
    assert split[3].keys() == {"words", "labels"}
    with pytest.raises(DataError, match="got both; the fields are labels"):
        TensorSplit(WORDS, labels=LABELS)
    with pytest.raises(SettingError, match=r"TensorSplit\(\*\*fields\)"):
        fit({"words": WORDS, "labels": LABELS}, fw.tasks.build("classification", **NAMED))


def trained_in_processes(settings):
    fw.discover()
    torch.manual_seed(0)
    model = Net()
    trainer = Trainer(max_steps=5, strategy=DDP(), device="cpu", **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with trainer:
        trainer.fit(
            model, dicts(), task=fw.tasks.build("classification", **NAMED), optimizer=optimizer
        )
        values = trainer.evaluate(dicts())
    return model.state_dict(), values


def test_two_processes_train_as_one(tmp_path):
    results = run_in_processes(trained_in_processes, 2, tmp_path, {"micro_batch": 3})
    torch.manual_seed(0)
    model = Net()
    trainer = Trainer(max_steps=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer.fit(model, dicts(), task=fw.tasks.build("classification", **NAMED), optimizer=optimizer)
    values = trainer.evaluate(dicts())
    for state, measured in results:
        assert measured == pytest.approx(values, rel=1e-5)
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-6)
