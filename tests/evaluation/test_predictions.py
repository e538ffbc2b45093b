"""Detections have the right category, box and score at any batch size and number of processes."""

import json
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from helpers.coco_files import annotation, write_coco
from hf_dino import DinoDetrImageProcessor
from hf_dino.data import InputError, evaluation_loader, read_coco
from hf_dino.evaluation import (
    DETECTION_DTYPE,
    collect_detections,
    detections_from_results,
    evaluate_coco,
    evaluate_model,
    predictions,
    write_coco_results,
)


BOXES = {1: [10, 10, 40, 20], 2: [5, 5, 50, 60]}
OBJECTS = [annotation(1, 3, BOXES[1]), annotation(2, 7, BOXES[2])]
SIZES = [(40, 80), (100, 60), (40, 80)]


class Oracle(nn.Module):
    """Detects one object in each image; the image size determines label and box (center format, as fractions)."""

    def __init__(self, boxes):
        super().__init__()
        self.config = SimpleNamespace(model_type="dino_detr", id2label={0: "N/A", 1: "cat", 2: "dog"}, num_select=2)
        self.boxes = boxes
        self.batches = []

    def forward(self, pixel_values, pixel_mask):
        self.batches.append(pixel_values.shape)
        assert pixel_mask.all(), "a batch only has images of one size"
        boxes, logits = [], []
        for shape in [tuple(pixel_values.shape[-2:])] * len(pixel_values):
            label, box = self.boxes[shape]
            boxes.append(torch.tensor([box, [0.5, 0.5, 1, 1]]))
            logits.append(torch.full((2, 3), -9.0))
            logits[-1][0, label] = 9.0
        return SimpleNamespace(logits=torch.stack(logits), pred_boxes=torch.stack(boxes))


def make_oracle():
    return Oracle(
        {
            (20, 40): (2, [30 / 80, 20 / 40, 40 / 80, 20 / 40]),
            (33, 20): (1, [30 / 60, 35 / 100, 50 / 60, 60 / 100]),
        }
    ).train()


def make_processor():
    return DinoDetrImageProcessor(size={"shortest_edge": 20, "longest_edge": 50})


@pytest.fixture
def data(tmp_path):
    return read_coco(*write_coco(tmp_path, OBJECTS, sizes=SIZES))


def random_detections(image_ids):
    rng = np.random.default_rng(0)
    detections = np.zeros(len(image_ids), DETECTION_DTYPE)
    detections["image_id"], detections["category_id"] = image_ids, rng.integers(1, 9, len(image_ids))
    detections["bbox"], detections["score"] = rng.uniform(0, 99, (len(image_ids), 4)), rng.random(len(image_ids))
    return detections


@pytest.mark.parametrize("batch_size", [1, 4])
def test_evaluate_model(data, batch_size):
    model, seen = make_oracle(), []
    scores, detections = evaluate_model(
        model, make_processor(), data, Accelerator(), batch_size=batch_size, on_batch=seen.append
    )
    assert model.training, "the training mode is restored"
    assert sum(seen) == 3
    assert detections["image_id"].tolist() == [1, 1, 2, 2, 3, 3]
    one, two, _ = detections[detections["score"] > 0.5]
    assert (one["category_id"], two["category_id"]) == (3, 7)
    assert one["bbox"] == pytest.approx(BOXES[1], abs=1e-4)
    assert two["bbox"] == pytest.approx(BOXES[2], abs=1e-4)
    # the third image has the size of the first, so the oracle detects the same object, which is a false positive
    assert 0.5 < scores.metrics["ap"] < 1
    assert scores == evaluate_coco(data, detections)
    assert set(detections["category_id"].tolist()) <= {3, 7}, "labels without a category are dropped"


@pytest.mark.parametrize("num_processes", [2, 3, 5])
def test_any_number_of_processes_gives_the_same_detections(data, num_processes, monkeypatch):
    """The processes are threads here. Two of five have no image."""
    shared, barrier = [None] * num_processes, threading.Barrier(num_processes, timeout=60)
    process = threading.local()

    def gather_object(objects):
        shared[process.rank] = objects
        barrier.wait()
        return [each for objects in shared for each in objects]

    def detect(rank):
        process.rank = rank
        loader = evaluation_loader(data, make_processor(), batch_size=1, rank=rank, world_size=num_processes)
        return collect_detections(make_oracle(), loader, make_processor(), {1: 7, 2: 3}, Accelerator())

    _, expected = evaluate_model(make_oracle(), make_processor(), data, Accelerator(), batch_size=3)
    monkeypatch.setattr(predictions, "gather_object", gather_object)
    with ThreadPoolExecutor(num_processes) as pool:
        results = list(pool.map(detect, range(num_processes)))
    for detections in results:
        assert detections.tobytes() == expected.tobytes()


def run_process(rank, folder, num_processes):
    """Evaluate in one of several processes; `Accelerator` finds the others through the environment."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), num_processes)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=num_processes)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "MASTER_ADDR": "-", "MASTER_PORT": 1}
    os.environ |= {name: str(value) for name, value in variables.items()}
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == num_processes
    data = read_coco(folder / "images", folder / "annotations.json")
    result = evaluate_model(make_oracle(), make_processor(), data, accelerator, batch_size=2)
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(result))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 4])
def test_real_processes_give_the_same_result(data, tmp_path, num_processes):
    """Of four processes, one has no image."""
    torch.multiprocessing.spawn(run_process, (tmp_path, num_processes), nprocs=num_processes)
    expected_scores, expected = evaluate_model(make_oracle(), make_processor(), data, Accelerator(), batch_size=3)
    for rank in range(num_processes):
        scores, detections = pickle.loads((tmp_path / f"{rank}.pickle").read_bytes())
        assert scores == expected_scores
        assert detections.tobytes() == expected.tobytes()


def test_two_processes_share_the_images(data):
    loaders = [evaluation_loader(data, make_processor(), batch_size=1, rank=rank, world_size=2) for rank in range(2)]
    shares = [[image_id for batch in loader for image_id in batch["image_ids"]] for loader in loaders]
    assert sorted(shares[0] + shares[1]) == [1, 2, 3]


def test_sorting_by_image_keeps_the_order_within_an_image():
    unsorted = random_detections([5, 5, -2, 9, 7, 7, 7, 1])
    detections = predictions.sort_by_image(unsorted)
    assert detections["image_id"].tolist() == [-2, 1, 5, 5, 7, 7, 7, 9]
    assert detections[2:4].tobytes() == unsorted[:2].tobytes()
    assert sorted(row.tobytes() for row in detections) == sorted(row.tobytes() for row in unsorted)


def test_no_images_give_no_detections():
    detections = collect_detections(Oracle({}), [], DinoDetrImageProcessor(), {}, Accelerator())
    assert (len(detections), detections.dtype) == (0, DETECTION_DTYPE)


def test_unknown_categories_are_an_error_before_the_first_image(data):
    model = Oracle({})
    model.config.id2label = {0: "bird"}
    with pytest.raises(InputError, match=r"no class for 'dog' \(id 3\), 'cat' \(id 7\)"):
        evaluate_model(model, DinoDetrImageProcessor(), data, Accelerator(), batch_size=1)
    with pytest.raises(InputError, match="--coco_backend must be one of"):
        evaluate_model(make_oracle(), make_processor(), data, Accelerator(), batch_size=1, engine="other")
    assert not model.batches


def test_classes_are_matched_by_their_words_and_others_are_named_once(tmp_path, caplog):
    names = {3: "Dog", 5: "unicorn", 7: " CAT"}
    data = read_coco(*write_coco(tmp_path, OBJECTS, sizes=SIZES, categories=names))
    same = read_coco(*write_coco(tmp_path / "same", OBJECTS, sizes=SIZES))
    model = make_oracle()
    (scores, detections), (expected_scores, expected), _ = (
        evaluate_model(model, make_processor(), each, Accelerator(), batch_size=2) for each in (data, same, data)
    )
    assert detections.tobytes() == expected.tobytes()
    assert scores.metrics == expected_scores.metrics
    assert [record.getMessage() for record in caplog.records if record.name.startswith("hf_dino.eval")] == [
        f"{data.source}: categories are the model's classes with the same words: 'Dog' is 'dog', 'CAT' is 'cat'",
        f"{data.source}: the model has no class for the categories 'unicorn', which have no objects",
    ]


def test_classes_that_the_dataset_lacks_are_named(tmp_path, caplog):
    data = read_coco(*write_coco(tmp_path, OBJECTS[:1], sizes=SIZES, categories={3: "dog"}))
    _, detections = evaluate_model(make_oracle(), make_processor(), data, Accelerator(), batch_size=2)
    assert set(detections["category_id"].tolist()) == {3}
    assert caplog.messages == [
        f"{data.source}: detections of the model's classes 'cat' are not counted, since the dataset does not have them"
    ]


def test_two_categories_that_are_one_class_are_an_error(tmp_path):
    data = read_coco(*write_coco(tmp_path, OBJECTS, sizes=SIZES, categories={3: "dog", 7: "Dog"}))
    with pytest.raises(InputError, match="the categories 'dog', 'Dog' are all the model's class 'dog'"):
        evaluate_model(make_oracle(), make_processor(), data, Accelerator(), batch_size=2)


def test_max_detections_keeps_more_than_the_model_selects(data, caplog):
    """The oracle has two queries and three labels, of which it selects two detections of an image."""
    arguments = (make_oracle(), make_processor(), data, Accelerator())
    few, more = (evaluate_model(*arguments, batch_size=2, max_detections=limit) for limit in (100, 101))
    assert (len(few[1]), len(more[1])) == (6, 12), "two of three labels are classes of the dataset"
    assert (few[0].max_detections, more[0].max_detections) == (100, 101)
    assert not caplog.messages


def test_images_with_more_objects_than_a_model_detects_are_named(tmp_path, caplog):
    objects = [annotation(1, 3, [n, n, 9, 9]) for n in range(5)] + [annotation(2, 7, [1, 1, 9, 9])]
    data = read_coco(*write_coco(tmp_path, objects, sizes=SIZES))
    model = make_oracle()
    model.config.num_queries, model.config.num_select = 3, 4
    for _ in range(2):
        evaluate_model(model, make_processor(), data, Accelerator(), batch_size=2)
    queries, selected = caplog.messages
    assert queries.startswith(f"{data.source}: 1 of 3 images have more than 3 objects, up to 5: a model of 3 queries ")
    assert selected.startswith(
        f"{data.source}: 1 of 3 images have more than 4 objects, up to 5: an evaluation keeps 4"
    )


def test_no_result_of_a_model_with_broken_weights(data, tmp_path):
    model = make_oracle()
    model.boxes = {shape: (label, [float("nan")] * 4) for shape, (label, _) in model.boxes.items()}
    with pytest.raises(FloatingPointError, match="scores or boxes are NaN or infinite"):
        evaluate_model(model, make_processor(), data, Accelerator(), batch_size=2)
    broken = random_detections([1, 2])
    broken["score"][0] = float("nan")
    with pytest.raises(FloatingPointError, match="the first in the image with id 1"):
        write_coco_results(tmp_path / "new" / "results.json", broken)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("count", [0, 1, 5])
def test_coco_results_survive_writing_and_reading(tmp_path, count):
    detections = random_detections(range(count))
    path = tmp_path / "new" / "results.json"
    write_coco_results(path, detections)
    results = json.loads(path.read_text())
    assert all(set(result) == {"image_id", "category_id", "bbox", "score"} for result in results)
    assert detections_from_results(results).tobytes() == detections.tobytes(), "every digit"
    with pytest.raises(InputError, match=r"results\.json: already exists"):
        write_coco_results(path, detections)
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_a_failed_write_leaves_no_partial_results(tmp_path, monkeypatch):
    def full_disk(result):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(predictions.json, "dumps", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_coco_results(tmp_path / "results.json", random_detections([1]))
    assert not list(tmp_path.iterdir())


def test_the_training_mode_is_restored_after_an_error():
    def broken_loader():
        raise KeyboardInterrupt
        yield

    model = Oracle({}).train()
    with pytest.raises(KeyboardInterrupt):
        collect_detections(model, broken_loader(), DinoDetrImageProcessor(), {}, Accelerator())
    assert model.training
