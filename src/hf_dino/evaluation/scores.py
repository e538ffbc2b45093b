"""COCO's average precision and recall of detections, by pycocotools or by faster-coco-eval, class after class."""

import contextlib
import importlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from pycocotools.cocoeval import COCOeval, Params

from ..data.dataset import DetectionSplit, to_annotation_array
from ..metrics import METRIC_NAMES
from ..utils.errors import InputError, summarize_list
from .records import group_rows


METRICS = tuple(METRIC_NAMES)
"""COCO's twelve numbers, in the order in which pycocotools computes them."""

ENGINES = {
    "pycocotools": (("pycocotools.coco", "COCO"), ("pycocotools.cocoeval", "COCOeval")),
    "faster-coco-eval": (("faster_coco_eval", "COCO"), ("faster_coco_eval", "COCOeval_faster")),
}
"""What may match detections with objects, by the names of its package: its dataset and its evaluation."""


class Curves(NamedTuple):
    """What COCO's evaluation measures, -1 where no object counts.

    Attributes:
        precision (`np.ndarray` of shape `(10, 101, num_categories, 4, 3)`): The highest precision at this recall or a
            higher one. The axes are COCO's: IoU threshold (.5 to .95), recall (0 to 1), category by rising id, size
            of objects (all, small, medium, large), most detections of a class in an image (1, 10, 100).
        recall (`np.ndarray` of shape `(10, num_categories, 4, 3)`): The highest recall reached.
    """

    precision: np.ndarray
    recall: np.ndarray


@dataclass(frozen=True)
class CocoScores:
    """What COCO's evaluation says about a set of detections.

    Attributes:
        metrics (`dict[str, float]`): The twelve numbers of [`METRICS`], in [0, 1]; -1 where no object counts.
        ap_per_category (`dict[str, float]`): Average precision by category name; -1 for a category without objects.
        table (`str`): The twelve lines that pycocotools prints.
        precision (`np.ndarray` of shape `(10, 101, num_categories)`): Precision by IoU threshold (.5 to .95), recall
            (0 to 1) and category, for objects of all sizes; -1 for a category without objects.
    """

    metrics: dict[str, float]
    ap_per_category: dict[str, float]
    table: str
    precision: np.ndarray = field(repr=False, compare=False)


def evaluate_coco(data: DetectionSplit, detections: np.ndarray, engine: str = "pycocotools") -> CocoScores:
    """Score detections against a dataset as COCO does.

    Args:
        data (`DetectionSplit`): The dataset, crowd regions included, which are ignored rather than missed.
        detections (`np.ndarray`): Of dtype [`DETECTION`], from [`collect_detections`] or [`detections_from_results`], in any
            order of images. There may be none, which scores 0. Those of unknown categories do not count.
        engine (`str`, *optional*, defaults to `"pycocotools"`): One of [`ENGINES`].

    Returns:
        `CocoScores`: Numbers, table, and precision of each category.

    Raises:
        InputError: If a detection is in an image that the dataset lacks, or the engine is not there.
    """
    check_engine(engine)
    _check_images(data, detections)
    curves = _measure(data, detections, engine)
    metrics, table = _summarize(curves)
    precision = curves.precision[..., 0, -1]
    averages = precision.mean(axis=(0, 1)).tolist()
    return CocoScores(metrics, dict(zip(data.categories.values(), averages, strict=True)), table, precision)


def check_engine(engine: str) -> None:
    """See that an engine can be used, before anything is detected.

    Raises:
        InputError: If it is unknown or not installed; the message says what to do.
    """
    if engine not in ENGINES:
        raise InputError(f"the evaluation engine must be one of {summarize_list(ENGINES)}; got {engine!r}")
    try:
        _load(engine)
    except ImportError as error:
        raise InputError(f"the engine {engine} cannot be used ({error}): pip install {engine}") from None


def _load(engine: str) -> tuple[Any, Any]:
    """The engine's classes of a dataset and of an evaluation."""
    dataset, evaluation = (getattr(importlib.import_module(module), name) for module, name in ENGINES[engine])
    return dataset, evaluation


def _check_images(data: DetectionSplit, detections: np.ndarray) -> None:
    unknown = np.setdiff1d(detections["image_id"], [image.image_id for image in data.images])
    if len(unknown):
        raise InputError(f"{data.source}: has no images with the ids {summarize_list(unknown)}, which detections name")


def _measure(data: DetectionSplit, detections: np.ndarray, engine: str) -> Curves:
    """Evaluate one category after the other.

    Categories have nothing to do with each other, nor have a category and the images without an object or a
    detection of it. So the result is that of evaluating all at once, but pycocotools' tables, which have several kB
    for each image, category and size of objects, are never in memory together.
    """
    parameters = Params(iouType="bbox")
    by_recall = (len(parameters.iouThrs), len(parameters.recThrs), len(data.categories))
    by_limit = (len(parameters.areaRng), len(parameters.maxDets))
    precision, recall = np.full(by_recall + by_limit, -1.0), np.full(by_recall[::2] + by_limit, -1.0)

    objects = to_annotation_array(data)
    rows = (group_rows(records["category_id"], data.categories) for records in (objects, detections))
    for index, (of_objects, of_detections) in enumerate(zip(*rows)):
        if len(of_objects):  # otherwise nothing can be found
            measured = _evaluate(objects[of_objects], np.asarray(detections[of_detections]), engine)
            precision[:, :, index], recall[:, index] = measured["precision"][:, :, 0], measured["recall"][:, 0]
    return Curves(precision, recall)


def _evaluate(objects: np.ndarray, detections: np.ndarray, engine: str) -> Mapping[str, np.ndarray]:
    """What COCO's evaluation of one category measures."""
    coco_class, evaluation_class = _load(engine)
    image_ids = np.union1d(objects["image_id"], detections["image_id"]).tolist()
    areas = detections["bbox"][:, 2] * detections["bbox"][:, 3]
    truth = _coco(coco_class, image_ids, objects)
    found = _coco(coco_class, image_ids, detections, area=areas, iscrowd=np.zeros(len(detections), dtype=np.int64))
    # both engines may print about their progress
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = evaluation_class(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval


def _coco(coco_class: Any, image_ids: list[int], records: np.ndarray, **more: np.ndarray) -> Any:
    """An engine's dataset with one category and an annotation for each record."""
    columns = {name: records[name].tolist() for name in records.dtype.names or ()}
    columns |= {name: values.tolist() for name, values in more.items()}
    # numbered from 1, whatever a file says: pycocotools takes a match with annotation 0 for no match
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


def _summarize(curves: Curves) -> tuple[dict[str, float], str]:
    """The twelve numbers, and the table of them that pycocotools prints."""
    evaluation = COCOeval(iouType="bbox")
    evaluation.eval = curves._asdict()
    with contextlib.redirect_stdout(io.StringIO()) as table:
        evaluation.summarize()
    numbers = [float(value) for value in evaluation.stats]
    return dict(zip(METRICS, numbers, strict=True)), table.getvalue().rstrip()
