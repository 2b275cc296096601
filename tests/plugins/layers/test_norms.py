import pytest
import torch
from torch import nn

import framework as fw
from framework.errors import BuildError, DataError

SHAPES = [(6,), (6, 5), (6, 4, 3), (6, 2, 4, 3)]
CHANNELS_FIRST = SHAPES[1:]


def inputs(shape):
    return torch.randn(7, *shape, dtype=torch.float64) * 3 + 2


def normalised(name, shape, **settings):
    return fw.norms.build(name, shape, **settings).double()(inputs(shape))


def over(x, *axes):
    """The formula: (x - mean) / √(variance + ε) over some axes."""
    return (x - x.mean(axes, keepdim=True)) / (
        x.var(axes, correction=0, keepdim=True) + 1e-5
    ).sqrt()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_normalises_each_channel_over_everything_else(shape):
    x = inputs(shape)
    axes = [axis for axis in range(x.ndim) if axis != 1]
    torch.testing.assert_close(fw.norms.build("batch", shape).double()(x), over(x, *axes))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_and_rms_normalise_the_channels_at_each_position(shape):
    x = inputs(shape)
    torch.testing.assert_close(fw.norms.build("layer", shape).double()(x), over(x, 1))
    expected = x / x.square().mean(1, keepdim=True).add(torch.finfo(x.dtype).eps).sqrt()
    torch.testing.assert_close(fw.norms.build("rms", shape).double()(x), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_group_normalises_channels_in_groups_with_their_positions(shape):
    x = inputs(shape)
    out = fw.norms.build("group", shape, groups=2).double()(x)
    torch.testing.assert_close(out, over(x.view(7, 2, -1), 2).view_as(x))


@pytest.mark.parametrize("shape", CHANNELS_FIRST, ids=str)
def test_instance_normalises_each_channel_over_its_positions(shape):
    x = inputs(shape)
    torch.testing.assert_close(
        fw.norms.build("instance", shape).double()(x), over(x, *range(2, x.ndim))
    )


@pytest.mark.parametrize(
    ("name", "settings"), [("batch", {}), ("layer", {}), ("rms", {}), ("group", {"groups": 2})]
)
def test_features_may_have_more_axes_before_them(name, settings):
    sequence = inputs((5, 6))
    norm = fw.norms.build(name, (6,), **settings).double()
    out = norm(sequence)
    assert out.shape == sequence.shape
    torch.testing.assert_close(out.reshape(-1, 6), norm(sequence.reshape(-1, 6)))


def test_batch_norm_evaluates_with_running_statistics():
    norm = fw.norms.build("batch", (3,), momentum=1.0)
    x = torch.randn(50, 3) * 2 + 1
    norm(x)
    expected = (x[:4] - x.mean(0)) / (x.var(0) + 1e-5).sqrt()
    torch.testing.assert_close(norm.eval()(x[:4]), expected)
    torch.testing.assert_close(norm(x[:1]), expected[:1])


def test_batch_norm_of_a_single_row_is_an_error_with_advice():
    with pytest.raises(DataError, match="drop_last"):
        fw.norms.build("batch", (3,))(torch.randn(1, 3))


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(3, 1), (1, 1), (8, 2), (10, 2), (12, 3), (64, 16), (128, 32), (256, 32), (48, 12), (7, 1)],
)
def test_groups_are_chosen_to_divide_the_channels(channels, groups):
    assert fw.norms.build("group", (channels, 4, 4)).num_groups == groups


@pytest.mark.parametrize("name", ["batch", "layer", "rms", "group", "instance"])
def test_scale_and_shift_are_per_channel_and_can_be_left_out(name):
    norm = fw.norms.build(name, (6, 4, 3))
    assert {p.shape for p in norm.parameters()} == {(6,)}
    assert list(fw.norms.build(name, (6, 4, 3), affine=False).parameters()) == []


def test_layer_norm_without_shift():
    assert len(list(fw.norms.build("layer", (6,), bias=False).parameters())) == 1


def test_torch_layers_are_used_where_they_fit():
    assert type(fw.norms.build("batch", (6, 4, 3))) is nn.BatchNorm2d
    assert type(fw.norms.build("layer", (6,))) is nn.LayerNorm
    assert type(fw.norms.build("group", (8, 4, 3))) is nn.GroupNorm


@pytest.mark.parametrize(
    ("name", "shape", "settings", "message"),
    [
        (
            "group",
            (10, 4, 4),
            {"groups": 4},
            r"groups=4 does not divide the 10 channels.*use one of 1, 2, 5, 10",
        ),
        ("group", (4,), {"groups": 4}, "over a single channel"),
        ("layer", (1, 28, 28), {}, "layer norm over a single channel"),
        ("rms", (1,), {}, "rms norm over a single channel"),
        ("instance", (8,), {}, r"in_shape \(8,\) has none; use layer"),
        ("batch", (), {}, r"got \(\)"),
        ("layer", (2, 3, 4, 5, 6), {}, r"got \(2, 3, 4, 5, 6\)"),
    ],
)
def test_a_shape_for_which_a_norm_is_undefined_is_refused(name, shape, settings, message):
    with pytest.raises(BuildError, match=message):
        fw.norms.build(name, shape, **settings)
