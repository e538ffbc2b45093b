"""Divide a dataset into train, validation and test: classes in equal shares, near-duplicates together.

Exports of annotation tools have one part. Frames of a video or shots of a burst look alike: divided at random, a model
would be validated on images that it was trained on.
"""

import hashlib
import os
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

from ..utils.errors import InputError, summarize_list
from .dataset import SPLITS, AnnotatedImage, DetectionSplit
from .images import ImageSource
from .readers.common import DEFAULT_OPTIONS, ReadOptions


# The two images of a pair are near-duplicates from this similarity on. Of 100 images of COCO and 150 of blood cells,
# distinct pairs have at most 0.58; an image and itself cropped by 2% have 0.93 to 0.97 in the median.
SIMILARITY = 0.9
_STRICTER = (0.95, 0.98, 0.995, np.inf)  # tried in turn if most images are alike, as those of a fixed camera are
_MAX_SHARE_OF_GROUP = 0.5

_CELLS = 8  # along each side of an image
_SAMPLES = 4  # pixels read along each side of a cell
_MIN_CONTRAST = 1.0  # gray levels between neighboring cells; flatter images look like nothing
_MAX_BLOCK = 2**22  # similarities computed at once


class DataParts(NamedTuple):
    """Result of [`split_data`].

    Attributes:
        splits (`dict[str, DetectionSplit]`): By split; each image is in exactly one.
        near_duplicates (`list[list[AnnotatedImage]]`): Groups of images that look alike, each kept in one split.
        warnings (`list[str]`): What could not be done as asked.
    """

    splits: dict[str, DetectionSplit]
    near_duplicates: list[list[AnnotatedImage]]
    warnings: list[str]


def split_data(
    splits: Mapping[str, DetectionSplit],
    *,
    validation: float = 0.2,
    test: float = 0.0,
    seed: int = 0,
    merge: bool = False,
    similarity: float = SIMILARITY,
    num_workers: int | None = None,
    on_image: Callable[[], object] = lambda: None,
) -> DataParts:
    """Divide the train split of a dataset, or its only one, so that each class has about the same share in every part.

    The result depends on `seed` and on the contents of the images, not on their names or order. Every class is in
    train. Images without objects are divided as if they were those of a class.

    Args:
        splits (`Mapping[str, DetectionSplit]`): From [`read_data`].
        validation (`float`, *optional*, defaults to 0.2): Share of the images; 0 keeps a validation split that exists.
        test (`float`, *optional*, defaults to 0.0): Likewise for test.
        seed (`int`, *optional*, defaults to 0): Seed of the choice, at least 0.
        merge (`bool`, *optional*, defaults to `False`): Divide the images of a split that exists again, together with
            those of train. By default, this is an error.
        similarity (`float`, *optional*, defaults to 0.9): Images that are at least so similar are near-duplicates,
            which are kept in one part; from 0 to 1. Raised with a warning if most images are.
        num_workers (`int`, *optional*): Number of threads; by default one per processor.
        on_image (`Callable`, *optional*): Called after each image that is read, from any thread.

    Returns:
        `DataParts`: The splits, and the near-duplicates.

    Raises:
        InputError: If the shares are impossible, a split exists, an image cannot be read, or a part gets no objects.
    """
    shares = _part_shares(validation, test)
    selected = _select_splits(splits, shares, merge)
    kept = {split: data for split, data in splits.items() if split not in selected}
    pool, warnings = _merge(list(selected.values()))
    with ThreadPoolExecutor(num_workers or os.cpu_count()) as executor:
        seen = list(executor.map(partial(_look_at, on_image=on_image), pool.images))
    groups, group_warnings = _group_images(seen, similarity)
    part_of_group = _assign(_count_classes(pool, groups), shares, _group_keys(seen, groups, seed))
    parts = _take_parts(pool, shares, part_of_group[groups])
    _require_objects(parts, groups.max() + 1)
    made = parts | kept
    members = [np.flatnonzero(groups == group) for group in np.flatnonzero(np.bincount(groups) > 1)]
    return DataParts(
        {split: made[split] for split in SPLITS if split in made},
        [[pool.images[index] for index in group] for group in members],
        [*warnings, *_repeated_ids(splits), *group_warnings, *_rare_classes(parts, pool)],
    )


def missing_split_message(source: str, splits: Collection[str], options: ReadOptions) -> str:
    """Return the sentence about the splits that training needs and a dataset lacks; empty if it has them.

    Args:
        source (`str`): The dataset, as given to [`read_data`].
        splits (`Collection[str]`): The splits that it has.
        options (`ReadOptions`): With which it was read.
    """
    missing = [split for split in ("train", "validation") if split not in splits]
    merge = ["--merge"] * ("train" in missing and len(splits) > 1)
    command = ["hf-dino", "data", "split", source, *_reader_words(options), *merge]
    make = shlex.join([*command, "--output_dir", _suggest_output(source)])
    return f"{' and '.join(missing)} split not found; make one with: {make}" if missing else ""


def _reader_words(options: ReadOptions) -> list[str]:
    """Return the options of a command that reads a dataset in the same way."""
    words = []
    for name in ("box_format", "rotated_boxes"):
        if getattr(options, name) != getattr(DEFAULT_OPTIONS, name):
            words += [f"--{name}", getattr(options, name)]
    columns = [f"{content}={name}" for content, name in options.columns.items()]
    return [*words, "--columns", *columns] if columns else words


def _suggest_output(source: str) -> str:
    """Return the name of a directory next to a dataset, or for one on the Hub in the working directory."""
    path = Path(source)
    if not path.exists():
        return f"{re.split('[:@]', path.name)[0]}-split"
    folder = dataset_directory(path)
    return f"{folder.resolve() if folder.name in ('', '..') else folder}-split"


def dataset_directory(path: Path) -> Path:
    """Return the directory of a dataset that is given by it or by a file of it, as in a directory `annotations`."""
    folder = path.parent if path.is_file() else path
    return folder.parent if path.is_file() and folder.name == "annotations" else folder


def _part_shares(validation: float, test: float) -> dict[str, float]:
    """Return the share of each part that is made, of train first."""
    if not (min(validation, test) >= 0 and 0 < validation + test < 1):
        raise InputError(
            f"--val and --test are shares of the images, together more than 0 and less than 1; got {validation} and "
            f"{test}"
        )
    shares = {"train": 1 - validation - test, "validation": validation, "test": test}
    return {split: share for split, share in shares.items() if share > 0}


def _select_splits(
    splits: Mapping[str, DetectionSplit], made: Collection[str], merge: bool
) -> dict[str, DetectionSplit]:
    """Return the splits whose images are divided: train and, to be merged with it, those that are to be made."""
    if len(splits) == 1:
        return dict(splits)
    selected = {split: data for split, data in splits.items() if split in made}
    if existing := [split for split in selected if split != "train" and not merge]:
        keep = " ".join({"validation": "--val 0", "test": "--test 0"}[split] for split in existing)
        raise InputError(
            f"{selected[existing[0]].name}: has a {' and a '.join(existing)} split. Keep it with {keep} and make "
            "another one, or add --merge to divide its images again, together with those of train"
        )
    if not selected:
        raise InputError(f"train split not found; the dataset has {summarize_list(splits) or 'no splits'}")
    return selected


def _merge(splits: Sequence[DetectionSplit]) -> tuple[DetectionSplit, list[str]]:
    """Return one split with the images of all, and warnings. Classes of the same name are the same."""
    ids: dict[str, int] = {}
    warnings: dict[str, list[str]] = defaultdict(list)
    for data in splits:
        ids = {name: id_ for id_, name in data.categories.items()} | ids
        for warning, paths in data.warnings.items():
            warnings[warning] += paths
    if len(set(ids.values())) < len(ids):
        ids = {name: id_ for id_, name in enumerate(ids, start=1)}
    renumbered = {name for data in splits for id_, name in data.categories.items() if ids[name] != id_}
    images = [image for data in splits for image in _with_ids(data, ids)]
    categories = dict(sorted((id_, name) for name, id_ in ids.items()))
    notes = [f"{len(renumbered)} classes have another id, since those of the splits differ"] * bool(renumbered)
    return replace(splits[0], images=images, categories=categories, warnings=dict(warnings)), notes


def _with_ids(data: DetectionSplit, ids: Mapping[str, int]) -> list[AnnotatedImage]:
    return [
        replace(
            image, category_ids=np.array([ids[data.categories[id_]] for id_ in image.category_ids], dtype=np.int64)
        )
        for image in data.images
    ]


def _repeated_ids(splits: Mapping[str, DetectionSplit]) -> list[str]:
    """Warn if images of a format with ids cannot keep them."""
    ids = [image.image_id for data in splits.values() if data.format in ("COCO", "datasets") for image in data.images]
    num_repeated = len(ids) - len(set(ids))
    return [f"image ids are not kept, since {num_repeated} occur in several splits"] * bool(num_repeated)


class _Seen(NamedTuple):
    """Contents of an image: a thumbnail as [`thumbnail`] returns it, and a digest of the file."""

    thumbnail: bytes
    digest: bytes


def _look_at(image: AnnotatedImage, on_image: Callable[[], object]) -> _Seen:
    seen = _Seen(thumbnail(image.read()), digest(image.path))
    on_image()
    return seen


def digest(source: ImageSource) -> bytes:
    """Return a hash of an encoded image."""
    with source.open("rb") as file:
        return hashlib.blake2b(file.read(), digest_size=16).digest()


def thumbnail(image: Image.Image) -> bytes:
    """Return the gray values of 9 x 9 cells of an image, in a hundredth of the time that decoding it takes."""
    side = (_CELLS + 1) * _SAMPLES
    return image.resize((side, side), Image.Resampling.NEAREST).convert("L").reduce(_SAMPLES).tobytes()


def compare_thumbnails(thumbnails: Sequence[bytes]) -> np.ndarray:
    """Return unit vectors whose products are the similarities of images, -1 to 1: correlations of their gradients.

    Gradients tell two scenes apart better than gray values, which are brighter at the top of most images, and moved or
    compressed images better from others than the signs of gradients do, which are the bits of a difference hash.

    Args:
        thumbnails (`Sequence[bytes]`): From [`thumbnail`].

    Returns:
        `np.ndarray` of shape `(num_images, 128)`: Zeros for an image without contrast, which is similar to none.
    """
    gray = np.frombuffer(b"".join(thumbnails), np.uint8).reshape(-1, _CELLS + 1, _CELLS + 1).astype(np.float32)
    corner = gray[:, :-1, :-1]
    gradients = np.stack([gray[:, :-1, 1:] - corner, gray[:, 1:, :-1] - corner], axis=1)
    gradients = gradients.reshape(len(gray), 2 * _CELLS**2)
    norms = np.linalg.norm(gradients, axis=1, keepdims=True)
    has_contrast = norms >= _MIN_CONTRAST * gradients.shape[1] ** 0.5
    return np.divide(gradients, norms, out=np.zeros_like(gradients), where=has_contrast)


def find_similar(thumbnails: Sequence[bytes], others: Sequence[bytes]) -> dict[int, int]:
    """Return the indices of the thumbnails that look like one of the others, and the index of the most similar one."""
    looks, other_looks = compare_thumbnails(thumbnails), compare_thumbnails(others)
    found = {}
    num_rows = max(1, _MAX_BLOCK // max(1, len(others)))
    for start in range(0, len(looks) if len(others) else 0, num_rows):
        similarities = looks[start : start + num_rows] @ other_looks.T
        for row in np.flatnonzero(similarities.max(axis=1) >= SIMILARITY):
            found[start + int(row)] = int(similarities[row].argmax())
    return found


def _group_images(seen: Sequence[_Seen], similarity: float) -> tuple[np.ndarray, list[str]]:
    """Return the number of each image's group of near-duplicates, and a warning if their similarity was raised."""
    looks = compare_thumbnails([each.thumbnail for each in seen])
    equal = np.unique([each.digest for each in seen], return_inverse=True)[1]
    for limit in (similarity, *(stricter for stricter in _STRICTER if stricter > similarity)):
        groups = _connect(looks, equal, limit)
        if np.bincount(groups).max() <= _MAX_SHARE_OF_GROUP * len(seen):
            break
    which = "only equal files" if limit > 1 else f"only those with a similarity of {limit}"
    return groups, [f"most images look alike: {which} are kept together"] * (limit != similarity)


def _connect(looks: np.ndarray, groups: np.ndarray, similarity: float) -> np.ndarray:
    """Join groups of images that contain similar ones."""
    num_images = len(looks)
    num_rows = max(1, _MAX_BLOCK // num_images)
    for start in range(0, num_images, num_rows):
        first, second = np.nonzero(looks[start : start + num_rows] @ looks.T >= similarity)
        # a node for each image and one for each group, to which its images are connected
        rows, columns = np.append(first + start, np.arange(num_images)), np.append(second, num_images + groups)
        graph = coo_array((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(2 * num_images, 2 * num_images))
        groups = np.unique(connected_components(graph, directed=False)[1][:num_images], return_inverse=True)[1]
    return groups


def _group_keys(seen: Sequence[_Seen], groups: np.ndarray, seed: int) -> np.ndarray:
    """Return a random number for each group, from the contents of its images."""
    salt = seed.to_bytes(16, "little")
    numbers = [
        int.from_bytes(hashlib.blake2b(each.digest, digest_size=8, salt=salt).digest(), "little") for each in seen
    ]
    keys = np.full(groups.max() + 1, np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(keys, groups, np.array(numbers, dtype=np.uint64))
    return keys


def _count_classes(pool: DetectionSplit, groups: np.ndarray) -> csr_array:
    """Count the images of each group with each class; in the last two columns, those without objects, and all."""
    columns = {id_: column for column, id_ in enumerate(pool.categories)}
    empty, total = len(columns), len(columns) + 1
    pairs = [
        (group, column)
        for group, image in zip(groups.tolist(), pool.images)
        for column in (*([columns[id_] for id_ in _classes_in(image)] or [empty]), total)
    ]
    return csr_array((np.ones(len(pairs)), tuple(zip(*pairs))), shape=(groups.max() + 1, total + 1))


def _classes_in(image: AnnotatedImage) -> list[int]:
    return np.unique(image.category_ids[image.iscrowd == 0]).tolist()


def _assign(counts: csr_array, shares: Mapping[str, float], keys: np.ndarray) -> np.ndarray:
    """Return the part of each group, as its index in `shares`, whose first is train.

    After "On the Stratification of Multi-Label Data" (Sechidis et al. 2011): groups with the rarest classes come
    first, and each goes to the part that lacks most of what the group contains. What a part lacks is counted from the
    groups that came before, of all classes and of images. Train gets one group with each class before all others.

    Args:
        counts (`csr_array` of shape `(num_groups, num_classes + 2)`): From [`_count_classes`].
        shares (`Mapping[str, float]`): Share of each part.
        keys (`np.ndarray` of shape `(num_groups,)`): Order of groups that are equally rare and large.
    """
    totals = counts.sum(axis=0)
    rarest = np.minimum.reduceat(totals[counts.indices], counts.indptr[:-1])
    order = np.lexsort((keys, -counts[:, [-1]].toarray()[:, 0], rarest))
    covering = _one_of_each_class(counts, order)
    share = np.array([*shares.values()])[:, None]
    lacking = np.zeros((len(share), len(totals)))  # images of each class that a part has too few of
    parts = np.zeros(len(order), dtype=np.int64)
    for group in sorted(order.tolist(), key=lambda group: group not in covering):
        row = slice(*counts.indptr[group : group + 2])
        columns, num_images = counts.indices[row], counts.data[row]
        lacking[:, columns] += share * num_images
        weights = num_images / totals[columns] ** 0.5  # one image more or less matters most to a rare class
        parts[group] = 0 if group in covering else np.argmax(lacking[:, columns] @ weights)
        lacking[parts[group], columns] -= num_images
    return parts


def _one_of_each_class(counts: csr_array, order: np.ndarray) -> set[int]:
    """Return groups that contain every class, for the rarest class first the first group in order."""
    rank = np.argsort(order)
    by_class = counts[:, :-2].tocsc()
    chosen: set[int] = set()
    for column in np.argsort(by_class.sum(axis=0), kind="stable"):
        groups = by_class.indices[slice(*by_class.indptr[column : column + 2])]
        if len(groups) and chosen.isdisjoint(groups.tolist()):
            chosen.add(int(groups[np.argmin(rank[groups])]))
    return chosen


def _take_parts(pool: DetectionSplit, shares: Mapping[str, float], parts: np.ndarray) -> dict[str, DetectionSplit]:
    """Return each part with its images in the order of the pool, and with the warnings about them."""
    images = {split: [pool.images[i] for i in np.flatnonzero(parts == part)] for part, split in enumerate(shares)}
    split_of = {str(image.path): split for split, of_split in images.items() for image in of_split}
    warnings: dict[str, dict[str, list[str]]] = {split: defaultdict(list) for split in shares}
    for warning, paths in pool.warnings.items():
        for path in paths:
            warnings[split_of.get(path, "train")][warning].append(path)
    return {split: replace(pool, images=images[split], warnings=dict(warnings[split])) for split in shares}


def count_classes(data: DetectionSplit) -> dict[str, tuple[int, int]]:
    """Return the numbers of images and of objects, without crowd regions, of each class that has any."""
    images = Counter(id_ for image in data.images for id_ in _classes_in(image))
    objects = Counter(id_ for image in data.images for id_ in image.category_ids[image.iscrowd == 0].tolist())
    return {name: (images[id_], objects[id_]) for id_, name in data.categories.items() if images[id_]}


def _require_objects(parts: Mapping[str, DetectionSplit], num_groups: int) -> None:
    if empty := [split for split, data in parts.items() if not count_classes(data)]:
        images = [image for data in parts.values() for image in data.images]
        num_with_objects = sum(bool(_classes_in(image)) for image in images)
        raise InputError(
            f"the {' and '.join(empty)} split would have no objects. The dataset has {len(images)} images, "
            f"{num_groups} that differ, {num_with_objects} with objects, and one of each class stays in train. Add "
            "images, or raise --val and --test"
        )


def _rare_classes(parts: Mapping[str, DetectionSplit], pool: DetectionSplit) -> list[str]:
    """Warn about classes with so few images that a part has none of them."""
    counts = count_classes(pool)
    found = {split: count_classes(data) for split, data in parts.items()}
    missing = {split: [name for name in counts if name not in found[split]] for split in parts}
    return [
        f"{split}: {len(names)} of {len(counts)} classes have too few images to be in it: "
        + summarize_list(f"{name!r} ({counts[name][0]})" for name in names)
        for split, names in missing.items()
        if names
    ]
