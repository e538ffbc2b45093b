"""Data sets in COCO's format: the annotation file, checked before the first step, and its pictures as training items.

Format: https://cocodataset.org/#format-data, boxes as `[x, y, width, height]` in pixels from the top-left corner.
"""

import json
import logging
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..configuration_dino_detr import UNUSED_LABEL
from .errors import InputError
from .images import PICTURE_SUFFIXES, read_image


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CocoPicture:
    """One picture and its objects, crowd regions included.

    Attributes:
        image_id (`int`): The picture's id in the annotation file.
        path (`Path`): The picture file.
        height (`int`): In pixels, as annotated.
        width (`int`): In pixels, as annotated.
        boxes (`np.ndarray` of shape `(num_objects, 4)`): x, y, width, height in pixels, as annotated, which may reach
            over the picture's border.
        category_ids (`np.ndarray` of shape `(num_objects,)`): Raw category ids.
        areas (`np.ndarray` of shape `(num_objects,)`): In square pixels, of the mask where the file has one.
        iscrowd (`np.ndarray` of shape `(num_objects,)`): 1 where the box holds a crowd rather than one object, else 0.
    """

    image_id: int
    path: Path
    height: int
    width: int
    boxes: np.ndarray
    category_ids: np.ndarray
    areas: np.ndarray
    iscrowd: np.ndarray

    @property
    def clipped_boxes(self) -> np.ndarray:
        """The boxes cut at the picture's border, x, y, width, height in pixels, of shape `(num_objects, 4)`."""
        return clip_boxes(self.boxes, self.height, self.width)


@dataclass(frozen=True)
class CocoData:
    """A checked annotation file.

    Attributes:
        source (`Path`): The annotation file.
        pictures (`list[CocoPicture]`): In the file's order, pictures without objects included.
        categories (`dict[int, str]`): Category id to name, in rising order of id.
    """

    source: Path
    pictures: list[CocoPicture]
    categories: dict[int, str]

    @property
    def name(self) -> str:
        """What people may call it: the folder of the annotation file, or the one above a folder `annotations`."""
        folder = self.source.resolve().parent
        return (folder.parent if folder.name == "annotations" else folder).name or self.source.stem

    @property
    def used_category_ids(self) -> set[int]:
        """The categories that at least one object belongs to."""
        return {int(category_id) for picture in self.pictures for category_id in picture.category_ids}


def read_coco(images: str | Path, annotations: str | Path) -> CocoData:
    """Read and check an annotation file and see that its pictures are there. Neither is ever changed.

    Boxes that are empty, not finite or wholly outside their picture are dropped, boxes that reach over the border are
    kept and counted; both are logged.

    Args:
        images (`str` or `Path`): The folder that the file names of the pictures are relative to.
        annotations (`str` or `Path`): The JSON file, with `images`, `annotations` and `categories`.

    Returns:
        `CocoData`: Pictures, objects and categories.

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
    return CocoData(source, pictures, categories)


def clip_boxes(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cut boxes at the border of their picture.

    Args:
        boxes (`np.ndarray` of shape `(num_boxes, 4)`): x, y, width, height in pixels.
        height (`int`): Of the picture, in pixels.
        width (`int`): Of the picture, in pixels.

    Returns:
        `np.ndarray` of shape `(num_boxes, 4)`: x, y, width, height in pixels; a box outside has no width or no height.

    Example:

    ```python
    >>> clip_boxes(np.array([[-10.0, 5.0, 30.0, 10.0], [50.0, 50.0, 9.0, 9.0]]), height=40, width=40).tolist()
    [[0.0, 5.0, 20.0, 10.0], [40.0, 40.0, 0.0, 0.0]]

    ```
    """
    limit = np.array([width, height])
    top_left = np.clip(boxes[:, :2], 0, limit)
    bottom_right = np.clip(boxes[:, :2] + boxes[:, 2:], 0, limit)
    return np.concatenate([top_left, bottom_right - top_left], axis=1)


def contiguous_id2label(categories: Mapping[int, str]) -> dict[int, str]:
    """Number a data set's categories from 0, in rising order of category id: the classes of a fresh model.

    Example:

    ```python
    >>> contiguous_id2label({7: "cat", 3: "dog"})
    {0: 'dog', 1: 'cat'}

    ```
    """
    return {label: categories[category_id] for label, category_id in enumerate(sorted(categories))}


def label_of_category(data: CocoData, id2label: Mapping[int, str]) -> dict[int, int]:
    """Map a data set's category ids to a model's labels by name, whatever numbers either side uses.

    Args:
        data (`CocoData`): The data set.
        id2label (`Mapping[int, str]`): The model's classes, `config.id2label`.

    Returns:
        `dict[int, int]`: Category id to label, for every category that the model has.

    Raises:
        InputError: If a category that has objects is not among the model's classes.
    """
    label_of_name = {name: int(label) for label, name in id2label.items() if name != UNUSED_LABEL}
    used = {category_id: data.categories[category_id] for category_id in sorted(data.used_category_ids)}
    unknown = [f"{name!r} (id {category_id})" for category_id, name in used.items() if name not in label_of_name]
    if unknown:
        raise InputError(
            f"{data.source}: the model has no class for {_few(unknown)}; its classes are "
            f"{_few(map(repr, label_of_name), 20)}. Rename the categories, or train a model with them"
        )
    return {i: label_of_name[name] for i, name in data.categories.items() if name in label_of_name}


class CocoDetection(Dataset[dict[str, Any]]):
    """The pictures of a `CocoData` with their objects, read when asked for and, for training, augmented.

    Item `i` of a given seed and epoch is always the same, in whatever process and order it is read: this is what lets
    a resumed run see the pictures that the uninterrupted one would have seen.

    Args:
        data (`CocoData`): From [`read_coco`].
        augmentation (`Callable`, *optional*): From [`make_augmentation`]; takes and returns a picture, its boxes
            (x, y, width, height in pixels) and, of shape `(num_boxes,)`, the number of the object each belongs to.
        seed (`int`, *optional*, defaults to 0): With `epoch` and the picture's id, decides the augmentation.
        epoch (`int`, *optional*, defaults to 0): Make one data set per epoch.

    Each item is a dict:
        - `image` (`PIL.Image.Image`): RGB.
        - `annotation` (`dict`): `image_id`, and `annotations` as a list of dicts with `category_id`, `bbox`, `area`
          and `iscrowd`, ready for the image processor.
    """

    def __init__(self, data: CocoData, augmentation: Callable | None = None, seed: int = 0, epoch: int = 0):
        self.data = data
        self.augmentation = augmentation
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.data.pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture = self.data.pictures[index]
        image = read_image(picture.path, (picture.height, picture.width))
        boxes, objects = torch.from_numpy(picture.clipped_boxes), torch.arange(len(picture.boxes))
        areas = torch.from_numpy(picture.areas)
        if self.augmentation is not None:
            # crc32 rather than hash(): the same number in every process
            seed = zlib.crc32(f"{self.seed} {self.epoch} {picture.image_id}".encode())
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                image, boxes, objects = self.augmentation(image, boxes, objects)
            areas = boxes[:, 2] * boxes[:, 3]
        annotations = [
            {
                "category_id": int(picture.category_ids[number]),
                "bbox": boxes[row].tolist(),
                "area": float(areas[row]),
                "iscrowd": int(picture.iscrowd[number]),
            }
            for row, number in enumerate(objects.tolist())
        ]
        return {"image": image, "annotation": {"image_id": picture.image_id, "annotations": annotations}}


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
            f"{source}: is not a COCO detection file, which has lists named {_few(_REQUIRED_FIELDS)}; it has {keys}"
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
            raise InputError(f"{source}: ids of {part!r} must be different integers of 64 bits; got {_few(wrong)}")
    for field, part in (("image_id", "images"), ("category_id", "categories")):
        known = {entry["id"] for entry in content[part]}
        named = [entry[field] for entry in content["annotations"]]
        wrong = sorted({repr(i) for i in named if not isinstance(i, int | float) or i not in known})
        if wrong:
            raise InputError(f"{source}: annotations name {field} {_few(wrong)}, which {part!r} does not list")


def _categories(content: dict, source: Path) -> dict[int, str]:
    categories = {entry["id"]: str(entry["name"]) for entry in sorted(content["categories"], key=lambda c: c["id"])}
    doubled = [name for name, count in Counter(categories.values()).items() if count > 1]
    if doubled:
        raise InputError(
            f"{source}: several categories are named {_few(map(repr, doubled))}; give each its own name, since models "
            "and data sets are matched by name"
        )
    return categories


def _check_files(folder: Path, names: Iterable[str], source: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder of pictures")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and not any(path.suffix.lower() in PICTURE_SUFFIXES for path in folder.rglob("*")):
        raise InputError(f"{folder}: the folder holds no pictures, though {source} names {_few(missing)}")
    if missing:
        raise InputError(f"{folder}: {len(missing)} of the pictures in {source} are missing: {_few(missing)}")


def _picture(entry: dict, objects: list[dict], folder: Path, remarks: Counter[str]) -> CocoPicture:
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
    return CocoPicture(
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


def _few(items: Iterable[str], limit: int = 5) -> str:
    """Name the first few and say how many more there are."""
    items = [str(item) for item in items]
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
