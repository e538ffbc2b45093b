"""Data sets in COCO's format: the annotation file, checked before the first step.

Format: https://cocodataset.org/#format-data, boxes as `[x, y, width, height]` in pixels from the top-left corner.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .dataset import AnnotatedPicture, DetectionData, clip_boxes, few
from .errors import InputError
from .images import PICTURE_SUFFIXES, read_image


logger = logging.getLogger(__name__)


def read_coco(images: str | Path, annotations: str | Path) -> DetectionData:
    """Read and check an annotation file and see that its pictures are there. Neither is ever changed.

    Boxes that are empty, not finite or wholly outside their picture are dropped, boxes that reach over the border are
    kept and counted; both are logged.

    Args:
        images (`str` or `Path`): The folder that the file names of the pictures are relative to.
        annotations (`str` or `Path`): The JSON file, with `images`, `annotations` and `categories`.

    Returns:
        `DetectionData`: Pictures, objects and categories.

    Raises:
        InputError: If the file is missing, truncated, no COCO annotations, or contradicts itself, or if pictures are
            missing. The message names the first few offenders.
    """
    images, source = Path(images), Path(annotations)
    content = _read_json(source)
    categories = _categories(content, source)
    entries = {entry["id"]: entry for entry in content["images"]}
    objects: dict[int, list[dict]] = {image_id: [] for image_id in entries}
    for annotation in content["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    _check_files(images, [entry["file_name"] for entry in entries.values()], source)

    remarks: Counter[str] = Counter()
    pictures = [_picture(entry, objects[image_id], images, remarks) for image_id, entry in entries.items()]
    for what, count in remarks.items():
        if count:
            logger.warning("%s: %d %s", source, count, what)
    return DetectionData(source, pictures, categories)


def _read_json(source: Path) -> dict:
    try:
        content = json.loads(source.read_text(encoding="utf-8-sig"))  # Windows likes to write a byte order mark
    except FileNotFoundError:
        raise InputError(f"{source}: there is no such annotation file") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: is not valid JSON ({error}); the file may be truncated") from None
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror})") from None
    _check_structure(content, source)
    return content


_LARGEST_ID = 2**63 - 1
_CROWD = (1, "1")  # True is 1; some tools write numbers as text
_REQUIRED_FIELDS = {
    "images": {"id", "file_name"},
    "categories": {"id", "name"},
    "annotations": {"image_id", "category_id", "bbox"},
}


def _check_structure(content: Any, source: Path) -> None:
    """Refuse what is not COCO, and ids that are doubled or point nowhere."""
    keys = sorted(content) if isinstance(content, dict) else type(content).__name__
    if not isinstance(content, dict) or any(not isinstance(content.get(part), list) for part in _REQUIRED_FIELDS):
        raise InputError(
            f"{source}: is not a COCO detection file, which has lists named {few(_REQUIRED_FIELDS)}; it has {keys}"
        )
    for part, fields in _REQUIRED_FIELDS.items():
        for entry in content[part]:
            if not isinstance(entry, dict) or not fields <= entry.keys():
                raise InputError(f"{source}: an entry of {part!r} lacks one of {sorted(fields)}: {str(entry)[:200]}")
    for entry in content["images"]:
        sides = [entry[side] for side in ("height", "width") if entry.get(side)]
        if not isinstance(entry["file_name"], str) or not all(_is_count(side) for side in sides):
            raise InputError(
                f"{source}: a picture's file_name must be text, its height and width whole positive numbers: "
                f"{str(entry)[:200]}"
            )
    for part in ("images", "categories"):
        ids = [entry["id"] for entry in content[part]]
        if not ids:
            raise InputError(f"{source}: lists no {part}")
        wrong = [i for i, count in Counter(map(repr, ids)).items() if count > 1] or [
            repr(i) for i in ids if type(i) is not int or abs(i) > _LARGEST_ID
        ]
        if wrong:
            raise InputError(f"{source}: ids of {part!r} must be different integers of 64 bits; got {few(wrong)}")
    for field, part in (("image_id", "images"), ("category_id", "categories")):
        known = {entry["id"] for entry in content[part]}
        named = [entry[field] for entry in content["annotations"]]
        wrong = sorted({repr(i) for i in named if not isinstance(i, int | float) or i not in known})
        if wrong:
            raise InputError(f"{source}: annotations name {field} {few(wrong)}, which {part!r} does not list")


def _categories(content: dict, source: Path) -> dict[int, str]:
    categories = {entry["id"]: str(entry["name"]) for entry in sorted(content["categories"], key=lambda c: c["id"])}
    doubled = [name for name, count in Counter(categories.values()).items() if count > 1]
    if doubled:
        raise InputError(
            f"{source}: several categories are named {few(map(repr, doubled))}; give each its own name, since models "
            "and data sets are matched by name"
        )
    return categories


def _check_files(folder: Path, names: Iterable[str], source: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder of pictures")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and not any(path.suffix.lower() in PICTURE_SUFFIXES for path in folder.rglob("*")):
        raise InputError(f"{folder}: the folder holds no pictures, though {source} names {few(missing)}")
    if missing:
        raise InputError(f"{folder}: {len(missing)} of the pictures in {source} are missing: {few(missing)}")


def _picture(entry: dict, objects: list[dict], folder: Path, remarks: Counter[str]) -> AnnotatedPicture:
    path = folder / entry["file_name"]
    height, width = _annotated_size(entry, path)
    boxes = np.array([_numbers(annotation["bbox"]) for annotation in objects], dtype=np.float64).reshape(-1, 4)
    finite = np.asarray(np.isfinite(boxes).all(axis=1))
    boxes[~finite] = 0
    clipped = clip_boxes(boxes, height, width)
    has_size, reaches_inside = (boxes[:, 2:] > 0).all(axis=1), (clipped[:, 2:] > 0).all(axis=1)
    # COCO itself rounds boxes to hundredths of a pixel, so only a whole pixel counts as being outside
    over_border = reaches_inside & (np.abs(clipped - boxes).max(axis=1, initial=0) >= 1)
    remarks["boxes are not four finite numbers: dropped"] += int((~finite).sum())
    remarks["boxes have no width or no height: dropped"] += int((finite & ~has_size).sum())
    remarks["boxes lie outside their picture: dropped"] += int((has_size & ~reaches_inside).sum())
    remarks["boxes reach over the border of their picture: clipped for training"] += int(over_border.sum())
    kept = np.flatnonzero(reaches_inside)
    areas = [_area(objects[i].get("area"), boxes[i]) for i in kept]
    return AnnotatedPicture(
        image_id=entry["id"],
        path=path,
        height=height,
        width=width,
        boxes=boxes[kept],
        category_ids=np.array([objects[i]["category_id"] for i in kept], dtype=np.int64),
        areas=np.array(areas, dtype=np.float64),
        iscrowd=np.array([int(objects[i].get("iscrowd") in _CROWD) for i in kept], dtype=np.int64),
    )


def _annotated_size(entry: dict, path: Path) -> tuple[int, int]:
    """`(height, width)` from the annotation file, or from the picture where the file does not say."""
    if entry.get("height") and entry.get("width"):
        return int(float(entry["height"])), int(float(entry["width"]))
    image: Image.Image = read_image(path)
    return image.height, image.width


def _is_count(value: Any) -> bool:
    """Whether something is, or spells, a whole positive number."""
    try:
        return float(value) >= 1 and float(value).is_integer()
    except (TypeError, ValueError):
        return False


def _numbers(box: Any) -> list[float]:
    """A box as four floats, NaN where it is anything else."""
    try:
        numbers = [float(value) for value in box]
    except (TypeError, ValueError):
        return [float("nan")] * 4
    return numbers if len(numbers) == 4 else [float("nan")] * 4


def _area(annotated: Any, box: np.ndarray) -> float:
    """The annotated area, which is that of a mask where there is one, or the box's where the file has none."""
    usable = isinstance(annotated, int | float) and math.isfinite(annotated) and annotated > 0
    return float(annotated) if usable else float(box[2] * box[3])
