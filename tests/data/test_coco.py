"""Annotation files are checked before the first step, and items are what the image processor wants."""

import json
import logging
import shutil

import numpy as np
import pytest

from helpers.coco_files import annotation, write_coco
from hf_dino.data import (
    DetectionDataset,
    InputError,
    label_of_category,
    make_augmentation,
    read_coco,
    read_data,
)
from hf_dino.data.shapes import generate_shapes
from hf_dino.hub import contiguous_id2label


def read(folder, annotations=(), **options):
    return read_coco(*write_coco(folder, annotations, **options))


def test_images_objects_and_crowds_are_kept(tmp_path):
    objects = [annotation(2, 7, [1, 2, 3, 4], iscrowd=1, area=9.5), annotation(2, 3, [5, 6, 7, 8])]
    data = read(tmp_path, objects, sizes=[(40, 60), (30, 20)])
    assert data.categories == {3: "dog", 7: "cat"}
    assert [image.image_id for image in data.images] == [1, 2]
    assert data.images[0].boxes.shape == (0, 4)
    crowded = data.images[1]
    assert crowded.boxes.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert (crowded.areas.tolist(), crowded.iscrowd.tolist()) == ([9.5, 56], [1, 0])
    assert crowded.category_ids.tolist() == [7, 3]

    item = DetectionDataset(data)[1]
    assert item["image"].size == (20, 30)
    assert item["annotation"] == {
        "image_id": 2,
        "annotations": [
            {"category_id": 7, "bbox": [1, 2, 3, 4], "area": 9.5, "iscrowd": 1},
            {"category_id": 3, "bbox": [5, 6, 7, 8], "area": 56, "iscrowd": 0},
        ],
    }


def test_wrong_boxes_are_dropped_or_clipped_and_counted(tmp_path, caplog):
    boxes = {
        "nan": [float("nan"), 0, 5, 5],
        "not numbers": ["a", 0, 5, 5],
        "three numbers": [1, 2, 3],
        "flat": [5, 5, 0, 5],
        "negative": [5, 5, -3, 5],
        "outside": [70, 5, 9, 9],
        "over the border": [-10, 30, 20, 20],
        "rounded": [0, 0, 60.004, 40],
        "good": [1, 1, 2, 2],
    }
    files = write_coco(tmp_path, [annotation(1, 3, box) for box in boxes.values()])
    before = files[1].read_bytes()
    with caplog.at_level(logging.WARNING):
        data = read_coco(*files)
    assert files[1].read_bytes() == before
    (image,) = data.images
    assert image.boxes.tolist() == [boxes["over the border"], boxes["rounded"], boxes["good"]]
    assert image.clipped_boxes.tolist() == [[0, 30, 10, 10], [0, 0, 60, 40], [1, 1, 2, 2]]
    messages = [record.getMessage().split(": ", 1)[1] for record in caplog.records]
    assert messages == [
        "3 boxes are not four finite numbers: dropped",
        "2 boxes have no width or no height: dropped",
        "1 boxes lie outside their image: dropped",
        "1 boxes extend beyond their image: clipped for training",
    ]


def test_clean_data_logs_nothing(tmp_path, caplog):
    read(tmp_path, [annotation(1, 3, [0, 0, 60, 40])])
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, r"is not a COCO detection file.*it has \['annotations', 'categories', 'images'\]"),
        ({"images": []}, "'images' is empty"),
        ({"categories": []}, "'categories' is empty"),
        ({"categories": [{"id": 3}]}, r"an entry of 'categories' lacks one of \['id', 'name'\]"),
        ({"categories": [{"id": 3, "name": "a"}, {"id": 3, "name": "b"}]}, r"duplicated: 3 \(.a., .b.\)\. Give"),
        (
            {"images": 2 * [{"id": 1, "file_name": "1.png"}]},
            r"json: ids of 'images' are duplicated: 1 \('1.png', '1.png'\)",
        ),
        ({"categories": [{"id": "3", "name": "a"}]}, "must be 64-bit integers, got '3'"),
        ({"categories": [{"id": 3, "name": "a"}, {"id": 4, "name": "a"}]}, "several categories are named 'a'"),
        ({"categories": [{"id": 4, "name": "a"}]}, "annotations have category_id 3, not listed in 'categories'"),
    ],
)
def test_not_coco(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, [annotation(1, 3, [0, 0, 5, 5])], replaced=change)


@pytest.mark.parametrize(
    "change", [{"file_name": None}, {"height": "abc"}, {"height": float("nan")}, {"width": [5]}, {"width": -60}]
)
def test_an_image_without_a_valid_size_or_name(tmp_path, change):
    image = {"id": 1, "file_name": "1.png", "height": 40, "width": 60} | change
    with pytest.raises(InputError, match="file_name must be text, and its height and width positive integers"):
        read(tmp_path, [], replaced={"images": [image]})


def test_odd_but_readable_values(tmp_path):
    objects = [annotation(1, 3, [0, 0, 5, 5], iscrowd=crowd) for crowd in (0, 1, "0", "1", None, True)]
    images, file = write_coco(tmp_path, objects)
    file.write_text(file.read_text(), encoding="utf-8-sig")
    assert read_coco(images, file).images[0].iscrowd.tolist() == [0, 1, 0, 1, 0, 1]
    with pytest.raises(InputError, match=r"annotations have image_id \[1\], not listed in 'images'"):
        read(tmp_path, [annotation([1], 3, [0, 0, 5, 5])])


def test_annotation_of_an_unknown_image(tmp_path):
    with pytest.raises(InputError, match="annotations have image_id 5, not listed in 'images'"):
        read(tmp_path, [annotation(5, 3, [0, 0, 5, 5])])


def test_unreadable_files(tmp_path):
    images, file = write_coco(tmp_path, [])
    with pytest.raises(InputError, match=r"gone\.json: file not found"):
        read_coco(images, tmp_path / "gone.json")
    with pytest.raises(InputError, match="cannot be read"):
        read_coco(images, tmp_path)
    file.write_text(content := file.read_text(), encoding="utf-16")
    with pytest.raises(InputError, match=r"annotations\.json: is not in UTF-8 \(.* at byte 0\); save it again with"):
        read_coco(images, file)
    file.write_text(content[:-20])
    with pytest.raises(InputError, match=r"annotations\.json: is not valid JSON .*truncated"):
        read_coco(images, file)
    file.write_text("[1, 2]")
    with pytest.raises(InputError, match=r"is not a COCO detection file.*it has list"):
        read_coco(images, file)


def test_missing_images_are_named(tmp_path):
    images, file = write_coco(tmp_path, [], sizes=[(4, 4)] * 9)
    with pytest.raises(InputError, match="gone: image directory not found"):
        read_coco(tmp_path / "gone", file)
    for number in range(2, 9):
        (images / f"{number}.png").unlink()
    with pytest.raises(InputError, match=r"7 images not found in .*: 2.png, 3.png, .*6.png and 2 more"):
        read_coco(images, file)
    (images / "1.png").unlink()
    (images / "9.png").unlink()
    with pytest.raises(InputError, match="the directory contains no images"):
        read_coco(images, file)


def test_size_is_read_from_the_image_where_it_is_not_annotated(tmp_path):
    images, file = write_coco(tmp_path, [annotation(1, 3, [0, 0, 5, 5])])
    content = json.loads(file.read_text())
    del content["images"][0]["height"]
    file.write_text(json.dumps(content))
    (image,) = read_coco(images, file).images
    assert (image.height, image.width) == (40, 60)


def test_the_folder_names_the_dataset(tmp_path, monkeypatch):
    images, file = write_coco(tmp_path / "birds", [])
    assert read_coco(images, file).name == "birds"
    monkeypatch.chdir(file.parent)
    assert read_coco(images, file.name).name == "birds"
    (file.parent / "annotations").mkdir()
    assert read_coco(images, file.rename(file.parent / "annotations" / "train.json")).name == "birds"


def test_labels_are_matched_by_name(tmp_path):
    data = read(tmp_path, [annotation(1, 7, [0, 0, 5, 5])])
    assert contiguous_id2label(data.categories) == {0: "dog", 1: "cat"}
    assert label_of_category(data, {0: "N/A", 5: "cat", 9: "dog"}) == {3: 9, 7: 5}
    assert label_of_category(data, {5: "cat"}) == {7: 5}, "a category without objects needs no label"
    with pytest.raises(InputError, match=r"the model has no class for 'cat' \(id 7\); its classes are 'dog', 'bird'"):
        label_of_category(data, {0: "N/A", 1: "dog", 2: "bird"})


def test_an_unused_label_is_not_matched(tmp_path):
    data = read(tmp_path, [annotation(1, 3, [0, 0, 5, 5])], categories={3: "N/A"})
    with pytest.raises(InputError, match=r"no class for 'N/A'"):
        label_of_category(data, {0: "N/A"})


def test_augmented_items_depend_on_seed_epoch_and_image_only(tmp_path):
    objects = [annotation(1, 3, [10, 10, 20, 20]), annotation(2, 3, [10, 10, 20, 20])]
    data = read(tmp_path, objects, sizes=[(40, 60), (40, 60)])
    augmentation = make_augmentation("dino", {"shortest_edge": 80, "longest_edge": 133})

    def item(index, seed=0, epoch=0):
        item = DetectionDataset(data, augmentation, seed, epoch)[index]
        return np.asarray(item["image"]).tobytes(), item["annotation"]

    assert item(0) == item(0)
    assert len({item(0, epoch=epoch)[0] for epoch in range(8)}) > 4
    assert item(0, seed=1)[0] != item(0)[0]


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "a\tb", "a\x00", "a\u2028b", "\ud83d"])
def test_a_category_name_that_is_not_one_line_of_text(tmp_path, name):
    with pytest.raises(InputError, match=r"category names must be one line of text\. Rename '.*' \(id 7\)$"):
        read(tmp_path, [], categories={3: "dog", 7: name})


def test_names_of_all_languages(tmp_path):
    names = {1: "Bär", 2: "猫", 3: "👨\u200d👩\u200d👧", 4: "a\xa0b"}
    assert read(tmp_path, [], categories=names).categories == names


def test_images_of_another_split_never_replace_missing_ones(tmp_path):
    """Folders of two splits often have images of the same names."""
    folder = generate_shapes(tmp_path / "data", image_size=64, num_train=3, num_val=3, num_test=2)
    (folder / "val" / "000002.png").unlink()
    with pytest.raises(InputError, match=r"val\.json: 1 images not found in .*val: 000002\.png"):
        read_data(folder)
    shutil.rmtree(folder / "val")
    with pytest.raises(InputError, match=r"val\.json: 3 images not found in .*: 000001\.png"):
        read_data(folder)
