"""The command `predict`: apply a trained model to files, or generate text."""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from framework.errors.terminal import note, print_line, printable, printable_lines
from framework.system.streams import set_errors

from . import help_texts
from .json_output import print_json
from .parsers import CHECKPOINT, JSON, RUN, Parser, opened_run

SAMPLING = ("length", "temperature", "top_k", "top_p", "seed")
"""Options that need --prompt."""


def predict(arguments: list[str]) -> None:
    """Run `framework predict`."""
    args = parse_predict(arguments)
    if args.prompt is not None:
        return generate(args)
    from framework.experiment.trained.prediction_files import choose_format, write_predictions
    from framework.registry.discovery import output_for_programs

    chosen = choose_format(args.output, args.format)
    with output_for_programs(args.output == "-"):
        trained = opened_run(args)
        chunks = trained.predict_files(args.input, args.id)
        form = trained.prediction_form()
        if args.output == "-":
            pieces = text_pieces(chosen, chunks, form)
            first = next(pieces, "")  # the errors of the input come first
        else:
            rows = write_predictions(chunks, form, args.output, chosen)
    if args.output == "-":
        set_errors(sys.stdout, "backslashreplace")  # keeps characters that cannot be encoded
        sys.stdout.write(first)
        for piece in pieces:
            sys.stdout.write(piece)
    else:
        print_line(f"{rows} predictions in {args.output}")
        if args.json:
            print_json({"output": args.output, "rows": rows})
    return None


def text_pieces(chosen: str, chunks: Any, form: Any) -> Iterator[str]:
    """Yield predictions as CSV, with control characters escaped, or as JSON lines."""
    from framework.experiment.trained.prediction_files import csv_pieces, json_pieces

    pieces = json_pieces(chunks, form) if chosen == "jsonl" else csv_pieces(chunks, form, printable)
    for piece in pieces:
        yield piece.decode()


def parse_predict(arguments: list[str]) -> argparse.Namespace:
    """Parse the arguments of `framework predict`."""
    description = "Apply a trained model to files, or generate text with a language model."
    parser = Parser("predict", description, help_texts.PREDICT)
    option = parser.add_argument
    option("run", **RUN)
    files = "files, folders, patterns, or - (stdin), in the format of the run's data set"
    option("--input", nargs="+", metavar="FILE", help=files)
    formats = ("csv", "jsonl", "parquet", "npy", "npz", "images")
    suffixes = ".csv, .jsonl, .parquet, .npy or .npz; FOLDER/ for images; - prints CSV"
    option("--output", metavar="FILE", help=suffixes)
    option("--format", choices=formats, metavar="NAME", help=f"of the output: {', '.join(formats)}")
    column = "column of the input that identifies a row, instead of its number; may be repeated"
    parser.add_repeated("--id", metavar="COLUMN", help=column)
    option("--prompt", metavar="TEXT", help="the text that a language model continues")
    option("--length", type=int, metavar="N", help="with --prompt: number of tokens (default 200)")
    temperature = "with --prompt: 0 takes the most likely token (default 0.8)"
    option("--temperature", type=float, metavar="X", help=temperature)
    top_k = "with --prompt: sample from the K most likely tokens"
    option("--top-k", type=int, metavar="K", help=top_k)
    top_p = "with --prompt: sample from the most likely tokens, of total probability P"
    option("--top-p", type=float, metavar="P", help=top_p)
    option("--seed", type=int, metavar="N", help="with --prompt: seed of the sampling (default 0)")
    option("--checkpoint", **CHECKPOINT)
    option("--json", **JSON | {"help": "print JSON: the file and the number of rows, or the text"})
    args = parser.parse_args(arguments)
    from_file = args.input is not None and args.output is not None
    one_of_the_files = (args.input is None) != (args.output is None)
    if from_file == (args.prompt is not None) or one_of_the_files:
        parser.error("give --input FILE --output FILE, or --prompt TEXT for a language model")
    if args.prompt is None:
        for name in SAMPLING:
            if getattr(args, name) is not None:
                parser.error(f"--{name.replace('_', '-')} requires --prompt")
    if args.json and args.output == "-":
        parser.error("--json: expected a file, as in --output predictions.jsonl")
    return args


def generate(args: argparse.Namespace) -> None:
    """Print a prompt and its continuation by the run's language model."""
    sampling = {}
    for name in SAMPLING:
        if getattr(args, name) is not None:
            sampling[name] = getattr(args, name)
    known, text = opened_run(args).generate(args.prompt, **sampling)
    if known != args.prompt:
        note(f"the vocabulary does not contain all of the prompt; the model reads {known!r}")
    print(printable_lines(text))
    if args.json:
        print_json({"prompt": known, "text": text})
