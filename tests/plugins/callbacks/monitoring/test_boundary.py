"""The callback boundary: decision regions, hidden units, the animation, the view in a terminal."""

import io

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

import framework as fw
import stacked
from framework.data.dataset import Loader
from framework.errors import DataError, SettingError
from runs import cut_off_at, logged, run_training

SMALL = ("data=spirals", "data.samples=120", "model.width=8", "trainer.max_epochs=3")


class Images(fw.Logger):
    """Stores the images by tag and step."""

    def __init__(self):
        self.found = {}

    def images(self, tag, images, step):
        self.found[tag, step] = images


def fit(model, data, task, tmp_path=None, **settings):
    callback = fw.callbacks.build("boundary", **settings)
    logger = Images()
    trainer = fw.Trainer(max_epochs=2, callbacks=[callback], loggers=[logger], folder=tmp_path)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer.fit(model, data, task=task, optimizer=optimizer, batch_size=20)
    return callback, logger, trainer


def frames_of(folder):
    """Return the frames of the animation as RGB images."""
    animation = Image.open(io.BytesIO((folder / "boundary.gif").read_bytes()))
    frames = []
    for number in range(animation.n_frames):
        animation.seek(number)
        frames.append(animation.convert("RGB").copy())
    return frames


def network(outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, outputs)
    )


def pixel(callback, x, y):
    """Return the color of the regions at a point."""
    size = callback.regions.shape[1]
    across = callback.axes[0].position(x)
    up = callback.axes[1].position(y)
    return callback.regions[:, round((1 - up) * (size - 1)), round(across * (size - 1))]


def test_the_regions_have_the_colors_of_the_predicted_classes():
    data = fw.datasets.build("blobs", samples=200)
    callback, _, trainer = fit(network(), data, fw.tasks.build("classification"))
    inputs = data.train.tensors[0][:40]
    probabilities = trainer.predict(inputs).softmax(1)
    colors = torch.tensor([(0, 114, 178), (213, 94, 0), (0, 158, 115)]) / 255
    light = 1 - 0.45 * (1 - probabilities @ colors)
    for (x, y), expected in zip(inputs.tolist(), light, strict=True):
        torch.testing.assert_close(pixel(callback, x, y), expected, atol=0.04, rtol=0)


def test_the_color_of_a_value_is_its_place_between_the_targets():
    inputs = torch.rand(100, 2)
    data = fw.Data()
    data.train = fw.TensorSplit(inputs, inputs[:, :1] * 4 - 1)
    data.in_shape, data.out_shape, data.target = (2,), (1,), "value"

    class Plane(nn.Linear):
        """Returns the targets exactly."""

    model = Plane(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[4.0, 0.0]]))
        model.bias.fill_(-1)
    callback, logger, _ = fit(model, data, nn.MSELoss())
    low, high = inputs[:, 0].aminmax()
    torch.testing.assert_close(
        pixel(callback, float(low + high) / 2, 0.5), torch.ones(3), atol=0.03, rtol=0
    )
    blue = 1 - 0.45 * (1 - torch.tensor((0, 114, 178)) / 255)
    torch.testing.assert_close(pixel(callback, float(low), 0.5), blue, atol=0.03, rtol=0)
    assert ("boundary/units", 10) not in logger.found, "no hidden layer"


def test_a_probability_of_one_half_is_white():
    inputs = torch.rand(100, 2)
    data = fw.Data()
    data.train = fw.TensorSplit(inputs, (inputs[:, :1] > 0.5).float())
    data.in_shape, data.out_shape, data.target = (2,), (1,), "labels"
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[100.0, 0.0]]))
        model.bias.fill_(-50)
    callback = fw.callbacks.build("boundary")
    trainer = fw.Trainer(max_steps=1, callbacks=[callback], loggers=[Images()])
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    trainer.fit(model, data, task=fw.tasks.build("multilabel"), optimizer=optimizer, batch_size=20)
    left = pixel(callback, 0.4, 0.5)
    right = pixel(callback, 0.6, 0.5)
    assert left[0] < left[2], "blue"
    assert right[0] > right[2], "red"
    assert pixel(callback, 0.5, 0.5).min() > left.min()


def test_the_picture_of_the_units_has_those_after_the_activation():
    from framework_plugins.callbacks.monitoring.boundary import GRID, hidden_units, recording

    model = network()
    recorded = []
    grid = torch.rand(GRID**2, 2)
    with recording(model, recorded), torch.no_grad():
        model(grid)
    units = hidden_units(recorded, 4)
    assert list(units) == ["0", "2"]
    expected = model[1](model[0](grid))[:, :4].T.reshape(4, GRID, GRID)
    torch.testing.assert_close(units["0"], expected)
    assert not any(module._forward_hooks for module in model.modules())


def test_it_draws_the_start_and_each_epoch(tmp_path):
    data = fw.datasets.build("spirals", samples=100)
    _, logger, trainer = fit(network(), data, nn.CrossEntropyLoss(), tmp_path)
    steps = [step for tag, step in logger.found if tag == "boundary"]
    assert steps == [0, trainer.state.step // 2, trainer.state.step]
    assert [step for tag, step in logger.found if tag == "boundary/units"] == steps
    frames = frames_of(tmp_path)
    assert len(frames) == 3
    charts = [logger.found["boundary", step][0] for step in steps]
    for frame, chart in zip(frames, charts, strict=True):
        drawn = torch.frombuffer(bytearray(frame.tobytes()), dtype=torch.uint8)
        drawn = drawn.reshape(frame.height, frame.width, 3).permute(2, 0, 1) / 255
        difference = (drawn[:, : chart.shape[1], : chart.shape[2]] - chart).abs().mean()
        assert difference < 0.02
    assert frames[0].tobytes() != frames[2].tobytes()


def test_an_interrupted_and_resumed_run_has_each_frame_once(tmp_path, monkeypatch):
    cadences = ("callbacks=[checkpoint,boundary]", "callbacks.checkpoint.every=4steps")
    cadences += ("callbacks.boundary.every=3steps", "loader.batch_size=10")
    whole = run_training(*SMALL, *cadences, f"run.root={tmp_path}", "run.name=whole")
    with cut_off_at(11, monkeypatch):
        run_training(*SMALL, *cadences, f"run.root={tmp_path}", "run.name=part")
    part = whole.folder.parent / "part"
    assert len(frames_of(part)) == 4, "of the steps 0, 3, 6 and 9; the checkpoint is of step 8"
    run_training(*SMALL, *cadences, f"resume={part}")
    assert logged(part) == logged(whole.folder)
    assert (part / "boundary.gif").read_bytes() == (whole.folder / "boundary.gif").read_bytes()
    assert len(frames_of(part)) == 1 + 27 // 3


@pytest.mark.parametrize("reading", ["a data set", "a loader with its own generator"])
def test_it_does_not_change_training(reading):
    data = fw.datasets.build("blobs", samples=100)
    weights = []
    for callbacks in ([], [fw.callbacks.build("boundary", every="2steps")]):
        torch.manual_seed(0)
        source = {"data": data, "batch_size": 20}
        if reading != "a data set":
            points = torch.utils.data.TensorDataset(*data.train.tensors)
            generator = torch.Generator().manual_seed(1)
            source = {"data": DataLoader(points, 20, shuffle=True, generator=generator)}
        model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))
        trainer = fw.Trainer(max_epochs=3, callbacks=callbacks, loggers=[Images()])
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        trainer.fit(model, **source, task=torch.nn.CrossEntropyLoss(), optimizer=optimizer)
        weights.append([*model.state_dict().values()])
    for one, other in zip(*weights, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (("data=digits",), "samples of two numbers"),
        (("data=blobs", "task=reconstruction", "model=autoencoder", "metrics=[]"), "one class or"),
    ],
)
def test_other_data_is_an_error(overrides, problem, tmp_path):
    with pytest.raises(SettingError, match=f"callbacks.boundary needs {problem}"):
        run_training(
            *overrides, "+callbacks=boundary", "trainer.max_steps=1", f"run.root={tmp_path}"
        )


def test_points_that_are_not_finite_are_left_out():
    inputs = torch.rand(20, 2)
    inputs[3, 0] = torch.nan
    inputs[5, 1] = torch.inf
    targets = inputs[:, :1].nan_to_num(0)
    targets[7] = torch.nan
    callback, logger, _ = fit(network(1), fw.TensorSplit(inputs, targets), nn.MSELoss())
    kept = [row for row in range(20) if row not in (3, 5, 7)]
    assert torch.equal(callback.inputs, inputs[kept])
    assert logger.found["boundary", 0].isfinite().all()
    with pytest.raises(SettingError, match="training points that are finite"):
        fit(network(1), fw.TensorSplit(inputs * torch.nan, targets), nn.MSELoss())


def test_training_data_that_can_be_read_only_once_is_an_error():
    batches = ((torch.rand(8, 2), torch.arange(8) % 3) for _ in range(3))
    trainer = fw.Trainer(max_epochs=1, callbacks=[fw.callbacks.build("boundary")])
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(DataError, match=r"callbacks\.boundary: expected data that can be read"):
        trainer.fit(model, batches, task=nn.CrossEntropyLoss(), optimizer=optimizer)


def test_stacked_trials_have_the_pictures_of_trials_alone():
    inputs = torch.rand(64, 2, dtype=torch.float64)
    split = fw.TensorSplit(inputs, (inputs.sum(1) > 1).long())

    def make(lr, logger):
        trainer, arguments = stacked.trial(lr=lr, model=network(2).double(), max_epochs=3)
        trainer.callbacks.append(fw.callbacks.build("boundary"))
        trainer.loggers.append(logger)
        arguments["data"] = Loader(split, 16, shuffle=True)
        arguments["val"] = None
        return trainer, arguments

    together = [Images(), Images()]
    _, errors = stacked.together(make(0.1, together[0]), make(1.0, together[1]))
    assert errors == [None, None]
    for lr, logger in zip((0.1, 1.0), together, strict=True):
        alone = Images()
        stacked.alone(make(lr, alone))
        assert logger.found.keys() == alone.found.keys()
        assert len(alone.found) == 2 * 4
        for place, picture in alone.found.items():
            assert (logger.found[place] - picture).abs().max() < 0.02, place
    assert not torch.equal(together[0].found["boundary", 12], together[1].found["boundary", 12])


def test_the_view_in_the_terminal_has_half_blocks_in_the_colors_of_the_regions():
    data = fw.datasets.build("blobs", samples=200)
    callback, _, _ = fit(network(), data, fw.tasks.build("classification"), live=True, points=1)
    view = callback.live_view(80, 12)
    lines = view.split("\n")
    assert len(lines) == 12
    assert {line.plain for line in lines} == {"▀" * 24}
    corner = view.spans[0].style.color.get_truecolor()
    expected = (callback.regions[:, :4, :4].mean((1, 2)) * 255).round().int().tolist()
    assert all(abs(a - b) < 6 for a, b in zip(corner, expected, strict=True))
    assert callback.live_view(80, 3) is None, "no room"
    assert fw.callbacks.build("boundary").live_view(80, 12) is None


def test_a_second_fit_begins_the_animation_again(tmp_path):
    model = network()
    inputs = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    data = fw.TensorSplit(inputs, torch.arange(40) % 3)
    callback = fw.callbacks.build("boundary")
    trainer = fw.Trainer(max_epochs=2, callbacks=[callback], folder=tmp_path, device="cpu")
    counts = []
    for _ in range(2):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        task = nn.CrossEntropyLoss()
        trainer.fit(model, data, task=task, optimizer=optimizer, batch_size=20)
        counts.append(len(frames_of(tmp_path)))
    assert counts == [3, 3]
