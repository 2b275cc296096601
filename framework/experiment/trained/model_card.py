"""The model card of an export: Markdown, from the files of the run and the measurements.

The sections are those of Mitchell et al. 2019, "Model Cards for Model Reporting", as far as a run
knows them. What it cannot know, such as the intended use, is for the user to add.
"""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from framework.runs.run_files import RunFiles
from framework.runtime.display import markdown

from .load import Trained

SHOWN = ("data", "model", "task", "loss", "optimizer", "scheduler", "loader", "trainer", "seed")
"""Sections of the config that the card lists."""
MOST_SETTINGS = 60
MOST_CLASSES = 100
MOST_TEXT = 200


def model_card(files: RunFiles, trained: Trained, about: Mapping[str, Any], split: str) -> str:
    """Return the model card.

    Args:
        files: of the run.
        trained: the exported run.
        about: the metadata of the export.
        split: on which the metrics were measured.
    """
    parameters = sum(each.numel() for each in trained.model.parameters())
    step = about["step"]
    run = code(f"{files.path.absolute().parent.name}/{files.name}")
    today = time.strftime("%Y-%m-%d")
    at = f"checkpoint {about['checkpoint']}" + ("" if step is None else f", step {step:,}")
    lines = [
        f"# {about['model']} on {about['data']}",
        "",
        f"Task {about['task']}, {parameters:,} parameters, {at}.",
        f"Trained by the run {run}; exported as {about['format']} on {today}.",
        "",
        "    python example.py FILE",
        "",
        "applies it to a file of raw inputs, without the framework. A comment in `example.py`",
        "names the format of the file.",
        "",
        "## Inputs and outputs",
        "",
    ]
    lines.append(table(("", "name", "type", "shape", "content"), tensors(about)))
    lines += class_lines(about["classes"])
    lines += ["", "## Metrics", ""]
    lines.append(f"Of these weights, measured on the {split} split when they were exported:")
    lines.append("")
    values = [(name, f"{value:.6g}") for name, value in about["metrics"].items()]
    lines.append(table(("metric", "value"), values))
    lines += ["", "## Data", ""]
    lines.append(table(("split", "samples", "sha256 of its content"), splits(trained.facts)))
    lines += ["", "## Settings", ""]
    lines.append(table(("setting", "value"), settings(files)))
    lines += ["", "## Software", ""]
    lines.append(table(("", ""), software(files)))
    lines += ["", "## Limits", ""]
    lines += [f"- {text}" for text in limits(about, split)]
    for problem in files.problems:
        lines.append(f"- Not known, because a file of the run is damaged: {cell(problem)}.")
    return "\n".join(lines) + "\n"


def tensors(about: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each input and output."""
    for kind in ("inputs", "outputs"):
        for name, each in about[kind].items():
            shape = ", ".join(map(str, each["shape"]))
            yield kind[:-1], code(name), each["dtype"], f"({shape})", each.get("text", "")


def class_lines(classes: list[Any]) -> list[str]:
    """Return the names of the classes, in the order of the outputs."""
    if not classes:
        return []
    names = ", ".join(cell(code(str(name))) for name in classes[:MOST_CLASSES])
    others = len(classes) - MOST_CLASSES
    more = f" and {others} more (metadata.json)" if others > 0 else ""
    return ["", f"Classes, counted from 0: {names}{more}."]


def splits(facts: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each split of the data."""
    samples = facts.get("samples")
    digests = facts.get("content")
    for name, count in samples.items() if isinstance(samples, dict) else ():
        digest = digests.get(name) if isinstance(digests, dict) else None
        yield name, f"{count:,}" if isinstance(count, int) else "", str(digest or "not known")


def settings(files: RunFiles) -> Iterator[tuple[str, ...]]:
    """Yield a row for each setting of the run that may affect the model."""
    shown = 0
    for key, value in files.settings.items():
        if key.partition(".")[0] not in SHOWN or value is None:
            continue
        shown += 1
        if shown > MOST_SETTINGS:
            yield "...", "see config.yaml of the run"
            return
        yield code(key), code(without_folder(value))


def without_folder(value: Any) -> str:
    """Return a value as text; of a path only the name, since a card may be published."""
    text = str(value)
    return Path(text).name if text.startswith(("/", "~")) else text


def software(files: RunFiles) -> Iterator[tuple[str, ...]]:
    """Yield the versions with which the run was trained, and the state of its code."""
    provenance = files.provenance
    for label, key in (("trained", "time"), ("git commit", "git_commit"), ("python", "python")):
        if provenance.get(key):
            yield label, str(provenance[key])
    if provenance.get("git_diff"):
        yield "code", "with changes that are not in the commit, see provenance.json of the run"
    packages = provenance.get("packages")
    for name, number in packages.items() if isinstance(packages, dict) else ():
        if number:
            yield str(name), str(number)


def limits(about: Mapping[str, Any], split: str) -> Iterator[str]:
    """Yield what the numbers of the card do not say."""
    verified = about["verified"]
    yield (
        f"The exported files gave the outputs of the run for {verified['samples']} samples "
        f"({verified['split']}), in batches of {', '.join(map(str, verified['batch_sizes']))}; the "
        f"largest difference was {verified['largest_difference']:.2g} (relative to the largest "
        "output of the batch, if that is above 1)."
    )
    if split != "test":
        role = "the model was trained on" if split == "train" else "may have chosen the checkpoint"
        yield f"There is no test split: the metrics are those of the {split} split, which {role}."
    yield "The metrics hold for data of the same source; nothing is known about other data."


def table(header: tuple[str, ...], rows: Any) -> str:
    """Return a table whose cells are shortened."""
    return markdown.table(header, [[shortened(each) for each in row] for row in rows])


def code(text: str) -> str:
    """Return a text as code in Markdown."""
    return "`" + text.replace("`", "'") + "`"


def cell(text: str) -> str:
    """Return a text for a cell: on one line, shortened, without markup of tables and HTML."""
    return markdown.cell(shortened(text))


def shortened(text: str) -> str:
    """Return a text on one line, cut to MOST_TEXT characters."""
    text = " ".join(text.split())
    return text if len(text) <= MOST_TEXT else text[:MOST_TEXT] + "..."
