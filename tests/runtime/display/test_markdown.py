"""Tables in Markdown."""

import html

from markdown_it import MarkdownIt

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


def test_a_long_text_continues_on_a_new_line():
    found = markdown.table(["two\nlines", "b"], [["one two three", "<b>"], ["", "x|y"]], wrap=8)
    assert found.splitlines() == [
        "| two<br>lines | b |",
        "|---|---|",
        "| one two<br>three | &lt;b> |",
        "|  | x\\|y |",
    ]


def test_a_literal_text_is_shown_as_it_is():
    text = r"__init__ of a_b, x*y*z, `code`, [a](b), _x_ and \d_"
    shown = MarkdownIt().renderInline(markdown.literal(text))
    assert html.unescape(shown) == text
    assert markdown.literal("max_length") == "max_length"
