"""Convert a dataset to another format: images are copied byte for byte, annotations are written by supervision.

Only boxes are converted; masks and keypoints are not read.

| format | layout | maximum error of a box's edge | not supported |
|---|---|---|---|
| COCO | `train.json`, `train/` | none | |
| YOLO | `data.yaml`, `images/train/`, `labels/train/` | 7.5e-6 of the side: 0.015 pixels of 2000 | iscrowd, areas |
| Pascal VOC | `train/JPEGImages/`, `train/Annotations/` | half a pixel | iscrowd, areas, classes without objects |

The other splits are called `val` and `test`. Classes keep their order. COCO also keeps their ids and those of images,
if they are unique over all splits; YOLO numbers classes from 0, and Pascal VOC has only names.
"""

import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..utils.errors import InputError, import_extra, summarize_list
from ..utils.io import atomic_directory
from .dataset import AnnotatedImage, DetectionSplit, to_annotation_array, xywh_to_xyxy
from .images import IMAGE_EXTENSIONS, ImageSource, get_image_size, short_path
from .readers import read_data
from .readers.voc import VOC_SOURCE


SPLIT_DIRS = {"train": "train", "validation": "val", "test": "test"}
"""Names that other tools expect for the files and directories of each split."""

SplitData = tuple[DetectionSplit, Any]  # a split, and a supervision dataset of it


class FormatWriter(NamedTuple):
    """A format to write.

    Attributes:
        images (`str`): Template for the directory of a split's images.
        write (`Callable`): Writes the annotations of all splits, given by the names in `SPLIT_DIRS`.
        supports_crowds (`bool`): Whether it has iscrowd annotations and areas.
        supports_sizes (`bool`): Whether it has image sizes, which show whether boxes refer to the image with or
            without its EXIF orientation.
        supports_unused_classes (`bool`): Whether it has a list of classes, apart from the objects.
    """

    images: str
    write: Callable[[Mapping[str, SplitData], Path], None]
    supports_crowds: bool
    supports_sizes: bool
    supports_unused_classes: bool


def convert_data(
    splits: Mapping[str, DetectionSplit],
    output: str | Path,
    format: str,
    *,
    on_image: Callable[[], object] = lambda: None,
) -> list[str]:
    """Write a dataset in another format, in a layout that [`read_data`] detects automatically.

    Images keep their names. If two differ only in directory or extension, the second gets its number as a suffix. An
    unknown extension is replaced by that of the image's format. Every split lists the classes of all splits.

    Args:
        splits (`Mapping[str, DetectionSplit]`): From [`read_data`], with keys `"train"`, `"validation"` and `"test"`.
        output (`str` or `Path`): The directory, which must not exist or be empty. It appears when it is complete.
        format (`str`): `"coco"`, `"voc"` or `"yolo"`.
        on_image (`Callable`, *optional*): Called twice per image: after reading its header, and after copying it.

    Returns:
        `list[str]`: Warnings with counts: corrections by the reader, and what the format does not support.

    Raises:
        InputError: If the directory is not empty, an image cannot be read or is not of the annotated size, or nothing
            is left that the format supports.
        ImportError: If supervision is not installed.
    """
    if format not in WRITERS:
        raise InputError(f"cannot write the format {format!r}. Choose from {summarize_list(WRITERS)}")
    writer = WRITERS[format]
    with atomic_directory(Path(output)) as folder:
        supported = {split: _select_supported(data, writer, on_image) for split, data in splits.items()}
        supported = {split: data for split, data in supported.items() if data.images}
        if not supported:
            raise InputError("there are no images to write")
        if not writer.supports_unused_classes and not any(len(to_annotation_array(d)) for d in supported.values()):
            raise InputError(
                "Pascal VOC stores class names only with objects, and this dataset has none. Choose coco or yolo"
            )
        _write(supported, writer, folder, on_image)
        written = read_data(folder)  # shows what rounding removes, and that the format is detected
    return [f"{split}: no images: left out" for split in splits if split not in supported] + [
        f"{split}: {count} {warning}"
        for split, data in supported.items()
        for warning, count in _count_differences(splits[split], data, written[split]).items()
        if count
    ]


def _select_supported(data: DetectionSplit, writer: FormatWriter, on_image: Callable[[], object]) -> DetectionSplit:
    """Return the part of a split that the format supports, after reading the header of every image."""
    images = []
    for image in data.images:
        if not _ignores_exif_orientation(image) or writer.supports_sizes:
            images.append(image)
        on_image()
    return replace(data, images=images if writer.supports_crowds else [_without_crowds(image) for image in images])


def _ignores_exif_orientation(image: AnnotatedImage) -> bool:
    """Return whether the boxes refer to the image without applying its EXIF orientation.

    Raises:
        InputError: If the image cannot be read, or has another size with and without it.
    """
    size = (image.height, image.width)
    return get_image_size(image.path, size) == size != get_image_size(image.path)


def _without_crowds(image: AnnotatedImage) -> AnnotatedImage:
    kept = image.iscrowd == 0
    fields = ("boxes", "category_ids", "areas", "iscrowd")
    return replace(image, **{name: getattr(image, name)[kept] for name in fields})


def _write(
    splits: Mapping[str, DetectionSplit], writer: FormatWriter, folder: Path, on_image: Callable[[], object]
) -> None:
    classes = list(dict.fromkeys(name for data in splits.values() for name in data.categories.values()))
    written = {}
    for split, data in splits.items():
        image_folder = folder / writer.images.format(SPLIT_DIRS[split])
        image_folder.mkdir(parents=True)
        paths = [image_folder / name for name in _unique_file_names(data.images)]
        for image, path in zip(data.images, paths):
            with image.path.open("rb") as source, path.open("xb") as copy:
                shutil.copyfileobj(source, copy)
            on_image()
        written[SPLIT_DIRS[split]] = data, _to_supervision(data, paths, classes)
    writer.write(written, folder)


def _unique_file_names(images: Sequence[AnnotatedImage]) -> list[str]:
    """Return names that differ before the extension, since label files share only that part, even ignoring case."""
    taken: set[str] = set()
    names = []
    for number, image in enumerate(images, start=1):
        stem = Path(_file_name(image.path)).stem or f"{number:08}"
        while stem.casefold() in taken:
            stem = f"{stem}-{number}"
        taken.add(stem.casefold())
        names.append(f"{stem}{_extension(image.path)}")
    return names


def _file_name(source: ImageSource) -> str:
    """Return the file name of an image, empty if it has none."""
    return source.name if isinstance(source, Path) else Path(getattr(source, "file_name", None) or "").name


def _extension(source: ImageSource) -> str:
    """Return the extension of the file name if it is that of an image, else one for the image's format."""
    extension = Path(_file_name(source)).suffix
    if extension.lower() in IMAGE_EXTENSIONS:
        return extension
    with source.open("rb") as file, Image.open(file) as image:
        image_format = str(image.format)
    extension = ".jpg" if image_format == "MPO" else f".{image_format.lower()}"  # MPO: a JPEG with further images
    others = [each for each, format in Image.registered_extensions().items() if format == image_format]
    extension = next((each for each in (extension, *others) if each in IMAGE_EXTENSIONS), "")
    if not extension:
        raise InputError(f"{source}: {image_format} images are not found in directories. Save it as PNG")
    return extension


def _to_supervision(data: DetectionSplit, paths: Sequence[Path], classes: Sequence[str]) -> Any:
    """Return a supervision `DetectionDataset` of the images at `paths`."""
    supervision = import_extra("supervision", "train", "converting data")
    images = {str(path): image for path, image in zip(paths, data.images)}
    base: Any = supervision.DetectionDataset

    class SizedDataset(base):
        """A dataset of blank images. Supervision would decode every image only to know its size."""

        def __getitem__(self, index: int) -> tuple[str, np.ndarray, Any]:
            path = self.image_paths[index]
            size = (images[path].height, images[path].width)
            return path, np.broadcast_to(np.uint8(0), (*size, 3)), self.annotations[path]

    class_ids = {category_id: classes.index(name) for category_id, name in data.categories.items()}
    detections = {
        path: supervision.Detections(
            xyxy=xywh_to_xyxy(image.boxes),
            class_id=np.array([class_ids[category_id] for category_id in image.category_ids.tolist()], dtype=np.int64),
            data={"area": image.areas, "iscrowd": image.iscrowd},  # used by its COCO writer
        )
        for path, image in images.items()
    }
    return SizedDataset(list(classes), list(detections), detections)


def _write_coco(splits: Mapping[str, SplitData], folder: Path) -> None:
    category_ids = {name: id_ for data, _ in splits.values() for id_, name in data.categories.items()}
    image_ids = [image.image_id for data, _ in splits.values() for image in data.images]
    if not _are_unique(category_ids.values()):
        category_ids = {name: id_ for id_, name in enumerate(category_ids, start=1)}
    if not _are_unique(image_ids):
        image_ids = list(range(1, len(image_ids) + 1))
    remaining_ids = iter(image_ids)
    annotation_id = 1
    for name, (data, dataset) in splits.items():
        file = folder / f"{name}.json"
        _, annotation_id = dataset.as_coco(annotations_path=str(file), starting_annotation_id=annotation_id)
        _correct_coco(file, data.images, list(islice(remaining_ids, len(data.images))), category_ids)


def _are_unique(ids: Collection[int]) -> bool:
    return len(set(ids)) == len(ids)


def _correct_coco(
    file: Path, records: Sequence[AnnotatedImage], image_ids: Sequence[int], category_ids: Mapping[str, int]
) -> None:
    """Restore original ids and image sizes, which supervision renumbers and reads again.

    Also remove its placeholders: a CC BY 4.0 license, and the current time as the date of each image.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    del content["licenses"]
    new_image_id = {image["id"]: image_id for image, image_id in zip(content["images"], image_ids)}
    new_category_id = {category["id"]: category_ids[category["name"]] for category in content["categories"]}
    for image, record in zip(content["images"], records):
        del image["license"], image["date_captured"]
        image |= {"id": new_image_id[image["id"]], "height": record.height, "width": record.width}
    for category in content["categories"]:
        category["id"] = new_category_id[category["id"]]
    for each in content["annotations"]:
        each |= {"image_id": new_image_id[each["image_id"]], "category_id": new_category_id[each["category_id"]]}
    file.write_text(json.dumps(content), encoding="utf-8")


def _write_voc(splits: Mapping[str, SplitData], folder: Path) -> None:
    for name, (_, dataset) in splits.items():
        dataset.as_pascal_voc(annotations_directory_path=str(folder / name / "Annotations"))
    for file in folder.rglob("*.xml"):  # supervision names Roboflow as the source
        text = file.read_text(encoding="utf-8")
        file.write_text(re.sub("(?<=<database>).*?(?=</database>)", VOC_SOURCE, text, count=1), encoding="utf-8")


def _write_yolo(splits: Mapping[str, SplitData], folder: Path) -> None:
    yaml_file = folder / "data.yaml"
    for name, (_, dataset) in splits.items():
        dataset.as_yolo(annotations_directory_path=str(folder / "labels" / name), data_yaml_path=str(yaml_file))
    with yaml_file.open("a", encoding="utf-8") as file:  # supervision writes only the classes
        file.writelines(f"{name}: images/{name}\n" for name in splits)


WRITERS = {
    "coco": FormatWriter("{}", _write_coco, supports_crowds=True, supports_sizes=True, supports_unused_classes=True),
    "voc": FormatWriter(
        "{}/JPEGImages",
        _write_voc,
        supports_crowds=False,
        supports_sizes=True,
        supports_unused_classes=False,
    ),
    "yolo": FormatWriter(
        "images/{}", _write_yolo, supports_crowds=False, supports_sizes=False, supports_unused_classes=True
    ),
}


def _count_differences(data: DetectionSplit, supported: DetectionSplit, written: DetectionSplit) -> dict[str, int]:
    """Count what differs between a split, the part of it that the format supports, and the files read back."""
    new_ids = {name: category_id for category_id, name in written.categories.items()}
    renumbered = {name for id_, name in supported.categories.items() if new_ids.get(name, id_) != id_}
    unused = set(supported.categories.values()) - new_ids.keys()
    renamed = [
        name
        for name, image in zip(_unique_file_names(supported.images), supported.images)
        if name != _file_name(image.path)
    ]
    before, selected, after = map(to_annotation_array, (data, supported, written))
    corrected = {_with_examples(warning, paths): len(paths) for warning, paths in data.warnings.items()}
    return corrected | {
        "images are annotated without their EXIF orientation, which the format cannot express: left out": (
            len(data.images) - len(supported.images)
        ),
        "iscrowd annotations, which the format does not support: left out": int(
            before["iscrowd"].sum() - selected["iscrowd"].sum()
        ),
        "boxes are too small for the format's precision: lost": len(selected) - len(after),
        "objects had the area of a mask: replaced by that of the box": (
            _num_mask_areas(selected) - _num_mask_areas(after)
        ),
        "images were renamed, because the name was missing, taken or without a known extension": len(renamed),
        "classes have no objects and cannot be listed in the format: left out": len(unused),
        "classes have another id": len(renumbered),
    }


def _with_examples(warning: str, paths: Sequence[str]) -> str:
    return f"{warning}; {summarize_list(dict.fromkeys(map(short_path, paths)), 3)}"


def _num_mask_areas(annotations: np.ndarray) -> int:
    """Count the areas that differ from those of the boxes by more than rounding."""
    is_box_area = np.isclose(annotations["area"], annotations["bbox"][:, 2:].prod(axis=1), rtol=0.01)
    return len(is_box_area) - int(is_box_area.sum())
