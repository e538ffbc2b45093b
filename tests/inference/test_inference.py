"""Detections in many images: those of each alone, in order, with bounded memory; all formats say the same."""

import csv
import json
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import batched_nms

from helpers.http_server import serving
from helpers.models import tiny_model
from hf_dino import DinoDetrImageProcessor
from hf_dino.data import InputError, read_coco, read_data
from hf_dino.inference import (
    SAVE_FORMATS,
    DetectionOptions,
    Detector,
    ImageInput,
    ResultsDirectory,
    detect_objects,
    find_inputs,
    sources,
)
from hf_dino.inference.results import to_record
from hf_dino.utils.names import named_classes


SIZES = [(60, 40), (40, 60), (60, 40), (50, 50), (60, 40), (40, 60), (90, 40), (60, 40), (50, 50), (60, 40)]


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return tiny_model(), DinoDetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 160})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number, (width, height) in enumerate(SIZES):
        pixels = generator.integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(folder / f"{number:02}.png")
    return folder


def stream(detector, items, *, batch_size=1, pool=None, **options):
    return Detector(*detector, DetectionOptions(**options), batch_size=batch_size).stream(items, pool)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_detections_do_not_depend_on_the_batch(detector, folder, batch_size, num_workers):
    items = find_inputs([str(folder)])
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        results = [
            *stream(detector, items, batch_size=batch_size, pool=pool if num_workers else None, threshold=0.015)
        ]
    assert [result.input for result in results] == items
    for result in results:
        alone = detect_objects(*detector, Image.open(result.input.source), 0.015)
        assert alone
        assert [each["name"] for each in result.detections] == [each["name"] for each in alone]
        for key in ("score", "box"):
            found, expected = ([each[key] for each in rows] for rows in (result.detections, alone))
            torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_options_keep_fewer_detections(detector, folder):
    items = find_inputs([str(folder)])[:3]
    everything = [each.detections for each in stream(detector, items, threshold=0.005)]
    top = [each.detections for each in stream(detector, items, threshold=0.005, top_k=3)]
    assert top == [detections[:3] for detections in everything]
    some = [each.detections for each in stream(detector, items, threshold=0.005, labels=frozenset({1, 2}))]
    assert some == [[each for each in detections if each["label"] in (1, 2)] for detections in everything]
    best_of_some = [each.detections for each in stream(detector, items, threshold=0.005, labels={1}, top_k=1)]
    assert all(found[0]["label"] == 1 for found in best_of_some)  # chosen among the wanted classes
    suppressed = [each.detections for each in stream(detector, items, threshold=0.005, nms_iou=0.0)]
    assert sum(map(len, suppressed)) < sum(map(len, everything))
    for kept, found in zip(suppressed, everything, strict=True):
        boxes, scores, labels = (torch.tensor([each[key] for each in found]) for key in ("box", "score", "label"))
        assert kept == [found[index] for index in batched_nms(boxes, scores, labels, 0.0)]


def test_bfloat16_finds_about_the_same(detector, folder):
    items = find_inputs([str(folder)])[:2]
    low = Detector(*detector, DetectionOptions(0.0), dtype=torch.bfloat16).stream(items)
    for one, other in zip(low, stream(detector, items, threshold=0.0), strict=True):
        best, expected = (np.mean([each["score"] for each in result.detections]) for result in (one, other))
        assert best == pytest.approx(expected, rel=0.1)


def test_an_image_that_is_too_small_for_the_model_takes_nothing_from_the_others(detector, folder):
    small = (detector[0], DinoDetrImageProcessor(size={"shortest_edge": 60, "longest_edge": 90}))
    results = [*stream(small, find_inputs([str(folder)]), threshold=0.005)]
    assert [result.input.name for result in results if not result.detections] == ["03.png", "08.png"]
    assert "03.png: cannot be used at its resized size of 60 x 60 pixels" in results[3].error


class Endless:
    """Images without end; all that are alive at a time are counted."""

    def __init__(self, sizes):
        self.sizes, self.num_read, self.alive = sizes, 0, weakref.WeakValueDictionary()

    def __iter__(self):
        for number in count():
            yield ImageInput(self, str(number))

    def read(self, source):
        self.num_read += 1
        image = Image.new("RGB", self.sizes(self.num_read), "teal")
        self.alive[self.num_read] = image
        return image


@pytest.mark.parametrize(
    ("sizes", "most"),
    [
        (lambda number: (40, 40), 40),
        (lambda number: (40 + (number if number % 40 == 0 else 0), 40), 60),  # a rare size waits for others like it
        (lambda number: (40 + number, 40), 60),
    ],
)
def test_memory_is_bounded(detector, monkeypatch, sizes, most):
    images = Endless(sizes)
    monkeypatch.setattr("hf_dino.inference.detector.read_image", images.read)
    most_alive = 0
    for number, result in enumerate(islice(stream(detector, images, batch_size=4), 60)):
        assert result.input.name == str(number)
        most_alive = max(most_alive, len(images.alive))
    assert images.num_read < 60 + most
    assert most_alive < most


def test_large_images_do_not_wait_for_each_other(detector, monkeypatch):
    images = Endless(lambda number: (40 + number, 40))
    monkeypatch.setattr("hf_dino.inference.detector.read_image", images.read)
    monkeypatch.setattr("hf_dino.inference.detector.MAX_PENDING_PIXELS", 5000)
    next(iter(stream(detector, images, batch_size=8)))
    assert images.num_read <= 4


def test_broken_images_take_nothing_from_the_others(detector, folder, tmp_path):
    images = shutil.copytree(folder, tmp_path / "images")
    (images / "00.png").write_text("no image")
    (images / "03b.heic").write_text("needs a plug-in")
    (images / "05.png").write_bytes((images / "05.png").read_bytes()[:-50])
    results = [*stream(detector, find_inputs([str(images)]), batch_size=3)]
    assert [result.input.name for result in results if result.error] == ["00.png", "03b.heic", "05.png"]
    assert "pip install pillow-heif" in next(result.error for result in results if ".heic" in result.input.name)
    assert len(results) == len(SIZES) + 1


def test_inputs_of_every_kind(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    images = tmp_path / "images"
    shutil.copytree(folder, images / "sub" / "deep")
    for name in ("b.png", "a.jpg", ".hidden.png", "._a.jpg"):
        shutil.copy(folder / "00.png", images / name)
    (images / "notes.txt").write_text("no image")
    (images / "movie.mp4").touch()

    def names(*arguments, **options):
        return [item.name for item in find_inputs(arguments, **options)]

    deep = [f"sub/deep/{number:02}.png" for number in range(10)]
    assert names("images") == ["a.jpg", "b.png"]
    assert "movie.mp4" in caplog.text
    assert ".hidden.png" not in caplog.text
    assert names("images", recursive=True) == ["a.jpg", "b.png", *deep]
    assert [str(item.source) for item in find_inputs(["images"])] == ["images/a.jpg", "images/b.png"]
    assert names("images/*.png", "images/a.jpg") == ["b.png", "a.jpg"]
    assert names("images/**/0[12].png") == deep[1:3]
    assert names(str(images / "*.jpg")) == ["a.jpg"]
    (tmp_path / "list.txt").write_text("images/b.png\n\n  images/sub/deep \n")
    assert names("@list.txt") == ["b.png", *(name[9:] for name in deep)]
    (images / "odd[1].png").write_bytes((images / "b.png").read_bytes())
    assert names("images/odd[1].png") == ["odd[1].png"]  # a file of this name is no pattern


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("gone.png", "gone.png: file or directory not found"),
        ("gone/*.png", r"gone/\*\.png: the pattern matches no images"),
        ("*.txt", r"the pattern matches no images, but empty.txt, list.txt"),
        ("@gone.txt", "gone.txt: file not found"),
        ("@list.txt", "a list cannot contain other lists, got @list.txt"),
        ("@empty.txt", "the list is empty"),
        ("https://", "is not the http or https URL of a file"),
    ],
)
def test_arguments_that_name_no_image(argument, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text("@list.txt")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match=message):
        find_inputs([argument])


def test_images_on_the_web(detector, folder, monkeypatch):
    with serving((folder / "00.png").read_bytes(), [{}, {"status": 404}], name="some%20image.png") as files:
        (item,) = find_inputs([files.url + "?token=secret"])
        assert item.name == "some image.png"
        assert "secret" not in str(item.source)
        (found,), (missing,) = [*stream(detector, [item])], [*stream(detector, [item])]
        assert found.image.tobytes() == Image.open(folder / "00.png").tobytes()
        assert missing.error == f"{item.source}: the server answered 404 Not Found"
        monkeypatch.setattr(sources, "MAX_URL_BYTES", 100)
        (large,) = stream(detector, [item])
        assert "is larger than" in large.error
        monkeypatch.setattr(sources, "MAX_URL_BYTES", 10**9)
        monkeypatch.setattr(sources, "MAX_URL_SECONDS", 0.2)
        files.plan = [{"delay": 1.0}]
        (slow,) = stream(detector, [item])
        assert "cannot be downloaded" in slow.error or "took longer" in slow.error


@pytest.fixture(scope="module")
def saved(detector, folder, tmp_path_factory):
    """All formats of one run, and its results."""
    output = tmp_path_factory.mktemp("saved") / "out"
    model, _ = detector
    directory = ResultsDirectory(output, SAVE_FORMATS, {}, named_classes(model.config.id2label))
    items = find_inputs([str(folder)])
    directory.check_inputs(items)
    directory.check_new(items)
    directory.open()
    results = [directory.save_files(result) for result in stream(detector, items, threshold=0.02)]
    for result in results:
        directory.append(to_record(result))
    directory.close(complete=True)
    assert any(result.detections for result in results)
    return output, results


def corners(result, clip=False):
    boxes = np.array([each["box"] for each in result.detections]).reshape(-1, 4)
    return np.clip(boxes, 0, result.image.size * 2) if clip else boxes


def read_corners(image):
    return np.hstack([image.boxes[:, :2], image.boxes[:, :2] + image.boxes[:, 2:]])


def test_coco_is_read_back_exactly(saved, folder):
    output, results = saved
    split = read_coco(folder, output / "coco.json")
    assert split.categories == {label: f"class {label}" for label in range(5)}
    for image, result in zip(split.images, results, strict=True):
        assert (image.width, image.height) == result.image.size
        np.testing.assert_allclose(read_corners(image), corners(result), rtol=0, atol=1e-12)
        assert image.category_ids.tolist() == [each["label"] for each in result.detections]


@pytest.mark.parametrize(
    ("format", "labels", "images", "tolerance"),
    [("yolo", "labels", "images", 1e-3), ("voc", "Annotations", "JPEGImages", 1.0 + 1e-6)],
)
def test_yolo_and_voc_are_read_back_within_their_resolution(
    saved, folder, tmp_path, format, labels, images, tolerance
):
    output, results = saved
    data = shutil.copytree(output / format, tmp_path / "data")
    shutil.copytree(folder, data / images)
    assert {path.stem for path in (data / labels).iterdir()} == {Path(result.input.name).stem for result in results}
    (split,) = [split for name, split in read_data(data).items() if split.images][:1]
    by_name = {image.path.name: image for image in split.images}
    for result in results:
        image = by_name[result.input.name]
        names = [split.categories[category_id] for category_id in image.category_ids]
        assert names == [each["name"] for each in result.detections]
        np.testing.assert_allclose(read_corners(image), corners(result, clip=True), rtol=0, atol=tolerance)


def test_json_csv_and_labelstudio_say_the_same(saved, folder):
    output, results = saved
    expected = {str(result.input.source): result.detections for result in results}
    assert json.loads((output / "results.json").read_text()) == expected
    lines = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert lines == [to_record(result) for result in results]
    with (output / "results.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    detections = [(image, each) for image, found in expected.items() for each in found]
    assert [(row["image"], float(row["score"])) for row in rows] == [(i, each["score"]) for i, each in detections]
    assert [[float(row[name]) for name in ("x0", "y0", "x1", "y1")] for row in rows] == [
        e["box"] for _, e in detections
    ]
    tasks = json.loads((output / "labelstudio.json").read_text())
    for task, result in zip(tasks, results, strict=True):
        (prediction,) = task["predictions"]
        values = [region["value"] for region in prediction["result"]]
        boxes = [[v["x"], v["y"], v["x"] + v["width"], v["y"] + v["height"]] for v in values]
        size = np.array(result.image.size * 2)
        np.testing.assert_allclose(np.reshape(boxes, (-1, 4)) / 100 * size, corners(result, clip=True), atol=1e-9)


def test_drawings_and_crops(saved):
    output, results = saved
    assert {path.name for path in output.glob("*.png")} == {result.input.name for result in results}
    crops = sorted((output / "crops").rglob("*.png"))
    assert len(crops) == sum(len(result.detections) for result in results)
    for result in results:
        for number, (each, box) in enumerate(zip(result.detections, corners(result, clip=True)), start=1):
            crop = Image.open(output / "crops" / each["name"] / f"{Path(result.input.name).stem}-{number}.png")
            x0, y0, x1, y1 = [*np.floor(box[:2]).astype(int), *np.ceil(box[2:]).astype(int)]
            assert np.array_equal(crop, np.asarray(result.image)[y0:y1, x0:x1])
