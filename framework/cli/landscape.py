"""The command `landscape`: the loss on a plane through the weights of a run."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.text import Text

from framework.errors import wrong_option
from framework.errors.paths import expanded, shorter
from framework.errors.terminal import can_redraw, print_line

from . import help_texts
from .json_output import print_json
from .parsers import CHECKPOINT, JSON, RUN, Parser, opened_run

WIDTH, HEIGHT = 64, 44  # of a map in the terminal, in half characters of the height
PATH_MARK = "o"
CENTER_MARK = "X"


def landscape(arguments: list[str]) -> None:
    """Run `framework landscape`."""
    args = parse_landscape(arguments)
    trained = [opened_run(args)]
    from framework.experiment.evaluation import landscape_files
    from framework.experiment.evaluation.landscape import (
        Surface,
        check_comparable,
        measure_landscapes,
    )
    from framework.experiment.trained.load import open_run

    if args.against is not None:
        trained.append(open_run(args.against))
        check_comparable(*trained)
    surfaces = []
    for run in trained:
        data = run.read_data()
        surface = Surface(run, data, args.split, args.samples, args.seed, args.directions)
        surfaces.append(surface)
    with progress_bar(len(surfaces) * args.points**2) as done:
        found = measure_landscapes(surfaces, args.points, args.span, done)
    # printed before they are written, also if the folder of the run cannot be written
    document = {"landscapes": [landscape_files.as_dict(each) for each in found]}
    print_json(document)
    if not args.json:
        print_landscapes(found)
    files = landscape_files.save_landscapes(found)
    print_json(document | {"files": [str(file) for file in files]})
    if not args.json:
        for file in files:
            print_line(f"written  {shorter(file)}")


def parse_landscape(arguments: list[str]) -> argparse.Namespace:
    """Parse the arguments of `framework landscape`."""
    description = "Draw the loss on a plane through the weights of a run."
    parser = Parser("landscape", description, help_texts.LANDSCAPE)
    option = parser.add_argument
    option("run", **RUN)
    option("--against", type=expanded, metavar="RUN2", help="draw this run too, in the same colors")
    directions = "pca needs 3 checkpoints; default: pca if there are, otherwise random"
    option("--directions", choices=["auto", "pca", "random"], default="auto", help=directions)
    points = "of an axis of the grid (default: 21)"
    option("--points", type=int, default=21, metavar="N", help=points)
    span = "the grid is from -S to S (default: around the path; 1 for random)"
    option("--span", type=float, metavar="S", help=span)
    option("--split", choices=["train", "val", "test"], default="train", help="default: train")
    samples = "samples on which the loss is measured (default: 512)"
    option("--samples", type=int, default=512, metavar="N", help=samples)
    seed = "of the samples and the random directions (default: 0)"
    option("--seed", type=int, default=0, metavar="N", help=seed)
    option("--checkpoint", **CHECKPOINT)
    option("--json", **JSON)
    args = parser.parse_args(arguments)
    if args.samples < 1:
        raise wrong_option("--samples", args.samples, "at least 1")
    return args


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[], None]]:
    """Show a progress bar on a terminal; yield a function that advances it by one point.

    Args:
        total: the number of points.
    """
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not can_redraw(sys.stderr)) as progress:
        bar = progress.add_task("measuring the loss", total=total)
        yield lambda: progress.advance(bar)


def print_landscapes(found: Sequence[Any]) -> None:
    """Print a map of each landscape with the same colors, its range, and its path."""
    from framework.experiment.evaluation.landscape_files import color_scale
    from framework.runtime.display.console import console

    scale = color_scale(found)
    output = console()
    width = min(WIDTH, output.width)
    for each in found:
        print_line(f"{each.run}, loss {each.center:.6g} at the center ({each.checkpoint})")
        output.print(heat_map(each, scale, width, output.color_system is not None))
        print_line(f"{each.samples:,} samples of {each.split}; {kind_text(each)}")
        print_line(
            f"x {each.x[0]:.3g} to {each.x[-1]:.3g}, y {each.y[0]:.3g} to {each.y[-1]:.3g}; "
            f"{PATH_MARK}: checkpoints, {CENTER_MARK}: center"
        )
    kind = "logarithmic" if scale.log else "linear"
    print_line(f"colors from loss {scale.low:.4g} (dark) to {scale.high:.4g} (bright), {kind}")


def kind_text(found: Any) -> str:
    """Return the kind of the directions, and how much of the path they contain."""
    kind = "random directions with the norms of the filters"
    if found.directions == "pca":
        kind = "main directions of the checkpoints"
    if found.explained is None:
        return kind
    return f"{kind}, with {found.explained:.1%} of the squared distances of the path"


def heat_map(found: Any, scale: Any, width: int, has_colors: bool) -> Text:
    """Return a map: two values in a character with colors, one without."""
    import torch

    from framework.runtime.display.drawing import colors_of, pixels_of
    from framework.runtime.display.plot import half_blocks, resampled, shade

    lines = HEIGHT if has_colors else HEIGHT // 2
    rows = resampled(found.losses, width, lines)[::-1]  # the highest y first
    shares = [list(map(scale.position, row)) for row in rows]
    marks = path_marks(found, width, lines)
    if has_colors:
        pixels = pixels_of(colors_of(torch.tensor(shares)))
        return Text("\n").join(half_blocks(pixels, marks))
    drawn = []
    for y, row in enumerate(shares):
        characters = [marks.get((x, y), shade(share)) for x, share in enumerate(row)]
        drawn.append("".join(characters))
    return Text("\n".join(drawn))


def path_marks(found: Any, width: int, lines: int) -> dict[tuple[int, int], str]:
    """Return the marks of checkpoints and of the center by column and line of a map."""
    marks = {}
    points = [(each["x"], each["y"], PATH_MARK) for each in found.path]
    for x, y, mark in [*points, (0.0, 0.0, CENTER_MARK)]:
        across = (x - found.x[0]) / (found.x[-1] - found.x[0])
        up = (y - found.y[0]) / (found.y[-1] - found.y[0])
        if 0 <= across <= 1 and 0 <= up <= 1:
            marks[round(across * (width - 1)), round((1 - up) * (lines - 1))] = mark
    return marks
