"""Where `scripts/fetch_data` puts data sets."""

import os
from pathlib import Path

from framework import DataError, paths


def cache_folder() -> Path:
    """Return the folder of all fetched data sets."""
    return paths.expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "framework"


def fetch_command(name: str) -> str:
    """Return the command that fetches a data set, in a checkout or in an installed package."""
    plugins = Path(__file__).parents[2]
    script = plugins.parent / "scripts" / "fetch_data"
    if script.is_file():
        return f"{paths.pasted(paths.shorter(script))} {name}"
    return f"bash {paths.pasted(plugins / 'fetch_data')} {name}"


def data_folder(name: str, size: str, alternative: str) -> Path:
    """Return the folder of a fetched data set.

    Args:
        name: the name that `scripts/fetch_data` knows.
        size: the size of the download, such as "2 MB", for the error.
        alternative: a data set that needs no file, for the error.

    Raises:
        DataError: the data set has not been fetched.
    """
    folder = cache_folder() / name
    if not folder.is_dir():
        raise DataError(
            f"{name} is not in {folder}; fetch it ({size}) with: {fetch_command(name)} "
            f"({alternative} needs no file)"
        )
    return folder
