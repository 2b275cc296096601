"""Images for the loggers: charts of curves and points, and images with captions.

They are drawn with Pillow, which TensorBoard requires, at twice their size and then reduced.
"""

import io
import math
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from .axis import Axis as Axis

if TYPE_CHECKING:
    from PIL.Image import Image

CARD = 350
"""Pixels of the width of an image in TensorBoard, which enlarges and reduces others unevenly."""
COLUMNS = 4  # of images with captions
BANDS = 16  # of colors in a map with contours
CONTOUR_PIXELS = 400  # of a side of it
Color = tuple[int, int, int]
BLACK = (40, 40, 40)
GRAY = (215, 215, 215)
WHITE = (255, 255, 255)
COLORS: Sequence[Color] = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
    (240, 228, 66),
    (0, 0, 0),
)
"""Colors that color-blind readers can tell apart (Okabe and Ito 2008)."""
HEAT: Sequence[Color] = (
    (68, 1, 84),
    (72, 40, 120),
    (62, 74, 137),
    (49, 104, 142),
    (38, 130, 142),
    (31, 158, 137),
    (53, 183, 121),
    (110, 206, 88),
    (181, 222, 43),
    (253, 231, 37),
)
"""Colors from low to high, evenly spaced points of "viridis" (van der Walt and Smith 2015)."""


class Canvas:
    """A white image of `width` times `height` pixels."""

    def __init__(self, width: int, height: int, font_size: int = 12):
        from PIL import Image, ImageDraw, ImageFont  # only a run that draws needs them

        self.image = Image.new("RGB", (2 * width, 2 * height), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default(2 * font_size)

    def line(self, points: Sequence[tuple[float, float]], color: Color, width: int = 2) -> None:
        """Draw a line through points (x, y), `width` half pixels wide."""
        scaled = [(2 * x, 2 * y) for x, y in points]
        self.draw.line(scaled, fill=color, width=width, joint="curve")

    def dot(self, x: float, y: float, color: Color, radius: float, edge: Color) -> None:
        """Draw a filled circle with an edge."""
        box = [2 * (x - radius), 2 * (y - radius), 2 * (x + radius), 2 * (y + radius)]
        self.draw.ellipse(box, fill=color, outline=edge)

    def box(self, left: float, top: float, right: float, bottom: float, color: Color) -> None:
        """Draw a filled rectangle."""
        self.draw.rectangle((2 * left, 2 * top, 2 * right, 2 * bottom), fill=color)

    def text(self, x: float, y: float, text: str, anchor: str = "mm", color: Color = BLACK) -> None:
        """Write a text, with its position as an anchor of Pillow ("mm" is the middle)."""
        shown = without_accents(text)
        self.draw.text((2 * x, 2 * y), shown, fill=color, anchor=anchor, font=self.font)

    def text_upwards(self, x: float, bottom: float, text: str) -> None:
        """Write a text from the bottom up, centered at x."""
        from PIL import Image, ImageDraw

        shown = without_accents(text)
        _, _, width, height = self.font.getbbox(shown)
        strip = Image.new("L", (round(width) + 1, round(height) + 1))
        ImageDraw.Draw(strip).text((0, 0), shown, fill=255, font=self.font)
        turned = strip.transpose(Image.Transpose.ROTATE_90)
        corner = (round(2 * x - turned.width / 2), round(2 * bottom - turned.height))
        self.image.paste(BLACK, corner, turned)

    def paste(self, picture: Tensor, left: int, top: int, width: int, height: int) -> None:
        """Draw an image (1 or 3, H, W) in [0, 1] into a rectangle, with sharp pixels."""
        from PIL import Image

        drawn = as_pillow(picture.expand(3, -1, -1))
        resized = drawn.resize((2 * width, 2 * height), Image.Resampling.BOX)
        self.image.paste(resized, (2 * left, 2 * top))

    def tensor(self) -> Tensor:
        """Return the image as (1, 3, H, W) in [0, 1]."""
        small = self.image.reduce(2)
        pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
        return pixels.reshape(1, small.height, small.width, 3).permute(0, 3, 1, 2) / 255


class Chart:
    """A chart of curves and points with axes, and a legend below it.

    Args:
        title: above the chart.
        x: the axis from left to right.
        y: the axis from the bottom up.
        x_label: what x is.
        y_label: what y is.
        width: pixels of the image.
        height: pixels of the image without the legend.
    """

    LEFT, RIGHT, TOP, BOTTOM = 46, 12, 42, 40  # margins in pixels

    def __init__(
        self,
        title: str,
        x: Axis,
        y: Axis,
        x_label: str = "",
        y_label: str = "",
        *,
        width: int = CARD,
        height: int = 300,
    ):
        self.x = x
        self.y = y
        self.canvas = Canvas(width, height)
        self.inner_width = width - self.LEFT - self.RIGHT
        self.inner_height = height - self.TOP - self.BOTTOM
        self.legend: list[tuple[str, Color]] = []
        bottom = self.TOP + self.inner_height
        for value, label in x.ticks():
            at = self.LEFT + x.position(value) * self.inner_width
            self.canvas.line([(at, self.TOP), (at, bottom)], GRAY)
            self.canvas.text(at, bottom + 10, label)
        for value, label in y.ticks():
            at = bottom - y.position(value) * self.inner_height
            self.canvas.line([(self.LEFT, at), (self.LEFT + self.inner_width, at)], GRAY)
            self.canvas.text(self.LEFT - 5, at, label, "rm")
        self.canvas.text(width / 2, 12, cut_to_width(self.canvas, title, width - 8))
        self.canvas.text(self.LEFT + self.inner_width / 2, height - 12, x_label)
        self.canvas.text(4, self.TOP - 12, y_label, "lm")

    def background(self, picture: Tensor) -> None:
        """Fill the area between the axes with an image (1 or 3, H, W) in [0, 1]."""
        self.canvas.paste(picture, self.LEFT, self.TOP, self.inner_width, self.inner_height)

    def line(
        self, points: Sequence[tuple[float, float]], color: Color, label: str = "", width: int = 3
    ) -> None:
        """Draw a curve through points (x, y); it is interrupted at a value that is not finite."""
        run: list[tuple[float, float]] = []
        for x, y in [*points, (math.nan, math.nan)]:
            if math.isfinite(x) and math.isfinite(y):
                run.append(self._pixels(x, y))
                continue
            if len(run) > 1:
                self.canvas.line(run, color, width)
            run = []
        self._add_to_legend(label, color)

    def points(
        self,
        points: Sequence[tuple[float, float]],
        color: Color,
        label: str = "",
        radius: float = 2.5,
        edge: Color = WHITE,
    ) -> None:
        """Draw points (x, y); those that are not finite are left out."""
        for x, y in points:
            if math.isfinite(x) and math.isfinite(y):
                self.canvas.dot(*self._pixels(x, y), color, radius, edge)
        self._add_to_legend(label, color)

    def tensor(self) -> Tensor:
        """Return the image as (1, 3, H, W) in [0, 1], with the legend below the chart."""
        chart = self.canvas.tensor()
        return torch.cat([chart, self._draw_legend()], dim=2) if self.legend else chart

    def _pixels(self, x: float, y: float) -> tuple[float, float]:
        """Return the pixel of a point; one outside of the axes is moved to their edge."""
        across = min(1.0, max(0.0, self.x.position(x)))
        up = min(1.0, max(0.0, self.y.position(y)))
        return self.LEFT + across * self.inner_width, self.TOP + (1 - up) * self.inner_height

    def _add_to_legend(self, label: str, color: Color) -> None:
        if label:
            self.legend.append((label, color))

    def _draw_legend(self) -> Tensor:
        """Return an image of the legend, as wide as the chart."""
        lengths = [self.canvas.draw.textlength(text, self.canvas.font) for text, _ in self.legend]
        width = self.canvas.image.width // 2
        columns = max(1, width // (round(max(lengths) / 2) + 38))
        column = width // columns
        canvas = Canvas(width, 16 * math.ceil(len(self.legend) / columns) + 6)
        for number, (label, color) in enumerate(self.legend):
            left = number % columns * column + 6
            middle = 8 + number // columns * 16
            canvas.line([(left, middle), (left + 16, middle)], color, 5)
            canvas.text(left + 22, middle, cut_to_width(canvas, label, column - 30), "lm")
        return canvas.tensor()


def heat_map(
    title: str, values: Tensor, rows: Sequence[str], columns: Sequence[str], log: bool = False
) -> Tensor:
    """Return an image of a table of numbers as colors: dark for small and yellow for large ones.

    Args:
        title: above the table.
        values: shape (rows, columns); those that are not finite are gray.
        rows: a label for each row.
        columns: a label for each column.
        log: whether equal differences of colors are equal factors. Numbers of 0 or less are gray.

    Returns:
        One image (1, 3, height, width).
    """
    numbers = values.cpu().double()  # in this order: mps has no float64
    if log:
        numbers = numbers.log10()
    known = numbers[numbers.isfinite()]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    cell = max(4, 20 - len(rows) // 10)
    left = 125
    top = 30
    height = len(rows) * cell
    width = CARD - left - 72
    canvas = Canvas(CARD, top + height + 34)
    canvas.text(CARD / 2, 14, cut_to_width(canvas, title, CARD - 8))
    shares = (numbers - low) / max(high - low, 1e-12)
    canvas.paste(colors_of(shares), left, top, width, height)
    shown = math.ceil(14 / cell)
    for row in range(0, len(rows), shown):
        label = cut_in_the_middle(canvas, rows[row], left - 10)
        canvas.text(left - 6, top + (row + 0.5) * cell, label, "rm")
    widest = max(canvas.draw.textlength(label, canvas.font) for label in columns) / 2
    between = math.ceil((widest + 8) * len(columns) / width)
    for column in range(0, len(columns), between):
        canvas.text(
            left + (column + 0.5) * width / len(columns), top + height + 12, columns[column]
        )
    scale = torch.linspace(1, 0, 32).reshape(32, 1)
    bar = left + width + 12
    canvas.paste(colors_of(scale), bar, top, 10, max(height, 40))
    for share, value in ((0.0, high), (1.0, low)):
        number = 10**value if log else value
        label = f"{number:.3g}"
        if len(label) > 7:
            label = f"{number:.2g}"
        canvas.text(bar + 13, top + 6 + share * (max(height, 40) - 12), label, "lm")
    return canvas.tensor()


def colors_of(shares: Tensor) -> Tensor:
    """Return the colors (3, rows, columns) of numbers in [0, 1]; gray where they are not finite."""
    place = shares.nan_to_num(0, 0, 0).clamp(0, 1) * (len(HEAT) - 1)
    index = place.long().clamp(max=len(HEAT) - 2)
    fraction = (place - index)[None].float()
    table = torch.tensor(HEAT).T / 255
    colors = torch.lerp(table[:, index], table[:, index + 1], fraction)
    gray = torch.tensor(GRAY).reshape(3, 1, 1) / 255
    return torch.where(shares.isfinite(), colors, gray)


def pixels_of(colors: Tensor) -> list[list[Color]]:
    """Return the rows of an image (3, rows, columns) in [0, 1] as colors from 0 to 255."""
    rows: list[list[Color]] = (colors * 255).round().int().permute(1, 2, 0).tolist()
    return [[(red, green, blue) for red, green, blue in row] for row in rows]


def captioned(images: Tensor, captions: Sequence[str], columns: int = COLUMNS) -> Tensor:
    """Return images (N, 1 or 3, H, W) in [0, 1] in rows, each above its caption.

    Args:
        images: of the same size; small ones are enlarged by a whole factor, so that a row has
            CARD pixels.
        captions: a text for each image; each line of it is cut to the width of its column. If all
            are empty, there is no space for them.
        columns: images in a row.

    Returns:
        One image (1, 3, height, width).
    """
    factor = max(1, (CARD // columns - 8) // images.shape[-1])
    large = F.interpolate(images.float().expand(-1, 3, -1, -1), scale_factor=factor, mode="nearest")
    height, width = large.shape[-2:]
    lines = [caption.split("\n") for caption in captions]
    text_height = 16 * max(map(len, lines)) + 6 if any(captions) else 8
    column = max(width + 8, CARD // columns)
    rows = math.ceil(len(images) / columns)
    canvas = Canvas(max(CARD, min(columns, len(images)) * column), rows * (height + text_height))
    for number, picture in enumerate(large):
        left = (number % columns) * column + 4
        top = (number // columns) * (height + text_height) + 4
        canvas.paste(picture, left, top, width, height)
        for row, line in enumerate(lines[number]):
            text = cut_to_width(canvas, line, column - 6)
            canvas.text(left, top + height + 9 + 16 * row, text, "lm")
    return canvas.tensor()


def as_pillow(picture: Tensor) -> "Image":
    """Return an image (1 or 3, H, W) in [0, 1] as one of Pillow with 8 bits per channel."""
    from PIL import Image

    pixels = (picture.float().nan_to_num(0).clamp(0, 1) * 255).round().byte().cpu()
    channels_last = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
    return Image.fromarray(channels_last.contiguous().numpy())


def encode_png(picture: Tensor) -> bytes:
    """Encode an image (1 or 3, H, W) in [0, 1] as a PNG with 8 bits per channel."""
    buffer = io.BytesIO()
    as_pillow(picture).save(buffer, format="png")
    return buffer.getvalue()


def without_accents(text: str) -> str:
    """Return a text with é as e: the font has no letters with accents.

    It draws boxes for the letters of other scripts.
    """
    if text.isascii():
        return text
    letters = unicodedata.normalize("NFD", text)
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


def cut_to_width(canvas: Canvas, text: str, width: int) -> str:
    """Return a text cut, with "…" at its end, to a width in pixels."""
    if canvas.draw.textlength(text, canvas.font) <= 2 * width:
        return text
    while text and canvas.draw.textlength(text + "…", canvas.font) > 2 * width:
        text = text[:-1]
    return text + "…"


def cut_in_the_middle(canvas: Canvas, text: str, width: int) -> str:
    """Return a text cut to a width in pixels, with "…" in its middle."""
    cut = text
    kept = len(text)
    while kept > 2 and canvas.draw.textlength(cut, canvas.font) > 2 * width:
        kept -= 1
        end = kept // 3
        cut = f"{text[: kept - end]}…{text[len(text) - end :]}"
    return cut


def side_by_side(images: Sequence[Tensor]) -> Tensor:
    """Return images (1, 3, H, W) of any size next to each other, on white."""
    height = max(image.shape[2] for image in images)
    return torch.cat([with_height(image, height) for image in images], dim=3)


def with_height(image: Tensor, height: int) -> Tensor:
    """Return an image (1, 3, H, W) with white below it."""
    return F.pad(image, (0, 0, 0, height - image.shape[2]), value=1.0)


def contour_map(values: Tensor, scale: Axis) -> Tensor:
    """Return a map of values in bands of colors with a dark line between two bands.

    Args:
        values: shape (rows, columns), the lowest row first; one that is not finite is gray.
        scale: the values of the first and the last color; others get these colors.

    Returns:
        An image (3, 400, 400) in [0, 1], with the lowest row at the bottom.
    """
    shares = torch.tensor([list(map(scale.position, row)) for row in values.tolist()])
    shares = shares.masked_fill(shares == -math.inf, 0.0)
    fine = F.interpolate(
        shares[None, None], (CONTOUR_PIXELS, CONTOUR_PIXELS), mode="bilinear", align_corners=True
    ).flip(2)[0, 0]
    band = (fine.nan_to_num(0, 1, 0).clamp(0, 1) * BANDS).long().clamp(max=BANDS - 1)
    edge = torch.zeros_like(band, dtype=torch.bool)
    edge[:, 1:] |= band[:, 1:] != band[:, :-1]
    edge[1:] |= band[1:] != band[:-1]
    finite = fine.isfinite()
    picture = colors_of(torch.where(finite, (band + 0.5) / BANDS, torch.nan))
    return torch.where(edge & finite, picture * 0.75, picture)


def color_bar(title: str, scale: Axis, height: int) -> Tensor:
    """Return the colors of `contour_map` with the values at their borders: (1, 3, H, W)."""
    canvas = Canvas(84, height)
    top, bottom = Chart.TOP, height - Chart.BOTTOM
    step = (bottom - top) / BANDS
    colors = pixels_of(colors_of((torch.arange(BANDS)[None] + 0.5) / BANDS))[0]
    for index, color in enumerate(colors):
        canvas.box(6, bottom - (index + 1) * step, 22, bottom - index * step, color)
    canvas.text(4, 14, title, "lm")
    for index in range(0, BANDS + 1, 2):
        share = index / BANDS
        if scale.log:
            value = scale.low * (scale.high / scale.low) ** share
        else:
            value = scale.low + (scale.high - scale.low) * share
        canvas.text(27, bottom - index * step, f"{value:.3g}", "lm")
    return canvas.tensor()
