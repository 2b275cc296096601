import math

import numpy as np
import pytest
import torch
from sklearn.metrics import recall_score
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from torch.nn import functional as F

import framework as fw
from framework.errors import DataError, SettingError

CLASS = "class"
LABELS = "labels"
VALUES = "values"
FITS = {
    CLASS: "cross_entropy label_smoothing nll focal dice multi_margin",
    LABELS: "bce_with_logits focal dice hinge multilabel_soft_margin",
    VALUES: "mse l1 smooth_l1 huber poisson_nll quantile log_cosh",
}
CASES: list[tuple[str, str]] = []
for kind, names in FITS.items():
    CASES += [(name, kind) for name in names.split()]


def batch(kind: str, rows: int = 12, columns: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = torch.randn(rows, columns, dtype=torch.float64, requires_grad=True)
    targets = {
        CLASS: torch.randint(columns, (rows,)),
        LABELS: torch.randint(2, (rows, columns)).double(),
        VALUES: torch.rand(rows, columns, dtype=torch.float64),
    }
    return outputs, targets[kind]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_loss_is_a_differentiable_mean_over_samples(name, kind):
    loss = fw.losses.build(name).double()
    outputs, targets = batch(kind)
    whole = loss(outputs, targets)
    parts = [
        loss(o, t) * len(o) / 12 for o, t in zip(outputs.split(5), targets.split(5), strict=True)
    ]
    assert whole.shape == ()
    torch.testing.assert_close(sum(parts), whole)
    assert torch.autograd.gradcheck(lambda o: loss(o, targets), outputs)


def test_every_registered_loss_is_covered_here():
    assert {name for name, _ in CASES} | {"kl_div"} == set(fw.losses.names())


@pytest.mark.parametrize("entry", fw.losses, ids=lambda entry: entry.name)
def test_the_reduction_is_no_setting(entry):
    assert not {"reduction", "reduce", "size_average"} & entry.settings.keys()


def test_cross_entropy_is_torchs_with_weights_smoothing_and_ignored_targets():
    outputs, targets = batch(CLASS)
    targets[:3] = 2
    ours = fw.losses.build("ce", weight=[1, 2, 3, 4], ignore_index=2, label_smoothing=0.1).double()
    torchs = nn.CrossEntropyLoss(
        torch.tensor([1.0, 2, 3, 4]).double(), ignore_index=2, label_smoothing=0.1
    )
    torch.testing.assert_close(ours(outputs, targets), torchs(outputs, targets))
    named = fw.losses.build("label_smoothing")
    torch.testing.assert_close(
        named(outputs, targets), F.cross_entropy(outputs, targets, label_smoothing=0.1)
    )
    nll = fw.losses.build("nll", weight=[1, 2, 3, 4]).double()
    torch.testing.assert_close(
        nll(outputs.log_softmax(1), targets), F.cross_entropy(outputs, targets, nll.weight)
    )


def test_class_weights_move_with_the_module_and_are_not_silently_wrong():
    loss = fw.losses.build("cross_entropy", weight=[1.0, 2.0])
    assert next(loss.buffers()).tolist() == [1, 2]
    with pytest.raises(RuntimeError, match="weight"):
        loss(torch.zeros(2, 3), torch.tensor([0, 1]))


def labelled(targets, classes=3):
    data = fw.Data()
    data.train = fw.TensorSplit(torch.zeros(len(targets), 2), targets)
    data.out_shape = (classes,)
    return data


@pytest.mark.parametrize("name", ["cross_entropy", "nll", "label_smoothing"])
def test_balanced_weights_are_those_of_scikit_learn_in_the_training_split(name):
    targets = torch.tensor([0] * 70 + [1] * 25 + [2] * 5)
    loss = fw.losses.build(name, weight="balanced", ignore_index=-1)
    loss.learn(labelled(torch.cat([targets, torch.tensor([-1, -1])])))
    expected = compute_class_weight("balanced", classes=np.arange(3), y=targets.numpy())
    torch.testing.assert_close(loss.weight, torch.from_numpy(expected).float())
    assert loss.weight[targets].sum() == pytest.approx(100), "the mean weight is 1"
    outputs = torch.randn(100, 3).log_softmax(1)
    smoothing = 0.1 if name == "label_smoothing" else 0.0
    reference = F.cross_entropy(
        outputs, targets, torch.from_numpy(expected).float(), label_smoothing=smoothing
    )
    torch.testing.assert_close(loss(outputs, targets), reference)


def test_a_run_with_balanced_weights_finds_the_rare_class(command):
    """The classes are overlapping normal distributions, one of them twenty times as frequent."""
    draw = np.random.default_rng(0)
    rare = (np.arange(2000) % 21 == 0).astype(int)
    np.savez("a.npz", x=draw.normal(size=(2000, 2)) + 1.5 * rare[:, None], y=rare)
    recall = {}
    for name, weight in (("plain", "[1,1]"), ("balanced", "balanced")):
        status, _, err = command(
            f"train data=npz data.path=a.npz loss=cross_entropy 'loss.weight={weight}'"
            f" run.name={name} trainer.max_epochs=5 optimizer.lr=0.01 loggers=json_lines"
            " 'callbacks=[checkpoint]'"
        )
        assert status in (0, None), err
        status, _, err = command(f"predict runs/default/{name} --input a.npz --output {name}.npz")
        assert status in (0, None), err
        recall[name] = recall_score(rare, np.load(f"{name}.npz")["class_index"])
    assert recall["plain"] < 0.5 < 0.75 < recall["balanced"]


def test_a_class_without_training_targets_has_the_weight_of_one_target():
    loss = fw.losses.build("ce", weight="balanced")
    loss.learn(labelled(torch.tensor([0, 0, 2, 2])))
    assert loss.weight.tolist() == pytest.approx([4 / 3 / 2, 4 / 3, 4 / 3 / 2])
    plain = fw.losses.build("ce", weight=[1.0, 2.0, 3.0])
    plain.learn(labelled(torch.tensor([0, 0, 2, 2])))
    assert plain.weight.tolist() == [1, 2, 3], "explicit weights do not change"


def test_balanced_without_classes_that_can_be_counted_is_refused():
    loss = fw.losses.build("ce", weight="balanced")
    with pytest.raises(
        DataError, match=r"loss\.weight=balanced: this task .*set one number per class"
    ):
        loss(torch.zeros(2, 3), torch.tensor([0, 1]))
    data = labelled(torch.tensor([0]))
    data.train = torch.utils.data.Subset(data.train, [0])
    with pytest.raises(DataError, match=r"loss.weight=balanced: the training split of Data"):
        loss.learn(data)


@pytest.mark.parametrize("name", ["cross_entropy", "nll", "label_smoothing"])
def test_a_batch_of_ignored_targets_costs_nothing_and_a_stray_minus_100_is_no_class(name):
    outputs = torch.randn(4, 3, requires_grad=True)
    loss = fw.losses.build(name, ignore_index=-100)(outputs, torch.full((4,), -100))
    loss.backward()
    assert loss == 0
    assert outputs.grad.abs().sum() == 0
    with pytest.raises(IndexError):
        fw.losses.build(name)(outputs, torch.full((4,), -100))


def test_bce_counts_positives_by_their_weight():
    outputs, targets = batch(LABELS)
    weight = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)
    p = outputs.sigmoid()
    by_hand = -(weight * targets * p.log() + (1 - targets) * (1 - p).log()).mean()
    loss = fw.losses.build("bce", pos_weight=[1, 2, 3, 4]).double()
    torch.testing.assert_close(loss(outputs, targets), by_hand)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_follows_the_paper(gamma):
    outputs, classes = batch(CLASS)
    p = outputs.softmax(1).gather(1, classes[:, None])[:, 0]
    alpha = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    expected = -(alpha[classes] * (1 - p) ** gamma * p.log()).mean()
    loss = fw.losses.build("focal", gamma=gamma, alpha=alpha.tolist()).double()
    torch.testing.assert_close(loss(outputs, classes), expected)

    outputs, labels = batch(LABELS)
    p = torch.where(labels > 0, outputs.sigmoid(), 1 - outputs.sigmoid())
    balance = torch.where(labels > 0, 0.25, 0.75)
    expected = -(balance * (1 - p) ** gamma * p.log()).mean()
    loss = fw.losses.build("focal", gamma=gamma, alpha=0.25).double()
    torch.testing.assert_close(loss(outputs, labels), expected)


def test_focal_stays_finite_on_certain_outputs_and_explains_alpha():
    outputs = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    fw.losses.build("focal", gamma=0.5)(outputs, torch.tensor([0, 0])).backward()
    assert outputs.grad.isfinite().all()
    with pytest.raises(DataError, match=r"loss.alpha=.* alpha=\[0.2, 0.8\]"):
        fw.losses.build("focal", alpha=0.25)(outputs, torch.tensor([0, 0]))


def test_dice_is_a_measure_of_overlap():
    loss = fw.losses.build("dice", smooth=1e-12)
    mask = torch.randint(2, (3, 5, 5))
    sure = 50.0 * (2 * F.one_hot(mask, 2).movedim(-1, 1).float() - 1)
    assert loss(sure, mask) < 1e-6
    assert loss(-sure, mask) == 1
    p = torch.rand(1, 6)
    t = torch.tensor([[1.0, 0, 1, 0, 0, 1]])
    # V-Net, the equation of section 3.
    expected = 1 - 2 * (p * t).sum() / ((p**2).sum() + (t**2).sum())
    torch.testing.assert_close(loss(p.logit(), t), expected)
    empty = torch.zeros(1, 6, requires_grad=True)
    fw.losses.build("dice")(empty, torch.zeros(1, 6)).backward()
    assert (empty.grad > 0).all()


def test_kl_div_is_the_divergence_of_the_samples():
    outputs = torch.randn(5, 3)
    target = torch.rand(5, 3).softmax(1)
    q = torch.distributions.Categorical(logits=outputs)
    expected = torch.distributions.kl_divergence(torch.distributions.Categorical(target), q).mean()
    torch.testing.assert_close(fw.losses.build("kl")(outputs, target), expected)


def test_quantile_is_least_at_the_quantile_and_hinge_at_the_margin():
    values = torch.arange(101.0)
    loss = fw.losses.build("pinball", q=0.9)
    losses = [float(loss(torch.full_like(values, guess), values)) for guess in range(101)]
    assert losses.index(min(losses)) == 90
    outputs = torch.tensor([[2.0, 0.5, 0.5]])
    labels = torch.tensor([[1.0, 1.0, 0.0]])
    hinge = fw.losses.build("hinge")(outputs, labels)
    assert float(hinge) == pytest.approx((0 + 0.5 + 1.5) / 3)
    squared = fw.losses.build("hinge", squared=True)(outputs, labels)
    assert float(squared) == pytest.approx((0.25 + 2.25) / 3)


def test_log_cosh_is_finite_where_cosh_overflows():
    loss = fw.losses.build("log_cosh")
    small = loss(torch.tensor([1.5]), torch.zeros(1))
    assert float(small) == pytest.approx(math.log(math.cosh(1.5)))
    large = loss(torch.tensor([1e4]), torch.zeros(1))
    assert float(large) == pytest.approx(1e4 - math.log(2))


@pytest.mark.parametrize(
    ("name", "setting"), [("huber", {"delta": 0}), ("quantile", {"q": 1}), ("focal", {"gamma": -1})]
)
def test_a_setting_out_of_range_is_refused(name, setting):
    with pytest.raises(SettingError, match="expected"):
        fw.losses.build(name, **setting)
