"""Read datasets in the COCO format: one JSON file per split, checked before training.

Format: https://cocodataset.org/#format-data, boxes as `[x, y, width, height]` in pixels from the top-left corner.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...utils.errors import InputError, summarize_list
from ...utils.io import read_text
from ...utils.names import to_integer
from ..dataset import (
    AnnotatedImageBuilder,
    DetectionSplit,
    ErrorHandler,
    check_unique_names,
    displayed_name,
    is_file,
    require_image_files,
    to_float,
)
from ..images import IMAGE_EXTENSIONS
from .common import (
    DEFAULT_OPTIONS,
    ROTATED_WARNING,
    ReadOptions,
    boxes_to_xywh,
    check_options,
    enclose_rotated_boxes,
    excerpt,
    group_by_split,
    refuse_rotated_boxes,
    split_from_name,
    subfolders,
    to_size,
    walk_files,
)
from .files import RENAMED_WARNING, find_image_files, relative_path


_NUM_PROBED_IMAGES = 20  # looked for in each directory
_REQUIRED_FIELDS = {
    "images": {"id", "file_name"},
    "categories": {"id", "name"},
    "annotations": {"image_id", "category_id", "bbox"},
}
_UNKNOWN_ROTATION_WARNING = "boxes have a rotation of unknown meaning: used without it"
_ANGLES = ("rotation", "angle", "theta")
_PARENT_WARNING = "categories without objects that others name as their supercategory: left out"
_JSON_CAUSES = {"Extra data": "It may be several files in one", "repeated": "Keep one entry of each name"}


class CocoFiles(NamedTuple):
    """Files of a split.

    Attributes:
        folders (`Sequence[Path]`): Directories that may contain the images, the most likely first.
        file (`Path`): The annotation file.
        root (`Path`): The dataset's directory, which contains all images.
        split (`str` or `None`): The split after which the file is named, if any.
        all_files (`Sequence[Path]`): The annotation files of all splits, which decide together what is a class.
    """

    folders: Sequence[Path]
    file: Path
    root: Path
    split: str | None = None
    all_files: Sequence[Path] = ()


class _Category(NamedTuple):
    """Name and supercategory of a category, which are the same in all splits, even if ids are not."""

    name: str
    supercategory: str | None


def read_coco(images: str | Path, annotations: str | Path, options: ReadOptions = DEFAULT_OPTIONS) -> DetectionSplit:
    """Read and check an annotation file and check that its images exist. Neither is changed.

    Boxes that are empty, non-finite or outside their image are dropped. Boxes that extend beyond the image are kept
    and counted. Both are logged.

    Args:
        images (`str` or `Path`): The directory that the images' file names are relative to.
        annotations (`str` or `Path`): The JSON file, with `images`, `annotations` and `categories`.
        options (`ReadOptions`, *optional*): See there.

    Returns:
        `DetectionSplit`: Images, annotations and categories.

    Raises:
        InputError: If the file is missing, truncated, not a COCO annotation file or inconsistent, or if images are
            missing. The message lists the first few faults.
    """
    split = read_coco_file([Path(images)], Path(annotations), options)
    return require_image_files(replace(split, box_format=options.box_format))


def read_coco_file(folders: Sequence[Path], source: Path, options: ReadOptions = DEFAULT_OPTIONS) -> DetectionSplit:
    """Read an annotation file whose images are in one of several directories.

    Args:
        folders (`Sequence[Path]`): The first one with more than half of the first images is used.
        source (`Path`): The JSON file.
        options (`ReadOptions`, *optional*): `on_error` is called for annotations of an unknown image or category,
            which are left out.
    """
    check_options(source, "COCO", options)
    (split,) = read_coco_files({"": CocoFiles(folders, source, folders[0])}, source, options).values()
    return split


def find_coco(folder: Path) -> dict[str, CocoFiles]:
    """Find annotation files named after splits: in the directory, in `annotations`, or next to the images (Roboflow).

    If any is called `instances_*`, as in COCO itself, the others do not contain boxes and are ignored.
    """
    files = [*sorted(folder.glob("*.json")), *sorted(folder.glob("annotations/*.json"))]
    files = [file for file in files if file.name.startswith("instances_")] or files
    named = [(file.stem, file) for file in files]
    named += [(file.parent.name, file) for file in sorted(folder.glob("*/_annotations.coco.json"))]
    found = group_by_split(named)
    return {
        split: CocoFiles(_candidate_folders(folder, split, file), file, folder, split, [*found.values()])
        for split, file in found.items()
    }


def find_single_coco_file(folder: Path) -> dict[str, CocoFiles]:
    """Find the only JSON file, whatever its name, as the train split."""
    files = [*folder.glob("*.json"), *folder.glob("annotations/*.json")]
    candidates = [files[0].parent, folder, *_image_folders(folder)] if files else []
    return {"train": CocoFiles(candidates, files[0], folder)} if len(files) == 1 else {}


def find_coco_file(file: Path) -> dict[str, CocoFiles]:
    """Find the images of an annotation file, in directories beside it or beside the directory `annotations`.

    Raises:
        InputError: If there are no images.
    """
    root = file.parent.parent if file.parent.name == "annotations" else file.parent
    split = split_from_name(file.parent.name if file.name == "_annotations.coco.json" else file.stem)
    folders = _candidate_folders(root, split, file) if split else [file.parent, root, *_image_folders(root)]
    if not any(walk_files(root, IMAGE_EXTENSIONS)):
        raise InputError(
            f"{file}: no images found in {root.resolve()}. Give their directory: --images and --annotations"
        )
    return {split or "train": CocoFiles(folders, file, root, split)}


def _candidate_folders(folder: Path, split: str, file: Path) -> list[Path]:
    """Return directories that may contain a split's images. Other splits may have others of the same names."""
    of_split, of_none = (
        [path for path in _image_folders(folder) if split_from_name(path.name) == name] for name in (split, None)
    )
    return [*of_split, file.parent, folder, *of_none]


def _image_folders(folder: Path) -> list[Path]:
    return [*subfolders(folder), *subfolders(folder / "images")]


def read_coco_files(splits: Mapping[str, CocoFiles], source: Path, options: ReadOptions) -> dict[str, DetectionSplit]:
    """Read the splits of [`find_coco`] or [`find_single_coco_file`]."""
    contents = {split: _read_json(files.file) for split, files in splits.items()}
    unread = {file for files in splits.values() for file in files.all_files} - {each.file for each in splits.values()}
    left_out = _find_empty_parents([*contents.values()], sorted(unread))
    return {split: _build_split(contents.pop(split), files, left_out, options) for split, files in splits.items()}


def _build_split(content: dict, files: CocoFiles, left_out: set[_Category], options: ReadOptions) -> DetectionSplit:
    builder = AnnotatedImageBuilder(files.file, on_error=options.on_error)
    categories = {entry["id"]: _to_category(entry) for entry in content["categories"]}
    paths = _find_images(content, files, builder)
    annotations = _select_valid_annotations(content, files.file, options.on_error)
    boxes, warnings = _read_boxes(annotations, files.file, options)
    rows_of: dict[int, list[int]] = {entry["id"]: [] for entry in content["images"]}
    for row, annotation in enumerate(annotations):
        rows_of[annotation["image_id"]].append(row)
    for entry, path in zip(content["images"], paths):
        rows = rows_of[entry["id"]]
        of_image = [annotations[row] for row in rows]
        builder.add(
            path,
            to_size(entry.get("height"), entry.get("width")),
            boxes[rows],
            [annotation["category_id"] for annotation in of_image],
            image_id=entry["id"],
            areas=[annotation.get("area") for annotation in of_image],
            iscrowd=[annotation.get("iscrowd") for annotation in of_image],
        )
        for row in filter(warnings.get, rows):
            builder.add_warning(warnings[row], path)
    builder.add_warnings(
        _PARENT_WARNING, (repr(category.name) for category in categories.values() if category in left_out)
    )
    names = {id_: category.name for id_, category in categories.items() if category not in left_out}
    return builder.build(check_unique_names(names, files.file))


def _find_empty_parents(contents: Sequence[dict], unread: Iterable[Path]) -> set[_Category]:
    """Return the categories that others name as their supercategory, and that have no objects in any split.

    Roboflow adds such a category to every dataset.
    """
    empty = {category for content in contents for category in _parent_categories(content)}
    empty = empty.difference(*map(_used_categories, contents)) if empty else empty
    return empty.difference(*map(_used_categories, map(_read_json, unread))) if empty else empty


def _parent_categories(content: dict) -> set[_Category]:
    categories = [_to_category(entry) for entry in content["categories"]]
    num_children = Counter(category.supercategory for category in categories)
    return {each for each in categories if num_children[each.name] > (each.name == each.supercategory)}


def _used_categories(content: dict) -> set[_Category]:
    used = {to_integer(annotation["category_id"]) for annotation in content["annotations"]}
    return {_to_category(entry) for entry in content["categories"] if entry["id"] in used}


def _to_category(entry: dict) -> _Category:
    name = entry["name"] if isinstance(entry["name"], str) else str(to_integer(entry["name"]))
    parent = entry.get("supercategory")
    return _Category(name.strip(), None if parent is None else str(parent).strip())


def _read_boxes(annotations: Sequence[dict], source: Path, options: ReadOptions) -> tuple[np.ndarray, dict[int, str]]:
    """Read boxes as x, y, width, height; a rotated one as the box around it.

    Returns:
        `tuple`: Boxes of shape `(num_annotations, 4)`, NaN for an invalid one; and warnings by the row of the box.
    """
    annotated = [annotation["bbox"] for annotation in annotations]
    if num_with_angle := sum(isinstance(box, list) and len(box) == 5 for box in annotated):
        options.on_error(
            f"{source}: {num_with_angle} boxes have five numbers, whose last may be an angle in several conventions. "
            "Export upright boxes"
        )
    boxes = boxes_to_xywh(annotated, options.box_format)
    degrees = np.array([to_float(_rotation(annotation) or 0) for annotation in annotations])
    rotated = np.flatnonzero(degrees % 180).tolist()  # half a turn does not change a box
    refuse_rotated_boxes([source] * len(rotated), source, options)
    known = [row for row in rotated if abs(degrees[row]) <= 360 and _is_before_rotation(annotations[row])]
    boxes[known] = enclose_rotated_boxes(boxes[known], degrees[known])
    return boxes, dict.fromkeys(rotated, _UNKNOWN_ROTATION_WARNING) | dict.fromkeys(known, ROTATED_WARNING)


def _rotation(annotation: dict) -> Any:
    """Return the rotation of a box: an attribute of CVAT's, or a field or attribute of other tools'."""
    return _cvat_rotation(annotation) or annotation.get("rotation") or next(filter(None, _other_angles(annotation)), 0)


def _cvat_rotation(annotation: dict) -> Any:
    attributes = annotation.get("attributes")
    return attributes.get("rotation") if isinstance(attributes, dict) else None


def _other_angles(annotation: dict) -> Iterator[float]:
    """Yield the numbers among fields and attributes that are named as angles; a word may describe the view."""
    attributes = annotation.get("attributes") or {}
    if isinstance(attributes, list):  # of names and values
        attributes = {each.get("name"): each.get("value") for each in attributes if isinstance(each, dict)}
    named = [(name, annotation.get(name)) for name in _ANGLES]
    named += attributes.items() if isinstance(attributes, dict) else []
    angles = (to_float(value) for name, value in named if value and str(name).lower() in _ANGLES)
    return filter(math.isfinite, angles)


def _is_before_rotation(annotation: dict) -> bool:
    """Return whether a box is that of CVAT's rectangle before its rotation: a mask or FastLabel's field is around it.

    CVAT: https://github.com/cvat-ai/cvat/blob/develop/cvat/apps/dataset_manager/bindings.py, `_convert_shape`.
    """
    is_around = annotation.get("segmentation") or "rotation" in annotation
    return bool(_cvat_rotation(annotation)) and not is_around


def _read_json(source: Path) -> dict:
    text = read_text(source)
    may_repeat = any(text.count(f'"{part}"') > 1 for part in _REQUIRED_FIELDS)
    try:
        content = json.loads(text, object_pairs_hook=_to_dict if may_repeat else None)
    except (ValueError, RecursionError) as error:
        cause = next(
            (cause for sign, cause in _JSON_CAUSES.items() if sign in str(error)), "The file may be truncated"
        )
        raise InputError(f"{source}: is not valid JSON ({error}). {cause}") from None
    _check_lists(content, source)
    _check_images(content, source)
    _check_category_names(content, source)
    for part, name in (("images", "file_name"), ("categories", "name")):
        _check_ids(content[part], part, name, source)
    return content


def _to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if repeated := [repr(key) for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
        raise ValueError(f"repeated {summarize_list(repeated)}")
    return dict(pairs)


def _check_lists(content: Any, source: Path) -> None:
    if not isinstance(content, dict) or any(not isinstance(content.get(part), list) for part in _REQUIRED_FIELDS):
        found = excerpt(sorted(content)) if isinstance(content, dict) else type(content).__name__
        raise InputError(
            f"{source}: is not a COCO detection file, which has lists named {summarize_list(_REQUIRED_FIELDS)}; it "
            f"has {found}"
        )
    for part, fields in _REQUIRED_FIELDS.items():
        for entry in content[part]:
            if not isinstance(entry, dict) or not fields <= entry.keys():
                raise InputError(f"{source}: an entry of {part!r} lacks one of {sorted(fields)}: {excerpt(entry)}")


def _check_images(content: dict, source: Path) -> None:
    for entry in content["images"]:
        name, sides = entry["file_name"], [entry[side] for side in ("height", "width") if entry.get(side)]
        is_name = isinstance(name, str) and name.strip() and "\0" not in name
        if not is_name or any(to_size(side, side) is None for side in sides):
            raise InputError(
                f"{source}: an image's file_name must be text, and its height and width positive integers: "
                f"{excerpt(entry)}"
            )


def _check_category_names(content: dict, source: Path) -> None:
    for entry in content["categories"]:
        if not isinstance(entry["name"], str) and to_integer(entry["name"]) is None:
            raise InputError(f"{source}: a category's name must be text: {excerpt(entry)}")


def _check_ids(entries: list[dict], part: str, name: str, source: Path) -> None:
    ids = [entry["id"] for entry in entries]
    if not ids:
        raise InputError(f"{source}: {part!r} is empty")
    if invalid := [excerpt(id_) for id_ in ids if to_integer(id_) is None]:
        raise InputError(f"{source}: ids of {part!r} must be 64-bit integers, got {summarize_list(invalid)}")
    names: dict[int, list[str]] = defaultdict(list)
    for entry in entries:
        entry["id"] = to_integer(entry["id"])
        names[entry["id"]].append(excerpt(entry[name]))
    if duplicates := [f"{id_} ({summarize_list(of_id, 3)})" for id_, of_id in names.items() if len(of_id) > 1]:
        raise InputError(
            f"{source}: ids of {part!r} are duplicated: {summarize_list(duplicates, 3)}. Give each entry its own"
        )


def _select_valid_annotations(content: dict, source: Path, on_error: ErrorHandler) -> list[dict]:
    """Return the annotations whose image and category are listed, and report the others."""
    annotations = content["annotations"]
    for field, part in (("image_id", "images"), ("category_id", "categories")):
        ids = {entry["id"] for entry in content[part]}
        invalid = [each[field] for each in annotations if to_integer(each[field]) not in ids]
        if invalid:
            unknown = summarize_list(sorted({excerpt(id_) for id_ in invalid}))
            hint = ", whose ids are integers" if None in map(to_integer, invalid) else ""
            on_error(f"{source}: annotations have {field} {unknown}, not listed in {part!r}{hint}")
            annotations = [each for each in annotations if to_integer(each[field]) in ids]
    return annotations


def _find_images(content: dict, files: CocoFiles, builder: AnnotatedImageBuilder) -> list[Path]:
    """Return the path of each image, which may be missing, and add warnings about what names they have."""
    names = [entry["file_name"] for entry in content["images"]]
    folder = _find_image_folder(names, files)
    found = find_image_files(names, folder, files.root, files.split)
    builder.add_warnings(RENAMED_WARNING, found.renamed)
    for path, count in Counter(found.paths).items():
        builder.add_warning("images are listed more than once: each entry is used", path, count - 1)
    if outside := [name for name in found.missing if relative_path(name, folder, files.root) is None]:
        builder.on_error(
            f"{files.file}: {len(outside)} file names lead out of {files.root}, which has no images of these names: "
            f"{summarize_list(map(displayed_name, outside))}. Give a directory with them, or correct the names"
        )
    return found.paths


def _find_image_folder(names: Sequence[str], files: CocoFiles) -> Path:
    probed = names[:_NUM_PROBED_IMAGES]
    num_found = {folder: _num_direct(probed, folder, files.root) for folder in files.folders}
    if not any(num_found.values()):  # the names may be those of another machine
        num_found = {
            folder: len(probed) - len(find_image_files(probed, folder, split=files.split).missing)
            for folder in files.folders
        }
    best = max(num_found, key=lambda folder: num_found[folder])  # the first of equals
    folder = next((folder for folder in files.folders if 2 * num_found[folder] > len(probed)), best)
    if not folder.is_dir():
        raise InputError(f"{folder}: image directory not found")
    if not num_found[folder] and not any(path.suffix.lower() in IMAGE_EXTENSIONS for path in folder.rglob("*")):
        listed = summarize_list(map(displayed_name, probed))
        raise InputError(f"{folder}: the directory contains no images, but {files.file} lists {listed}")
    return folder


def _num_direct(names: Sequence[str], folder: Path, root: Path) -> int:
    paths = [relative_path(name, folder, root) for name in names]
    return sum(is_file(folder / path) for path in paths if path)
