"""Errors of the parsers.

argparse has no attributes for the reason of an error. `Parser.parsed` therefore reads its texts,
which another release of Python may change.
"""

import pytest

from framework.cli.parsers import Parser, composing
from framework.errors import FrameworkError


@pytest.fixture
def evaluating():
    parser = Parser("eval", "Evaluate a run.", "")
    parser.add_argument("run")
    parser.add_argument("--port", type=int)
    parser.add_argument("--split", choices=["train", "val"])
    parser.add_argument("-j", "--json", action="store_true")
    return parser


def error_of(parse, arguments):
    with pytest.raises(FrameworkError) as raised:
        parse(arguments)
    return str(raised.value).partition(" (see `framework ")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "eval: missing argument run"),
        ("a b", "eval: expected no argument b"),
        ("a --port", "--port: expected a value"),
        ("a --port --json", "--port: expected a value"),
        ("a --port x", "--port x: expected an integer"),
        ("a --split trai", "--split trai: expected one of train, val; did you mean 'train'?"),
        ("a --json=3", "--json: takes no value"),
        ("a -j=3", "--json: takes no value"),
        ("a --jsn", "--jsn: there is no such option; did you mean '--json'?"),
    ],
)
@pytest.mark.parametrize("method", ["parse_args", "parse_intermixed_args"])
def test_errors_of_arguments(evaluating, method, arguments, message):
    assert error_of(getattr(evaluating, method), arguments.split()) == message


def test_overrides_are_not_required():
    parser = composing("find", "Find a setting.", "", ("lr", "batch_size"))
    args = parser.parse_intermixed_args([])
    assert (args.target, args.overrides) == (None, [])
    args = parser.parse_intermixed_args(["lr", "a=1", "--resolve", "b=2"])
    assert (args.target, args.overrides) == ("lr", ["a=1", "b=2"])
    message = "find a=1: expected one of lr, batch_size"
    assert error_of(parser.parse_intermixed_args, ["a=1", "lr"]) == message
