"""Draw sample images with their boxes into a grid, as they are on disk or as training sees them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..utils.errors import InputError
from ..utils.io import ensure_new_files
from ..visualization import check_drawing_dependencies, draw_detections, save_image
from .augmentation import Augmentation
from .dataset import DetectionDataset, DetectionSplit, xywh_to_xyxy
from .images import short_path


_CELL = 480  # pixels, longer side of each image
_GAP = 8  # pixels
_CAPTION_HEIGHT = 20  # pixels


class Sample(NamedTuple):
    """An image of the grid.

    Attributes:
        image (`PIL.Image.Image`): RGB.
        boxes (`np.ndarray` of shape `(num_objects, 4)`): x, y, width, height in pixels.
        names (`list[str]` of length `num_objects`): Text for each box.
        classes (`list[str]`): All class names of the dataset.
        caption (`str`): Text below the image.
    """

    image: Image.Image
    boxes: np.ndarray
    names: Sequence[str]
    classes: Sequence[str]
    caption: str


def draw_image_grid(samples: Iterable[Sample], path: str | Path, columns: int | None = None) -> None:
    """Draw samples into a grid and write it to a new file.

    Args:
        samples (`Iterable[Sample]`): From [`sample_images`] or [`sample_augmented`].
        path (`str` or `Path`): The image file, whose extension gives the format.
        columns (`int`, *optional*): Samples per row; by default about as many as there are rows.

    Raises:
        InputError: If the file exists, its format cannot be written, or there are no samples.
        ImportError: If supervision or matplotlib is not installed.
    """
    path = Path(path)
    ensure_can_draw(path)
    cells = [_draw_cell(sample) for sample in samples]
    if not cells:
        raise InputError(f"{path}: no images to draw")
    columns = columns or math.ceil(math.sqrt(len(cells)))
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) + _GAP for row in rows]
    grid = Image.new("RGB", (columns * (_CELL + _GAP) + _GAP, sum(heights) + _GAP), "white")
    for row_index, row in enumerate(rows):
        for column, cell in enumerate(row):
            grid.paste(cell, (column * (_CELL + _GAP) + _GAP, sum(heights[:row_index]) + _GAP))
    save_image(grid, path)


def ensure_can_draw(path: Path) -> None:
    """Check, before any work is done, that a grid can be drawn into a new file.

    Raises:
        InputError: If the file exists, or its format cannot be written.
        ImportError: If supervision or matplotlib is not installed.
    """
    ensure_new_files(path)
    check_drawing_dependencies(path)


def _draw_cell(sample: Sample) -> Image.Image:
    scale = _CELL / max(sample.image.size)
    size = (max(1, round(sample.image.width * scale)), max(1, round(sample.image.height * scale)))
    boxes = np.asarray(sample.boxes, dtype=np.float64).reshape(-1, 4) * scale
    resized = sample.image.resize(size, Image.Resampling.BICUBIC)
    drawn = draw_detections(resized, xywh_to_xyxy(boxes), sample.names, classes=sample.classes)
    cell = Image.new("RGB", (_CELL, drawn.height + _CAPTION_HEIGHT), "white")
    cell.paste(drawn, (0, 0))
    font = ImageFont.load_default(_CAPTION_HEIGHT * 0.65)
    ImageDraw.Draw(cell).text((2, drawn.height + 2), sample.caption, fill="black", font=font)
    return cell


def sample_images(splits: Mapping[str, DetectionSplit], num_images: int) -> list[Sample]:
    """Sample images evenly from all splits, preferably with objects. Unreadable images are left out."""
    num_per_split = -(-num_images // max(1, len(splits)))
    return [
        sample
        for split, data in splits.items()
        for index in _select_evenly(data, num_per_split)
        for sample in _read_samples({split: DetectionDataset(data)}, index)
    ][:num_images]


def sample_augmented(
    data: DetectionSplit, augmentation: Augmentation, num_images: int, num_views: int, seed: int
) -> list[Sample]:
    """Sample images and return each as it is on disk, followed by its augmentations in `num_views` epochs."""
    datasets = {"original": DetectionDataset(data)}
    datasets |= {f"epoch {epoch}": DetectionDataset(data, augmentation, seed, epoch) for epoch in range(num_views)}
    return [sample for index in _select_evenly(data, num_images) for sample in _read_samples(datasets, index)]


def _select_evenly(data: DetectionSplit, count: int) -> list[int]:
    """Return up to `count` indices, evenly spaced among the images with objects, or among all if none has any."""
    indices = [index for index, image in enumerate(data.images) if len(image.boxes)] or list(range(len(data.images)))
    positions = np.unique(np.linspace(0, len(indices) - 1, min(count, len(indices))).round())
    return [indices[int(position)] for position in positions]


def _read_samples(datasets: Mapping[str, DetectionDataset], index: int) -> list[Sample]:
    """Return image `index` of each dataset, or nothing if it cannot be read, which the check reports."""
    try:
        return [_read_sample(dataset, index, name) for name, dataset in datasets.items()]
    except InputError:
        return []


def _read_sample(dataset: DetectionDataset, index: int, title: str) -> Sample:
    item, categories = dataset[index], dataset.split.categories
    objects = item["annotation"]["annotations"]
    boxes = np.array([each["bbox"] for each in objects], dtype=np.float64).reshape(-1, 4)
    names = [categories[each["category_id"]] + (" (crowd)" if each["iscrowd"] else "") for each in objects]
    caption = f"{title}: {short_path(dataset.split.images[index].path)}"
    return Sample(item["image"], boxes, names, list(categories.values()), caption)
