"""What a dataset is, whatever files it came from: images, objects, categories, and training items of them."""

import logging
import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..configuration_dino_detr import UNUSED_LABEL
from ..utils.errors import InputError, summarize_list
from .augmentation import Augmentation, NoAugmentation, seed_per_image
from .images import ImageSource, get_image_size, read_image
from .splits import SPLIT_ALIASES


logger = logging.getLogger(__name__)

ErrorHandler = Callable[[str], None]  # is told what stops a training and yet leaves the rest of the data readable


def raise_input_error(message: str) -> NoReturn:
    """Complain by stopping at once."""
    raise InputError(message)


@dataclass(frozen=True)
class AnnotatedImage:
    """One image and its objects, crowd regions included.

    Attributes:
        image_id (`int`): The image's id in the annotation file, or its number counted from 1.
        path (`Path` or `ImageFileLike`): The image file, or where else the image is: what [`read_image`] takes.
        height (`int`): In pixels, as annotated.
        width (`int`): In pixels, as annotated.
        boxes (`np.ndarray` of shape `(num_objects, 4)`): x, y, width, height in pixels, as annotated, which may reach
            over the image's border.
        category_ids (`np.ndarray` of shape `(num_objects,)`): Raw category ids.
        areas (`np.ndarray` of shape `(num_objects,)`): In square pixels, of the mask where the file has one.
        iscrowd (`np.ndarray` of shape `(num_objects,)`): 1 where the box holds a crowd rather than one object, else 0.
            Such a box is not trained on, and what is found in it counts neither for nor against a model.
    """

    image_id: int
    path: ImageSource
    height: int
    width: int
    boxes: np.ndarray
    category_ids: np.ndarray
    areas: np.ndarray
    iscrowd: np.ndarray

    def read(self) -> Image.Image:
        """Read the pixels: [`read_image`] with the annotated size."""
        return read_image(self.path, (self.height, self.width))

    @property
    def clipped_boxes(self) -> np.ndarray:
        """The boxes cut at the image's border, x, y, width, height in pixels, of shape `(num_objects, 4)`."""
        return clip_boxes(self.boxes, self.height, self.width)


@dataclass(frozen=True)
class DetectionSplit:
    """One split of a dataset, checked.

    Attributes:
        source (`Path` or `str`): The annotation file or folder, or the dataset's name on the Hub.
        images (`list[AnnotatedImage]`): In the source's order, images without objects included.
        categories (`dict[int, str]`): Category id to name, in rising order of id.
        remarks (`dict[str, list[str]]`): What was done to which boxes; for each box the name of its image.
    """

    source: Path | str
    images: list[AnnotatedImage]
    categories: dict[int, str]
    remarks: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What people may call it: its folder, but the one above `annotations` or `train`, or its name on the Hub."""
        if isinstance(self.source, str):
            return self.source
        place = self.source.resolve()
        folder = place if place.is_dir() else place.parent
        return (folder.parent if folder.name in ("annotations", *SPLIT_ALIASES) else folder).name or place.stem

    @property
    def used_category_ids(self) -> set[int]:
        """The categories that at least one object belongs to."""
        return {int(category_id) for image in self.images for category_id in image.category_ids}


class DetectionDataset(Dataset[dict[str, Any]]):
    """The images of a `DetectionSplit` with their objects, read when asked for and, for training, augmented.

    Item `i` of a given seed and epoch is always the same, in whatever process and order it is read: this is what lets
    a resumed run see the images that the uninterrupted one would have seen.

    Args:
        data (`DetectionSplit`): From [`read_data`] or [`read_coco`].
        augmentation (`Augmentation`, *optional*): From [`make_augmentation`]; none by default.
        seed (`int`, *optional*, defaults to 0): With `epoch` and the image's id, decides the augmentation.
        epoch (`int`, *optional*, defaults to 0): Make one dataset per epoch.

    Each item is a dict:
        - `image` (`PIL.Image.Image`): RGB.
        - `annotation` (`dict`): `image_id`, and `annotations` as a list of dicts with `category_id`, `bbox`, `area`
          and `iscrowd`, ready for the image processor.
    """

    def __init__(self, data: DetectionSplit, augmentation: Augmentation | None = None, seed: int = 0, epoch: int = 0):
        self.data = data
        self.augmentation = augmentation or NoAugmentation()
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.data.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.data.images[index]
        image, boxes, areas = record.read(), torch.from_numpy(record.clipped_boxes), torch.from_numpy(record.areas)
        with seed_per_image(self.seed, self.epoch, record.image_id):
            image, boxes, areas, objects = self.augmentation(image, boxes, areas)
        annotations = [
            {
                "category_id": int(record.category_ids[number]),
                "bbox": boxes[row].tolist(),
                "area": float(areas[row]),
                "iscrowd": int(record.iscrowd[number]),
            }
            for row, number in enumerate(objects.tolist())
        ]
        return {"image": image, "annotation": {"image_id": record.image_id, "annotations": annotations}}


class AnnotatedImageBuilder:
    """Makes [`AnnotatedImage`]s of what files say, whatever their format, and remembers what it did to boxes.

    Boxes that are empty, not finite or wholly outside their image are dropped; boxes that reach over the border are
    kept and counted.

    Args:
        source (`Path` or `str`): Of the dataset.
        split (`str`, *optional*): Said in messages, where the source does not say it.
        complain (`Callable`, *optional*): Is told of an image whose size nobody knows. Stops, if not given.
    """

    def __init__(self, source: Path | str, split: str = "", on_error: ErrorHandler = raise_input_error):
        self.source = source
        self.title = f"{source} ({split})" if split else str(source)
        self.on_error = on_error
        self.images: list[AnnotatedImage] = []
        self.remarks: dict[str, list[str]] = defaultdict(list)

    def add(
        self,
        path: ImageSource,
        size: tuple[int, int] | None,
        boxes: Sequence[Any] | np.ndarray,
        category_ids: Sequence[int],
        *,
        image_id: int | None = None,
        areas: Sequence[Any] | None = None,
        iscrowd: Sequence[Any] | None = None,
    ) -> None:
        """Add an image.

        Args:
            path (`Path` or `ImageFileLike`): The image.
            size (`tuple[int, int]` or `None`): `(height, width)` in pixels, as annotated; otherwise the image's.
            boxes (sequence of length `num_objects`): x, y, width, height in pixels, or anything: what is not four
                finite numbers is dropped.
            category_ids (`Sequence[int]` of length `num_objects`): Raw category ids.
            image_id (`int`, *optional*): The image's number, counted from 1, where none is given.
            areas (sequence of length `num_objects`, *optional*): In square pixels; what is no positive number is
                replaced by the area of the box.
            iscrowd (sequence of length `num_objects`, *optional*): 1 (or "1", or `True`) marks a crowd.
        """
        try:
            height, width = size or get_image_size(path)
        except InputError as error:
            self.on_error(str(error))
            return
        found = np.array([_numbers(box) for box in boxes], dtype=np.float64).reshape(-1, 4)
        kept = self._inspect(found, height, width, path)
        areas = [None] * len(found) if areas is None else areas
        iscrowd = [0] * len(found) if iscrowd is None else iscrowd
        self.images.append(
            AnnotatedImage(
                image_id=len(self.images) + 1 if image_id is None else image_id,
                path=path,
                height=height,
                width=width,
                boxes=found[kept],
                category_ids=np.array([category_ids[i] for i in kept], dtype=np.int64),
                areas=np.array([_area(areas[i], found[i]) for i in kept], dtype=np.float64),
                iscrowd=np.array([int(iscrowd[i] in _CROWD) for i in kept], dtype=np.int64),
            )
        )

    def _inspect(self, boxes: np.ndarray, height: int, width: int, path: ImageSource) -> np.ndarray:
        """Return the numbers of the boxes to keep, and remember what is said of them and of the others."""
        finite = np.asarray(np.isfinite(boxes).all(axis=1))
        boxes[~finite] = 0
        clipped = clip_boxes(boxes, height, width)
        has_size, reaches_inside = (boxes[:, 2:] > 0).all(axis=1), (clipped[:, 2:] > 0).all(axis=1)
        # COCO itself rounds boxes to hundredths of a pixel, so only a whole pixel counts as being outside
        over_border = reaches_inside & (np.abs(clipped - boxes).max(axis=1, initial=0) >= 1)
        for what, which in {
            "boxes are not four finite numbers: dropped": ~finite,
            "boxes have no width or no height: dropped": finite & ~has_size,
            "boxes lie outside their image: dropped": has_size & ~reaches_inside,
            "boxes reach over the border of their image: clipped for training": over_border,
        }.items():
            self.remark(what, path, int(which.sum()))
        return np.flatnonzero(reaches_inside)

    def remark(self, what: str, path: ImageSource, count: int = 1) -> None:
        """Remember what was done `count` times about an image."""
        if count:
            self.remarks[what] += [str(path)] * count

    def finish(self, categories: Mapping[int, str]) -> DetectionSplit:
        """Log what was done to boxes, complain of names that no table could show, and hand over the data."""
        for what, images in self.remarks.items():
            logger.warning("%s: %d %s", self.title, len(images), what)
        if unusable := [f"{name!r} (id {number})" for number, name in categories.items() if not _is_one_line(name)]:
            self.on_error(
                f"{self.title}: a category's name must be one line of text; rename {summarize_list(unusable)}"
            )
        return DetectionSplit(self.source, self.images, dict(sorted(categories.items())), dict(self.remarks))


def _is_one_line(name: str) -> bool:
    """Whether there is something to read, without line breaks, other control characters and halves of characters."""
    return bool(name.strip()) and not {unicodedata.category(sign) for sign in name} & {"Cc", "Cs", "Zl", "Zp"}


_CROWD = (1, "1")  # True is 1; some tools write numbers as text


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


def require_image_files(data: DetectionSplit) -> DetectionSplit:
    """Return `data`.

    Raises:
        InputError: If an image file is missing.
    """
    paths = [image.path for image in data.images if isinstance(image.path, Path)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        names = summarize_list(path.name for path in missing)
        raise InputError(
            f"{data.source}: {len(missing)} of the images in {missing[0].parent} are missing: {names}; restore "
            "them, or take them out of the annotations"
        )
    return data


def distinct(categories: Mapping[int, str], source: Path | str) -> dict[int, str]:
    """Return `categories`, in rising order of id.

    Raises:
        InputError: If two have one name.
    """
    doubled = [name for name, count in Counter(categories.values()).items() if count > 1]
    if doubled:
        raise InputError(
            f"{source}: several categories are named {summarize_list(map(repr, doubled))}; give each its own name, since models "
            "and datasets are matched by name"
        )
    return dict(sorted(categories.items()))


def clip_boxes(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cut boxes at the border of their image.

    Args:
        boxes (`np.ndarray` of shape `(num_boxes, 4)`): x, y, width, height in pixels.
        height (`int`): Of the image, in pixels.
        width (`int`): Of the image, in pixels.

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


def label_of_category(data: DetectionSplit, id2label: Mapping[int, str]) -> dict[int, int]:
    """Map a dataset's category ids to a model's labels by name, whatever numbers either side uses.

    Args:
        data (`DetectionSplit`): The dataset.
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
            f"{data.source}: the model has no class for {summarize_list(unknown)}; its classes are "
            f"{summarize_list(map(repr, label_of_name), 20)}. Rename the categories, or train a model with them"
        )
    return {i: label_of_name[name] for i, name in data.categories.items() if name in label_of_name}
