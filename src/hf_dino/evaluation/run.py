"""The whole evaluation of a model: detect in every image, then score, on any number of processes."""

from collections.abc import Callable

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import BaseImageProcessor

from ..data.dataset import DetectionSplit, label_of_category
from ..data.loaders import evaluation_loader
from .detections import collect_detections
from .scores import CocoScores, check_engine, evaluate_coco


def evaluate_model(
    model: nn.Module,
    processor: BaseImageProcessor,
    data: DetectionSplit,
    accelerator: Accelerator,
    *,
    batch_size: int,
    num_workers: int = 0,
    on_batch: Callable[[int], None] = lambda num_images: None,
    engine: str = "pycocotools",
) -> tuple[CocoScores, np.ndarray]:
    """Detect in a whole dataset and score it; called by every process, all of which get the same answer.

    Categories are matched to the model's classes by name. Images are batched with others of the same resized size
    only, so the answer does not depend on the batch size. The main process scores, and the others wait for it.

    Args:
        model (`nn.Module`): A detection model, prepared by `accelerator` or not.
        processor (`BaseImageProcessor`): The model's image processor.
        data (`DetectionSplit`): The dataset.
        accelerator (`Accelerator`): Gives the device and shares out the images.
        batch_size (`int`): The most images in a batch of one process.
        num_workers (`int`, *optional*, defaults to 0): Processes that read ahead.
        on_batch (`Callable[[int], None]`, *optional*): Called after each batch of this process with its size.
        engine (`str`, *optional*, defaults to `"pycocotools"`): What scores, one of [`ENGINES`].

    Returns:
        `tuple[CocoScores, np.ndarray]`: The scores, and the detections as [`collect_detections`] returns them.

    Raises:
        InputError: If a category that has objects is not among the model's classes, or the engine is not there.
    """
    check_engine(engine)
    labels = label_of_category(data, accelerator.unwrap_model(model).config.id2label)
    loader = evaluation_loader(
        data,
        processor,
        batch_size=batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=num_workers,
    )
    label_to_category_id = {label: category_id for category_id, label in labels.items()}
    detections = collect_detections(model, loader, processor, label_to_category_id, accelerator, on_batch)
    scores = [evaluate_coco(data, detections, engine)] if accelerator.is_main_process else [None]
    return broadcast_object_list(scores)[0], detections
