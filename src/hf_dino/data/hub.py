"""Datasets of Hugging Face `datasets`: folders of images with metadata, saved ones, and names on the Hub.

Each row is an image with a column `objects` of boxes (x, y, width, height in pixels) and categories, as in
https://huggingface.co/docs/datasets/image_dataset#object-detection.
"""

import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple, TypeVar

from tqdm import tqdm

from ..utils.errors import InputError, summarize_list
from ..utils.io import annotate_oserror, atomic_write, read_text
from .dataset import AnnotatedImageBuilder, DetectionSplit, ErrorHandler, distinct
from .extras import import_extra
from .images import IMAGE_EXTENSIONS, ImageSource
from .splits import SPLITS, split_from_name


# the names that columns have in the datasets on the Hub, the first found is meant
_OBJECTS = ("objects", "annotations")
_BOXES = ("bbox", "bboxes", "boxes", "box")
_CATEGORIES = ("category", "categories", "category_id", "category_ids", "label", "labels", "class_labels")
_CROWDS = ("iscrowd", "is_crowd")
_OF_IMAGE = ("image_id", "height", "width")
_USED = frozenset({*_OBJECTS, *_BOXES, *_CATEGORIES, *_CROWDS, *_OF_IMAGE, "area"})

_NAME = re.compile(r"(?P<path>[\w.-]+(/[\w.-]+)?)(:(?P<name>[\w.-]+))?(@(?P<revision>[\w.-]+))?")
_READ_AHEAD = 32  # images of a stream fetched at once

T = TypeVar("T")


@dataclass(frozen=True)
class TableImage:
    """An image in a table of `datasets`, read when asked for. Other processes get the table's file, not its bytes.

    Attributes:
        table (`datasets.Dataset`): With the undecoded images in `column`.
        column (`str`): Of the images.
        row (`int`): Counted from 0.
        title (`str`): Of the table.
    """

    table: Any
    column: str
    row: int
    title: str

    def open(self, mode: str = "rb", /) -> BinaryIO:
        """Open the encoded image."""
        return io.BytesIO(_content(self.table[self.row][self.column]))

    def __str__(self) -> str:
        return f"{self.title}, row {self.row}: {self.table[self.row][self.column]['path'] or 'image without name'}"


class TableSplit(NamedTuple):
    """Where a split is.

    Attributes:
        table (`datasets.Dataset`): Of the split.
        all_tables (`dict[str, datasets.Dataset]`): Of all splits, whose classes are numbered together.
    """

    table: Any
    all_tables: Mapping[str, Any]


class Row(NamedTuple):
    """One row: its image, and what it says of it.

    Attributes:
        image (`Path` or `ImageFileLike`): The image.
        said (`dict`): Those columns of the row that are of use.
    """

    image: ImageSource
    said: Mapping[str, Any]


def find_saved(folder: Path) -> dict[str, TableSplit]:
    """Find what `save_to_disk` wrote."""
    if not (folder / "dataset_dict.json").is_file() and not all(
        (folder / name).is_file() for name in ("dataset_info.json", "state.json")
    ):
        return {}
    return _table_splits(_load(str(folder), lambda: _datasets().load_from_disk(str(folder))), folder)


def find_imagefolder(folder: Path) -> dict[str, TableSplit]:
    """Find images with metadata files, divided into folders of splits or not, or Parquet files."""
    patterns = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "*.parquet")
    if not any(any(folder.glob(f"{depth}{pattern}")) for depth in ("", "*/") for pattern in patterns):
        return {}
    return _table_splits(_load(str(folder), lambda: _datasets().load_dataset(str(folder))), folder)


def load_name(name: str) -> dict[str, TableSplit]:
    """Load the splits of a dataset on the Hub: `owner/name`, with `:configuration` and `@revision` if need be."""
    options = _parse(name)
    return _table_splits(_load(name, lambda: _datasets().load_dataset(**options)), name)


def is_name(text: str) -> bool:
    """Whether this could be a name on the Hub."""
    return _NAME.fullmatch(text) is not None


def _parse(name: str) -> dict[str, str]:
    if Path(name).is_dir():
        return {"path": name}
    match = _NAME.fullmatch(name)
    if match is None:
        raise InputError(f"{name}: is neither a folder nor a name on the Hub, OWNER/NAME[:CONFIGURATION][@REVISION]")
    owner = Path(match["path"]).parent
    if not match["revision"] and owner.name and owner.is_dir():  # a slip; the Hub would be asked for a minute
        held = summarize_list(sorted(entry.name for entry in owner.iterdir()))
        raise InputError(f"{name}: there is no such folder; {owner} holds {held}. On the Hub it is {name}@main")
    return {key: value for key, value in match.groupdict().items() if value}


def _datasets() -> ModuleType:
    return import_extra("datasets", "hub-data", "reading Hugging Face datasets")


def _load(name: str, load: Any) -> Any:
    try:
        return load()
    except (_datasets().exceptions.DatasetsError, OSError, ValueError) as error:
        raise InputError(
            f"{name}: {'' if Path(name).is_dir() else 'is no folder here, and '}`datasets` cannot load it ({error}). "
            "If it has several configurations, write NAME:CONFIGURATION"
        ) from None


def _table_splits(loaded: Any, source: Path | str) -> dict[str, TableSplit]:
    tables = _by_split(loaded, source)
    return {split: TableSplit(table, tables) for split, table in tables.items()}


def _by_split(loaded: Any, source: Path | str) -> dict[str, Any]:
    """Sort tables by split; a single one that is named after none is for training."""
    tables = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    if len(tables) == 1 and split_from_name(next(iter(tables))) is None:
        tables = {"train": next(iter(tables.values()))}
    names = {split: [name for name in tables if split_from_name(name) == split] for split in SPLITS}
    for split, candidates in names.items():
        if len(candidates) > 1:
            raise InputError(
                f"{source}: cannot tell which is the {split} split: {summarize_list(candidates)}; write a dataset with one of "
                "each by save_to_disk"
            )
    ordered = {split: tables[candidates[0]] for split, candidates in names.items() if candidates}
    if not ordered:
        raise InputError(
            f"{source}: none of its splits is called after {summarize_list(SPLITS)}: {summarize_list(tables)}"
        )
    return ordered


def read_tables(
    splits: Mapping[str, TableSplit], source: Path | str, on_error: ErrorHandler
) -> dict[str, DetectionSplit]:
    """Read tables of `datasets`. Their images stay where they are: on disk, in Arrow files or beside them.

    Classes that are named by words at the objects are numbered from 0 in the order of words, over all splits of the
    dataset, whichever are read: ids in a file of results are the same every time.
    """
    rows = {split: list(_table_rows(each.table, f"{source} ({split})")) for split, each in splits.items()}
    names = {split: _class_names(each.table.features) for split, each in splits.items()}
    unread = {
        split: table for each in splits.values() for split, table in each.all_tables.items() if split not in splits
    }
    return _read_rows(rows, names, source, on_error, _categories(unread) if None in names.values() else ())


def _categories(tables: Mapping[str, Any]) -> Iterator[Any]:
    """The categories of all objects, as far as the tables can be read: the labels of a test may be kept secret."""
    for split, table in tables.items():
        with suppress(InputError):
            for row in _table_rows(table, split):
                yield from _columns(row, split)[1]


def _table_rows(table: Any, title: str) -> Iterator[Row]:
    table = table.with_format(None)  # a saved table may give tensors
    column = _image_column(table.features, title)
    images = table.select_columns([column]).cast_column(column, _datasets().Image(decode=False))
    said = table.select_columns([name for name in table.column_names if name in _USED])
    for number, row in enumerate(said):
        yield Row(TableImage(images, column, number, title), row)


def read_stream(
    name: str, splits: Sequence[str], limit: int | None, cache: Path | None, on_error: ErrorHandler
) -> dict[str, DetectionSplit]:
    """Read a dataset as it comes over the net, keeping its images in a folder of their own.

    Training asks for images in any order and again, and a resumed run for exactly those that the interrupted one
    would have seen, which a stream cannot give. So on the first pass the images are written as they are encoded,
    each once it is complete, with what is said of them in a file `metadata.jsonl`; a pass that was cut short goes on
    where it was. What comes out is a folder of images like any other. Without `limit` it saves no space on the disk
    compared to a download, only the second copy in Arrow files.

    Classes that are named by words at the objects are numbered over what is read: which words the other splits and
    images have is not known before they are fetched.

    Args:
        name (`str`): On the Hub, or a folder.
        splits (`Sequence[str]`): To read, if there are any; else all.
        limit (`int` or `None`): The most images of a split, the first ones.
        cache (`Path` or `None`): The folder; by default one beside what `datasets` itself keeps of this very version.
        complain (`Callable`): Is told of what stops a training.

    Raises:
        InputError: If the folder holds anything else than this very stream.
    """
    options = _parse(name)
    builder = _load(name, lambda: _datasets().load_dataset_builder(**options))
    streams = _by_split(_load(name, builder.as_streaming_dataset), name)
    cache = cache or Path(f"{builder.cache_dir}-images")
    path = str(Path(name).resolve()) if Path(name).is_dir() else options["path"]
    _claim(cache, {"name": path, "configuration": builder.config_id, "revision": builder.hash})
    chosen = {split: stream for split, stream in streams.items() if not splits or split in splits}
    rows = {split: _keep(stream, cache / split, f"{name} ({split})", limit) for split, stream in chosen.items()}
    names = {split: _class_names(stream.features) for split, stream in chosen.items()}
    return _read_rows(rows, names, name, on_error)


def _claim(cache: Path, stream: Mapping[str, str]) -> None:
    """Note in a folder, when it is first used, which stream it keeps; refuse it if it holds anything else."""
    file, said = cache / "stream.json", json.dumps(stream)
    with _locked(cache):
        if not file.exists():
            # hidden are the lock, and what a process leaves that was killed just here
            if held := sorted(entry.name for entry in cache.iterdir() if not entry.name.startswith(".")):
                raise InputError(
                    f"{cache}: holds {summarize_list(held)}, and no stream; give a new or empty folder to keep one"
                )
            with atomic_write(file) as temporary:
                temporary.write_text(said, encoding="utf-8")
        if (kept := read_text(file)) != said:
            raise InputError(f"{cache}: keeps the stream {kept}, not {said}; give another folder, or remove this one")


def _locked(folder: Path) -> Any:
    """Make a folder that one process at a time uses within this context."""
    folder.mkdir(parents=True, exist_ok=True)
    filelock = import_extra("filelock", "hub-data", "reading a stream")  # what `datasets` locks with
    return filelock.FileLock(folder / ".lock")


def _keep(stream: Any, folder: Path, title: str, limit: int | None) -> list[Row]:
    """Write what is missing of a stream's first `limit` images, and return the rows."""
    if stream.features is None:
        raise InputError(f"{title}: cannot be streamed, since its columns are not known beforehand; do without")
    column = _image_column(stream.features, title)
    with _locked(folder):  # the other processes of a run wait, then find everything there
        rows = _kept_rows(folder)
        missing = None if limit is None else max(0, limit - len(rows))
        if missing != 0 and not (folder / "complete").is_file():
            new = [
                *_write_rows(islice(stream.decode(False).skip(len(rows)), missing), column, folder, len(rows), title)
            ]
            if missing is None or len(new) < missing:
                (folder / "complete").touch()
            rows += new
    return [Row(folder / row["file_name"], row) for row in rows[:limit]]


def _kept_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows written so far; a last line that was cut short is taken off the file."""
    file = folder / "metadata.jsonl"
    written = file.read_bytes() if file.is_file() else b""
    whole = written[: written.rfind(b"\n") + 1]
    if len(whole) < len(written):
        os.truncate(file, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def _write_rows(rows: Iterable[dict], column: str, folder: Path, first: int, title: str) -> Iterator[dict[str, Any]]:
    with open(folder / "metadata.jsonl", "a", encoding="utf-8") as file, ThreadPoolExecutor(_READ_AHEAD) as pool:
        progress = tqdm(_fetched(rows, column, pool), desc=f"fetching {title}", initial=first, disable=None)
        for number, (row, content) in enumerate(progress, start=first):
            suffix = Path(row[column]["path"] or "").suffix.lower()
            path = folder / f"{number:08}{suffix if suffix in IMAGE_EXTENSIONS else ''}"
            kept = {"file_name": path.name, **{name: value for name, value in row.items() if name in _USED}}
            with annotate_oserror(folder):
                path.write_bytes(content)  # an image is there once its line is: half a one is written anew
                file.write(json.dumps(kept) + "\n")
                file.flush()
            yield kept


def _fetched(rows: Iterable[dict], column: str, pool: ThreadPoolExecutor) -> Iterator[tuple[dict, bytes]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, _READ_AHEAD)):
        yield from zip(batch, pool.map(lambda row: _content(row[column]), batch))


def _content(stored: Mapping[str, Any]) -> bytes:
    """The encoded image, from the table or from the file or address that it names."""
    if stored["bytes"] is not None:
        return stored["bytes"]
    # knows local paths and every address that `datasets` gives
    fsspec = import_extra("fsspec", "hub-data", "reading Hugging Face datasets")
    with fsspec.open(stored["path"], "rb") as file:
        return file.read()


def _read_rows(
    rows: Mapping[str, Sequence[Row]],
    names: Mapping[str, Sequence[str] | None],
    source: Path | str,
    on_error: ErrorHandler,
    other_categories: Iterable[Any] = (),
) -> dict[str, DetectionSplit]:
    columns = {split: [_columns(row, f"{source} ({split})") for row in found] for split, found in rows.items()}
    categories_read = (category for split in columns.values() for each in split for category in each[1])
    found_names = _found_names(chain(categories_read, other_categories))
    data = {}
    for split, found in rows.items():
        listed = names[split]
        categories = found_names if listed is None else distinct(dict(enumerate(listed)), source)
        ids: dict[Any, int] = {number: number for number in categories} | {n: i for i, n in categories.items()}
        maker = AnnotatedImageBuilder(source, split, on_error)
        image_ids = _distinct_ids([row.said.get("image_id") for row in found])
        for row, image_id, (boxes, named, areas, crowds) in zip(found, image_ids, columns[split]):
            known = [i for i, name in enumerate(named) if name in ids]
            if len(known) < len(named):
                on_error(f"{row.image}: objects of unknown categories: {summarize_list(set(named) - ids.keys())}")
            maker.add(
                row.image,
                _size(row.said),
                [boxes[i] for i in known],
                [ids[named[i]] for i in known],
                image_id=image_id,
                areas=[areas[i] for i in known],
                iscrowd=[crowds[i] for i in known],
            )
        data[split] = maker.finish(categories)
    return data


def _columns(row: Row, title: str) -> tuple[Sequence[Any], ...]:
    """Boxes, categories, areas and crowd marks of a row's objects, equally many."""
    objects = next((row.said[name] for name in _OBJECTS if name in row.said), row.said)
    objects = json.loads(objects or "{}") if isinstance(objects, str) else objects  # from a CSV file
    if isinstance(objects, list):  # of objects, rather than a list for each of their columns
        objects = {key: [each.get(key) for each in objects] for key in (objects[0] if objects else ())}
    if not objects:
        return (), (), (), ()
    boxes, named = _first(objects, _BOXES), _first(objects, _CATEGORIES)
    if boxes is None or named is None or len(boxes) != len(named):
        raise InputError(
            f"{title}: the objects of an image need boxes ({summarize_list(_BOXES)}) and as many categories "
            f"({summarize_list(_CATEGORIES, 9)}); got {str(objects)[:200]}"
        )
    areas, crowds = _first(objects, ("area",)), _first(objects, _CROWDS)
    return boxes, named, areas or [None] * len(boxes), crowds or [0] * len(boxes)


def _first(columns: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((columns[name] for name in names if columns.get(name) is not None), None)


def _found_names(categories: Iterable[Any]) -> dict[int, str]:
    """Number the categories that are named by words from 0, in the order of words; numbers stay what they are."""
    found = set(categories)
    if all(isinstance(category, int) for category in found):
        return {number: str(number) for number in sorted(found)}
    return dict(enumerate(sorted(map(str, found))))


def _distinct_ids(image_ids: Sequence[Any]) -> Sequence[int | None]:
    """The ids, or none where they are not distinct whole numbers."""
    usable = all(type(image_id) is int for image_id in image_ids) and len(set(image_ids)) == len(image_ids)
    return image_ids if usable else [None] * len(image_ids)


def _size(said: Mapping[str, Any]) -> tuple[int, int] | None:
    height, width = said.get("height"), said.get("width")
    return (int(height), int(width)) if height and width else None


def _image_column(features: Mapping[str, Any], title: str) -> str:
    images = [name for name, feature in features.items() if isinstance(feature, _datasets().Image)]
    if not images:
        raise InputError(f"{title}: has no column of images; its columns are {summarize_list(features, 20)}")
    return "image" if "image" in images else images[0]


def _class_names(features: Mapping[str, Any]) -> list[str] | None:
    """The names of a `ClassLabel` of the objects' categories, if it is one."""
    objects = _unwrapped(_first(features, _OBJECTS) or features)
    category = _first(objects, _CATEGORIES) if isinstance(objects, Mapping) else None
    return getattr(_unwrapped(category), "names", None)


def _unwrapped(feature: Any) -> Any:
    """What a list, or a list of lists, is of."""
    while hasattr(feature, "feature"):
        feature = feature.feature
    return feature
