"""Read datasets in the Pascal VOC format: one XML file per image.

Format: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html. By it, `bndbox` counts pixels from 1
and includes the last one: xmin 1 and xmax 10 mean x 0 and width 10. Tools count otherwise, see `_find_counting`.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from xml.etree.ElementTree import Element, ParseError

import numpy as np

from ...utils.errors import InputError, count_of, import_extra, summarize_list
from ...utils.io import read_lines
from ..dataset import (
    SPLIT_ALIASES,
    SPLITS,
    AnnotatedImageBuilder,
    DetectionSplit,
    ErrorHandler,
    to_float,
    xyxy_to_xywh,
)
from ..images import IMAGE_EXTENSIONS
from .annotation_tools import read_beginning
from .common import (
    NO_FILE_WARNING,
    ROTATED_WARNING,
    SHARED_FILE_WARNING,
    ReadOptions,
    child_folder,
    enclose_rotated_boxes,
    expected_image,
    group_by_split,
    refuse_rotated_boxes,
    split_folders,
    to_size,
    walk_files,
)
from .files import find_image_files


logger = logging.getLogger(__name__)

# usual names of directories, without upper case
_IMAGE_FOLDERS = ("jpegimages", "images", "imgs", "img")
_XML_FOLDERS = ("annotations", "xmls", "xml", "labels")
_NUM_PROBED_FILES = 20  # XML files, to know the format

VOC_SOURCE = "hf-dino, pixels are counted from 1"
"""Source in the files that [`convert_data`] writes. A box that extends beyond its image may have a coordinate of 0."""

_DIFFICULT = {"": 0, "0": 0, "false": 0, "no": 0, "1": 1, "true": 1, "yes": 1}

# an image, if one has the name of the annotation file, and that file, which may be missing
Pair = tuple[Path | None, Path]


class VocSplit(NamedTuple):
    """Files of a split.

    Attributes:
        images (`Path`): The directory of the images.
        pairs (`list[Pair]`): Images and their annotation files.
        notes (`dict[str, list[Path]]`): Warnings about the lists of images, and the images that they are about.
        all_annotations (`list[Path]`): The annotation files of all splits, whose classes are numbered together.
    """

    images: Path
    pairs: Sequence[Pair]
    notes: Mapping[str, Sequence[Path]] = {}
    all_annotations: Sequence[Path] = ()


class VocObject(NamedTuple):
    """An `object` of an XML file.

    Attributes:
        name (`str`): Class name.
        corners (`tuple[float, ...]`): xmin, ymin, xmax, ymax as written, NaN if invalid.
        angle (`float`): Rotation of the box about its center in degrees.
        difficult (`int`): 1 for an object that VOC's evaluation ignores.
        counts_pixels (`bool`): Whether the corners are `bndbox`; otherwise they are x and y as everywhere else.
        warnings (`list[str]`): What was corrected.
    """

    name: str
    corners: Sequence[float]
    angle: float
    difficult: int
    counts_pixels: bool
    warnings: Sequence[str]


class VocAnnotation(NamedTuple):
    """Content of an XML file.

    Attributes:
        root (`str`): Name of the root element, empty for a file that is missing or broken.
        size (`tuple[int, int]` or `None`): `(height, width)` in pixels, if given.
        objects (`list[VocObject]`): The objects.
        image_name (`str`): File name of the image, if given.
        tool (`str`): The tool that wrote the file, if it is one that counts pixels in a known way.
        warnings (`list[str]`): What was corrected apart from the objects.
    """

    root: str = ""
    size: tuple[int, int] | None = None
    objects: Sequence[VocObject] = ()
    image_name: str = ""
    tool: str = ""
    warnings: Sequence[str] = ()


class Counting(NamedTuple):
    """What the numbers of `bndbox` mean.

    Attributes:
        offset (`tuple[int, ...]`): Subtracted from xmin, ymin, xmax, ymax to get the edges of the box.
        message (`str`): What was done and why.
    """

    offset: tuple[int, int, int, int]
    message: str


def find_voc(folder: Path) -> dict[str, VocSplit]:
    """Find splits as lists in `ImageSets/Main` or as directories. Without either, everything is for training."""
    splits = _find_splits(folder)
    all_annotations = [file for split in splits.values() for _, file in split.pairs]
    return {name: split._replace(all_annotations=all_annotations) for name, split in splits.items()}


def _find_splits(folder: Path) -> dict[str, VocSplit]:
    roots = _find_roots(folder)
    lists = next((path for path in (folder / "ImageSets/Main", folder / "ImageSets") if any(path.glob("*.txt"))), None)
    if roots and lists:
        return _find_listed(lists, *roots)
    found = {split: roots_ for split, path in split_folders(folder).items() if (roots_ := _find_roots(path))}
    if found:
        return {
            split: VocSplit(images, [pair for _, pair in _match(images, files)])
            for split, (images, files) in found.items()
        }
    return _group_pairs(*roots) if roots else {}


def _find_roots(folder: Path) -> tuple[Path, Path] | None:
    """Return the directories of images and of XML files below `folder`, if it has any annotation."""
    images = child_folder(folder, _IMAGE_FOLDERS) or folder
    outer = child_folder(folder, _XML_FOLDERS) or images
    candidates = dict.fromkeys((child_folder(outer, _XML_FOLDERS) or outer, outer, images, folder))
    return next(((images, path) for path in candidates if any(map(_is_annotation, _probe_xml_files(path)))), None)


def _probe_xml_files(folder: Path) -> Iterator[Path]:
    return islice(walk_files(folder, {".xml"}), _NUM_PROBED_FILES)


def _is_annotation(file: Path) -> bool:
    """Return whether an XML file seems to be an annotation, in any encoding. Those of LabelMe have points only."""
    beginning = read_beginning(file)
    return re.search(r"<annotation[\s>]", beginning) is not None and (
        "<pt>" not in beginning or "bndbox>" in beginning
    )


def _match(images: Path, annotations: Path) -> list[tuple[str, Pair]]:
    """Pair files of the same key, their path without extension: images, then the annotation files of none.

    Images of a directory in which no image has an annotation file, such as one of masks, are left out.
    """
    files = {_key(file, annotations): file for file in walk_files(annotations, {".xml"})}
    keys = {path: _key(path, images) for path in walk_files(images, IMAGE_EXTENSIONS)}
    annotated = {path.parent for path, key in keys.items() if key in files}
    paired = [
        (key, (path, files.get(key) or annotations / f"{key}.xml"))
        for path, key in keys.items()
        if path.parent in annotated
    ]
    unmatched = files.keys() - set(keys.values())
    return [*paired, *((key, (None, file)) for key, file in files.items() if key in unmatched)]


def _key(path: Path, root: Path) -> str:
    return path.relative_to(root).with_suffix("").as_posix()


def _group_pairs(images: Path, annotations: Path) -> dict[str, VocSplit]:
    """Group pairs by subdirectories that are named after splits. Deeper ones belong to a dataset further below."""
    groups: dict[str, list[Pair]] = {}
    for key, pair in _match(images, annotations):
        first, *others = key.lower().split("/")[:-1] or [""]
        if {first, *others} & {*_XML_FOLDERS} or {*others} & SPLIT_ALIASES.keys():
            return {}
        groups.setdefault(SPLIT_ALIASES.get(first, "train"), []).append(pair)
    return {split: VocSplit(images, groups[split]) for split in SPLITS if split in groups}


def _find_listed(lists: Path, images: Path, annotations: Path) -> dict[str, VocSplit]:
    matched = _match(images, annotations)
    # `cat_train.txt` lists the images of the split with a flag for a class
    files = group_by_split(
        (file.stem, file) for file in sorted(lists.glob("*.txt")) if file.stem.lower() in SPLIT_ALIASES
    )
    if "train" not in files and (lists / "trainval.txt").is_file():
        files["train"] = lists / "trainval.txt"
    if not files:
        note = f"images are in no split, as {lists.name} has no train.txt, val.txt or test.txt: used for training"
        pairs = [pair for _, pair in matched]
        return {"train": VocSplit(images, pairs, {note: [image or file for image, file in pairs]})}
    pairs_of_key: dict[str, list[Pair]] = {}
    for key, pair in matched:
        pairs_of_key.setdefault(key, []).append(pair)
    splits = {split: _read_list(files[split], images, annotations, pairs_of_key) for split in SPLITS if split in files}
    return _add_notes(splits)


def _read_list(file: Path, images: Path, annotations: Path, pairs_of_key: Mapping[str, Sequence[Pair]]) -> VocSplit:
    lines = [line.strip('"').replace("\\", "/") for line in read_lines(file)]
    keys = [_find_key(line, pairs_of_key) for line in lines]
    pairs = [
        pair
        for key in dict.fromkeys(keys)
        for pair in pairs_of_key.get(key, [(images / f"{key}.jpg", annotations / f"{key}.xml")])
    ]
    repeated = [images / key for key, count in Counter(keys).items() for _ in range(count - 1)]
    flagged = [images / key for key, line in zip(keys, lines) if re.search(r"\s-?[01]$", line) and key != line]
    notes = {"images are listed several times: used once": repeated, "images are listed with a flag: ignored": flagged}
    return VocSplit(images, pairs, notes)


def _find_key(line: str, known: Mapping[str, object]) -> str:
    """Return the name of a listed image without directory and extension, and without the flag of a class."""
    names = (line, re.sub(r"\s+-?[01]$", "", line))
    parts = [PurePosixPath(name).parts[start:] for name in names for start in range(name.count("/") + 1)]
    candidates = [key for each in parts for key in (PurePosixPath(*each), _without_extension(PurePosixPath(*each)))]
    return next((str(key) for key in candidates if str(key) in known), str(candidates[-1]))


def _without_extension(name: PurePosixPath) -> PurePosixPath:
    return name.with_suffix("") if name.suffix.lower() in {*IMAGE_EXTENSIONS, ".xml"} else name


def _add_notes(splits: dict[str, VocSplit]) -> dict[str, VocSplit]:
    """Add which images are listed for several splits."""
    listed: set[Path] = set()
    for name, split in splits.items():
        shared = [file for _, file in split.pairs if file in listed]
        listed.update(file for _, file in split.pairs)
        splits[name] = split._replace(notes={**split.notes, "images are also in another split": shared})
    return splits


def read_voc(splits: Mapping[str, VocSplit], source: Path, options: ReadOptions) -> dict[str, DetectionSplit]:
    """Read the splits of [`find_voc`].

    Classes are numbered from 1 in alphabetical order over all splits of the directory, even if only some are read, so
    that category ids in result files do not depend on the choice. Difficult objects become iscrowd annotations.
    """
    files = dict.fromkeys(file for split in splits.values() for file in split.all_annotations)
    annotations = {file: _read_xml(file, options.on_error) for file in files}
    names = sorted({each.name for annotation in annotations.values() for each in annotation.objects})
    if splits and not names:
        raise InputError(f"{source}: no annotation file contains an object")
    rotated = [file for file, content in annotations.items() for each in content.objects if each.angle]
    refuse_rotated_boxes(rotated, source, options)
    counting = _find_counting(list(annotations.values()))
    logger.info("%s: %s", source, counting.message)
    categories = dict(enumerate(names, start=1))
    return {
        name: _build_split(
            split, annotations, categories, counting, AnnotatedImageBuilder(source, name, options.on_error)
        )
        for name, split in splits.items()
    }


def _find_counting(annotations: Sequence[VocAnnotation]) -> Counting:
    """Return what the numbers mean, by the numbers of all splits.

    The devkit counts pixels from 1 up to the last one, and so do LabelImg (roughly) and supervision. Others write the
    edges of the box: from 0, or from 1, where the right edge of an image is its width plus 1.
    """
    starts, ends, sizes = np.split(_boxes_in_pixels(annotations), 3, axis=1)
    lowest = starts.min(initial=math.inf, where=starts >= 0)
    beyond = (ends - sizes).max(initial=-math.inf)
    tools = {annotation.tool for annotation in annotations if annotation.root}
    from_one = Counting((1, 1, 0, 0), "boxes count pixels from 1 and include the last one, as no coordinate is 0")
    if tools == {VOC_SOURCE}:
        return from_one
    if lowest < 1:
        return Counting((0, 0, 0, 0), "boxes count pixels from 0, as a coordinate of 0 shows: nothing was subtracted")
    if len(tools) == 1 and tools != {""}:
        return Counting(
            (0, 0, 0, 0), f"boxes count pixels from 0, as {tools.pop()} writes them: nothing was subtracted"
        )
    if beyond == 1:
        return Counting(
            (1, 1, 1, 1),
            "boxes have edges counted from 1, as the image's width or height plus 1 shows: 1 was subtracted from each",
        )
    return from_one


def _boxes_in_pixels(annotations: Sequence[VocAnnotation]) -> np.ndarray:
    """Return the valid corners that count pixels, and the width and height of their images or infinity.

    Returns:
        `np.ndarray` of shape `(num_boxes, 6)`: xmin, ymin, xmax, ymax, width, height.
    """
    rows = [
        (*each.corners, *(annotation.size or (math.inf, math.inf))[::-1])
        for annotation in annotations
        for each in annotation.objects
        if each.counts_pixels and not each.angle
    ]
    array = np.array(rows, dtype=np.float64).reshape(-1, 6)
    return array[(array[:, 2:4] > array[:, :2]).all(axis=1)]


def _build_split(
    split: VocSplit,
    annotations: Mapping[Path, VocAnnotation],
    categories: Mapping[int, str],
    counting: Counting,
    builder: AnnotatedImageBuilder,
) -> DetectionSplit:
    id_of_name = {name: id_ for id_, name in categories.items()}
    pairs = _drop_unknown(_pair_images(split, annotations, builder), split.images, annotations, builder)
    boxes = _to_boxes([annotations[file].objects for _, file in pairs], counting)
    for (path, file), of_image in zip(pairs, boxes):
        annotation = annotations[file]
        if annotation.root not in ("", "annotation"):
            builder.on_error(
                f"{file}: is not a Pascal VOC annotation, but <{annotation.root}>. Remove it, or restore it"
            )
        objects = annotation.objects
        builder.add(
            path,
            annotation.size,
            of_image,
            [id_of_name[each.name] for each in objects],
            iscrowd=[each.difficult for each in objects],
        )
        for warning in chain(annotation.warnings, *(each.warnings for each in objects)):
            builder.add_warning(warning, path)
        if counting.offset[0] == counting.offset[2]:
            builder.add_warning(counting.message, path, len(objects))
        if not file.is_file():
            builder.add_warning(NO_FILE_WARNING, path)
    for note, paths in split.notes.items():
        builder.add_warnings(note, paths)
    return builder.build(categories)


def _drop_unknown(
    pairs: Sequence[tuple[Path, Path]],
    folder: Path,
    annotations: Mapping[Path, VocAnnotation],
    builder: AnnotatedImageBuilder,
) -> list[tuple[Path, Path]]:
    """Return the pairs whose image is there or has an annotated size, and report the others."""
    unknown = {path for path, file in pairs if annotations[file].size is None and not path.is_file()}
    if unknown:
        names = summarize_list(sorted(path.name for path in unknown))
        builder.on_error(
            f"{builder.title}: {count_of(len(unknown), 'image')} not found in {folder}: {names}. Restore them, or "
            "remove them from the annotations"
        )
    return [pair for pair in pairs if pair[0] not in unknown]


def _to_boxes(objects_of: Sequence[Sequence[VocObject]], counting: Counting) -> list[np.ndarray]:
    """Return x, y, width, height in pixels, of shape `(num_objects, 4)` for each image."""
    objects = [each for of_image in objects_of for each in of_image]  # all at once, which is faster
    corners = np.array([each.corners for each in objects], dtype=np.float64).reshape(-1, 4)
    corners -= np.array([each.counts_pixels for each in objects]).reshape(-1, 1) * counting.offset
    boxes = enclose_rotated_boxes(xyxy_to_xywh(corners), np.array([each.angle for each in objects]))
    return np.split(np.round(boxes, 3), np.cumsum([len(of_image) for of_image in objects_of]))


def _pair_images(
    split: VocSplit, annotations: Mapping[Path, VocAnnotation], builder: AnnotatedImageBuilder
) -> list[tuple[Path, Path]]:
    """Return an image for each annotation file, which names it if no image has the file's own name."""
    matched = [(image, file) for image, file in split.pairs if image is not None]
    alone = [file for image, file in split.pairs if image is None]
    stray = {file for file in alone if annotations[file].root not in ("", "annotation")}
    names = {file: annotations[file].image_name or f"{file.stem}.jpg" for file in alone if file not in stray}
    found = find_image_files(list(names.values()), split.images).paths
    taken = {image for image, file in matched if file.is_file()}
    taken |= {path for path, count in Counter(found).items() if count > 1 or not path.is_file()}
    by_name = {path: file for path, file in zip(found, names) if path not in taken}
    missing = [(expected_image(split.images, file.stem), file) for path, file in zip(found, names) if path in taken]
    shared = Counter(file for _, file in matched if file.is_file())
    for warning, paths in {
        "XML files are not annotations: ignored": stray,
        "images have another name than their annotation file: matched by the name in it": by_name,
        SHARED_FILE_WARNING: [path for path, file in matched if shared[file] > 1],
    }.items():
        builder.add_warnings(warning, paths)
    return [*((path, by_name.pop(path, file)) for path, file in matched), *by_name.items(), *missing]


def _read_xml(file: Path, on_error: ErrorHandler) -> VocAnnotation:
    xml = import_extra("defusedxml.ElementTree", "train", "reading Pascal VOC")
    try:
        root = xml.parse(file).getroot()
    except FileNotFoundError:
        return VocAnnotation()
    except (OSError, ValueError, LookupError, ParseError) as error:
        on_error(f"{file}: cannot be read as XML ({error})")
        return VocAnnotation()
    if root.tag != "annotation":
        return VocAnnotation(root.tag)
    elements = root.findall("object")
    objects = [_read_object(element) for element in elements]
    num_outside = sum(
        len(list(root.iter(tag))) - sum(len(list(element.iter(tag))) for element in elements)
        for tag in ("bndbox", "robndbox")
    )
    warnings = ["boxes are outside of an object element: left out"] * num_outside
    warnings += ["objects have no class name: left out"] * sum(not each.name for each in objects)
    return VocAnnotation(
        root.tag, _read_size(root), [each for each in objects if each.name], _image_name(root), _tool(root), warnings
    )


def _image_name(root: Element) -> str:
    name = next((text for tag in ("filename", "path") if (text := root.findtext(tag, "").strip())), "")
    return name if PurePosixPath(name).suffix.lower() in IMAGE_EXTENSIONS else ""


def _tool(root: Element) -> str:
    """Return the name of the tool, by what only it writes: edges counted from 0, apart from ours."""
    source = [root.findtext(f"source/{tag}", "") for tag in ("database", "annotation", "image")]
    if source[0] == VOC_SOURCE:
        return VOC_SOURCE
    is_label_studio = root.findtext("owner/name", "") == "Label Studio"
    return "Label Studio" if is_label_studio else "CVAT" if source == ["Unknown"] * 3 else ""


def _read_object(element: Element) -> VocObject:
    boxes = [box for box in element if box.tag in ("bndbox", "robndbox")]
    box = boxes[0] if boxes else Element("bndbox")
    corners, angle = _read_rotated(box) if box.tag == "robndbox" else _read_corners(box, element)
    difficult = element.findtext("difficult", "").strip().lower()
    (left, right), (top, bottom) = sorted(corners[::2]), sorted(corners[1::2])
    warnings = {
        "objects have several boxes: the first one is used": len(boxes) > 1,
        "objects have several names: the first one is used": len(element.findall("name")) > 1,
        "objects are marked neither difficult nor not: read as not difficult": difficult not in _DIFFICULT,
        "boxes have their corners swapped: put in order": corners[2] < corners[0] or corners[3] < corners[1],
        ROTATED_WARNING: angle % 180 != 0,
    }
    return VocObject(
        element.findtext("name", "").strip(),
        (left, top, right, bottom),
        angle % 180,
        _DIFFICULT.get(difficult, 0),
        box.tag == "bndbox",
        [warning for warning, applies in warnings.items() if applies],
    )


def _read_corners(box: Element, element: Element) -> tuple[Sequence[float], float]:
    """Return the corners of `bndbox`, and CVAT's rotation about its center in degrees."""
    attributes = {each.findtext("name"): each.findtext("value") for each in element.iter("attribute")}
    angle = to_float(attributes.get("rotation"))
    return _numbers(box, ("xmin", "ymin", "xmax", "ymax")), 0 if math.isnan(angle) else angle


def _read_rotated(box: Element) -> tuple[Sequence[float], float]:
    """Return the corners of roLabelImg's `robndbox` before its rotation, and its rotation in degrees."""
    x, y, width, height, angle = _numbers(box, ("cx", "cy", "w", "h", "angle"))
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2), math.degrees(angle)


def _numbers(box: Element, tags: Sequence[str]) -> list[float]:
    """Return the numbers in elements, NaN where there is none or more than one."""
    num_of_tag = Counter(each.tag for each in box)
    return [to_float(box.findtext(tag) if num_of_tag[tag] == 1 else None) for tag in tags]


def _read_size(root: Element) -> tuple[int, int] | None:
    return to_size(root.findtext("size/height"), root.findtext("size/width"))
