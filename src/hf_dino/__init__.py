"""DINO (DETR with Improved DeNoising Anchor Boxes, https://arxiv.org/abs/2203.03605) for Hugging Face transformers.

Importing the package registers its classes, so `AutoModelForObjectDetection`, `AutoImageProcessor` and
`pipeline("object-detection")` support DINO models.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .registration import (
        DinoDetrConfig,
        DinoDetrForObjectDetection,
        DinoDetrImageProcessor,
        DinoDetrImageProcessorPil,
        DinoDetrModel,
        DinoDetrPreTrainedModel,
    )


__version__ = "0.1.0"

__all__ = [
    "DinoDetrConfig",
    "DinoDetrForObjectDetection",
    "DinoDetrImageProcessor",
    "DinoDetrImageProcessorPil",
    "DinoDetrModel",
    "DinoDetrPreTrainedModel",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".registration", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Importing torch and transformers takes seconds. A program that imports this package needs them anyway, but the commands
# `hf-dino` and `python -m hf_dino` answer `--help` without them and register the classes when they load a model.
# While Python looks for the module that `-m` runs, `sys.argv[0]` is "-m".
if sys.argv[0] != "-m" and Path(sys.argv[0]).name not in ("hf-dino", "hf-dino.exe"):
    import_module(".registration", __name__)
