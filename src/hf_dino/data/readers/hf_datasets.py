"""Load datasets with Hugging Face `datasets`: directories of images with metadata, saved datasets, ids on the Hub."""

import glob
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...utils.errors import InputError, summarize_list
from ..dataset import SPLIT_ALIASES, SPLITS
from .columns import find_image_column, import_datasets
from .common import group_by_split, split_from_name, subfolders
from .tables import TableSplit, encoded_images, image_files, load_table, read_bytes


logger = logging.getLogger(__name__)

_METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_HUB_ID = re.compile(r"(?P<path>[\w.-]+(/[\w.-]+)?)(:(?P<name>[\w.-]+))?(@(?P<revision>[\w.-]+))?")
_NUM_FETCHED_AT_ONCE = 32  # images of a stream


def find_saved(folder: Path) -> dict[str, TableSplit]:
    """Find what `save_to_disk` wrote."""
    if not (folder / "dataset_dict.json").is_file() and not all(
        (folder / name).is_file() for name in ("dataset_info.json", "state.json")
    ):
        return {}
    return _to_splits(load_table(folder, lambda: import_datasets().load_from_disk(str(folder))), folder)


def find_imagefolder(folder: Path) -> dict[str, TableSplit]:
    """Find Parquet files, or images with a metadata file, in the directory or in those of splits."""
    patterns = (*_METADATA_FILES, "*.parquet")
    if not any(any(folder.glob(f"{depth}{pattern}")) for depth in ("", "*/") for pattern in patterns):
        return {}
    splits = _to_splits(load_table(folder, lambda: import_datasets().load_dataset(**_load_options(folder))), folder)
    folders = {split: path for split, (path, _) in _metadata_files(folder).items()}
    if folders == {"train": folder}:
        return load_table(folder, partial(_divide_by_folder, splits["train"].table, folder))
    unread = [path.name for path in subfolders(folder) if path not in folders.values() and _is_split(path)]
    if folders and unread:
        problem = "directories have no metadata or are not named after splits: left out"
        logger.warning("%s: %s: %s", folder, problem, summarize_list(unread))
    return {split: each._replace(folder=folders.get(split)) for split, each in splits.items()}


def _is_split(folder: Path) -> bool:
    """Return whether a directory seems to be a split."""
    return split_from_name(folder.name) is not None or bool(_find_metadata(folder))


def _divide_by_folder(table: Any, folder: Path) -> dict[str, TableSplit]:
    """Divide a table by the directories of its image files, if each of these is named after a split."""
    paths = image_files(encoded_images(table, "image"), "image") if "image" in table.column_names else []
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


def _metadata_files(folder: Path) -> dict[str, tuple[Path, list[Path]]]:
    """Return the directory and the metadata files of each split, or all of them as train if no directory is named so.

    There are none if the dataset's card configures its files.

    Raises:
        InputError: If there are some in the directory itself and in those of splits.
    """
    card = folder / "README.md"
    if card.is_file() and b"\nconfigs:" in card.read_bytes():
        return {}
    inside = {path: files for path in subfolders(folder) if (files := _find_metadata(path))}
    of_split = group_by_split((path.name, path) for path in inside)
    here = [folder / name for name in _METADATA_FILES if (folder / name).is_file()]
    if here and of_split:
        directories = summarize_list(path.name for path in of_split.values())
        raise InputError(f"{folder}: has {here[0].name} in itself and in {directories}. Remove one of them")
    all_files = [*here, *(file for files in inside.values() for file in files)]
    for file in all_files:
        _check_metadata(file)
    whole = {"train": (folder, all_files)} if all_files else {}
    return {split: (path, inside[path]) for split, path in of_split.items()} or whole


def _find_metadata(folder: Path) -> list[Path]:
    """Return the metadata files of a directory that has one, and of those below it."""
    found = any((folder / name).is_file() for name in _METADATA_FILES)
    return sorted(path for name in _METADATA_FILES for path in folder.rglob(name)) if found else []


def _check_metadata(file: Path) -> None:
    """Check what `datasets` does not survive: a process that reads `null` as a row of JSON Lines crashes."""
    if not file.stat().st_size:
        raise InputError(f"{file}: is empty")
    if file.suffix == ".jsonl":
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip(b"\xef\xbb\xbf \t\r\n")[:1] not in (b"{", b""):
                    raise InputError(f"{file}: line {number} is not a JSON object: {line[:60]!r}")


def load_from_hub(hub_id: str) -> dict[str, TableSplit]:
    """Download a dataset from the Hub: `OWNER/NAME[:CONFIGURATION][@REVISION]`."""
    options = parse_hub_id(hub_id)
    return _to_splits(load_table(hub_id, lambda: import_datasets().load_dataset(**options), from_hub=True), hub_id)


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
    load = partial(load_table, source, from_hub=not Path(source).is_dir())
    builder = load(lambda: import_datasets().load_dataset_builder(**options))
    version = f"{builder.hash} {builder.config_id}"  # the one depends on the code, the other on local files
    streams = _select_by_split(load(builder.as_streaming_dataset), source)
    chosen = {split: each for split, each in streams.items() if not splits or split in splits}
    if unknown := [split for split, each in chosen.items() if each.features is None]:
        raise InputError(
            f"{source}: cannot stream {summarize_list(unknown)}, whose features are unknown. Remove --streaming"
        )
    tables = {}
    for split, each in chosen.items():
        column = find_image_column(each.features, columns, f"{source} ({split})")
        tables[split] = load(partial(_write_table, each, options, column, version, max_samples, cache_dir))
    return {split: TableSplit(table, tables) for split, table in tables.items()}


def _write_table(
    stream: Any,
    options: Mapping[str, Any],
    column: str,
    version: str,
    max_samples: int | None,
    cache_dir: Path | None,
) -> Any:
    """Write a stream into a table, or return it from the cache of `datasets` if the arguments are the same again."""
    options = {**options, "split": str(stream.split)}
    arguments = {"options": options, "column": column, "version": version, "max_samples": max_samples}
    features = stream.decode(False).cast_column(column, import_datasets().Image(decode=False)).features
    cache = None if cache_dir is None else str(cache_dir)
    return import_datasets().Dataset.from_generator(_generate_rows, features, cache_dir=cache, gen_kwargs=arguments)


def _generate_rows(
    options: Mapping[str, Any], column: str, version: str, max_samples: int | None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a streamed split with the encoded images in them. `version` only tells cached tables apart."""
    rows = import_datasets().load_dataset(**options, streaming=True).decode(False)
    rows = rows.cast_column(column, import_datasets().Image(decode=False))
    rows = rows if max_samples is None else rows.take(max_samples)
    with ThreadPoolExecutor(_NUM_FETCHED_AT_ONCE) as pool:
        for batch in rows.iter(batch_size=_NUM_FETCHED_AT_ONCE):
            images = [
                {"bytes": content, "path": image["path"] and Path(image["path"]).name}
                for image, content in zip(batch[column], pool.map(read_bytes, batch[column]))
            ]
            yield from (dict(zip(batch, values)) for values in zip(*(batch | {column: images}).values()))


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
