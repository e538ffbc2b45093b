"""Turn images and COCO annotations into the model's inputs, and its outputs into boxes in pixels.

The image processor has both backends of transformers: torchvision (the default; fast, also on an accelerator) and PIL
(bitwise identical to the official implementation).
"""

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.ops import batched_nms, box_convert
from transformers import BatchFeature, DetrImageProcessor, DetrImageProcessorPil
from transformers.image_utils import SizeDict
from transformers.utils import logging


logger = logging.get_logger(__name__)

SHORTEST_EDGE, LONGEST_EDGE = 800, 1333  # pixels; the official implementation trains and evaluates with these

WHITE = 255
TOLERANCE = 1e-3  # how far values may exceed their range, as a fraction of it: rounding errors
DARK_LIMIT = 2**14  # values below use at most 14 of 16 bits, as those of many cameras and X-ray devices
DARK_ADVICE = "scale them yourself, e.g. 12 bits by np.uint8(pixels * (255 / 4095)), unless the image is dark"


def get_size_with_aspect_ratio(height: int, width: int, shortest_edge: int, longest_edge: int) -> tuple[int, int]:
    """Return the size to resize an image to: the shorter side is `shortest_edge`, or less to respect `longest_edge`.

    The rounding is that of the official implementation (facebookresearch/detr, datasets/transforms.py). transformers'
    function of this name differs by a pixel for most images that are limited by `longest_edge`.

    Args:
        height, width (`int`): Of the image, in pixels.
        shortest_edge, longest_edge (`int`): Limits, in pixels. Rounding may exceed `longest_edge`: by a pixel, or more
            for an image that is many times longer than wide.

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
    """Convert a PIL image to 8-bit RGB.

    Palette, gray and CMYK images are converted, transparent parts become white, and 16-bit gray values are divided by
    257, so that 65535 becomes 255. PIL itself would clip them at 255, which makes most of the image white.

    Raises:
        ValueError: If values are floats or need more than 16 bits, because their black and white points are unknown.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Convert 16-bit values, 0 to 65535, to 8-bit values."""
    if not np.issubdtype(values.dtype, np.integer) or values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"the image has {values.dtype} values from {values.min()} to {values.max()}, whose black and white "
            f"points are unknown; save it with 8 or 16 bits per channel"
        )
    return (values // 257).astype(np.uint8)


def _warn_if_dark(values: np.ndarray) -> None:
    if 0 < values.max() < DARK_LIMIT:
        logger.warning_once(f"16-bit values below {DARK_LIMIT}, divided by 257, are nearly black: {DARK_ADVICE}")


def to_8_bit_scale(images: list[Any]) -> list[Any]:
    """Bring images of other dtypes than uint8 to values from 0 to 255.

    Floats in [0, 1] are multiplied by 255 with a warning, because `do_rescale` would divide them a second time. Zeros
    and ones alone are taken for a nearly black image if another image has larger values.

    Args:
        images (list of `np.ndarray` or `torch.Tensor`): Channels first, in the range of 8 bits or in [0, 1].

    Returns:
        Images of the same kinds: uint8, but float32 for tensors of floats. The PIL backend, whose images are arrays,
        resizes nothing but uint8.

    Raises:
        ValueError: If values are in neither range, or not finite.
    """
    peaks = {index: _peak(image) for index, image in enumerate(images) if _dtype_name(image) != "uint8"}
    has_levels = any(peak > 1 + TOLERANCE for peak in peaks.values())
    return [
        _scale_to_8_bits(image, peaks[index], has_levels) if index in peaks else image
        for index, image in enumerate(images)
    ]


def _dtype_name(image: Any) -> str:
    return str(getattr(image, "dtype", "")).removeprefix("torch.")


def _is_finite(image: Any) -> bool:
    return "float" not in _dtype_name(image) or math.isfinite(float(image.max()) - float(image.min()))


def _is_whole(image: Any) -> bool:
    return bool((image == image.round()).all())


def _peak(image: Any) -> float:
    """Return the largest value, once all values are known to be in one of the two ranges."""
    low, high = float(image.min()), float(image.max())
    is_between = "float" in _dtype_name(image) and 1 + TOLERANCE < high < 2 and not _is_whole(image)
    if not -TOLERANCE <= low <= high <= WHITE * (1 + TOLERANCE) or is_between:
        raise ValueError(
            f"the image has {_dtype_name(image)} values from {low:g} to {high:g}, but do_rescale needs 0 to 255, or "
            f"floats in 0 to 1: clip it or convert it to uint8. If it is rescaled or normalized already, pass "
            f"do_rescale=False and do_normalize=False"
        )
    return high


def _scale_to_8_bits(image: Any, peak: float, has_levels: bool) -> Any:
    dtype = _dtype_name(image)
    is_float, is_array = "float" in dtype, isinstance(image, np.ndarray)
    is_unit = dtype == "bool" or (is_float and peak <= 1 + TOLERANCE and not (has_levels and _is_whole(image)))
    if is_unit and is_float and peak > 0:
        logger.warning_once(
            "float images in 0 to 1 are taken as rescaled and not divided by 255 again; do_rescale=False says so "
            "without this warning"
        )
    levels = (image.astype(np.float32) if is_array else image.to(torch.float32)) * (WHITE if is_unit else 1)
    if is_float and not is_array:
        return levels
    levels = levels.round().clip(0, WHITE)
    return levels.astype(np.uint8) if is_array else levels.to(torch.uint8)


class DinoDetrImageProcessorMixin:
    """Differences from transformers' DETR image processors, for both backends."""

    do_convert_rgb = True
    do_convert_annotations = True  # transformers does not make boxes fractions if it does not normalize

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
            images (image or list of images):
                PIL images, arrays or tensors: 8-bit, 16-bit (divided by 257), or floats from 0 to 255. Floats in
                0 to 1 are not rescaled again, which is logged unless `do_rescale=False` says so.
            annotations (`dict` or `list[dict]`, *optional*):
                Per image `{"image_id": int, "annotations": [...]}` with COCO's `category_id`, `bbox` (x, y, width,
                height in pixels), and optionally `area` and `iscrowd`. Annotations with `iscrowd` are dropped; boxes
                are clipped to the image, and boxes without an area are dropped with a warning.
            category_id_to_label (`dict[int, int]`, *optional*):
                Label of each category id. By default, category ids are labels.

        Returns:
            `BatchFeature` with

            - `pixel_values` `(batch_size, 3, height, width)`;
            - `pixel_mask` `(batch_size, height, width)`: 1 is image, 0 is padding;
            - `labels`, if there are annotations. For each image: `class_labels` `(num_objects,)`; `boxes`
              `(num_objects, 4)`, which are center x, center y, width, height as fractions of the *unpadded* image;
              `orig_size` and `size`, which are (height, width) before and after resizing; and COCO's `image_id`,
              `area` and `iscrowd`.

        Raises:
            ValueError: If a category id is not in `category_id_to_label` or an annotation is malformed, naming the
                image; or if the values of an image are neither in 0 to 255 nor floats in 0 to 1.
        """
        if annotations is not None:
            targets = [annotations] if isinstance(annotations, dict) else annotations
            annotations = [_map_categories(target, category_id_to_label) for target in targets]
        return super().preprocess(images, annotations, *args, **kwargs)

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(image, Image.Image):
            if image.mode.startswith("I"):
                _warn_if_dark(np.asarray(image))
            image = convert_to_rgb(image)
        elif _dtype_name(image) == "uint16":
            values = image if isinstance(image, np.ndarray) else image.cpu().numpy()
            _warn_if_dark(values)
            reduced = _to_8_bits(values)
            image = reduced if image is values else torch.from_numpy(reduced).to(image.device)
        channels = super().process_image(image, *args, **kwargs)
        return channels[[0, 0, 0]] if len(channels) == 1 else channels  # transformers 5.14 leaves gray arrays gray

    def _preprocess(
        self, images: list[Any], *args: Any, do_rescale: bool, rescale_factor: float, **kwargs: Any
    ) -> BatchFeature:
        if do_rescale and math.isclose(rescale_factor, 1 / WHITE):
            images = to_8_bit_scale(images)
        elif not all(map(_is_finite, images)):
            raise ValueError("the values of an image are NaN or infinite")
        return super()._preprocess(images, *args, do_rescale=do_rescale, rescale_factor=rescale_factor, **kwargs)

    def resize(self, image: Any, size: SizeDict, *args: Any, **kwargs: Any) -> Any:
        if size.shortest_edge and size.longest_edge:
            height, width = image.shape[-2:]
            height, width = get_size_with_aspect_ratio(height, width, size.shortest_edge, size.longest_edge)
            size = SizeDict(height=height, width=width)
        if isinstance(image, np.ndarray) and image.dtype.kind == "f" and 0 <= image.min() <= image.max() <= 1:
            # transformers would round them down to 8 bits
            levels = np.rint(image * WHITE).astype(np.uint8)
            return super().resize(levels, size, *args, **kwargs) / np.float32(WHITE)
        return super().resize(image, size, *args, **kwargs)

    def prepare_annotation(self, image: Any, target: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        prepared = super().prepare_annotation(image, target, *args, **kwargs)
        prepared["size"] = prepared["orig_size"]  # updated if the image is resized
        num_objects = sum(not annotation.get("iscrowd", 0) for annotation in target.get("annotations", ()))
        if len(prepared["boxes"]) < num_objects:
            missing = num_objects - len(prepared["boxes"])
            logger.warning(
                f"image_id {target['image_id']}: {missing} of {num_objects} boxes have no area inside the image and "
                f"are dropped"
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
        """Keep boxes and `size` relative to the unpadded image, as DINO's predictions are."""
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
        Convert outputs to detections, at most `top_k` per image. A query can be a detection of more than one class.

        Args:
            outputs ([`DinoDetrObjectDetectionOutput`]): Only `logits` and `pred_boxes` are read.
            threshold (`float`, *optional*, defaults to 0.5): Detections with a score up to this are dropped.
            target_sizes (`torch.Tensor` of shape `(batch_size, 2)` or `list[tuple[int, int]]`, *optional*):
                (height, width) of the original images in pixels. Without it boxes are fractions.
            top_k (`int`, *optional*, defaults to 300): Maximum number of detections per image.
            nms_iou_threshold (`float`, *optional*):
                IoU for non-maximum suppression within each class. By default there is none, and DINO needs none.

        Returns:
            Per image `scores` `(num_detections,)` in descending order, `labels` `(num_detections,)` and `boxes`
            `(num_detections, 4)`: left, top, right, bottom, in pixels.

        Raises:
            ValueError: If `target_sizes` is not one size per image.
            FloatingPointError: If a score or a box is NaN or infinite.
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

        _check_finite(logits, pred_boxes)
        all_scores = logits.to(pred_boxes.dtype).sigmoid().flatten(1)  # (batch, queries * labels)
        scores, topk_indices = all_scores.topk(min(top_k, all_scores.shape[1]), dim=1)
        queries, labels = topk_indices // num_labels, topk_indices % num_labels
        boxes = box_convert(pred_boxes, "cxcywh", "xyxy").gather(1, queries[..., None].expand(-1, -1, 4))
        boxes = boxes * target_sizes[:, [1, 0, 1, 0]][:, None]  # width, height, width, height

        results = []
        for image in range(batch_size):
            keep = scores[image] > threshold
            detections = {"scores": scores[image][keep], "labels": labels[image][keep], "boxes": boxes[image][keep]}
            if nms_iou_threshold is not None:
                best = batched_nms(detections["boxes"], detections["scores"], detections["labels"], nms_iou_threshold)
                detections = {name: values[best] for name, values in detections.items()}
            results.append(detections)
        return results

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dictionary as transformers does, with the code of both backends in `auto_map`."""
        return super().to_dict() | {"auto_map": {"AutoImageProcessor": BACKENDS}}


def _check_finite(logits: torch.Tensor, pred_boxes: torch.Tensor) -> None:
    """Raise an error if detections would be NaN or infinite. A class may be excluded by a logit of minus infinity."""
    is_finite = (logits < math.inf).all() & pred_boxes.isfinite().all()
    if not is_finite:
        raise FloatingPointError(
            "the model's scores or boxes are NaN or infinite: fp16 overflowed (use bf16 or float32), or the weights "
            "diverged in training or are damaged (use an earlier checkpoint)"
        )


def _map_categories(target: Any, category_id_to_label: dict[int, int] | None) -> Any:
    """Replace category ids by labels, and fill in missing areas, in the annotations of an image."""
    if not isinstance(target, dict) or not isinstance(target.get("annotations"), list | tuple):
        return target  # transformers raises the error
    if not _is_integer(target.get("image_id", 0)):
        raise ValueError(f"image_id must be an integer, got {target['image_id']!r}")
    mapped = [_map_category(annotation, target, category_id_to_label) for annotation in target["annotations"]]
    return {**target, "annotations": mapped}


def _map_category(
    annotation: dict[str, Any], target: dict[str, Any], category_id_to_label: dict[int, int] | None
) -> dict[str, Any]:
    name = f"image_id {target.get('image_id')}"
    if not isinstance(annotation, dict) or not _is_box(annotation.get("bbox")) or "category_id" not in annotation:
        raise ValueError(f"{name}: an annotation must have a category_id and a bbox of 4 numbers, got {annotation}")
    category, (_, _, width, height) = annotation["category_id"], annotation["bbox"]
    if not _is_integer(category):
        raise ValueError(f"{name}: a category_id must be an integer, got {category!r}")
    if category_id_to_label is not None and category not in category_id_to_label:
        raise ValueError(
            f"{name}: category_id {category} is not in category_id_to_label, which has {sorted(category_id_to_label)}"
        )
    label = int(category) if category_id_to_label is None else category_id_to_label[category]
    area = width * height if annotation.get("area") is None else annotation["area"]
    # some tools write numbers as text, or null for the usual case
    iscrowd = int(annotation.get("iscrowd") in (1, "1"))
    return {**annotation, "area": area, "iscrowd": iscrowd, "category_id": label}


def _is_integer(value: Any) -> bool:
    """Return whether a value is an integer of any type; a float without fraction is one."""
    try:
        return not isinstance(value, bool) and bool(int(value) == value)
    except (TypeError, ValueError, OverflowError):
        return False


def _is_box(values: Any) -> bool:
    """Return whether a value is a sequence of 4 numbers, which may be NaN."""
    try:
        return len(values) == 4 and all(float(value) == value or math.isnan(value) for value in values)
    except (TypeError, ValueError):
        return False


class DinoDetrImageProcessor(DinoDetrImageProcessorMixin, DetrImageProcessor):
    """Image processor of DINO, torchvision backend. See [`DinoDetrImageProcessorMixin`] for arguments and outputs."""


class DinoDetrImageProcessorPil(DinoDetrImageProcessorMixin, DetrImageProcessorPil):
    """Image processor of DINO, PIL backend: pixels of the official code. See [`DinoDetrImageProcessorMixin`]."""


BACKENDS = {
    "torchvision": f"image_processing_dino_detr.{DinoDetrImageProcessor.__name__}",
    "pil": f"image_processing_dino_detr.{DinoDetrImageProcessorPil.__name__}",
}
DinoDetrImageProcessor.register_for_auto_class()
DinoDetrImageProcessorPil.register_for_auto_class()

__all__ = ["DinoDetrImageProcessor", "DinoDetrImageProcessorPil", "get_size_with_aspect_ratio"]
