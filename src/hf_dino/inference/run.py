"""One run of `hf-dino predict`: its loop, its counts, and what it prints."""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..utils.errors import BrokenInputError
from ..visualization import save_image
from .detector import Detector, ImageResult, map_ahead, worker_threads
from .results import ResultsDirectory, draw_rows, to_record
from .sources import ImageInput


MAX_LINES = 100  # on the terminal: one per image, or only a summary
MAX_ERRORS = 20  # on the terminal
MAX_RAISED = 2  # of them in the last message, which has a line for each
PROGRESS_DELAY = 2.0  # seconds


class PredictionRun:
    """One run of the command: its loop, its counts, and what it prints."""

    def __init__(self, detector: Detector, results: ResultsDirectory, num_workers: int, total: int, quiet: bool):
        self.detector, self.results, self.num_workers = detector, results, num_workers
        self.total, self.quiet = total, quiet
        self.errors: dict[str, str] = {}
        self.objects: Counter[str] = Counter()
        self.num_images = 0
        self.target = results.folder
        self.start = time.monotonic()

    def draw_one(self, item: ImageInput, target: Path) -> None:
        """Draw one image into a file."""
        self.target = target
        (result,) = self.detector.stream([item])
        if result.image is not None:
            save_image(draw_rows(result.image, result.detections, self.results.classes), target)
        self._count(result)

    def save_all(self, inputs: Sequence[ImageInput], overwrite: bool) -> None:
        """Save all images in a directory. After Ctrl-C, what was finished is saved."""
        results = self.results
        if overwrite:
            results.remove_previous()
        results.open()
        try:
            with worker_threads(self.num_workers) as pool:
                ahead = 2 * self.num_workers
                stream = map_ahead(results.save_files, self.detector.stream(inputs, pool, ahead), pool, ahead)
                for result in self._with_progress(stream):
                    if result.image is not None:
                        results.append(to_record(result))
                    self._count(result)
        except KeyboardInterrupt:
            results.close(complete=False)
            raise
        results.close(complete=True)

    def _count(self, result: ImageResult) -> None:
        if result.error:
            self.errors[str(result.input.source)] = result.error
            return
        self.num_images += 1
        names = Counter(each["name"] for each in result.detections)
        self.objects += names
        if not self.quiet and self.total <= MAX_LINES:
            counts = ", ".join(f"{count} {name}" for name, count in names.most_common())
            nothing = f"nothing above {self.detector.options.threshold}"
            print(f"{result.input.source}: {counts or nothing} -> {self.target}")

    def _with_progress(self, results: Iterator[ImageResult]) -> Iterator[ImageResult]:
        """Show the progress of a run that takes longer than `PROGRESS_DELAY`."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]:.1f} images/s"))
        # lines for a file are not to be printed above the bar
        redirect = sys.stdout.isatty()
        progress = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), redirect_stdout=redirect)
        task = progress.add_task("detecting", total=self.total, rate=0.0)
        try:
            for number, result in enumerate(results, start=1):
                yield result
                seconds = time.monotonic() - self.start
                if seconds > PROGRESS_DELAY and self.total > 1:
                    progress.start()  # does nothing if it has
                    progress.update(task, completed=number, rate=number / seconds)
        finally:
            if progress.live.is_started:
                progress.stop()

    def report(self, num_skipped: int) -> None:
        """Print the summary.

        Raises:
            BrokenInputError: If an image could not be read.
        """
        seconds = time.monotonic() - self.start
        if self.quiet:
            print(json.dumps(self._summary(num_skipped, seconds), indent=2))
        elif self.total > MAX_LINES or num_skipped:
            skipped = f", {num_skipped} were there already" if num_skipped else ""
            print(
                f"{self.num_images} images{skipped}, {self.objects.total()} objects, "
                f"{self.num_images / seconds:.1f} images/s -> {self.target}"
            )
        if self.errors:
            errors, count = [*self.errors.values()], len(self.errors)
            for error in [] if self.quiet else errors[MAX_RAISED:MAX_ERRORS]:
                print(f"not read: {error}")
            more = f" ... and {count - MAX_RAISED} more; --json lists all" * (count > MAX_RAISED)
            listed = "\n".join(errors[:MAX_RAISED])
            raise BrokenInputError(f"{count} of {self.total} images cannot be read:\n{listed}{more}")

    def _summary(self, num_skipped: int, seconds: float) -> dict[str, Any]:
        return {
            "output": str(self.target),
            "images": self.num_images,
            "skipped": num_skipped,
            "objects": dict(self.objects.most_common()),
            "errors": self.errors,
            "seconds": round(seconds, 3),
            "images_per_second": round(self.num_images / seconds, 2),
        }
