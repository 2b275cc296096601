"""An installed copy of plugins/template: its parts are found by name, and its own tests pass."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TEMPLATE = Path(__file__).parents[2] / "plugins" / "template"
OFFLINE = [
    "--quiet",
    "--no-index",
    "--no-build-isolation",
    "--no-deps",
    "--disable-pip-version-check",
]


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Run Python with an installed copy of the template; this environment does not change."""
    folder = tmp_path_factory.mktemp("template")
    copy = folder / "copy"
    site = folder / "site"
    shutil.copytree(TEMPLATE, copy)
    environment = os.environ | {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}

    def run(*arguments, cwd=folder):
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("-m", "pip", "install", *OFFLINE, "--target", site, copy)
    return run


def test_the_parts_of_an_installed_package_are_found_by_name(python, tmp_path):
    shown = json.loads(python("-m", "framework", "show", "bent_identity", "--json", cwd=tmp_path))
    assert shown["kind"] == "activation"
    assert shown["package"] == "my-parts"
    assert shown["version"] == "0.1.0"
    bend = shown["settings"][0]
    assert bend["name"] == "bend"
    assert bend["default"] == 1.0
    assert bend["type"] == "float in (0, inf)"


def test_an_experiment_trains_with_the_installed_parts(python, tmp_path):
    overrides = [
        "activation=bent_identity",
        "activation.bend=0.5",
        "+metrics=confidence",
        "trainer.max_epochs=1",
    ]
    python("-m", "framework", "train", *overrides, "run.name=own", cwd=tmp_path)
    lines = (tmp_path / "runs/default/own/metrics.jsonl").read_text().splitlines()
    assert 0.1 < json.loads(lines[-1])["test/confidence"] <= 1


def test_the_tests_of_the_template_pass(python, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(TEMPLATE, copy)
    pytest_command = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    assert "2 passed" in python(*pytest_command, copy / "tests", cwd=copy)


def test_the_template_is_not_one_of_the_built_in_plugins():
    assert "my_parts" not in sys.modules
    assert "framework_plugins.template" not in sys.modules
