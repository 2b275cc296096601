"""Every block of code in the documentation runs: commands, Python, and the files that they name.

A block whose first line is a comment with a path is that file; one after `<!-- not run: why -->` is for people only.
The blocks of a page run one after another in one folder. A process that has imported all and is forked for each command
spares its start-up; short runs come from a conf/config.yaml in the folder, as a project may have one.
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
    "scripts/README.md",
]
BLOCK = re.compile(r"(<!-- not run: .+? -->\n+)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHORT = "defaults: [framework, _self_]\ntrainer: {max_epochs: 1}\n"
FORKS = """
import json, os, sys, traceback
import sklearn.datasets, tensorboard.plugins.hparams.plugin_data_pb2, torch, torch._dynamo
import framework.composition.compose, framework.cli.output
from framework.cli import main

framework.discover()
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        output = os.open(asked["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        os.chdir(asked["cwd"])
        status = 1
        try:
            if "python" in asked:
                exec(compile(asked["python"], "README", "exec"), {"__name__": "__main__"})
                status = 0
            else:
                main.main(asked["arguments"])
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    """Run a command of the framework, or Python, in a fork of a process that has everything imported."""
    output = tmp_path_factory.mktemp("forks") / "output.txt"
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    pipe["env"] = os.environ | {
        "OMP_NUM_THREADS": "1"
    }  # a fork of a process with threads could hang
    with subprocess.Popen([sys.executable, "-c", FORKS], **pipe) as server:

        def run(cwd, **asked):
            server.stdin.write(json.dumps({"cwd": str(cwd), "output": str(output), **asked}) + "\n")
            server.stdin.flush()
            status = int(server.stdout.readline())
            return status, output.read_text()

        yield run
        server.stdin.close()


def blocks(page):
    return [
        (why, language, code) for why, language, code in BLOCK.findall((ROOT / page).read_text())
    ]


def commands(code):
    """The lines of a bash block without comments, as lists of words."""
    return [words for line in code.splitlines() if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs(page, forks, tmp_path):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/config.yaml").write_text(SHORT)
    for why, language, code in blocks(page):
        named = re.match(r"# ([\w./-]+\.\w+)\n", code)
        if why or language == "text":
            continue
        if named:
            file = tmp_path / named[1]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(code)
        elif language == "python":
            check(code, *forks(tmp_path, python=code))
        elif language == "bash":
            for program, *arguments in commands(code):
                assert program == "framework", (
                    f"{page}: only `framework` can be run here; mark the block as not run"
                )
                check([program, *arguments], *forks(tmp_path, arguments=arguments))
        else:
            pytest.fail(f"{page}: a block of {language} is neither a file nor runs")


def check(ran, status, output):
    assert status == 0, f"{ran}\n{output}"


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page):
    text = (ROOT / page).read_text()
    targets = re.findall(r"\]\(([^)#]+)\)|(?:src|srcset|href)=\"([^\"#]+)\"", text)
    for target in {either for pair in targets for either in pair if either and "://" not in either}:
        assert ((ROOT / page).parent / target).exists(), f"{page} points to {target}"


def test_few_blocks_are_not_run():
    assert sum(bool(why) for page in PAGES for why, _, _ in blocks(page)) <= 5


def test_the_pages_name_no_part_that_is_not_there():
    for page in PAGES:
        for file in re.findall(
            r"`(framework/\w+\.py|scripts/\w+|conf/[\w/]+\.yaml)`", (ROOT / page).read_text()
        ):
            assert (ROOT / file).exists() or file.startswith("conf/"), f"{page} names {file}"
