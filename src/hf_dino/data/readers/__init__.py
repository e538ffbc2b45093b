"""Read a dataset in any of the usual formats, which is detected automatically."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ...utils.errors import InputError, summarize_list
from ..dataset import SPLITS, DetectionSplit, logger, raise_input_error, require_image_files
from ..images import find_unused_images
from .coco import find_coco, find_single_coco_file, read_coco, read_coco_file, read_coco_files
from .common import DEFAULT_OPTIONS, ReadOptions, split_from_name
from .hf_datasets import find_imagefolder, find_saved, is_hub_id, load_from_hub, read_tables, stream
from .voc import find_voc, read_voc
from .yolo import find_yolo_folders, find_yolo_yaml, read_yolo


__all__ = ["ReadOptions", "read_coco", "read_coco_file", "read_data", "split_from_name"]


UNUSED_WARNING = "images of the directory are in no split: not used"


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

# The first match is taken, so the most specific signatures come first.
FORMATS = (
    TABLES,
    Format("YOLO", "a YAML file with names and train, val or test", find_yolo_yaml, read_yolo),
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
)


def read_data(
    source: str | Path,
    *,
    splits: Sequence[str] = (),
    streaming: bool = False,
    max_samples: int | None = None,
    cache_dir: str | Path | None = None,
    options: ReadOptions = DEFAULT_OPTIONS,
) -> dict[str, DetectionSplit]:
    """Read a detection dataset. Its files are never changed.

    A directory may be in the format of COCO, Pascal VOC, YOLO or Hugging Face `datasets`, which is detected
    automatically. Any other name is an id on the Hub. Boxes that are empty, non-finite or outside their image are
    dropped. Boxes that extend beyond the image are kept and counted. Both are logged, and so are images of the
    directory that are in no split, if all splits are read.

    Args:
        source (`str` or `Path`): A directory, or an id on the Hub: `OWNER/NAME[:CONFIGURATION][@REVISION]`.
        splits (`Sequence[str]`, *optional*): Any of `"train"`, `"validation"` and `"test"`, which must exist; by
            default all that exist. The dataset may name them differently, such as `val` or `train2017`; a dataset
            without splits is `"train"`. Classes that are given only as names with the objects are numbered over all
            splits, even if only some are read, but for a stream over those that are read.
        streaming (`bool`, *optional*, defaults to `False`): Stream a dataset of `datasets` instead of downloading it
            completely. The images are kept in a cache, because training reads them repeatedly and in any order.
        max_samples (`int`, *optional*): Number of images of each split to stream, from its beginning.
        cache_dir (`str` or `Path`, *optional*): Cache directory of a stream; by default that of `datasets`.
        options (`ReadOptions`, *optional*): What the files do not say, such as the names of columns.

    Returns:
        `dict[str, DetectionSplit]`: By split, in the order above.

    Raises:
        InputError: If the source is in no known format, is inconsistent, or lacks a split or images, or if
            `max_samples` or `cache_dir` is given without `streaming`.
        ImportError: If a package that the format needs is not installed.
    """
    if unknown := set(splits) - set(SPLITS):
        raise InputError(f"unknown splits: {summarize_list(sorted(unknown))}. Choose from {summarize_list(SPLITS)}")
    if not streaming and (max_samples is not None or cache_dir is not None):
        raise InputError("max_samples and cache_dir require streaming. Add streaming, or remove them")
    format, found = _find_splits(source, splits, streaming, max_samples, Path(cache_dir) if cache_dir else None)
    available = [split for split in SPLITS if split in found]
    if missing := [split for split in splits if split not in available]:
        raise InputError(f"{source}: split {summarize_list(missing)} not found. It has {summarize_list(available)}")
    selected = {split: found[split] for split in available if not splits or split in splits}
    contents = {
        split: replace(each, format=format.name) for split, each in format.read(selected, source, options).items()
    }
    if options.on_error is raise_input_error:
        for each in contents.values():
            require_image_files(each)
    return contents if splits or not Path(source).is_dir() else _add_unused_images(Path(source), contents)


def _add_unused_images(folder: Path, contents: dict[str, DetectionSplit]) -> dict[str, DetectionSplit]:
    """Add a warning to the first split, which is that of training, about images of the directory in no split."""
    images = [image.path for split in contents.values() for image in split.images]
    unused = find_unused_images(folder, [path for path in images if isinstance(path, Path)])
    if unused:  # rows of a table have the paths of their files, which take time to read
        names = [getattr(image, "file_name", None) for image in images]
        unused = sorted({*unused} & {*find_unused_images(folder, [Path(name) for name in names if name])})
    if not unused:
        return contents
    logger.warning("%s: %d %s", folder, len(unused), UNUSED_WARNING)
    first, split = next(iter(contents.items()))
    return contents | {first: replace(split, warnings={**split.warnings, UNUSED_WARNING: unused})}


def _find_splits(
    source: str | Path, splits: Sequence[str], streaming: bool, max_samples: int | None, cache_dir: Path | None
) -> tuple[Format, Mapping[str, Any]]:
    """Return the format of the source and its splits."""
    if streaming:
        return TABLES, stream(str(source), splits, max_samples, cache_dir)
    folder = Path(source)
    if folder.is_dir():
        return detect_format(folder)
    if folder.exists():
        raise InputError(f"{source}: is a file. Give the dataset's directory, or --images and --annotations")
    if not isinstance(source, str) or not is_hub_id(source):
        raise InputError(f"{source}: directory not found, and not an id on the Hub")
    return TABLES, load_from_hub(source)


def detect_format(folder: Path) -> tuple[Format, Mapping[str, Any]]:
    """Return the format of a directory, and the files of each split.

    Raises:
        InputError: If the directory is in no known format.
    """
    for format in FORMATS:
        if found := format.find(folder):
            return format, found
    signatures = "".join(f"\n  {format.name}: {format.signature}" for format in FORMATS)
    entries = summarize_list(sorted(entry.name for entry in folder.iterdir()), 10) or "nothing"
    raise InputError(f"{folder}: is not in a known format. Looked for:{signatures}\nThe directory contains {entries}")
