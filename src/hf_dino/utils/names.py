"""Names of classes: written in one way, compared in one way, by everything that matches models and datasets."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, TypeVar

from ..configuration_dino_detr import UNUSED_LABEL


Key = TypeVar("Key", bound=Hashable)

INTEGER_LIMIT = 2**63
"""Ids are stored as 64-bit integers, so they are smaller than this, and larger than its negative."""


def normalize_name(name: str) -> str:
    """Return the words of a name, in which case, blanks, hyphens and underscores do not count.

    Example:

    ```python
    >>> normalize_name("Traffic_light") == normalize_name(" traffic-light ") == "traffic light"
    True

    ```
    """
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name)).strip().casefold()


def match_names(names: Mapping[Key, str], classes: Mapping[int, str]) -> dict[Key, int]:
    """Map the keys of names to the labels of classes: of an equal name, or else of the only one with the same words.

    Args:
        names (`Mapping[Key, str]`): Names to look for.
        classes (`Mapping[int, str]`): Label to name, such as a model's `id2label`.

    Returns:
        `dict[Key, int]`: Without the keys whose names are not among the classes.

    Example:

    ```python
    >>> match_names({7: "Traffic_Light", 8: "bus"}, {0: "car", 1: "traffic light"})
    {7: 1}

    ```
    """
    exact = {name: label for label, name in classes.items()}
    by_words: dict[str, list[int]] = defaultdict(list)
    for label, name in classes.items():
        by_words[normalize_name(name)].append(label)
    same_words = {words: labels[0] for words, labels in by_words.items() if len(labels) == 1}
    found = {key: exact.get(name, same_words.get(normalize_name(name))) for key, name in names.items()}
    return {key: label for key, label in found.items() if label is not None}


def named_classes(id2label: Mapping[int, str]) -> dict[int, str]:
    """Return the classes of a model without its unused labels."""
    return {int(label): name for label, name in id2label.items() if name != UNUSED_LABEL}


def similar_names(names: Iterable[str]) -> list[list[str]]:
    """Return the groups of different names that have the same words.

    Example:

    ```python
    >>> similar_names(["cat", "Dog", "dog", "traffic light", "Traffic-Light"])
    [['Dog', 'dog'], ['traffic light', 'Traffic-Light']]

    ```
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name in dict.fromkeys(names):
        groups[normalize_name(name)].append(name)
    return [group for group in groups.values() if len(group) > 1]


def to_integer(value: Any) -> int | None:
    """Return a 64-bit integer that is stored as one or as a float without fraction, and `None` for anything else.

    Example:

    ```python
    >>> to_integer(3), to_integer(3.0), to_integer(3.5), to_integer("3"), to_integer(True)
    (3, 3, None, None, None)

    ```
    """
    is_whole = type(value) is int or (isinstance(value, float) and value.is_integer())
    return int(value) if is_whole and abs(value) < INTEGER_LIMIT else None
