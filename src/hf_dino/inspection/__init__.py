"""Record where a model looks in an image: selected tokens, refined boxes and sampling points; and draw them."""

from .figures import draw_reference_points, draw_refinement, draw_sampling_points
from .recorder import Inspection, Recorder, inspect_image


__all__ = [
    "Inspection",
    "Recorder",
    "draw_reference_points",
    "draw_refinement",
    "draw_sampling_points",
    "inspect_image",
]
