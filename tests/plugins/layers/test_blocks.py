import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import framework as fw
from framework.errors import BuildError
from framework.runtime.shapes import build_chain, expect, output_shape

VECTOR = (16,)
SEQUENCE = (6, 16)
IMAGE = (4, 12, 12)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def build(name, in_shape, **settings):
    return fw.blocks.build(name, in_shape, **settings)


def wake(module):
    """Give norms and biases values that show a mistake which zeros and ones would hide."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return module


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    ("name", "settings", "in_shape", "out_shape"),
    [
        ("linear", {"width": 8, "norm": "layer", "dropout": 0.1}, VECTOR, (8,)),
        ("linear", {"width": 8, "activation": None}, SEQUENCE, (6, 8)),
        ("linear", {"width": 8, "activation": "glu"}, VECTOR, (4,)),
        ("conv1d", {"channels": 8}, (4, 50), (8, 50)),
        ("conv1d", {"channels": 8, "kernel_size": 4}, (4, 50), (8, 50)),
        (
            "conv1d",
            {"channels": 8, "kernel_size": 5, "padding": 0, "dilation": 2, "norm": "batch"},
            (4, 50),
            (8, 42),
        ),
        ("conv2d", {"channels": 8, "norm": "group"}, IMAGE, (8, 12, 12)),
        ("conv2d", {"channels": 8, "stride": 2}, (4, 13, 12), (8, 7, 6)),
        ("conv2d", {"channels": 8, "groups": 4, "padding": 2}, IMAGE, (8, 14, 14)),
        ("residual", {"blocks": ["flatten"]}, VECTOR, VECTOR),
        (
            "residual",
            {"blocks": [{"name": "linear", "width": 3}], "norm": "batch"},
            SEQUENCE,
            (6, 3),
        ),
        (
            "residual",
            {"blocks": [{"name": "conv1d", "channels": 8, "stride": 2}]},
            (4, 51),
            (8, 26),
        ),
        (
            "residual",
            {"blocks": ["conv2d", "avg_pool"], "activation": "relu", "norm": "batch"},
            IMAGE,
            (32, 6, 6),
        ),
        ("residual_mlp", {"width": 32}, VECTOR, VECTOR),
        (
            "residual_mlp",
            {"activation": "glu", "dropout": 0.1, "dropout_kind": "drop_path"},
            SEQUENCE,
            SEQUENCE,
        ),
        ("basic_block", {"channels": 8, "stride": 2}, IMAGE, (8, 6, 6)),
        ("basic_block", {"channels": 4, "norm": None}, IMAGE, IMAGE),
        ("bottleneck", {"channels": 8, "stride": 2}, (4, 13, 13), (32, 7, 7)),
        ("depthwise_separable", {"channels": 8, "stride": 2}, IMAGE, (8, 6, 6)),
        ("squeeze_excite", {}, IMAGE, IMAGE),
        ("squeeze_excite", {"reduction": 2}, (4, 50), (4, 50)),
        ("max_pool", {"kernel_size": 3, "stride": 2, "padding": 1}, IMAGE, (4, 6, 6)),
        ("max_pool", {}, (4, 50), (4, 25)),
        ("avg_pool", {"kernel_size": 3}, IMAGE, (4, 4, 4)),
        ("adaptive_avg_pool", {"size": 5}, IMAGE, (4, 5, 5)),
        ("adaptive_max_pool", {"size": 5}, (4, 50), (4, 5)),
        ("global_avg_pool", {}, IMAGE, (4,)),
        ("flatten", {}, IMAGE, (576,)),
        ("reshape", {"shape": [8, -1]}, IMAGE, (8, 72)),
        ("permute", {"axes": [1, 2, 0]}, IMAGE, (12, 12, 4)),
        ("activation", {"activation": "gelu"}, IMAGE, IMAGE),
        ("norm", {"norm": "batch"}, IMAGE, IMAGE),
        ("norm", {"norm": "batch", "features": "last"}, SEQUENCE, SEQUENCE),
        ("dropout", {"p": 0.1}, SEQUENCE, SEQUENCE),
        ("embedding", {"vocabulary": 7, "width": 3}, (5,), (5, 3)),
        ("patch_embedding", {"patch": 3, "width": 5}, IMAGE, (16, 5)),
        ("class_token", {}, SEQUENCE, (7, 16)),
        ("position", {"dropout": 0.1}, SEQUENCE, SEQUENCE),
        ("position", {"position": "sinusoidal"}, (6, 5), (6, 5)),
        (
            "lstm",
            {"width": 8, "bidirectional": True, "depth": 2, "dropout": 0.1},
            SEQUENCE,
            (6, 16),
        ),
        ("gru", {"width": 8, "outputs": "last"}, SEQUENCE, (8,)),
        ("attention", {"causal": True, "bias": False}, SEQUENCE, SEQUENCE),
        (
            "transformer_encoder",
            {"norm": "rms", "activation": "glu", "dropout": 0.1},
            SEQUENCE,
            SEQUENCE,
        ),
        ("transformer_decoder", {"norm": "batch", "norm_first": False}, SEQUENCE, SEQUENCE),
        ("mlp_mixer", {"dropout": 0.1}, SEQUENCE, SEQUENCE),
    ],
)
def test_a_block_gives_its_shape_and_a_gradient_to_every_parameter(
    name, settings, in_shape, out_shape
):
    block = build(name, in_shape, **settings)
    assert output_shape(block, in_shape) == out_shape
    x = torch.randint(7, (3, *in_shape)) if name == "embedding" else torch.randn(3, *in_shape)
    y = block.train()(x)
    assert y.shape == (3, *out_shape)
    if list(block.parameters()):
        (y * torch.randn_like(y)).sum().backward()
    assert all(p.grad is not None for p in block.parameters())


@pytest.mark.parametrize(
    ("name", "settings", "in_shape", "count"),
    [
        ("linear", {"width": 8, "norm": "layer"}, (16,), 16 * 8 + 8 + 2 * 8),
        (
            "conv2d",
            {"channels": 8, "kernel_size": 5, "groups": 2, "bias": False},
            IMAGE,
            8 * 2 * 25,
        ),
        ("residual_mlp", {"width": 32}, (16,), 2 * 16 + (16 * 32 + 32) + (32 * 16 + 16)),
        ("basic_block", {"channels": 8}, IMAGE, 9 * 4 * 8 + 9 * 8 * 8 + 4 * 8 + 3 * 2 * 8),
        (
            "bottleneck",
            {"channels": 8},
            IMAGE,
            4 * 8 + 9 * 64 + 8 * 32 + 4 * 32 + 2 * (8 + 8 + 32 + 32),
        ),
        ("depthwise_separable", {"channels": 8}, IMAGE, 4 * 9 + 2 * 4 + 4 * 8 + 2 * 8),
        ("squeeze_excite", {"reduction": 2}, IMAGE, (4 * 2 + 2) + (2 * 4 + 4)),
        ("patch_embedding", {"patch": 4, "width": 10}, IMAGE, 4 * 16 * 10 + 10),
        ("transformer_encoder", {}, SEQUENCE, 4 * (16 * 16 + 16) + 2 * 16 * 64 + 64 + 16 + 4 * 16),
        (
            "mlp_mixer",
            {"token_width": 5, "width": 7},
            (6, 16),
            2 * 30 + 5 + 6 + 2 * 112 + 7 + 16 + 4 * 16,
        ),
    ],
)
def test_the_number_of_parameters_follows_the_formula(name, settings, in_shape, count):
    assert parameters(build(name, in_shape, **settings)) == count


def test_linear_is_norm_then_activation_of_the_linear_map():
    block = wake(build("linear", VECTOR, width=8, norm="layer", activation="gelu"))
    linear = block.linear
    norm = block.norm
    x = torch.randn(5, 16)
    expected = F.gelu(F.layer_norm(x @ linear.weight.T + linear.bias, (8,), norm.weight, norm.bias))
    torch.testing.assert_close(block(x), expected)


def test_a_residual_without_blocks_doubles_and_with_zero_weights_is_the_identity():
    x = torch.randn(3, *IMAGE)
    assert torch.equal(build("residual", IMAGE)(x), 2 * x)
    block = build("residual", IMAGE, blocks=[{"name": "conv2d", "channels": 4, "activation": None}])
    for p in block.parameters():
        nn.init.zeros_(p)
    assert torch.equal(block(x), x)


def test_basic_block_follows_the_paper():
    block = wake(build("basic_block", IMAGE, channels=8, stride=2)).eval()
    first, second = block[0].body
    skip = block[0].skip
    x = torch.randn(3, *IMAGE)
    hidden = first.norm(F.conv2d(x, first.conv.weight, stride=2, padding=1)).relu()
    branch = second.norm(F.conv2d(hidden, second.conv.weight, padding=1))
    shortcut = skip[1](F.conv2d(x, skip[0].weight, stride=2))
    torch.testing.assert_close(block(x), (branch + shortcut).relu())


def test_squeeze_excite_scales_each_channel_by_its_gate():
    block = build("squeeze_excite", IMAGE, reduction=2)
    x = torch.randn(3, *IMAGE)
    z = x.mean(dim=(2, 3))
    hidden = (z @ block.squeeze.weight.T + block.squeeze.bias).relu()
    gate = torch.sigmoid(hidden @ block.excite.weight.T + block.excite.bias)
    torch.testing.assert_close(block(x), x * gate[:, :, None, None])


def test_pooling_and_patches_by_hand():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert build("max_pool", (1, 4, 4))(x).flatten().tolist() == [5, 7, 13, 15]
    assert build("avg_pool", (1, 4, 4))(x).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert build("global_avg_pool", (1, 4, 4))(x).tolist() == [[7.5]]
    block = build("patch_embedding", (1, 4, 4), patch=2, width=3)
    patches = x.unfold(2, 2, 2).unfold(3, 2, 2).reshape(1, 4, 4)  # row by row
    weight = block.projection.weight.reshape(3, 4)
    torch.testing.assert_close(block(x), patches @ weight.T + block.projection.bias)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("name", "layer"), [("lstm", nn.LSTM), ("gru", nn.GRU)])
def test_recurrent_blocks_are_torchs_layers(name, layer, bidirectional):
    settings = {"width": 5, "depth": 2, "bidirectional": bidirectional}
    every, last = (
        build(name, SEQUENCE, outputs=outputs, **settings) for outputs in ("all", "last")
    )
    theirs = layer(16, 5, 2, batch_first=True, bidirectional=bidirectional)
    every.layer.load_state_dict(theirs.state_dict())
    last.layer.load_state_dict(theirs.state_dict())
    x = torch.randn(3, *SEQUENCE)
    expected, _ = theirs(x)
    torch.testing.assert_close(every(x), expected)
    ends = [expected[:, -1, :5]] + ([expected[:, 0, 5:]] if bidirectional else [])
    torch.testing.assert_close(last(x), torch.cat(ends, dim=1))


def copy_attention(ours, theirs):
    """Copy the weights of torch's multi-head attention into ours."""
    width = theirs.embed_dim
    with torch.no_grad():
        ours.query.weight.copy_(theirs.in_proj_weight[:width])
        ours.query.bias.copy_(theirs.in_proj_bias[:width])
        ours.key_value.weight.copy_(theirs.in_proj_weight[width:])
        ours.key_value.bias.copy_(theirs.in_proj_bias[width:])
    ours.output.load_state_dict(theirs.out_proj.state_dict())


def copy_layer(ours, theirs):
    """Copy the weights of torch's encoder or decoder layer into ours."""
    pairs = [(ours.attention, theirs.self_attn, theirs.norm1)]
    norms = [theirs.norm2]
    if ours.cross_attention is not None:
        pairs.append((ours.cross_attention, theirs.multihead_attn, theirs.norm2))
        norms = [theirs.norm3]
    for sublayer, attention, norm in pairs:
        copy_attention(sublayer.module, attention)
        sublayer.norm.load_state_dict(norm.state_dict())
    ours.feed_forward.norm.load_state_dict(norms[0].state_dict())
    first, second = ours.feed_forward.module
    first.linear.load_state_dict(theirs.linear1.state_dict())
    second.linear.load_state_dict(theirs.linear2.state_dict())


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_torchs_multi_head_attention(causal):
    theirs = wake(nn.MultiheadAttention(16, 4, batch_first=True))
    ours = build("attention", SEQUENCE, heads=4, causal=causal)
    copy_attention(ours, theirs)
    x = torch.randn(3, *SEQUENCE)
    mask = nn.Transformer.generate_square_subsequent_mask(6) if causal else None
    expected, _ = theirs(x, x, x, attn_mask=mask, need_weights=False)
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_layers_are_torchs(norm_first):
    settings = {"activation": F.gelu, "batch_first": True, "norm_first": norm_first, "dropout": 0.0}
    x = torch.randn(3, *SEQUENCE)
    memory = torch.randn(3, 9, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(6)

    theirs = wake(nn.TransformerEncoderLayer(16, 4, 64, **settings))
    ours = build("transformer_encoder", SEQUENCE, norm_first=norm_first)
    copy_layer(ours, theirs)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)

    theirs = wake(nn.TransformerDecoderLayer(16, 4, 64, **settings))
    ours = build("transformer_decoder", SEQUENCE, norm_first=norm_first, memory_width=16)
    copy_layer(ours, theirs)
    torch.testing.assert_close(
        ours(x, memory), theirs(x, memory, tgt_mask=mask), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("attention", {"causal": True}),
        ("transformer_encoder", {"causal": True}),
        ("transformer_decoder", {}),
    ],
)
def test_the_future_does_not_change_the_past(name, settings):
    block = build(name, SEQUENCE, **settings)
    x = torch.randn(2, *SEQUENCE)
    changed = x.clone()
    changed[:, 4:] += 1
    assert torch.equal(block(x)[:, :4], block(changed)[:, :4])
    assert not torch.allclose(block(x)[:, 4:], block(changed)[:, 4:])
    past = x[:, :4]  # and a shorter sequence is no special case
    torch.testing.assert_close(block(past), block(x)[:, :4])


def test_attention_with_memory_width_needs_a_memory():
    block = build("attention", SEQUENCE, memory_width=5)
    assert block(torch.randn(2, *SEQUENCE), torch.randn(2, 9, 5)).shape == (2, *SEQUENCE)
    with pytest.raises(ValueError, match="expected a memory"):
        block(torch.randn(2, *SEQUENCE))


def test_sinusoidal_positions_follow_the_paper():
    block = build("position", (50, 8), position="sinusoidal")
    table = block(torch.zeros(1, 50, 8))[0]
    for t, i in [(0, 0), (1, 0), (7, 2), (49, 3)]:
        angle = t / 10_000 ** (2 * i / 8)
        assert table[t, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
        assert table[t, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)
    assert not block.state_dict()  # derived, not stored


def test_mixer_mixes_positions_and_features():
    block = wake(build("mlp_mixer", SEQUENCE, token_width=5, width=7)).eval()
    x = torch.randn(3, *SEQUENCE)
    mixed = x + block.tokens(block.norm(x).mT).mT  # equation 1, first line
    norm, up, down = block.features[0].body
    expected = mixed + F.linear(
        F.gelu(up.linear(norm(mixed))), down.linear.weight, down.linear.bias
    )
    torch.testing.assert_close(block(x), expected)


def test_dropout_works_in_training_only():
    for block in (build("dropout", VECTOR), build("linear", VECTOR, activation=None, dropout=0.5)):
        x = torch.ones(100, 16)
        assert (block.train()(x) == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
        assert (block.eval()(x) != 0).all()


@pytest.mark.parametrize(
    ("name", "settings", "in_shape", "message"),
    [
        ("conv2d", {}, VECTOR, r"conv2d expects \(C, H, W\), got \(16,\)"),
        (
            "linear",
            {},
            IMAGE,
            r"linear expects \(D,\) or \(T, D\), got .*; put `flatten` before it",
        ),
        (
            "conv1d",
            {"groups": 3},
            (4, 50),
            "groups=3 does not divide 4 input and 32 output channels",
        ),
        ("attention", {"heads": 3}, SEQUENCE, "16 features cannot be split into 3 heads"),
        ("patch_embedding", {"patch": 5}, IMAGE, r"patch=5 .*use one of \[1, 2, 3, 4, 6, 12\]"),
        ("max_pool", {"kernel_size": 13}, IMAGE, "kernel_size=13 does not fit"),
        ("reshape", {"shape": [7, -1]}, IMAGE, r"\(4, 12, 12\) does not fit \(7, -1\)"),
        ("permute", {"axes": [0, 0]}, SEQUENCE, r"axes=\[0, 0\].* each axis of \(6, 16\) once"),
        (
            "residual",
            {"blocks": ["flatten"]},
            IMAGE,
            r"cannot add its input \(4, 12, 12\) to .* \(576,\)",
        ),
        ("embedding", {}, IMAGE, r"expects token ids \(T,\)"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_when_the_block_is_built(
    name, settings, in_shape, message
):
    with pytest.raises(BuildError, match=message):
        build(name, in_shape, **settings)


def test_output_shape_does_not_change_the_module():
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.BatchNorm1d(3).eval())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    assert output_shape(module, (3, 7)) == (3, 7)
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in module] == [True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_chain_takes_any_function_of_a_shape_and_passes_on_what_a_block_gives():
    modules, shape = build_chain([lazy_linear], (3,))
    assert shape == (4,)
    assert modules[0].in_features == 3
    with pytest.raises(BuildError, match=r"block 2 \(embedding\) cannot take \(4,\)"):
        build_chain([lazy_linear, fw.blocks.maker("embedding")], (3,))  # floats are no token ids
    with pytest.raises(BuildError, match=r"block 1 \(bare_lstm\) returns a tuple, not a tensor"):
        build_chain([bare_lstm], (5, 3))


def lazy_linear(in_shape):
    return nn.LazyLinear(4)


def bare_lstm(in_shape):
    return nn.LSTM(in_shape[-1], 4)


def test_expect_counts_axes():
    assert expect([3, 4], "(D,) or (T, D)", "it") == (3, 4)
    with pytest.raises(BuildError, match=r"it expects images \(C, H, W\), got \(3, 4\); sorry"):
        expect((3, 4), "images (C, H, W)", "it", "sorry")
