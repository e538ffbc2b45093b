"""Datasets in the format of YOLO: a text file per image, a line per object, classes in a YAML file.

Format: https://docs.ultralytics.com/datasets/detect/, lines as `class x_center y_center width height`, fractions of
the image as a viewer shows it; a line with more numbers is a polygon, of which the box around it is taken.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..utils.errors import InputError, summarize_list
from ..utils.io import read_lines, read_text
from .dataset import AnnotatedImageBuilder, DetectionSplit, ErrorHandler, distinct
from .extras import import_extra, supervision_to_xywh
from .images import get_image_size, is_image_file
from .splits import split_folders, split_from_name


logger = logging.getLogger(__name__)

_USUAL_STEMS = ("data", "dataset")  # of the YAML file
_NAME_FILES = ("classes.txt", "obj.names", "labels/classes.txt")


class YoloSplit(NamedTuple):
    """Where a split is.

    Attributes:
        images (`list[Path]`): Image files, and missing ones whose label file is there.
        names (`dict[int, str]` or `None`): Classes by number, where some file says them.
        num_keypoint_values (`int`): Numbers behind the box on the lines of a pose dataset, else 0.
    """

    images: Sequence[Path]
    names: Mapping[int, str] | None
    num_keypoint_values: int = 0


def find_yolo_yaml(folder: Path) -> dict[str, YoloSplit]:
    """Find what a YAML file with `names` and at least one of `train`, `val` and `test` describes."""
    for file in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
        try:
            content = _read_yaml(file)
        except InputError:
            if file.stem in _USUAL_STEMS:
                raise
            continue  # it may be anything
        entries = {split: entry for key, entry in content.items() if (split := split_from_name(key)) and entry}
        if "names" in content and entries:
            return _described(file, content, entries)
    return {}


def _read_yaml(file: Path) -> dict[str, Any]:
    yaml = import_extra("yaml", "train", "reading YOLO data")
    text = read_text(file)
    try:
        content = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{file}: cannot be read as YAML ({error})") from None
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}


def _described(file: Path, content: Mapping[str, Any], entries: Mapping[str, Any]) -> dict[str, YoloSplit]:
    root = file.parent / str(content.get("path") or ".")
    root = root if root.is_dir() else file.parent  # a path of the machine where the file was written
    names = content["names"]
    numbered = names if isinstance(names, dict) else dict(enumerate(names if isinstance(names, list) else []))
    try:
        classes = {int(number): str(name) for number, name in numbered.items()}
    except ValueError:
        classes = {}
    if not classes:
        raise InputError(f"{file}: names must be a list, or be numbered from 0; got {names!r}")
    keypoints = content.get("kpt_shape") or [0]
    found = {}
    for split, entry in entries.items():
        places = [_place(root, str(place)) for place in (entry if isinstance(entry, list) else [entry])]
        if absent := [str(place) for place in places if not place.exists()]:
            # Roboflow describes splits that were left empty
            logger.warning(
                "%s: the %s split is left out, since %s does not exist", file, split, summarize_list(absent)
            )
        else:
            images = [path for place in places for path in _images(place, root)]
            found[split] = YoloSplit(images, distinct(classes, file), math.prod(keypoints))
    if not found:
        raise InputError(
            f"{file}: none of the folders that it names exists: {summarize_list(map(str, entries.values()))}"
        )
    return found


def _place(root: Path, entry: str) -> Path:
    """A folder of images, or a list of them. Roboflow's `../train/images` means the folder beside the YAML file."""
    place = root / entry
    return place if place.exists() or not entry.startswith("../") else root / entry[3:]


def _images(place: Path, root: Path) -> list[Path]:
    if place.is_file():
        return [root / line for line in read_lines(place)]
    found = sorted(path for path in place.rglob("*") if is_image_file(path))
    labels = label_file(place / "any").parent
    labeled = {label_file(path) for path in found}
    files = sorted(labels.rglob("*.txt")) if labels != place and labels.is_dir() else []
    alone = [file for file in files if file not in labeled and file.name != "classes.txt"]
    return found + [place / file.relative_to(labels).with_suffix(".jpg") for file in alone]


def label_file(image: Path) -> Path:
    """The label file of an image: in the folder `labels` beside the last folder `images` of its path, or beside it.

    Example:

    ```python
    >>> label_file(Path("images/train/1.jpg")).as_posix(), label_file(Path("train/1.jpg")).as_posix()
    ('labels/train/1.txt', 'train/1.txt')

    ```
    """
    parts = list(image.parts[:-1])
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts, f"{image.stem}.txt")


def find_yolo_folders(folder: Path) -> dict[str, YoloSplit]:
    """Find folders `images` and `labels` side by side, divided into splits or not, without a YAML file."""
    if all((folder / name).is_dir() for name in ("images", "labels")):
        places = split_folders(folder / "images") or {"train": folder / "images"}
    else:
        places = {split: place / "images" for split, place in split_folders(folder).items()}
    labeled = {split: place for split, place in places.items() if any(label_file(place / "any").parent.rglob("*.txt"))}
    names = _listed_names(folder) if labeled else None  # another format may have such files for something else
    return {split: YoloSplit(_images(place, folder), names) for split, place in labeled.items()}


def _listed_names(folder: Path) -> dict[int, str] | None:
    for file in (folder / name for name in _NAME_FILES):
        if file.is_file():
            return distinct(dict(enumerate(read_lines(file))), file)
    return None


def read_yolo(splits: Mapping[str, YoloSplit], source: Path, on_error: ErrorHandler) -> dict[str, DetectionSplit]:
    """Read label files with supervision. An image without one has no objects; unnamed classes are their numbers."""
    return {split: _read_split(found, source, split, on_error) for split, found in splits.items()}


def _read_split(found: YoloSplit, source: Path, split: str, on_error: ErrorHandler) -> DetectionSplit:
    formats = import_extra("supervision.dataset.formats.yolo", "train", "reading YOLO data")
    maker = AnnotatedImageBuilder(source, split, on_error)
    users: dict[int, Path] = {}  # of each class number, a label file
    for path in found.images:
        try:
            size, lines = get_image_size(path), _lines(label_file(path), found.num_keypoint_values)
        except InputError as error:
            on_error(str(error))
            continue
        objects = _objects(lines, size, formats.yolo_annotations_to_detections)
        users |= {number: label_file(path) for number, box in objects if box is not None}
        if found.names is not None:
            objects = [(number, box) for number, box in objects if box is None or number in found.names]
        maker.add(path, size, [box for _, box in objects], [number for number, _ in objects])
    names = {number: str(number) for number in users} if found.names is None else found.names
    nameless = [f"{number} in {file}" for number, file in sorted(users.items()) if number not in names]
    if nameless:
        on_error(
            f"{source} ({split}): labels use classes that have no name: {summarize_list(nameless)}; there are {dict(names)}"
        )
    return maker.finish(names)


def _lines(file: Path, num_keypoint_values: int) -> list[str]:
    rows = [line.split() for line in read_lines(file)] if file.exists() else []
    has_keypoints = 5 + (num_keypoint_values or math.inf)
    return [" ".join(row[:5] if len(row) == has_keypoints else row) for row in rows]


def _objects(lines: list[str], size: tuple[int, int], read: Callable) -> list[tuple[int, Any]]:
    """Class number and box of each line; no box for a line that supervision refuses."""
    try:
        detections = read(lines=lines, resolution_wh=size[::-1], with_masks=False)
    except ValueError:
        if len(lines) > 1:
            return [pair for line in lines for pair in _objects([line], size, read)]
        return [(0, None)]
    return list(zip(detections.class_id.tolist(), supervision_to_xywh(detections)))
