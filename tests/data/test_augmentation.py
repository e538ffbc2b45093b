"""Augmented images have the sizes of the recipe, and boxes follow their objects."""

import math
import pickle
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_dino.data import InputError, NoAugmentation, make_augmentation
from hf_dino.data.augmentation import RandomSizeCrop, ResizeShortestEdge, seed_per_image
from hf_dino.image_processing_dino_detr import get_size_with_aspect_ratio


SIZE = {"shortest_edge": 800, "longest_edge": 1333}


def image_with_red_box(height, width, box):
    """Black, with a red rectangle at `box` (x, y, width, height)."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    x, y, w, h = box
    pixels[y : y + h, x : x + w, 0] = 255
    return Image.fromarray(pixels)


def augment(augmentation, image, boxes):
    boxes = torch.tensor(boxes, dtype=torch.float64).view(-1, 4)
    return augmentation(image, boxes, areas=torch.zeros(len(boxes)))


@pytest.mark.parametrize("size", [SIZE, {"shortest_edge": 160, "longest_edge": 266}, {"height": 96, "width": 128}])
@pytest.mark.parametrize(("height", "width"), [(480, 640), (640, 480), (120, 700), (20, 30)])
def test_dino_sizes_and_boxes(size, height, width):
    augmentation = make_augmentation("dino", size)
    assert augmentation.resizes
    box = [width // 4, height // 4, width // 2, height // 2]
    image = image_with_red_box(height, width, box)
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


def test_half_of_the_images_are_flipped():
    augmentation = make_augmentation("flip", SIZE)
    assert not augmentation.resizes
    image = image_with_red_box(10, 40, (2, 3, 5, 4))
    boxes = set()
    for seed in range(20):
        torch.manual_seed(seed)
        boxes.add(tuple(augment(augmentation, image, [[2, 3, 5, 4]]).boxes[0].tolist()))
    assert boxes == {(2, 3, 5, 4), (33, 3, 5, 4)}


def test_images_without_objects():
    result = augment(make_augmentation("dino", SIZE), Image.new("RGB", (64, 48)), [])
    assert result.boxes.shape == (0, 4)


def test_none_leaves_everything_as_it_is():
    augmentation = make_augmentation("none", SIZE)
    assert isinstance(augmentation, NoAugmentation)
    assert (augmentation.resizes, augmentation.evaluation_size) == (False, SIZE)
    image, boxes = Image.new("RGB", (40, 30)), torch.tensor([[-3.0, 4.0, 20.0, 10.0], [40.0, 30.0, 0.0, 0.0]])
    areas, numbers = torch.tensor([7.0, 8.0]), torch.get_rng_state()
    result = augmentation(image, boxes, areas)
    assert (result.image, result.boxes, result.areas) == (image, boxes, areas)
    assert result.objects.tolist() == [0, 1]
    assert augmentation.output_shape(30, 40, boxes) == (30, 40)
    assert torch.equal(torch.get_rng_state(), numbers), "no random number is used"


def test_areas_are_those_of_the_boxes_once_there_is_an_augmentation():
    result = augment(make_augmentation("flip", SIZE), Image.new("RGB", (40, 30)), [[4, 6, 9, 5], [0, 0, 2, 3]])
    assert result.areas.tolist() == [45, 6]


def test_unknown_names():
    presets = "dino, dino-large, photometric, flip, none"
    with pytest.raises(InputError, match=f"unknown augmentation 'mosaic'. Choose from {presets}, or name a function"):
        make_augmentation("mosaic", SIZE)


def test_resize_rounds_as_the_official_implementation():
    """800 of 1333 at aspect ratio 2: the official implementation reduces the short side to round(1333 / 2) first."""
    resized = ResizeShortestEdge([800], 1333)(Image.new("RGB", (1000, 500)))
    assert resized.size == (1332, 666)


def test_crop_of_an_image_smaller_than_the_crop_is_the_image():
    assert RandomSizeCrop(50, 60)(Image.new("RGB", (30, 20))).size == (30, 20)


def drawn_sizes(augmentation, image, draws=40):
    """(short, long) side of what comes out, drawn many times."""
    sizes = set()
    for seed in range(draws):
        torch.manual_seed(seed)
        sizes.add(tuple(sorted(augment(augmentation, image, []).image.size)))
    return sizes


def test_large_sizes_are_half_as_large_again():
    small, large = ({"shortest_edge": 80, "longest_edge": 133}, {"shortest_edge": 120, "longest_edge": 200})
    assert make_augmentation("dino-large", small).evaluation_size == large
    assert make_augmentation("dino", small).evaluation_size == small
    assert make_augmentation("dino-large", {"height": 40, "width": 60}).evaluation_size == {"height": 60, "width": 90}
    image = Image.new("RGB", (64, 48))
    sizes = drawn_sizes(make_augmentation("dino-large", small), image)
    assert sizes == drawn_sizes(make_augmentation("dino", large), image)
    assert max(short for short, _ in sizes) == 120


def test_published_large_sizes():
    """Short side 720 to 1200 in steps of 48, long side at most 2000, for a model of the official size."""
    _, choice = make_augmentation("dino-large", SIZE).transform.transforms
    resize, crop = choice.transforms
    assert resize.shortest_edges == list(range(720, 1201, 48))
    assert resize.longest_edge == 2000
    before, cut, _ = crop.transforms
    assert (before.shortest_edges, cut.shortest, cut.longest) == ([600, 750, 900], 576, 900)


def test_large_augmentation_of_a_large_model_is_a_warning(caplog):
    large = make_augmentation("dino-large", SIZE).evaluation_size
    assert not caplog.messages
    make_augmentation("dino-large", large)
    assert "1800/3000 pixels, 1.5 times the model's 1200/2000. `dino` would keep" in caplog.text


def test_photometric_changes_colors_and_is_otherwise_the_recipe():
    size = {"height": 24, "width": 32}
    image = Image.new("RGB", (32, 24), (90, 120, 60))
    colors = set()
    for seed in range(20):
        torch.manual_seed(seed)
        result = augment(make_augmentation("photometric", size), image, [[0, 0, 32, 24]])
        assert result.image.size == (32, 24)
        assert result.boxes.tolist() == [[0, 0, 32, 24]]
        colors.add(result.image.getpixel((16, 12)))
    assert len(colors) > 10
    assert make_augmentation("photometric", size).resizes


@pytest.mark.parametrize("name", ["dino", "dino-large", "photometric", "flip"])
def test_output_shapes_are_predicted_without_pixels(name):
    augmentation = make_augmentation(name, {"shortest_edge": 40, "longest_edge": 67})
    boxes = torch.tensor([[3.0, 4.0, 20.0, 10.0]])
    for image_id, (height, width) in enumerate([(48, 64), (64, 48), (30, 100), (50, 50)] * 4):
        with seed_per_image(0, 1, image_id):
            predicted = augmentation.output_shape(height, width, boxes)
        with seed_per_image(0, 1, image_id):
            image = augment(augmentation, Image.new("RGB", (width, height)), boxes.tolist()).image
        assert predicted == (image.height, image.width)


def test_each_image_has_its_own_random_state():
    def draw(*key):
        with seed_per_image(*key):
            return torch.rand(()).item()

    torch.manual_seed(0)
    expected = torch.rand(2).tolist()
    torch.manual_seed(0)
    first = torch.rand(1).tolist()
    numbers = {draw(0, 0, 1), draw(0, 0, 2), draw(0, 1, 1), draw(1, 0, 1)}
    assert len(numbers) == 4
    assert draw(0, 0, 1) in numbers
    assert [*first, *torch.rand(1).tolist()] == expected, "the global random state is not advanced"


OWN_SIZE = {"shortest_edge": 40, "longest_edge": 60}
IMPORTS = """
    import random
    import torch
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional
    from hf_dino.data import Augmentation
"""


def own_augmentation(folder, body, function="make"):
    """Write a user's file with the functions of `body`, and return its augmentation."""
    file = folder / "own.py"
    file.write_text(textwrap.dedent(IMPORTS) + textwrap.dedent(body))
    return make_augmentation(f"{file}:{function}", OWN_SIZE)


def test_own_function_of_a_file(tmp_path):
    body = """
    def make(size):
        assert size == {"shortest_edge": 40, "longest_edge": 60}
        return v2.Compose([v2.RandomRotation((90, 90), expand=True), v2.ConvertBoundingBoxFormat("XYXY")])
    """
    augmentation = own_augmentation(tmp_path, body)
    assert not augmentation.resizes
    result = augment(augmentation, Image.new("RGB", (40, 30)), [[4, 6, 10, 5]])
    assert result.image.size == (30, 40)
    assert result.boxes.tolist() == [[6, 26, 5, 10]], "x, y, width, height again"
    assert augmentation.output_shape(30, 40, torch.zeros(0, 4)) == (30, 40), "assumed to keep the shape"
    assert augmentation.evaluation_size == OWN_SIZE
    assert augmentation.min_output_shape(30, 60) == (30, 60), "resized, whatever is cut away"


def test_own_function_of_a_module(tmp_path, monkeypatch):
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "augment.py").write_text(
        "from torchvision.transforms import v2\ndef make(size): return v2.RandomHorizontalFlip(1.0)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    result = augment(
        make_augmentation("my_package.augment:make", OWN_SIZE), Image.new("RGB", (40, 30)), [[4, 6, 9, 5]]
    )
    assert result.boxes.tolist() == [[27, 6, 9, 5]]


def test_own_function_may_remove_boxes_and_resize(tmp_path):
    body = """
    def make(size):
        crop = v2.CenterCrop(20)
        return Augmentation(v2.Compose([crop, v2.SanitizeBoundingBoxes(min_size=3)]), resizes=True)
    """
    augmentation = own_augmentation(tmp_path, body)
    assert augmentation.resizes
    result = augment(augmentation, Image.new("RGB", (60, 60)), [[0, 0, 9, 9], [21, 21, 5, 5], [38, 21, 9, 9]])
    assert result.objects.tolist() == [1]
    assert result.boxes.tolist() == [[1, 1, 5, 5]]


def test_own_function_may_set_the_evaluation_size(tmp_path):
    body = """
    def make(size):
        large = {side: 2 * length for side, length in size.items()}
        return Augmentation(v2.RandomHorizontalFlip(), resizes=False, evaluation_size=large)
    """
    augmentation = own_augmentation(tmp_path, body)
    assert augmentation.evaluation_size == {"shortest_edge": 80, "longest_edge": 120}
    assert augmentation.min_output_shape(30, 30) == (80, 80)


def test_own_augmentation_can_be_pickled(tmp_path):
    body = """
    class Own(v2.Transform):
        def transform(self, inpt, params):
            return functional.horizontal_flip(inpt)

    def make(size):
        return Own()
    """
    again = pickle.loads(pickle.dumps(own_augmentation(tmp_path, body)))
    assert augment(again, Image.new("RGB", (40, 30)), [[4, 6, 9, 5]]).boxes.tolist() == [[27, 6, 9, 5]]


CLASS = """
    from itertools import count

    calls = count()

    class Own(Augmentation):
        def __init__(self):
            super().__init__(v2.Identity(), resizes=True)

        def __call__(self, image, boxes, areas):
            return image.crop((0, 0, 20 + {number}, 10)), boxes[:1], areas[:1], torch.arange(len(boxes))[:1]

        def output_shape(self, height, width, boxes):
            return 10, 20

        def min_output_shape(self, height, width):
            return 10, 20

    def make(size):
        return Own()
"""


def test_own_class_may_replace_methods(tmp_path):
    augmentation = own_augmentation(tmp_path, CLASS.format(number="0"))
    for each in (augmentation, pickle.loads(pickle.dumps(augmentation))):
        result = augment(each, Image.new("RGB", (40, 30)), [[1, 2, 3, 4], [5, 6, 7, 8]])
        assert (result.image.size, result.boxes.tolist(), result.objects.tolist()) == ((20, 10), [[1, 2, 3, 4]], [0])
        assert each.output_shape(30, 40, torch.zeros(0, 4)) == each.min_output_shape(30, 40) == (10, 20)
        assert (each.resizes, each.evaluation_size) == (True, OWN_SIZE)
    with pytest.raises(InputError, match="another image or other boxes for the same seed"):
        own_augmentation(tmp_path, CLASS.format(number="next(calls)"))


def test_own_class_without_output_shape_keeps_the_shape(tmp_path):
    body = (
        CLASS.format(number="0")
        .replace("def output_shape", "def other")
        .replace("def min_output_shape", "def another")
    )
    augmentation = own_augmentation(tmp_path, body)
    assert augmentation.output_shape(30, 40, torch.zeros(0, 4)) == (30, 40)
    assert augmentation.min_output_shape(30, 60) == (30, 60)


INVALID = {
    "5": "must return a torchvision v2.Transform or an Augmentation, got 5",
    "v2.ToImage()": r"must return a PIL image, got Image\. Leave tensors and normalization",
    "v2.Lambda(lambda boxes: boxes.as_subclass(torch.Tensor), BoundingBoxes)": "boxes as tv_tensors.BoundingBoxes",
    "v2.Lambda(lambda image: image.resize((9, 7)), Image)": r"of 7 x 9 .* for 40 x 60\. Resize and crop both",
    "v2.SanitizeBoundingBoxes(min_size=15, labels_getter=None)": "returned 1 boxes for 2 objects",
    "v2.Lambda(lambda image: image.rotate(random.random() * 90), Image)": "image or other boxes for the same seed",
}


@pytest.mark.parametrize("transform", INVALID)
def test_own_function_that_cannot_be_used(tmp_path, transform):
    body = f"""
    from PIL.Image import Image
    from torchvision.tv_tensors import BoundingBoxes
    def make(size):
        return {transform}
    """
    with pytest.raises(InputError, match=INVALID[transform]):
        own_augmentation(tmp_path, body)


def test_own_function_that_is_not_found(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.py: Python file not found"):
        make_augmentation("nowhere.py:make", OWN_SIZE)
    with pytest.raises(InputError, match=r"own\.py:make: function not found\. .*own\.py has .*build"):
        own_augmentation(tmp_path, "def build(size): pass")
    with pytest.raises(InputError, match=r"no_such_package: cannot be imported .*PYTHONPATH, or name the file"):
        make_augmentation("no_such_package:make", OWN_SIZE)
    with pytest.raises(InputError, match="cannot be imported"):
        make_augmentation(":make", OWN_SIZE)


@pytest.mark.parametrize("name", ["dino", "dino-large", "flip"])
@pytest.mark.parametrize("shape", [(60, 80), (30, 200), (70, 70)])
def test_no_image_is_smaller_than_min_output_shape(name, shape):
    size = {"shortest_edge": 80, "longest_edge": 133}
    augmentation = make_augmentation(name, size)
    least = augmentation.min_output_shape(*shape)
    if name == "flip":
        assert least == get_size_with_aspect_ratio(*shape, *size.values())
        return
    torch.manual_seed(0)
    areas = {math.prod(augmentation.output_shape(*shape, torch.zeros(0, 4))) for _ in range(300)}
    assert math.prod(least) <= min(areas) <= 1.3 * math.prod(least)


def test_the_example_turns_images_upside_down_half_of_the_time():
    file = Path(__file__).parents[2] / "examples" / "augmentations.py"
    augmentation = make_augmentation(f"{file}:microscope", {"height": 96, "width": 128})
    image = image_with_red_box(96, 128, [30, 4, 60, 20])
    upside_down = []
    for seed in range(40):
        with seed_per_image(seed, 0, 0):
            made = augment(augmentation, image, [[30, 4, 60, 20]])
        assert made.image.size == (128, 96)
        for x, y, width, height in made.boxes.round().int().tolist():
            inside = np.asarray(made.image)[y : y + height, x : x + width].mean()
            assert inside > np.asarray(made.image).mean(), "the box is where the rectangle is"
            upside_down.append(y + height / 2 > 48)
    assert 5 < sum(upside_down) < 35
