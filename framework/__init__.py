"""Named parts, composed into experiments, trained on PyTorch. Importing this registers nothing."""

from importlib import import_module
from typing import TYPE_CHECKING

from .signals import guard_start

guard_start()  # before the other imports, which take a while

from .discovery import discover as discover  # noqa: E402
from .errors import FrameworkError as FrameworkError  # noqa: E402
from .kinds import (  # noqa: E402
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
from .schema import (  # noqa: E402
    Fraction as Fraction,
    NonNegativeFloat as NonNegativeFloat,
    NonNegativeInt as NonNegativeInt,
    PositiveFloat as PositiveFloat,
    PositiveInt as PositiveInt,
    Range as Range,
    Rate as Rate,
)

if TYPE_CHECKING:
    from .callback import Callback as Callback
    from .data import Data as Data, TensorSplit as TensorSplit
    from .logger import Logger as Logger
    from .metric import Metric as Metric
    from .pure import PureOptimizer as PureOptimizer
    from .scheduler import Schedule as Schedule
    from .state import Every as Every
    from .task import Step as Step, Task as Task
    from .trainer import Trainer as Trainer
    from .transform import Transform as Transform

_LATER = {  # these import torch, which a person who only lists parts need not wait for
    "Callback": "callback",
    "Data": "data",
    "Every": "state",
    "Logger": "logger",
    "Metric": "metric",
    "PureOptimizer": "pure",
    "Schedule": "scheduler",
    "Step": "task",
    "Task": "task",
    "TensorSplit": "data",
    "Trainer": "trainer",
    "Transform": "transform",
}


def __getattr__(name: str):
    if name not in _LATER:
        raise AttributeError(f"module 'framework' has no attribute {name!r}")
    return getattr(import_module(f".{_LATER[name]}", __name__), name)
