"""Say what is wrong with a dataset before it costs a night, and change nothing."""

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
from .dataset import AnnotatedImage, DetectionSplit
from .images import ImageSource, get_image_size, short_name
from .objects import to_annotation_array


# COCO's sizes of objects: areas in square pixels, each below its limit and not below the one before
SIZES = {"small": 32.0**2, "medium": 96.0**2, "large": np.inf}
_MANY_OVER_BORDER = 0.25  # of the boxes, which hardly happens to boxes of the right format


@dataclass(frozen=True)
class SplitCounts:
    """What a split holds.

    Attributes:
        images (`int`): Of all kinds.
        without_objects (`int`): Images without a box, or with crowds only.
        crowds (`int`): Boxes of crowds, which no other number includes.
        classes (`dict[str, int]`): Objects of each class, 0 for one that is listed only.
        sizes (`dict[str, int]`): Objects of each of COCO's sizes, `SIZES`.
    """

    images: int
    without_objects: int
    crowds: int
    classes: dict[str, int]
    sizes: dict[str, int]

    @property
    def objects(self) -> int:
        """Of all classes."""
        return sum(self.classes.values())


@dataclass(frozen=True)
class DataReport:
    """What [`check_data`] found.

    Attributes:
        errors (`list[str]`): What would stop a training, or make it learn nothing.
        warnings (`list[str]`): What is put right, and what one may want to know.
        counts (`dict[str, SplitCounts]`): By split.
    """

    errors: list[str]
    warnings: list[str]
    counts: dict[str, SplitCounts]

    def raise_if_errors(self) -> None:
        """Stop.

        Raises:
            InputError: If there are errors. The message says the first few.
        """
        if self.errors:
            more = f"\n… and {len(self.errors) - 5} more" if len(self.errors) > 5 else ""
            raise InputError("the data cannot be used:\n" + "\n".join(self.errors[:5]) + more)


def check_data(
    splits: Mapping[str, DetectionSplit],
    *,
    decode: bool = True,
    num_workers: int | None = None,
    on_image: Callable[[], object] = lambda: None,
) -> DataReport:
    """Look at every image and box of a dataset.

    Args:
        splits (`Mapping[str, DetectionSplit]`): From [`read_data`], with keys `"train"`, `"validation"` and `"test"`.
        decode (`bool`, *optional*, defaults to `True`): Read every image to its last pixel. Otherwise only the head
            of each file is read, which is several times faster and finds missing files and wrong sizes, but not
            images that were cut short.
        num_workers (`int`, *optional*): Threads; by default one for each processor.
        on_image (`Callable`, *optional*): Called after each image, from any thread.

    Returns:
        `DataReport`: Errors, warnings and counts.
    """
    counts = {split: _count(data) for split, data in splits.items()}
    with ThreadPoolExecutor(num_workers or os.cpu_count()) as pool:
        inspected = list(_inspect_all(splits, pool, partial(_inspect, decode=decode, on_image=on_image)))
        warnings = [
            *(warning for split, data in splits.items() for warning in _about_boxes(split, data)),
            *_about_counts(counts),
            *_about_doubles(inspected, pool),
        ]
    errors = [
        *(f"{each.split}: {each.problem}" for each in inspected if each.problem),
        *(error for split, data in splits.items() for error in _misread_boxes(split, data)),
        *_unknown_classes(counts),
    ]
    return DataReport(errors, warnings, counts)


class Inspected(NamedTuple):
    """What was seen of an image.

    Attributes:
        split (`str`): That it is in.
        path (`Path` or `ImageFileLike`): Where it is.
        problem (`str` or `None`): Why it cannot be used.
        length (`int`): Of its file in bytes; -1 where it cannot be used.
    """

    split: str
    path: ImageSource
    problem: str | None
    length: int


def _inspect_all(
    splits: Mapping[str, DetectionSplit],
    pool: ThreadPoolExecutor,
    inspect: Callable[[tuple[str, AnnotatedImage]], Inspected],
) -> Iterator[Inspected]:
    return pool.map(inspect, [(split, image) for split, data in splits.items() for image in data.images])


def _inspect(entry: tuple[str, AnnotatedImage], decode: bool, on_image: Callable[[], object]) -> Inspected:
    split, image = entry
    try:
        if decode:
            image.read()
        else:
            get_image_size(image.path, (image.height, image.width))
        with image.path.open("rb") as file:
            return Inspected(split, image.path, None, file.seek(0, os.SEEK_END))
    except InputError as error:
        return Inspected(split, image.path, str(error), -1)
    finally:
        on_image()


def _about_doubles(inspected: Sequence[Inspected], pool: ThreadPoolExecutor) -> Iterator[str]:
    """Images that are there twice, byte by byte. Only those of equal length are read for that."""
    lengths = Counter(each.length for each in inspected)
    suspects = [each for each in inspected if lengths[each.length] > 1 and each.problem is None]
    groups: dict[bytes, list[Inspected]] = defaultdict(list)
    for each, digest in zip(suspects, pool.map(_digest, [each.path for each in suspects])):
        groups[digest].append(each)
    kinds: dict[str, list[str]] = defaultdict(list)
    for group in groups.values():
        if len(group) > 1:
            where = sorted({each.split for each in group})
            kind = f"in both {' and '.join(where)}" if len(where) > 1 else f"more than once in {where[0]}"
            kinds[kind].append(" = ".join(short_name(each.path) for each in group[:2]))
    for kind, names in sorted(kinds.items()):
        yield f"{len(names)} images are {kind}: {summarize_list(names, 3)}"


def _digest(path: ImageSource) -> bytes:
    with path.open("rb") as file:
        return hashlib.blake2b(file.read(), digest_size=16).digest()


def _about_boxes(split: str, data: DetectionSplit) -> Iterator[str]:
    for what, images in data.remarks.items():
        yield f"{split}: {len(images)} {what}; {summarize_list(dict.fromkeys(map(short_name, images)), 3)}"
    doubled = {short_name(image.path): count for image in data.images if (count := _num_doubled(image))}
    if doubled:
        yield f"{split}: {sum(doubled.values())} boxes are there twice, of the same class; {summarize_list(doubled, 3)}"


def _num_doubled(image: AnnotatedImage) -> int:
    objects = list(zip(image.category_ids.tolist(), map(tuple, image.boxes.tolist())))
    return len(objects) - len(set(objects))


def _misread_boxes(split: str, data: DetectionSplit) -> Iterator[str]:
    """Boxes that are written in another way than x, y, width, height in pixels."""
    boxes = to_annotation_array(data)["bbox"]
    if len(boxes) and boxes.max() <= 1:
        yield f"{split}: no box is larger than a pixel; they seem to be fractions, but must be in pixels"
    over_border = sum(
        np.count_nonzero(np.abs(image.boxes - image.clipped_boxes).max(axis=1, initial=0) >= 1)
        for image in data.images
    )
    if over_border > _MANY_OVER_BORDER * len(boxes) and (boxes[:, 2:] > boxes[:, :2]).all():
        yield (
            f"{split}: boxes seem to be x0, y0, x1, y1, but must be x, y, width, height: as they are, {over_border} "
            f"of {len(boxes)} reach over the border of their image"
        )


def _count(data: DetectionSplit) -> SplitCounts:
    everything = to_annotation_array(data)
    objects = everything[everything["iscrowd"] == 0]
    of_category = Counter(objects["category_id"].tolist())
    size = np.searchsorted([*SIZES.values()], objects["area"], side="right")
    return SplitCounts(
        images=len(data.images),
        without_objects=sum(bool(image.iscrowd.all()) for image in data.images),
        crowds=len(everything) - len(objects),
        classes={name: of_category[number] for number, name in data.categories.items()},
        sizes={name: int((size == number).sum()) for number, name in enumerate(SIZES)},
    )


def _unknown_classes(counts: Mapping[str, SplitCounts]) -> Iterator[str]:
    train = counts.get("train")
    if train is None:
        return
    if not train.objects:
        yield "train: has no object to learn from"
    if "validation" in counts and not counts["validation"].objects:
        yield "validation: has no object, so that no model could be told from a better one"
    for split, each in counts.items():
        unknown = [name for name, count in each.classes.items() if count and name not in train.classes]
        if unknown:
            yield (
                f"{split}: has objects of classes that train does not list: {summarize_list(map(repr, unknown))}; train's are "
                f"{summarize_list(map(repr, train.classes), 20)}"
            )


def _about_counts(counts: Mapping[str, SplitCounts]) -> Iterator[str]:
    for split, each in counts.items():
        if each.without_objects:
            yield f"{split}: {each.without_objects} of {each.images} images have no objects"
        unused = [name for name, count in each.classes.items() if not count]
        if unused:
            yield f"{split}: {len(unused)} of {len(each.classes)} classes have no objects: {summarize_list(map(repr, unused))}"
    everywhere = set.intersection(*(set(each.classes) for each in counts.values())) if counts else set()
    for split, each in counts.items():
        own = [name for name in each.classes if name not in everywhere]
        if own:
            yield f"{split}: lists classes that another split does not list: {summarize_list(map(repr, own))}"
