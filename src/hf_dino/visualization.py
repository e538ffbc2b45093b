"""Draw detections, put two images side by side, and plot training curves."""

import io
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .utils.errors import InputError, import_extra
from .utils.io import atomic_write


# Pixels. An image whose longer side is shorter than this is enlarged, since labels would cover most of it.
MIN_LONGEST_EDGE = 480

# dark enough for white text, with hues that differ in print too
_COLORS = (
    "#c1121f",
    "#0353a4",
    "#2b7a0b",
    "#7b2cbf",
    "#b5530a",
    "#00687a",
    "#a4036f",
    "#5c4400",
    "#3d348b",
    "#006d4f",
    "#8a1c4a",
    "#44515c",
)


def check_drawing_dependencies(*paths: Path) -> None:
    """Check that detections can be drawn and images can be written, before the model runs.

    Args:
        paths (`Path`): The image files to be written; their suffixes determine the formats.

    Raises:
        InputError: If Pillow cannot write a format.
        ImportError: If supervision or matplotlib is not installed.
    """
    for path in paths:
        image_format = Image.registered_extensions().get(path.suffix.lower())
        try:  # Pillow can only read some formats, and writes others only in grayscale or with another library
            Image.new("RGB", (8, 8)).save(io.BytesIO(), image_format)
        except (KeyError, ValueError, OSError):
            raise InputError(f"{path}: images of kind {path.suffix!r} cannot be written; use .png or .jpg") from None
    _supervision()
    font_path()


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image atomically. After an error, the previous file is still there."""
    with atomic_write(path) as temporary:
        image.save(temporary)


def draw_detections(
    image: Image.Image,
    boxes: Any,
    names: Sequence[str],
    scores: Sequence[float] | None = None,
    classes: Iterable[str] = (),
    tracks: Sequence[int | None] = (),
    trails: Mapping[int, Sequence[tuple[float, float]]] = {},
    enlarge: bool = True,
) -> Image.Image:
    """Draw labeled boxes on a copy of an image.

    Line width and font size are proportional to the image. A name has the same color in every image.

    Args:
        image (`PIL.Image.Image`): The image, in any mode.
        boxes (tensor, array or list of shape `(num_boxes, 4)`): x0, y0, x1, y1 in pixels of `image`.
        names (`list[str]` of length `num_boxes`): Label of each box.
        scores (`list[float]` of length `num_boxes`, *optional*): Appended to the labels. Boxes with higher scores are
            drawn over those with lower scores.
        classes (`Iterable[str]`, *optional*): All possible names. The first twelve get different colors; other names
            may share one.
        tracks (`list[int]`, *optional*): Ids of the objects, put before the labels; `None` for an object without one.
        trails (`dict[int, list[tuple[float, float]]]`, *optional*): By the ids of objects, the points (x, y) in pixels
            of lines to draw.
        enlarge (`bool`, *optional*, defaults to `True`): Whether a small image is enlarged.

    Returns:
        `PIL.Image.Image`: An RGB image, enlarged by a factor of `ceil(480 / longest edge)` if that is more than 1.

    Raises:
        ValueError: If boxes, names and scores differ in length.
        ImportError: If supervision or matplotlib is not installed.

    Example:

    ```python
    >>> from PIL import Image
    >>> image = Image.new("RGB", (640, 480), "white")
    >>> drawn = draw_detections(image, [[100, 100, 300, 250]], ["cat"], [0.87])
    >>> drawn.size, drawn.getpixel((100, 200)) == (255, 255, 255)
    ((640, 480), False)

    ```
    """
    boxes = np.asarray([[float(value) for value in box] for box in boxes], dtype=np.float32).reshape(-1, 4)
    if len(names) != len(boxes) or (scores is not None and len(scores) != len(boxes)):
        counts = f"{len(boxes)} boxes, {len(names)} names" + ("" if scores is None else f", {len(scores)} scores")
        raise ValueError(f"boxes, names and scores must have the same length, got {counts}")

    scale = max(1, -(-MIN_LONGEST_EDGE // max(image.size))) if enlarge else 1
    resized = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
    order = np.arange(len(boxes)) if scores is None else np.argsort([float(score) for score in scores])
    ids = [*tracks, *[None] * (len(boxes) - len(tracks))]
    prefixes = ["" if track is None else f"#{track} " for track in ids]
    suffixes = [""] * len(boxes) if scores is None else [f" {float(score):.2f}" for score in scores]
    labels = [prefixes[index] + names[index] + suffixes[index] for index in order]
    numbers = {name: number for number, name in enumerate(classes)}
    colors = [numbers.get(names[index], zlib.crc32(names[index].encode())) % len(_COLORS) for index in order]
    pen = ImageDraw.Draw(resized)
    for index, color in zip(order, colors):
        trail = [(x * scale, y * scale) for x, y in trails.get(ids[index] or 0, ())]
        if trail:  # Pillow fails otherwise
            pen.line(trail, fill=_COLORS[color], width=_line_width(resized), joint="curve")
    return _annotate(resized, boxes[order] * scale, labels, colors)


def class_colors(names: Iterable[str]) -> dict[str, str]:
    """Return the color of each of all possible names in [`draw_detections`], such as `"#c1121f"`."""
    return {name: _COLORS[number % len(_COLORS)] for number, name in enumerate(names)}


def _annotate(image: Image.Image, boxes: np.ndarray, labels: Sequence[str], colors: Sequence[int]) -> Image.Image:
    """Draw boxes (x0, y0, x1, y1) with their labels in the given indices of `_COLORS`, in this order."""
    supervision = _supervision()
    detections = supervision.Detections(xyxy=boxes, class_id=np.array(colors))
    palette = supervision.ColorPalette.from_hex(list(_COLORS))
    longest_edge = max(image.size)
    font_size = max(12, round(longest_edge / 50))
    box_annotator = supervision.BoxAnnotator(color=palette, thickness=_line_width(image))
    label_annotator = supervision.RichLabelAnnotator(
        color=palette,
        font_path=font_path(),
        font_size=font_size,
        text_padding=max(2, font_size // 5),
        smart_position=len(boxes) <= 100,  # moves labels apart, in time quadratic in their number
    )
    return label_annotator.annotate(box_annotator.annotate(image, detections), detections, labels=list(labels))


def _line_width(image: Image.Image) -> int:
    return max(2, round(max(image.size) / 400))


def hstack_images(left: Image.Image, right: Image.Image, captions: tuple[str, str]) -> Image.Image:
    """Put two images side by side on a white background, each below its caption.

    Args:
        left (`PIL.Image.Image`): The left image.
        right (`PIL.Image.Image`): The right image, which is resized to the height of the left one.
        captions (`tuple[str, str]`): Captions of the left and the right image, one line each.

    Raises:
        ImportError: If matplotlib, which provides the font, is not installed.
    """
    if right.height != left.height:
        width = max(1, round(right.width * left.height / right.height))
        right = right.resize((width, left.height), Image.Resampling.BICUBIC)
    font = ImageFont.truetype(font_path(), max(14, round(max(left.size) / 36)))
    gap = max(8, left.width // 60)
    widths = [max(image.width, round(font.getlength(caption))) for image, caption in zip((left, right), captions)]
    caption_height = round(2 * font.size)

    canvas = Image.new("RGB", (sum(widths) + 3 * gap, left.height + caption_height + gap), "white")
    draw = ImageDraw.Draw(canvas)
    x = gap
    for image, caption, width in zip((left, right), captions, widths):
        draw.text((x, caption_height / 2), caption, fill="black", font=font, anchor="lm")
        canvas.paste(image.convert("RGB"), (x, caption_height))
        x += width + gap
    return canvas


def plot_training_curves(history: Sequence[Mapping[str, float]], path: str | os.PathLike) -> None:
    """Plot training loss and average precision by step and write the plot to an image file.

    Args:
        history (`list[dict[str, float]]`): Rows with `"step"` and any of `"loss"`, `"ap"` and `"ap50"`; average
            precision is in [0, 1].
        path (`str` or `os.PathLike`): The file; its suffix determines the format. Written atomically.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    import_extra("matplotlib", "train", "plotting")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)  # draws in memory, so it needs no display and does not touch pyplot's global state
    loss_axes, precision_axes = figure.subplots(1, 2)
    _plot(loss_axes, history, {"loss": ("training loss", "#44515c")})
    _plot(precision_axes, history, {"ap50": ("AP50", "#b5530a"), "ap": ("AP@[.50:.95]", "#0353a4")})
    loss_axes.set(xlabel="step", ylabel="loss", title="Training loss")
    loss_axes.set_ylim(bottom=0)
    precision_axes.set(xlabel="step", ylabel="average precision", title="Evaluation", ylim=(0, 1))
    for axes in (loss_axes, precision_axes):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    if precision_axes.lines:
        precision_axes.legend(frameon=False, loc="best")

    with atomic_write(Path(path)) as temporary:
        figure.savefig(temporary, dpi=120)


def _plot(axes: Any, history: Sequence[Mapping[str, float]], curves: Mapping[str, tuple[str, str]]) -> None:
    for name, (label, color) in curves.items():
        points = [(row["step"], row[name]) for row in history if row.get(name) is not None]
        if points:
            steps, values = zip(*points)
            axes.plot(steps, values, label=label, color=color, marker="o" if len(points) < 30 else None, markersize=3)


def _supervision() -> ModuleType:
    return import_extra("supervision", "train", "drawing")


def font_path() -> str:
    """Return matplotlib's font, which has more characters than Pillow's: Greek, Cyrillic, symbols such as ≥."""
    matplotlib = import_extra("matplotlib", "train", "drawing text")
    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
