"""Initial weights, one rule per kind of layer, as in the official implementation.

Each layer gets its rule when it is built, `init_as(zeros, nn.Linear(...))`, and `initialize` applies it later. The
rule is on the layer that owns the parameters, because transformers calls `_init_weights` of a model outside its own
code only for such modules.

Source of the rules: IDEA-Research/DINO, commit faa8520, `DeformableTransformer._reset_parameters`,
`MSDeformAttn._reset_parameters` and `DINO.__init__`.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import initialization as init


CLASS_PRIOR = 0.01  # probability of each class that a new class head gives to every query

_INIT_ATTRIBUTE = "_dino_init"  # where a layer keeps its rule

InitRule = Callable[..., None]
Module = TypeVar("Module", bound=nn.Module)


def init_as(rule: InitRule, module: Module, **arguments: Any) -> Module:
    """Attach a rule to a layer, with its keyword arguments, and return the layer."""
    setattr(module, _INIT_ATTRIBUTE, (rule, arguments))
    return module


@torch.no_grad()
def initialize(module: nn.Module, force: bool = False) -> bool:
    """Initialize a layer by the rule attached to it and return whether there is one.

    Weights that were loaded or initialized before, which transformers marks, keep their values.

    Args:
        module (`nn.Module`): The layer.
        force (`bool`, *optional*, defaults to `False`): Initialize marked weights too.
    """
    marked: Any = module.parameters(recurse=False) if force else ()
    for parameter in marked:
        parameter._is_hf_initialized = False
    rule, arguments = getattr(module, _INIT_ATTRIBUTE, (None, {}))
    if rule is not None:
        rule(module, **arguments)
    return rule is not None


def initial_sampling_offsets(num_heads: int, num_levels: int, num_points: int) -> torch.Tensor:
    """Return the initial offsets of deformable attention: head m looks in direction m, point k is k + 1 cells away.

    Returns:
        `torch.Tensor` of shape `(num_heads, num_levels, num_points, 2)`: (x, y) in cells. The larger of |x| and |y| of
        point k is k + 1, so the points of all heads lie on nested squares.

    Example:

    ```python
    >>> initial_sampling_offsets(num_heads=4, num_levels=1, num_points=2)[0, 0].tolist()  # head 0 looks right
    [[1.0, 0.0], [2.0, 0.0]]

    ```
    """
    angle = 2 * math.pi / num_heads * torch.arange(num_heads, dtype=torch.float32)
    direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
    direction = direction / direction.abs().amax(dim=-1, keepdim=True)
    distance = torch.arange(1, num_points + 1, dtype=torch.float32)
    offsets = direction[:, None, None, :] * distance[None, None, :, None]
    return offsets.expand(num_heads, num_levels, num_points, 2).contiguous()


def pytorch_default(module: Any) -> None:
    """Initialize a linear layer as PyTorch does: uniform within 1 / sqrt(fan in)."""
    init.kaiming_uniform_(module.weight, a=math.sqrt(5))
    _pytorch_default_bias(module)


def _pytorch_default_bias(module: Any) -> None:
    bound = 1 / math.sqrt(module.weight.shape[1])
    init.uniform_(module.bias, -bound, bound)


def xavier(module: Any) -> None:
    """Initialize weights by Xavier and biases as PyTorch does."""
    init.xavier_uniform_(module.weight)
    _pytorch_default_bias(module)


def xavier_zero_bias(module: Any, gain: float = 1.0) -> None:
    """Initialize weights by Xavier and biases to zero."""
    init.xavier_uniform_(module.weight, gain=gain)
    init.zeros_(module.bias)


def zeros(module: Any) -> None:
    """Initialize weights and biases to zero."""
    init.zeros_(module.weight)
    init.zeros_(module.bias)


def sampling_offset_bias(module: Any, **counts: int) -> None:
    """Initialize weights to zero and biases to `initial_sampling_offsets(**counts)`."""
    init.zeros_(module.weight)
    init.copy_(module.bias, initial_sampling_offsets(**counts).flatten())


def class_prior(module: Any, probability: float = CLASS_PRIOR) -> None:
    """Start with a low probability of every class; otherwise the first focal loss is huge (RetinaNet, section 3.3)."""
    init.kaiming_uniform_(module.weight, a=math.sqrt(5))
    init.constant_(module.bias, -math.log((1 - probability) / probability))


def xavier_embedding(module: Any) -> None:
    """Initialize the rows of an embedding by Xavier."""
    init.xavier_uniform_(module.weight)


def normal_embedding(module: Any) -> None:
    """Initialize the rows of an embedding from the standard normal distribution."""
    init.normal_(module.weight)


def level_embedding(module: Any) -> None:
    """Initialize the backbone's level embedding from the standard normal distribution."""
    init.normal_(module.level_embed)
