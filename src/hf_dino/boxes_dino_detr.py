"""Boxes as the decoder handles them: their logits, their sine embedding, and the head that moves them.

Everything here keeps boxes in at least 32 bits: a box in bf16 is off by up to 2 pixels in 1000.
"""

import math

import torch
from torch import nn

from .initialization_dino_detr import init_as


# Of the decoder's boxes; the temperature of feature positions is a field of the config.
BOX_TEMPERATURE = 10000  # IDEA-Research/DINO, models/dino/utils.py, gen_sineembed_for_position

# The original's bound, not transformers' 1e-5: boxes at the border of the image depend on it
# (IDEA-Research/DINO, util/misc.py:575).
INVERSE_SIGMOID_EPSILON = 1e-3


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Widen 16-bit floats; leave 32 and 64 bits alone.

    Example:

    ```python
    >>> at_least_float32(torch.zeros(1, dtype=torch.bfloat16)).dtype, at_least_float32(torch.zeros(1).double()).dtype
    (torch.float32, torch.float64)

    ```
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def inverse_sigmoid(fraction: torch.Tensor) -> torch.Tensor:
    """The logit of a fraction, with both odds bounded from below by 1e-3.

    Args:
        fraction (`torch.Tensor`): Any shape; clamped to [0, 1].

    Returns:
        `torch.Tensor` of the same shape, within ±6.91.

    Example:

    ```python
    >>> [round(value, 2) for value in inverse_sigmoid(torch.tensor([0.0, 0.5, 0.75, 1.0])).tolist()]
    [-6.91, 0.0, 1.1, 6.91]

    ```
    """
    fraction = fraction.clamp(min=0, max=1)
    odds_for = fraction.clamp(min=INVERSE_SIGMOID_EPSILON)
    odds_against = (1 - fraction).clamp(min=INVERSE_SIGMOID_EPSILON)
    return torch.log(odds_for / odds_against)


def sine_wavelengths(width: int, temperature: float, device: torch.device) -> torch.Tensor:
    """Wavelengths of a sine embedding, each twice: for the sine and for the cosine (Attention is all you need, 3.5).

    Returns:
        `torch.Tensor` of shape `(width,)` and dtype float32, from 1 to nearly `temperature`, in units of 2π.

    Example:

    ```python
    >>> sine_wavelengths(4, 100.0, torch.device("cpu")).tolist()
    [1.0, 1.0, 10.0, 10.0]

    ```
    """
    pair = torch.arange(width, device=device).div(2, rounding_mode="floor")
    return temperature ** (2 * pair / width)


def sine_box_embedding(boxes: torch.Tensor, width: int) -> torch.Tensor:
    """Embed each of a box's four numbers in sines and cosines (DAB-DETR, https://arxiv.org/abs/2201.12329, eq. 6).

    Args:
        boxes (`torch.Tensor` of shape `(..., 4)`): Center x, center y, width, height; fractions.
        width (`int`): Numbers per coordinate; even.

    Returns:
        `torch.Tensor` of shape `(..., 4 * width)`, in the order y, x, width, height, sine and cosine alternating.
    """
    y_x_width_height = torch.stack([boxes[..., 1], boxes[..., 0], boxes[..., 2], boxes[..., 3]], dim=-1)
    angle = 2 * math.pi * y_x_width_height[..., None] / sine_wavelengths(width, BOX_TEMPERATURE, boxes.device)
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-3)


class DinoDetrMLPPredictionHead(nn.Module):
    """Linear layers with ReLU between them; `rule` is how all but the last are initialized, `last_rule` the last."""

    def __init__(self, widths: list[int], *, rule: str, last_rule: str):
        super().__init__()
        rules = [rule] * (len(widths) - 2) + [last_rule]
        self.layers = nn.ModuleList(
            init_as(rule, nn.Linear(width_in, width_out))
            for rule, width_in, width_out in zip(rules, widths, widths[1:])
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            hidden_states = layer(hidden_states).relu_()
        return self.layers[-1](hidden_states)


def make_bbox_head(d_model: int) -> DinoDetrMLPPredictionHead:
    """A head from a query to the change of its box's four logits; a fresh one changes nothing."""
    return DinoDetrMLPPredictionHead([d_model, d_model, d_model, 4], rule="default", last_rule="zeros")


def make_class_head(d_model: int, num_labels: int) -> nn.Linear:
    """A head from a query to one logit per class; a fresh one finds everything improbable."""
    return init_as("class_prior", nn.Linear(d_model, num_labels))
