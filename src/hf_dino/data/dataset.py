"""What a data set is, whatever files it came from: pictures, objects, categories, and training items of them."""

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..configuration_dino_detr import UNUSED_LABEL
from .errors import InputError
from .images import read_image


@dataclass(frozen=True)
class AnnotatedPicture:
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
class DetectionData:
    """A checked annotation file.

    Attributes:
        source (`Path`): The annotation file.
        pictures (`list[AnnotatedPicture]`): In the file's order, pictures without objects included.
        categories (`dict[int, str]`): Category id to name, in rising order of id.
    """

    source: Path
    pictures: list[AnnotatedPicture]
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


class DetectionDataset(Dataset[dict[str, Any]]):
    """The pictures of a `DetectionData` with their objects, read when asked for and, for training, augmented.

    Item `i` of a given seed and epoch is always the same, in whatever process and order it is read: this is what lets
    a resumed run see the pictures that the uninterrupted one would have seen.

    Args:
        data (`DetectionData`): From [`read_coco`].
        augmentation (`Callable`, *optional*): From [`make_augmentation`]; takes and returns a picture, its boxes
            (x, y, width, height in pixels) and, of shape `(num_boxes,)`, the number of the object each belongs to.
        seed (`int`, *optional*, defaults to 0): With `epoch` and the picture's id, decides the augmentation.
        epoch (`int`, *optional*, defaults to 0): Make one data set per epoch.

    Each item is a dict:
        - `image` (`PIL.Image.Image`): RGB.
        - `annotation` (`dict`): `image_id`, and `annotations` as a list of dicts with `category_id`, `bbox`, `area`
          and `iscrowd`, ready for the image processor.
    """

    def __init__(self, data: DetectionData, augmentation: Callable | None = None, seed: int = 0, epoch: int = 0):
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


def label_of_category(data: DetectionData, id2label: Mapping[int, str]) -> dict[int, int]:
    """Map a data set's category ids to a model's labels by name, whatever numbers either side uses.

    Args:
        data (`DetectionData`): The data set.
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
            f"{data.source}: the model has no class for {few(unknown)}; its classes are "
            f"{few(map(repr, label_of_name), 20)}. Rename the categories, or train a model with them"
        )
    return {i: label_of_name[name] for i, name in data.categories.items() if name in label_of_name}


def few(items: Iterable[str], limit: int = 5) -> str:
    """Name the first few and say how many more there are."""
    items = [str(item) for item in items]
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
