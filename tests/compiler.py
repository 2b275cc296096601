"""A mark for tests that need torch's compiler."""

from pathlib import Path

import pytest
import torch

needs_compiler = pytest.mark.skipif(
    " " in str(Path(torch.__file__).parent),
    reason="torch's compiler does not work from a folder with a space in its name",
)
