"""Deterministic algorithms."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Run with deterministic algorithms only, if wanted; afterwards torch is set as before."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    if wanted:
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # cuBLAS asks for one fixed workspace
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        if wanted:  # torch imports its compiler here, which takes a second
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
