"""The run of `hf-dino predict` through one video."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import tee
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from PIL import Image

from ..utils.errors import InputError, count_of
from ..utils.io import atomic_write
from .detector import Detector, ImageResult, map_ahead, worker_threads
from .results import draw_rows, to_record
from .sources import ImageInput, Video
from .tracking import LOW_SCORE, ObjectTracker, to_mot
from .video import VideoFrame, VideoReader, VideoWriter, to_input, write_video


if TYPE_CHECKING:
    from .run import PredictionRun

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VideoOptions:
    """What is detected in a video; each field is an option of `hf-dino predict`."""

    every: int | None
    start: Fraction | None
    end: Fraction | None
    track: bool

    def settings(self) -> dict[str, Any]:
        """Return what the results depend on, `None` where an option is not given or has its default."""
        every = None if self.every == 1 else self.every
        start, end = (float(time) if time else None for time in (self.start, self.end))
        return {"every": every, "start": start, "end": end, "track": self.track or None}


class _Shown(NamedTuple):
    """A frame with the detections to draw in it: its own, or those of the last frame that has some."""

    frame: VideoFrame
    result: ImageResult | None  # of this frame
    rows: list[dict[str, Any]]
    trails: dict[int, list[tuple[float, float]]]


def detect_in_video(
    run: "PredictionRun",
    item: ImageInput,
    drawing: Path | None,
    mot: Path | None = None,
    save: Callable[[dict[str, Any]], None] = lambda record: None,
) -> bool:
    """Detect in the frames of a video. If it is cut short, or after Ctrl-C, the files have the frames so far.

    Args:
        run (`PredictionRun`): Counts what is found, and notes what could not be read.
        item (`ImageInput`): The video.
        drawing (`Path`, *optional*): Video to write.
        mot (`Path`, *optional*): Text of the MOT challenge to write.
        save (`Callable`, *optional*): Receives the record of each frame that is detected in.

    Returns:
        `bool`: `True` if Ctrl-C ended what a camera records.

    Raises:
        KeyboardInterrupt: After Ctrl-C, unless it is the end of what a camera records.
    """
    try:
        video = _VideoRun(run, item)
        video.detect(drawing, mot, save)
    except InputError as error:
        run.errors[str(item.source)] = str(error)
        return False
    video.report(mot)
    if video.is_interrupted and not video.is_live:
        raise KeyboardInterrupt
    return video.is_interrupted


class _VideoRun:
    """The frames of one video on their way from the reader through the detector to the files."""

    def __init__(self, run: "PredictionRun", item: ImageInput):
        assert isinstance(item.source, Video)
        options, threshold = run.video_options, run.detector.options.threshold
        self.run, self.item, self.video, self.is_live = run, item, item.source, item.source.is_live
        self.start, self.end, self.every = options.start or Fraction(0), options.end, options.every or 1
        self.reader = VideoReader(self.video, self.start, self.end)
        rate = float(self.reader.rate / self.every)
        self.tracker = ObjectTracker(threshold, rate) if options.track else None
        self.objects: Counter[str] = Counter()
        self.tracks: set[int] = set()
        self.num_frames = self.num_without_track = 0
        self.start_time = time.monotonic()
        self.is_interrupted = False
        self.pending: dict[str, Any] = {}  # the record of the last frame

    def detect(self, drawing: Path | None, mot: Path | None, save: Callable[[dict[str, Any]], None]) -> None:
        """Write the files, which end with the last frame before Ctrl-C."""
        ahead = 2 * self.run.num_workers
        with ExitStack() as stack:
            audio = None if self.is_live else self.video
            writer = drawing and stack.enter_context(write_video(drawing, audio, is_excerpt=self.start > 0))
            mot_file = stack.enter_context(stack.enter_context(atomic_write(mot)).open("w")) if mot else None
            pool = stack.enter_context(worker_threads(self.run.num_workers))
            frames = self._frames(drawing is not None, pool, ahead)
            if writer:
                drawn = map_ahead(self._draw, frames, pool, ahead)
                encoder = stack.enter_context(ThreadPoolExecutor(1))
                frames = map_ahead(partial(_write, writer), drawn, encoder, max(1, ahead))
            try:
                self._save(self.run.show_progress(frames, self.reader.expected_frames, "frames"), mot_file, save)
            except KeyboardInterrupt:
                self.is_interrupted = True
            if self.pending:
                save(self.pending | ({"last": True} if self.is_complete else {}))
            if writer and not self.is_interrupted and self.end is None:
                writer.copy_remaining_audio()

    @property
    def is_complete(self) -> bool:
        return (self.is_live or not self.is_interrupted) and not self.reader.faults

    def _frames(self, with_all: bool, pool: Executor | None, ahead: int) -> Iterator[_Shown]:
        """Yield the frames with their detections; those between detections only `with_all`."""
        shown, detected = self._streams(with_all)
        detector = self._detector()
        inputs = (to_input(frame, self.item.name) for frame in detected if self._is_due(frame))
        results = detector.stream(inputs, None if self.is_live else pool, ahead)
        rows: list[dict[str, Any]] = []
        for frame in shown:
            result = next(results, None) if self._is_due(frame) else None
            if result is not None:
                rows = self._rows(frame, result)
            yield _Shown(frame, result, rows, self.tracker.trails() if self.tracker else {})

    def _streams(self, with_all: bool) -> Sequence[Iterable[VideoFrame]]:
        """Return the frames to show, and the same frames for the detector, which is a few ahead."""
        if not with_all:
            return tee(filter(self._is_due, self.reader))
        if self.is_live or self.every == 1:
            return tee(self.reader)
        # decoded twice, so that the frames between those of a batch need not wait in memory
        return self.reader, VideoReader(self.video, self.start, self.end)

    def _is_due(self, frame: VideoFrame) -> bool:
        return frame.index % self.every == 0

    def _detector(self) -> Detector:
        """Return a detector that finds what the tracker needs, and does not wait for further frames of a camera."""
        given = self.run.detector
        threshold = min(given.options.threshold, LOW_SCORE if self.tracker else 1.0)
        return Detector(
            given.model,
            given.processor,
            replace(given.options, threshold=threshold),
            batch_size=1 if self.is_live else given.batch_size,
            dtype=given.dtype,
            on_tiles=given.on_tiles,
        )

    def _rows(self, frame: VideoFrame, result: ImageResult) -> list[dict[str, Any]]:
        if result.error:
            raise InputError(result.error)
        return self.tracker.update(result.detections, frame.seconds) if self.tracker else result.detections

    def _draw(self, shown: _Shown) -> tuple[_Shown, Image.Image]:
        image = (shown.result and shown.result.image) or shown.frame.to_image()
        return shown, draw_rows(image, shown.rows, self.run.results.classes, trails=shown.trails, enlarge=False)

    def _save(self, frames: Iterable[_Shown], mot_file: TextIO | None, save: Callable[[dict[str, Any]], None]) -> None:
        for shown in frames:
            self.num_frames += 1
            if shown.result is None:
                continue
            previous, self.pending = self.pending, self._record(shown)
            if previous:  # one behind, since the last one is marked
                save(previous)
            if mot_file:
                mot_file.write(to_mot(shown.frame.index, shown.rows))

    def _record(self, shown: _Shown) -> dict[str, Any]:
        assert shown.result is not None
        self.objects += Counter(each["name"] for each in shown.rows)
        if self.tracker:
            ids = [each["track"] for each in shown.rows]
            self.num_without_track += ids.count(None)
            self.tracks |= {*ids} - {None}
        record = to_record(replace(shown.result, detections=shown.rows))
        return {**record, "frame": shown.frame.index, "seconds": shown.frame.seconds}

    def report(self, mot: Path | None) -> None:
        """Add the counts to those of the run, which prints them."""
        if self.reader.faults:
            used = count_of(self.num_frames, "frame was", "frames were")
            self.run.errors[str(self.video)] = f"{self.video}: {'; '.join(self.reader.faults)}; {used} used"
        if mot and self.num_without_track:
            rows = count_of(self.num_without_track, "detection")
            logger.warning("%s: without %s of objects not seen before", mot, rows)
        num_tracks = len(self.tracks) if self.tracker else None
        self.run.count_video(self.item, self.num_frames, self.objects, num_tracks, time.monotonic() - self.start_time)


def _write(writer: VideoWriter, drawn: tuple[_Shown, Image.Image]) -> _Shown:
    shown, image = drawn
    writer.write(image, shown.frame)
    return shown
