"""The kinds of parts, a line each, and the annotations by which a part asks for parts of another kind.

    class Residual(nn.Module):
        def __init__(self, in_shape: Shape, activation: Activation = "relu", norm: Norm | None = None): ...

A parameter annotated so receives a maker: `activation()` builds a fresh one. Its default is a name, or None for none.
"""

from collections.abc import Callable
from typing import Annotated, Any

from .registry import Kind, Registry
from .schema import PartOf

Shape = tuple[int, ...]
"""A sample's shape without the batch axis: (features,), (channels, height, width), (time, features)."""

MODULE = "torch.nn.modules.module.Module"


def registry(
    name: str,
    given: str = "",
    needs: str = "",
    base: str | None = None,
    many: bool = False,
    doc: str = "",
):
    return Registry(Kind(name, tuple(given.split()), tuple(needs.split()), base, many, doc))


activations = registry(
    "activation", base=MODULE, doc="elementwise non-linearity (or a gate over the last axis)"
)
initializers = registry("initializer", "tensor", "tensor", doc="fills a weight tensor in place")
norms = registry(
    "norm",
    "in_shape",
    "in_shape",
    MODULE,
    doc="normalisation: of features (D,), or of (C, L) or (C, H, W)",
)
dropouts = registry(
    "dropout", "p", "p", MODULE, doc="random zeroing with probability p, in training only"
)
blocks = registry(
    "block", "in_shape", base=MODULE, doc="a layer or group of layers; its output shape is measured"
)
heads = registry(
    "head",
    "in_shape out_shape",
    "in_shape out_shape",
    MODULE,
    doc="from features to the task's outputs",
)
models = registry(
    "model", "in_shape out_shape columns", "in_shape out_shape", MODULE, doc="a whole network"
)
losses = registry("loss", base=MODULE, doc="mean loss of (outputs, targets)")
tasks = registry("task", base="framework.contracts.task.Task", doc="what one training step means")
metrics = registry(
    "metric",
    base="framework.contracts.metric.Metric",
    many=True,
    doc="a measure held as sums that add over batches",
)
optimizers = registry(
    "optimizer", "params", "params", "torch.optim.optimizer.Optimizer", doc="the update rule"
)
schedulers = registry(
    "scheduler",
    "total_steps",
    "total_steps",
    doc="factor on the learning rate, a function of the step",
)
transforms = registry(
    "transform",
    "in_shape out_shape",
    base="framework.contracts.transform.Transform",
    many=True,
    doc="changes training batches",
)
datasets = registry("data", base="framework.data.dataset.Data", doc="a data set with its splits")
callbacks = registry(
    "callback",
    base="framework.contracts.callback.Callback",
    many=True,
    doc="listens to the events of training",
)
loggers = registry(
    "logger",
    base="framework.contracts.logger.Logger",
    many=True,
    doc="where scalars, texts and pictures go",
)

Activation = Annotated[Callable[..., Any], PartOf("activation")]
Initializer = Annotated[Callable[..., Any], PartOf("initializer")]
Norm = Annotated[Callable[..., Any], PartOf("norm")]
Dropout = Annotated[Callable[..., Any], PartOf("dropout")]
Block = Annotated[Callable[..., Any], PartOf("block")]
Head = Annotated[Callable[..., Any], PartOf("head")]
Loss = Annotated[Callable[..., Any], PartOf("loss")]
Augmentation = Annotated[Callable[..., Any], PartOf("transform")]
