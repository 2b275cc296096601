"""Where tensors are."""

import torch

from framework.errors import SettingError


def find_device(name: str) -> torch.device:
    """Return the device of that name; auto is cuda, else mps, else cpu. Raises SettingError when it is not there."""
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingError(
            f"device should be auto, cpu, cuda, cuda:N or mps, not {name!r}"
        ) from error
    there = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    if (device.index or 0) >= there.get(device.type, 0):
        raise SettingError(
            f"device {name} is not on this machine (it has {there['cuda']} CUDA devices)"
        )
    return device
