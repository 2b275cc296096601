"""Write predictions that are images as PNG files."""

import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from framework.errors import FrameworkError
from framework.system.files import make_folder, write_file

from .prediction_columns import Chunk, Form, as_array


def write_images(chunks: Iterable[Chunk], form: Form, folder: Path) -> None:
    """Write predictions that are images as PNG files: FOLDER/000001.png, or 000001-NAME.png.

    Raises:
        FrameworkError: the predictions are not images.
        RunError: a file cannot be written. Then those that were written are removed.
    """
    is_new = not folder.exists()
    names: list[str] = []
    try:
        for name, content in image_files(chunks, form):
            if not names:
                make_folder(folder)
            write_file(folder, name, content)
            names.append(name)
    except BaseException:
        for name in names:
            (folder / name).unlink(missing_ok=True)
        if is_new and folder.is_dir():
            folder.rmdir()
        raise


def image_files(chunks: Iterable[Chunk], form: Form) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of a PNG file for each row.

    Raises:
        FrameworkError: the predictions are not images.
    """
    import numpy
    from PIL import Image

    number = 0
    for names, predictions in chunks:
        images = images_of(predictions)
        pixels = stretched(images) if form.to_pixels is None else form.to_pixels(images)
        pixels = (pixels.clip(0, 1) * 255).round().astype(numpy.uint8)
        for row, channels in enumerate(pixels):
            number += 1
            is_gray = len(channels) == 1
            picture = Image.fromarray(channels[0] if is_gray else channels.transpose(1, 2, 0))
            content = io.BytesIO()
            picture.save(content, "PNG")
            stem = f"-{Path(names['file'][row]).stem}" if "file" in names else ""
            yield f"{number:06}{stem}.png", content.getvalue()


def stretched(images: Any) -> Any:
    """Return images whose smallest number is 0 and whose largest is 1, each by itself."""
    low = images.min(axis=(1, 2, 3), keepdims=True)
    high = images.max(axis=(1, 2, 3), keepdims=True)
    return (images - low) / (high - low).clip(min=1e-12)


def images_of(predictions: Mapping[str, Any]) -> Any:
    """Return the predictions that are images, shape (rows, 1 or 3, height, width)."""
    for values in predictions.values():
        array = as_array(values)
        if getattr(array, "ndim", 0) == 4 and array.shape[1] in (1, 3):
            return array
    raise FrameworkError(
        f"the predictions ({', '.join(predictions)}) are not images; --format csv, jsonl, parquet, "
        "npy and npz are possible"
    )


def check_pillow() -> None:
    """Raise FrameworkError if Pillow is not installed."""
    try:
        import PIL.Image  # noqa: F401  # only whether it can be imported
    except ImportError as error:
        raise FrameworkError("images need Pillow: pip install 'framework[images]'") from error
