"""The precision of a whole model: float32, TF32 in matrix products and convolutions, or autocast to bfloat16."""

from contextlib import AbstractContextManager

import torch


PRECISIONS = ("fp32", "tf32", "bf16")


def use_precision(name: str, device: str) -> AbstractContextManager[None]:
    """Set whether this process may use TF32, and return the context for a forward pass.

    Args:
        name (`str`): One of `PRECISIONS`. `"fp32"` also disables TF32 in convolutions, where it is the default.
        device (`str`): `"cpu"` or `"cuda"`.
    """
    torch.set_float32_matmul_precision("highest" if name == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = name != "fp32"
    return torch.autocast(device, torch.bfloat16, enabled=name == "bf16")
