"""Record one forward pass by hooks: the tokens that become queries, their boxes and the points that they sample.

The model is not changed. Only the class scores of the decoder layers and a top-k are computed a second time.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.ops import box_convert
from transformers import BaseImageProcessor

from ..deformable_attention_dino_detr import compute_sampling_locations
from ..query_selection_dino_detr import gen_encoder_output_proposals
from ..reference_points_dino_detr import cell_centers
from ..registration import DinoDetrForObjectDetection


Calls = list[tuple[tuple[Any, ...], Any]]  # arguments and output of each call of a module


@dataclass(frozen=True)
class Inspection:
    """What one forward pass did with one image. Points are (x, y), boxes are x0, y0, x1, y1, both in its pixels.

    Query `i` starts from token `i` of the encoder. With static query selection no tokens are selected: their arrays
    have length 0, and the first reference boxes are learned.

    Attributes:
        image_size (`tuple[int, int]`): Width and height of the image in pixels.
        token_points (`np.ndarray` of shape `(num_queries, 2)`): Centers of the selected tokens' cells.
        token_levels (`np.ndarray` of shape `(num_queries,)`): Their feature levels, from 0, the finest.
        token_scores (`np.ndarray` of shape `(num_queries,)`): The scores that they were selected by, descending.
        token_labels (`np.ndarray` of shape `(num_queries,)`): Their classes with the highest score.
        proposals (`np.ndarray` of shape `(num_queries, 4)`): Their boxes before the encoder's box head moves them.
        reference_boxes (`np.ndarray` of shape `(decoder_layers + 1, num_queries, 4)`):
            At `[layer]` the boxes that a layer looks around, at `[layer + 1]` those that it passes on.
        boxes (`np.ndarray` of shape `(decoder_layers, num_queries, 4)`): Boxes that each layer predicts; the last are
            the model's.
        scores (`np.ndarray` of shape `(decoder_layers, num_queries, num_labels)`): Class scores of each layer.
        sampling_points (`np.ndarray` of shape `(decoder_layers, num_queries, num_heads, num_levels, num_points, 2)`):
            Where each layer reads the feature levels.
        attention_weights (`np.ndarray` of shape `(decoder_layers, num_queries, num_heads, num_levels, num_points)`):
            Their weights, which sum to 1 over the levels and points of a head.
    """

    image_size: tuple[int, int]
    token_points: np.ndarray
    token_levels: np.ndarray
    token_scores: np.ndarray
    token_labels: np.ndarray
    proposals: np.ndarray
    reference_boxes: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    sampling_points: np.ndarray
    attention_weights: np.ndarray

    def find_query(self, box: Any, label: int, score: float) -> int:
        """Return the query whose final box and score of a class are those of a detection, or closest to them."""
        candidates = np.column_stack([self.boxes[-1], self.scores[-1, :, label]])
        return int(np.abs(candidates - [*box, score]).sum(axis=1).argmin())

    def keep_queries(self, queries: list[int]) -> "Inspection":
        """Return the decoder's part for some queries only, in this order; all selected tokens are kept."""
        names = ("reference_boxes", "boxes", "scores", "sampling_points", "attention_weights")
        return replace(self, **{name: getattr(self, name)[:, queries] for name in names})


class Recorder:
    """Record what a model does with an image, in a `with` block in which it is called once.

    Args:
        model (`DinoDetrForObjectDetection`): In evaluation mode, on any device.

    Example:

    ```python
    with Recorder(model) as recorder:
        detections = detect_objects(model, processor, image, threshold=0.3)
    inspection = recorder.inspection(image.size)
    ```
    """

    def __init__(self, model: DinoDetrForObjectDetection):
        self.model = model
        self.calls: dict[str, Calls] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> "Recorder":
        core: Any = self.model.model
        attentions = [layer.encoder_attn for layer in core.decoder.layers]
        self._listen("backbone", [core.backbone])
        self._listen("token scores", core.query_selection.class_specific_layers())
        self._listen("sampling offsets", [attention.sampling_offsets for attention in attentions])
        self._listen("attention", attentions)
        self._listen("model", [core])
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def _listen(self, name: str, modules: Sequence[nn.Module]) -> None:
        calls: Calls = []
        self.calls[name] = calls
        for module in modules:
            handle = module.register_forward_hook(lambda _, args, output: calls.append((args, output)))
            self._hooks.enter_context(handle)

    @torch.inference_mode()
    def inspection(self, image_size: tuple[int, int]) -> Inspection:
        """Return what was recorded.

        Args:
            image_size (`tuple[int, int]`): Width and height in pixels of the image before it was resized.

        Raises:
            ValueError: If the model was not called once with one image.
        """
        num_images = [len(output.features) for _, output in self.calls["backbone"]]
        if num_images != [1]:
            raise ValueError(f"record one call of the model with one image, got calls with {num_images} images")
        (((_, mask), levels),), ((_, output),) = self.calls["backbone"], self.calls["model"]
        size = mask.new_tensor(image_size, dtype=torch.float32)
        padded_size = size * _padding_factor(mask[0])
        states = output.intermediate_hidden_states.to(self.model.dtype)
        references = torch.cat([output.init_reference_points, output.intermediate_reference_points[0]])
        fields = {
            **self._tokens(levels, size, padded_size, output.enc_outputs_class),
            "reference_boxes": _to_corners(references, size),
            "boxes": _to_corners(output.intermediate_boxes[0], size),
            "scores": self.model.predict_classes(states, range(states.shape[1]))[0].sigmoid(),
            "sampling_points": torch.cat(self._sampling_locations()) * padded_size,
            "attention_weights": torch.cat([weights for _, (_, weights) in self.calls["attention"]]),
        }
        return Inspection(image_size, **{name: _to_numpy(each) for name, each in fields.items()})

    def _sampling_locations(self) -> list[torch.Tensor]:
        """Return (x, y) of each layer as fractions of the padded image, as the operator computes them."""
        calls = zip(self.calls["sampling offsets"], self.calls["attention"])
        return [
            compute_sampling_locations(offsets.view(*weights.shape, 2), reference_points, levels.spatial_shapes)
            for (_, offsets), ((*_, reference_points, levels), (_, weights)) in calls
        ]

    def _tokens(
        self, levels: Any, size: torch.Tensor, padded_size: torch.Tensor, class_logits: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Return what is recorded of the selected tokens; sizes are (width, height) in pixels of the image."""
        none = size.new_zeros(0)
        proposals, _ = gen_encoder_output_proposals(levels)
        ranking = [logits[0].amax(dim=-1) for _, logits in self.calls["token scores"]]  # none if static
        tokens = torch.cat([none.long(), *(each.topk(self.model.config.num_queries).indices for each in ranking)])
        centers = [
            cell_centers(height, width, size.device) / size.new_tensor([width, height])
            for height, width in levels.spatial_shapes_list
        ]
        return {
            "token_points": torch.cat(centers)[tokens] * padded_size,
            "token_levels": torch.bucketize(tokens, levels.level_start_index, right=True) - 1,
            "token_scores": torch.cat([none, *ranking])[tokens].sigmoid(),
            "token_labels": none.long() if class_logits is None else class_logits[0].argmax(dim=-1),
            "proposals": _to_corners(proposals[0, tokens], size),
        }


def inspect_image(model: DinoDetrForObjectDetection, processor: BaseImageProcessor, image: Image.Image) -> Inspection:
    """Record what a model does with an image, in one forward pass.

    Args:
        model (`DinoDetrForObjectDetection`): In evaluation mode, on any device.
        processor (`BaseImageProcessor`): The model's image processor.
        image (`PIL.Image.Image`): The image.

    Example:

    ```python
    inspection = inspect_image(model, processor, image)
    best = inspection.scores[-1].max(axis=1).argmax()
    draw_sampling_points(image, inspection, best).save("looked.png")
    ```
    """
    inputs = processor(images=image, return_tensors="pt").to(model.device)
    with torch.inference_mode(), Recorder(model) as recorder:
        model(**inputs)
    return recorder.inspection(image.size)


def _padding_factor(mask: torch.Tensor) -> torch.Tensor:
    """Return by what padding multiplied the (width, height) of an image, given its mask `(height, width)`."""
    height, width = mask.shape
    unpadded = torch.stack([mask.any(dim=0).sum(), mask.any(dim=1).sum()])
    return mask.new_tensor([width, height], dtype=torch.float32) / unpadded


def _to_corners(boxes: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Turn center x, center y, width, height, fractions of an image of `size`, into corners in pixels."""
    return box_convert(boxes, "cxcywh", "xyxy") * size.repeat(2)


def _to_numpy(values: torch.Tensor) -> np.ndarray:
    return (values.float() if values.is_floating_point() else values).cpu().numpy()
