"""Faults of a dataset are found before training, and no file of the user is changed."""

import json
import logging
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from helpers.coco_files import annotation, write_coco
from helpers.command_line import hf_dino
from helpers.data_formats import coco_text, draw, voc_xml, write, write_shapes
from hf_dino import DinoDetrConfig
from hf_dino.data import InputError, check_data, read_coco, read_data
from hf_dino.data.check import object_limits
from hf_dino.data.dataset import AnnotatedImageBuilder, label_of_category, xywh_to_xyxy, xyxy_to_xywh
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
        "their image, and 3 of 3 are inside as corners. Read them with --box_format xyxy"
    )
    (error,) = check_data({"train": data(tmp_path / "b", [annotation(1, 3, [0.1, 0.2, 0.5, 0.3])])}).errors
    assert "Boxes seem to be fractions" in error


SIZE = np.array([320, 240])  # width, height


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "1.png"
    draw(path, (240, 320))
    return path


def make_split(image, boxes, num_images=10, format="COCO", **options):
    """Boxes as they are read, in copies of an image of 320 x 240 pixels."""
    builder = AnnotatedImageBuilder("made")
    for part in np.array_split(np.asarray(boxes, dtype=float), num_images):
        builder.add(image, (240, 320), part, [1] * len(part))
    return replace(builder.build({1: "cat"}), format=format, **options)


def messages(split):
    """Errors and warnings about boxes."""
    report = check_data({"train": split}, decode=False, num_workers=1)
    about_boxes = [[text for text in texts if " boxes " in f" {text} "] for texts in (report.errors, report.warnings)]
    assert not [text for texts in about_boxes for text in texts if "\n" in text]
    return about_boxes


def random_boxes(rng, kind, count):
    """True x, y, width, height in pixels."""
    sides = {
        "coco": np.clip(rng.lognormal(-2, 0.8, (count, 2)), 0.02, 1),
        "large": rng.uniform(0.6, 1, (count, 2)),
        "tiny": rng.uniform(0.01, 0.03, (count, 2)),
        "upper left": rng.uniform(0.3, 1, (count, 2)),
        "of one size": np.tile(rng.uniform(0.2, 0.8, 2), (count, 1)),
        "whole": 1 - rng.uniform(0, 0.04, (count, 2)),
    }[kind]
    starts = rng.uniform(0, 0.1 if kind == "upper left" else 1, (count, 2)) * (1 - sides)
    return np.hstack([starts, sides]) * np.tile(SIZE, 2)


KINDS = ("coco", "large", "tiny", "upper left", "of one size", "whole")


@pytest.mark.parametrize("kind", KINDS)
def test_true_boxes_are_taken_for_nothing_else(image, kind):
    """Also those of which people drew some a little too far, and a few much too far."""
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 10, 40, 400):
        boxes = random_boxes(rng, kind, count)
        sloppy = boxes + np.pad(rng.uniform(0, 0.04, (count, 2)) * SIZE, ((0, 0), (2, 0)))
        sloppy[: count // 20, 2:] += SIZE
        for each in (boxes, sloppy, np.round(boxes)):
            errors, warnings = messages(make_split(image, each, min(count, 10)))
            assert errors == []
            assert not [text for text in warnings if "far beyond" in text or "x0" in text or "percent" in text]


@pytest.mark.parametrize("kind", ["coco", "large", "tiny", "of one size"])
@pytest.mark.parametrize("share_odd", [0, 0.01, 0.2])
def test_corners_are_found_though_some_boxes_are_odd(image, kind, share_odd):
    rng = np.random.default_rng(1)
    corners = xywh_to_xyxy(random_boxes(rng, kind, 200))
    odd = rng.permutation(200)[: int(200 * share_odd)]
    corners[odd, 2] = corners[odd, 0] * rng.choice([0, 0.5, 1], len(odd))
    (error,), _ = messages(make_split(image, corners))
    assert error.startswith("train: boxes seem to be x0, y0, x1, y1, but must be x, y, width, height: read so, ")
    assert error.endswith("Read them with --box_format xyxy")
    for format in ("Pascal VOC", "YOLO"):  # which define their boxes
        assert messages(make_split(image, corners, format=format))[0] == []


def test_corners_in_the_upper_left_are_found_by_their_equal_sizes(image):
    boxes = random_boxes(np.random.default_rng(2), "tiny", 100) / 2
    errors, warnings = messages(make_split(image, xywh_to_xyxy(boxes)))
    assert errors == []
    assert [text for text in warnings if "may be x0, y0, x1, y1: as such, 100 of 100 are inside" in text]
    assert messages(make_split(image, xywh_to_xyxy(boxes), box_format="xyxy"))[0] == [], "these were converted"
    boxes[:4, :2] = 0.7 * SIZE
    assert "read so, 4 of 100 extend beyond" in messages(make_split(image, xywh_to_xyxy(boxes)))[0][0]


def test_boxes_read_as_corners_that_are_none(image):
    boxes = random_boxes(np.random.default_rng(3), "coco", 200)
    (error,), _ = messages(make_split(image, xyxy_to_xywh(boxes), box_format="xyxy"))
    assert "boxes cannot be used as xyxy. Leave out --box_format xyxy" in error
    assert messages(make_split(image, boxes, box_format="xyxy")) == [[], []]
    boxes[:120] = 0  # rows of images without objects
    errors, warnings = messages(make_split(image, boxes))
    assert (errors, "train: 120 of 200 boxes cannot be used as xywh. They may be in another format" in warnings) == (
        [],
        True,
    )


@pytest.mark.parametrize(
    ("convert", "hint"),
    [
        (lambda boxes: boxes + np.pad(boxes[:, 2:] / 2, ((0, 0), (0, 2))), "as center x, center y, width, height"),
        (lambda boxes: boxes * [1.5, 1.5, 1.5, 1.5], "are they of images of another size?"),
    ],
)
def test_boxes_far_beyond_their_image(image, convert, hint):
    boxes = convert(random_boxes(np.random.default_rng(4), "coco", 200))
    errors, warnings = messages(make_split(image, boxes))
    assert errors == []
    assert [text for text in warnings if "boxes extend far beyond their image: " in text and text.endswith(hint)]


@pytest.mark.parametrize("num_in_pixels", [0, 1, 40])
def test_fractions_are_found_among_pixels(image, num_in_pixels):
    boxes = random_boxes(np.random.default_rng(5), "coco", 100)
    for fractions in (boxes, boxes + np.pad(boxes[:, 2:] / 2, ((0, 0), (0, 2)))):
        fractions = fractions / np.tile(SIZE, 2)
        fractions[:num_in_pixels] = boxes[:num_in_pixels]
        (error,), _ = messages(make_split(image, fractions))
        assert error.startswith(f"train: {100 - num_in_pixels} of 100 boxes are in the first pixel of their image. ")


def test_boxes_of_unusual_sizes_are_named(image):
    boxes = random_boxes(np.random.default_rng(6), "coco", 40)
    boxes[3] = [0.1, 0.2, 0.3, 0.2]
    assert messages(make_split(image, boxes))[1] == [
        f"train: 1 of 40 boxes cover less than a pixel; {image.parent.name}/1.png"
    ]
    percent = random_boxes(np.random.default_rng(7), "coco", 40) / np.tile(SIZE, 2) * 100
    assert messages(make_split(image, percent))[1][-1] == (
        "train: 40 of 40 boxes are in the first 100 pixels of larger images: are they in percent?"
    )
    boxes[:30] = [0, 0, *SIZE]
    assert "train: 30 of 40 boxes cover the entire image" in messages(make_split(image, boxes))[1]


@pytest.mark.parametrize("name", ["bccd", "tiny_coco"])
def test_real_boxes_and_their_corners(shared, name):
    for split in read_data(shared / "data" / name).values():
        assert messages(split)[0] == []
        wrong = [replace(image, boxes=xywh_to_xyxy(image.boxes)) for image in split.images]
        assert "--box_format xyxy" in messages(replace(split, images=wrong))[0][0]


def classes(*names):
    return dict(enumerate(names, start=1))


def named_data(folder, names):
    """One object of each class."""
    objects = [annotation(1, number, [number, 2, 8, 8]) for number in range(1, len(names) + 1)]
    return data(folder, objects, categories=classes(*names))


@pytest.mark.parametrize(
    ("train", "validation", "error"),
    [
        (["traffic light"], ["Traffic_Light"], None),
        (["Traffic_Light", "bus"], ["bus", "traffic-light"], None),
        (["cat", "Cat"], ["Cat", "cat"], None),
        (["cat"], ["cat", "Cat"], "validation: 'cat' and 'Cat' are all the class 'cat' of train. Give it one name"),
        (["cat", "Cat"], ["CAT"], "validation: has objects of classes that train does not have: 'CAT'"),
        (["cat"], ["category"], "validation: has objects of classes that train does not have: 'category'"),
    ],
)
def test_classes_of_splits_are_matched_as_training_matches_them(tmp_path, train, validation, error):
    splits = {"train": named_data(tmp_path / "a", train), "validation": named_data(tmp_path / "b", validation)}
    errors = check_data(splits, decode=False).errors
    assert [text.startswith(error or "") for text in errors] == [True] * bool(error)
    id2label = dict(enumerate(train))
    if error:
        with pytest.raises(InputError):
            label_of_category(splits["validation"], id2label)
    else:
        assert len(set(label_of_category(splits["validation"], id2label).values())) == len(validation)


def test_names_of_the_same_words_are_shown(tmp_path):
    names = ["traffic light", "Traffic  light", "bus"]
    splits = {"train": named_data(tmp_path / "a", names), "validation": named_data(tmp_path / "b", ["BUS"])}
    warnings = check_data(splits, decode=False).warnings
    assert (
        "train: the names 'traffic light', 'Traffic  light' are the same words, but different classes. If they are "
        "one class, give it one name"
    ) in warnings
    assert "validation: classes are those of train with the same words: 'BUS' is 'bus'" in warnings
    assert [text for text in warnings if "another split" in text] == [
        "train: has classes that another split does not have: 'traffic light', 'Traffic  light'"
    ]


def test_images_with_many_objects_are_named_with_the_option(tmp_path):
    objects = [annotation(1, 3, [x, y, 1, 1]) for x in range(50) for y in range(20)]
    objects += [annotation(2, 3 + 4 * (n % 2), [n % 50, n // 50, 1, 1]) for n in range(301)]
    objects += [annotation(3, 3, [n % 50, n // 50, 1, 1], iscrowd=int(n > 99)) for n in range(300)]
    split = data(tmp_path, objects, sizes=[(40, 60)] * 3)
    warnings = check_data({"train": split, "validation": split}, decode=False).warnings
    assert [text.partition(";")[0] for text in warnings if "more than" in text] == [
        "train: 1 of 3 images have more than 900 objects, up to 1000: a model of 900 queries cannot detect them all, "
        "one that is trained with --config_overrides num_queries=1000 can",
        "train: 2 of 3 images have more than 100 objects, up to 1000: a step takes 100 of them at random for "
        "denoising, with --config_overrides num_denoising=1000 all",
        "validation: 1 of 3 images have more than 900 objects, up to 1000: a model of 900 queries cannot detect them "
        "all, one that is trained with --config_overrides num_queries=1000 can",
        "validation: 2 of 3 images have more than 300 objects, up to 1000: an evaluation keeps 300 detections of an "
        "image, with --max_detections 1000 more",
        "validation: 2 of 3 images have more than 100 objects of a class, up to 1000: an evaluation counts 100 "
        "detections of a class in an image, with --max_detections 1000 more",
    ]
    images = {text.partition("; images/1.png")[2] for text in warnings if "more than" in text}
    assert images == {"", ", images/2.png"}
    config = DinoDetrConfig(num_queries=1000, denoising="none", num_select=50)
    enough = check_data({"train": split, "validation": split}, decode=False, limits=object_limits(config, 1000))
    assert not [text for text in enough.warnings if "more than" in text]


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
