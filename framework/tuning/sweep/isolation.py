"""Isolation of trials: restores global state of the process after each of them."""

import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from framework.runtime import seeds


def set_path(path: list[str]) -> None:
    """Replace the entries of `sys.path`."""
    sys.path[:] = path


GetterAndSetter = tuple[Callable[[], Any], Callable[[Any], Any]]

GLOBAL_STATE: list[GetterAndSetter] = [
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, torch.set_default_device),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (os.getcwd, os.chdir),
    (lambda: list(sys.path), set_path),
]
CUDNN_FLAGS = ("enabled", "benchmark", "deterministic", "allow_tf32")


@contextmanager
def isolated() -> Iterator[None]:
    """Restore global state at the end, and free cached memory of the accelerator.

    Global state is: random generators, settings of torch, environment variables, the working
    folder, `sys.path`, warnings and loggers.
    """
    before = [get() for get, _ in GLOBAL_STATE]
    cudnn = {name: getattr(torch.backends.cudnn, name) for name in CUDNN_FLAGS}
    environment = dict(os.environ)
    loggers = [(logger, logger_state(logger)) for logger in all_loggers()]
    try:
        with seeds.undisturbed(), warnings.catch_warnings():
            yield
    finally:
        for (get, set_value), value in zip(GLOBAL_STATE, before, strict=True):
            if get() != value:
                set_value(value)
        for name, value in cudnn.items():
            if getattr(torch.backends.cudnn, name) != value:
                setattr(torch.backends.cudnn, name, value)
        if os.environ != environment:
            os.environ.clear()
            os.environ.update(environment)
        restore_loggers(loggers)
        if torch.cuda.is_initialized():
            gc.collect()  # tensors in reference cycles
            torch.cuda.empty_cache()


def all_loggers() -> list[logging.Logger]:
    """Return the root logger and all named ones."""
    named = logging.Logger.manager.loggerDict.values()
    return [logging.getLogger(), *(each for each in named if isinstance(each, logging.Logger))]


def logger_state(logger: logging.Logger) -> dict[str, Any]:
    """Return the attributes of a logger that `restore_loggers` restores."""
    return {
        "level": logger.level,
        "propagate": logger.propagate,
        "disabled": logger.disabled,
        "handlers": list(logger.handlers),
    }


def restore_loggers(loggers: list[tuple[logging.Logger, dict[str, Any]]]) -> None:
    """Restore the configuration of loggers; new ones lose their handlers and level."""
    logging.disable(logging.NOTSET)
    known = {logger for logger, _ in loggers}
    default = {"handlers": [], "level": logging.NOTSET}
    new = [(logger, default) for logger in all_loggers() if logger not in known]
    for logger, state in (*loggers, *new):
        for handler in list(logger.handlers):
            if handler not in state["handlers"]:
                logger.removeHandler(handler)
                handler.close()
        for name, value in state.items():
            setattr(logger, name, value)
    # The cache of effective levels; typeshed does not list the private method.
    logging.root.manager._clear_cache()  # type: ignore[attr-defined]
