"""Which files of a checkout belong to the project: a user may have files of their own beside them."""

import shutil
import subprocess
from pathlib import Path


def shipped(folder: Path, pattern: str) -> list[Path]:
    """Return the files of a folder that match a pattern and are tracked by git, sorted; all where git cannot tell."""
    found = sorted(folder.glob(pattern))
    if shutil.which("git") is None:
        return found
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=folder, capture_output=True, text=True, check=False
    )
    tracked = set(listed.stdout.split("\0")) - {""}
    if not tracked:
        return found
    return [path for path in found if str(path.relative_to(folder)) in tracked]
