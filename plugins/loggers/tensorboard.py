"""The TensorBoard logger: one event file in the run folder, written without TensorFlow.

TensorBoard is imported when a run opens. Each record is one unbuffered write: a run that ends by
SIGKILL keeps everything that it logged, and no thread competes with training.
"""

import io
import os
import re
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from framework import Logger, PositiveInt, files, loggers
from framework.contracts.alignment import tensors_in

from .text import warn_of_no_folder

STATUS_SUCCESS = 1  # of the HParams plugin
SESSION_START = 1  # SessionLog.START


@loggers.register("tensorboard", aliases=["tb"])
class TensorBoard(Logger):
    """Writes scalars, texts, histograms, images, graph and hyperparameters for TensorBoard.

    Args:
        graph: record the graph of the model.
        bins: bars of a histogram.
    """

    def __init__(self, graph: bool = True, bins: PositiveInt = 48):
        self.draw_graph = graph
        self.bins = bins
        self._file: EventFile | None = None
        self._step = 0
        self._resumed = False
        self._logged_tags: set[str] = set()

    def open(self, folder: Path | None, step: int, metrics: Sequence[str]) -> None:
        """Begin an event file; readers then discard the records of earlier files after `step`."""
        if folder is None:
            warn_of_no_folder("tensorboard")
            return
        self._resumed = any(Path(folder).glob("events.out.tfevents.*"))
        self._file = EventFile(Path(folder))
        self._step = step
        self._logged_tags = set()
        if self._resumed:
            self._file.discard_after(step)
        self._file.write(values=[layout_value(metrics)])

    def scalars(
        self, values: dict[str, float], *, step: int, epoch: int, wall_seconds: float
    ) -> None:
        """Record values at a step in one event (a seventh of the cost of one event each)."""
        self._step = step
        self._logged_tags.update(values)
        self._write(
            step, [{"tag": tag, "simple_value": float(value)} for tag, value in values.items()]
        )

    def text(self, tag: str, markdown: str, step: int = 0) -> None:
        """Record a text, shown as markdown."""
        value = tensor_value(tag, "text", "DT_STRING", [1], string_val=[markdown.encode()])
        self._write(step, [value])

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        """Record the distribution of the finite values, counted on their device."""
        if self._file is None:
            return
        bars = histogram_bars(values, self.bins)
        content = bars.numpy().tobytes()
        value = tensor_value(
            tag, "histograms", "DT_DOUBLE", list(bars.shape), tensor_content=content
        )
        self._write(step, [value])

    def images(self, tag: str, images: Tensor, step: int) -> None:
        """Record images (N, C, H, W) in [0, 1], C = 1 or 3, side by side under one tag."""
        if self._file is None:
            return
        height, width = images.shape[-2:]
        strings = [str(width).encode(), str(height).encode()]
        strings += map(encode_png, images.detach().cpu())
        value = tensor_value(tag, "images", "DT_STRING", [len(strings)], string_val=strings)
        self._write(step, [value])

    def graph(self, model: nn.Module, inputs: Tensor) -> None:
        """Record the graph for the first of `inputs`; if the model fails, record its error."""
        if self._file is None or not self.draw_graph:
            return
        try:
            graph = trace_graph(model, inputs[:1])
        except Exception as error:  # a model may fail in any way, and the run does not need a graph
            message = str(error).strip().split("\n")[0][:300]
            name = type(error).__name__
            self.text("graph", f"The model's graph cannot be drawn: `{name}: {message}`")
            return
        self._file.write(graph_def=graph)

    def hparams(self, settings: dict[str, Any], metrics: dict[str, float]) -> None:
        """Record the settings and the success of this run in the same file: no second run appears.

        The HParams page reads the metrics from the scalars of the run, so metrics without a scalar
        are logged now. The page merges the columns of all runs, so runs with different parts and
        settings can be compared.
        """
        if self._file is None:
            return
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

        new = {tag: value for tag, value in metrics.items() if tag not in self._logged_tags}
        if new and not self._resumed:  # an earlier file may contain them
            self.scalars(new, step=self._step, epoch=0, wall_seconds=0.0)
        start = HParamsPluginData()
        start.session_start_info.start_time_secs = self._file.opened
        for name, value in flatten_settings(settings).items():
            setattr(start.session_start_info.hparams[name], value_field(value), value)
        end = HParamsPluginData()
        end.session_end_info.status = STATUS_SUCCESS
        end.session_end_info.end_time_secs = time.time()
        for tag, data in (("session_start_info", start), ("session_end_info", end)):
            content = data.SerializeToString()
            self._write(0, [tensor_value(f"_hparams_/{tag}", "hparams", "DT_FLOAT", [0], content)])

    def close(self) -> None:
        """Close the file; further calls record nothing."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def _write(self, step: int, values: list[dict[str, Any]]) -> None:
        if self._file is not None and values:
            self._file.write(step, values)


class EventFile:
    """A file of TensorBoard events in TFRecord format.

    TensorBoard's own `RecordWriter` gives the same bytes, but its import takes 25 to 100 ms (it
    loads TensorBoard's replacement of TensorFlow), and every run would start later by that time.

    Attributes:
        opened: seconds since 1970.
    """

    def __init__(self, folder: Path):
        from tensorboard.compat.proto.event_pb2 import Event

        self._event = Event
        self.opened = time.time()
        files.make_folder(folder)
        # TensorBoard reads the files of a run in the order of their names. With nanoseconds, a run
        # that is resumed within a second keeps its place.
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        source = f"{socket.gethostname()}.{os.getpid()}"
        name = f"events.out.tfevents.{seconds:010d}.{nanoseconds:09d}.{source}"
        self._file = files.AppendFile(folder, name, "x")
        try:
            self._append(Event(wall_time=self.opened, file_version="brain.Event:2"))
        except BaseException:
            self._file.close()
            self._file.path.unlink(missing_ok=True)  # an event file without a record
            raise

    def discard_after(self, step: int) -> None:
        """Make readers discard the records of earlier files after `step`, for a resumed run."""
        event = self._event(wall_time=time.time(), step=step + 1)
        event.session_log.status = SESSION_START
        self._append(event)

    def write(
        self, step: int = 0, values: list[dict[str, Any]] | None = None, **content: Any
    ) -> None:
        """Append an event.

        Args:
            step: of the event.
            values: its summary values, see `tensor_value`.
            content: other fields of the event.
        """
        if values:
            content["summary"] = {"value": values}
        self._append(self._event(wall_time=time.time(), step=step, **content))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, event: Any) -> None:
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        record = length + masked_crc32c(length) + data + masked_crc32c(data)
        self._file.append(record)  # one write: readers see complete records, also after a crash


def crc32c_table() -> list[int]:
    """Return the CRC-32C of each byte."""
    table = list(range(256))
    for _ in range(8):
        table = [crc >> 1 ^ (crc & 1) * 0x82F63B78 for crc in table]
    return table


CRC32C = crc32c_table()


def masked_crc32c(data: bytes) -> bytes:
    """Return the checksum of a TFRecord: CRC-32C (RFC 3720, B.4), rotated, plus a constant."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC32C[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def tensor_value(
    tag: str, plugin: str, dtype: str, shape: list[int], content: bytes = b"", **tensor: Any
) -> dict[str, Any]:
    """Return a summary value for a plugin of TensorBoard: a tensor with the plugin's name."""
    plugin_data = {"plugin_name": plugin, "content": content}
    dimensions = [{"size": size} for size in shape]
    return {
        "tag": tag,
        "metadata": {"plugin_data": plugin_data},
        "tensor": {"dtype": dtype, "tensor_shape": {"dim": dimensions}, **tensor},
    }


def layout_value(metrics: Sequence[str]) -> dict[str, Any]:
    """Return the layout of the Custom Scalars page: training and validation in one chart."""
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    charts = []
    for name in dict.fromkeys(["loss", *metrics]):
        tags = [f"^train/{re.escape(name)}$", f"^val/{re.escape(name)}$"]
        charts.append({"title": name, "multiline": {"tag": tags}})
    layout = Layout(category=[{"title": "training and validation", "chart": charts}])
    content = [layout.SerializeToString()]
    return tensor_value(
        "custom_scalars__config__", "custom_scalars", "DT_STRING", [], string_val=content
    )


def histogram_bars(values: Tensor, bins: int) -> Tensor:
    """Count the finite values in bars of equal width.

    Returns:
        (left edge, right edge, count) of each bar: shape (bins, 3), float64 on the CPU. One bar if
        all values are equal, none without a finite value.
    """
    values = values.detach().flatten()
    values = values[values.isfinite()].float()
    if values.numel() == 0:
        return torch.zeros(0, 3, dtype=torch.float64)
    smallest, largest = values.aminmax()
    low = smallest.item()
    high = largest.item()
    if low == high:
        return torch.tensor([[low, high, values.numel()]], dtype=torch.float64)
    bars = ((values - low) * (bins / (high - low))).long().clamp_(0, bins - 1)
    # bincount, because histc has no deterministic implementation on CUDA
    counts = bars.bincount(minlength=bins).double().cpu()
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    return torch.stack([edges[:-1], edges[1:], counts], dim=1)


def encode_png(image: Tensor) -> bytes:
    """Encode an image (1 or 3, H, W) in [0, 1] as a PNG with 8 bits per channel."""
    from PIL import Image  # TensorBoard requires Pillow

    pixels = (image.float().nan_to_num(0).clamp(0, 1) * 255).round().byte()
    channels_last = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(channels_last.numpy()).save(buffer, format="png")
    return buffer.getvalue()


def trace_graph(model: nn.Module, inputs: Tensor) -> bytes:
    """Return the graph of a model as a serialized GraphDef.

    One forward pass in eval mode records it and leaves the model unchanged.
    """
    from tensorboard.compat.proto.graph_pb2 import GraphDef

    from framework import model_undisturbed

    recorder = GraphRecorder(model, inputs)
    hooks: list[RemovableHandle] = []
    for name, module in model.named_modules():
        hooks += recorder.add_hooks(name, module)
    try:
        with model_undisturbed(model), torch.no_grad(), recorder:
            outputs = model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for number, tensor in enumerate(tensors_in(outputs)):
        recorder.add_node(f"output_{number}" if number else "output", "output", [tensor], [])
    return GraphDef(node=recorder.nodes, versions={"producer": 22}).SerializeToString()


class GraphRecorder(TorchFunctionMode):
    """Records each call of a torch function as a node, named after the calling module."""

    def __init__(self, model: nn.Module, inputs: Tensor):
        super().__init__()
        named_tensors = [*model.named_parameters(), *model.named_buffers()]
        self.weight_names = {tensor: name for name, tensor in named_tensors}
        self.nodes: list[dict[str, Any]] = []
        self.scopes = [""]  # of the modules whose forward passes run, the innermost last
        self.scope_of: dict[str, str] = {}
        self.producers: dict[Tensor, str] = {}  # the node that returns a tensor
        self.calls: Counter[str] = Counter()
        self.add_node("input", "input", [], [inputs])

    def add_hooks(self, name: str, module: nn.Module) -> list[RemovableHandle]:
        """Make the forward pass of a module use its scope, such as "features/0 (Conv2d)/"."""
        parent, _, leaf = name.rpartition(".")
        label = leaf if isinstance(module, nn.Sequential) else f"{leaf} ({type(module).__name__})"
        scope = f"{self.scope_of.get(parent, '')}{label}/" if name else ""
        self.scope_of[name] = scope

        def enter(module: nn.Module, inputs: Any) -> None:
            self.scopes.append(scope)

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            self.scopes.pop()

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        outputs = tensors_in(output)
        if outputs:
            operation = function.__name__.strip("_")
            name = self.unique_name(self.scopes[-1] + operation)
            self.add_node(name, operation, tensors_in((args, kwargs)), outputs)
        return output

    def unique_name(self, name: str) -> str:
        """Return "linear" for the first call with this name, then "linear_2", "linear_3"."""
        self.calls[name] += 1
        return name if self.calls[name] == 1 else f"{name}_{self.calls[name]}"

    def add_node(
        self, name: str, operation: str, inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        """Add a node with edges from its inputs; a weight becomes a node at its first use."""
        for tensor in inputs:
            if tensor in self.weight_names and tensor not in self.producers:
                leaf = self.weight_names[tensor].rpartition(".")[2]
                self.add_node(self.unique_name(self.scopes[-1] + leaf), "parameter", [], [tensor])
        edges = [self.producers[tensor] for tensor in inputs if tensor in self.producers]
        node: dict[str, Any] = {"name": name, "op": operation, "input": edges}
        shapes = []
        for tensor in outputs:
            dimensions = [{"size": size} for size in tensor.shape]
            shapes.append({"dim": dimensions})
            self.producers[tensor] = name
        if shapes:
            node["attr"] = {"_output_shapes": {"list": {"shape": shapes}}}
        self.nodes.append(node)


def flatten_settings(
    settings: dict[str, Any], prefix: str = ""
) -> dict[str, bool | int | float | str]:
    """Return nested settings as {"optimizer": "adamw", "optimizer.lr": 1e-3}.

    Lists become texts; settings that are None are left out.
    """
    flat: dict[str, bool | int | float | str] = {}
    for key, value in settings.items():
        name = prefix.rstrip(".") if prefix and key == "name" else f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= flatten_settings(value, f"{name}.")
        elif value is not None:
            flat[name] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat


def value_field(value: bool | int | float | str) -> str:
    """Return the field of a hyperparameter in TensorBoard's messages for a value of this type."""
    if isinstance(value, bool):
        return "bool_value"
    return "number_value" if isinstance(value, int | float) else "string_value"
