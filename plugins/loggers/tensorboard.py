"""The TensorBoard logger: one event file in the run folder, written without TensorFlow.

Values of the test split are not charts with one point: the Text page has a table of them, and the
HParams page a column for each. If they are measured at several steps, they are charts.

TensorBoard is imported when a run opens. Each record is one unbuffered write: a run that ends by
SIGKILL keeps everything that it logged, and no thread competes with training.
"""

import io
import math
import os
import re
import socket
import struct
import time
import wave
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from framework import Logger, PositiveInt, drawing, files, loggers, markdown, select_rows

from .tensorboard_graph import trace_graph
from .text import warn_of_no_folder

STATUS_SUCCESS = 1  # of the HParams plugin
SESSION_START = 1  # SessionLog.START
WAV = 11  # AudioPluginData.WAV
THRESHOLDS = 127  # of a curve of precision and recall, as in TensorBoard's own writer
BOTH_SPLITS = "training and validation"  # the first part of the Custom Scalars page
PROJECTOR_FILE = "projector_config.pbtxt"  # where the Projector page looks for it


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
        self._folder = Path()
        self._embeddings: dict[str, dict[str, Any]] = {}
        self._layout: dict[str, dict[str, list[str]]] = {}
        self._layout_written = False
        self._test_step = 0
        self._test_values: dict[str, float] = {}

    def open(self, folder: Path | None, step: int, metrics: Sequence[str]) -> None:
        """Begin an event file; readers then discard the records of earlier files after `step`.

        A run that starts again at step 0 discards all of them.
        """
        if folder is None:
            warn_of_no_folder("tensorboard")
            return
        has_earlier_files = any(Path(folder).glob("events.out.tfevents.*"))
        self._resumed = has_earlier_files and step > 0
        self._file = EventFile(Path(folder))
        self._folder = Path(folder)
        self._embeddings = {}
        self._step = step
        self._logged_tags = set()
        if has_earlier_files:
            self._file.discard_from(step + 1 if step > 0 else 0)
        self._test_values = {}
        pairs = {name: both_splits(name) for name in ("loss", *metrics)}
        self._layout = {BOTH_SPLITS: pairs}
        self._layout_written = False

    def charts(self, title: str, charts: Mapping[str, str]) -> None:
        """Add charts to the Custom Scalars page."""
        self._layout[title] = {name: [f"^{re.escape(prefix)}"] for name, prefix in charts.items()}
        self._layout_written = False

    def scalars(
        self, values: dict[str, float], *, step: int, epoch: int, wall_seconds: float
    ) -> None:
        """Record values at a step in one event (a seventh of the cost of one event each)."""
        self._step = step
        charted = {tag: value for tag, value in values.items() if not tag.startswith("test/")}
        if len(charted) < len(values):
            charted |= self._tested_again(values, step)
        self._logged_tags.update(charted)
        self._update_layout(charted)
        self._write(step, scalar_values(charted))

    def _update_layout(self, tags: Iterable[str]) -> None:
        """Add charts of values of both splits, such as those of a task; record a new layout.

        The last layout of a run counts. An evaluation, which logs no scalars, records none.
        """
        charts = self._layout.get(BOTH_SPLITS, {})
        for tag in tags:
            name = tag.removeprefix("val/")
            if tag != name and name not in charts and f"train/{name}" in self._logged_tags:
                charts[name] = both_splits(name)
                self._layout_written = False
        if tags and not self._layout_written:
            self._write(0, [layout_value(self._layout)])
            self._layout_written = True

    def _tested_again(self, values: Mapping[str, float], step: int) -> dict[str, float]:
        """Return the values of the test split that belong into charts; keep those of one step."""
        tested = {tag: value for tag, value in values.items() if tag.startswith("test/")}
        if tested.keys() & self._logged_tags:
            return tested
        if self._test_values and self._test_step != step:
            self._logged_tags.update(self._test_values)
            self._write(self._test_step, scalar_values(self._test_values))
            self._test_values = {}
            return tested
        self._test_values |= tested
        self._test_step = step
        return {}

    def _write_test_table(self) -> None:
        """Record the values of the test split that have no chart as a text."""
        if not self._test_values:
            return
        values = self._test_values.items()
        rows = [[tag.removeprefix("test/"), f"{value:.6g}"] for tag, value in values]
        self.text("test", markdown.table(["test", "value"], rows, texts=1), self._test_step)
        self._test_values = {}

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
        strings += map(drawing.encode_png, images.detach())
        value = tensor_value(tag, "images", "DT_STRING", [len(strings)], string_val=strings)
        self._write(step, [value])

    def audio(self, tag: str, waves: Tensor, rate: int, step: int) -> None:
        """Record sounds (N, samples) in [-1, 1] under one tag, as WAV with 16 bits."""
        from tensorboard.plugins.audio.plugin_data_pb2 import AudioPluginData

        strings = []
        for sound in waves.detach().cpu():
            strings += [encode_wav(sound, rate), b""]  # the sound and its label
        content = AudioPluginData(encoding=WAV).SerializeToString()
        shape = [len(waves), 2]
        value = tensor_value(tag, "audio", "DT_STRING", shape, content, string_val=strings)
        self._write(step, [value])

    def pr_curve(self, tag: str, labels: Tensor, scores: Tensor, step: int) -> None:
        """Record precision and recall at evenly spaced thresholds."""
        from tensorboard.plugins.pr_curve.plugin_data_pb2 import PrCurvePluginData

        curve = precision_and_recall(labels, scores)
        content = PrCurvePluginData(num_thresholds=THRESHOLDS).SerializeToString()
        value = tensor_value(
            tag,
            "pr_curves",
            "DT_FLOAT",
            list(curve.shape),
            content,
            tensor_content=curve.float().numpy().tobytes(),
        )
        self._write(step, [value])

    def embedding(
        self,
        tag: str,
        vectors: Tensor,
        labels: Sequence[str],
        step: int,
        images: Tensor | None = None,
    ) -> None:
        """Write points, labels and thumbnails as files that the Projector page reads."""
        from google.protobuf.text_format import MessageToString
        from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

        if self._file is None:
            return
        stem = "embeddings/" + re.sub(r"[^\w.-]+", "_", tag)
        files.make_folder(self._folder / "embeddings")
        rows = ("\t".join(f"{x:.6g}" for x in row) + "\n" for row in vectors.double().tolist())
        files.write_file(self._folder, f"{stem}.tsv", "".join(rows))
        names = (re.sub(r"\s+", " ", label) + "\n" for label in labels)
        files.write_file(self._folder, f"{stem}.labels.tsv", "".join(names))
        entry: dict[str, Any] = {
            "tensor_name": f"{tag} (step {step})",
            "tensor_shape": list(vectors.shape),
            "tensor_path": f"{stem}.tsv",
            "metadata_path": f"{stem}.labels.tsv",
        }
        if images is not None:
            files.write_file(self._folder, f"{stem}.png", drawing.encode_png(sprite_sheet(images)))
            height, width = images.shape[-2:]
            entry["sprite"] = {"image_path": f"{stem}.png", "single_image_dim": [width, height]}
        self._embeddings[tag] = entry
        config = ProjectorConfig(embeddings=list(self._embeddings.values()))
        files.write_file(self._folder, PROJECTOR_FILE, MessageToString(config))

    def graph(self, model: nn.Module, inputs: Any) -> None:
        """Record the graph for the first of `inputs`; if the model fails, record its error."""
        if self._file is None or not self.draw_graph:
            return
        try:
            graph = trace_graph(model, select_rows(inputs, 0, 1))
        except Exception as error:  # a model may fail in any way, and the run does not need a graph
            message = str(error).strip().split("\n")[0][:300]
            name = type(error).__name__
            self.text("graph", f"The model's graph cannot be drawn: `{name}: {message}`")
            return
        self._file.write(graph_def=graph)

    def hparams(self, settings: dict[str, Any], metrics: dict[str, float]) -> None:
        """Record the settings and the success of this run in the same file: no second run appears.

        The HParams page reads the metrics from the scalars of the run, so metrics without a scalar
        are logged now. Values of the test split that have no chart are among the settings: the page
        sorts and filters by them too. The page merges the columns of all runs, so runs with
        different parts and settings can be compared.
        """
        if self._file is None:
            return
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

        new = {tag: value for tag, value in metrics.items() if tag not in self._logged_tags}
        if new and not self._resumed:  # an earlier file may contain them
            self.scalars(self._test_values | new, step=self._step, epoch=0, wall_seconds=0.0)
        tested = {tag: value for tag, value in new.items() if tag.startswith("test/")}
        start = HParamsPluginData()
        start.session_start_info.start_time_secs = self._file.opened
        for name, value in (flatten_settings(settings) | finite(tested)).items():
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
            self._write_test_table()
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

    def discard_from(self, step: int) -> None:
        """Make readers discard the records of earlier files from `step` on, for a resumed run."""
        event = self._event(wall_time=time.time(), step=step)
        event.session_log.status = SESSION_START
        self._append(event)  # TensorBoard takes the first such event for the start of the run
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


def scalar_values(values: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return the summary values of scalars."""
    return [{"tag": tag, "simple_value": float(value)} for tag, value in values.items()]


def finite(values: Mapping[str, float]) -> dict[str, float]:
    """Return the values that are finite."""
    return {tag: value for tag, value in values.items() if math.isfinite(value)}


def both_splits(name: str) -> list[str]:
    """Return regular expressions of the tags of a value of training and validation."""
    return [f"^train/{re.escape(name)}$", f"^val/{re.escape(name)}$"]


def layout_value(layout: Mapping[str, Mapping[str, list[str]]]) -> dict[str, Any]:
    """Return the layout of the Custom Scalars page.

    Args:
        layout: regular expressions of the tags, by the title of the page's part and of the chart.
    """
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    categories = []
    for title, charts in layout.items():
        named = [{"title": name, "multiline": {"tag": tags}} for name, tags in charts.items()]
        categories.append({"title": title, "chart": named})
    content = [Layout(category=categories).SerializeToString()]
    return tensor_value(
        "custom_scalars__config__", "custom_scalars", "DT_STRING", [], string_val=content
    )


def histogram_bars(values: Tensor, bins: int) -> Tensor:
    """Count the values that are finite in float32 in bars of equal width.

    Returns:
        (left edge, right edge, count) of each bar: shape (bins, 3), float64 on the CPU. One bar if
        all values are equal, none without a finite value.
    """
    values = values.detach().flatten().float()
    values = values[values.isfinite()]
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


def encode_wav(sound: Tensor, rate: int) -> bytes:
    """Encode amplitudes (samples,) in [-1, 1] as a WAV file with 16 bits per sample."""
    numbers = (sound.float().nan_to_num(0).clamp(-1, 1) * (2**15 - 1)).round().short()
    buffer = io.BytesIO()
    with wave.Wave_write(buffer) as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(numbers.numpy().astype("<i2").tobytes())
    return buffer.getvalue()


def precision_and_recall(labels: Tensor, scores: Tensor) -> Tensor:
    """Count the decisions "score at least the threshold" at THRESHOLDS values from 0 to 1.

    Args:
        labels: whether a sample is positive, bool of shape (N,).
        scores: in [0, 1], shape (N,).

    Returns:
        True positives, false positives, true negatives, false negatives, precision and recall:
        shape (6, THRESHOLDS), float64 on the CPU. The precision without a positive decision is 1,
        the recall without a positive sample is 0.
    """
    positive = labels.bool().cpu()
    last = THRESHOLDS - 1
    # the number of thresholds that a score reaches, less one
    reached = (scores.double().cpu().nan_to_num(0).clamp(0, 1) * last + 1e-9).long()

    def at_least(chosen: Tensor) -> Tensor:
        counts = reached[chosen].bincount(minlength=THRESHOLDS).double()
        return counts.flip(0).cumsum(0).flip(0)

    true_positives = at_least(positive)
    false_positives = at_least(~positive)
    false_negatives = positive.sum() - true_positives
    true_negatives = (~positive).sum() - false_positives
    decided = true_positives + false_positives
    precision = torch.where(decided > 0, true_positives / decided.clamp(min=1), 1.0)
    recall = true_positives / positive.sum().clamp(min=1)
    return torch.stack(
        [true_positives, false_positives, true_negatives, false_negatives, precision, recall]
    )


def sprite_sheet(images: Tensor) -> Tensor:
    """Return images (N, C, H, W) as one square of images, row by row; the rest is black."""
    side = math.ceil(math.sqrt(len(images)))
    missing = side * side - len(images)
    padded = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
    rows = [torch.cat(list(row), 2) for row in padded.split(side)]
    return torch.cat(rows, 1)


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
