"""Batch norms and instance norms."""

from torch import nn
from torch.nn.modules import batchnorm

PUBLIC = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
BASE: type[nn.Module] | None = getattr(batchnorm, "_NormBase", None)


def has_statistics(module: nn.Module) -> bool:
    """Return whether a module is a batch norm or an instance norm.

    Gain: it finds the classes that a library derives from torch's private base class. Without that
    class it finds the public classes and their subclasses.
    """
    return isinstance(module, PUBLIC if BASE is None else BASE)
