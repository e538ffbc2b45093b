"""Convert checkpoints of DINO and its ancestors, in the formats of five code bases, to model directories and back."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .convert import check_class_options, check_output, convert_checkpoint
    from .export import export_checkpoint
    from .known import fetch_checkpoint

__all__ = ["check_class_options", "check_output", "convert_checkpoint", "export_checkpoint", "fetch_checkpoint"]

_MODULES = {
    "check_class_options": "convert",
    "check_output": "convert",
    "convert_checkpoint": "convert",
    "export_checkpoint": "export",
    "fetch_checkpoint": "known",
}


def __getattr__(name: str) -> Any:
    """Import the conversion when it is used: the list of checkpoints is printed without waiting for torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
