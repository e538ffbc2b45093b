"""Record where a model looks in an image: selected tokens, refined boxes, sampling points, attention; and draw it."""

from .figures import draw_reference_points, draw_refinement, draw_sampling_points
from .recorder import Inspection, PositionalAttention, Recorder, inspect_image, inspect_positional_attention
from .teaching import (
    draw_anchors,
    draw_box_noise,
    draw_denoising_mask,
    draw_positional_attention,
    draw_query_selections,
    draw_sampling_heads,
    sample_noisy_boxes,
)


__all__ = [
    "Inspection",
    "PositionalAttention",
    "Recorder",
    "draw_anchors",
    "draw_box_noise",
    "draw_denoising_mask",
    "draw_positional_attention",
    "draw_query_selections",
    "draw_reference_points",
    "draw_refinement",
    "draw_sampling_heads",
    "draw_sampling_points",
    "inspect_image",
    "inspect_positional_attention",
    "sample_noisy_boxes",
]
