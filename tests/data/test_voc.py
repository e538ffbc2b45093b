"""Pascal VOC as tools write it: how they count pixels, what is in their XML files, and how they name images."""

import logging

import numpy as np
import pytest

from helpers.data_formats import coco_text, draw, voc_xml, write
from hf_dino.data import InputError, ReadOptions, check_data, convert_data, read_data, xywh_to_xyxy
from hf_dino.data.readers import UNUSED_WARNING
from hf_dino.data.readers.files import RENAMED_WARNING


NO_FILE = "images have no annotation file: treated as images without objects"


def bndbox(*corners):
    return "".join(f"<{tag}>{value}</{tag}>" for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), corners))


def xml(*corners, name="cell", size=(40, 60), source="", more="", head=""):
    """Return an annotation file with one object, as corners are written; `size` is (height, width)."""
    return (
        f"{head}<annotation>{source}<size><width>{size[1]}</width><height>{size[0]}</height></size>"
        f"<object><name>{name}</name><bndbox>{bndbox(*corners)}</bndbox>{more}</object></annotation>"
    )


def with_object(text):
    return f"<annotation><size><width>60</width><height>40</height></size><object>{text}</object></annotation>"


def lay_out(folder, files):
    """Write the text files, and an image for each name without text."""
    for seed, (name, text) in enumerate(files.items()):
        draw(folder / name, seed=seed) if text is None else write(folder / name, text)
    return folder


def read_one(folder, text, **options):
    """Read one image with an annotation file; return it and the number of each warning."""
    lay_out(folder, {"1.png": None, "1.xml": text})
    data = read_data(folder, options=ReadOptions(**options))["train"]
    return data.images[0], {warning: len(paths) for warning, paths in data.warnings.items()}


CVAT = "<source><database>Unknown</database><annotation>Unknown</annotation><image>Unknown</image></source>"
LABEL_STUDIO = "<source><database>MyDatabase</database></source><owner><name>Label Studio</name></owner>"
LABELIMG = "<source><database>Unknown</database></source>"
COUNTINGS = {
    # corners of two boxes as written, x, y, width, height of the first, and what is said
    "the devkit": ("", (2, 3, 31, 22), (1, 1, 60, 40), [1, 2, 30, 20], ""),
    "LabelImg": (LABELIMG, (2, 3, 31, 22), (1, 1, 60, 40), [1, 2, 30, 20], ""),
    "a coordinate of 0": ("", (1, 2, 31, 22), (0, 5, 60, 40), [1, 2, 30, 20], "from 0, as a coordinate of 0 shows"),
    "a fraction of a pixel": ("", (1, 2, 31.5, 22), (5, 0.25, 60, 40), [1, 2, 30.5, 20], "from 0, as a coordinate"),
    "CVAT": (CVAT, (1.5, 2, 31.5, 22), (3, 5, 60, 40), [1.5, 2, 30, 20], "from 0, as CVAT writes them"),
    "Label Studio": (LABEL_STUDIO, (1, 2, 31, 22), (3, 5, 60, 40), [1, 2, 30, 20], "from 0, as Label Studio writes"),
    "edges from 1": ("", (2, 3, 32, 23), (1, 1, 61, 41), [1, 2, 30, 20], "edges counted from 1"),
}


@pytest.mark.parametrize("name", COUNTINGS)
def test_numbers_of_any_split_tell_how_pixels_are_counted(tmp_path, caplog, name):
    source, first, second, box, said = COUNTINGS[name]
    files = {
        "train/1.png": None,
        "train/1.xml": xml(*first, source=source),
        "val/1.png": None,
        "val/1.xml": xml(*second, source=source),
    }
    with caplog.at_level(logging.INFO, logger="hf_dino"):
        data = read_data(lay_out(tmp_path, files))
    assert data["train"].images[0].boxes.tolist() == [box]
    assert caplog.text.count("boxes count pixels") + caplog.text.count("boxes have edges") >= 1
    assert [said in warning for split in data.values() for warning in split.warnings] == [True] * 2 * bool(said)
    assert not check_data(data).errors


def test_large_boxes_at_the_border_are_accepted(tmp_path):
    text = (
        "<annotation><size><width>160</width><height>120</height></size><object><name>page</name>"
        "<bndbox><xmin>{0}</xmin><ymin>{0}</ymin><xmax>150</xmax><ymax>110</ymax></bndbox></object></annotation>"
    )
    for split in ("train", "val"):
        for number in range(4):
            draw(tmp_path / split / f"{number}.jpg", (120, 160), seed=number + 5 * (split == "val"))
            write(tmp_path / split / f"{number}.xml", text.format(0 if number < 2 else 5))
    data = read_data(tmp_path)
    assert {tuple(box) for split in data.values() for image in split.images for box in image.boxes.tolist()} == {
        (0, 0, 150, 110),
        (5, 5, 145, 105),
    }
    assert not check_data(data).errors
    assert data["train"].format == "Pascal VOC"


def test_a_box_of_zeros_does_not_tell_how_pixels_are_counted(tmp_path):
    files = {"1.png": None, "1.xml": xml(0, 0, 0, 0), "2.png": None, "2.xml": xml(2, 3, 31, 22)}
    assert read_data(lay_out(tmp_path, files))["train"].images[1].boxes.tolist() == [[1, 2, 30, 20]]


@pytest.mark.parametrize("box", [[-1, -0.5, 30, 20], [40, 30, 21, 11]])
def test_what_is_written_is_read_in_the_same_way_again(tmp_path, box):
    """A box that extends beyond the image by a pixel must not look as if pixels were counted otherwise."""
    lay_out(tmp_path / "coco", {"train.json": coco_text("1.png", box=tuple(box)), "train/1.png": None})
    write(tmp_path / "coco" / "val.json", coco_text("2.png"))
    draw(tmp_path / "coco" / "val" / "2.png")
    source = read_data(tmp_path / "coco")
    convert_data(source, tmp_path / "voc", "voc")
    for split, data in read_data(tmp_path / "voc").items():
        written, wanted = (xywh_to_xyxy(each.images[0].boxes) for each in (data, source[split]))
        assert written == pytest.approx(wanted, abs=0.5)
        assert not [warning for warning in data.warnings if "count" in warning]


OBJECTS = {
    # an object, x, y, width, height of its box or None, and what is said
    "swapped corners": (
        f"<name>a</name><bndbox>{bndbox(31, 3, 2, 22)}</bndbox>",
        [1, 2, 30, 20],
        "boxes have their corners swapped: put in order",
    ),
    "no box": ("<name>a</name>", None, "boxes are not four finite numbers: dropped"),
    "a box without a corner": (
        "<name>a</name><bndbox><xmin>1</xmin></bndbox>",
        None,
        "boxes are not four finite numbers: dropped",
    ),
    "a corner twice": (
        f"<name>a</name><bndbox>{bndbox(2, 3, 31, 22)}<xmin>7</xmin></bndbox>",
        None,
        "boxes are not four finite numbers: dropped",
    ),
    "a unit": (
        f"<name>a</name><bndbox>{bndbox(2, 3, '12.5px', 22)}</bndbox>",
        None,
        "boxes are not four finite numbers: dropped",
    ),
    "infinity": (
        f"<name>a</name><bndbox>{bndbox(2, 3, 'inf', 22)}</bndbox>",
        None,
        "boxes are not four finite numbers: dropped",
    ),
    "several boxes": (
        f"<name>a</name><bndbox>{bndbox(2, 3, 31, 22)}</bndbox><bndbox>{bndbox(2, 3, 9, 9)}</bndbox>",
        [1, 2, 30, 20],
        "objects have several boxes: the first one is used",
    ),
    "several names": (
        f"<name>a</name><name>b</name><bndbox>{bndbox(2, 3, 31, 22)}</bndbox>",
        [1, 2, 30, 20],
        "objects have several names: the first one is used",
    ),
    "a part": (
        f"<name>a</name><bndbox>{bndbox(2, 3, 31, 22)}</bndbox>"
        f"<part><name>head</name><bndbox>{bndbox(2, 3, 9, 9)}</bndbox></part>",
        [1, 2, 30, 20],
        "",
    ),
    "no name": (f"<bndbox>{bndbox(2, 3, 31, 22)}</bndbox>", None, "objects have no class name: left out"),
    "an empty name": (f"<name> </name><bndbox>{bndbox(2, 3, 31, 22)}</bndbox>", None, "objects have no class name"),
    "an odd flag": (
        f"<name>a</name><difficult>2</difficult><bndbox>{bndbox(2, 3, 31, 22)}</bndbox>",
        [1, 2, 30, 20],
        "objects are marked neither difficult nor not: read as not difficult",
    ),
    "roLabelImg": (
        "<type>robndbox</type><name>a</name><robndbox><cx>30</cx><cy>20</cy><w>10</w><h>4</h><angle>1.5707963268</angle>"
        "</robndbox>",
        [28, 15, 4, 10],
        "boxes are rotated: replaced by the upright boxes around them",
    ),
    "roLabelImg, not rotated": (
        "<name>a</name><robndbox><cx>30</cx><cy>20</cy><w>10</w><h>4</h><angle>0</angle></robndbox>",
        [25, 18, 10, 4],
        "",
    ),
    "CVAT's rotation": (
        f"<name>a</name><bndbox>{bndbox(11, 11, 20, 20)}</bndbox><attributes><attribute><name>rotation</name>"
        "<value>45.0</value></attribute></attributes>",
        [15 - 50**0.5, 15 - 50**0.5, 200**0.5, 200**0.5],
        "boxes are rotated: replaced by the upright boxes around them",
    ),
    "another attribute": (
        f"<name>a</name><bndbox>{bndbox(2, 3, 31, 22)}</bndbox><attributes><attribute><name>rotation</name>"
        "<value>left</value></attribute></attributes>",
        [1, 2, 30, 20],
        "",
    ),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_whatever_is_changed_or_left_out_is_said(tmp_path, name):
    text, box, said = OBJECTS[name]
    other = f"</object><object><name>b</name><bndbox>{bndbox(5, 5, 9, 9)}</bndbox>"
    image, warnings = read_one(tmp_path, with_object(text + other))
    boxes = ([] if box is None else [box]) + [[4, 4, 5, 5]]
    # the devkit's corners of CVAT's box are 10 and 20
    assert image.boxes == pytest.approx(np.array(boxes), abs=1e-3)
    assert [warning.startswith(said) for warning in warnings] == [True] * bool(said)


def test_rotated_boxes_can_be_refused(tmp_path):
    text = with_object(OBJECTS["roLabelImg"][0])
    with pytest.raises(InputError, match=r"1 boxes are rotated, in 1\.xml\. .* add --rotated_boxes enclose"):
        read_one(tmp_path, text, rotated_boxes="refuse")


@pytest.mark.parametrize(("flag", "iscrowd"), [("1", 1), ("true", 1), (" Yes ", 1), ("0", 0), ("", 0), ("False", 0)])
def test_difficult_objects_are_crowds(tmp_path, flag, iscrowd):
    image, warnings = read_one(tmp_path, xml(2, 3, 31, 22, more=f"<difficult>{flag}</difficult>"))
    assert (image.iscrowd.tolist(), warnings) == ([iscrowd], {})


def test_boxes_outside_of_an_object_are_said(tmp_path):
    text = xml(2, 3, 31, 22).replace("</annotation>", f"<objects><bndbox>{bndbox(1, 2, 3, 4)}</bndbox></objects>")
    image, warnings = read_one(tmp_path, text + "</annotation>")
    assert (len(image.boxes), warnings) == (1, {"boxes are outside of an object element: left out": 1})


def test_blanks_around_a_name_do_not_make_another_class(tmp_path):
    names = ("cat", "cat ", " cat", "\n\tcat\n")
    files = {
        f"{n}.{end}": text
        for n, name in enumerate(names)
        for end, text in (("png", None), ("xml", xml(2, 3, 31, 22, name=name)))
    }
    data = read_data(lay_out(tmp_path, files))["train"]
    assert data.categories == {1: "cat"}
    assert [image.category_ids.tolist() for image in data.images] == [[1]] * 4


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_encodings_that_xml_knows(tmp_path, encoding):
    head = f'<?xml version="1.0" encoding="{encoding.removesuffix("-sig")}"?>\n<!-- by hand -->\n'
    draw(tmp_path / "1.png")
    (tmp_path / "1.xml").write_bytes(xml(2, 3, 31, 22, name="Käfer &amp; Co", head=head).encode(encoding))
    data = read_data(tmp_path)["train"]
    assert (data.categories, data.images[0].boxes.tolist()) == ({1: "Käfer & Co"}, [[1, 2, 30, 20]])


BROKEN = {
    "entities": '<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>'
    + xml(2, 3, 31, 22, name="&b;"),
    "a file as an entity": '<!DOCTYPE a [<!ENTITY a SYSTEM "file:///etc/passwd">]>' + xml(2, 3, 31, 22, name="&a;"),
    "an unknown encoding": '<?xml version="1.0" encoding="klingon"?>' + xml(2, 3, 31, 22),
    "an encoding of several bytes": '<?xml version="1.0" encoding="gbk"?>' + xml(2, 3, 31, 22),
    "truncated": xml(2, 3, 31, 22)[:-20],
}


@pytest.mark.parametrize("name", BROKEN)
def test_xml_that_cannot_be_read_is_one_line_of_error(tmp_path, name):
    with pytest.raises(InputError, match=r"1\.xml: cannot be read as XML") as caught:
        read_one(tmp_path, BROKEN[name])
    assert "\n" not in str(caught.value)


def test_xml_of_other_programs(tmp_path):
    """One that has the name of an image is an error, others are ignored and said."""
    files = {"1.png": None, "1.xml": xml(2, 3, 31, 22), "workspace.xml": "<project/>"}
    data = read_data(lay_out(tmp_path, files))["train"]
    assert (len(data.images), list(data.warnings)) == (1, ["XML files are not annotations: ignored"])
    lay_out(tmp_path, {"2.png": None, "2.xml": "<annotations/>"})
    with pytest.raises(InputError, match=r"2\.xml: is not a Pascal VOC annotation, but <annotations>"):
        read_data(tmp_path)


@pytest.mark.parametrize("size", [(0, 0), ("", 60), ("inf", "60"), (40.5, 60), (-40, 60)])
def test_a_size_that_cannot_be_is_read_from_the_image(tmp_path, size):
    image, _ = read_one(tmp_path, xml(2, 3, 31, 22, size=size))
    assert (image.height, image.width) == (40, 60)


NAMES = {
    "the file name": ("<filename>photo.png</filename>", "photo.png"),
    "a path of Windows": (r"<path>C:\Users\me\photo.png</path>", "photo.png"),
    "upper case": ("<filename>PHOTO.PNG</filename>", "photo.png"),
    "a prefix of an upload": ("<filename>1d7d4d71-photo.png</filename>", "photo.png"),
}


@pytest.mark.parametrize("name", NAMES)
def test_an_image_of_another_name_is_found_by_the_name_in_the_file(tmp_path, name):
    element, image_name = NAMES[name]
    text = xml(2, 3, 31, 22, source=element)
    data = read_data(lay_out(tmp_path, {"Annotations/7.xml": text, f"JPEGImages/{image_name}": None}))["train"]
    assert [(image.path.name, len(image.boxes)) for image in data.images] == [(image_name, 1)]
    assert list(data.warnings) == ["images have another name than their annotation file: matched by the name in it"]


def test_the_name_of_the_file_comes_before_the_name_in_it(tmp_path):
    """Roboflow renames images; two annotations never get the same image."""
    files = {
        f"{n}.{end}": text
        for n in (1, 2)
        for end, text in (("png", None), ("xml", xml(2, 3, 31, 20 + n, source="<filename>2.png</filename>")))
    }
    data = read_data(lay_out(tmp_path, files))["train"]
    assert [image.boxes.tolist() for image in data.images] == [[[1, 2, 30, 19]], [[1, 2, 30, 20]]]
    lay_out(tmp_path, {"3.xml": xml(2, 3, 31, 22, source="<filename>2.png</filename>")})
    with pytest.raises(InputError, match=r"1 image not found in .*: 3\.jpg"):
        read_data(tmp_path)


def test_an_image_of_another_split_is_not_taken(tmp_path):
    text = xml(2, 3, 31, 22, source="<filename>2.png</filename>")
    files = {"train/1.png": None, "train/1.xml": text, "train/2.xml": text, "val/2.png": None, "val/2.xml": text}
    with pytest.raises(InputError, match=r"1 image not found in .*train: 2\.jpg"):
        read_data(lay_out(tmp_path, files))


def test_an_image_with_an_unknown_extension_is_named(tmp_path):
    files = {"1.png": None, "1.xml": xml(2, 3, 31, 22), "2.xml": xml(2, 3, 31, 22), "2.xcf": "?"}
    errors = check_data(read_data(lay_out(tmp_path, files))).errors
    assert len(errors) == 1
    assert "2.xcf: cannot be read as an image (not a known image format)" in errors[0]


def test_images_that_share_an_annotation_file(tmp_path):
    data = read_data(lay_out(tmp_path, {"1.png": None, "1.jpg": None, "1.xml": xml(2, 3, 31, 22)}))["train"]
    assert [len(image.boxes) for image in data.images] == [1, 1]
    assert len(data.warnings["images share their annotation file with another image"]) == 2


LAYOUTS = {
    "Label Studio": {"images/1.png": None, "Annotations/1.xml": ""},
    "subdirectories": {"JPEGImages/a/1.png": None, "Annotations/a/1.xml": ""},
    "Oxford-IIIT Pet": {"images/1.png": None, "annotations/xmls/1.xml": ""},
    "images and labels": {"images/1.png": None, "labels/1.XML": ""},
    "next to each other, below": {"cells/1.png": None, "cells/1.xml": ""},
    "annotations next to the directory": {"images/1.png": None, "1.xml": ""},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path, name):
    files = {path: text if text is None else xml(2, 3, 31, 22) for path, text in LAYOUTS[name].items()}
    data = read_data(lay_out(tmp_path, files))
    assert [(split, [len(image.boxes) for image in each.images], each.warnings) for split, each in data.items()] == [
        ("train", [1], {})
    ]


def test_splits_as_subdirectories_of_images_and_annotations(tmp_path):
    files = {
        f"{kind}/{split}/1.{end}": text
        for split in ("train", "val")
        for kind, end, text in (("images", "png", None), ("annotations", "xml", xml(2, 3, 31, 22)))
    }
    assert {split: len(data.images) for split, data in read_data(lay_out(tmp_path, files)).items()} == {
        "train": 1,
        "validation": 1,
    }


def devkit(folder, lists, stems=("000001", "000002", "000003")):
    files = {f"ImageSets/Main/{name}.txt": text for name, text in lists.items()}
    for stem in stems:
        files |= {f"JPEGImages/{stem}.png": None, f"Annotations/{stem}.xml": xml(2, 3, 31, 22)}
    return lay_out(folder, files)


def stems(data):
    return {split: [image.path.stem for image in each.images] for split, each in data.items()}


LINES = {
    "plain": "000001\n000002\n",
    "blank lines and Windows": "\r\n000001\r\n\r\n000002\r\n",
    "extensions": "000001.jpg\n000002.png\n",
    "paths": "JPEGImages/000001.jpg\n./JPEGImages/000002.jpg\n",
    "backslashes": "JPEGImages\\000001.jpg\nC:\\data\\JPEGImages\\000002.jpg\n",
    "quotes": '"000001"\n"000002"\n',
}


@pytest.mark.parametrize("name", LINES)
def test_lists_of_images(tmp_path, name):
    data = read_data(devkit(tmp_path, {"train": LINES[name], "val": "000003\n"}))
    assert stems(data) == {"train": ["000001", "000002"], "validation": ["000003"]}
    assert [dict(each.warnings) for each in data.values()] == [{}, {}]


def test_flags_of_classes_are_not_part_of_the_name(tmp_path):
    lists = {"train": "000001  1\n000002 -1\n", "val": "000003\n", "cell_train": "000001 1\n000003 -1\n"}
    data = read_data(devkit(tmp_path, lists))
    assert stems(data) == {"train": ["000001", "000002"], "validation": ["000003"]}
    assert len(data["train"].warnings["images are listed with a flag: ignored"]) == 2


def test_lists_of_classes_alone_are_not_splits(tmp_path):
    data = read_data(devkit(tmp_path, {"cell_train": "000001 1\n000002 -1\n", "cell_val": "000003 1\n"}))
    assert stems(data) == {"train": ["000001", "000002", "000003"]}
    (warning,) = data["train"].warnings
    assert warning == "images are in no split, as Main has no train.txt, val.txt or test.txt: used for training"


def test_images_in_several_lists_in_none_and_listed_twice(tmp_path):
    data = read_data(devkit(tmp_path, {"trainval": "000001\n000002\n000001\n", "val": "000002\n"}))
    assert stems(data) == {"train": ["000001", "000002"], "validation": ["000002"]}
    assert {split: {what: len(paths) for what, paths in each.warnings.items()} for split, each in data.items()} == {
        "train": {"images are listed several times: used once": 1, UNUSED_WARNING: 1},
        "validation": {"images are also in another split": 1},
    }
    assert any("in both train and validation" in warning for warning in check_data(data).warnings)


def test_listed_names_that_do_not_exist_are_named(tmp_path):
    with pytest.raises(InputError, match=r"1 image not found in .*JPEGImages: 000009\.jpg"):
        read_data(devkit(tmp_path, {"train": "000001\n000009.jpg\n"}))


def test_two_lists_of_one_split(tmp_path):
    with pytest.raises(InputError, match=r"the validation split may be .*val\.txt or .*valid\.txt"):
        read_data(devkit(tmp_path, {"train": "000001\n", "val": "000002\n", "valid": "000003\n"}))


def test_listed_images_without_annotation_file(tmp_path):
    folder = devkit(tmp_path, {"train": "000001\n000004\n"}, stems=("000001",))
    draw(folder / "JPEGImages" / "000004.png")
    data = read_data(folder)["train"]
    assert (len(data.images), list(data.warnings), RENAMED_WARNING in data.warnings) == (2, [NO_FILE], False)


def test_voc_xml_of_the_other_tests_is_the_devkit(tmp_path):
    image, warnings = read_one(tmp_path, voc_xml((40, 60), [("cell", [1, 2, 30, 20])]))
    assert (image.boxes.tolist(), warnings) == ([[1, 2, 30, 20]], {})
