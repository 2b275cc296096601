"""`framework explain`: where a setting comes from, where the time went, why a loss is NaN."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from framework.errors.paths import expanded, pasted
from framework.errors.terminal import print_line, printable, title

from . import help_texts
from .json_output import print_json
from .parsers import JSON, RUN, command_line, composing, importing_torch
from .units import duration, small_duration, value_text

if TYPE_CHECKING:
    from framework.experiment.recorded.explain import Explained
    from framework.experiment.recorded.finder import Finding
    from framework.experiment.recorded.replay import Replay
    from framework.runs.overview.speed import Activity

WIDEST_VALUE = 40


def explain(arguments: list[str]) -> None:
    """Run `framework explain`."""
    parser = composing(
        "explain",
        "Explain a setting, the speed of a run, or a loss that is not finite.",
        help_texts.EXPLAIN,
        argument=("WHAT", "a setting such as optimizer.lr, or speed, or nan"),
    )
    parser.add_argument("--run", **RUN | {"metavar": "RUN", "help": "explain this run"})
    output = "folder for the files that repeat the step (default: RUN/non_finite)"
    parser.add_argument("--output", type=expanded, metavar="DIR", help=f"with nan: {output}")
    parser.add_argument("--json", **JSON)
    args = parser.parse_intermixed_args(arguments)
    if "=" in args.what:
        parser.error(f"explain: expected a setting before the overrides, got {args.what}")
    if args.run is not None and args.overrides:
        parser.error(f"--run {args.run}: expected no overrides, got {args.overrides[0]}")
    if args.what in ("speed", "nan"):
        if args.run is None:
            if len(args.overrides) != 1:
                parser.error(f"explain {args.what}: expected the folder of one run")
            args.run = expanded(args.overrides[0])
        explain_speed_of(args) if args.what == "speed" else explain_nan_of(args)
        return
    if args.run is not None:
        explain_run(args)
        return
    line = command_line(parser, args)
    from framework.composition.compose import Job, run_composed as compose

    def job(composed: Job) -> None:
        from framework.experiment.recorded.explain import explain_setting

        print_explained(explain_setting(composed.spec, args.what), args.json)

    compose(line, job)


def explain_run(args: Any) -> None:
    """Explain a setting of a run."""
    with importing_torch():
        from framework.experiment.recorded.explain import explain_setting_of_run
        from framework.registry.discovery import discover
    from framework.runs.run_files import run_files

    discover(args.plugins, args.without_plugin)
    found = explain_setting_of_run(run_files(args.run), args.what)
    print_explained(found, args.json)


def explain_speed_of(args: Any) -> None:
    """Print where the time of a run went, and what to change."""
    from framework.runs.overview.speed import explain_speed
    from framework.runs.run_files import run_files

    run = run_files(args.run)
    speed = explain_speed(run)
    if args.json:
        print_json(speed.as_dict())
        return
    time = speed.time
    if time is not None and time.training:
        text = f"{duration(time.total)}, {time.steps:,} steps"
        if time.sessions > 1:
            text += f", in {time.sessions} sessions (resumed)"
        if speed.samples_per_second is not None:
            text += f", {speed.samples_per_second:,.0f} samples/s at the end"
        print_line(text)
    print_activities(speed.activities)
    if speed.of_a_step:
        print_line()
        print_line("of a step")
        print_activities(speed.of_a_step)
    if speed.advice:
        print_line()
    for line in [*speed.advice, *(f"note: {text}" for text in speed.notes)]:
        print_line(f"- {line}")


def explain_nan_of(args: Any) -> None:
    """Repeat the step of a run that was not finite, and print where that began."""
    with importing_torch():
        from framework.experiment.recorded.replay import replay
        from framework.registry.discovery import discover
    from framework.runs.run_files import run_files

    discover(args.plugins, args.without_plugin)
    run = run_files(args.run)
    found = replay(run, args.output or run.path / "non_finite")
    if args.json:
        print_json(asdict(found))
        return
    for line in nan_lines(found):
        print_line(line)


def nan_lines(found: "Replay") -> Iterator[str]:
    """Yield the lines on a step that is not finite."""
    if found.finding is None:
        yield f"steps {found.start + 1:,} to {found.last:,} repeated: the loss and all gradients "
        yield "are finite: the failure did not occur again"
    else:
        step = found.finding
        yield f"step       {step.step:,} (repeated from step {found.start:,})"
        yield f"loss       {step.loss:.6g}"
        if step.weights:
            yield f"weights    not finite before the step: {some(step.weights)}"
        if step.inputs:
            yield f"inputs     not finite in {rows_name(step)} {some(step.inputs)}"
        yield from forward_lines(step)
        yield from backward_lines(step)
        if step.samples:
            yield f"samples    the step reads {some(step.samples)}"
    for note in found.notes:
        yield f"note       {printable(note)}"
    if found.files:
        yield f"repeat     python {pasted(found.files[0])}"


def forward_lines(step: "Finding") -> Iterator[str]:
    """Yield the lines on the forward pass of a step."""
    if step.layer is not None:
        count, total = step.layer_values
        inputs = "finite inputs" if step.layer_inputs_finite else "inputs that are not finite"
        yield (
            f"forward    {title(step.layer)} ({step.layer_type}) is the first layer whose output "
            f"is not finite: {count:,} of {total:,} values, from {inputs}"
        )
        if step.layer_samples:
            yield f"           in {rows_name(step)} {some(step.layer_samples)}"
    elif math.isfinite(step.loss):
        yield "forward    all outputs of layers and the loss are finite"
    else:
        yield "forward    all outputs of layers are finite: the loss itself is not"


def rows_name(step: "Finding") -> str:
    """Return what the numbers of `inputs` and `layer_samples` are."""
    return "rows of the batch" if step.samples is None else "samples"


def backward_lines(step: "Finding") -> Iterator[str]:
    """Yield the lines on the backward pass of a step."""
    lines = []
    if step.operation:
        lines.append(printable(step.operation))
    if step.gradient_layer is not None:
        layer = title(step.gradient_layer)
        lines.append(f"the gradient at the output of {layer} is the first that is not finite")
    if step.parameter is not None:
        count, total = step.parameters
        lines.append(
            f"the gradients of {count} of {total} parameters are not finite; the first one is that "
            f"of {title(step.parameter)}"
        )
    for number, line in enumerate(lines):
        yield f"{'' if number else 'backward':<11}{line}"


def some(values: Sequence[Any], most: int = 8) -> str:
    """Return the first values, and the number of the others."""
    shown_values = ", ".join(title(value) for value in values[:most])
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return shown_values + more


def print_activities(activities: Sequence["Activity"]) -> None:
    """Print seconds and shares, longest first."""
    rows = []
    for each in activities:
        seconds = f"{small_duration(each.seconds):>9}"
        rows.append((f"  {each.name}", seconds, f"{each.share:6.1%}"))
    print_rows(rows)


def print_explained(found: Sequence["Explained"], as_json: bool) -> None:
    """Print a setting with all its places, or several settings with the place that counts."""
    if as_json:
        print_json({"settings": [asdict(each) for each in found]})
        return
    if len(found) == 1:
        print_places(found[0])
        return
    rows = [
        (each.setting, value_text(each.value, WIDEST_VALUE), each.source or "not known")
        for each in found
    ]
    print_rows(rows)


def print_places(explained: "Explained") -> None:
    """Print a setting, and the places that give it a value, the one that is used first."""
    print_line(f"{printable(explained.setting)} = {value_text(explained.value, WIDEST_VALUE)}")
    print_rows(
        [(f"  {value_text(e.value, WIDEST_VALUE)}", e.text, e.effect) for e in explained.places]
    )
    if explained.note:
        print_line(f"  {explained.note}")


def print_rows(rows: Sequence[Sequence[str]]) -> None:
    """Print a table without borders."""
    if not rows:
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [f"{printable(cell):<{width}}" for cell, width in zip(row, widths, strict=True)]
        print_line("  ".join(cells).rstrip())
