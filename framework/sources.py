"""Where a value in a composed experiment was written: on the command line, or in which line of which file."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class Sources:
    """Looks a path such as "optimizer.lr" up in what was typed, then in the config files, the last first."""

    def __init__(self, typed: Mapping[str, str], files: Iterable[Path]):
        self.typed, self.files = dict(typed), list(files)

    def __call__(self, path: str) -> str:
        """Return "command line", "conf/experiment/spam.yaml:7", or "" for a default."""
        if any(path == key or path.startswith(f"{key}.") for key in self.typed):
            return "command line"
        for file in reversed(self.files):
            line = line_of(file, path.split("."))
            if line is not None:
                return f"{shorter(file)}:{line}"
        return ""


def line_of(file: Path, keys: list[str]) -> int | None:
    """Return the line of a YAML file where a nested key stands, or None."""
    import yaml

    try:
        node: Any = yaml.compose(file.read_text(), Loader=yaml.SafeLoader)
    except (OSError, yaml.YAMLError):
        return None
    line = None
    for key in keys:
        pair = next((p for p in getattr(node, "value", ()) if is_key(p, key)), None)
        if pair is None:
            return None
        line, node = pair[0].start_mark.line + 1, pair[1]
    return line


def is_key(pair: Any, key: str) -> bool:
    return isinstance(pair, tuple) and pair[0].value == key


def shorter(file: Path) -> str:
    try:
        return str(file.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(file)
