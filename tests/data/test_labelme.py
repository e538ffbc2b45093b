"""LabelMe: a file for each image, whose rectangles and polygons become boxes."""

import json

import pytest

from helpers.data_formats import coco_text, draw, voc_xml, write
from hf_dino.data import InputError, ReadOptions, read_data
from hf_dino.data.readers.files import RENAMED_WARNING


NO_FILE = "images have no annotation file: treated as images without objects"
DROPPED = "boxes are not four finite numbers: dropped"


def shape(points, *, label="cell", kind="rectangle", group=None, **more):
    return {"label": label, "points": points, "group_id": group, "shape_type": kind, "flags": {}} | more


def labelme(*shapes, image="1.png", **more):
    content = {"version": "5.4.1", "flags": {}, "shapes": list(shapes), "imagePath": image, "imageData": None}
    return json.dumps(content | {"imageHeight": 40, "imageWidth": 60} | more, indent=2)


BOX = shape([[1, 2], [31, 22]])


def lay_out(folder, files):
    for seed, (name, text) in enumerate(files.items()):
        draw(folder / name, seed=seed) if text is None else write(folder / name, text)
    return folder


SHAPES = {
    # the shapes, the boxes, and what is said
    "rectangle": ([BOX], [[1, 2, 30, 20]], []),
    "rectangle from the lower right": ([shape([[31.5, 22], [1, 2]])], [[1, 2, 30.5, 20]], []),
    "rectangle by four corners": ([shape([[1, 2], [31, 2], [31, 22], [1, 22]])], [[1, 2, 30, 20]], []),
    "polygon": (
        [shape([[1, 2], [31, 12], [11, 22]], kind="polygon")],
        [[1, 2, 30, 20]],
        ["labels are polygons: their bounding boxes are used"],
    ),
    "group": (
        [shape([[1, 2], [11, 22]], group=3), shape([[21, 2], [31, 12]], group=3), shape([[5, 5], [9, 9]], group=4)],
        [[1, 2, 30, 20], [5, 5, 4, 4]],
        ["shapes belong to one group: joined to one object"],
    ),
    "others": (
        [
            BOX,
            shape([[1, 2]], kind="point"),
            shape([[9, 9], [12, 12]], kind="circle"),
            shape([[1, 2]], kind="rotation"),
        ],
        [[1, 2, 30, 20]],
        ["shapes are neither rectangles nor polygons: left out"] * 3,
    ),
    "no label": (
        [BOX, shape([[1, 2], [3, 4]], label=" ")],
        [[1, 2, 30, 20]],
        ["objects have no class name: left out"],
    ),
    "null": ([BOX, shape([[1, 2], [3, 4]], label=None)], [[1, 2, 30, 20]], ["objects have no class name: left out"]),
    "one point": ([BOX, shape([[1, 2]])], [[1, 2, 30, 20]], [DROPPED]),
    "text": ([BOX, shape([[1, "x"], [3, 4]])], [[1, 2, 30, 20]], [DROPPED]),
    "truth values": ([BOX, shape([[1, True], [3, 4]])], [[1, 2, 30, 20]], [DROPPED]),
    "no points": ([BOX, shape(None)], [[1, 2, 30, 20]], [DROPPED]),
    "not finite": ([BOX, shape([[1, float("nan")], [3, 4]])], [[1, 2, 30, 20]], [DROPPED]),
    "blanks around a label": ([shape([[1, 2], [31, 22]], label=" cell ")], [[1, 2, 30, 20]], []),
}


@pytest.mark.parametrize("name", SHAPES)
def test_whatever_is_changed_or_left_out_is_said(tmp_path, name):
    shapes, boxes, said = SHAPES[name]
    data = read_data(lay_out(tmp_path, {"1.png": None, "1.json": labelme(*shapes)}))["train"]
    assert data.images[0].boxes.tolist() == boxes
    assert data.categories == {1: "cell"}
    assert [warning for warning, paths in data.warnings.items() for _ in paths] == said
    assert data.format == "LabelMe"


def test_classes_have_one_number_in_all_splits(tmp_path):
    files = {
        "train/1.png": None,
        "train/1.json": labelme(shape([[1, 2], [31, 22]], label="zebra")),
        "val/1.png": None,
        "val/1.json": labelme(BOX),
        "val/2.png": None,
    }
    data = read_data(lay_out(tmp_path, files))
    assert data["train"].categories == data["validation"].categories == {1: "cell", 2: "zebra"}
    assert [each.images[0].category_ids.tolist() for each in data.values()] == [[2], [1]]
    assert data["validation"].warnings == {NO_FILE: [str(tmp_path / "val" / "2.png")]}


@pytest.mark.parametrize(("path", "said"), [("..\\images\\1.png", []), ("1.png", [RENAMED_WARNING])])
def test_images_in_another_directory(tmp_path, path, said):
    data = read_data(lay_out(tmp_path, {"images/1.png": None, "json/1.json": labelme(BOX, image=path)}))["train"]
    assert [len(image.boxes) for image in data.images] == [1]
    assert [warning for warning in data.warnings if warning != RENAMED_WARNING] == []


@pytest.mark.parametrize("stems", [("train_1", "train_2"), ("test1", "test2", "a"), ("1",)])
def test_names_of_files_are_not_taken_for_splits(tmp_path, stems):
    files = {
        f"{stem}.{end}": text
        for stem in stems
        for end, text in (("png", None), ("json", labelme(BOX, image=f"{stem}.png")))
    }
    assert {split: len(data.images) for split, data in read_data(lay_out(tmp_path, files)).items()} == {
        "train": len(stems)
    }


def test_what_was_converted_is_read_instead(tmp_path):
    """LabelMe's files may still be next to the images."""
    lay_out(tmp_path / "a", {"train.json": coco_text("1.png", "2.png"), "train/1.png": None, "train/2.png": None})
    lay_out(tmp_path / "a", {"train/1.json": labelme(BOX)})
    assert read_data(tmp_path / "a")["train"].format == "COCO"
    lay_out(tmp_path / "b", {"1.png": None, "1.json": labelme(BOX), "1.xml": voc_xml((40, 60), [("a", [1, 2, 3, 4])])})
    lay_out(tmp_path / "b", {"2.png": None, "2.json": labelme(BOX, image="2.png")})
    assert read_data(tmp_path / "b")["train"].format == "Pascal VOC"


BROKEN = {
    "truncated": (labelme(BOX)[:-20], "cannot be read as a LabelMe file"),
    "shapes that are none": ('{"shapes": [1], "imagePath": "1.png"}', "cannot be read as a LabelMe file"),
    "no shapes": ('{"imagePath": "1.png"}', "cannot be read as a LabelMe file"),
    "nothing to train on": (labelme(), "no LabelMe file contains a rectangle or polygon with a label"),
    "a missing image": (labelme(BOX, image="2.png"), r"1 image not found in .*: 2\.png"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_one_clear_error(tmp_path, name):
    text, message = BROKEN[name]
    with pytest.raises(InputError, match=message) as caught:
        read_data(lay_out(tmp_path, {"1.png": None, "1.json": text}))
    assert str(caught.value).count("\n") <= 2


def test_two_files_for_one_image(tmp_path):
    errors = []
    files = {"1.png": None, "1.json": labelme(BOX), "2.json": labelme(BOX)}
    data = read_data(lay_out(tmp_path, files), options=ReadOptions(on_error=errors.append))["train"]
    assert (len(data.images), len(errors)) == (1, 1)
