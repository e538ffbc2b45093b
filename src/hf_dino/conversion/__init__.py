"""Convert DINO checkpoints of the official implementation, detrex and mmdetection to model directories, and back."""

from .convert import convert_checkpoint
from .export import export_checkpoint


__all__ = ["convert_checkpoint", "export_checkpoint"]
