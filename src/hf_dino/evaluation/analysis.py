"""What goes wrong: each detection's kind of mistake, who is taken for whom, the best score threshold, worst images.

The kinds are those of TIDE (https://arxiv.org/abs/2008.08115), counted rather than weighed by their effect on AP. What
TIDE calls duplicate, background and missed is called so here too, and its other errors have plainer names: wrong class
is classification, badly placed is localization, wrong class and place is both.
Detections are matched with objects as COCO does, at half overlap: strongest first, each to the free object of its
class that it overlaps most. So whether one is right depends on stronger ones alone, and one pass serves any threshold.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from pycocotools import mask

from ..data.dataset import DetectionSplit, to_annotation_array
from .records import group_rows


KINDS = {
    "correct": "on an object of its class that no stronger detection has found",
    "ignored": "within a crowd region of its class: neither right nor wrong",
    "duplicate": "on an object of its class that a stronger detection has found already",
    "wrong class": "on an object of another class (TIDE: classification)",
    "badly placed": "near an object of its class, but overlapping it by less than half (TIDE: localization)",
    "wrong class and place": "near an object of another class, but overlapping it by less than half (TIDE: both)",
    "background": "where there is no object",
    "missed": "an object without a detection on it, or of its class near it",
}
"""What a detection may be, and last what an object may be. "On" is an overlap (IoU) of .5 or more, "near" of .1."""

ON, NEAR = 0.5, 0.1
CORRECT, IGNORED, DUPLICATE, WRONG_CLASS, BADLY_PLACED, WRONG_CLASS_AND_PLACE, BACKGROUND, MISSED = range(len(KINDS))


class OperatingPoint(NamedTuple):
    """A score threshold and what the detections from there upwards are worth.

    Attributes:
        threshold (`float`): Detections with this score or a higher one count; NaN where no threshold is any good.
        f1 (`float`): Harmonic mean of precision and recall.
        precision (`float`): The share of detections that is right.
        recall (`float`): The share of objects that is found.
    """

    threshold: float = math.nan
    f1: float = 0.0
    precision: float = 0.0
    recall: float = 0.0


class MatchResults(NamedTuple):
    """What each detection is, whatever the threshold.

    Attributes:
        kind (`np.ndarray` of shape `(num_detections,)`): Position in [`KINDS`].
        target (`np.ndarray` of shape `(num_detections,)`): The object that it is on or near; -1 for background.
    """

    kind: np.ndarray
    target: np.ndarray


@dataclass(frozen=True)
class ImageErrors:
    """An image's detections from the threshold upwards, and what is wrong with them.

    Attributes:
        index (`int`): Of the image in `data.images`.
        detections (`np.ndarray`): Of dtype [`DETECTION`], strongest first.
        kinds (`list[str]`): What each is, one of [`KINDS`].
        found (`np.ndarray` of shape `(num_objects,)`): Whether each object of the image was found. Crowd regions
            need not be, and count as found.
    """

    index: int
    detections: np.ndarray
    kinds: list[str]
    found: np.ndarray


@dataclass(frozen=True)
class Analysis:
    """What is right and wrong among the detections from one threshold upwards.

    Attributes:
        threshold (`float`): The score from which detections count.
        best (`dict[str, OperatingPoint]`): The threshold of the highest F1 of each category alone, by name.
        counts (`dict[str, int]`): How many there are of each of [`KINDS`].
        confusion (`np.ndarray` of shape `(num_categories + 1, num_categories + 1)`): Objects of the row's category
            that were taken for the column's. The last row has detections that belong to no object, the last column
            objects that were not found. Rows add up to the objects of a category, columns to its detections, crowd
            regions and what is ignored left out.
        worst (`list[ImageErrors]`): The images with most false detections and objects not found, the worst
            first; none without mistakes.
    """

    threshold: float
    best: dict[str, OperatingPoint]
    counts: dict[str, int]
    confusion: np.ndarray
    worst: list[ImageErrors]


def analyze_errors(
    data: DetectionSplit, detections: np.ndarray, *, threshold: float | None = None, num_worst: int = 12
) -> Analysis:
    """Say what is right and wrong about detections.

    Args:
        data (`DetectionSplit`): The dataset.
        detections (`np.ndarray`): Of dtype [`DETECTION`]; those of unknown categories do not count.
        threshold (`float`, *optional*): The score from which detections count. Without it, that of the highest F1 of
            all classes together; where nothing is right, as many detections count as there are objects.
        num_worst (`int`, *optional*, defaults to 12): How many of the worst images to name, at most.
    """
    objects, categories = to_annotation_array(data), list(data.categories)
    detections = np.asarray(detections)[np.isin(detections["category_id"], categories)]
    verdicts = match_detections(objects, detections)
    counted, correct = verdicts.kind != IGNORED, verdicts.kind == CORRECT
    real = objects["iscrowd"] == 0

    def best_of(found: np.ndarray, present: np.ndarray) -> OperatingPoint:
        found = found[counted[found]]
        return best_f1_threshold(detections["score"][found], correct[found], int(np.count_nonzero(real[present])))

    rows = zip(group_rows(detections["category_id"], categories), group_rows(objects["category_id"], categories))
    best = {name: best_of(*of_category) for name, of_category in zip(data.categories.values(), rows)}
    if threshold is None:
        threshold = best_of(np.arange(len(detections)), np.arange(len(objects))).threshold
    if math.isnan(threshold):
        threshold = _some_threshold(detections["score"], int(np.count_nonzero(real)))
    strong = detections["score"] >= threshold
    detections, verdicts = detections[strong], MatchResults(verdicts.kind[strong], verdicts.target[strong])
    return Analysis(
        threshold=threshold,
        best=best,
        counts=_count_kinds(objects, verdicts),
        confusion=_confusion(objects, detections, verdicts, categories),
        worst=_worst_images(data, objects, detections, verdicts, num_worst),
    )


def match_detections(objects: np.ndarray, detections: np.ndarray) -> MatchResults:
    """Say of every detection what it is and which object it is about.

    Args:
        objects (`np.ndarray`): Of dtype [`OBJECT`].
        detections (`np.ndarray`): Of dtype [`DETECTION`], in any order.
    """
    verdicts = MatchResults(np.zeros(len(detections), np.int8), np.full(len(detections), -1))
    image_ids = np.unique(detections["image_id"])
    for found, present in zip(
        group_rows(detections["image_id"], image_ids), group_rows(objects["image_id"], image_ids)
    ):
        found = found[np.argsort(-detections["score"][found], kind="stable")]
        kind, target = _judge_image(objects[present], detections[found])
        verdicts.kind[found], verdicts.target[found] = kind, np.append(present, -1)[target]
    return verdicts


def best_f1_threshold(scores: np.ndarray, correct: np.ndarray, num_objects: int) -> OperatingPoint:
    """Find the score threshold with the highest F1.

    Args:
        scores (`np.ndarray` of shape `(num_detections,)`): In any order.
        correct (`np.ndarray` of shape `(num_detections,)`): Which detections are right, one for an object.
        num_objects (`int`): To be found.

    Example:

    ```python
    >>> best_f1_threshold(np.array([0.9, 0.8, 0.3, 0.3]), np.array([True, False, True, True]), num_objects=3)
    OperatingPoint(threshold=0.3, f1=0.857..., precision=0.75, recall=1.0)

    ```
    """
    order = np.argsort(-scores, kind="stable")
    scores, num_correct = scores[order], np.cumsum(correct[order])
    f1 = 2 * num_correct / (np.arange(1, len(scores) + 1) + num_objects)
    f1[:-1][scores[:-1] == scores[1:]] = 0  # a threshold takes all detections of a score or none
    if not f1.any():
        return OperatingPoint()
    last = int(f1.argmax())
    right = float(num_correct[last])
    return OperatingPoint(float(scores[last]), float(f1[last]), right / (last + 1), right / num_objects)


def _judge_image(objects: np.ndarray, detections: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Kinds and targets of one image's detections, strongest first; target `num_objects` means none."""
    shape = len(detections), len(objects)
    # for a crowd region, the share of the detection that lies within it; without objects it is an empty list
    overlap = np.reshape(mask.iou(detections["bbox"], objects["bbox"], objects["iscrowd"]), shape)
    same = detections["category_id"][:, None] == objects["category_id"]
    crowd = objects["iscrowd"] == 1
    on, near = (overlap >= ON) & ~crowd, (overlap >= NEAR) & ~crowd
    reasons = {
        CORRECT: _match(np.where(on & same, overlap, 0)),
        IGNORED: (overlap >= ON) & same & crowd,
        DUPLICATE: on & same,
        WRONG_CLASS: on & ~same,
        BADLY_PLACED: near & same,
        WRONG_CLASS_AND_PLACE: near & ~same,
        BACKGROUND: np.zeros(shape, dtype=bool),
    }
    # the first kind that any object is a reason for; background has a place of its own, behind the objects
    cells = np.pad(np.stack(list(reasons.values())), ((0, 0), (0, 0), (0, 1)))
    cells[BACKGROUND, :, -1] = True
    kind = cells.any(axis=2).argmax(axis=0)
    reason = cells[kind, np.arange(len(kind))]
    return kind, (reason * np.pad(overlap, ((0, 0), (0, 1)), constant_values=1)).argmax(axis=1)


def _match(overlap: np.ndarray) -> np.ndarray:
    """Give each detection in turn the free object that it overlaps most; 0 where the two do not fit."""
    free, matched = overlap.copy(), np.zeros(overlap.shape, dtype=bool)
    for row in np.flatnonzero(overlap.any(axis=1)):
        column = free.shape[1] - 1 - free[row, ::-1].argmax()  # the last of equals, as pycocotools
        if free[row, column]:
            matched[row, column] = True
            free[:, column] = 0
    return matched


def _some_threshold(scores: np.ndarray, num_objects: int) -> float:
    """The score from which there are as many detections as objects, for models of which nothing is right."""
    strongest = np.sort(scores)[::-1][: max(1, num_objects)]
    return float(strongest[-1]) if len(strongest) else 0.0


def _found(objects: np.ndarray, verdicts: MatchResults) -> np.ndarray:
    """Whether each object was found; crowd regions need not be."""
    found = objects["iscrowd"] == 1
    found[verdicts.target[verdicts.kind == CORRECT]] = True
    return found


def _count_kinds(objects: np.ndarray, verdicts: MatchResults) -> dict[str, int]:
    counts = np.bincount(verdicts.kind, minlength=len(KINDS))
    noticed = _found(objects, verdicts)
    noticed[verdicts.target[np.isin(verdicts.kind, (WRONG_CLASS, BADLY_PLACED))]] = True
    counts[MISSED] = np.count_nonzero(~noticed)
    return dict(zip(KINDS, counts.tolist()))


def _confusion(
    objects: np.ndarray, detections: np.ndarray, verdicts: MatchResults, categories: list[int]
) -> np.ndarray:
    nothing = len(categories)
    true, taken_for = (np.searchsorted(categories, records["category_id"]) for records in (objects, detections))
    found = _found(objects, verdicts)
    # an object that was not found is taken for the class of the strongest detection on it
    strongest_first = np.argsort(-detections["score"], kind="stable")
    on_it = strongest_first[verdicts.kind[strongest_first] == WRONG_CLASS]
    on_it = on_it[~found[verdicts.target[on_it]]]
    on_it = on_it[np.unique(verdicts.target[on_it], return_index=True)[1]]
    paired = np.append(np.flatnonzero(verdicts.kind == CORRECT), on_it)

    confusion = np.zeros((nothing + 1, nothing + 1), dtype=np.int64)
    np.add.at(confusion, (true[verdicts.target[paired]], taken_for[paired]), 1)
    counted, real = verdicts.kind != IGNORED, objects["iscrowd"] == 0
    confusion[nothing] = np.bincount(taken_for[counted], minlength=nothing + 1) - confusion.sum(axis=0)
    confusion[:nothing, nothing] = np.bincount(true[real], minlength=nothing) - confusion[:nothing].sum(axis=1)
    return confusion


def _worst_images(
    data: DetectionSplit, objects: np.ndarray, detections: np.ndarray, verdicts: MatchResults, limit: int
) -> list[ImageErrors]:
    image_ids = [image.image_id for image in data.images]
    of_objects, of_detections = (group_rows(records["image_id"], image_ids) for records in (objects, detections))
    found, wrong = _found(objects, verdicts), verdicts.kind > IGNORED
    mistakes = [
        np.count_nonzero(~found[present]) + np.count_nonzero(wrong[shown])
        for present, shown in zip(of_objects, of_detections)
    ]
    worst = sorted(range(len(mistakes)), key=lambda index: -mistakes[index])[:limit]
    names = list(KINDS)

    def describe(index: int) -> ImageErrors:
        rows = of_detections[index]
        rows = rows[np.argsort(-detections["score"][rows], kind="stable")]
        kinds = [names[kind] for kind in verdicts.kind[rows]]
        return ImageErrors(index, detections[rows], kinds, found[of_objects[index]])

    return [describe(index) for index in worst if mistakes[index]]
