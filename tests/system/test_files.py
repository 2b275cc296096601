"""Files of a run folder are opened without links, within limits, and written atomically."""

import errno
import os
import socket

import pytest

from framework.errors import RunError
from framework.system.files import (
    TEMPORARY,
    failure_reason,
    open_file,
    parse_json,
    parse_yaml,
    read_bytes,
    read_json,
    read_rows,
    remove_temporary,
    write_file,
)


def make_link(path):
    target = path.parent / "outside"
    target.write_text("precious")
    path.symlink_to(target)


def make_device_link(path):
    path.symlink_to("/dev/zero")


def make_socket(path):
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.relpath(path))  # the length of a socket's path is limited
    server.close()


def make_hard_link(path):
    target = path.parent / "outside"
    target.write_text("precious")
    os.link(target, path)


ODD = [make_link, make_device_link, os.mkfifo, os.mkdir, make_socket, make_hard_link]


@pytest.mark.parametrize("mode", ["r", "r+", "a"])
@pytest.mark.parametrize("make", ODD, ids=lambda make: make.__name__)
def test_links_and_irregular_files_are_not_opened(tmp_path, make, mode):
    make(tmp_path / "file")
    with pytest.raises(RunError, match=r"link|regular file"):
        open_file(tmp_path, "file", mode)
    outside = tmp_path / "outside"
    assert not outside.exists() or outside.read_text() == "precious"


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "below/../../outside"])
def test_a_name_outside_of_the_folder_is_refused(tmp_path, name):
    (tmp_path / "below").mkdir()
    with pytest.raises(RunError, match="is outside of"):
        open_file(tmp_path, name)
    with pytest.raises(RunError, match="is outside of"):
        write_file(tmp_path, name, "x")


def test_a_link_to_a_folder_is_not_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "real")
    with pytest.raises(RunError, match="symbolic link"):
        read_bytes(tmp_path / "run", "checkpoints/file")
    with pytest.raises(RunError, match="symbolic link"):
        write_file(tmp_path / "run", "checkpoints/file", "x")
    assert (tmp_path / "real" / "file").read_text() == "precious"


def test_the_path_of_the_folder_itself_may_contain_links(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "run").symlink_to("real")
    write_file(tmp_path / "run", "file", "x")
    assert read_bytes(tmp_path / "run", "file") == b"x"


@pytest.mark.parametrize(
    "make", [make_link, make_hard_link, os.mkfifo], ids=lambda make: make.__name__
)
def test_writing_replaces_a_link_and_not_its_target(tmp_path, make):
    make(tmp_path / "file")
    write_file(tmp_path, "file", "new")
    assert (tmp_path / "file").read_text() == "new"
    outside = tmp_path / "outside"
    assert not outside.exists() or outside.read_text() == "precious"


def test_a_failed_write_leaves_no_file_and_names_the_path(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError, match=r"folder cannot be written: Is a directory"):
        write_file(tmp_path, "folder", "x")
    assert os.listdir(tmp_path) == ["folder"]
    with pytest.raises(RunError, match="no longer exists"):
        write_file(tmp_path / "removed", "file", "x")


def test_the_error_of_a_full_disk_has_the_bytes_needed(tmp_path, monkeypatch):
    def full(*arguments, **more):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(
        RunError,
        match=r"file cannot be written: No space left on device \(1,000 bytes are needed, ",
    ):
        write_file(tmp_path, "file", "x" * 1000)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o000])
def test_the_umask_determines_the_permissions(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_file(tmp_path, "written", "x")
        open_file(tmp_path, "appended", "a").close()
    finally:
        os.umask(before)
    for name in ("written", "appended"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~mask


def test_temporary_files_of_killed_processes_are_removed(tmp_path):
    (tmp_path / f".status.json.{'0' * 16}.tmp").write_text("")
    (tmp_path / ".mine.tmp").write_text("")
    assert TEMPORARY.fullmatch(f".status.json.{'0' * 16}.tmp")
    remove_temporary(tmp_path)
    assert os.listdir(tmp_path) == [".mine.tmp"]


def test_a_size_limit_is_checked_before_reading(tmp_path):
    with open(tmp_path / "file", "wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(RunError, match="1,099,511,627,776 bytes; expected at most"):
        read_json(tmp_path, "file")


BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{n}: &a{n} [{f'*a{n - 1},' * 10}]\n" for n in range(1, 10)
)
DEEP = "[" * 100 + "]" * 100
DEEPER = "[1, " * 70 + "1" + "]" * 70
YAML_BOMBS = {
    "aliases": BOMB,
    "deep": f"a: {DEEP}",
    "open": "a: " + "[" * 10**6,
    "cycle": "a: &a [*a]",
    "mixed": DEEPER,
}
NO_YAML = {
    "bytes": b"a: \xff",
    "date": "a: 2001-99-99",
    "key": "? [1]\n: 2",
    "tag": "!!python/name:os.system",
    "digits": f"a: {'9' * 9999}",
    "bool": "!!bool abc",
    "int": "!!int ''",
    "timestamp": "!!timestamp x",
    "documents": "---\n" * 1000,
}
NO_JSON = {
    "bytes": b"\xff",
    "torn": "{",
    "empty": "",
    "deep": DEEP,
    "open": "[" * 10**6,
    "digits": "9" * 9999,
    "many": f"[{'0,' * 10**6}0]",
}


@pytest.mark.parametrize("text", YAML_BOMBS.values(), ids=YAML_BOMBS)
def test_yaml_beyond_the_limits_is_refused(tmp_path, text):
    with pytest.raises(RunError, match=r"too large or too deep|undefined alias"):
        parse_yaml(text, tmp_path)


@pytest.mark.parametrize("text", NO_YAML.values(), ids=NO_YAML)
def test_invalid_yaml_is_refused(tmp_path, text):
    with pytest.raises(RunError, match="is not valid YAML"):
        parse_yaml(text, tmp_path)


def test_a_few_aliases_are_read(tmp_path):
    assert parse_yaml("a: &a [1, 2]\nb: [*a, *a]", tmp_path)["b"] == [[1, 2], [1, 2]]


@pytest.mark.parametrize("text", NO_JSON.values(), ids=NO_JSON)
def test_invalid_or_large_json_is_refused(tmp_path, text):
    with pytest.raises(RunError, match=r"is not valid JSON|too large or too deep"):
        parse_json(text, tmp_path)


def test_torn_and_undecodable_rows_are_skipped(tmp_path):
    (tmp_path / "rows").write_bytes(
        b'{"a": 1}\n\xff\n[1]\n{"b"\n' + b"[" * 10**5 + b'\n\n{"c": 3}\n{"d": 4}'
    )
    assert list(read_rows(tmp_path, "rows")) == [{"a": 1}, {"c": 3}]


def test_the_reason_of_a_file_below_a_missing_folder_is_that_of_the_system(tmp_path):
    path = tmp_path / "missing" / "file"
    read_only = OSError(errno.EROFS, "Read-only file system")
    assert failure_reason(path, read_only) == "Read-only file system"
    removed = FileNotFoundError(errno.ENOENT, "No such file or directory")
    assert failure_reason(path, removed) == f"the folder {path.parent} no longer exists"
