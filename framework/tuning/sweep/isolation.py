"""What a trial may change in the process without the next one feeling it."""

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

Pair = tuple[Callable[[], Any], Callable[[Any], Any]]

GLOBALS: list[Pair] = [  # how to read, and how to write it
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, torch.set_default_device),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (os.getcwd, os.chdir),
    (lambda: list(sys.path), lambda value: sys.path.__setitem__(slice(None), value)),
]
CUDNN = ("enabled", "benchmark", "deterministic", "allow_tf32")


@contextmanager
def isolated() -> Iterator[None]:
    """Take back, at the end, what was done to generators, torch's global settings, warnings and loggers, and give back
    the accelerator's memory.
    """
    before = [read() for read, _ in GLOBALS]
    cudnn = {name: getattr(torch.backends.cudnn, name) for name in CUDNN}
    environment, loggers = (
        dict(os.environ),
        [(logger, state_of(logger)) for logger in all_loggers()],
    )
    try:
        with seeds.undisturbed(), warnings.catch_warnings():
            yield
    finally:
        for (read, write), value in zip(GLOBALS, before, strict=True):
            if read() != value:
                write(value)
        for name, value in cudnn.items():
            if getattr(torch.backends.cudnn, name) != value:
                setattr(torch.backends.cudnn, name, value)
        if os.environ != environment:
            os.environ.clear()
            os.environ.update(environment)
        restore_loggers(loggers)
        if torch.cuda.is_initialized():
            gc.collect()  # tensors in cycles
            torch.cuda.empty_cache()


def all_loggers() -> list[logging.Logger]:
    named = logging.Logger.manager.loggerDict.values()
    return [logging.getLogger(), *(each for each in named if isinstance(each, logging.Logger))]


def state_of(logger: logging.Logger) -> dict[str, Any]:
    kept = ("level", "propagate", "disabled")
    return {name: getattr(logger, name) for name in kept} | {"handlers": list(logger.handlers)}


def restore_loggers(loggers: list[tuple[logging.Logger, dict[str, Any]]]) -> None:
    """Take back what was done to loggers, those that are new included."""
    logging.disable(logging.NOTSET)
    known = {logger for logger, _ in loggers}
    fresh = [
        (logger, {"handlers": [], "level": logging.NOTSET})
        for logger in all_loggers()
        if logger not in known
    ]
    for logger, state in (*loggers, *fresh):
        for handler in [each for each in logger.handlers if each not in state["handlers"]]:
            logger.removeHandler(handler)
            handler.close()
        for name, value in state.items():
            setattr(logger, name, value)
    logging.root.manager._clear_cache()  # type: ignore[attr-defined]  # levels are remembered
