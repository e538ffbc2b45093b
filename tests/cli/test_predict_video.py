"""`hf-dino predict` in videos: drawn as MP4, rows with frame, seconds and id; each video is done once, or again."""

import csv
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import forks
from helpers.command_line import hf_dino
from helpers.models import tiny_model
from helpers.videos import RATE, facts, make_video, numbered_frame
from hf_dino import DinoDetrImageProcessor
from hf_dino.cli import predict_video
from hf_dino.data import InputError
from hf_dino.inference import VIDEO_FORMATS, ResultsDirectory, video, video_run


NUM_FRAMES = 12


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    """A directory with a model, videos and an image."""
    directory = tmp_path_factory.mktemp("reader")
    tiny_model().save_pretrained(directory / "model")
    DinoDetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 160}).save_pretrained(directory / "model")
    make_video(directory / "clip.mp4", NUM_FRAMES, size=(60, 40), audio="aac")
    make_video(directory / "other.mkv", 5, size=(61, 41), pixel_format="yuv444p")
    Image.fromarray(numbered_frame(0, (60, 40))).save(directory / "photo.png")
    return directory


@pytest.fixture
def run(reader, tmp_path, monkeypatch):
    """Run the command in a directory with `model`, `clip.mp4`, `other.mkv` and `photo.png`, on a CPU."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(reader / "model")
    for name in ("clip.mp4", "other.mkv", "photo.png"):
        shutil.copy(reader / name, tmp_path / name)

    def predict(*arguments, output="out", threshold=0.015):
        common = ["--model=model", f"--output={output}", f"--threshold={threshold}", "--device=cpu"]
        return hf_dino(["predict", *arguments, *common])

    return predict


def journal(output="out"):
    return [json.loads(line) for line in Path(output, "results.jsonl").read_text().splitlines()]


def files(folder="out"):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def test_all_formats_have_every_frame(run):
    assert run("clip.mp4", f"--save={','.join(VIDEO_FORMATS)}", "--track") == 0
    assert files() == {
        ".predict.json", ".predict.lock", "clip.mp4", "clip.mot.txt", "results.jsonl", "results.json", "results.csv",
        "coco.json",
    }  # fmt: skip
    rows = journal()
    assert [row["frame"] for row in rows] == [*range(NUM_FRAMES)]
    assert [row["seconds"] for row in rows] == [round(number / RATE, 6) for number in range(NUM_FRAMES)]
    assert {(row["image"], row["width"], row["height"]) for row in rows} == {("clip.mp4", 60, 40)}
    assert [row.get("last") for row in rows] == [None] * (NUM_FRAMES - 1) + [True]
    found = [(row["frame"], each) for row in rows for each in row["detections"]]
    assert found
    assert {type(each["track"]) for _, each in found} == {int, type(None)}

    with open("out/results.csv", newline="") as file:
        table = [*csv.DictReader(file)]
    assert [(int(line["frame"]), line["track"]) for line in table] == [
        (number, str(each["track"] or "")) for number, each in found
    ]
    named = json.loads(Path("out/results.json").read_text())
    assert [*named.items()] == [(f"clip/{row['frame']:06}", row["detections"]) for row in rows]
    coco = json.loads(Path("out/coco.json").read_text())
    assert [image["file_name"] for image in coco["images"]] == [*named]
    assert [each["track_id"] for each in coco["annotations"]] == [each["track"] for _, each in found]
    lines = [line.split(",") for line in Path("out/clip.mot.txt").read_text().splitlines()]
    assert [(int(frame) - 1, int(track)) for frame, track, *_ in lines] == [
        (number, each["track"]) for number, each in found if each["track"]
    ]
    drawn = facts(Path("out/clip.mp4"))
    assert (drawn.size, len(drawn.times), drawn.audio) == ((60, 40), NUM_FRAMES, ["aac"])


def test_the_detections_are_those_of_the_frames_as_images(run):
    assert run("clip.mp4", "--save=jsonl") == 0
    Path("frames").mkdir()
    for item in video.read_video("clip.mp4"):
        item.source.to_image().save(f"frames/{item.source.index:06}.png")
    assert run("frames", "--save=jsonl", output="images") == 0
    for row, expected in zip(journal(), journal("images"), strict=True):
        assert [each["name"] for each in row["detections"]] == [each["name"] for each in expected["detections"]]
        boxes, others = ([each["box"] for each in record["detections"]] for record in (row, expected))
        np.testing.assert_allclose(boxes, others, atol=1e-3)


def test_every_nth_frame_is_detected_in_and_the_others_show_its_detections(run, monkeypatch):
    shown = []
    draw = video_run.draw_rows

    def record(image, detections, *arguments, **options):
        shown.append([each["box"] for each in detections])
        return draw(image, detections, *arguments, **options)

    monkeypatch.setattr(video_run, "draw_rows", record)
    assert run("clip.mp4", "--save=images,jsonl", "--every=5", "--start=0.08", "--num_workers=0") == 0
    rows = journal()
    assert [(row["frame"], row["seconds"]) for row in rows] == [(0, 0.08), (5, 0.28)]
    expected = [[each["box"] for each in rows[number // 5]["detections"]] for number in range(NUM_FRAMES - 2)]
    assert shown == expected
    assert len(facts(Path("out/clip.mp4")).times) == NUM_FRAMES - 2


def test_one_video_is_drawn_into_a_file(run, capsys):
    assert run("other.mkv", "--json", output="drawn.mp4") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["videos"], summary["frames"], summary["images"]) == (1, 5, 0)
    assert summary["fps"] > 0
    assert facts(Path("drawn.mp4")).size == (62, 42)
    with pytest.raises(InputError, match="already exists"):
        run("other.mkv", output="drawn.mp4")
    for output in ("drawn.png", "drawn.avi", "other.mkv"):
        with pytest.raises(InputError, match=f"{output}: (a video is drawn into an MP4 file|is what is to be drawn)"):
            run("other.mkv", "--overwrite", output=output)
    with pytest.raises(InputError, match="is the name of one video, but 2 are to be drawn"):
        run("other.mkv", "clip.mp4", output="new.mp4")
    assert run("clip.mp4", "--save=json", output="new.mp4") == 2


def test_a_directory_is_one_of_images_or_else_of_videos(run, caplog):
    Path("phone").mkdir()
    for name in ("clip.mp4", "other.mkv", "photo.png"):
        shutil.copy(name, "phone")
    assert run("phone", "--save=yolo,images") == 0
    assert {"photo.png", "yolo/labels/photo.txt"} < files()
    assert "clip.mp4" not in files()
    assert "phone: 2 videos next to images: not used unless named; clip.mp4, other.mkv" in caplog.text
    Path("phone/photo.png").rename("phone/photo.zip")
    assert run("phone", output="videos") == 0
    assert "phone: 1 entries are not videos: not used; phone/photo.zip" in caplog.text
    assert files("videos") == {"clip.mp4", "other.mp4"}
    assert run("phone/*.mkv", output="pattern") == 0
    assert files("pattern") == {"other.mp4"}


def test_images_and_videos_share_the_tables(run):
    assert run("photo.png", "other.mkv", "--save=images,csv,coco") == 0
    assert {"photo.png", "other.mp4"} < files()
    with open("out/results.csv", newline="") as file:
        images = {(line["image"], line["frame"]) for line in csv.DictReader(file)}
    assert images == {("photo.png", ""), *(("other.mkv", str(number)) for number in range(5))}
    assert run("photo.png", "--save=csv", output="only") == 0
    assert "frame" not in Path("only/results.csv").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["clip.mp4", "--save=yolo"], "--save yolo is for images; of videos, choose among images, json"),
        (["clip.mp4", "photo.png", "--save=json,crops"], "--save crops is for images"),
        (["clip.mp4", "--save=mot"], "--save mot needs --track"),
        (["photo.png", "--every=2"], "--every is for videos, but there are only images"),
        (["photo.png", "--track", "--save=mot"], "--track is for videos"),
        (["photo.png", "--save=mot"], "--save mot is for videos"),
        (["clip.mp4", "--every=0"], "'--every'"),
        (["clip.mp4", "--start=1:2:3:4"], "'1:2:3:4' is not a time; give seconds, minutes:seconds"),
        (["clip.mp4", "--end=-1"], "is not a time"),
        (["clip.mp4", "--start=2", "--end=0:01"], "--end must be later than --start"),
    ],
)
def test_wrong_use_is_status_2_and_writes_nothing(run, arguments, message, capsys):
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_what_was_read_of_a_broken_video_is_kept_and_it_is_tried_again(run, caplog):
    good = make_video(Path("cut.mkv"), 60, size=(60, 40)).read_bytes()
    Path("cut.mkv").write_bytes(good[: len(good) // 2])
    with pytest.raises(InputError, match=r"^cut\.mkv: it is cut short, at .* of 2\.4 s; \d+ frames were used$"):
        run("cut.mkv", "--save=images,jsonl")
    num_frames = len(journal())
    assert num_frames == len(facts(Path("out/cut.mp4")).times) < 60
    assert "last" not in journal()[-1]
    Path("cut.mkv").write_bytes(good)
    assert run("cut.mkv", "--save=images,jsonl", "--resume") == 0
    assert [row["frame"] for row in journal()] == [*range(60)]
    assert len(facts(Path("out/cut.mp4")).times) == 60


def test_what_is_not_a_video_is_one_line_and_takes_nothing_from_the_others(run, capsys):
    Path("text.mp4").write_text("text " * 100)
    with pytest.raises(InputError, match=r"^text\.mp4: cannot be read as a video \(.*\)$"):
        run("text.mp4")
    with pytest.raises(InputError, match=r"1 of 3 images and videos cannot be read:\ntext\.mp4: "):
        run("text.mp4", "clip.mp4", "photo.png", "--json", output="all")
    assert json.loads(capsys.readouterr().out)["frames"] == NUM_FRAMES
    assert files("all") == {"clip.mp4", "photo.png"}


def test_ctrl_c_leaves_a_complete_file_and_resume_begins_the_video_again(run, monkeypatch):
    append = ResultsDirectory.append

    def interrupted(self, record):
        if record["image"] == "other.mkv" and record["frame"] == 2:
            raise KeyboardInterrupt
        append(self, record)

    arguments = ("clip.mp4", "other.mkv", "--save=images,jsonl,coco")
    assert run(*arguments, output="whole") == 0
    monkeypatch.setattr(ResultsDirectory, "append", interrupted)
    assert run(*arguments) != 0
    assert 2 < len(facts(Path("out/other.mp4")).times) <= 5
    coco = json.loads(Path("out/coco.json").read_text())
    assert coco["images"][-1]["file_name"] == "other/000003"
    monkeypatch.setattr(ResultsDirectory, "append", append)
    assert run(*arguments, "--resume") == 0
    assert journal() == journal("whole")
    assert Path("out/coco.json").read_text() == Path("whole/coco.json").read_text()
    assert len(facts(Path("out/other.mp4")).times) == 5
    before = Path("out/clip.mp4").stat().st_mtime_ns
    assert run(*arguments, "--resume") == 0
    assert Path("out/clip.mp4").stat().st_mtime_ns == before


def test_ctrl_c_in_a_single_drawing_leaves_a_complete_file(run, monkeypatch, capsys):
    draw = video_run.draw_rows

    def interrupted(*arguments, **options):
        interrupted.calls += 1
        if interrupted.calls == 4:
            raise KeyboardInterrupt
        return draw(*arguments, **options)

    interrupted.calls = 0
    monkeypatch.setattr(video_run, "draw_rows", interrupted)
    assert run("clip.mp4", "--num_workers=0", output="drawn.mp4") == 130
    assert 0 < len(facts(Path("drawn.mp4")).times) < NUM_FRAMES
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; drawn.mp4 has the frames so far"


def test_the_defaults_of_videos_may_be_given_and_a_summary_counts_videos(run, capsys):
    assert run("clip.mp4", "other.mkv", "--save=jsonl", "--start=0", "--every=1") == 0
    capsys.readouterr()
    assert run("clip.mp4", "other.mkv", "--save=jsonl", "--resume") == 0
    assert capsys.readouterr().out == "0 videos, 0 frames, 2 were there already, 0 objects, 0.0 frames/s -> out\n"
    assert run("clip.mp4", "photo.png", "--save=jsonl", "--resume") == 0
    assert "1 image, 0 videos, 0 frames, 1 was there already, " in capsys.readouterr().out


@pytest.mark.parametrize(("module", "extra"), [("av", "train"), ("trackers", "tracking")])
def test_a_missing_library_is_said_before_anything_is_written(run, monkeypatch, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs {module}: pip install 'hf-dino\[{extra}\]'"):
        run("clip.mp4", "--track")
    assert not Path("out").exists()


def test_a_killed_run_leaves_no_partial_file_of_the_final_name(run):
    command = ["predict", "clip.mp4", "--save=images,jsonl", "--model=model", "--output=out", "--threshold=0.015"]
    child = forks.start([*command, "--device=cpu"], before=forks.die_after_frame_3)
    assert forks.status_of(child) == -signal.SIGKILL
    assert len(journal()) == 4
    assert not Path("out/clip.mp4").exists()
    assert run("clip.mp4", "--save=images,jsonl", "--resume") == 0
    assert [row["frame"] for row in journal()] == [*range(NUM_FRAMES)]
    assert "clip.mp4" in files()
    with pytest.raises(InputError, match=r"made with every None \(now 2\)"):
        run("clip.mp4", "--save=images,jsonl", "--resume", "--every=2")


def test_two_videos_never_share_a_name(run):
    shutil.copy("clip.mp4", "clip.mov")
    with pytest.raises(InputError, match="several videos would be saved as"):
        run("clip.mp4", "clip.mov", "--save=jsonl")
    Path("more").mkdir()
    shutil.copy("other.mkv", "more/clip.mkv")
    assert run("clip.mp4", "--save=jsonl") == 0
    with pytest.raises(InputError, match=r"more/clip\.mkv: has the same name as clip\.mp4"):
        run("more/clip.mkv", "--save=jsonl", "--resume")


def test_a_video_in_the_output_directory_is_never_replaced(run, tmp_path):
    before = Path("clip.mp4").read_bytes()
    with pytest.raises(InputError, match="use a different --output"):
        run("clip.mp4", "--overwrite", output=".")
    assert Path("clip.mp4").read_bytes() == before


@pytest.mark.parametrize("every", [1, 3])
def test_a_camera_records_until_ctrl_c(run, monkeypatch, every):
    """The stream is generated; only the opening of a device is not tested."""
    append = ResultsDirectory.append
    monkeypatch.setattr(video, "_open_camera", lambda address: video.import_av().open("clip.mp4"))

    def interrupted(self, record):
        append(self, record)
        if record["frame"] == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(ResultsDirectory, "append", interrupted)
    arguments = ("camera:0", "--save=images,jsonl", "--track", f"--every={every}")
    assert run(*arguments) == 0
    assert journal()[-1]["last"]
    assert {row["image"] for row in journal()} == {"camera:0"}
    assert 7 <= len(facts(Path("out/camera-0.mp4")).times) <= NUM_FRAMES
    assert run("camera:0", "other.mkv", "--save=images,jsonl", output="two") == 130, "the rest of the run stops too"
    assert {row["image"] for row in journal("two")} == {"camera:0"}


def test_tiles_and_classes_apply_to_frames(run):
    make_video(Path("large.mp4"), 2, size=(200, 150))
    assert run("large.mp4", "--save=jsonl", "--tile=80", "--classes=class 1", "--top_k=2", threshold=0.005) == 0
    assert {each["name"] for row in journal() for each in row["detections"]} == {"class 1"}
    assert {len(row["detections"]) for row in journal()} == {2}


def test_frames_that_are_too_small_for_the_model_are_one_error(run, reader):
    Path("model").unlink()
    shutil.copytree(reader / "model", "model")
    DinoDetrImageProcessor(size={"shortest_edge": 60, "longest_edge": 90}).save_pretrained("model")
    make_video(Path("small.mp4"), 3, size=(50, 50))
    with pytest.raises(InputError, match=r"^small\.mp4: cannot be used at its resized size of") as caught:
        run("small.mp4", "--save=images,jsonl", "--batch_size=1")
    assert "\n" not in str(caught.value)
    assert "small.mp4" not in files()


def test_formats_are_those_of_the_library():
    assert predict_video.VIDEO_FORMATS == VIDEO_FORMATS


CHILD = """
import resource, sys
from hf_dino.cli import main
try:
    main(["predict", sys.argv[1], "--model=model", "--output", sys.argv[2], "--save", "images", "jsonl", "coco", "mot",
          "--track", "--every", sys.argv[3], "--threshold=0.02", "--device=cpu"])
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 50])
def test_memory_does_not_grow_with_the_length(run, every):
    peaks = []
    for num_frames in (200, 2000):
        make_video(Path(f"{num_frames}.mp4"), num_frames, size=(320, 180), audio="aac")
        command = [sys.executable, "-c", CHILD, f"{num_frames}.mp4", f"out{num_frames}", str(every)]
        child = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(child.stderr.split()[-1]) / 1024)
        drawn = facts_of_duration(Path(f"out{num_frames}/{num_frames}.mp4"))
        assert drawn == pytest.approx(num_frames / RATE, abs=1 / RATE)
    assert peaks[1] < peaks[0] + 100, peaks  # MiB; the frames alone would be 300


def facts_of_duration(path):
    reader = video.VideoReader(video.Video(str(path)))
    return float(reader.stream.duration * reader.stream.time_base)
