"""The public names of the package are in `__all__`, and imported at first use."""

import ast
from pathlib import Path

import pytest

import framework as fw


@pytest.mark.parametrize("name", [*fw.__all__, *fw._NAMES, *fw._MODULES])
def test_every_name_can_be_imported(name):
    assert getattr(fw, name) is not None


def test_dir_lists_the_public_names():
    assert dir(fw) == sorted(fw.__all__)
    assert "files" not in dir(fw)


def test_a_misspelt_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Trainr'"):
        fw.Trainr  # noqa: B018  # only looked up


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(fw.__file__).read_text())
    for_type_checkers = set()
    for block in tree.body:
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
            for statement in block.body:
                for_type_checkers.update(alias.asname or alias.name for alias in statement.names)
    assert for_type_checkers == {*fw._NAMES, *fw._MODULES}


def test_the_tables_of_names_are_sorted():
    """Public names are first, in the table of those that are imported at first use."""
    public = sorted(set(fw._NAMES) & set(fw.__all__))
    others = sorted(set(fw._NAMES) - set(fw.__all__))
    assert list(fw._NAMES) == [*public, *others]
    assert list(fw._MODULES) == sorted(fw._MODULES)
