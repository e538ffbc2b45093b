"""Augmented pictures have the sizes of the recipe, and boxes stay on what they were drawn around."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_dino.data import InputError, make_augmentation
from hf_dino.data.augmentation import RandomSizeCrop, ResizeShortestEdge


SIZE = {"shortest_edge": 800, "longest_edge": 1333}


def picture_with_red_box(height, width, box):
    """Black, with a red rectangle at `box` (x, y, width, height)."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    x, y, w, h = box
    pixels[y : y + h, x : x + w, 0] = 255
    return Image.fromarray(pixels)


def augment(augmentation, image, boxes):
    boxes = torch.tensor(boxes, dtype=torch.float64).view(-1, 4)
    return augmentation(image, boxes, torch.arange(len(boxes)))


@pytest.mark.parametrize("size", [SIZE, {"shortest_edge": 160, "longest_edge": 266}, {"height": 96, "width": 128}])
@pytest.mark.parametrize(("height", "width"), [(480, 640), (640, 480), (120, 700), (20, 30)])
def test_dino_sizes_and_boxes(size, height, width):
    augmentation = make_augmentation("dino", size)
    assert augmentation.resizes
    box = [width // 4, height // 4, width // 2, height // 2]
    image = picture_with_red_box(height, width, box)
    sizes = set()
    for seed in range(12):
        torch.manual_seed(seed)
        result = augment(augmentation, image, [box, [0, 0, 1, 1]])
        sizes.add(result.image.size)
        new_width, new_height = result.image.size
        if "height" in size:
            assert (new_height, new_width) == (96, 128)
        else:
            assert max(new_height, new_width) <= size["longest_edge"] + max(
                height / width, width / height
            )  # as in DETR
            assert min(new_height, new_width) <= size["shortest_edge"]
        # the box holds the red pixels: compare with where they are
        red = np.asarray(result.image)[..., 0] > 127
        assert (0 in result.objects) == red.any()
        if not red.any():
            continue
        x, y, w, h = result.boxes[result.objects.tolist().index(0)].tolist()
        rows, columns = np.flatnonzero(red.any(axis=1)), np.flatnonzero(red.any(axis=0))
        found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        scale = max(1, new_width / width, new_height / height)
        assert np.abs(np.array([x, y, x + w, y + h]) - found).max() <= scale
        assert (x >= 0, y >= 0, x + w <= new_width + 1e-6, y + h <= new_height + 1e-6) == (True,) * 4
    assert len(sizes) > 1 or "height" in size


def test_objects_that_are_cut_away_are_dropped():
    augmentation = make_augmentation("dino", SIZE)
    image = Image.new("RGB", (640, 480))
    corners = [[0, 0, 4, 4], [636, 0, 4, 4], [0, 476, 4, 4], [636, 476, 4, 4]]
    kept = []
    for seed in range(20):
        torch.manual_seed(seed)
        result = augment(augmentation, image, corners)
        assert len(result.boxes) == len(result.objects)
        assert (result.boxes[:, 2:] > 0).all()
        kept.append(len(result.boxes))
    assert min(kept) < 4
    assert max(kept) == 4


def test_half_of_the_pictures_are_flipped():
    augmentation = make_augmentation("flip", SIZE)
    assert not augmentation.resizes
    image = picture_with_red_box(10, 40, (2, 3, 5, 4))
    boxes = set()
    for seed in range(20):
        torch.manual_seed(seed)
        boxes.add(tuple(augment(augmentation, image, [[2, 3, 5, 4]]).boxes[0].tolist()))
    assert boxes == {(2, 3, 5, 4), (33, 3, 5, 4)}


def test_pictures_without_objects():
    result = augment(make_augmentation("dino", SIZE), Image.new("RGB", (64, 48)), [])
    assert result.boxes.shape == (0, 4)


def test_none_and_unknown_names():
    assert make_augmentation("none", SIZE) is None
    with pytest.raises(InputError, match="unknown augmentation 'mosaic'; choose one of dino, flip, none"):
        make_augmentation("mosaic", SIZE)


def test_resize_rounds_as_the_original():
    """800 of 1333 at aspect 2: the original shortens the short side to round(1333 / 2) first."""
    resized = ResizeShortestEdge([800], 1333)(Image.new("RGB", (1000, 500)))
    assert resized.size == (1332, 666)


def test_crop_of_a_picture_smaller_than_the_crop_is_the_picture():
    assert RandomSizeCrop(50, 60)(Image.new("RGB", (30, 20))).size == (30, 20)
