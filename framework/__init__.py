"""Named parts, composed into experiments, trained on PyTorch. Importing this registers nothing.

Plugins import from here and from `framework.contracts`; the other packages may change without notice.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .system.signals import guard_start

guard_start()  # before the other imports, which take a while

from .errors import (  # noqa: E402
    BuildError as BuildError,
    CheckpointError as CheckpointError,
    ConfigError as ConfigError,
    ContractError as ContractError,
    DataError as DataError,
    FrameworkError as FrameworkError,
    RunError as RunError,
    SettingError as SettingError,
    did_you_mean as did_you_mean,
    short as short,
)
from .registry.discovery import discover as discover  # noqa: E402
from .registry.kinds import (  # noqa: E402
    Activation as Activation,
    Augmentation as Augmentation,
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
from .registry.registry import Kind as Kind, Maker as Maker, Registry as Registry  # noqa: E402
from .registry.schema import (  # noqa: E402
    Fraction as Fraction,
    NonNegativeFloat as NonNegativeFloat,
    NonNegativeInt as NonNegativeInt,
    PartOf as PartOf,
    Pattern as Pattern,
    PositiveFloat as PositiveFloat,
    PositiveInt as PositiveInt,
    Range as Range,
    Rate as Rate,
)

if TYPE_CHECKING:
    from .contracts.callback import Callback as Callback, SavingCallback as SavingCallback
    from .contracts.context import Context as Context
    from .contracts.logger import Logger as Logger
    from .contracts.metric import Metric as Metric
    from .contracts.pure_optimizer import PureOptimizer as PureOptimizer
    from .contracts.schedule import Schedule as Schedule
    from .contracts.state import Every as Every, Stop as Stop
    from .contracts.task import Step as Step, Task as Task
    from .contracts.transform import Transform as Transform
    from .data.accumulation import count_steps as count_steps
    from .data.dataset import (
        Batch as Batch,
        Data as Data,
        LabelledSplit as LabelledSplit,
        Loader as Loader,
        RaggedSplit as RaggedSplit,
        Scale as Scale,
        Target as Target,
        TensorSplit as TensorSplit,
        WindowSplit as WindowSplit,
        check_read_again as check_read_again,
        class_names as class_names,
        is_in_memory as is_in_memory,
    )
    from .errors import paths as paths, terminal as terminal, user_code as user_code
    from .experiment.load import open_run as open_run
    from .runs import checkpoint as checkpoints, snapshot as snapshot  # noqa: F401
    from .runs.background_writer import Writer as Writer
    from .runtime import memory as memory, seeds as seeds, shapes as shapes
    from .runtime.clock import slow_data as slow_data
    from .runtime.gradients import gradient_numbers as gradient_numbers, numbers_of as numbers_of
    from .runtime.identity import ModelContents as ModelContents
    from .runtime.torch_internals import foreach as foreach
    from .runtime.torch_internals.non_finite import NonFiniteFlag as NonFiniteFlag
    from .system import files as files
    from .training.layer_table import model_undisturbed as model_undisturbed
    from .training.optimizer_state import (
        restore_optimizer as restore_optimizer,
        state_after_a_step as state_after_a_step,
    )
    from .training.trainer import Trainer as Trainer
    from .training.validation import check_initialized as check_initialized
    from .tuning.search.study import Judge as Judge, make_pruner as make_pruner

_NAMES = {  # imported at first use: most of these import torch, which a command that only lists parts does not need
    "Batch": "data.dataset",
    "Callback": "contracts.callback",
    "Context": "contracts.context",
    "Data": "data.dataset",
    "Every": "contracts.state",
    "Judge": "tuning.search.study",
    "LabelledSplit": "data.dataset",
    "Loader": "data.dataset",
    "Logger": "contracts.logger",
    "Metric": "contracts.metric",
    "ModelContents": "runtime.identity",
    "NonFiniteFlag": "runtime.torch_internals.non_finite",
    "PureOptimizer": "contracts.pure_optimizer",
    "RaggedSplit": "data.dataset",
    "SavingCallback": "contracts.callback",
    "Scale": "data.dataset",
    "Schedule": "contracts.schedule",
    "Step": "contracts.task",
    "Stop": "contracts.state",
    "Target": "data.dataset",
    "Task": "contracts.task",
    "TensorSplit": "data.dataset",
    "Trainer": "training.trainer",
    "Transform": "contracts.transform",
    "WindowSplit": "data.dataset",
    "Writer": "runs.background_writer",
    "check_initialized": "training.validation",
    "check_read_again": "data.dataset",
    "class_names": "data.dataset",
    "count_steps": "data.accumulation",
    "gradient_numbers": "runtime.gradients",
    "is_in_memory": "data.dataset",
    "make_pruner": "tuning.search.study",
    "numbers_of": "runtime.gradients",
    "open_run": "experiment.load",
    "restore_optimizer": "training.optimizer_state",
    "slow_data": "runtime.clock",
    "state_after_a_step": "training.optimizer_state",
    "model_undisturbed": "training.layer_table",
}
_MODULES = {
    "checkpoints": "runs.checkpoint",
    "files": "system.files",
    "foreach": "runtime.torch_internals.foreach",
    "memory": "runtime.memory",
    "paths": "errors.paths",
    "seeds": "runtime.seeds",
    "shapes": "runtime.shapes",
    "snapshot": "runs.snapshot",
    "terminal": "errors.terminal",
    "user_code": "errors.user_code",
}


def __getattr__(name: str):
    if name in _MODULES:
        return import_module(f".{_MODULES[name]}", __name__)
    if name in _NAMES:
        return getattr(import_module(f".{_NAMES[name]}", __name__), name)
    raise AttributeError(f"module 'framework' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES, *_MODULES})
