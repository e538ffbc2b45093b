"""What a run tells while it goes on: a bar with loss and time left, or plain lines where there is no terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class TrainingProgress:
    """Shows steps done, epoch, loss and time left. Use as a context manager.

    Args:
        total_steps (`int`): Optimizer steps of the whole run.
        done_steps (`int`): Steps done before a resumed run went on.
        enabled (`bool`): False in all processes but one, and then nothing is shown.
    """

    def __init__(self, total_steps: int, done_steps: int, enabled: bool):
        self.enabled = enabled
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            speed_estimate_period=120,  # long enough to even out slow and fast pictures
            disable=not enabled,
        )
        self.steps = self.progress.add_task("training", total=total_steps, completed=done_steps, loss="")

    def __enter__(self) -> "TrainingProgress":
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.progress.stop()

    def step(self, epoch: float, loss: float) -> None:
        """Count an optimizer step. `epoch` is how often the data set was seen, `loss` that of the step."""
        self.progress.update(self.steps, advance=1, description=f"epoch {epoch:.2f}", loss=f"loss {loss:.3f}")

    def report(self, step: int, epoch: float, loss: float) -> None:
        """Say in a line how far the run is, where a bar cannot: in a log file."""
        if self.enabled and not self.progress.console.is_terminal:
            task = self.progress.tasks[0]
            left = timedelta(seconds=round(task.time_remaining or 0))
            self.say(f"step {step}/{task.total:.0f}  epoch {epoch:.2f}  loss {loss:.3f}  {left} left")

    @contextmanager
    def count(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show another bar, of `total` pictures, while the context lasts; it gives the function that counts them."""
        task = self.progress.add_task(description, total=total, loss="")
        yield lambda count: self.progress.advance(task, count)
        self.progress.remove_task(task)

    def say(self, text: str) -> None:
        """Print above the bar."""
        if self.enabled:
            self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
