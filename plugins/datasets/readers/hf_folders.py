"""Folders that Hugging Face `save_to_disk` writes, and the features in the schema of their files.

A folder of one split has state.json, which names the Arrow streams, and dataset_info.json; a folder
of several splits has dataset_dict.json and a folder for each split.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from framework import DataError

from .class_folders import PART_FOLDERS
from .data_files import one_line, read_bytes

Features = Mapping[str, Any]
"""The features of the columns, as Hugging Face describes them in JSON."""


def find_hf_parts(folder: Path) -> dict[str, list[Path]]:
    """Return the files of train, val and test; a folder of one split is train.

    Raises:
        DataError: the folder is not one that `save_to_disk` writes, or has no split train.
    """
    if not folder.is_dir():
        raise DataError(f"data.path={folder}: no such folder (looked in {Path.cwd()})")
    if not (folder / "dataset_dict.json").is_file():
        return {"train": find_hf_files(folder)}
    splits = read_object(folder / "dataset_dict.json").get("splits")
    if not isinstance(splits, list):
        raise DataError(f"{folder / 'dataset_dict.json'} has no list of splits")
    parts = {}
    for part, names in PART_FOLDERS.items():
        for name in names:
            if name in splits:
                parts[part] = find_hf_files(folder / name)
                break
    if "train" not in parts:
        raise DataError(f"{folder} has no split 'train'; splits: {', '.join(map(str, splits))}")
    return parts


def find_hf_files(folder: Path) -> list[Path]:
    """Return the Arrow files of one split.

    Raises:
        DataError: the folder is not one that `save_to_disk` writes.
    """
    state_file = folder / "state.json"
    if not state_file.is_file():
        raise DataError(
            f"{folder} has no state.json; expected a folder written by `save_to_disk` of Hugging "
            "Face datasets (for a folder of Arrow files use data=arrow)"
        )
    files = []
    entries = read_object(state_file).get("_data_files")
    for entry in entries if isinstance(entries, list) else []:
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(name, str) or Path(name).name != name:
            raise DataError(
                f"{state_file} is damaged: {str(entry)[:80]!r} is not the name of a file"
            )
        files.append(folder / name)
    if not files:
        raise DataError(f"{state_file} names no files")
    return files


def features_of(schema: Any) -> Features:
    """Return the features that the metadata of an Arrow schema describe; empty if there are none.

    `framework data convert` writes them, too.
    """
    metadata = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(metadata)["info"]["features"] if metadata else {}
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def feature_type(features: Features, column: str) -> str:
    """Return the type of a feature, such as "Image"; empty if it is not known."""
    feature = features.get(column)
    return str(feature.get("_type", "")) if isinstance(feature, dict) else ""


def class_names(features: Features, column: str) -> list[str]:
    """Return the names of the classes of a column; empty if it has none."""
    if feature_type(features, column) != "ClassLabel":
        return []
    names = features[column].get("names")
    if not isinstance(names, list) or len(names) < 2:
        return []
    return [str(name) for name in names]


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        DataError: the file is not JSON, or contains something else.
    """
    try:
        value = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object")
    return value
