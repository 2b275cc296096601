"""The TensorBoard logger: one event file in the run folder, written without TensorFlow.

TensorBoard is imported when a run opens, not before. Records go to the file one by one and unbuffered, so that a run
that dies (even by SIGKILL) has kept all it logged, and no thread competes with the training.
"""

import os
import re
import socket
import struct
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from framework import Logger, PositiveInt, files, loggers


@loggers.register("tensorboard", aliases=["tb"])
class TensorBoard(Logger):
    """Writes scalars, texts, histograms, pictures, the graph and the hyperparameters for TensorBoard."""

    def __init__(self, graph: bool = True, bins: PositiveInt = 48):
        """Prepare; the file is made in `open`.

        Args:
            graph: record the graph of the model.
            bins: bars of a histogram.
        """
        self.draw_graph, self.bins = graph, bins
        self._file: EventFile | None = None
        self._step, self._goes_on = 0, False
        self._logged: set[str] = set()

    def open(self, folder: Path | None, step: int, metrics: Sequence[str]) -> None:
        """Begin an event file in `folder`; what earlier files hold after `step` is marked as void."""
        if folder is None:
            warnings.warn(
                "the run has no folder, so the tensorboard logger records nothing", stacklevel=2
            )
            return
        before = list(Path(folder).glob("events.out.tfevents.*"))
        self._file, self._step = EventFile(Path(folder)), step
        self._goes_on = bool(before)
        self._logged = set()
        if before:
            self._file.void_after(step)
        self._file.write(value=[layout_value(metrics)])

    def scalars(
        self, values: dict[str, float], *, step: int, epoch: int, wall_seconds: float
    ) -> None:
        """Record values at a step, all in one event (a seventh of the cost of an event each)."""
        self._step = step
        self._logged.update(values)
        self._write(
            step, [{"tag": tag, "simple_value": float(value)} for tag, value in values.items()]
        )

    def text(self, tag: str, markdown: str, step: int = 0) -> None:
        """Record a text, shown as markdown."""
        self._write(
            step, [tensor_value(tag, "text", "DT_STRING", [1], string_val=[markdown.encode()])]
        )

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        """Record the distribution of the finite values, counted on the device where they are."""
        if self._file is None:
            return
        bars = histogram_bars(values, self.bins)
        content = bars.numpy().tobytes()
        self._write(
            step,
            [
                tensor_value(
                    tag, "histograms", "DT_DOUBLE", list(bars.shape), tensor_content=content
                )
            ],
        )

    def images(self, tag: str, images: Tensor, step: int) -> None:
        """Record pictures, (N, C, H, W) in [0, 1] with 1 or 3 channels, side by side under one tag."""
        if self._file is None:
            return
        height, width = images.shape[-2:]
        pictures = [str(width).encode(), str(height).encode(), *map(png, images.detach().cpu())]
        self._write(
            step, [tensor_value(tag, "images", "DT_STRING", [len(pictures)], string_val=pictures)]
        )

    def graph(self, model: nn.Module, inputs: Tensor) -> None:
        """Record the graph, from the first of `inputs`; a model that does not run on it leaves a text that says why."""
        if self._file is None or not self.draw_graph:
            return
        try:
            drawn = draw(model, inputs[:1])
        except (
            Exception
        ) as error:  # a model may fail in any way, and the run has no need of a drawing
            said = str(error).strip().split("\n")[0][:300]
            self.text(
                "graph", f"The model's graph cannot be drawn: `{type(error).__name__}: {said}`"
            )
            return
        self._file.write(graph_def=drawn)

    def hparams(self, settings: dict[str, Any], metrics: dict[str, float]) -> None:
        """Record the settings of this run and that it succeeded, in the same file: no second run appears.

        The HParams page reads the metrics from the scalars of the run; those never logged are logged now. It takes the
        columns from all runs together, so that runs with different parts (and settings) can be compared.
        """
        if self._file is None:
            return
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

        new = {tag: value for tag, value in metrics.items() if tag not in self._logged}
        if new and not self._goes_on:  # or what is new here is in an earlier file
            self.scalars(new, step=self._step, epoch=0, wall_seconds=0.0)
        start, end = HParamsPluginData(), HParamsPluginData()
        start.session_start_info.start_time_secs = self._file.opened
        for name, value in flat(settings).items():
            field = "bool_value" if isinstance(value, bool) else "string_value"
            field = (
                "number_value"
                if isinstance(value, int | float) and not isinstance(value, bool)
                else field
            )
            setattr(start.session_start_info.hparams[name], field, value)
        end.session_end_info.status, end.session_end_info.end_time_secs = (
            1,
            time.time(),
        )  # 1: STATUS_SUCCESS
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
    """A file of TensorBoard events: for each, its length and the serialized message, both with a CRC-32C."""

    def __init__(self, folder: Path):
        from tensorboard.compat.proto.event_pb2 import Event

        self._event, self.opened = Event, time.time()
        files.make_folder(folder)
        # TensorBoard reads a run's files in the order of their names; nanoseconds keep a quick resume in order.
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        name = f"events.out.tfevents.{seconds:010d}.{nanoseconds:09d}.{socket.gethostname()}.{os.getpid()}"
        self._file = files.AppendFile(folder, name, "x")
        try:
            self._append(Event(wall_time=self.opened, file_version="brain.Event:2"))
        except BaseException:
            self._file.close()
            self._file.path.unlink(missing_ok=True)  # an event file without a record
            raise

    def void_after(self, step: int) -> None:
        """Tell readers to forget what earlier files hold after `step`: a resumed run does those steps again."""
        event = self._event(wall_time=time.time(), step=step + 1)
        event.session_log.status = 1  # SessionLog.START
        self._append(event)

    def write(
        self, step: int = 0, value: list[dict[str, Any]] | None = None, **content: Any
    ) -> None:
        summary = {"summary": {"value": value}} if value else {}
        self._append(self._event(wall_time=time.time(), step=step, **summary, **content))

    def _append(self, event: Any) -> None:
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        # One write a record: a reader, or a crash, sees whole records.
        self._file.append(b"".join((length, masked_crc32c(length), data, masked_crc32c(data))))

    def close(self) -> None:
        self._file.close()


def crc32c_table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [crc >> 1 ^ (0x82F63B78 if crc & 1 else 0) for crc in table]
    return table


CRC32C = crc32c_table()


def masked_crc32c(data: bytes) -> bytes:
    """Return the checksum of a TFRecord: CRC-32C (RFC 3720, B.4), rotated by 15 bits plus a constant, little-endian."""
    table, crc = CRC32C, 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def tensor_value(
    tag: str, plugin: str, dtype: str, shape: list[int], content: bytes = b"", **tensor: Any
) -> dict[str, Any]:
    """Return a summary value that a plugin of TensorBoard reads: a tensor with that plugin's name on it."""
    data = {"plugin_name": plugin, "content": content}
    form = {"dtype": dtype, "tensor_shape": {"dim": [{"size": size} for size in shape]}}
    return {"tag": tag, "metadata": {"plugin_data": data}, "tensor": form | tensor}


def layout_value(metrics: Sequence[str]) -> dict[str, Any]:
    """Return the layout of the Custom Scalars page: a chart for each metric with its training and validation curve."""
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    names = list(dict.fromkeys(["loss", *metrics]))
    charts = [
        {
            "title": name,
            "multiline": {"tag": [f"^{split}/{re.escape(name)}$" for split in ("train", "val")]},
        }
        for name in names
    ]
    layout = Layout(category=[{"title": "training and validation", "chart": charts}])
    content = [layout.SerializeToString()]
    return tensor_value(
        "custom_scalars__config__", "custom_scalars", "DT_STRING", [], string_val=content
    )


def histogram_bars(values: Tensor, bins: int) -> Tensor:
    """Return bars (left edge, right edge, count), shape (bins, 3), float64 on the CPU; none when nothing is finite."""
    values = values.detach().flatten()
    values = values[values.isfinite()].float()
    if values.numel() == 0:
        return torch.zeros(0, 3, dtype=torch.float64)
    low, high = (end.item() for end in values.aminmax())
    if low == high:
        return torch.tensor([[low, high, values.numel()]], dtype=torch.float64)
    place = ((values - low) * (bins / (high - low))).long().clamp_(0, bins - 1)
    counts = (
        place.bincount(minlength=bins).double().cpu()
    )  # histc refuses to run when algorithms must be deterministic
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    return torch.stack([edges[:-1], edges[1:], counts], dim=1)


def png(picture: Tensor) -> bytes:
    """Encode (1 or 3, H, W) in [0, 1] as a PNG of 8 bits a channel (ISO/IEC 15948)."""
    channels, height, width = picture.shape
    pixels = (picture.float().nan_to_num(0).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    rows = pixels.reshape(height, width * channels)
    rows = torch.cat(
        [rows.new_zeros(height, 1), rows], dim=1
    )  # filter type 0 at the start of each row
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    chunks = [
        (b"IHDR", header),
        (b"IDAT", zlib.compress(rows.contiguous().numpy().tobytes())),
        (b"IEND", b""),
    ]
    framed = [
        struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def draw(model: nn.Module, inputs: Tensor) -> bytes:
    """Return the model's graph as a serialized GraphDef, from a pass in eval mode that leaves no trace in the model."""
    from tensorboard.compat.proto.graph_pb2 import GraphDef

    from framework import model_undisturbed

    recorder = Recorder(model, inputs)
    hooks = [
        hook for name, module in model.named_modules() for hook in recorder.hooks(name, module)
    ]
    try:
        with model_undisturbed(model), torch.no_grad(), recorder:
            outputs = model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for number, tensor in enumerate(tensors_in(outputs)):
        recorder.add(f"output_{number}" if number else "output", "output", [tensor], [])
    return GraphDef(node=recorder.nodes, versions={"producer": 22}).SerializeToString()


class Recorder(TorchFunctionMode):
    """Writes down each call of a torch function as a node, named by the module in which it happens."""

    def __init__(self, model: nn.Module, inputs: Tensor):
        super().__init__()
        self.stored = {
            id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())
        }
        self.nodes: list[dict[str, Any]] = []
        self.scopes = [""]
        self.scope_of: dict[str, str] = {}
        self.source: dict[int, str] = {}  # the node that made a tensor, by the tensor's id
        self.kept: list[Tensor] = []  # held, so that no id is used twice
        self.calls: Counter[str] = Counter()
        self.add("input", "input", [], [inputs])

    def hooks(self, name: str, module: nn.Module) -> list[Any]:
        """Return hooks that keep `scopes` at the module at work: "features/0 (Conv2d)/", "" for the model itself."""
        above, _, leaf = name.rpartition(".")
        label = leaf if isinstance(module, nn.Sequential) else f"{leaf} ({type(module).__name__})"
        scope = f"{self.scope_of.get(above, '')}{label}/" if name else ""
        self.scope_of[name] = scope
        return [
            module.register_forward_pre_hook(lambda module, inputs: self.scopes.append(scope)),
            module.register_forward_hook(lambda module, inputs, output: del_last(self.scopes)),
        ]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        made = tensors_in(output)
        if made:
            operation = function.__name__.strip("_")
            self.add(
                self.unique(self.scopes[-1] + operation),
                operation,
                tensors_in((args, kwargs)),
                made,
            )
        return output

    def unique(self, name: str) -> str:
        self.calls[name] += 1
        return name if self.calls[name] == 1 else f"{name}_{self.calls[name]}"

    def add(self, name: str, operation: str, used: list[Tensor], made: list[Tensor]) -> None:
        """Add a node with edges from those that made the tensors it uses; weights become nodes when first used."""
        for tensor in used:
            if id(tensor) in self.stored and id(tensor) not in self.source:
                leaf = self.stored[id(tensor)].rpartition(".")[2]
                self.add(self.unique(self.scopes[-1] + leaf), "parameter", [], [tensor])
        shapes = [{"dim": [{"size": size} for size in tensor.shape]} for tensor in made]
        inputs = [self.source[id(tensor)] for tensor in used if id(tensor) in self.source]
        shown = {"attr": {"_output_shapes": {"list": {"shape": shapes}}}} if shapes else {}
        self.nodes.append({"name": name, "op": operation, "input": inputs} | shown)
        self.source |= {id(tensor): name for tensor in made}
        self.kept += made


def del_last(scopes: list[str]) -> None:
    del scopes[-1]  # a hook that returned what `pop` does would replace the module's output


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    return (
        [tensor for item in value for tensor in tensors_in(item)]
        if isinstance(value, list | tuple)
        else []
    )


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Return nested settings as {"optimizer": "adamw", "optimizer.lr": 1e-3}; lists as text, null left out."""
    found: dict[str, bool | int | float | str] = {}
    for key, value in settings.items():
        name = prefix.rstrip(".") if prefix and key == "name" else f"{prefix}{key}"
        if isinstance(value, dict):
            found |= flat(value, f"{name}.")
        elif value is not None:
            found[name] = value if isinstance(value, bool | int | float | str) else str(value)
    return found
