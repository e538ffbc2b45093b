"""Write a dataset in another format: the images copied byte for byte, the annotations written by supervision.

Boxes only: masks and key points are not even read.

| format | layout | error of a box's edge | does not hold |
|---|---|---|---|
| COCO | `train.json`, `train/` | none | numbers of objects |
| YOLO | `data.yaml`, `images/train/`, `labels/train/` | 7.5e-6 of the side: 0.015 pixels of 2000 | crowds, areas |
| Pascal VOC | `train/JPEGImages/`, `train/Annotations/` | half a pixel | crowds, areas, classes without objects |

The other splits are `val` and `test`. Classes keep their order; in COCO their numbers and those of the images too,
while YOLO numbers classes from 0 and Pascal VOC has nothing but their names, at the objects.
"""

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..utils.errors import InputError, summarize_list
from ..utils.io import atomic_directory
from .boxes import xywh_to_xyxy
from .dataset import AnnotatedImage, DetectionSplit
from .extras import import_extra
from .formats import read_data
from .hub import TableImage
from .images import IMAGE_EXTENSIONS, ImageSource, get_image_size
from .objects import to_annotation_array


# what the files and folders of each split are called, which is what other tools look for
_WORDS = {"train": "train", "validation": "val", "test": "test"}


class Target(NamedTuple):
    """A format to write.

    Attributes:
        images (`str`): Where the folder of a split's images is, as a template.
        write (`Callable`): Writes the annotations of data, which it gets by the words of their splits, with
            supervision's datasets made of them.
        holds_crowds (`bool`): And areas.
        holds_sizes (`bool`): Of images, which tell whether boxes were drawn before the EXIF rotation or after it.
        holds_unused_classes (`bool`): Rather than names at objects alone.
    """

    images: str
    write: Callable[[Mapping[str, tuple[DetectionSplit, Any]], Path], None]
    holds_crowds: bool
    holds_sizes: bool
    holds_unused_classes: bool


def convert_data(
    splits: Mapping[str, DetectionSplit],
    output: str | Path,
    form: str,
    *,
    on_image: Callable[[], object] = lambda: None,
) -> list[str]:
    """Write a dataset in another format, in a layout that [`read_data`] tells by looking.

    Images keep their names, except that the later of two which differ only in folder or suffix gets its number at
    the end, and that unknown suffixes become those of the image's kind. Every split lists the classes of all.

    Args:
        splits (`Mapping[str, DetectionSplit]`): From [`read_data`], with keys `"train"`, `"validation"` and `"test"`.
        output (`str` or `Path`): The folder, new or empty. Nothing is there before everything is.
        form (`str`): `"coco"`, `"voc"` or `"yolo"`.
        on_image (`Callable`, *optional*): Called twice for each image: after its head was read, and after it was
            copied.

    Returns:
        `list[str]`: What reading had to say, and what the format does not hold, with counts, for people.

    Raises:
        InputError: If the folder holds something already, an image cannot be read or has another size than
            annotated, or there is nothing that the format can hold.
        ImportError: If supervision is not installed.
    """
    if form not in TARGETS:
        raise InputError(f"there is no format called {form!r} to write; choose of {summarize_list(TARGETS)}")
    target = TARGETS[form]
    with atomic_directory(Path(output)) as folder:
        held = {split: _held(data, target, on_image) for split, data in splits.items()}
        filled = {split: data for split, data in held.items() if data.images}
        if not filled:
            raise InputError("there are no images to write")
        if not target.holds_unused_classes and not any(len(to_annotation_array(data)) for data in filled.values()):
            raise InputError(
                "there are no objects, at which alone the format names its classes; choose another format"
            )
        _write(filled, target, folder, on_image)
        found = read_data(folder)  # tells what rounding loses, and that all is told by looking before it has its name
    differences = {split: _differences(splits[split], data, found[split]) for split, data in filled.items()}
    return [f"{split}: no images: left out" for split in splits if split not in filled] + [
        f"{split}: {count} {what}" for split, counts in differences.items() for what, count in counts.items() if count
    ]


def _held(data: DetectionSplit, target: Target, on_image: Callable[[], object]) -> DetectionSplit:
    """The part of the data that the format can hold. Looks at every image, before anything is written."""
    images = []
    for image in data.images:
        if not _lies_as_stored(image) or target.holds_sizes:
            images.append(image)
        on_image()
    return replace(data, images=images if target.holds_crowds else [_without_crowds(each) for each in images])


def _lies_as_stored(image: AnnotatedImage) -> bool:
    """Whether the boxes were drawn on the pixels as stored, which EXIF data would have turned.

    Raises:
        InputError: If it cannot be read, or is of neither size.
    """
    size = (image.height, image.width)
    return get_image_size(image.path, size) == size != get_image_size(image.path)


def _without_crowds(image: AnnotatedImage) -> AnnotatedImage:
    kept = image.iscrowd == 0
    fields = ("boxes", "category_ids", "areas", "iscrowd")
    return replace(image, **{name: getattr(image, name)[kept] for name in fields})


def _write(splits: Mapping[str, DetectionSplit], target: Target, folder: Path, on_image: Callable[[], object]) -> None:
    classes = list(dict.fromkeys(name for data in splits.values() for name in data.categories.values()))
    written = {}
    for split, data in splits.items():
        place = folder / target.images.format(_WORDS[split])
        place.mkdir(parents=True)
        paths = [place / name for name in _file_names(data.images)]
        for image, path in zip(data.images, paths):
            with image.path.open("rb") as source, path.open("xb") as copy:
                shutil.copyfileobj(source, copy)
            on_image()
        written[_WORDS[split]] = data, _supervision_data(data, paths, classes)
    target.write(written, folder)


def _file_names(images: Sequence[AnnotatedImage]) -> list[str]:
    """Names that differ before the suffix, since label files are named so, and whatever the case."""
    taken: set[str] = set()
    names = []
    for number, image in enumerate(images, start=1):
        stem = Path(_given_name(image.path)).stem or f"{number:08}"
        while stem.casefold() in taken:
            stem = f"{stem}-{number}"
        taken.add(stem.casefold())
        names.append(f"{stem}{_suffix(image.path)}")
    return names


def _given_name(source: ImageSource) -> str:
    """The name of an image's file, without folders; nothing where it has none."""
    stored = source.table[source.row][source.column]["path"] if isinstance(source, TableImage) else source
    return Path(stored).name if isinstance(stored, str | Path) else ""


def _suffix(source: ImageSource) -> str:
    """That of the name, if readers of folders would take it for an image's, otherwise that of its kind."""
    given = Path(_given_name(source)).suffix
    if given.lower() in IMAGE_EXTENSIONS:
        return given
    with source.open("rb") as file, Image.open(file) as image:
        kind = str(image.format)
    suffix = ".jpg" if kind == "MPO" else f".{kind.lower()}"  # MPO is a JPEG with more images behind it
    if suffix not in IMAGE_EXTENSIONS:
        raise InputError(f"{source}: is of the kind {kind}, which is not looked for in folders; save it as PNG")
    return suffix


def _supervision_data(data: DetectionSplit, paths: Sequence[Path], classes: Sequence[str]) -> Any:
    """Return supervision's `DetectionDataset` of images that lie at `paths`."""
    supervision = import_extra("supervision", "train", "converting data")
    images = {str(path): image for path, image in zip(paths, data.images)}
    base: Any = supervision.DetectionDataset

    class SizedDataset(base):
        """Gives supervision no pixels: it would decode every image, to know only its size."""

        def __getitem__(self, index: int) -> tuple[str, np.ndarray, Any]:
            path = self.image_paths[index]
            size = (images[path].height, images[path].width)
            return path, np.broadcast_to(np.uint8(0), (*size, 3)), self.annotations[path]

    numbers = {category_id: classes.index(name) for category_id, name in data.categories.items()}
    detections = {path: _detections(supervision, image, numbers) for path, image in images.items()}
    return SizedDataset(list(classes), list(detections), detections)


def _detections(supervision: Any, image: AnnotatedImage, numbers: Mapping[int, int]) -> Any:
    return supervision.Detections(
        xyxy=xywh_to_xyxy(image.boxes),
        class_id=np.array([numbers[category_id] for category_id in image.category_ids.tolist()], dtype=np.int64),
        data={"area": image.areas, "iscrowd": image.iscrowd},  # which its COCO writer looks for
    )


def _write_coco(splits: Mapping[str, tuple[DetectionSplit, Any]], folder: Path) -> None:
    category_ids = {name: number for data, _ in splits.values() for number, name in data.categories.items()}
    image_ids = [image.image_id for data, _ in splits.values() for image in data.images]
    if not _are_distinct(category_ids.values()):
        category_ids = {name: number for number, name in enumerate(category_ids, start=1)}
    if not _are_distinct(image_ids):
        image_ids = list(range(1, len(image_ids) + 1))
    next_image_id = iter(image_ids)
    annotation_id = 1
    for word, (data, made) in splits.items():
        file = folder / f"{word}.json"
        _, annotation_id = made.as_coco(annotations_path=str(file), starting_annotation_id=annotation_id)
        _correct_coco(file, data.images, list(islice(next_image_id, len(data.images))), category_ids)


def _are_distinct(numbers: Collection[int]) -> bool:
    """Over all splits, which may number alike what differs."""
    return len(set(numbers)) == len(numbers)


def _correct_coco(
    file: Path, images: Sequence[AnnotatedImage], image_ids: Sequence[int], category_ids: Mapping[str, int]
) -> None:
    """Put in numbers and sizes, where supervision counts, and looks after EXIF rotation; take out what it made up.

    That is a license, CC BY 4.0, and the present as the time when each image was taken.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    del content["licenses"]
    image_id_of = {image["id"]: image_id for image, image_id in zip(content["images"], image_ids)}
    category_id_of = {category["id"]: category_ids[category["name"]] for category in content["categories"]}
    for image, record in zip(content["images"], images):
        del image["license"], image["date_captured"]
        image |= {"id": image_id_of[image["id"]], "height": record.height, "width": record.width}
    for category in content["categories"]:
        category["id"] = category_id_of[category["id"]]
    for each in content["annotations"]:
        each |= {"image_id": image_id_of[each["image_id"]], "category_id": category_id_of[each["category_id"]]}
    file.write_text(json.dumps(content), encoding="utf-8")


def _write_voc(splits: Mapping[str, tuple[DetectionSplit, Any]], folder: Path) -> None:
    for word, (_, data) in splits.items():
        data.as_pascal_voc(annotations_directory_path=str(folder / word / "Annotations"))


def _write_yolo(splits: Mapping[str, tuple[DetectionSplit, Any]], folder: Path) -> None:
    description = folder / "data.yaml"
    for word, (_, data) in splits.items():
        data.as_yolo(annotations_directory_path=str(folder / "labels" / word), data_yaml_path=str(description))
    with description.open("a", encoding="utf-8") as file:  # supervision writes the classes alone
        file.writelines(f"{word}: images/{word}\n" for word in splits)


TARGETS = {
    "coco": Target("{}", _write_coco, holds_crowds=True, holds_sizes=True, holds_unused_classes=True),
    "voc": Target("{}/JPEGImages", _write_voc, holds_crowds=False, holds_sizes=True, holds_unused_classes=False),
    "yolo": Target("images/{}", _write_yolo, holds_crowds=False, holds_sizes=False, holds_unused_classes=True),
}


def _differences(data: DetectionSplit, held: DetectionSplit, found: DetectionSplit) -> dict[str, int]:
    """Count what is otherwise than in the source. `found` is what was read again of what was written of `held`."""
    names = zip(_file_names(held.images), (_given_name(image.path) for image in held.images))
    numbers = {name: category_id for category_id, name in found.categories.items()}
    renumbered = {
        name for category_id, name in held.categories.items() if numbers.get(name, category_id) != category_id
    }
    unused = set(held.categories.values()) - numbers.keys()
    objects, objects_held, objects_found = map(to_annotation_array, (data, held, found))
    counts = {
        "images whose boxes ignore their EXIF rotation, which the format cannot say: left out": (
            len(data.images) - len(held.images)
        ),
        "crowd regions, which the format does not have: left out": int(
            objects["iscrowd"].sum() - objects_held["iscrowd"].sum()
        ),
        "boxes are so small that rounding makes them vanish: lost": len(objects_held) - len(objects_found),
        "objects had the area of a mask: now that of their box": _masked(objects_held) - _masked(objects_found),
        "images have a new name, since it was missing, taken or without a known suffix": sum(
            name != given for name, given in names
        ),
        "classes have no objects, without which the format does not have them: left out": len(unused),
        "classes have another number": len(renumbered),
    }
    return {what: len(where) for what, where in data.remarks.items()} | counts


def _masked(objects: np.ndarray) -> int:
    """Count the areas that are not those of the boxes, but for rounding."""
    close = np.isclose(objects["area"], objects["bbox"][:, 2:].prod(axis=1), rtol=0.01)
    return len(close) - int(close.sum())
