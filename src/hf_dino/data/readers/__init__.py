"""Read a dataset in any of the usual formats, which is detected automatically."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...utils.errors import InputError, summarize_list
from ..dataset import SPLITS, DetectionSplit, logger, raise_input_error, require_image_files
from ..images import find_unused_images
from .coco import read_coco, read_coco_file
from .common import DEFAULT_OPTIONS, ReadOptions, check_options, split_from_name
from .formats import FILE_FORMATS, TABLES, Format, describe_files, detect_file_format, detect_format
from .hf_datasets import is_hub_id, load_from_hub, stream


__all__ = ["ReadOptions", "describe_files", "read_coco", "read_coco_file", "read_data", "split_from_name"]


UNUSED_WARNING = "images of the directory are in no split: not used"


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
    automatically. A file may be the YAML file of a YOLO dataset or a COCO annotation file. Any other name is an id on
    the Hub. Boxes that are empty, non-finite or outside their image are dropped. Boxes that extend beyond the image
    are kept and counted. Both are logged, and so are images of the directory that are in no split, if all are read.

    Args:
        source (`str` or `Path`): A directory or file, or an id on the Hub: `OWNER/NAME[:CONFIGURATION][@REVISION]`.
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
    format, found = _find_splits(
        source, splits, streaming, max_samples, Path(cache_dir) if cache_dir else None, options.columns
    )
    check_options(source, format.name, options)
    available = [split for split in SPLITS if split in found]
    if missing := [split for split in splits if split not in available]:
        raise InputError(
            f"{source}: split {summarize_list(missing)} not found. It has {summarize_list(available)}: choose one, or "
            "make others with hf-dino data split"
        )
    selected = {split: found[split] for split in available if not splits or split in splits}
    origin = Path(source) if Path(source).exists() else source
    contents = {
        split: replace(each, format=format.name, box_format=options.box_format)
        for split, each in format.read(selected, origin, options).items()
    }
    if options.on_error is raise_input_error:
        for each in contents.values():
            require_image_files(each)
    return contents if splits or streaming or not Path(source).is_dir() else _add_unused_images(Path(source), contents)


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
    source: str | Path,
    splits: Sequence[str],
    streaming: bool,
    max_samples: int | None,
    cache_dir: Path | None,
    columns: Mapping[str, str],
) -> tuple[Format, Mapping[str, Any]]:
    """Return the format of the source and its splits."""
    path = Path(source)
    if path.is_file() or (path.suffix.lower() in FILE_FORMATS and not path.exists()):
        return detect_file_format(path, streaming)
    if streaming:
        if not path.exists():
            _check_hub_id(str(source))
        return TABLES, stream(str(source), splits, max_samples, cache_dir, columns)
    if path.is_dir():
        return detect_format(path)
    if not isinstance(source, str) or not is_hub_id(source):
        raise InputError(
            f"{source}: directory not found, and not an id on the Hub (OWNER/NAME[:CONFIGURATION][@REVISION])"
        )
    _check_hub_id(source)
    try:
        return TABLES, load_from_hub(source)
    except ImportError as error:
        raise ImportError(f"{source}: directory not found, and as an id on the Hub, {error}") from error


def _check_hub_id(source: str) -> None:
    """Check that a name is not rather a directory that is missing: it has an owner or a revision."""
    if not set("/@") & set(source):
        raise InputError(
            f"{source}: directory not found. If it is a dataset on the Hub, write OWNER/{source}, or {source}@main if "
            "it has no owner"
        )
