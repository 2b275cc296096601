"""Find the files of a checkout that belong to the project, without those of the user."""

import shutil
import subprocess
from pathlib import Path


def shipped(folder: Path, pattern: str) -> list[Path]:
    """Return the files that match a pattern and are tracked by git, sorted.

    Without git, or outside of a repository, all matching files are returned.
    """
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
