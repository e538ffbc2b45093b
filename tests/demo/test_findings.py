"""One pass per image; what is shown and saved of it is the same as from `hf-dino predict`, and quick."""

import csv
import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.models import tiny_model
from hf_dino import DinoDetrImageProcessor


pytest.importorskip("gradio")
pytest.importorskip("supervision")
pytest.importorskip("matplotlib")

from hf_dino.demo import page
from hf_dino.demo.findings import FILES, LOWEST_SCORE, Finding, find_objects
from hf_dino.exported import READERS, Session, load_exported
from hf_dino.inference import detect_objects
from hf_dino.inference.results import draw_rows


PROCESSOR = DinoDetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 160})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(directory / "noise.png")
    (directory / "broken.png").write_bytes(b"\x89PNG no image")
    return directory


@pytest.fixture(scope="module")
def model():
    """A model with scores on both sides of the lowest one."""
    model = tiny_model()
    for head in model.class_embed:
        head.bias.data += 2.5
    return model


@pytest.fixture(scope="module")
def finding(model, folder):
    return find_objects(model, PROCESSOR, folder / "noise.png")


def test_detections_are_those_of_the_library(model, finding, folder):
    expected = detect_objects(model, PROCESSOR, Image.open(folder / "noise.png"), LOWEST_SCORE)
    assert len(expected) > 10
    assert list(finding.detections) == expected
    assert finding.size == (90, 60)
    assert "s on cpu, 90 x 60 pixels" in finding.text


def test_queries_of_the_inspection_are_the_detections(finding):
    boxes = np.array([each["box"] for each in finding.detections])
    np.testing.assert_allclose(finding.inspection.boxes[-1], boxes, rtol=1e-6)


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("names", [[], ["class 1"], ["class 0", "class 3"]])
def test_filtering_keeps_scores_and_classes(finding, threshold, names):
    kept = finding.keep(threshold, names)
    assert kept == sorted(kept)
    for index, each in enumerate(finding.detections):
        wanted = each["score"] >= threshold and (not names or each["name"] in names)
        assert (index in kept) == wanted


def test_a_finding_is_small(finding):
    arrays = [value.nbytes for value in vars(finding.inspection).values() if isinstance(value, np.ndarray)]
    assert sum(arrays) < 10_000 * len(finding.detections)
    assert len(finding.preview) < 500_000


def test_of_boxes_at_a_point_the_smallest_is_chosen(tmp_path):
    Image.new("RGB", (100, 100), "gray").save(tmp_path / "gray.png")
    boxes = [[0, 0, 100, 100], [20, 20, 40, 40], [20, 20, 60, 60]]
    detections = [{"label": 0, "name": "a", "score": 0.5, "box": box} for box in boxes]
    preview = find_objects(tiny_model(), PROCESSOR, tmp_path / "gray.png").preview
    found = Finding(size=(100, 100), preview=preview, detections=detections)
    scale = found.open_preview().width / 100
    assert scale > 1
    assert found.detection_at([0, 1, 2], (30 * scale, 30 * scale)) == 1
    assert found.detection_at([0, 2], (30 * scale, 30 * scale)) == 2
    assert found.detection_at([0, 1, 2], (50 * scale, 50 * scale)) == 2
    assert found.detection_at([1, 2], (90 * scale, 90 * scale)) is None


def test_files_contain_what_is_shown(finding, tmp_path):
    kept = finding.keep(0.2)[:5]
    rows = [finding.detections[index] for index in kept]
    paths = {kind: finding.save(kept, kind, tmp_path) for kind in FILES}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths.values())
    assert json.loads(paths["JSON"].read_text()) == {"noise.png": rows}
    with paths["CSV"].open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["image"], float(line["score"]), line["name"]) for line in lines] == [
        ("noise.png", each["score"], each["name"]) for each in rows
    ]
    coco = json.loads(paths["COCO"].read_text())
    assert [each["score"] for each in coco["annotations"]] == [each["score"] for each in rows]
    assert coco["images"] == [{"id": 1, "file_name": "noise.png", "width": 90, "height": 60}]
    assert len(coco["categories"]) == 5
    drawn = draw_rows(Image.open(finding.path), rows, finding.classes)
    assert (np.asarray(Image.open(paths["PNG"])) == np.asarray(drawn)).all()


def test_a_broken_image_is_one_line_without_the_path(model, folder):
    finding = find_objects(model, PROCESSOR, folder / "broken.png")
    assert finding.text.startswith("broken.png: cannot be read as an image")
    assert "\n" not in finding.text
    assert str(folder) not in finding.text
    assert page.redraw(finding, 0.3, [], None)[0] is None


def test_an_image_too_small_for_the_model_is_one_line(folder):
    processor = DinoDetrImageProcessor(size={"height": 40, "width": 40})
    finding = find_objects(tiny_model(), processor, folder / "noise.png")
    assert finding.text.startswith("noise.png: cannot be used at its resized size of 40 x 40 pixels")
    assert "\n" not in finding.text


@pytest.mark.parametrize("classes", [[], ["class 3"]])
def test_a_slider_is_answered_within_150_milliseconds_of_cpu(finding, classes, tmp_path):
    generator = np.random.default_rng(0)
    corner = generator.uniform(0, 1, (100, 2)) * [900, 700]
    boxes = np.hstack([corner, corner + generator.uniform(20, 200, (100, 2))])
    labels = generator.integers(0, 5, 100)
    detections = [
        {"label": int(label), "name": f"class {label}", "score": 0.5 + index / 1000, "box": box.tolist()}
        for index, (label, box) in enumerate(zip(labels, boxes))
    ]
    path = tmp_path / "large.jpg"
    Image.effect_noise((1000, 800), 60).convert("RGB").save(path)
    blank = find_objects(tiny_model(), PROCESSOR, path)
    large = replace(blank, detections=detections, classes=finding.classes)
    times = []
    for _ in range(5):
        start = time.process_time()
        drawing, rows, *_ = page.redraw(large, 0.3, classes, None)
        drawing.save(tmp_path / "shown.jpg")
        times.append(time.process_time() - start)
    assert len(rows) == (100 if not classes else (labels == 3).sum())
    assert min(times) < 0.150


def test_the_slider_is_answered_without_the_model(model, finding):
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    counts = [len(page.redraw(finding, threshold, [], None)[1]) for threshold in (0.05, 0.1, 0.2)]
    page.show_looks(page.LOOKS, finding, 0, 1, False)
    page.show_hover(page.HOVER, finding, 0.1, [])
    handle.remove()
    assert counts[0] > counts[-1]
    assert not calls


def test_the_chosen_object_stays_chosen_while_it_is_shown(finding):
    kept = finding.keep(0.1)
    assert page.redraw(finding, 0.1, [], kept[-1])[3].value == kept[-1]
    assert page.redraw(finding, 0.1, [], None)[3].value == kept[0]
    assert page.redraw(finding, 1.0, [], kept[-1])[3].value is None


def test_where_dino_looked_depends_on_object_and_layer(finding):
    first = page.show_looks(page.LOOKS, finding, 0, 1, False)
    others = [page.show_looks(page.LOOKS, finding, 1, 1, False), page.show_looks(page.LOOKS, finding, 0, 2, False)]
    others += [page.show_looks(page.LOOKS, finding, 0, 0, False), page.show_looks(page.LOOKS, finding, 0, 1, True)]
    for other in others:
        assert first[2].tobytes() != other[2].tobytes()
    assert first[1].tobytes() == others[0][1].tobytes()


def test_an_exported_model_is_shown_without_where_it_looked(model, folder, tmp_path, monkeypatch):
    def run(*inputs):
        with torch.no_grad():
            outputs = model(*inputs)
        return [outputs.logits.numpy(), outputs.pred_boxes.numpy()]

    facts = {"config": model.config.to_dict(), "processor": PROCESSOR.to_dict(), "least_edge": 32, "least_size": 32}
    monkeypatch.setitem(READERS, ".onnx", lambda *arguments, **options: Session(run, facts, "ONNX Runtime"))
    (tmp_path / "model.onnx").touch()
    finding = find_objects(*load_exported(tmp_path / "model.onnx"), folder / "noise.png")
    assert len(finding.detections) > 10
    assert page.redraw(finding, 0.1, [], None)[0] is not None
    text, *figures = page.show_looks(page.LOOKS, finding, 0, 1, False)
    assert text == page.NEEDS_PYTORCH
    assert figures == [None, None, None]
