"""Conventions of the detection models in transformers, as data, so that the same tools train and run all of them.

A tool uses any model as it uses DINO: images go through [`DinoDetrImageProcessor`] with the model's own settings,
[`model_inputs`] passes on the arguments that the model takes, and [`detect`] returns outputs whose scores are sigmoids
of logits. Saved models have transformers' own image processor, so they work without hf_dino.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import MODEL_FOR_OBJECT_DETECTION_MAPPING, BaseImageProcessor, PreTrainedConfig, PreTrainedModel

from .image_processing_dino_detr import DinoDetrImageProcessor, DinoDetrImageProcessorPil
from .modeling_dino_detr import DinoDetrObjectDetectionOutput
from .registration import DinoDetrConfig  # with the auto classes, which then know DINO models
from .utils.errors import InputError


@dataclass(frozen=True)
class Convention:
    """How a type of model differs from other types.

    Args:
        image_processor (`str`): Class of transformers that its models are saved with.
        backbone (`str`): Name of the module with the pretrained weights of a classifier.
        has_no_object_class (`bool`, *optional*, defaults to `False`): The last logit is "no object", scores are a
            softmax, and a query is at most one detection, of its best class. Otherwise scores are sigmoids, and a
            query can be a detection of several classes.
        boxes_include_padding (`bool`, *optional*, defaults to `False`): Boxes are fractions of the padded batch
            instead of the image, because the model does not know where the image ends.
        inputs (`tuple[str, ...]`, *optional*): Arguments of its forward that training and detection pass.
    """

    image_processor: str
    backbone: str
    has_no_object_class: bool = False
    boxes_include_padding: bool = False
    inputs: tuple[str, ...] = ("pixel_values", "pixel_mask", "labels")


_RT_DETR = Convention("RTDetrImageProcessor", "model.backbone.model", boxes_include_padding=True)

CONVENTIONS: dict[str, Convention] = {
    DinoDetrConfig.model_type: Convention(
        DinoDetrImageProcessor.__name__,
        "model.backbone.body",
        inputs=("pixel_values", "pixel_mask", "labels", "effective_batch"),
    ),
    "detr": Convention("DetrImageProcessor", "model.backbone.model", has_no_object_class=True),
    "table-transformer": Convention(
        "DetrImageProcessor", "model.backbone.conv_encoder.model", has_no_object_class=True
    ),
    "conditional_detr": Convention("ConditionalDetrImageProcessor", "model.backbone.model"),
    "dab-detr": Convention("ConditionalDetrImageProcessor", "model.backbone.conv_encoder.model"),
    "deformable_detr": Convention("DeformableDetrImageProcessor", "model.backbone.model"),
    "lw_detr": Convention("DeformableDetrImageProcessor", "model.backbone.backbone"),
    "rf_detr": Convention("RfDetrImageProcessor", "model.backbone.backbone"),
    "rt_detr": _RT_DETR,
    "rt_detr_v2": _RT_DETR,
    "d_fine": _RT_DETR,
    "deimv2": dataclasses.replace(_RT_DETR, backbone="model.conv_encoder.backbone"),
}
"""Conventions by `config.model_type`."""


def convention_of(config: PreTrainedConfig) -> Convention:
    """Return the conventions of a model.

    Raises:
        InputError: If they are not known.
    """
    if config.model_type not in CONVENTIONS:
        raise InputError(
            f"models of type {config.model_type!r} cannot be used; the types that can be are {', '.join(CONVENTIONS)}"
        )
    return CONVENTIONS[config.model_type]


def model_class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the detection model of a configuration."""
    return MODEL_FOR_OBJECT_DETECTION_MAPPING[type(config)]


def model_inputs(batch: Mapping[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """Return the entries of a batch that the model takes as arguments."""
    return {name: batch[name] for name in convention_of(config).inputs if name in batch}


def detect(model: Callable[..., Any], config: PreTrainedConfig, inputs: Mapping[str, torch.Tensor]) -> Any:
    """Run a model on images, without labels.

    Args:
        model (`Callable`): A detection model, or an exported one, in evaluation mode.
        config (`PreTrainedConfig`): Its configuration.
        inputs (`Mapping[str, torch.Tensor]`): `pixel_values` and `pixel_mask`, on the model's device.

    Returns:
        Outputs with `logits` `(batch_size, num_queries, num_labels)`, whose sigmoids are scores, and `pred_boxes`
        `(batch_size, num_queries, 4)`, center x, center y, width, height as fractions of the image, which must not be
        padded if `boxes_include_padding`. [`DinoDetrImageProcessor`] turns them into detections.
    """
    outputs = model(**model_inputs(inputs, config))
    if not convention_of(config).has_no_object_class:
        return outputs
    return DinoDetrObjectDetectionOutput(logits=sigmoid_logits(outputs.logits), pred_boxes=outputs.pred_boxes)


def sigmoid_logits(logits: torch.Tensor) -> torch.Tensor:
    """Convert logits of a softmax over classes and "no object" to logits whose sigmoids are the same scores.

    Args:
        logits (`torch.Tensor` of shape `(..., num_labels + 1)`): The last one is "no object".

    Returns:
        `torch.Tensor` of shape `(..., num_labels)`: Minus infinity except for the best class.

    Example:

    ```python
    >>> sigmoid_logits(torch.tensor([3.0, 1.0, 3.0])).sigmoid()
    tensor([0.4683, 0.0000])

    ```
    """
    scores = logits.float().softmax(dim=-1)[..., :-1]
    is_best = nn.functional.one_hot(scores.argmax(dim=-1), scores.shape[-1]).bool()
    return scores.logit(eps=1e-7).masked_fill(~is_best, -torch.inf)


def num_selected(config: PreTrainedConfig) -> int:
    """Return the number of detections of an image: that of the model, or its number of queries."""
    return getattr(config, "num_select", config.num_queries)


def include_padding(labels: list[dict[str, torch.Tensor]], height: int, width: int) -> list[dict[str, torch.Tensor]]:
    """Convert boxes from fractions of each image to fractions of the padded batch.

    Args:
        labels (`list[dict[str, torch.Tensor]]`): Per image `boxes` `(num_objects, 4)`, and `size`, its height and
            width in pixels without padding.
        height, width (`int`): Of the batch, in pixels.
    """
    padded = torch.tensor([width, height] * 2)
    return [{**label, "boxes": label["boxes"] * label["size"].flip(0).repeat(2) / padded} for label in labels]


_SETTINGS = (
    "do_resize",
    "size",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)
"""Settings that all image processors have; only padding is always ours, with a mask."""


def adopt_processor(own: BaseImageProcessor, backend: str | None = None) -> BaseImageProcessor:
    """Return a DINO image processor with the settings of another one.

    Args:
        own (`BaseImageProcessor`): The model's own image processor.
        backend (`str`, *optional*): `"torchvision"` or `"pil"`; by default `"torchvision"`.

    Raises:
        ValueError: If the two give other pixels, as for a processor that crops or rounds sizes.
    """
    ours = DinoDetrImageProcessorPil if backend == "pil" else DinoDetrImageProcessor
    adopted = ours(**_settings_of(own))
    image = torch.arange(3 * 97 * 131, dtype=torch.uint8).reshape(3, 97, 131)
    first, second = (processor(images=[image], return_tensors="pt")["pixel_values"] for processor in (own, adopted))
    if first.shape != second.shape or (backend != "pil" and not torch.allclose(first, second, atol=0.05)):
        raise ValueError(
            f"{type(own).__name__} gives {tuple(first.shape)} for an image of 97 x 131 pixels, hf_dino "
            f"{tuple(second.shape)} or other values"
        )
    return adopted


def own_processor(config: PreTrainedConfig, processor: BaseImageProcessor) -> BaseImageProcessor:
    """Return the image processor to save with a model: of its own class, with the settings of a DINO processor."""
    if isinstance(config, DinoDetrConfig):
        return processor
    return getattr(transformers, convention_of(config).image_processor)(**_settings_of(processor))


def _settings_of(processor: BaseImageProcessor) -> dict[str, Any]:
    return {name: _plain(getattr(processor, name)) for name in _SETTINGS}


def _plain(value: Any) -> Any:
    """Return a setting as the constructor takes it: sizes are mappings."""
    return dict(value) if isinstance(value, Mapping) else value
