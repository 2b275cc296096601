"""The loss on a plane through the weights, compared with closed forms and with `eval`."""

import json

import pytest
import torch
from torch import nn

from framework.cli.landscape import heat_map
from framework.errors import BuildError
from framework.experiment.evaluation.landscape import Surface, grid, measure_landscapes
from framework.experiment.evaluation.landscape_files import color_scale, draw_landscapes
from framework.experiment.evaluation.plane import main_plane, movable_weights, random_plane
from framework.experiment.trained.load import open_run
from framework.runs.checkpoint import load_model
from framework.runtime.display.drawing import colors_of, pixels_of
from framework.runtime.display.plot import SHADES
from runs import run_training


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))


def test_filters_of_random_directions_have_the_norms_of_the_filters_of_the_model():
    center = movable_weights(network())
    assert set(center) == {"0.weight", "3.weight"}, "biases and norms stay as they are"
    plane = random_plane(center, [], seed=0)
    for direction in (plane.first, plane.second):
        for name, weight in center.items():
            norms = direction[name].flatten(1).norm(dim=1)
            torch.testing.assert_close(norms, weight.flatten(1).norm(dim=1))
    assert not torch.equal(plane.first["3.weight"], plane.second["3.weight"])
    again = random_plane(center, [], seed=0)
    other = random_plane(center, [], seed=1)
    assert torch.equal(plane.first["0.weight"], again.first["0.weight"])
    assert not torch.equal(plane.first["0.weight"], other.first["0.weight"])


def test_the_main_plane_contains_two_checkpoints():
    center = {"w": torch.randn(3, 5)}
    checkpoints = [{"w": center["w"] + torch.randn(3, 5)} for _ in range(2)]
    plane = main_plane(center, [*checkpoints, center])
    assert plane.explained == pytest.approx(1)
    for checkpoint, (x, y) in zip([*checkpoints, center], plane.path, strict=True):
        point = center["w"] + x * plane.first["w"] + y * plane.second["w"]
        torch.testing.assert_close(point, checkpoint["w"], atol=1e-5, rtol=1e-5)
    assert plane.path[2] == pytest.approx((0, 0), abs=1e-6)


def test_the_explained_share_is_that_of_the_singular_values():
    torch.manual_seed(1)
    center = {"w": torch.zeros(4, 6)}
    checkpoints = [{"w": torch.randn(4, 6)} for _ in range(6)]
    plane = main_plane(center, checkpoints)
    values = torch.linalg.svdvals(torch.stack([each["w"].flatten() for each in checkpoints])) ** 2
    assert plane.explained == pytest.approx((values[:2].sum() / values.sum()).item(), rel=1e-5)
    assert 0.3 < plane.explained < 0.9


def test_the_path_on_parallel_directions_has_the_smallest_coordinates():
    weights = [{"w": torch.zeros(2, 2)}, {"w": torch.ones(2, 2)}]
    plane = random_plane(weights[0], weights, seed=0)  # filters of norm 0
    assert plane.path == [(0, 0), (0, 0)]
    assert plane.explained == 0


def test_a_model_without_two_finite_weights_has_no_plane():
    with pytest.raises(BuildError, match=r"at least 2 numbers in weights .* got 1"):
        movable_weights(nn.Linear(1, 1))
    model = nn.Linear(2, 2)
    model.weight.data[0, 0] = torch.inf
    with pytest.raises(BuildError, match="the weights weight of the model are not finite"):
        movable_weights(model)


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """A linear regression, whose loss is a quadratic function of the weights."""
    root = tmp_path_factory.mktemp("runs")
    return run_training(
        f"run.root={root}",
        "experiment=diabetes",
        "model={name: mlp, width: []}",
        "loss=mse",
        "trainer.max_epochs=4",
        "callbacks.checkpoint.keep=10",
        "callbacks.checkpoint.every=1epoch",
    ).folder


def surface_of(run, directions="random", split="train", samples=10**6):
    trained = open_run(run)
    return Surface(trained, trained.read_data(), split, samples, 0, directions)


def test_the_loss_of_a_linear_model_is_its_quadratic_form(linear):
    surface = surface_of(linear)
    (found,) = measure_landscapes([surface], 5, 2.0)
    inputs, targets = surface.trained.read_data().train.tensors
    (name,) = surface.plane.center
    model = surface.trained.model
    bias = dict(model.named_parameters())[name.replace("weight", "bias")].detach().double()
    x = inputs.double()
    for row, y in enumerate(found.y):
        for column, across in enumerate(found.x):
            weight = surface.plane.center[name].double()
            weight = weight + across * surface.plane.first[name].double()
            weight = weight + y * surface.plane.second[name].double()
            outputs = x @ weight.T + bias
            expected = (outputs - targets.double()).square().mean().item()
            assert found.losses[row][column] == pytest.approx(expected, rel=1e-4)
    assert max(map(max, found.losses)) > 1.5 * found.center


@pytest.mark.parametrize("directions", ["random", "pca"])
def test_the_center_is_the_loss_of_the_evaluation(linear, directions):
    surface = surface_of(linear, directions, "test")
    (found,) = measure_landscapes([surface], 4, None)
    expected = open_run(linear).evaluate("test")["test/loss"]
    assert found.center == expected
    row = found.y.index(0.0)
    column = found.x.index(0.0)
    assert found.losses[row][column] == expected


def test_the_path_has_the_losses_of_the_checkpoints(linear):
    (found,) = measure_landscapes([surface_of(linear, "pca", "test")], 3, None)
    assert len(found.path) == 4
    for point in found.path:
        trained = open_run(linear, f"step-{point['step']:08d}")
        assert point["loss"] == pytest.approx(trained.evaluate("test")["test/loss"], rel=1e-6)
    assert found.directions == "pca"
    assert 0.5 < found.explained <= 1.0000001
    low, high = min(found.x), max(found.x)
    assert all(low <= point["x"] <= high for point in found.path)


def test_the_path_is_without_checkpoints_that_are_not_finite(linear, monkeypatch, capsys):
    (found,) = measure_landscapes([surface_of(linear, "pca")], 3, None)
    damaged = f"step-{found.path[1]['step']:08d}"

    def with_nan(folder):
        state = load_model(folder)
        if folder.name == damaged:
            state["head.linear.weight"] *= torch.nan
        return state

    monkeypatch.setattr("framework.runs.checkpoint.load_model", with_nan)
    (shorter,) = measure_landscapes([surface_of(linear, "pca")], 3, None)
    assert shorter.path[0]["step"] == found.path[0]["step"]
    assert shorter.path[1]["step"] == found.path[2]["step"]
    assert "not finite" in capsys.readouterr().err


def test_the_weights_are_restored(linear):
    surface = surface_of(linear)
    model = surface.trained.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measure_landscapes([surface], 3, 1.0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_some_samples_are_drawn_by_the_seed(linear):
    trained = open_run(linear)
    data = trained.read_data()
    losses = []
    for seed in (0, 0, 1):
        surface = Surface(trained, data, "train", 20, seed, "random")
        assert surface.samples == 20
        losses.append(surface.loss())
    assert losses[0] == losses[1] != losses[2]


def test_samples_of_texts_are_those_of_the_split(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{n} squared is {n * n}.\n" for n in range(300)))
    run = run_training(
        f"run.root={tmp_path}/runs",
        "data=plain_text",
        f"data.path={tmp_path}",
        "data.length=16",
        "data.val_fraction=0.2",
        "task=language_modelling",
        "model={name: decoder, width: 16, depth: 1, heads: 2}",
        "metrics=[]",
        "trainer.max_steps=1",
        "trainer.max_epochs=null",
    ).folder
    surface = surface_of(run, split="val", samples=3)
    whole = surface_of(run, split="val")
    rows = torch.cat([batch[0] for batch in whole.batches])
    for row in torch.cat([batch[0] for batch in surface.batches]):
        assert (rows == row).all(1).any()
    assert surface.samples == 3 < whole.samples


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-0.3, 2.0), (0.0, 5.0), (-4.0, 0.5)])
@pytest.mark.parametrize("points", [3, 4, 21])
def test_a_grid_contains_zero(low, high, points):
    values = grid(low, high, points)
    assert len(values) == points
    assert 0.0 in values
    assert values[-1] - values[0] == pytest.approx(high - low)


def test_a_loss_that_is_not_finite_has_no_color(linear):
    (found,) = measure_landscapes([surface_of(linear)], 3, 1.0)
    scale = color_scale([found])
    found.losses[0][0] = float("inf")
    found.losses[2][2] = float("nan")
    after = color_scale([found])
    assert (after.low, scale.low) == (scale.low, after.low)
    assert draw_landscapes([found]).isfinite().all()


def test_the_command_draws_two_runs_with_the_same_range(linear, tmp_path, command, monkeypatch):
    other = run_training(
        f"run.root={tmp_path}/runs",
        "experiment=diabetes",
        "model={name: mlp, width: [8]}",
        "loss=mse",
        "trainer.max_epochs=1",
    ).folder
    line = f"landscape {linear} --against {other} --points 3 --samples 50"
    status, out, err = command(f"{line} --json")
    assert status == 0, err
    document = json.loads(out)
    first, second = document["landscapes"]
    assert first["directions"] == second["directions"] == "random", "one checkpoint is no path"
    assert (first["x"], first["y"]) == (second["x"], second["y"])
    files = {file.rpartition("/")[2] for file in document["files"]}
    assert files == {"landscape.png", "landscape.json"}
    status, text, err = command(line)
    assert status == 0, err
    assert text.count("X") >= 2
    assert max(map(len, text.splitlines()[:20])) <= 120
    monkeypatch.setattr("rich.console.Console.width", 30)
    narrow = command(line)[1].splitlines()
    assert max(map(len, narrow[1:23])) == 30
    assert len(narrow) == len(text.splitlines())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--points 2", "--points 2"),
        ("--points 999", "--points 999"),
        ("--span 0", "--span 0"),
        ("--span nan", "--span nan"),
        ("--samples 0", "--samples 0"),
        ("--split valid", "--split valid"),
        ("--against nothing", "nothing"),
        ("--directions flat", "--directions flat"),
    ],
)
def test_wrong_options_are_errors_in_one_line(linear, command, options, words):
    status, _, err = command(f"landscape {linear} {options}")
    assert status == 2
    assert words in err
    assert len(err.splitlines()) == 1


def test_runs_that_cannot_be_compared_or_have_no_path_are_errors(linear, tmp_path, command, capsys):
    other = run_training(f"run.root={tmp_path}/runs", "trainer.max_epochs=1").folder
    status, _, err = command(f"landscape {linear} --against {other}")
    assert status == 2
    assert "cannot be compared" in err
    status, _, err = command(f"landscape {other} --directions pca")
    assert status == 2
    assert "expected at least 3" in err
    bare = run_training(f"run.root={tmp_path}/bare", "trainer.max_epochs=1", "callbacks=[]").folder
    status, _, err = command(f"landscape {bare}")
    assert status == 2
    assert "no checkpoint" in err


def test_a_map_with_colors_has_two_values_in_a_character(linear):
    (found,) = measure_landscapes([surface_of(linear, "pca")], 5, None)
    scale = color_scale([found])
    text = heat_map(found, scale, 64, has_colors=True)
    lines = text.plain.split("\n")
    assert len(lines) == 22
    assert {len(line) for line in lines} == {64}
    corner = text.spans[0].style
    share = torch.tensor([[scale.position(found.losses[-1][0])]])
    assert corner.color.triplet == pixels_of(colors_of(share))[0][0]
    assert "X" in text.plain
    assert "o" in text.plain
    plain = heat_map(found, scale, 64, has_colors=False).plain
    assert set(plain) <= {*SHADES, "o", "X", "\n"}
