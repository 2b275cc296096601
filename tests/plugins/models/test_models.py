import pytest
import torch
from torch import nn
from torch.nn import functional as F

import framework as fw
from framework.errors import BuildError

RESNET18 = {"depths": [2, 2, 2, 2], "channels": [64, 128, 256, 512], "stem": "large"}
RESNET50 = {**RESNET18, "depths": [3, 4, 6, 3], "block": "bottleneck"}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "settings", "in_shape"),
    [
        ("mlp", {}, (64,)),
        (
            "mlp",
            {"width": [32, 16], "norm": "batch", "dropout": 0.1, "activation": "gelu"},
            (1, 8, 8),
        ),
        ("mlp", {"width": 32, "depth": 1, "activation": "glu"}, (4, 6)),
        ("cnn", {}, (1, 8, 8)),
        (
            "cnn",
            {"channels": [4, 8, 16], "norm": None, "pooling": "avg", "dropout": 0.1},
            (3, 16, 11),
        ),
        ("resnet", {"depths": [1, 1], "channels": [4, 8]}, (3, 9, 9)),
        (
            "resnet",
            {"depths": [1, 1], "channels": [4, 8], "block": "bottleneck", "stem": "large"},
            (1, 32, 32),
        ),
        ("resnet", {"depths": [1], "channels": [4], "norm": None, "activation": "gelu"}, (1, 8, 8)),
        ("rnn", {}, (12, 5)),
        (
            "rnn",
            {"cell": "gru", "depth": 2, "bidirectional": True, "pool": "mean", "dropout": 0.1},
            (1, 8, 8),
        ),
        ("rnn", {"vocabulary": 9, "embedding": 8}, (12,)),
        ("transformer", {"dropout": 0.1}, (12, 5)),
        ("transformer", {"pool": "class_token", "norm": "rms", "activation": "glu"}, (3, 8, 8)),
        (
            "transformer",
            {"vocabulary": 9, "position": "sinusoidal", "causal": True, "pool": "last"},
            (12,),
        ),
    ],
)
def test_a_model_maps_its_shape_to_the_outputs_and_trains_every_parameter(name, settings, in_shape):
    model = fw.models.build(name, in_shape, (10,), **settings)
    x = torch.randint(9, (4, *in_shape)) if "vocabulary" in settings else torch.randn(4, *in_shape)
    logits = model(x)
    assert logits.shape == (4, 10)
    F.cross_entropy(logits, torch.arange(4)).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "settings", "in_shape", "classes", "count"),
    [
        (
            "mlp",
            {"width": 32, "depth": 2},
            (64,),
            10,
            (64 * 32 + 32) + (32 * 32 + 32) + (32 * 10 + 10),
        ),
        (
            "mlp",
            {"width": [32, 16]},
            (1, 8, 8),
            10,
            (64 * 32 + 32) + (32 * 16 + 16) + (16 * 10 + 10),
        ),
        ("cnn", {"norm": None}, (1, 28, 28), 10, 320 + 18_496 + (64 * 49 * 128 + 128) + 1_290),
        ("rnn", {"width": 32}, (12, 5), 10, 4 * 32 * (5 + 32 + 2) + 330),
        ("resnet", RESNET18, (3, 224, 224), 1000, 11_689_512),  # as in torchvision
        ("resnet", RESNET50, (3, 224, 224), 1000, 25_557_032),
        # ViT-B/16 for 224x224 images, as in torchvision and timm
        (
            "transformer",
            {"width": 768, "depth": 12, "heads": 12, "patch": 16, "pool": "class_token"},
            (3, 224, 224),
            1000,
            86_567_656,
        ),
    ],
)
def test_the_number_of_parameters_follows_papers_and_formulas(
    name, settings, in_shape, classes, count
):
    with torch.device("meta"):
        assert parameters(fw.models.build(name, in_shape, (classes,), **settings)) == count


# stochastic depth


@pytest.mark.parametrize("name", ["basic_block", "bottleneck"])
def test_a_branch_is_left_out_for_some_samples_and_the_mean_is_that_of_evaluation(name):
    torch.manual_seed(0)
    block = fw.blocks.build(
        name, (2, 4, 4), channels=2, activation="identity", norm=None, drop_path=0.3
    )
    x = torch.randn(1, 2, 4, 4)
    with torch.no_grad():
        whole = block.eval()(x)
        skipped = block[0].skip(x)
        drawn = block.train()(x.expand(20_000, -1, -1, -1))
    out = (drawn - skipped).flatten(1).abs().amax(1) < 1e-6
    assert out.float().mean().item() == pytest.approx(0.3, abs=5 * 0.0033)  # 5 deviations
    kept = skipped + (whole - skipped) / 0.7
    torch.testing.assert_close(drawn[~out], kept.expand_as(drawn[~out]), rtol=1e-4, atol=1e-5)
    size = (whole - skipped).abs().max().item()
    torch.testing.assert_close(drawn.mean(0), whole[0], rtol=0, atol=5 * 0.005 * size)


def test_a_resnet_leaves_deeper_blocks_out_more_often():
    settings = {"depths": [2, 1, 2], "channels": [4, 8, 8]}
    model = fw.models.build("resnet", (1, 16, 16), (10,), drop_path=0.5, **settings)
    rates = [module.p for module in model.modules() if type(module).__name__ == "DropPath"]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    plain = fw.models.build("resnet", (1, 16, 16), (10,), **settings)
    assert plain.state_dict().keys() == model.state_dict().keys(), (
        "their checkpoints fit each other"
    )
    assert not [module for module in plain.modules() if isinstance(module, nn.Dropout)]
    plain.load_state_dict(model.state_dict())
    x = torch.randn(8, 1, 16, 16)
    torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=0, atol=0)
    torch.manual_seed(3)
    assert not torch.allclose(model.train()(x), model.train()(x))


def test_resnet_20_has_20_layers_and_the_papers_size():
    model = fw.models.build("resnet", (3, 32, 32), (10,))
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert sum(1 for m in layers if getattr(m, "kernel_size", None) != (1, 1)) == 20
    assert parameters(model) == pytest.approx(0.27e6, rel=0.02)  # table 6, without projections


def test_mlp_computes_what_plain_pytorch_does():
    model = fw.models.build("mlp", (64,), (10,), width=32, activation="gelu")
    plain = nn.Sequential(
        nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 10)
    )
    plain.load_state_dict(dict(zip(plain.state_dict(), model.state_dict().values(), strict=True)))
    x = torch.randn(5, 64)
    torch.testing.assert_close(model(x), plain(x))


def test_cnn_computes_what_plain_pytorch_does():
    model = fw.models.build("cnn", (1, 8, 8), (10,))
    plain = nn.Sequential(
        *(
            nn.Conv2d(1, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ),
        *(
            nn.Conv2d(32, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ),
        *(nn.Flatten(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)),
    )
    plain.load_state_dict(dict(zip(plain.state_dict(), model.state_dict().values(), strict=True)))
    x = torch.randn(
        5, 1, 8, 8
    )  # in evaluation, norm and pooling may change places: the scales are positive
    torch.testing.assert_close(model.eval()(x), plain.eval()(x))


def test_rnn_reads_the_rows_of_an_image():
    model = fw.models.build("rnn", (3, 5, 4), (10,), width=6)
    x = torch.randn(2, 3, 5, 4)
    rows = torch.stack([x[:, :, row].flatten(1) for row in range(5)], dim=1)
    every, _ = model.blocks[2].layer(rows)
    torch.testing.assert_close(model(x), model.head(every[:, -1]))


@pytest.mark.parametrize("name", ["rnn", "transformer"])
def test_pool_none_gives_outputs_at_every_position_that_see_only_the_past(name):
    settings = {"causal": True} if name == "transformer" else {}
    model = fw.models.build(name, (12,), (9,), vocabulary=9, pool="none", **settings)
    tokens = torch.randint(9, (2, 12))
    changed = tokens.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 9
    assert model(tokens).shape == (2, 12, 9)
    torch.testing.assert_close(model(tokens)[:, :8], model(changed)[:, :8])
    assert not torch.allclose(model(tokens)[:, 8:], model(changed)[:, 8:])


@pytest.mark.parametrize(
    ("settings", "in_shape"),
    [({"pool": "class_token"}, (1, 8, 8)), ({"pool": "mean", "vocabulary": 9}, (12,))],
)
def test_without_positions_a_transformer_does_not_know_the_order(settings, in_shape):
    if "vocabulary" in settings:
        x = torch.randint(9, (2, 12))
        reordered = x.flip(1)
    else:
        x = torch.randn(2, *in_shape)
        reordered = x.roll(4, dims=2)  # rows of patches
    for position in ("none", "learned"):
        model = fw.models.build("transformer", in_shape, (10,), position=position, **settings)
        same = torch.allclose(model(x), model(reordered), atol=1e-5)
        assert same == (position == "none")


def test_a_model_can_return_values_of_any_shape():
    model = fw.models.build("mlp", (1, 8, 8), (1, 8, 8), width=[16, 4, 16])  # an autoencoder
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 1, 8, 8)


def test_a_small_cnn_learns_digits():
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(classes)
    model = fw.models.build("cnn", (1, 8, 8), (10,), channels=[8, 16], width=32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(3):
        for batch in torch.randperm(1400).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        assert (model.eval()(x[1400:]).argmax(1) == y[1400:]).float().mean() > 0.9


@pytest.mark.parametrize(
    ("name", "settings", "in_shape", "message"),
    [
        ("cnn", {}, (64,), r"cnn expects images \(C, H, W\), got \(64,\)"),
        (
            "cnn",
            {"channels": [4] * 4},
            (1, 8, 8),
            r"4 `channels` .* \(1, 8, 8\) can be halved only 3 times",
        ),
        ("resnet", {}, (6, 16), r"resnet expects images \(C, H, W\), got \(6, 16\)"),
        ("resnet", {"depths": [1, 1]}, (1, 8, 8), r"2 depths \[1, 1\] and 3 channels"),
        (
            "rnn",
            {},
            (64,),
            r"rnn expects \(T, D\) or images \(C, H, W\), or with a `vocabulary` .*, got \(64,\)",
        ),
        ("transformer", {"vocabulary": 9}, (1, 8, 8), r"transformer expects .* got \(1, 8, 8\)"),
        ("transformer", {"patch": 3}, (1, 8, 8), r"block 1 \(patch_embedding\).*patch=3"),
        ("transformer", {"heads": 5}, (12, 5), "64 features .* 5 heads"),
        ("transformer", {"causal": True, "pool": "class_token"}, (12, 5), "use pool=last"),
    ],
)
def test_a_model_refuses_a_wrong_shape_or_setting(name, settings, in_shape, message):
    with pytest.raises(BuildError, match=message):
        fw.models.build(name, in_shape, (10,), **settings)
