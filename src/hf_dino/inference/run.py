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
from operator import attrgetter
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

from ..utils.errors import BrokenInputError, count_of
from ..visualization import save_image
from .detector import Detector, ImageResult, map_ahead, worker_threads
from .processes import InputQueue
from .results import ResultsDirectory, draw_rows, to_record
from .sources import ImageInput
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
        queue (`InputQueue`): The images and videos of all processes.
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
        self.kinds = ["image"]  # of the inputs: image, video or both
        self.total = self.num_skipped = self.num_images = self.num_videos = self.num_frames = 0
        self.errors: dict[str, str] = {}
        self.objects: Counter[str] = Counter()
        self.target = results.folder
        self.start = time.monotonic()

    def draw_one(self, item: ImageInput, target: Path) -> None:
        """Draw one image or video into a file."""
        self.total, self.target, self.kinds = 1, target, [item.kind]
        (self._draw_video if item.is_video else self._draw_image)(item, target)

    def _draw_video(self, item: ImageInput, target: Path) -> None:
        with stop_on_signals() as received:
            try:
                detect_in_video(self, item, target)
            except KeyboardInterrupt:
                content = f"; {target} has the frames so far" * bool(self.num_frames)
                _exit_on_signal(f"interrupted{content}", *received)

    def _draw_image(self, item: ImageInput, target: Path) -> None:
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
        remaining = [item for item in inputs if str(item.source) not in done]
        remaining.sort(key=attrgetter("kind"))  # images first
        self.total, self.num_skipped = len(remaining), len(inputs) - len(remaining)
        self.kinds = sorted({item.kind for item in inputs})
        self.results.has_videos = "video" in self.kinds
        self.results.open()
        self.queue.put(remaining, self.detector.batch_size)

    def _save(self, inputs: Sequence[ImageInput]) -> None:
        for kind, group in groupby(self.queue.take(), key=attrgetter("kind")):
            (self._save_videos if kind == "video" else self._save_images)(group)
        self.results.close_journal()
        with self._progress(self.total, self._plural, self.start) as show:
            summaries = self.queue.gather(self._counts(), show)
        if self.queue.rank == 0:
            self._add_up(summaries, inputs)
            self.results.close(complete=True, inputs=inputs)

    def _save_images(self, inputs: Iterator[ImageInput]) -> None:
        results, ahead = self.results, 2 * self.num_workers
        with worker_threads(self.num_workers) as pool, self._progress(self.total, self._plural, self.start) as show:
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
            is_stopped = detect_in_video(self, item, drawing, mot, self.results.append)
            self.queue.finish()
            if is_stopped and next(inputs, None):  # Ctrl-C is the end of a camera, but not of what follows it
                raise KeyboardInterrupt

    def _stop(self, inputs: Sequence[ImageInput], number: int = signal.SIGINT) -> NoReturn:
        self.results.close_journal()
        if self.queue.size == 1:  # otherwise the other processes may still write
            self.results.close(complete=False, inputs=inputs)
        self.queue.fail("interrupted")
        _exit_on_signal("interrupted; --resume continues" * (self.queue.rank == 0), number)

    def _count(self, result: ImageResult) -> None:
        if result.error:
            self.errors[str(result.input.source)] = result.error
            return
        self.num_images += 1
        names = Counter(each["name"] for each in result.detections)
        self.objects += names
        self._print_counts(result.input, names)

    def count_video(
        self, item: ImageInput, num_frames: int, objects: Counter[str], num_tracks: int | None, seconds: float
    ) -> None:
        """Add a video of which frames were used, and print what is in it.

        Args:
            item (`ImageInput`): The video.
            num_frames (`int`): Number of its frames, or of those that were detected in if it is not drawn.
            objects (`Counter[str]`): Number of detections in all frames by class name.
            num_tracks (`int`, *optional*): Number of ids; `None` if objects are not tracked.
            seconds (`float`): Time that it took.
        """
        self.num_videos += 1
        self.num_frames += num_frames
        self.objects += objects
        tracks = "" if num_tracks is None else f" in {count_of(num_tracks, 'track')}"
        rate = f"{tracks}, {num_frames / seconds:.1f} frames/s"
        self._print_counts(item, objects, f"{count_of(num_frames, 'frame')}, ", rate)

    def _print_counts(self, item: ImageInput, objects: Counter[str], before: str = "", after: str = "") -> None:
        if not self.quiet and self._has_lines:
            counts = ", ".join(f"{count} {name}" for name, count in objects.most_common())
            nothing = f"nothing above {self.detector.options.threshold}"
            print(f"{item.source}: {before}{counts or nothing}{after} -> {self.target}")

    @property
    def _has_lines(self) -> bool:
        return self.total <= MAX_LINES and self.queue.size == 1

    @property
    def _plural(self) -> str:
        return " and ".join(f"{kind}s" for kind in self.kinds)

    def _counts(self) -> dict[str, Any]:
        return {
            "images": self.num_images, "videos": self.num_videos, "frames": self.num_frames, "objects": self.objects,
            "errors": self.errors, "changed_boxes": self.results.changed_boxes,
        }  # fmt: skip

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
            unit (`str`): What images are called.
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
            print(f"{', '.join(self._summary_parts(seconds))} -> {self.target}")
        if self.errors:
            self._raise_errors()

    def _summary_parts(self, seconds: float) -> Iterator[str]:
        if "image" in self.kinds:
            yield count_of(self.num_images, "image")
        if "video" in self.kinds:
            yield f"{count_of(self.num_videos, 'video')}, {count_of(self.num_frames, 'frame')}"
        if self.num_skipped:
            yield f"{count_of(self.num_skipped, 'was', 'were')} there already"
        yield count_of(self.objects.total(), "object")
        unit = " and ".join({"image": "images", "video": "frames"}[kind] for kind in self.kinds)
        yield f"{(self.num_images + self.num_frames) / seconds:.1f} {unit}/s"

    def _raise_errors(self) -> NoReturn:
        errors, count = [*self.errors.values()], len(self.errors)
        if self.kinds == ["video"] and self.total == 1:
            raise BrokenInputError(*errors)
        for error in [] if self.quiet else errors[MAX_RAISED:MAX_ERRORS]:
            print(f"not read: {error}")
        more = f" ... and {count - MAX_RAISED} more; --json lists all" * (count > MAX_RAISED)
        listed = "\n".join(errors[:MAX_RAISED])
        total = count_of(self.total, " or ".join(self.kinds), self._plural)
        raise BrokenInputError(f"{count} of {total} cannot be read:\n{listed}{more}")

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


def _exit_on_signal(message: str, number: int = signal.SIGINT) -> NoReturn:
    if message:
        print(message, file=sys.stderr)
    raise SystemExit(128 + number)


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
