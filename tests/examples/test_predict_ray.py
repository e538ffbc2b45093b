"""`examples/predict_ray.py` on a cluster of two workers: killed at any moment, each image has one row in the end."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from PIL import Image

from helpers.models import tiny_model
from hf_dino import DinoDetrImageProcessor
from hf_dino.inference import DetectionOptions, Detector, find_inputs


pytest.importorskip("ray")
parquet = pytest.importorskip("pyarrow.parquet")

SCRIPT = Path(__file__).parents[2] / "examples" / "predict_ray.py"
NUM_IMAGES = 60


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("model")
    DinoDetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 160}).save_pretrained("model")
    Path("images").mkdir()
    for number in range(NUM_IMAGES):
        Image.effect_noise((60, 40), 50).convert("RGB").save(f"images/{number:03}.png")
    Path("images/broken.png").write_text("no image")
    return tmp_path


def start(source, output):
    options = ["--model=model", "--threshold=0.02", "--block_size=2", "--batch_size=1", "--num_workers=2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), source, output, *options],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for_files(output, number):
    deadline = time.monotonic() + 120
    while len([*Path(output).glob("[!.]*.parquet")]) < number:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def processes_of(job, name=""):
    return [each for each in psutil.Process(job.pid).children(recursive=True) if name in " ".join(each.cmdline())]


def read_rows(output):
    return [row for path in Path(output).glob("[!.]*.parquet") for row in parquet.read_table(path).to_pylist()]


@pytest.mark.slow
def test_each_image_has_one_row_whatever_is_killed(folder):
    job = start("images", "out")
    wait_for_files("out", 3)
    for process in [*processes_of(job), psutil.Process(job.pid)]:
        process.kill()
    job.wait()
    before = {path.name for path in Path("out").glob("[!.]*.parquet")}

    job = start("images", "out")
    wait_for_files("out", len(before) + 2)
    worker = processes_of(job, "DetectInBlock")[0]
    worker.send_signal(signal.SIGKILL)
    told, _ = job.communicate(timeout=200)
    assert job.returncode == 0
    assert f"{NUM_IMAGES + 1} images -> out, 1 of them with an error" in told
    assert f"{NUM_IMAGES + 1} images, 0 of them detected in before" not in told
    assert before < {path.name for path in Path("out").glob("[!.]*.parquet")}, "what was done stays"

    rows = {Path(row["image"]).name: row for row in read_rows("out")}
    counts = Counter(row["image"] for row in read_rows("out"))
    assert counts == Counter(str(path) for path in (folder / "images").iterdir())
    assert "not a known image format" in rows["broken.png"]["error"]
    processor = DinoDetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 160})
    detector = Detector(tiny_model(), processor, DetectionOptions(threshold=0.02))
    for result in detector.stream(find_inputs(["images/00*.png"])):
        row = rows[result.input.name]
        assert (row["width"], row["height"], row["error"]) == (60, 40, None)
        assert len(row["detections"]) == len(result.detections) > 0
        for found, expected in zip(row["detections"], result.detections):
            assert found["name"] == expected["name"]
            assert [found["score"], *found["box"]] == pytest.approx([expected["score"], *expected["box"]], rel=1e-4)
