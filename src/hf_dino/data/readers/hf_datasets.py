"""Read datasets of Hugging Face `datasets`: directories of images with metadata, saved datasets, and ids on the Hub.

Each row is an image with a column `objects` of boxes (x, y, width, height in pixels) and categories, as in
https://huggingface.co/docs/datasets/image_dataset#object-detection.
"""

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

from ...utils.errors import InputError, import_extra, summarize_list
from ..dataset import SPLITS, AnnotatedImageBuilder, DetectionSplit, check_unique_names
from .common import ReadOptions, split_from_name


# names of columns in datasets on the Hub, the first that exists is used
_OBJECTS = ("objects", "annotations")
_BOXES = ("bbox", "bboxes", "boxes", "box")
_CATEGORIES = ("category", "categories", "category_id", "category_ids", "label", "labels", "class_labels")
_CROWDS = ("iscrowd", "is_crowd")
_METADATA = frozenset({*_OBJECTS, *_BOXES, *_CATEGORIES, *_CROWDS, "area", "image_id", "height", "width"})

_HUB_ID = re.compile(r"(?P<path>[\w.-]+(/[\w.-]+)?)(:(?P<name>[\w.-]+))?(@(?P<revision>[\w.-]+))?")
_NUM_FETCHED_AT_ONCE = 32  # images of a stream


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
        return self.table[self.row][self.column]["path"]

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
    """

    table: Any
    all_tables: Mapping[str, Any]


class Row(NamedTuple):
    """One row of a table: an image and its annotations.

    Attributes:
        image (`TableImage`): The image.
        image_id (`Any`): The image's id, `None` if there is none.
        size (`tuple[int, int]` or `None`): `(height, width)` in pixels, if annotated.
        boxes, categories, areas, iscrowd (sequences of length `num_objects`): Columns of the annotations.
    """

    image: TableImage
    image_id: Any
    size: tuple[int, int] | None
    boxes: Sequence[Any] = ()
    categories: Sequence[Any] = ()
    areas: Sequence[Any] = ()
    iscrowd: Sequence[Any] = ()


def find_saved(folder: Path) -> dict[str, TableSplit]:
    """Find what `save_to_disk` wrote."""
    if not (folder / "dataset_dict.json").is_file() and not all(
        (folder / name).is_file() for name in ("dataset_info.json", "state.json")
    ):
        return {}
    return _to_splits(_load(folder, lambda: _datasets().load_from_disk(str(folder))), folder)


def find_imagefolder(folder: Path) -> dict[str, TableSplit]:
    """Find Parquet files, or images with a metadata file, in the directory or in those of splits."""
    patterns = ("metadata.jsonl", "metadata.csv", "*.parquet")
    if not any(any(folder.glob(f"{depth}{pattern}")) for depth in ("", "*/") for pattern in patterns):
        return {}
    return _to_splits(_load(folder, lambda: _datasets().load_dataset(str(folder))), folder)


def load_from_hub(hub_id: str) -> dict[str, TableSplit]:
    """Download a dataset from the Hub: `OWNER/NAME[:CONFIGURATION][@REVISION]`."""
    options = parse_hub_id(hub_id)
    return _to_splits(_load(hub_id, lambda: _datasets().load_dataset(**options)), hub_id)


def stream(
    source: str, splits: Sequence[str], max_samples: int | None, cache_dir: Path | None
) -> dict[str, TableSplit]:
    """Stream a dataset once into Arrow files that `datasets` caches, so that images can be read in any order.

    Once a split is complete, it is read from the cache. An interrupted download of a split starts again from its first
    image.

    Args:
        source (`str`): An id on the Hub, or a directory.
        splits (`Sequence[str]`): Splits to read; all if empty.
        max_samples (`int` or `None`): Number of images to read from the beginning of each split; all if `None`.
        cache_dir (`Path` or `None`): Cache directory; by default that of `datasets`.
    """
    options = {"path": str(Path(source).resolve())} if Path(source).is_dir() else parse_hub_id(source)
    builder = _load(source, lambda: _datasets().load_dataset_builder(**options))
    streams = _select_by_split(_load(source, builder.as_streaming_dataset), source)
    chosen = {split: each for split, each in streams.items() if not splits or split in splits}
    if unknown := [split for split, each in chosen.items() if each.features is None]:
        raise InputError(
            f"{source}: cannot stream {summarize_list(unknown)}, whose features are unknown. Remove --streaming"
        )
    tables = {
        split: _load(source, partial(_write_table, each, options, builder.hash, max_samples, cache_dir))
        for split, each in chosen.items()
    }
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


def _load(source: Path | str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (_datasets().exceptions.DatasetsError, OSError, ValueError) as error:
        prefix = "" if Path(source).is_dir() else "is not a local directory, and "
        raise InputError(
            f"{source}: {prefix}`datasets` cannot load it ({error.__cause__ or error}). If it has several "
            "configurations, write NAME:CONFIGURATION"
        ) from None


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
        raise InputError(f"{source}: no split named {summarize_list(SPLITS)} found in {summarize_list(tables)}")
    return selected


def _write_table(
    stream: Any, options: Mapping[str, str], version: str, max_samples: int | None, cache_dir: Path | None
) -> Any:
    """Write a stream into a table, or return it from the cache of `datasets` if the arguments are the same again."""
    arguments = {"options": {**options, "split": str(stream.split)}, "version": version, "max_samples": max_samples}
    features = stream.decode(False).features
    cache = None if cache_dir is None else str(cache_dir)
    return _datasets().Dataset.from_generator(_generate_rows, features, cache_dir=cache, gen_kwargs=arguments)


def _generate_rows(options: Mapping[str, str], version: str, max_samples: int | None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a streamed split with the encoded images in them. `version` only tells cached tables apart."""
    rows = _datasets().load_dataset(**options, streaming=True).decode(False)
    column = _find_image_column(rows.features, options["path"])
    rows = rows if max_samples is None else rows.take(max_samples)
    with ThreadPoolExecutor(_NUM_FETCHED_AT_ONCE) as pool:
        for batch in rows.iter(batch_size=_NUM_FETCHED_AT_ONCE):
            images = [
                {"bytes": content, "path": image["path"] and Path(image["path"]).name}
                for image, content in zip(batch[column], pool.map(_read_bytes, batch[column]))
            ]
            yield from (dict(zip(batch, values)) for values in zip(*(batch | {column: images}).values()))


def _read_bytes(image: Mapping[str, Any]) -> bytes:
    """Return an encoded image from the table, or from the file or URL that the table refers to."""
    if image["bytes"] is not None:
        return image["bytes"]
    # opens local paths and every URL that `datasets` returns
    fsspec = import_extra("fsspec", "hub-data", "reading Hugging Face datasets")
    with fsspec.open(image["path"], "rb") as file:
        return file.read()


def read_tables(
    splits: Mapping[str, TableSplit], source: Path | str, options: ReadOptions
) -> dict[str, DetectionSplit]:
    """Read tables of `datasets`. Their images stay on disk, in Arrow files or as files of their own.

    Classes that are given as names with the objects are numbered from 0 in alphabetical order over all splits of the
    dataset, even if only some are read, so that category ids in result files do not depend on the choice.
    """
    rows = {split: list(_read_rows(tables.table, f"{source} ({split})")) for split, tables in splits.items()}
    names = {split: _class_label_names(tables.table.features) for split, tables in splits.items()}
    used = {category for of_split in rows.values() for row in of_split for category in row.categories}
    if None in names.values():
        used |= _categories_of_unread(splits)
    categories = {
        split: _number_categories(used) if listed is None else check_unique_names(dict(enumerate(listed)), source)
        for split, listed in names.items()
    }
    return {
        split: _build_split(rows[split], categories[split], AnnotatedImageBuilder(source, split, options.on_error))
        for split in splits
    }


def _categories_of_unread(splits: Mapping[str, TableSplit]) -> set[Any]:
    """Return the categories used in splits that are not read."""
    unread = {
        split: table for each in splits.values() for split, table in each.all_tables.items() if split not in splits
    }
    used: set[Any] = set()
    for split, table in unread.items():
        with suppress(InputError):  # a test split may be published without annotations
            used.update(category for row in _read_rows(table, split) for category in row.categories)
    return used


def _number_categories(used: set[Any]) -> dict[int, str]:
    """Assign ids from 0 to categories that are names, in alphabetical order. Categories that are numbers keep them."""
    if all(isinstance(category, int) for category in used):
        return {number: str(number) for number in sorted(used)}
    return dict(enumerate(sorted(map(str, used))))


def _build_split(rows: Sequence[Row], categories: Mapping[int, str], builder: AnnotatedImageBuilder) -> DetectionSplit:
    ids: dict[Any, int] = {id_: id_ for id_ in categories} | {name: id_ for id_, name in categories.items()}
    image_ids = [row.image_id for row in rows]
    has_ids = all(type(image_id) is int for image_id in image_ids) and len(set(image_ids)) == len(image_ids)
    for row in rows:
        known = [index for index, category in enumerate(row.categories) if category in ids]
        if len(known) < len(row.categories):
            builder.on_error(f"{row.image}: unknown categories: {summarize_list(set(row.categories) - ids.keys())}")
        builder.add(
            row.image,
            row.size,
            [row.boxes[index] for index in known],
            [ids[row.categories[index]] for index in known],
            image_id=row.image_id if has_ids else None,
            areas=[row.areas[index] for index in known],
            iscrowd=[row.iscrowd[index] for index in known],
        )
    return builder.build(categories)


def _read_rows(table: Any, title: str) -> Iterator[Row]:
    table = table.with_format(None)  # a saved table may be set to return tensors
    column = _find_image_column(table.features, title)
    images = table.select_columns([column]).cast_column(column, _datasets().Image(decode=False))
    metadata = table.select_columns([name for name in table.column_names if name in _METADATA])
    for index, row in enumerate(metadata):
        height, width = row.get("height"), row.get("width")
        size = (int(height), int(width)) if height and width else None
        yield Row(TableImage(images, column, index, title), row.get("image_id"), size, *_read_annotations(row, title))


def _read_annotations(row: Mapping[str, Any], title: str) -> tuple[Sequence[Any], ...]:
    """Return the boxes, categories, areas and crowd flags of a row, all of the same length."""
    objects = next((row[name] for name in _OBJECTS if name in row), row)
    objects = json.loads(objects or "{}") if isinstance(objects, str) else objects  # from a CSV file
    if isinstance(objects, list):  # a list of dicts rather than a dict of lists
        objects = {key: [each.get(key) for each in objects] for key in (objects[0] if objects else ())}
    if not objects:
        return (), (), (), ()
    boxes, categories = _first(objects, _BOXES), _first(objects, _CATEGORIES)
    if boxes is None or categories is None or len(boxes) != len(categories):
        raise InputError(
            f"{title}: the objects of an image need boxes ({summarize_list(_BOXES)}) and as many categories "
            f"({summarize_list(_CATEGORIES, 9)}), got {str(objects)[:200]}"
        )
    areas, iscrowd = _first(objects, ("area",)), _first(objects, _CROWDS)
    return boxes, categories, areas or [None] * len(boxes), iscrowd or [0] * len(boxes)


def _first(columns: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((columns[name] for name in names if columns.get(name) is not None), None)


def _find_image_column(features: Mapping[str, Any], title: str) -> str:
    images = [name for name, feature in features.items() if isinstance(feature, _datasets().Image)]
    if not images:
        raise InputError(f"{title}: has no column of images. Its columns are {summarize_list(features, 20)}")
    return "image" if "image" in images else images[0]


def _class_label_names(features: Mapping[str, Any]) -> list[str] | None:
    """Return the names of the categories if their feature is a `ClassLabel`."""
    objects = _unwrap_lists(_first(features, _OBJECTS) or features)
    category = _first(objects, _CATEGORIES) if isinstance(objects, Mapping) else None
    return getattr(_unwrap_lists(category), "names", None)


def _unwrap_lists(feature: Any) -> Any:
    """Return the feature of the items of a list, or of a list of lists."""
    while hasattr(feature, "feature"):
        feature = feature.feature
    return feature
