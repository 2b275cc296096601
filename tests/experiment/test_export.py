"""`framework export`: files that give the outputs of a run without the framework."""

import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import framework as fw
from exports import run_alone
from framework.contracts.exporter import Exporter
from framework.errors import FrameworkError, RunError, SettingError, UnknownName
from framework.experiment.trained import verification
from framework.experiment.trained.export import export_run
from framework.experiment.trained.load import open_run
from framework.experiment.trained.pipeline import build_pipeline, choose_split
from framework_plugins.datasets.builtin import load_digits
from runs import run_training

FORMATS = ["safetensors", "torch_export", "onnx"]
SHORT = ["callbacks=[checkpoint]", "model.width=16", "trainer.max_steps=30"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on digits, which tests do not change."""
    folder = tmp_path_factory.mktemp("runs")
    return run_training(f"run.root={folder}", "run.name=first", *SHORT).folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Run a script in a process in which `import framework` fails; return its lines of JSON."""
    run = partial(run_alone, tmp_path_factory.mktemp("alone"))
    assert "not installed" in run("-c", "import framework")
    return run


def require(name):
    for package in fw.exporters.build(name).packages:
        pytest.importorskip(package)


@pytest.fixture(scope="module", params=FORMATS)
def exported(request, run, tmp_path_factory):
    """The run in a format: its name, and the result of the export."""
    require(request.param)
    folder = tmp_path_factory.mktemp("exports") / request.param
    return request.param, export_run(open_run(run), request.param, folder)


def test_the_example_gives_the_predictions_of_the_run_without_the_framework(
    exported, run, alone, tmp_path
):
    _, exported = exported
    trained = open_run(run)
    assert exported.difference <= 1e-5
    pixels, _ = load_digits()
    np.save(tmp_path / "raw.npy", pixels[:5])  # from 0 to 16, as read from the source
    found = alone(exported.folder / "example.py", tmp_path / "raw.npy")
    expected = trained.predict(trained.read_inputs(tmp_path / "raw.npy"))
    assert isinstance(found, dict), found
    np.testing.assert_allclose(found["probabilities"], expected["probabilities"], atol=1e-5)
    assert found["class"] == expected["class"]
    assert found["class_index"] == expected["class_index"].tolist()
    assert "python example.py FILE" in alone(exported.folder / "example.py")  # no traceback
    assert "Traceback" not in alone(exported.folder / "example.py")
    content = b"".join(path.read_bytes() for path in exported.folder.iterdir())
    assert str(run.parent.parent).encode() not in content
    assert os.path.dirname(fw.__file__).encode() not in content  # stack traces of the model


@pytest.mark.filterwarnings("ignore")  # of torch about its own code
def test_exported_models_take_batches_of_any_size(exported, run):
    name, exported = exported
    exporter = fw.exporters.build(name)
    folder = exported.folder
    trained = open_run(run)
    pipeline = build_pipeline(trained, choose_split(trained.read_data())[1])
    model = fw.ExportedModel(pipeline, pipeline.preparation.raw, OUTPUTS, (), "Mlp")
    loaded = exporter.load(model, folder)
    for rows in (1, 2, 7, 300):
        inputs = torch.rand(rows, 64) * 16
        with torch.no_grad():
            expected = pipeline(inputs)
        for found, value in zip(loaded(inputs), expected, strict=True):
            torch.testing.assert_close(torch.as_tensor(found), value, atol=1e-5, rtol=1e-5)


OUTPUTS = ["class_index", "probability", "probabilities"]


def test_the_metadata_and_the_card_have_the_facts_of_the_run(run, tmp_path):
    trained = open_run(run)
    exported = export_run(trained, "safetensors", tmp_path / "new")
    about = json.loads((exported.folder / "metadata.json").read_text())
    assert list(about["outputs"]) == OUTPUTS
    assert about["inputs"]["inputs"]["shape"] == ["batch", 64]
    assert about["classes"] == [str(digit) for digit in range(10)] or about["classes"]
    assert about["step"] == 30
    assert about["metrics"] == trained.evaluate("test")
    card = (exported.folder / "README.md").read_text()
    for text in ("# mlp on digits", "step 30", "test/accuracy", "`model.width` | `16`", "torch"):
        assert text in card
    assert trained.facts["content"]["train"] in card


def test_the_averaged_weights_that_are_evaluated_are_exported(tmp_path):
    overrides = [f"run.root={tmp_path}", *SHORT, "+callbacks=ema", "callbacks.ema.decay=0.9"]
    trained = open_run(run_training(*overrides).folder)
    exported = export_run(trained, "safetensors", tmp_path / "new")
    weights = load_file(exported.folder / "model.safetensors")
    saved = load_file(trained.checkpoint / "model.safetensors")
    training = torch.load(trained.checkpoint / "training.pt", weights_only=True)
    for name, tensor in saved.items():
        assert torch.equal(weights[f"model.{name}"], tensor), name
    trained_weights = training["callbacks"]["0:Ema"]["weights"]
    assert any(not torch.equal(trained_weights[name], saved[name]) for name in saved)


def test_a_checkpoint_is_chosen_as_for_eval(run, tmp_path):
    exported = export_run(open_run(run, "last"), "safetensors", tmp_path / "new")
    about = json.loads((exported.folder / "metadata.json").read_text())
    assert about["checkpoint"] == "step-00000030"


class Rounded(Exporter):
    """Writes a model whose outputs are wrong by 2e-5."""

    error = 2e-5

    def write(self, model, folder):
        (folder / "model.txt").write_text("weights")

    def load(self, model, folder):
        def run(*raw):
            with torch.no_grad():
                index, *others = model.module(*raw)
            return [index, *[each + self.error for each in others]]

        return run

    def example(self, model):
        return [], "outputs = []"


def test_a_file_with_other_outputs_is_an_error_and_nothing_is_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr(fw.exporters, "_entries", dict(fw.exporters._entries))
    fw.exporters.register("rounded_of_tests")(Rounded)
    with pytest.raises(RunError, match="probability"):
        export_run(open_run(run), "rounded_of_tests", tmp_path / "new" / "model")
    assert not list((tmp_path / "new").iterdir())
    with pytest.raises(RunError):
        export_run(open_run(run), "rounded_of_tests")
    assert not (run / "exports").exists()
    monkeypatch.setattr(Rounded, "error", 5e-6)
    exported = export_run(open_run(run), "rounded_of_tests", tmp_path / "new" / "model")
    assert 4e-6 < exported.difference < 6e-6
    assert sorted(exported.files) == ["README.md", "example.py", "metadata.json", "model.txt"]


def test_the_difference_is_relative_for_large_outputs_and_infinite_for_other_classes():
    large = torch.tensor([1e6, 0.0])
    assert verification.difference_of(large + 1, large) == pytest.approx(1e-6)
    assert verification.difference_of(torch.tensor([0.5]), torch.tensor([0.25])) == 0.25
    assert verification.difference_of(torch.tensor([1, 2]), torch.tensor([1, 3])) == float("inf")
    nan = torch.tensor([float("nan")])
    assert not verification.difference_of(nan, torch.tensor([1.0])) <= verification.TOLERANCE


def test_wrong_arguments_are_errors(run, tmp_path):
    trained = open_run(run)
    with pytest.raises(UnknownName, match="onnx"):
        export_run(trained, "onx", tmp_path / "new")
    with pytest.raises(SettingError):
        export_run(trained, "safetensors", tmp_path / "new", {"opset": 20})
    (tmp_path / "taken").mkdir()
    with pytest.raises(RunError, match="exists"):
        export_run(trained, "safetensors", tmp_path / "taken")
    with pytest.raises(FrameworkError, match="not a folder"):
        export_run(trained, "safetensors", run / "config.yaml" / "new")


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("framework.contracts.exporter.find_spec", lambda name: None)
    with pytest.raises(SettingError) as error:
        fw.exporters.build("onnx").check("onnx")
    assert "onnxruntime" in str(error.value)
    assert "framework[export]" in str(error.value)


class Branching(nn.Module):
    """A model that torch.export cannot trace."""

    def __init__(self, in_shape, out_shape):
        super().__init__()
        self.layer = nn.Linear(in_shape[0], out_shape[0])

    def forward(self, inputs):
        outputs = self.layer(inputs)
        return outputs if outputs.sum() > 0 else -outputs


def test_a_model_that_cannot_be_traced_is_an_error_in_one_line(tmp_path):
    overrides = [f"run.root={tmp_path}", "model=branching_of_tests", "trainer.max_steps=2"]
    if "branching_of_tests" not in fw.models:
        fw.models.register("branching_of_tests")(Branching)
    trained = open_run(run_training(*overrides, "callbacks=[checkpoint]").folder)
    with pytest.raises(fw.BuildError) as error:
        export_run(trained, "torch_export", tmp_path / "new")
    assert "Branching" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


PAIRS = '''
import torch
from torch import nn

import framework as fw


@fw.datasets.register("pairs_of_tests")
class Pairs(fw.Data):
    """Two points each, with the class "near" or "far", and a name."""

    in_shape = (2,)
    out_shape = (2,)
    classes = ("near", "far")

    def __init__(self):
        self.train = self.val = Rows()


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.first, self.second = torch.randn(2, 42, 2)

    def __len__(self):
        return 42

    def __getitem__(self, row):
        first, second = self.first[row], self.second[row]
        label = ((first - second).norm() > 1.5).long()
        return {"first": first, "point": {"second": second}, "labels": label, "name": f"row {row}"}


@fw.models.register("pairs_of_tests")
class PairModel(nn.Module):
    """Two points to logits, and the loss if there are labels."""

    def __init__(self, in_shape: fw.Shape, out_shape: fw.Shape):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, first, second=None, labels=None, name=None):
        logits = self.linear(torch.cat([first, first if second is None else second], 1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}
'''
PAIR_RUN = "--plugins pairs.py data=pairs_of_tests model=pairs_of_tests trainer.max_steps=3"
NAMED = "task.target=labels task.output=logits"


@pytest.mark.parametrize(
    ("task", "inputs", "outputs"),
    [
        (f"{NAMED} task.inputs=[first,point.second]", ["first", "point.second"], OUTPUTS),
        (f"{NAMED} task.inputs=first", ["first"], OUTPUTS),
        ("task=model_loss task.inputs=[point.second,labels,first] metrics=[accuracy]",
         ["point.second", "first"], ["output"]),
    ],
)  # fmt: skip
def test_the_named_fields_are_the_inputs(command, forget_plugins, alone, task, inputs, outputs):
    Path("pairs.py").write_text(PAIRS)
    status, _, err = command(f"train {PAIR_RUN} {task} run.name=r")
    assert status == 0, err
    status, _, err = command("export runs/default/r --to safetensors --plugins pairs.py")
    assert status == 0, err
    folder = Path("runs/default/r/exports/safetensors").absolute()
    about = json.loads((folder / "metadata.json").read_text())
    assert list(about["inputs"]) == inputs
    assert all(each["shape"] == ["batch", 2] for each in about["inputs"].values())
    assert list(about["outputs"]) == outputs
    points = {name: torch.randn(5, 2) for name in inputs}
    if len(inputs) == 1:
        np.save("raw", points["first"])
    else:
        np.savez("raw", **points)
    found = alone(folder / "example.py", *Path.cwd().glob("raw.np*"))
    assert isinstance(found, dict), found
    model = open_run("runs/default/r").model.eval()
    with torch.no_grad():
        arguments = {name.rpartition(".")[2]: each for name, each in points.items()}
        logits = model(**arguments)["logits"]
    if outputs == ["output"]:
        torch.testing.assert_close(torch.tensor(found["output"]), logits)
    else:
        torch.testing.assert_close(torch.tensor(found["probabilities"]), logits.softmax(1))


def test_a_field_that_is_no_tensor_cannot_be_exported(command, forget_plugins):
    Path("pairs.py").write_text(PAIRS)
    line = f"train {PAIR_RUN} {NAMED} task.inputs=[first,name] run.name=r"
    assert command(line)[0] == 0
    status, _, err = command("export runs/default/r --to torch_export --plugins pairs.py")
    assert status == 2
    assert "task.inputs=name: expected a tensor with a row for each sample, got" in err
    assert err.count("\n") == 1
