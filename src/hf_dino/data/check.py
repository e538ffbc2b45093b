"""Validate a dataset before training. Read-only."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..configuration_dino_detr import DinoDetrConfig
from ..detectors import num_selected
from ..model_card import COCO_MAX_DETECTIONS
from ..utils.errors import BrokenInputError, InputError, summarize_list
from ..utils.names import match_names, normalize_name, similar_names
from .dataset import AnnotatedImage, DetectionSplit, to_annotation_array, xyxy_to_xywh
from .images import ImageSource, get_image_size, short_path
from .split import digest, find_similar, thumbnail


# COCO's object sizes: exclusive upper limits of the area in square pixels
SIZES = {"small": 32.0**2, "medium": 96.0**2, "large": np.inf}

TRAINING_LIMITS = ("num_queries", "num_denoising")
EVALUATION_LIMITS = ("num_queries", "num_select", "max_detections")
"""Limits of [`object_limits`] that matter for the images of the train split, and for those of the others."""

_EFFECTS_OF_LIMITS = {
    "num_queries": "a model of {limit} queries cannot detect them all, one that is trained with --config_overrides "
    "num_queries={most} can",
    "num_denoising": "a step takes {limit} of them at random for denoising, with --config_overrides "
    "num_denoising={most} all",
    "num_select": "an evaluation keeps {limit} detections of an image, with --max_detections {most} more",
    "max_detections": "an evaluation counts {limit} detections of a class in an image, with --max_detections {most} "
    "more",
}

_OPEN_FORMATS = ("", "COCO", "datasets")
"""Display names of the formats in which files may have boxes of any kind; "" is a COCO file."""

_CORNERS = "x0, y0, x1, y1"
_OTHER_READINGS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    _CORNERS: xyxy_to_xywh,
    "center x, center y, width, height": lambda boxes: np.hstack([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, 2:]]),
    "y, x, height, width": lambda boxes: boxes[:, [1, 0, 3, 2]],
}
"""Boxes that tools write instead of x, y, width, height, and how to convert them."""

# Shares of the boxes, since some are always odd. In real datasets, 0.7 to 0.8 of corners and about 0.2 of centers
# extend far beyond the image if they are read as x, y, width, height, and none do if they are that.
_INSIDE, _BEYOND, _SUSPICIOUS = 0.7, 0.25, 0.1
_MARGIN = 0.05  # of a side of the image; boxes that extend further beyond it were not drawn there
_MIN_BOXES = 20  # for a statistic
_NUM_ERRORS_RAISED = 2  # on a line each, below the first


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
            BrokenInputError: If there are errors.
        """
        if self.errors:
            num_more = len(self.errors) - _NUM_ERRORS_RAISED
            more = f" ... and {num_more} more, which `hf-dino data check` lists" if num_more > 0 else ""
            raise BrokenInputError("\n".join(["the dataset has errors:", *self.errors[:_NUM_ERRORS_RAISED]]) + more)


def check_data(
    splits: Mapping[str, DetectionSplit],
    *,
    decode: bool = True,
    num_workers: int | None = None,
    limits: Mapping[str, int] | None = None,
    on_image: Callable[[], object] = lambda: None,
) -> DataReport:
    """Check every image and box of a dataset.

    Args:
        splits (`Mapping[str, DetectionSplit]`): From [`read_data`], with keys `"train"`, `"validation"` and `"test"`.
        decode (`bool`, *optional*, defaults to `True`): Decode every image. If false, only its header is read, which
            is several times faster and finds missing files and wrong sizes, but not truncated images.
        num_workers (`int`, *optional*): Number of threads; by default one per processor.
        limits (`Mapping[str, int]`, *optional*): From [`object_limits`]; by default those of a new model. There is a
            warning about images with more objects.
        on_image (`Callable`, *optional*): Called after each image, from any thread.

    Returns:
        `DataReport`: Errors, warnings and counts.
    """
    limits = object_limits(DinoDetrConfig) if limits is None else limits
    counts = {split: _count(data) for split, data in splits.items()}
    images = [(split, image) for split, data in splits.items() for image in data.images]
    with ThreadPoolExecutor(num_workers or os.cpu_count()) as pool:
        checks = list(pool.map(partial(_check_image, decode=decode, on_image=on_image), images))
        about_images = [*_duplicate_images(checks, pool), *_similar_images(checks)]
    about_boxes = [(level, f"{split}: {text}") for split, data in splits.items() for level, text in _check_boxes(data)]
    warnings = [
        *(warning for split, data in splits.items() for warning in _corrected_boxes(split, data)),
        *(text for level, text in about_boxes if level == "warning"),
        *(warning for split, data in splits.items() for warning in dense_images(split, data, limits)),
        *_missing_objects_and_classes(counts),
        *_similar_classes(counts),
        *about_images,
    ]
    errors = [
        *(f"{check.split}: {check.error}" for check in checks if check.error),
        *(text for level, text in about_boxes if level == "error"),
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
    for check, content in zip(suspects, pool.map(digest, [check.path for check in suspects])):
        groups[content].append(check)
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


def _check_boxes(data: DetectionSplit) -> Iterator[tuple[str, str]]:
    """Yield "error" or "warning", and what suggests that the boxes are not x, y, width, height in pixels."""
    num_boxes = [len(image.boxes) for image in data.images]
    boxes = np.concatenate([np.empty((0, 4)), *(image.boxes for image in data.images)])
    sizes = np.array([(image.width, image.height) for image in data.images]).reshape(-1, 2)
    sizes = np.repeat(sizes, num_boxes, axis=0)
    fractions = np.asarray((boxes <= 1).all(axis=1))
    if _share(fractions) > 0.5:
        yield (
            "error",
            f"{_count_of(fractions)} boxes are in the first pixel of their image. Boxes seem to be fractions, but "
            "must be in pixels",
        )
    else:
        yield from _check_sizes(data, boxes, sizes, np.repeat(np.arange(len(num_boxes)), num_boxes))
        if data.format in _OPEN_FORMATS and data.box_format == "xywh":
            yield from _check_reading(boxes, sizes)
    yield from _check_dropped(data, len(boxes))


def _check_sizes(
    data: DetectionSplit, boxes: np.ndarray, sizes: np.ndarray, images: np.ndarray
) -> Iterator[tuple[str, str]]:
    """Detect boxes of sizes that objects hardly have, in images of these sizes and indices."""
    tiny, ends = boxes[:, 2:].prod(axis=1) < 1, boxes[:, :2] + boxes[:, 2:]
    if tiny.any():
        names = dict.fromkeys(short_path(data.images[index].path) for index in images[tiny])
        yield "warning", f"{_count_of(tiny)} boxes cover less than a pixel; {summarize_list(names, 3)}"
    if len(boxes) < _MIN_BOXES:
        return
    covers_all = np.asarray(((boxes[:, :2] < 1) & (ends > sizes - 1)).all(axis=1))
    if _share(covers_all) > 0.5:
        yield "warning", f"{_count_of(covers_all)} boxes cover the entire image"
    percent = np.asarray(((boxes <= 100) & np.tile(sizes > 200, 2)).all(axis=1))
    if _share(percent) > 1 - _SUSPICIOUS:
        yield (
            "warning",
            f"{_count_of(percent)} boxes are in the first 100 pixels of larger images: are they in percent?",
        )


def _share(mask: np.ndarray) -> float:
    return float(mask.mean()) if len(mask) else 0.0


def _count_of(mask: np.ndarray) -> str:
    return f"{np.count_nonzero(mask):,} of {len(mask):,}"


def _is_inside(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return which boxes (x, y, width, height) have an area and are, up to a pixel, inside of (width, height)."""
    starts, sides = boxes[:, :2], boxes[:, 2:]
    return ((sides > 0) & (starts >= -1) & (starts + sides <= sizes + 1)).all(axis=1)


def _check_reading(boxes: np.ndarray, sizes: np.ndarray) -> Iterator[tuple[str, str]]:
    """Detect boxes that extend far beyond their image, but would not in another format.

    Corners in the upper left quarter of an image do not. But the last two numbers follow the first two, while a width
    does not become larger with the distance from the left border.
    """
    starts, ends = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    beyond = ((starts < -_MARGIN * sizes) | (ends > (1 + _MARGIN) * sizes)).any(axis=1)
    inside = {name: _is_inside(convert(boxes), sizes) for name, convert in _OTHER_READINGS.items()}
    corners = inside[_CORNERS]
    first, last = np.split((boxes / np.hstack([sizes, sizes]))[corners], 2, axis=1)
    follows = len(first) >= _MIN_BOXES and bool(((last - first).std(axis=0) < 0.8 * first.std(axis=0)).all())
    may_be_corners, is_usual = _share(corners) >= _INSIDE, np.count_nonzero(beyond) < 2
    if may_be_corners and not is_usual and _share(beyond) > (0.02 if follows else _BEYOND):
        yield (
            "error",
            f"boxes seem to be {_CORNERS}, but must be x, y, width, height: read so, {_count_of(beyond)} extend "
            f"beyond their image, and {_count_of(corners)} are inside as corners. Read them with --box_format xyxy",
        )
    elif may_be_corners and follows:
        yield (
            "warning",
            f"boxes may be {_CORNERS}: as such, {_count_of(corners)} are inside their image and of similar sizes. "
            "Look at them with --preview; --box_format xyxy reads corners",
        )
    elif not is_usual and _share(beyond) > _SUSPICIOUS:
        reading = max(inside, key=lambda name: np.count_nonzero(inside[name]))
        fits = _share(inside[reading]) > 1 - _SUSPICIOUS
        hint = (
            f"{_count_of(inside[reading])} would not as {reading}" if fits else "are they of images of another size?"
        )
        yield "warning", f"{_count_of(beyond)} boxes extend far beyond their image: {hint}"


def _check_dropped(data: DetectionSplit, num_kept: int) -> Iterator[tuple[str, str]]:
    """Detect boxes of which so many had to be dropped that they may have been read in the wrong format."""
    num_dropped = sum(len(paths) for warning, paths in data.warnings.items() if warning.endswith("dropped"))
    share = num_dropped / max(1, num_dropped + num_kept)
    if num_dropped > 1 and share > _BEYOND:
        is_error = data.box_format == "xyxy" and share > 0.5
        hint = "Leave out --box_format xyxy" if data.box_format == "xyxy" else "They may be in another format"
        yield (
            "error" if is_error else "warning",
            f"{num_dropped:,} of {num_dropped + num_kept:,} boxes cannot be used as {data.box_format}. {hint}",
        )


def object_limits(config: Any, max_detections: int = COCO_MAX_DETECTIONS) -> dict[str, int]:
    """Return the numbers of objects in an image beyond which a model misses some, or an evaluation counts fewer.

    Args:
        config ([`DinoDetrConfig`]): The model's configuration.
        max_detections (`int`, *optional*): Detections per image and class that are evaluated; by default COCO's.

    Returns:
        `dict[str, int]`: `num_queries`, `num_select`, `num_denoising` if that is a limit, and `max_detections`. The
        last one is for objects of one class, and `num_select` is at least as large if it is not COCO's.
    """
    has_denoising = getattr(config, "denoising", "none") != "none"
    names = ("num_queries", *(["num_denoising"] if has_denoising else []))
    limits = {name: getattr(config, name) for name in names if hasattr(config, name)}
    limits["num_select"] = num_selected(config)
    if max_detections > COCO_MAX_DETECTIONS:
        limits["num_select"] = max(limits["num_select"], max_detections)
    return {**limits, "max_detections": max_detections}


def dense_images(split: str, data: DetectionSplit, limits: Mapping[str, int], title: str = "") -> Iterator[str]:
    """Warn about images with more objects than a model or an evaluation takes.

    Args:
        split (`str`): Name of the split; `"train"` is trained on, others are evaluated on.
        data (`DetectionSplit`): Its images. Crowd regions do not count.
        limits (`Mapping[str, int]`): From [`object_limits`].
        title (`str`, *optional*): Begins each warning; by default the name of the split.
    """
    names = TRAINING_LIMITS if split == "train" else EVALUATION_LIMITS
    for name in filter(limits.__contains__, names):
        limit, is_per_class = limits[name], name == "max_detections"
        large = (image for image in data.images if len(image.boxes) > limit)
        counts = [(count, image) for image in large if (count := _num_objects(image, is_per_class)) > limit]
        if counts:
            most = max(count for count, _ in counts)
            yield (
                f"{title or split}: {len(counts):,} of {len(data.images):,} images have more than {limit} objects"
                f"{' of a class' if is_per_class else ''}, up to {most}: "
                f"{_EFFECTS_OF_LIMITS[name].format(limit=limit, most=most)}; "
                f"{summarize_list((short_path(image.path) for _, image in counts), 3)}"
            )


def _num_objects(image: AnnotatedImage, is_per_class: bool) -> int:
    """Return the number of objects in an image, or the largest number of a class."""
    category_ids = image.category_ids[image.iscrowd == 0]
    return int(np.unique(category_ids, return_counts=True)[1].max(initial=0)) if is_per_class else len(category_ids)


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
        yield from _compare_classes(split, each, train)


def _compare_classes(split: str, counts: SplitCounts, train: SplitCounts) -> Iterator[str]:
    """Find classes of a split that are none of train, or several that are the same one."""
    matched = _match_classes(counts, train)
    if unknown := [repr(name) for name, count in counts.classes.items() if count and name not in matched]:
        yield (
            f"{split}: has objects of classes that train does not have: {summarize_list(unknown)}. The classes of "
            f"train are {summarize_list(map(repr, train.classes), 20)}"
        )
    names_of = defaultdict(list)
    for name, of_train in matched.items():
        names_of[of_train].append(repr(name))
    for of_train, names in names_of.items():
        if len(names) > 1:
            yield f"{split}: {' and '.join(names)} are all the class {of_train!r} of train. Give it one name"


def _match_classes(each: SplitCounts, train: SplitCounts) -> dict[str, str]:
    """Return the name that a class has in the train split, for every class that it has, as training matches them."""
    of_train = dict(enumerate(train.classes))
    labels = match_names({name: name for name in each.classes}, of_train)
    return {name: of_train[label] for name, label in labels.items()}


def _similar_classes(counts: Mapping[str, SplitCounts]) -> Iterator[str]:
    """Find names that may be meant to be the same, and those that are taken to be."""
    splits_with: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for split, each in counts.items():
        for names in similar_names(each.classes):
            splits_with[tuple(names)].append(split)
    for group, splits in splits_with.items():
        yield (
            f"{' and '.join(splits)}: the names {', '.join(map(repr, group))} are the same words, but different "
            "classes. If they are one class, give it one name"
        )
    for split, each in counts.items():
        matched = _match_classes(each, counts["train"]) if "train" in counts else {}
        if renamed := [f"{name!r} is {of_train!r}" for name, of_train in matched.items() if name != of_train]:
            yield f"{split}: classes are those of train with the same words: {summarize_list(renamed)}"


def _missing_objects_and_classes(counts: Mapping[str, SplitCounts]) -> Iterator[str]:
    for split, each in counts.items():
        if each.num_empty_images:
            yield f"{split}: {each.num_empty_images} of {each.num_images} images have no objects"
        if empty := [repr(name) for name, count in each.classes.items() if not count]:
            yield f"{split}: {len(empty)} of {len(each.classes)} classes have no objects: {summarize_list(empty)}"
    words = [set(map(normalize_name, each.classes)) for each in counts.values()]
    common = set.intersection(*words) if words else set()
    for split, each in counts.items():
        if own := [repr(name) for name in each.classes if normalize_name(name) not in common]:
            yield f"{split}: has classes that another split does not have: {summarize_list(own)}"
