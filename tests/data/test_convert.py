"""Converted datasets are read as the same data. What a format does not support is reported, never invented."""

import io
import json
from collections import Counter

import datasets
import numpy as np
import pytest
from PIL import Image

from helpers.coco_files import annotation, write_coco
from helpers.command_line import hf_dino
from helpers.data_formats import FORMATS, as_imagefolder, coco_text, draw, voc_xml, write, write_shapes
from hf_dino.data import InputError, convert, convert_data, read_coco, read_data


pytestmark = pytest.mark.usefixtures("datasets_cache")

FORMAT_NAMES = ("coco", "voc", "yolo")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes")


def saved_table(shapes, folder):
    """Images inside Arrow files."""
    as_imagefolder(shapes, folder.with_name("images"))
    datasets.load_dataset(str(folder.with_name("images"))).save_to_disk(str(folder))


SOURCES = {**FORMATS, "saved table": saved_table}


def encoded(image):
    with image.path.open("rb") as file:
        return file.read()


def named_boxes(data):
    """Map the encoded image to its size, class names and boxes."""
    return {
        encoded(image): (
            (image.height, image.width),
            [data.categories[number] for number in image.category_ids],
            image.boxes,
        )
        for image in data.images
    }


def assert_same(converted, source, tolerance):
    assert list(converted) == list(source)
    for split, data in source.items():
        got, wanted = named_boxes(converted[split]), named_boxes(data)
        assert len(data.images) == len(converted[split].images)
        assert got.keys() == wanted.keys()
        for content, (size, names, boxes) in wanted.items():
            assert got[content][:2] == (size, names)
            corners, others = (
                np.hstack([each[:, :2], each[:, :2] + each[:, 2:]]) for each in (boxes, got[content][2])
            )
            # supervision_to_xywh rounds to thousandths of a pixel
            np.testing.assert_allclose(others, corners, rtol=0, atol=tolerance(size) + 1e-3)


TOLERANCES = {
    "coco": lambda size: 0,
    "yolo": lambda size: 7.5e-6 * max(size),
    "voc": lambda size: 0.5,
}


@pytest.mark.parametrize("form", FORMAT_NAMES)
@pytest.mark.parametrize("name", SOURCES)
def test_a_converted_dataset_is_read_as_the_same_data(shapes, tmp_path, name, form):
    SOURCES[name](shapes, tmp_path / "source")
    source = read_data(tmp_path / "source")
    seen = []
    convert_data(source, tmp_path / "converted", form, on_image=lambda: seen.append(1))
    converted = read_data(tmp_path / "converted")
    assert_same(converted, source, TOLERANCES[form])
    for split, data in converted.items():
        if form != "voc":  # whose classes have no order
            assert list(data.categories.values()) == list(source[split].categories.values())
        assert Counter(data.categories.values()) == Counter(source[split].categories.values())
    assert any(not len(image.boxes) for image in converted["train"].images)
    assert len(seen) == 2 * sum(len(data.images) for data in source.values())
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")] == []


@pytest.mark.parametrize("form", FORMAT_NAMES)
def test_how_precise_boxes_are(tmp_path, form):
    rng = np.random.default_rng(0)
    size = (900, 1600)
    top_left, sides = rng.uniform(0, 700, (200, 2)), rng.uniform(3, 200, (200, 2))
    boxes = np.hstack([top_left, sides])
    objects = [annotation(1, 3, box) for box in boxes.tolist()]
    source = {"train": read_coco(*write_coco(tmp_path, objects, sizes=[size], categories={3: "dog"}))}
    convert_data(source, tmp_path / "out", form)
    (found,) = read_data(tmp_path / "out")["train"].images
    edges, wanted = (np.hstack([each[:, :2], each[:, :2] + each[:, 2:]]) for each in (found.boxes, boxes))
    error = np.abs(edges - wanted).max()
    least, most = {"coco": (0, 1e-9), "yolo": (0.001, 7.5e-6 * 1600 + 1e-3), "voc": (0.4, 0.5)}[form]
    assert least <= error <= most


def test_coco_keeps_crowds_areas_and_ids_that_differ_between_splits(tmp_path):
    objects = [annotation(1, 3, [1, 2, 30, 20], area=123.5), annotation(1, 7, [5, 6, 9.25, 9], iscrowd=1)]
    splits = {
        split: read_coco(*write_coco(tmp_path / split, objects, sizes=[(40, 60), (30, 30)]))
        for split in ("train", "validation")
    }
    assert convert_data(splits, tmp_path / "out", "coco") == []
    data = read_data(tmp_path / "out")
    image = data["train"].images[0]
    assert image.areas.tolist() == [123.5, 83.25]
    assert image.iscrowd.tolist() == [0, 1]
    ids = [image.image_id for each in data.values() for image in each.images]
    assert ids == [1, 2, 3, 4], "each split had 1 and 2"
    assert data["train"].categories == splits["train"].categories
    content = json.loads((tmp_path / "out" / "train.json").read_text())
    assert "licenses" not in content
    assert set(content["images"][0]) == {"id", "file_name", "height", "width"}


def test_coco_keeps_ids_that_are_distinct(tmp_path):
    objects = [annotation(1, 3, [1, 2, 30, 20]), annotation(2, 7, [5, 6, 9, 9])]
    images, annotations = write_coco(tmp_path / "train", objects, sizes=[(40, 60), (30, 30)])
    content = json.loads(annotations.read_text())
    for each in content["images"]:
        each["id"] += 900
    for each in content["annotations"]:
        each["image_id"] += 900
    annotations.write_text(json.dumps(content))
    source = read_coco(images, annotations)
    convert_data({"train": source}, tmp_path / "out", "coco")
    found = read_data(tmp_path / "out")["train"]
    assert [image.image_id for image in found.images] == [901, 902]
    assert [image.category_ids.tolist() for image in found.images] == [[3], [7]]
    assert found.categories == source.categories


@pytest.mark.parametrize("form", ["voc", "yolo"])
def test_crowds_and_areas_are_left_out_if_not_supported(tmp_path, form):
    objects = [
        annotation(1, 3, [1, 2, 30, 20], area=123.5),
        annotation(1, 3, [1, 2, 10, 10], area=100.04),
        *[annotation(1, 7, [5, 6, 9, 9], iscrowd=1)] * 2,
    ]
    notes = convert_data({"train": read_coco(*write_coco(tmp_path, objects))}, tmp_path / "out", form)
    (image,) = read_data(tmp_path / "out")["train"].images
    assert image.boxes.tolist() == pytest.approx(np.array([[1, 2, 30, 20], [1, 2, 10, 10]]), abs=1e-2)
    classes = {
        "voc": [
            "train: 1 classes have no objects and cannot be listed in the format: left out",
            "train: 1 classes have another id",
        ],
        "yolo": ["train: 2 classes have another id"],
    }
    assert notes == [
        "train: 2 iscrowd annotations, which the format does not support: left out",
        "train: 1 objects had the area of a mask: replaced by that of the box",
        *classes[form],
    ]


@pytest.mark.parametrize("form", ["voc", "yolo"])
def test_boxes_lost_by_rounding_are_counted(tmp_path, form):
    boxes = [[1599.7, 2, 0.3, 20], [20, 30, 0.001, 5], [1, 2, 30, 20]]
    objects = [annotation(1, 3, box) for box in boxes]
    source = {"train": read_coco(*write_coco(tmp_path, objects, sizes=[(900, 1600)], categories={3: "dog"}))}
    notes = convert_data(source, tmp_path / "out", form)
    (image,) = read_data(tmp_path / "out")["train"].images
    assert len(image.boxes) == 2
    assert "train: 1 boxes are too small for the format's precision: lost" in notes


def test_warnings_of_the_reader_are_returned(tmp_path):
    source = {
        "train": read_coco(*write_coco(tmp_path, [annotation(1, 3, box) for box in ([1, 2, 0, 4], [1, 2, 3, 4])]))
    }
    expected = "train: 1 boxes have no width or no height: dropped; images/1.png"
    assert expected in convert_data(source, tmp_path / "out", "coco")


@pytest.mark.parametrize("form", FORMAT_NAMES)
def test_images_of_one_name_do_not_overwrite_each_other(tmp_path, form):
    names = ("a/1.png", "b/1.png", "1.bmp", "1-2.png", "A.PNG", "nosuffix")
    write(tmp_path / "source" / "train.json", coco_text(*names))
    for seed, name in enumerate(names):
        draw(tmp_path / "source" / "train" / f"{name}.png", seed=seed)
        (tmp_path / "source" / "train" / f"{name}.png").rename(tmp_path / "source" / "train" / name)
    source = read_data(tmp_path / "source")
    notes = convert_data(source, tmp_path / "out", form)
    converted = read_data(tmp_path / "out")
    assert_same(converted, source, TOLERANCES[form])
    assert {image.path.name for image in converted["train"].images} == {
        *("1.png", "1-2.png", "1-3.bmp", "1-2-4.png", "A.PNG", "nosuffix.png")
    }
    assert any("4 images were renamed" in note for note in notes)


@pytest.mark.parametrize("form", FORMAT_NAMES)
def test_rows_without_names_are_numbered_and_get_the_extension_of_their_format(tmp_path, form):
    rows = []
    for kind, seed in (("JPEG", 0), ("MPO", 1), ("WEBP", 2), ("JPEG2000", 3)):
        file = io.BytesIO()
        noise = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        more = {"save_all": True, "append_images": [Image.new("RGB", (6, 4))]} if kind == "MPO" else {}
        Image.fromarray(noise).save(file, format=kind, **more)
        rows.append({"bytes": file.getvalue(), "path": None})
    objects = [{"bbox": [[1, 2, 30, 20]], "category": ["cell"]}] * 4
    table = datasets.Dataset.from_dict({"image": rows, "objects": objects}).cast_column("image", datasets.Image())
    table.save_to_disk(str(tmp_path / "source"))
    source = read_data(tmp_path / "source")
    convert_data(source, tmp_path / "out", form)
    converted = read_data(tmp_path / "out")
    assert_same(converted, source, TOLERANCES[form])
    assert [image.path.name for image in converted["train"].images] == [
        *("00000001.jpeg", "00000002.jpg", "00000003.webp", "00000004.jp2")
    ]


def test_images_of_a_format_that_is_not_found_in_folders(tmp_path):
    write(tmp_path / "source" / "train.json", coco_text("1.eps"))
    draw(tmp_path / "source" / "train" / "1.eps")
    source = read_data(tmp_path / "source")
    with pytest.raises(InputError, match=r"1\.eps: EPS images are not found in directories"):
        convert_data(source, tmp_path / "out", "yolo")


@pytest.mark.parametrize("form", FORMAT_NAMES)
def test_boxes_that_extend_beyond_the_image_are_not_clipped(tmp_path, form):
    objects = [annotation(1, 3, box) for box in ([-10, 30, 20, 20], [50, -5, 30, 60])]
    source = {"train": read_coco(*write_coco(tmp_path, objects))}
    convert_data(source, tmp_path / "out", form)
    assert_same(read_data(tmp_path / "out"), source, TOLERANCES[form])


@pytest.mark.parametrize("form", FORMAT_NAMES)
def test_boxes_annotated_without_exif_orientation_stay_on_their_pixels(tmp_path, form):
    images, file = write_coco(tmp_path, [annotation(n, 3, [1, 2, 30, 20]) for n in (1, 2, 3)], sizes=[(40, 60)] * 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(images / "1.png", exif=exif)  # annotated without its orientation
    Image.new("RGB", (40, 60)).save(images / "2.png", exif=exif)  # annotated with its orientation
    source = {"train": read_coco(images, file)}
    notes = convert_data(source, tmp_path / "out", form)
    found = {image.path.name: image for image in read_data(tmp_path / "out")["train"].images}
    left_out = [note for note in notes if "1 images are annotated without their EXIF orientation" in note]
    assert len(left_out) == (form == "yolo")
    assert set(found) == {"2.png", "3.png"} | ({"1.png"} if form != "yolo" else set())
    for image in found.values():
        assert (image.height, image.width) == (40, 60)
        assert image.read().size == (60, 40)
        assert image.boxes == pytest.approx(np.array([[1, 2, 30, 20]]), abs=1e-2)


def test_classes_of_only_some_splits_have_one_id_in_all(tmp_path):
    splits = {
        "train": read_coco(*write_coco(tmp_path / "a", [annotation(1, 3, [1, 2, 3, 4])])),
        "test": read_coco(*write_coco(tmp_path / "b", [annotation(1, 5, [1, 2, 3, 4])], categories={5: "bird"})),
    }
    convert_data(splits, tmp_path / "out", "yolo")
    found = read_data(tmp_path / "out")
    assert found["train"].categories == found["test"].categories == {0: "dog", 1: "cat", 2: "bird"}
    assert found["test"].images[0].category_ids.tolist() == [2]


NAMES = {3: "a & <b>", 5: "two words", 7: "ключ: 'да'", 8: "no", 9: "1"}


@pytest.mark.parametrize("form", FORMAT_NAMES)
def test_any_class_name_is_kept(tmp_path, form):
    objects = [annotation(1, category_id, [1, 2, 3, 4]) for category_id in NAMES]
    convert_data({"train": read_coco(*write_coco(tmp_path, objects, categories=NAMES))}, tmp_path / "out", form)
    data = read_data(tmp_path / "out")["train"]
    assert [data.categories[number] for number in data.images[0].category_ids] == list(NAMES.values())


def test_voc_needs_objects(tmp_path):
    crowd = [annotation(1, 3, [1, 2, 3, 4], iscrowd=1)]
    source = {"train": read_coco(*write_coco(tmp_path / "source", crowd, categories={3: "dog"}))}
    with pytest.raises(InputError, match="Pascal VOC stores class names only with objects"):
        convert_data(source, tmp_path / "out", "voc")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    for form in ("coco", "yolo"):
        convert_data(source, tmp_path / form, form)
        assert list(read_data(tmp_path / form)["train"].categories.values()) == ["dog"]


def test_splits_without_images(tmp_path):
    full = read_coco(*write_coco(tmp_path / "source", [annotation(1, 3, [1, 2, 3, 4])]))
    empty = type(full)(full.source, [], full.categories)
    assert "test: no images: left out" in convert_data({"train": full, "test": empty}, tmp_path / "out", "yolo")
    assert list(read_data(tmp_path / "out")) == ["train"]
    with pytest.raises(InputError, match="there are no images"):
        convert_data({"test": empty}, tmp_path / "other", "yolo")


def source_of_two(folder):
    write(folder / "train.json", coco_text("1.png", "2.png"))
    draw(folder / "train" / "1.png")
    draw(folder / "train" / "2.png")
    return folder


def test_command_line(tmp_path, capsys):
    source = source_of_two(tmp_path / "source")
    words = ["data", "convert", str(source), "--format"]
    assert hf_dino([*words, "yolo", "--output_dir", str(tmp_path / "new" / "out")]) == 0
    printed = capsys.readouterr().out
    assert "warning: train: 1 classes have another id" in printed
    assert f"data: {tmp_path / 'new' / 'out'}" in printed.replace("\n", "")
    assert_same(read_data(tmp_path / "new" / "out"), read_data(source), TOLERANCES["yolo"])
    assert hf_dino(["data", "check", str(tmp_path / "new" / "out")]) == 0
    (tmp_path / "empty").mkdir()
    pair = ["--images", str(source / "train"), "--annotations", str(source / "train.json")]
    assert hf_dino(["data", "convert", *pair, "--format", "coco", "--output_dir", str(tmp_path / "empty")]) == 0
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == ["train", "train.json"]


@pytest.mark.parametrize(
    ("damage", "output", "message"),
    [
        (lambda source: (source / "train" / "2.png").unlink(), "out", "1 image not found in"),
        (lambda source: (source / "train" / "2.png").write_bytes(b"no"), "out", "2.png: cannot be read as an image"),
        (lambda source: draw(source / "train" / "2.png", (42, 60)), "out", "2.png: is annotated as 60 x 40"),
        (lambda source: None, "source", "already exists"),
        (lambda source: None, "source/train.json", "is not changed"),
        (lambda source: None, "source/out", "is not changed"),
    ],
)
def test_one_clear_error_and_nothing_left_behind(tmp_path, damage, output, message):
    source = source_of_two(tmp_path / "source")
    damage(source)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=message) as error:
        hf_dino(["data", "convert", str(source), "--format", "coco", "--output_dir", str(tmp_path / output)])
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(source, copy):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert.shutil, "copyfileobj", full)
    source = source_of_two(tmp_path / "source")
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'out'}'"):
        hf_dino(["data", "convert", str(source), "--format", "coco", "--output_dir", str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_partial_dataset_never_has_the_final_name_and_does_not_block_the_next(tmp_path):
    source = read_data(source_of_two(tmp_path / "source"))
    write(tmp_path / ".out.part" / "val.json", "from a killed conversion")
    there = []
    convert_data(source, tmp_path / "out", "coco", on_image=lambda: there.append((tmp_path / "out").exists()))
    assert there == [False] * 4
    assert_same(read_data(tmp_path / "out"), source, TOLERANCES["coco"])
    assert not (tmp_path / ".out.part").exists()


def test_difficult_voc_objects_do_not_become_ordinary_ones(tmp_path):
    folder = tmp_path / "source"
    draw(folder / "1.png")
    write(folder / "1.xml", voc_xml((40, 60), [("cell", [1, 2, 30, 20])], difficult="1"))
    draw(folder / "2.png", seed=1)
    write(folder / "2.xml", voc_xml((40, 60), [("cell", [1, 2, 30, 20])]))
    notes = convert_data(read_data(folder), tmp_path / "out", "voc")
    assert notes == ["train: 1 iscrowd annotations, which the format does not support: left out"]
    assert [len(image.boxes) for image in read_data(tmp_path / "out")["train"].images] == [0, 1]


def test_an_unknown_format(tmp_path):
    with pytest.raises(InputError, match=r"cannot write the format 'kitti'\. Choose from coco, voc, yolo"):
        convert_data({}, tmp_path / "out", "kitti")
