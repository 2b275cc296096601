"""A loss gives the same averages, targets and errors in a named task and as a plain callable."""

from functools import partial

import pytest
import torch
from sklearn import metrics as sk
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import framework as fw
from framework import Metric, Step, Task, Trainer
from framework.contracts.loss import IGNORED, Mean
from framework.contracts.task import LossTask
from framework.errors import DataError, FrameworkError, SettingError
from framework_plugins.callbacks.monitoring.confusion import count_pairs

N = 12  # samples
D = 5  # inputs
C = 3  # classes
generator = torch.Generator().manual_seed(1)
X = torch.randn(N, D, generator=generator)
Y = torch.tensor([0, 0, 0, 2, 1, 1, 0, 2, 2, 2, 2, 1])
GAPS = torch.tensor([-100, 0, -100, -100, 1, 1, 0, 2, -100, -100, -100, 1])
LABELS = torch.randint(2, (N, C), generator=generator).float()
VALUES = torch.randn(N, C, generator=generator)
SHARES = VALUES.softmax(1)
WEIGHT = torch.tensor([1.0, 2.0, 50.0])
PARTS = [5, 3, 4]  # rows of the batches


def name_of(loss):
    """Return a name for a test: that of a function, or a module with its settings."""
    return getattr(loss, "__name__", str(loss))


class Focal(nn.CrossEntropyLoss):
    """A subclass with class weights; its mean is over the targets, not over their weights."""

    def forward(self, outputs, targets):
        losses = F.cross_entropy(outputs, targets, self.weight, reduction="none")
        return ((1 - (-losses).exp()) ** 2 * losses).mean()


class Kept(nn.Module):
    """A loss of a third party that ignores targets."""

    ignore_index = 2

    def forward(self, outputs, targets):
        kept = targets != self.ignore_index
        return F.cross_entropy(outputs[kept], targets[kept])


class Wrapping(nn.Module):
    """A loss that contains one of torch."""

    def __init__(self):
        super().__init__()
        self.inner = nn.CrossEntropyLoss(WEIGHT.clone(), ignore_index=1)

    def forward(self, outputs, targets):
        return self.inner(2 * outputs, targets)


class PerSample(nn.Module):
    """A loss that counts the items of its mean itself."""

    def forward(self, outputs, targets):
        return ((outputs - targets) ** 2).sum() / (targets > 0).sum()

    def count(self, targets):
        return (targets > 0).sum()


def smoothed(**settings):
    return nn.CrossEntropyLoss(label_smoothing=0.1, **settings)


LOSSES = {
    "plain": (nn.CrossEntropyLoss, Y),
    "weight": (lambda: nn.CrossEntropyLoss(WEIGHT.clone()), Y),
    "weight 0": (lambda: nn.CrossEntropyLoss(torch.tensor([0.0, 1.0, 5.0])), Y.sort().values),
    "default index": (nn.CrossEntropyLoss, GAPS),
    "index 2": (lambda: nn.CrossEntropyLoss(ignore_index=2), Y),
    "all settings": (lambda: smoothed(weight=WEIGHT.clone(), ignore_index=0), Y),
    "probabilities": (nn.CrossEntropyLoss, SHARES),
    "smoothed": (smoothed, GAPS),
    "nll": (lambda: nn.NLLLoss(WEIGHT.clone(), ignore_index=1), Y),
    "subclass": (lambda: Focal(WEIGHT.clone()), Y),
    "third party": (Kept, Y),
    "wrapping": (Wrapping, Y),
    "multi margin": (lambda: nn.MultiMarginLoss(weight=WEIGHT.clone()), Y),
    "bce": (lambda: nn.BCEWithLogitsLoss(pos_weight=WEIGHT.clone()), LABELS),
    "soft margin": (nn.MultiLabelSoftMarginLoss, LABELS),
    "mse": (nn.MSELoss, VALUES),
    "kl": (lambda: nn.KLDivLoss(reduction="batchmean"), SHARES),
    "own count": (PerSample, VALUES),
}


def closure_of(loss):
    return lambda outputs, targets: loss(outputs, targets)


def counted_function():
    def loss(outputs, targets):
        return ((outputs - targets) ** 2).sum() / (targets > 0).sum()

    loss.count = lambda targets: (targets > 0).sum()
    return loss


FUNCTIONS = {
    "function": (lambda: F.cross_entropy, GAPS),
    "partial": (
        lambda: partial(F.cross_entropy, ignore_index=2, weight=WEIGHT.clone().double()),
        Y,
    ),
    "partial of partial": (
        lambda: partial(partial(F.cross_entropy, ignore_index=1), ignore_index=2),
        Y,
    ),
    "method": (lambda: nn.CrossEntropyLoss(ignore_index=2).forward, Y),
    "lambda": (lambda: lambda outputs, targets: ((outputs - targets) ** 2).mean(), VALUES),
    "smooth_l1": (lambda: F.smooth_l1_loss, VALUES),
    "lambda with weights": (
        lambda: lambda o, t: F.cross_entropy(2 * o, t, WEIGHT.double(), ignore_index=1),
        Y,
    ),
    "closure": (lambda: closure_of(nn.CrossEntropyLoss()), GAPS),
    "attribute": (counted_function, VALUES),
}
TASKS = {
    "bce": "multilabel",
    "soft margin": "multilabel",
    "mse": "regression",
    "own count": "regression",
}


def bare(name):
    make, targets = (LOSSES | FUNCTIONS)[name]
    loss = make()
    return (loss.double() if isinstance(loss, nn.Module) else loss), targets


def named(name):
    make, targets = LOSSES[name]
    task = fw.tasks.build(TASKS.get(name, "classification"), loss=make)
    task.criterion.double()
    return task, targets


WAYS = [pytest.param(bare, name, id=f"bare {name}") for name in LOSSES | FUNCTIONS]
WAYS += [pytest.param(named, name, id=f"task {name}") for name in LOSSES]


def network():
    torch.manual_seed(1)
    return nn.Linear(D, C).double()


def cast(targets):
    return targets.double() if targets.is_floating_point() else targets


class Stream(list):
    """Batches that are not inspected before they are read, as those of any iterable."""


def batches_of(targets, sizes, kind=Stream):
    return kind(zip(X.double().split(sizes), cast(targets).split(sizes), strict=True))


def data_of(inputs, targets, in_features, outputs):
    data = fw.Data()
    data.train = fw.TensorSplit(inputs, targets)
    data.in_shape = (in_features,)
    data.out_shape = (outputs,)
    return data


def train(task, batches, *, model=None, **settings):
    """Take a step of SGD and return the trainer and the change of the weight."""
    model = network() if model is None else model
    before = next(model.parameters()).detach().clone()
    trainer = Trainer(max_epochs=1, device="cpu", **settings)
    trainer.fit(model, batches, task=task, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
    return trainer, next(model.parameters()).detach() - before


@pytest.mark.parametrize(("make", "name"), WAYS)
def test_batches_of_any_size_make_the_step_and_the_loss_of_one_batch(make, name):
    loss, targets = make(name)
    whole, step = train(loss, batches_of(targets, N))
    assert step.isfinite().all()
    assert step.abs().max() > 1e-3
    for settings, kind in (({}, list), ({}, Stream), ({"micro_batch": 2}, Stream)):
        _, other = train(loss, batches_of(targets, PARTS, kind), accumulate=3, **settings)
        torch.testing.assert_close(other, step, rtol=1e-5, atol=1e-8)
    expected = whole.evaluate(batches_of(targets, N))
    assert whole.evaluate(batches_of(targets, PARTS)) == pytest.approx(expected, rel=1e-6)
    whole.micro_batches.size = 2
    assert whole.evaluate(batches_of(targets, PARTS)) == pytest.approx(expected, rel=1e-6)


def ragged(classes):
    """Batches of sequences of three lengths: class indices, or values."""
    batches = []
    for length in (2, 7, 4):
        inputs = torch.randn(3, D, length, generator=generator).double()
        indices = torch.randint(C, (3, length), generator=generator)
        indices[0, 0] = -100
        values = torch.randn(3, C, length, generator=generator).double()
        batches.append((inputs, indices if classes else values))
    return batches


@pytest.mark.parametrize(
    ("loss", "classes", "total"),
    [
        (nn.CrossEntropyLoss(), True, lambda o, t: F.cross_entropy(o, t, reduction="sum")),
        (lambda o, t: ((o - t) ** 2).mean(), False, lambda o, t: F.mse_loss(o, t, reduction="sum")),
        (nn.MSELoss(), False, lambda o, t: F.mse_loss(o, t, reduction="sum")),
        (fw.tasks.build("regression"), False, lambda o, t: F.mse_loss(o, t, reduction="sum")),
        (fw.tasks.build("reconstruction"), None, lambda o, t: F.mse_loss(o, t, reduction="sum")),
        (
            fw.tasks.build("classification", loss=nn.CrossEntropyLoss),
            True,
            partial(F.cross_entropy, reduction="sum"),
        ),
    ],
    ids=["cross_entropy", "lambda", "mse", "regression", "reconstruction", "classification"],
)
def test_sequences_of_unequal_lengths_are_averaged_over_all_items(loss, classes, total):
    batches = ragged(classes)
    torch.manual_seed(1)
    model = nn.Conv1d(D, D if classes is None else C, 1).double()
    reference = nn.Conv1d(D, D if classes is None else C, 1).double()
    reference.load_state_dict(model.state_dict())
    pairs = [(x, x if classes is None else y) for x, y in batches]
    items = 0
    loss_sum = 0
    for x, y in pairs:
        items += int((y != -100).sum()) if classes else y.numel()
        loss_sum = loss_sum + total(reference(x), y)
    mean = loss_sum / items
    mean.backward()
    trainer, step = train(loss, batches, model=model, accumulate=3)
    torch.testing.assert_close(step, -reference.weight.grad)
    value = trainer.evaluate(batches, model=nn.Sequential(reference))["test/loss"]
    assert value == pytest.approx(mean.item(), rel=1e-9)


@pytest.mark.parametrize("weight", [None, [0.0, 1.0, 5.0]])
@pytest.mark.parametrize("way", ["bare", "lambda", "factory", "registered"])
def test_a_batch_without_a_counted_target_adds_nothing(way, weight):
    ignored = -100 if weight is None else 2
    targets = [torch.tensor([0, 1, 2, 1]), torch.full((4,), ignored), torch.tensor([1, 1, 2, 2])]
    if weight is not None:
        targets[1] = torch.tensor([0, 0, 2, 0])
    batches = list(zip(X[:12].split(4), targets, strict=True))
    tensor = None if weight is None else torch.tensor(weight)
    task = nn.CrossEntropyLoss(tensor, ignore_index=ignored)
    if way == "lambda":
        task = closure_of(task)
    if way == "factory":
        task = fw.tasks.build(
            "classification", loss=lambda: nn.CrossEntropyLoss(tensor, ignore_index=ignored)
        )
    if way == "registered":
        task = fw.tasks.build(
            "classification",
            loss={"name": "cross_entropy", "weight": weight, "ignore_index": ignored},
        )
    rest = [batches[0], batches[2]]
    _, with_none = train(task, batches, model=network().float(), accumulate=3)
    trainer, without = train(task, rest, model=network().float(), accumulate=2)
    torch.testing.assert_close(with_none, without)
    value = trainer.evaluate(batches)["test/loss"]
    assert value == pytest.approx(trainer.evaluate(rest)["test/loss"], rel=1e-6)
    for accumulate in (1, 2):
        trainer, step = train(
            task, [batches[1]] * 2, model=network().float(), accumulate=accumulate
        )
        assert torch.equal(step, torch.zeros_like(step))
        assert float(trainer.loss) == 0


def test_a_task_whose_loss_is_nan_without_items_adds_nothing():
    class Own(Task):
        def step(self, model, batch):
            outputs = model(batch[0])
            return Step(
                F.cross_entropy(outputs, batch[1]),
                outputs,
                batch[1],
                {"more": outputs.mean() / 0 * 0},
            )

        def count(self, batch):
            return (batch[1] != -100).sum()

    batches = batches_of(torch.where(torch.arange(N) < 4, -100, Y), [4, 8])
    trainer, step = train(Own(), batches, accumulate=2)
    _, expected = train(Own(), batches[1:])
    torch.testing.assert_close(step, expected)
    expected = F.cross_entropy(network()(X[4:].double()), Y[4:]).item()
    assert float(trainer.loss) == pytest.approx(expected)


def test_a_batch_of_context_only_has_no_loss_in_language_modelling():
    task = fw.tasks.build("language_modelling")
    targets = torch.tensor([[-1, -1], [0, 2]])
    model = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 3))
    loss = task.step(model, (torch.zeros(1, 2, dtype=torch.long), targets[:1])).loss
    loss.backward()
    assert loss == 0
    assert model[1].weight.grad.abs().sum() == 0


@pytest.mark.parametrize("name", ["distillation", "multi_task"])
def test_both_losses_of_a_task_are_averaged_over_the_same_targets(name):
    loss = {"name": "cross_entropy", "weight": WEIGHT.tolist(), "ignore_index": 1}
    task = fw.tasks.build(name, loss=loss)
    task.criterion.double()
    torch.manual_seed(1)
    task.teacher = nn.Linear(D, C).double().requires_grad_(False)
    torch.manual_seed(2)
    model = nn.Linear(D, C + D if name == "multi_task" else C).double()
    start = {key: value.clone() for key, value in model.state_dict().items()}
    _, whole = train(task, batches_of(Y, N), model=model)
    model.load_state_dict(start)
    _, parts = train(task, batches_of(Y, PARTS), model=model, accumulate=3)
    torch.testing.assert_close(parts, whole)


def test_a_task_that_compares_the_samples_of_a_batch_refuses_micro_batches():
    for size in (2, "auto"):
        with pytest.raises(SettingError, match="micro_batch: expected null, as Contrastive"):
            train(fw.tasks.build("contrastive"), batches_of(Y, PARTS), micro_batch=size)


def test_an_evaluation_without_a_counted_target_is_nan():
    for number in (1, 40):
        batches = [(X[:2].double(), torch.full((2,), -100))] * number
        found = Trainer(max_steps=1).evaluate(batches, model=network(), task=nn.CrossEntropyLoss())
        assert found["test/loss"] != found["test/loss"]


# reductions


@pytest.mark.parametrize(
    "loss",
    [
        nn.MSELoss(reduction="sum"),
        nn.CrossEntropyLoss(reduction="none"),
        nn.CrossEntropyLoss(reduction="sum"),
        nn.MSELoss(reduction="batchmean"),
        partial(F.mse_loss, reduction="sum"),
        partial(F.mse_loss, size_average=False),
    ],
    ids=["mse sum", "none", "sum", "mse batchmean", "partial", "older"],
)
def test_a_loss_of_torch_that_is_not_a_mean_is_an_error_before_training(loss):
    with pytest.raises(SettingError, match=r"the loss \w+: expected reduction='mean', got"):
        train(loss, batches_of(VALUES, PARTS))
    with pytest.raises(SettingError, match="expected reduction"):
        Trainer(max_steps=1).evaluate(batches_of(VALUES, PARTS), model=network(), task=loss)
    if isinstance(loss, nn.MSELoss):
        task = fw.tasks.build("regression", loss=lambda: loss)
        with pytest.raises(SettingError, match="expected reduction"):
            train(task, batches_of(VALUES, PARTS))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda o, t: ((o - t) ** 2).sum(), "is a sum over the samples"),
        (
            lambda o, t: (o - t) ** 2,
            r"expected one real number, the mean over the batch, got float64 of shape",
        ),
        (lambda o, t: 1.0, "expected a tensor with one number, got a float"),
    ],
    ids=["sum", "none", "float"],
)
def test_a_function_that_is_not_a_mean_is_an_error_before_a_weight_changes(loss, message):
    model = network()
    start = model.weight.detach().clone()
    with pytest.raises(DataError, match=message):
        train(loss, batches_of(VALUES, PARTS), model=model)
    assert torch.equal(model.weight, start)
    with pytest.raises(DataError, match=message):
        Trainer(max_steps=1).evaluate(batches_of(VALUES, PARTS), model=network(), task=loss)


class Summed(nn.Module):
    """A loss of a third party that is a sum."""

    def forward(self, outputs, targets):
        return ((outputs - targets) ** 2).sum()


def test_a_named_task_refuses_a_sum_before_training():
    data = data_of(X, VALUES, D, C)
    data.target = "value"
    with pytest.raises(DataError, match="the loss Summed is a sum over the samples"):
        train(fw.tasks.build("regression", loss=Summed), data, model=nn.Linear(D, C))


@pytest.mark.parametrize(
    "loss",
    [nn.TripletMarginLoss(), nn.CTCLoss(), lambda o: o.mean(), F.gaussian_nll_loss],
    ids=name_of,
)
def test_a_loss_of_other_arguments_is_an_error_before_training(loss):
    with pytest.raises(
        SettingError, match=r"the loss .* cannot be called with \(outputs, targets\)"
    ):
        train(loss, batches_of(VALUES, PARTS))


def test_the_trial_of_a_function_that_works_in_place_does_not_change_outputs():
    def loss(outputs, targets):
        return outputs.sub_(targets).square().mean()

    class Zero(nn.Module):
        def forward(self, x):
            return x * 0

    mae = fw.metrics.build("mae")
    found = Trainer(max_steps=1).evaluate(
        [(VALUES, VALUES)], model=Zero(), task=loss, metrics=[mae]
    )
    assert found["test/mae"] == pytest.approx(2 * float(VALUES.abs().mean()))  # of -targets


def contrast(outputs, targets):
    unit = F.normalize(outputs, dim=1)
    return F.cross_entropy(unit @ unit.T / 0.5, torch.arange(len(outputs)).roll(1))


@pytest.mark.parametrize(
    "loss", [contrast, nn.SmoothL1Loss(), lambda o, t: (o - t).abs().mean()], ids=name_of
)
def test_a_loss_that_is_not_a_sum_is_accepted(loss):
    train(loss, batches_of(VALUES, PARTS))


# targets that the loss ignores


@pytest.mark.parametrize("index", [-100, 0, 2])
@pytest.mark.parametrize("way", ["bare", "function", "lambda", "factory", "registered"])
def test_metrics_and_confusion_ignore_the_targets_that_the_loss_ignores(way, index):
    targets = torch.where(Y == 2, index, Y) if index < 0 else Y
    task = nn.CrossEntropyLoss(ignore_index=index)
    if way == "function":
        task = partial(F.cross_entropy, ignore_index=index)
    if way == "lambda":
        task = closure_of(task)
    if way == "factory":
        task = fw.tasks.build(
            "classification", loss=lambda: nn.CrossEntropyLoss(ignore_index=index)
        )
    if way == "registered":
        task = fw.tasks.build(
            "classification", loss={"name": "cross_entropy", "ignore_index": index}
        )
    model = network().float()
    names = ("accuracy", "f1", "perplexity", "top_k", "balanced_accuracy", "auroc")
    metrics = [fw.metrics.build(name, **({"k": 2} if name == "top_k" else {})) for name in names]
    trainer = Trainer(max_steps=1, device="cpu")
    split = fw.TensorSplit(X, targets)
    found = trainer.evaluate(split, model=model, task=task, metrics=metrics, batch_size=5)
    kept = targets != index
    outputs = model(X[kept]).detach()
    truth = targets[kept]
    assert found["test/accuracy"] == pytest.approx(sk.accuracy_score(truth, outputs.argmax(1)))
    assert found["test/balanced_accuracy"] == pytest.approx(
        sk.recall_score(truth, outputs.argmax(1), average="macro", labels=truth.unique())
    )
    assert found["test/f1"] == pytest.approx(sk.f1_score(truth, outputs.argmax(1), average="macro"))
    assert found["test/top2"] == pytest.approx(
        sk.top_k_accuracy_score(truth, outputs, k=2, labels=range(C))
    )
    assert found["test/perplexity"] == pytest.approx(
        float(F.cross_entropy(outputs, truth).exp()), rel=1e-5
    )
    assert found["test/perplexity"] == pytest.approx(2.718281828 ** found["test/loss"], rel=1e-5)
    trainer.val_batches = trainer._batches(split, 5)
    assert count_pairs(trainer, "confusion").sum() == kept.sum()


def test_metrics_receive_the_likeliest_class_of_probabilities():
    trainer = Trainer(max_steps=1, device="cpu")
    accuracy = [fw.metrics.build("accuracy")]
    for task in (nn.CrossEntropyLoss(), fw.tasks.build("classification")):
        found = trainer.evaluate(
            [(SHARES.log(), SHARES)], model=nn.Identity(), task=task, metrics=accuracy
        )
        assert found["test/accuracy"] == 1


def test_targets_in_memory_that_are_never_ignored_are_counted_without_the_device():
    task = LossTask(nn.CrossEntropyLoss())
    batch = (torch.zeros(4, D), torch.tensor([0, 1, 2, 1]))
    assert isinstance(task.count(batch), torch.Tensor)
    task.know_targets([Y])
    assert task.count(batch) == 4
    assert isinstance(task.count(batch), int)
    task.know_targets([Y, GAPS])
    assert task.count((X, GAPS)) == 6
    loader = DataLoader(TensorDataset(X.double(), Y), 4)
    seen = []

    class RecordAllKept(fw.Callback):
        def on_step_end(self, trainer):
            seen.append(trainer.task.all_kept)

    inputs = [
        loader,
        batches_of(Y, PARTS, list),
        batches_of(GAPS, PARTS, list),
        batches_of(Y, PARTS),
    ]
    for data in inputs:
        trainer, _ = train(nn.CrossEntropyLoss(), data, callbacks=[RecordAllKept()], accumulate=9)
        assert not trainer.task.all_kept
    assert seen == [True, True, False, False]


@pytest.mark.parametrize("name", ["regression", "multilabel", "reconstruction"])
def test_samples_of_a_data_set_and_numbers_of_other_targets_are_counted(name):
    task = fw.tasks.build(name)
    batch = (torch.zeros(4, C), torch.zeros(4, C))
    assert task.count(batch) == 4 * C
    data = data_of(*batch, C, C)
    data.target = "labels" if name == "multilabel" else "value"
    task.check(data)
    assert task.count(batch) == 4
    assert isinstance(task.count(batch), int)
    assert task.count((torch.zeros(4, C + 1),) * 2) == pytest.approx(4 * (C + 1) / C)


def test_a_step_of_a_plain_loss_does_not_read_the_device():
    outputs = torch.zeros(4, 3, device="meta")  # has no values: reading one is an error
    for loss in (
        nn.MSELoss(),
        F.l1_loss,
        nn.CrossEntropyLoss(),
        partial(F.cross_entropy, ignore_index=0),
    ):
        classes = Mean.of(loss).form == "classes"
        batch = (outputs, outputs[:, 0].long() if classes else outputs)
        LossTask(loss).step(nn.Identity(), batch)
        LossTask(loss).count(batch)


# shapes and types


REGISTERED = [
    fw.losses.build(name) for name in ("hinge", "quantile", "log_cosh", "focal", "poisson_nll")
]


@pytest.mark.parametrize(
    "loss",
    [nn.MSELoss(), F.mse_loss, nn.HuberLoss(), nn.BCEWithLogitsLoss(), *REGISTERED],
    ids=name_of,
)
@pytest.mark.parametrize("shapes", [((8, 1), (8,)), ((8,), (8, 1))], ids=str)
def test_targets_are_never_broadcast_by_a_loss_of_torch(loss, shapes):
    outputs = torch.rand(8, generator=generator).reshape(shapes[0])
    targets = torch.rand(8, generator=generator).reshape(shapes[1])
    batches = [(outputs, targets)]
    values = Trainer(max_steps=1).evaluate(batches, model=nn.Identity(), task=loss)
    expected = float(loss(outputs.flatten(), targets.flatten()))
    assert values["test/loss"] == pytest.approx(expected)


@pytest.mark.parametrize(
    "loss", [nn.MSELoss(), F.mse_loss, nn.KLDivLoss(reduction="batchmean")], ids=name_of
)
@pytest.mark.parametrize("shape", [(4, 1), (4,), (1, 4), (4, 4, 2)], ids=str)
def test_targets_of_another_shape_are_refused_by_a_loss_of_torch(loss, shape):
    with pytest.raises(
        DataError, match=r"targets have shape .* but the model.s outputs .*\(4, 4\)"
    ):
        LossTask(loss).step(nn.Identity(), (torch.zeros(4, 4), torch.zeros(shape)))


SPREADING = {
    "difference": lambda o, t: ((o - t) ** 2).mean(),
    "function": lambda o, t: F.mse_loss(o, t),
    "after an activation": lambda o, t: (o.sigmoid() - t.abs()).abs().mean(),
    "picked": lambda o, t: F.l1_loss(o["y"], t),
    "in place": lambda o, t: t.clone().sub(o).pow_(2).mean(),
}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("name", SPREADING)
def test_a_function_that_broadcasts_outputs_and_targets_is_refused(name):
    loss = SPREADING[name]
    torch.manual_seed(0)
    model = nn.Linear(D, 1)
    if name == "picked":
        model = Picked(model)
    start = next(model.parameters()).detach().clone()
    batches = list(zip(X.split([1, 11]), VALUES[:, 0].split([1, 11]), strict=True))
    message = r"broadcasts outputs of shape \(11, 1\) and targets of shape \(11,\) to \(11, 11\)"
    with pytest.raises(DataError, match=message):
        train(loss, batches, model=model, accumulate=2)
    assert torch.equal(next(model.parameters()), start)
    with pytest.raises(DataError, match=message):
        Trainer(max_steps=1).evaluate(batches, model=model, task=loss)


class Picked(nn.Module):
    """A model that returns a dict."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return {"y": self.inner(x)}


@pytest.mark.parametrize(
    ("loss", "outputs", "targets"),
    [
        (lambda o, t: F.mse_loss(o.squeeze(1), t), 1, VALUES[:, 0]),
        (lambda o, t: F.mse_loss(o, t.unsqueeze(1)), 1, VALUES[:, 0]),
        (lambda o, t: F.cross_entropy(o, t), N, torch.arange(N)),
        (lambda o, t: -o.log_softmax(1)[torch.arange(len(t)), t].mean(), N, torch.arange(N)),
        (lambda o, t: (o - t).abs().mean(), 3, VALUES[:, :1]),
        (lambda o, t: (o - o.T - (t[:, None] - t)).abs().mean(), 1, VALUES[:, 0]),
        (lambda o, t: F.cosine_embedding_loss(o, o.roll(1, 0), 2 * t - 1), 3, Y % 2),
    ],
    ids=["squeeze", "unsqueeze", "classes", "own classes", "quantiles", "pairs", "cosine"],
)
def test_a_function_may_take_targets_of_another_shape_by_design(loss, outputs, targets):
    train(loss, [(X, targets)], model=nn.Linear(D, outputs))


class Sequences(nn.CrossEntropyLoss):
    """A subclass of other outputs and targets: (batch, T, classes) with (batch, T)."""

    def forward(self, outputs, targets):
        return super().forward(outputs["y"].transpose(1, 2), targets)


def test_a_subclass_may_take_other_outputs_than_its_base_class():
    targets = torch.tensor([[0, 1], [2, -100]])
    inputs = torch.randn(2, 2, D)
    train(Sequences(), [(inputs, targets)] * 2, model=Picked(nn.Linear(D, C)), accumulate=2)
    square = torch.where(torch.arange(9).reshape(3, 3) % 2 == 0, 1, 2)
    loss = Sequences(ignore_index=1)
    train(loss, [(torch.randn(3, 3, D), square)], model=Picked(nn.Linear(D, C)))
    train(closure_of(nn.CrossEntropyLoss(ignore_index=1)), [(X[:3], Y[2:5])], model=nn.Linear(D, C))


class Naive(Metric):
    """A metric of a user that does not check shapes."""

    name = "naive"

    def sums(self, outputs, targets):
        errors = (outputs - targets).abs()
        return torch.stack([errors.sum(), torch.full_like(errors, 1).sum()])

    def compute(self, sums):
        return float(sums[0] / sums[1])


class Own(Task):
    """A task of a user whose targets for metrics have another shape than the outputs."""

    def step(self, model, batch):
        outputs = model(batch[0])
        return Step(F.mse_loss(outputs[:, 0], batch[1]), outputs, batch[1])


def test_metrics_never_broadcast_the_outputs_and_targets_of_a_task():
    outputs = VALUES[:, :1] + 3
    targets = VALUES[:, 1] + 3
    trainer = Trainer(max_steps=1)
    for name in ("mae", "mse", "rmse", "r2", "mape", "r2_log"):
        metric = fw.metrics.build(name)
        found = trainer.evaluate(
            [(outputs, targets)], model=nn.Identity(), task=Own(), metrics=[metric]
        )
        same = metric.compute(metric.sums(outputs, targets[:, None]).double())
        assert found[f"test/{metric.name}"] == pytest.approx(same), name
    with pytest.raises(
        DataError, match=r"the metric naive broadcasts outputs of shape \(12, 1\) and targets"
    ):
        trainer.evaluate([(outputs, targets)], model=nn.Identity(), task=Own(), metrics=[Naive()])


@pytest.mark.parametrize("entry", fw.metrics, ids=lambda entry: entry.name)
def test_every_registered_metric_reshapes_or_refuses_targets(entry):
    metric = entry.build({}, {})
    for kind in set(metric.targets) - {"none"}:
        outputs = VALUES[:, :1] + 3 if kind != "class" else VALUES
        targets = {"class": Y, "labels": (Y > 0).float(), "value": VALUES[:, 1] + 3}[kind]
        column = metric.sums(outputs, targets.reshape(-1, 1))
        torch.testing.assert_close(metric.sums(outputs, targets), column, equal_nan=True)
        with pytest.raises(DataError, match="targets have shape"):
            metric.sums(outputs, targets[:5])


@pytest.mark.parametrize(
    "targets", [Y.float(), F.one_hot(Y, C)], ids=["floating indices", "integer table"]
)
def test_targets_that_are_neither_indices_nor_probabilities_are_refused(targets):
    for task in (nn.CrossEntropyLoss(), fw.tasks.build("classification")):
        with pytest.raises(DataError, match=r"targets have shape \(5.*class indices"):
            train(task, batches_of(targets, PARTS))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_class_indices_of_any_integer_dtype_are_accepted(dtype):
    _, expected = train(nn.CrossEntropyLoss(), batches_of(Y, N))
    for task in (nn.CrossEntropyLoss(), F.cross_entropy, fw.tasks.build("classification")):
        _, step = train(task, [(X.double(), Y.to(dtype))])
        assert torch.equal(step, expected)
    weighted = LossTask(nn.CrossEntropyLoss(WEIGHT))
    assert weighted.count((X, Y.to(dtype))) == WEIGHT[Y].sum()
    _, step = train(nn.CrossEntropyLoss(), [(X.double(), Y.to(dtype)[:, None])])
    assert torch.equal(step, expected)


mse_needs_torch_2_11 = pytest.mark.xfail(
    torch.__version__ < (2, 11),
    reason="mse_loss of torch 2.10 cannot mix dtypes",
)


@pytest.mark.parametrize(
    "name", [pytest.param("mse", marks=mse_needs_torch_2_11), "huber", "bce_with_logits"]
)
def test_float64_targets_are_accepted(name):
    loss = fw.losses.build(name)
    task = fw.tasks.build("multilabel", loss=lambda: loss)
    steps = []
    for targets in (LABELS, LABELS.double()):
        steps += [train(each, [(X, targets)], model=network().float())[1] for each in (loss, task)]
    for step in steps[1:]:
        torch.testing.assert_close(step, steps[0])


@pytest.mark.parametrize(
    "task", [nn.CrossEntropyLoss(), fw.tasks.build("classification")], ids=["bare", "named"]
)
def test_inputs_of_another_dtype_than_the_model_are_an_error(task):
    batches = batches_of(Y, N)
    with pytest.raises(
        DataError, match=r"the inputs are torch.int64, but the model's parameters torch.float32"
    ):
        train(task, [(X.long(), Y)], model=network().float())
    message = "the inputs are torch.float64, but the model's parameters torch.float32"
    with pytest.raises(DataError, match=message):
        train(task, batches, model=network().float())
    with pytest.raises(DataError, match=message):
        Trainer(max_steps=1).evaluate(batches, model=network().float(), task=task)
    with pytest.raises(DataError, match=message):
        Trainer(max_steps=1).predict(batches, model=network().float())


@pytest.mark.parametrize(
    "task", [nn.CrossEntropyLoss(), fw.tasks.build("classification"), F.mse_loss]
)
@pytest.mark.parametrize("tensors", [1, 3])
def test_a_batch_without_exactly_two_tensors_is_an_error(task, tensors):
    with pytest.raises(
        DataError, match=rf"a batch has {tensors} tensors.*this task takes \(inputs, targets\)"
    ):
        train(task, [(X.double(), Y, Y)[:tensors]])


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize("model", [Pair(D, C), Picked(nn.Linear(D, C))], ids=["tuple", "dict"])
def test_a_model_that_returns_more_than_a_tensor_is_an_error(model):
    described = r"a tuple of 2" if isinstance(model, Pair) else r"a dict \(y\)"
    for task in (
        nn.CrossEntropyLoss(),
        fw.tasks.build("classification"),
        fw.tasks.build("reconstruction"),
    ):
        with pytest.raises(DataError, match=described):
            train(task, [(X, Y)], model=model)
    trainer = Trainer(max_steps=1)
    outputs = trainer.predict(X, model=model)
    assert type(outputs) is type(model(X))
    assert outputs[0 if isinstance(model, Pair) else "y"].shape == (len(X), C)

    def picking(outputs, targets):
        return F.cross_entropy(outputs["y"] if isinstance(outputs, dict) else outputs[0], targets)

    assert trainer.evaluate([(X, Y)], model=model, task=picking)["test/loss"] > 0
    with pytest.raises(DataError, match=f"metrics=accuracy: .* outputs as one tensor.*{described}"):
        trainer.evaluate([(X, Y)], task=picking, metrics=[fw.metrics.build("accuracy")])


# parameters of a loss


class Learnt(nn.Module):
    """A loss with its own parameter."""

    def __init__(self, trained=True):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()), requires_grad=trained)
        self.register_buffer("kept", torch.ones(()))

    def forward(self, outputs, targets):
        return F.cross_entropy(outputs * self.scale * self.kept, targets)


class Weighing(Task):
    """A task with a learnt weight."""

    def __init__(self):
        self.scale = nn.Parameter(torch.ones(()))

    def step(self, model, batch):
        outputs = model(batch[0])
        return Step(F.cross_entropy(outputs * self.scale, batch[1]), outputs, batch[1])


def closure():
    loss = Learnt()
    return lambda outputs, targets: loss(outputs, targets)


@pytest.mark.parametrize(
    "make",
    [
        Learnt,
        lambda: partial(Learnt()),
        lambda: Learnt().forward,
        closure,
        Weighing,
        lambda: fw.tasks.build("classification", loss=Learnt),
    ],
    ids=["bare", "partial", "method", "closure", "task", "named"],
)
def test_a_loss_with_its_own_parameter_is_an_error_before_a_weight_changes(make):
    model = nn.Linear(D, C)
    start = model.weight.detach().clone()
    with pytest.raises(
        SettingError, match="only parameters of the model are trained and saved"
    ) as error:
        train(make(), [(X, Y)], model=model)
    assert "requires_grad_(False)" in str(error.value)
    assert torch.equal(model.weight, start)


def test_a_loss_may_have_frozen_parameters_buffers_and_parameters_of_the_model():
    model = nn.Linear(D, C)
    train(Learnt(trained=False), [(X, Y)], model=model)

    def regularised(outputs, targets):
        return F.cross_entropy(outputs, targets) + 0.1 * model.weight.square().sum()

    train(regularised, [(X, Y)], model=model)
    loss = Learnt()
    model.loss = loss
    train(loss, [(X, Y)], model=model)
    values = Trainer(max_steps=1).evaluate([(X, Y)], model=nn.Linear(D, C), task=Learnt())
    assert values["test/loss"] > 0


PLUGIN = """
import torch
from torch import nn
from torch.nn import functional as F
from framework import losses

@losses.register("learnt")
class Learnt(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, outputs, targets):
        return F.cross_entropy(outputs * self.scale, targets)

losses.register("any_reduction", nn.CrossEntropyLoss)
"""


def test_a_loss_of_a_plugin_is_an_error_on_the_command_line_before_a_run_begins(
    command, tmp_path, forget_plugins
):
    (tmp_path / "parts.py").write_text(PLUGIN)
    quick = "train --plugins parts.py trainer.max_steps=1 run.name=a model.width=4 model.depth=1"
    for override, message in (
        ("loss=learnt", "the loss Learnt has `scale` to train, but only parameters of the model"),
        ("loss=any_reduction loss.reduction=sum", "expected reduction='mean', got reduction='sum'"),
    ):
        status, _, err = command(f"{quick} {override}")
        assert status == 2
        assert message in err
        assert len(err.splitlines()) == 1
        assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_mixing_refuses_a_loss_that_ignores_a_class(name):
    mix = fw.transforms.build(name, (1, 4, 4), (C,))
    mix.criterion = fw.losses.build("cross_entropy", ignore_index=0)
    with pytest.raises(SettingError, match="ignore_index=0"):
        mix((torch.rand(N, 1, 4, 4), Y))
    mix.criterion = nn.CrossEntropyLoss()
    with pytest.raises(SettingError, match="class targets from 0 to 2"):
        mix((torch.rand(N, 1, 4, 4), GAPS))


def test_a_plain_loss_is_checked_against_data_and_learns_from_it():
    data = data_of(X, Y, D, 2)
    with pytest.raises(DataError, match=r"the train split of Data has a target 2: .* from 0 to 1"):
        train(nn.CrossEntropyLoss(), data, model=nn.Linear(D, 2))
    data.out_shape = (C,)
    balanced = fw.losses.build("cross_entropy", weight="balanced")
    train(balanced, data, model=nn.Linear(D, C))
    assert len(balanced.weight) == C


def test_balanced_weights_of_targets_out_of_range_are_refused():
    for targets, settings, message in (
        (GAPS, {}, "got -100"),
        (torch.full((4,), IGNORED), {"ignore_index": IGNORED}, "all training targets are ignored"),
    ):
        loss = fw.losses.build("cross_entropy", weight="balanced", **settings)
        data = data_of(torch.zeros(len(targets), 2), targets, 2, C)
        with pytest.raises(FrameworkError, match=message):
            loss.learn(data)
