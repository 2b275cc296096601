"""Sequences of unequal length: what a block says of the real frames does not depend on the padding."""

import pytest
import torch
from torch.nn import functional as F

import framework as fw
from framework.errors import BuildError
from framework.runtime.shapes import output_shape

CHANNELS, LENGTHS = 6, (40, 23, 9, 1)


def ragged(padding=0, channels=CHANNELS, dtype=torch.float32):
    """Return sequences of four lengths, filled up to 40 frames and then by `padding`."""
    x = torch.zeros(len(LENGTHS), channels + 1, max(LENGTHS) + padding, dtype=dtype)
    draw = torch.Generator().manual_seed(3)
    for row, length in enumerate(LENGTHS):
        x[row, :-1, :length] = torch.randn(channels, length, generator=draw, dtype=dtype)
        x[row, -1, :length] = 1
    return x


def alone(x, row):
    """Return one sequence without its padding."""
    return x[row : row + 1, :, : LENGTHS[row]]


def build(kind, name, *shapes, **settings):
    torch.manual_seed(1)
    return getattr(fw, kind).build(name, *shapes, **settings)


BLOCKS = [
    ("masked", {"blocks": [{"name": "conv1d", "channels": 5, "kernel_size": 3}]}),
    ("masked_conv1d", {"channels": 8, "kernel_size": 3}),
    ("masked_conv1d", {"channels": 8, "kernel_size": 7, "stride": 2, "activation": "gelu"}),
    ("masked_conv1d", {"channels": 8, "stride": 3, "dilation": 2, "norm": None}),
    ("masked_residual", {"blocks": ["masked_conv1d"]}),
    ("masked_residual", {"blocks": [{"name": "masked_conv1d", "channels": CHANNELS}]}),
    ("masked_residual", {"blocks": [{"name": "masked_conv1d", "stride": 2}, "masked_conv1d"]}),
    ("masked_norm", {}),
    ("masked_norm", {"scale": False}),
    ("masked_batch_norm", {}),
    ("masked_transformer", {"heads": 3}),
    *(("masked_pool", {"pool": pool}) for pool in ("mean", "max", "statistics", "attention")),
]


MODELS = ["sequence_cnn", "spectrogram_cnn", "sequence_transformer"]
PICTURES = [
    ("masked", {"blocks": [{"name": "conv2d", "channels": 5}]}),
    ("masked_conv2d", {"channels": 4, "kernel_size": 5, "activation": "gelu"}),
    ("masked_conv2d", {"channels": 4, "stride": 2}),
    ("masked_conv2d", {"channels": 4, "stride": 3, "norm": None}),
    ("masked_residual", {"blocks": ["masked_conv2d"]}),
    ("masked_residual", {"blocks": [{"name": "masked_conv2d", "channels": 1, "norm": None}]}),
    ("masked_residual", {"blocks": [{"name": "masked_conv2d", "stride": 2}, "masked_conv2d"]}),
    ("as_sequence", {}),
]


def makers(settings):
    """Return settings with the blocks in them as makers, as the command line gives them."""
    named = [
        {"name": each} if isinstance(each, str) else each for each in settings.get("blocks", ())
    ]
    made = [
        fw.blocks.maker(each["name"], **{k: v for k, v in each.items() if k != "name"})
        for each in named
    ]
    return settings | ({"blocks": made} if made else {})


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("name", "settings"), BLOCKS)
def test_padding_changes_nothing(name, settings, train):
    block = build("blocks", name, (CHANNELS + 1, max(LENGTHS)), **makers(settings)).train(train)
    whole = block(ragged())
    wider = block(ragged(padding=11))
    torch.testing.assert_close(wider if wider.ndim == 2 else wider[:, :, : whole.shape[2]], whole)
    for row in range(len(LENGTHS)) if name != "masked_batch_norm" or not train else ():
        single = block(alone(ragged(), row))
        kept = (
            whole[row : row + 1] if whole.ndim == 2 else whole[row : row + 1, :, : single.shape[2]]
        )
        torch.testing.assert_close(kept, single)


@pytest.mark.parametrize(
    ("name", "settings"), [each for each in BLOCKS if each[0] != "masked_pool"]
)
def test_what_is_padding_stays_zero_and_the_mask_a_mask(name, settings):
    out = build("blocks", name, (CHANNELS + 1, max(LENGTHS)), **makers(settings))(ragged())
    stride = -(-max(LENGTHS) // out.shape[2])
    assert out[:, -1].sum(1).tolist() == [-(-length // stride) for length in LENGTHS]
    assert set(out[:, -1].unique().tolist()) == {0.0, 1.0}
    assert out[:, :-1].masked_select(out[:, -1:] == 0).eq(0).all()
    assert out[:, :-1].masked_select(out[:, -1:] == 1).ne(0).any()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pool", ["mean", "max", "statistics", "attention"])
def test_a_model_says_the_same_of_a_sequence_alone_and_among_longer_ones(name, pool):
    model = build(
        "models", name, (CHANNELS + 1, max(LENGTHS) + 5), (4,), pool=pool, dropout=0.2
    ).eval()
    together = model(ragged(padding=5))
    for row in range(len(LENGTHS)):
        torch.testing.assert_close(
            together[row : row + 1], model(alone(ragged(), row)), atol=1e-5, rtol=1e-5
        )


def picture(x):
    """Return sequences as pictures: two maps, the values and the mask, with the channels as rows."""
    return build("blocks", "as_picture", tuple(x.shape[1:]))(x)


def test_a_picture_has_the_channels_as_rows_and_is_a_sequence_again():
    x = ragged()
    x[1, :-1, 30:] = 7  # rubbish behind the mask
    shown = picture(x)
    assert shown.shape == (len(LENGTHS), 2, CHANNELS, 40)
    assert torch.equal(shown[0, 0], x[0, :-1])
    assert torch.equal(
        shown[1], torch.stack([ragged()[1, :-1], ragged()[1, -1].expand(CHANNELS, -1)])
    )
    assert torch.equal(build("blocks", "as_sequence", (2, CHANNELS, 40))(shown), ragged())


@pytest.mark.parametrize(("name", "settings"), PICTURES)
def test_padding_changes_nothing_in_a_picture(name, settings):
    block = build("blocks", name, (2, CHANNELS, max(LENGTHS)), **makers(settings))
    whole, wider = block(picture(ragged())), block(picture(ragged(padding=11)))
    torch.testing.assert_close(wider[..., : whole.shape[-1]], whole)
    assert wider[..., whole.shape[-1] :].eq(0).all()
    for row in range(len(LENGTHS)):
        single = block(picture(alone(ragged(), row)))
        torch.testing.assert_close(whole[row : row + 1, ..., : single.shape[-1]], single)
        assert whole[row, ..., single.shape[-1] :].eq(0).all()
        assert single[0, -1].eq(1).all()


def test_a_masked_2d_convolution_is_a_convolution_of_the_frames_in_both_directions():
    x = ragged()
    block = build(
        "blocks",
        "masked_conv2d",
        (2, CHANNELS, 40),
        channels=4,
        stride=2,
        norm=None,
        activation=None,
    )
    convolution, out = block.body[0].conv, block(picture(x))
    for row, length in enumerate(LENGTHS):
        frames = F.pad(alone(x, row)[0, :-1], [1, 1, 1, 1])
        for channel, high, wide in ((0, 0, 0), (3, 2, 0), (1, 1, (length - 1) // 2)):
            under = frames[2 * high : 2 * high + 3, 2 * wide : 2 * wide + 3]
            expected = (convolution.weight[channel, 0] * under).sum() + convolution.bias[channel]
            torch.testing.assert_close(out[row, channel, high, wide], expected)


def test_pooling_is_that_of_the_frames_alone():
    x = ragged(dtype=torch.float64)
    frames = [alone(x, row)[0, :-1] for row in range(len(LENGTHS))]

    def pooled(pool):
        return build("blocks", "masked_pool", tuple(x.shape[1:]), pool=pool).double()(x)

    torch.testing.assert_close(pooled("mean"), torch.stack([each.mean(1) for each in frames]))
    torch.testing.assert_close(pooled("max"), torch.stack([each.amax(1) for each in frames]))
    deviation = torch.stack([(each.var(1, correction=0) + 1e-5).sqrt() for each in frames])
    torch.testing.assert_close(pooled("statistics"), torch.cat([pooled("mean"), deviation], dim=1))


def test_attentive_pooling_is_a_weighted_mean():
    x = ragged()
    block = build("blocks", "masked_pool", tuple(x.shape[1:]), pool="attention", width=5)
    first, _, second = block.score
    for row, length in enumerate(LENGTHS):
        frames = x[row, :-1, :length].T
        scores = torch.tanh(frames @ first.weight[:, :, 0].T + first.bias) @ second.weight[0, :, 0]
        torch.testing.assert_close(block(x)[row], scores.softmax(0) @ frames)


def test_the_norm_is_over_the_real_frames():
    out = build("blocks", "masked_norm", (CHANNELS + 1, 40), eps=1e-12)(ragged(dtype=torch.float64))
    frames = out[1, :-1, :23]
    torch.testing.assert_close(frames.mean(1), torch.zeros(CHANNELS, dtype=torch.float64))
    torch.testing.assert_close(
        frames.var(1, correction=0), torch.ones(CHANNELS, dtype=torch.float64)
    )


def test_the_transformer_layer_is_that_of_torch():
    """With the same weights as nn.TransformerEncoderLayer, whose padding mask is True where there is nothing."""
    x = ragged()
    ours = build("blocks", "masked_transformer", tuple(x.shape[1:]), heads=3, expansion=2).eval()
    rest = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
    theirs = torch.nn.TransformerEncoderLayer(CHANNELS, 3, 2 * CHANNELS, **rest).eval()
    linears = [part for part in ours.feed_forward.modules() if isinstance(part, torch.nn.Linear)]
    norm = next(
        part for part in ours.feed_forward.modules() if isinstance(part, torch.nn.LayerNorm)
    )
    pairs = [
        (theirs.self_attn.out_proj, ours.output),
        (theirs.norm1, ours.norm),
        (theirs.norm2, norm),
    ]
    for there, here in [*pairs, (theirs.linear1, linears[0]), (theirs.linear2, linears[1])]:
        there.load_state_dict(here.state_dict())
    theirs.self_attn.in_proj_weight.data = ours.query_key_value.weight.data
    theirs.self_attn.in_proj_bias.data = ours.query_key_value.bias.data
    expected = theirs(x[:, :-1].transpose(1, 2), src_key_padding_mask=x[:, -1] == 0).transpose(1, 2)
    torch.testing.assert_close(ours(x)[:, :-1], expected * x[:, -1:], atol=1e-5, rtol=1e-5)


def test_a_masked_convolution_is_a_convolution_of_the_frames():
    x = ragged()
    block = build(
        "blocks", "masked_conv1d", tuple(x.shape[1:]), channels=4, norm=None, activation=None
    )
    convolution = block.body[0].conv
    for row in range(len(LENGTHS)):
        frames = alone(x, row)
        expected = F.conv1d(frames[:, :-1], convolution.weight, convolution.bias, padding=2)
        torch.testing.assert_close(block(x)[row : row + 1, :-1, : LENGTHS[row]], expected)


def test_shapes_and_mistakes():
    assert output_shape(
        build("blocks", "masked_conv1d", (4, 41), channels=9, stride=2), (4, 41)
    ) == (10, 21)
    shortened = build(
        "blocks", "masked", (4, 41), blocks=[fw.blocks.maker("max_pool", kernel_size=2)]
    )
    assert output_shape(shortened, (4, 41)) == (4, 20)
    with pytest.raises(BuildError, match=r"masked_norm expects \(C\+1, L\), gets \(5,\)"):
        build("blocks", "masked_norm", (5,))
    with pytest.raises(BuildError, match="has no other channel"):
        build("blocks", "masked_pool", (1, 8))
    with pytest.raises(BuildError, match="kernel_size=4"):
        build("blocks", "masked_conv1d", (4, 8), kernel_size=4)
    with pytest.raises(BuildError, match=r"masked_conv2d expects \(C\+1, H, L\), gets \(4, 8\)"):
        build("blocks", "masked_conv2d", (4, 8))
    with pytest.raises(BuildError, match="kernel_size=4"):
        build("blocks", "masked_conv2d", (2, 4, 8), kernel_size=4)
    with pytest.raises(BuildError, match=r"expects blocks that give \(C, H, L\), gets \(256,\)"):
        build("blocks", "masked", (2, 16, 16), blocks=[fw.blocks.maker("flatten")])
    with pytest.raises(BuildError, match="6 channels .* 4 heads"):
        build("blocks", "masked_transformer", (7, 8), heads=4)
    with pytest.raises(BuildError, match="8 frames to 6"):
        build(
            "blocks", "masked", (4, 8), blocks=[fw.blocks.maker("conv1d", kernel_size=3, padding=0)]
        )


def test_zeros_without_a_real_frame_give_numbers():
    for name in MODELS:
        for pool in ("mean", "max", "statistics", "attention"):
            model = build("models", name, (7, 40), (4,), pool=pool)
            assert model(torch.zeros(2, 7, 40)).isfinite().all()


def test_batch_norm_is_that_of_torch_on_the_real_frames_alone():
    x = ragged()
    ours, theirs = (
        build("blocks", "masked_batch_norm", tuple(x.shape[1:])),
        torch.nn.BatchNorm1d(CHANNELS),
    )
    for train in (True, False):
        real = x[:, -1] > 0
        expected = theirs.train(train)(x[:, :-1].transpose(1, 2)[real])
        out = ours.train(train)(x)
        torch.testing.assert_close(out[:, :-1].transpose(1, 2)[real], expected)
    torch.testing.assert_close(ours.running_mean[:, 0], theirs.running_mean)
    torch.testing.assert_close(ours.running_variance[:, 0], theirs.running_var)
