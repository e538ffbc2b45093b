"""Annotated images, the splits they form, how readers build them, and the torch dataset that training reads."""

import logging
import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..utils.errors import BrokenInputError, InputError, count_of, summarize_list
from ..utils.names import match_names, named_classes
from .augmentation import Augmentation, NoAugmentation, seed_per_image
from .images import ImageSource, get_image_size, is_image_file, read_image


logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
SPLIT_ALIASES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}

ANNOTATION_DTYPE = np.dtype(
    [("image_id", "<i8"), ("category_id", "<i8"), ("bbox", "<f8", 4), ("area", "<f8"), ("iscrowd", "<i8")]
)
"""One annotation: original COCO ids, box as x, y, width, height in pixels, area in square pixels, `iscrowd` 0 or 1."""

_TRUTH_TYPES = (bool, np.bool_)
_MAX_PIXELS = 2**31  # no image is larger
# some tools write numbers as text, others as truth values
_CROWD_FLAGS = {
    **dict.fromkeys(("None", "", "0", "0.0", "False", "false"), 0),
    **dict.fromkeys(("1", "1.0", "True", "true"), 1),
}

ErrorHandler = Callable[[str], None]
"""Receives an error that makes the dataset unfit for training, although the rest of it can still be read."""


def raise_input_error(message: str) -> NoReturn:
    """Stop at the first error: the default [`ErrorHandler`]."""
    raise BrokenInputError(message)


@dataclass(frozen=True)
class AnnotatedImage:
    """One image and its annotations.

    Attributes:
        image_id (`int`): The image's id in the annotation file, or its number counted from 1.
        path (`Path` or `ImageFileLike`): The image file, or anything else that [`read_image`] takes.
        height (`int`): In pixels, as annotated.
        width (`int`): In pixels, as annotated.
        boxes (`np.ndarray` of shape `(num_objects, 4)`): x, y, width, height in pixels, as annotated. A box may extend
            beyond the image.
        category_ids (`np.ndarray` of shape `(num_objects,)`): Category ids of the dataset.
        areas (`np.ndarray` of shape `(num_objects,)`): In square pixels: the mask's area if annotated, else the box's.
        iscrowd (`np.ndarray` of shape `(num_objects,)`): 1 if the box contains a group of objects, else 0. Such a box
            is not trained on, and detections inside it are ignored by the evaluation.
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
        """Read the pixels with [`read_image`], checking the annotated size."""
        return read_image(self.path, (self.height, self.width))

    @property
    def clipped_boxes(self) -> np.ndarray:
        """The boxes clipped to the image: x, y, width, height in pixels, of shape `(num_objects, 4)`."""
        return clip_boxes(self.boxes, self.height, self.width)


@dataclass(frozen=True)
class DetectionSplit:
    """One split of a dataset, read and checked.

    Attributes:
        source (`Path` or `str`): The annotation file or directory, or the dataset's id on the Hub.
        images (`list[AnnotatedImage]`): In the order of the source, including images without objects.
        categories (`dict[int, str]`): Category id to name, by ascending id.
        warnings (`dict[str, list[str]]`): What was corrected, mapped to the path of the image, once per correction.
        format (`str`): Display name of the format that was detected, if any.
        box_format (`str`): `box_format` of the [`ReadOptions`] that it was read with.
    """

    source: Path | str
    images: list[AnnotatedImage]
    categories: dict[int, str]
    warnings: Mapping[str, Sequence[str]] = field(default_factory=dict)
    format: str = ""
    box_format: str = "xywh"

    @property
    def name(self) -> str:
        """Display name: the dataset directory (its parent if called `annotations` or after a split), or the Hub id."""
        if isinstance(self.source, str):
            return self.source
        path = self.source.resolve()
        folder = path if path.is_dir() else path.parent
        return (folder.parent if folder.name in ("annotations", *SPLIT_ALIASES) else folder).name or path.stem

    @property
    def used_category_ids(self) -> set[int]:
        """The ids of the categories that have at least one object."""
        return {int(category_id) for image in self.images for category_id in image.category_ids}


class DetectionDataset(Dataset[dict[str, Any]]):
    """Torch dataset over a [`DetectionSplit`]: reads each image on access and augments it.

    An item depends on `seed`, `epoch` and the image's id only, whichever process reads it and in whatever order.
    A resumed run therefore sees the same images as an uninterrupted one.

    Args:
        split (`DetectionSplit`): From [`read_data`] or [`read_coco`].
        augmentation (`Augmentation`, *optional*): From [`make_augmentation`]; none by default.
        seed (`int`, *optional*, defaults to 0): Seed of the augmentation.
        epoch (`int`, *optional*, defaults to 0): Epoch, counted from 0. Make one dataset per epoch.

    Each item is a dict:
        - `image` (`PIL.Image.Image`): RGB.
        - `annotation` (`dict`): `image_id`, and `annotations` as a list of dicts with `category_id`, `bbox`, `area`
          and `iscrowd`, as the image processor takes them.
    """

    def __init__(self, split: DetectionSplit, augmentation: Augmentation | None = None, seed: int = 0, epoch: int = 0):
        self.split = split
        self.augmentation = augmentation or NoAugmentation()
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.split.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.split.images[index]
        image, boxes, areas = record.read(), torch.from_numpy(record.clipped_boxes), torch.from_numpy(record.areas)
        with seed_per_image(self.seed, self.epoch, record.image_id):
            image, boxes, areas, objects = self.augmentation(image, boxes, areas)
        annotations = [
            {
                "category_id": int(record.category_ids[object_index]),
                "bbox": box,
                "area": area,
                "iscrowd": int(record.iscrowd[object_index]),
            }
            for box, area, object_index in zip(boxes.tolist(), areas.tolist(), objects.tolist())
        ]
        return {"image": image, "annotation": {"image_id": record.image_id, "annotations": annotations}}


class AnnotatedImageBuilder:
    """Build the [`AnnotatedImage`]s of a split from what a file contains, and count the boxes that were corrected.

    Boxes that are empty, non-finite or outside their image are dropped. Boxes that extend beyond the image are kept
    and counted.

    Args:
        source (`Path` or `str`): Source of the dataset.
        split (`str`, *optional*): Named in messages, for a source with several splits.
        on_error (`Callable`, *optional*): Called if the size of an image is neither annotated nor readable, or a
            category's name is not one line of text. Raises by default.
    """

    def __init__(self, source: Path | str, split: str = "", on_error: ErrorHandler = raise_input_error):
        self.source = source
        self.title = f"{source} ({split})" if split else str(source)
        self.on_error = on_error
        self.warnings: dict[str, list[str]] = defaultdict(list)
        self._images: list[dict[str, Any]] = []
        self._boxes: list[np.ndarray] = []
        self._category_ids: list[int] = []
        self._areas: list[Any] = []
        self._iscrowd: list[Any] = []

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
            size (`tuple[int, int]` or `None`): Annotated `(height, width)` in pixels; read from the image if `None`.
            boxes (sequence of length `num_objects`): x, y, width, height in pixels. Anything that is not four finite
                numbers is dropped.
            category_ids (`Sequence[int]` of length `num_objects`): Category ids of the dataset.
            image_id (`int`, *optional*): Defaults to the image's number, counted from 1.
            areas (sequence of length `num_objects`, *optional*): In square pixels, `None` for the area of the box.
                Anything else that is not a positive number is replaced by it.
            iscrowd (sequence of length `num_objects`, *optional*): 1, `"1"` or `True` for a group of objects. Anything
                else that is not 0 is read as 0.
        """
        try:
            height, width = size or get_image_size(path)
        except InputError as error:
            self.on_error(str(error))
            return
        number = len(self._images) + 1
        image_id = number if image_id is None else image_id
        self._images.append({"image_id": image_id, "path": path, "height": height, "width": width})
        self._boxes.append(to_box_array(boxes))
        self._category_ids += category_ids
        self._areas += [None] * len(boxes) if areas is None else areas
        self._iscrowd += [0] * len(boxes) if iscrowd is None else iscrowd

    def add_warning(self, warning: str, path: ImageSource | str, count: int = 1) -> None:
        """Record `count` corrections of one kind in an image, or of what else `path` names."""
        if count:
            self.warnings[warning] += [str(path)] * count

    def add_warnings(self, warning: str, paths: Iterable[ImageSource | str]) -> None:
        """Record a correction of one kind in each of several images, or of what else `paths` name."""
        for path in paths:
            self.add_warning(warning, path)

    def build(self, categories: Mapping[int, str]) -> DetectionSplit:
        """Check the objects and the names of the categories, log the warnings and return the split."""
        images = self._build_images()
        for warning, paths in self.warnings.items():
            logger.warning("%s: %d %s", self.title, len(paths), warning)
        if invalid := [f"{name!r} (id {id_})" for id_, name in categories.items() if not _is_one_line(name)]:
            self.on_error(f"{self.title}: category names must be one line of text. Rename {summarize_list(invalid)}")
        return DetectionSplit(self.source, images, dict(sorted(categories.items())), dict(self.warnings))

    def _build_images(self) -> list[AnnotatedImage]:
        # the objects of all images at once, which is many times faster than one image after the other
        owners = np.repeat(np.arange(len(self._images)), [len(boxes) for boxes in self._boxes])
        boxes = np.concatenate([np.empty((0, 4)), *self._boxes])
        kept = self._check_boxes(boxes, owners)
        boxes, owners = boxes[kept], owners[kept]
        category_ids = np.array([self._category_ids[row] for row in kept], dtype=np.int64)
        areas = self._check_areas([self._areas[row] for row in kept], boxes, owners)
        iscrowd = self._check_crowds([self._iscrowd[row] for row in kept], owners)
        ends = np.bincount(owners, minlength=len(self._images)).cumsum().tolist()
        rows = [slice(start, end) for start, end in zip([0, *ends], ends)]
        return [
            AnnotatedImage(
                **image, boxes=boxes[row], category_ids=category_ids[row], areas=areas[row], iscrowd=iscrowd[row]
            )
            for image, row in zip(self._images, rows)
        ]

    def _check_boxes(self, boxes: np.ndarray, owners: np.ndarray) -> np.ndarray:
        """Return the rows of the boxes to keep, and add warnings about these and the others."""
        sides = np.array([(image["height"], image["width"]) for image in self._images], dtype=np.float64).reshape(
            -1, 2
        )
        finite = np.isfinite(boxes).all(axis=1)
        boxes[~finite] = 0
        clipped = clip_boxes(boxes, *sides[owners].T)
        has_size, overlaps_image = (boxes[:, 2:] > 0).all(axis=1), (clipped[:, 2:] > 0).all(axis=1)
        # COCO itself rounds boxes to hundredths of a pixel, so only a full pixel counts as beyond the image
        extends_beyond = overlaps_image & (np.abs(clipped - boxes).max(axis=1, initial=0) >= 1)
        for warning, mask in {
            "boxes are not four finite numbers: dropped": ~finite,
            "boxes have no width or no height: dropped": finite & ~has_size,
            "boxes lie outside their image: dropped": has_size & ~overlaps_image,
            "boxes extend beyond their image: clipped for training": extends_beyond,
        }.items():
            self._add_warnings(warning, owners[mask])
        return np.flatnonzero(overlaps_image)

    def _check_areas(self, areas: Sequence[Any], boxes: np.ndarray, owners: np.ndarray) -> np.ndarray:
        annotated = np.array([to_float(area) for area in areas], dtype=np.float64)
        is_valid = annotated > 0
        is_given = np.array([area is not None for area in areas], dtype=bool)
        self._add_warnings(
            "areas are not positive numbers: replaced by the area of the box", owners[is_given & ~is_valid]
        )
        return np.where(is_valid, annotated, boxes[:, 2] * boxes[:, 3])

    def _check_crowds(self, iscrowd: Sequence[Any], owners: np.ndarray) -> np.ndarray:
        flags = np.array([_CROWD_FLAGS.get(str(value).strip(), -1) for value in iscrowd], dtype=np.int64)
        self._add_warnings("iscrowd values are neither 0 nor 1: read as 0", owners[flags < 0])
        return np.maximum(flags, 0)

    def _add_warnings(self, warning: str, owners: np.ndarray) -> None:
        self.add_warnings(warning, (self._images[owner]["path"] for owner in owners.tolist()))


def _is_one_line(name: str) -> bool:
    """Return whether a name is visible, without line breaks, other control characters or unpaired surrogates."""
    categories = {unicodedata.category(sign) for sign in name}
    is_visible = any(category[0] not in "CZ" for category in categories)  # a zero-width space is of category Cf
    return is_visible and not categories & {"Cc", "Cs", "Zl", "Zp"}


def to_box_array(boxes: Sequence[Any] | np.ndarray) -> np.ndarray:
    """Return annotated boxes as floats of shape `(num_boxes, 4)`, NaN for a box that is not four numbers of pixels."""
    if isinstance(boxes, np.ndarray) and boxes.dtype.kind == "f" and boxes.shape[1:] == (4,):
        array = boxes.astype(np.float64)
    else:
        array = np.array([_to_floats(box) for box in boxes], dtype=np.float64).reshape(-1, 4)
    array[~(np.abs(array) < _MAX_PIXELS).all(axis=1)] = np.nan
    return array


def _to_floats(box: Any) -> list[float]:
    is_sequence = isinstance(box, list | tuple | np.ndarray) and len(box) == 4
    return [to_float(value) for value in box] if is_sequence else [math.nan] * 4


def to_float(value: Any) -> float:
    """Return a finite number, possibly written as text, and NaN for anything else.

    Example:

    ```python
    >>> to_float(" 1.5 "), to_float("12.5px"), to_float("inf"), to_float(None), to_float(True)
    (1.5, nan, nan, nan, nan)

    ```
    """
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    # Python also reads underscores between digits, and digits of other scripts
    is_odd = (not value.isascii() or "_" in value) if isinstance(value, str) else isinstance(value, _TRUTH_TYPES)
    return math.nan if is_odd or not math.isfinite(number) else number


def require_image_files(split: DetectionSplit) -> DetectionSplit:
    """Return `split` if all of its image files exist.

    Raises:
        InputError: If an image file is missing.
    """
    paths = dict.fromkeys(image.path for image in split.images if isinstance(image.path, Path))
    missing = [path for path in paths if not is_file(path)]
    if missing:
        folder = missing[0].parent
        unlisted = _list_images_in(folder) - paths.keys()
        held = f". Images there that are not listed: {_summarize_names(sorted(unlisted), 3)}" if unlisted else ""
        raise InputError(
            f"{split.source}: {count_of(len(missing), 'image')} not found in {displayed_name(str(folder), 300)}: "
            f"{_summarize_names(missing)}{held}. Restore them, or remove them from the annotations"
        )
    return split


def is_file(path: Path) -> bool:
    """Return whether a file exists, also for names that no file can have."""
    with suppress(OSError, ValueError):
        return path.is_file()
    return False


def _list_images_in(folder: Path) -> set[Path]:
    with suppress(OSError, ValueError):
        return {path for path in folder.iterdir() if is_image_file(path)}
    return set()


def displayed_name(name: str, max_length: int = 100) -> str:
    """Return the name of a file or directory as one short line of text."""
    short = name if len(name) <= max_length else f"...{name[-max_length:]}"
    return short if short.isprintable() else repr(short)


def _summarize_names(paths: Sequence[Path], limit: int = 5) -> str:
    return summarize_list([displayed_name(path.name) for path in paths], limit)


def check_unique_names(categories: Mapping[int, str], source: Path | str) -> dict[int, str]:
    """Return `categories` by ascending id, their names without blanks at the ends.

    Raises:
        InputError: If two categories have the same name.
    """
    categories = {id_: name.strip() for id_, name in categories.items()}
    duplicates = [repr(name) for name, count in Counter(categories.values()).items() if count > 1]
    if duplicates:
        raise InputError(
            f"{source}: several categories are named {summarize_list(duplicates)}. Give each its own name, since "
            "models and datasets are matched by name"
        )
    return dict(sorted(categories.items()))


def clip_boxes(boxes: np.ndarray, height: int | np.ndarray, width: int | np.ndarray) -> np.ndarray:
    """Clip boxes to their image.

    Args:
        boxes (`np.ndarray` of shape `(num_boxes, 4)`): x, y, width, height in pixels.
        height (`int` or `np.ndarray` of shape `(num_boxes,)`): Height of the image in pixels.
        width (`int` or `np.ndarray` of shape `(num_boxes,)`): Width of the image in pixels.

    Returns:
        `np.ndarray` of shape `(num_boxes, 4)`: x, y, width, height in pixels. The width or height of a box outside
        the image is zero.

    Example:

    ```python
    >>> clip_boxes(np.array([[-10.0, 5.0, 30.0, 10.0], [50.0, 50.0, 9.0, 9.0]]), height=40, width=40).tolist()
    [[0.0, 5.0, 20.0, 10.0], [40.0, 40.0, 0.0, 0.0]]

    ```
    """
    return xyxy_to_xywh(np.clip(xywh_to_xyxy(boxes), 0, np.stack([width, height, width, height], axis=-1)))


def xywh_to_xyxy(boxes: np.ndarray) -> np.ndarray:
    """Convert boxes from x, y, width, height to x0, y0, x1, y1, in the same unit; both of shape `(num_boxes, 4)`.

    Example:

    ```python
    >>> xywh_to_xyxy(np.array([[10, 20, 5, 6]])).tolist()
    [[10, 20, 15, 26]]

    ```
    """
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def xyxy_to_xywh(boxes: np.ndarray) -> np.ndarray:
    """Convert boxes from x0, y0, x1, y1 to x, y, width, height, in the same unit; both of shape `(num_boxes, 4)`."""
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def to_annotation_array(split: DetectionSplit) -> np.ndarray:
    """Return all annotations of a split in the order of its images, as an array of dtype `ANNOTATION_DTYPE`."""
    annotations = np.empty(sum(len(image.boxes) for image in split.images), ANNOTATION_DTYPE)
    parts = np.split(annotations, np.cumsum([len(image.boxes) for image in split.images])[:-1])
    for part, image in zip(parts, split.images):
        part["image_id"] = image.image_id
        part["category_id"], part["bbox"] = image.category_ids, image.boxes
        part["area"], part["iscrowd"] = image.areas, image.iscrowd
    return annotations


def label_of_category(split: DetectionSplit, id2label: Mapping[int, str]) -> dict[int, int]:
    """Map the category ids of a dataset to the labels of a model by name, as [`~utils.names.match_names`] does.

    Args:
        split (`DetectionSplit`): The split of the dataset.
        id2label (`Mapping[int, str]`): The model's classes, `config.id2label`.

    Returns:
        `dict[int, int]`: Category id to label, for every category that the model has.

    Raises:
        InputError: If a category with objects is not a class of the model, or several categories are the same one.
    """
    classes = named_classes(id2label)
    labels = match_names(split.categories, classes)
    if unknown := [f"{split.categories[id_]!r} (id {id_})" for id_ in sorted(split.used_category_ids - labels.keys())]:
        raise InputError(
            f"{split.source}: the model has no class for {summarize_list(unknown)}; its classes are "
            f"{summarize_list(map(repr, classes.values()), 20)}. Rename the categories, or train a model with them"
        )
    shared = [label for label, count in Counter(labels.values()).items() if count > 1]
    if same := [[split.categories[id_] for id_ in labels if labels[id_] == label] for label in shared]:
        raise InputError(
            f"{split.source}: the categories {summarize_list(map(repr, same[0]))} are all the model's class "
            f"{classes[shared[0]]!r}. Give their objects one category"
        )
    return labels
