"""The operator as a layer that can replace the one of `kernels-community/deformable-detr`."""

import torch
from torch import nn


class MultiScaleDeformableAttention(nn.Module):
    """Call [`deformable_attention`] with the seven arguments that transformers' layers pass; has no state."""

    has_backward = True
    can_torch_compile = True

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
        from . import deformable_attention

        return deformable_attention(value, value_spatial_shapes_list, sampling_locations, attention_weights)
