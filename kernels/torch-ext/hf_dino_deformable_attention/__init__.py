"""Multi-scale deformable attention (Deformable DETR, https://arxiv.org/abs/2010.04159, equation 3), compiled.

Two forms of one operator. Both run on CPUs and CUDA devices in float32, float64, bfloat16 and float16, have gradients,
and work under autocast, `torch.compile(fullgraph=True)` and `torch.export`. Locations, softmax and sums are computed
in at least 32 bits; 16-bit results are rounded once. Double backward is not supported.

A cell of `value` that is infinite or NaN may reach queries that look next to it, or outside the map.
"""

from collections.abc import Sequence

import torch

from . import layers
from .registration import ops


def deformable_attention(
    value: torch.Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
) -> torch.Tensor:
    """Return the weighted sum of a few points of every feature level, for each query and head.

    Args:
        value (`torch.Tensor` of shape `(batch_size, sequence_length, num_heads, head_dim)`):
            Projected feature maps, each level flattened row by row and the levels joined in order.
        spatial_shapes (`Sequence[tuple[int, int]]` of length `num_levels`):
            `(height, width)` of each level, in cells; they add up to `sequence_length`.
        sampling_locations (`torch.Tensor` of shape `(batch_size, num_queries, num_heads, num_levels, num_points, 2)`):
            (x, y) as fractions of the map. Points outside, and NaN, read zero.
        attention_weights (`torch.Tensor` of shape `(batch_size, num_queries, num_heads, num_levels, num_points)`):
            Weight of each point.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_queries, num_heads * head_dim)`, in the dtype of `value`.

    Raises:
        RuntimeError: If shapes, dtypes or devices disagree.
    """
    locations, weights = _of_one_dtype(value, sampling_locations, attention_weights)
    return ops.deformable_attention(value, _flat(spatial_shapes), locations, weights)


def fused_deformable_attention(
    value: torch.Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    reference_points: torch.Tensor,
    sampling_offsets: torch.Tensor,
    attention_logits: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute [`deformable_attention`] around reference points, from attention logits instead of weights.

    Args:
        value, spatial_shapes: As for [`deformable_attention`].
        reference_points (`torch.Tensor` of shape `(batch_size, num_queries, num_levels, 2 or 4)`):
            Points (x, y) or boxes (center x, center y, width, height), fractions of each level's map.
        sampling_offsets (`torch.Tensor` of shape `(batch_size, num_queries, num_heads, num_levels, num_points, 2)`):
            (x, y), in cells around a point; around a box, an offset of `num_points` reaches its edge.
        attention_logits (`torch.Tensor` of shape `(batch_size, num_queries, num_heads, num_levels, num_points)`):
            Attention weights before the softmax over the points of all levels.

    Returns:
        The output, `(batch_size, num_queries, num_heads * head_dim)` in the dtype of `value`, and the attention
        weights, of shape and dtype of `attention_logits`.

    Raises:
        RuntimeError: If shapes, dtypes or devices disagree.
    """
    offsets, logits = _of_one_dtype(value, sampling_offsets, attention_logits)
    references = reference_points.to(_compute_dtype(value))
    output, weights = ops.fused_deformable_attention(value, _flat(spatial_shapes), references, offsets, logits)
    return output, weights.to(attention_logits.dtype)


def _flat(spatial_shapes: Sequence[tuple[int, int]]) -> list[int]:
    return [length for shape in spatial_shapes for length in shape]


def _compute_dtype(value: torch.Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)


def _of_one_dtype(value: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Convert tensors to what the operators take: all in the dtype of `value`, or all in the one computed with."""
    if all(tensor.dtype == value.dtype for tensor in tensors):
        return tensors
    return tuple(tensor.to(_compute_dtype(value)) for tensor in tensors)


__all__ = ["deformable_attention", "fused_deformable_attention", "layers"]
