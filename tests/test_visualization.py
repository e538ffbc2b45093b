"""Drawing works at any image size and in any mode, and files are written atomically."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from hf_dino.data import InputError
from hf_dino.visualization import (
    check_drawing_dependencies,
    draw_detections,
    hstack_images,
    plot_training_curves,
    save_image,
)


pytest.importorskip("supervision")
pytest.importorskip("matplotlib")


def changed(image: Image.Image, drawn: Image.Image) -> np.ndarray:
    """Return a mask of the pixels that differ, `(height, width)`."""
    return (np.asarray(image.convert("RGB"), int) != np.asarray(drawn, int)).any(axis=-1)


def test_box_is_drawn_at_its_corners():
    image = Image.new("RGB", (640, 480), "white")
    drawn = draw_detections(image, torch.tensor([[100.0, 200.0, 300.0, 400.0]]), ["cat"], torch.tensor([0.5]))
    mask = changed(image, drawn)
    assert mask[300, 100]
    assert mask[300, 300]
    assert mask[200, 290]
    assert mask[400, 200]
    assert not mask[300, 200]
    assert not mask[450:].any()
    assert not changed(image, Image.new("RGB", (640, 480), "white")).any()  # the image itself is unchanged


@pytest.mark.parametrize("size", [(40, 30), (160, 160), (640, 480), (3000, 200)])
def test_labels_are_legible_at_any_image_size(size):
    image = Image.new("RGB", size, "white")
    drawn = draw_detections(image, [[size[0] // 4, size[1] // 2, size[0] // 2, size[1] - 2]], ["zebra"], [0.9])
    assert max(drawn.size) >= 480
    assert drawn.width * size[1] == drawn.height * size[0]
    assert changed(image.resize(drawn.size), drawn).any(axis=1).sum() >= 12


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "1"])
def test_images_of_every_mode(mode):
    drawn = draw_detections(Image.new("RGB", (500, 400), "white").convert(mode), [[10, 50, 100, 200]], ["cat"])
    assert drawn.mode == "RGB"


@pytest.mark.parametrize("boxes", [[], torch.zeros(0, 4), np.zeros((0, 4))])
def test_without_boxes_the_image_is_unchanged(boxes):
    image = Image.new("RGB", (500, 400), "red")
    assert not changed(image, draw_detections(image, boxes, [], [])).any()


def test_name_has_one_color_in_all_images():
    image = Image.new("RGB", (500, 400), "white")
    first = draw_detections(image, [[100, 200, 200, 300]], ["cat"])
    second = draw_detections(image, [[300, 100, 400, 150], [100, 200, 200, 300]], ["dog", "cat"])
    assert first.getpixel((100, 280)) == second.getpixel((100, 280)) != second.getpixel((300, 140))


def test_names_in_other_scripts():
    image = Image.new("RGB", (500, 400), "white")
    one, other = (draw_detections(image, [[100, 200, 300, 300]], [name]) for name in ("кот", "пёс"))
    assert changed(one, other).any()


@pytest.mark.parametrize(("names", "scores"), [(["cat", "dog"], None), (["cat"], [0.1, 0.2])])
def test_different_lengths_are_an_error(names, scores):
    with pytest.raises(ValueError, match=r"must have the same length, got 1 boxes"):
        draw_detections(Image.new("RGB", (64, 64)), [[0, 0, 9, 9]], names, scores)


@pytest.mark.parametrize("module", ["supervision", "matplotlib"])
def test_missing_packages_are_a_clear_error(monkeypatch, tmp_path, module):
    monkeypatch.setitem(sys.modules, module, None)
    message = rf"needs {module}: pip install 'hf-dino\[train\]'"
    with pytest.raises(ImportError, match=message):
        check_drawing_dependencies()
    with pytest.raises(ImportError, match=message):
        draw_detections(Image.new("RGB", (64, 64)), [[0, 0, 9, 9]], ["cat"])
    if module == "matplotlib":
        with pytest.raises(ImportError, match=message):
            plot_training_curves([], tmp_path / "curves.png")


@pytest.mark.parametrize("suffix", [".fits", ".cur", ".mpg", ".psd", ".xbm", ".xyz", ""])
def test_image_formats_that_cannot_be_written_are_an_error(tmp_path, suffix):
    with pytest.raises(InputError, match=f"images of kind '{suffix}' cannot be written; use .png or .jpg"):
        check_drawing_dependencies(tmp_path / "a.png", tmp_path / f"a{suffix}")


def test_images_are_written_atomically(tmp_path):
    for name in ("a.png", "a.JPG"):
        check_drawing_dependencies(tmp_path / name)
        save_image(Image.new("RGB", (20, 30)), tmp_path / name)
        assert Image.open(tmp_path / name).size == (20, 30)
    with pytest.raises(OSError, match="cannot write mode"):
        save_image(Image.new("CMYK", (2, 2)), tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == (20, 30)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.JPG", "a.png"]


def test_side_by_side_shows_both_images_at_one_height():
    left, right = Image.new("RGB", (300, 200), "red"), Image.new("L", (50, 100), 0)
    canvas = hstack_images(left, right, ("truth", "predicted"))
    pixels = np.asarray(canvas)
    assert (pixels == [255, 0, 0]).all(axis=-1).sum() == 300 * 200
    assert ((pixels == 0).all(axis=-1).any(axis=1)).sum() >= 200
    assert canvas.height < 300


def test_long_captions_are_not_truncated():
    image = Image.new("RGB", (60, 60), "red")
    assert hstack_images(image, image, ("a caption much wider than its image", "b")).width > 300


HISTORY = [
    {"step": 10, "epoch": 1, "loss": 20.0},
    {"step": 10, "epoch": 1, "ap": 0.2, "ap50": 0.4},
    {"step": 20, "epoch": 2, "loss": 10.0, "ap": None},
]


@pytest.mark.parametrize("history", [HISTORY, [], [{"step": 1, "loss": 1.0}]])
def test_curves_are_plotted_and_no_temporary_file_is_left(tmp_path, history):
    path = tmp_path / "new" / "curves.png"
    plot_training_curves(history, path)
    assert Image.open(path).width > 500
    assert [entry.name for entry in path.parent.iterdir()] == ["curves.png"]


def test_failed_plot_keeps_the_old_file(tmp_path):
    path = tmp_path / "curves.png"
    path.write_text("old")
    with pytest.raises(KeyError):
        plot_training_curves([{"loss": 1.0}], path)
    assert path.read_text() == "old"
    with pytest.raises(ValueError, match="nothing"):
        plot_training_curves(HISTORY, tmp_path / "curves.nothing")
    assert [entry.name for entry in tmp_path.iterdir()] == ["curves.png"]
