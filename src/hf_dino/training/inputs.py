"""What a model is trained on and measured with: a dataset, read and looked at, and made fit for the model."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import BaseImageProcessor, PreTrainedModel

from ..data.augmentation import Augmentation, make_augmentation
from ..data.check import check_data
from ..data.dataset import DetectionSplit, label_of_category
from ..data.loaders import TrainingCollator, get_processed_shape
from .image_sizes import check_min_image_size


logger = logging.getLogger("hf_dino.data")


@dataclass(frozen=True)
class TrainingPipeline:
    """How the images of a dataset become the arguments of a model.

    Attributes:
        augmentation (`Augmentation`): Of the images that are trained on.
        collate (`TrainingCollator`): Makes batches of them.
    """

    augmentation: Augmentation
    collate: TrainingCollator


def read_and_check(read: Callable[[], dict[str, DetectionSplit]], *, is_new: bool = True) -> dict[str, DetectionSplit]:
    """Read a dataset and, where a run begins, look for what would make it a waste of time; called by every process.

    Args:
        read (`Callable`): Gives the data by the names of splits. The main process reads first, and downloads if
            anything has to be.
        is_new (`bool`, *optional*, defaults to `True`): False for a run that goes on, whose data was looked at.

    Returns:
        `dict[str, DetectionSplit]`: What `read` gives.

    Raises:
        InputError: If there is an error in the data. Warnings are logged.
    """
    process, readers_log = PartialState(), logging.getLogger("hf_dino.data.dataset")
    readers_log.disabled = is_new  # the check says again what was done to boxes, and in which images
    try:
        with process.main_process_first():
            data = read()
    finally:
        readers_log.disabled = False
    if is_new:
        reports = [check_data(data, decode=False) if process.is_main_process else None]
        (report,) = broadcast_object_list(reports)
        for warning in report.warnings if process.is_main_process else ():
            logger.warning(warning)
        report.raise_if_errors()
    return data


def build_training_pipeline(
    model: PreTrainedModel, processor: BaseImageProcessor, data: Mapping[str, DetectionSplit], augmentation: str
) -> TrainingPipeline:
    """Make a dataset fit for a model, and see before the first step that each of its images can be used.

    Args:
        model (`PreTrainedModel`): A `DinoDetrForObjectDetection`, before `accelerator.prepare`.
        processor (`BaseImageProcessor`): Its image processor, with the size to train at. It gets the size to evaluate
            at.
        data (`Mapping[str, DetectionSplit]`): By the names of splits, of which `"train"` is trained on.
        augmentation (`str`): A name for [`make_augmentation`].

    Raises:
        InputError: If an object's category is none of the model's classes, the augmentation cannot be used, or a
            image becomes too small for the model.
    """
    labels = {split: label_of_category(each, model.config.id2label) for split, each in data.items()}
    chosen = make_augmentation(augmentation, dict(processor.size))
    processor.size = dict(chosen.evaluation_size)
    shape_of = {split: partial(get_processed_shape, processor) for split in data} | {"train": chosen.min_output_shape}
    check_min_image_size(
        model,
        (shape_of[split](image.height, image.width) for split, each in data.items() for image in each.images),
    )
    return TrainingPipeline(
        chosen, TrainingCollator(processor, labels["train"], model.config.num_labels, do_resize=not chosen.resizes)
    )
