"""Error analysis of detections: error types, confusion matrix, best score thresholds, images with the most errors.

The error types are those of TIDE (https://arxiv.org/abs/2008.08115), as counts; their effect on AP is not estimated.
Detections are matched to objects as COCO does at an IoU of .5: in order of descending score, each to the unmatched
object of its category with the highest IoU. So a detection's outcome depends only on detections with a higher score,
and one matching is valid for every score threshold.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from pycocotools import mask

from ..data.dataset import DetectionSplit, to_annotation_array
from .coco_eval import group_rows


FOREGROUND_IOU, BACKGROUND_IOU = 0.5, 0.1
"""TIDE's IoU thresholds: a detection is well localized from the first on, and is background below the second."""

ERROR_TYPES = {
    "duplicate": "IoU ≥ .5 with an object of its class that a detection with a higher score already matches",
    "classification error": "IoU ≥ .5 with an object of another class",
    "localization error": "IoU of .1 to .5 with an object of its class",
    "classification and localization error": "IoU of .1 to .5 with an object of another class",
    "background": "IoU < .1 with every object",
    "missed": "object without a true positive, classification error or localization error",
}
"""TIDE's error types: five of detections, and last the one of objects."""

OUTCOMES = {
    "true positive": "IoU ≥ .5 with an object of its class that no detection with a higher score matches",
    "ignored": "in a crowd region of its class, therefore neither correct nor an error",
    **ERROR_TYPES,
}
"""Possible outcomes of matching. The first that applies to a detection is its outcome."""

TRUE_POSITIVE, IGNORED, DUPLICATE, CLASSIFICATION, LOCALIZATION, BOTH, BACKGROUND, MISSED = range(len(OUTCOMES))


class OperatingPoint(NamedTuple):
    """A score threshold, with precision and recall of the detections that reach it.

    Attributes:
        threshold (`float`): The lowest score that counts; NaN if there are no true positives.
        f1 (`float`): Harmonic mean of precision and recall.
        precision (`float`): True positives divided by detections.
        recall (`float`): True positives divided by objects.
    """

    threshold: float = math.nan
    f1: float = 0.0
    precision: float = 0.0
    recall: float = 0.0


class MatchResults(NamedTuple):
    """Outcome of each detection, valid at every score threshold.

    Attributes:
        outcome (`np.ndarray` of shape `(num_detections,)`): Index into [`OUTCOMES`].
        object_index (`np.ndarray` of shape `(num_detections,)`): The object that decided the outcome; -1 for
            background.
    """

    outcome: np.ndarray
    object_index: np.ndarray


@dataclass(frozen=True)
class ImageErrors:
    """Detections of one image at a score threshold, and their errors.

    Attributes:
        image_index (`int`): Index into `split.images`.
        detections (`np.ndarray`): Of dtype [`DETECTION_DTYPE`], by descending score.
        outcomes (`list[str]`): Keys of [`OUTCOMES`], one per detection.
        is_detected (`np.ndarray` of shape `(num_objects,)`): `False` for each object of the image that is a false
            negative. Crowd regions are `True`.
    """

    image_index: int
    detections: np.ndarray
    outcomes: list[str]
    is_detected: np.ndarray


@dataclass(frozen=True)
class ErrorAnalysis:
    """Errors of the detections at one score threshold.

    Attributes:
        threshold (`float`): The lowest score that counts.
        best_thresholds (`dict[str, OperatingPoint]`): The threshold with the highest F1 by category name, for each
            category on its own.
        counts (`dict[str, int]`): Number of detections, or of missed objects, for each of [`OUTCOMES`].
        confusion (`np.ndarray` of shape `(num_categories + 1, num_categories + 1)`): Number of objects of the row's
            category that were predicted as the column's. The last row has detections that match no object, the last
            column has false negatives. Crowd regions and ignored detections are left out, so a row adds up to the
            objects of its category and a column to the detections of its category.
        worst_images (`list[ImageErrors]`): The images with the most errors (false positives and false negatives), in
            descending order. Images without errors are left out.
    """

    threshold: float
    best_thresholds: dict[str, OperatingPoint]
    counts: dict[str, int]
    confusion: np.ndarray
    worst_images: list[ImageErrors]


def analyze_errors(
    split: DetectionSplit, detections: np.ndarray, *, threshold: float | None = None, num_worst: int = 12
) -> ErrorAnalysis:
    """Classify the errors of detections.

    Args:
        split (`DetectionSplit`): The split of the dataset.
        detections (`np.ndarray`): Of dtype [`DETECTION_DTYPE`], in any order. Those of unknown categories are ignored.
        threshold (`float`, *optional*): The lowest score that counts. By default the threshold with the highest F1
            over all categories together or, if there are no true positives, the one that leaves as many detections
            as there are objects.
        num_worst (`int`, *optional*, defaults to 12): Maximum number of images in `worst_images`.
    """
    objects, category_ids = to_annotation_array(split), list(split.categories)
    detections = detections[np.isin(detections["category_id"], category_ids)]
    matches = match_detections(objects, detections)
    groups = zip(*(group_rows(records["category_id"], category_ids) for records in (objects, detections)))
    best_thresholds = {
        name: _best_threshold(objects[of_objects], detections[of_detections], matches.outcome[of_detections])
        for name, (of_objects, of_detections) in zip(split.categories.values(), groups)
    }
    if threshold is None:
        threshold = _default_threshold(objects, detections, matches.outcome)
    kept = detections["score"] >= threshold
    detections, matches = detections[kept], MatchResults(matches.outcome[kept], matches.object_index[kept])
    return ErrorAnalysis(
        threshold=threshold,
        best_thresholds=best_thresholds,
        counts=_count_outcomes(objects, matches),
        confusion=_confusion_matrix(objects, detections, matches, category_ids),
        worst_images=_worst_images(split, objects, detections, matches, num_worst),
    )


def match_detections(objects: np.ndarray, detections: np.ndarray) -> MatchResults:
    """Classify each detection and return the object that decided its outcome.

    Args:
        objects (`np.ndarray`): Of dtype [`ANNOTATION_DTYPE`].
        detections (`np.ndarray`): Of dtype [`DETECTION_DTYPE`], in any order.
    """
    matches = MatchResults(np.zeros(len(detections), np.int8), np.full(len(detections), -1))
    image_ids = np.unique(detections["image_id"])
    groups = zip(*(group_rows(records["image_id"], image_ids) for records in (objects, detections)))
    for of_objects, of_detections in groups:
        of_detections = of_detections[np.argsort(-detections["score"][of_detections], kind="stable")]
        outcome, index = _match_image(objects[of_objects], detections[of_detections])
        matches.outcome[of_detections] = outcome
        matches.object_index[of_detections] = np.append(of_objects, -1)[index]
    return matches


def best_f1_threshold(scores: np.ndarray, correct: np.ndarray, num_objects: int) -> OperatingPoint:
    """Return the score threshold with the highest F1.

    Args:
        scores (`np.ndarray` of shape `(num_detections,)`): In any order.
        correct (`np.ndarray` of shape `(num_detections,)`): `True` for true positives, at most one per object.
        num_objects (`int`): Number of objects that should be detected.

    Example:

    ```python
    >>> best_f1_threshold(np.array([0.9, 0.8, 0.3, 0.3]), np.array([True, False, True, True]), num_objects=3)
    OperatingPoint(threshold=0.3, f1=0.857..., precision=0.75, recall=1.0)

    ```
    """
    order = np.argsort(-scores, kind="stable")
    scores, true_positives = scores[order], np.cumsum(correct[order])
    f1 = 2 * true_positives / (np.arange(1, len(scores) + 1) + num_objects)
    f1[:-1][scores[:-1] == scores[1:]] = 0  # no threshold separates equal scores
    if not f1.any():
        return OperatingPoint()
    last = int(f1.argmax())
    num_correct = float(true_positives[last])
    return OperatingPoint(float(scores[last]), float(f1[last]), num_correct / (last + 1), num_correct / num_objects)


def _best_threshold(objects: np.ndarray, detections: np.ndarray, outcome: np.ndarray) -> OperatingPoint:
    counted = outcome != IGNORED
    num_objects = int(np.count_nonzero(objects["iscrowd"] == 0))
    return best_f1_threshold(detections["score"][counted], outcome[counted] == TRUE_POSITIVE, num_objects)


def _default_threshold(objects: np.ndarray, detections: np.ndarray, outcome: np.ndarray) -> float:
    """Return the threshold with the highest F1 or, without true positives, keep as many detections as objects."""
    best = _best_threshold(objects, detections, outcome).threshold
    num_objects = np.count_nonzero(objects["iscrowd"] == 0)
    highest = np.sort(detections["score"])[::-1][: max(1, num_objects)]
    fallback = float(highest[-1]) if len(highest) else 0.0
    return fallback if math.isnan(best) else best


def _match_image(objects: np.ndarray, detections: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return outcomes and object indices of one image's detections, which are sorted by descending score.

    The index is `num_objects` for background.
    """
    shape = len(detections), len(objects)
    # for a crowd region, the intersection is divided by the detection's area; without objects the result is a list
    iou = np.reshape(mask.iou(detections["bbox"], objects["bbox"], objects["iscrowd"]), shape)
    same_class = detections["category_id"][:, None] == objects["category_id"]
    crowd = objects["iscrowd"] == 1
    foreground, nearby = (iou >= FOREGROUND_IOU) & ~crowd, (iou >= BACKGROUND_IOU) & ~crowd
    applies = {
        TRUE_POSITIVE: _greedy_match(np.where(foreground & same_class, iou, 0)),
        IGNORED: (iou >= FOREGROUND_IOU) & same_class & crowd,
        DUPLICATE: foreground & same_class,
        CLASSIFICATION: foreground & ~same_class,
        LOCALIZATION: nearby & same_class,
        BOTH: nearby & ~same_class,
        BACKGROUND: np.zeros(shape, dtype=bool),
    }
    # one more column, after the objects, to which background applies
    cells = np.pad(np.stack(list(applies.values())), ((0, 0), (0, 0), (0, 1)))
    cells[BACKGROUND, :, -1] = True
    outcome = cells.any(axis=2).argmax(axis=0)
    candidates = cells[outcome, np.arange(len(outcome))]
    return outcome, (candidates * np.pad(iou, ((0, 0), (0, 1)), constant_values=1)).argmax(axis=1)


def _greedy_match(iou: np.ndarray) -> np.ndarray:
    """Match each detection in turn to the unmatched object with the highest IoU; an IoU of 0 never matches."""
    unmatched, matched = iou.copy(), np.zeros(iou.shape, dtype=bool)
    for row in np.flatnonzero(iou.any(axis=1)):
        column = unmatched.shape[1] - 1 - unmatched[row, ::-1].argmax()  # the last of equals, as pycocotools
        if unmatched[row, column]:
            matched[row, column] = True
            unmatched[:, column] = 0
    return matched


def _is_detected(objects: np.ndarray, matches: MatchResults) -> np.ndarray:
    """Return `False` for each false negative; crowd regions are never false negatives."""
    is_detected = objects["iscrowd"] == 1
    is_detected[matches.object_index[matches.outcome == TRUE_POSITIVE]] = True
    return is_detected


def _count_outcomes(objects: np.ndarray, matches: MatchResults) -> dict[str, int]:
    counts = np.bincount(matches.outcome, minlength=len(OUTCOMES))
    is_explained = _is_detected(objects, matches)
    is_explained[matches.object_index[np.isin(matches.outcome, (CLASSIFICATION, LOCALIZATION))]] = True
    counts[MISSED] = np.count_nonzero(~is_explained)
    return dict(zip(OUTCOMES, counts.tolist()))


def _confusion_matrix(
    objects: np.ndarray, detections: np.ndarray, matches: MatchResults, category_ids: list[int]
) -> np.ndarray:
    none = len(category_ids)
    true, predicted = (np.searchsorted(category_ids, records["category_id"]) for records in (objects, detections))
    # a false negative is predicted as the class of the classification error on it that has the highest score
    by_score = np.argsort(-detections["score"], kind="stable")
    confused = by_score[matches.outcome[by_score] == CLASSIFICATION]
    confused = confused[~_is_detected(objects, matches)[matches.object_index[confused]]]
    confused = confused[np.unique(matches.object_index[confused], return_index=True)[1]]
    paired = np.append(np.flatnonzero(matches.outcome == TRUE_POSITIVE), confused)

    confusion = np.zeros((none + 1, none + 1), dtype=np.int64)
    np.add.at(confusion, (true[matches.object_index[paired]], predicted[paired]), 1)
    counted = matches.outcome != IGNORED
    confusion[none] = np.bincount(predicted[counted], minlength=none + 1) - confusion.sum(axis=0)
    num_objects = np.bincount(true[objects["iscrowd"] == 0], minlength=none)
    confusion[:none, none] = num_objects - confusion[:none].sum(axis=1)
    return confusion


def _worst_images(
    split: DetectionSplit, objects: np.ndarray, detections: np.ndarray, matches: MatchResults, limit: int
) -> list[ImageErrors]:
    image_ids = [image.image_id for image in split.images]
    of_objects, of_detections = (group_rows(records["image_id"], image_ids) for records in (objects, detections))
    is_detected, is_error = _is_detected(objects, matches), matches.outcome > IGNORED
    num_errors = [
        np.count_nonzero(~is_detected[object_rows]) + np.count_nonzero(is_error[detection_rows])
        for object_rows, detection_rows in zip(of_objects, of_detections)
    ]
    worst = sorted(range(len(num_errors)), key=lambda index: -num_errors[index])[:limit]
    names = list(OUTCOMES)

    def describe(index: int) -> ImageErrors:
        rows = of_detections[index]
        rows = rows[np.argsort(-detections["score"][rows], kind="stable")]
        outcomes = [names[outcome] for outcome in matches.outcome[rows]]
        return ImageErrors(index, detections[rows], outcomes, is_detected[of_objects[index]])

    return [describe(index) for index in worst if num_errors[index]]
