"""Read a data set whatever its format, which is told by looking."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError, few
from .coco import find_coco, find_lone_coco, read_coco_files
from .dataset import Complain, DetectionData, refuse, require_pictures
from .hub import find_picture_folder, find_saved, is_name, load_name, read_stream, read_tables
from .splits import SPLITS
from .voc import find_voc, read_voc
from .yolo import find_described_yolo, find_plain_yolo, read_yolo


class Format(NamedTuple):
    """One way in which a folder may hold a data set.

    Attributes:
        name (`str`): For people.
        looked_for (`str`): What makes a folder one of these, for people.
        find (`Callable`): Says where each split is; nothing where the folder is of another format.
        read (`Callable`): Reads the splits that were found.
    """

    name: str
    looked_for: str
    find: Callable[[Path], Mapping[str, Any]]
    read: Callable[[Mapping[str, Any], Path, Complain], dict[str, DetectionData]]


# the first that finds something is taken, so those that cannot be mistaken for another come first
FORMATS = (
    Format("datasets", "dataset_dict.json, or dataset_info.json and state.json", find_saved, read_tables),
    Format("YOLO", "a YAML file with names and train, val or test", find_described_yolo, read_yolo),
    Format(
        "COCO",
        "train.json, annotations/instances_train*.json or train/_annotations.coco.json",
        find_coco,
        read_coco_files,
    ),
    Format(
        "datasets", "metadata.jsonl, metadata.csv or *.parquet, here or in train", find_picture_folder, read_tables
    ),
    Format("Pascal VOC", "JPEGImages and Annotations with *.xml, or *.xml here or in train", find_voc, read_voc),
    Format("YOLO", "images and labels with *.txt, here or in train", find_plain_yolo, read_yolo),
    Format("COCO", "a single *.json", find_lone_coco, read_coco_files),
)


def read_data(
    source: str | Path,
    *,
    splits: Sequence[str] = (),
    streaming: bool = False,
    limit: int | None = None,
    cache: str | Path | None = None,
    complain: Complain = refuse,
) -> dict[str, DetectionData]:
    """Read a data set for detection. Nothing of it is ever changed.

    A folder may be in COCO's format, Pascal VOC's, YOLO's, or of Hugging Face `datasets`; looking at it tells. Any
    other name is looked for on the Hub. Boxes that are empty, not finite or wholly outside their picture are dropped,
    boxes that reach over the border are kept and counted; both are logged.

    Args:
        source (`str` or `Path`): A folder, or a name on the Hub: `OWNER/NAME[:CONFIGURATION][@REVISION]`.
        splits (`Sequence[str]`, *optional*): Which of `"train"`, `"validation"` and `"test"` must be there and are
            read; by default those that are there. Their names in the data set may be others, as `val` or `train2017`;
            what is not divided is `"train"`. Where classes have no numbers but names at the objects, they are numbered
            over all splits, whichever are read; those of a stream over what is read.
        streaming (`bool`, *optional*, defaults to `False`): Fetch a data set of `datasets` picture by picture instead
            of downloading it whole. Since training reads pictures in any order and again, they are kept: in `cache`,
            encoded as they come. A pass that was cut short goes on where it was.
        limit (`int`, *optional*): Of a stream, the most pictures of a split.
        cache (`str` or `Path`, *optional*): Of a stream, the folder to keep it in; by default beside the cache of
            `datasets`, one for each version of the data set. It is new, empty, or keeps this very stream.
        complain (`Callable`, *optional*): Called with each thing that stops a training and yet leaves the rest
            readable. By default the first is raised.

    Returns:
        `dict[str, DetectionData]`: By split, in the order above.

    Raises:
        InputError: If the source is of no known format, contradicts itself, or lacks a split or pictures; if `limit`
            or `cache` is given without `streaming`, or the cache is used for something else.
        ImportError: If a library is missing that this format needs.
    """
    wanted = tuple(splits)
    if unknown := set(wanted) - set(SPLITS):
        raise InputError(f"there are no splits called {few(sorted(unknown))}; choose of {few(SPLITS)}")
    if not streaming and (limit is not None or cache is not None):
        raise InputError("limit and cache are for a stream: give streaming as well, or leave them out")
    data = (
        read_stream(str(source), wanted, limit, Path(cache) if cache else None, complain)
        if streaming
        else _read_whole(source, wanted, complain)
    )
    if missing := [split for split in wanted if split not in data]:
        raise InputError(f"{source}: has no split for {few(missing)}{f'; it has {few(data)}' if data else ''}")
    return {split: require_pictures(each) if complain is refuse else each for split, each in data.items()}


def _read_whole(source: str | Path, wanted: Sequence[str], complain: Complain) -> dict[str, DetectionData]:
    folder = Path(source)
    if folder.is_dir():
        form, found = _tell(folder)
        return form.read(_chosen(found, wanted), folder, complain)
    if folder.exists():
        raise InputError(
            f"{source}: is a file; give the folder of the data, or name pictures and annotations one by one"
        )
    if not isinstance(source, str) or not is_name(source):
        raise InputError(f"{source}: there is no such folder, and it cannot be a name on the Hub either")
    return read_tables(_chosen(load_name(source), wanted), source, complain)


def _chosen(found: Mapping[str, Any], wanted: Sequence[str]) -> dict[str, Any]:
    return {split: found[split] for split in SPLITS if split in found and (not wanted or split in wanted)}


def _tell(folder: Path) -> tuple[Format, Mapping[str, Any]]:
    for form in FORMATS:
        if found := form.find(folder):
            return form, found
    looked_for = "".join(f"\n  {form.name}: {form.looked_for}" for form in FORMATS)
    held = few(sorted(entry.name for entry in folder.iterdir()), 10) or "nothing"
    raise InputError(f"{folder}: is a data set of no known format. Looked for:{looked_for}\nThe folder holds {held}")
