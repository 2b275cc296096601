"""Sequences of unequal length: outputs for the real frames do not depend on the padding."""

import pytest
import torch
from torch.nn import functional as F

import framework as fw
from framework.errors import BuildError
from framework.runtime.shapes import output_shape

CHANNELS = 6
LENGTHS = (40, 23, 9, 1)


def ragged(padding=0, channels=CHANNELS, dtype=torch.float32):
    """Return sequences of four lengths, padded to 40 frames and then by `padding` frames."""
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
    """Return settings with makers instead of the descriptions of blocks, as a config has them."""
    if "blocks" not in settings:
        return settings
    blocks = []
    for block in settings["blocks"]:
        block_settings = {"name": block} if isinstance(block, str) else dict(block)
        blocks.append(fw.blocks.maker(block_settings.pop("name"), **block_settings))
    return settings | {"blocks": blocks}


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("name", "settings"), BLOCKS)
def test_padding_changes_nothing(name, settings, train):
    block = build("blocks", name, (CHANNELS + 1, max(LENGTHS)), **makers(settings)).train(train)
    whole = block(ragged())
    wider = block(ragged(padding=11))
    if wider.ndim == 3:
        wider = wider[:, :, : whole.shape[2]]
    torch.testing.assert_close(wider, whole)
    if name == "masked_batch_norm" and train:
        return
    for row in range(len(LENGTHS)):
        single = block(alone(ragged(), row))
        expected = whole[row : row + 1]
        if whole.ndim == 3:
            expected = expected[:, :, : single.shape[2]]
        torch.testing.assert_close(expected, single)


@pytest.mark.parametrize(
    ("name", "settings"), [case for case in BLOCKS if case[0] != "masked_pool"]
)
def test_padding_stays_zero_and_the_mask_stays_binary(name, settings):
    out = build("blocks", name, (CHANNELS + 1, max(LENGTHS)), **makers(settings))(ragged())
    stride = -(-max(LENGTHS) // out.shape[2])
    assert out[:, -1].sum(1).tolist() == [-(-length // stride) for length in LENGTHS]
    assert set(out[:, -1].unique().tolist()) == {0.0, 1.0}
    assert out[:, :-1].masked_select(out[:, -1:] == 0).eq(0).all()
    assert out[:, :-1].masked_select(out[:, -1:] == 1).ne(0).any()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pool", ["mean", "max", "statistics", "attention"])
def test_a_model_gives_the_same_output_for_a_sequence_alone_and_in_a_batch(name, pool):
    model = build(
        "models", name, (CHANNELS + 1, max(LENGTHS) + 5), (4,), pool=pool, dropout=0.2
    ).eval()
    together = model(ragged(padding=5))
    for row in range(len(LENGTHS)):
        torch.testing.assert_close(
            together[row : row + 1], model(alone(ragged(), row)), atol=1e-5, rtol=1e-5
        )


def picture(x):
    """Return sequences as images with two maps, values and mask, and a row per channel."""
    return build("blocks", "as_picture", tuple(x.shape[1:]))(x)


def test_a_picture_has_the_channels_as_rows_and_is_a_sequence_again():
    x = ragged()
    x[1, :-1, 30:] = 7  # arbitrary values in the padding
    shown = picture(x)
    assert shown.shape == (len(LENGTHS), 2, CHANNELS, 40)
    assert torch.equal(shown[0, 0], x[0, :-1])
    values = ragged()[1, :-1]
    mask = ragged()[1, -1].expand(CHANNELS, -1)
    assert torch.equal(shown[1], torch.stack([values, mask]))
    assert torch.equal(build("blocks", "as_sequence", (2, CHANNELS, 40))(shown), ragged())


@pytest.mark.parametrize(("name", "settings"), PICTURES)
def test_padding_changes_nothing_in_a_picture(name, settings):
    block = build("blocks", name, (2, CHANNELS, max(LENGTHS)), **makers(settings))
    whole = block(picture(ragged()))
    wider = block(picture(ragged(padding=11)))
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
    convolution = block.body[0].conv
    out = block(picture(x))
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
    """Copy the weights to nn.TransformerEncoderLayer, which masks padding by True."""
    x = ragged()
    ours = build("blocks", "masked_transformer", tuple(x.shape[1:]), heads=3, expansion=2).eval()
    rest = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
    theirs = torch.nn.TransformerEncoderLayer(CHANNELS, 3, 2 * CHANNELS, **rest).eval()
    linears = [part for part in ours.feed_forward.modules() if isinstance(part, torch.nn.Linear)]
    norms = [part for part in ours.feed_forward.modules() if isinstance(part, torch.nn.LayerNorm)]
    theirs.self_attn.out_proj.load_state_dict(ours.output.state_dict())
    theirs.norm1.load_state_dict(ours.norm.state_dict())
    theirs.norm2.load_state_dict(norms[0].state_dict())
    theirs.linear1.load_state_dict(linears[0].state_dict())
    theirs.linear2.load_state_dict(linears[1].state_dict())
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


def test_strided_blocks_shorten_the_sequence():
    strided = build("blocks", "masked_conv1d", (4, 41), channels=9, stride=2)
    assert output_shape(strided, (4, 41)) == (10, 21)
    pool = fw.blocks.maker("max_pool", kernel_size=2)
    pooled = build("blocks", "masked", (4, 41), blocks=[pool])
    assert output_shape(pooled, (4, 41)) == (4, 20)


def test_wrong_shapes_and_settings_are_refused():
    with pytest.raises(BuildError, match=r"masked_norm expects \(C\+1, L\), got \(5,\)"):
        build("blocks", "masked_norm", (5,))
    with pytest.raises(BuildError, match="which is the mask only"):
        build("blocks", "masked_pool", (1, 8))
    with pytest.raises(BuildError, match="kernel_size=4"):
        build("blocks", "masked_conv1d", (4, 8), kernel_size=4)
    with pytest.raises(BuildError, match=r"masked_conv2d expects \(C\+1, H, L\), got \(4, 8\)"):
        build("blocks", "masked_conv2d", (4, 8))
    with pytest.raises(BuildError, match="kernel_size=4"):
        build("blocks", "masked_conv2d", (2, 4, 8), kernel_size=4)
    with pytest.raises(BuildError, match=r"expects blocks that give \(C, H, L\), got \(256,\)"):
        build("blocks", "masked", (2, 16, 16), blocks=[fw.blocks.maker("flatten")])
    with pytest.raises(BuildError, match=r"6 features .* 4 heads"):
        build("blocks", "masked_transformer", (7, 8), heads=4)
    with pytest.raises(BuildError, match="8 frames to 6"):
        unpadded = fw.blocks.maker("conv1d", kernel_size=3, padding=0)
        build("blocks", "masked", (4, 8), blocks=[unpadded])


def test_a_sequence_without_real_frames_gives_finite_outputs():
    for name in MODELS:
        for pool in ("mean", "max", "statistics", "attention"):
            model = build("models", name, (7, 40), (4,), pool=pool)
            assert model(torch.zeros(2, 7, 40)).isfinite().all()


def test_batch_norm_is_that_of_torch_on_the_real_frames_alone():
    x = ragged()
    ours = build("blocks", "masked_batch_norm", tuple(x.shape[1:]))
    theirs = torch.nn.BatchNorm1d(CHANNELS)
    for train in (True, False):
        real = x[:, -1] > 0
        expected = theirs.train(train)(x[:, :-1].transpose(1, 2)[real])
        out = ours.train(train)(x)
        torch.testing.assert_close(out[:, :-1].transpose(1, 2)[real], expected)
    torch.testing.assert_close(ours.running_mean[:, 0], theirs.running_mean)
    torch.testing.assert_close(ours.running_variance[:, 0], theirs.running_var)
