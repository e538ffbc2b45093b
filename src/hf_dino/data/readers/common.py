"""Shared by the readers: their options, which split a name stands for, and rotated boxes."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...utils.errors import InputError, summarize_list
from ..dataset import SPLIT_ALIASES, SPLITS, ErrorHandler, raise_input_error


ROTATED_WARNING = "boxes are rotated: replaced by the upright boxes around them"


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
    """

    box_format: str = "xywh"
    rotated_boxes: str = "enclose"
    columns: Mapping[str, str] = field(default_factory=dict)
    on_error: ErrorHandler = raise_input_error


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


def child_folder(folder: Path, names: Sequence[str]) -> Path | None:
    """Return the directory inside `folder` that has the first of several names, in upper or lower case."""
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    folders = {entry.name.lower(): entry for entry in entries if entry.is_dir()}
    return next((folders[name] for name in names if name in folders), None)


def to_finite(value: Any) -> float:
    """Return the finite number that a text contains, NaN for anything else.

    Example:

    ```python
    >>> to_finite(" 1.5 "), to_finite("12.5px"), to_finite("inf"), to_finite(None)
    (1.5, nan, nan, nan)

    ```
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def enclose_rotated_box(x0: float, y0: float, x1: float, y1: float, angle: float) -> list[float]:
    """Return the upright box around a box that is rotated about its center by `angle` degrees, as corners.

    Example:

    ```python
    >>> [round(value, 3) for value in enclose_rotated_box(0, 0, 4, 2, 90)]
    [1.0, -1.0, 3.0, 3.0]

    ```
    """
    cosine, sine = abs(math.cos(math.radians(angle))), abs(math.sin(math.radians(angle)))
    center_x, center_y, width, height = (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0
    half_width, half_height = (width * cosine + height * sine) / 2, (width * sine + height * cosine) / 2
    return [center_x - half_width, center_y - half_height, center_x + half_width, center_y + half_height]


def refuse_rotated_boxes(files: Sequence[Path], source: Path, options: ReadOptions) -> None:
    """Report rotated boxes as an error if the options ask for it, given the file of each."""
    if files and options.rotated_boxes == "refuse":
        names = summarize_list(dict.fromkeys(file.name for file in files), 3)
        options.on_error(
            f"{source}: {len(files)} boxes are rotated, in {names}. To use the upright boxes around them, add "
            "--rotated_boxes enclose"
        )
