"""The device on which a model runs."""

import torch

from framework.errors import SettingError


def find_device(name: str) -> torch.device:
    """Return a device by its name.

    Args:
        name: cpu, cuda, cuda:N or mps; auto is CUDA if it is available, else MPS, else the CPU.

    Raises:
        SettingError: the name is unknown, or this machine has no such device.
    """
    if name == "auto":
        return fastest_device()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingError(
            f"expected device auto, cpu, cuda, cuda:N or mps, got {name!r}"
        ) from error
    cuda_devices = torch.cuda.device_count()
    available = {"cpu": 1, "cuda": cuda_devices, "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= available.get(device.type, 0):
        raise SettingError(
            f"device {name} is not available: this machine has {cuda_devices} CUDA devices"
        )
    return device


def fastest_device() -> torch.device:
    """Return the CUDA device, else the MPS device, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")
