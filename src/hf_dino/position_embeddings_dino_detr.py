"""Embeddings of positions: of the cells of feature maps, and of the boxes (anchors) of queries.

Papers: Attention Is All You Need, https://arxiv.org/abs/1706.03762, section 3.5; DETR,
https://arxiv.org/abs/2005.12872; DAB-DETR, https://arxiv.org/abs/2201.12329.
"""

import math

import torch
from torch import nn

from .configuration_dino_detr import DinoDetrConfig
from .initialization_dino_detr import xavier
from .prediction_heads_dino_detr import DinoDetrMLPPredictionHead


# Temperature of the decoder's box embedding; that of the cells is a field of the config.
BOX_TEMPERATURE = 10000  # IDEA-Research/DINO, models/dino/utils.py, gen_sineembed_for_position


def sine_wavelengths(dim: int, temperature: float, device: torch.device) -> torch.Tensor:
    """Return the wavelengths of a sine embedding, each twice: for sine and cosine.

    Returns:
        `torch.Tensor` of shape `(dim,)` and dtype float32, from 1 to nearly `temperature`. Callers compute the
        sine and cosine of 2π · coordinate / wavelength.

    Example:

    ```python
    >>> sine_wavelengths(4, 100.0, torch.device("cpu")).tolist()
    [1.0, 1.0, 10.0, 10.0]

    ```
    """
    pair = torch.arange(dim, device=device).div(2, rounding_mode="floor")
    return temperature ** (2 * pair / dim)


def sine_position_embedding(mask: torch.Tensor, dim: int, temperature: float, offset: float) -> torch.Tensor:
    """Embed the y and x of each cell, normalized by the unpadded height and width, in sines and cosines.

    Args:
        mask (`torch.Tensor` of shape `(batch_size, height, width)` and dtype bool): `True` is image.
        dim (`int`): Width of the embedding of one coordinate; even.
        temperature (`float`): Longest wavelength; see `sine_wavelengths`.
        offset (`float`): Added to y and x in cells, which count from 1, before they are normalized.

    Returns:
        `torch.Tensor` of shape `(batch_size, height, width, 2 * dim)`, float32; y in the first half, then x, sine and
        cosine alternating.
    """
    wavelengths = sine_wavelengths(dim, temperature, mask.device)
    halves = []
    for axis in (1, 2):
        index = mask.cumsum(axis, dtype=torch.float32)  # 1, 2, 3, ...; fp16 cannot count beyond 2048
        last = index.narrow(axis, index.shape[axis] - 1, 1)
        fraction = (index + offset) / (last + 1e-6)
        angle = 2 * math.pi * fraction[..., None] / wavelengths
        halves.append(torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-2))
    return torch.cat(halves, dim=-1)


def sine_box_embedding(boxes: torch.Tensor, dim: int) -> torch.Tensor:
    """Embed each coordinate of a box in sines and cosines, for the positional query of DAB-DETR.

    Args:
        boxes (`torch.Tensor` of shape `(..., 4)`): Center x, center y, width, height; fractions.
        dim (`int`): Width of the embedding of one coordinate; even.

    Returns:
        `torch.Tensor` of shape `(..., 4 * dim)`, in the order y, x, width, height, sine and cosine alternating.
    """
    y_x_width_height = torch.stack([boxes[..., 1], boxes[..., 0], boxes[..., 2], boxes[..., 3]], dim=-1)
    angle = 2 * math.pi * y_x_width_height[..., None] / sine_wavelengths(dim, BOX_TEMPERATURE, boxes.device)
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-3)


class DinoDetrAnchorQuery(nn.Module):
    """DINO: the positional query is the embedded anchor."""

    def __init__(self, config: DinoDetrConfig):
        super().__init__()

    def forward(self, embedded_anchors: torch.Tensor, contents: torch.Tensor, layer: int) -> torch.Tensor:
        return embedded_anchors


class DinoDetrConditionalQuery(nn.Module):
    """DAB-DETR, section 4.2: the embedded anchor is scaled by an MLP of the content, as in Conditional DETR."""

    def __init__(self, config: DinoDetrConfig):
        super().__init__()
        self.query_scale = DinoDetrMLPPredictionHead([config.d_model] * 3, rule=xavier, last_rule=xavier)

    def forward(self, embedded_anchors: torch.Tensor, contents: torch.Tensor, layer: int) -> torch.Tensor:
        """
        Args:
            embedded_anchors (`torch.Tensor` of shape `(batch_size, num_queries, d_model)`): Embedded boxes.
            contents (`torch.Tensor` of shape `(batch_size, num_queries, d_model)`): Input of the decoder layer.
            layer (`int`): Index of the decoder layer. Before the first, contents do not depend on the image yet, and
                nothing is scaled.
        """
        return embedded_anchors * self.query_scale(contents) if layer else embedded_anchors


POSITIONAL_QUERIES: dict[str, type[DinoDetrAnchorQuery] | type[DinoDetrConditionalQuery]] = {
    "anchor": DinoDetrAnchorQuery,
    "conditional": DinoDetrConditionalQuery,
}
