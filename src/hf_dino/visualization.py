"""Images for people: detections drawn into an image, two images side by side, training curves."""

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


# Pixels. An image whose longer side is below this is enlarged before it is drawn into, or names would hide it.
SMALLEST_LONGER_SIDE = 480

# Dark enough for white text and apart in hue, so that neighbors differ also in print.
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
    """See, before the work is done, that images can be drawn into and written.

    Args:
        paths (`Path`): The files to be written, whose suffixes give the formats.

    Raises:
        InputError: If Pillow writes no images of a suffix.
        ImportError: If supervision or matplotlib is not installed.
    """
    for path in paths:
        kind = Image.registered_extensions().get(path.suffix.lower())
        try:  # there are kinds that Pillow only reads, or writes with another library, or in gray only
            Image.new("RGB", (8, 8)).save(io.BytesIO(), kind)
        except (KeyError, ValueError, OSError):
            raise InputError(f"{path}: images of kind {path.suffix!r} cannot be written; use .png or .jpg") from None
    _supervision()
    _font_path()


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image, or leave what was there if it cannot be finished."""
    with atomic_write(path) as temporary:
        image.save(temporary)


def draw_detections(
    image: Image.Image,
    boxes: Any,
    names: Sequence[str],
    scores: Sequence[float] | None = None,
    classes: Iterable[str] = (),
) -> Image.Image:
    """Draw boxes with their names into a copy of an image.

    Lines and text grow with the image. One name has one color in every image.

    Args:
        image (`PIL.Image.Image`): The image, in any mode.
        boxes (tensor, array or list of shape `(num_boxes, 4)`): x0, y0, x1, y1 in pixels of `image`.
        names (`list[str]` of length `num_boxes`): What to write at each box.
        scores (`list[float]` of length `num_boxes`, *optional*): Written behind the names. Boxes of higher score are
            drawn above those of lower score.
        classes (`Iterable[str]`, *optional*): All names that there are, which makes the colors of the first twelve
            differ. Other names may share one.

    Returns:
        `PIL.Image.Image`: An RGB image, larger than `image` by a factor of `ceil(480 / longer side)`.

    Raises:
        ValueError: If boxes, names and scores differ in number.
        ImportError: If supervision is not installed.

    Example:

    ```python
    >>> from PIL import Image
    >>> image = Image.new("RGB", (640, 480), "white")
    >>> drawn = draw_detections(image, [[100, 100, 300, 250]], ["cat"], [0.87])
    >>> drawn.size, drawn.getpixel((100, 200)) == (255, 255, 255)
    ((640, 480), False)

    ```
    """
    supervision = _supervision()
    corners = np.asarray([[float(value) for value in box] for box in boxes], dtype=np.float32).reshape(-1, 4)
    if len(names) != len(corners) or (scores is not None and len(scores) != len(corners)):
        counts = f"{len(corners)} boxes, {len(names)} names" + ("" if scores is None else f", {len(scores)} scores")
        raise ValueError(f"boxes, names and scores must be equally many, got {counts}")

    enlargement = max(1, -(-SMALLEST_LONGER_SIDE // max(image.size)))
    drawn = image.convert("RGB")
    if enlargement > 1:
        drawn = drawn.resize((image.width * enlargement, image.height * enlargement), Image.Resampling.BICUBIC)
    if not len(corners):
        return drawn

    weakest_first = np.argsort([float(score) for score in scores]) if scores is not None else np.arange(len(corners))
    text = [
        names[index] if scores is None else f"{names[index]} {float(scores[index]):.2f}" for index in weakest_first
    ]
    numbers = {name: number for number, name in enumerate(classes)}
    colors = [numbers.get(name, zlib.crc32(name.encode())) % len(_COLORS) for name in names]
    detections = supervision.Detections(
        xyxy=corners[weakest_first] * enlargement, class_id=np.array(colors)[weakest_first]
    )
    palette = supervision.ColorPalette.from_hex(list(_COLORS))
    longer_side = max(drawn.size)
    font_size = max(12, round(longer_side / 50))
    drawn = supervision.BoxAnnotator(color=palette, thickness=max(2, round(longer_side / 400))).annotate(
        drawn, detections
    )
    return supervision.RichLabelAnnotator(
        color=palette,
        font_path=_font_path(),
        font_size=font_size,
        text_padding=max(2, font_size // 5),
        smart_position=len(corners) <= 100,  # moves names apart, in time that grows with the square of their number
    ).annotate(drawn, detections, labels=text)


def hstack_images(left: Image.Image, right: Image.Image, captions: tuple[str, str]) -> Image.Image:
    """Put two images beside each other on white, each with its caption above it.

    Args:
        left (`PIL.Image.Image`): Gives the height.
        right (`PIL.Image.Image`): Scaled to that height.
        captions (`tuple[str, str]`): Of the left and of the right image, one line each.

    Raises:
        ImportError: If matplotlib, whose font is used, is not installed.
    """
    if right.height != left.height:
        width = max(1, round(right.width * left.height / right.height))
        right = right.resize((width, left.height), Image.Resampling.BICUBIC)
    font = ImageFont.truetype(_font_path(), max(14, round(max(left.size) / 36)))
    gap = max(8, left.width // 60)
    widths = [max(image.width, round(font.getlength(caption))) for image, caption in zip((left, right), captions)]
    bar = round(2 * font.size)

    sheet = Image.new("RGB", (sum(widths) + 3 * gap, left.height + bar + gap), "white")
    draw = ImageDraw.Draw(sheet)
    x = gap
    for image, caption, width in zip((left, right), captions, widths):
        draw.text((x, bar / 2), caption, fill="black", font=font, anchor="lm")
        sheet.paste(image.convert("RGB"), (x, bar))
        x += width + gap
    return sheet


def plot_training_curves(history: Sequence[Mapping[str, float]], path: str | os.PathLike) -> None:
    """Plot loss and average precision over a training into an image file.

    Args:
        history (`list[dict[str, float]]`): Rows with `"step"`, the horizontal axis, and any of `"loss"`, `"ap"` and
            `"ap50"` (fractions of 1).
        path (`str` or `os.PathLike`): The file, whose suffix gives the format. Replaced in one step.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    import_extra("matplotlib", "train", "plotting")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)  # draws into memory: works without a display and leaves pyplot's global state alone
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


def _font_path() -> str:
    """A font that comes with matplotlib and knows more than Pillow's own: Greek, Cyrillic, signs such as ≥."""
    matplotlib = import_extra("matplotlib", "train", "drawing text")
    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
