"""Run every code block of the documentation: commands, Python, and the files that they name.

A block whose first line is a comment with a path is that file; `<!-- not run: reason -->` before a
block skips it. The blocks of a page run in order in one folder. To save start-up time, each command
is a fork of a process with all imports; a conf/config.yaml in the folder makes the runs short.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "conf/README.md",
    "framework/README.md",
    "plugins/README.md",
    "plugins/exporters/README.md",
    "plugins/strategies/README.md",
    "scripts/README.md",
]
BLOCK = re.compile(r"(<!-- not run: .+? -->\n+)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHORT = "defaults: [framework, _self_]\ntrainer: {max_epochs: 1}\n"
FORKS = """
import gc, json, os, sys, traceback
import sklearn.datasets, tensorboard.plugins.hparams.plugin_data_pb2, torch, torch._dynamo
import framework.composition.compose, framework.cli.output
from framework.cli import main

framework.discover()
gc.freeze()
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(job["cwd"])
        status = 1
        try:
            if "python" in job:
                exec(compile(job["python"], "README", "exec"), {"__name__": "__main__"})
                status = 0
            else:
                main.main(job["arguments"])
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    """Run a command of the framework, or Python code, in a fork of a process with all imports."""
    output = tmp_path_factory.mktemp("forks") / "output.txt"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # a fork of several threads could hang
    with subprocess.Popen(
        [sys.executable, "-c", FORKS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as server:

        def run(cwd, **job):
            line = json.dumps({"cwd": str(cwd), "output": str(output), **job})
            server.stdin.write(line + "\n")
            server.stdin.flush()
            status = int(server.stdout.readline())
            return status, output.read_text()

        yield run
        server.stdin.close()


def torchrun(cwd, arguments):
    """Run a script in several processes; return the status and the output."""
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return ended.returncode, ended.stdout + ended.stderr


def blocks(page):
    """Return the reason not to run, the language and the code of each block."""
    return BLOCK.findall((ROOT / page).read_text())


def commands(code):
    """Return the lines of a bash block without comments, as lists of words."""
    lines = [shlex.split(line, comments=True) for line in code.splitlines()]
    return [words for words in lines if words]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs(page, forks, tmp_path):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/config.yaml").write_text(SHORT)
    for not_run, language, code in blocks(page):
        file_name = re.match(r"# ([\w./-]+\.\w+)\n", code)
        if not_run or language == "text":
            continue
        if file_name:
            file = tmp_path / file_name[1]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(code)
        elif language == "python":
            status, output = forks(tmp_path, python=code)
            assert status == 0, f"{code}\n{output}"
        elif language == "bash":
            for program, *arguments in commands(code):
                run = torchrun if program == "torchrun" else forks
                known = program in ("framework", "torchrun")
                assert known, f"{page}: mark a block with {program} as not run"
                status, output = run(tmp_path, arguments=arguments)
                assert status == 0, f"{arguments}\n{output}"
                assert "UserWarning" not in output, f"{arguments}\n{output}"
        else:
            pytest.fail(f"{page}: a block of {language} is neither a file nor runs")


@pytest.mark.parametrize("page", PAGES)
def test_links_and_images_point_to_existing_files(page):
    text = (ROOT / page).read_text()
    targets = re.findall(r"\]\(([^)#]+)\)", text)
    targets += re.findall(r"(?:src|srcset|href)=\"([^\"#]+)\"", text)
    for target in targets:
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), f"{page} points to {target}"


def test_few_blocks_are_not_run():
    skipped = 0
    for page in PAGES:
        skipped += sum(bool(not_run) for not_run, _, _ in blocks(page))
    assert skipped <= 6


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_existing_files(page):
    text = (ROOT / page).read_text()
    for file in re.findall(r"`(framework/\w+\.py|scripts/\w+|conf/[\w/]+\.yaml)`", text):
        assert (ROOT / file).exists() or file.startswith("conf/"), f"{page} names {file}"
