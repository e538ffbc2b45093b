"""Kinds of mistakes, thresholds, confusion and worst pictures: agreed with COCO's evaluation and with each other."""

import sys
from pathlib import Path

import numpy as np
import pytest

from coco_files import annotation, write_coco
from hf_dino.data import read_coco
from hf_dino.data.objects import objects_of
from hf_dino.evaluation import KINDS, analyse, as_detections, evaluate_coco
from hf_dino.evaluation.analysis import CORRECT, IGNORED, best_point, judge
from hf_dino.evaluation.records import rows_of


sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from evaluation_inputs import generate


@pytest.fixture(scope="module")
def generated():
    return generate(num_pictures=60, num_detections=40, num_categories=5, crowd_share=0.1, decimals=3)


def coco_precision(correct, num_objects):
    """COCO's 101 precisions from the marks of detections, strongest first."""
    num_correct = np.cumsum(correct)
    precision = num_correct / np.arange(1, len(correct) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    first = np.searchsorted(num_correct / num_objects, np.linspace(0, 1, 101), side="left")
    return np.append(precision, 0)[np.minimum(first, len(precision))]


def test_what_is_correct_or_ignored_is_so_for_coco(generated):
    data, detections = generated
    verdicts, objects = judge(objects_of(data), detections), objects_of(data)
    measured = evaluate_coco(data, detections)
    by_picture = np.argsort(detections["image_id"], kind="stable")  # where pycocotools puts those of equal score
    for index, category_id in enumerate(list(data.categories)[:-1]):
        rows = by_picture[detections["category_id"][by_picture] == category_id]
        rows = rows[np.argsort(-detections["score"][rows], kind="stable")]
        rows = rows[verdicts.kind[rows] != IGNORED]
        num_objects = np.count_nonzero((objects["category_id"] == category_id) & (objects["iscrowd"] == 0))
        expected = coco_precision(verdicts.kind[rows] == CORRECT, num_objects)
        np.testing.assert_allclose(measured.precision[0, :, index], expected, atol=1e-12)


def slow_best_point(scores, correct, num_objects):
    """Every threshold tried."""
    tried = [(0.0, 1.0)]
    for threshold in sorted(set(scores), reverse=True):
        kept = scores >= threshold
        tried.append((2 * correct[kept].sum() / (kept.sum() + num_objects), threshold))
    return max(tried)


def test_best_thresholds(generated):
    data, detections = generated
    kind, objects = judge(objects_of(data), detections).kind, objects_of(data)
    analysis = analyse(data, detections)
    scores, correct = detections["score"][kind != IGNORED], (kind == CORRECT)[kind != IGNORED]
    real = objects["iscrowd"] == 0
    assert analysis.threshold == slow_best_point(scores, correct, real.sum())[1]
    for category_id, name in list(data.categories.items())[:-1]:
        rows = (detections["category_id"] == category_id) & (kind != IGNORED)
        num_objects = (real & (objects["category_id"] == category_id)).sum()
        f1, threshold = slow_best_point(detections["score"][rows], (kind == CORRECT)[rows], num_objects)
        point = analysis.best[name]
        assert (point.f1, point.threshold) == pytest.approx((f1, threshold), abs=1e-12)
        assert point.f1 == pytest.approx(2 / (1 / point.precision + 1 / point.recall))
    assert np.isnan(analysis.best["class 4"].threshold), "without objects no threshold is any good"
    assert np.isnan(best_point(np.zeros(0), np.zeros(0, bool), 3).threshold)


def test_a_threshold_changes_nothing_about_stronger_detections(generated):
    data, detections = generated
    strong = detections["score"] >= 0.4
    weak_and_strong, only_strong = judge(objects_of(data), detections), judge(objects_of(data), detections[strong])
    for one, other in zip(weak_and_strong, only_strong):
        np.testing.assert_array_equal(one[strong], other)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6, 1.1])
def test_every_object_and_detection_is_counted_once(generated, threshold):
    data, detections = generated
    analysis, objects = analyse(data, detections, threshold=threshold, num_worst=1000), objects_of(data)
    strong = detections[detections["score"] >= threshold]
    ignored = analysis.counts["ignored"]
    assert sum(analysis.counts.values()) - analysis.counts["missed"] == len(strong)
    assert analysis.confusion[:, :-1].sum() == len(strong) - ignored
    per_category = [
        np.count_nonzero(objects["iscrowd"][rows] == 0) for rows in rows_of(objects["category_id"], data.categories)
    ]
    assert analysis.confusion[:-1].sum(axis=1).tolist() == per_category
    assert analysis.confusion.min() >= 0
    assert analysis.confusion[-1, -1] == 0
    assert np.trace(analysis.confusion) == analysis.counts["correct"]
    not_found = sum(np.count_nonzero(~one.found) for one in analysis.worst)
    assert not_found == analysis.confusion[:-1].sum() - analysis.counts["correct"]
    assert analysis.counts["missed"] <= not_found
    mistakes = [
        np.count_nonzero(~one.found) + sum(kind not in ("correct", "ignored") for kind in one.kinds)
        for one in analysis.worst
    ]
    assert mistakes == sorted(mistakes, reverse=True)
    assert min(mistakes) > 0
    assert sum(len(one.detections) for one in analysis.worst) <= len(strong)


A, B = [0, 0, 40, 40], [60, 0, 40, 40]
SHOULD_BE = [
    # category, box, score, kind
    (3, [0, 0, 40, 38], 0.9, "correct"),
    (3, [0, 2, 40, 40], 0.8, "duplicate"),
    (3, [62, 0, 40, 40], 0.7, "wrong class"),
    (7, [60, 20, 40, 40], 0.6, "badly placed"),
    (3, [75, 20, 40, 40], 0.5, "wrong class and place"),
    (7, [150, 60, 20, 20], 0.4, "background"),
    (3, [110, 70, 10, 10], 0.3, "ignored"),
    (7, [110, 70, 10, 10], 0.2, "background"),
]


@pytest.fixture
def one_picture(tmp_path):
    objects = [annotation(1, 3, A), annotation(1, 7, B), annotation(1, 3, [105, 60, 30, 30], iscrowd=1)]
    data = read_coco(*write_coco(tmp_path, objects, sizes=[(100, 200), (50, 50)]))
    fields = ("category_id", "bbox", "score")
    return data, as_detections([{"image_id": 1, **dict(zip(fields, values))} for values in SHOULD_BE])


def test_kinds(one_picture):
    data, detections = one_picture
    analysis = analyse(data, detections[::-1], threshold=0)
    (worst,) = analysis.worst
    assert worst.kinds == [kind for *_, kind in SHOULD_BE]
    assert worst.found.tolist() == [True, False, True]
    assert worst.detections["score"].tolist() == [score for _, _, score, _ in SHOULD_BE]
    assert set(analysis.counts) == set(KINDS)
    tides = [kind for kind, meaning in KINDS.items() if "TIDE: " in meaning]
    assert tides == ["wrong class", "badly placed", "wrong class and place"]
    assert analysis.counts["missed"] == 0, "the cat was taken for a dog, so it was not missed"
    # dog, cat, nothing
    assert analysis.confusion.tolist() == [[1, 0, 0], [1, 0, 0], [2, 3, 0]]
    assert analyse(data, detections, threshold=0.85).counts["missed"] == 1


def test_agrees_with_supervision_where_nothing_is_ambiguous(one_picture):
    """The library pairs by overlap whatever the class, so it may call a lesser fit of the right class wrong."""
    supervision = pytest.importorskip("supervision")
    data, detections = one_picture
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
    assert analyse(data, detections, threshold=0).confusion.tolist() == expected.matrix.tolist()


def test_nothing_detected_and_nothing_there(one_picture, tmp_path):
    data, detections = one_picture
    analysis = analyse(data, as_detections([]))
    assert analysis.confusion.tolist() == [[0, 0, 1], [0, 0, 1], [0, 0, 0]]
    assert analysis.counts["missed"] == 2
    empty = read_coco(*write_coco(tmp_path / "empty", [], sizes=[(100, 200)]))
    assert analyse(empty, as_detections([])).worst == []
    analysis = analyse(empty, detections)
    assert analysis.threshold == 0.9, "where nothing is right, as many detections as objects, but one at least"
    assert analysis.counts["background"] == 1
