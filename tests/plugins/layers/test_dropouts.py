import pytest
import torch

import framework as fw
from framework.errors import BuildError

IMAGES = torch.ones(200, 30, 4, 5)
NAMES = ["dropout", "feature", "alpha", "feature_alpha", "drop_path"]


def dropped(name, x=IMAGES, p=0.3):
    return fw.dropouts.build(name, p)(x)


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_changes_nothing(name):
    x = torch.randn(4, 3, 5)
    assert torch.equal(fw.dropouts.build(name, 0.9).eval()(x), x)


@pytest.mark.parametrize("name", NAMES)
def test_p_is_the_whole_range(name):
    x = torch.randn(4, 6)
    assert torch.equal(fw.dropouts.build(name, 0.0)(x), x)
    assert fw.dropouts.build(name, 1.0)(x).isfinite().all()
    with pytest.raises(BuildError, match=f"dropout/{name}.*between 0 and 1"):
        fw.dropouts.build(name, 1.5)


@pytest.mark.parametrize(
    ("name", "draws"), [("dropout", IMAGES.numel()), ("feature", 6000), ("drop_path", 200)]
)
def test_a_share_p_is_zeroed_and_the_rest_grows_to_keep_the_mean(name, draws):
    out = dropped(name)
    tolerance = 4 * (0.3 * 0.7 / draws) ** 0.5
    assert (out == 0).float().mean().item() == pytest.approx(0.3, abs=tolerance)
    torch.testing.assert_close(out[out != 0].unique(), torch.tensor([1 / 0.7]))


def test_feature_drops_whole_channels_and_drop_path_whole_samples():
    channels = dropped("feature")
    samples = dropped("drop_path")
    assert torch.equal(channels, channels[:, :, :1, :1].expand_as(channels))
    assert not torch.equal(channels, channels[:, :1].expand_as(channels))
    assert torch.equal(samples, samples[:, :1, :1, :1].expand_as(samples))


def test_feature_on_features_is_plain_dropout():
    x = torch.randn(5, 8)
    torch.manual_seed(1)
    plain = dropped("dropout", x)
    torch.manual_seed(1)
    assert torch.equal(dropped("feature", x), plain)


@pytest.mark.parametrize("name", ["alpha", "feature_alpha"])
def test_alpha_dropout_keeps_mean_and_variance(name):
    out = dropped(name, torch.randn(4000, 50))
    assert out.mean().item() == pytest.approx(0, abs=0.02)
    assert out.var().item() == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize("name", ["feature", "drop_path"])
def test_each_model_of_a_vectorized_batch_has_its_own_mask(name):
    part = fw.dropouts.build(name, 0.5)
    out = torch.func.vmap(part, randomness="different")(torch.ones(3, 64, 8))
    assert not torch.equal(out[0], out[1])
    assert set(out.unique().tolist()) == {0.0, 2.0}
