"""See before the first step that no picture will be too small for the model."""

import math
from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from ..errors import InputError
from ..evaluation.detections import evaluation_mode


@torch.no_grad()
def check_picture_sizes(model: PreTrainedModel, shapes: Iterable[tuple[int, int]]) -> None:
    """Let the model choose its queries from the features of the smallest of these pictures.

    Args:
        model (`PreTrainedModel`): A `DinoDetrForObjectDetection`, before `accelerator.prepare`.
        shapes (`Iterable[tuple[int, int]]`): `(height, width)` in pixels of the pictures that it will be given.

    Raises:
        InputError: If the picture has too few features.
    """
    height, width = min(shapes, key=math.prod)
    base = model.model
    # two, because group norm refuses a level of a single cell in a single picture
    pictures = torch.zeros(2, 3, height, width, device=model.device, dtype=model.dtype)
    with evaluation_mode(model):
        levels = base.backbone(pictures, torch.ones_like(pictures[:, 0]))
        try:
            base.query_selection(levels.features, levels)
        except ValueError as error:
            raise InputError(f"pictures become as small as {height} x {width} pixels: {error}") from None
