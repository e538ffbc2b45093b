"""Convert checkpoints of the official implementation (IDEA-Research/DINO) to model directories."""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .convert import convert_checkpoint

__all__ = ["convert_checkpoint"]


def __getattr__(name: str) -> Any:
    """Import the conversion when it is used: the list of checkpoints is printed without waiting for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .convert import convert_checkpoint

    return convert_checkpoint
