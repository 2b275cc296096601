"""The example notebook, executed in a kernel as in Jupyter."""

import json
import os
import shutil
import subprocess
import sys

import pytest

import framework_conf

NOTEBOOK = "framework.ipynb"


@pytest.fixture(scope="module")
def source():
    return next(iter(framework_conf.__path__)) + f"/tour/{NOTEBOOK}"


@pytest.fixture(scope="module")
def outputs(source, tmp_path_factory):
    """Return the outputs of each cell with code, by its id."""
    folder = tmp_path_factory.mktemp("notebook")
    shutil.copy(source, folder)
    command = [sys.executable, "-m", "nbconvert", "--execute", "--to", "notebook"]
    done = subprocess.run(
        [*command, "--output", "executed", NOTEBOOK],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    cells = json.loads((folder / "executed.ipynb").read_text())["cells"]
    return {cell["id"]: cell["outputs"] for cell in cells if cell["cell_type"] == "code"}


def kinds(outputs, kind):
    return [output["data"] for output in outputs if kind in output.get("data", {})]


def html_of(output):
    return "".join(output["text/html"])


def test_a_fit_has_one_bar_that_shows_its_end(outputs):
    (bar,) = outputs["train"]
    assert "epoch 30/30  step 990/990" in html_of(bar["data"])
    assert len(outputs["compare"]) == 2  # two fits, and nothing on stderr
    for output in outputs["compare"]:
        assert "epoch 30/30" in html_of(output["data"])


def test_a_command_in_a_cell_prints_no_codes_that_move_the_cursor(outputs):
    text = ""
    for output in outputs["command"]:
        text += "".join(output["text"])
    assert "epoch 10/10  step 30/30" in text
    assert "\x1b" not in text


def test_states_and_runs_are_shown_as_tables(outputs):
    (state,) = kinds(outputs["state"], "text/html")
    assert "epoch 30, step 990 of 990" in html_of(state)
    assert "val/accuracy" in html_of(state)
    (run,) = kinds(outputs["run"], "text/html")
    assert "tour_digits/notebook-" in html_of(run)
    assert "adamw, lr=0.003" in html_of(run)
    assert html_of(run).count("<svg") >= 4


def test_plots_are_images_in_the_notebook(outputs):
    for cell in ("plot", "regions", "activations", "mistakes"):
        assert len(kinds(outputs[cell], "image/png")) == 1
        assert len(outputs[cell]) == 1


def test_the_notebook_is_stored_without_outputs(source):
    with open(source, encoding="utf-8") as file:
        content = json.load(file)
    assert set(content["metadata"]) == {"kernelspec", "language_info"}
    for cell in content["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
        assert cell["metadata"] == {}
