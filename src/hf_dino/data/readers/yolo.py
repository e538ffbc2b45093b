"""Read datasets in the YOLO format: one text file per image, one line per object, class names in a YAML file.

Format: https://docs.ultralytics.com/datasets/detect/, lines of `class x_center y_center width height` as fractions of
the image after applying its EXIF orientation. A line with more values is a polygon, whose bounding box is taken, or a
rotated box. Darknet has a file `*.data` instead of YAML, and label files next to the images.
"""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from ...utils.errors import InputError, import_extra, summarize_list
from ...utils.io import read_lines, read_text
from ...utils.names import to_integer
from ..dataset import SPLIT_ALIASES, AnnotatedImageBuilder, DetectionSplit, check_unique_names
from ..images import IMAGE_EXTENSIONS, get_image_size
from .common import (
    NO_FILE_WARNING,
    POLYGON_WARNING,
    ROTATED_WARNING,
    SHARED_FILE_WARNING,
    ReadOptions,
    child_folder,
    expected_image,
    refuse_rotated_boxes,
    split_folders,
    split_from_name,
    to_float,
    walk_files,
)
from .files import RENAMED_WARNING, find_image_files


logger = logging.getLogger(__name__)

_YAML_STEMS = ("data", "dataset")  # usual names of the YAML file
_NAME_FILES = ("classes.txt", "obj.names", "_darknet.labels")
_NUM_PROBED_FILES = 20  # label files, to know the format
_MAX_FRACTION = 1.5  # of the image's side; larger ones are probably pixels
_MAX_SHARE_OF_PIXELS = 0.25  # of the boxes


class YoloSplit(NamedTuple):
    """Files of a split.

    Attributes:
        images (`list[Path]`): Image files, including missing ones that a list names.
        names (`dict[int, str]` or `None`): Class names by number, if a file lists them.
        num_keypoint_values (`int`): Values after the box on each line of a pose dataset, else 0.
        renamed (`list[Path]`): Images that were found by the last part of their name only.
        folder (`Path` or `None`): The directory of the images, unless they are listed.
    """

    images: Sequence[Path]
    names: Mapping[int, str] | None
    num_keypoint_values: int = 0
    renamed: Sequence[Path] = ()
    folder: Path | None = None


class Label(NamedTuple):
    """A line of a label file.

    Attributes:
        number (`int` or `None`): Class number, `None` if the line does not begin with one.
        box (`np.ndarray` of shape `(4,)`): x center, y center, width, height as fractions, NaN if invalid.
        warning (`str`): What was done with other values, if any.
        line (`str`): The line.
    """

    number: int | None
    box: np.ndarray
    warning: str
    line: str


def find_yolo_yaml(path: Path) -> dict[str, YoloSplit]:
    """Find the splits listed in a YAML file that has `names` and at least one of `train`, `val` and `test`.

    Args:
        path (`Path`): The file, or a directory that contains it.
    """
    for file in [path] if path.is_file() else _yaml_files(path):
        try:
            content = _read_yaml(file)
        except InputError:
            if file == path or file.stem in _YAML_STEMS:
                raise
            continue  # unrelated to the dataset
        if found := _find_listed_splits(file, content):
            return found
    return {}


def _yaml_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])


def find_darknet(folder: Path) -> dict[str, YoloSplit]:
    """Find the splits listed in a file `*.data` of lines `names = FILE` and `train = FILE`, as CVAT's `obj.data`."""
    for file in sorted(folder.glob("*.data")):
        pairs = [line.partition("=") for line in read_lines(file)]
        content: dict[str, Any] = {key.strip(): value.strip() for key, _, value in pairs}
        if "names" in content:
            names = _locate(content["names"], [file.parent], min_parts=1)
            content |= {"names": _read_names(names or file.parent / content["names"]), "nc": content.get("classes")}
        if found := _find_listed_splits(file, content):
            return found
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
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file}: cannot be read as YAML ({reason})") from None
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}


def _find_listed_splits(file: Path, content: Mapping[str, Any]) -> dict[str, YoloSplit]:
    """Return the splits that a file lists, empty for a file about something else."""
    named = [key for key, entry in content.items() if split_from_name(key) and isinstance(entry, str | list) and entry]
    keys = [key for key in named if key.lower() in SPLIT_ALIASES] or named
    if "names" not in content or not keys:
        return {}
    entries = {str(split_from_name(key)): content[key] for key in keys}
    if len(entries) < len(keys):
        raise InputError(f"{file}: several of {summarize_list(keys)} are the same split. Keep one of them")
    names = _parse_names(content["names"], content.get("nc"), file)
    num_keypoint_values = _parse_keypoints(content.get("kpt_shape"), file)
    root = file.parent / str(content.get("path") or ".")
    root = root if _exists(root) else file.parent  # an absolute path of the machine where the file was written
    splits = {}
    for split, paths in _resolve_entries(entries, root, file).items():
        found = [_find_images(path, root) for path in paths]
        images, renamed = ([image for each in found for image in each[part]] for part in (0, 1))
        folder = paths[0] if paths[0].is_dir() else None
        splits[split] = YoloSplit(images, names, num_keypoint_values, renamed, folder)
    if not splits:
        raise InputError(f"{file}: directories not found: {summarize_list(map(str, entries.values()))}")
    return splits


def _parse_names(names: Any, num_classes: Any, file: Path) -> dict[int, str]:
    """Return class names by number. YAML reads `no` as a boolean and `1e3` as a float, so names must be text."""
    numbered = names if isinstance(names, dict) else dict(enumerate(names if isinstance(names, list) else []))
    numbers = {key: to_integer(to_float(key if isinstance(key, str | int) else None)) for key in numbered}
    if not numbers or None in numbers.values() or True in map(_is_bool, numbers):
        raise InputError(f"{file}: names must be a list or a mapping from class numbers, got {str(names)[:200]}")
    if unquoted := [name for name in numbered.values() if not isinstance(name, str | int) or _is_bool(name)]:
        raise InputError(f"{file}: names must be text, got {summarize_list(unquoted)}. Write them in quotes")
    classes = {int(number or 0): str(numbered[key]) for key, number in numbers.items()}
    if len(classes) < len(numbered):
        raise InputError(f"{file}: names have a class number twice: {names}. Give each name its own")
    if num_classes is not None and to_integer(to_float(num_classes)) not in (len(classes), max(classes) + 1):
        raise InputError(f"{file}: is about {num_classes} classes, but has {len(classes)} names. Correct one of them")
    return check_unique_names(classes, file)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _parse_keypoints(shape: Any, file: Path) -> int:
    """Return the number of values of `kpt_shape`: keypoints times values of each."""
    numbers = [to_integer(value) or 0 for value in shape] if isinstance(shape, list) else []
    if shape is not None and (len(numbers) != 2 or min(numbers) < 1):
        raise InputError(f"{file}: kpt_shape must be the number of keypoints and of values of each, got {shape}")
    return math.prod(numbers) if numbers else 0


def _resolve_entries(entries: Mapping[str, Any], root: Path, file: Path) -> dict[str, list[Path]]:
    """Return the existing directories or lists of each split. Roboflow lists splits that were left empty."""
    resolved: dict[str, list[Path]] = {}
    for split, entry in entries.items():
        texts = [str(each) for each in (entry if isinstance(entry, list) else [entry])]
        paths = [_locate(text, [root, file.parent], min_parts=1) for text in texts]
        if missing := [str(root / text) for text, path in zip(texts, paths) if path is None]:
            logger.warning("%s: ignoring the %s split, %s not found", file, split, summarize_list(missing))
            continue
        resolved[split] = [path for path in paths if path is not None]
        guessed = [text for text in texts if not text.startswith(("../", "..\\")) and not _exists(root / text)]
        if guessed and (same := [other for other, each in resolved.items() if each == resolved[split]][:-1]):
            raise InputError(f"{file}: {summarize_list(guessed)} not found; {same[0]} has the only directory like it")
        for text in guessed:
            logger.warning("%s: %s not found, using %s", file, text, summarize_list(resolved[split]))
    return resolved


def _locate(text: str, roots: Sequence[Path], min_parts: int = 2) -> Path | None:
    r"""Return the existing path that a text stands for, relative to the first root that has it.

    It may have been written on another machine: backslashes, and directories at the beginning that are not here, as
    in `/home/me/train/images`, `..\train\images` and `data/obj_train_data/1.jpg`, are left out as far as necessary.
    `min_parts` remain at least.
    """
    parts = [part for part in PurePosixPath(text.replace("\\", "/")).parts if part != ".."]
    shorter = [str(PurePosixPath(*parts[start:])) for start in range(len(parts) - min_parts + 1)]
    texts = dict.fromkeys((text, text.replace("\\", "/"), *(each.lstrip("/") for each in shorter)))
    return next((root / each for each in texts for root in roots if each and _exists(root / each)), None)


def _exists(path: Path) -> bool:
    try:
        return path.exists() and path != path.parent  # a whole disk is not a dataset
    except OSError:  # the name is too long
        return False


def _find_images(path: Path, root: Path) -> tuple[list[Path], list[Path]]:
    """Return the images of a directory or of a file with one path per line, and those found by their name only."""
    if path.is_dir():
        return [*walk_files(path, IMAGE_EXTENSIONS)], []
    lines = read_lines(path)
    roots = {True: [path.parent, root], False: [root, path.parent]}
    located = {line: _locate(line, roots[line.startswith("./")]) for line in lines}
    found = find_image_files([line for line, image in located.items() if image is None], root)
    others = iter(found.paths)
    images = {line: image or next(others) for line, image in located.items()}
    return [images[line] for line in lines], [*found.renamed]


def label_folder(images: Path) -> Path:
    """Return the directory of the label files of a directory of images.

    The last directory `images` of its path, if any, becomes `labels`. Without one, labels are next to the images.
    """
    names = [part.lower() for part in images.parts]
    if "images" in names:
        depth = len(names) - names[::-1].index("images")
        labels = child_folder(Path(*images.parts[: depth - 1]), ("labels",))
        if labels and (labels := labels.joinpath(*images.parts[depth:])).is_dir():
            return labels
    return images


def _label_files(folder: Path) -> dict[str, Path]:
    """Return the text files of a directory by their names without extension."""
    files = sorted(folder.iterdir(), key=lambda file: file.name) if folder.is_dir() else []
    return {file.stem: file for file in files if file.suffix.lower() == ".txt" and file.name not in _NAME_FILES}


def _is_label_file(file: Path) -> bool:
    """Return whether a text file may be about objects, which is left open by one that is empty or unreadable."""
    try:
        lines = read_lines(file)
    except InputError:
        return True
    return not lines or any(label.number is not None and np.isfinite(label.box).all() for label in map(_parse, lines))


def find_yolo_folders(folder: Path) -> dict[str, YoloSplit]:
    """Find images and label files without a file that lists the splits.

    They are in directories `images` and `labels` next to each other, with or without splits, or next to each other as
    LabelImg writes them.
    """
    images = child_folder(folder, ("images",))
    if images and child_folder(folder, ("labels",)):
        paths = split_folders(images) or {"train": images}
    else:
        splits = {split: child_folder(path, ("images",)) or path for split, path in split_folders(folder).items()}
        paths = splits or {"train": images or folder}
    return {
        split: YoloSplit(_find_images(path, folder)[0], _find_names(path, folder), folder=path)
        for split, path in paths.items()
        if any(map(_is_label_file, _probe_label_files(path)))
    }


def _probe_label_files(images: Path) -> list[Path]:
    """Return some label files. Next to images, those of an image only."""
    labels = label_folder(images)
    files = [file for file in walk_files(labels, {".txt"}) if file.name not in _NAME_FILES]
    if files and labels == images:
        stems = {path.with_suffix("") for path in walk_files(images, IMAGE_EXTENSIONS)}
        files = [file for file in files if file.with_suffix("") in stems]
    return files[:_NUM_PROBED_FILES]


def _find_names(images: Path, folder: Path) -> dict[int, str] | None:
    """Return the class names in a file of the split or else of the dataset, which may be YAML, if any."""
    folders = (images, label_folder(images), images.parent, folder, folder / "labels")
    files = (each / name for each in folders if each.is_relative_to(folder) for name in _NAME_FILES)
    if file := next((file for file in files if file.is_file()), None):
        return check_unique_names(dict(enumerate(_read_names(file))), file)
    for file in _yaml_files(folder):
        with suppress(InputError):
            if "names" in (content := _read_yaml(file)):
                return _parse_names(content["names"], content.get("nc"), file)
    return None


def _read_names(file: Path) -> list[str]:
    """Read a file with the name of one class on each line."""
    names = [line.strip() for line in read_text(file).rstrip().split("\n")]
    if "" in names:
        raise InputError(f"{file}: line {names.index('') + 1} is empty, but each line is the name of a class")
    return names


def read_yolo(splits: Mapping[str, YoloSplit], source: Path, options: ReadOptions) -> dict[str, DetectionSplit]:
    """Read the splits of [`find_yolo_yaml`], [`find_darknet`] or [`find_yolo_folders`].

    An image without a label file has no objects. Without names, a class is named by its number.
    """
    return {split: _read_split(files, source, split, options) for split, files in splits.items()}


def _read_split(files: YoloSplit, source: Path, split: str, options: ReadOptions) -> DetectionSplit:
    builder = AnnotatedImageBuilder(source, split, options.on_error)
    label_files = _find_label_files(files, builder)
    sizes, labels = {}, {}
    for path in dict.fromkeys(files.images):
        try:
            sizes[path] = get_image_size(path)
            labels[path] = _read_labels(label_files.get(path), files.num_keypoint_values)
        except InputError as error:
            options.on_error(str(error))
    rotated = [label_files[path] for path in labels for label in labels[path] if label.warning == ROTATED_WARNING]
    refuse_rotated_boxes(rotated, source, options)
    names = _check_labels({label_files[path]: each for path, each in labels.items() if each}, files.names, builder)
    for path, count in Counter(files.images).items():
        builder.add_warning("images are listed several times: used once", path, count - 1)
        if path in labels:
            _add_image(path, sizes[path], [each for each in labels[path] if each.number in names], builder)
            builder.add_warning(NO_FILE_WARNING, path, path not in label_files)
    builder.add_warnings(RENAMED_WARNING, files.renamed)
    builder.add_warning(
        "classes have no names: named by their numbers", str(source), (files.names is None) * len(names)
    )
    return builder.build(names)


def _add_image(path: Path, size: tuple[int, int], labels: Sequence[Label], builder: AnnotatedImageBuilder) -> None:
    height, width = size
    centers = np.array([label.box for label in labels]).reshape(-1, 4) * [width, height, width, height]
    boxes = np.concatenate([centers[:, :2] - centers[:, 2:] / 2, centers[:, 2:]], axis=1)
    builder.add(path, size, np.round(boxes, 3), [label.number or 0 for label in labels])
    for label in labels:
        builder.add_warning(label.warning, path, bool(label.warning))


def _find_label_files(files: YoloSplit, builder: AnnotatedImageBuilder) -> dict[Path, Path]:
    """Return the label file of each image, and report those of no image."""
    folders = {folder: label_folder(folder) for folder in {image.parent for image in files.images}}
    contents = {labels: _label_files(labels) for labels in folders.values()}
    of_image = {image: contents[folders[image.parent]].get(image.stem) for image in files.images}
    found = {image: file for image, file in of_image.items() if file}
    used = Counter(found.values())
    if files.folder:
        _report_unmatched(files.folder, [file for file in _all_label_files(files.folder) if file not in used], builder)
    builder.add_warnings(SHARED_FILE_WARNING, (image for image, file in found.items() if used[file] > 1))
    return found


def _all_label_files(images: Path) -> list[Path]:
    labels = label_folder(images)
    files = (file for file in walk_files(labels, {".txt"}) if file.name not in _NAME_FILES)
    return [file for file in files if labels != images or _is_label_file(file)]


def _report_unmatched(images: Path, files: Sequence[Path], builder: AnnotatedImageBuilder) -> None:
    if files:
        expected = expected_image(images / files[0].relative_to(label_folder(images)).parent, files[0].stem)
        names = summarize_list(file.name for file in files)
        problem = "is not a known image format" if expected.is_file() else "image file not found"
        builder.on_error(
            f"{builder.title}: {len(files)} label files have no image of their name: {names}. {expected}: {problem}"
        )


def _check_labels(
    labels: Mapping[Path, Sequence[Label]], names: Mapping[int, str] | None, builder: AnnotatedImageBuilder
) -> Mapping[int, str]:
    """Report lines without a known class and boxes that are not fractions, and return the class names by number."""
    lines = [(label, file) for file, each in labels.items() for label in each]
    if unknown := [f"{label.line[:20]!r} in {file}" for label, file in lines if label.number is None]:
        builder.on_error(
            f"{builder.title}: {len(unknown)} lines do not begin with a class number: {summarize_list(unknown, 3)}"
        )
    file_of_class = {label.number: file for label, file in lines if label.number is not None}
    known = {number: str(number) for number in sorted(file_of_class)} if names is None else names
    if unnamed := [f"{number} in {file}" for number, file in sorted(file_of_class.items()) if number not in known]:
        builder.on_error(
            f"{builder.title}: labels use classes without a name: {summarize_list(unnamed)}. The names are "
            f"{dict(known)}"
        )
    large = [label for label, _ in lines if (label.box > _MAX_FRACTION).any()]
    if len(large) > _MAX_SHARE_OF_PIXELS * len(lines):
        builder.on_error(
            f"{builder.title}: boxes seem to be in pixels, but must be fractions of the image: {len(large)} of "
            f"{len(lines)} have larger values than {_MAX_FRACTION}, as {large[0].line[:80]!r}"
        )
    return known


def _read_labels(file: Path | None, num_keypoint_values: int) -> list[Label]:
    return [_parse(line, num_keypoint_values) for line in read_lines(file)] if file else []


def _parse(line: str, num_keypoint_values: int = 0) -> Label:
    first, *others = line.split()
    number = to_integer(to_float(first))
    values = np.array([to_float(value) for value in others])
    warning = ""
    if len(values) == 4 + (num_keypoint_values or math.inf):
        values = values[:4]
    elif len(values) > 4:
        values, warning = _parse_polygon(values)
    is_valid = len(values) == 4 and (values[2:] >= 0).all()
    return Label(number if number is not None and number >= 0 else None, values if is_valid else NO_BOX, warning, line)


NO_BOX = np.full(4, np.nan)


def _parse_polygon(values: np.ndarray) -> tuple[np.ndarray, str]:
    """Return the box of a line with more values, and the warning about them."""
    if len(values) == 5:
        return values[:4], "labels have a sixth value, such as a confidence: ignored"
    points = values[: len(values) // 2 * 2].reshape(-1, 2)
    low, high = points.min(axis=0), points.max(axis=0)
    box = np.concatenate([(low + high) / 2, high - low])
    if len(points) == 4 and np.abs(points[0] + points[2] - points[1] - points[3]).max() < 1e-3:
        is_upright = (np.isclose(points, low, atol=1e-6) | np.isclose(points, high, atol=1e-6)).all()
        return box, "" if is_upright else ROTATED_WARNING
    return box, "labels are polygons with another value: it is ignored" if len(values) % 2 else POLYGON_WARNING
