"""COCO's numbers for known detections, and detections in the right category, pixels and number."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from coco_files import annotation, write_coco
from hf_dino import DinoDetrImageProcessor
from hf_dino.data import InputError, evaluation_loader, read_coco
from hf_dino.evaluation import METRICS, collect_detections, evaluate_coco, evaluate_model


BOXES = {1: [10, 10, 40, 20], 2: [5, 5, 50, 60]}
OBJECTS = [annotation(1, 3, BOXES[1]), annotation(2, 7, BOXES[2])]


class Oracle(nn.Module):
    """Finds one object in each picture, whose mean colour says which box (fractions, centre format) it has."""

    def __init__(self, boxes):
        super().__init__()
        self.config = SimpleNamespace(id2label={0: "N/A", 1: "cat", 2: "dog"}, num_select=2)
        self.boxes = boxes
        self.batches = []

    def forward(self, pixel_values, pixel_mask):
        self.batches.append(pixel_values.shape)
        assert pixel_mask.all(), "no picture is padded because of another"
        boxes, logits = [], []
        for shape in [tuple(pixel_values.shape[-2:])] * len(pixel_values):
            label, box = self.boxes[shape]
            boxes.append(torch.tensor([box, [0.5, 0.5, 1, 1]]))
            logits.append(torch.full((2, 3), -9.0))
            logits[-1][0, label] = 9.0
        return SimpleNamespace(logits=torch.stack(logits), pred_boxes=torch.stack(boxes))


@pytest.fixture
def data(tmp_path):
    return read_coco(*write_coco(tmp_path, OBJECTS, sizes=[(40, 80), (100, 60), (40, 80)]))


def results(scale=1.0):
    return [
        {"image_id": 1, "category_id": 3, "bbox": [scale * v for v in BOXES[1]], "score": 0.9},
        {"image_id": 2, "category_id": 7, "bbox": [scale * v for v in BOXES[2]], "score": 0.8},
    ]


def test_perfect_detections(data):
    scores = evaluate_coco(data, results())
    assert list(scores.metrics) == list(METRICS)
    assert scores.metrics["ap"] == pytest.approx(1)
    assert scores.metrics["ap_large"] == -1, "there is no large object"
    assert scores.ap_per_category == pytest.approx({"dog": 1, "cat": 1})
    assert scores.table.splitlines()[0].strip().startswith("Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all")
    assert len(scores.table.splitlines()) == 12


def test_half_right_detections(data):
    wrong_category = [{**results()[0], "category_id": 7}, results()[1]]
    scores = evaluate_coco(data, wrong_category)
    assert scores.ap_per_category["dog"] == 0
    assert 0 < scores.metrics["ap"] <= 0.5


def test_no_detections_and_no_objects(data, tmp_path):
    scores = evaluate_coco(data, [])
    assert (scores.metrics["ap"], scores.metrics["ar_100"]) == (0, 0)
    assert scores.ap_per_category == {"dog": 0, "cat": 0}
    empty = read_coco(*write_coco(tmp_path / "empty", []))
    assert evaluate_coco(empty, []).metrics["ap"] == -1


def test_annotation_id_zero_counts(tmp_path):
    """For pycocotools id 0 means "no match"."""
    data = read_coco(*write_coco(tmp_path, [annotation(1, 3, BOXES[1], id=0)], sizes=[(40, 80)]))
    assert evaluate_coco(data, results()[:1]).metrics["ap"] == pytest.approx(1)


def test_crowds_are_ignored_rather_than_missed(tmp_path):
    objects = [OBJECTS[0], annotation(1, 3, [50, 0, 30, 40], iscrowd=1)]
    data = read_coco(*write_coco(tmp_path, objects, sizes=[(40, 80)]))
    in_the_crowd = {"image_id": 1, "category_id": 3, "bbox": [55, 5, 10, 10], "score": 0.95}
    assert evaluate_coco(data, [results()[0], in_the_crowd]).metrics["ap"] == pytest.approx(1)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_evaluate_model(data, batch_size):
    processor = DinoDetrImageProcessor(size={"shortest_edge": 20, "longest_edge": 50})
    model = Oracle(
        {
            (20, 40): (2, [30 / 80, 20 / 40, 40 / 80, 20 / 40]),
            (33, 20): (1, [30 / 60, 35 / 100, 50 / 60, 60 / 100]),
        }
    ).train()
    seen = []
    scores, found = evaluate_model(model, processor, data, Accelerator(), batch_size=batch_size, on_batch=seen.append)
    assert model.training, "the mode is put back"
    assert sum(seen) == 3
    best = {result["image_id"]: result for result in found if result["score"] > 0.5}
    assert (best[1]["category_id"], best[2]["category_id"]) == (3, 7)
    assert best[1]["bbox"] == pytest.approx(BOXES[1], abs=1e-4)
    assert best[2]["bbox"] == pytest.approx(BOXES[2], abs=1e-4)
    # the third picture looks like the first, so the same is "found" there and is wrong
    assert 0.5 < scores.metrics["ap"] < 1
    assert {result["category_id"] for result in found} <= {3, 7}, "labels that the data lack are left out"


def test_shares_of_two_processes_are_the_whole(data):
    processor = DinoDetrImageProcessor(size={"shortest_edge": 20, "longest_edge": 50})
    shares = [
        [
            i
            for batch in evaluation_loader(data, processor, batch_size=1, rank=rank, world_size=2)
            for i in batch["image_ids"]
        ]
        for rank in (0, 1)
    ]
    assert sorted(shares[0] + shares[1]) == [1, 2, 3]


def test_detect_without_pictures():
    assert collect_detections(Oracle({}), [], DinoDetrImageProcessor(), {}, Accelerator()) == []


def test_unknown_categories_are_an_error_before_the_first_picture(data):
    model = Oracle({})
    model.config.id2label = {0: "bird"}
    with pytest.raises(InputError, match=r"no class for 'dog' \(id 3\), 'cat' \(id 7\)"):
        evaluate_model(model, DinoDetrImageProcessor(), data, Accelerator(), batch_size=1)
    assert not model.batches
