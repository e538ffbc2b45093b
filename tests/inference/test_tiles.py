"""Tiles cover an image, and of an object at a seam only the whole box is kept."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.models import tiny_model
from hf_dino import DinoDetrImageProcessor
from hf_dino.inference import DetectionOptions, Detector, ImageInput, detect_objects
from hf_dino.inference.tiles import merge_tiles, tile_boxes


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
    merged = merge_tiles(tiles, [in_tile(boxes, tile) for tile in tiles], size, 0.3, None)
    order = merged["boxes"].sum(dim=1).argsort()
    torch.testing.assert_close(merged["boxes"][order], boxes[boxes.sum(dim=1).argsort()], rtol=0, atol=1e-3)
    assert (merged["scores"] == 0.9).all()


def test_a_box_at_the_border_of_the_image_is_not_cut():
    boxes = torch.tensor([[0.0, 0.0, 40.0, 50.0], [60.0, 60.0, 100.0, 90.0]])
    found = {"scores": torch.tensor([0.9, 0.8]), "labels": torch.tensor([0, 0]), "boxes": boxes}
    alone = merge_tiles([(0, 0, 100, 100)], [found], (100, 100), 0.0, None)
    assert alone["scores"].tolist() == pytest.approx([0.9, 0.8])
    seamed = merge_tiles([(0, 0, 100, 100)], [found], (200, 100), 0.0, None)  # the second box ends at a seam
    assert seamed["scores"].tolist() == pytest.approx([0.9, 0.08])


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
        expected = merge_tiles(tiles, found, image.size, 0.002, None)
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
