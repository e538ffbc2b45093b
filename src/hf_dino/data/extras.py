"""Libraries that only some users need: imported when they are used, and asked for by the name of their extra."""

import importlib
import warnings
from types import ModuleType
from typing import Any

import numpy as np

from .boxes import xyxy_to_xywh


def import_extra(module: str, extra: str, purpose: str) -> ModuleType:
    """Import `module`, which `pip install 'hf-dino[extra]'` brings.

    Raises:
        ImportError: If it is not installed; the message says what for and how to install it.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="OpenCV", category=UserWarning)  # supervision has a substitute
            return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} needs {module.split('.')[0]}: pip install 'hf-dino[{extra}]'") from error


def supervision_to_xywh(detections: Any) -> np.ndarray:
    """Return the boxes of supervision's detections as x, y, width, height in pixels.

    Its corners are in single precision; what that adds beyond thousandths of a pixel is taken off again, so that a
    box is the same whatever format it came in.

    Example:

    ```python
    >>> from types import SimpleNamespace
    >>> supervision_to_xywh(SimpleNamespace(xyxy=np.array([[11.3, 2, 20, 30.125]], dtype=np.float32))).tolist()
    [[11.3, 2.0, 8.7, 28.125]]

    ```
    """
    return np.round(xyxy_to_xywh(detections.xyxy.astype(np.float64)), 3)
