"""From a dataset to the batches of a step: reading, checking, preprocessing, and the effective batch of the loss."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from transformers import BaseImageProcessor, PreTrainedModel

from ..configuration_dino_detr import DinoDetrConfig
from ..data.augmentation import Augmentation, make_augmentation
from ..data.check import check_data, dense_images, object_limits
from ..data.dataset import DetectionSplit, label_of_category
from ..data.dataset import logger as reader_logger
from ..data.loaders import TrainingCollator, get_processed_shape
from ..detectors import check_patches, convention_of, detect
from ..evaluation.coco_eval import warn_about_dense_images
from ..evaluation.predictions import eval_mode
from ..loss_dino_detr import DinoDetrEffectiveBatch
from ..model_card import COCO_MAX_DETECTIONS
from ..utils.errors import InputError


logger = logging.getLogger("hf_dino.data")


def read_and_check(read: Callable[[], dict[str, DetectionSplit]], *, is_new: bool = True) -> dict[str, DetectionSplit]:
    """Read a dataset and, for a new run, check it. Must be called on every process.

    Args:
        read (`Callable`): Returns the dataset by the names of splits. The main process calls it first, so that only
            one of them downloads.
        is_new (`bool`, *optional*, defaults to `True`): False for a resumed run, whose dataset was checked before.

    Returns:
        `dict[str, DetectionSplit]`: The dataset that `read` returned.

    Raises:
        InputError: If there is an error in the dataset. Warnings are logged.
    """
    process = PartialState()
    reader_logger.disabled = is_new  # the check repeats which boxes were changed, and names their images
    try:
        with process.main_process_first():
            data = read()
    finally:
        reader_logger.disabled = False
    if is_new:
        # whatever limits the number of objects is known once there is a model
        reports = [check_data(data, decode=False, limits={}) if process.is_main_process else None]
        (report,) = broadcast_object_list(reports)
        for warning in report.warnings if process.is_main_process else ():
            logger.warning(warning)
        report.raise_if_errors()
    return data


@dataclass(frozen=True)
class TrainingPipeline:
    """Preprocessing that turns annotated images into arguments of a model.

    Attributes:
        augmentation (`Augmentation`): Augmentation of the training images.
        collate (`TrainingCollator`): Makes batches of them.
    """

    augmentation: Augmentation
    collate: TrainingCollator


def build_training_pipeline(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    data: Mapping[str, DetectionSplit],
    augmentation: str,
    max_detections: int = COCO_MAX_DETECTIONS,
) -> TrainingPipeline:
    """Build the preprocessing of a dataset for a model, and check before the first step that every image is usable.

    Images with more objects than the model or an evaluation takes are warned about.

    Args:
        model (`PreTrainedModel`): A detection model, before `accelerator.prepare`.
        processor (`BaseImageProcessor`): Its image processor, with the training size, which is changed to the
            evaluation size of the augmentation.
        data (`Mapping[str, DetectionSplit]`): The dataset by the names of splits; `"train"` is trained on.
        augmentation (`str`): A name for [`make_augmentation`].
        max_detections (`int`, *optional*, defaults to 100): Detections of a class in an image that evaluations count.

    Raises:
        InputError: If a category with objects is not a class of the model, the augmentation cannot be used, an image
            becomes too small for the model, or the model needs images of one size.
    """
    labels = {name: label_of_category(split, model.config.id2label) for name, split in data.items()}
    if PartialState().is_main_process:
        _warn_about_dense_images(data, object_limits(model.config, max_detections))
    chosen = make_augmentation(augmentation, dict(processor.size))
    processor.size = dict(chosen.evaluation_size)
    if convention_of(model.config).takes_one_size and "height" not in processor.size:
        raise InputError(
            f"a model of type {model.config.model_type!r} needs images of one size; give --image_size HEIGHTxWIDTH"
        )
    check_patches(model.config, processor.size)
    shape_of = {name: partial(get_processed_shape, processor) for name in data} | {"train": chosen.min_output_shape}
    check_min_image_size(
        model,
        (shape_of[name](image.height, image.width) for name, split in data.items() for image in split.images),
    )
    return TrainingPipeline(
        chosen, TrainingCollator(processor, labels["train"], model.config.num_labels, do_resize=not chosen.resizes)
    )


def _warn_about_dense_images(data: Mapping[str, DetectionSplit], limits: Mapping[str, int]) -> None:
    for warning in dense_images("train", data["train"], limits):
        logger.warning(warning)
    for split in (split for name, split in data.items() if name != "train"):
        warn_about_dense_images(split, limits)


@torch.no_grad()
def check_min_image_size(model: PreTrainedModel, shapes: Iterable[tuple[int, int]]) -> None:
    """Check that the model can be used with the smallest image.

    Args:
        model (`PreTrainedModel`): A detection model, before `accelerator.prepare`.
        shapes (`Iterable[tuple[int, int]]`): `(height, width)` in pixels of the preprocessed images.

    Raises:
        InputError: If that image has too few features, or a size that the model does not take.
    """
    height, width = min(shapes, key=math.prod)
    # two, because group norm rejects a level of a single cell in a single image
    images = torch.zeros(2, 3, height, width, device=model.device, dtype=model.dtype)
    try_images = _select_queries if isinstance(model.config, DinoDetrConfig) else _detect
    with eval_mode(model):
        try:
            try_images(model, images, torch.ones_like(images[:, 0]))
        except torch.OutOfMemoryError:  # a RuntimeError that says nothing of the size
            raise
        except (ValueError, RuntimeError) as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise InputError(
                f"images become as small as {height} x {width} pixels: {reason}. Options: --image_size, "
                "--augmentation, --config_overrides num_queries=NUMBER"
            ) from None


def _select_queries(model: PreTrainedModel, images: torch.Tensor, mask: torch.Tensor) -> None:
    """Do what fails first in DINO, and no more, because its images may be large."""
    levels = model.model.backbone(images, mask)
    model.model.query_selection(levels.features, levels)


def _detect(model: PreTrainedModel, images: torch.Tensor, mask: torch.Tensor) -> None:
    detect(model, model.config, {"pixel_values": images, "pixel_mask": mask.long()})


def effective_batch(
    labels_of_batches: Sequence[Sequence[Mapping[str, torch.Tensor]]], accelerator: Accelerator
) -> DinoDetrEffectiveBatch:
    """Count the objects of a step over all micro-batches and processes, with one gather of two numbers.

    Normalized by it, the losses of the micro-batches have as their mean the loss of one large batch. This mean is
    what training computes anyway: `accelerator.backward` divides by the number of accumulated micro-batches, and
    data-parallel training by the number of processes.

    Args:
        labels_of_batches (`Sequence[Sequence[Mapping]]`): Labels of this process's micro-batches of the step; every
            process has the same number of them.
        accelerator (`Accelerator`): The accelerator, of which every process calls this.
    """
    counts = [len(label["boxes"]) for labels in labels_of_batches for label in labels]
    gathered = torch.tensor([sum(counts), max(counts, default=0)])
    if accelerator.num_processes > 1:  # a single process need not wait for its device
        gathered = accelerator.gather(gathered.to(accelerator.device))
    num_objects, max_num_objects = zip(*gathered.view(-1, 2).tolist())
    num_batches = len(labels_of_batches) * accelerator.num_processes
    return DinoDetrEffectiveBatch(
        num_boxes=max(1, sum(num_objects)) / num_batches, max_num_objects=max(max_num_objects)
    )


def with_effective_batch(batches: Iterable[dict[str, Any]], accelerator: Accelerator) -> Iterator[dict[str, Any]]:
    """Add the argument `effective_batch` to each micro-batch.

    Args:
        batches (`Iterable[dict]`): Micro-batches with `labels`; `accelerator.gradient_accumulation_steps` of them
            make a step.
        accelerator (`Accelerator`): The accelerator, whose processes have the same number of micro-batches.
    """
    batches = iter(batches)
    while step := list(islice(batches, accelerator.gradient_accumulation_steps)):
        whole_step = effective_batch([batch["labels"] for batch in step], accelerator)
        yield from ({**batch, "effective_batch": whole_step} for batch in step)
