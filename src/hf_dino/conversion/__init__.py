"""Convert checkpoints of the official implementation (IDEA-Research/DINO) to model folders."""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .convert import convert_checkpoint

__all__ = ["convert_checkpoint"]


def __getattr__(name: str) -> Any:
    """Import PyTorch and the model on first use, so that a command's `--help` does not wait for them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import convert

    return getattr(convert, name)
