"""Print the JSON schema of an experiment file, or write it to a file for an editor."""

import json
import os
from pathlib import Path
from typing import Any

from framework.composition.catalogue import Index
from framework.composition.compose import config_folders
from framework.composition.experiment_schema import choice_files, experiment_schema
from framework.errors import FrameworkError, RunError, wrong_option
from framework.errors.paths import real_path, shorter
from framework.errors.terminal import print_line
from framework.system.files import write_file

from .json_output import print_json


def print_schema(index: Index, output: Path | None, as_json: bool) -> None:
    """Print the schema, or write it to a file and print how to use it.

    Args:
        index: all parts.
        output: the file.
        as_json: print the schema, or the path of the file, as a document of `--json`.

    Raises:
        FrameworkError: the file cannot be written.
    """
    schema = experiment_schema(index, choice_files(config_folders(), index))
    if output is None and as_json:
        print_json({"experiment_schema": schema})
        return
    if output is None:
        print(json.dumps(schema, indent=2))
        return
    write_schema(output, schema)
    print_line(f"schema   {shorter(output)}")
    relative = os.path.relpath(real_path(output), Path("conf", "experiment").absolute())
    print_line(f"use it   # yaml-language-server: $schema={relative}")
    if as_json:
        print_json({"output": str(output)})


def write_schema(path: Path, schema: Any) -> None:
    """Write a schema to a file; see `print_schema`."""
    target = real_path(path)
    if target.is_dir():
        raise wrong_option("--output", str(path), "a file, not a folder")
    if not target.parent.is_dir():
        raise FrameworkError(f"--output {path}: no folder {path.parent}")
    try:
        write_file(target.parent, target.name, json.dumps(schema, indent=2) + "\n")
    except RunError as error:
        raise FrameworkError(f"--output {path}: {error}") from error
