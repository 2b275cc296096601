"""The matrix of environments, without creating environments."""

import importlib.util
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "scripts/matrix.py"


@pytest.fixture
def matrix(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("matrix", FILE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "matrix", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "CACHE", tmp_path / "cache")
    return module


def test_the_selected_torch_and_hydra_replace_those_of_the_project(matrix):
    found = matrix.requirements_for("2.10", "1.4.0rc3")
    assert found[:2] == ["torch==2.10.*", "hydra-core==1.4.0rc3"]
    others = {matrix.name_of(requirement) for requirement in found[2:]}
    assert others.isdisjoint({"torch", "hydra-core"})
    assert {"pytest", "tensorboard", "hydra-joblib-launcher"} <= others
    assert matrix.requirements_for("newest", "1.3.8")[0] == "torch"
    assert matrix.requirements_for("2.13.0", "1.3.8")[0] == "torch==2.13.0"
    pinned = {matrix.name_of(line) for line in matrix.constraints().splitlines()}
    assert "numpy" in pinned
    assert not pinned & {"torch", "hydra-core", "omegaconf"}


def test_an_installed_python_is_found_and_a_missing_one_is_not(matrix):
    version = "{}.{}".format(*sys.version_info)
    assert matrix.find_python(version)
    assert matrix.find_python("3.2") is None


REPORT = """<?xml version="1.0"?><testsuites>
<testsuite tests="12" failures="1" errors="2" skipped="4" /></testsuites>"""


def test_tests_are_counted(matrix, tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    assert matrix.counts_in(report) == (5, 3, 4)


def test_the_table_has_a_row_for_each_environment(matrix, monkeypatch, capsys):
    monkeypatch.setattr(
        matrix, "find_python", lambda version: None if version == "3.13" else sys.executable
    )
    created = []

    def environment(interpreter, folder, torch, hydra, log):
        if torch == "newest":
            raise matrix.MatrixError("cannot be installed")
        folder.mkdir(parents=True)
        created.append((torch, hydra))
        return folder / "bin/python"

    def run_tests(python, log, arguments):
        assert arguments == ["-x"]
        failed = int("2.13" in str(python))
        return matrix.Row(("3.11.7", "2.x", "1.x"), (10, failed, 2), "5 s", failed=failed > 0)

    monkeypatch.setattr(matrix, "environment", environment)
    monkeypatch.setattr(matrix, "run_tests", run_tests)
    assert matrix.main(["--matrix=*/*/1.3.8", "-x"]) == 1
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 6
    assert "| 3.13 | 2.10 | 1.3.8 |  |  |  | no python3.13 |" in rows
    assert "| 3.11 | newest | 1.3.8 |  |  |  | cannot be installed |" in rows
    assert created == [("2.10", "1.3.8"), ("2.13", "1.3.8")]
    assert list(matrix.CACHE.iterdir()) == []  # environments are removed after use
    assert matrix.main(["--matrix=3.11/2.10/1.3.8", "--matrix-keep", "-x"]) == 0
    assert len(list(matrix.CACHE.iterdir())) == 1


def test_a_wrong_combination_gives_an_error(matrix, capsys):
    assert matrix.main(["--matrix=3.11"]) == 2
    assert "--matrix=3.11/2.13/1.3.8" in capsys.readouterr().err
