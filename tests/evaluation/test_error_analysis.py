"""Error types, thresholds, confusion matrix and worst images agree with COCO's evaluation and with each other."""

import sys
from pathlib import Path

import numpy as np
import pytest

from helpers.coco_files import annotation, write_coco
from hf_dino.data import read_coco, to_annotation_array
from hf_dino.evaluation import analyze_errors, detections_from_results, evaluate_coco
from hf_dino.evaluation.coco_eval import group_rows
from hf_dino.evaluation.error_analysis import (
    ERROR_TYPES,
    IGNORED,
    OUTCOMES,
    TRUE_POSITIVE,
    best_f1_threshold,
    match_detections,
)


sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from evaluation_inputs import generate


@pytest.fixture(scope="module")
def generated():
    return generate(num_images=60, num_detections=40, num_categories=5, crowd_share=0.1, decimals=3)


def coco_precision(correct, num_objects):
    """Return COCO's 101 precisions of detections sorted by descending score."""
    num_correct = np.cumsum(correct)
    precision = num_correct / np.arange(1, len(correct) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    first = np.searchsorted(num_correct / num_objects, np.linspace(0, 1, 101), side="left")
    return np.append(precision, 0)[np.minimum(first, len(precision))]


def test_true_positives_and_ignored_detections_are_those_of_coco(generated):
    data, detections = generated
    matches, objects = match_detections(to_annotation_array(data), detections), to_annotation_array(data)
    measured = evaluate_coco(data, detections)
    by_image = np.argsort(detections["image_id"], kind="stable")  # pycocotools' order of equal scores
    for index, category_id in enumerate(list(data.categories)[:-1]):
        rows = by_image[detections["category_id"][by_image] == category_id]
        rows = rows[np.argsort(-detections["score"][rows], kind="stable")]
        rows = rows[matches.outcome[rows] != IGNORED]
        num_objects = np.count_nonzero((objects["category_id"] == category_id) & (objects["iscrowd"] == 0))
        expected = coco_precision(matches.outcome[rows] == TRUE_POSITIVE, num_objects)
        np.testing.assert_allclose(measured.precision[0, :, index], expected, atol=1e-12)


def slow_best_threshold(scores, correct, num_objects):
    """Try every threshold."""
    tried = [(0.0, 1.0)]
    for threshold in sorted(set(scores), reverse=True):
        kept = scores >= threshold
        tried.append((2 * correct[kept].sum() / (kept.sum() + num_objects), threshold))
    return max(tried)


def test_best_thresholds(generated):
    data, detections = generated
    outcome, objects = match_detections(to_annotation_array(data), detections).outcome, to_annotation_array(data)
    analysis = analyze_errors(data, detections)
    scores, correct = detections["score"][outcome != IGNORED], (outcome == TRUE_POSITIVE)[outcome != IGNORED]
    real = objects["iscrowd"] == 0
    assert analysis.threshold == slow_best_threshold(scores, correct, real.sum())[1]
    for category_id, name in list(data.categories.items())[:-1]:
        rows = (detections["category_id"] == category_id) & (outcome != IGNORED)
        num_objects = (real & (objects["category_id"] == category_id)).sum()
        f1, threshold = slow_best_threshold(detections["score"][rows], (outcome == TRUE_POSITIVE)[rows], num_objects)
        point = analysis.best_thresholds[name]
        assert (point.f1, point.threshold) == pytest.approx((f1, threshold), abs=1e-12)
        assert point.f1 == pytest.approx(2 / (1 / point.precision + 1 / point.recall))
    assert np.isnan(analysis.best_thresholds["class 4"].threshold), "no objects, no best threshold"
    assert np.isnan(best_f1_threshold(np.zeros(0), np.zeros(0, bool), 3).threshold)


def test_detections_below_the_threshold_do_not_affect_those_above(generated):
    data, detections = generated
    kept = detections["score"] >= 0.4
    all_matches, kept_matches = (
        match_detections(to_annotation_array(data), detections),
        match_detections(to_annotation_array(data), detections[kept]),
    )
    for one, other in zip(all_matches, kept_matches):
        np.testing.assert_array_equal(one[kept], other)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6, 1.1])
def test_every_object_and_detection_is_counted_once(generated, threshold):
    data, detections = generated
    analysis, objects = (
        analyze_errors(data, detections, threshold=threshold, num_worst=1000),
        to_annotation_array(data),
    )
    kept = detections[detections["score"] >= threshold]
    ignored = analysis.counts["ignored"]
    assert sum(analysis.counts.values()) - analysis.counts["missed"] == len(kept)
    assert analysis.confusion[:, :-1].sum() == len(kept) - ignored
    per_category = [
        np.count_nonzero(objects["iscrowd"][rows] == 0) for rows in group_rows(objects["category_id"], data.categories)
    ]
    assert analysis.confusion[:-1].sum(axis=1).tolist() == per_category
    assert analysis.confusion.min() >= 0
    assert analysis.confusion[-1, -1] == 0
    assert np.trace(analysis.confusion) == analysis.counts["true positive"]
    false_negatives = sum(np.count_nonzero(~one.is_detected) for one in analysis.worst_images)
    assert false_negatives == analysis.confusion[:-1].sum() - analysis.counts["true positive"]
    assert analysis.counts["missed"] <= false_negatives
    num_errors = [
        np.count_nonzero(~one.is_detected)
        + sum(outcome not in ("true positive", "ignored") for outcome in one.outcomes)
        for one in analysis.worst_images
    ]
    assert num_errors == sorted(num_errors, reverse=True)
    assert min(num_errors) > 0
    assert sum(len(one.detections) for one in analysis.worst_images) <= len(kept)


A, B = [0, 0, 40, 40], [60, 0, 40, 40]
SHOULD_BE = [
    # category, box, score, outcome
    (3, [0, 0, 40, 38], 0.9, "true positive"),
    (3, [0, 2, 40, 40], 0.8, "duplicate"),
    (3, [62, 0, 40, 40], 0.7, "classification error"),
    (7, [60, 20, 40, 40], 0.6, "localization error"),
    (3, [75, 20, 40, 40], 0.5, "classification and localization error"),
    (7, [150, 60, 20, 20], 0.4, "background"),
    (3, [110, 70, 10, 10], 0.3, "ignored"),
    (7, [110, 70, 10, 10], 0.2, "background"),
]


@pytest.fixture
def one_image(tmp_path):
    objects = [annotation(1, 3, A), annotation(1, 7, B), annotation(1, 3, [105, 60, 30, 30], iscrowd=1)]
    data = read_coco(*write_coco(tmp_path, objects, sizes=[(100, 200), (50, 50)]))
    fields = ("category_id", "bbox", "score")
    return data, detections_from_results([{"image_id": 1, **dict(zip(fields, values))} for values in SHOULD_BE])


def test_outcomes(one_image):
    data, detections = one_image
    analysis = analyze_errors(data, detections[::-1], threshold=0)
    (worst,) = analysis.worst_images
    assert worst.outcomes == [outcome for *_, outcome in SHOULD_BE]
    assert worst.is_detected.tolist() == [True, False, True]
    assert worst.detections["score"].tolist() == [score for _, _, score, _ in SHOULD_BE]
    assert set(analysis.counts) == set(OUTCOMES)
    assert set(OUTCOMES) - set(ERROR_TYPES) == {"true positive", "ignored"}
    assert analysis.counts["missed"] == 0, "the cat was predicted as a dog, so it was not missed"
    # dog, cat, nothing
    assert analysis.confusion.tolist() == [[1, 0, 0], [1, 0, 0], [2, 3, 0]]
    assert analyze_errors(data, detections, threshold=0.85).counts["missed"] == 1


def test_agrees_with_supervision_where_nothing_is_ambiguous(one_image):
    """Supervision matches across classes: there, a detection of the right class with a lower IoU may be an error."""
    supervision = pytest.importorskip("supervision")
    data, detections = one_image
    detections = detections[[0, 2, 5]]
    boxes = [np.concatenate([b[:, :2], b[:, :2] + b[:, 2:]], axis=1) for b in (np.array([A, B]), detections["bbox"])]
    labels = np.searchsorted([3, 7], detections["category_id"])
    expected = supervision.ConfusionMatrix.from_detections(
        predictions=[supervision.Detections(boxes[1], class_id=labels, confidence=detections["score"])],
        targets=[supervision.Detections(boxes[0], class_id=np.array([0, 1]))],
        classes=["dog", "cat"],
        conf_threshold=0,
    )
    assert expected.matrix.tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 0]]
    assert analyze_errors(data, detections, threshold=0).confusion.tolist() == expected.matrix.tolist()


def test_no_detections_and_no_objects(one_image, tmp_path):
    data, detections = one_image
    analysis = analyze_errors(data, detections_from_results([]))
    assert analysis.confusion.tolist() == [[0, 0, 1], [0, 0, 1], [0, 0, 0]]
    assert analysis.counts["missed"] == 2
    empty = read_coco(*write_coco(tmp_path / "empty", [], sizes=[(100, 200)]))
    assert analyze_errors(empty, detections_from_results([])).worst_images == []
    analysis = analyze_errors(empty, detections)
    assert analysis.threshold == 0.9, "without true positives, as many detections as objects, but at least one"
    assert analysis.counts["background"] == 1
