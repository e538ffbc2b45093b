"""Read datasets of Hugging Face `datasets`: directories of images with metadata, saved datasets, and ids on the Hub.

Each row is an image with a column `objects` of boxes (x, y, width, height in pixels) and categories, as in
https://huggingface.co/docs/datasets/image_dataset#object-detection.
"""

import glob
import io
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ...utils.errors import InputError, import_extra, summarize_list
from ...utils.names import to_integer
from ..dataset import SPLIT_ALIASES, SPLITS, AnnotatedImageBuilder, DetectionSplit, check_unique_names, to_float
from ..images import ImageSource
from .common import ReadOptions, boxes_to_xywh, group_by_split, split_from_name
from .files import RENAMED_WARNING, find_image_files


logger = logging.getLogger(__name__)

# names of columns in datasets on the Hub, the first that exists is used
_OBJECTS = ("objects", "annotations")
_FIELDS = {
    "bbox": ("bbox", "bboxes", "boxes", "box"),
    "category": ("category", "categories", "category_id", "category_ids", "label", "labels", "class_labels"),
    "area": ("area",),
    "iscrowd": ("iscrowd", "is_crowd"),
}
_REQUIRED = dict.fromkeys(("bbox", "category")).keys()  # a set in this order
_OF_IMAGES = ("image_id", "height", "width")

# sides of boxes that are dicts, in the order of a format of boxes
_SIDES = {
    ("x", "y", "width", "height"): "xywh",
    ("x", "y", "w", "h"): "xywh",
    ("left", "top", "width", "height"): "xywh",
    ("xmin", "ymin", "xmax", "ymax"): "xyxy",
    ("x_min", "y_min", "x_max", "y_max"): "xyxy",
    ("x0", "y0", "x1", "y1"): "xyxy",
    ("x1", "y1", "x2", "y2"): "xyxy",
    ("left", "top", "right", "bottom"): "xyxy",
}
_NUMBER = re.compile("0|-?[1-9][0-9]{0,18}")  # as `str` writes it

_METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_HUB_ID = re.compile(r"(?P<path>[\w.-]+(/[\w.-]+)?)(:(?P<name>[\w.-]+))?(@(?P<revision>[\w.-]+))?")
_NO_ANNOTATIONS = "images have no annotations: treated as images without objects"
_NUM_FETCHED_AT_ONCE = 32  # images of a stream
_NUM_PATHS_AT_ONCE = 100
_MAX_TEXT = 200  # characters of a value in a message


@dataclass(frozen=True)
class TableImage:
    """An image in a table of `datasets`. Pickling it pickles the path of the table's file, not the image.

    Attributes:
        table (`datasets.Dataset`): Contains encoded images in `column`.
        column (`str`): Name of the column of images.
        row (`int`): Counted from 0.
        title (`str`): Name of the table, for messages.
    """

    table: Any
    column: str
    row: int
    title: str

    @property
    def file_name(self) -> str | None:
        """The path that the table has for the image, if any."""
        return (self.table[self.row][self.column] or {}).get("path")

    def open(self, mode: str = "rb", /) -> BinaryIO:
        """Open the encoded image."""
        return io.BytesIO(_read_bytes(self.table[self.row][self.column]))

    def __str__(self) -> str:
        return f"{self.title}, row {self.row}: {self.file_name or 'image without a name'}"


class TableSplit(NamedTuple):
    """Tables of a split.

    Attributes:
        table (`datasets.Dataset`): The split.
        all_tables (`dict[str, datasets.Dataset]`): All splits, whose classes are numbered together.
        folder (`Path` or `None`): The directory that contains the image files, if it is known.
    """

    table: Any
    all_tables: Mapping[str, Any]
    folder: Path | None = None


class Field(NamedTuple):
    """Type of what is annotated for the objects of an image.

    Attributes:
        feature (`Any`): The feature of `datasets`, without the lists around it.
        depth (`int`): Number of lists around it: 1 for one value per object, 2 for a list per object.
    """

    feature: Any
    depth: int


class Columns(NamedTuple):
    """Where a table contains the objects of its images.

    Attributes:
        objects (`str` or `None`): Name of the column; `None` if the fields are columns of the table.
        fields (`dict[str, Field]` or `None`): By name; `None` if they are known for each row only, as in JSON.
    """

    objects: str | None
    fields: Mapping[str, Field] | None


class Row(NamedTuple):
    """The annotations of one row of a table.

    Attributes:
        image_id (`Any`): The image's id, `None` if there is none.
        size (`tuple[int, int]` or `None`): `(height, width)` in pixels, if annotated.
        boxes (`np.ndarray` of shape `(num_objects, 4)`): x, y, width, height in pixels, NaN for an invalid box.
        categories, areas, iscrowd (sequences of length `num_objects`): The other fields of the annotations.
        is_annotated (`bool`): False if there is nothing at all, rather than no objects.
    """

    image_id: Any
    size: tuple[int, int] | None
    boxes: np.ndarray
    categories: Sequence[Any]
    areas: Sequence[Any]
    iscrowd: Sequence[Any]
    is_annotated: bool


_NO_OBJECTS = Row(None, None, np.empty((0, 4)), (), (), (), is_annotated=False)


class TableContent(NamedTuple):
    """The rows of a table.

    Attributes:
        rows (`list[Row]`): In order.
        class_names (`list[str]` or `None`): Names of the categories if these are numbers of a `ClassLabel`.
    """

    rows: list[Row]
    class_names: list[str] | None


def find_saved(folder: Path) -> dict[str, TableSplit]:
    """Find what `save_to_disk` wrote."""
    if not (folder / "dataset_dict.json").is_file() and not all(
        (folder / name).is_file() for name in ("dataset_info.json", "state.json")
    ):
        return {}
    return _to_splits(_load(folder, lambda: _datasets().load_from_disk(str(folder))), folder)


def find_imagefolder(folder: Path) -> dict[str, TableSplit]:
    """Find Parquet files, or images with a metadata file, in the directory or in those of splits."""
    patterns = (*_METADATA_FILES, "*.parquet")
    if not any(any(folder.glob(f"{depth}{pattern}")) for depth in ("", "*/") for pattern in patterns):
        return {}
    splits = _to_splits(_load(folder, lambda: _datasets().load_dataset(**_load_options(folder))), folder)
    folders = {split: path for split, (path, _) in _metadata_files(folder).items()}
    if folders == {"train": folder}:
        return _load(folder, partial(_divide_by_folder, splits["train"].table, folder))
    unread = [path.name for path in _subfolders(folder) if path not in folders.values() and _is_data(path)]
    if folders and unread:
        logger.warning(
            "%s: directories have no metadata or are not named after splits: left out: %s",
            folder,
            summarize_list(unread),
        )
    return {split: each._replace(folder=folders.get(split)) for split, each in splits.items()}


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _is_data(folder: Path) -> bool:
    """Return whether a directory seems to be a split."""
    return split_from_name(folder.name) is not None or bool(_find_metadata(folder))


def _divide_by_folder(table: Any, folder: Path) -> dict[str, TableSplit]:
    """Divide a table by the directories of its image files, if each of these is named after a split."""
    paths = _image_files(_encoded_images(table, "image"), "image") if "image" in table.column_names else []
    names = [Path(os.path.relpath(path or folder, folder)).parts[:1] for path in paths]
    of_row = [SPLIT_ALIASES.get("".join(name).lower()) for name in names]
    if not of_row or None in of_row:
        return {"train": TableSplit(table, {"train": table}, folder)}
    rows = {split: [row for row, each in enumerate(of_row) if each == split] for split in SPLITS if split in of_row}
    tables = {split: table.select(indices) for split, indices in rows.items()}
    return {split: TableSplit(each, tables, folder.joinpath(*names[rows[split][0]])) for split, each in tables.items()}


def _load_options(source: Path | str) -> dict[str, Any]:
    """Return the arguments of `datasets.load_dataset` for a directory, or an id on the Hub.

    A directory's metadata files are named: left alone, `datasets` takes an image called test_tube.jpg for one of the
    test split, and its annotations for those of another.
    """
    if not Path(source).is_dir():
        return parse_hub_id(str(source))
    files = _metadata_files(Path(source))
    data_files = {split: [glob.escape(str(path.absolute())) for path in paths] for split, (_, paths) in files.items()}
    return {"path": "imagefolder", "data_files": data_files} if files else {"path": str(Path(source).resolve())}


def _check_metadata(file: Path) -> None:
    """Check what `datasets` does not survive: a process that reads `null` as a row of JSON Lines crashes."""
    if not file.stat().st_size:
        raise InputError(f"{file}: is empty")
    if file.suffix == ".jsonl":
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip(b"\xef\xbb\xbf \t\r\n")[:1] not in (b"{", b""):
                    raise InputError(f"{file}: line {number} is not a JSON object: {line[:60]!r}")


def _metadata_files(folder: Path) -> dict[str, tuple[Path, list[Path]]]:
    """Return the directory and the metadata files of each split, or all of them as train if no directory is named so.

    There are none if the dataset's card configures its files.

    Raises:
        InputError: If there are some in the directory itself and in those of splits.
    """
    card = folder / "README.md"
    if card.is_file() and b"\nconfigs:" in card.read_bytes():
        return {}
    inside = {path: files for path in _subfolders(folder) if (files := _find_metadata(path))}
    of_split = group_by_split((path.name, path) for path in inside)
    here = [folder / name for name in _METADATA_FILES if (folder / name).is_file()]
    if here and of_split:
        directories = summarize_list(path.name for path in of_split.values())
        raise InputError(f"{folder}: has {here[0].name} in itself and in {directories}. Remove one of them")
    all_files = [*here, *(file for files in inside.values() for file in files)]
    for file in all_files:
        _check_metadata(file)
    return {split: (path, inside[path]) for split, path in of_split.items()} or (
        {"train": (folder, all_files)} if all_files else {}
    )


def _find_metadata(folder: Path) -> list[Path]:
    """Return the metadata files of a directory that has one, and of those below it."""
    found = any((folder / name).is_file() for name in _METADATA_FILES)
    return sorted(path for name in _METADATA_FILES for path in folder.rglob(name)) if found else []


def load_from_hub(hub_id: str) -> dict[str, TableSplit]:
    """Download a dataset from the Hub: `OWNER/NAME[:CONFIGURATION][@REVISION]`."""
    options = parse_hub_id(hub_id)
    return _to_splits(_load(hub_id, lambda: _datasets().load_dataset(**options), from_hub=True), hub_id)


def stream(
    source: str,
    splits: Sequence[str],
    max_samples: int | None,
    cache_dir: Path | None,
    columns: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, TableSplit]:
    """Stream a dataset once into Arrow files that `datasets` caches, so that images can be read in any order.

    Once a split is complete, it is read from the cache. An interrupted download of a split starts again from its first
    image.

    Args:
        source (`str`): An id on the Hub, or a directory.
        splits (`Sequence[str]`): Splits to read; all if empty.
        max_samples (`int` or `None`): Number of images to read from the beginning of each split; all if `None`.
        cache_dir (`Path` or `None`): Cache directory; by default that of `datasets`.
        columns (`Mapping[str, str]`): See [`ReadOptions`].
    """
    options = _load_options(source)
    load = partial(_load, source, from_hub=not Path(source).is_dir())
    builder = load(lambda: _datasets().load_dataset_builder(**options))
    version = f"{builder.hash} {builder.config_id}"  # the one depends on the code, the other on local files
    streams = _select_by_split(load(builder.as_streaming_dataset), source)
    chosen = {split: each for split, each in streams.items() if not splits or split in splits}
    if unknown := [split for split, each in chosen.items() if each.features is None]:
        raise InputError(
            f"{source}: cannot stream {summarize_list(unknown)}, whose features are unknown. Remove --streaming"
        )
    tables = {}
    for split, each in chosen.items():
        column = _find_image_column(each.features, columns, f"{source} ({split})")
        write = partial(_write_table, each, options, column, version, max_samples, cache_dir)
        tables[split] = load(write)
    return {split: TableSplit(table, tables) for split, table in tables.items()}


def is_hub_id(text: str) -> bool:
    """Return whether a text has the form of an id on the Hub."""
    return _HUB_ID.fullmatch(text) is not None


def parse_hub_id(hub_id: str) -> dict[str, str]:
    """Return the arguments of `datasets.load_dataset` for `OWNER/NAME[:CONFIGURATION][@REVISION]`.

    Raises:
        InputError: If the text has another form, or looks like a misspelled local directory.
    """
    match = _HUB_ID.fullmatch(hub_id)
    if match is None:
        raise InputError(
            f"{hub_id}: is neither a directory nor a Hub id of the form OWNER/NAME[:CONFIGURATION][@REVISION]"
        )
    owner = Path(match["path"]).parent
    if not match["revision"] and owner.name and owner.is_dir():
        entries = summarize_list(sorted(entry.name for entry in owner.iterdir()))
        raise InputError(
            f"{hub_id}: directory not found; {owner} contains {entries}. For the Hub's {hub_id}, write {hub_id}@main"
        )
    return {key: value for key, value in match.groupdict().items() if value}


def _datasets() -> ModuleType:
    return import_extra("datasets", "hub-data", "reading Hugging Face datasets")


def _load(title: Path | str, load: Callable[[], Any], *, from_hub: bool = False) -> Any:
    """Return what `load` returns. On files that are not as expected, `datasets` raises exceptions of many types."""
    try:
        return load()
    except (InputError, ImportError, MemoryError):
        raise
    except Exception as error:
        prefix = "is not a local directory, and " if from_hub else ""
        hint = ". If it has several configurations, write NAME:CONFIGURATION" if from_hub else ""
        cause = error.__cause__ or error
        raise InputError(f"{title}: {prefix}`datasets` cannot load it ({_one_line(cause)}){hint}") from None


def _one_line(error: BaseException) -> str:
    """Return the message of an error, with its type unless that says nothing."""
    text = " ".join(str(error).split())[: 2 * _MAX_TEXT]
    return text if text and isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {text}"


def _to_splits(loaded: Any, source: Path | str) -> dict[str, TableSplit]:
    tables = _select_by_split(loaded, source)
    return {split: TableSplit(table, tables) for split, table in tables.items()}


def _select_by_split(loaded: Any, source: Path | str) -> dict[str, Any]:
    """Map splits to tables by the tables' names. A single table with another name is the train split."""
    tables = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    if len(tables) == 1 and split_from_name(next(iter(tables))) is None:
        tables = {"train": next(iter(tables.values()))}
    names = {split: [name for name in tables if split_from_name(name) == split] for split in SPLITS}
    for split, candidates in names.items():
        if len(candidates) > 1:
            raise InputError(
                f"{source}: the {split} split may be any of {summarize_list(candidates)}. Write a dataset with one of "
                "them with save_to_disk"
            )
    selected = {split: tables[candidates[0]] for split, candidates in names.items() if candidates}
    if not selected:
        raise InputError(
            f"{source}: no split named {summarize_list(SPLITS)} found in {summarize_list(tables)}. Write a dataset "
            "with splits of these names with save_to_disk"
        )
    if unread := [name for name in tables if split_from_name(name) is None]:
        logger.warning(
            "%s: splits are not named after train, validation or test: left out: %s", source, summarize_list(unread)
        )
    return selected


def _write_table(
    stream: Any,
    options: Mapping[str, Any],
    column: str,
    version: str,
    max_samples: int | None,
    cache_dir: Path | None,
) -> Any:
    """Write a stream into a table, or return it from the cache of `datasets` if the arguments are the same again."""
    arguments = {
        "options": {**options, "split": str(stream.split)},
        "column": column,
        "version": version,
        "max_samples": max_samples,
    }
    features = stream.decode(False).cast_column(column, _datasets().Image(decode=False)).features
    cache = None if cache_dir is None else str(cache_dir)
    return _datasets().Dataset.from_generator(_generate_rows, features, cache_dir=cache, gen_kwargs=arguments)


def _generate_rows(
    options: Mapping[str, Any], column: str, version: str, max_samples: int | None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a streamed split with the encoded images in them. `version` only tells cached tables apart."""
    rows = _datasets().load_dataset(**options, streaming=True).decode(False)
    rows = rows.cast_column(column, _datasets().Image(decode=False))
    rows = rows if max_samples is None else rows.take(max_samples)
    with ThreadPoolExecutor(_NUM_FETCHED_AT_ONCE) as pool:
        for batch in rows.iter(batch_size=_NUM_FETCHED_AT_ONCE):
            images = [
                {"bytes": content, "path": image["path"] and Path(image["path"]).name}
                for image, content in zip(batch[column], pool.map(_read_bytes, batch[column]))
            ]
            yield from (dict(zip(batch, values)) for values in zip(*(batch | {column: images}).values()))


def _read_bytes(image: Mapping[str, Any] | None) -> bytes:
    """Return an encoded image from the table, or from the file or URL that the table refers to."""
    if not image or (image["bytes"] is None and not image["path"]):
        raise ValueError("the table has no image there")
    if image["bytes"] is not None:
        return image["bytes"]
    # opens local paths and every URL that `datasets` returns
    fsspec = import_extra("fsspec", "hub-data", "reading Hugging Face datasets")
    try:
        with fsspec.open(image["path"], "rb") as file:
            return file.read()
    except OSError:
        raise
    except Exception as error:  # those of the packages that open URLs are of their own types
        raise OSError(_one_line(error)) from None


def read_tables(
    splits: Mapping[str, TableSplit], source: Path | str, options: ReadOptions
) -> dict[str, DetectionSplit]:
    """Read tables of `datasets`. Their images stay on disk, in Arrow files or as files of their own.

    Classes that are given as names with the objects are numbered from 0 in alphabetical order over all splits of the
    dataset, even if only some are read, so that category ids in result files do not depend on the choice.
    """
    builders = {split: AnnotatedImageBuilder(source, split, options.on_error) for split in splits}
    images = {split: _find_images(each, options.columns, builders[split]) for split, each in splits.items()}
    contents = _read_contents(splits, builders, options)
    used = {
        category: f"{builders[split].title}, row {index}"
        for split, content in contents.items()
        for category, index in _used_categories(content).items()
    }
    if any(content.class_names is None for content in contents.values()):
        used = _categories_of_unread(splits, options) | used
    numbered = _number_categories(used, source)
    categories = {
        split: numbered if each.class_names is None else check_unique_names(dict(enumerate(each.class_names)), source)
        for split, each in contents.items()
    }
    return {
        split: _build_split(images[split], contents[split], categories[split], builder)
        for split, builder in builders.items()
    }


def _read_contents(
    splits: Mapping[str, TableSplit], builders: Mapping[str, AnnotatedImageBuilder], options: ReadOptions
) -> dict[str, TableContent]:
    """Read all tables. A test split may be published without annotations, beside others that have them."""
    contents = {}
    for split, tables in splits.items():
        try:
            contents[split] = _read_table(tables.table, options, builders[split].title)
        except _ObjectsNotFoundError:
            if split != "test" or not contents:
                raise
            class_names = next(iter(contents.values())).class_names
            contents[split] = TableContent([_NO_OBJECTS] * len(tables.table), class_names)
    return contents


def _used_categories(content: TableContent) -> dict[int | str, int]:
    """Map the categories that a table gives with its objects to the first row that has each."""
    if content.class_names is not None:
        return {}
    rows = reversed([*enumerate(content.rows)])
    found = {_to_category(category): index for index, row in rows for category in row.categories}
    return {category: index for category, index in found.items() if category is not None}


def _categories_of_unread(splits: Mapping[str, TableSplit], options: ReadOptions) -> dict[int | str, str]:
    """Return the categories used in splits that are not read, each with the split and row that has it."""
    unread = {
        split: table for each in splits.values() for split, table in each.all_tables.items() if split not in splits
    }
    used: dict[int | str, str] = {}
    for split, table in unread.items():
        with suppress(InputError):  # a test split may be published without annotations
            content = _read_table(table, options, split)
            used |= {category: f"{split}, row {index}" for category, index in _used_categories(content).items()}
    return used


def _to_category(value: Any) -> int | str | None:
    """Return a category as an integer, or a name without blanks at its ends; `None` if it is neither."""
    return value.strip() if isinstance(value, str) else to_integer(value)


def _to_number(value: Any) -> int | None:
    """Return a whole number, which may be text if it is written as `str` writes it."""
    return to_integer(int(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value)


def _number_categories(used: Mapping[int | str, str], source: Path | str) -> dict[int, str]:
    """Assign ids from 0 to categories that are names, in alphabetical order. Categories that are numbers keep them.

    Args:
        used (`Mapping[int | str, str]`): From [`_to_category`], with a row that has each.
        source (`Path` or `str`): Source of the dataset.
    """
    numbers = {number for category in used if (number := _to_number(category)) is not None}
    if len(numbers) == len({str(category) for category in used}):
        return {number: str(number) for number in sorted(numbers)}
    examples = {type(category): f"{category!r} ({where})" for category, where in used.items()}
    if len(examples) > 1:
        raise InputError(
            f"{source}: categories are both numbers and names, such as {examples[int]} and {examples[str]}. Write all "
            "of them in one way"
        )
    return dict(enumerate(sorted(map(str, used))))


def _build_split(
    images: Sequence[ImageSource | None],
    content: TableContent,
    categories: Mapping[int, str],
    builder: AnnotatedImageBuilder,
) -> DetectionSplit:
    ids: dict[Any, int] = {id_: id_ for id_ in categories}
    if content.class_names is None:
        ids |= {name: id_ for id_, name in categories.items()}
    image_ids = _unique_ids(images, content.rows, builder)
    for image, row, image_id in zip(images, content.rows, image_ids):
        if image is None:
            continue
        known = _known_categories(image, row, ids, builder)
        builder.add_warning(_NO_ANNOTATIONS, image, not row.is_annotated)
        builder.add(
            image,
            row.size,
            row.boxes[[*known]],
            [*known.values()],
            image_id=image_id,
            areas=[row.areas[index] for index in known],
            iscrowd=[row.iscrowd[index] for index in known],
        )
    return builder.build(categories)


def _known_categories(
    image: ImageSource, row: Row, ids: Mapping[Any, int], builder: AnnotatedImageBuilder
) -> dict[int, int]:
    """Return the category ids of the objects by their indices, and report those that have none."""
    found = {index: ids.get(_to_category(category)) for index, category in enumerate(row.categories)}
    if unknown := [repr(row.categories[index])[:_MAX_TEXT] for index, id_ in found.items() if id_ is None]:
        builder.on_error(
            f"{image}: unknown categories: {summarize_list(dict.fromkeys(unknown))}. Give each object a name or a "
            "whole number, or the number of a name that the table lists"
        )
    blanks = sum(isinstance(category, str) and category != category.strip() for category in row.categories)
    builder.add_warning("class names have blanks at their ends: removed", image, blanks)
    return {index: id_ for index, id_ in found.items() if id_ is not None}


def _unique_ids(
    images: Sequence[ImageSource | None], rows: Sequence[Row], builder: AnnotatedImageBuilder
) -> list[int | None]:
    """Return the ids of images, or `None` for all unless each has its own."""
    ids = [_to_number(row.image_id) for row in rows]
    num_images = Counter(ids)
    invalid = [image for image, id_ in zip(images, ids) if id_ is None or num_images[id_] > 1]
    if not invalid:
        return ids
    for image in invalid if any(row.image_id is not None for row in rows) else ():
        if image is not None:
            builder.add_warning("images have no id of their own that is a whole number: numbered", image)
    return [None] * len(ids)


def _find_images(
    tables: TableSplit, names: Mapping[str, str], builder: AnnotatedImageBuilder
) -> list[ImageSource | None]:
    """Return the images of a table, `None` for those that are reported because their files are missing."""
    column = _find_image_column(tables.table.features, names, builder.title)
    encoded = _load(f"{builder.title}, column {column}", partial(_encoded_images, tables.table, column))
    paths = _load(builder.title, partial(_image_files, encoded, column))
    # unlike `Path.is_file`, it takes text of any length
    missing = [row for row, path in enumerate(paths) if path is not None and not os.path.isfile(path)]  # noqa: PTH113
    renamed = _find_renamed(paths, missing, tables.folder, builder) if tables.folder and missing else {}
    if lost := [row for row in missing if row not in renamed]:
        examples = summarize_list(f"{(paths[row] or 'no name')[:_MAX_TEXT]} (row {row})" for row in lost)
        builder.on_error(
            f"{builder.title}: {len(lost)} images not found: {examples}. Restore them, or remove their rows"
        )
    images: dict[int, ImageSource | None] = {
        row: TableImage(encoded, column, row, builder.title) for row in range(len(paths))
    }
    return [*(images | renamed | dict.fromkeys(lost)).values()]


def _find_renamed(
    paths: Sequence[str | None], missing: Sequence[int], folder: Path, builder: AnnotatedImageBuilder
) -> dict[int, Path]:
    """Return image files that are missing by their names, but not by the last parts of these, by row."""
    names = [os.path.relpath(path or folder, folder) for path in paths]
    found = find_image_files(names, folder).paths
    renamed = {row: found[row] for row in missing if found[row].is_file()}
    for path in renamed.values():
        builder.add_warning(RENAMED_WARNING, path)
    return renamed


def _encoded_images(table: Any, column: str) -> Any:
    images = table.with_format(None).select_columns([column])  # a saved table may be set to return tensors
    return images.cast_column(column, _datasets().Image(decode=False))


def _image_files(images: Any, column: str) -> list[str | None]:
    """Return the path of each image that is a file of its own, empty if it has none; `None` for others.

    Args:
        images (`datasets.Dataset`): From [`_encoded_images`].
        column (`str`): The column.
    """
    files: list[str | None] = []
    for batch in images.with_format("arrow").iter(_NUM_PATHS_AT_ONCE):
        for chunk in batch[column].chunks:
            content, path = chunk.flatten()
            paths = [each or "" for each in path.to_pylist()]
            in_table = content.is_valid().to_pylist()
            files += [None if inside or "://" in path else path for inside, path in zip(in_table, paths)]
    return files


def _read_table(table: Any, options: ReadOptions, title: str) -> TableContent:
    """Read the annotations of all rows.

    Raises:
        InputError: If a column is not found, or a row is not as expected.
    """
    columns = _find_columns(table.features, options.columns, title)
    rows = _read_columns(table, columns, options.columns, title)
    objects = [
        _to_dict_of_lists(row if columns.objects is None else row[columns.objects], f"{title}, row {index}")
        for index, row in enumerate(rows)
    ]
    keys = columns.fields or dict.fromkeys(key for each in objects for key in each or ())
    fields = _find_fields(keys, options.columns)
    if keys and not fields.keys() >= _REQUIRED:
        raise _ObjectsNotFoundError(_objects_not_found(title, f"{columns.objects}: {{{', '.join(keys)}}}", ""))
    if keys.keys() >= {*_FIELDS["iscrowd"]}:
        raise InputError(
            f"{title}: objects have both {' and '.join(_FIELDS['iscrowd'])}. Rename or remove one of them"
        )
    category = keys.get(fields.get("category", ""))
    return TableContent(
        [
            _to_row(row, each, fields, options.box_format, f"{title}, row {index}")
            for index, (row, each) in enumerate(zip(rows, objects))
        ],
        getattr(category.feature, "names", None) if category else None,
    )


def _read_columns(table: Any, columns: Columns, names: Mapping[str, str], title: str) -> list[dict[str, Any]]:
    """Return all rows, with those columns only that are needed: not with the images."""
    objects = {columns.objects} if columns.objects else {*_find_fields(columns.fields or (), names).values()}
    needed = [name for name in table.column_names if name in objects | {*_OF_IMAGES}]
    # a saved table may be set to return tensors
    return _load(title, lambda: [*table.with_format(None).select_columns(needed)])


def _to_dict_of_lists(objects: Any, where: str) -> Mapping[str, Any] | None:
    """Return the objects of an image as a dict of lists. They may be a list of dicts, and either may be JSON."""
    objects = _parse_json(objects, "its objects", where)
    if isinstance(objects, list) and all(isinstance(each, dict) for each in objects):
        keys = dict.fromkeys(key for each in objects for key in each)
        return {key: [each.get(key) for each in objects] for key in keys}
    if not isinstance(objects, dict | None):
        raise InputError(
            f"{where}: the objects of an image must be a list of dicts or a dict of lists, got {_shorten(objects)}"
        )
    return objects


def _parse_json(value: Any, name: str, where: str) -> Any:
    """Return a value, parsed if it is text, as in CSV files. Empty text is `None`."""
    try:
        return json.loads(value.strip() or "null") if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where}: {name} must be a list with one item for each object or JSON ({error}), got {_shorten(value)}"
        ) from None


def _shorten(value: Any) -> str:
    return repr(value)[:_MAX_TEXT]


def _to_row(
    row: Mapping[str, Any], objects: Mapping[str, Any] | None, fields: Mapping[str, str], box_format: str, where: str
) -> Row:
    lists = {content: _to_list((objects or {}).get(name), name, where) for content, name in fields.items()}
    given = {content: [] for content in _REQUIRED} | {key: each for key, each in lists.items() if each is not None}
    if len({len(values) for values in given.values()}) > 1:
        lengths = summarize_list(f"{len(values)} {fields.get(content, content)}" for content, values in given.items())
        raise InputError(f"{where}: an image must have as many of each for its objects, got {lengths}")
    nothing = [None] * len(given["bbox"])
    return Row(
        row.get("image_id"),
        _to_size(row.get("height"), row.get("width"), where),
        _to_box_array(given["bbox"], box_format, where),
        given["category"],
        given.get("area", nothing),
        given.get("iscrowd", nothing),
        is_annotated=objects == {} or any(lists.get(content) is not None for content in _REQUIRED),
    )


def _to_list(value: Any, name: str, where: str) -> list[Any] | None:
    values = _parse_json(value, name, where)
    if not isinstance(values, list | None):
        raise InputError(
            f"{where}: {name} must be a list with one item for each object or JSON, got {_shorten(value)}"
        )
    return values


def _to_box_array(boxes: Sequence[Any], box_format: str, where: str) -> np.ndarray:
    """Return boxes as x, y, width, height. The sides of dicts are known by their names, whatever the format."""
    array = boxes_to_xywh(boxes, box_format)
    for index, box in enumerate(boxes):
        if isinstance(box, dict):
            array[index] = _named_sides_to_xywh(box, where)
    return array


def _named_sides_to_xywh(box: Mapping[str, Any], where: str) -> np.ndarray:
    sides = {str(name).lower(): value for name, value in box.items()}
    names = next((names for names in _SIDES if sides.keys() == {*names}), None)
    if names is None:
        expected = " or ".join(", ".join(names) for names in _SIDES if names[0] in ("x", "xmin"))
        raise InputError(f"{where}: a box must be a list of 4 numbers, or have {expected}; got {_shorten(box)}")
    return boxes_to_xywh([[sides[name] for name in names]], _SIDES[names])[0]


def _to_size(height: Any, width: Any, where: str) -> tuple[int, int] | None:
    """Return the annotated size in pixels, `None` if a side is missing or 0."""
    sides = (to_integer(to_float(side or 0)) for side in (height, width))
    rows, columns = (-1 if side is None else side for side in sides)
    if rows < 0 or columns < 0:
        raise InputError(
            f"{where}: height and width must be positive integers, got {_shorten(height)} and {_shorten(width)}"
        )
    return (rows, columns) if rows and columns else None


class _ObjectsNotFoundError(InputError):
    """Raised for a table without a column of objects, or without boxes or categories in it."""


def _find_image_column(features: Mapping[str, Any], names: Mapping[str, str], title: str) -> str:
    if unknown := names.keys() - {"image", "objects", *_REQUIRED}:
        raise InputError(f"columns may be given for image, objects, bbox and category, got {summarize_list(unknown)}")
    images = [name for name, feature in features.items() if isinstance(feature, _datasets().Image)]
    found = [name for name in images if name == "image"] or images
    problem = f"has {'several columns' if found else 'no column'} of images"
    if "image" in names:
        found = [name for name in features if name == names["image"]]
        problem = f"--columns image={names['image']} not found"
    if len(found) != 1:
        raise InputError(
            f"{title}: {problem}. Its columns are {_describe_columns(features)}. If one contains images, paths, URLs "
            "or encoded bytes, add --columns image=NAME"
        )
    return found[0]


def _find_columns(features: Mapping[str, Any], names: Mapping[str, str], title: str) -> Columns:
    """Find the objects: in the column that the user names, or else in one with a usual name or in those of the table.

    Raises:
        InputError: If they are not found, or in several columns.
    """
    if missing := [f"{content}={name}" for content, name in names.items() if not _may_have(features, content, name)]:
        columns = _describe_columns(features)
        raise _ObjectsNotFoundError(f"{title}: --columns {' '.join(missing)} not found. Its columns are {columns}")
    usual = [name for name in _OBJECTS if name in features]
    options = {name: _fields(features[name]) for name in ([names["objects"]] if "objects" in names else usual)}
    flat = {} if "objects" in names else {None: _flat_fields(features)}
    found = [
        Columns(name, fields)
        for name, fields in (options | flat).items()
        if _find_fields(fields, names).keys() >= _REQUIRED
    ] or [Columns(name, None) for name in options if _is_open(features[name])]
    if not found:
        raise _ObjectsNotFoundError(_objects_not_found(title, _describe_columns(features), _suggest(features)))
    if len(found) > 1:
        several = summarize_list(each.objects or "columns of the table" for each in found)
        raise InputError(f"{title}: objects are in {several}. Name one of them with --columns objects=NAME")
    return found[0]


def _may_have(features: Mapping[str, Any], content: str, name: str) -> bool:
    """Return whether a table has a column, or a field in one. The fields of JSON are known for each row only."""
    inside = {field for feature in features.values() for field in _fields(feature)}
    is_open = any(_is_open(feature) for feature in features.values())
    return name in features or (content in _REQUIRED and (name in inside or is_open))


def _find_fields(keys: Iterable[str], names: Mapping[str, str]) -> dict[str, str]:
    """Map contents to the names of their fields: those that the user gives, or the first usual one."""
    keys = {*keys}
    choices = {content: (names[content],) if content in names else usual for content, usual in _FIELDS.items()}
    found = {content: [name for name in usual if name in keys] for content, usual in choices.items()}
    return {content: usual[0] for content, usual in found.items() if usual}


def _objects_not_found(title: str, got: str, hint: str) -> str:
    boxes, categories = (summarize_list(_FIELDS[content], 9) for content in ("bbox", "category"))
    return (
        f"{title}: the objects of an image need boxes ({boxes}) and categories ({categories}), as lists within a "
        f"column called {' or '.join(_OBJECTS)} or as columns of lists; got {got}.{hint}"
    )


def _suggest(features: Mapping[str, Any]) -> str:
    """Return the option that a table may need, or what it lacks."""
    tables = {name: _fields(feature) for name, feature in features.items()} | {None: _flat_fields(features)}
    incomplete = ""
    for objects, fields in tables.items():
        boxes, categories = (_candidates(content, fields) for content in ("bbox", "category"))
        if boxes and len(categories) == 1:
            chosen = {"objects": objects or "objects", "bbox": boxes[0], "category": categories[0]}
            usual = _FIELDS | {"objects": _OBJECTS}
            unusual = [f"{content}={name}" for content, name in chosen.items() if name not in usual[content]]
            return f" Add --columns {' '.join(unusual)}"
        if boxes:
            incomplete = f" {objects or 'The table'} has boxes but no categories: give each object one"
    return incomplete or " Name them with --columns objects=NAME bbox=NAME category=NAME"


def _candidates(content: str, fields: Mapping[str, Field]) -> list[str]:
    """Return the fields that may be the boxes or the categories: that with a usual name, or those of such a type."""
    found = [name for name in _FIELDS[content] if name in fields and fields[name].depth][:1]
    return found or [name for name, field in fields.items() if _has_type_of(content, field)]


def _has_type_of(content: str, field: Field) -> bool:
    kind = getattr(field.feature, "dtype", "")
    if content == "category":
        return field.depth == 1 and (hasattr(field.feature, "names") or kind == "string")
    return field.depth == 2 and str(kind).startswith(("int", "uint", "float"))


def _fields(feature: Any) -> dict[str, Field]:
    """Return the fields of objects, whether their feature is a dict of lists or a list of dicts."""
    struct, depth = _unwrap_lists(feature)
    inside = {name: _unwrap_lists(each) for name, each in struct.items()} if isinstance(struct, dict) else {}
    return {name: Field(field.feature, field.depth + depth) for name, field in inside.items()}


def _flat_fields(features: Mapping[str, Any]) -> dict[str, Field]:
    """Return the columns that may have a value for each object: lists, and text that may be JSON."""
    fields = {name: _unwrap_lists(feature) for name, feature in features.items()}
    return {name: field for name, field in fields.items() if field.depth or _is_open(features[name])}


def _is_open(feature: Any) -> bool:
    """Return whether only the rows show what is in a column: in JSON, or if all of it is null."""
    leaf, depth = _unwrap_lists(feature)
    kind = getattr(leaf, "dtype", "")
    return type(leaf).__name__ == "Json" or kind == "null" or (not depth and kind in ("string", "large_string"))


def _unwrap_lists(feature: Any) -> Field:
    depth = 0
    while hasattr(feature, "feature"):
        feature, depth = feature.feature, depth + 1
    return Field(feature, depth)


def _describe_columns(features: Mapping[str, Any]) -> str:
    return summarize_list((f"{name}: {_describe(feature)}" for name, feature in features.items()), 20)


def _describe(feature: Any) -> str:
    leaf, depth = _unwrap_lists(feature)
    if isinstance(leaf, dict):
        return "list of " * depth + f"{{{_describe_columns(leaf)}}}"
    is_value = isinstance(leaf, _datasets().Value)
    return "list of " * depth + (leaf.dtype if is_value else type(leaf).__name__)
