"""DINO (DETR with Improved DeNoising Anchor Boxes, https://arxiv.org/abs/2203.03605) for Hugging Face transformers.

Importing the package registers its classes, so `AutoModelForObjectDetection`, `AutoImageProcessor` and
`pipeline("object-detection")` support DINO models, and DN-DETR.
"""

import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

__all__ = [
    "DinoDetrConfig",
    "DinoDetrForObjectDetection",
    "DinoDetrImageProcessor",
    "DinoDetrImageProcessorPil",
    "DinoDetrModel",
    "DinoDetrPreTrainedModel",
    "DnDetrConfig",
    "DnDetrForObjectDetection",
]


def _is_command_line() -> bool:
    """Return whether this process runs `hf-dino` or `python -m hf_dino`."""
    if sys.argv[0] == "-m":  # while Python imports the package of the module that it is told to run
        return ("-m", __name__) in pairwise(sys.orig_argv)
    return Path(sys.argv[0]).name in ("hf-dino", "hf-dino.exe")


# A program that imports this package finds its classes registered. Only the command line does not wait seconds for the
# import of torch and transformers: it answers `--help` without them, and registers the classes when it uses one.
if TYPE_CHECKING or not _is_command_line():
    from .registration import (
        DinoDetrConfig,
        DinoDetrForObjectDetection,
        DinoDetrImageProcessor,
        DinoDetrImageProcessorPil,
        DinoDetrModel,
        DinoDetrPreTrainedModel,
        DnDetrConfig,
        DnDetrForObjectDetection,
    )


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".registration", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
