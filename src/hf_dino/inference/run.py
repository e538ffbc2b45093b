"""One run of `hf-dino predict`: its loop, its counts, and what it prints."""

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

from ..utils.errors import BrokenInputError, count_of
from ..visualization import save_image
from .detector import Detector, ImageResult, map_ahead, worker_threads
from .processes import InputQueue
from .results import ResultsDirectory, draw_rows, to_record
from .sources import ImageInput, Video
from .video_run import VideoOptions, detect_in_video


Item = TypeVar("Item")

MAX_LINES = 100  # on the terminal: one per image, or only a summary
MAX_ERRORS = 20  # on the terminal
MAX_RAISED = 2  # of them in the last message, which has a line for each
PROGRESS_DELAY = 2.0  # seconds
DUPLICATE_SECONDS = 1.0  # one press of Ctrl-C arrives twice: from the terminal, and from a launcher


class PredictionRun:
    """One run of the command.

    Args:
        detector (`Detector`): Of this process.
        results (`ResultsDirectory`): Where the results are saved.
        queue (`InputQueue`): The images of all processes.
        video_options (`VideoOptions`): What is detected in videos.
        num_workers (`int`): Threads that read and save images.
        quiet (`bool`): Whether to print a summary in JSON alone.
    """

    def __init__(
        self,
        detector: Detector,
        results: ResultsDirectory,
        queue: InputQueue,
        video_options: VideoOptions,
        *,
        num_workers: int,
        quiet: bool,
    ):
        self.detector, self.results, self.queue, self.video_options = detector, results, queue, video_options
        self.num_workers, self.quiet = num_workers, quiet or queue.rank > 0
        self.kinds = "images"
        self.total = self.num_skipped = self.num_images = self.num_videos = self.num_frames = 0
        self.errors: dict[str, str] = {}
        self.objects: Counter[str] = Counter()
        self.target = results.folder
        self.start = time.monotonic()

    def draw_one(self, item: ImageInput, target: Path) -> None:
        """Draw one image or video into a file."""
        self.total, self.target = 1, target
        if isinstance(item.source, Video):
            self.kinds = "videos"
            with stop_on_signals():
                detect_in_video(self, item, target)
            return
        with self._progress(self.total, "images"):
            (result,) = self.detector.stream([item])
        if result.image is not None:
            with result.image:
                save_image(draw_rows(result.image, result.detections, self.results.classes), target)
        self._count(result)

    def save_all(self, inputs: Sequence[ImageInput], *, resume: bool, overwrite: bool) -> None:
        """Save all images in the directory. After a signal to stop, or an error, what was finished is saved.

        Args:
            inputs (`Sequence[ImageInput]`): All images in the main process; the others get theirs from it.
            resume (`bool`): Whether to continue an earlier run.
            overwrite (`bool`): Whether to replace the results of an earlier run.

        Raises:
            InputError: If another run uses the directory, or another process failed.
            SystemExit: After a signal.
        """
        with self.results.locked() if self.queue.rank == 0 else nullcontext(), stop_on_signals() as received:
            try:
                if self.queue.rank == 0:
                    self._prepare(inputs, resume, overwrite)
                else:
                    self.results.open()
                self._save(inputs)
            except KeyboardInterrupt:
                self._stop(inputs, *received)
            except Exception as error:
                self.results.close_journal()
                self.queue.fail(str(error))
                if isinstance(error, OSError):
                    raise BrokenInputError(f"{error}; --resume continues once this is mended") from error
                raise

    def _prepare(self, inputs: Sequence[ImageInput], resume: bool, overwrite: bool) -> None:
        self.results.check_previous(inputs, resume=resume, overwrite=overwrite)  # a run may have come and gone
        if overwrite:
            self.results.remove_previous()
        done = self.results.resume(inputs) if resume else set()
        remaining = sorted((item for item in inputs if str(item.source) not in done), key=_is_video)
        self.total, self.num_skipped = len(remaining), len(done)
        self.results.has_videos = any(map(_is_video, inputs))
        kinds = sorted({_is_video(item) for item in inputs})
        self.kinds = " and ".join(("images", "videos")[is_video] for is_video in kinds)
        self.results.open()
        self.queue.put(remaining, self.detector.batch_size)

    def _save(self, inputs: Sequence[ImageInput]) -> None:
        for is_video, group in groupby(self.queue.take(), key=_is_video):  # images first
            (self._save_videos if is_video else self._save_images)(group)
        self.results.close_journal()
        with self._progress(self.total, self.kinds, self.start) as show:
            summaries = self.queue.gather(self._counts(), show)
        if self.queue.rank == 0:
            self._add_up(summaries, inputs)
            self.results.close(complete=True, inputs=inputs)

    def _save_images(self, inputs: Iterator[ImageInput]) -> None:
        results, ahead = self.results, 2 * self.num_workers
        with worker_threads(self.num_workers) as pool, self._progress(self.total, self.kinds, self.start) as show:
            stream = self.detector.stream(inputs, pool, ahead)
            for result in map_ahead(results.save_files, stream, pool, ahead):
                if result.image is not None:
                    results.append(to_record(result))
                self._count(result)
                show(self.queue.finish())

    def _save_videos(self, inputs: Iterator[ImageInput]) -> None:
        for item in inputs:
            drawing, mot = (
                self.results.path_of(item, suffix) if name in self.results.formats else None
                for name, suffix in (("images", ".mp4"), ("mot", ".mot.txt"))
            )
            detect_in_video(self, item, drawing, mot, self.results.append)
            self.queue.finish()

    def _stop(self, inputs: Sequence[ImageInput], number: int = signal.SIGINT) -> NoReturn:
        self.results.close_journal()
        if self.queue.size == 1:  # otherwise the other processes may still write
            self.results.close(complete=False, inputs=inputs)
        if self.queue.rank == 0:
            print("interrupted; --resume continues", file=sys.stderr)
        raise SystemExit(128 + number)

    def _count(self, result: ImageResult) -> None:
        if result.error:
            self.errors[str(result.input.source)] = result.error
            return
        self.num_images += 1
        names = Counter(each["name"] for each in result.detections)
        self.objects += names
        if not self.quiet and self._has_lines:
            counts = ", ".join(f"{count} {name}" for name, count in names.most_common())
            nothing = f"nothing above {self.detector.options.threshold}"
            print(f"{result.input.source}: {counts or nothing} -> {self.target}")

    @property
    def _has_lines(self) -> bool:
        return self.total <= MAX_LINES and self.queue.size == 1

    def _counts(self) -> dict[str, Any]:
        boxes = self.results.changed_boxes
        videos = {"videos": self.num_videos, "frames": self.num_frames}
        return {
            "images": self.num_images,
            **videos,
            "objects": self.objects,
            "errors": self.errors,
            "changed_boxes": boxes,
        }

    def _add_up(self, summaries: Sequence[dict[str, Any]], inputs: Sequence[ImageInput]) -> None:
        errors = {source: error for each in summaries for source, error in each["errors"].items()}
        sources = (str(item.source) for item in inputs)
        self.errors = {source: errors[source] for source in sources if source in errors}
        self.num_images, self.num_videos, self.num_frames = (
            sum(each[name] for each in summaries) for name in ("images", "videos", "frames")
        )
        self.objects = sum((Counter(each["objects"]) for each in summaries), Counter())
        self.results.changed_boxes = sum((Counter(each["changed_boxes"]) for each in summaries), Counter())

    def show_progress(self, results: Iterator[Item], total: int | None, unit: str) -> Iterator[Item]:
        """Pass on results, and show how many of them there were."""
        with self._progress(total, unit) as show:
            for number, result in enumerate(results, start=1):
                yield result
                self.queue.beat()
                show(number)

    @contextmanager
    def _progress(self, total: int | None, unit: str, start: float | None = None) -> Iterator[Callable[[int], None]]:
        """Yield a function that shows the number of finished images, once a run takes longer than `PROGRESS_DELAY`.

        Args:
            total (`int`, *optional*): Number of images, if it is known.
            unit (`str`): What the images are called.
            start (`float`, *optional*): Time of the monotonic clock at which the first image began; by default now.
        """
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        since = time.monotonic() if start is None else start
        rate = TextColumn("{task.fields[rate]:.1f} {task.fields[unit]}/s{task.fields[tiles]}")
        columns = (BarColumn(), MofNCompleteColumn(), rate)
        # lines for a file are not to be printed above the bar
        redirect = sys.stdout.isatty()
        progress = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), redirect_stdout=redirect)
        task = progress.add_task("detecting", total=total, rate=0.0, tiles="", unit=unit)

        def update(num_parts: int | None, **fields: Any) -> None:
            if time.monotonic() - since > PROGRESS_DELAY and num_parts != 1 and self.queue.rank == 0:
                progress.start()  # does nothing if it has
                progress.update(task, **fields)

        def show(finished: int) -> None:
            update(total, completed=finished, rate=finished / (time.monotonic() - since))

        def show_tiles(done: int, num_tiles: int) -> None:
            self.queue.beat()
            update(num_tiles, tiles=f", tile {done} of {num_tiles}" * (num_tiles > 1))

        self.detector.on_tiles = show_tiles
        try:
            yield show
        finally:
            if progress.live.is_started:
                progress.stop()

    def report(self) -> None:
        """Print the summary, in the main process.

        Raises:
            BrokenInputError: If an image could not be read.
        """
        if self.queue.rank:
            return
        seconds = time.monotonic() - self.start
        if self.quiet:
            print(json.dumps(self._summary(seconds), indent=2))
        elif not self._has_lines or self.num_skipped:
            skipped = f", {count_of(self.num_skipped, 'was', 'were')} there already" if self.num_skipped else ""
            print(
                f"{count_of(self.num_images, 'image')}{skipped}, {count_of(self.objects.total(), 'object')}, "
                f"{self.num_images / seconds:.1f} images/s -> {self.target}"
            )
        if self.errors and self.kinds == "videos" and self.total == 1:
            raise BrokenInputError(*self.errors.values())
        if self.errors:
            self._raise_errors()

    def _raise_errors(self) -> NoReturn:
        errors, count = [*self.errors.values()], len(self.errors)
        for error in [] if self.quiet else errors[MAX_RAISED:MAX_ERRORS]:
            print(f"not read: {error}")
        more = f" ... and {count - MAX_RAISED} more; --json lists all" * (count > MAX_RAISED)
        listed = "\n".join(errors[:MAX_RAISED])
        kinds = self.kinds if self.total > 1 else self.kinds.removesuffix("s")
        raise BrokenInputError(f"{count} of {self.total:,} {kinds} cannot be read:\n{listed}{more}")

    def _summary(self, seconds: float) -> dict[str, Any]:
        return {
            "output": str(self.target),
            "images": self.num_images,
            "skipped": self.num_skipped,
            "objects": dict(self.objects.most_common()),
            "errors": self.errors,
            "seconds": round(seconds, 3),
            "images_per_second": round(self.num_images / seconds, 2),
            "videos": self.num_videos,
            "frames": self.num_frames,
            "fps": round(self.num_frames / seconds, 2),
        }


def _is_video(item: ImageInput) -> bool:
    return isinstance(item.source, Video)


@contextmanager
def stop_on_signals() -> Iterator[list[int]]:
    """Raise `KeyboardInterrupt` at the first SIGINT or SIGTERM, and let a later one end the process at once.

    Yields:
        `list[int]`: The number of the first signal, once there is one.
    """
    received: list[int] = []
    since = time.monotonic()

    def receive(number: int, frame: FrameType | None) -> None:
        nonlocal since
        if not received:
            received.append(number)
            since = time.monotonic()
            raise KeyboardInterrupt
        if time.monotonic() - since > DUPLICATE_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    handlers = {}
    if threading.current_thread() is threading.main_thread():  # no other thread may handle signals
        handlers = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
