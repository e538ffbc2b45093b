"""Shared by the readers: their options, which split a name stands for, and boxes as supervision reads them."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ...utils.errors import InputError
from ..dataset import SPLIT_ALIASES, SPLITS, ErrorHandler, raise_input_error, to_box_array, xyxy_to_xywh


Item = TypeVar("Item")
Annotation = tuple[Any, Any]  # a class, and x, y, width, height in pixels or `None`

ROTATED_WARNING = "boxes are rotated: replaced by the upright boxes around them"

_TO_XYWH = {"xywh": lambda boxes: boxes, "xyxy": xyxy_to_xywh}


@dataclass(frozen=True)
class ReadOptions:
    """What a dataset's files do not say, and what to do about errors in them.

    Attributes:
        box_format (`str`): Meaning of a box in COCO files and in tables, whose formats leave it open: `"xywh"` for x,
            y, width, height or `"xyxy"` for corners, both in pixels.
        rotated_boxes (`str`): `"enclose"` replaces a rotated box by the upright box around it, `"refuse"` reports it
            as an error.
        columns (`Mapping[str, str]`): Names of a table's columns by what they contain: `"image"`, `"objects"`,
            `"bbox"` or `"category"`. Others are found by their usual names.
        on_error (`Callable`): Receives each error that makes the dataset unfit for training but not unreadable. By
            default, the first one is raised.

    Raises:
        InputError: If `box_format` or `rotated_boxes` is none of these.
    """

    box_format: str = "xywh"
    rotated_boxes: str = "enclose"
    columns: Mapping[str, str] = field(default_factory=dict)
    on_error: ErrorHandler = raise_input_error

    def __post_init__(self) -> None:
        for name, choices in (("box_format", _TO_XYWH), ("rotated_boxes", ("enclose", "refuse"))):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} is {getattr(self, name)!r}. Choose from {', '.join(choices)}")


DEFAULT_OPTIONS = ReadOptions()


def split_from_name(name: str) -> str | None:
    """Return the split that a name contains as a word, if any.

    Example:

    ```python
    >>> split_from_name("instances_val2017"), split_from_name("Train"), split_from_name("_annotations.coco")
    ('validation', 'train', None)

    ```
    """
    return next((SPLIT_ALIASES[word] for word in re.findall("[a-z]+", name.lower()) if word in SPLIT_ALIASES), None)


def group_by_split(named_paths: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """Map splits to the paths named after them. Paths that are not named after a split are left out.

    Raises:
        InputError: If two paths are named after the same split.
    """
    found: dict[str, Path] = {}
    for name, path in named_paths:
        split = split_from_name(name)
        if split in found:
            raise InputError(
                f"the {split} split may be {found[split]} or {path}. Move one of them away, or give a directory of "
                "images and its COCO file"
            )
        if split:
            found[split] = path
    return {split: found[split] for split in SPLITS if split in found}


def split_folders(folder: Path) -> dict[str, Path]:
    """Return the directories directly inside `folder` that are named after splits."""
    return group_by_split((entry.name, entry) for entry in sorted(folder.iterdir()) if entry.is_dir())


def boxes_to_xywh(boxes: Sequence[Any] | np.ndarray, box_format: str) -> np.ndarray:
    """Convert annotated boxes to x, y, width, height.

    Args:
        boxes (sequence of length `num_boxes`): As annotated. A row that is not four numbers is invalid.
        box_format (`str`): See [`ReadOptions`].

    Returns:
        `np.ndarray` of shape `(num_boxes, 4)`: x, y, width, height in the same unit, NaN for an invalid box.

    Example:

    ```python
    >>> boxes_to_xywh([[1, 2, 31, 22], None], "xyxy").tolist()
    [[1.0, 2.0, 30.0, 20.0], [nan, nan, nan, nan]]

    ```
    """
    return _TO_XYWH[box_format](to_box_array(boxes))


def enclose_rotated_boxes(boxes: np.ndarray, degrees: np.ndarray) -> np.ndarray:
    """Return the smallest upright boxes around boxes that are rotated about their centers.

    Args:
        boxes (`np.ndarray` of shape `(num_boxes, 4)`): x, y, width, height before the rotation.
        degrees (`np.ndarray` of shape `(num_boxes,)`): In either direction, which does not change the result.

    Returns:
        `np.ndarray` of shape `(num_boxes, 4)`: x, y, width, height. A box without width or height stays as it is.

    Example:

    ```python
    >>> enclose_rotated_boxes(np.array([[60.0, 20.0, 20.0, 80.0]]), np.array([90.0])).tolist()
    [[30.0, 50.0, 80.0, 20.0]]

    ```
    """
    angles = np.radians(degrees)[:, None]
    cosines, sines = np.abs(np.cos(angles)).round(12), np.abs(np.sin(angles)).round(12)  # exact for right angles
    sizes = boxes[:, 2:]
    enclosing_sizes = cosines * sizes + sines * sizes[:, ::-1]
    enclosing = np.concatenate([boxes[:, :2] + (sizes - enclosing_sizes) / 2, enclosing_sizes], axis=1)
    return np.where((sizes > 0).all(axis=1, keepdims=True), enclosing, boxes)


def supervision_to_xywh(detections: Any) -> np.ndarray:
    """Return the boxes of supervision's detections as x, y, width, height in pixels.

    supervision stores corners in single precision. Rounding to thousandths of a pixel removes its error, so that a box
    is the same in every format.

    Example:

    ```python
    >>> from types import SimpleNamespace
    >>> supervision_to_xywh(SimpleNamespace(xyxy=np.array([[11.3, 2, 20, 30.125]], dtype=np.float32))).tolist()
    [[11.3, 2.0, 8.7, 28.125]]

    ```
    """
    return np.round(xyxy_to_xywh(detections.xyxy.astype(np.float64)), 3)


def read_valid(
    items: Sequence[Item], read: Callable[[Sequence[Item]], list[Annotation]], invalid: Annotation
) -> list[Annotation]:
    """Read annotations with supervision, which rejects a whole file for one invalid item.

    Args:
        items (sequence of length `num_objects`): Lines or XML elements.
        read (`Callable`): Reads items; raises `ValueError` if one is invalid.
        invalid (`tuple`): Returned for an invalid item.

    Returns:
        `list[tuple]` of length `num_objects`: Class and box of each item.
    """
    try:
        return read(items)
    except ValueError:
        if len(items) > 1:
            return [annotation for item in items for annotation in read_valid([item], read, invalid)]
        return [invalid]
