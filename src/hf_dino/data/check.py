"""Validate a dataset before training. Read-only."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from ..utils.errors import InputError, summarize_list
from .dataset import AnnotatedImage, DetectionSplit, to_annotation_array
from .images import ImageSource, get_image_size, short_path
from .split import find_similar, thumbnail


# COCO's object sizes: exclusive upper limits of the area in square pixels
SIZES = {"small": 32.0**2, "medium": 96.0**2, "large": np.inf}
_MAX_SHARE_BEYOND_IMAGE = 0.25  # of the boxes; more suggests that they are in another format
_NUM_ERRORS_RAISED = 5


@dataclass(frozen=True)
class SplitCounts:
    """Contents of a split in numbers.

    Attributes:
        num_images (`int`): Images, with and without objects.
        num_empty_images (`int`): Images without objects, or with iscrowd annotations only.
        num_crowds (`int`): iscrowd annotations, which are included in no other number.
        classes (`dict[str, int]`): Objects of each class, 0 for a class without objects.
        sizes (`dict[str, int]`): Objects of each of COCO's sizes, `SIZES`.
    """

    num_images: int
    num_empty_images: int
    num_crowds: int
    classes: dict[str, int]
    sizes: dict[str, int]

    @property
    def num_objects(self) -> int:
        """Objects of all classes."""
        return sum(self.classes.values())


@dataclass(frozen=True)
class DataReport:
    """Result of [`check_data`].

    Attributes:
        errors (`list[str]`): What would stop training or make it useless.
        warnings (`list[str]`): What is corrected while reading, or worth knowing.
        counts (`dict[str, SplitCounts]`): By split.
    """

    errors: list[str]
    warnings: list[str]
    counts: dict[str, SplitCounts]

    def raise_if_errors(self) -> None:
        """Raise the first few errors.

        Raises:
            InputError: If there are errors.
        """
        if self.errors:
            num_more = len(self.errors) - _NUM_ERRORS_RAISED
            more = f"\n... and {num_more} more" if num_more > 0 else ""
            raise InputError("the dataset has errors:\n" + "\n".join(self.errors[:_NUM_ERRORS_RAISED]) + more)


def check_data(
    splits: Mapping[str, DetectionSplit],
    *,
    decode: bool = True,
    num_workers: int | None = None,
    on_image: Callable[[], object] = lambda: None,
) -> DataReport:
    """Check every image and box of a dataset.

    Args:
        splits (`Mapping[str, DetectionSplit]`): From [`read_data`], with keys `"train"`, `"validation"` and `"test"`.
        decode (`bool`, *optional*, defaults to `True`): Decode every image. If false, only its header is read, which
            is several times faster and finds missing files and wrong sizes, but not truncated images.
        num_workers (`int`, *optional*): Number of threads; by default one per processor.
        on_image (`Callable`, *optional*): Called after each image, from any thread.

    Returns:
        `DataReport`: Errors, warnings and counts.
    """
    counts = {split: _count(data) for split, data in splits.items()}
    images = [(split, image) for split, data in splits.items() for image in data.images]
    with ThreadPoolExecutor(num_workers or os.cpu_count()) as pool:
        checks = list(pool.map(partial(_check_image, decode=decode, on_image=on_image), images))
        warnings = [
            *(warning for split, data in splits.items() for warning in _corrected_boxes(split, data)),
            *_missing_objects_and_classes(counts),
            *_duplicate_images(checks, pool),
            *_similar_images(checks),
        ]
    errors = [
        *(f"{check.split}: {check.error}" for check in checks if check.error),
        *(error for split, data in splits.items() for error in _check_box_format(split, data)),
        *_check_classes(counts),
    ]
    return DataReport(errors, warnings, counts)


class ImageCheck(NamedTuple):
    """Result of checking an image.

    Attributes:
        split (`str`): The split that contains it.
        path (`Path` or `ImageFileLike`): The image.
        error (`str` or `None`): Why it cannot be used.
        file_size (`int`): In bytes; -1 if it cannot be used.
        thumbnail (`bytes`): From [`thumbnail`] if the image was decoded, else empty.
    """

    split: str
    path: ImageSource
    error: str | None
    file_size: int
    thumbnail: bytes = b""


def _check_image(entry: tuple[str, AnnotatedImage], decode: bool, on_image: Callable[[], object]) -> ImageCheck:
    split, image = entry
    try:
        if not decode:
            get_image_size(image.path, (image.height, image.width))
        small = thumbnail(image.read()) if decode else b""
        with image.path.open("rb") as file:
            return ImageCheck(split, image.path, None, file.seek(0, os.SEEK_END), small)
    except InputError as error:
        return ImageCheck(split, image.path, str(error), -1)
    finally:
        on_image()


def _duplicate_images(checks: Sequence[ImageCheck], pool: ThreadPoolExecutor) -> Iterator[str]:
    """Find files with the same content. Only files of the same size are read for that."""
    num_of_size = Counter(check.file_size for check in checks)
    suspects = [check for check in checks if num_of_size[check.file_size] > 1 and check.error is None]
    groups: dict[bytes, list[ImageCheck]] = defaultdict(list)
    for check, digest in zip(suspects, pool.map(_digest, [check.path for check in suspects])):
        groups[digest].append(check)
    pairs: dict[str, list[str]] = defaultdict(list)
    for group in groups.values():
        if len(group) > 1:
            splits = sorted({check.split for check in group})
            where = f"in both {' and '.join(splits)}" if len(splits) > 1 else f"duplicated in {splits[0]}"
            pairs[where].append(" = ".join(short_path(check.path) for check in group[:2]))
    for where, names in sorted(pairs.items()):
        yield f"{len(names)} images are {where}: {summarize_list(names, 3)}"


def _similar_images(checks: Sequence[ImageCheck]) -> Iterator[str]:
    """Find images of other splits that look like one of train, if they were decoded."""
    by_split: dict[str, list[ImageCheck]] = defaultdict(list)
    for check in checks:
        if check.thumbnail:
            by_split[check.split].append(check)
    train = by_split.pop("train", [])
    for split, images in by_split.items():
        similar = find_similar([check.thumbnail for check in images], [check.thumbnail for check in train])
        pairs = [f"{short_path(images[index].path)} = {short_path(train[of].path)}" for index, of in similar.items()]
        if pairs:
            yield f"{split}: {len(pairs)} images look like images of train: {summarize_list(pairs, 3)}"


def _digest(path: ImageSource) -> bytes:
    with path.open("rb") as file:
        return hashlib.blake2b(file.read(), digest_size=16).digest()


def _corrected_boxes(split: str, data: DetectionSplit) -> Iterator[str]:
    for warning, paths in data.warnings.items():
        yield f"{split}: {len(paths)} {warning}; {summarize_list(dict.fromkeys(map(short_path, paths)), 3)}"
    duplicates = {short_path(image.path): count for image in data.images if (count := _num_duplicate_boxes(image))}
    if duplicates:
        count = sum(duplicates.values())
        yield f"{split}: {count} boxes are duplicates with the same class; {summarize_list(duplicates, 3)}"


def _num_duplicate_boxes(image: AnnotatedImage) -> int:
    objects = list(zip(image.category_ids.tolist(), map(tuple, image.boxes.tolist())))
    return len(objects) - len(set(objects))


def _check_box_format(split: str, data: DetectionSplit) -> Iterator[str]:
    """Detect boxes that are not x, y, width, height in pixels."""
    boxes = to_annotation_array(data)["bbox"]
    if len(boxes) and boxes.max() <= 1:
        yield f"{split}: no box is larger than a pixel. Boxes seem to be fractions, but must be in pixels"
    num_beyond = sum(
        np.count_nonzero(np.abs(image.boxes - image.clipped_boxes).max(axis=1, initial=0) >= 1)
        for image in data.images
    )
    if num_beyond > _MAX_SHARE_BEYOND_IMAGE * len(boxes) and (boxes[:, 2:] > boxes[:, :2]).all():
        yield (
            f"{split}: boxes seem to be x0, y0, x1, y1, but must be x, y, width, height: read so, {num_beyond} of "
            f"{len(boxes)} extend beyond their image"
        )


def _count(data: DetectionSplit) -> SplitCounts:
    annotations = to_annotation_array(data)
    objects = annotations[annotations["iscrowd"] == 0]
    num_of_category = Counter(objects["category_id"].tolist())
    size_index = np.searchsorted([*SIZES.values()], objects["area"], side="right")
    return SplitCounts(
        num_images=len(data.images),
        num_empty_images=sum(bool(image.iscrowd.all()) for image in data.images),
        num_crowds=len(annotations) - len(objects),
        classes={name: num_of_category[category_id] for category_id, name in data.categories.items()},
        sizes={name: int((size_index == index).sum()) for index, name in enumerate(SIZES)},
    )


def _check_classes(counts: Mapping[str, SplitCounts]) -> Iterator[str]:
    if "train" not in counts:
        return
    train = counts["train"]
    if not train.num_objects:
        yield "train: has no objects to train on"
    if "validation" in counts and not counts["validation"].num_objects:
        yield "validation: has no objects, so models cannot be compared on it"
    for split, each in counts.items():
        if unknown := [repr(name) for name, count in each.classes.items() if count and name not in train.classes]:
            yield (
                f"{split}: has objects of classes that train does not have: {summarize_list(unknown)}. The classes of "
                f"train are {summarize_list(map(repr, train.classes), 20)}"
            )


def _missing_objects_and_classes(counts: Mapping[str, SplitCounts]) -> Iterator[str]:
    for split, each in counts.items():
        if each.num_empty_images:
            yield f"{split}: {each.num_empty_images} of {each.num_images} images have no objects"
        if empty := [repr(name) for name, count in each.classes.items() if not count]:
            yield f"{split}: {len(empty)} of {len(each.classes)} classes have no objects: {summarize_list(empty)}"
    common = set.intersection(*(set(each.classes) for each in counts.values())) if counts else set()
    for split, each in counts.items():
        if own := [repr(name) for name in each.classes if name not in common]:
            yield f"{split}: has classes that another split does not have: {summarize_list(own)}"
