"""Datasets in COCO's format: the annotation file, checked before the first step.

Format: https://cocodataset.org/#format-data, boxes as `[x, y, width, height]` in pixels from the top-left corner.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..utils.errors import InputError, summarize_list
from ..utils.io import read_text
from .dataset import (
    AnnotatedImageBuilder,
    DetectionSplit,
    ErrorHandler,
    distinct,
    raise_input_error,
    require_image_files,
)
from .images import IMAGE_EXTENSIONS
from .splits import group_by_split, split_from_name


def read_coco(images: str | Path, annotations: str | Path) -> DetectionSplit:
    """Read and check an annotation file and see that its images are there. Neither is ever changed.

    Boxes that are empty, not finite or wholly outside their image are dropped, boxes that reach over the border are
    kept and counted; both are logged.

    Args:
        images (`str` or `Path`): The folder that the file names of the images are relative to.
        annotations (`str` or `Path`): The JSON file, with `images`, `annotations` and `categories`.

    Returns:
        `DetectionSplit`: Images, objects and categories.

    Raises:
        InputError: If the file is missing, truncated, no COCO annotations, or contradicts itself, or if images are
            missing. The message names the first few offenders.
    """
    return require_image_files(read_coco_file([Path(images)], Path(annotations)))


def read_coco_file(
    folders: Sequence[Path], source: Path, on_error: ErrorHandler = raise_input_error
) -> DetectionSplit:
    """Read an annotation file whose images are in the first of `folders` which holds most of the first few.

    Objects of unknown images or categories are complained of, and left out where that does not stop.
    """
    content = _read_json(source)
    categories = distinct({entry["id"]: str(entry["name"]) for entry in content["categories"]}, source)
    folder = _image_folder(folders, content, source)
    objects: dict[int, list[dict]] = {entry["id"]: [] for entry in content["images"]}
    for annotation in _annotations(content, source, on_error):
        objects[annotation["image_id"]].append(annotation)
    maker = AnnotatedImageBuilder(source, on_error=on_error)
    for entry in content["images"]:
        found = objects[entry["id"]]
        maker.add(
            folder / entry["file_name"],
            _annotated_size(entry),
            [annotation["bbox"] for annotation in found],
            [annotation["category_id"] for annotation in found],
            image_id=entry["id"],
            areas=[annotation.get("area") for annotation in found],
            iscrowd=[annotation.get("iscrowd") for annotation in found],
        )
    return maker.finish(categories)


CocoFiles = tuple[list[Path], Path]  # folders that may hold the images, the likeliest first; the annotation file


def find_coco(folder: Path) -> dict[str, CocoFiles]:
    """Find annotation files named after splits: in the folder, in `annotations`, or Roboflow's beside the images.

    Where some are called `instances_…`, as COCO's own, the others hold no boxes.
    """
    files = [*sorted(folder.glob("*.json")), *sorted(folder.glob("annotations/*.json"))]
    files = [file for file in files if file.name.startswith("instances_")] or files
    named = [(file.stem, file) for file in files]
    named += [(file.parent.name, file) for file in sorted(folder.glob("*/_annotations.coco.json"))]
    return {split: (_folders(folder, split, file), file) for split, file in group_by_split(named).items()}


def find_single_coco_file(folder: Path) -> dict[str, CocoFiles]:
    """Find the only JSON file, whatever its name: for training."""
    files = [*folder.glob("*.json"), *folder.glob("annotations/*.json")]
    return {"train": ([files[0].parent, folder, *_places(folder)], files[0])} if len(files) == 1 else {}


def _folders(folder: Path, split: str, file: Path) -> list[Path]:
    """Leave out the folders of other splits: they may hold other images of the same names."""
    named = {
        name: [place for place in _places(folder) if split_from_name(place.name) == name] for name in (split, None)
    }
    return [*named[split], file.parent, folder, *named[None]]


def _places(folder: Path) -> list[Path]:
    nested = [*sorted(folder.iterdir()), *sorted((folder / "images").glob("*"))]
    return [entry for entry in nested if entry.is_dir()]


def read_coco_files(
    splits: Mapping[str, CocoFiles], source: Path, on_error: ErrorHandler
) -> dict[str, DetectionSplit]:
    """Read what [`find_coco`] found."""
    return {split: read_coco_file(*files, on_error) for split, files in splits.items()}


def _read_json(source: Path) -> dict:
    text = read_text(source)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: is not valid JSON ({error}); the file may be truncated") from None
    _check_structure(content, source)
    return content


_LARGEST_ID = 2**63 - 1
_FEW_IMAGES = 20  # tell which folder is meant
_REQUIRED_FIELDS = {
    "images": {"id", "file_name"},
    "categories": {"id", "name"},
    "annotations": {"image_id", "category_id", "bbox"},
}


def _check_structure(content: Any, source: Path) -> None:
    """Refuse what is not COCO, and ids that are doubled or point nowhere."""
    keys = sorted(content) if isinstance(content, dict) else type(content).__name__
    if not isinstance(content, dict) or any(not isinstance(content.get(part), list) for part in _REQUIRED_FIELDS):
        raise InputError(
            f"{source}: is not a COCO detection file, which has lists named {summarize_list(_REQUIRED_FIELDS)}; it has {keys}"
        )
    for part, fields in _REQUIRED_FIELDS.items():
        for entry in content[part]:
            if not isinstance(entry, dict) or not fields <= entry.keys():
                raise InputError(f"{source}: an entry of {part!r} lacks one of {sorted(fields)}: {str(entry)[:200]}")
    for entry in content["images"]:
        sides = [entry[side] for side in ("height", "width") if entry.get(side)]
        if not isinstance(entry["file_name"], str) or not all(_is_count(side) for side in sides):
            raise InputError(
                f"{source}: an image's file_name must be text, its height and width whole positive numbers: "
                f"{str(entry)[:200]}"
            )
    for part, name in (("images", "file_name"), ("categories", "name")):
        ids = [entry["id"] for entry in content[part]]
        if not ids:
            raise InputError(f"{source}: lists no {part}")
        if wrong := [repr(i) for i in ids if type(i) is not int or abs(i) > _LARGEST_ID]:
            raise InputError(f"{source}: ids of {part!r} must be integers of 64 bits; got {summarize_list(wrong)}")
        names: dict[int, list[str]] = defaultdict(list)
        for entry in content[part]:
            names[entry["id"]].append(repr(entry[name]))
        if doubled := [f"{i} ({summarize_list(of_id, 3)})" for i, of_id in names.items() if len(of_id) > 1]:
            raise InputError(
                f"{source}: ids of {part!r} are there more than once: {summarize_list(doubled, 3)}; give each its own"
            )


def _annotations(content: dict, source: Path, on_error: ErrorHandler) -> list[dict]:
    """The annotations whose image and category are listed."""
    known_annotations = content["annotations"]
    for field, part in (("image_id", "images"), ("category_id", "categories")):
        known = {entry["id"] for entry in content[part]}
        unknown = [each for each in known_annotations if not _is_among(each[field], known)]
        if unknown:
            on_error(
                f"{source}: annotations name {field} {summarize_list(sorted({repr(each[field]) for each in unknown}))}, which "
                f"{part!r} does not list"
            )
            known_annotations = [each for each in known_annotations if _is_among(each[field], known)]
    return known_annotations


def _is_among(number: Any, known: set[int]) -> bool:
    return isinstance(number, int | float) and number in known  # a list cannot be looked for in a set


def _image_folder(folders: Sequence[Path], content: dict, source: Path) -> Path:
    names = [entry["file_name"] for entry in content["images"][:_FEW_IMAGES]]
    held = {folder: sum((folder / name).is_file() for name in names) for folder in folders}
    most = max(held, key=lambda folder: held[folder])  # the first of several
    folder = next((folder for folder in folders if 2 * held[folder] > len(names)), most)
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder of images")
    if not held[folder] and not any(path.suffix.lower() in IMAGE_EXTENSIONS for path in folder.rglob("*")):
        raise InputError(f"{folder}: the folder holds no images, though {source} names {summarize_list(names)}")
    return folder


def _annotated_size(entry: dict) -> tuple[int, int] | None:
    """`(height, width)` from the annotation file, if it says both."""
    height, width = entry.get("height"), entry.get("width")
    return (int(float(height)), int(float(width))) if height and width else None


def _is_count(value: Any) -> bool:
    """Whether something is, or spells, a whole positive number."""
    try:
        return float(value) >= 1 and float(value).is_integer()
    except (TypeError, ValueError):
        return False
