"""Conventions of the detection models in transformers, as data, so that the same tools train and run all of them.

A tool uses any model as it uses DINO: images go through [`DinoDetrImageProcessor`] with the model's own settings,
[`model_inputs`] passes on the arguments that the model takes, and [`detect`] returns outputs whose scores are sigmoids
of logits. Saved models have transformers' own image processor, so they work without hf_dino.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import MODEL_FOR_OBJECT_DETECTION_MAPPING, BaseImageProcessor, PreTrainedConfig, PreTrainedModel

from .family import DnDetrConfig, deformable_detr_missing_loss
from .image_processing_dino_detr import DinoDetrImageProcessor, DinoDetrImageProcessorPil
from .loss_dino_detr import DinoDetrEffectiveBatch
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
        takes_one_size (`bool`, *optional*, defaults to `False`): All images are resized to one height and width, so
            that none is padded: the model does not know where an image ends, or divides it into equal windows. Boxes
            are then fractions of the image in any case.
        antialias (`bool`, *optional*, defaults to `True`): Its image processor lowers the resolution of images with
            antialiasing, in 8 bits.
        inputs (`tuple[str, ...]`, *optional*): Arguments of its forward that training and detection pass.
        missing_loss (`Callable`, *optional*): Takes outputs, labels, configuration and the normalizer, and returns
            what the loss of transformers lacks of the authors', and the terms of the whole.
    """

    image_processor: str
    backbone: str
    has_no_object_class: bool = False
    takes_one_size: bool = False
    antialias: bool = True
    inputs: tuple[str, ...] = ("pixel_values", "pixel_mask", "labels")
    missing_loss: Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]] | None = None


_WITH_EFFECTIVE_BATCH = ("pixel_values", "pixel_mask", "labels", "effective_batch")
_RT_DETR = Convention("RTDetrImageProcessor", "model.backbone.model", takes_one_size=True)

CONVENTIONS: dict[str, Convention] = {
    DinoDetrConfig.model_type: Convention(
        DinoDetrImageProcessor.__name__,
        "model.backbone.body",
        inputs=_WITH_EFFECTIVE_BATCH,
    ),
    "detr": Convention("DetrImageProcessor", "model.backbone.model", has_no_object_class=True),
    "table-transformer": Convention(
        "DetrImageProcessor", "model.backbone.conv_encoder.model", has_no_object_class=True
    ),
    "conditional_detr": Convention("ConditionalDetrImageProcessor", "model.backbone.model"),
    "dab-detr": Convention("ConditionalDetrImageProcessor", "model.backbone.conv_encoder.model"),
    DnDetrConfig.model_type: Convention(
        "ConditionalDetrImageProcessor", "model.backbone.conv_encoder.model", inputs=_WITH_EFFECTIVE_BATCH
    ),
    "deformable_detr": Convention(
        "DeformableDetrImageProcessor", "model.backbone.model", missing_loss=deformable_detr_missing_loss
    ),
    "lw_detr": Convention("DeformableDetrImageProcessor", "model.backbone.backbone", takes_one_size=True),
    "rf_detr": Convention("RfDetrImageProcessor", "model.backbone.backbone", takes_one_size=True, antialias=False),
    "rt_detr": _RT_DETR,
    "rt_detr_v2": _RT_DETR,
    "d_fine": _RT_DETR,
    "deimv2": dataclasses.replace(_RT_DETR, backbone="model.conv_encoder.model"),
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


def training_loss(
    outputs: Any, batch: Mapping[str, Any], config: PreTrainedConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss that a model is trained with, and its terms.

    Args:
        outputs: Outputs of the model for the batch.
        batch (`Mapping`): With `labels` and perhaps `effective_batch`, on the model's device.
        config (`PreTrainedConfig`): The model's configuration.
    """
    missing_loss = convention_of(config).missing_loss
    if missing_loss is None:
        return outputs.loss, outputs.loss_dict
    effective_batch = batch.get("effective_batch", DinoDetrEffectiveBatch())
    missing, terms = missing_loss(outputs, batch["labels"], config, effective_batch.num_boxes)
    return outputs.loss + missing, terms


def check_patches(config: Any, size: Mapping[str, int]) -> None:
    """Check that a model reads whole images, and not only as much of them as whole patches cover.

    Args:
        config (`PreTrainedConfig`): The model's configuration.
        size (`Mapping[str, int]`): Size of its image processor.

    Raises:
        InputError: If the right or lower border would be left out.
    """
    patch = getattr(config.backbone_config, "patch_size", 1)
    if convention_of(config).takes_one_size and "height" in size and any(edge % patch for edge in size.values()):
        raise InputError(
            f"a model of type {config.model_type!r} reads patches of {patch} x {patch} pixels, which do not cover "
            f"images of {size['height']} x {size['width']}; choose multiples of {patch}, in training with --image_size"
        )


def detect(model: Callable[..., Any], config: PreTrainedConfig, inputs: Mapping[str, torch.Tensor]) -> Any:
    """Run a model on images, without labels.

    Args:
        model (`Callable`): A detection model, or an exported one, in evaluation mode.
        config (`PreTrainedConfig`): Its configuration.
        inputs (`Mapping[str, torch.Tensor]`): `pixel_values` and `pixel_mask`, on the model's device.

    Returns:
        Outputs with `logits` `(batch_size, num_queries, num_labels)`, whose sigmoids are scores, and `pred_boxes`
        `(batch_size, num_queries, 4)`, center x, center y, width, height as fractions of the image.
        [`DinoDetrImageProcessor`] turns them into detections.

    Raises:
        InputError: If the model takes images of one size, and not of this one.
    """
    with _as_wrong_size(config, inputs["pixel_values"].shape):
        outputs = model(**model_inputs(inputs, config))
    if not convention_of(config).has_no_object_class:
        return outputs
    return DinoDetrObjectDetectionOutput(logits=sigmoid_logits(outputs.logits), pred_boxes=outputs.pred_boxes)


@contextmanager
def _as_wrong_size(config: PreTrainedConfig, shape: torch.Size) -> Iterator[None]:
    """Convert the errors of a model that cannot divide images into its windows, or halve them often enough."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        # errors of the machine, as of its memory, are of classes below RuntimeError
        if not convention_of(config).takes_one_size or type(error) not in (ValueError, RuntimeError):
            raise
        reason = str(error).partition("\n")[0].rstrip(".")
        raise InputError(
            f"a model of type {config.model_type!r} does not take images of {shape[2]} x {shape[3]} pixels "
            f"({reason}); change the size of its image processor, in training with --image_size"
        ) from error


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


def num_selected(config: Any) -> int:
    """Return the number of detections of an image: that of the model, or its number of queries."""
    return config.num_select if hasattr(config, "num_select") else config.num_queries


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


class AliasedImageProcessor(DinoDetrImageProcessor):
    """Resizes as RF-DETR does: floats, without antialiasing."""

    def resize(self, image: Any, *args: Any, **kwargs: Any) -> Any:
        return super().resize(image.float(), *args, **{**kwargs, "antialias": False})


def adopt_processor(own: BaseImageProcessor, convention: Convention, backend: str | None = None) -> BaseImageProcessor:
    """Return a DINO image processor with the settings of another one.

    Args:
        own (`BaseImageProcessor`): The model's own image processor.
        convention (`Convention`): Conventions of the model.
        backend (`str`, *optional*): `"torchvision"` or `"pil"`; by default `"torchvision"`.

    Raises:
        ValueError: If the two give other pixels, as for a processor that crops or rounds sizes.
    """
    ours = DinoDetrImageProcessor if convention.antialias else AliasedImageProcessor
    if backend == "pil":
        ours = DinoDetrImageProcessorPil
    adopted = ours(**_settings_of(own))
    image = (torch.arange(3 * 97 * 131) % 256).to(torch.uint8).reshape(3, 97, 131)
    first, second = (processor(images=[image], return_tensors="pt")["pixel_values"] for processor in (own, adopted))
    is_close = backend == "pil" and convention.antialias  # Pillow rounds otherwise, and cannot do without antialiasing
    if first.shape != second.shape or not (is_close or torch.allclose(first, second, atol=0.05)):
        raise ValueError(
            f"{type(own).__name__} gives {tuple(first.shape)} for an image of 97 x 131 pixels, hf_dino "
            f"{tuple(second.shape)} or other values"
        )
    return adopted


def new_processor(config: PreTrainedConfig, size: Mapping[str, int] | None = None) -> BaseImageProcessor:
    """Return the image processor of a new model: a DINO image processor with the defaults of the model's own class.

    Args:
        config (`PreTrainedConfig`): The model's configuration.
        size (`Mapping[str, int]`, *optional*): Size of the images, by default that of the class.
    """
    given = {"size": dict(size)} if size else {}
    if isinstance(config, DinoDetrConfig):
        return DinoDetrImageProcessor(**given)
    convention = convention_of(config)
    return adopt_processor(getattr(transformers, convention.image_processor)(**given), convention)


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
