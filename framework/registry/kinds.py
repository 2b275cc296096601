"""The kinds of parts, and the annotations by which a part asks for parts of another kind.

    class Residual(nn.Module):
        def __init__(
            self, in_shape: Shape, activation: Activation = "relu", norm: Norm | None = None
        ): ...

A parameter with such an annotation receives a maker: each call of `activation()` builds a new
activation. The default is the name of a registered part, or None.
"""

from collections.abc import Callable
from typing import Annotated, Any

from .annotations import PartOf
from .registry import Kind, Registry

Shape = tuple[int, ...]
"""The shape of a sample, without the batch axis: (features,), (channels, height, width), ..."""

MODULE = "torch.nn.modules.module.Module"

activations = Registry(
    Kind("activation", base=MODULE, doc="elementwise non-linearity (or a gate over the last axis)")
)
initializers = Registry(
    Kind("initializer", given=("tensor",), needs=("tensor",), doc="fills a weight tensor in place")
)
norms = Registry(
    Kind(
        "norm",
        given=("in_shape",),
        needs=("in_shape",),
        base=MODULE,
        doc="normalization: of features (D,), or of (C, L) or (C, H, W)",
    )
)
dropouts = Registry(
    Kind(
        "dropout",
        given=("p",),
        needs=("p",),
        base=MODULE,
        doc="random zeroing with probability p, in training only",
    )
)
blocks = Registry(
    Kind(
        "block",
        given=("in_shape",),
        base=MODULE,
        doc="a layer or group of layers; its output shape is measured",
    )
)
heads = Registry(
    Kind(
        "head",
        given=("in_shape", "out_shape"),
        needs=("in_shape", "out_shape"),
        base=MODULE,
        doc="from features to the task's outputs",
    )
)
models = Registry(
    Kind(
        "model",
        given=("in_shape", "out_shape", "columns"),
        needs=("in_shape", "out_shape"),
        base=MODULE,
        doc="a whole network",
    )
)
losses = Registry(Kind("loss", base=MODULE, doc="mean loss of (outputs, targets)"))
tasks = Registry(
    Kind("task", base="framework.contracts.task.Task", doc="the computation of one training step")
)
metrics = Registry(
    Kind(
        "metric",
        base="framework.contracts.metric.Metric",
        many=True,
        doc="a measure computed from sums over batches",
    )
)
optimizers = Registry(
    Kind(
        "optimizer",
        given=("params",),
        needs=("params",),
        base="torch.optim.optimizer.Optimizer",
        doc="the update rule",
        builder="framework.contracts.optimizer:build_optimizer",
    )
)
schedulers = Registry(
    Kind(
        "scheduler",
        given=("total_steps",),
        needs=("total_steps",),
        doc="factor on the learning rate, a function of the step",
    )
)
transforms = Registry(
    Kind(
        "transform",
        given=("in_shape", "out_shape"),
        base="framework.contracts.transform.Transform",
        many=True,
        doc="changes training batches",
    )
)
datasets = Registry(
    Kind("data", base="framework.data.dataset.Data", doc="a data set with its splits")
)
callbacks = Registry(
    Kind(
        "callback",
        base="framework.contracts.callback.Callback",
        many=True,
        doc="reacts to the events of training",
    )
)
loggers = Registry(
    Kind(
        "logger",
        base="framework.contracts.logger.Logger",
        many=True,
        doc="writes scalars, texts and images",
    )
)
strategies = Registry(
    Kind(
        "strategy",
        base="framework.contracts.strategy.Strategy",
        doc="how the processes of a run share its work",
    )
)
exporters = Registry(
    Kind(
        "exporter",
        base="framework.contracts.exporter.Exporter",
        doc="writes a trained model as files, for `framework export`",
        composed=False,
    )
)

Activation = Annotated[Callable[..., Any], PartOf("activation")]
Initializer = Annotated[Callable[..., Any], PartOf("initializer")]
Norm = Annotated[Callable[..., Any], PartOf("norm")]
Dropout = Annotated[Callable[..., Any], PartOf("dropout")]
Block = Annotated[Callable[..., Any], PartOf("block")]
Head = Annotated[Callable[..., Any], PartOf("head")]
Loss = Annotated[Callable[..., Any], PartOf("loss")]
Augmentation = Annotated[Callable[..., Any], PartOf("transform")]
