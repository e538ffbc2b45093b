"""COCO average precision and recall, computed by pycocotools or faster-coco-eval, one category at a time."""

import contextlib
import importlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval, Params
from transformers.utils import logging

from ..data.check import dense_images
from ..data.dataset import DetectionSplit, to_annotation_array
from ..model_card import COCO_MAX_DETECTIONS, METRIC_NAMES, describe_max_detections
from ..utils.errors import InputError, summarize_list


logger = logging.get_logger(__name__)

METRICS = tuple(METRIC_NAMES)
"""Keys of the twelve COCO metrics, in the order in which pycocotools computes them."""

ENGINES = {
    "pycocotools": (("pycocotools.coco", "COCO"), ("pycocotools.cocoeval", "COCOeval")),
    "faster-coco-eval": (("faster_coco_eval", "COCO"), ("faster_coco_eval", "COCOeval_faster")),
}
"""Packages that can compute the metrics, each with module and name of its dataset class and its evaluation class."""


@dataclass(frozen=True)
class CocoScores:
    """COCO metrics of a set of detections.

    Attributes:
        metrics (`dict[str, float]`): The twelve values of [`METRICS`], in [0, 1]; -1 where there is no object. If
            `max_detections` is not COCO's, its number is in the name of `ar_100`.
        ap_per_category (`dict[str, float]`): Average precision by category name; -1 for a category without objects.
        table (`str`): The twelve lines that pycocotools prints, and one more if `max_detections` is not COCO's.
        precision (`np.ndarray` of shape `(10, 101, num_categories)`): Precision by IoU threshold (.5 to .95), recall
            (0 to 1) and category, for objects of all sizes; -1 for a category without objects.
        max_detections (`int`): Detections of a class in an image that count: 100 for COCO's metrics.
    """

    metrics: dict[str, float]
    ap_per_category: dict[str, float]
    table: str
    precision: np.ndarray = field(repr=False, compare=False)
    max_detections: int = COCO_MAX_DETECTIONS

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics, the average precision per category and, if it is not COCO's, `max_detections`."""
        limit = {} if self.max_detections == COCO_MAX_DETECTIONS else {"max_detections": self.max_detections}
        return {**self.metrics, "ap_per_category": self.ap_per_category, **limit}


def evaluate_coco(
    split: DetectionSplit,
    detections: np.ndarray,
    engine: str = "pycocotools",
    max_detections: int = COCO_MAX_DETECTIONS,
) -> CocoScores:
    """Compute the COCO metrics of detections on a dataset.

    Args:
        split (`DetectionSplit`): The split of the dataset. Crowd regions (`iscrowd`) are ignored, not missed.
        detections (`np.ndarray`): Of dtype [`DETECTION_DTYPE`], from [`collect_detections`] or
            [`detections_from_results`], with images in any order. An empty array scores 0. Detections of unknown
            categories are ignored.
        engine (`str`, *optional*, defaults to `"pycocotools"`): One of [`ENGINES`].
        max_detections (`int`, *optional*, defaults to 100): Detections of a class in an image that count, those with
            the highest scores; at least COCO's 100. Images with more objects are warned about, once.

    Returns:
        `CocoScores`: Metrics, printable table, and precision per category.

    Raises:
        InputError: If a detection's image is not in the dataset, `max_detections` is below 100, or the engine is not
            available.
        FloatingPointError: If a detection is not finite.
    """
    check_engine(engine)
    if max_detections < COCO_MAX_DETECTIONS:
        raise InputError(f"--max_detections must be at least COCO's {COCO_MAX_DETECTIONS}, got {max_detections}")
    _check_image_ids(split, detections)
    check_finite(detections)
    warn_about_dense_images(split, {"max_detections": max_detections})
    curves = _compute_curves(split, detections, engine, max_detections)
    metrics, table = _summarize(curves, max_detections)
    precision = curves["precision"][..., 0, -1]
    average_precision = precision.mean(axis=(0, 1)).tolist()
    by_category = dict(zip(split.categories.values(), average_precision, strict=True))
    return CocoScores(metrics, by_category, table, precision, max_detections)


def warn_about_dense_images(split: DetectionSplit, limits: Mapping[str, int]) -> None:
    """Warn about images with more objects than are detected and counted, once in a process.

    Args:
        split (`DetectionSplit`): The split that is evaluated.
        limits (`Mapping[str, int]`): From [`~data.check.object_limits`].
    """
    for warning in dense_images("", split, limits, title=str(split.source)):
        logger.warning_once(warning)


def check_finite(detections: np.ndarray) -> None:
    """Check that all boxes and scores are finite.

    Raises:
        FloatingPointError: If one is NaN or infinite.
    """
    is_finite = np.isfinite(detections["bbox"]).all(axis=1) & np.isfinite(detections["score"])
    if not is_finite.all():
        raise FloatingPointError(
            f"{np.count_nonzero(~is_finite)} of {len(detections)} detections have a box or a score that is not "
            f"finite, the first in the image with id {detections['image_id'][~is_finite][0]}. Check the model's "
            "weights, or use --mixed_precision no"
        )


def check_engine(engine: str) -> None:
    """Check that an engine can be used, before the model runs.

    Raises:
        InputError: If it is unknown or not installed; the message says what to do.
    """
    if engine not in ENGINES:
        raise InputError(f"--coco_backend must be one of {summarize_list(ENGINES)}; got {engine!r}")
    try:
        _load(engine)
    except ImportError as error:
        raise InputError(f"--coco_backend {engine} cannot be used ({error}): pip install {engine}") from None


def _load(engine: str) -> tuple[Any, Any]:
    """Import an engine's dataset class and evaluation class."""
    dataset, evaluation = (getattr(importlib.import_module(module), name) for module, name in ENGINES[engine])
    return dataset, evaluation


def _check_image_ids(split: DetectionSplit, detections: np.ndarray) -> None:
    unknown = np.setdiff1d(detections["image_id"], [image.image_id for image in split.images])
    if len(unknown):
        raise InputError(f"{split.source}: image ids not found: {summarize_list(unknown)}; detections refer to them")


def group_rows(ids: np.ndarray, keys: Iterable[int]) -> list[np.ndarray]:
    """Return for each key the indices of the rows with this id, in ascending order.

    Example:

    ```python
    >>> [rows.tolist() for rows in group_rows(np.array([7, 3, 7]), [3, 5, 7])]
    [[1], [], [0, 2]]

    ```
    """
    order, keys = np.argsort(ids, kind="stable"), np.fromiter(keys, dtype=np.int64)
    starts, ends = (np.searchsorted(ids, keys, side, sorter=order) for side in ("left", "right"))
    return [order[start:end] for start, end in zip(starts, ends)]


def _compute_curves(
    split: DetectionSplit, detections: np.ndarray, engine: str, max_detections: int
) -> dict[str, np.ndarray]:
    """Return `precision` and `recall` as `COCOeval.eval` has them: -1 where there is no object.

    Precision, of shape `(10, 101, num_categories, 4, 3)`, is by IoU threshold (.5 to .95), recall (0 to 1), category
    (by ascending id), object size (all, small, medium, large) and maximum number of detections per image and category
    (1, 10, `max_detections`); recall, of shape `(10, num_categories, 4, 3)`, is the highest one reached.

    One category is evaluated at a time, which bounds the memory: pycocotools needs several kB per image, category and
    object size. The result is the same, since categories are independent of each other, and a category is independent
    of images without an object or a detection of it.
    """
    parameters = Params(iouType="bbox")
    by_recall = (len(parameters.iouThrs), len(parameters.recThrs), len(split.categories))
    by_limit = (len(parameters.areaRng), len(parameters.maxDets))
    precision, recall = np.full(by_recall + by_limit, -1.0), np.full(by_recall[::2] + by_limit, -1.0)

    objects = to_annotation_array(split)
    rows = (group_rows(records["category_id"], split.categories) for records in (objects, detections))
    for index, (object_rows, detection_rows) in enumerate(zip(*rows)):
        if len(object_rows):  # a category without objects stays -1
            measured = _evaluate_category(objects[object_rows], detections[detection_rows], engine, max_detections)
            precision[:, :, index], recall[:, index] = measured["precision"][:, :, 0], measured["recall"][:, 0]
    return {"precision": precision, "recall": recall}


def _evaluate_category(
    objects: np.ndarray, detections: np.ndarray, engine: str, max_detections: int
) -> Mapping[str, np.ndarray]:
    """Run an engine on the objects and detections of one category."""
    coco_class, evaluation_class = _load(engine)
    image_ids = np.union1d(objects["image_id"], detections["image_id"]).tolist()
    areas = detections["bbox"][:, 2] * detections["bbox"][:, 3]
    ground_truth = _make_coco(coco_class, image_ids, objects)
    predicted = _make_coco(
        coco_class, image_ids, detections, area=areas, iscrowd=np.zeros(len(detections), dtype=np.int64)
    )
    # both engines may print their progress
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = evaluation_class(ground_truth, predicted, "bbox")
        evaluation.params.maxDets = [*evaluation.params.maxDets[:-1], max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval


def _make_coco(coco_class: Any, image_ids: list[int], records: np.ndarray, **more: np.ndarray) -> Any:
    """Make an engine's dataset with one category and one annotation per record."""
    columns = {name: records[name].tolist() for name in records.dtype.names or ()}
    columns |= {name: values.tolist() for name, values in more.items()}
    # numbered from 1, whatever the annotation file has: pycocotools takes a match with annotation 0 for no match
    columns["id"] = range(1, len(records) + 1)
    coco = coco_class()
    coco.dataset = {
        "images": [{"id": image_id} for image_id in image_ids],
        "categories": [{"id": category_id} for category_id in set(columns["category_id"])],
        "annotations": [dict(zip(columns, values)) for values in zip(*columns.values())],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _summarize(curves: dict[str, np.ndarray], max_detections: int) -> tuple[dict[str, float], str]:
    """Compute the twelve metrics and the table that pycocotools prints of them.

    pycocotools only summarizes curves of at most 100 detections, so those of another number are passed as such.
    """
    evaluation = COCOeval(iouType="bbox")
    evaluation.eval = curves
    with contextlib.redirect_stdout(io.StringIO()) as table:
        evaluation.summarize()
    names = [name.replace(str(COCO_MAX_DETECTIONS), str(max_detections)) for name in METRICS]
    values = [float(value) for value in evaluation.stats]
    lines = table.getvalue().rstrip().replace(f"maxDets={COCO_MAX_DETECTIONS}", f"maxDets={max_detections}")
    note = describe_max_detections(max_detections)
    return dict(zip(names, values, strict=True)), "\n".join(filter(None, [lines, note]))
