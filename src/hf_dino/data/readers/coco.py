"""Read datasets in the COCO format: one JSON file per split, checked before training.

Format: https://cocodataset.org/#format-data, boxes as `[x, y, width, height]` in pixels from the top-left corner.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...utils.errors import InputError, summarize_list
from ...utils.io import read_text
from ..dataset import (
    AnnotatedImageBuilder,
    DetectionSplit,
    ErrorHandler,
    check_unique_names,
    require_image_files,
)
from ..images import IMAGE_EXTENSIONS, is_image_file
from .common import DEFAULT_OPTIONS, ReadOptions, group_by_split, split_from_name


CocoFiles = tuple[
    list[Path], Path
]  # directories that may contain the images, the most likely first; the annotation file

_MAX_ID = 2**63 - 1
_NUM_PROBED_IMAGES = 20  # looked for in each directory
_REQUIRED_FIELDS = {
    "images": {"id", "file_name"},
    "categories": {"id", "name"},
    "annotations": {"image_id", "category_id", "bbox"},
}


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
    return require_image_files(read_coco_file([Path(images)], Path(annotations), options))


def read_coco_file(folders: Sequence[Path], source: Path, options: ReadOptions = DEFAULT_OPTIONS) -> DetectionSplit:
    """Read an annotation file whose images are in one of several directories.

    Args:
        folders (`Sequence[Path]`): The first one with more than half of the first images is used.
        source (`Path`): The JSON file.
        options (`ReadOptions`, *optional*): `on_error` is called for annotations of an unknown image or category,
            which are left out.
    """
    content = _read_json(source)
    categories = check_unique_names({entry["id"]: str(entry["name"]) for entry in content["categories"]}, source)
    folder = _find_image_folder(folders, content, source)
    annotations_of: dict[int, list[dict]] = {entry["id"]: [] for entry in content["images"]}
    for annotation in _select_valid_annotations(content, source, options.on_error):
        annotations_of[annotation["image_id"]].append(annotation)
    builder = AnnotatedImageBuilder(source, on_error=options.on_error)
    for entry in content["images"]:
        annotations = annotations_of[entry["id"]]
        builder.add(
            folder / entry["file_name"],
            _annotated_size(entry),
            [annotation["bbox"] for annotation in annotations],
            [annotation["category_id"] for annotation in annotations],
            image_id=entry["id"],
            areas=[annotation.get("area") for annotation in annotations],
            iscrowd=[annotation.get("iscrowd") for annotation in annotations],
        )
    return builder.build(categories)


def find_coco(folder: Path) -> dict[str, CocoFiles]:
    """Find annotation files named after splits: in the directory, in `annotations`, or next to the images (Roboflow).

    If any is called `instances_*`, as in COCO itself, the others do not contain boxes and are ignored.
    """
    files = [*sorted(folder.glob("*.json")), *sorted(folder.glob("annotations/*.json"))]
    files = [file for file in files if file.name.startswith("instances_")] or files
    named = [(file.stem, file) for file in files]
    named += [(file.parent.name, file) for file in sorted(folder.glob("*/_annotations.coco.json"))]
    return {split: (_candidate_folders(folder, split, file), file) for split, file in group_by_split(named).items()}


def find_single_coco_file(folder: Path) -> dict[str, CocoFiles]:
    """Find the only JSON file, whatever its name, as the train split."""
    files = [*folder.glob("*.json"), *folder.glob("annotations/*.json")]
    return {"train": ([files[0].parent, folder, *_subfolders(folder)], files[0])} if len(files) == 1 else {}


def find_coco_file(file: Path) -> dict[str, CocoFiles]:
    """Find the images of an annotation file, in directories beside it or beside the directory `annotations`.

    Raises:
        InputError: If there are no images.
    """
    root = file.parent.parent if file.parent.name == "annotations" else file.parent
    split = split_from_name(file.parent.name if file.name == "_annotations.coco.json" else file.stem)
    folders = _candidate_folders(root, split, file) if split else [file.parent, root, *_subfolders(root)]
    if not any(is_image_file(path) for path in root.rglob("*")):
        raise InputError(
            f"{file}: no images found in {root.resolve()}. Give their directory: --images and --annotations"
        )
    return {split or "train": (folders, file)}


def _candidate_folders(folder: Path, split: str, file: Path) -> list[Path]:
    """Return directories that may contain a split's images. Other splits may have others of the same names."""
    of_split, of_none = (
        [path for path in _subfolders(folder) if split_from_name(path.name) == name] for name in (split, None)
    )
    return [*of_split, file.parent, folder, *of_none]


def _subfolders(folder: Path) -> list[Path]:
    entries = [*sorted(folder.iterdir()), *sorted((folder / "images").glob("*"))]
    return [entry for entry in entries if entry.is_dir()]


def read_coco_files(splits: Mapping[str, CocoFiles], source: Path, options: ReadOptions) -> dict[str, DetectionSplit]:
    """Read the splits of [`find_coco`] or [`find_single_coco_file`]."""
    return {split: read_coco_file(folders, file, options) for split, (folders, file) in splits.items()}


def _read_json(source: Path) -> dict:
    text = read_text(source)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: is not valid JSON ({error}). The file may be truncated") from None
    _check_lists(content, source)
    _check_images(content, source)
    for part, name in (("images", "file_name"), ("categories", "name")):
        _check_ids(content[part], part, name, source)
    return content


def _check_lists(content: Any, source: Path) -> None:
    if not isinstance(content, dict) or any(not isinstance(content.get(part), list) for part in _REQUIRED_FIELDS):
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise InputError(
            f"{source}: is not a COCO detection file, which has lists named {summarize_list(_REQUIRED_FIELDS)}; it "
            f"has {found}"
        )
    for part, fields in _REQUIRED_FIELDS.items():
        for entry in content[part]:
            if not isinstance(entry, dict) or not fields <= entry.keys():
                raise InputError(f"{source}: an entry of {part!r} lacks one of {sorted(fields)}: {str(entry)[:200]}")


def _check_images(content: dict, source: Path) -> None:
    for entry in content["images"]:
        sides = [entry[side] for side in ("height", "width") if entry.get(side)]
        if not isinstance(entry["file_name"], str) or not all(_is_positive_integer(side) for side in sides):
            raise InputError(
                f"{source}: an image's file_name must be text, and its height and width positive integers: "
                f"{str(entry)[:200]}"
            )


def _check_ids(entries: list[dict], part: str, name: str, source: Path) -> None:
    ids = [entry["id"] for entry in entries]
    if not ids:
        raise InputError(f"{source}: {part!r} is empty")
    if invalid := [repr(id_) for id_ in ids if type(id_) is not int or abs(id_) > _MAX_ID]:
        raise InputError(f"{source}: ids of {part!r} must be 64-bit integers, got {summarize_list(invalid)}")
    names: dict[int, list[str]] = defaultdict(list)
    for entry in entries:
        names[entry["id"]].append(repr(entry[name]))
    if duplicates := [f"{id_} ({summarize_list(of_id, 3)})" for id_, of_id in names.items() if len(of_id) > 1]:
        raise InputError(
            f"{source}: ids of {part!r} are duplicated: {summarize_list(duplicates, 3)}. Give each entry its own"
        )


def _select_valid_annotations(content: dict, source: Path, on_error: ErrorHandler) -> list[dict]:
    """Return the annotations whose image and category are listed, and report the others."""
    annotations = content["annotations"]
    for field, part in (("image_id", "images"), ("category_id", "categories")):
        ids = {entry["id"] for entry in content[part]}
        unknown = sorted({repr(each[field]) for each in annotations if not _is_in(each[field], ids)})
        if unknown:
            on_error(f"{source}: annotations have {field} {summarize_list(unknown)}, not listed in {part!r}")
            annotations = [each for each in annotations if _is_in(each[field], ids)]
    return annotations


def _is_in(value: Any, ids: set[int]) -> bool:
    return isinstance(value, int | float) and value in ids  # a list is not hashable


def _find_image_folder(folders: Sequence[Path], content: dict, source: Path) -> Path:
    names = [entry["file_name"] for entry in content["images"][:_NUM_PROBED_IMAGES]]
    num_found = {folder: sum((folder / name).is_file() for name in names) for folder in folders}
    best = max(num_found, key=lambda folder: num_found[folder])  # the first of equals
    folder = next((folder for folder in folders if 2 * num_found[folder] > len(names)), best)
    if not folder.is_dir():
        raise InputError(f"{folder}: image directory not found")
    if not num_found[folder] and not any(path.suffix.lower() in IMAGE_EXTENSIONS for path in folder.rglob("*")):
        raise InputError(f"{folder}: the directory contains no images, but {source} lists {summarize_list(names)}")
    return folder


def _annotated_size(entry: dict) -> tuple[int, int] | None:
    height, width = entry.get("height"), entry.get("width")
    return (int(float(height)), int(float(width))) if height and width else None


def _is_positive_integer(value: Any) -> bool:
    """Return whether a value is a positive integer, possibly written as text or float."""
    try:
        return float(value) >= 1 and float(value).is_integer()
    except (TypeError, ValueError):
        return False
