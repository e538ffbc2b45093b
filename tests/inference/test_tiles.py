"""Tiles cover an image, and of an object at a seam only the whole box is kept."""

import logging
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

from helpers.large_images import encode_tile, write_tiff
from helpers.models import tiny_model
from hf_dino import DinoDetrImageProcessor
from hf_dino.data import images as images_module
from hf_dino.data import large_images
from hf_dino.inference import DetectionOptions, Detector, ImageInput, ResultsDirectory, detect_objects, find_inputs
from hf_dino.inference import results as results_module
from hf_dino.inference.tiles import SAME_IOU, merge_tiles, tile_boxes
from hf_dino.utils.names import named_classes


@pytest.mark.parametrize("size", [(1, 1), (100, 40), (101, 100), (333, 777), (40, 1000)])
@pytest.mark.parametrize("overlap", [0.0, 0.2, 0.5, 0.9])
def test_tiles_cover_the_image_and_overlap(size, overlap):
    covered = np.zeros(size[::-1], dtype=bool)
    tiles = tile_boxes(size, 100, overlap)
    for x0, y0, x1, y1 in tiles:
        assert (x1 - x0, y1 - y0) == (min(100, size[0]), min(100, size[1]))
        covered[y0:y1, x0:x1] = True
    assert covered.all()
    for axis in (0, 1):
        starts = sorted({tile[axis] for tile in tiles})
        assert all(100 - (other - one) >= int(100 * overlap) for one, other in pairwise(starts))


def test_without_tiles_there_is_one_view():
    assert tile_boxes((300, 200), None, 0.2) == [(0, 0, 300, 200)]


def in_tile(boxes, tile):
    """What a perfect detector finds in a tile: the visible part of each object, with a higher score if it is large."""
    x0, y0, x1, y1 = tile
    visible = torch.stack([boxes[:, 0].clamp(x0, x1), boxes[:, 1].clamp(y0, y1)], dim=1)
    visible = torch.cat([visible, boxes[:, 2:].clamp(boxes.new_tensor([x0, y0]), boxes.new_tensor([x1, y1]))], dim=1)
    kept = ((visible[:, 2:] - visible[:, :2]) > 4).all(dim=1)
    visible = visible[kept] - boxes.new_tensor([x0, y0, x0, y0])
    return {"scores": torch.full((len(visible),), 0.9), "labels": kept.nonzero()[:, 0] % 3, "boxes": visible}


@pytest.mark.parametrize("seed", range(5))
def test_objects_smaller_than_the_overlap_are_found_once(seed):
    size, generator = (700, 500), torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(5), torch.arange(7), indexing="ij")
    centers = (
        torch.stack([columns, rows], dim=-1).reshape(-1, 2) * 100 + 30 + 40 * torch.rand(35, 2, generator=generator)
    )
    halves = 8 + 12 * torch.rand(35, 2, generator=generator)
    boxes = torch.cat([centers - halves, centers + halves], dim=1).clamp(min=0)
    tiles = tile_boxes(size, 160, 0.3)
    merged = merge_tiles(tiles, [in_tile(boxes, tile) for tile in tiles], size, 48, 0.3, None)
    order = merged["boxes"].sum(dim=1).argsort()
    torch.testing.assert_close(merged["boxes"][order], boxes[boxes.sum(dim=1).argsort()], rtol=0, atol=1e-3)
    assert (merged["scores"] == 0.9).all()


def test_a_box_at_the_border_of_the_image_is_not_cut():
    boxes = torch.tensor([[0.0, 0.0, 40.0, 50.0], [60.0, 60.0, 100.0, 90.0]])
    found = {"scores": torch.tensor([0.9, 0.8]), "labels": torch.tensor([0, 0]), "boxes": boxes}
    alone = merge_tiles([(0, 0, 100, 100)], [found], (100, 100), 50, 0.0, None)
    assert alone["scores"].tolist() == pytest.approx([0.9, 0.8])
    seamed = merge_tiles([(0, 0, 100, 100)], [found], (200, 100), 50, 0.0, None)  # the second box ends at a seam
    assert seamed["scores"].tolist() == pytest.approx([0.9, 0.08])


def test_a_cut_box_that_no_tile_can_see_whole_keeps_its_score():
    found = {"scores": torch.tensor([0.9]), "labels": torch.tensor([0]), "boxes": torch.tensor([[60.0, 10, 100, 90]])}
    for overlap, score in ((41, 0.09), (40, 0.9)):  # it is 40 pixels long across the seam
        merged = merge_tiles([(0, 0, 100, 100)], [found], (200, 100), overlap, 0.0, None)
        assert merged["scores"].tolist() == pytest.approx([score])


@pytest.fixture(scope="module")
def detector():
    return tiny_model(), DinoDetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 160})


def test_tiles_are_detected_in_as_images_of_their_own(detector, monkeypatch):
    image = Image.effect_noise((150, 100), 80).convert("RGB")
    monkeypatch.setattr("hf_dino.inference.detector.open_image", lambda source: image)
    options = DetectionOptions(0.002, tile=80, tile_overlap=0.25)
    for batch_size in (1, 3, 8):
        stream = Detector(*detector, options, batch_size=batch_size).stream([ImageInput(image, "a")] * 2)
        results = [*stream]
        tiles = tile_boxes(image.size, 80, 0.25)
        assert len(tiles) == 6
        found = []
        for tile in tiles:
            rows = detect_objects(*detector, image.crop(tile), 0.002)
            columns = {"scores": "score", "labels": "label", "boxes": "box"}
            found.append({name: torch.tensor([row[key] for row in rows]) for name, key in columns.items()})
        expected = merge_tiles(tiles, found, image.size, 20, 0.002, None)
        for result in results:
            best = result.detections[:10]
            torch.testing.assert_close(
                torch.tensor([each["box"] for each in best]), expected["boxes"][:10], rtol=1e-3, atol=1e-2
            )


@pytest.mark.parametrize("nms_iou", [None, 0.5])
def test_an_image_smaller_than_a_tile_is_not_cut(detector, monkeypatch, nms_iou):
    image = Image.effect_noise((60, 40), 80).convert("RGB")
    monkeypatch.setattr("hf_dino.inference.detector.open_image", lambda source: image)
    item = ImageInput(image, "a")
    (tiled,) = Detector(*detector, DetectionOptions(0.005, tile=100, nms_iou=nms_iou)).stream([item])
    monkeypatch.setattr("hf_dino.inference.detector.read_image", lambda source: image)
    (whole,) = Detector(*detector, DetectionOptions(0.005, nms_iou=nms_iou)).stream([item])
    assert tiled.detections == whole.detections


def detections(boxes, scores, labels):
    return {"scores": torch.tensor(scores), "labels": torch.tensor(labels), "boxes": torch.tensor(boxes)}


def test_a_box_is_the_mean_of_those_that_other_tiles_have_of_the_object():
    tiles, size = [(0, 0, 100, 100), (50, 0, 150, 100)], (150, 100)
    left = detections([[52.0, 20.0, 92.0, 60.0], [10.0, 10.0, 30.0, 30.0]], [0.9, 0.8], [0, 0])
    right = detections([[6.0, 20.0, 46.0, 60.0], [3.5, 20.0, 43.5, 60.0]], [0.3, 0.7], [0, 1])
    merged = merge_tiles(tiles, [left, right], size, 50, 0.1, None)
    # 52 with a weight of 0.9 and 56 with 0.3; the third is of another class
    expected = [[53.0, 20.0, 93.0, 60.0], [10.0, 10.0, 30.0, 30.0], [53.5, 20.0, 93.5, 60.0]]
    torch.testing.assert_close(merged["boxes"], torch.tensor(expected))
    assert merged["scores"].tolist() == pytest.approx([0.9, 0.8, 0.7])


@pytest.mark.parametrize("seed", range(3))
def test_means_are_those_of_all_pairs(seed):
    generator = torch.Generator().manual_seed(seed)
    corners = 60 * torch.rand(300, 2, generator=generator)
    boxes = torch.cat([corners, corners + 10 + 25 * torch.rand(300, 2, generator=generator)], dim=1)
    boxes[0, 2:] = boxes[0, :2]  # without an area
    scores, labels = torch.rand(300, generator=generator), torch.arange(300) % 2
    tile, size = (100, 100, 200, 200), (300, 300)  # nothing is near a seam but by chance
    inside = (boxes.min(dim=1).values > 3) & (boxes.max(dim=1).values < 97)
    boxes, scores, labels = boxes[inside], scores[inside], labels[inside]
    merged = merge_tiles([tile], [{"boxes": boxes, "scores": scores, "labels": labels}], size, 50, 0.0, 0.5)
    for score, label, box in zip(merged["scores"], merged["labels"], merged["boxes"], strict=True):
        (index,) = ((scores == score) & (labels == label)).nonzero()[0]
        same = (box_iou(boxes[index : index + 1], boxes)[0] > SAME_IOU) & (labels == label)
        same[index] = True
        mean = (scores[same, None] * boxes[same]).sum(dim=0) / scores[same].sum()
        torch.testing.assert_close(box, mean + 100)


@pytest.mark.parametrize("shift", [(16, 0), (0, 48), (80, 32)])
def test_a_translated_object_has_translated_detections(shift):
    size, boxes = (900, 700), torch.tensor([[300.0, 200.0, 340.0, 260.0], [385.0, 300.0, 440.0, 330.0]])
    merged = []
    for moved in (boxes, boxes + torch.tensor([*shift, *shift])):
        tiles = tile_boxes(size, 160, 0.5)
        merged.append(merge_tiles(tiles, [in_tile(moved, tile) for tile in tiles], size, 80, 0.3, None))
    torch.testing.assert_close(merged[1]["boxes"], merged[0]["boxes"] + torch.tensor([*shift, *shift]))
    assert torch.equal(merged[1]["scores"], merged[0]["scores"])


def test_the_order_of_tiles_and_objects_of_other_classes_do_not_matter():
    size, tiles = (500, 400), tile_boxes((500, 400), 160, 0.4)
    boxes = torch.tensor([[90.0, 90.0, 150.0, 140.0], [95.0, 92.0, 155.0, 141.0], [300.0, 200.0, 340.0, 260.0]])
    found = [in_tile(boxes, tile) for tile in tiles]
    merged, turned = (merge_tiles(tiles[::s], found[::s], size, 64, 0.3, None)["boxes"] for s in (1, -1))
    torch.testing.assert_close(merged[merged[:, 0].argsort()], turned[turned[:, 0].argsort()])
    assert len(merged) == 3


@pytest.fixture
def large(monkeypatch):
    """Make images of a few hundred pixels large ones."""
    monkeypatch.setattr(large_images, "LARGE_PIXELS", 1000)
    monkeypatch.setattr(large_images, "BAND_BYTES", 4000)
    monkeypatch.setattr(images_module, "_warned", set())
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (30, 24, 3), dtype=np.uint8)).resize((240, 300), Image.BICUBIC)


OPTIONS = DetectionOptions(0.015, tile=100, tile_overlap=0.3)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jpg"])
def test_a_large_image_has_the_detections_of_one_that_is_decoded_whole(detector, large, tmp_path, monkeypatch, name):
    large.save(tmp_path / name)
    (item,) = find_inputs([str(tmp_path / name)])
    progress = []
    parts = Detector(*detector, OPTIONS, batch_size=4, on_tiles=lambda *counts: progress.append(counts))
    (in_parts,) = parts.stream([item])
    assert isinstance(in_parts.image, large_images.LargeImage)
    assert progress == [(4, 12), (8, 12), (12, 12)]
    assert not in_parts.image._bands  # freed, since nothing but detections may be wanted
    monkeypatch.setattr(large_images, "LARGE_PIXELS", 10**9)
    (whole,) = Detector(*detector, OPTIONS, batch_size=4).stream([item])
    assert in_parts.detections == whole.detections
    assert len(whole.detections) > 3


def test_a_file_that_breaks_in_the_middle_is_an_error_and_the_others_are_detected_in(detector, large, tmp_path):
    for name in ("a.png", "b.png", "c.tif"):
        large.save(tmp_path / name)
    content = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(content[: len(content) * 3 // 4])
    results = [*Detector(*detector, OPTIONS, batch_size=5).stream(find_inputs([str(tmp_path)]))]
    assert [bool(result.error) for result in results] == [False, True, False]
    assert "b.png: cannot be read as an image (image file is truncated" in results[1].error
    assert results[0].detections
    assert [each["label"] for each in results[0].detections] == [each["label"] for each in results[2].detections]


def test_few_tiles_exist_at_a_time(detector, large, tmp_path, monkeypatch):
    large.save(tmp_path / "a.png")
    alive, most = weakref.WeakValueDictionary(), []
    crop = large_images.LargeImage.crop

    def counted(self, box):
        part = crop(self, box)
        alive[len(most)] = part
        most.append(len(alive))
        return part

    monkeypatch.setattr(large_images.LargeImage, "crop", counted)
    options = DetectionOptions(0.3, tile=40, tile_overlap=0.5)
    (_,) = Detector(*detector, options, batch_size=4).stream(find_inputs([str(tmp_path / "a.png")]))
    assert len(most) > 100
    assert max(most) <= 8


def test_objects_longer_than_the_overlap_are_warned_about_once(detector, large, tmp_path, caplog):
    for name in ("a.png", "b.png"):
        large.save(tmp_path / name)
    options = DetectionOptions(0.01, tile=100, tile_overlap=0.05)
    with caplog.at_level(logging.WARNING):
        results = [*Detector(*detector, options).stream(find_inputs([str(tmp_path)]))]
    sides = [max(x1 - x0, y1 - y0) for each in results[0].detections for x0, y0, x1, y1 in [each["box"]]]
    (text,) = [record.getMessage() for record in caplog.records]
    assert f"a.png: {sum(side > 5 for side in sides)} detections are longer than the 5 pixels that tiles" in text


def test_drawings_of_very_large_images_are_reduced_and_crops_are_not(detector, large, tmp_path, monkeypatch, caplog):
    large.save(tmp_path / "a.png")
    monkeypatch.setattr(results_module, "MAX_DRAWN_PIXELS", large.width * large.height // 4)
    (result,) = Detector(*detector, replace(OPTIONS, top_k=10)).stream(find_inputs([str(tmp_path / "a.png")]))
    directory = ResultsDirectory(tmp_path / "out", ["images", "crops"], {}, named_classes(detector[0].config.id2label))
    with caplog.at_level(logging.WARNING):
        directory.save_files(result)
    assert "an image of 240 x 300 pixels is drawn at 1/2 of its size" in caplog.text
    drawn = Image.open(tmp_path / "out" / "a.png")
    assert drawn.size == (4 * 120, 4 * 150)  # small drawings are enlarged
    for number, each in enumerate(result.detections, start=1):
        x0, y0, x1, y1 = np.clip(each["box"], 0, (240, 300) * 2)
        box = (int(x0), int(y0), int(np.ceil(x1)), int(np.ceil(y1)))
        (path,) = (tmp_path / "out" / "crops").glob(f"*/a-{number}.png")
        assert Image.open(path).tobytes() == large.crop(box).tobytes()


MEASURE = """
import os, subprocess, sys
process = subprocess.Popen([sys.executable, "-m", "hf_dino", "predict", *sys.argv[1:]])
_, status, usage = os.wait4(process.pid, 0)
print(status, usage.ru_maxrss // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.jpg"])
def test_memory_of_a_very_large_image(detector, tmp_path, name):
    """20,000 x 12,000 pixels, which are 960 MB decoded, besides 0.7 GB of torch and transformers."""
    model = tmp_path / "model"
    for part in detector:
        part.save_pretrained(model)
    if name == "a.tif":
        data, tags = encode_tile(Image.effect_noise((256, 256), 80).convert("RGB"), "tiff_lzw")
        tags = {tag: value for tag, value in tags.items() if tag > 257 and tag not in (273, 278, 279)}
        write_tiff(tmp_path / name, (20_000, 12_000), (256, 256), [data] * 79 * 47, tags)
    else:
        image = Image.effect_noise((500, 300), 80).convert("RGB").resize((20_000, 12_000), Image.Resampling.NEAREST)
        image.save(tmp_path / name, **{"compress_level": 1} if name == "a.png" else {})
        del image
    arguments = ["--model", str(model), str(tmp_path / name), "--tile", "2000", "--tile_overlap", "0.1"]
    arguments += ["--threshold", "0.01", "--output", str(tmp_path / "out"), "--save", "jsonl", "images"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], env=environment, capture_output=True, text=True, check=True
    )
    status, peak = map(int, done.stdout.split()[-2:])
    assert status == 0, done.stderr
    assert peak < (3 * 1024 if name == "a.jpg" else 2 * 1024)
    assert "drawn at 1/3 of its size" in done.stderr
