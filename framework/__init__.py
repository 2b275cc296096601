"""Named parts, composed into experiments, trained on PyTorch.

`__all__` is the public API, together with `framework.contracts`. Everything else may change without
notice. Importing the package registers no parts: `discover` does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .system.signals import guard_start

guard_start()  # before the other imports, which take a while

from .errors import (  # noqa: E402  # after guard_start
    BuildError,
    CheckpointError,
    ConfigError,
    ContractError,
    DataError,
    FrameworkError,
    RunError,
    SettingError,
    did_you_mean,
    short,
)
from .registry.annotations import (  # noqa: E402  # after guard_start
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PartOf,
    Pattern,
    PositiveFloat,
    PositiveInt,
    Range,
    Rate,
)
from .registry.discovery import discover  # noqa: E402  # after guard_start
from .registry.kinds import (  # noqa: E402  # after guard_start
    Activation,
    Augmentation,
    Block,
    Dropout,
    Head,
    Initializer,
    Loss,
    Norm,
    Shape,
    activations,
    blocks,
    callbacks,
    datasets,
    dropouts,
    exporters,
    heads,
    initializers,
    loggers,
    losses,
    metrics,
    models,
    norms,
    optimizers,
    schedulers,
    strategies,
    tasks,
    transforms,
)
from .registry.registry import Kind, Maker, Registry  # noqa: E402  # after guard_start

if TYPE_CHECKING:
    from .contracts.callback import Callback, SavingCallback
    from .contracts.context import Context
    from .contracts.exporter import ExportedModel, Exporter
    from .contracts.logger import Logger
    from .contracts.metric import Metric
    from .contracts.pure_optimizer import PureOptimizer
    from .contracts.schedule import Schedule
    from .contracts.state import Every, Stop
    from .contracts.strategy import Strategy
    from .contracts.task import Step, Task
    from .contracts.transform import Transform
    from .data.dataset import (
        Batch,
        Data,
        GatheredSplit,
        LabelledSplit,
        Loader,
        RaggedSplit,
        Scale,
        Shown,
        Target,
        TensorSplit,
        WindowSplit,
    )
    from .data.input_rows import InputFile, InputRows
    from .data.preparation import Axis, Preparation, RawInput, UnchangedInputs
    from .experiment.trained.load import open_run as open_run  # the former name of `load`
    from .experiment.trained.trained_model import load
    from .training.trainer import Trainer

if TYPE_CHECKING:  # not public: for the built-in plugins only
    from .data.accumulation import Batches as Batches, count_steps as count_steps
    from .data.batch_slice import whole_batches as whole_batches
    from .data.chosen_samples import (
        read_first_samples as read_first_samples,
        read_spread_samples as read_spread_samples,
    )
    from .data.dataset import (
        check_has_validation as check_has_validation,
        check_read_again as check_read_again,
        class_names as class_names,
        is_in_memory as is_in_memory,
        names_or_numbers as names_or_numbers,
    )
    from .errors import paths as paths, terminal as terminal, user_code as user_code
    from .experiment.evaluation import (
        within_fit as evaluation,  # noqa: F401  # in _MODULES
    )
    from .runs import (
        checkpoint as checkpoints,  # noqa: F401  # in _MODULES
        snapshot as snapshot,
    )
    from .runs.background_writer import Writer as Writer
    from .runs.file_names import NON_FINITE as NON_FINITE
    from .runs.sharded_writer import ShardedWriter as ShardedWriter
    from .runtime import (
        distributed_checkpoint as distributed_checkpoint,
        dtensors as dtensors,
        memory as memory,
        processes as processes,
        seeds as seeds,
        shapes as shapes,
    )
    from .runtime.batch import (
        count_rows as count_rows,
        join_rows as join_rows,
        map_rows as map_rows,
        move_batch as move_batch,
        select_rows as select_rows,
    )
    from .runtime.clock import seconds_of_waiting as seconds_of_waiting, slow_data as slow_data
    from .runtime.display import (
        drawing as drawing,
        markdown as markdown,
        notebook as notebook,
        plot as plot,
    )
    from .runtime.gradients import gradient_numbers as gradient_numbers, numbers_of as numbers_of
    from .runtime.identity import ModelContents as ModelContents
    from .runtime.pairwise import pairwise_sum as pairwise_sum
    from .runtime.torch_internals import foreach as foreach, pytree as pytree
    from .runtime.torch_internals.non_finite import NonFiniteFlag as NonFiniteFlag
    from .runtime.torch_internals.tensor_version import version_of as version_of
    from .runtime.torch_internals.views import without_view as without_view
    from .system import files as files
    from .training.layer_table import (
        model_undisturbed as model_undisturbed,
        read_layers as read_layers,
    )
    from .training.optimizer_state import (
        restore_optimizer as restore_optimizer,
        state_after_a_step as state_after_a_step,
    )
    from .training.validation import check_initialized as check_initialized
    from .tuning.search.study import Judge as Judge, make_pruner as make_pruner

__all__ = [
    "Activation",
    "Augmentation",
    "Axis",
    "Batch",
    "Block",
    "BuildError",
    "Callback",
    "CheckpointError",
    "ConfigError",
    "Context",
    "ContractError",
    "Data",
    "DataError",
    "Dropout",
    "Every",
    "ExportedModel",
    "Exporter",
    "Fraction",
    "FrameworkError",
    "GatheredSplit",
    "Head",
    "Initializer",
    "InputFile",
    "InputRows",
    "Kind",
    "LabelledSplit",
    "Loader",
    "Logger",
    "Loss",
    "Maker",
    "Metric",
    "NonNegativeFloat",
    "NonNegativeInt",
    "Norm",
    "PartOf",
    "Pattern",
    "PositiveFloat",
    "PositiveInt",
    "Preparation",
    "PureOptimizer",
    "RaggedSplit",
    "Range",
    "Rate",
    "RawInput",
    "Registry",
    "RunError",
    "SavingCallback",
    "Scale",
    "Schedule",
    "SettingError",
    "Shape",
    "Shown",
    "Step",
    "Stop",
    "Strategy",
    "Target",
    "Task",
    "TensorSplit",
    "Trainer",
    "Transform",
    "UnchangedInputs",
    "WindowSplit",
    "activations",
    "blocks",
    "callbacks",
    "datasets",
    "did_you_mean",
    "discover",
    "dropouts",
    "exporters",
    "heads",
    "initializers",
    "load",
    "loggers",
    "losses",
    "metrics",
    "models",
    "norms",
    "optimizers",
    "schedulers",
    "short",
    "strategies",
    "tasks",
    "transforms",
]

# Imported at first use: most of these modules import torch, which `framework list` does not need.
_NAMES = {
    "Axis": "data.preparation",
    "Batch": "data.dataset",
    "Callback": "contracts.callback",
    "Context": "contracts.context",
    "Data": "data.dataset",
    "Every": "contracts.state",
    "ExportedModel": "contracts.exporter",
    "Exporter": "contracts.exporter",
    "GatheredSplit": "data.dataset",
    "InputFile": "data.input_rows",
    "InputRows": "data.input_rows",
    "LabelledSplit": "data.dataset",
    "Loader": "data.dataset",
    "Logger": "contracts.logger",
    "Metric": "contracts.metric",
    "Preparation": "data.preparation",
    "PureOptimizer": "contracts.pure_optimizer",
    "RaggedSplit": "data.dataset",
    "RawInput": "data.preparation",
    "SavingCallback": "contracts.callback",
    "Scale": "data.dataset",
    "Schedule": "contracts.schedule",
    "Shown": "data.dataset",
    "Step": "contracts.task",
    "Stop": "contracts.state",
    "Strategy": "contracts.strategy",
    "Target": "data.dataset",
    "Task": "contracts.task",
    "TensorSplit": "data.dataset",
    "Trainer": "training.trainer",
    "Transform": "contracts.transform",
    "UnchangedInputs": "data.preparation",
    "WindowSplit": "data.dataset",
    "load": "experiment.trained.trained_model",
    # Not public: for the built-in plugins only.
    "Batches": "data.accumulation",
    "Judge": "tuning.search.study",
    "ModelContents": "runtime.identity",
    "NON_FINITE": "runs.file_names",
    "NonFiniteFlag": "runtime.torch_internals.non_finite",
    "ShardedWriter": "runs.sharded_writer",
    "Writer": "runs.background_writer",
    "check_has_validation": "data.dataset",
    "check_initialized": "training.validation",
    "check_read_again": "data.dataset",
    "class_names": "data.dataset",
    "count_rows": "runtime.batch",
    "count_steps": "data.accumulation",
    "gradient_numbers": "runtime.gradients",
    "is_in_memory": "data.dataset",
    "join_rows": "runtime.batch",
    "make_pruner": "tuning.search.study",
    "map_rows": "runtime.batch",
    "model_undisturbed": "training.layer_table",
    "move_batch": "runtime.batch",
    "names_or_numbers": "data.dataset",
    "numbers_of": "runtime.gradients",
    "open_run": "experiment.trained.load",
    "pairwise_sum": "runtime.pairwise",
    "read_first_samples": "data.chosen_samples",
    "read_layers": "training.layer_table",
    "read_spread_samples": "data.chosen_samples",
    "restore_optimizer": "training.optimizer_state",
    "seconds_of_waiting": "runtime.clock",
    "select_rows": "runtime.batch",
    "slow_data": "runtime.clock",
    "state_after_a_step": "training.optimizer_state",
    "version_of": "runtime.torch_internals.tensor_version",
    "whole_batches": "data.batch_slice",
    "without_view": "runtime.torch_internals.views",
}
_MODULES = {  # not public: for the built-in plugins only
    "checkpoints": "runs.checkpoint",
    "distributed_checkpoint": "runtime.distributed_checkpoint",
    "drawing": "runtime.display.drawing",
    "dtensors": "runtime.dtensors",
    "evaluation": "experiment.evaluation.within_fit",
    "files": "system.files",
    "foreach": "runtime.torch_internals.foreach",
    "markdown": "runtime.display.markdown",
    "memory": "runtime.memory",
    "notebook": "runtime.display.notebook",
    "paths": "errors.paths",
    "plot": "runtime.display.plot",
    "processes": "runtime.processes",
    "pytree": "runtime.torch_internals.pytree",
    "seeds": "runtime.seeds",
    "shapes": "runtime.shapes",
    "snapshot": "runs.snapshot",
    "terminal": "errors.terminal",
    "user_code": "errors.user_code",
}


if not TYPE_CHECKING:  # a type checker would accept every name

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return import_module(f".{_MODULES[name]}", __name__)
        if name in _NAMES:
            return getattr(import_module(f".{_NAMES[name]}", __name__), name)
        raise AttributeError(f"module 'framework' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
