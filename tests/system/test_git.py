"""Commit and diff are read without running programs of the repository or the working folder."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from framework.system import git
from framework.system.git import commit_and_diff

SETTINGS = {
    "fsmonitor": "core.fsmonitor={proof}",
    "external diff": "diff.external={proof}",
    "driver": "diff.any.command={proof}",
    "textconv": "diff.any.textconv={proof}",
    "clean filter": "filter.any.clean={proof}",
    "filter process": "filter.any.process={proof}",
    "odd name": "filter.a=b.clean={proof}",
    "pager": "core.pager={proof}",
    "alias": "alias.diff=!{proof}",
    "submodule": "diff.submodule=log",
}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Create a repository with a change, and a program that creates the file `proof`."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "repository"
    folder.mkdir()
    monkeypatch.chdir(folder)
    run("init", "-q")
    run("config", "user.name", "A")
    run("config", "user.email", "a@b.c")
    Path("part.py").write_text("one\n")
    Path(".gitattributes").write_text("* diff=any filter=any\n")
    run("add", ".")
    run("commit", "-qm", "first")
    Path("part.py").write_text("two\n")
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/proof\ncat\n")
    program.chmod(0o755)
    return folder


def run(*arguments, **environment):
    command = ["git", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | environment
    ).stdout


def use(setting, proof):
    key, _, value = setting.format(proof=proof).rpartition("=")
    run("config", key, value)
    if "a=b" in key:
        Path(".gitattributes").write_text("* filter=a=b\n")


def test_the_commit_and_the_change_are_read(repository):
    commit, diff = commit_and_diff(repository)
    assert commit == run("rev-parse", "HEAD").strip()
    assert "-one\n+two" in diff
    Path("below").mkdir()
    assert commit_and_diff(repository / "below") == (commit, diff)


@pytest.mark.parametrize("name", SETTINGS)
def test_no_program_that_a_repository_configures_is_run(repository, tmp_path, name):
    use(SETTINGS[name], tmp_path / "program")
    commit, diff = commit_and_diff(repository)
    assert not (tmp_path / "proof").exists()
    assert commit is not None
    assert ("-one\n+two" in diff) != (name == "odd name"), diff


@pytest.mark.parametrize(
    "name", ["fsmonitor", "external diff", "driver", "textconv", "clean filter", "filter process"]
)
def test_a_plain_git_diff_runs_these_programs(repository, tmp_path, name):
    """Control of the test above."""
    use(SETTINGS[name], tmp_path / "program")
    subprocess.run(
        ["git", "diff", "HEAD"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=20,
        check=False,
    )
    assert (tmp_path / "proof").exists()


def test_filters_of_an_included_file_are_not_run(repository, tmp_path):
    Path("more").write_text(f'[filter "any"]\n\tclean = {tmp_path}/program\n\trequired = true\n')
    run("config", "include.path", str(repository / "more"))
    assert "-one\n+two" in commit_and_diff(repository)[1]
    assert not (tmp_path / "proof").exists()


def test_hooks_are_not_run(repository, tmp_path):
    hook = repository / ".git/hooks/post-index-change"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path}/proof\n")
    hook.chmod(0o755)
    os.utime(".gitattributes", (1, 1))
    commit_and_diff(repository)
    assert not (tmp_path / "proof").exists()
    os.utime(".gitattributes", (2, 2))
    run("diff", "HEAD")
    assert (tmp_path / "proof").exists(), "a plain git diff runs it"


def test_a_submodule_runs_nothing(repository, tmp_path):
    inner = tmp_path / "inner"
    run("clone", "-q", str(repository), str(inner))
    run("-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(inner), "sub")
    run("config", "diff.submodule", "diff")
    run("commit", "-qam", "with a submodule")
    run("-C", "sub", "config", "core.fsmonitor", str(tmp_path / "program"))
    Path("sub/part.py").write_text("three\n")
    assert commit_and_diff(repository)[0] is not None
    assert not (tmp_path / "proof").exists()
    run("diff", "HEAD")
    assert (tmp_path / "proof").exists(), "a plain git diff runs it"


def test_a_missing_object_is_not_fetched(repository, tmp_path):
    """A plain git fetches an object of a partial clone by a program that the repository names."""
    for name, value in {
        "core.repositoryformatversion": "1",
        "extensions.partialClone": "origin",
        "remote.origin.url": f"ext::touch {tmp_path}/proof",
        "remote.origin.promisor": "true",
        "protocol.ext.allow": "always",
    }.items():
        run("config", name, value)
    blob = run("rev-parse", "HEAD:part.py").strip()
    (repository / ".git/objects" / blob[:2] / blob[2:]).unlink()
    assert commit_and_diff(repository)[1] is None
    assert not (tmp_path / "proof").exists()
    subprocess.run(
        ["git", "diff", "HEAD"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=20,
        check=False,
    )
    assert (tmp_path / "proof").exists(), "a plain git diff runs it"


def test_a_git_in_the_working_folder_is_not_run(repository, tmp_path, monkeypatch):
    Path("git").symlink_to(tmp_path / "program")
    for first in ("", ".", str(repository)):
        monkeypatch.setenv("PATH", os.pathsep.join([first, os.environ["PATH"]]))
        assert "-one\n+two" in commit_and_diff(repository)[1]
    assert not (tmp_path / "proof").exists()
    monkeypatch.setenv("PATH", ".")
    assert commit_and_diff(repository) == (None, None)


def test_variables_of_another_git_command_are_left_out(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", str(tmp_path / "program"))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    monkeypatch.setenv("GIT_TRACE", str(tmp_path / "proof"))
    assert "-one\n+two" in commit_and_diff(repository)[1]
    assert not (tmp_path / "proof").exists()


def test_a_work_tree_elsewhere_is_not_copied(repository, tmp_path):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "part.py").write_text("a password\n")
    run("config", "core.worktree", str(secret))
    assert "password" not in commit_and_diff(repository)[1]


def test_a_bare_repository_is_not_read(repository, tmp_path):
    run("clone", "-q", "--bare", ".", "bare")
    run("-C", "bare", "config", "core.fsmonitor", str(tmp_path / "program"))
    run("-C", "bare", "config", "core.worktree", str(repository))
    assert commit_and_diff(repository / "bare") == (None, None)
    assert not (tmp_path / "proof").exists()


def test_an_empty_folder_named_git_is_no_repository(repository):
    (repository / "below/.git").mkdir(parents=True)
    assert "-one\n+two" in commit_and_diff(repository / "below")[1]
    (repository / "below/.git/HEAD").touch()
    assert commit_and_diff(repository / "below") == (None, None)


def test_outside_of_a_repository_there_is_no_commit_and_no_diff(tmp_path):
    assert commit_and_diff(tmp_path) == (None, None)


def test_a_large_diff_is_cut(repository):
    Path("part.py").write_text("line\n" * 300_000)
    diff = commit_and_diff(repository)[1]
    assert len(diff) < git.MOST_DIFF_BYTES + 100
    assert diff.endswith(git.CUT)


def test_a_diff_may_contain_any_bytes(repository):
    Path("part.py").write_bytes(b"caf\xe9\n")
    assert "caf\ufffd" in commit_and_diff(repository)[1]


def test_a_hanging_git_is_killed_with_its_children(tmp_path, monkeypatch):
    program = tmp_path / "hang"
    program.write_text("#!/bin/sh\nsleep 60 & echo $! > child\nwait\n")
    program.chmod(0o755)
    monkeypatch.setattr(git, "TIMEOUT", 0.3)
    began = time.monotonic()
    assert git.output([str(program)], tmp_path, os.environ) is None
    assert time.monotonic() - began < 5
    child = int((tmp_path / "child").read_text())
    for _ in range(50):
        if not is_running(child):
            return
        time.sleep(0.02)
    pytest.fail("the child is still running")


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
