"""The scripts, with a fake Python that records its arguments, so that nothing is downloaded."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from shipped import shipped

ROOT = Path(__file__).parents[2]
TOOLS = ["bash", "cat", "chmod", "cksum", "cp", "dirname", "env", "flock", "grep", "id", "mkdir"]
PYTHON = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
case "$*" in
    *version_info*sys.exit* | *"sys.exit(not"*) [ "${VERSION:-3.12}" = 3.12 ] ;;
    *ensurepip*) [ -z "${NO_VENV:-}" ] ;;
    *'import torch'*) [ -z "${NO_TORCH:-}" ] ;;
    *version_info*) echo 3.12 ;;
    *_base_executable*) echo /usr/bin/python3 ;;
    *"-m venv"*) mkdir -p "${@: -1}/bin"; cp "$0" "${@: -1}/bin/python" ;;
    *"pip install"*) [ -z "${NO_NETWORK:-}" ] ;;
esac
"""


class Checkout:
    """A copy of the scripts in a folder with a space in its name, and a PATH with few programs."""

    def __init__(self, folder):
        self.root = folder / "a checkout"
        self.calls = folder / "calls.txt"
        self.bin = folder / "bin"
        self.bin.mkdir()
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        shutil.copy(ROOT / "pyproject.toml", self.root)
        for tool in TOOLS:
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)
        self.python = self.bin / "python3"
        self.python.write_text(PYTHON)
        self.python.chmod(0o755)

    def run(self, script="setup", *arguments, cwd=None, **environment):
        self.calls.write_text("")
        command = [str(self.root / "scripts" / script), *arguments]
        environment |= {"PATH": str(self.bin), "CALLS": str(self.calls), "HOME": str(self.root)}
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
        )

    def calls_with(self, text):
        return [call for call in self.calls.read_text().splitlines() if text in call]


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_setup_creates_a_pinned_environment_once(checkout):
    assert checkout.run().returncode == 0
    assert checkout.calls_with("-m venv") == [f"-m venv --clear {checkout.root}/.venv"]
    (installed,) = checkout.calls_with("pip install")
    assert f"-c {checkout.root}/scripts/constraints.txt -e {checkout.root}[dev]" in installed
    again = checkout.run()
    assert again.returncode == 0
    assert again.stderr == ""
    assert checkout.calls_with("") == []


def test_setup_installs_again_when_the_versions_change_or_an_install_failed(checkout):
    failed = checkout.run(NO_NETWORK="1")
    assert failed.returncode == 1
    assert "setup: pip could not install the packages" in failed.stderr
    assert checkout.run().returncode == 0
    assert checkout.calls_with("-m venv") == []  # the environment is reused
    with (checkout.root / "scripts/constraints.txt").open("a") as file:
        file.write("another==1\n")
    assert checkout.run().returncode == 0
    assert len(checkout.calls_with("pip install")) == 1


def test_a_moved_checkout_gets_a_new_environment(checkout):
    checkout.run()
    checkout.root = checkout.root.rename(checkout.root.parent / "moved")
    assert checkout.run().returncode == 0
    assert checkout.calls_with("-m venv") == [f"-m venv --clear {checkout.root}/.venv"]


def test_an_existing_torch_is_not_replaced(checkout):
    assert checkout.run(FRAMEWORK_TORCH="skip").returncode == 0
    assert checkout.calls_with("-m venv") == [
        f"-m venv --clear --system-site-packages {checkout.root}/.venv"
    ]
    pins = (checkout.root / ".venv/constraints.txt").read_text()
    assert "numpy==" in pins
    assert "\ntorch==" not in pins
    assert checkout.run().stderr == ""  # the choice is stored
    shutil.rmtree(checkout.root / ".venv")
    failed = checkout.run(FRAMEWORK_TORCH="skip", NO_TORCH="1")
    assert "FRAMEWORK_TORCH=skip" in failed.stderr
    assert "/usr/bin/python3" in failed.stderr


@pytest.mark.parametrize(
    ("environment", "facts"),
    [
        ({"VERSION": "3.10"}, ["Python 3.11, 3.12 or 3.13", "sudo apt-get install"]),
        ({"NO_VENV": "1"}, ["sudo apt-get install python3.12-venv"]),
        ({"PYTHON": "python9"}, ["PYTHON=python9", "Python 3.11, 3.12 or 3.13"]),
        ({"FRAMEWORK_TORCH": "mine"}, ["FRAMEWORK_TORCH", "skip", "pinned", "mine"]),
    ],
)
def test_setup_reports_a_missing_requirement(checkout, environment, facts):
    done = checkout.run(**environment)
    assert done.returncode == 1
    for fact in facts:
        assert fact in done.stderr
    assert done.stderr.count("\n") <= 2


def test_train_forwards_its_arguments_and_keeps_the_working_folder(checkout, tmp_path):
    checkout.run()
    framework = checkout.root / ".venv/bin/framework"
    framework.write_text('#!/usr/bin/env bash\necho "$PWD: $*"\nexit 3\n')
    framework.chmod(0o755)
    done = checkout.run("train", "seed=1", "run.name=a b", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, f"{tmp_path}: train seed=1 run.name=a b\n")


def test_every_dependency_is_pinned_exactly():
    lines = (ROOT / "scripts/constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = list(project["dependencies"])
    for extra, names in project["optional-dependencies"].items():
        if extra != "trackio":  # needs an older pillow
            requirements += names
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}
    assert names <= pins.keys()
    for version in pins.values():
        # no local builds such as +cpu
        assert re.fullmatch(r"\d+(\.\d+)*(b\d+)?(\.post\d+)?", version)


def test_every_pinned_version_runs_on_the_oldest_python():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = re.search(r">=(\d+\.\d+)", project["requires-python"])[1] + ".0"
    compared = 0
    for line in (ROOT / "scripts/constraints.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        for distribution in metadata.distributions(name=name) if version else ():
            if distribution.version == version:
                compared += 1
                needed = distribution.metadata["Requires-Python"] or ""
                assert SpecifierSet(needed).contains(oldest), f"{line} needs Python {needed}"
    assert compared > 50  # the others are not installed here, or in another version


@pytest.mark.parametrize(
    "script",
    ["scripts/setup", "scripts/train", "scripts/test", "scripts/fetch_data", ".ci/run"],
)
def test_a_shell_script_is_executable_and_has_no_syntax_error(script):
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / script], check=True)


@pytest.mark.parametrize(
    "script", ["bench", "fault_campaign", "screenshots", "search_campaign", "slurm_campaign"]
)
def test_a_python_script_is_executable(script):
    assert os.access(ROOT / "scripts" / script, os.X_OK)


def test_folders_of_a_user_do_not_change_the_order_of_imports(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(
        ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__", "golden")
    )
    for name in ("runs", "sweeps", "torch"):
        (tmp_path / name).mkdir()
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "I", "."]
    checked = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_files_that_git_does_not_track_are_not_shipped(tmp_path):
    for name in ("ours.py", "mine.py"):
        (tmp_path / name).touch()
    outside_git = [path.name for path in shipped(tmp_path, "*.py")]
    assert outside_git == ["mine.py", "ours.py"]
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "ours.py"], cwd=tmp_path, check=True)
    assert [path.name for path in shipped(tmp_path, "*.py")] == ["ours.py"]
