"""Predictions of a model on a data set, gathered from all processes, and their COCO average precision."""

import contextlib
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import BaseImageProcessor

from .data.batching import evaluation_loader
from .data.dataset import DetectionData, label_of_category
from .model_card import METRIC_NAMES


try:
    from accelerate import Accelerator
    from accelerate.utils import gather_object, send_to_device
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
except ImportError as error:
    raise ImportError(f"evaluation needs {error.name}: pip install 'hf-dino[train]'") from error

METRICS = tuple(METRIC_NAMES)
"""COCO's twelve numbers, in the order in which pycocotools computes them."""


@dataclass(frozen=True)
class CocoScores:
    """What COCO's evaluation says about a set of detections.

    Attributes:
        metrics (`dict[str, float]`): The twelve numbers of [`METRICS`], in [0, 1]; -1 where no object counts.
        ap_per_category (`dict[str, float]`): Average precision by category name; -1 for a category without objects.
        table (`str`): The twelve lines that pycocotools prints.
    """

    metrics: dict[str, float]
    ap_per_category: dict[str, float]
    table: str


@torch.no_grad()
def collect_detections(
    model: nn.Module,
    loader: Iterable[dict[str, Any]],
    processor: BaseImageProcessor,
    label_to_category_id: Mapping[int, int],
    accelerator: Accelerator,
    on_batch: Callable[[int], None] = lambda num_pictures: None,
) -> list[dict[str, Any]]:
    """Run a model over a data set and return its detections as COCO results.

    The model is put back into the mode that it was in. Each process reads its own share, so none of its calls waits
    for another process: the shares need not have the same length, and no picture is counted twice.

    Args:
        model (`nn.Module`): A detection model, prepared by `accelerator` or not.
        loader (`Iterable[dict]`): From [`evaluation_loader`], this process's share; not prepared by `accelerator`.
        processor (`BaseImageProcessor`): The model's image processor.
        label_to_category_id (`Mapping[int, int]`): The model's labels to raw category ids. Detections of labels that
            it lacks are left out.
        accelerator (`Accelerator`): Gives the device and gathers the results.
        on_batch (`Callable[[int], None]`, *optional*): Called after each batch with its number of pictures.

    Returns:
        `list[dict]`: `image_id`, `category_id`, `bbox` (x, y, width, height in pixels of the original picture) and
        `score` of every detection of every process; the best `config.num_select` of each picture.
    """
    # without the wrapper of DistributedDataParallel, whose forward waits for the other processes
    network = accelerator.unwrap_model(model)
    was_training = network.training
    network.eval()
    results: list[dict[str, Any]] = []
    for batch in loader:
        tensors = {name: batch[name] for name in ("pixel_values", "pixel_mask")}
        outputs = network(**send_to_device(tensors, accelerator.device, non_blocking=True))
        detections = processor.post_process_object_detection(
            outputs, threshold=0.0, target_sizes=batch["target_sizes"], top_k=network.config.num_select
        )
        for image_id, detection in zip(batch["image_ids"], detections, strict=True):
            results.extend(_coco_results(image_id, detection, label_to_category_id))
        on_batch(len(batch["image_ids"]))
    network.train(was_training)
    return gather_object(results)


def evaluate_coco(data: DetectionData, results: list[dict[str, Any]]) -> CocoScores:
    """Score detections against a data set as COCO does.

    Args:
        data (`DetectionData`): The data set, crowd regions included, which are ignored rather than missed.
        results (`list[dict]`): From [`collect_detections`]; may be empty, which scores 0.

    Returns:
        `CocoScores`: Numbers, table, and average precision of each category.
    """
    # pycocotools prints about its progress; only the table is of interest
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _coco(data, _ground_truth(data))
        # loadRes writes into what it is given, and cannot take an empty list
        found = truth.loadRes([dict(result) for result in results]) if results else _coco(data, [])
        scores = COCOeval(truth, found, "bbox")
        scores.evaluate()
        scores.accumulate()
    with contextlib.redirect_stdout(io.StringIO()) as table:
        scores.summarize()
    # (IoU thresholds, recalls, categories, area ranges, maximum detections), -1 where there is no object
    precision = scores.eval["precision"][:, :, :, 0, -1]
    per_category = {}
    for index, category_id in enumerate(scores.params.catIds):
        values = precision[:, :, index]
        per_category[data.categories[category_id]] = float(values.mean()) if (values > -1).all() else -1.0
    metrics = {name: float(value) for name, value in zip(METRICS, scores.stats, strict=True)}
    return CocoScores(metrics, per_category, table.getvalue().rstrip())


def evaluate_model(
    model: nn.Module,
    processor: BaseImageProcessor,
    data: DetectionData,
    accelerator: Accelerator,
    *,
    batch_size: int,
    num_workers: int = 0,
    on_batch: Callable[[int], None] = lambda num_pictures: None,
) -> tuple[CocoScores, list[dict[str, Any]]]:
    """Detect in a whole data set and score it; called by every process, all of which get the same answer.

    Categories are matched to the model's classes by name. Pictures are batched with others of the same resized size
    only, so the answer does not depend on the batch size.

    Args:
        model (`nn.Module`): A detection model, prepared by `accelerator` or not.
        processor (`BaseImageProcessor`): The model's image processor.
        data (`DetectionData`): The data set.
        accelerator (`Accelerator`): Gives the device and shares out the pictures.
        batch_size (`int`): The most pictures in a batch of one process.
        num_workers (`int`, *optional*, defaults to 0): Processes that read ahead.
        on_batch (`Callable[[int], None]`, *optional*): Called after each batch of this process with its size.

    Returns:
        `tuple[CocoScores, list[dict]]`: The scores, and the detections as COCO results.

    Raises:
        InputError: If a category that has objects is not among the model's classes.
    """
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
    results = collect_detections(model, loader, processor, label_to_category_id, accelerator, on_batch)
    return evaluate_coco(data, results), results


def _coco_results(
    image_id: int, detection: Mapping[str, torch.Tensor], label_to_category_id: Mapping[int, int]
) -> list[dict[str, Any]]:
    corners = detection["boxes"].float().cpu()
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()
    rows = zip(detection["labels"].tolist(), boxes, detection["scores"].tolist(), strict=True)
    return [
        {"image_id": image_id, "category_id": label_to_category_id[label], "bbox": box, "score": score}
        for label, box, score in rows
        if label in label_to_category_id
    ]


def _ground_truth(data: DetectionData) -> list[dict[str, Any]]:
    # numbered from 1, whatever the file says: pycocotools takes a match with annotation 0 for no match
    objects = [(picture, index) for picture in data.pictures for index in range(len(picture.boxes))]
    return [
        {
            "id": number,
            "image_id": picture.image_id,
            "category_id": int(picture.category_ids[index]),
            "bbox": picture.boxes[index].tolist(),
            "area": float(picture.areas[index]),
            "iscrowd": int(picture.iscrowd[index]),
        }
        for number, (picture, index) in enumerate(objects, start=1)
    ]


def _coco(data: DetectionData, annotations: list[dict[str, Any]]) -> COCO:
    coco = COCO()
    coco.dataset = {
        "info": {},
        "images": [{"id": picture.image_id} for picture in data.pictures],
        "categories": [{"id": category_id, "name": name} for category_id, name in data.categories.items()],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco
