"""Read a dataset whatever its format, which is told by looking."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..utils.errors import InputError, summarize_list
from .coco import find_coco, find_single_coco_file, read_coco_files
from .dataset import DetectionSplit, ErrorHandler, raise_input_error, require_image_files
from .hub import find_imagefolder, find_saved, is_name, load_name, read_stream, read_tables
from .splits import SPLITS
from .voc import find_voc, read_voc
from .yolo import find_yolo_folders, find_yolo_yaml, read_yolo


class Format(NamedTuple):
    """One way in which a folder may hold a dataset.

    Attributes:
        name (`str`): For people.
        looked_for (`str`): What makes a folder one of these, for people.
        find (`Callable`): Says where each split is; nothing where the folder is of another format.
        read (`Callable`): Reads the splits that were found.
    """

    name: str
    looked_for: str
    find: Callable[[Path], Mapping[str, Any]]
    read: Callable[[Mapping[str, Any], Path, ErrorHandler], dict[str, DetectionSplit]]


# the first that finds something is taken, so those that cannot be mistaken for another come first
FORMATS = (
    Format("datasets", "dataset_dict.json, or dataset_info.json and state.json", find_saved, read_tables),
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
    limit: int | None = None,
    cache: str | Path | None = None,
    on_error: ErrorHandler = raise_input_error,
) -> dict[str, DetectionSplit]:
    """Read a dataset for detection. Nothing of it is ever changed.

    A folder may be in COCO's format, Pascal VOC's, YOLO's, or of Hugging Face `datasets`; looking at it tells. Any
    other name is looked for on the Hub. Boxes that are empty, not finite or wholly outside their image are dropped,
    boxes that reach over the border are kept and counted; both are logged.

    Args:
        source (`str` or `Path`): A folder, or a name on the Hub: `OWNER/NAME[:CONFIGURATION][@REVISION]`.
        splits (`Sequence[str]`, *optional*): Which of `"train"`, `"validation"` and `"test"` must be there and are
            read; by default those that are there. Their names in the dataset may be others, as `val` or `train2017`;
            what is not divided is `"train"`. Where classes have no numbers but names at the objects, they are numbered
            over all splits, whichever are read; those of a stream over what is read.
        streaming (`bool`, *optional*, defaults to `False`): Fetch a dataset of `datasets` image by image instead
            of downloading it whole. Since training reads images in any order and again, they are kept: in `cache`,
            encoded as they come. A pass that was cut short goes on where it was.
        limit (`int`, *optional*): Of a stream, the most images of a split.
        cache (`str` or `Path`, *optional*): Of a stream, the folder to keep it in; by default beside the cache of
            `datasets`, one for each version of the dataset. It is new, empty, or keeps this very stream.
        complain (`Callable`, *optional*): Called with each thing that stops a training and yet leaves the rest
            readable. By default the first is raised.

    Returns:
        `dict[str, DetectionSplit]`: By split, in the order above.

    Raises:
        InputError: If the source is of no known format, contradicts itself, or lacks a split or images; if `limit`
            or `cache` is given without `streaming`, or the cache is used for something else.
        ImportError: If a library is missing that this format needs.
    """
    wanted = tuple(splits)
    if unknown := set(wanted) - set(SPLITS):
        raise InputError(
            f"there are no splits called {summarize_list(sorted(unknown))}; choose of {summarize_list(SPLITS)}"
        )
    if not streaming and (limit is not None or cache is not None):
        raise InputError("limit and cache are for a stream: give streaming as well, or leave them out")
    data = (
        read_stream(str(source), wanted, limit, Path(cache) if cache else None, on_error)
        if streaming
        else _read_whole(source, wanted, on_error)
    )
    if missing := [split for split in wanted if split not in data]:
        raise InputError(
            f"{source}: has no split for {summarize_list(missing)}{f'; it has {summarize_list(data)}' if data else ''}"
        )
    return {
        split: require_image_files(each) if on_error is raise_input_error else each for split, each in data.items()
    }


def _read_whole(source: str | Path, wanted: Sequence[str], on_error: ErrorHandler) -> dict[str, DetectionSplit]:
    folder = Path(source)
    if folder.is_dir():
        form, found = _tell(folder)
        return form.read(_chosen(found, wanted), folder, on_error)
    if folder.exists():
        raise InputError(
            f"{source}: is a file; give the folder of the data, or name images and annotations one by one"
        )
    if not isinstance(source, str) or not is_name(source):
        raise InputError(f"{source}: there is no such folder, and it cannot be a name on the Hub either")
    return read_tables(_chosen(load_name(source), wanted), source, on_error)


def _chosen(found: Mapping[str, Any], wanted: Sequence[str]) -> dict[str, Any]:
    return {split: found[split] for split in SPLITS if split in found and (not wanted or split in wanted)}


def _tell(folder: Path) -> tuple[Format, Mapping[str, Any]]:
    for form in FORMATS:
        if found := form.find(folder):
            return form, found
    looked_for = "".join(f"\n  {form.name}: {form.looked_for}" for form in FORMATS)
    held = summarize_list(sorted(entry.name for entry in folder.iterdir()), 10) or "nothing"
    raise InputError(f"{folder}: is a dataset of no known format. Looked for:{looked_for}\nThe folder holds {held}")
