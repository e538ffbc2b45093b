"""How each fresh weight gets its first value: one rule per kind of layer, as in the original.

transformers calls `_init_weights` of a model that lives outside its own package only for modules that hold a parameter
themselves. So the rule is attached to that leaf when it is built, `init_as("zeros", nn.Linear(...))`, and looked up
when its weights are made (`initialize`).

Source of the rules: IDEA-Research/DINO, commit faa8520, `DeformableTransformer._reset_parameters`,
`MSDeformAttn._reset_parameters` and `DINO.__init__`.
"""

import math
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import initialization as init


CLASS_PRIOR = 0.01  # probability of "object of this class" that a fresh class head gives to everything

TAG = "_dino_init"  # the attribute in which a layer keeps its rule

Module = TypeVar("Module", bound=nn.Module)


def init_as(rule: str, module: Module, **arguments: Any) -> Module:
    """Attach a rule of `RULES` to a layer and hand the layer back."""
    setattr(module, TAG, (RULES[rule], arguments))
    return module


@torch.no_grad()
def initialize(module: nn.Module, again: bool = False) -> bool:
    """Give a layer its first weights by the rule attached to it; say whether there was one.

    Weights that were loaded or drawn before keep their value, by a mark that transformers leaves on them, unless they
    are to be drawn `again`.
    """
    marked: Any = module.parameters(recurse=False) if again else ()
    for parameter in marked:
        parameter._is_hf_initialized = False
    rule, arguments = getattr(module, TAG, (None, {}))
    if rule is not None:
        rule(module, **arguments)
    return rule is not None


def initial_sampling_offsets(num_heads: int, num_levels: int, num_points: int) -> torch.Tensor:
    """Offsets with which deformable attention starts: head m looks in direction m, point k reaches k + 1 cells.

    Returns:
        `torch.Tensor` of shape `(num_heads, num_levels, num_points, 2)`: (x, y) in cells, on the unit square's rim.

    Example:

    ```python
    >>> initial_sampling_offsets(num_heads=4, num_levels=1, num_points=2)[0, 0].tolist()  # head 0 looks right
    [[1.0, 0.0], [2.0, 0.0]]

    ```
    """
    angle = 2 * math.pi / num_heads * torch.arange(num_heads, dtype=torch.float32)
    direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
    direction = direction / direction.abs().amax(dim=-1, keepdim=True)
    reach = torch.arange(1, num_points + 1, dtype=torch.float32)
    ring = direction[:, None, None, :] * reach[None, None, :, None]
    return ring.expand(num_heads, num_levels, num_points, 2).contiguous()


def _default(module: Any) -> None:
    """What PyTorch itself does for a linear layer: uniform within 1 / sqrt(fan in)."""
    init.kaiming_uniform_(module.weight, a=math.sqrt(5))
    _default_bias(module)


def _default_bias(module: Any) -> None:
    bound = 1 / math.sqrt(module.weight.shape[1])
    init.uniform_(module.bias, -bound, bound)


def _xavier(module: Any, gain: float = 1.0) -> None:
    """Matrices of the transformer, biases as PyTorch leaves them."""
    init.xavier_uniform_(module.weight, gain=gain)
    _default_bias(module)


def _xavier_zero_bias(module: Any, gain: float = 1.0) -> None:
    init.xavier_uniform_(module.weight, gain=gain)
    init.zeros_(module.bias)


def _zeros(module: Any) -> None:
    init.zeros_(module.weight)
    init.zeros_(module.bias)


def _sampling_ring(module: Any, **counts: int) -> None:
    init.zeros_(module.weight)
    init.copy_(module.bias, initial_sampling_offsets(**counts).flatten())


def _class_prior(module: Any) -> None:
    """Start with every class improbable, or the focal loss of 900 queries swamps the first steps (RetinaNet, 3.3)."""
    init.kaiming_uniform_(module.weight, a=math.sqrt(5))
    init.constant_(module.bias, -math.log((1 - CLASS_PRIOR) / CLASS_PRIOR))


def _xavier_embedding(module: Any) -> None:
    init.xavier_uniform_(module.weight)


def _normal(module: Any) -> None:
    init.normal_(module.weight)


def _level_embedding(module: Any) -> None:
    init.normal_(module.level_embed)


RULES = {
    "default": _default,
    "xavier": _xavier,
    "xavier_zero_bias": _xavier_zero_bias,
    "zeros": _zeros,
    "initial_sampling_offsets": _sampling_ring,
    "class_prior": _class_prior,
    "xavier_embedding": _xavier_embedding,
    "normal": _normal,
    "level_embedding": _level_embedding,
}
