"""Shared by the readers: their options, which split a name stands for, and rotated boxes."""

import glob
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...utils.errors import InputError, summarize_list
from ...utils.names import to_integer
from ..dataset import SPLIT_ALIASES, SPLITS, ErrorHandler, raise_input_error, to_box_array, to_float, xyxy_to_xywh
from ..images import IMAGE_EXTENSIONS


NO_FILE_WARNING = "images have no annotation file: treated as images without objects"
SHARED_FILE_WARNING = "images share their annotation file with another image"
POLYGON_WARNING = "labels are polygons: their bounding boxes are used"
ROTATED_WARNING = "boxes are rotated: replaced by the upright boxes around them"

_MAX_EXCERPT = 200  # characters of a value in a message
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

_FORMATS_OF_OPTIONS = {"box_format": ("COCO", "datasets"), "columns": ("datasets",)}


def check_options(source: str | Path, format: str, options: ReadOptions) -> None:
    """Check that a format, given by its display name, leaves open what the options say.

    Raises:
        InputError: If an option would have no effect.
    """
    for name, formats in _FORMATS_OF_OPTIONS.items():
        if format not in formats and getattr(options, name) != getattr(DEFAULT_OPTIONS, name):
            raise InputError(
                f"{source}: is in the format of {format}, in which --{name} has no effect. Leave it out; it is for "
                f"{summarize_list(formats)}"
            )


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


def subfolders(folder: Path) -> list[Path]:
    """Return the directories directly inside `folder`, in order; none if it is not a directory."""
    return [folder / entry.name for entry in _entries(folder) if entry.is_dir()]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return what is in a directory by name, of a known type: asking for that of a `Path` would take a while."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def walk_files(folder: Path, extensions: Collection[str]) -> Iterator[Path]:
    """Yield the files below a directory with some extensions, in ascending order of their paths.

    Links to directories are not followed. Links to nothing are among the files, but for images.

    Args:
        folder (`Path`): The directory.
        extensions (`Collection[str]`): In lower case.
    """
    for entry in _entries(folder):
        if entry.is_dir(follow_symlinks=False):
            yield from walk_files(folder / entry.name, extensions)
            continue
        stem, dot, last = entry.name.lower().rpartition(".")
        extension = dot + last if stem else ""
        if extension in extensions and (entry.is_file() or not (extension in IMAGE_EXTENSIONS or entry.is_dir())):
            yield folder / entry.name


def split_folders(folder: Path) -> dict[str, Path]:
    """Return the directories directly inside `folder` that are named after splits."""
    return group_by_split((entry.name, entry) for entry in subfolders(folder))


def child_folder(folder: Path, names: Sequence[str]) -> Path | None:
    """Return the directory inside `folder` that has the first of several names, in upper or lower case."""
    folders = {entry.name.lower(): entry for entry in subfolders(folder)}
    return next((folders[name] for name in names if name in folders), None)


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


def expected_image(folder: Path, stem: str) -> Path:
    """Return where a missing image should be: a file of its name with an unknown extension, or else a JPEG."""
    known = (".txt", ".xml", ".json", *IMAGE_EXTENSIONS)
    others = sorted(folder.glob(f"{glob.escape(stem)}.*")) if folder.is_dir() else []
    return next((path for path in others if path.suffix.lower() not in known), folder / f"{stem}.jpg")


def to_size(height: Any, width: Any) -> tuple[int, int] | None:
    """Return an annotated `(height, width)` in pixels, `None` unless both are positive integers."""
    rows, columns = (to_integer(to_float(side)) or 0 for side in (height, width))
    return (rows, columns) if min(rows, columns) > 0 else None


def excerpt(value: Any) -> str:
    """Return the beginning of a value on one line."""
    return repr(value)[:_MAX_EXCERPT]


def refuse_rotated_boxes(files: Sequence[Path], source: Path, options: ReadOptions) -> None:
    """Report rotated boxes as an error if the options ask for it, given the file of each."""
    if files and options.rotated_boxes == "refuse":
        names = summarize_list(dict.fromkeys(file.name for file in files if file != source), 3)
        options.on_error(
            f"{source}: {len(files)} boxes are rotated{names and f', in {names}'}. To use the upright boxes around "
            "them, add --rotated_boxes enclose"
        )
