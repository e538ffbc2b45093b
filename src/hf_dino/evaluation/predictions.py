"""Run a model over a dataset, gather its detections from all processes, and score them."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from torch import nn
from transformers import BaseImageProcessor
from transformers.utils import logging

from ..data.check import object_limits
from ..data.dataset import DetectionSplit, label_of_category, xyxy_to_xywh
from ..data.loaders import evaluation_loader
from ..detectors import detect, num_selected
from ..model_card import COCO_MAX_DETECTIONS
from ..utils.distributed import summon_full_params
from ..utils.errors import summarize_list
from ..utils.io import open_new_text_file
from ..utils.names import named_classes
from .coco_eval import CocoScores, check_engine, check_finite, evaluate_coco, warn_about_dense_images


logger = logging.get_logger(__name__)

DETECTION_DTYPE = np.dtype([("image_id", "<i8"), ("category_id", "<i8"), ("bbox", "<f8", 4), ("score", "<f8")])
"""One detection: COCO image id and category id, box as x, y, width, height in pixels of the original image, and score
in [0, 1]. The fields are as wide as JSON numbers, so COCO results keep every digit. A detection takes 56 bytes."""


def evaluate_model(
    model: nn.Module,
    processor: BaseImageProcessor,
    split: DetectionSplit,
    accelerator: Accelerator,
    *,
    batch_size: int,
    num_workers: int = 0,
    on_batch: Callable[[int], None] = lambda num_images: None,
    engine: str = "pycocotools",
    max_detections: int = COCO_MAX_DETECTIONS,
) -> tuple[CocoScores, np.ndarray]:
    """Run a model over a dataset and compute its COCO metrics. All processes must call it and get the same result.

    Categories are matched to the model's classes by name. A batch only has images of one resized size, so the result
    does not depend on the batch size. The main process computes the metrics. It warns, once, about classes of which
    only the model or the dataset knows, and about images with more objects than can be detected or counted.

    Args:
        model (`nn.Module`): A detection model, prepared by `accelerator` or not.
        processor (`BaseImageProcessor`): The model's image processor.
        split (`DetectionSplit`): The split of the dataset.
        accelerator (`Accelerator`): Provides the device and this process's share of the images.
        batch_size (`int`): Maximum number of images in a batch, per process.
        num_workers (`int`, *optional*, defaults to 0): DataLoader workers, per process.
        on_batch (`Callable[[int], None]`, *optional*): Called after each batch of this process with its number of
            images.
        engine (`str`, *optional*, defaults to `"pycocotools"`): Computes the metrics; one of [`ENGINES`].
        max_detections (`int`, *optional*, defaults to 100): Detections of a class in an image that count. If it is
            more than COCO's 100, as many are kept of each image, even if the model's `num_select` is lower.

    Returns:
        `tuple[CocoScores, np.ndarray]`: The metrics, and the detections as [`collect_detections`] returns them.

    Raises:
        InputError: If a category that has objects is not among the model's classes, or the engine is not available.
        FloatingPointError: If a detection is not finite.
    """
    check_engine(engine)
    config = accelerator.unwrap_model(model).config
    labels, limits = label_of_category(split, config.id2label), object_limits(config, max_detections)
    if accelerator.is_main_process:
        _warn_about_classes(split, config.id2label, labels)
        warn_about_dense_images(split, limits)
    loader = evaluation_loader(
        split,
        processor,
        batch_size=batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=num_workers,
    )
    label_to_category_id = {label: category_id for category_id, label in labels.items()}
    detections = collect_detections(
        model, loader, processor, label_to_category_id, accelerator, on_batch, top_k=limits["num_select"]
    )
    is_main = accelerator.is_main_process
    scores = [evaluate_coco(split, detections, engine, max_detections) if is_main else None]
    return broadcast_object_list(scores)[0], detections


def _warn_about_classes(split: DetectionSplit, id2label: Mapping[int, str], labels: Mapping[int, int]) -> None:
    """Warn about classes that are matched by their words, and about those that only one side has."""
    classes, categories = named_classes(id2label), split.categories
    texts = {
        "categories are the model's classes with the same words: {}": [
            f"{categories[id_]!r} is {classes[label]!r}"
            for id_, label in labels.items()
            if categories[id_] != classes[label]
        ],
        "detections of the model's classes {} are not counted, since the dataset does not have them": [
            repr(name) for label, name in classes.items() if label not in labels.values()
        ],
        "the model has no class for the categories {}, which have no objects": [
            repr(name) for id_, name in categories.items() if id_ not in labels
        ],
    }
    for text, names in texts.items():
        if names:
            logger.warning_once(f"{split.source}: {text.format(summarize_list(names))}")


@torch.no_grad()
def collect_detections(
    model: nn.Module,
    loader: Iterable[dict[str, Any]],
    processor: BaseImageProcessor,
    label_to_category_id: Mapping[int, int],
    accelerator: Accelerator,
    on_batch: Callable[[int], None] = lambda num_images: None,
    top_k: int | None = None,
) -> np.ndarray:
    """Run a model over a dataset and return the detections of all processes. All processes must call it.

    The processes only communicate before the first and after the last image, so their shares may differ in length
    and no image is evaluated twice. Every process receives all detections, which take 80 MiB for the 5,000 images of
    COCO val2017 with 300 detections each. With NCCL they pass through GPU memory, which needs as much free at the end
    of the evaluation. The model's training mode is restored.

    Args:
        model (`nn.Module`): A detection model, prepared by `accelerator` or not.
        loader (`Iterable[dict]`): From [`evaluation_loader`], this process's share; not prepared by `accelerator`.
        processor (`BaseImageProcessor`): The model's image processor.
        label_to_category_id (`Mapping[int, int]`): Maps the model's labels to COCO category ids. Detections of other
            labels are dropped.
        accelerator (`Accelerator`): Provides the device.
        on_batch (`Callable[[int], None]`, *optional*): Called after each batch with its number of images.
        top_k (`int`, *optional*): Detections of an image; by default, the model's `num_select`.

    Returns:
        `np.ndarray` of shape `(num_detections,)` and dtype [`DETECTION_DTYPE`]: The `top_k` detections with the
        highest scores of each image, by ascending image id; those of one image by descending score.

    Raises:
        FloatingPointError: If a detection is not finite.
    """
    # DistributedDataParallel's forward would wait for the other processes
    network = accelerator.unwrap_model(model)
    own = [np.empty(0, DETECTION_DTYPE)]
    with eval_mode(network), summon_full_params(network):
        for batch in loader:
            tensors = {name: batch[name] for name in ("pixel_values", "pixel_mask")}
            outputs = detect(network, network.config, send_to_device(tensors, accelerator.device, non_blocking=True))
            results = processor.post_process_object_detection(
                outputs, threshold=0.0, target_sizes=batch["target_sizes"], top_k=top_k or num_selected(network.config)
            )
            for image_id, result in zip(batch["image_ids"], results, strict=True):
                own.append(_to_detections(image_id, result, label_to_category_id))
            on_batch(len(batch["image_ids"]))
    detections = sort_by_image(np.concatenate(gather_object([np.concatenate(own)])))
    check_finite(detections)
    return detections


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and back into its previous mode at the end, also after an error."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


def sort_by_image(detections: np.ndarray) -> np.ndarray:
    """Sort detections by ascending image id and keep the order of those of one image."""
    return detections[np.argsort(detections["image_id"], kind="stable")]


def _to_detections(
    image_id: int, result: Mapping[str, torch.Tensor], label_to_category_id: Mapping[int, int]
) -> np.ndarray:
    """Convert the post-processed output of one image, whose boxes are corners in pixels."""
    labels = result["labels"].tolist()
    kept = [index for index, label in enumerate(labels) if label in label_to_category_id]
    detections = np.empty(len(kept), DETECTION_DTYPE)
    detections["image_id"] = image_id
    detections["category_id"] = [label_to_category_id[labels[index]] for index in kept]
    detections["bbox"] = xyxy_to_xywh(result["boxes"].float().cpu()[kept].numpy())
    detections["score"] = result["scores"].float().cpu()[kept].numpy()
    return detections


def write_coco_results(path: Path, detections: np.ndarray) -> None:
    """Write detections as COCO results: a JSON list of `image_id`, `category_id`, `bbox` and `score`, all digits kept.

    Args:
        path (`Path`): Must not exist. It appears once it is complete.
        detections (`np.ndarray`): Of dtype [`DETECTION_DTYPE`].

    Raises:
        InputError: If the file exists.
        FloatingPointError: If a detection is not finite, for which JSON has no number.
    """
    check_finite(detections)
    fields = DETECTION_DTYPE.names or ()
    with open_new_text_file(path) as file:
        file.write("[")
        for number, detection in enumerate(detections):
            result = {field: detection[field].tolist() for field in fields}
            file.write(("," if number else "") + "\n" + json.dumps(result))
        file.write("\n]\n")


def detections_from_results(results: Iterable[Mapping[str, Any]]) -> np.ndarray:
    """Convert COCO results, as read from JSON, to an array of dtype [`DETECTION_DTYPE`].

    Raises:
        FloatingPointError: If a box or a score is not finite.

    Example:

    ```python
    >>> detections = detections_from_results(
    ...     [{"image_id": 1, "category_id": 3, "bbox": [10, 10, 40, 20], "score": 0.9}]
    ... )
    >>> detections["bbox"].tolist(), detections["score"].tolist()
    ([[10.0, 10.0, 40.0, 20.0]], [0.9])

    ```
    """
    fields = DETECTION_DTYPE.names or ()
    detections = np.array([tuple(result[field] for field in fields) for result in results], dtype=DETECTION_DTYPE)
    check_finite(detections)
    return detections
