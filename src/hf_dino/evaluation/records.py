"""Detections as an array of records of fixed size, which can lie on the disk."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


DETECTION_DTYPE = np.dtype([("image_id", "<i8"), ("category_id", "<i8"), ("bbox", "<f8", 4), ("score", "<f8")])
"""One detection: raw ids, box as x, y, width, height in pixels of the original image, and score in [0, 1].

As wide as JSON's numbers, so that COCO results read from a file keep every digit.
"""


def detections_from_results(results: Iterable[Mapping[str, Any]]) -> np.ndarray:
    """Turn COCO results, as read from JSON, into an array.

    Example:

    ```python
    >>> found = detections_from_results([{"image_id": 1, "category_id": 3, "bbox": [10, 10, 40, 20], "score": 0.9}])
    >>> found["bbox"].tolist(), found["score"].tolist()
    ([[10.0, 10.0, 40.0, 20.0]], [0.9])

    ```
    """
    fields = DETECTION_DTYPE.names or ()
    return np.array([tuple(result[field] for field in fields) for result in results], dtype=DETECTION_DTYPE)


def group_rows(ids: np.ndarray, keys: Iterable[int]) -> list[np.ndarray]:
    """For each key, the rows that have it as their id, in rising order.

    Example:

    ```python
    >>> [rows.tolist() for rows in rows_of(np.array([7, 3, 7]), [3, 5, 7])]
    [[1], [], [0, 2]]

    ```
    """
    order, keys = np.argsort(ids, kind="stable"), np.fromiter(keys, dtype=np.int64)
    starts, ends = (np.searchsorted(ids, keys, side, sorter=order) for side in ("left", "right"))
    return [order[start:end] for start, end in zip(starts, ends)]
