"""Which part of a dataset a file or folder holds, by its name."""

import re
from collections.abc import Iterable
from pathlib import Path

from ..utils.errors import InputError


SPLITS = ("train", "validation", "test")
SPLIT_ALIASES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


def split_from_name(name: str) -> str | None:
    """Tell the split that a name speaks of, if any.

    Example:

    ```python
    >>> split_of("instances_val2017"), split_of("Train"), split_of("_annotations.coco")
    ('validation', 'train', None)

    ```
    """
    return next((SPLIT_ALIASES[word] for word in re.findall("[a-z]+", name.lower()) if word in SPLIT_ALIASES), None)


def group_by_split(named: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """Sort paths by the split that their names speak of, leaving out those that speak of none.

    Raises:
        InputError: If two speak of the same.
    """
    found: dict[str, Path] = {}
    for name, path in named:
        split = split_from_name(name)
        if split in found:
            raise InputError(
                f"cannot tell which is the {split} split: {found[split]} or {path}; move one of them away, or name a "
                "folder of images and its COCO file explicitly"
            )
        if split:
            found[split] = path
    return {split: found[split] for split in SPLITS if split in found}


def split_folders(folder: Path) -> dict[str, Path]:
    """The folders directly within `folder` that are named after splits."""
    return group_by_split((entry.name, entry) for entry in sorted(folder.iterdir()) if entry.is_dir())
