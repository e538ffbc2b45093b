"""The arithmetic of a whole model: float32 throughout, TF32 products, or autocast to bfloat16."""

from contextlib import AbstractContextManager

import torch


PRECISIONS = ("fp32", "tf32", "bf16")


def use_precision(name: str, device: str) -> AbstractContextManager[None]:
    """Set whether this process may use TF32, and return the context for a forward pass.

    Args:
        name (`str`): One of `PRECISIONS`. `"fp32"` takes TF32 away from convolutions, too, which have it by default.
        device (`str`): `"cpu"` or `"cuda"`.
    """
    torch.set_float32_matmul_precision("highest" if name == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = name != "fp32"
    return torch.autocast(device, torch.bfloat16, enabled=name == "bf16")
