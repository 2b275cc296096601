"""Callbacks that show what a model has learned: filters, attention, embeddings; and its inputs."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import framework as fw
from framework import drawing
from framework.errors import SettingError
from framework_plugins.callbacks.monitoring import speed as speed_callback
from framework_plugins.callbacks.monitoring.attention import (
    AttentionRecorder,
    attention_image,
    without_padding,
)
from framework_plugins.callbacks.monitoring.filters import filters_image
from framework_plugins.callbacks.monitoring.samples import target_texts

LOSS = nn.CrossEntropyLoss()
IMAGES = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
SPLIT = fw.TensorSplit(IMAGES, torch.arange(12) % 3)


class Shown(fw.Logger):
    """Stores what it receives, by tag and step."""

    def __init__(self):
        self.pictures = {}
        self.points = {}
        self.sounds = {}
        self.values = {}

    def scalars(self, values, *, step, epoch, wall_seconds):
        self.values |= values

    def images(self, tag, images, step):
        self.pictures[tag, step] = images

    def embedding(self, tag, vectors, labels, step, images=None):
        self.points[tag] = (vectors, list(labels), images)

    def audio(self, tag, waves, rate, step):
        self.sounds[tag] = (waves, rate)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 5, 3), nn.Dropout(0.2), nn.Flatten(), nn.Linear(180, 3))


def fit(*callbacks, model=None, split=SPLIT, val=None, epochs=2, **settings):
    shown = Shown()
    model = model or network()
    trainer = fw.Trainer(max_epochs=epochs, callbacks=callbacks, loggers=[shown], device="cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"task": LOSS, "batch_size": 4, "val": val or split} | settings
    trainer.fit(model, split, optimizer=optimizer, **settings)
    return shown, model


class Never(fw.Callback):
    """Fails at the first step."""

    def on_step_start(self, trainer):
        raise AssertionError("the training has begun")


def build(name, **settings):
    return fw.callbacks.build(name, **settings)


def test_they_do_not_change_training():
    observers = ["filters", "embeddings", "speed", "per_class", "augmented"]
    callbacks = [build(name) for name in observers]
    callbacks.append(build("histograms", activations=True, every="1steps"))
    _, watched = fit(*callbacks)
    _, alone = fit()
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, watched.state_dict()[name]), name
    modules = list(watched.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def test_filters_are_shown_before_and_in_training():
    shown, model = fit(build("filters"))
    assert list(shown.pictures) == [("filters", 0), ("filters", 3), ("filters", 6)]
    weight = model[0].weight.detach()
    image = shown.pictures["filters", 6][0, 0]
    expected = 0.5 + weight[1, 0] / (2 * weight.abs().max())
    cell = 11  # pixels of a weight
    second = image[: 3 * cell, 3 * cell + 2 :]
    torch.testing.assert_close(second[::cell, : 3 * cell : cell], expected)


@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (4, 2, 3, 3), (6, 40, 5)])
def test_filters_of_all_shapes_are_one_image(shape):
    image = filters_image(torch.randn(shape))
    assert image.ndim == 3
    assert image.shape[0] == (3 if shape[1] == 3 else 1)
    assert image.min() >= 0
    assert image.max() <= 1


def test_a_model_without_convolution_has_no_filters():
    with pytest.raises(SettingError, match=r"callbacks\.filters: .* no 1-d or 2-d convolution"):
        fit(build("filters"), model=nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_the_recorded_weights_are_those_of_the_attention(causal, mask):
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 3, 5, 4)
    settings = {"is_causal": causal and mask is None}
    if mask is not None:
        visible = (torch.rand(2, 1, 5, 5) < 0.7) | torch.eye(5, dtype=torch.bool)
        settings["attn_mask"] = visible if mask == "bool" else torch.randn(2, 1, 5, 5)
    value = torch.eye(5).expand(2, 3, 5, 5)  # the output is then the matrix of weights
    with AttentionRecorder() as recorder:
        output = F.scaled_dot_product_attention(query, key, value, **settings)
    torch.testing.assert_close(recorder.weights[0], output[0])


def test_an_attention_image_has_a_row_for_each_layer_and_a_map_for_each_head():
    height, width = attention_image([torch.ones(1, 3, 3)], None, None, "").shape[2:]
    higher, same = attention_image([torch.ones(1, 3, 3)] * 3, None, None, "").shape[2:]
    row = drawing.CARD - 6 + 14  # the map of a head fills the card
    assert (higher - height, same - width) == (2 * row, 0)
    lower, same = attention_image([torch.ones(3, 3, 3)], None, None, "").shape[2:]
    assert lower < height - row / 2, "three maps beside each other are smaller"
    assert same == width


def test_padding_is_left_out_of_attention_maps():
    weights = torch.rand(2, 4, 4) + 0.1
    padded = F.pad(weights, (0, 3, 0, 3))
    padded[:, 4:, :4] = 0.5  # queries of the padding
    other = padded.clone()
    other[:, :, 3] = 0  # one layer ignores a token
    first, second = without_padding([other, padded])
    assert torch.equal(second, weights)
    assert first.shape == weights.shape
    causal = [torch.rand(2, 7, 7).add(0.1).tril()]
    assert without_padding(causal)[0].shape == (2, 7, 7)


def test_attention_maps_are_those_of_the_layers_of_the_model():
    layers = ["transformer_encoder", "transformer_encoder"]
    model = fw.models.build(
        "stack",
        (1, 8, 8),
        (3,),
        blocks=[fw.blocks.maker("patch_embedding", width=8), *map(fw.blocks.maker, layers)],
    )
    shown, _ = fit(build("attention", count=1), model=model)
    assert list(shown.pictures) == [("attention/0", 3), ("attention/0", 6)]
    one_layer = attention_image([torch.ones(1, 3, 3)], None, IMAGES[0], "0")
    two_layers = attention_image([torch.ones(4, 3, 3)] * 2, None, IMAGES[0], "0")
    assert shown.pictures["attention/0", 6].shape == two_layers.shape != one_layer.shape
    with pytest.raises(SettingError, match=r"callbacks\.attention: model Sequential calls no"):
        fit(build("attention"), Never())


def test_embeddings_are_the_inputs_of_the_last_layer():
    shown, model = fit(build("embeddings", count=6))
    vectors, labels, images = shown.points["features"]
    chosen = torch.linspace(0, 11, 6).round().long()
    expected = model.eval()[:3](IMAGES[chosen])
    torch.testing.assert_close(vectors, expected.detach())
    assert labels == [str(index % 3) for index in chosen.tolist()]
    assert images.shape == (6, 1, 8, 8)


def test_thumbnails_of_narrow_images_have_a_row_at_least():
    split = fw.TensorSplit(torch.rand(8, 1, 2, 200), torch.arange(8) % 3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(400, 3))
    shown, _ = fit(build("embeddings"), model=model, split=split)
    assert shown.points["features"][2].shape == (8, 1, 1, 32)


def test_embeddings_of_a_layer_and_of_tokens():
    torch.manual_seed(0)
    words = torch.randint(1, 9, (12, 4))
    model = nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(12, 3))
    split = fw.TensorSplit(words, torch.arange(12) % 3)
    shown, model = fit(build("embeddings", layer="0", tokens=True), model=model, split=split)
    vectors, _, images = shown.points["features"]
    torch.testing.assert_close(vectors, model[0](words)[:, -1].detach())
    assert images is None
    assert torch.equal(shown.points["tokens"][0], model[0].weight.detach())
    with pytest.raises(SettingError, match=r"callbacks\.embeddings\.layer=9"):
        fit(build("embeddings", layer="9"))


def test_token_embeddings_have_a_row_for_each_token_of_the_text():
    tokens = torch.arange(1, 200) % 5 + 1
    split = fw.WindowSplit(tokens, 8, tokenizer=SimpleNamespace(size=6, decode=str))
    model = fw.models.build("decoder", (8,), (8, 6), width=8, depth=1, ngrams=2, buckets=64)
    task = fw.tasks.build("language_modelling")
    shown, _ = fit(build("embeddings", tokens=True), model=model, split=split, task=task)
    vectors, labels, _ = shown.points["tokens"]
    assert torch.equal(vectors, model.embedding.weight.detach()), "not the table of the n-grams"
    assert labels == [f"[{number}]" for number in range(6)]


def test_sounds_are_the_real_part_of_the_waveforms():
    inputs = torch.zeros(4, 2, 10)
    inputs[:, 0] = torch.linspace(-1, 1, 10)
    for row in range(4):
        inputs[row, 1, : row + 3] = 1  # the mask
    split = fw.TensorSplit(inputs, torch.tensor([0, 1, 0, 2]))
    model = nn.Sequential(nn.Flatten(), nn.Linear(20, 3))
    shown, _ = fit(build("sounds", sample_rate=8000), model=model, split=split)
    assert list(shown.sounds) == ["sounds/0 0", "sounds/1 1", "sounds/2 0", "sounds/3 2"]
    waves, rate = shown.sounds["sounds/3 2"]
    assert rate == 8000
    assert torch.equal(waves, inputs[3:, 0, :6])
    with pytest.raises(SettingError, match=r"or callbacks\.sounds\.sample_rate"):
        fit(build("sounds"), model=model, split=split)
    with pytest.raises(SettingError, match=r"callbacks\.sounds: expected waveforms"):
        fit(build("sounds", sample_rate=8000))


def activations_of(model):
    """Return the histograms of the activations after the last step, by module."""
    found = {}

    class Histograms(fw.Logger):
        def histogram(self, tag, values, step):
            group, _, name = tag.partition("/")
            if group == "activations" and step == 3:
                found[name] = values

    callback = build("histograms", activations=True, samples=12)
    trainer = fw.Trainer(max_epochs=1, callbacks=[callback], loggers=[Histograms()], device="cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer.fit(model, SPLIT, val=SPLIT, task=LOSS, optimizer=optimizer, batch_size=4)
    return found


def test_activations_are_those_of_the_innermost_modules():
    model = network()
    found = activations_of(model)
    assert found.keys() == {"0", "3"}  # not of dropout and flatten
    expected = model.eval()(IMAGES).detach().flatten()
    torch.testing.assert_close(found["3"], expected)


class Rows(nn.Module):
    """Reshapes by a copy, in another memory format."""

    def forward(self, x):
        return x.flatten(1).clone()


def test_modules_that_only_reshape_have_no_activations():
    torch.manual_seed(1)
    convolution = nn.Conv2d(1, 5, 3)
    nn.init.zeros_(convolution.weight)
    nn.init.ones_(convolution.bias)  # all activations are positive
    layers = [convolution, nn.ReLU(), nn.Identity(), Rows(), nn.Linear(180, 3), nn.ReLU(True)]
    found = activations_of(nn.Sequential(nn.Identity(), *layers))
    assert found.keys() == {"1", "2", "5", "6"}
    assert float(found["6"].min()) == 0
    assert float(found["5"].min()) < 0


class Clock(fw.Callback):
    """A clock on which a step takes a quarter of a second, and a validation 10 seconds."""

    changes_training = False

    def __init__(self):
        self.seconds = 0.0

    def perf_counter(self):
        return self.seconds

    def on_step_end(self, trainer):
        self.seconds += 0.25

    def on_validation_start(self, trainer):
        self.seconds += 10  # after the callback `speed`, which comes first


def test_speed_logs_the_use_of_the_device(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(speed_callback, "time", clock)
    shown, _ = fit(build("speed", peak_tflops=1e-6), clock)
    speed = {tag: value for tag, value in shown.values.items() if tag.startswith("speed/")}
    assert speed.keys() == {"speed/data_wait", "speed/memory_gib", "speed/mfu"}
    flops = 3 * 2 * (5 * 9 * 36 + 180 * 3)  # of a sample: convolution and linear layer
    samples_per_second = 4 / 0.25
    assert speed["speed/mfu"] == pytest.approx(samples_per_second * flops / 1e6)
    assert 0 <= speed["speed/data_wait"] <= 1
    assert 0.05 < speed["speed/memory_gib"] < 50


def test_the_peak_of_a_slow_device_is_measured_with_small_matrices(monkeypatch):
    clock = [0.0]

    def slow_product(self, other):
        clock[0] += 2 * len(self) ** 3 / 1e8  # seconds, at 1e8 FLOP/s
        return self

    monkeypatch.setattr(torch.Tensor, "__matmul__", slow_product)
    monkeypatch.setattr(speed_callback.time, "perf_counter", lambda: clock[0])
    trainer = SimpleNamespace(device=torch.device("cpu"), precision=SimpleNamespace(dtype=None))
    assert speed_callback.measured_peak(trainer) == pytest.approx(1e8)
    assert clock[0] < 1


def test_the_first_batch_is_shown_with_its_classes():
    shown, _ = fit(build("augmented", count=4, every="2epochs"))
    assert list(shown.pictures) == [("augmented", 1), ("augmented", 6)]
    assert shown.pictures["augmented", 1].shape == (1, 3, 94, 350)
    split = fw.TensorSplit(IMAGES[:9], torch.arange(9) % 3)  # the last batch has one image
    shown, _ = fit(build("augmented", count=4), split=split)
    assert [step for _, step in shown.pictures] == [1, 3, 6]
    for step in (1, 3, 6):
        white_below = shown.pictures["augmented", step][0, :, 40, 350 - 80 :]
        assert white_below.min() < 0.9, "the row has four images"


def test_targets_as_texts():
    names = ["cat", "dog", "cow"]
    assert target_texts(torch.tensor([2, 0, 5]), names) == ["cow", "cat", "5"]
    assert target_texts(torch.tensor([[1.5], [2.0]]), []) == ["1.5", "2"]
    mixed = torch.tensor([[0.3, 0.7, 0.0], [0.0, 0.0, 1.0]])
    assert target_texts(mixed, names) == ["dog 70%\ncat 30%", "cow 100%"]


def test_the_plan_lists_the_cost_of_callbacks():
    from framework.experiment.experiment import Experiment
    from runs import composed

    names = "callbacks=[checkpoint,confusion,histograms]"
    spec = composed(["data=blobs", names, "callbacks.confusion.every=10steps"])
    assert Experiment(spec).plan().callbacks == [
        "confusion reads the validation split once more, every 10 steps",
        "histograms copies all weights and gradients, every epoch",
    ]
