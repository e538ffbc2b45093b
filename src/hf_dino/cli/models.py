"""Models that commands run: from a directory, the Hub or an exported file, on a device."""

import sys
from typing import TYPE_CHECKING, Any

from ..utils.errors import InputError


if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(name: str, device: str | None = None, dtype: str = "float32", compile: bool = False) -> tuple[Any, Any]:
    """Return a model, or an exported one that is called alike, and its image processor.

    Args:
        name (`str`): Directory or Hub id of the model, or an exported file.
        device (`str`, *optional*): As in [`choose_device`]; by default the CPU for an exported file.
        dtype (`str`, *optional*, defaults to `"float32"`): Precision of the computations, which is only checked.
        compile (`bool`, *optional*, defaults to `False`): Compile the layers.

    Raises:
        InputError: If the model is not found, the device cannot be used, or the model does not have these options.
    """
    from ..exported import is_exported, load_exported
    from ..hub import load_detector

    if is_exported(name):
        if dtype != "float32" or compile:
            raise InputError(f"{name}: is an exported model; leave out --dtype and --compile")
        model, processor = load_exported(name, device=device or "cpu")
        print(f"{name}: runs in {model.session.runtime}", file=sys.stderr)
        return model, processor
    device = choose_device(device)
    if dtype == "float16" and device.partition(":")[0] == "cpu":
        raise InputError("--dtype float16 needs a GPU; use bfloat16 or float32")
    model, processor = load_detector(name)
    move_to_device(model, device)
    if compile:
        from ..training import compile_layers

        compile_layers(model)
    return model, processor


def choose_device(device: str | None) -> str:
    """Return a device: by default CUDA's if available; without a number, the one of this process."""
    import torch

    from ..inference.processes import local_device

    return local_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def move_to_device(model: "PreTrainedModel", device: str) -> None:
    """Move a model to a device.

    Raises:
        InputError: If it cannot be used.
    """
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch has no error of its own for this
        reason = str(error).partition("\n")[0]
        raise InputError(f"--device {device}: cannot be used ({reason})") from error
