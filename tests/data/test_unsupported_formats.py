"""Formats that are not read are named in one line with the way to one that is; so are paths that are not datasets."""

import json
import logging
import zipfile

import pytest

from helpers.data_formats import coco_text, draw, voc_xml, write, yolo_lines
from hf_dino.data import InputError, read_data
from hf_dino.data.readers.annotation_tools import UNSUPPORTED_FORMATS
from hf_dino.data.readers.formats import FORMATS


DATUMARO = {
    "info": {},
    "categories": {"label": {"labels": [{"name": "cell", "parent": "", "attributes": []}], "attributes": []}},
    "items": [{"id": "1", "annotations": [{"id": 0, "type": "bbox", "label_id": 0, "bbox": [1, 2, 30, 20]}]}],
}
CVAT = (
    '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n  <version>1.1</version>\n  <image id="0" name="1.png" '
    'width="60" height="40"><box label="cell" xtl="1" ytl="2" xbr="31" ybr="22"/></image>\n</annotations>\n'
)
LABELME_XML = (
    "<annotation><filename>1.png</filename><folder/><object><name>cell</name><deleted>0</deleted><polygon><pt><x>1</x>"
    "<y>2</y></pt><pt><x>31</x><y>2</y></pt></polygon></object></annotation>"
)
RESULT = {"x": 1, "y": 2, "width": 50, "height": 50, "rotation": 0, "rectanglelabels": ["cell"]}
LABEL_STUDIO = [
    {
        "id": 1,
        "annotations": [{"id": 1, "completed_by": 1, "result": [{"value": RESULT, "type": "rectanglelabels"}]}],
        "data": {"image": "/data/upload/1/1d7d4d71-1.png"},
    }
]
VIA = {"_via_settings": {}, "_via_img_metadata": {"1.png99": {"filename": "1.png", "regions": []}}}
VIA_ANNOTATIONS = {
    "1.png99": {"filename": "1.png", "size": 99, "regions": [{"shape_attributes": {"name": "rect", "x": 1}}]}
}
CREATEML = [
    {
        "image": "1.png",
        "annotations": [{"label": "cell", "coordinates": {"x": 16, "y": 12, "width": 30, "height": 20}}],
    }
]
SUPERVISELY = {
    "description": "",
    "size": {"height": 40, "width": 60},
    "objects": [{"classTitle": "cell", "geometryType": "rectangle", "points": {"exterior": [[1, 2], [31, 22]]}}],
}
FIFTYONE = {"samples": [{"_id": {"$oid": "6"}, "filepath": "data/1.png", "ground_truth": {"detections": []}}]}
KITTI = "Pedestrian 0.00 0 -0.20 712.40 143.00 810.73 307.92 1.89 0.48 1.20 1.84 1.47 8.41 0.01\n"
OPEN_IMAGES = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded\n1,xclick,/m/01,1,0.1,0.5,0.1,0.5,0\n"
)
DARWIN = {"version": "2.0", "schema_ref": "https://darwin-public.s3.amazonaws.com/darwin_json/2.0/schema.json"}
XMLS = {"annotations.xml": CVAT, "images/1.png": None}

# files, the name of the format and part of the advice
EXPORTS = {
    "FiftyOne": (
        {"samples.json": FIFTYONE, "metadata.json": {"name": "a"}, "data/1.png": None},
        "FiftyOne",
        "COCODetectionDataset",
    ),
    "Datumaro": (
        {"annotations/default.json": DATUMARO, "images/default/1.png": None},
        "Datumaro",
        "export as COCO 1.0",
    ),
    "Datumaro in splits": ({f"annotations/{s}.json": DATUMARO for s in ("train", "val")}, "Datumaro", "datum convert"),
    "CVAT for images": (XMLS, "CVAT XML", "export as COCO 1.0, Pascal VOC 1.1"),
    "CVAT's LabelMe": ({"default/1.xml": LABELME_XML, "default/1.png": None}, "LabelMe XML", "export as COCO 1.0"),
    "Label Studio": ({"project-1.json": LABEL_STUDIO, "images/1.png": None}, "Label Studio", "export as COCO, YOLO"),
    "Label Studio's JSON_MIN": (
        {"1.json": [{"image": "/data/1.png", "id": 1, "label": [RESULT]}]},
        "Label Studio",
        "Pascal VOC XML",
    ),
    "VIA project": ({"via_project.json": VIA, "1.png": None}, "VIA", "Export Annotations .COCO format"),
    "VIA annotations": ({"via.json": VIA_ANNOTATIONS}, "VIA", "COCO format"),
    "VIA table": (
        {"via.csv": "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes\n"},
        "VIA",
        "COCO",
    ),
    "CreateML": (
        {"train/_annotations.createml.json": CREATEML, "train/1.png": None},
        "CreateML",
        "export as COCO JSON",
    ),
    "Supervisely": (
        {"meta.json": {"classes": []}, "ds0/ann/1.png.json": SUPERVISELY, "ds0/img/1.png": None},
        "Supervisely",
        "Export to COCO",
    ),
    "TFRecord": (
        {"train/cells.tfrecord": "\x0a", "train/cells_label_map.pbtxt": "item {}"},
        "TFRecord",
        "Export as COCO",
    ),
    "Open Images": ({"train-annotations-bbox.csv": OPEN_IMAGES, "train/1.png": None}, "Open Images", "open-images-v7"),
    "Roboflow's table": (
        {"train/_annotations.csv": "filename,width,height,class,xmin,ymin,xmax,ymax\n"},
        "a table of boxes",
        "metadata.jsonl",
    ),
    "KITTI": ({"training/label_2/1.txt": KITTI, "training/image_2/1.png": None}, "KITTI", "datum convert -if kitti"),
    "KITTI as CVAT lays it out": ({"images/1.png": None, "labels/1.txt": KITTI}, "KITTI", "datum convert -if kitti"),
    "WIDER FACE": (
        {"wider_face_split/wider_face_train_bbx_gt.txt": "a/1.jpg\n1\n1 2 3 4\n"},
        "WIDER FACE",
        "datum convert",
    ),
    "DOTA": (
        {"labelTxt/1.txt": "gsd:0.1\n1.0 2.0 9.0 2.0 9.0 9.0 1.0 9.0 plane 0\n", "images/1.png": None},
        "DOTA",
        "YOLO OBB",
    ),
    "Roboflow's YOLOv4": (
        {"train/_annotations.txt": "1.jpg 1,2,31,22,0\n", "train/1.png": None},
        "YOLOv4",
        "export as YOLOv8",
    ),
    "VoTT": ({"vott-json-export/a.json": {"visitedFrames": [], "assets": {}}}, "VoTT", "export as Pascal VOC"),
    "V7": ({"a.json": DARWIN, "1.png": None}, "V7 Darwin", "export as COCO"),
    "Labelbox": ({"export.ndjson": {"data_row": {"id": "1"}}, "1.png": None}, "Labelbox", "labelbox package"),
}


def lay_out(folder, files):
    """Write text, JSON, or an image for each name without content."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if content is None:
            draw(folder / name)
        else:
            write(folder / name, content if isinstance(content, str) else json.dumps(content, indent=2))
    return folder


@pytest.mark.parametrize("name", EXPORTS)
def test_a_format_that_is_not_read_is_named(tmp_path, name):
    files, format_name, advice = EXPORTS[name]
    with pytest.raises(InputError, match=rf"(is|contains) {format_name}.*, which is not read.*{advice}") as caught:
        read_data(lay_out(tmp_path / "cells", files))
    assert "\n" not in str(caught.value)


def test_every_format_that_is_not_read_is_tested():
    named = {name for _, name, _ in EXPORTS.values()} | {"an archive"}
    assert not [format.name for format in UNSUPPORTED_FORMATS if not format.name.startswith(tuple(named))]


def test_all_formats_in_a_directory_are_named(tmp_path):
    files = EXPORTS["CVAT for images"][0] | EXPORTS["TFRecord"][0] | EXPORTS["Label Studio"][0]
    with pytest.raises(InputError, match=r"contains CVAT XML .*It also contains Label Studio's own format, TFRecord"):
        read_data(lay_out(tmp_path, files))


YOLO = {
    "data.yaml": "names: [cell]\ntrain: images\n",
    "images/1.png": None,
    "labels/1.txt": yolo_lines((40, 60), [(0, [1, 2, 30, 20])]),
}


@pytest.mark.parametrize("name", ["CVAT for images", "VIA project", "FiftyOne", "TFRecord", "Label Studio"])
def test_what_is_read_is_read_whatever_else_is_there(tmp_path, name):
    files = {key: content for key, content in EXPORTS[name][0].items() if content is not None}
    assert len(read_data(lay_out(tmp_path, YOLO | files))["train"].images[0].boxes) == 1


def test_other_formats_that_could_be_read_are_logged(tmp_path, caplog):
    files = YOLO | {
        "train.json": coco_text("1.png"),
        "annotations/1.xml": voc_xml((40, 60), [("cell", [1, 2, 30, 20])]),
    }
    with caplog.at_level(logging.WARNING, logger="hf_dino"):
        read_data(lay_out(tmp_path, files))
    assert "read as YOLO, although it is also COCO, Pascal VOC" in caplog.text


@pytest.mark.parametrize("inner", ["cells", "VOCdevkit/VOC2012"])
@pytest.mark.parametrize("form", ["yolo", "voc", "coco"])
def test_a_dataset_inside_the_directory_is_named(tmp_path, inner, form):
    files = {
        "yolo": YOLO,
        "coco": {"train.json": coco_text("1.png"), "train/1.png": None},
        "voc": {"Annotations/1.xml": voc_xml((40, 60), [("cell", [1, 2, 30, 20])]), "JPEGImages/1.png": None},
    }[form]
    lay_out(tmp_path / "data" / inner, files)
    name = {"yolo": "YOLO", "coco": "COCO", "voc": "Pascal VOC"}[form]
    with pytest.raises(InputError, match=rf"contains .*data/{inner} \({name}\)\. Give that directory"):
        read_data(tmp_path / "data")
    assert list(read_data(tmp_path / "data" / inner)) == ["train"]


def test_archives_are_to_be_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "cells.zip", "w") as archive:
        archive.writestr("train.json", coco_text("1.png"))
    with pytest.raises(InputError, match=r"cells\.zip: is an archive\. Unpack it, and give the directory"):
        read_data(tmp_path / "cells.zip")
    with pytest.raises(InputError, match=r"contains an archive \(cells\.zip\), which is not read\. Unpack it"):
        read_data(tmp_path)


def test_an_unknown_directory_is_described_in_few_lines(tmp_path):
    lay_out(tmp_path, {f"{number}.dat": "?" for number in range(30)})
    with pytest.raises(InputError) as caught:
        read_data(tmp_path)
    message = str(caught.value)
    assert message.count("\n") <= 2
    assert all(format.signature in message for format in FORMATS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="It contains nothing"):
        read_data(tmp_path / "empty")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_directory_is_not_taken_for_an_id_on_the_hub(tmp_path, monkeypatch, streaming):
    """Both possibilities are named, whether or not `datasets` is installed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(
        InputError, match=r"^nowhere: directory not found\. .*on the Hub, write OWNER/nowhere, or nowhere@main"
    ):
        read_data("nowhere", streaming=streaming)


def test_an_id_without_the_package_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match=r"^data/cells: directory not found, and as an id on the Hub, .*hub-data"):
        read_data("data/cells")
