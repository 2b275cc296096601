"""Dropouts: zero elements at random in training, keep the mean, and do nothing in evaluation.

`p` is the probability of zeroing.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from framework import dropouts

dropouts.register("dropout", nn.Dropout, hide=["inplace"])
dropouts.register("alpha", nn.AlphaDropout, aliases=["alpha_dropout"], hide=["inplace"])
dropouts.register(
    "feature_alpha", nn.FeatureAlphaDropout, aliases=["feature_alpha_dropout"], hide=["inplace"]
)


@dropouts.register("feature", aliases=["dropout1d", "dropout2d", "spatial"])
class FeatureDropout(nn.Dropout):
    """Zero whole channels of (N, C, ...), with one random draw for each (n, c).

    On features (N, D) this is plain dropout (Tompson et al. 2015, arXiv:1411.4280, section 3.2).
    """

    def __init__(self, p: float):
        super().__init__(p)

    def forward(self, x: Tensor) -> Tensor:
        return shared_mask(x, self.p, axes=2) if self.training else x


@dropouts.register("drop_path", aliases=["stochastic_depth"])
class DropPath(nn.Dropout):
    """Zero whole samples, which skips a residual branch (stochastic depth).

    The other samples are multiplied by 1/(1 - p) in training; the paper multiplies all by 1 - p in
    evaluation instead (Huang et al. 2016, arXiv:1603.09382, section 3).
    """

    def __init__(self, p: float):
        super().__init__(p)

    def forward(self, x: Tensor) -> Tensor:
        return shared_mask(x, self.p, axes=1) if self.training else x


def shared_mask(x: Tensor, p: float, axes: int) -> Tensor:
    """Return x times 0 or 1/(1 - p), drawn once for each index of the first `axes` axes."""
    shape = x.shape[:axes] + (1,) * (x.ndim - axes)
    return x * F.dropout(torch.ones(shape, dtype=x.dtype, device=x.device), p)
