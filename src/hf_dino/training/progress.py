"""What a run tells while it goes on: a bar with all that is measured, or plain lines where there is no terminal."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import ModuleType, TracebackType

import torch
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text


resource: ModuleType | None
try:
    import resource
except ImportError:  # Windows
    resource = None


class _Bars(Progress):
    """Bars with a line of text below."""

    text = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield Text(self.text)


class TrainingProgress:
    """Shows steps, epoch, losses, learning rate, AP, speed, memory and time left. Use as a context manager.

    Args:
        total_steps (`int`): Optimizer steps of the whole run.
        done_steps (`int`): Steps done before a resumed run went on.
        enabled (`bool`): False in all processes but one, and then nothing is shown.
        step_size (`int`): Images per optimizer step, over all processes.
    """

    def __init__(self, total_steps: int, done_steps: int, enabled: bool, step_size: int = 1):
        self.enabled = enabled
        self.step_size = step_size
        self.progress = _Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            speed_estimate_period=120,  # long enough to even out slow and fast images
            disable=not enabled,
        )
        # in a file the lines of `report` say it all, and what the bars showed last would come behind the end
        self.progress.live.transient = not self.progress.console.is_terminal
        self.steps = self.progress.add_task("training", total=total_steps, completed=done_steps)
        self._ap: float | None = None
        self._first_step, self._since = done_steps, time.monotonic()  # of what the speed is measured over

    def __enter__(self) -> "TrainingProgress":
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.progress.stop()

    @property
    def samples_per_second(self) -> float:
        """Since the last report, evaluations left out."""
        steps = self.progress.tasks[0].completed - self._first_step
        return steps * self.step_size / max(1e-9, time.monotonic() - self._since)

    def step(self, epoch: float, losses: Mapping[str, float], learning_rate: float) -> None:
        """Count an optimizer step.

        Args:
            epoch (`float`): How often the dataset was seen.
            losses (`Mapping[str, float]`): Of the step, from [`LossMonitor.check`]: `loss` and its parts.
            learning_rate (`float`): Of the step.
        """
        self.progress.update(self.steps, advance=1, description=f"epoch {epoch:.2f}")
        self.progress.text = self._line(losses, learning_rate)

    def report(self, step: int, epoch: float, losses: Mapping[str, float], learning_rate: float) -> dict[str, float]:
        """Say in a line how far the run is, where a bar cannot: in a log file.

        Args:
            step (`int`): Optimizer steps done.
            epoch (`float`): How often the dataset was seen.
            losses (`Mapping[str, float]`): Averages since the last report.
            learning_rate (`float`): Of the last step.

        Returns:
            `dict[str, float]`: `samples_per_second` since the last report and `memory_gib`, for a tracker.
        """
        task = self.progress.tasks[0]
        if self.enabled and not self.progress.console.is_terminal:
            left = timedelta(seconds=round(task.time_remaining or 0))
            line = self._line(losses, learning_rate)
            self.say(f"step {step}/{task.total:.0f}  epoch {epoch:.2f}  {line}  {left} left")
        measured = {"samples_per_second": self.samples_per_second, "memory_gib": peak_memory()}
        self._first_step, self._since = int(task.completed), time.monotonic()
        return measured

    def scored(self, ap: float) -> None:
        """Take note of the average precision of the last evaluation, in [0, 1]."""
        self._ap = ap

    @contextmanager
    def count(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show another bar, of `total` images, while the context lasts; it gives the function that counts them."""
        task, start = self.progress.add_task(description, total=total), time.monotonic()
        yield lambda count: self.progress.advance(task, count)
        self.progress.remove_task(task)
        self._since += time.monotonic() - start

    def say(self, text: str) -> None:
        """Print above the bar."""
        if self.enabled:
            self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _line(self, losses: Mapping[str, float], learning_rate: float) -> str:
        parts = ", ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in losses.items())
        words = [parts, f"lr {learning_rate:.2e}", f"{self.samples_per_second:.1f} images/s"]
        words += [] if self._ap is None else [f"AP {self._ap:.3f}"]
        return "  ".join([*words, _readable(peak_memory())])


def _readable(gib: float) -> str:
    return f"{gib:.1f} GiB" if gib >= 0.1 else f"{1024 * gib:.0f} MiB"


def peak_memory() -> float:
    """Say how many GiB this process has had in use at most: of its GPU where it has one, else of main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if resource is None:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024  # in which the system counts, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
