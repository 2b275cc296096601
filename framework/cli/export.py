"""The command `framework export`."""

import argparse
from dataclasses import asdict
from typing import Any

from framework.errors import FrameworkError
from framework.errors.paths import expanded, shorter
from framework.errors.terminal import print_line

from . import help_texts
from .json_output import print_json
from .parsers import CHECKPOINT, JSON, RUN, Parser

OWN = ("safetensors", "torch_export", "onnx")


def export(arguments: list[str]) -> None:
    """Run `framework export`."""
    description = "Write a trained model as files that need no framework, and verify them."
    parser = Parser("export", description, help_texts.EXPORT)
    parser.add_argument("run", **RUN)
    formats = f"{', '.join(OWN)}, or an exporter of a plugin"
    parser.add_argument("--to", required=True, metavar="FORMAT", help=formats)
    output = "folder to create (default: exports/FORMAT in the folder of the run)"
    parser.add_argument("--output", type=expanded, metavar="DIR", help=output)
    settings = "settings of the exporter, such as opset=20"
    parser.add_argument("settings", nargs="*", default=[], metavar="KEY=VALUE", help=settings)
    parser.add_argument("--checkpoint", **CHECKPOINT)
    parser.add_argument("--json", **JSON)
    args = parser.parse_intermixed_args(arguments)
    typed = parse_settings(args.settings)
    trained = opened(args, typed)
    from framework.experiment.trained.export import export_run

    exported = export_run(trained, args.to, args.output, typed)
    if args.json:
        print_json(asdict(exported))
    for name, size in exported.files.items():
        print_line(f"{size:>12,}  {shorter(exported.folder)}/{name}")
    print_line(
        f"verified on {exported.samples} samples ({exported.split}): largest difference "
        f"{exported.difference:.2g}"
    )


def opened(args: argparse.Namespace, settings: dict[str, Any]) -> Any:
    """Load the plugins, check the exporter before the run is read, and open the run."""
    from framework.errors.terminal import note
    from framework.experiment.trained.load import open_run
    from framework.registry.discovery import discover
    from framework.registry.kinds import exporters

    for problem in discover(args.plugins, args.without_plugin, tolerant=True):
        note(f"{problem}; its parts are left out")
    maker = exporters.maker(args.to, **settings)
    maker().check(maker.entry.name)
    return open_run(args.run, args.checkpoint)


def parse_settings(words: list[str]) -> dict[str, Any]:
    """Return settings by name; values are read as YAML.

    Raises:
        FrameworkError: a word is not KEY=VALUE.
    """
    import yaml

    settings: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise FrameworkError(f"export: expected KEY=VALUE, got {word}")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            settings[key] = value
    return settings
