"""YOLO as tools write it: paths of other machines, lines with other values, layouts without a YAML file."""

import logging

import numpy as np
import pytest
import yaml

from helpers.data_formats import draw, write, yolo_lines
from hf_dino.data import InputError, ReadOptions, check_data, read_data
from hf_dino.data.readers import UNUSED_WARNING
from hf_dino.data.readers.files import RENAMED_WARNING


LINE = yolo_lines((40, 60), [(0, [1, 2, 30, 20])])
OTHER = yolo_lines((40, 60), [(1, [5, 5, 10, 10])])
NO_FILE = "images have no annotation file: treated as images without objects"


def lay_out(folder, files):
    """Write the text files, and an image for each name without text."""
    for seed, (name, text) in enumerate(files.items()):
        draw(folder / name, seed=seed) if text is None else write(folder / name, text)
    return folder


def read_lines_as(folder, text, *, names="[a, b]", more="", **options):
    """Read one image with a label file; return it and the number of each warning."""
    files = {"data.yaml": f"names: {names}\ntrain: images\n{more}", "images/1.png": None, "labels/1.txt": text}
    data = read_data(lay_out(folder, files), options=ReadOptions(**options))["train"]
    return data.images[0], {warning: len(paths) for warning, paths in data.warnings.items()}


def summary(data):
    """The names of the images of each split, and the boxes."""
    return {
        split: [(image.path.relative_to(each.source).as_posix(), len(image.boxes)) for image in each.images]
        for split, each in data.items()
    }


PATHS = {
    "relative to the file": ("images/train", "images/val"),
    "trailing slashes, as FiftyOne": ("./images/train/", "./images/val/"),
    "one level up, as Roboflow": ("../images/train", "../images/val"),
    "backslashes": ("images\\train", "..\\images\\val"),
    "another machine": ("/home/me/cells/images/train", "/home/me/cells/images/val"),
    "another machine with Windows": ("C:\\data\\images\\train", "D:\\data\\images\\val"),
    "in a list": (["images/train"], ["images/val"]),
}


@pytest.mark.parametrize("root", [None, "/another/machine", ".", "../gone"])
@pytest.mark.parametrize("name", PATHS)
def test_paths_in_yaml(tmp_path, name, root):
    train, val = PATHS[name]
    content = {"names": ["a", "b"], "train": train, "val": val} | ({"path": root} if root else {})
    files = {
        "dataset.yaml": yaml.safe_dump(content),
        "images/train/1.png": None,
        "images/val/2.png": None,
        "labels/train/1.txt": LINE,
        "labels/val/2.txt": LINE + OTHER,
    }
    data = read_data(lay_out(tmp_path / "cells", files))
    assert summary(data) == {"train": [("images/train/1.png", 1)], "validation": [("images/val/2.png", 2)]}


def test_directories_of_another_machine_are_logged_and_never_one_for_two_splits(tmp_path, caplog):
    text = "names: [a]\ntrain: /there/train/images\nval: /there/val/images\n"
    lay_out(tmp_path, {"data.yaml": text, "train/images/1.png": None, "train/labels/1.txt": LINE})
    with caplog.at_level(logging.WARNING, logger="hf_dino"):
        assert list(read_data(tmp_path)) == ["train"]
    assert f"/there/train/images not found, using {tmp_path / 'train' / 'images'}" in caplog.text
    assert "ignoring the validation split" in caplog.text
    (tmp_path / "train" / "images").rename(tmp_path / "images")
    with pytest.raises(InputError, match=r"/there/val/images not found; train has the only directory like it"):
        read_data(tmp_path)


LISTS = {
    "relative to the dataset": ("train.txt", "images/1.png\nimages/2.png\n"),
    "relative to the list": ("lists/train.txt", "../images/1.png\n../images/2.png\n"),
    "backslashes": ("train.txt", "images\\1.png\r\n\r\n.\\images\\2.png\r\n"),
    "CVAT's prefix": ("train.txt", "data/images/1.png\ndata/images/2.png\n"),
    "another machine": ("train.txt", "/home/me/cells/images/1.png\nC:\\cells\\images\\2.png\n"),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_images(tmp_path, name):
    file, lines = LISTS[name]
    files = {
        "data.yaml": f"names: [a]\ntrain: {file}\n",
        file: lines,
        "images/1.png": None,
        "images/2.png": None,
        "images/3.png": None,
        "labels/1.txt": LINE,
        "labels/2.txt": LINE,
    }
    data = read_data(lay_out(tmp_path, files))
    assert {image.path.resolve() for image in data["train"].images} == {
        tmp_path / "images" / "1.png",
        tmp_path / "images" / "2.png",
    }
    assert [len(image.boxes) for image in data["train"].images] == [1, 1]
    assert data["train"].warnings == {UNUSED_WARNING: [str(tmp_path / "images" / "3.png")]}


def test_images_found_by_the_last_part_of_their_name_are_said(tmp_path):
    files = {"data.yaml": "names: [a]\ntrain: train.txt\n", "train.txt": "https://x.org/pics/1.png\n"}
    data = read_data(lay_out(tmp_path, files | {"images/1.png": None, "labels/1.txt": LINE}))["train"]
    assert (len(data.images[0].boxes), list(data.warnings)) == (1, [RENAMED_WARNING])


def test_images_that_are_listed_several_times_are_used_once(tmp_path):
    files = {"data.yaml": "names: [a]\ntrain: train.txt\n", "train.txt": "images/1.png\nimages/1.png\n"}
    data = read_data(lay_out(tmp_path, files | {"images/1.png": None, "labels/1.txt": LINE}))["train"]
    assert (len(data.images), list(data.warnings)) == (1, ["images are listed several times: used once"])


def test_a_listed_image_that_does_not_exist_is_named(tmp_path):
    files = {"data.yaml": "names: [a]\ntrain: train.txt\n", "train.txt": "gone/images/1.png\n"}
    with pytest.raises(InputError, match=r"1\.png: image file not found"):
        read_data(lay_out(tmp_path, files))


BAD_YAML = {
    "names as text": ("names: cat", "names must be a list or a mapping from class numbers, got cat"),
    "names as numbers of names": ("names: {cat: 0}", "names must be a list or a mapping from class numbers"),
    "numbers that are not": ("names: {0.5: cat}", "names must be a list or a mapping"),
    "a negative number": ("names: {-1: cat, 0: dog}\nnc: 3", "is about 3 classes, but has 2 names"),
    "yes and no": ("names: [yes, cat]", r"names must be text, got True\. Write them in quotes"),
    "no name": ("names: [cat, ]\nnc: 2", "is about 2 classes, but has 1 names"),
    "an empty name": ("names: [cat, null]", r"names must be text, got None"),
    "a number with a fraction": ("names: [1.0, cat]", r"names must be text, got 1\.0"),
    "a number twice": ("names: {0: cat, '0': dog}", "names have a class number twice"),
    "duplicates": ("names: [cat, 'cat ']", "several categories are named 'cat'"),
    "more classes": ("names: [cat]\nnc: 2", r"is about 2 classes, but has 1 names\. Correct one"),
    "fewer classes": ("names: [cat, dog]\nnc: 1", "is about 1 classes, but has 2 names"),
    "keypoints": ("names: [cat]\nkpt_shape: 17", "kpt_shape must be the number of keypoints and of values"),
    "keypoints as text": ("names: [cat]\nkpt_shape: [a, b]", "kpt_shape must be the number"),
    "two keys of a split": (
        "names: [cat]\nval: images\nvalid: images",
        "several of val, valid, train are the same split",
    ),
}


@pytest.mark.parametrize("name", BAD_YAML)
def test_one_clear_error_about_yaml(tmp_path, name):
    text, message = BAD_YAML[name]
    files = {"data.yaml": f"{text}\ntrain: images\n", "images/1.png": None, "labels/1.txt": LINE}
    with pytest.raises(InputError, match=message) as caught:
        read_data(lay_out(tmp_path, files))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "names", ["{0: cat, 2: dog}\nnc: 3", "{0: cat, 2: dog}\nnc: 2", "{'0': cat, '2': ' dog '}", "{2: dog, 0: cat}"]
)
def test_numbers_may_have_gaps(tmp_path, names):
    lines = LINE + LINE.replace("0 ", "2 ", 1)
    files = {"data.yaml": f"names: {names}\ntrain: images\n", "images/1.png": None, "labels/1.txt": lines}
    data = read_data(lay_out(tmp_path, files))["train"]
    assert (data.categories, data.images[0].category_ids.tolist()) == ({0: "cat", 2: "dog"}, [0, 2])


DROPPED = "boxes are not four finite numbers: dropped"
LINES = {
    # x, y, width, height or None, and what is said
    "a box": ("0 0.5 0.5 0.2 0.2", [24, 16, 12, 8], ""),
    "a number with a fraction of 0": ("1.000e+00 0.5 0.5 0.2 0.2", [24, 16, 12, 8], ""),
    "tabs": ("0\t0.5\t0.5\t0.2\t0.2", [24, 16, 12, 8], ""),
    "a confidence": (
        "0 0.5 0.5 0.2 0.2 0.93",
        [24, 16, 12, 8],
        "labels have a sixth value, such as a confidence: ignored",
    ),
    "a polygon": ("0 0.1 0.1 0.5 0.1 0.5 0.5", [6, 4, 24, 16], "labels are polygons: their bounding boxes are used"),
    "a polygon of four points": (
        "0 0.1 0.1 0.5 0.1 0.4 0.4 0.1 0.5",
        [6, 4, 24, 16],
        "labels are polygons: their bounding boxes are used",
    ),
    "a polygon with a confidence": (
        "0 0.1 0.1 0.5 0.1 0.5 0.5 0.9",
        [6, 4, 24, 16],
        "labels are polygons with another value: it is ignored",
    ),
    "a rotated box": (
        "0 0.5 0.1 0.9 0.5 0.5 0.9 0.1 0.5",
        [6, 4, 48, 32],
        "boxes are rotated: replaced by the upright boxes around them",
    ),
    "an upright box by its corners": ("0 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5", [6, 4, 24, 16], ""),
    "too few values": ("0 0.5 0.5 0.2", None, DROPPED),
    "only a class": ("0", None, DROPPED),
    "a comma for the decimal point": ("0 0,5 0,5 0,2 0,2", None, DROPPED),
    "nan": ("0 0.5 nan 0.2 0.2", None, DROPPED),
    "infinity": ("0 0.5 inf 0.2 0.2", None, DROPPED),
    "text": ("0 0.5 0.5 0.2 wide", None, DROPPED),
    "an underscore": ("0 0.5 0.5 0.2 0.2_5", None, DROPPED),
    "a negative width": ("0 0.5 0.5 -0.2 0.2", None, DROPPED),
    "no width": ("0 0.5 0.5 0 0.2", None, "boxes have no width or no height: dropped"),
    "outside": ("0 -0.5 0.5 0.2 0.2", None, "boxes lie outside their image: dropped"),
    "beyond": ("0 0.05 0.5 0.2 0.2", [-3, 16, 12, 8], "boxes extend beyond their image: clipped for training"),
}


@pytest.mark.parametrize("name", LINES)
def test_whatever_is_changed_or_left_out_is_said(tmp_path, name):
    line, box, said = LINES[name]
    image, warnings = read_lines_as(tmp_path, f"{OTHER}{line}\r\n\n{OTHER}")
    assert image.boxes == pytest.approx(np.array([[5, 5, 10, 10], *([box] if box else []), [5, 5, 10, 10]]), abs=1e-3)
    assert warnings == ({said: 1} if said else {})


def test_rotated_boxes_can_be_refused(tmp_path):
    with pytest.raises(InputError, match=r"1 boxes are rotated, in 1\.txt\. .* add --rotated_boxes enclose"):
        read_lines_as(tmp_path, LINES["a rotated box"][0], rotated_boxes="refuse")


def test_keypoints_are_left_out_where_yaml_announces_them(tmp_path):
    image, warnings = read_lines_as(tmp_path, "1 0.5 0.5 0.2 0.2 0.4 0.4 2\n", more="kpt_shape: [1, 3]\n")
    assert (image.boxes.tolist(), warnings) == ([[24, 16, 12, 8]], {})


BAD_LINES = {
    "a name": ("cat 0.5 0.5 0.2 0.2", r"1 lines do not begin with a class number: 'cat 0.5 0.5 0.2 0.2' in .*1\.txt"),
    "commas": ("0,0.5,0.5,0.2,0.2", "lines do not begin with a class number"),
    "a fraction": ("0.5 0.5 0.5 0.2 0.2", "lines do not begin with a class number"),
    "a negative number": ("-1 0.5 0.5 0.2 0.2", "lines do not begin with a class number"),
    "a number beyond the names": ("2 0.5 0.5 0.2 0.2", r"labels use classes without a name: 2 in .*1\.txt"),
    "pixels": (
        "0 30 20 12 8",
        r"boxes seem to be in pixels, but must be fractions of the image: 1 of 3 .* as '0 30 20 12 8'",
    ),
    "percent": ("0 50.0 50.0 20.0 20.0", "boxes seem to be in pixels"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_lines_that_stop_training(tmp_path, name):
    line, message = BAD_LINES[name]
    with pytest.raises(InputError, match=message) as caught:
        read_lines_as(tmp_path, f"{OTHER}{line}\n{OTHER}")
    assert "\n" not in str(caught.value)
    errors = []
    image, _ = read_lines_as(tmp_path, f"{OTHER}{line}\n{OTHER}", on_error=errors.append)
    assert (len(errors), image.category_ids.tolist()[::2][:1]) == (1, [1])


def test_negative_classes_are_not_classes_without_names_either(tmp_path):
    with pytest.raises(InputError, match="lines do not begin with a class number"):
        read_data(lay_out(tmp_path, {"images/1.png": None, "labels/1.txt": LINE + "-1 0.5 0.5 0.2 0.2\n"}))


def test_files_without_partner_are_said(tmp_path):
    """An image without label file has no objects; a label file without image is an error."""
    files = {
        "images/1.png": None,
        "images/2.png": None,
        "images/3.png": None,
        "labels/1.txt": LINE,
        "labels/2.txt": "",
    }
    data = read_data(lay_out(tmp_path, files))["train"]
    assert data.warnings[NO_FILE] == [str(tmp_path / "images" / "3.png")]
    lay_out(tmp_path, {"labels/8.txt": LINE, "labels/sub/9.txt": LINE})
    with pytest.raises(InputError, match=r"2 label files have no image of their name: 8\.txt, 9\.txt"):
        read_data(tmp_path)
    errors = []
    assert len(read_data(tmp_path, options=ReadOptions(on_error=errors.append))["train"].images) == 3
    assert len(errors) == 1


def test_an_image_with_an_unknown_extension_is_named(tmp_path):
    lay_out(tmp_path, {"images/1.png": None, "labels/1.txt": LINE, "labels/2.txt": LINE, "images/2.xcf": "?"})
    with pytest.raises(InputError, match=r"2\.txt\. .*images/2\.xcf: is not a known image format"):
        read_data(tmp_path)


def test_images_that_share_a_label_file(tmp_path):
    data = read_data(lay_out(tmp_path, {"images/1.png": None, "images/1.jpg": None, "labels/1.txt": LINE}))["train"]
    assert len(data.warnings["images share their annotation file with another image"]) == 2


def test_duplicate_lines_are_kept_and_reported(tmp_path):
    image, _ = read_lines_as(tmp_path, LINE + LINE)
    assert len(image.boxes) == 2
    assert any("1 boxes are duplicates" in warning for warning in check_data(read_data(tmp_path)).warnings)


CVAT = {
    "obj.data": "classes = 2\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\nbackup = b/\n",
    "obj.names": "a\nb\n",
    "train.txt": "data/obj_train_data/1.png\n",
    "valid.txt": "data/obj_valid_data/1.png\n",
    "obj_train_data/1.png": None,
    "obj_train_data/1.txt": LINE,
    "obj_valid_data/1.png": None,
    "obj_valid_data/1.txt": LINE + OTHER,
}
LAYOUTS = {
    # files, the number of boxes of each split, and the names
    "CVAT's YOLO 1.1": (CVAT, {"train": 1, "validation": 2}, ["a", "b"]),
    "Label Studio": (
        {"images/1.png": None, "labels/1.txt": LINE, "classes.txt": "a\nb\n", "notes.json": '{"categories": []}'},
        {"train": 1},
        ["a", "b"],
    ),
    "LabelImg": ({"1.png": None, "1.txt": LINE, "classes.txt": "a\nb\n"}, {"train": 1}, ["a", "b"]),
    "LabelImg, a class list for each split": (
        {
            "train/1.png": None,
            "train/1.txt": LINE,
            "train/classes.txt": "a\nb\n",
            "val/1.png": None,
            "val/1.txt": OTHER,
            "val/classes.txt": "a\nb\n",
        },
        {"train": 1, "validation": 1},
        ["a", "b"],
    ),
    "Roboflow's Darknet": (
        {
            "train/1.png": None,
            "train/1.txt": LINE,
            "train/_darknet.labels": "a\nb\n",
            "valid/2.png": None,
            "valid/2.txt": LINE,
            "valid/_darknet.labels": "a\nb\n",
            "README.roboflow.txt": "cells\n",
        },
        {"train": 1, "validation": 1},
        ["a", "b"],
    ),
    "upper case": (
        {"Images/1.png": None, "Labels/1.TXT": LINE, "data.yaml": "names: [a, b]\ntrain: Images\n"},
        {"train": 1},
        ["a", "b"],
    ),
    "upper case without yaml": ({"Images/1.PNG": None, "Labels/1.TXT": LINE}, {"train": 1}, ["0"]),
    "a split with its own images and labels": (
        {"data.yaml": "names: [a, b]\ntrain: train\n", "train/images/1.png": None, "train/labels/1.txt": LINE},
        {"train": 1},
        ["a", "b"],
    ),
    "labels next to images of a directory images": (
        {"data.yaml": "names: [a, b]\ntrain: images\n", "images/1.png": None, "images/1.txt": LINE},
        {"train": 1},
        ["a", "b"],
    ),
    "only the number of classes": (
        {"data.yaml": "nc: 2\ntrain: images\n", "images/1.png": None, "labels/1.txt": LINE},
        {"train": 1},
        ["0"],
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path, name):
    files, num_boxes, names = LAYOUTS[name]
    # the path contains a directory that must not be taken for that of the images
    data = read_data(lay_out(tmp_path / "images" / "cells", files))
    assert {split: len(each.images[0].boxes) for split, each in data.items()} == num_boxes
    for each in data.values():
        assert (list(each.categories.values()), len(each.images)) == (names, 1)
        assert list(each.warnings) == ["classes have no names: named by their numbers"] * (names == ["0"])


def test_captions_of_images_are_not_labels(tmp_path):
    with pytest.raises(InputError, match="is not in a known format"):
        read_data(lay_out(tmp_path, {"1.png": None, "1.txt": "a cat on 2 mats\n", "classes.txt": "cat\n"}))


def test_an_empty_line_would_shift_the_numbers_of_classes(tmp_path):
    files = {"images/1.png": None, "labels/1.txt": LINE, "classes.txt": "a\n\nb\n\n"}
    with pytest.raises(InputError, match=r"classes\.txt: line 2 is empty, but each line is the name of a class"):
        read_data(lay_out(tmp_path, files))


@pytest.mark.parametrize("text", ["train: /", "train: " + "x" * 400, "train: [1, 2]", "train: {a: b}", "train: 3"])
def test_entries_that_are_not_paths(tmp_path, text):
    files = {"data.yaml": f"names: [a]\n{text}\n", "1.png": None}
    with pytest.raises(InputError):
        read_data(lay_out(tmp_path, files))
