"""COCO metrics equal those of pycocotools with either engine, whatever the order of the detections."""

import contextlib
import io
import sys
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from helpers.coco_files import annotation, write_coco
from hf_dino.data import InputError, read_coco
from hf_dino.evaluation import ENGINES, METRICS, check_engine, coco_eval, detections_from_results, evaluate_coco


sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from evaluation_inputs import generate


BOXES = {1: [10, 10, 40, 20], 2: [5, 5, 50, 60]}
OBJECTS = [annotation(1, 3, BOXES[1]), annotation(2, 7, BOXES[2])]
RESULTS = [
    {"image_id": 1, "category_id": 3, "bbox": BOXES[1], "score": 0.9},
    {"image_id": 2, "category_id": 7, "bbox": BOXES[2], "score": 0.8},
]
SETTINGS = {
    "crowds": {"crowd_share": 0.2},
    "ties": {"decimals": 1},
    "more than 100 of a class": {"num_categories": 3, "num_detections": 300, "num_images": 20},
}


@pytest.fixture(params=ENGINES)
def engine(request):
    pytest.importorskip(request.param.replace("-", "_"))
    return request.param


@pytest.fixture
def data(tmp_path):
    return read_coco(*write_coco(tmp_path, OBJECTS, sizes=[(40, 80), (100, 60), (40, 80)]))


def by_pycocotools(data, detections, max_detections=100):
    """Evaluate all categories at once; pycocotools loads the detections from a list of dicts."""
    objects = [(image, row) for image in data.images for row in range(len(image.boxes))]
    truth = COCO()
    truth.dataset = {
        "images": [{"id": image.image_id} for image in data.images],
        "categories": [{"id": category_id, "name": name} for category_id, name in data.categories.items()],
        "annotations": [
            {
                "id": number,
                "image_id": image.image_id,
                "category_id": int(image.category_ids[row]),
                "bbox": image.boxes[row].tolist(),
                "area": float(image.areas[row]),
                "iscrowd": int(image.iscrowd[row]),
            }
            for number, (image, row) in enumerate(objects, start=1)
        ],
    }
    results = [
        {"image_id": int(i), "category_id": int(c), "bbox": box.tolist(), "score": float(score)}
        for i, c, box, score in detections
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.params.maxDets = [1, 10, max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("setting", SETTINGS)
def test_equal_to_pycocotools(engine, setting):
    options = {"num_images": 40, "num_detections": 40, "num_categories": 6, **SETTINGS[setting]}
    data, detections = generate(**options)
    expected, measured = by_pycocotools(data, detections), evaluate_coco(data, detections, engine)
    assert 0.05 < expected.stats[0] < 0.95
    assert list(measured.metrics.values()) == pytest.approx(expected.stats.tolist(), abs=1e-12, rel=0)
    np.testing.assert_allclose(measured.precision, expected.eval["precision"][..., 0, -1], atol=1e-12, rtol=0)
    assert list(measured.ap_per_category.values())[-1] == -1, "there are detections, but no objects of the last class"
    with contextlib.redirect_stdout(io.StringIO()) as table:
        expected.summarize()
    assert measured.table == table.getvalue().rstrip()


@pytest.mark.parametrize("split", ["train", "val"])
def test_equal_on_real_annotations(engine, shared, split):
    folder = shared / "data" / "tiny_coco"
    data = read_coco(folder / f"{split}2017", folder / "annotations" / f"instances_{split}2017.json")
    rng = np.random.default_rng(0)
    results = [
        {
            "image_id": image.image_id,
            "category_id": int(category_id),
            "bbox": (box * rng.uniform(0.8, 1.2, 4)).tolist(),
            "score": rng.random(),
        }
        for image in data.images
        for box, category_id in zip(image.boxes, image.category_ids)
        for _ in range(3)
    ]
    detections = detections_from_results(results)
    expected = by_pycocotools(data, detections).stats
    measured = evaluate_coco(data, detections, engine).metrics
    assert list(measured.values()) == pytest.approx(expected.tolist(), abs=1e-12, rel=0)


def test_the_order_of_images_does_not_matter(engine):
    data, detections = generate(num_images=30, num_detections=20, num_categories=4, decimals=2)
    images = np.split(detections, 30)
    shuffled = np.concatenate([images[index] for index in np.random.default_rng(0).permutation(30)])
    assert evaluate_coco(data, shuffled, engine) == evaluate_coco(data, detections, engine)


def test_perfect_detections(data, engine):
    measured = evaluate_coco(data, detections_from_results(RESULTS), engine)
    assert list(measured.metrics) == list(METRICS)
    assert measured.metrics["ap"] == pytest.approx(1)
    assert measured.metrics["ap_large"] == -1, "there is no large object"
    assert measured.ap_per_category == pytest.approx({"dog": 1, "cat": 1})
    assert measured.table.splitlines()[0].strip().startswith("Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all")
    assert len(measured.table.splitlines()) == 12


def test_half_right_detections(data, engine):
    measured = evaluate_coco(data, detections_from_results([{**RESULTS[0], "category_id": 7}, RESULTS[1]]), engine)
    assert measured.ap_per_category["dog"] == 0
    assert 0 < measured.metrics["ap"] <= 0.5


def test_no_detections_and_no_objects(data, tmp_path, engine):
    nothing = detections_from_results([])
    measured = evaluate_coco(data, nothing, engine)
    assert (measured.metrics["ap"], measured.metrics["ar_100"]) == (0, 0)
    assert measured.ap_per_category == {"dog": 0, "cat": 0}
    empty = read_coco(*write_coco(tmp_path / "empty", []))
    for detections in (nothing, detections_from_results(RESULTS[:1])):
        assert evaluate_coco(empty, detections, engine).metrics["ap"] == -1


def test_annotation_id_zero_can_be_matched(tmp_path, engine):
    """Pycocotools takes id 0 for "no match"."""
    data = read_coco(*write_coco(tmp_path, [annotation(1, 3, BOXES[1], id=0)], sizes=[(40, 80)]))
    assert evaluate_coco(data, detections_from_results(RESULTS[:1]), engine).metrics["ap"] == pytest.approx(1)


def perfect_detections(data):
    return detections_from_results(
        {"image_id": image.image_id, "category_id": int(category_id), "bbox": box.tolist(), "score": 1 - 1e-4 * number}
        for image in data.images
        for number, (box, category_id) in enumerate(zip(image.boxes, image.category_ids))
    )


@pytest.fixture
def dense(tmp_path):
    """Two images with 200 objects of a class each."""
    objects = [annotation(i, 3, [n % 20 * 8, n // 20 * 8, 7, 6]) for i in (1, 2) for n in range(200)]
    return read_coco(*write_coco(tmp_path, objects, sizes=[(120, 160)] * 2))


def test_more_detections_than_coco_counts(dense, engine, caplog):
    detections = perfect_detections(dense)
    measured = evaluate_coco(dense, detections, engine)
    assert 0.49 < measured.metrics["ap"] < 0.51, "half of the objects, as pycocotools says"
    evaluate_coco(dense, detections, engine)
    (warning,) = [each.getMessage() for each in caplog.records if "more than" in each.getMessage()]
    assert warning == (
        f"{dense.source}: 2 of 2 images have more than 100 objects of a class, up to 200: an evaluation counts 100 "
        "detections of a class in an image, with --max_detections 200 more; images/1.png, images/2.png"
    )
    caplog.clear()
    enough = evaluate_coco(dense, detections, engine, max_detections=200)
    assert enough.metrics["ap"] == pytest.approx(1)
    assert (enough.metrics["ar_200"], enough.max_detections) == (pytest.approx(1), 200)
    assert "ar_100" not in enough.metrics
    assert not caplog.records


def test_no_number_of_more_detections_is_shown_as_coco_s(dense, engine):
    coco, more = (evaluate_coco(dense, perfect_detections(dense), engine, limit) for limit in (100, 250))
    note = "With 250 detections of a class in an image instead of 100: not comparable with COCO's metrics."
    assert more.table.splitlines()[-1] == note
    assert more.table.count("maxDets=250") == 10
    assert "maxDets=100" not in more.table
    assert more.to_dict() == {**more.metrics, "ap_per_category": more.ap_per_category, "max_detections": 250}
    assert coco.to_dict() == {**coco.metrics, "ap_per_category": coco.ap_per_category}
    with pytest.raises(InputError, match="--max_detections must be at least COCO's 100, got 99"):
        evaluate_coco(dense, perfect_detections(dense), engine, 99)


@pytest.mark.parametrize("max_detections", [101, 150, 300, 1000])
def test_equal_to_pycocotools_with_more_detections(engine, max_detections):
    data, detections = generate(num_images=10, num_detections=300, num_categories=2)
    expected = by_pycocotools(data, detections, max_detections)
    measured = evaluate_coco(data, detections, engine, max_detections)
    curves = expected.eval["precision"][..., 0, -1]
    np.testing.assert_allclose(measured.precision, curves, atol=1e-12, rtol=0)
    assert measured.metrics["ap"] == pytest.approx(curves[curves > -1].mean(), abs=1e-12, rel=0)
    # pycocotools gives all but the first number for any limit
    assert list(measured.metrics.values())[1:] == pytest.approx(expected.stats.tolist()[1:], abs=1e-12, rel=0)


@pytest.mark.parametrize(("field", "index"), [("score", (1,)), ("bbox", (1, 0)), ("bbox", (1, 3))])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_detections_that_are_not_finite_are_an_error(data, field, index, value):
    detections = detections_from_results(RESULTS)
    detections[field][index] = value
    message = "1 of 2 detections have a box or a score that is not finite, the first in the image with id 2"
    with pytest.raises(FloatingPointError, match=message):
        evaluate_coco(data, detections)
    result = dict(RESULTS[0], score=float("nan"))
    with pytest.raises(FloatingPointError, match="1 of 1 detections"):
        detections_from_results([result])


def test_crowds_are_ignored_rather_than_missed(tmp_path, engine):
    objects = [OBJECTS[0], annotation(1, 3, [50, 0, 30, 40], iscrowd=1)]
    data = read_coco(*write_coco(tmp_path, objects, sizes=[(40, 80)]))
    in_the_crowd = {"image_id": 1, "category_id": 3, "bbox": [55, 5, 10, 10], "score": 0.95}
    assert evaluate_coco(data, detections_from_results([RESULTS[0], in_the_crowd]), engine).metrics[
        "ap"
    ] == pytest.approx(1)


def test_unknown_categories_are_ignored_and_unknown_images_are_an_error(data, engine):
    more = detections_from_results([*RESULTS, {**RESULTS[0], "category_id": 99, "score": 1.0}])
    assert evaluate_coco(data, more, engine).metrics["ap"] == pytest.approx(1)
    with pytest.raises(InputError, match=r"annotations\.json: image ids not found: 77; detections refer to them"):
        evaluate_coco(data, detections_from_results([{**RESULTS[0], "image_id": 77}]), engine)


def test_an_unavailable_engine_is_an_error(monkeypatch):
    with pytest.raises(InputError, match="must be one of pycocotools, faster-coco-eval; got 'fastest'"):
        check_engine("fastest")
    monkeypatch.setitem(coco_eval.ENGINES, "faster-coco-eval", (("no_such_package", "COCO"),) * 2)
    with pytest.raises(InputError, match=r"No module named 'no_such_package'.*pip install faster-coco-eval"):
        check_engine("faster-coco-eval")
