"""Convert checkpoints of the official implementation (IDEA-Research/DINO) to model directories."""

from .convert import convert_checkpoint


__all__ = ["convert_checkpoint"]
