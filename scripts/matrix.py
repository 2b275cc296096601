"""Run the unit and training suites with several releases of Python, torch and Hydra.

    scripts/test --matrix                       every combination
    scripts/test --matrix=3.11/2.13/1.3.8       only PYTHON/TORCH/HYDRA; * selects all releases
    scripts/test --matrix --matrix-keep         keep environments for the next run
    scripts/test --matrix -x tests/runs         with arguments for pytest

It prints a Markdown table. Environments and the logs of pip and pytest are in the cache folder of
the user; an environment needs 1 to 2 GB, or 5 to 8 GB with a torch for CUDA. FRAMEWORK_TORCH_INDEX
is an additional index for torch, e.g. https://download.pytorch.org/whl/cpu for builds without CUDA.
A missing Python (searched on the PATH, in pyenv and in uv) is reported in its row. The exit status
is 1 if anything failed.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

PYTHONS = ("3.11", "3.13")
TORCHES = ("2.10", "2.13", "newest")
HYDRAS = ("1.3.8", "1.4.0rc3")
REPLACED = ("torch", "hydra-core")
# torch and Hydra determine the versions of these packages
UNPINNED = ("torch", "hydra-core", "omegaconf", "antlr4-python3-runtime", "sympy", "networkx")
GIGABYTES = 12  # free disk space for an environment and the temporary files of pip
ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "framework-matrix"


class MatrixError(Exception):
    """An environment cannot be created; the message is shown in its row of the table."""


@dataclass
class Row:
    """The result of one environment.

    Args:
        versions: Installed versions of Python, torch and Hydra, or the selected ones.
        counts: Numbers of passed, failed and skipped tests; None if no test ran.
        note: The duration, or the reason why no test ran.
        failed: Whether the row is a failure.
    """

    versions: tuple[str, str, str]
    counts: tuple[int, int, int] | None
    note: str
    failed: bool

    def __str__(self) -> str:
        counts = ("", "", "") if self.counts is None else self.counts
        return "| " + " | ".join(map(str, (*self.versions, *counts, self.note))) + " |"


def main(arguments: list[str]) -> int:
    keep = "--matrix-keep" in arguments
    chosen = ["*", "*", "*"]
    pytest_arguments = []
    for argument in arguments:
        if argument.startswith("--matrix="):
            chosen = argument.removeprefix("--matrix=").split("/")
        elif argument not in ("--matrix", "--matrix-keep"):
            pytest_arguments.append(argument)
    if len(chosen) != 3:
        form = "--matrix=PYTHON/TORCH/HYDRA, e.g. --matrix=3.11/2.13/1.3.8"
        print(f"matrix: expected {form}", file=sys.stderr)
        return 2
    axes = []
    for wanted, known in zip(chosen, (PYTHONS, TORCHES, HYDRAS), strict=True):
        axes.append(known if wanted in ("*", "") else (wanted,))
    rows = []
    for combination in product(*axes):
        row = result_of(combination, keep, pytest_arguments)
        print(f"matrix: {row}", file=sys.stderr, flush=True)
        rows.append(row)
    print("| Python | torch | hydra-core | passed | failed | skipped | |")
    print("|---|---|---|--:|--:|--:|---|")
    for row in rows:
        print(row)
    return int(any(row.failed for row in rows))


def result_of(combination: tuple[str, ...], keep: bool, pytest_arguments: list[str]) -> Row:
    """Create the environment of a combination, and run the suites in it."""
    version, torch, hydra = combination
    selected = (version, torch, hydra)
    interpreter = find_python(version)
    if interpreter is None:
        return Row(selected, None, f"no python{version}", failed=True)
    folder = CACHE / "-".join(combination)
    log = CACHE / f"{folder.name}.log"
    try:
        python = environment(interpreter, folder, torch, hydra, log)
        return run_tests(python, log, pytest_arguments)
    except MatrixError as error:
        return Row(selected, None, str(error), failed=True)
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def find_python(version: str) -> str | None:
    """Return an interpreter of that version that runs, or None."""
    candidates = [sys.executable, shutil.which(f"python{version}")]
    if pyenv := shutil.which("pyenv"):
        root = Path(output_of([pyenv, "root"]))
        installed = sorted(root.glob(f"versions/{version}.*/bin/python"), reverse=True)
        candidates += map(str, installed)
    if uv := shutil.which("uv"):
        candidates.append(output_of([uv, "python", "find", version]))
    for candidate in filter(None, candidates):
        found = output_of([candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"])
        if found == version:
            return candidate
    return None


def output_of(command: list[str]) -> str:
    """Return the output of a command, or an empty text if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def environment(interpreter: str, folder: Path, torch: str, hydra: str, log: Path) -> Path:
    """Return the Python of an environment with these releases; create it if needed."""
    python = folder / "bin/python"
    stamp = folder / "installed"
    requirements = requirements_for(torch, hydra)
    pins = constraints()
    wanted = hashlib.sha256("\n".join([str(ROOT), *requirements, pins]).encode()).hexdigest()
    may_reuse = torch != "newest"  # there may be a newer release since
    if may_reuse and stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    CACHE.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(CACHE).free / 1e9
    if free < GIGABYTES:
        raise MatrixError(f"{CACHE}: an environment needs {GIGABYTES} GB, {free:.1f} GB are free")
    log.write_text("", encoding="utf-8")
    call([interpreter, "-m", "venv", "--clear", str(folder)], log)
    constraint_file = folder / "constraints.txt"
    constraint_file.write_text(pins, encoding="utf-8")
    install = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    if index := os.environ.get("FRAMEWORK_TORCH_INDEX"):
        install += ["--extra-index-url", index]
    call([*install, *requirements], log, PIP_CONSTRAINT=str(constraint_file))
    call([*install, "--no-deps", "-e", str(ROOT)], log, PIP_CONSTRAINT=os.devnull)
    stamp.write_text(wanted, encoding="utf-8")
    return python


def requirements_for(torch: str, hydra: str) -> list[str]:
    """Return the requirements of the project and its tests, with these torch and Hydra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    kept = [requirement for requirement in declared if name_of(requirement) not in REPLACED]
    exact = torch if torch.count(".") > 1 else f"{torch}.*"
    return ["torch" if torch == "newest" else f"torch=={exact}", f"hydra-core=={hydra}", *kept]


def constraints() -> str:
    """Return the pinned versions of all packages except those in UNPINNED."""
    lines = (ROOT / "scripts/constraints.txt").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if name_of(line) not in UNPINNED) + "\n"


def name_of(requirement: str) -> str:
    """Return the name of the package in a requirement."""
    return re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0].lower()


def call(command: list[str], log: Path, **variables: str) -> None:
    """Run a command with its output in the log.

    Raises:
        MatrixError: The command failed.
    """
    with log.open("a", encoding="utf-8") as file:
        environ = os.environ | variables
        done = subprocess.run(
            command,
            env=environ,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode != 0:
        raise MatrixError(f"cannot be installed: see {log}")


def run_tests(python: Path, log: Path, pytest_arguments: list[str]) -> Row:
    """Run the unit and training suites with an environment's Python."""
    versions = installed_versions(python)
    report = log.with_suffix(".xml")
    report.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command += ["-n", "2", "--dist", "loadfile", "--max-worker-restart=0"]
    command += ["-m", "(unit or training) and not slow"]
    environ = {"OMP_NUM_THREADS": "1"} | os.environ
    environ["PATH"] = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    start = time.monotonic()
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run(
            [*command, *pytest_arguments],
            cwd=ROOT,
            env=environ,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )
    seconds = time.monotonic() - start
    if not report.is_file():
        note = f"pytest did not end (status {done.returncode}): see {log}"
        return Row(versions, None, note, failed=True)
    counts = counts_in(report)
    note = f"{seconds:.0f} s"
    if done.returncode != 0:
        note += f", see {log}"
    return Row(versions, counts, note, failed=done.returncode != 0)


def installed_versions(python: Path) -> tuple[str, str, str]:
    """Return the versions of Python, torch and Hydra in an environment."""
    code = (
        "import json, platform; from importlib.metadata import version; "
        "print(json.dumps([platform.python_version(), version('torch'), version('hydra-core')]))"
    )
    found = output_of([str(python), "-c", code])
    if not found:
        raise MatrixError("torch or Hydra is missing after the installation")
    version, torch, hydra = json.loads(found)
    return version, torch, hydra


def counts_in(report: Path) -> tuple[int, int, int]:
    """Return the numbers of passed, failed and skipped tests in a JUnit file."""
    totals = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        for name in totals:
            totals[name] += int(suite.get(name, 0))
    failed = totals["failures"] + totals["errors"]
    return totals["tests"] - failed - totals["skipped"], failed, totals["skipped"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
