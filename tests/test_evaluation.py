"""Detections in the right category, pixels and number, on the disk, at any batch size and number of processes."""

import json
import os
import pickle
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from coco_files import annotation, write_coco
from hf_dino import DinoDetrImageProcessor
from hf_dino.data import InputError, evaluation_loader, read_coco
from hf_dino.evaluation import (
    DETECTION_DTYPE,
    collect_detections,
    detections,
    detections_from_results,
    evaluate_coco,
    evaluate_model,
    write_coco_results,
)


BOXES = {1: [10, 10, 40, 20], 2: [5, 5, 50, 60]}
OBJECTS = [annotation(1, 3, BOXES[1]), annotation(2, 7, BOXES[2])]
SIZES = [(40, 80), (100, 60), (40, 80)]
NUM_PROCESSES = 2


class Oracle(nn.Module):
    """Finds one object in each image, whose mean color says which box (fractions, center format) it has."""

    def __init__(self, boxes):
        super().__init__()
        self.config = SimpleNamespace(id2label={0: "N/A", 1: "cat", 2: "dog"}, num_select=2)
        self.boxes = boxes
        self.batches = []

    def forward(self, pixel_values, pixel_mask):
        self.batches.append(pixel_values.shape)
        assert pixel_mask.all(), "no image is padded because of another"
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


@pytest.fixture(params=["small blocks", "one block"])
def blocks(request, monkeypatch):
    """Records are moved in blocks; two of them at a time show what happens at the edges."""
    if request.param == "small blocks":
        monkeypatch.setattr(detections, "_BLOCK", 2)


def random_detections(image_ids, seed=0):
    rng = np.random.default_rng(seed)
    found = np.zeros(len(image_ids), DETECTION_DTYPE)
    found["image_id"], found["category_id"] = image_ids, rng.integers(1, 9, len(image_ids))
    found["bbox"], found["score"] = rng.uniform(0, 99, (len(image_ids), 4)), rng.random(len(image_ids))
    return found


@pytest.mark.parametrize("batch_size", [1, 4])
def test_evaluate_model(data, batch_size):
    model, seen = make_oracle(), []
    scores, found = evaluate_model(
        model, make_processor(), data, Accelerator(), batch_size=batch_size, on_batch=seen.append
    )
    assert model.training, "the mode is put back"
    assert sum(seen) == 3
    assert found["image_id"].tolist() == [1, 1, 2, 2, 3, 3]
    one, two, _ = found[found["score"] > 0.5]
    assert (one["category_id"], two["category_id"]) == (3, 7)
    assert one["bbox"] == pytest.approx(BOXES[1], abs=1e-4)
    assert two["bbox"] == pytest.approx(BOXES[2], abs=1e-4)
    # the third image looks like the first, so the same is "found" there and is wrong
    assert 0.5 < scores.metrics["ap"] < 1
    assert scores == evaluate_coco(data, found)
    assert set(found["category_id"].tolist()) <= {3, 7}, "labels that the data lack are left out"


class Process:
    """Stands for an `Accelerator` of one of several processes, which are threads here."""

    device = torch.device("cpu")

    def __init__(self, rank, shared, barrier):
        self.rank, self.shared, self.barrier = rank, shared, barrier

    def unwrap_model(self, model):
        return model

    def gather(self, tensor):
        self.shared[self.rank] = tensor
        self.barrier.wait()
        assert len({each.shape for each in self.shared}) == 1, "torch gathers only tensors of one shape"
        gathered = torch.cat(self.shared)
        self.barrier.wait()
        return gathered


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("num_processes", [2, 3, 5])
def test_processes_get_the_detections_of_one(data, num_processes):
    """Of five processes two have no image."""
    shared, barrier = [None] * num_processes, threading.Barrier(num_processes, timeout=60)

    def detect(rank):
        loader = evaluation_loader(data, make_processor(), batch_size=1, rank=rank, world_size=num_processes)
        process = Process(rank, shared, barrier)
        return collect_detections(make_oracle(), loader, make_processor(), {1: 7, 2: 3}, process)

    with ThreadPoolExecutor(num_processes) as pool:
        answers = list(pool.map(detect, range(num_processes)))
    _, expected = evaluate_model(make_oracle(), make_processor(), data, Accelerator(), batch_size=3)
    for found in answers:
        assert found.tobytes() == expected.tobytes()


def run_process(rank, folder):
    """What one of several real processes does; `Accelerator` finds the others through the environment."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), NUM_PROCESSES)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=NUM_PROCESSES)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": NUM_PROCESSES, "MASTER_ADDR": "-", "MASTER_PORT": 1}
    os.environ |= {name: str(value) for name, value in places.items()}
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == NUM_PROCESSES
    data = read_coco(folder / "images", folder / "annotations.json")
    scores, found = evaluate_model(make_oracle(), make_processor(), data, accelerator, batch_size=2)
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps((scores, np.array(found))))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_real_processes_get_the_answer_of_one(data, tmp_path):
    torch.multiprocessing.spawn(run_process, (tmp_path,), nprocs=NUM_PROCESSES)
    expected_scores, expected = evaluate_model(make_oracle(), make_processor(), data, Accelerator(), batch_size=3)
    for rank in range(NUM_PROCESSES):
        scores, found = pickle.loads((tmp_path / f"{rank}.pickle").read_bytes())
        assert scores == expected_scores
        assert found.tobytes() == expected.tobytes()


def test_shares_of_two_processes_are_the_whole(data):
    loaders = [
        evaluation_loader(data, make_processor(), batch_size=1, rank=rank, world_size=NUM_PROCESSES)
        for rank in range(NUM_PROCESSES)
    ]
    shares = [[image_id for batch in loader for image_id in batch["image_ids"]] for loader in loaders]
    assert sorted(shares[0] + shares[1]) == [1, 2, 3]


@pytest.mark.usefixtures("blocks")
def test_blocks_of_any_process_become_one_array_by_image():
    parts = [random_detections(ids, seed) for seed, ids in enumerate(([5, 5, -2, 9], [], [7, 7, 7], [1]))]
    found = detections.sort_by_image(parts)
    assert found["image_id"].tolist() == [-2, 1, 5, 5, 7, 7, 7, 9]
    assert found[2:4].tobytes() == parts[0][:2].tobytes(), "in an image the order stays"
    everything = [record.tobytes() for part in parts for record in part]
    assert sorted(record.tobytes() for record in found) == sorted(everything), "nothing lost or doubled"


def test_detections_take_no_memory_while_the_model_runs(tmp_path, monkeypatch):
    """They lie in a file, which is gone from the folder for temporary files at once."""
    monkeypatch.setattr(detections.tempfile, "tempdir", str(tmp_path))
    num_images, per_image = 40, 500

    class Noise(nn.Module):
        config = SimpleNamespace(num_select=per_image)

        def forward(self, pixel_values, pixel_mask):
            generator = torch.Generator().manual_seed(len(held))
            logits = torch.randn(1, per_image, 1, generator=generator)
            return SimpleNamespace(logits=logits, pred_boxes=torch.rand(1, per_image, 4, generator=generator))

    def batches():
        for image_id in range(num_images):
            ones = torch.ones(1, 3, 4, 4)
            yield {
                "pixel_values": ones,
                "pixel_mask": ones[:, 0],
                "image_ids": [image_id],
                "target_sizes": [(4, 4)],
            }

    held = []
    tracemalloc.start()
    found = collect_detections(
        Noise(),
        batches(),
        DinoDetrImageProcessor(),
        {0: 1},
        Accelerator(),
        lambda count: held.append(tracemalloc.get_traced_memory()[0]),
    )
    tracemalloc.stop()
    assert found.nbytes == num_images * per_image * DETECTION_DTYPE.itemsize
    assert isinstance(found, np.memmap)
    assert held[-1] - held[num_images // 4] < found.nbytes / 10
    assert not list(tmp_path.iterdir())


def test_detect_without_images():
    found = collect_detections(Oracle({}), [], DinoDetrImageProcessor(), {}, Accelerator())
    assert (len(found), found.dtype) == (0, DETECTION_DTYPE)


def test_unknown_categories_are_an_error_before_the_first_image(data):
    model = Oracle({})
    model.config.id2label = {0: "bird"}
    with pytest.raises(InputError, match=r"no class for 'dog' \(id 3\), 'cat' \(id 7\)"):
        evaluate_model(model, DinoDetrImageProcessor(), data, Accelerator(), batch_size=1)
    with pytest.raises(InputError, match="evaluation engine must be one of"):
        evaluate_model(make_oracle(), make_processor(), data, Accelerator(), batch_size=1, engine="other")
    assert not model.batches


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("count", [0, 1, 5])
def test_coco_results_come_back_as_they_were(tmp_path, count):
    found = random_detections(range(count))
    path = tmp_path / "new" / "results.json"
    write_coco_results(path, found)
    results = json.loads(path.read_text())
    assert all(set(result) == {"image_id", "category_id", "bbox", "score"} for result in results)
    assert detections_from_results(results).tobytes() == found.tobytes(), "every digit"
    with pytest.raises(InputError, match=r"results\.json: exists already"):
        write_coco_results(path, found)
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_half_written_results_leave_nothing(tmp_path, monkeypatch):
    def full_disk(result):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(detections.json, "dumps", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_coco_results(tmp_path / "results.json", random_detections([1]))
    assert not list(tmp_path.iterdir())


def test_the_mode_is_put_back_after_an_error():
    def broken_loader():
        raise KeyboardInterrupt
        yield

    model = Oracle({}).train()
    with pytest.raises(KeyboardInterrupt):
        collect_detections(model, broken_loader(), DinoDetrImageProcessor(), {}, Accelerator())
    assert model.training
