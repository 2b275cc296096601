"""The wording of all messages is in one file, so that all changes of wording show in one diff."""

import ast

import pytest

import messages


def collect(source):
    tree = ast.parse(source)
    return messages.messages_of(tree, messages.BUILT_IN_ERRORS | {"DataError", "DataErrors"})


def test_the_snapshot_has_all_messages():
    """After a change, run `python tests/messages.py`, and read the diff."""
    assert messages.collected() == messages.SNAPSHOT.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("raise DataError(f'{path} has no rows')", "DataError: {path} has no rows"),
        (
            "where = f'{path}: '\nraise DataError(where + 'it is empty')",
            "DataError: {path}: it is empty",
        ),
        (
            "raise DataError('it is ' + ('empty' if not rows else 'full'))",
            "DataError: it is (empty | full)",
        ),
        ("def reason(path) -> str:\n    return f'no {path}'", "reason: no {path}"),
        ("warnings.warn('no rows', stacklevel=2)", "warn: no rows"),
        ("reader.problem('data.path', path, 'no rows')", "problem: no rows"),
        ("raise DataErrors([f'{path} has no rows'])", "DataErrors: {path} has no rows"),
        ("EMPTY = 'the file is empty'", "EMPTY: the file is empty"),
        ("def read(path):\n    yield f'{path} is empty'", "read: {path} is empty"),
        ("def read():\n    problems.append('the file is empty')", "read: the file is empty"),
        ("def read():\n    text = 'the file is empty'", "read: the file is empty"),
        ("class Reader:\n    doc: str = 'reads the file'", "doc: reads the file"),
    ],
)
def test_a_message_is_found(source, line):
    assert collect(source) == [line]


@pytest.mark.parametrize(
    "source",
    [
        "raise OtherError('no rows')",
        "rows = 'no rows'",
        "DataError(text)",
        "re.compile('the file is empty')",
        "def read():\n    'Read all the rows.'",
        "def read(path: 'Path or text or None'):\n    pass",
    ],
)
def test_other_texts_are_not_messages(source):
    assert collect(source) == []
