"""The same images give the same data and batches in every format, and every layout is detected."""

import json
import logging
import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from helpers.command_line import hf_dino
from helpers.data_formats import (
    FORMATS,
    as_imagefolder,
    class_names,
    coco_text,
    draw,
    voc_xml,
    write,
    write_shapes,
    yolo_lines,
)
from hf_dino import DinoDetrImageProcessor
from hf_dino.data import (
    DetectionDataset,
    InputError,
    TrainingCollator,
    check_data,
    label_of_category,
    make_augmentation,
    read_data,
)
from hf_dino.data.readers import UNUSED_WARNING, hf_datasets


pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes")


def contents(data):
    """Everything that a model is trained on."""
    return [
        {
            "image_id": image.image_id,
            "pixels": image.read().tobytes(),
            "size": (image.height, image.width),
            "boxes": image.boxes.tolist(),
            "names": [data.categories[number] for number in image.category_ids],
            "areas": image.areas.tolist(),
            "iscrowd": image.iscrowd.tolist(),
        }
        for image in data.images
    ]


def batch(data, names, augmentation):
    """Return a batch of the first three images."""
    size = {"shortest_edge": 64, "longest_edge": 100}
    augment = make_augmentation(augmentation, size)
    labels = label_of_category(data, dict(enumerate(names)))
    resize = augment is None or not augment.resizes
    collate = TrainingCollator(DinoDetrImageProcessor(size=size), labels, len(names), resize)
    dataset = DetectionDataset(data, augment, seed=3, epoch=1)
    return collate([dataset[index] for index in range(3)])


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_images_give_the_same_data_and_batches(shapes, tmp_path, name):
    expected = read_data(shapes)
    FORMATS[name](shapes, tmp_path / "data")
    data = read_data(tmp_path / "data")
    assert list(data) == list(expected) == ["train", "validation", "test"]
    for split in data:
        assert contents(data[split]) == contents(expected[split])
        assert sorted(data[split].categories.values()) == sorted(class_names(shapes))
    assert not len(data["train"].images[1].boxes)
    assert sum(len(image.boxes) for image in data["train"].images) > 3
    for augmentation in ("none", "dino"):
        got, wanted = (batch(each["train"], class_names(shapes), augmentation) for each in (data, expected))
        assert torch.equal(got["pixel_values"], wanted["pixel_values"])
        assert torch.equal(got["pixel_mask"], wanted["pixel_mask"])
        for label, other in zip(got["labels"], wanted["labels"]):
            assert label.keys() == other.keys()
            assert all(torch.equal(torch.as_tensor(label[key]), torch.as_tensor(other[key])) for key in label)


def test_a_saved_table_is_pickled_without_its_images(shapes, tmp_path):
    as_imagefolder(shapes, tmp_path / "images")
    datasets.load_dataset(str(tmp_path / "images")).save_to_disk(str(tmp_path / "saved"))
    data = read_data(tmp_path / "saved")
    expected = read_data(shapes)
    assert {split: contents(each) for split, each in data.items()} == {s: contents(e) for s, e in expected.items()}
    sent = pickle.dumps(data["train"])
    assert len(sent) < sum(len(image.path.open().read()) for image in data["train"].images)
    assert contents(pickle.loads(sent)) == contents(expected["train"])
    assert str(data["train"].images[2].path) == f"{tmp_path / 'saved'} (train), row 2: 000003.png"


@pytest.mark.parametrize("form", ["dict of lists", "list of dicts", "columns"])
def test_every_form_of_objects_in_hub_tables(tmp_path, form):
    draw(tmp_path / "a.png")
    draw(tmp_path / "b.png")
    box, label = datasets.Sequence(datasets.Value("float32"), 4), datasets.ClassLabel(names=["cell", "virus"])
    boxes, labels = [[1, 2, 3, 4], [5, 6, 7, 8.5]], [1, 0]
    as_columns = {"bbox": boxes, "category": labels}
    feature, objects = {
        "dict of lists": (
            datasets.Sequence({"bbox": box, "category": label}),
            [as_columns, {"bbox": [], "category": []}],
        ),
        "list of dicts": (
            [{"bbox": box, "category": label}],
            [[{"bbox": box, "category": label} for box, label in zip(boxes, labels)], []],
        ),
        "columns": (None, None),
    }[form]
    features = {"image": datasets.Image(), "height": datasets.Value("int32"), "width": datasets.Value("int32")}
    rows = {"image": [str(tmp_path / "a.png"), str(tmp_path / "b.png")], "height": [40, 40], "width": [60, 60]}
    if feature is None:
        features |= {"bboxes": datasets.Sequence(box), "label": datasets.Sequence(label)}
        rows |= {"bboxes": [boxes, []], "label": [labels, []]}
    else:
        features["objects"], rows["objects"] = feature, objects
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    table.save_to_disk(str(tmp_path / "saved"))
    (data,) = read_data(tmp_path / "saved").values()
    assert data.categories == {0: "cell", 1: "virus"}
    assert data.images[0].boxes.tolist() == boxes
    assert data.images[0].category_ids.tolist() == labels
    assert data.images[1].boxes.shape == (0, 4)


def test_metadata_in_csv(tmp_path):
    draw(tmp_path / "data" / "a.png")
    objects = json.dumps({"bbox": [[1, 2, 3, 4]], "categories": [7]}).replace('"', '""')
    write(tmp_path / "data" / "metadata.csv", f'file_name,objects\na.png,"{objects}"\n')
    (data,) = read_data(tmp_path / "data").values()
    assert (data.categories, data.images[0].boxes.tolist()) == ({7: "7"}, [[1, 2, 3, 4]])


YAML = "names: [cell]\n"
XML, LINES = voc_xml((40, 60), [("cell", [1, 2, 30, 20])]), yolo_lines((40, 60), [(0, [1, 2, 30, 20])])
ROW = json.dumps({"file_name": "1.png", "objects": {"bbox": [[1, 2, 30, 20]], "categories": ["cell"]}}) + "\n"
TRAIN_AND_VALIDATION = ["train", "validation"]

# files of a folder, and the splits it contains; None is an image
LAYOUTS = {
    "coco": (
        {
            "annotations/instances_train2017.json": coco_text("1.png"),
            "annotations/person_keypoints_train2017.json": "{}",
            "annotations/instances_val2017.json": coco_text("1.png"),
            "images/train2017/1.png": None,
            "images/val2017/1.png": None,
        },
        TRAIN_AND_VALIDATION,
    ),
    "coco files beside one folder": (
        {"train.json": coco_text("1.png"), "val.json": coco_text("2.png"), "images/1.png": None, "images/2.png": None},
        TRAIN_AND_VALIDATION,
    ),
    "coco, with other folders and files around": (
        {
            "train.json": coco_text("1.png"),
            "shapes.json": "{}",
            "settings.yaml": "{{ no: yaml",
            "images/1.png": None,
            "train/2.png": None,
            "train_old/2.png": None,
        },
        ["train"],
    ),
    "coco files that name the folder": (
        {"train.json": coco_text("images/1.png"), "images/1.png": None},
        ["train"],
    ),
    "roboflow's coco": (
        {
            "train/_annotations.coco.json": coco_text("1.png"),
            "train/1.png": None,
            "valid/_annotations.coco.json": coco_text("1.png"),
            "valid/1.png": None,
        },
        TRAIN_AND_VALIDATION,
    ),
    "one coco file": ({"labels.json": coco_text("1.png"), "data/1.png": None}, ["train"]),
    "voc": (
        {
            "ImageSets/Main/trainval.txt": "1\n",
            "ImageSets/Main/test.txt": "2\n",
            "Annotations/1.xml": XML,
            "Annotations/2.xml": XML,
            "JPEGImages/1.png": None,
            "JPEGImages/2.png": None,
        },
        ["train", "test"],
    ),
    "voc without lists": ({"Annotations/1.xml": XML, "JPEGImages/1.png": None}, ["train"]),
    "voc in folders of splits": (
        {"train/1.xml": XML, "train/1.png": None, "val/1.xml": XML, "val/1.png": None},
        TRAIN_AND_VALIDATION,
    ),
    "xml beside images": ({"1.xml": XML, "1.png": None}, ["train"]),
    "yolo": (
        {
            "data.yaml": YAML + "train: images/train\nval: images/val\ntest:\n",
            "images/train/1.png": None,
            "images/val/1.png": None,
            "labels/train/1.txt": LINES,
            "labels/val/1.txt": LINES,
        },
        TRAIN_AND_VALIDATION,
    ),
    "roboflow's yolo": (
        {
            "data.yaml": "names: {0: cell}\ntrain: ../train/images\nval: ../valid/images\ntest: ../test/images\n",
            "train/images/1.png": None,
            "valid/images/1.png": None,
            "train/labels/1.txt": LINES,
            "valid/labels/1.txt": LINES,
        },
        TRAIN_AND_VALIDATION,
    ),
    "yolo with a list of images": (
        {
            "set.yml": YAML + "train: train.txt\n",
            "train.txt": "./images/1.png\n",
            "images/1.png": None,
            "images/2.png": None,
            "labels/1.txt": LINES,
        },
        ["train"],
    ),
    "yolo without yaml": (
        {"images/1.png": None, "labels/1.txt": LINES, "classes.txt": "cell\n"},
        ["train"],
    ),
    "yolo without yaml, in splits": (
        {"images/val/1.png": None, "labels/val/1.txt": LINES, "labels/classes.txt": "cell\n"},
        ["validation"],
    ),
    "datasets": ({"metadata.jsonl": ROW, "1.png": None}, ["train"]),
    "datasets in folders of splits": (
        {"train/metadata.jsonl": ROW, "train/1.png": None, "val/metadata.jsonl": ROW, "val/1.png": None},
        TRAIN_AND_VALIDATION,
    ),
}


def lay_out(folder, files):
    for name, text in files.items():
        draw(folder / name) if text is None else write(folder / name, text)
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_detected(tmp_path, name):
    files, splits = LAYOUTS[name]
    data = read_data(lay_out(tmp_path / "cells", files))
    assert list(data) == splits
    for each in data.values():
        assert [*each.categories.values()] == ["cell"]
        assert len(each.images) == 1
        assert each.images[0].boxes == pytest.approx(np.array([[1, 2, 30, 20]]), abs=1e-3)
        assert each.name == "cells"


@pytest.mark.parametrize("name", LAYOUTS)
def test_images_in_no_split_are_said(tmp_path, caplog, name):
    files, splits = LAYOUTS[name]
    folder = lay_out(tmp_path / "cells", files)
    unused = [*read_data(folder)[splits[0]].warnings.get(UNUSED_WARNING, [])]  # some layouts have one
    assert {Path(path).relative_to(folder).as_posix() for path in unused} <= {
        "train/2.png",
        "train_old/2.png",
        "images/2.png",
    }
    for image in ("a.jfif", "b.png"):
        draw(folder / "elsewhere" / image)
        unused.append(str(folder / "elsewhere" / image))
    with caplog.at_level(logging.WARNING):
        data = read_data(folder)
    assert data[splits[0]].warnings[UNUSED_WARNING] == sorted(unused)
    assert f"{folder}: {len(unused)} {UNUSED_WARNING}" in caplog.messages
    assert not [split for split in splits[1:] if UNUSED_WARNING in data[split].warnings]
    assert any(f"{splits[0]}: {len(unused)} {UNUSED_WARNING}; " in text for text in check_data(data).warnings)
    assert UNUSED_WARNING not in read_data(folder, splits=splits[:1])[splits[0]].warnings


def test_splits_can_be_chosen(tmp_path):
    folder = lay_out(tmp_path, LAYOUTS["voc"][0])
    assert list(read_data(folder, splits=["test"])) == ["test"]
    with pytest.raises(InputError, match=r"split validation not found\. It has train, test"):
        read_data(folder, splits=["train", "validation"])
    with pytest.raises(InputError, match="split validation not found"):
        read_data(folder, splits=["validation"])
    with pytest.raises(InputError, match=r"unknown splits: val\. Choose from train, validation, test"):
        read_data(folder, splits=["val"])


def test_voc_counts_pixels_from_one_and_difficult_objects_are_crowds(tmp_path):
    draw(tmp_path / "1.png")
    write(tmp_path / "1.xml", voc_xml((40, 60), [("cell", [0, 0, 60, 40])], difficult="1"))
    (image,) = read_data(tmp_path)["train"].images
    assert "<xmin>1</xmin>" in (tmp_path / "1.xml").read_text()
    assert (image.boxes.tolist(), image.iscrowd.tolist()) == ([[0, 0, 60, 40]], [1])


def test_voc_lists_may_contain_names_with_spaces_and_images_without_annotation_files(tmp_path):
    files = {
        "ImageSets/Main/train.txt": "a b\n2\n",
        "Annotations/a b.xml": XML,
        "JPEGImages/a b.png": None,
        "JPEGImages/2.png": None,
    }
    data = read_data(lay_out(tmp_path, files))["train"]
    assert [(image.path.name, len(image.boxes)) for image in data.images] == [("a b.png", 1), ("2.png", 0)]
    assert data.warnings == {
        "images have no annotation file: treated as images without objects": [str(tmp_path / "JPEGImages" / "2.png")]
    }


def test_voc_classes_have_one_number_in_all_splits(tmp_path):
    for split, names in (("train", "zebra ant"), ("val", "bee zebra")):
        draw(tmp_path / split / "1.png")
        write(tmp_path / split / "1.xml", voc_xml((40, 60), [(name, [1, 2, 3, 4]) for name in names.split()]))
    data = read_data(tmp_path)
    assert data["train"].categories == data["validation"].categories == {1: "ant", 2: "bee", 3: "zebra"}
    assert [each.images[0].category_ids.tolist() for each in data.values()] == [[3, 1], [2, 3]]


def test_size_is_read_from_the_image_if_the_xml_does_not_have_it(tmp_path):
    draw(tmp_path / "1.png", (30, 50))
    write(tmp_path / "1.xml", voc_xml((0, 0), [("cell", [1, 2, 3, 4])]))
    (image,) = read_data(tmp_path)["train"].images
    assert (image.height, image.width) == (30, 50)


def test_polygons_and_keypoints_of_yolo_become_boxes(tmp_path):
    lines = "0 0.1 0.1 0.5 0.1 0.5 0.5\n1 0.5 0.5 0.2 0.2 0.4 0.4 2\n"
    files = {
        "data.yaml": "names: [a, b]\ntrain: images\nkpt_shape: [1, 3]\n",
        "images/1.png": None,
        "labels/1.txt": lines,
    }
    (image,) = read_data(lay_out(tmp_path, files))["train"].images
    assert image.boxes == pytest.approx(np.array([[6, 4, 24, 16], [24, 16, 12, 8]]), abs=1e-3)


def test_yolo_classes_without_names_are_their_numbers(tmp_path):
    lay_out(tmp_path, {"images/1.png": None, "labels/1.txt": LINES + LINES.replace("0 ", "12 ", 1)})
    assert read_data(tmp_path)["train"].categories == {0: "0", 12: "12"}


BOXES = [[1, 2, 30, 20], [5, 5, 0, 5], [70, 5, 9, 9], [-10, 30, 20, 20]]
WARNINGS = {
    "boxes have no width or no height: dropped": 1,
    "boxes lie outside their image: dropped": 1,
    "boxes extend beyond their image: clipped for training": 1,
}
NOT_NUMBERS = {"boxes are not four finite numbers: dropped": 1}
BAD_BOXES = {
    "coco": (
        {
            "train.json": json.dumps(
                json.loads(coco_text("1.png"))
                | {"annotations": [{"image_id": 0, "category_id": 1, "bbox": box} for box in [*BOXES, [1, 2, "x", 4]]]}
            ),
            "train/1.png": None,
        },
        WARNINGS | NOT_NUMBERS,
    ),
    "voc": (
        {
            "1.png": None,
            "1.xml": voc_xml((40, 60), [("cell", box) for box in [BOXES[0], *BOXES[2:], [1, 2, 3, float("nan")]]]),
        },
        {what: 1 for what in (*WARNINGS, *NOT_NUMBERS) if "no width" not in what},
    ),
    "yolo": (
        {
            "images/1.png": None,
            "labels/1.txt": yolo_lines((40, 60), [(0, box) for box in BOXES]) + "0 0.5 0.5 -0.1 0.2\n",
            "classes.txt": "cell",
        },
        WARNINGS | NOT_NUMBERS,
    ),
    "datasets": (
        {
            "1.png": None,
            "metadata.jsonl": json.dumps(
                {"file_name": "1.png", "objects": {"bbox": [*BOXES, [1, 2, 3]], "categories": ["cell"] * 5}}
            ),
        },
        WARNINGS | NOT_NUMBERS,
    ),
}


@pytest.mark.parametrize("name", BAD_BOXES)
def test_invalid_boxes_are_treated_alike_in_every_format(tmp_path, caplog, name):
    files, warnings = BAD_BOXES[name]
    with caplog.at_level(logging.WARNING, logger="hf_dino"):
        data = read_data(lay_out(tmp_path, files))["train"]
    (image,) = data.images
    assert image.boxes == pytest.approx(np.array([BOXES[0], BOXES[3]]), abs=1e-3)
    assert {what: len(images) for what, images in data.warnings.items()} == warnings
    assert all(f"{count} {what}" in caplog.text for what, count in warnings.items())


NOT_READABLE = {
    "nothing known": (
        {"notes.txt": "?"},
        r"not in a known format\. It contains notes\.txt\nLooked for datasets: [^\n]*; YOLO: [^\n]*$",
    ),
    "two files for a split": (
        {"train.json": coco_text("1.png"), "train_v2.json": coco_text("1.png"), "1.png": None},
        r"the train split may be .*train\.json or .*train_v2\.json",
    ),
    "yaml": ({"data.yaml": "names: [a"}, r"data\.yaml: cannot be read as YAML"),
    "yaml without classes": (
        {"data.yaml": "names: 3\ntrain: images"},
        "names must be a list or a mapping from class numbers, got 3",
    ),
    "yaml of empty folders": (
        {"data.yaml": YAML + "train: gone\nval: gone2\n"},
        r"directories not found: gone, gone2",
    ),
    "a class without a name": (
        {"images/1.png": None, "labels/1.txt": LINES.replace("0 ", "4 ", 1), "classes.txt": "cell"},
        r"labels use classes without a name: 4 in .*1\.txt\. The names are \{0: 'cell'\}",
    ),
    "a label without an image": (
        {"images/1.png": None, "labels/1.txt": LINES, "labels/2.txt": LINES},
        r"2\.jpg: image file not found",
    ),
    "voc without an image": (
        {"1.png": None, "1.xml": XML, "2.xml": XML},
        r"1 image not found in .*: 2\.jpg\. Restore them, or remove them",
    ),
    "broken xml": ({"1.png": None, "1.xml": XML[:-9]}, r"1\.xml: cannot be read as XML \(unclosed token"),
    "voc without objects": ({"1.png": None, "1.xml": voc_xml((40, 60), [])}, "no annotation file contains an object"),
    "no json": ({"train.json": "[", "train/1.png": None}, r"train\.json: is not valid JSON"),
    "datasets without boxes": (
        {"metadata.jsonl": '{"file_name": "1.png", "objects": {"x": [1]}}', "1.png": None},
        r"the objects of an image need boxes \(bbox, .*; got image: Image, objects: \{x: list of int64\}\.",
    ),
    "datasets without images": (
        {"metadata.jsonl": '{"file_name": "gone.png", "objects": {"bbox": []}}'},
        r"1 image not found: .*gone\.png \(row 0\)\. Restore them, or remove their rows",
    ),
}


@pytest.mark.parametrize("name", NOT_READABLE)
def test_one_clear_error(tmp_path, name):
    files, message = NOT_READABLE[name]
    folder = lay_out(tmp_path / "data", files)
    with pytest.raises(InputError, match="(?s)" + message):
        read_data(folder)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("voc", "ImageSets/Main/trainval.txt"),
        ("yolo", "data.yaml"),
        ("yolo with a list of images", "train.txt"),
        ("yolo without yaml", "classes.txt"),
        ("yolo without yaml", "labels/1.txt"),
    ],
)
def test_a_file_in_another_encoding_is_named(tmp_path, layout, name, encoding):
    folder = lay_out(tmp_path, LAYOUTS[layout][0])
    (folder / name).write_bytes("é".encode(encoding))
    with pytest.raises(InputError, match=rf"{name}: is not in UTF-8 \(.*\); save it again"):
        read_data(folder)


def test_a_file_of_another_format_may_be_in_any_encoding(tmp_path):
    folder = lay_out(tmp_path, LAYOUTS["one coco file"][0])
    for name in ("classes.txt", "settings.yaml"):
        (folder / name).write_bytes("é".encode("utf-16"))
    assert list(read_data(folder)) == ["train"]


def test_neither_a_folder_nor_an_id_on_the_hub(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="directory not found, and not an id on the Hub"):
        read_data(tmp_path / "gone")
    with pytest.raises(InputError, match="directory not found, and not an id on the Hub"):
        read_data("a/b/c")

    (tmp_path / "mine" / "cells").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=r"directory not found; mine contains cells. For the Hub's mine/cell, write mine/cell@main"
    ):
        read_data("mine/cell")

    def fail(**options):
        raise FileNotFoundError(f"no dataset {options}")

    monkeypatch.setattr(hf_datasets.import_datasets(), "load_dataset", fail)
    asked = "{'path': 'owner/name', 'name': 'mini', 'revision': 'v1'}"
    with pytest.raises(
        InputError,
        match=f"owner/name:mini@v1: is not a local directory, and `datasets` cannot load it .no dataset {asked}",
    ):
        read_data("owner/name:mini@v1")
    with pytest.raises(InputError, match="mine/cell@main: is not a local directory, and `datasets` cannot load it"):
        read_data("mine/cell@main")


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match=r"needs datasets: pip install 'hf-dino\[hub-data\]'"):
        read_data(lay_out(tmp_path, LAYOUTS["datasets"][0]))


@pytest.fixture
def folder(shapes, tmp_path):
    as_imagefolder(shapes, tmp_path / "images")
    return tmp_path / "images"


@pytest.fixture
def fetched(monkeypatch):
    """Record the images that are read from outside of tables."""
    fetched, read_bytes = [], hf_datasets.read_bytes

    def read_and_record(image):
        if image["bytes"] is None:
            fetched.append(image["path"])
        return read_bytes(image)

    monkeypatch.setattr(hf_datasets, "read_bytes", read_and_record)
    return fetched


def test_a_stream_gives_the_same_data_and_is_fetched_once(shapes, folder, tmp_path, fetched):
    cache = tmp_path / "stream"
    data = read_data(folder, streaming=True, cache_dir=cache)
    assert len(fetched) == 10
    assert {split: contents(each) for split, each in data.items()} == {
        split: contents(each) for split, each in read_data(shapes).items()
    }
    assert data["train"].images[0].path.file_name == "000001.png"
    fetched.clear()
    read_data(folder, streaming=True, cache_dir=cache)
    assert fetched == []
    assert cache.is_dir()
    read_data(folder, streaming=True, splits=["test"])
    assert len(fetched) == 2, "in the default cache of `datasets`"
    assert list((tmp_path / "cache").rglob("*.arrow"))


def test_a_stream_can_be_limited(shapes, folder, tmp_path, fetched):
    expected = contents(read_data(shapes)["train"])
    for max_samples in (2, 4, None):
        fetched.clear()
        data = read_data(
            folder, streaming=True, splits=["train"], cache_dir=tmp_path / "stream", max_samples=max_samples
        )
        assert len(fetched) == len(expected[:max_samples])
        assert contents(data["train"]) == expected[:max_samples]


def test_a_changed_dataset_is_streamed_again(folder, tmp_path):
    options = {"streaming": True, "cache_dir": tmp_path / "stream", "max_samples": 1, "splits": ["train"]}
    assert "disc" not in read_data(folder, **options)["train"].categories.values()
    metadata = folder / "train" / "metadata.jsonl"
    metadata.write_text(
        metadata.read_text().replace("circle", "disc").replace("square", "disc").replace("star", "disc")
    )
    metadata.write_text(metadata.read_text().replace("triangle", "disc").replace("cross", "disc"))
    assert set(read_data(folder, **options)["train"].categories.values()) == {"disc"}


def test_a_stream_that_breaks_off_names_the_cause_and_can_be_repeated(shapes, folder, tmp_path, monkeypatch):
    read_bytes = hf_datasets.read_bytes

    def break_off(image):
        if image["path"].endswith("4.png"):
            raise ConnectionError("the network is down")
        return read_bytes(image)

    monkeypatch.setattr(hf_datasets, "read_bytes", break_off)
    options = {"streaming": True, "splits": ["train"], "cache_dir": tmp_path / "stream"}
    with pytest.raises(InputError, match=r"`datasets` cannot load it \(the network is down\)"):
        read_data(folder, **options)
    monkeypatch.setattr(hf_datasets, "read_bytes", read_bytes)
    assert contents(read_data(folder, **options)["train"]) == contents(read_data(shapes)["train"])


def test_a_stream_is_checked_like_any_other_dataset(folder, tmp_path, capsys):
    stream = ["--streaming", "--max_samples=2", "--cache_dir", tmp_path / "stream"]
    assert hf_dino(["data", "check", folder, *stream]) == 0
    assert "train: 1 of 2 images have no objects" in capsys.readouterr().out


@pytest.mark.parametrize("option", [{"max_samples": 3}, {"cache_dir": "c"}])
def test_options_of_a_stream_require_streaming(shapes, option):
    with pytest.raises(InputError, match="max_samples and cache_dir require streaming"):
        read_data(shapes, **option)


@pytest.mark.parametrize("form", ["torch", "numpy", "pandas"])
def test_a_saved_table_may_have_a_format(tmp_path, form):
    files: dict = dict.fromkeys(("a.png", "b.png"))
    rows = [
        {"file_name": name, "image_id": number, "objects": {"bbox": [[1, 2, 3, number]], "categories": [number]}}
        for name, number in zip(files, (9, 4))
    ]
    files["metadata.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows)
    loaded = datasets.load_dataset(str(lay_out(tmp_path / "data", files)))
    loaded.set_format(form)
    loaded.save_to_disk(str(tmp_path / "saved"))
    expected = read_data(tmp_path / "data")
    data = read_data(tmp_path / "saved")
    assert contents(data["train"]) == contents(expected["train"])
    assert [image.image_id for image in data["train"].images] == [9, 4]


@pytest.mark.parametrize("form", ["voc", "datasets"])
def test_category_ids_do_not_depend_on_the_splits_that_are_read(tmp_path, form):
    for split, name in (("train", "zebra"), ("val", "bee"), ("test", "ant")):
        draw(tmp_path / "data" / split / "1.png")
        row = {"file_name": "1.png", "objects": {"bbox": [[1, 2, 3, 4]], "categories": [name]}}
        if form == "voc":
            write(tmp_path / "data" / split / "1.xml", voc_xml((40, 60), [(name, [1, 2, 3, 4])]))
        else:
            write(tmp_path / "data" / split / "metadata.jsonl", json.dumps(row) + "\n")
    whole = read_data(tmp_path / "data")
    for split, expected in whole.items():
        (alone,) = read_data(tmp_path / "data", splits=[split]).values()
        assert alone.categories == expected.categories
        assert contents(alone) == contents(expected)


def test_a_split_that_is_not_read_may_have_no_annotations(tmp_path):
    draw(tmp_path / "data" / "val" / "1.png")
    objects = {"bbox": [[1, 2, 3, 4]], "categories": ["cell"]}
    write(
        tmp_path / "data" / "val" / "metadata.jsonl",
        json.dumps({"file_name": "1.png", "image_id": 1, "objects": objects}),
    )
    loaded = datasets.load_dataset(str(tmp_path / "data"), split="validation")
    test = loaded.remove_columns("objects")
    datasets.DatasetDict(validation=loaded, test=test).save_to_disk(str(tmp_path / "saved"))
    (data,) = read_data(tmp_path / "saved", splits=["validation"]).values()
    assert data.categories == {0: "cell"}
