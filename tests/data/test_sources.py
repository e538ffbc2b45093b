"""A dataset may be given as a file, and `check` says which files it read and which it did not."""

import json
import zipfile
from contextlib import nullcontext

import pytest

from helpers.command_line import hf_dino
from helpers.data_formats import FORMATS, coco_text, draw, voc_xml, write, write_shapes, yolo_lines
from hf_dino.data import InputError, ReadOptions, read_data


pytestmark = pytest.mark.usefixtures("datasets_cache")

XML, LINES = voc_xml((40, 60), [("cell", [1, 2, 30, 20])]), yolo_lines((40, 60), [(0, [1, 2, 30, 20])])
ROW = json.dumps({"file_name": "1.png", "objects": {"bbox": [[1, 2, 3, 4]], "category": ["cell"]}}) + "\n"
YAML = "names: [cell]\ntrain: images/train\nval: images/val\n"
YOLO = {
    "data.yaml": YAML,
    "images/train/1.png": None,
    "images/val/2.png": None,
    "labels/train/1.txt": LINES,
    "labels/val/2.txt": LINES,
}
COCO = {
    "train.json": coco_text("1.png"),
    "val.json": coco_text("2.png"),
    "train/1.png": None,
    "val/2.png": None,
}


def lay_out(folder, files):
    for seed, (name, text) in enumerate(files.items()):
        draw(folder / name, seed=seed) if text is None else write(folder / name, text)
    return folder


def names(splits):
    return {split: [image.path.name for image in data.images] for split, data in splits.items()}


@pytest.mark.parametrize("name", ["data.yaml", "other.yml"])
def test_the_yaml_file_of_a_yolo_dataset(tmp_path, name):
    folder = lay_out(tmp_path / "cells", YOLO)
    write(folder / "other.yml", YAML.replace("images/train", "images/val").replace("\nval: images/val", ""))
    splits = read_data(str(folder / name))
    assert splits["train"].name == "cells"
    assert splits["train"].format == "YOLO"
    expected = {"train": ["1.png"], "validation": ["2.png"]} if name == "data.yaml" else {"train": ["2.png"]}
    assert names(splits) == expected


@pytest.mark.parametrize(
    ("files", "file", "split", "image"),
    [
        (COCO, "train.json", "train", "1.png"),
        (COCO, "val.json", "validation", "2.png"),
        ({"export.json": coco_text("1.png"), "1.png": None}, "export.json", "train", "1.png"),
        ({"annotations/instances_default.json": coco_text("1.png"), "images/1.png": None},
         "annotations/instances_default.json", "train", "1.png"),
        ({"annotations/instances_val2017.json": coco_text("1.png"), "train2017/1.png": None, "val2017/1.png": None},
         "annotations/instances_val2017.json", "validation", "1.png"),
        ({"test/_annotations.coco.json": coco_text("1.png"), "test/1.png": None},
         "test/_annotations.coco.json", "test", "1.png"),
    ],
)  # fmt: skip
def test_a_coco_file_finds_the_images_beside_it(tmp_path, files, file, split, image):
    folder = lay_out(tmp_path / "cells", files)
    (found,) = read_data(folder / file).items()
    assert (found[0], found[1].format) == (split, "COCO")
    assert [each.path.name for each in found[1].images] == [image]
    assert found[1].images[0].path.is_file()
    assert "train" not in found[1].images[0].path.parts[-2] or split == "train"


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        ("voc", {"box_format": "xyxy"}, "is in the format of Pascal VOC, in which --box_format has no effect"),
        ("yolo", {"box_format": "xyxy"}, "is in the format of YOLO, in which --box_format has no effect"),
        ("coco", {"columns": {"objects": "faces"}}, "is in the format of COCO, in which --columns has no effect"),
        ("datasets", {"columns": {"objects": "objects"}}, ""),
        ("coco", {"box_format": "xywh"}, ""),
    ],
)
def test_options_without_effect_are_refused(tmp_path, form, options, message):
    FORMATS[form](write_shapes(tmp_path / "shapes"), tmp_path / "data")
    with pytest.raises(InputError, match=message) if message else nullcontext():
        read_data(tmp_path / "data", options=ReadOptions(**options))


def test_a_file_that_is_not_a_dataset(tmp_path):
    write(tmp_path / "alone" / "labels.json", coco_text("1.png"))
    write(tmp_path / "settings.yaml", "learning_rate: 1\n")
    write(tmp_path / "broken.yaml", "names: [")
    write(tmp_path / "1.xml", XML)
    with zipfile.ZipFile(tmp_path / "export.zip", "w") as file:
        file.writestr("train.json", "{}")
    for name, message in {
        "alone/labels.json": r"labels\.json: no images found in .*alone\. Give .* --images and --annotations",
        "settings.yaml": r"settings\.yaml: is not a YAML file with names and train, val or test",
        "broken.yaml": r"broken\.yaml: cannot be read as YAML",
        "1.xml": r"1\.xml: is a file, but must be a directory, a YOLO \*\.yaml or a COCO \*\.json file",
        "export.zip": r"export\.zip: is an archive\. Unpack it, and give the directory",
        "gone.yaml": r"gone\.yaml: file not found",
        "alone/gone.json": r"gone\.json: file not found",
        "gone": "gone: directory not found",
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            read_data(str(tmp_path / name))
        assert "Looked for" not in str(caught.value)
    with pytest.raises(InputError, match="is a file, but must be a directory or an id on the Hub"):
        read_data(tmp_path / "alone" / "labels.json", streaming=True)


def printed_format(capsys, *words):
    assert hf_dino(["data", "check", "--headers_only", *words]) == 0
    return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("format: "))


SEEN = {
    "COCO (train.json, val.json)": COCO,
    "COCO (train.json, val.json); also found: data.yaml, extra/2.xml: not read": COCO
    | {"extra/2.xml": XML, "data.yaml": "hello: 1"},
    "COCO (train.json, val.json); also found: 4 *.xml, captions/a.json, 1 image: not read": COCO
    | {f"{number}.xml": XML for number in range(4)}
    | {"captions/a.json": "{}", "val/3.png": None, "README.txt": "", ".cache/1.json": "", ".git/x.yaml": ""},
    "YOLO (data.yaml, labels/train/1.txt, labels/val/2.txt)": YOLO,
    "YOLO (data.yaml, labels/train/1.txt, labels/val/2.txt); also found: a.json, b.csv, zoo.yaml: not read": YOLO
    | {"a.json": "{}", "b.csv": "", "zoo.yaml": YAML},
    "YOLO (labels/1.txt)": {"images/1.png": None, "labels/1.txt": LINES},
    "Pascal VOC (5 *.xml); also found: 1.txt: not read": {f"{number}.png": None for number in range(5)}
    | {f"{number}.xml": XML for number in range(5)}
    | {"1.txt": LINES},
    "datasets (metadata.jsonl)": {"1.png": None, "metadata.jsonl": ROW},
}


@pytest.mark.parametrize("text", SEEN)
def test_the_first_line_of_check_names_what_was_read_and_what_was_not(tmp_path, capsys, text):
    assert printed_format(capsys, lay_out(tmp_path / "cells", SEEN[text])) == f"format: {text}"


@pytest.mark.parametrize("name", FORMATS)
def test_of_a_dataset_in_one_format_nothing_is_left_over(tmp_path, capsys, name):
    FORMATS[name](write_shapes(tmp_path / "shapes"), tmp_path / "data")
    line = printed_format(capsys, tmp_path / "data")
    others = "annotations/captions_" if name == "coco" else "not read"
    assert line.count("not read") == (name == "coco")
    assert (others in line) == (name == "coco")


def test_images_are_known_by_any_path_that_leads_to_them(tmp_path, capsys):
    folder = lay_out(tmp_path / "cells", YOLO)
    write(folder / "data.yaml", f"names: [cell]\npath: {folder}/images/..\ntrain: ./images/train\nval: images/val\n")
    assert "not read" not in printed_format(capsys, folder)
    (tmp_path / "link").symlink_to(folder)
    assert "not read" not in printed_format(capsys, tmp_path / "link")


def test_files_are_named_as_given(tmp_path, capsys):
    folder = lay_out(tmp_path / "cells", COCO | YOLO)
    assert printed_format(capsys, folder / "data.yaml") == "format: YOLO (data.yaml)"
    assert printed_format(capsys, folder / "val.json") == "format: COCO (val.json)"
    pair = ["--images", folder / "train", "--annotations", folder / "train.json"]
    assert printed_format(capsys, *pair) == "format: COCO (train.json)"


@pytest.mark.parametrize("command", ["augment", "convert", "split"])
def test_other_commands_take_a_file_too(tmp_path, command):
    folder = lay_out(tmp_path / "cells", YOLO)
    options = {
        "augment": ["--output", tmp_path / "a.png", "--image_size", "64", "--num_images=1", "--num_views=1"],
        "convert": ["--format=coco", "--output_dir", tmp_path / "out"],
        "split": ["--merge", "--val=0.5", "--output_dir", tmp_path / "out"],
    }[command]
    assert hf_dino(["data", command, folder / "data.yaml", *options]) == 0
