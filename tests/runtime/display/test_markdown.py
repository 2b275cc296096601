"""Tables in Markdown."""

from framework.runtime.display import markdown


def test_a_cell_cannot_end_its_column_or_its_row_or_be_html():
    rows = [["a|b", "two\nlines"], ["<b>", 3]]
    lines = markdown.table(["name", "value"], rows).splitlines()
    assert lines == [
        "| name | value |",
        "|---|---|",
        "| a\\|b | two lines |",
        "| &lt;b> | 3 |",
    ]


def test_numbers_are_aligned_to_the_right():
    lines = markdown.table(["class", "recall", "samples"], [], texts=1).splitlines()
    assert lines == ["| class | recall | samples |", "|---|--:|--:|"]
