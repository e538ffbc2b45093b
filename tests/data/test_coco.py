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
    ReadOptions,
    check_data,
    label_of_category,
    make_augmentation,
    read_coco,
    read_data,
)
from hf_dino.data.readers import read_coco_file
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
    "change",
    [
        *({"file_name": name} for name in (None, "", " ", "1.png\0", ["1.png"])),
        *({"height": height} for height in ("abc", float("nan"), float("inf"), True, 10**400)),
        *({"width": width} for width in ([5], -60, 0.5)),
    ],
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


def warnings_of(data):
    return {warning: len(paths) for warning, paths in data.warnings.items()}


@pytest.mark.parametrize(
    ("value", "flag"),
    [(1.0, 1), ("1.0", 1), ("true", 1), (" True ", 1), (False, 0), ("0.0", 0), ("false", 0), ("", 0)]
    + [(value, None) for value in (2, -1, 0.5, "yes", [1], {}, float("nan"))],
)
def test_iscrowd_is_0_or_1_in_any_spelling(tmp_path, value, flag):
    data = read(tmp_path, [annotation(1, 3, [0, 0, 5, 5], iscrowd=value)])
    assert data.images[0].iscrowd.tolist() == [flag or 0]
    assert warnings_of(data) == ({"iscrowd values are neither 0 nor 1: read as 0": 1} if flag is None else {})


@pytest.mark.parametrize(
    ("value", "area"),
    [(7, 7), (7.5, 7.5), ("7.5", 7.5), (None, 25)]
    + [(value, "replaced") for value in (0, -7, float("nan"), float("inf"), "large", True, [7], 10**400)],
)
def test_areas_are_positive_numbers(tmp_path, value, area):
    data = read(tmp_path, [annotation(1, 3, [0, 0, 5, 5], area=value)])
    assert data.images[0].areas.tolist() == [25 if area == "replaced" else area]
    warning = "areas are not positive numbers: replaced by the area of the box"
    assert warnings_of(data) == ({warning: 1} if area == "replaced" else {})


@pytest.mark.parametrize(
    ("box", "expected"),
    [(["1", "2.5", "3", "4"], [1, 2.5, 3, 4]), ([1, 2, 3, 10**9], [1, 2, 3, 10**9])]
    + [(box, None) for box in ("1234", {"1": 1, "2": 2, "3": 3, "4": 4}, None, 5, [], [[1, 2], [3, 4]])]
    + [([1, 2, 3, value], None) for value in (True, None, "", "4px", 10**400, 1e300, float("inf"), [4])]
    + [([1, 2, 3], None), ([1, 2, 3, 4, 5, 6, 7, 8], None)],
)
def test_a_box_is_a_list_of_four_numbers(tmp_path, box, expected):
    data = read(tmp_path, [{"image_id": 1, "category_id": 3, "bbox": box}, annotation(1, 7, [5, 5, 5, 5])])
    assert data.images[0].boxes.tolist() == [*([expected] if expected else []), [5, 5, 5, 5]]
    assert data.images[0].category_ids.tolist() == [*([3] if expected else []), 7]
    assert ("boxes are not four finite numbers: dropped" in data.warnings) == (expected is None)


def test_ids_that_are_whole_floats_are_integers(tmp_path):
    objects = [annotation(1.0, 3, [0, 0, 5, 5]), annotation(2, 7.0, [1, 1, 5, 5])]
    entries = [{"id": float(id_), "file_name": f"{id_}.png", "height": 40.0, "width": "60"} for id_ in (1, 2)]
    names = [{"id": 7.0, "name": "cat"}, {"id": 3, "name": 12.0}]
    data = read(tmp_path, objects, sizes=[(40, 60)] * 2, replaced={"images": entries, "categories": names})
    assert (data.categories, data.warnings) == ({3: "12", 7: "cat"}, {})
    assert [(image.image_id, image.category_ids.tolist()) for image in data.images] == [(1, [3]), (2, [7])]
    assert {type(image.image_id) for image in data.images} | {*map(type, data.categories)} == {int}
    with pytest.raises(InputError, match=r"ids of 'images' are duplicated: 1 \("):
        read(tmp_path, [], replaced={"images": [entries[0], entries[0] | {"id": 1}]})


INVALID_IDS = ("1", None, True, float("nan"), float("inf"), 1.5, [1], {}, 2**63, 1e300)


@pytest.mark.parametrize("value", INVALID_IDS)
@pytest.mark.parametrize("part", ["images", "categories", "image_id", "category_id"])
def test_other_ids_are_refused(tmp_path, part, value):
    entries = {"images": [{"id": 1, "file_name": "1.png"}], "categories": [{"id": 1, "name": "cat"}]}
    if part in entries:
        entries[part][0]["id"] = value
        message = f"ids of '{part}' must be 64-bit integers, got "
    else:
        message = f"annotations have {part} .*, not listed in '(images|categories)'"
    message += "" if value == 2**63 or part in entries else ", whose ids are integers$"
    objects = [annotation(1, 1, [0, 0, 5, 5]) | ({} if part in entries else {part: value})]
    with pytest.raises(InputError, match=message):
        read(tmp_path, objects, replaced=entries)


@pytest.mark.parametrize("name", [None, True, 1.5, float("nan"), ["cat"], {}])
def test_a_category_name_that_is_no_text(tmp_path, name):
    with pytest.raises(InputError, match="a category's name must be text: "):
        read(tmp_path, [], replaced={"categories": [{"id": 1, "name": name}]})


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
    for text, cause in (
        (content + content, r"Extra data.*\. It may be several files in one$"),
        ('{"a": 1}\n{"a": 2}\n', r"Extra data.*\. It may be several files in one$"),
        ('{"images": [], ' + content[1:], r"\(repeated 'images'\)\. Keep one entry of each name$"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=rf"is not valid JSON \(?{cause}"):
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


@pytest.mark.parametrize("name", ["", "  ", "\u200b", "a\nb", "a\tb", "a\x00", "a\u2028b", "\ud83d"])
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
    with pytest.raises(InputError, match=r"val\.json: 1 image not found in .*val: 000002\.png"):
        read_data(folder)
    (folder / "val" / "000001.png").unlink()
    (folder / "more").mkdir()
    shutil.copy(folder / "train" / "000001.png", folder / "more")
    with pytest.raises(InputError, match=r"val\.json: 2 images not found in .*val: 000001\.png, 000002\.png"):
        read_data(folder)
    shutil.rmtree(folder / "more")
    shutil.rmtree(folder / "val")
    with pytest.raises(InputError, match=r"val\.json: 3 images not found in .*: 000001\.png"):
        read_data(folder)


def test_boxes_given_by_corners(tmp_path):
    objects = [annotation(1, 3, box) for box in ([10, 5, 30, 25.5], ["1", 2, 3, 4], [9, 9, 5, 5], [1, 2, 3])]
    data = read_coco(*write_coco(tmp_path, objects), ReadOptions(box_format="xyxy"))
    assert data.images[0].boxes.tolist() == [[10, 5, 20, 20.5], [1, 2, 2, 2]]
    assert data.images[0].areas.tolist() == [410, 4]
    assert warnings_of(data) == {
        "boxes have no width or no height: dropped": 1,
        "boxes are not four finite numbers: dropped": 1,
    }


@pytest.mark.parametrize(("field", "value"), [("box_format", "cxcywh"), ("rotated_boxes", "keep")])
def test_unknown_options(field, value):
    with pytest.raises(InputError, match=f"{field} is '{value}'. Choose from "):
        ReadOptions(**{field: value})


ENCLOSED = "boxes are rotated: replaced by the upright boxes around them"
NOT_ENCLOSED = "boxes have a rotation of unknown meaning: used without it"


def rotated(box, rotation, **more):
    return annotation(1, 3, box, segmentation=[], attributes={"occluded": False, "rotation": rotation}, **more)


@pytest.mark.parametrize("rotation", [90, 90.0, "90", -90, 270])
def test_a_rotated_rectangle_of_cvat_gives_the_upright_box_around_it(tmp_path, rotation):
    objects = [rotated([20, 4, 10, 30], rotation, area=300), annotation(1, 3, [20, 4, 10, 30])]
    files = write_coco(tmp_path, objects)
    data = read_coco(*files)
    assert data.images[0].boxes.tolist() == [[10, 14, 30, 10], [20, 4, 10, 30]]
    assert data.images[0].areas.tolist() == [300, 300]
    assert warnings_of(data) == {ENCLOSED: 1}
    with pytest.raises(InputError, match=r"1 boxes are rotated\. .* add --rotated_boxes enclose$"):
        read_coco(*files, ReadOptions(rotated_boxes="refuse"))
    corners = write_coco(tmp_path, [rotated([20, 4, 30, 34], rotation)])
    assert read_coco(*corners, ReadOptions(box_format="xyxy")).images[0].boxes.tolist() == [[10, 14, 30, 10]]


def test_the_upright_box_touches_the_corners_of_the_rotated_one(tmp_path):
    rng = np.random.default_rng(0)
    boxes, angles = rng.uniform(5, 30, (50, 4)), rng.uniform(-360, 360, 50)
    data = read(tmp_path, [rotated(box.tolist(), angle) for box, angle in zip(boxes, angles)], sizes=[(200, 200)])
    for (x, y, width, height), angle, got in zip(boxes, np.radians(angles), data.images[0].boxes, strict=True):
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        corners = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]]) * [width / 2, height / 2]
        corners = corners @ turn.T + [x + width / 2, y + height / 2]
        expected = [*corners.min(axis=0), *np.ptp(corners, axis=0)]
        np.testing.assert_allclose(got, expected, atol=1e-9)


@pytest.mark.parametrize("rotation", [0, 0.0, "0", None, 180, -360.0, False])
def test_a_rotation_that_does_not_change_the_box_is_not_mentioned(tmp_path, rotation):
    files = write_coco(tmp_path, [rotated([20, 4, 10, 30], rotation)])
    data = read_coco(*files, ReadOptions(rotated_boxes="refuse"))
    assert (data.images[0].boxes.tolist(), data.warnings) == ([[20, 4, 10, 30]], {})


@pytest.mark.parametrize(
    "changes",
    [{"attributes": {"rotation": value}} for value in (float("nan"), float("inf"), 1e9, "left", [90], True)]
    + [{"segmentation": [[20, 4, 30, 4, 30, 34]]}, {"attributes": {}, "rotation": 30}]
    + [{"attributes": {name: 30}} for name in ("angle", "Rotation", "theta")]
    + [{"attributes": None, "angle": "30"}, {"attributes": [{"name": "rotation", "value": 30}], "theta": 0}],
)
def test_a_rotation_that_is_not_known_to_be_of_this_box(tmp_path, changes):
    """FastLabel writes the box around the rotated one; other tools have attributes of that name."""
    files = write_coco(tmp_path, [rotated([20, 4, 10, 30], 90) | changes])
    data = read_coco(*files)
    assert (data.images[0].boxes.tolist(), warnings_of(data)) == ([[20, 4, 10, 30]], {NOT_ENCLOSED: 1})
    with pytest.raises(InputError, match="1 boxes are rotated"):
        read_coco(*files, ReadOptions(rotated_boxes="refuse"))


@pytest.mark.parametrize("changes", [{"angle": "front"}, {"attributes": {"angle": "left"}}, {"attributes": ["a", 1]}])
def test_words_are_no_rotation(tmp_path, changes):
    data = read_coco(*write_coco(tmp_path, [annotation(1, 3, [20, 4, 10, 30], **changes)]))
    assert (data.images[0].boxes.tolist(), data.warnings) == ([[20, 4, 10, 30]], {})


def test_an_invalid_box_stays_invalid_when_rotated(tmp_path):
    data = read(tmp_path, [rotated([20, 4, -3, 30], 45), rotated([20, 4, 30], 45), rotated([20, 4, 0, 30], 45)])
    assert not len(data.images[0].boxes)


def test_boxes_with_an_angle(tmp_path):
    with pytest.raises(InputError, match=r"1 boxes have five numbers, whose last may be an angle .* upright boxes$"):
        read(tmp_path, [annotation(1, 3, [20, 20, 10, 30, 45]), annotation(1, 3, [1, 2, 3, 4])])


PARENT = "categories without objects that others name as their supercategory: left out"


def write_splits(folder, categories, used):
    """Write a split with one image for each list of `used` category ids."""
    for split, ids in used.items():
        files = write_coco(folder / split, [annotation(1, id_, [5, 5, 10, 10]) for id_ in ids])
        content = json.loads(files[1].read_text())
        content["categories"] = [dict(zip(("id", "name", "supercategory"), entry)) for entry in categories]
        (folder / f"{split}.json").write_text(json.dumps(content))
        files[1].unlink()
        files[0].rename(folder / f"{split}_images")
        shutil.rmtree(folder / split)
    return folder


@pytest.mark.parametrize(
    ("categories", "kept"),
    [
        ([(0, "pets", "none"), (1, "cat", "pets"), (2, "dog", "pets")], {1: "cat", 2: "dog"}),
        ([(0, "cat", "none"), (1, "cat", "cat"), (2, "dog", "cat")], {1: "cat", 2: "dog"}),
        ([(0, "none", "none"), (1, "cat", "none"), (2, "dog", "none")], {1: "cat", 2: "dog"}),
        ([(0, " pets", None), (1, "cat", "pets "), (2, "dog", "pets")], {1: "cat", 2: "dog"}),
        ([(9, "pets", "all"), (8, "all", None), (1, "cat", "pets"), (2, "dog", "pets")], {1: "cat", 2: "dog"}),
        ([(0, "pets", "none"), (1, "cat", "animal"), (2, "dog", "animal")], {0: "pets", 1: "cat", 2: "dog"}),
        ([(0, "None", None), (1, "cat", None), (2, "dog", None)], {0: "None", 1: "cat", 2: "dog"}),
        ([(1, "cat", "cat"), (2, "dog", "dog"), (3, "bird", "bird")], {1: "cat", 2: "dog", 3: "bird"}),
    ],
)
def test_a_category_that_only_groups_others_is_no_class(tmp_path, categories, kept):
    splits = read_data(write_splits(tmp_path, categories, {"train": [1, 2], "val": [1]}))
    for data in splits.values():
        assert data.categories == kept
        assert warnings_of(data) == ({PARENT: len(categories) - len(kept)} if len(kept) < len(categories) else {})
    names = [repr(name.strip()) for id_, name, _ in categories if id_ not in kept]
    assert [*splits["train"].warnings.get(PARENT, [])] == names


@pytest.mark.parametrize("used", [{"train": [1, 2], "val": [0]}, {"train": [0, 1], "val": [2]}])
def test_all_splits_decide_together_what_is_a_class(tmp_path, used):
    categories = [(0, "pets", "none"), (1, "cat", "pets"), (2, "dog", "pets")]
    folder = write_splits(tmp_path, categories, used)
    both = read_data(folder)
    assert both["train"].categories == both["validation"].categories == {0: "pets", 1: "cat", 2: "dog"}
    for split, data in both.items():
        (alone,) = read_data(folder, splits=[split]).values()
        assert (alone.categories, alone.warnings) == (data.categories, {})


def test_a_used_parent_of_the_same_name_is_refused(tmp_path):
    folder = write_splits(tmp_path, [(0, "fish", "none"), (1, "fish", "fish")], {"train": [0, 1]})
    with pytest.raises(InputError, match="several categories are named 'fish'"):
        read_data(folder)


def renamed_images(folder, names):
    """Write a dataset in which images `1.png`, `2.png`, ... have other names in the annotations."""
    images, file = write_coco(folder, [], sizes=[(4, 4)] * len(names))
    content = json.loads(file.read_text())
    for entry, name in zip(content["images"], names):
        entry["file_name"] = name
    file.write_text(json.dumps(content))
    return images, file


@pytest.mark.parametrize(
    "form", ["images\\{}", "C:\\data\\{}", "/label-studio/data/upload/{}", "../../media/{}", "https://host/{}?a=b"]
)
@pytest.mark.parametrize("whole", [True, False])
def test_images_under_the_names_of_another_machine(tmp_path, form, whole):
    images, file = renamed_images(tmp_path, [form.format(f"{number}.png") for number in (1, 2, 3)])
    data = read_data(tmp_path)["train"] if whole else read_coco(images, file)
    assert [image.path for image in data.images] == [images / f"{number}.png" for number in (1, 2, 3)]
    warning = "image file names are those of another machine: matched by the last part of the name"
    assert warnings_of(data) == {warning: 3}
    assert any(warning in message and "1.png" in message for message in check_data({"train": data}).warnings)


def test_names_that_lead_out_of_the_dataset(tmp_path):
    images, file = renamed_images(tmp_path / "data", ["../../1.png", "/nothing/4.png", "3.png"])
    (tmp_path / "1.png").touch()
    (images / "1.png").unlink()
    message = rf"2 file names lead out of {images}, which has no images of these names: \.\./\.\./1\.png, /nothing/4"
    with pytest.raises(InputError, match=message):
        read_coco(images, file)
    errors = []
    data = read_coco_file([images], file, ReadOptions(on_error=errors.append))
    assert len(errors) == 1
    assert all(tmp_path / "data" in image.path.parents for image in data.images)


def test_the_message_about_missing_images_says_what_there_is(tmp_path):
    images, file = renamed_images(tmp_path, ["x1.png", "x2.png", "3.png", "a\nb.png", "y" * 300 + ".png"])
    with pytest.raises(InputError) as error:
        read_coco(images, file)
    message = str(error.value)
    assert f"4 images not found in {images}: x1.png, x2.png, 'a\\nb.png', ...yyy" in message
    assert "Images there that are not listed: 1.png, 2.png, 4.png and 1 more. Restore them" in message
    assert len(message.splitlines()) == 1
    assert len(message) < 600
    for name in ("x/" * 3000 + "1.png", "\ud800/1.png", "gone/6.png"):
        with pytest.raises(InputError, match=r"json: 1 image not found in .{1,400}: \d\.png\. Restore them"):
            read_coco(*renamed_images(tmp_path / "more", [name, "1.png"]))


def test_an_image_that_is_listed_twice(tmp_path):
    images, file = renamed_images(tmp_path, ["1.png", "2.png", "./1.png"])
    data = read_coco(images, file)
    assert [image.path for image in data.images] == [images / "1.png", images / "2.png", images / "1.png"]
    assert warnings_of(data) == {"images are listed more than once: each entry is used": 1}
