"""Videos: every frame, upright, at its time; what is written plays in a browser; damage is reported, never hidden."""

import functools
import http.server
import shutil
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from helpers.models import tiny_model
from helpers.videos import RATE, facts, make_video, numbered_frame
from hf_dino import DinoDetrImageProcessor
from hf_dino.data import InputError
from hf_dino.inference import (
    Detector,
    ObjectTracker,
    Video,
    VideoReader,
    find_inputs,
    read_video,
    video,
    write_video,
)
from hf_dino.inference.tracking import to_mot


VARIABLE_RATE = [0, 0.04, 0.1, 0.5, 0.52, 1.3]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def copy_video(source: Path, target: Path, **options: float) -> VideoReader:
    """Write the frames that are read, without drawing anything."""
    reader = VideoReader(Video(str(source)), **options)
    with write_video(target, Video(str(source)), is_excerpt=bool(options.get("start"))) as writer:
        for frame in reader:
            writer.write(frame.to_image(), frame)
    return reader


def with_alpha(number, size):
    alpha = np.full(size[::-1], 255, dtype=np.uint8)
    alpha[:, size[0] // 2 :] = 0
    return np.dstack([numbered_frame(number, size), alpha])


def noise(number, size):
    return np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


SOURCES = {
    "cfr.mp4": {"num_frames": 60},
    "vfr.mkv": {"times": VARIABLE_RATE, "last_duration": 0.7},
    "one.mp4": {"num_frames": 1},
    "odd.mkv": {"size": (161, 91), "pixel_format": "yuv444p"},
    "high.mkv": {"size": (64, 640)},
    "10-bit.mov": {"codec": "prores_ks", "pixel_format": "yuv422p10le"},
    "gray.mkv": {"codec": "ffv1", "pixel_format": "gray"},
    "b-frames.mp4": {"bf": "3"},
    "stream.ts": {},
    "web.webm": {"codec": "libvpx"},
}


@pytest.mark.parametrize(("name", "options"), SOURCES.items(), ids=SOURCES)
def test_every_frame_is_written_at_its_time(name, options, tmp_path):
    source = make_video(tmp_path / name, **options)
    reader = copy_video(source, tmp_path / "out.mp4")
    before, after = facts(source), facts(tmp_path / "out.mp4")
    assert (after.codec, after.pixel_format, after.audio, reader.faults) == ("h264", "yuv420p", [], [])
    assert after.size == tuple(length + length % 2 for length in before.size)
    np.testing.assert_allclose(after.times, np.subtract(before.times, before.times[0]), atol=1e-3)
    ends = [*options["times"][1:], 2.0] if "times" in options else [options.get("num_frames", 12) / RATE]
    assert after.duration == pytest.approx(ends[-1], abs=0.5 / RATE)
    for frame, expected in zip(after.pixels, before.pixels, strict=True):
        height, width = expected.shape[:2]
        assert np.abs(frame[:height, :width].astype(int) - expected).mean() < 3


def test_odd_sides_are_extended_not_scaled(tmp_path):
    source = make_video(tmp_path / "odd.mkv", size=(161, 91), pixel_format="yuv444p")
    copy_video(source, tmp_path / "out.mp4")
    (frame, *_) = facts(tmp_path / "out.mp4").pixels
    assert frame.shape == (92, 162, 3)
    assert np.abs(frame[:, -1].astype(int) - frame[:, -2]).max() < 12
    assert np.abs(frame[-1].astype(int) - frame[-2]).max() < 12


def quadrants(number, size):
    """Green at the top left, blue at the top right, red below."""
    pixels = np.full((size[1], size[0], 3), (220, 20, 20), dtype=np.uint8)
    pixels[: size[1] // 2, : size[0] // 2] = (20, 200, 20)
    pixels[: size[1] // 2, size[0] // 2 :] = (20, 20, 220)
    return pixels


@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
@pytest.mark.parametrize("mirrored", [False, True])
def test_frames_are_upright(rotation, mirrored, tmp_path):
    source = make_video(tmp_path / "a.mp4", 2, rotation=rotation, mirrored=mirrored, draw=quadrants)
    expected = np.rot90(quadrants(0, (96, 64)), rotation // 90)
    expected = np.fliplr(expected) if mirrored else expected
    image = next(read_video(source)).source.to_image()
    assert np.abs(np.asarray(image).astype(int) - expected).mean() < 6
    copy_video(source, tmp_path / "out.mp4")
    assert np.abs(facts(tmp_path / "out.mp4").pixels[0].astype(int) - expected).mean() < 8


def test_transparent_parts_are_white(tmp_path, caplog):
    source = make_video(tmp_path / "alpha.mov", codec="qtrle", pixel_format="argb", draw=with_alpha)
    image = np.asarray(next(read_video(source)).source.to_image())
    assert (image[:, 50:] == 255).all()
    assert (image[:, :48] < 255).all()
    assert "blended with white" in caplog.text


@pytest.mark.parametrize(
    ("name", "codec", "written"),
    [
        ("a.mp4", "aac", "aac"),
        ("a.mkv", "libopus", "opus"),
        ("a.ts", "aac", "aac"),
        ("a.avi", "libmp3lame", "mp3"),
        ("a.mov", "pcm_s16le", "aac"),
    ],
)
def test_audio_is_copied_or_encoded_for_players(name, codec, written, tmp_path):
    video_codec = {"codec": "mpeg4"} if name == "a.avi" else {}
    source = make_video(tmp_path / name, 50, audio=codec, **video_codec)
    reader = VideoReader(Video(str(source)))
    with write_video(tmp_path / "out.mp4", Video(str(source))) as writer:
        for frame in reader:
            writer.write(frame.to_image(), frame)
        writer.copy_remaining_audio()
    before, after = facts(source), facts(tmp_path / "out.mp4")
    assert after.audio == [written]
    assert after.audio_duration == pytest.approx(before.audio_duration, abs=0.03)


def test_an_excerpt_begins_with_its_first_frame_and_its_audio(tmp_path):
    source = make_video(tmp_path / "a.mp4", 100, audio="aac", g="25")
    reader = copy_video(source, tmp_path / "out.mp4", start=1.22, end=2)
    after = facts(tmp_path / "out.mp4")
    assert reader.num_frames == len(after.times) == 19  # at 1.24, 1.28, ... 1.96
    assert after.times[:2] == [0, 0.04]
    assert after.audio_duration == pytest.approx(0.76, abs=0.05)
    (first, *_), expected = after.pixels, numbered_frame(31, (96, 64))
    assert np.abs(first.astype(int) - expected).mean() < 3


def test_frames_have_numbers_and_seconds(tmp_path):
    source = make_video(tmp_path / "clip.mp4", times=VARIABLE_RATE)
    frames = [*read_video(source, every=2)]
    assert [item.name for item in frames] == ["clip/000000", "clip/000002", "clip/000004"]
    assert [item.source.seconds for item in frames] == VARIABLE_RATE[::2]
    assert {str(item.source) for item in frames} == {str(source)}


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "libx264"), ("a.mp4", "libx264"), ("a.avi", "mpeg4")])
def test_a_video_that_is_cut_short_is_read_as_far_as_it_goes(name, codec, tmp_path):
    fast_start = {"container_options": {"movflags": "faststart"}} if name == "a.mp4" else {}
    content = make_video(tmp_path / name, 60, codec=codec, draw=noise, **fast_start).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    reader = VideoReader(Video(str(tmp_path / name)))
    frames = [*reader]
    assert 10 < len(frames) < 40
    assert any("it is cut short, at " in fault for fault in reader.faults)


def test_broken_frames_are_counted_and_the_others_stay_in_step(tmp_path):
    source = make_video(tmp_path / "a.mp4", 40, codec="mpeg4", draw=noise, g="1")
    content = bytearray(source.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(200)
    source.write_bytes(content)
    reader = VideoReader(Video(str(source)))
    times = [frame.seconds for frame in reader]
    assert 35 <= len(times) <= 40
    assert any("damaged" in fault for fault in reader.faults)
    assert {*times} <= {round(number / RATE, 6) for number in range(40)}


def test_what_is_not_a_video_is_refused_in_one_line(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video " * 100)
    (tmp_path / "empty.mp4").touch()
    make_video(tmp_path / "sound.mp4", 0, audio="aac", with_video=False)
    make_video(tmp_path / "a.mp4", 12)
    for name, options, message in [
        ("text.mp4", {}, "cannot be read as a video"),
        ("empty.mp4", {}, "cannot be read as a video"),
        ("missing.mp4", {}, "cannot be read as a video"),
        ("sound.mp4", {}, "is not a video, it contains only audio"),
        ("a.mp4", {"start": 60}, r"contains no frames from 60 s on \(0.5 s long\)"),
    ]:
        with pytest.raises(InputError, match=rf"{name}: {message}") as caught:
            list(VideoReader(Video(str(tmp_path / name)), **options))
        assert "\n" not in str(caught.value)


def test_a_file_appears_when_it_is_complete(tmp_path):
    source = make_video(tmp_path / "a.mp4")
    (tmp_path / "out.mp4").write_text("before")

    def interrupted():
        with write_video(tmp_path / "out.mp4") as writer:
            for item in read_video(source):
                writer.write(item.source.to_image(), item.source)
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        interrupted()
    assert (tmp_path / "out.mp4").read_text() == "before"
    with write_video(tmp_path / "none.mp4"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "out.mp4"]


def test_only_a_few_frames_are_decoded_ahead(tmp_path, monkeypatch):
    source = make_video(tmp_path / "a.mp4", 100)
    reader = VideoReader(Video(str(source)))
    frames = iter(reader)
    assert len([*islice(frames, 10)]) == 10
    frames.close()
    assert reader.num_frames <= 10 + video.DECODED_AHEAD + 2


def test_frames_are_inputs_of_the_detector(tmp_path):
    source = make_video(tmp_path / "a.mp4", 6, size=(60, 40))
    detector = Detector(
        tiny_model(), DinoDetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 160}), batch_size=4
    )
    results = [*detector.stream(read_video(source))]
    assert [result.input.name for result in results] == [f"a/{number:06}" for number in range(6)]
    assert {result.image.size for result in results} == {(60, 40)}
    (result,) = detector.stream(find_inputs([str(source)]))
    assert "read_video" in result.error


def test_a_camera_is_opened_by_its_device(tmp_path, monkeypatch):
    source, opened = make_video(tmp_path / "a.mp4", 5), []
    av = video.import_av()

    def open_device(address, format, options):
        opened.append((address, format))
        return av.open(str(source))

    monkeypatch.setattr(video, "import_av", lambda: type("Av", (), {**vars(av), "open": staticmethod(open_device)}))
    for platform, device in (("linux", ("/dev/video1", "v4l2")), ("darwin", ("1:none", "avfoundation"))):
        monkeypatch.setattr(video.sys, "platform", platform)
        frames = [*VideoReader(Video("camera:1"))]
        assert opened[-1] == device
        assert len(frames) == 5
        assert Video("camera:1").name == "camera-1"


def test_names_of_streams_have_no_secrets():
    stream = Video("rtsp://user:secret@example.org:554/live/door.stream?token=secret")
    assert "secret" not in f"{stream} {stream.name}"
    assert stream.is_live
    assert not Video("https://example.org/a.mp4").is_live


def moving_boxes(number: int) -> list[dict]:
    """Three objects whose paths cross, without overlapping at any moment."""
    corners = [(10 + 5 * number, 20), (290 - 5 * number, 80), (20 + 3 * number, 140)]
    return [
        {"label": label, "name": f"class {label}", "score": 0.9 - 0.1 * label, "box": [x, y, x + 40, y + 40]}
        for label, (x, y) in enumerate(corners)
    ]


@pytest.mark.parametrize("every", [1, 3])
def test_three_moving_objects_keep_their_ids(every):
    tracker, lines = ObjectTracker(0.3, frame_rate=25 / every), []
    numbers = range(0, 50, every)
    for number in numbers:
        boxes = moving_boxes(number)
        if 20 < number < 27:  # one is hidden for a moment
            boxes = boxes[1:]
        rows = tracker.update(boxes, number / 25)
        assert [{**row, "track": None} for row in rows] == [{**box, "track": None} for box in boxes]
        lines += [(row["label"], line.split(",")) for row in rows if (line := to_mot(number, [row]))]
    ids = {label: {line[1] for other, line in lines if other == label} for label in range(3)}
    assert sorted(ids.values()) == [{"1"}, {"2"}, {"3"}]
    frames = [int(line[0]) for label, line in lines if label == 1]
    assert frames == [number + 1 for number in numbers][1:]  # an id begins with the second detection
    assert lines[-1][1][2:7] == [f"{20 + 3 * numbers[-1]:.2f}", "140.00", "40.00", "40.00", "0.700000"]


def test_weak_detections_continue_a_track_but_are_no_results():
    tracker = ObjectTracker(0.5, frame_rate=25)
    found = []
    for number in range(12):
        score = 0.2 if 4 <= number < 9 else 0.9
        (box, *_) = moving_boxes(number)
        found.append([row["track"] for row in tracker.update([{**box, "score": score}], number / 25)])
    assert found == [[None], [1], [1], [1], *[[]] * 5, [1], [1], [1]]
    (trail,) = tracker.trails().values()
    assert len(trail) == 11
    assert tracker.update([], 60) == []
    assert not tracker.trails()


PAGE = (
    """<video id="video" src="{}" muted playsinline></video><script>document.getElementById("video").play()</script>"""
)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_plays_it(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    source = make_video(tmp_path / "odd.mkv", 50, size=(161, 91), pixel_format="yuv444p", audio="aac")
    copy_video(source, tmp_path / "out.mp4")
    (tmp_path / "index.html").write_text(PAGE.format("out.mp4"))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, playwright.sync_playwright() as driver:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        )
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/index.html")
        page.wait_for_function("video.currentTime > 0.3 || video.error", timeout=30_000)
        state = page.evaluate("[video.error, video.videoWidth, video.videoHeight, video.duration]")
        browser.close()
        server.shutdown()
    assert state[:3] == [None, 162, 92]
    assert state[3] == pytest.approx(2, abs=0.05)
