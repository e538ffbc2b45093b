"""From images and COCO annotations to the model's inputs, and from its outputs to boxes in pixels.

Both backends of transformers: torchvision (the default, fast, also on an accelerator) and PIL (bit for bit the
original's pixels).
"""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.ops import batched_nms, box_convert
from transformers import BatchFeature, DetrImageProcessor, DetrImageProcessorPil
from transformers.image_utils import SizeDict
from transformers.utils import logging


logger = logging.get_logger(__name__)

SHORTEST_EDGE, LONGEST_EDGE = 800, 1333  # pixels; what the original was trained and measured with


def get_size_with_aspect_ratio(height: int, width: int, shortest_edge: int, longest_edge: int) -> tuple[int, int]:
    """The shape that an image is resized to: its shorter side to `shortest_edge`, unless the longer one would exceed.

    The rounding is the original's, which transformers' own differs from by a pixel in most images that are limited
    by `longest_edge` (facebookresearch/detr, datasets/transforms.py).

    Args:
        height, width (`int`): Of the image, in pixels.
        shortest_edge, longest_edge (`int`): Limits, in pixels. Rounding may exceed `longest_edge` by a pixel.

    Returns:
        `(height, width)` in pixels.

    Example:

    ```python
    >>> get_size_with_aspect_ratio(480, 640, shortest_edge=800, longest_edge=1333)
    (800, 1066)
    >>> get_size_with_aspect_ratio(300, 1000, shortest_edge=800, longest_edge=1333)
    (400, 1333)

    ```
    """
    short, long = min(height, width), max(height, width)
    if long / short * shortest_edge > longest_edge:
        shortest_edge = max(1, round(longest_edge * short / long))
    if short == shortest_edge:
        return height, width
    other = int(shortest_edge * long / short)
    return (shortest_edge, other) if height <= width else (other, shortest_edge)


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """An 8-bit RGB version of a PIL image.

    Palette, gray and CMYK images are converted, transparent parts lie on white, and 16-bit gray is divided by 257,
    so that 65535 becomes 255; PIL's own conversion would clip it at 255, which makes nearly all of it white.

    Raises:
        ValueError: If values are floats or need more than 16 bits: their black and white points are unknown.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """16-bit values, 0 to 65535, as 8-bit ones."""
    if not np.issubdtype(values.dtype, np.integer) or values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"the image holds {values.dtype} values from {values.min()} to {values.max()}, whose black and white "
            f"points are unknown; save it with 8 or 16 bits per channel"
        )
    return (values // 257).astype(np.uint8)


class DinoDetrImageProcessorMixin:
    """What DINO does otherwise than transformers' DETR processors, for both backends."""

    do_convert_rgb = True

    def preprocess(
        self,
        images: Any,
        annotations: dict[str, Any] | list[dict[str, Any]] | None = None,
        *args: Any,
        category_id_to_label: dict[int, int] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Resize, normalize and pad images, and turn their COCO annotations into labels.

        Args:
            images (image or list of images): PIL images, arrays or tensors.
            annotations (`dict` or `list[dict]`, *optional*):
                Per image `{"image_id": int, "annotations": [...]}` with COCO's `category_id`, `bbox` (x, y, width,
                height in pixels), and optionally `area` and `iscrowd`. Crowds are left out; boxes are clipped to the
                image, and those without an area are left out with a warning.
            category_id_to_label (`dict[int, int]`, *optional*):
                Label of each category id. Without it category ids are taken to be labels.

        Returns:
            `BatchFeature` with `pixel_values` `(batch_size, 3, height, width)`, `pixel_mask` `(batch_size, height,
            width)`, 1 where there is image, and, with annotations, `labels`: per image `class_labels`, `boxes`
            (center x, center y, width, height as fractions of the *unpadded* image), `image_id`, `area`, `iscrowd`,
            `orig_size` and `size` (height, width before and after resizing).

        Raises:
            ValueError: If a category id is not in `category_id_to_label`, naming it and its image.
        """
        if annotations is not None:
            targets = [annotations] if isinstance(annotations, dict) else annotations
            annotations = [_complete(target, category_id_to_label) for target in targets]
        return super().preprocess(images, annotations, *args, **kwargs)

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(image, Image.Image):
            image = convert_to_rgb(image)
        elif isinstance(image, np.ndarray) and image.dtype == np.uint16:
            image = _to_8_bits(image)
        channels = super().process_image(image, *args, **kwargs)
        return channels[[0, 0, 0]] if len(channels) == 1 else channels  # older transformers leave gray arrays gray

    def resize(self, image: Any, size: SizeDict, *args: Any, **kwargs: Any) -> Any:
        if size.shortest_edge and size.longest_edge:
            height, width = image.shape[-2:]
            height, width = get_size_with_aspect_ratio(height, width, size.shortest_edge, size.longest_edge)
            size = SizeDict(height=height, width=width)
        return super().resize(image, size, *args, **kwargs)

    def prepare_annotation(self, image: Any, target: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        prepared = super().prepare_annotation(image, target, *args, **kwargs)
        prepared["size"] = prepared["orig_size"]  # until it is resized, which it need not be
        num_objects = sum(not each.get("iscrowd", 0) for each in target.get("annotations", ()))
        if len(prepared["boxes"]) < num_objects:
            missing = num_objects - len(prepared["boxes"])
            logger.warning(
                f"image_id {target['image_id']}: {missing} of {num_objects} boxes have no area inside the image and "
                f"are left out"
            )
        return prepared

    def _update_annotation_for_padded_image(
        self,
        annotation: dict[str, Any],
        input_image_size: Any,
        output_image_size: Any,
        padding: Any,
        update_bboxes: bool,
    ) -> dict[str, Any]:
        """Boxes and `size` stay relative to the image without its padding: so do DINO's predictions."""
        updated = super()._update_annotation_for_padded_image(
            annotation, input_image_size, output_image_size, padding, update_bboxes=False
        )
        updated["size"] = annotation["size"]
        return updated

    def post_process_object_detection(
        self,
        outputs: Any,
        threshold: float = 0.5,
        target_sizes: torch.Tensor | list[tuple[int, int]] | None = None,
        top_k: int = 300,
        nms_iou_threshold: float | None = None,
    ) -> list[dict[str, torch.Tensor]]:
        """
        The best detections of each image. A query can be detected as more than one class.

        Args:
            outputs ([`DinoDetrObjectDetectionOutput`]): Only `logits` and `pred_boxes` are read.
            threshold (`float`): Detections that score less or equal are left out.
            target_sizes (`torch.Tensor` of shape `(batch_size, 2)` or `list[tuple[int, int]]`, *optional*):
                (height, width) of the original images. Without it boxes stay fractions.
            top_k (`int`): Most detections per image.
            nms_iou_threshold (`float`, *optional*):
                Leave out detections that overlap a better one of the same class by more than this. DINO needs none.

        Returns:
            Per image `scores` `(num_detections,)`, from high to low, `labels` `(num_detections,)` and `boxes`
            `(num_detections, 4)`: left, top, right, bottom, in pixels.

        Raises:
            ValueError: If `target_sizes` is not one size per image.
        """
        logits, pred_boxes = outputs.logits, outputs.pred_boxes
        batch_size, _, num_labels = logits.shape
        if target_sizes is None:
            target_sizes = pred_boxes.new_ones(batch_size, 2)
        target_sizes = torch.as_tensor(target_sizes, dtype=pred_boxes.dtype).to(pred_boxes.device)
        if target_sizes.shape != (batch_size, 2):
            raise ValueError(
                f"target_sizes must be (height, width) for each of the {batch_size} images, "
                f"got a shape of {tuple(target_sizes.shape)}"
            )

        all_scores = logits.to(pred_boxes.dtype).sigmoid().flatten(1)  # (batch, queries * labels)
        scores, places = all_scores.topk(min(top_k, all_scores.shape[1]), dim=1)
        queries, labels = places // num_labels, places % num_labels
        boxes = box_convert(pred_boxes, "cxcywh", "xyxy").gather(1, queries[..., None].expand(-1, -1, 4))
        boxes = boxes * target_sizes[:, [1, 0, 1, 0]][:, None]  # width, height, width, height

        detections = []
        for image in range(batch_size):
            keep = scores[image] > threshold
            found = {"scores": scores[image][keep], "labels": labels[image][keep], "boxes": boxes[image][keep]}
            if nms_iou_threshold is not None:
                best = batched_nms(found["boxes"], found["scores"], found["labels"], nms_iou_threshold)
                found = {name: values[best] for name, values in found.items()}
            detections.append(found)
        return detections

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, but a saved processor names both backends for those who load it with its code."""
        return super().to_dict() | {"auto_map": {"AutoImageProcessor": BACKENDS}}


def _complete(target: dict[str, Any], category_id_to_label: dict[int, int] | None) -> dict[str, Any]:
    """An image's annotations with labels in place of category ids and areas where they are missing."""
    objects = target.get("annotations")
    if objects is None:
        return target  # transformers says what is wrong with it
    return {**target, "annotations": [_complete_object(each, target, category_id_to_label) for each in objects]}


def _complete_object(
    annotation: dict[str, Any], target: dict[str, Any], category_id_to_label: dict[int, int] | None
) -> dict[str, Any]:
    name = f"image_id {target.get('image_id')}"
    if "category_id" not in annotation or len(annotation.get("bbox", ())) != 4:
        raise ValueError(f"{name}: an annotation must have a category_id and a bbox of 4 numbers, got {annotation}")
    category = annotation["category_id"]
    if category_id_to_label is not None and category not in category_id_to_label:
        raise ValueError(
            f"{name}: category_id {category} is not among those that were mapped to labels, "
            f"{sorted(category_id_to_label)}"
        )
    label = category if category_id_to_label is None else category_id_to_label[category]
    width, height = annotation["bbox"][2:]
    return {"area": width * height, **annotation, "category_id": label}


class DinoDetrImageProcessor(DinoDetrImageProcessorMixin, DetrImageProcessor):
    """DINO's image processor, torchvision backend. See [`DinoDetrImageProcessorMixin`] for what it takes and gives."""


class DinoDetrImageProcessorPil(DinoDetrImageProcessorMixin, DetrImageProcessorPil):
    """DINO's image processor, PIL backend: the same numbers as the original's. See [`DinoDetrImageProcessorMixin`]."""


BACKENDS = {
    "torchvision": f"image_processing_dino_detr.{DinoDetrImageProcessor.__name__}",
    "pil": f"image_processing_dino_detr.{DinoDetrImageProcessorPil.__name__}",
}
DinoDetrImageProcessor.register_for_auto_class()
DinoDetrImageProcessorPil.register_for_auto_class()

__all__ = ["DinoDetrImageProcessor", "DinoDetrImageProcessorPil", "get_size_with_aspect_ratio"]
