"""The formats of dataset directories: which one a directory or a file is in, and what else it contains."""

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ...utils.errors import InputError, count_of, summarize_list
from ..dataset import DetectionSplit
from ..images import IMAGE_EXTENSIONS
from .annotation_tools import find_labelme, is_coco, read_labelme, refuse_unsupported
from .coco import find_coco, find_coco_file, find_single_coco_file, read_coco_files
from .common import ReadOptions
from .hf_datasets import find_imagefolder, find_saved
from .tables import read_tables
from .voc import find_voc, read_voc
from .yolo import find_darknet, find_yolo_folders, find_yolo_yaml, lists_splits, read_yolo


logger = logging.getLogger(__name__)


class Format(NamedTuple):
    """A format of dataset directories.

    Attributes:
        name (`str`): Display name.
        signature (`str`): The files that identify the format, for messages.
        find (`Callable`): Returns the files of each split; empty for a directory in another format.
        read (`Callable`): Reads the splits that were found.
    """

    name: str
    signature: str
    find: Callable[[Path], Mapping[str, Any]]
    read: Callable[[Mapping[str, Any], Any, ReadOptions], dict[str, DetectionSplit]]


TABLES = Format("datasets", "dataset_dict.json, or dataset_info.json and state.json", find_saved, read_tables)
YOLO_YAML = Format("YOLO", "a YAML file with names and train, val or test", find_yolo_yaml, read_yolo)
COCO_FILE = Format("COCO", "a COCO annotation file", find_coco_file, read_coco_files)

FILE_FORMATS = {".yaml": YOLO_YAML, ".yml": YOLO_YAML, ".json": COCO_FILE}
"""Formats of which a file may be given instead of a directory, by its extension."""

# The first match is taken, so the most specific signatures come first.
FORMATS = (
    TABLES,
    YOLO_YAML,
    Format("YOLO", "obj.data with names and train, valid or test", find_darknet, read_yolo),
    Format(
        "COCO",
        "train.json, annotations/instances_train*.json or train/_annotations.coco.json",
        find_coco,
        read_coco_files,
    ),
    Format("datasets", "metadata.jsonl, metadata.csv or *.parquet, here or in train", find_imagefolder, read_tables),
    Format("Pascal VOC", "JPEGImages and Annotations with *.xml, or *.xml here or in train", find_voc, read_voc),
    Format("YOLO", "images and labels with *.txt, here or in train", find_yolo_folders, read_yolo),
    Format("COCO", "a single *.json", find_single_coco_file, read_coco_files),
    Format("LabelMe", "*.json for each image, here or in train", find_labelme, read_labelme),
)

_ANNOTATION_SUFFIXES = {
    "COCO": (".json",),
    "YOLO": (".yaml", ".yml", ".data", ".txt"),
    "Pascal VOC": (".xml",),
    "LabelMe": (".json",),
    "datasets": (".jsonl", ".csv", ".parquet", ".arrow"),
}
_STATE_FILES = ("dataset_dict.json", "dataset_info.json", "state.json")  # of a saved dataset
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_MAX_NESTED = 50  # directories that are looked into
_MAX_NAMED_FILES = 3  # of one extension


def detect_file_format(file: Path, streaming: bool) -> tuple[Format, Mapping[str, Any]]:
    """Return the format of a file that describes a dataset, and the splits that it lists."""
    format = FILE_FORMATS.get(file.suffix.lower())
    if not file.exists():
        raise InputError(f"{file}: file not found")
    if file.suffix.lower() in _ARCHIVES:
        raise InputError(f"{file}: is an archive. Unpack it, and give the directory")
    if format is None or streaming:
        kinds = "a directory or an id on the Hub" if streaming else "a directory, a YOLO *.yaml or a COCO *.json file"
        raise InputError(f"{file}: is a file, but must be {kinds}")
    if not (found := format.find(file)):
        raise InputError(f"{file}: is not {format.signature}")
    return format, found


def detect_format(folder: Path) -> tuple[Format, Mapping[str, Any]]:
    """Return the format of a directory, and the files of each split.

    Raises:
        InputError: If the directory is in no known format. The message names one that it is in, or a directory inside
            that is in a known one.
    """
    for format in FORMATS:
        if found := _find(format, folder):
            _log_other_formats(folder, format)
            return format, found
    _name_nested(folder)
    refuse_unsupported(folder)
    entries = summarize_list(sorted(entry.name for entry in folder.iterdir()), 10) or "nothing"
    signatures = "; ".join(f"{format.name}: {format.signature}" for format in FORMATS)
    raise InputError(f"{folder}: is not in a known format. It contains {entries}\nLooked for {signatures}")


def _find(format: Format, folder: Path) -> Mapping[str, Any]:
    """Return the files of each split. A JSON file that is named as COCO's may be of another format."""
    if format.name != "COCO":
        return format.find(folder)
    with suppress(InputError):
        found = format.find(folder)
        if all(is_coco(files.file) for files in found.values()):
            return found
    if find_labelme(folder):
        return {}
    refuse_unsupported(folder)
    return format.find(folder)


def _log_other_formats(folder: Path, format: Format) -> None:
    """Log in which other formats a directory contains annotations, which are not read."""
    if others := list(dict.fromkeys(_find_formats(folder, format.name))):
        logger.warning("%s: read as %s, although it is also %s", folder, format.name, summarize_list(others))


def _find_formats(folder: Path, read: str = "") -> Iterator[str]:
    """Yield the names of the formats that a directory may be in, apart from the one that is read.

    Tables of `datasets`, which would have to be loaded, are left out.
    """
    for format in FORMATS:
        with suppress(InputError, ImportError, OSError):
            found = {} if format.name in (read, "datasets") else format.find(folder)
            if found and (format.name != "COCO" or all(is_coco(files.file) for files in found.values())):
                yield format.name


def _name_nested(folder: Path) -> None:
    """Raise an error that names the directories inside which are datasets, as of an archive in a directory."""
    for pattern in ("*", "*/*"):
        folders = [path for path in sorted(folder.glob(pattern))[:_MAX_NESTED] if path.is_dir()]
        found = {path: next(_find_formats(path), None) for path in folders}
        if names := [f"{path} ({name})" for path, name in found.items() if name]:
            raise InputError(
                f"{folder}: is not a dataset itself, but contains {summarize_list(names, 3)}. Give that directory"
            )


def describe_files(source: str | Path, splits: Mapping[str, DetectionSplit]) -> str:
    """Return the format of a dataset, its annotation files, and what its directory contains besides and was not read.

    Args:
        source (`str` or `Path`): The dataset, as given to [`read_data`].
        splits (`Mapping[str, DetectionSplit]`): All that [`read_data`] returned.
    """
    format = next((data.format for data in splits.values()), "") or "COCO"
    folder = Path(source)
    if not folder.is_dir():
        return f"{format} ({folder.name if folder.exists() else source})"
    paths = [path for path in sorted(folder.rglob("*")) if "/." not in f"/{path.relative_to(folder).as_posix()}"]
    files = _annotation_files(paths)
    read = _select_read(files, folder, format, {data.source for data in splits.values()})
    also = _summarize_files(sorted({*files} - {*read}), folder)
    if format != "datasets" and (num_others := _count_others(paths, splits)):
        also.append(count_of(num_others, "image"))
    others = f"; also found: {', '.join(also)}: not read" if also else ""
    return f"{format} ({', '.join(_summarize_files(read, folder)) or folder.name}){others}"


def _annotation_files(paths: Sequence[Path]) -> list[Path]:
    """Select files with the extensions of annotation files. A text file must have the name of an image."""
    suffixes = {suffix for of_format in _ANNOTATION_SUFFIXES.values() for suffix in of_format}
    stems = {path.stem for path in paths if path.suffix.lower() in IMAGE_EXTENSIONS}
    files = [path for path in paths if path.suffix.lower() in suffixes and path.name not in _STATE_FILES]
    return [file for file in files if file.suffix != ".txt" or file.stem in stems]


def _select_read(files: Sequence[Path], folder: Path, format: str, sources: Collection[Path | str]) -> list[Path]:
    """Select the annotation files of a format: of those that list images, the ones that were read."""
    own = [file for file in files if file.suffix.lower() in _ANNOTATION_SUFFIXES[format]]
    if format == "COCO":
        return [file for file in own if file in sources]
    lists = [file for file in own if format == "YOLO" and file.suffix != ".txt"]
    read = [file for file in lists if file.parent == folder and lists_splits(file)][:1]
    return [file for file in own if file in read or file not in lists]


def _count_others(paths: Sequence[Path], splits: Mapping[str, DetectionSplit]) -> int:
    """Count the image files that are not images of a split, under whatever paths these were read."""
    images: set[Any] = {image.path for data in splits.values() for image in data.images}
    others = [path for path in paths if path.suffix.lower() in IMAGE_EXTENSIONS and path not in images]
    resolved = {path.resolve() for path in images} if others else set()
    return sum(path.resolve() not in resolved for path in others)


def _summarize_files(files: Sequence[Path], folder: Path) -> list[str]:
    """Name files relative to a directory, or count them if there are many of a kind."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for file in files:
        kinds[file.suffix].append(file.relative_to(folder).as_posix())
    return [
        name
        for suffix, names in kinds.items()
        for name in (names if len(names) <= _MAX_NAMED_FILES else [f"{len(names)} *{suffix}"])
    ]
