"""Recognize formats of datasets that are not read, and name the way from each to one that is."""

import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from ...utils.errors import InputError


_NUM_BYTES = 65536  # of a file's beginning
_NUM_PROBED_FILES = 5  # of each pattern
_DEPTHS = ("", "*/", "*/*/")


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


_COCO_IN_SUPERVISION = "as_coco(images_directory_path=..., annotations_path=...)"

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
        "In CVAT, export as COCO 1.0, Pascal VOC 1.1 or Ultralytics YOLO Detection 1.0, with images",
    ),
    UnsupportedFormat(
        "LabelMe XML",
        ("*.xml",),
        r"(?s)<annotation>.*<pt>\s*<x>",
        "In CVAT, export as COCO 1.0, Pascal VOC 1.1 or Ultralytics YOLO Detection 1.0, with images",
    ),
    UnsupportedFormat(
        "LabelMe",
        ("*.json",),
        r'"shapes"\s*:\s*\[|"imagePath"\s*:\s*"',
        f"Convert it with labelme2coco, or with supervision.DetectionDataset.from_labelme(...).{_COCO_IN_SUPERVISION}",
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
        "In Roboflow, export as COCO JSON; otherwise convert it with "
        f"supervision.DetectionDataset.from_createml(...).{_COCO_IN_SUPERVISION}",
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
