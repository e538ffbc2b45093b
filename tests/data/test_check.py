"""Faults of a dataset are found before training, and no file of the user is changed."""

import json
import logging
import sys

import numpy as np
import pytest
from PIL import Image

from helpers.coco_files import annotation, write_coco
from helpers.command_line import hf_dino
from helpers.data_formats import coco_text, draw, voc_xml, write, write_shapes
from hf_dino.data import InputError, check_data, read_coco, read_data
from hf_dino.data.preview import Sample, draw_image_grid


def data(folder, annotations=(), **options):
    return read_coco(*write_coco(folder, annotations, **options))


def good(folder, **options):
    """One image with a dog and a cat."""
    return data(folder, [annotation(1, 3, [1, 2, 30, 20]), annotation(1, 7, [5, 6, 9, 9])], **options)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_valid_dataset_has_no_errors_and_is_counted(tmp_path):
    objects = [annotation(1, 3, [0, 0, 8, 8]), annotation(1, 7, [0, 0, 32, 32]), annotation(1, 7, [0, 0, 96, 96])]
    crowd = annotation(1, 3, [0, 0, 10, 10], iscrowd=1)
    report = check_data({"train": data(tmp_path, [*objects, crowd], sizes=[(100, 100)])})
    assert (report.errors, report.warnings) == ([], [])
    counts = report.counts["train"]
    assert (counts.num_images, counts.num_empty_images, counts.num_objects, counts.num_crowds) == (1, 0, 3, 1)
    assert counts.classes == {"dog": 1, "cat": 2}
    assert counts.sizes == {"small": 1, "medium": 1, "large": 1}
    report.raise_if_errors()


@pytest.mark.parametrize("decode", [True, False])
def test_images_missing_broken_and_of_another_size(tmp_path, decode):
    read = data(tmp_path, [annotation(n, 3, [1, 2, 3, 4]) for n in (1, 2, 3, 4)], sizes=[(40, 60)] * 4)
    images = tmp_path / "images"
    (images / "1.png").unlink()
    (images / "2.png").write_bytes(b"no image")
    draw(images / "3.png", (42, 60))
    whole = (images / "4.png").read_bytes()
    (images / "4.png").write_bytes(whole[: len(whole) // 2])
    seen = []
    report = check_data({"train": read}, decode=decode, on_image=lambda: seen.append(1))
    messages = [
        "1.png: image file not found",
        "2.png: cannot be read as an image (not a known image format)",
        "3.png: is annotated as 60 x 40 pixels (width x height), but the file has 60 x 42",
        *(["4.png: cannot be read as an image"] if decode else []),  # whose header is complete
    ]
    assert len(report.errors) == len(messages)
    for error, message in zip(report.errors, messages):
        assert error.startswith("train: ")
        assert message in error
    assert len(seen) == 4
    with pytest.raises(InputError, match=r"(?s)has errors:\ntrain: .*1\.png: image file not found"):
        report.raise_if_errors()


def test_the_check_of_headers_applies_the_exif_orientation(tmp_path):
    read = good(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 60)).save(tmp_path / "images" / "1.png", exif=exif)
    assert check_data({"train": read}, decode=False).errors == []
    assert read.images[0].read().size == (60, 40)


def test_corrected_boxes_are_listed_with_their_images(tmp_path):
    boxes = [[5, 5, 0, 5], [70, 5, 9, 9], [-10, 30, 20, 20], [1, 1, 2, 2], [1, 1, 2, 2]]
    report = check_data({"train": data(tmp_path, [annotation(1, 3, box) for box in boxes])})
    assert report.errors == []
    assert report.warnings[:4] == [
        "train: 1 boxes have no width or no height: dropped; images/1.png",
        "train: 1 boxes lie outside their image: dropped; images/1.png",
        "train: 1 boxes extend beyond their image: clipped for training; images/1.png",
        "train: 1 boxes are duplicates with the same class; images/1.png",
    ]


def test_boxes_in_another_format(tmp_path):
    corners = [[20, 10, 50, 30], [30, 20, 55, 35], [2, 2, 20, 20]]
    wrong = data(tmp_path / "corners", [annotation(1, 3, box) for box in corners])
    (error,) = check_data({"train": wrong}).errors
    assert error == (
        "train: boxes seem to be x0, y0, x1, y1, but must be x, y, width, height: read so, 2 of 3 extend beyond "
        "their image"
    )
    (error,) = check_data({"train": data(tmp_path / "b", [annotation(1, 3, [0.1, 0.2, 0.5, 0.3])])}).errors
    assert "Boxes seem to be fractions" in error


def test_classes_that_differ_between_splits(tmp_path):
    train = good(tmp_path / "a")
    other = data(tmp_path / "b", [annotation(1, 5, [1, 2, 3, 4])], categories={5: "bird", 7: "cat"}, sizes=[(40, 70)])
    report = check_data({"train": train, "validation": other})
    assert report.errors == [
        "validation: has objects of classes that train does not have: 'bird'. The classes of train are 'dog', 'cat'"
    ]
    assert "train: has classes that another split does not have: 'dog'" in report.warnings
    assert "validation: has classes that another split does not have: 'bird'" in report.warnings
    assert "validation: 1 of 2 classes have no objects: 'cat'" in report.warnings


def test_duplicate_images_within_and_between_splits(tmp_path):
    train = data(tmp_path / "a", [annotation(1, 3, [1, 2, 3, 4])], sizes=[(40, 60), (40, 60), (30, 30)])
    (tmp_path / "a" / "images" / "2.png").write_bytes((tmp_path / "a" / "images" / "1.png").read_bytes())
    validation = data(tmp_path / "b", [annotation(1, 3, [1, 2, 3, 4])])
    warnings = check_data({"train": train, "validation": validation}, decode=False).warnings
    assert "1 images are in both train and validation: images/1.png = images/2.png" in warnings
    only = check_data({"train": train}).warnings
    assert "1 images are duplicated in train: images/1.png = images/2.png" in only


def test_images_without_objects_and_nothing_to_train_on(tmp_path):
    report = check_data({"train": data(tmp_path, sizes=[(40, 60), (30, 30)])})
    assert report.errors == ["train: has no objects to train on"]
    assert "train: 2 of 2 images have no objects" in report.warnings
    assert check_data({}).errors == []


def test_the_two_boxes_of_blood_cells(shared):
    splits = read_data(shared / "data" / "bccd")
    report = check_data(splits, decode=False)
    assert report.errors == []
    assert report.warnings == [
        "train: 1 boxes have no width or no height: dropped; images/BloodImage_00343.jpg",
        "validation: 1 boxes have no width or no height: dropped; images/BloodImage_00338.jpg",
    ]


def test_command_line_on_good_data(tmp_path, capsys):
    write_shapes(tmp_path / "shapes")
    before = contents(tmp_path / "shapes")
    sheet = tmp_path / "sheets" / "sheet.png"
    assert hf_dino(["data", "check", str(tmp_path / "shapes"), "--preview", str(sheet), "--num_images", "4"]) == 0
    printed = capsys.readouterr().out
    assert "circle" in printed
    assert "train: 1 of 5 images have no objects" in printed
    assert "0 errors" in printed
    assert contents(tmp_path / "shapes") == before

    with Image.open(sheet) as drawn:
        pixels = np.asarray(drawn.convert("RGB"))
    assert pixels.shape[1] > 2 * 480
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1000
    with pytest.raises(InputError, match=r"sheet\.png: already exists"):
        hf_dino(["data", "check", str(tmp_path / "shapes"), "--preview", str(sheet)])


def test_command_line_reports_every_error(tmp_path, capsys):
    folder = tmp_path / "data"
    content = json.loads(coco_text("1.png", "2.png", "3.png"))
    content["annotations"] += [{"image_id": 9, "category_id": 1, "bbox": [1, 2, 3, 4]}]
    content["annotations"] += [{"image_id": 1, "category_id": 8, "bbox": [1, 2, 3, 4]}]
    write(folder / "train.json", json.dumps(content))
    draw(folder / "train" / "1.png")
    write(folder / "train" / "2.png", "no image")
    before = contents(folder)
    assert hf_dino(["data", "check", str(folder), "--headers_only", "--num_workers", "1"]) == 1
    printed = capsys.readouterr().out
    for message in (
        "annotations have image_id 9, not listed in 'images'",
        "annotations have category_id 8, not listed in 'categories'",
        "2.png: cannot be read as an image",
        "3.png: image file not found",
        "4 errors",
    ):
        assert message in printed
    assert contents(folder) == before


def test_command_line_on_a_pair_and_on_nothing(tmp_path):
    images, file = write_coco(tmp_path, [annotation(1, 3, [1, 2, 30, 20]), annotation(1, 7, [1, 2, 30, 20])])
    assert hf_dino(["data", "check", "--images", str(images), "--annotations", str(file)]) == 0
    with pytest.raises(InputError, match="gone: directory not found"):
        hf_dino(["data", "check", str(tmp_path / "gone")])
    for source in ([], ["--images", images], [tmp_path, "--images", images]):
        assert hf_dino(["data", "check", *source]) == 2


VOC = voc_xml((40, 60), [("cell", [1, 2, 30, 20])])


@pytest.mark.parametrize(
    ("files", "messages"),
    [
        (
            {"1.png": None, "1.xml": VOC, "2.png": None, "2.xml": "<annotation>", "3.xml": VOC},
            ["2.xml: cannot be read as XML", "3.jpg: image file not found", "2 errors"],
        ),
        (
            {
                "classes.txt": "cell",
                "images/1.png": None,
                "labels/1.txt": "7 0.5 0.5 0.2 0.2\n0 0.5 0.5 0.2 0.2\n",
                "images/2.png": "no image",
            },
            ["classes without a name: 7 in ", "2.png: cannot be read as an image", "2 errors"],
        ),
    ],
)
def test_errors_of_other_formats_do_not_hide_each_other(tmp_path, capsys, files, messages):
    for name, text in files.items():
        draw(tmp_path / name) if text is None else write(tmp_path / name, text)
    assert hf_dino(["data", "check", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert [message for message in messages if message not in printed] == []


def test_augmented_samples_are_drawn(tmp_path):
    write_shapes(tmp_path / "shapes")
    words = ["data", "augment", tmp_path / "shapes", "--image_size", 64, 100, "--num_images=2", "--num_views=2"]
    assert hf_dino([*words, "--augmentation", "dino", "--output", str(tmp_path / "a.png")]) == 0
    with Image.open(tmp_path / "a.png") as drawn:
        assert drawn.width == 3 * 488 + 8
        first, second = (np.asarray(drawn.crop((left, 8, left + 480, 300))).astype(int) for left in (8, 496))
    assert np.abs(first - second).mean() > 5
    with pytest.raises(InputError, match="unknown augmentation 'nonsense'"):
        hf_dino([*words, "--augmentation", "nonsense", "--output", str(tmp_path / "b.png")])
    assert not (tmp_path / "b.png").exists()


def test_a_preview_is_a_new_image_of_a_known_format(tmp_path):
    sample = Sample(Image.new("RGB", (30, 20)), np.zeros((0, 4)), [], [], "nothing")
    with pytest.raises(InputError, match="no images to draw"):
        draw_image_grid([], tmp_path / "a.png")
    with pytest.raises(InputError, match=r"images of kind '\.txt' cannot be written; use \.png or \.jpg"):
        draw_image_grid([sample], tmp_path / "a.txt")
    assert list(tmp_path.iterdir()) == []
    draw_image_grid([sample], tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(InputError, match="already exists"):
        draw_image_grid([sample], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before


@pytest.mark.parametrize("words", [["data", "check", "gone", "--preview"], ["data", "augment", "gone", "--output"]])
def test_a_preview_that_cannot_be_drawn_is_an_error_before_the_work(tmp_path, monkeypatch, words):
    with pytest.raises(InputError, match=r"images of kind '\.fits' cannot be written"):
        hf_dino([*words, str(tmp_path / "sheet.fits")])
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-dino\[train\]'"):
        hf_dino([*words, str(tmp_path / "sheet.png")])


def test_class_names_are_printed_as_they_are(tmp_path, capsys):
    names = {3: "car [small]", 5: "a [/] b", 7: ":smile: [red]"}
    file = write_coco(tmp_path, [annotation(1, number, [1, 2, 30, 20]) for number in (3, 5, 7, 7)], categories=names)
    assert hf_dino(["data", "check", "--images", str(file[0]), "--annotations", str(file[1])]) == 0
    printed = capsys.readouterr().out
    assert [name for name in names.values() if name not in printed] == []


@pytest.mark.parametrize("option", [["--streaming"], ["--max_samples", "3"], ["--cache_dir", "c"]])
def test_options_of_a_stream_are_not_for_a_pair(tmp_path, capsys, option):
    assert hf_dino(["data", "check", "--images", str(tmp_path), "--annotations", "a.json", *option]) == 2
    assert "--streaming, --max_samples and --cache_dir need a DATASET" in capsys.readouterr().err


def test_warnings_that_the_report_does_not_contain_are_logged(tmp_path, capsys, monkeypatch):
    """A missing folder is logged, corrected boxes are only in the report."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    files = {
        "data.yaml": "names: [cell]\ntrain: a\nval: [a, b]\n",
        "a/1.png": None,
        "a/1.txt": "0 0.5 0.5 0.2 0.2\n0 0.5 0.5 0 0.2\n",
    }
    for name, text in files.items():
        draw(tmp_path / name) if text is None else write(tmp_path / name, text)
    assert hf_dino(["data", "check", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    place = tmp_path / "b"
    assert printed.err == (f"WARNING {tmp_path / 'data.yaml'}: ignoring the validation split, {place} not found\n")
    assert "1 boxes have no width or no height: dropped" in printed.out
