"""Generate the `shapes` dataset: images of circles, squares, triangles, stars and crosses, in the COCO format.

It needs no download, so a detector can be trained and evaluated anywhere. Shapes of all sizes, roughly upright and
each class with a typical hue, overlap each other and extend beyond the image. Lines and blobs that are not objects,
uneven light and noise make detection harder. Every image depends only on the seed, its split and its number, so splits
share no image and a larger dataset begins with the images of a smaller one.

    python -m hf_dino.data.shapes --output_dir shapes --num_train 2000
"""

import argparse
import colorsys
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from ..utils.errors import InputError
from ..utils.io import atomic_directory


def _regular(num_corners: int, *radii: float, first: float = -90.0) -> np.ndarray:
    """Return corners (x, y) of shape `(num_corners, 2)`, evenly around the origin, cycling through the radii.

    `first` is the direction of the first corner in degrees, clockwise from the right since y points down; -90 is up.
    """
    angle = math.radians(first) + np.arange(num_corners) * (2 * math.pi / num_corners)
    radius = np.resize(np.array(radii or (1.0,)), num_corners)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


_ARM = 0.32  # half the width of a cross's arms

# Corners (x, y) around the origin, scaled so that all shapes look equally large. The order gives the category ids,
# from 1.
OUTLINES: dict[str, np.ndarray] = {
    "circle": _regular(64) * 0.9,
    "square": _regular(4, first=45.0) * 1.15,
    "triangle": _regular(3) * 1.2,
    "star": _regular(10, 1.25, 0.52),
    "cross": np.array(
        [(_ARM, 1), (_ARM, _ARM), (1, _ARM), (1, -_ARM), (_ARM, -_ARM), (_ARM, -1)]
        + [(-_ARM, -1), (-_ARM, -_ARM), (-1, -_ARM), (-1, _ARM), (-_ARM, _ARM), (-_ARM, 1)]
    )
    * 1.1,
}

# Typical hue of each class, in [0, 1): a hint that speeds up the first minutes of training, but only a hint, since one
# object in ten is closer to the hue of another class.
_HUES = {name: index / len(OUTLINES) for index, name in enumerate(OUTLINES)}
_HUE_SPREAD = 0.06  # standard deviation

_SUPERSAMPLING = 4  # images are drawn this much larger, then shrunk: smooth edges, boxes exact to a quarter pixel
_OBJECT_SIDES = (0.18, 0.5)  # length of an object, as a fraction of the image's side
_MAX_TILT = 15.0  # degrees to either side
_MAX_OBJECTS = 5
_EMPTY_IMAGES = 0.05  # fraction of images without objects
_MIN_INSIDE = 0.75  # fraction of an object inside the image
_MIN_VISIBLE = 0.7  # fraction of that not covered by other objects
_MIN_CONTRAST = 70  # distance between the colors of an image, of 255, in the channel that differs most
_PLACEMENT_TRIES = 12  # then the object is left out
_MIN_IMAGE_SIZE = 32  # pixels; the smallest objects are then five pixels long

_SETTINGS_FILE = "shapes.json"
_VERSION = 1  # increase it if the same settings give other images

Color = tuple[int, int, int]


class DrawnObject(NamedTuple):
    """One object of an image.

    Attributes:
        name (`str`): Class, a key of `OUTLINES`.
        outline (`np.ndarray` of shape `(num_corners, 2)`): Corners (x, y) in pixels of the image, unclipped.
        box (`tuple[float, float, float, float]`): x, y, width, height in pixels: tight around the part of the outline
            inside the image, including parts covered by other objects.
        area (`float`): Area of that part in square pixels.
    """

    name: str
    outline: np.ndarray
    box: tuple[float, float, float, float]
    area: float


def draw_image(rng: np.random.Generator, image_size: int) -> tuple[Image.Image, list[DrawnObject]]:
    """Draw one image.

    Args:
        rng (`np.random.Generator`): The only source of randomness.
        image_size (`int`): Height and width in pixels.

    Returns:
        `tuple[Image.Image, list[DrawnObject]]`: An RGB image, and its objects from back to front.

    Example:

    ```python
    >>> image, objects = draw_image(np.random.default_rng(3), image_size=160)
    >>> image.size, {drawn.name for drawn in objects} <= set(OUTLINES)
    ((160, 160), True)

    ```
    """
    background = _random_color(rng, saturation=(0.0, 0.5), value=(0.15, 0.9))
    canvas = _background(rng, background, image_size)
    _draw_distractors(rng, canvas, num_blobs=int(rng.integers(0, 9)), num_lines=int(rng.integers(0, 4)))

    objects: list[DrawnObject] = []
    colors = [background]
    visible: list[np.ndarray] = []  # per object (image_size, image_size): its visible pixels
    num_objects = 0 if rng.random() < _EMPTY_IMAGES else int(rng.integers(1, _MAX_OBJECTS + 1))
    for _ in range(num_objects):
        placed = _place(rng, image_size, [drawn.area for drawn in objects], visible)
        if placed is None:
            continue
        drawn, mask = placed
        color = _contrasting_color(rng, colors, _HUES[drawn.name])
        _draw_outline(rng, canvas, drawn, color)
        objects.append(drawn)
        colors.append(color)
        visible = [seen & ~mask for seen in visible] + [mask]

    _draw_distractors(rng, canvas, num_blobs=0, num_lines=int(rng.integers(0, 3)))
    return _add_camera_noise(rng, canvas), objects


def _random_color(
    rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float], hue: float | None = None
) -> Color:
    """Sample a color of any hue, or of one near `hue`."""
    hue = rng.random() if hue is None else rng.normal(hue, _HUE_SPREAD) % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, rng.uniform(*saturation), rng.uniform(*value))
    return round(255 * red), round(255 * green), round(255 * blue)


def _contrasting_color(rng: np.random.Generator, others: list[Color], hue: float) -> Color:
    """Sample a strong color near `hue` that differs from `others`, as much as possible if none is far enough."""
    candidates = [_random_color(rng, saturation=(0.4, 1.0), value=(0.35, 1.0), hue=hue) for _ in range(16)]
    distance = np.abs(np.subtract(np.array(candidates)[:, None], np.array(others)[None])).max(-1).min(-1)
    return candidates[int(np.argmax(np.minimum(distance, _MIN_CONTRAST)))]  # the first that is far enough


def _background(rng: np.random.Generator, color: Color, image_size: int) -> Image.Image:
    """Return a canvas of `color` with large soft spots, by enlarging a few random pixels smoothly."""
    cells = np.array(color) + rng.integers(-35, 36, size=(*rng.integers(2, 7, size=2), 3))
    spots = Image.fromarray(cells.clip(0, 255).astype(np.uint8)).resize((image_size,) * 2, Image.Resampling.BICUBIC)
    return spots.resize((image_size * _SUPERSAMPLING,) * 2, Image.Resampling.NEAREST)


def _draw_distractors(rng: np.random.Generator, canvas: Image.Image, num_blobs: int, num_lines: int) -> None:
    """Draw what is not an object: irregular blobs, smaller than any object, and thin lines."""
    draw, side = ImageDraw.Draw(canvas), canvas.width
    for _ in range(num_blobs):
        angles = np.sort(rng.uniform(0, 2 * math.pi, size=7))
        radii = rng.uniform(0.3, 1.0, size=(7, 1)) * rng.uniform(0.01, 0.035) * side
        corners = rng.uniform(0, side, size=2) + radii * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        draw.polygon(_points(corners), fill=_random_color(rng, (0.0, 1.0), (0.1, 1.0)))
    for _ in range(num_lines):
        width = int(rng.integers(_SUPERSAMPLING, 2 * _SUPERSAMPLING + 1))
        draw.line(
            _points(rng.uniform(0, side, size=(2, 2))), fill=_random_color(rng, (0.0, 1.0), (0.1, 1.0)), width=width
        )


def _points(corners: np.ndarray) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in corners]


def _place(
    rng: np.random.Generator, image_size: int, areas: list[float], visible: list[np.ndarray]
) -> tuple[DrawnObject, np.ndarray] | None:
    """Sample an object that leaves enough of itself and of the objects below it visible; `None` after some tries."""
    name = str(rng.choice(list(OUTLINES)))
    for _ in range(_PLACEMENT_TRIES):
        # uniform in the logarithm: halving and doubling the size are equally likely
        side = image_size * math.exp(rng.uniform(math.log(_OBJECT_SIDES[0]), math.log(_OBJECT_SIDES[1])))
        tilt = math.radians(rng.uniform(-_MAX_TILT, _MAX_TILT))
        outline = rng.uniform(0, image_size, size=2) + OUTLINES[name] @ _turn(tilt) * (side / 2)
        drawn_large = Image.new("L", (image_size * _SUPERSAMPLING,) * 2)
        ImageDraw.Draw(drawn_large).polygon(_points(outline * _SUPERSAMPLING), fill=255)
        bounds = drawn_large.getbbox()
        area = drawn_large.histogram()[255] / _SUPERSAMPLING**2
        if bounds is None or area < _MIN_INSIDE * _polygon_area(outline):
            continue
        mask = np.asarray(drawn_large.reduce(_SUPERSAMPLING)) > 127
        if all(
            np.count_nonzero(seen & ~mask) >= _MIN_VISIBLE * below_area
            for seen, below_area in zip(visible, areas, strict=True)
        ):
            left, top, right, bottom = (edge / _SUPERSAMPLING for edge in bounds)
            return DrawnObject(name, outline, (left, top, right - left, bottom - top), area), mask
    return None


def _turn(angle: float) -> np.ndarray:
    return np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])


def _polygon_area(corners: np.ndarray) -> float:
    """Return the area inside corners (x, y) by the shoelace formula."""
    x, y = corners.T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def _draw_outline(rng: np.random.Generator, canvas: Image.Image, drawn: DrawnObject, color: Color) -> None:
    """Fill the outline, half of the time with a darker rim."""
    draw, center = ImageDraw.Draw(canvas), drawn.outline.mean(axis=0)
    shade = rng.uniform(0.4, 0.75) if rng.random() < 0.5 else 1.0
    rim = (round(color[0] * shade), round(color[1] * shade), round(color[2] * shade))
    draw.polygon(_points(drawn.outline * _SUPERSAMPLING), fill=rim)
    draw.polygon(_points((center + 0.8 * (drawn.outline - center)) * _SUPERSAMPLING), fill=color)


def _add_camera_noise(rng: np.random.Generator, canvas: Image.Image) -> Image.Image:
    """Shrink the canvas and add a little blur, uneven light and noise, as a camera does."""
    image = canvas.reduce(_SUPERSAMPLING).filter(ImageFilter.GaussianBlur(rng.uniform(0.0, 0.7)))
    ramp = np.linspace(-1, 1, image.width)
    light = 1 + rng.uniform(-0.2, 0.2) * ramp[None, :, None] + rng.uniform(-0.2, 0.2) * ramp[:, None, None]
    amplitude = int(rng.integers(2, 16))
    noise = rng.integers(-amplitude, amplitude + 1, size=(image.height, image.width, 3), dtype=np.int8)
    return Image.fromarray((np.asarray(image) * light + noise).clip(0, 255).astype(np.uint8))


def generate_shapes(
    output: Path,
    *,
    seed: int = 0,
    image_size: int = 160,
    num_train: int = 2000,
    num_val: int = 200,
    num_test: int = 200,
) -> Path:
    """Write the dataset, unless it exists already. Call it in one process at a time.

    Args:
        output (`Path`): Directory for `{train,val,test}/*.png`, `{train,val,test}.json` in the COCO format (boxes x,
            y, width, height in pixels; category ids from 1 in the order of `OUTLINES`) and `shapes.json` with the
            settings. It appears when it is complete; a killed process leaves nothing under this name.
        seed (`int`): Random seed. With the same numpy and Pillow, the same settings give bitwise identical files.
        image_size (`int`): Height and width in pixels; objects grow with it.
        num_train (`int`): Number of images to train on.
        num_val (`int`): Number of images to choose the best checkpoint with.
        num_test (`int`): Number of images to measure the final result with.

    Returns:
        `Path`: `output`.

    Raises:
        InputError: If `output` contains anything but this dataset, or a number is out of range.
    """
    counts = {"train": num_train, "val": num_val, "test": num_test}
    if image_size < _MIN_IMAGE_SIZE:
        raise InputError(f"image_size must be at least {_MIN_IMAGE_SIZE} pixels, got {image_size}")
    if seed < 0 or min(counts.values()) < 0:
        raise InputError(f"seed and numbers of images must not be negative, got seed={seed} and {counts}")
    settings = {"version": _VERSION, "seed": seed, "image_size": image_size, **counts}
    if _exists(output, settings):
        return output
    with atomic_directory(output) as folder:
        for stream, (split, count) in enumerate(counts.items()):
            _write_split(folder, split, count, image_size, (seed, stream))
        (folder / _SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return output


def _exists(output: Path, settings: dict[str, int]) -> bool:
    """Return whether `output` contains the dataset with these settings.

    Raises:
        InputError: If it contains anything else.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    advice = "Choose another directory, or remove this one if it is no longer needed"
    try:
        found = json.loads((output / _SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{output}: is not empty and not a shapes dataset. {advice}") from None
    if found != settings:
        raise InputError(f"{output}: is another shapes dataset, with {found} instead of {settings}. {advice}")
    for split in ("train", "val", "test"):
        count = sum(1 for _ in (output / split).glob("*.png"))
        if count != settings[split] or not (output / f"{split}.json").is_file():
            raise InputError(
                f"{output}: files are missing, {count} of {settings[split]} {split} images found. {advice}"
            )
    return True


def _write_split(folder: Path, split: str, count: int, image_size: int, stream: tuple[int, int]) -> None:
    """Write the images and annotations of a split. `stream` and an image's number seed that image."""
    (folder / split).mkdir()
    names = list(OUTLINES)
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in tqdm(range(count), desc=f"drawing {split} images", disable=None):  # silent without a terminal
        image, objects = draw_image(np.random.default_rng((*stream, index)), image_size)
        record = {"id": index + 1, "file_name": f"{index + 1:06}.png", "width": image_size, "height": image_size}
        image.save(folder / split / str(record["file_name"]), compress_level=1)  # noise does not compress well anyway
        records.append(record)
        annotations += [
            {
                "id": len(annotations) + position,
                "image_id": record["id"],
                "category_id": names.index(drawn.name) + 1,
                "bbox": list(drawn.box),
                "area": drawn.area,
                "iscrowd": 0,
            }
            for position, drawn in enumerate(objects, start=1)
        ]
    content = {
        "info": {"description": f"hf_dino shapes, {split}, generated"},
        "licenses": [],
        "images": records,
        "annotations": annotations,
        "categories": [{"id": id_, "name": name, "supercategory": "shape"} for id_, name in enumerate(names, start=1)],
    }
    (folder / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")


_OPTION_HELP = {
    "seed": "Random seed",
    "image_size": "Height and width of the images in pixels",
    "num_train": "Number of images to train on",
    "num_val": "Number of validation images",
    "num_test": "Number of test images",
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. `arguments` default to those of the process."""
    parser = argparse.ArgumentParser(prog="python -m hf_dino.data.shapes", description="Draw the shapes dataset.")
    parser.add_argument(
        *("--output_dir", "--output-dir", "--output"),
        dest="output",
        type=Path,
        required=True,
        metavar="PATH",
        help="Directory to write. Must not exist, be empty, or contain the same dataset.",
    )
    for name, default in (generate_shapes.__kwdefaults__ or {}).items():
        spellings = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])
        help_text = f"{_OPTION_HELP[name]} (default: {default})."
        parser.add_argument(*spellings, type=int, default=default, metavar="INTEGER", help=help_text)
    try:
        print(generate_shapes(**vars(parser.parse_args(arguments))))
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
