"""Multi-scale deformable attention: the PyTorch reference implementation, the replaceable operator, and the layer.

`DinoDetrMultiscaleDeformableAttention`, the layer of encoder and decoder, tries in this order:

1. the fused compiled operator, which includes the softmax and the sampling locations, unless its `attn` was replaced;
2. its `attn`: a replacement from the Hub or, by default, `MultiScaleDeformableAttention`, which has no weights and
   calls the compiled operator or, without one, the reference implementation `multi_scale_deformable_attention`.

Paper: Deformable DETR, https://arxiv.org/abs/2010.04159, equation 3.
"""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import nn

from .backbone_dino_detr import DinoDetrFeatureLevels
from .boxes_dino_detr import at_least_float32
from .initialization_dino_detr import init_as, sampling_offset_bias, xavier_zero_bias, zeros


try:
    from hf_dino.kernels import operators
except ImportError:

    def operators(device: str | torch.device) -> ModuleType | None:
        """Return `None`: a saved model's directory contains this file but no compiled kernel."""
        return None


def multi_scale_deformable_attention(
    value: torch.Tensor,
    spatial_shapes: list[tuple[int, int]],
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
) -> torch.Tensor:
    r"""Sample every feature level at a few points per query and return the weighted sum of the samples.

    For query q, head m, level l and point k this is the inner double sum of equation 3 of Deformable DETR,
    with W'_m already applied to `value` and W_m left to the caller:

        output[q, m] = sum_l sum_k  attention_weights[q, m, l, k] * value[l, m](sampling_locations[q, m, l, k])

    Args:
        value (`torch.Tensor` of shape `(batch_size, sequence_length, num_heads, head_dim)`):
            Projected feature maps, each level flattened row by row and the levels concatenated in order, so
            `sequence_length == sum(height * width)`.
        spatial_shapes (`list[tuple[int, int]]` of length `num_levels`):
            `(height, width)` of each level, in feature-map cells.
        sampling_locations (`torch.Tensor` of shape `(batch_size, num_queries, num_heads, num_levels, num_points, 2)`):
            `(x, y)` as fractions of the padded map: `(0, 0)` is its top-left corner and `(1, 1)` its bottom-right
            corner, so the center of cell `(row, column)` is `((column + 0.5) / width, (row + 0.5) / height)`.
            A point outside the map, or with a non-finite coordinate, reads zero.
        attention_weights (`torch.Tensor` of shape `(batch_size, num_queries, num_heads, num_levels, num_points)`):
            Non-negative, summing to 1 over the last two axes.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_queries, num_heads * head_dim)`, in the dtype of `value`; computed
        in float32 or higher.

    Raises:
        ValueError: If `spatial_shapes` have another number of cells than `value` has tokens.

    Example:

    ```python
    >>> value = torch.arange(4.0).view(1, 4, 1, 1)  # one 2 x 2 map: 0 1 / 2 3
    >>> center_of_first_cell, center_of_map = [0.25, 0.25], [0.5, 0.5]
    >>> locations = torch.tensor([center_of_first_cell, center_of_map]).view(1, 2, 1, 1, 1, 2)
    >>> multi_scale_deformable_attention(value, [(2, 2)], locations, torch.ones(1, 2, 1, 1, 1)).flatten().tolist()
    [0.0, 1.5]

    ```
    """
    level_lengths = [height * width for height, width in spatial_shapes]
    if sum(level_lengths) != value.shape[1]:
        raise ValueError(f"spatial_shapes cover {sum(level_lengths)} positions but value has {value.shape[1]}")
    batch_size, _, num_heads, head_dim = value.shape
    num_queries = sampling_locations.shape[1]

    # In half precision, locations are off by a cell, and grid_sample on the CPU overflows and reads garbage.
    compute_dtype = torch.promote_types(value.dtype, torch.float32)
    feature_maps = value.to(compute_dtype).permute(0, 2, 3, 1).flatten(0, 1)  # (batch * heads, head_dim, sequence)
    # grid_sample expects the corners at -1 and 1 and finite coordinates; -3 is outside every map
    grids = (2 * sampling_locations.to(compute_dtype) - 1).nan_to_num(nan=-3, posinf=-3, neginf=-3)
    grids = grids.transpose(1, 2).flatten(0, 1)  # (batch * heads, queries, levels, points, 2)
    weights = attention_weights.to(compute_dtype)
    weights = weights.transpose(1, 2).flatten(0, 1)  # (batch * heads, queries, levels, points)

    output = feature_maps.new_zeros(batch_size * num_heads, head_dim, num_queries)
    for level, level_values in enumerate(feature_maps.split(level_lengths, dim=2)):
        feature_map = level_values.unflatten(2, spatial_shapes[level])
        sampled = nn.functional.grid_sample(feature_map, grids[:, :, level], align_corners=False)
        output = output + (sampled * weights[:, None, :, level]).sum(dim=-1)
    return output.view(batch_size, num_heads * head_dim, num_queries).transpose(1, 2).to(value.dtype)


class MultiScaleDeformableAttention(nn.Module):
    """The operator as a layer without weights, which a kernel of the Hub can replace (`kernels.kernelize`).

    The seven arguments are those of `kernels-community/deformable-detr`. See [`multi_scale_deformable_attention`].
    """

    def forward(
        self,
        value: torch.Tensor,
        value_spatial_shapes: torch.Tensor,
        value_spatial_shapes_list: list[tuple[int, int]],
        level_start_index: torch.Tensor,
        sampling_locations: torch.Tensor,
        attention_weights: torch.Tensor,
        im2col_step: int,
    ) -> torch.Tensor:
        compiled = operators(value.device)
        attend = compiled.deformable_attention if compiled else multi_scale_deformable_attention
        return attend(value, value_spatial_shapes_list, sampling_locations, attention_weights)


class DinoDetrMultiscaleDeformableAttention(nn.Module):
    """Let each query attend to a few points per head and level around its reference (Deformable DETR, section 4.1).

    Args:
        d_model (`int`): Width of queries and memory.
        num_heads (`int`): Heads; divides `d_model`.
        num_levels (`int`): Feature levels.
        num_points (`int`): Sampling points per head and level.
    """

    im2col_step = 64  # required by the signature of Deformable DETR's kernel, and not used otherwise

    def __init__(self, d_model: int, *, num_heads: int, num_levels: int, num_points: int):
        super().__init__()
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        total_points = num_heads * num_levels * num_points
        counts = {"num_heads": num_heads, "num_levels": num_levels, "num_points": num_points}
        self.sampling_offsets = init_as(sampling_offset_bias, nn.Linear(d_model, total_points * 2), **counts)
        self.attention_weights = init_as(zeros, nn.Linear(d_model, total_points))
        self.value_proj = init_as(xavier_zero_bias, nn.Linear(d_model, d_model))
        self.output_proj = init_as(xavier_zero_bias, nn.Linear(d_model, d_model))
        self.attn = MultiScaleDeformableAttention()

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: torch.Tensor,
        memory: torch.Tensor,
        reference_points: torch.Tensor,
        levels: DinoDetrFeatureLevels,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, num_queries, d_model)`): Contents of the queries.
            position_embeddings (`torch.Tensor` of the same shape): Positions of the queries.
            memory (`torch.Tensor` of shape `(batch_size, sequence_length, d_model)`): The feature levels to sample.
            reference_points (`torch.Tensor` of shape `(batch_size, num_queries, num_levels, 2 or 4)`):
                Points (x, y) or boxes (center x, center y, width, height), fractions of each level's padded map.
            levels ([`DinoDetrFeatureLevels`]): Shapes and mask of the levels; padding reads zero.

        Returns:
            The output, `(batch_size, num_queries, d_model)`, and the attention weights,
            `(batch_size, num_queries, num_heads, num_levels, num_points)`.
        """
        batch_size, num_queries, _ = hidden_states.shape
        points_shape = (batch_size, num_queries, self.num_heads, self.num_levels, self.num_points)
        queries = hidden_states + position_embeddings

        value = self.project_values(memory, levels)
        value = value.unflatten(-1, (self.num_heads, value.shape[-1] // self.num_heads))
        offsets = self.sampling_offsets(queries).view(*points_shape, 2)
        logits = self.attention_weights(queries).view(points_shape)

        output, weights = self._attend(value, reference_points, offsets, logits, levels)
        return self.output_proj(output), weights

    def project_values(self, memory: torch.Tensor, levels: DinoDetrFeatureLevels) -> torch.Tensor:
        """Return the values to sample, of the shape of the memory, zero in the padding."""
        rows = self.value_proj(memory.flatten(0, 1))  # not a view, which is costly to overwrite before a backward pass
        return rows.masked_fill_(~levels.mask.flatten()[:, None], 0.0).view_as(memory)

    def _attend(
        self,
        value: torch.Tensor,
        reference_points: torch.Tensor,
        offsets: torch.Tensor,
        logits: torch.Tensor,
        levels: DinoDetrFeatureLevels,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sampled values and the attention weights, by the fused operator or by `attn`."""
        fused_operator = self._fused_operator(value.device)
        if fused_operator is not None:
            return fused_operator(value, levels.spatial_shapes_list, reference_points, offsets, logits)
        weights = logits.flatten(-2).softmax(dim=-1).view(logits.shape)
        output = self.attn(
            value,
            levels.spatial_shapes,
            levels.spatial_shapes_list,
            levels.level_start_index,
            compute_sampling_locations(offsets, reference_points, levels.spatial_shapes),
            weights,
            self.im2col_step,
        )
        return output, weights

    def _fused_operator(self, device: torch.device) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
        """Return the compiled operator that includes softmax and locations, or `None` if `attn` was replaced."""
        is_replaced = type(self.attn) is not MultiScaleDeformableAttention or "forward" in self.attn.__dict__
        compiled = None if is_replaced else operators(device)
        return compiled.fused_deformable_attention if compiled else None


def compute_sampling_locations(
    sampling_offsets: torch.Tensor, reference_points: torch.Tensor, spatial_shapes: torch.Tensor
) -> torch.Tensor:
    """Add offsets to reference points, or to the centers of reference boxes.

    For points, offsets are in cells; for boxes, in units of half the width and height of the box divided by
    `num_points`, so that an offset of `num_points` reaches the edge.

    Args:
        sampling_offsets (`torch.Tensor` of shape `(batch_size, num_queries, num_heads, num_levels, num_points, 2)`):
            (x, y).
        reference_points (`torch.Tensor` of shape `(batch_size, num_queries, num_levels, 2 or 4)`):
            Fractions of the padded maps: (x, y), or center x, center y, width, height.
        spatial_shapes (`torch.Tensor` of shape `(num_levels, 2)`): (height, width).

    Returns:
        `torch.Tensor` of the shape of `sampling_offsets`: (x, y) as fractions of the padded maps, float32 or
        higher.
    """
    offsets = at_least_float32(sampling_offsets)
    centers = reference_points[:, :, None, :, None, :2]
    if reference_points.shape[-1] == 2:
        cell = 1 / spatial_shapes.flip(-1).to(offsets.dtype)  # (levels, 2): its width and height as fractions
        return torch.addcmul(centers, offsets, cell[:, None, :])
    num_points = offsets.shape[-2]
    return centers + offsets * (reference_points[:, :, None, :, None, 2:] * (0.5 / num_points))
