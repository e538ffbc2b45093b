"""A sheet of sample images with their boxes, to see in a minute what a model would be shown."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..utils.errors import InputError
from ..utils.io import ensure_new_files
from ..visualization import check_drawing_dependencies, draw_detections, save_image
from .augmentation import Augmentation
from .boxes import xywh_to_xyxy
from .dataset import DetectionDataset, DetectionSplit
from .images import short_name


_CELL = 480  # pixels, the longer side of each image on the sheet
_GAP = 8
_CAPTION = 20  # pixels, the height of a line


class Sample(NamedTuple):
    """An image on a sheet.

    Attributes:
        image (`PIL.Image.Image`): RGB.
        boxes (`np.ndarray` of shape `(num_objects, 4)`): x, y, width, height in pixels.
        names (`list[str]` of length `num_objects`): What to write at each box.
        classes (`list[str]`): All names in the dataset.
        caption (`str`): What to write below.
    """

    image: Image.Image
    boxes: np.ndarray
    names: Sequence[str]
    classes: Sequence[str]
    caption: str


def draw_image_grid(samples: Iterable[Sample], path: str | Path, columns: int | None = None) -> None:
    """Draw samples side by side into a new file.

    Args:
        samples (`Iterable[Sample]`): From [`choose_samples`], for instance.
        path (`str` or `Path`): The image file, whose suffix gives the format.
        columns (`int`, *optional*): Samples in a row; by default about as many as there are rows.

    Raises:
        InputError: If there is such a file already, no images of its suffix can be written, or there are no samples.
        ImportError: If supervision or matplotlib is not installed.
    """
    path = Path(path)
    require_new(path)
    cells = [_cell(sample) for sample in samples]
    if not cells:
        raise InputError(f"{path}: there is no image to draw")
    columns = columns or math.ceil(math.sqrt(len(cells)))
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) + _GAP for row in rows]
    sheet = Image.new("RGB", (columns * (_CELL + _GAP) + _GAP, sum(heights) + _GAP), "white")
    for number, row in enumerate(rows):
        for column, cell in enumerate(row):
            sheet.paste(cell, (column * (_CELL + _GAP) + _GAP, sum(heights[:number]) + _GAP))
    save_image(sheet, path)


def require_new(path: Path) -> None:
    """See, before the work is done, that a sheet can be drawn into a new file.

    Raises:
        InputError: If there is such a file already, or no images of its suffix can be written.
        ImportError: If supervision or matplotlib is not installed.
    """
    ensure_new_files(path)
    check_drawing_dependencies(path)


def _cell(sample: Sample) -> Image.Image:
    factor = _CELL / max(sample.image.size)
    size = (max(1, round(sample.image.width * factor)), max(1, round(sample.image.height * factor)))
    boxes = np.asarray(sample.boxes, dtype=np.float64).reshape(-1, 4) * factor
    resized = sample.image.resize(size, Image.Resampling.BICUBIC)
    drawn = draw_detections(resized, xywh_to_xyxy(boxes), sample.names, classes=sample.classes)
    cell = Image.new("RGB", (_CELL, drawn.height + _CAPTION), "white")
    cell.paste(drawn, (0, 0))
    font = ImageFont.load_default(_CAPTION * 0.65)
    ImageDraw.Draw(cell).text((2, drawn.height + 2), sample.caption, fill="black", font=font)
    return cell


def choose_samples(splits: Mapping[str, DetectionSplit], count: int) -> list[Sample]:
    """Choose images evenly over the splits, with objects where there are any, and leave out what cannot be read."""
    share = -(-count // max(1, len(splits)))
    return [
        sample
        for split, data in splits.items()
        for index in _spread(data, share)
        for sample in _samples({split: DetectionDataset(data)}, index)
    ][:count]


def choose_augmented(
    data: DetectionSplit, augmentation: Augmentation, count: int, views: int, seed: int
) -> list[Sample]:
    """Choose `count` images, each as it is and then as `views` epochs of training see it."""
    datasets = {"as it is": DetectionDataset(data)}
    datasets |= {f"epoch {epoch}": DetectionDataset(data, augmentation, seed, epoch) for epoch in range(views)}
    return [sample for index in _spread(data, count) for sample in _samples(datasets, index)]


def _spread(data: DetectionSplit, count: int) -> list[int]:
    """Numbers of up to `count` images, evenly over those with objects, or over all if none has any."""
    with_objects = [index for index, image in enumerate(data.images) if len(image.boxes)]
    indices = with_objects or list(range(len(data.images)))
    return [
        indices[int(place)] for place in np.unique(np.linspace(0, len(indices) - 1, min(count, len(indices))).round())
    ]


def _samples(datasets: Mapping[str, DetectionDataset], index: int) -> list[Sample]:
    """Image `index` of each; none if it cannot be read, which is for the check to say."""
    try:
        return [_sample(dataset, index, name) for name, dataset in datasets.items()]
    except InputError:
        return []


def _sample(dataset: DetectionDataset, index: int, caption: str) -> Sample:
    item: dict[str, Any] = dataset[index]
    objects = item["annotation"]["annotations"]
    boxes = np.array([each["bbox"] for each in objects], dtype=np.float64).reshape(-1, 4)
    names = [
        dataset.data.categories[each["category_id"]] + (" (crowd)" if each["iscrowd"] else "") for each in objects
    ]
    classes = list(dataset.data.categories.values())
    return Sample(item["image"], boxes, names, classes, f"{caption}: {short_name(dataset.data.images[index].path)}")
