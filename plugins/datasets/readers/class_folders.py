"""Find files in a folder for each class: ROOT/CLASS/*, or ROOT/train/CLASS/* and so on."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from framework import DataError, did_you_mean

PART_FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


class LabelledFiles(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Files with the index of their class; a file is read when its sample is, by a data worker."""

    def __init__(self, files: Sequence[Path], labels: Tensor, facts: dict[str, Any]):
        self.files = files
        self.labels = labels
        self.facts = facts

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.read(self.files[index]), self.labels[index]

    def read(self, file: Path) -> Tensor:
        """Return a file as an input."""
        raise NotImplementedError

    def content(self) -> Any:
        """Return the files and labels: a run can be resumed with the same files at another path."""
        return [list(self.files), self.labels]

    def subset(self, rows: Tensor) -> Self:
        """Return the files with these row numbers."""
        files = [self.files[row] for row in rows.tolist()]
        return type(self)(files, self.labels[rows], self.facts)


def find_parts(root: Path) -> dict[str, Path]:
    """Return the folders of train, val and test; a root without a train folder is train itself."""
    if root.is_file():
        raise DataError(
            f"data.path={root} is a file; expected a folder with a folder for each class"
        )
    if not root.is_dir():
        raise DataError(f"data.path={root}: no such folder (looked in {Path.cwd()})")
    found = {}
    for part, names in PART_FOLDERS.items():
        for name in names:
            if (root / name).is_dir():
                found[part] = root / name
    return found if "train" in found else {"train": root}


def find_classes(folder: Path, contents: str) -> list[str]:
    """Return the names of the class folders, sorted.

    Args:
        folder: the folder of a part.
        contents: the plural of the files, such as "images", for errors.

    Raises:
        DataError: there is no class, or only one in a folder for training.
    """
    folders = [entry for entry in folder.iterdir() if entry.is_dir()]
    names = sorted(entry.name for entry in folders if not entry.name.startswith("."))
    if not names:
        raise DataError(
            f"{folder} has no folders; put the {contents} of each class into a folder with its name"
        )
    is_held_out = folder.name in (*PART_FOLDERS["val"], *PART_FOLDERS["test"])
    if len(names) == 1 and not is_held_out:
        raise DataError(f"{folder} has only one class, {names[0]!r}; expected at least two classes")
    return names


def find_labelled_files(
    folder: Path, classes: Sequence[str], contents: str, find: Callable[[Path], list[Path]]
) -> tuple[list[Path], Tensor]:
    """Return the files of a folder of class folders, and the index of the class of each.

    Args:
        folder: the folder of a part.
        classes: the classes of training.
        contents: the plural of the files, such as "images", for errors.
        find: returns the files of a class folder.

    Raises:
        DataError: the folder is empty, or has a class that training does not have.
    """
    files = []
    labels = []
    for name in find_classes(folder, contents):
        if name not in classes:
            raise DataError(
                f"{folder / name}: no such class in train; {did_you_mean(name, classes)}"
            )
        found = find(folder / name)
        files += found
        labels += [classes.index(name)] * len(found)
    return files, torch.tensor(labels)


def find_files(folder: Path, suffixes: Collection[str], contents: str) -> list[Path]:
    """Return the files in a folder, at any depth, that have one of the suffixes, sorted.

    Raises:
        DataError: there is none. `contents` is the plural of the files, such as "images".
    """
    files = []
    for file in folder.rglob("*"):
        is_hidden = file.name.startswith(".")
        if file.suffix.lower() in suffixes and not is_hidden and not file.is_dir():
            files.append(file)
    if not files:
        raise DataError(
            f"{folder} has no {contents}; known suffixes: {', '.join(sorted(suffixes))}"
        )
    return sorted(files)
