import pytest
import torch
from torch.nn import functional as F

import framework as fw
from framework.errors import BuildError

VECTOR = (5,)
SEQUENCE = (7, 5)
IMAGE = (5, 4, 3)


@pytest.mark.parametrize(
    ("in_shape", "pool", "by_hand"),
    [
        (VECTOR, "flatten", lambda x: x),
        (VECTOR, "mean", lambda x: x),
        (SEQUENCE, "flatten", lambda x: x.reshape(2, 35)),
        (SEQUENCE, "mean", lambda x: x.sum(1) / 7),
        (SEQUENCE, "max", lambda x: x.max(1).values),
        (SEQUENCE, "first", lambda x: x[:, 0]),
        (SEQUENCE, "last", lambda x: x[:, 6]),
        (IMAGE, "flatten", lambda x: x.reshape(2, 60)),
        (IMAGE, "mean", lambda x: x.sum((2, 3)) / 12),
        (IMAGE, "max", lambda x: x.reshape(2, 5, 12).max(2).values),
    ],
)
def test_the_class_head_is_linear_in_the_pooled_features(in_shape, pool, by_hand):
    head = fw.heads.build("class", in_shape, (10,), pool=pool)
    x = torch.randn(2, *in_shape)
    torch.testing.assert_close(head(x), F.linear(by_hand(x), head.linear.weight, head.linear.bias))


@pytest.mark.parametrize("out_shape", [(1,), (3, 4, 2)])
def test_values_have_any_shape(out_shape):
    head = fw.heads.build("value", IMAGE, out_shape)
    assert head(torch.randn(2, *IMAGE)).shape == (2, *out_shape)


def test_the_mlp_head_has_a_hidden_layer():
    settings = {"width": 6, "activation": "tanh", "norm": "layer", "dropout": 0.5, "pool": "mean"}
    head = fw.heads.build("mlp", SEQUENCE, (10,), **settings).eval()
    x = torch.randn(2, *SEQUENCE)
    hidden = head.hidden.norm(head.hidden.linear(x.mean(1))).tanh()
    torch.testing.assert_close(head(x), head.output.linear(hidden))
    assert sum(p.numel() for p in head.parameters()) == (5 * 6 + 6) + 2 * 6 + (6 * 10 + 10)
    assert fw.heads.build("mlp", VECTOR, (10,), activation="glu")(torch.randn(2, 5)).shape == (
        2,
        10,
    )


@pytest.mark.parametrize("out_shape", [(10,), (7, 10)])
def test_the_token_head_is_the_same_at_every_position(out_shape):
    head = fw.heads.build("token", SEQUENCE, out_shape)
    x = torch.randn(2, *SEQUENCE)
    assert head(x).shape == (2, 7, 10)
    torch.testing.assert_close(head(x)[:, 3], head(x[:, 3:4])[:, 0])


@pytest.mark.parametrize(
    ("name", "settings", "in_shape", "message"),
    [
        (
            "class",
            {"pool": "last"},
            IMAGE,
            r"pool=last expects \(D,\) or \(T, D\), got \(5, 4, 3\)",
        ),
        ("mlp", {"pool": "mean"}, (5, 4, 3, 2), r"pool=mean expects"),
        ("token", {}, IMAGE, r"token head expects \(T, D\), got \(5, 4, 3\)"),
    ],
)
def test_a_head_refuses_a_shape_and_names_the_expected_ones(name, settings, in_shape, message):
    with pytest.raises(BuildError, match=message):
        fw.heads.build(name, in_shape, (10,), **settings)
