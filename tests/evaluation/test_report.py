"""The report is one self-contained file, has all results, and escapes every name."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from helpers.coco_files import annotation, write_coco
from helpers.command_line import hf_dino
from helpers.models import tiny_model
from hf_dino import DinoDetrImageProcessor
from hf_dino.data import InputError, read_coco
from hf_dino.evaluation import analyze_errors, detections_from_results, evaluate_coco, report
from hf_dino.evaluation.error_analysis import OUTCOMES
from hf_dino.evaluation.report import write_report


HOSTILE = {
    3: '<b>"dog" & $\\frac</b>',
    7: "<script>alert(1)</script>",
    9: "{{ 7 * 7 }}",
    11: "a very " * 20 + "long name",
}
VOID = {"meta", "img", "polyline"}
BOX = [10, 10, 40, 20]


class Page(HTMLParser):
    """Collect elements and text of a page, and check that every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.attributes, self.words = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def images_in(page):
    sources = [value for name, value in page.attributes if name == "src"]
    assert all(source.startswith("data:image/") for source in sources), "images are embedded"
    return [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in sources]


def make_report(path, data, results, **details):
    detections = detections_from_results(results)
    scores, analysis = evaluate_coco(data, detections), analyze_errors(data, detections)
    write_report(path, data, scores, analysis, title="a <model> on data", details=details)
    return path.read_text(encoding="utf-8"), scores, analysis


@pytest.fixture
def data(tmp_path):
    objects = [annotation(1, 3, BOX), annotation(1, 7, [50, 5, 20, 30]), annotation(2, 7, [0, 0, 50, 50], iscrowd=1)]
    return read_coco(*write_coco(tmp_path, objects, sizes=[(60, 80), (100, 60), (40, 80)], categories=HOSTILE))


RESULTS = [
    {"image_id": 1, "category_id": 3, "bbox": BOX, "score": 0.9},
    {"image_id": 1, "category_id": 3, "bbox": [52, 5, 20, 30], "score": 0.93},
    {"image_id": 3, "category_id": 11, "bbox": [0, 0, 20, 30], "score": 0.95},
]


def test_the_report_has_all_results(data, tmp_path):
    text, scores, analysis = make_report(tmp_path / "new" / "report.html", data, RESULTS, command="evaluate <it>")
    page = Page(text)
    words = " ".join(" ".join(page.words).split())
    for name in HOSTILE.values():
        assert name.strip()[:59] in words, "names are text"
        assert ("title", name) in page.attributes
    for value in scores.metrics.values():
        assert ("–" if value < 0 else f"{value:.3f}") in words
    for outcome, description in OUTCOMES.items():
        assert f"{outcome} {analysis.counts[outcome]} {description}" in words
    assert "3 images with 2 objects and 1 crowd regions" in words
    assert f"{HOSTILE[7]} {HOSTILE[3]} 1 1" in words, "one object of one was predicted as the other class"
    assert "evaluate <it>" in words
    assert "torch" in words
    assert "b" not in page.elements[page.elements.index("table") :], "no name has become an element"
    assert not {"script", "link", "iframe"} & set(page.elements)
    assert not re.search(r"https?://|url\(|@import", text)


def test_images(data, tmp_path):
    text, _, analysis = make_report(tmp_path / "report.html", data, RESULTS)
    curves, confusion, *worst = images_in(Page(text))
    assert (curves.format, confusion.format) == ("PNG", "PNG")
    assert len(worst) == len(analysis.worst_images) == 2
    for image in worst:
        assert image.format == "JPEG"
        assert max(image.size) <= 1600
        assert np.asarray(image).std() > 10


def test_no_detections_and_no_objects(data, tmp_path):
    text, *_ = make_report(tmp_path / "nothing.html", data, [])
    assert "false negative: 2" in text
    empty = read_coco(*write_coco(tmp_path / "empty", []))
    text, *_ = make_report(tmp_path / "empty.html", empty, [])
    assert "No image has an error." in text
    assert len(images_in(Page(text))) == 2


def test_many_classes(tmp_path, monkeypatch):
    """The matrix leaves out classes that never occur, and has no more of the others than are legible."""
    monkeypatch.setattr(report, "_MAX_CLASSES", 20)
    categories = {number: f"class {number}" for number in range(1, 41)}
    objects = [annotation(1, number, BOX) for number in range(11, 41)]
    data = read_coco(*write_coco(tmp_path, objects, categories=categories))
    results = [{"image_id": 1, "category_id": 40, "bbox": BOX, "score": 0.9}]
    text, *_ = make_report(tmp_path / "report.html", data, results)
    page = Page(text)
    assert "20 of 40 classes" in text
    assert page.elements.count("polyline") == 3 * 30
    assert 400 < max(images_in(page)[1].size) < 1000


def test_an_existing_file_is_not_overwritten(data, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("mine")
    with pytest.raises(InputError, match=r"report\.html: already exists"):
        make_report(path, data, RESULTS)
    assert path.read_text() == "mine"


def test_a_missing_image_leaves_no_partial_report(data, tmp_path):
    data.images[0].path.unlink()
    with pytest.raises(InputError, match=r"1\.png"):
        make_report(tmp_path / "report.html", data, RESULTS)
    assert not list(tmp_path.glob("*report*"))


def test_the_command_writes_all_files_and_overwrites_none(data, tmp_path, capsys):
    tiny_model(id2label=dict(enumerate(HOSTILE.values()))).save_pretrained(tmp_path / "model")
    DinoDetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 107}).save_pretrained(tmp_path / "model")
    files = [f"--images={tmp_path / 'images'}", f"--annotations={tmp_path / 'annotations.json'}"]
    outputs = {name: tmp_path / "new" / name for name in ("metrics_json", "results_json", "report_html")}
    command = ["evaluate", f"--model_name_or_path={tmp_path / 'model'}", *files, "--dataloader_num_workers=0"]
    command += ["--per_device_eval_batch_size=2"]
    assert hf_dino([*command, *(f"--{name}={path}" for name, path in outputs.items())]) == 0
    assert "Average Precision" in capsys.readouterr().out

    found = detections_from_results(json.loads(outputs["results_json"].read_text()))
    metrics = json.loads(outputs["metrics_json"].read_text())
    assert metrics.pop("ap_per_category").keys() == set(HOSTILE.values())
    assert metrics == evaluate_coco(data, found).metrics
    words = " ".join(Page(outputs["report_html"].read_text(encoding="utf-8")).words)
    assert f"hf-dino evaluate --model_name_or_path={tmp_path / 'model'}" in words
    for name, path in outputs.items():
        with pytest.raises(InputError, match="already exists"):
            hf_dino([*command, f"--{name}={path}"])
    assert hf_dino([*command, "--coco_backend=other"]) == 2


def test_metrics_of_more_detections_than_coco_s_are_marked_everywhere(data, tmp_path, capsys):
    tiny_model(id2label=dict(enumerate(HOSTILE.values()))).save_pretrained(tmp_path / "model")
    DinoDetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 107}).save_pretrained(tmp_path / "model")
    outputs = {name: tmp_path / name for name in ("metrics_json", "results_json", "report_html")}
    command = ["evaluate", f"--model_name_or_path={tmp_path / 'model'}", "--dataloader_num_workers=0"]
    command += [f"--images={tmp_path / 'images'}", f"--annotations={tmp_path / 'annotations.json'}"]
    command += ["--max_detections=400", *(f"--{name}={path}" for name, path in outputs.items())]
    assert hf_dino(command) == 0
    note = "With 400 detections of a class in an image instead of 100: not comparable with COCO's metrics."
    assert note in capsys.readouterr().out
    metrics = json.loads(outputs["metrics_json"].read_text())
    assert (metrics["max_detections"], "ar_400" in metrics, "ar_100" in metrics) == (400, True, False)
    page = " ".join(" ".join(Page(outputs["report_html"].read_text(encoding="utf-8")).words).split())
    assert f"Metrics {note}" in page
    assert "COCO metrics" not in page
    assert "AR 400" in page
    assert "at most 1, 10 or 400 detections per image and class" in page
    assert hf_dino([*command, "--max_detections=99"]) == 2


@pytest.mark.filterwarnings("error")
def test_names_that_are_long_or_in_no_font(tmp_path):
    names = {3: 300 * "x", 7: "🐈 猫"}
    data = read_coco(*write_coco(tmp_path, [annotation(1, 3, [0, 0, 20, 20])], categories=names))
    found = [{"image_id": 1, "category_id": 7, "bbox": [0, 0, 20, 20], "score": 0.9}]
    text, *_ = make_report(tmp_path / "report.html", data, found)
    words = Page(text).words
    assert words.count(59 * "x" + "…") == 2, "in the table of classes and in that of confusions"
    assert 300 * "x" not in words
    assert f'title="{300 * "x"}"' in text
