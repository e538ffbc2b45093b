"""See before the first step that no image will be too small for the model."""

import math
from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from ..evaluation.predictions import eval_mode
from ..utils.errors import InputError


@torch.no_grad()
def check_min_image_size(model: PreTrainedModel, shapes: Iterable[tuple[int, int]]) -> None:
    """Let the model choose its queries from the features of the smallest of these images.

    Args:
        model (`PreTrainedModel`): A `DinoDetrForObjectDetection`, before `accelerator.prepare`.
        shapes (`Iterable[tuple[int, int]]`): `(height, width)` in pixels of the images that it will be given.

    Raises:
        InputError: If the image has too few features.
    """
    height, width = min(shapes, key=math.prod)
    base = model.model
    # two, because group norm refuses a level of a single cell in a single image
    images = torch.zeros(2, 3, height, width, device=model.device, dtype=model.dtype)
    with eval_mode(model):
        levels = base.backbone(images, torch.ones_like(images[:, 0]))
        try:
            base.query_selection(levels.features, levels)
        except ValueError as error:
            raise InputError(f"images become as small as {height} x {width} pixels: {error}") from None
