"""Read datasets in the YOLO format: one text file per image, one line per object, class names in a YAML file.

Format: https://docs.ultralytics.com/datasets/detect/, lines of `class x_center y_center width height` as fractions of
the image after applying its EXIF orientation. A line with more values is a polygon, whose bounding box is taken.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ...utils.errors import InputError, import_extra, summarize_list
from ...utils.io import read_lines, read_text
from ..dataset import AnnotatedImageBuilder, DetectionSplit, ErrorHandler, check_unique_names
from ..images import get_image_size, is_image_file
from .common import Annotation, ReadOptions, read_valid, split_folders, split_from_name, supervision_to_xywh


logger = logging.getLogger(__name__)

_YAML_STEMS = ("data", "dataset")  # usual names of the YAML file
_NAME_FILES = ("classes.txt", "obj.names", "labels/classes.txt")


class YoloSplit(NamedTuple):
    """Files of a split.

    Attributes:
        images (`list[Path]`): Image files, including missing ones that have a label file.
        names (`dict[int, str]` or `None`): Class names by number, if a file lists them.
        num_keypoint_values (`int`): Values after the box on each line of a pose dataset, else 0.
    """

    images: Sequence[Path]
    names: Mapping[int, str] | None
    num_keypoint_values: int = 0


def find_yolo_yaml(path: Path) -> dict[str, YoloSplit]:
    """Find the splits listed in a YAML file that has `names` and at least one of `train`, `val` and `test`.

    Args:
        path (`Path`): The file, or a directory that contains it.
    """
    for file in [path] if path.is_file() else sorted([*path.glob("*.yaml"), *path.glob("*.yml")]):
        try:
            content = _read_yaml(file)
        except InputError:
            if file == path or file.stem in _YAML_STEMS:
                raise
            continue  # unrelated to the dataset
        entries = {split: entry for key, entry in content.items() if (split := split_from_name(key)) and entry}
        if "names" in content and entries:
            return _find_listed_splits(file, content, entries)
    return {}


def lists_splits(file: Path) -> bool:
    """Return whether a file is one that [`find_yolo_yaml`] reads."""
    with suppress(InputError):
        return "names" in (content := _read_yaml(file)) and any(map(split_from_name, content))
    return False


def _read_yaml(file: Path) -> dict[str, Any]:
    yaml = import_extra("yaml", "train", "reading YOLO data")
    text = read_text(file)
    try:
        content = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{file}: cannot be read as YAML ({error})") from None
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}


def _find_listed_splits(file: Path, content: Mapping[str, Any], entries: Mapping[str, Any]) -> dict[str, YoloSplit]:
    root = file.parent / str(content.get("path") or ".")
    root = root if root.is_dir() else file.parent  # an absolute path of the machine where the file was written
    names = check_unique_names(_parse_names(content["names"], file), file)
    num_keypoint_values = math.prod(content.get("kpt_shape") or [0])
    splits = {}
    for split, entry in entries.items():
        paths = [_resolve(root, str(path)) for path in (entry if isinstance(entry, list) else [entry])]
        if missing := [str(path) for path in paths if not path.exists()]:
            # Roboflow lists splits that were left empty
            logger.warning("%s: ignoring the %s split, %s not found", file, split, summarize_list(missing))
        else:
            images = [image for path in paths for image in _find_images(path, root)]
            splits[split] = YoloSplit(images, names, num_keypoint_values)
    if not splits:
        raise InputError(f"{file}: directories not found: {summarize_list(map(str, entries.values()))}")
    return splits


def _parse_names(names: Any, file: Path) -> dict[int, str]:
    numbered = names if isinstance(names, dict) else dict(enumerate(names if isinstance(names, list) else []))
    try:
        classes = {int(number): str(name) for number, name in numbered.items()}
    except ValueError:
        classes = {}
    if not classes:
        raise InputError(f"{file}: names must be a list or a mapping from class numbers, got {names!r}")
    return classes


def _resolve(root: Path, entry: str) -> Path:
    """Return the path of an entry. Roboflow writes `../train/images` for a directory next to the YAML file."""
    path = root / entry
    return path if path.exists() or not entry.startswith("../") else root / entry[3:]


def _find_images(path: Path, root: Path) -> list[Path]:
    """List the images of a directory or of a file with one path per line, and those expected by its label files."""
    if path.is_file():
        return [root / line for line in read_lines(path)]
    images = sorted(image for image in path.rglob("*") if is_image_file(image))
    labels = label_file(path / "any").parent
    labeled = {label_file(image) for image in images}
    files = sorted(labels.rglob("*.txt")) if labels != path and labels.is_dir() else []
    unmatched = [file for file in files if file not in labeled and file.name != "classes.txt"]
    return images + [path / file.relative_to(labels).with_suffix(".jpg") for file in unmatched]


def label_file(image: Path) -> Path:
    """Return the path of an image's label file: the last directory `images` of its path, if any, becomes `labels`.

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
    """Find directories `images` and `labels` next to each other, with or without splits, and without a YAML file."""
    if all((folder / name).is_dir() for name in ("images", "labels")):
        paths = split_folders(folder / "images") or {"train": folder / "images"}
    else:
        paths = {split: path / "images" for split, path in split_folders(folder).items()}
    labeled = {split: path for split, path in paths.items() if any(label_file(path / "any").parent.rglob("*.txt"))}
    names = _read_names(folder) if labeled else None  # in another format, such files may mean something else
    return {split: YoloSplit(_find_images(path, folder), names) for split, path in labeled.items()}


def _read_names(folder: Path) -> dict[int, str] | None:
    file = next((folder / name for name in _NAME_FILES if (folder / name).is_file()), None)
    return check_unique_names(dict(enumerate(read_lines(file))), file) if file else None


def read_yolo(splits: Mapping[str, YoloSplit], source: Path, options: ReadOptions) -> dict[str, DetectionSplit]:
    """Read the splits of [`find_yolo_yaml`] or [`find_yolo_folders`].

    An image without a label file has no objects. Without names, a class is named by its number.
    """
    return {split: _read_split(files, source, split, options.on_error) for split, files in splits.items()}


def _read_split(files: YoloSplit, source: Path, split: str, on_error: ErrorHandler) -> DetectionSplit:
    builder = AnnotatedImageBuilder(source, split, on_error)
    file_of_class: dict[int, Path] = {}  # a label file that uses each class
    for path in files.images:
        try:
            size, lines = get_image_size(path), _read_box_lines(label_file(path), files.num_keypoint_values)
        except InputError as error:
            on_error(str(error))
            continue
        objects = _read_boxes(lines, size)
        file_of_class |= {number: label_file(path) for number, box in objects if box is not None}
        if files.names is not None:
            objects = [(number, box) for number, box in objects if box is None or number in files.names]
        builder.add(path, size, [box for _, box in objects], [number for number, _ in objects])
    names = {number: str(number) for number in file_of_class} if files.names is None else files.names
    unnamed = [f"{number} in {file}" for number, file in sorted(file_of_class.items()) if number not in names]
    if unnamed:
        on_error(
            f"{source} ({split}): labels use classes without a name: {summarize_list(unnamed)}. The names are "
            f"{dict(names)}"
        )
    return builder.build(names)


def _read_box_lines(file: Path, num_keypoint_values: int) -> list[str]:
    """Read the lines of a label file, without keypoints."""
    rows = [line.split() for line in read_lines(file)] if file.exists() else []
    length_with_keypoints = 5 + (num_keypoint_values or math.inf)
    return [" ".join(row[:5] if len(row) == length_with_keypoints else row) for row in rows]


def _read_boxes(lines: Sequence[str], size: tuple[int, int]) -> list[Annotation]:
    """Return class number and box of each line; the box of an invalid line is `None`."""
    formats = import_extra("supervision.dataset.formats.yolo", "train", "reading YOLO data")

    def read(lines: Sequence[str]) -> list[Annotation]:
        detections = formats.yolo_annotations_to_detections(lines=lines, resolution_wh=size[::-1], with_masks=False)
        return list(zip(detections.class_id.tolist(), supervision_to_xywh(detections)))

    return read_valid(lines, read, invalid=(0, None))
