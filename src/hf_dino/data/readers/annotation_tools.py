"""Formats of annotation tools: LabelMe is read, others are recognized, to name the way from each to one that is read.

LabelMe writes a JSON file for each image, whose shapes are rectangles, polygons and others in pixels:
https://github.com/wkentaro/labelme
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...utils.errors import InputError, import_extra
from ...utils.io import read_text
from ..dataset import SPLIT_ALIASES, AnnotatedImageBuilder, DetectionSplit, ErrorHandler, xyxy_to_xywh
from ..images import IMAGE_EXTENSIONS
from .common import NO_FILE_WARNING, POLYGON_WARNING, ReadOptions, split_folders, to_size, walk_files
from .files import RENAMED_WARNING, find_image_files


_NUM_BYTES = 65536  # of a file's beginning
_NUM_PROBED_FILES = 5  # of each pattern
_LABELME = re.compile(r'"shapes"\s*:\s*\[|"imagePath"\s*:\s*"')
_COCO = re.compile(r'(?s)\s*\{.*"(images|annotations)"\s*:\s*\[')
_DEPTHS = ("", "*/", "*/*/")
_IN_CVAT = "In CVAT, export as COCO 1.0, Pascal VOC 1.1 or Ultralytics YOLO Detection 1.0, with images"


class UnsupportedFormat(NamedTuple):
    """A format that is not read.

    Attributes:
        name (`str`): Display name.
        files (`tuple[str, ...]`): Patterns of file names, which may begin with a directory.
        content (`str`): Regular expression of what the beginning of such a file contains.
        advice (`str`): How to get the dataset in a format that is read.
    """

    name: str
    files: tuple[str, ...]
    content: str
    advice: str

    def find(self, folder: Path) -> Path | None:
        """Return a file in this format in a directory or one of its subdirectories, if any."""
        patterns = (f"{depth}{pattern}" for depth in _DEPTHS for pattern in self.files)
        files = (file for pattern in patterns for file in islice(folder.glob(pattern), _NUM_PROBED_FILES))
        return next((file for file in files if self.matches(file)), None)

    def matches(self, file: Path) -> bool:
        """Return whether a file of a suitable name is in this format."""
        return file.is_file() and re.search(self.content, read_beginning(file)) is not None


UNSUPPORTED_FORMATS = (
    UnsupportedFormat(
        "an archive", ("*.zip", "*.tar", "*.tar.gz", "*.tgz", "*.7z", "*.rar"), "", "Unpack it, and give its directory"
    ),
    UnsupportedFormat(
        "FiftyOne's own format",
        ("samples.json", "frames.json"),
        r'"(_id|filepath|_media_type|samples)"',
        "Export it with dataset.export(export_dir=..., dataset_type=fiftyone.types.COCODetectionDataset)",
    ),
    UnsupportedFormat(
        "Datumaro",
        ("*.json",),
        r'"dm_format_version"|"categories"\s*:\s*\{\s*"(label|mask|points)"',
        "In CVAT, export as COCO 1.0; otherwise run `datum convert -if datumaro -i DIRECTORY -f coco_instances`",
    ),
    UnsupportedFormat(
        "CVAT XML",
        ("*.xml",),
        r"<annotations>\s*<version>",
        _IN_CVAT,
    ),
    UnsupportedFormat(
        "LabelMe XML",
        ("*.xml",),
        r"(?s)<annotation>.*<pt>\s*<x>",
        _IN_CVAT,
    ),
    UnsupportedFormat(
        "Label Studio's own format",
        ("*.json",),
        r'(?s)^\s*\[.*"(rectanglelabels|polygonlabels|completed_by|annotator|annotation_id|total_annotations)"',
        "In Label Studio, export as COCO, YOLO with Images or Pascal VOC XML",
    ),
    UnsupportedFormat(
        "CreateML",
        ("*.json",),
        r'(?s)^\s*\[\s*\{.*"coordinates"\s*:\s*\{',
        "In Roboflow, export as COCO JSON; otherwise convert it with supervision: "
        "DetectionDataset.from_createml(...).as_coco(...)",
    ),
    UnsupportedFormat(
        "VIA (VGG Image Annotator)",
        ("*.json", "*.csv"),
        r'_via_img_metadata|_via_settings|"shape_attributes"|region_shape_attributes',
        "In VIA, choose Annotation > Export Annotations (COCO format)",
    ),
    UnsupportedFormat(
        "Supervisely",
        ("ann/*.json",),
        r'"(classTitle|geometryType)"|"objects"\s*:',
        "In Supervisely, run the app Export to COCO",
    ),
    UnsupportedFormat("VoTT", ("*.vott", "*.json"), r'"vottVersion"|"visitedFrames"', "In VoTT, export as Pascal VOC"),
    UnsupportedFormat(
        "V7 Darwin",
        ("*.json",),
        r'darwin-public|"slots"\s*:\s*\[',
        "In V7, export as COCO or Pascal VOC",
    ),
    UnsupportedFormat(
        "Labelbox",
        ("*.ndjson", "*.json"),
        r'"data_row"\s*:|"Labeled Data"\s*:',
        "Convert it to COCO with the labelbox package",
    ),
    UnsupportedFormat(
        "TFRecord",
        ("*.tfrecord", "*.tfrecords", "*.tfrecord-*", "*.record"),
        "",
        "Export as COCO from the tool that wrote it, such as CVAT or Roboflow",
    ),
    UnsupportedFormat(
        "Open Images",
        ("*.csv",),
        r"^(ImageID,(Source,)?LabelName|ImageID,.*XMin)",
        'Load it with fiftyone.zoo.load_zoo_dataset("open-images-v7") and export it as COCODetectionDataset',
    ),
    UnsupportedFormat(
        "a table of boxes in CSV",
        ("*.csv",),
        r"(?i)^[\w\",]*\b(xmin|x_min|bbox_x|left)\b",
        "Export as COCO from the tool that wrote it, or write metadata.jsonl as Hugging Face `datasets` reads it",
    ),
    UnsupportedFormat(
        "KITTI",
        ("label_2/*.txt", "labels/*.txt", "labels/*/*.txt", "*.txt"),
        r"^[A-Za-z_]+( -?\d+(\.\d+)?){14,15}\s*$",
        "Convert it to COCO, for example with `datum convert -if kitti -i DIRECTORY -f coco_instances`",
    ),
    UnsupportedFormat(
        "WIDER FACE",
        ("*bbx_gt*.txt",),
        "",
        "Convert it to COCO, for example with `datum convert -if wider_face -i DIRECTORY -f coco_instances`",
    ),
    UnsupportedFormat(
        "DOTA",
        ("labelTxt/*.txt", "*.txt"),
        r"(?m)^(-?\d+(\.\d+)? ){8}[A-Za-z][\w-]* [012]\s*$",
        "Convert it to YOLO OBB with ultralytics.data.converter.convert_dota_to_yolo_obb, whose boxes are rotated",
    ),
    UnsupportedFormat(
        "YOLOv4 or Keras TXT",
        ("_annotations.txt", "*.txt"),
        r"(?mi)^\S+\.(jpe?g|png|bmp|webp) \d+,\d+,\d+,\d+,\d+( |$)",
        "In Roboflow, export as YOLOv8 or COCO JSON",
    ),
)


def read_beginning(file: Path) -> str:
    """Return the beginning of a text file, whatever its encoding; empty if it cannot be read."""
    with suppress(OSError), file.open("rb") as opened:
        return opened.read(_NUM_BYTES).replace(b"\0", b"").decode("utf-8", errors="ignore").lstrip("\ufeff")
    return ""


def is_unsupported(file: Path) -> bool:
    """Return whether a file is in a format that is not read."""
    return any(any(map(file.match, format.files)) and format.matches(file) for format in UNSUPPORTED_FORMATS)


def refuse_unsupported(folder: Path) -> None:
    """Raise an error if a directory contains files in a format that is not read.

    Raises:
        InputError: If there is such a file.
    """
    found = dict(_find_unsupported(folder))
    if found:
        format, *others = found
        also = f". It also contains {', '.join(other.name for other in others)}" if others else ""
        raise InputError(
            f"{folder}: contains {format.name} ({found[format].relative_to(folder)}), which is not read{also}. "
            f"{format.advice}"
        )


def _find_unsupported(folder: Path) -> Iterator[tuple[UnsupportedFormat, Path]]:
    taken: set[Path] = set()
    for format in UNSUPPORTED_FORMATS:
        file = format.find(folder)
        if file and file not in taken:
            taken.add(file)
            yield format, file


def is_coco(file: Path) -> bool:
    """Return whether the beginning of a JSON file looks like COCO."""
    return _COCO.match(read_beginning(file)) is not None and not is_unsupported(file)


class LabelMeSplit(NamedTuple):
    """Files of a split.

    Attributes:
        folder (`Path`): The directory.
        files (`list[Path]`): LabelMe's files below it.
        all_files (`list[Path]`): Those of all splits, whose classes are numbered together.
    """

    folder: Path
    files: Sequence[Path]
    all_files: Sequence[Path] = ()


class LabelMeFile(NamedTuple):
    """Content of a LabelMe file.

    Attributes:
        image_name (`str`): Path of the image relative to the file, on the machine where it was written.
        size (`tuple[int, int]` or `None`): `(height, width)` in pixels, if given.
        names (`list[str]` of length `num_objects`): Class names.
        boxes (`np.ndarray` of shape `(num_objects, 4)`): x, y, width, height in pixels, NaN if invalid.
        warnings (`list[str]`): What was changed or left out.
    """

    image_name: str = ""
    size: tuple[int, int] | None = None
    names: Sequence[str] = ()
    boxes: np.ndarray = np.empty((0, 4))
    warnings: Sequence[str] = ()


def find_labelme(folder: Path) -> dict[str, LabelMeSplit]:
    """Find LabelMe's files, in directories of splits or without, unless there is a COCO file that was made of them."""
    if any(map(is_coco, folder.glob("*.json"))) or any(map(is_coco, folder.glob("annotations/*.json"))):
        return {}
    paths = split_folders(folder) or {"train": folder}
    files = {split: [*filter(_is_labelme, walk_files(path, {".json"}))] for split, path in paths.items()}
    all_files = [file for of_split in files.values() for file in of_split]
    below = [file.relative_to(path).parts[:-1] for split, path in paths.items() for file in files[split]]
    if any(part.lower() in SPLIT_ALIASES for parts in below for part in parts):
        return {}  # a dataset further below
    return {split: LabelMeSplit(path, files[split], all_files) for split, path in paths.items() if files[split]}


def _is_labelme(file: Path) -> bool:
    return _LABELME.search(read_beginning(file)) is not None


def read_labelme(splits: Mapping[str, LabelMeSplit], source: Path, options: ReadOptions) -> dict[str, DetectionSplit]:
    """Read the splits of [`find_labelme`].

    Classes are numbered from 1 in alphabetical order over all splits, as in Pascal VOC.
    """
    files = dict.fromkeys(file for split in splits.values() for file in split.all_files)
    contents = {file: _read_labelme_file(file, options.on_error) for file in files}
    names = sorted({name for content in contents.values() for name in content.names})
    if not names:
        raise InputError(f"{source}: no LabelMe file contains a rectangle or polygon with a label")
    return {
        name: _build_split(split, contents, names, AnnotatedImageBuilder(source, name, options.on_error))
        for name, split in splits.items()
    }


def _build_split(
    split: LabelMeSplit, contents: Mapping[Path, LabelMeFile], names: Sequence[str], builder: AnnotatedImageBuilder
) -> DetectionSplit:
    file_of_image: dict[Path, Path] = {}
    for folder in dict.fromkeys(file.parent for file in split.files):
        files = [file for file in split.files if file.parent == folder]
        found = find_image_files(
            [contents[file].image_name or f"{file.stem}.jpg" for file in files], folder, split.folder
        )
        file_of_image |= dict(zip(found.paths, files))
        builder.add_warnings(RENAMED_WARNING, found.renamed)
    if len(file_of_image) < len(split.files):
        builder.on_error(f"{builder.title}: several LabelMe files have the same image. Keep one of each")
    images = {*walk_files(split.folder, IMAGE_EXTENSIONS)}
    for path in sorted(images | file_of_image.keys()):
        content = contents[file_of_image[path]] if path in file_of_image else LabelMeFile()
        builder.add(path, content.size, content.boxes, [names.index(name) + 1 for name in content.names])
        for warning in content.warnings if path in file_of_image else [NO_FILE_WARNING]:
            builder.add_warning(warning, path)
    return builder.build(dict(enumerate(names, start=1)))


def _read_labelme_file(file: Path, on_error: ErrorHandler) -> LabelMeFile:
    try:
        content = json.loads(read_text(file))
        shapes = [dict(shape) for shape in content["shapes"]]
    except InputError as error:
        on_error(str(error))
        return LabelMeFile()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        on_error(f"{file}: cannot be read as a LabelMe file ({error})")
        return LabelMeFile()
    objects = list(_read_objects(shapes))
    kept = [(name, box) for name, box, _ in objects if name]
    return LabelMeFile(
        str(content.get("imagePath") or ""),
        to_size(content.get("imageHeight"), content.get("imageWidth")),
        [name for name, _ in kept],
        np.array([box for _, box in kept], dtype=np.float64).reshape(-1, 4),
        [warning for *_, warnings in objects for warning in warnings],
    )


def _read_objects(shapes: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, np.ndarray, list[str]]]:
    """Yield class, box and warnings of each object, the shapes of one label and group; without class if left out."""
    reader = import_extra("supervision.dataset.formats.labelme", "train", "reading LabelMe data")
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for index, shape in enumerate(shapes):
        group = shape.get("group_id")
        key = index if group is None else (str(shape.get("label")), str(group))
        groups.setdefault(key, []).append(shape)
    for group in groups.values():
        supported = [shape for shape in group if shape.get("shape_type") in reader.SUPPORTED_SHAPE_TYPES]
        warnings = ["shapes are neither rectangles nor polygons: left out"] * (len(group) - len(supported))
        label = supported[0].get("label") if supported else None
        name = str(label).strip() if isinstance(label, str | int) else ""
        warnings += ["objects have no class name: left out"] * bool(supported and not name)
        warnings += ["shapes belong to one group: joined to one object"] * (len(supported) - 1)
        warnings += [POLYGON_WARNING] * any(shape["shape_type"] == "polygon" for shape in supported)
        yield name, _enclose(supported, reader), warnings


def _enclose(shapes: Sequence[Mapping[str, Any]], reader: Any) -> np.ndarray:
    """Return the box around shapes as x, y, width, height, NaN if one is invalid."""
    with suppress(ValueError, TypeError, KeyError, IndexError):
        if any(isinstance(value, bool) for shape in shapes for point in shape["points"] for value in point):
            raise ValueError
        labels = {shape["label"]: 0 for shape in shapes}
        corners = reader.labelme_shapes_to_detections(list(shapes), labels, (1, 1), with_masks=False).xyxy
        return np.round(xyxy_to_xywh(corners.astype(np.float64)), 3)[0]
    return np.full(4, np.nan)
