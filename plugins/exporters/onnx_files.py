"""Export to ONNX, by torch's exporter that uses torch.export (`dynamo=True`)."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch

from framework import BuildError, ExportedModel, Exporter, Range, exporters, user_code

MOST_IN_ONE_FILE = 2**30
"""Bytes of weights above which they get a file of their own: protobuf is limited to 2 GiB."""


@exporters.register("onnx")
class Onnx(Exporter):
    """A graph for ONNX Runtime and other engines: model.onnx.

    Needs the packages onnx, onnxscript and onnxruntime, which verifies the file
    (pip install 'framework[export]').

    Args:
        opset: version of the operator set; null: that of torch.
    """

    packages = ("onnx", "onnxscript", "onnxruntime")
    extra = "export"

    def __init__(self, opset: Annotated[int, Range("[18, 30]")] | None = None):
        self.opset = opset

    def write(self, model: ExportedModel, folder: Path) -> None:
        program = model.program()
        size = sum(each.nbytes for each in program.state_dict.values())
        try:
            with quiet():
                converted = torch.onnx.export(
                    program,
                    model.samples,
                    input_names=list(model.raw),
                    output_names=list(model.outputs),
                    opset_version=self.opset,
                    dynamo=True,
                    verbose=False,
                )
                assert converted is not None
                large = size > MOST_IN_ONE_FILE
                converted.save(folder / "model.onnx", external_data=large)
        except OSError:  # of the disk
            raise
        except Exception as error:
            reason = user_code.text_of(error)
            raise BuildError(f"--to onnx: torch cannot convert {model.name}: {reason}") from error

    def load(self, model: ExportedModel, folder: Path) -> Any:
        import onnxruntime

        providers = ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=providers)

        def run(*raw: torch.Tensor) -> list[torch.Tensor]:
            feeds = {name: each.numpy() for name, each in zip(model.raw, raw, strict=True)}
            outputs = session.run(list(model.outputs), feeds)
            return [torch.from_numpy(each) for each in outputs]

        return run

    def example(self, model: ExportedModel) -> tuple[list[str], str]:
        lines = ['session = onnxruntime.InferenceSession(here / "model.onnx")']
        lines.append("outputs = session.run(list(about['outputs']), raw)")
        return ["import onnxruntime"], "\n".join(lines)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the log lines of the exporter about its own implementation."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
