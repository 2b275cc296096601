"""Named parts, composed into experiments, trained on PyTorch. Importing this registers nothing."""

from importlib import import_module
from typing import TYPE_CHECKING

from framework.system.signals import guard_start

guard_start()  # before the other imports, which take a while

from framework.registry.discovery import discover as discover  # noqa: E402
from framework.registry.kinds import (  # noqa: E402
    Activation as Activation,
    Block as Block,
    Dropout as Dropout,
    Head as Head,
    Initializer as Initializer,
    Loss as Loss,
    Norm as Norm,
    Shape as Shape,
    activations as activations,
    blocks as blocks,
    callbacks as callbacks,
    datasets as datasets,
    dropouts as dropouts,
    heads as heads,
    initializers as initializers,
    loggers as loggers,
    losses as losses,
    metrics as metrics,
    models as models,
    norms as norms,
    optimizers as optimizers,
    schedulers as schedulers,
    tasks as tasks,
    transforms as transforms,
)
from framework.registry.schema import (  # noqa: E402
    Fraction as Fraction,
    NonNegativeFloat as NonNegativeFloat,
    NonNegativeInt as NonNegativeInt,
    PositiveFloat as PositiveFloat,
    PositiveInt as PositiveInt,
    Range as Range,
    Rate as Rate,
)

from .errors import FrameworkError as FrameworkError  # noqa: E402

if TYPE_CHECKING:
    from framework.contracts.callback import Callback as Callback
    from framework.contracts.logger import Logger as Logger
    from framework.contracts.metric import Metric as Metric
    from framework.contracts.pure_optimizer import PureOptimizer as PureOptimizer
    from framework.contracts.schedule import Schedule as Schedule
    from framework.contracts.state import Every as Every
    from framework.contracts.task import Step as Step, Task as Task
    from framework.contracts.transform import Transform as Transform
    from framework.data.dataset import Data as Data, TensorSplit as TensorSplit
    from framework.training.trainer import Trainer as Trainer

_LATER = {  # these import torch, which a person who only lists parts need not wait for
    "Callback": "contracts.callback",
    "Data": "data.dataset",
    "Every": "contracts.state",
    "Logger": "contracts.logger",
    "Metric": "contracts.metric",
    "PureOptimizer": "contracts.pure_optimizer",
    "Schedule": "contracts.schedule",
    "Step": "contracts.task",
    "Task": "contracts.task",
    "TensorSplit": "data.dataset",
    "Trainer": "training.trainer",
    "Transform": "contracts.transform",
}


def __getattr__(name: str):
    if name not in _LATER:
        raise AttributeError(f"module 'framework' has no attribute {name!r}")
    return getattr(import_module(f".{_LATER[name]}", __name__), name)
