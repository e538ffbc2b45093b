"""Pictures for people: what is drawn where, at any size and in any mode."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from hf_dino.visualization import draw_detections, plot_training_curves, side_by_side


pytest.importorskip("supervision")
pytest.importorskip("matplotlib")


def changed(picture: Image.Image, drawn: Image.Image) -> np.ndarray:
    """Which pixels differ, `(height, width)`."""
    return (np.asarray(picture.convert("RGB"), int) != np.asarray(drawn, int)).any(axis=-1)


def test_box_is_drawn_at_its_corners():
    picture = Image.new("RGB", (640, 480), "white")
    drawn = draw_detections(picture, torch.tensor([[100.0, 200.0, 300.0, 400.0]]), ["cat"], torch.tensor([0.5]))
    mask = changed(picture, drawn)
    assert mask[300, 100]
    assert mask[300, 300]
    assert mask[200, 290]
    assert mask[400, 200]
    assert not mask[300, 200]
    assert not mask[450:].any()
    assert not changed(picture, Image.new("RGB", (640, 480), "white")).any()  # the picture itself is as it was


@pytest.mark.parametrize("size", [(40, 30), (160, 160), (640, 480), (3000, 200)])
def test_name_takes_a_legible_share_of_any_picture(size):
    picture = Image.new("RGB", size, "white")
    drawn = draw_detections(picture, [[size[0] // 4, size[1] // 2, size[0] // 2, size[1] - 2]], ["zebra"], [0.9])
    assert max(drawn.size) >= 480
    assert drawn.width * size[1] == drawn.height * size[0]
    assert changed(picture.resize(drawn.size), drawn).any(axis=1).sum() >= 12


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "1"])
def test_every_mode_can_be_drawn_into(mode):
    drawn = draw_detections(Image.new("RGB", (500, 400), "white").convert(mode), [[10, 50, 100, 200]], ["cat"])
    assert drawn.mode == "RGB"


@pytest.mark.parametrize("boxes", [[], torch.zeros(0, 4), np.zeros((0, 4))])
def test_nothing_found_is_drawn_as_it_is(boxes):
    picture = Image.new("RGB", (500, 400), "red")
    assert not changed(picture, draw_detections(picture, boxes, [], [])).any()


def test_name_has_one_colour_in_all_pictures():
    picture = Image.new("RGB", (500, 400), "white")
    first = draw_detections(picture, [[100, 200, 200, 300]], ["cat"])
    second = draw_detections(picture, [[300, 100, 400, 150], [100, 200, 200, 300]], ["dog", "cat"])
    assert first.getpixel((100, 280)) == second.getpixel((100, 280)) != second.getpixel((300, 140))


def test_names_may_be_of_other_scripts():
    picture = Image.new("RGB", (500, 400), "white")
    one, other = (draw_detections(picture, [[100, 200, 300, 300]], [name]) for name in ("кот", "пёс"))
    assert changed(one, other).any()


@pytest.mark.parametrize(("names", "scores"), [(["cat", "dog"], None), (["cat"], [0.1, 0.2])])
def test_unequal_numbers_are_an_error(names, scores):
    with pytest.raises(ValueError, match=r"equally many, got 1 boxes"):
        draw_detections(Image.new("RGB", (64, 64)), [[0, 0, 9, 9]], names, scores)


def test_absent_supervision_is_a_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-dino\[train\]'"):
        draw_detections(Image.new("RGB", (64, 64)), [[0, 0, 9, 9]], ["cat"])


def test_side_by_side_shows_both_pictures_at_one_height():
    left, right = Image.new("RGB", (300, 200), "red"), Image.new("L", (50, 100), 0)
    sheet = side_by_side(left, right, ("truth", "predicted"))
    pixels = np.asarray(sheet)
    assert (pixels == [255, 0, 0]).all(axis=-1).sum() == 300 * 200
    assert ((pixels == 0).all(axis=-1).any(axis=1)).sum() >= 200
    assert sheet.height < 300


def test_long_caption_is_not_cut():
    picture = Image.new("RGB", (60, 60), "red")
    assert side_by_side(picture, picture, ("a caption much wider than its picture", "b")).width > 300


HISTORY = [
    {"step": 10, "epoch": 1, "loss": 20.0},
    {"step": 10, "epoch": 1, "ap": 0.2, "ap50": 0.4},
    {"step": 20, "epoch": 2, "loss": 10.0, "ap": None},
]


@pytest.mark.parametrize("history", [HISTORY, [], [{"step": 1, "loss": 1.0}]])
def test_curves_are_drawn_and_nothing_is_left_beside_them(tmp_path, history):
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
