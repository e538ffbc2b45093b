"""Read tables of Hugging Face `datasets`, of which each row is an image with its objects.

They are boxes (x, y, width, height in pixels) and categories in a column `objects`, as in
https://huggingface.co/docs/datasets/image_dataset#object-detection, or in one of the other ways that are usual on the
Hub.
"""

import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ...utils.errors import InputError, count_of, import_extra, summarize_list
from ...utils.names import to_integer
from ..dataset import AnnotatedImageBuilder, DetectionSplit, check_unique_names, to_float
from ..images import ImageSource
from .columns import (
    FIELDS,
    REQUIRED,
    Columns,
    ObjectsNotFoundError,
    find_columns,
    find_fields,
    find_image_column,
    import_datasets,
    objects_not_found,
)
from .common import ReadOptions, boxes_to_xywh, excerpt, to_size
from .files import RENAMED_WARNING, find_image_files


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
_OF_IMAGES = ("image_id", "height", "width")
_NO_ANNOTATIONS = "images have no annotations: treated as images without objects"
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
        return io.BytesIO(read_bytes(self.table[self.row][self.column]))

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


class TableContent(NamedTuple):
    """The rows of a table.

    Attributes:
        rows (`list[Row]`): In order.
        class_names (`list[str]` or `None`): Names of the categories if these are numbers of a `ClassLabel`.
    """

    rows: list[Row]
    class_names: list[str] | None


_NO_OBJECTS = Row(None, None, np.empty((0, 4)), (), (), (), is_annotated=False)


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
    used: dict[int | str, str] = {}
    for split, content in contents.items():
        used |= _used_categories(content, builders[split].title)
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
        except ObjectsNotFoundError:
            if split != "test" or not contents:
                raise
            class_names = next(iter(contents.values())).class_names
            contents[split] = TableContent([_NO_OBJECTS] * len(tables.table), class_names)
    return contents


def _used_categories(content: TableContent, title: str) -> dict[int | str, str]:
    """Map the categories that a table gives with its objects, rather than as `ClassLabel`, to a row that has each."""
    rows = [*enumerate(content.rows)] if content.class_names is None else []
    first = {_to_category(category): index for index, row in reversed(rows) for category in row.categories}
    return {category: f"{title}, row {index}" for category, index in first.items() if category is not None}


def _categories_of_unread(splits: Mapping[str, TableSplit], options: ReadOptions) -> dict[int | str, str]:
    """Return the categories used in splits that are not read, each with the split and row that has it."""
    tables = {split: table for each in splits.values() for split, table in each.all_tables.items()}
    used: dict[int | str, str] = {}
    for split in [split for split in tables if split not in splits]:
        with suppress(InputError):  # a test split may be published without annotations
            used |= _used_categories(_read_table(tables[split], options, split), split)
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
    if unknown := [excerpt(row.categories[index]) for index, id_ in found.items() if id_ is None]:
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
    if any(row.image_id is not None for row in rows):
        builder.add_warnings("images have no id of their own that is a whole number: numbered", filter(None, invalid))
    return [None] * len(ids) if invalid else [*ids]


def _find_images(
    tables: TableSplit, names: Mapping[str, str], builder: AnnotatedImageBuilder
) -> list[ImageSource | None]:
    """Return the images of a table, `None` for those that are reported because their files are missing."""
    column = find_image_column(tables.table.features, names, builder.title)
    encoded = load_table(f"{builder.title}, column {column}", partial(encoded_images, tables.table, column))
    paths = load_table(builder.title, partial(image_files, encoded, column))
    # unlike `Path.is_file`, it takes text of any length
    missing = [row for row, path in enumerate(paths) if path is not None and not os.path.isfile(path)]  # noqa: PTH113
    renamed = _find_renamed(paths, missing, tables.folder, builder) if tables.folder and missing else {}
    if lost := [row for row in missing if row not in renamed]:
        examples = summarize_list(f"{(paths[row] or 'no name')[:_MAX_TEXT]} (row {row})" for row in lost)
        builder.on_error(
            f"{builder.title}: {count_of(len(lost), 'image')} not found: {examples}. Restore them, or remove their "
            f"rows"
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
    builder.add_warnings(RENAMED_WARNING, renamed.values())
    return renamed


def encoded_images(table: Any, column: str) -> Any:
    """Return a table of one column of images, which are not decoded when rows are read."""
    images = table.with_format(None).select_columns([column])  # a saved table may be set to return tensors
    return images.cast_column(column, import_datasets().Image(decode=False))


def image_files(images: Any, column: str) -> list[str | None]:
    """Return the path of each image that is a file of its own, empty if it has none; `None` for others.

    Args:
        images (`datasets.Dataset`): From [`encoded_images`].
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


def read_bytes(image: Mapping[str, Any] | None) -> bytes:
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


def _read_table(table: Any, options: ReadOptions, title: str) -> TableContent:
    """Read the annotations of all rows.

    Raises:
        InputError: If a column is not found, or a row is not as expected.
    """
    columns = find_columns(table.features, options.columns, title)
    rows = load_table(title, partial(_read_columns, table, columns, options.columns))
    objects = [
        _to_dict_of_lists(row if columns.objects is None else row[columns.objects], f"{title}, row {index}")
        for index, row in enumerate(rows)
    ]
    keys = columns.fields or dict.fromkeys(key for each in objects for key in each or ())
    fields = find_fields(keys, options.columns)
    if keys and not fields.keys() >= REQUIRED:
        raise objects_not_found(title, f"{columns.objects}: {{{', '.join(keys)}}}")
    if keys.keys() >= {*FIELDS["iscrowd"]}:
        raise InputError(f"{title}: objects have both {' and '.join(FIELDS['iscrowd'])}. Rename or remove one of them")
    category = keys.get(fields.get("category", ""))
    return TableContent(
        [
            _to_row(row, each, fields, options.box_format, f"{title}, row {index}")
            for index, (row, each) in enumerate(zip(rows, objects))
        ],
        getattr(category.feature, "names", None) if category else None,
    )


def _read_columns(table: Any, columns: Columns, names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return all rows, with those columns only that are needed: not with the images."""
    objects = {columns.objects} if columns.objects else {*find_fields(columns.fields or (), names).values()}
    needed = [name for name in table.column_names if name in objects | {*_OF_IMAGES}]
    return [*table.with_format(None).select_columns(needed)]  # a saved table may be set to return tensors


def _to_dict_of_lists(objects: Any, where: str) -> Mapping[str, Any] | None:
    """Return the objects of an image as a dict of lists. They may be a list of dicts, and either may be JSON."""
    objects = _parse_json(objects, "its objects", where)
    if isinstance(objects, list) and all(isinstance(each, dict) for each in objects):
        keys = dict.fromkeys(key for each in objects for key in each)
        return {key: [each.get(key) for each in objects] for key in keys}
    if not isinstance(objects, dict | None):
        raise InputError(
            f"{where}: the objects of an image must be a list of dicts or a dict of lists, got {excerpt(objects)}"
        )
    return objects


def _parse_json(value: Any, name: str, where: str) -> Any:
    """Return a value, parsed if it is text, as in CSV files. Empty text is `None`."""
    try:
        return json.loads(value.strip() or "null") if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where}: {name} must be a list with one item for each object or JSON ({error}), got {excerpt(value)}"
        ) from None


def _to_row(
    row: Mapping[str, Any], objects: Mapping[str, Any] | None, fields: Mapping[str, str], box_format: str, where: str
) -> Row:
    lists = {content: _to_list((objects or {}).get(name), name, where) for content, name in fields.items()}
    given = {content: [] for content in REQUIRED} | {key: each for key, each in lists.items() if each is not None}
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
        is_annotated=objects == {} or any(lists.get(content) is not None for content in REQUIRED),
    )


def _to_list(value: Any, name: str, where: str) -> list[Any] | None:
    values = _parse_json(value, name, where)
    if not isinstance(values, list | None):
        raise InputError(f"{where}: {name} must be a list with one item for each object or JSON, got {excerpt(value)}")
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
        raise InputError(f"{where}: a box must be a list of 4 numbers, or have {expected}; got {excerpt(box)}")
    return boxes_to_xywh([[sides[name] for name in names]], _SIDES[names])[0]


def _to_size(height: Any, width: Any, where: str) -> tuple[int, int] | None:
    """Return the annotated size in pixels, `None` if a side is missing or 0."""
    sides = [to_integer(to_float(side or 0)) for side in (height, width)]
    if any(side is None or side < 0 for side in sides):
        raise InputError(
            f"{where}: height and width must be positive integers, got {excerpt(height)} and {excerpt(width)}"
        )
    return to_size(*sides)


def load_table(title: Path | str, load: Callable[[], Any], *, from_hub: bool = False) -> Any:
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
