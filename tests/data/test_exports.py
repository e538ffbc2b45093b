"""What annotation tools export, laid out as they do: the table "Exports" of docs/data.md, row by row."""

import json
import warnings

import numpy as np
import pytest

from helpers.data_formats import draw, write, yolo_lines
from helpers.paths import ROOT
from hf_dino.data import InputError, check_data, read_data


SIZE = (40, 60)  # of every image (height, width)
BOX, OTHER = [1, 2, 30, 20], [10, 15, 50, 25]  # the other one ends at the lower right corner of the image
LINES = yolo_lines(SIZE, [(0, BOX), (1, OTHER)])
README = {"README.dataset.txt": "# cells > 2026-01-01\n", "README.roboflow.txt": "cells - v1\n"}
NAME = "1_png.rf.5b1d7ac2"  # as Roboflow renames an image


def coco(file_name, categories, **more):
    """Return a COCO file with both boxes in one image; more fields are those of each annotation."""
    first, second = (each["id"] for each in categories if each["name"] in ("cell", "virus"))
    annotations = [
        {"id": number, "image_id": 1, "category_id": id_, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        | {"segmentation": []}
        | more
        for number, (id_, box) in enumerate(((first, BOX), (second, OTHER)), start=1)
    ]
    images = [{"id": 1, "file_name": file_name, "height": SIZE[0], "width": SIZE[1]}]
    return {"info": {}, "licenses": [], "categories": categories, "images": images, "annotations": annotations}


def xml(file_name, header, first, second, attributes=""):
    """Return a VOC file as tools write it, given the corners of both boxes."""
    objects = "".join(
        f"<object><name>{name}</name><pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult>"
        f"<bndbox><xmin>{box[0]}</xmin><xmax>{box[2]}</xmax><ymin>{box[1]}</ymin><ymax>{box[3]}</ymax></bndbox>"
        f"{attributes}</object>"
        for name, box in (("cell", first), ("virus", second))
    )
    return (
        f"<annotation><folder></folder><filename>{file_name}</filename>{header}<size><width>{SIZE[1]}</width>"
        f"<height>{SIZE[0]}</height><depth>3</depth></size><segmented>0</segmented>{objects}</annotation>"
    )


def splits(**names):
    """Return the files of two splits, each of whose names and contents are made from that of the split."""
    return lambda make: {path: content for split in names for path, content in make(names[split], split).items()}


CATEGORIES = [{"id": 1, "name": "cell", "supercategory": ""}, {"id": 2, "name": "virus", "supercategory": ""}]
OF_ROBOFLOW = [{"id": 0, "name": "cells", "supercategory": "none"}] + [
    each | {"supercategory": "cells"} for each in CATEGORIES
]
ROBOFLOW_VOC = "<path>{0}</path><source><database>roboflow.com</database></source>"
CVAT_VOC = "<source><database>Unknown</database><annotation>Unknown</annotation><image>Unknown</image></source>"
CVAT_ROTATION = "<attributes><attribute><name>rotation</name><value>{0}</value></attribute></attributes>"
LABEL_STUDIO_VOC = (
    "<source><database>MyDatabase</database><annotation>COCO2017</annotation><image>flickr</image></source>"
    "<owner><flickrid>NULL</flickrid><name>Label Studio</name></owner>"
)
CVAT_YOLO = {
    "obj.data": "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n",
    "obj.names": "cell\nvirus\n",
    "train.txt": "data/obj_train_data/1.png\n",
    "obj_train_data/1.png": None,
    "obj_train_data/1.txt": LINES,
}
FROM_ZERO = ((1.0, 2.0, 31.0, 22.0), (10.0, 15.0, 60.0, 40.0))
DATUMARO = {
    "info": {},
    "categories": {"label": {"labels": [{"name": "cell", "parent": "", "attributes": []}], "attributes": []}},
    "items": [{"id": "1", "annotations": [], "attr": {"frame": 0}, "image": {"path": "1.png", "size": SIZE}}],
}
LABELME = {
    "version": "5.4.1",
    "flags": {},
    "shapes": [
        {"label": name, "points": points, "group_id": None, "shape_type": "rectangle", "flags": {}}
        for name, points in (("cell", [[1, 2], [31, 22]]), ("virus", [[60, 40], [10, 15]]))
    ],
    "imagePath": "1.png",
    "imageData": None,
    "imageHeight": SIZE[0],
    "imageWidth": SIZE[1],
}

# tool and format: the files, the splits, and what is said: warnings, or an error if there are no splits
EXPORTS = {
    ("Roboflow", "COCO"): (
        README
        | splits(train="train", validation="valid")(
            lambda folder, _: {
                f"{folder}/_annotations.coco.json": coco(f"{NAME}.png", OF_ROBOFLOW),
                f"{folder}/{NAME}.png": None,
            }
        ),
        ["train", "validation"],
        ["categories without objects that others name as their supercategory: left out"],
    ),
    ("Roboflow", "YOLO"): (
        README
        | {
            "data.yaml": "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 2\n"
            "names: ['cell', 'virus']\n\nroboflow:\n  workspace: me\n  project: cells\n  version: 1\n"
        }
        | splits(train="train", validation="valid")(
            lambda folder, _: {f"{folder}/images/{NAME}.png": None, f"{folder}/labels/{NAME}.txt": LINES}
        ),
        ["train", "validation"],
        [],
    ),
    ("Roboflow", "Pascal VOC"): (
        README
        | splits(train="train", validation="valid")(
            lambda folder, _: {
                f"{folder}/{NAME}.png": None,
                f"{folder}/{NAME}.xml": xml(
                    f"{NAME}.png", ROBOFLOW_VOC.format(f"{NAME}.png"), (2, 3, 32, 23), (11, 16, 61, 41)
                ),
            }
        ),
        ["train", "validation"],
        ["boxes have edges counted from 1"],
    ),
    ("CVAT", "COCO"): (
        {
            "annotations/instances_default.json": coco(
                "1.png", CATEGORIES, attributes={"occluded": False, "rotation": 0.0}
            ),
            "images/default/1.png": None,
        },
        ["train"],
        [],
    ),
    ("CVAT", "Pascal VOC"): (
        {
            "Annotations/1.xml": xml("1.png", CVAT_VOC, *FROM_ZERO),
            "ImageSets/Main/default.txt": "1\n",
            "JPEGImages/1.png": None,
            "labelmap.txt": "# label:color_rgb:parts:actions\ncell:1,2,3::\nvirus:4,5,6::\n",
        },
        ["train"],
        ["images are in no split, as Main has no train.txt", "boxes count pixels from 0, as CVAT writes them"],
    ),
    ("CVAT", "YOLO 1.1"): (CVAT_YOLO, ["train"], []),
    ("CVAT", "Ultralytics YOLO Detection"): (
        {
            "data.yaml": "names:\n  0: cell\n  1: virus\npath: .\ntrain: train.txt\n",
            "train.txt": "data/images/train/1.png\n",
            "images/train/1.png": None,
            "labels/train/1.txt": LINES,
        },
        ["train"],
        [],
    ),
    ("CVAT", "Datumaro"): (
        {"annotations/default.json": DATUMARO, "images/default/1.png": None},
        [],
        r"contains Datumaro .*, which is not read\. In CVAT, export as COCO 1\.0",
    ),
    ("CVAT", "CVAT for images"): (
        {"annotations.xml": "<annotations>\n<version>1.1</version></annotations>", "images/1.png": None},
        [],
        r"contains CVAT XML .*, which is not read\. In CVAT, export as COCO 1\.0",
    ),
    ("Label Studio", "COCO"): (
        {
            "result.json": coco("images\\1d7d4d71-1.png", [{"id": 0, "name": "cell"}, {"id": 1, "name": "virus"}]),
            "images/1d7d4d71-1.png": None,
        },
        ["train"],
        ["image file names are those of another machine"],
    ),
    ("Label Studio", "YOLO"): (
        {
            "classes.txt": "cell\nvirus\n",
            "notes.json": {"categories": [{"id": 0, "name": "cell"}], "info": {"contributor": "Label Studio"}},
            "images/1d7d4d71-1.png": None,
            "labels/1d7d4d71-1.txt": LINES,
        },
        ["train"],
        [],
    ),
    ("Label Studio", "Pascal VOC"): (
        {
            "Annotations/1d7d4d71-1.xml": xml("1d7d4d71-1.png", LABEL_STUDIO_VOC, (1, 2, 31, 22), (10, 15, 60, 40)),
            "images/1d7d4d71-1.png": None,
        },
        ["train"],
        ["boxes count pixels from 0, as Label Studio writes them"],
    ),
    ("Label Studio", "JSON"): (
        {"project-1-at-2026-01-01.json": [{"id": 1, "annotations": [{"completed_by": 1, "result": []}], "data": {}}]},
        [],
        "contains Label Studio's own format .*, which is not read. In Label Studio, export as COCO",
    ),
    ("LabelImg", "Pascal VOC"): (
        {
            "1.png": None,
            "1.xml": xml("1.png", "<source><database>Unknown</database></source>", (2, 3, 31, 22), (11, 16, 60, 40)),
        },
        ["train"],
        [],
    ),
    ("LabelImg", "YOLO"): ({"1.png": None, "1.txt": LINES, "classes.txt": "cell\nvirus\n"}, ["train"], []),
    ("LabelMe", "JSON"): (
        {"1.png": None, "1.json": LABELME},
        ["train"],
        [],
    ),
    ("FiftyOne", "COCODetectionDataset"): (
        {"labels.json": coco("1.png", CATEGORIES), "data/1.png": None},
        ["train"],
        [],
    ),
    ("FiftyOne", "YOLOv5Dataset"): (
        {
            "dataset.yaml": "names:\n  0: cell\n  1: virus\npath: /home/me/cells\ntrain: ./images/train/\n"
            "validation: ./images/validation/\n",
            "images/train/1.png": None,
            "labels/train/1.txt": LINES,
            "images/validation/2.png": None,
            "labels/validation/2.txt": LINES,
        },
        ["train", "validation"],
        [],
    ),
    ("FiftyOne", "FiftyOneDataset"): (
        {"metadata.json": {}, "samples.json": {"samples": [{"filepath": "data/1.png"}]}, "data/1.png": None},
        [],
        "contains FiftyOne's own format .*, which is not read. Export it with .*COCODetectionDataset",
    ),
}


def lay_out(folder, files):
    """Write text, JSON, or an image for each name without content."""
    for seed, (name, content) in enumerate(files.items()):
        if content is None:
            draw(folder / name, SIZE, seed=seed)
        else:
            write(folder / name, content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize(("tool", "form"), EXPORTS)
def test_exports(tmp_path, tool, form):
    files, splits, said = EXPORTS[tool, form]
    folder = lay_out(tmp_path / "cells", files)
    if not splits:
        with pytest.raises(InputError, match=said):
            read_data(folder)
        return
    data = read_data(folder)
    assert list(data) == splits
    for each in data.values():
        (image,) = each.images
        assert [each.categories[id_] for id_ in image.category_ids] == ["cell", "virus"] == [*each.categories.values()]
        assert image.boxes == pytest.approx(np.array([BOX, OTHER]), abs=1e-3)
        assert sorted(map(bool, said)) == sorted(any(part in warning for warning in each.warnings) for part in said)
        assert len(each.warnings) == len(said)
    assert not check_data(data).errors


@pytest.mark.parametrize("form", ["COCO", "YOLO", "Pascal VOC"])
def test_exports_of_supervision(tmp_path, form):
    supervision = pytest.importorskip("supervision")
    images, labels = tmp_path / "images", tmp_path / "labels"
    draw(images / "1.png", SIZE)
    corners = np.array([[1, 2, 31, 22], [10, 15, 60, 40]], dtype=np.float32)
    detections = {str(images / "1.png"): supervision.Detections(xyxy=corners, class_id=np.array([0, 1]))}
    dataset = supervision.DetectionDataset(["cell", "virus"], [*detections], detections)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        {
            "COCO": lambda: dataset.as_coco(annotations_path=str(tmp_path / "labels.json")),
            "YOLO": lambda: dataset.as_yolo(
                annotations_directory_path=str(labels), data_yaml_path=str(tmp_path / "data.yaml")
            ),
            "Pascal VOC": lambda: dataset.as_pascal_voc(annotations_directory_path=str(tmp_path / "annotations")),
        }[form]()
    data = read_data(tmp_path)["train"]
    assert [*data.categories.values()] == ["cell", "virus"]
    assert data.images[0].boxes == pytest.approx(np.array([BOX, OTHER]), abs=1e-3)
    assert (data.format, dict(data.warnings)) == (form, {})


@pytest.mark.parametrize("form", ["COCO", "Pascal VOC"])
def test_rotated_boxes_of_cvat(tmp_path, form):
    files = {
        "COCO": {
            "annotations/instances_default.json": coco("1.png", CATEGORIES, attributes={"rotation": 90.0}),
            "images/default/1.png": None,
        },
        "Pascal VOC": {
            "Annotations/1.xml": xml("1.png", CVAT_VOC, *FROM_ZERO, CVAT_ROTATION.format(90.0)),
            "JPEGImages/1.png": None,
        },
    }[form]
    data = read_data(lay_out(tmp_path, files))["train"]
    assert data.images[0].boxes[0] == pytest.approx(np.array([6, -3, 20, 30]), abs=1e-3)
    assert len(data.warnings["boxes are rotated: replaced by the upright boxes around them"]) == 2


def test_the_documentation_lists_every_export():
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    table = text.partition("## Exports")[2].partition("\n## ")[0]
    rows = {
        tuple(cell.strip() for cell in line.split("|")[1:3]) for line in table.splitlines() if line.startswith("|")
    }
    listed = {(tool, form) for tool, forms in rows for form in forms.split(", ")}
    of_supervision = {("supervision", form) for form in ("COCO", "YOLO", "Pascal VOC")}
    assert {*EXPORTS} | of_supervision == listed - {("tool", "format"), ("---", "---")}
