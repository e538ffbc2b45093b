"""The operator as a layer that takes the place of `kernels-community/deformable-detr`'s."""

import torch
from torch import nn


class MultiScaleDeformableAttention(nn.Module):
    """Stateless, with the seven arguments that transformers' layers pass. See [`deformable_attention`]."""

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
