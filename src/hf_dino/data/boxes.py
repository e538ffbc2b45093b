"""Boxes in two ways of writing: x, y, width, height as datasets have them, and corners as drawing needs them."""

import numpy as np


def xywh_to_xyxy(boxes: np.ndarray) -> np.ndarray:
    """Write boxes of x, y, width, height as x0, y0, x1, y1, in the same unit; both of shape `(num_boxes, 4)`.

    Example:

    ```python
    >>> xywh_to_xyxy(np.array([[10, 20, 5, 6]])).tolist()
    [[10, 20, 15, 26]]

    ```
    """
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def xyxy_to_xywh(corners: np.ndarray) -> np.ndarray:
    """Write boxes of x0, y0, x1, y1 as x, y, width, height, in the same unit; both of shape `(num_boxes, 4)`."""
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
