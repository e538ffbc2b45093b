"""Read datasets in the Pascal VOC format: one XML file per image.

Format: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html. `bndbox` counts pixels from 1 and
includes the last one: xmin 1 and xmax 10 mean x 0 and width 10. supervision reads it so.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element, ParseError

from ...utils.errors import InputError, import_extra
from ...utils.io import read_lines
from ..dataset import SPLIT_ALIASES, AnnotatedImageBuilder, DetectionSplit, ErrorHandler
from ..images import is_image_file
from .common import Annotation, ReadOptions, read_valid, split_folders, supervision_to_xywh


# directories of images and of XML files, relative to a dataset or split
_FOLDERS = (("JPEGImages", "Annotations"), ("images", "annotations"), (".", "."))

Pairs = Sequence[tuple[Path, Path]]  # an image and its annotation file, either of which may be missing


class VocSplit(NamedTuple):
    """Files of a split.

    Attributes:
        pairs (`list[tuple[Path, Path]]`): Images and their annotation files.
        all_annotations (`list[Path]`): The annotation files of all splits, whose classes are numbered together.
    """

    pairs: Pairs
    all_annotations: Sequence[Path]


class VocAnnotation(NamedTuple):
    """Content of an XML file.

    Attributes:
        size (`tuple[int, int]` or `None`): `(height, width)` in pixels, if given.
        names (`list[str]` of length `num_objects`): Class names.
        boxes (`list` of length `num_objects`): x, y, width, height in pixels, or `None` if invalid.
        difficult (`list[int]` of length `num_objects`): 1 for an object that VOC's evaluation ignores.
    """

    size: tuple[int, int] | None = None
    names: Sequence[str] = ()
    boxes: Sequence[Any] = ()
    difficult: Sequence[int] = ()


def find_voc(folder: Path) -> dict[str, VocSplit]:
    """Find splits as lists in `ImageSets/Main` or as directories. Without either, everything is for training."""
    pairs_of_split = _find_pairs(folder)
    all_annotations = [file for pairs in pairs_of_split.values() for _, file in pairs]
    return {split: VocSplit(pairs, all_annotations) for split, pairs in pairs_of_split.items()}


def _find_pairs(folder: Path) -> dict[str, Pairs]:
    lists, devkit = folder / "ImageSets" / "Main", [folder / name for name in _FOLDERS[0]]
    if all(path.is_dir() for path in (lists, *devkit)):
        return _find_listed_pairs(lists, *devkit)
    split_paths = {split: path for split, path in split_folders(folder).items() if _find_folders(path)}
    found = {split: _find_folders(path) for split, path in (split_paths or {"train": folder}).items()}
    return {split: _match_by_stem(*folders) for split, folders in found.items() if folders}


def _find_folders(folder: Path) -> tuple[Path, Path] | None:
    """Return the directories of images and of XML files below `folder`, if it has any XML files."""
    candidates = [(folder / images, folder / annotations) for images, annotations in _FOLDERS]
    return next((pair for pair in candidates if pair[0].is_dir() and any(pair[1].glob("*.xml"))), None)


def _match_by_stem(images: Path, annotations: Path) -> Pairs:
    files = sorted(path for path in images.iterdir() if is_image_file(path))
    stems = {path.stem for path in files}
    missing = [images / f"{file.stem}.jpg" for file in sorted(annotations.glob("*.xml")) if file.stem not in stems]
    return [(path, annotations / f"{path.stem}.xml") for path in (*files, *missing)]


def _find_listed_pairs(lists: Path, images: Path, annotations: Path) -> dict[str, Pairs]:
    image_of_stem = {path.stem: path for path in sorted(images.iterdir()) if is_image_file(path)}
    files = {SPLIT_ALIASES[file.stem]: file for file in sorted(lists.glob("*.txt")) if file.stem in SPLIT_ALIASES}
    if "train" not in files and (lists / "trainval.txt").is_file():
        files["train"] = lists / "trainval.txt"
    return {
        split: [
            (image_of_stem.get(stem, images / f"{stem}.jpg"), annotations / f"{stem}.xml") for stem in read_lines(file)
        ]
        for split, file in files.items()
    } or {"train": _match_by_stem(images, annotations)}


def read_voc(splits: Mapping[str, VocSplit], source: Path, options: ReadOptions) -> dict[str, DetectionSplit]:
    """Read the splits of [`find_voc`].

    Classes are numbered from 1 in alphabetical order over all splits of the directory, even if only some are read, so
    that category ids in result files do not depend on the choice. Difficult objects become iscrowd annotations.
    """
    files = dict.fromkeys(file for split in splits.values() for file in split.all_annotations)
    annotations = {file: _read_xml(file, options.on_error) for file in files}
    names = sorted({name for annotation in annotations.values() for name in annotation.names if name})
    if splits and not names:
        raise InputError(f"{source}: no annotation file contains an object")
    categories = dict(enumerate(names, start=1))
    return {
        split: _build_split(pairs, annotations, categories, AnnotatedImageBuilder(source, split, options.on_error))
        for split, (pairs, _) in splits.items()
    }


def _build_split(
    pairs: Pairs,
    annotations: Mapping[Path, VocAnnotation],
    categories: Mapping[int, str],
    builder: AnnotatedImageBuilder,
) -> DetectionSplit:
    id_of_name = {name: id_ for id_, name in categories.items()}
    for path, file in pairs:
        size, names, boxes, difficult = annotations[file]
        builder.add(path, size, boxes, [id_of_name.get(name, 0) for name in names], iscrowd=difficult)
        if not file.is_file():
            builder.add_warning("images have no annotation file: treated as images without objects", path)
    return builder.build(categories)


def _read_xml(file: Path, on_error: ErrorHandler) -> VocAnnotation:
    formats = import_extra("supervision.dataset.formats.pascal_voc", "train", "reading Pascal VOC")
    try:
        root = formats.parse(file).getroot()
    except FileNotFoundError:
        return VocAnnotation()
    except (OSError, ValueError, ParseError) as error:
        on_error(f"{file}: cannot be read as XML ({error})")
        return VocAnnotation()
    elements = root.findall("object")
    for element in elements:
        for polygon in element.findall("polygon"):  # supervision would draw masks
            element.remove(polygon)

    def read(elements: Sequence[Element]) -> list[Annotation]:
        parent = Element("annotation")
        parent.extend(elements)
        detections, names = formats.detections_from_xml_obj(parent, [], (1, 1))
        return [(names[index], box) for index, box in zip(detections.class_id, supervision_to_xywh(detections))]

    objects = read_valid(elements, read, invalid=("", None))
    return VocAnnotation(
        _read_size(root),
        [name for name, _ in objects],
        [box for _, box in objects],
        [int(element.findtext("difficult", "0").strip() == "1") for element in elements],
    )


def _read_size(root: Element) -> tuple[int, int] | None:
    try:
        height, width = (int(float(root.findtext(f"size/{side}", ""))) for side in ("height", "width"))
    except ValueError:
        return None
    return (height, width) if min(height, width) > 0 else None
