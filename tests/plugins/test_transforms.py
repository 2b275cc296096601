"""Each transform of batches against a loop over the samples, and transforms in a run."""

import io
import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import framework as fw
from compiler import needs_compiler
from framework import TensorSplit, Trainer, Transform
from framework.composition.compose import CommandLine, run_composed as compose
from framework.contracts.callback import Callback
from framework.errors import BuildError, ConfigError, SettingError
from framework.experiment.experiment import Experiment, train
from framework.runs.checkpoint import listed
from framework.runtime.display.drawing import captioned
from framework.tuning.vectorized.stacked_update import NotStackable
from framework.tuning.vectorized.trainer import check_equal_settings

IN = (2, 5, 6)
OUT = (4,)


def images(count=40, seed=0):
    return torch.randn(count, *IN, generator=torch.Generator().manual_seed(seed))


def build(name, **settings):
    return fw.transforms.build(name, IN, OUT, **settings)


def apply(transform, *batch, seed=1):
    torch.manual_seed(seed)
    return transform(batch)


TARGETS = torch.arange(40) % 4
EVERY = [
    "flip",
    "crop",
    "resized_crop",
    "cutout",
    "noise",
    "brightness_contrast",
    "mixup",
    "cutmix",
]


@pytest.mark.parametrize("name", EVERY)
def test_a_transform_changes_the_batch_and_not_the_data(name):
    x = images()
    y = TARGETS.clone()
    out, targets = apply(build(name), x, y)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert not torch.equal(out, x)
    assert torch.equal(x, images())
    assert torch.equal(y, TARGETS)
    assert len(targets) == len(y)


@pytest.mark.parametrize("name", EVERY)
def test_the_same_seed_gives_the_same_batch_and_another_seed_another(name):
    first, _ = apply(build(name), images(), TARGETS, seed=1)
    again, _ = apply(build(name), images(), TARGETS, seed=1)
    other, _ = apply(build(name), images(), TARGETS, seed=2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("axis", "dimension"), [("horizontal", 2), ("vertical", 1)])
def test_a_flip_mirrors_about_half_of_the_images(axis, dimension):
    x = images(400)
    out, _ = apply(build("flip", axis=axis), x, x)
    mirrored = 0
    for before, after in zip(x, out, strict=True):
        mirror = torch.stack(list(before.unbind(dimension))[::-1], dimension)
        assert torch.equal(after, before) or torch.equal(after, mirror)
        mirrored += torch.equal(after, mirror)
    assert 160 < mirrored < 240
    assert torch.equal(apply(build("flip", p=0.0), x, x)[0], x)


@pytest.mark.parametrize("fill", ["edge", "zero", "reflect"])
def test_a_crop_is_one_of_the_shifts_and_every_shift_comes(fill):
    x = images(150)
    out, _ = apply(build("crop", padding=2, fill=fill), x, x)
    shifts = list(product(range(-2, 3), repeat=2))
    seen = set()
    for before, after in zip(x, out, strict=True):
        found = [shift for shift in shifts if torch.equal(shifted(before, *shift, fill), after)]
        assert found
        seen.update(found)
    assert len(seen) == 25


def shifted(image, top, left, fill):
    """Shift an image by `top` rows and `left` columns, pixel by pixel."""
    _, high, wide = image.shape
    out = torch.zeros_like(image)
    for row in range(high):
        for column in range(wide):
            r = row + top
            c = column + left
            if fill == "edge":
                r = min(max(r, 0), high - 1)
                c = min(max(c, 0), wide - 1)
            elif fill == "reflect":
                r = (high - 1) - abs((high - 1) - abs(r))
                c = (wide - 1) - abs((wide - 1) - abs(c))
            if 0 <= r < high and 0 <= c < wide:
                out[:, row, column] = image[:, r, c]
    return out


def ramps(count, high, wide):
    """Return images with channels row and column, which stay linear under interpolation."""
    rows, columns = torch.meshgrid(
        torch.arange(float(high)), torch.arange(float(wide)), indexing="ij"
    )
    return torch.stack([rows, columns]).expand(count, -1, -1, -1)


def box_of(pixels, size):
    """Return start and length of the box along an axis, from two pixels in its middle."""
    middle = size // 2
    length = (pixels[middle] - pixels[middle - 1]) * size
    return pixels[middle] + 0.5 - (middle + 0.5) * length / size, length


def test_a_resized_crop_is_a_box_inside_the_image_scaled_to_its_size():
    high = 12
    wide = 16
    smallest = 0.3
    crop = fw.transforms.build("resized_crop", (2, high, wide), OUT, smallest=smallest, ratio=1.5)
    out, _ = apply(crop, ramps(2000, high, wide), torch.zeros(2000))
    boxes = []
    for image in out:
        top, tall = box_of(image[0, :, 0], high)
        left, broad = box_of(image[1, 0], wide)
        rows = (top - 0.5 + (torch.arange(high) + 0.5) * tall / high).clamp(0, high - 1)
        columns = (left - 0.5 + (torch.arange(wide) + 0.5) * broad / wide).clamp(0, wide - 1)
        torch.testing.assert_close(image[0], rows[:, None].expand(high, wide), atol=2e-4, rtol=0)
        torch.testing.assert_close(image[1], columns[None].expand(high, wide), atol=2e-4, rtol=0)
        boxes.append([top / high, tall / high, left / wide, broad / wide])
    top, tall, left, broad = torch.tensor(boxes).unbind(1)
    share = tall * broad
    stretch = (broad / tall).log().abs()
    assert torch.stack([top, left, 1 - top - tall, 1 - left - broad]).min() > -1e-3, "inside"
    assert smallest - 1e-3 < share.min() < 0.31 < 0.99 < share.max() < 1 + 1e-3
    assert float(share.mean()) == pytest.approx((1 + smallest) / 2, abs=0.02)
    assert 0.38 < stretch.max() < 0.406  # the logarithm of 1.5
    place = top[share < 0.6] / (1 - tall[share < 0.6])
    assert float(place.mean()) == pytest.approx(0.5, abs=0.03)
    assert place.min() < 0.02 < 0.98 < place.max()


def test_a_resized_crop_of_all_of_the_image_is_the_image():
    out, _ = apply(build("resized_crop", smallest=1.0), images(), TARGETS)
    torch.testing.assert_close(out, images(), atol=1e-5, rtol=0)
    with pytest.raises(
        SettingError,
        match=r"resized_crop: .*torch.uint8",
    ):
        apply(build("resized_crop"), images().byte(), TARGETS)


def test_a_cutout_is_a_square_of_zeros_about_any_pixel():
    x = images(800)
    centres = set()
    out, _ = apply(build("cutout", size=3), x, x)
    expected = {}
    for row in range(IN[1]):
        for column in range(IN[2]):
            mask = torch.ones(IN[1:])
            mask[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = 0
            expected[row, column] = mask
    for before, after in zip(x, out, strict=True):
        found = [centre for centre, mask in expected.items() if torch.equal(before * mask, after)]
        assert len(found) == 1
        centres.update(found)
    assert len(centres) == 30
    kept = apply(build("cutout", p=0.25), x, x)[0]
    assert 140 < sum(not torch.equal(a, b) for a, b in zip(x, kept, strict=True)) < 260


def test_noise_is_normal_and_of_every_number_by_itself():
    x = torch.zeros(500, *IN)
    added = apply(build("noise", std=0.5), x, x)[0].flatten(1)
    assert float(added.mean()) == pytest.approx(0, abs=0.02)
    assert float(added.std()) == pytest.approx(0.5, abs=0.02)
    assert float(torch.corrcoef(added.T).triu(1).abs().max()) < 0.25
    with pytest.raises(SettingError, match=r"noise: .*torch.int64"):
        apply(build("noise"), TARGETS, TARGETS)


def test_brightness_and_contrast_are_drawn_for_each_image():
    x = images(300)
    out, _ = apply(build("brightness_contrast", brightness=0.3, contrast=0.5), x, x)
    shifts = []
    stretches = []
    for before, after in zip(x, out, strict=True):
        stretches.append(float((after - after.mean()).norm() / (before - before.mean()).norm()))
        shifts.append(float(after.mean() - before.mean()))
        torch.testing.assert_close(
            before.mean() + stretches[-1] * (before - before.mean()) + shifts[-1], after
        )
    assert -0.3 < min(shifts) < -0.25 < 0.25 < max(shifts) < 0.3
    assert 0.5 < min(stretches) < 0.55 < 1.45 < max(stretches) < 1.5


def test_mixup_mixes_two_samples_and_their_targets_in_the_same_proportion():
    x = images()
    one_hot = torch.eye(4)[TARGETS]
    out, targets = apply(build("mixup", alpha=1.0), x, TARGETS)
    torch.manual_seed(1)  # only the order of the draws is copied from the transform
    share = torch.distributions.Beta(1.0, 1.0).sample((40,))
    torch.rand(40)
    other = torch.randperm(40)
    for row in range(40):
        kept = float(share[row])
        torch.testing.assert_close(out[row], kept * x[row] + (1 - kept) * x[other[row]])
        torch.testing.assert_close(
            targets[row], kept * one_hot[row] + (1 - kept) * one_hot[other[row]]
        )
    assert float(share.min()) < 0.1 < 0.9 < float(share.max())


def test_cutmix_inserts_a_box_of_another_image_and_mixes_targets_by_area():
    x = torch.arange(40.0).reshape(40, 1, 1, 1).expand(40, *IN)
    y = TARGETS
    out, targets = apply(build("cutmix"), x, y)
    boxed = 0
    for row in range(40):
        inside = out[row, 0] != row
        assert torch.equal(inside, out[row, 1] != row)
        share = inside.float().mean().item()
        expected = (1 - share) * torch.eye(4)[y[row]]
        if share:
            (other,) = out[row, 0][inside].unique().long().tolist()
            expected = expected + share * torch.eye(4)[y[other]]
            rows, columns = inside.nonzero().unbind(1)
            box = inside[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert bool(box.all()), "one rectangle"
            boxed += 1
        torch.testing.assert_close(targets[row], expected)
    assert boxed > 25


def test_the_share_that_cutmix_draws_is_that_of_the_paper():
    start, end = type(build("cutmix")).side(torch.tensor([0.36, 1.0, 0.0]), 10)
    assert (end - start).tolist() == [8, 0, 10]  # side times the root of 1 - λ


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_targets_that_are_values_or_probabilities_already_are_mixed_as_they_are(name):
    values = torch.randn(40, 4)
    _, targets = apply(build(name), images(), values)
    assert not torch.equal(targets, values)
    for row in targets:
        assert any(is_between(row, one, other) for one, other in product(values, repeat=2))


def is_between(row, one, other):
    """Return whether `row` is on the line segment from one point to another."""
    direction = one - other
    share = ((row - other) @ direction / (direction @ direction).clamp_min(1e-9)).clamp(0, 1)
    return torch.allclose(share * one + (1 - share) * other, row, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["flip", "crop", "resized_crop", "cutout", "cutmix", "brightness_contrast"]
)
def test_a_transform_of_images_refuses_other_shapes_when_it_is_built(name):
    with pytest.raises(
        (BuildError, ConfigError), match=rf"{name} expects images \(C, H, W\), got \(64,\)"
    ):
        fw.transforms.build(name, (64,), (10,))


def test_a_crop_cannot_mirror_more_pixels_than_the_image_has():
    with pytest.raises(BuildError, match=r"padding=5.*\(2, 5, 6\); fill=edge"):
        build("crop", padding=5, fill="reflect")


# in a run


class Recorder(Transform):
    """Stores its batches and returns zeros."""

    def __init__(self):
        self.batches = []

    def __call__(self, batch):
        self.batches.append(batch)
        return batch[0] * 0, *batch[1:]


def fit(*transforms, loss=None, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(60, 4))
    split = TensorSplit(images(), TARGETS)
    trainer = Trainer(max_epochs=2, device="cpu", callbacks=transforms, **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer.fit(
        model,
        split,
        task=loss or nn.CrossEntropyLoss(),
        optimizer=optimizer,
        val=split,
        batch_size=10,
    )
    return trainer, model


def test_training_batches_are_transformed_in_order_and_validation_batches_are_not():
    first = Recorder()
    second = Recorder()
    trainer, model = fit(first, second)
    assert len(first.batches) == len(second.batches) == 8
    assert all(bool((batch[0] == 0).all()) for batch in second.batches)
    _, untrained = fit(Recorder(), Recorder())
    assert torch.equal(model[1].weight, untrained[1].weight), "zeros do not train the weights"
    expected = nn.functional.cross_entropy(model(images()), TARGETS).item()
    assert trainer.state.metrics["val/loss"] == pytest.approx(expected, rel=1e-5)


def test_mixup_refuses_a_loss_without_probabilities_by_name():
    with pytest.raises(
        SettingError,
        match=r"mixup .* loss Focal .* use cross_entropy",
    ):
        fit(build("mixup"), loss=fw.losses.build("focal"))


def test_a_batch_is_transformed_before_it_is_split_into_micro_batches():
    _, whole = fit(build("mixup"), build("crop"))
    _, parts = fit(build("mixup"), build("crop"), micro_batch=5)
    torch.testing.assert_close(whole[1].weight, parts[1].weight)


def test_stacked_trials_refuse_transforms_by_name():
    trainers = [Trainer(max_epochs=1, callbacks=[build("flip")]) for _ in range(2)]
    with pytest.raises(NotStackable, match="Flip works with a single trial"):
        check_equal_settings(trainers)


@needs_compiler
def test_a_compiled_step_trains_on_transformed_batches():
    _, compiled = fit(build("mixup"), build("flip"), compile="step")
    _, eager = fit(build("mixup"), build("flip"))
    torch.testing.assert_close(compiled[1].weight, eager[1].weight)


SMALL = [
    "data.image=true",
    "model=cnn",
    "model.channels=[4]",
    "model.width=8",
    "transforms=[crop,noise,cutmix]",
]
LIMITS = [
    "trainer.max_epochs=2",
    "callbacks=[checkpoint]",
    "callbacks.checkpoint.every=5steps",
    "loggers=json_lines",
]


def spec_of(*overrides):
    specs = []
    compose(CommandLine([*SMALL, *LIMITS, *overrides]), lambda job: specs.append(job.spec))
    return specs[0]


class Cut(Callback):
    """Ends the run at a step as a kill would."""

    def on_step_end(self, trainer):
        if trainer.state.step == 33:
            raise KeyboardInterrupt


def test_a_run_stopped_in_mid_epoch_resumes_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = train(spec_of("run.name=whole"), "default", [])
    plain = Experiment.trainer
    with monkeypatch.context() as patched:
        patched.setattr(Experiment, "trainer", lambda *args: add(plain(*args)))
        with pytest.raises(KeyboardInterrupt):
            train(spec_of("run.name=cut"), "default", [])
    resumed = train(spec_of("run.name=cut", "resume=auto"), "default", [], say=lambda line: None)
    assert weights(whole.folder) == weights(resumed.folder)
    other = train(spec_of("transforms=[crop,noise]"), "default", [])
    assert weights(whole.folder) != weights(other.folder)


def add(trainer):
    trainer.callbacks.append(Cut())
    return trainer


def weights(run):
    return (listed(Path(run) / "checkpoints")[-1] / "model.safetensors").read_bytes()


def test_the_config_of_a_run_has_their_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = spec_of("transforms.crop.padding=1", "+transforms=flip").tree
    assert list(tree["transforms"]) == ["crop", "noise", "cutmix", "flip"]
    assert tree["transforms"]["crop"] == {"padding": 1, "fill": "edge"}
    with pytest.raises(ConfigError, match=r"transforms\.crop\.padding=0"):
        spec_of("transforms.crop.padding=0")
    assert json.dumps(tree["transforms"])


# in TensorBoard


def shown_in(folder):
    """Return the images with the tag "augmented" by step, each an array (height, width)."""
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    shown = {}
    for event in events.Tensors("augmented"):
        files = event.tensor_proto.string_val[2:]
        shown[event.step] = [np.asarray(Image.open(io.BytesIO(file))) for file in files]
    return shown


def test_tensorboard_shows_the_inputs_of_the_model(tmp_path, monkeypatch):
    inputs = []
    drawn = []

    def recorded(images, captions):
        drawn.append(images)
        return captioned(images, captions)

    monkeypatch.setattr("framework.runtime.display.drawing.captioned", recorded)

    class Watched(nn.Linear):
        def forward(self, x):
            inputs.extend([x.detach().clone()] * self.training)
            return super().forward(x)

    split = TensorSplit(images()[:, :1].contiguous(), TARGETS)
    model = nn.Sequential(Watched(6, 4), nn.Flatten(), nn.Linear(20, 4))
    trainer = Trainer(
        max_epochs=2,
        device="cpu",
        folder=tmp_path,
        callbacks=[build("crop"), build("mixup"), fw.callbacks.build("augmented", count=10)],
        loggers=[fw.loggers.build("tensorboard")],
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer.fit(
        model, split, task=nn.CrossEntropyLoss(), optimizer=optimizer, val=split, batch_size=10
    )
    shown = shown_in(tmp_path)
    assert list(shown) == [1, 4, 8], "after the first step and each epoch of four"
    for step, pictures in zip(shown, drawn, strict=True):
        expected = inputs[step - 1]
        expected = (expected - expected.min()) / (expected.max() - expected.min())
        assert len(expected) == 10
        torch.testing.assert_close(pictures, expected)


def test_the_augmented_callback_changes_no_weights_and_needs_images():
    _, shown = fit(build("mixup"), fw.callbacks.build("augmented"))
    _, plain = fit(build("mixup"))
    assert torch.equal(shown[1].weight, plain[1].weight)
    split = TensorSplit(torch.randn(8, 6), TARGETS[:8])
    model = nn.Linear(6, 4)
    trainer = Trainer(max_steps=1, device="cpu", callbacks=[fw.callbacks.build("augmented")])
    with pytest.raises(
        SettingError, match=r"callbacks.augmented: expected images .* got torch.float32 \(6,\)"
    ):
        trainer.fit(
            model, split, task=nn.CrossEntropyLoss(), optimizer=torch.optim.SGD(model.parameters())
        )
