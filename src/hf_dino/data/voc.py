"""Datasets in the format of Pascal VOC: an XML file per image.

Format: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html. `bndbox` counts pixels from 1 and
includes the last one, so a box from 1 to 10 is x 0 and width 10; supervision reads it so.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element, ParseError

from ..utils.errors import InputError
from ..utils.io import read_lines
from .dataset import AnnotatedImageBuilder, DetectionSplit, ErrorHandler
from .extras import import_extra, supervision_to_xywh
from .images import is_image_file
from .splits import SPLIT_ALIASES, split_folders


# where a folder may have its images and its XML files
_PLACES = (("JPEGImages", "Annotations"), ("images", "annotations"), (".", "."))

Pairs = Sequence[tuple[Path, Path]]  # an image and its annotation file, either of which may be missing


class VocSplit(NamedTuple):
    """Where a split is.

    Attributes:
        pairs (`list[tuple[Path, Path]]`): Images and their annotation files.
        all_annotations (`list[Path]`): The annotation files of all splits, whose classes are numbered together.
    """

    pairs: Pairs
    all_annotations: Sequence[Path]


class VocAnnotation(NamedTuple):
    """What an XML file says.

    Attributes:
        size (`tuple[int, int]` or `None`): `(height, width)` in pixels, where it is there.
        names (`list[str]` of length `num_objects`): Classes.
        boxes (`list` of length `num_objects`): x, y, width, height in pixels; `None` where the file has none.
        difficult (`list[int]` of length `num_objects`): 1 for an object that VOC's evaluation leaves out.
    """

    size: tuple[int, int] | None = None
    names: Sequence[str] = ()
    boxes: Sequence[Any] = ()
    difficult: Sequence[int] = ()


def find_voc(folder: Path) -> dict[str, VocSplit]:
    """Find the splits: lists in ImageSets/Main, or folders of their own, or else everything is for training."""
    found = _find_pairs(folder)
    all_annotations = [file for pairs in found.values() for _, file in pairs]
    return {split: VocSplit(pairs, all_annotations) for split, pairs in found.items()}


def _find_pairs(folder: Path) -> dict[str, Pairs]:
    lists = folder / "ImageSets" / "Main"
    if lists.is_dir() and all((folder / place).is_dir() for place in _PLACES[0]):
        return _listed(lists, *(folder / place for place in _PLACES[0]))
    folders = {split: place for split, place in split_folders(folder).items() if _places(place)} or {"train": folder}
    return {split: _pairs(*places) for split, place in folders.items() if (places := _places(place))}


def _places(folder: Path) -> tuple[Path, Path] | None:
    """The folders of images and of XML files, if `folder` has any of the latter."""
    places = [(folder / images, folder / annotations) for images, annotations in _PLACES]
    return next((place for place in places if place[0].is_dir() and any(place[1].glob("*.xml"))), None)


def _pairs(images: Path, annotations: Path) -> Pairs:
    found = sorted(path for path in images.iterdir() if is_image_file(path))
    stems = {path.stem for path in found}
    alone = [images / f"{file.stem}.jpg" for file in sorted(annotations.glob("*.xml")) if file.stem not in stems]
    return [(path, annotations / f"{path.stem}.xml") for path in (*found, *alone)]


def _listed(lists: Path, images: Path, annotations: Path) -> dict[str, Pairs]:
    by_stem = {path.stem: path for path in sorted(images.iterdir()) if is_image_file(path)}
    files = {SPLIT_ALIASES[file.stem]: file for file in sorted(lists.glob("*.txt")) if file.stem in SPLIT_ALIASES}
    if "train" not in files and (lists / "trainval.txt").is_file():
        files["train"] = lists / "trainval.txt"
    stems = {split: read_lines(file) for split, file in files.items()}
    return {
        split: [(by_stem.get(stem, images / f"{stem}.jpg"), annotations / f"{stem}.xml") for stem in listed]
        for split, listed in stems.items()
    } or {"train": _pairs(images, annotations)}


def read_voc(splits: Mapping[str, VocSplit], source: Path, on_error: ErrorHandler) -> dict[str, DetectionSplit]:
    """Read XML files with supervision, but without the images, which it would decode to know their size.

    Classes are numbered from 1 in the order of their names, over all splits of the folder, whichever are read: ids in
    a file of results are the same every time. Difficult objects become crowds, which are neither trained on nor
    counted.
    """
    files = dict.fromkeys(file for split in splits.values() for file in split.all_annotations)
    annotations = {file: _read(file, on_error) for file in files}
    names = sorted({name for said in annotations.values() for name in said.names if name})
    if splits and not names:
        raise InputError(f"{source}: no annotation file has an object")
    ids = {name: number for number, name in enumerate(names, start=1)}
    data = {}
    for split, (pairs, _) in splits.items():
        maker = AnnotatedImageBuilder(source, split, on_error)
        for path, file in pairs:
            said = annotations[file]
            category_ids = [ids.get(name, 0) for name in said.names]
            maker.add(path, said.size, said.boxes, category_ids, iscrowd=said.difficult)
            if not file.is_file():
                maker.remark("images have no annotation file: taken to be without objects", path)
        data[split] = maker.finish({number: name for name, number in ids.items()})
    return data


def _read(file: Path, on_error: ErrorHandler) -> VocAnnotation:
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
        for polygon in element.findall("polygon"):  # of which supervision would draw masks
            element.remove(polygon)
    objects = _objects(elements, formats.detections_from_xml_obj)
    return VocAnnotation(
        _size(root),
        [name for name, _ in objects],
        [box for _, box in objects],
        [int(element.findtext("difficult", "0").strip() == "1") for element in elements],
    )


def _objects(elements: list[Element], read: Callable) -> list[tuple[str, Any]]:
    """Name and box of each; no name and no numbers for one that supervision refuses."""
    annotation = Element("annotation")
    annotation.extend(elements)
    try:
        detections, names = read(annotation, [], (1, 1))
    except ValueError:
        if len(elements) > 1:
            return [pair for element in elements for pair in _objects([element], read)]
        return [("", None)]
    return [(names[number], box) for number, box in zip(detections.class_id, supervision_to_xywh(detections))]


def _size(root: Element) -> tuple[int, int] | None:
    try:
        height, width = (int(float(root.findtext(f"size/{side}", ""))) for side in ("height", "width"))
    except ValueError:
        return None
    return (height, width) if min(height, width) > 0 else None
