"""The model `stack`: a list of blocks with settings."""

import pytest
import torch
from torch import nn

import framework as fw
from framework.errors import BuildError, SettingError, UnknownName

IMAGE = (1, 8, 8)


def stack(in_shape, blocks=(), **settings):
    return fw.models.build("stack", in_shape, (10,), blocks=list(blocks), **settings)


def test_a_list_of_names_and_settings_is_a_model():
    model = stack(
        IMAGE,
        [
            {
                "name": "conv2d",
                "channels": 8,
                "norm": "batch",
                "activation": {"name": "leaky_relu", "negative_slope": 0.2},
            },
            {"name": "residual", "blocks": [{"name": "conv2d", "channels": 8}, "squeeze_excite"]},
            "max_pool",
            "flatten",
            {"name": "linear", "width": 16},
        ],
        head={"name": "mlp", "width": 32},
    )
    assert model.blocks[0].activation.negative_slope == 0.2
    assert model.blocks[4].linear.in_features == 8 * 4 * 4
    assert model.head.hidden.linear.weight.shape == (32, 16)
    assert model(torch.randn(3, *IMAGE)).shape == (3, 10)


def test_a_stack_computes_what_plain_pytorch_does():
    model = stack(IMAGE, ["conv2d", "max_pool", "flatten", {"name": "linear", "width": 16}])
    plain = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 16),
        nn.ReLU(),
    )
    plain.append(nn.Linear(16, 10))
    for theirs, ours in zip(plain.parameters(), model.parameters(), strict=True):
        theirs.data.copy_(ours.data)
    x = torch.randn(3, *IMAGE)
    torch.testing.assert_close(model(x), plain(x))


def test_no_block_makes_a_linear_model():
    model = stack(IMAGE)
    x = torch.randn(3, *IMAGE)
    torch.testing.assert_close(
        model(x), x.flatten(1) @ model.head.linear.weight.T + model.head.linear.bias
    )


def test_token_ids_go_through_an_embedding():
    model = stack(
        (6,),
        [{"name": "embedding", "vocabulary": 9}, "position", "transformer_decoder"],
        head="token",
    )
    assert model(torch.randint(9, (3, 6))).shape == (3, 6, 10)


def test_each_block_has_parameters_of_its_own():
    model = stack((16,), ["residual_mlp"] * 3)
    assert len({id(p) for p in model.parameters()}) == 3 * 6 + 2


def test_building_leaves_statistics_and_random_numbers_as_they_were():
    torch.manual_seed(1)
    model = stack(
        IMAGE, [{"name": "conv2d", "norm": "batch"}, {"name": "dropout", "p": 0.5}, "flatten"]
    )
    after = torch.rand(1)
    torch.manual_seed(1)
    nn.Conv2d(1, 32, 3)
    nn.Linear(2048, 10)
    assert torch.equal(torch.rand(1), after)
    assert all(part.training for part in model.modules())
    assert model.blocks[0].norm.num_batches_tracked == 0


def test_building_on_the_meta_device_touches_no_memory():
    with torch.device("meta"):
        model = stack(
            (1, 64, 64),
            [{"name": "conv2d", "channels": 64}, "flatten", {"name": "linear", "width": 10**6}],
        )
    assert model.blocks[2].linear.weight.is_meta
    assert model.blocks[2].linear.weight.shape == (10**6, 64 * 64 * 64)


@pytest.mark.parametrize(
    ("blocks", "settings", "error", "message"),
    [
        (
            ["conv2d", "flatten", "linear", "conv2d"],
            {},
            BuildError,
            r"^block 4 \(conv2d\) expects \(C, H, W\), got \(128,\)",
        ),
        (["flatten", "conv"], {}, BuildError, r"block 2 \(conv2d\) expects"),
        (
            ["linear"],
            {},
            BuildError,
            r"block 1 \(linear\) expects .* got \(1, 8, 8\); put `flatten` before it",
        ),
        (
            ["flatten", {"name": "residual", "blocks": ["lstm"]}],
            {},
            BuildError,
            r"block 2 \(residual\): block 1 \(lstm\)",
        ),
        (
            ["max_pool"] * 4,
            {},
            BuildError,
            r"block 4 \(max_pool\).*kernel_size=2.*\(1, 1, 1\)",
        ),
        (
            [{"name": "conv2d", "kernel_size": 9, "padding": 0}],
            {},
            BuildError,
            r"block 1 \(conv2d\)",
        ),
        (["flatten"], {"head": "token"}, BuildError, r"token head expects \(T, D\), got \(64,\)"),
        (["conv2", "flatten"], {}, UnknownName, "conv2d"),
        ([{"name": "conv2d", "chanels": 3}], {}, SettingError, "did you mean 'channels'"),
        (
            [{"name": "conv2d", "channels": 0}],
            {},
            SettingError,
            r"channels: expected int in \[1, inf\), got 0",
        ),
    ],
)
def test_a_mismatch_is_a_sentence_at_build_time(blocks, settings, error, message):
    with pytest.raises(error, match=message):
        stack(IMAGE, blocks, **settings)
