"""Log a run: a progress bar or plain lines, `history.jsonl` with its curves, and a tracker of Accelerate."""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from ..utils.errors import import_if_available
from ..utils.io import annotate_oserror, atomic_write, fsync
from ..visualization import plot_training_curves
from .checkpoint import TrainingState


resource = import_if_available("resource")  # not on Windows

logger = logging.getLogger(__name__)

PROJECT = "hf_dino"


class _ProgressWithStatus(Progress):
    """A progress display with a line of text below the bars."""

    status = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield Text(self.status)


class TrainingProgress:
    """Show steps, epoch, losses, learning rate, AP, speed, memory and remaining time. Use as a context manager.

    Args:
        total_steps (`int`): Optimizer steps of the whole run.
        completed_steps (`int`): Optimizer steps done before the run was resumed.
        enabled (`bool`): Whether anything is shown; true on the main process only.
        global_batch_size (`int`, *optional*, defaults to 1): Images per optimizer step, over all processes.
    """

    def __init__(self, total_steps: int, completed_steps: int, enabled: bool, global_batch_size: int = 1):
        self.enabled = enabled
        self.global_batch_size = global_batch_size
        self.progress = _ProgressWithStatus(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            speed_estimate_period=120,  # seconds; long enough to average over slow and fast images
            disable=not enabled,
        )
        # a log file has the lines of `report`; the last state of the bars would only repeat them
        self.progress.live.transient = not self.progress.console.is_terminal
        self.task = self.progress.add_task("training", total=total_steps, completed=completed_steps)
        self._ap: float | None = None
        self._first_step, self._since = completed_steps, time.monotonic()  # where the speed is measured from

    def __enter__(self) -> "TrainingProgress":
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.progress.stop()

    @property
    def samples_per_second(self) -> float:
        """Images per second since the last report, without the time of evaluations."""
        steps = self.progress.tasks[0].completed - self._first_step
        return steps * self.global_batch_size / max(1e-9, time.monotonic() - self._since)

    def step(self, epoch: float, losses: Mapping[str, float], learning_rate: float) -> None:
        """Count an optimizer step.

        Args:
            epoch (`float`): Passes over the dataset so far.
            losses (`Mapping[str, float]`): Losses of the step, from [`LossMonitor.check`].
            learning_rate (`float`): Learning rate of the step.
        """
        self.progress.update(self.task, advance=1, description=f"epoch {epoch:.2f}")
        self.progress.status = self._status(losses, learning_rate)

    def report(self, step: int, epoch: float, losses: Mapping[str, float], learning_rate: float) -> dict[str, float]:
        """Print a line where there is no terminal for a bar, and start a new measurement of the speed.

        Args:
            step (`int`): Optimizer steps done.
            epoch (`float`): Passes over the dataset so far.
            losses (`Mapping[str, float]`): Mean losses since the last report.
            learning_rate (`float`): Learning rate of the last step.

        Returns:
            `dict[str, float]`: `samples_per_second` since the last report and `peak_memory_gib`, for a tracker.
        """
        task = self.progress.tasks[0]
        if not self.progress.console.is_terminal:
            left = timedelta(seconds=round(task.time_remaining or 0))
            status = self._status(losses, learning_rate)
            self.print(f"step {step}/{task.total:.0f}  epoch {epoch:.2f}  {status}  {left} left")
        throughput = {"samples_per_second": self.samples_per_second, "peak_memory_gib": peak_memory_gib()}
        self._first_step, self._since = int(task.completed), time.monotonic()
        return throughput

    def set_ap(self, ap: float) -> None:
        """Set the average precision that is shown, in [0, 1]."""
        self._ap = ap

    @contextmanager
    def track(self, description: str, num_images: int) -> Iterator[Callable[[int], None]]:
        """Show a second bar of `num_images` while the context lasts. Yield the function that advances it."""
        task, start = self.progress.add_task(description, total=num_images), time.monotonic()
        yield lambda count: self.progress.advance(task, count)
        self.progress.remove_task(task)
        self._since += time.monotonic() - start

    def print(self, text: str) -> None:
        """Print above the bar."""
        if self.enabled:
            self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _status(self, losses: Mapping[str, float], learning_rate: float) -> str:
        terms = ", ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in losses.items())
        ap = [] if self._ap is None else [f"AP {self._ap:.3f}"]
        speed = f"{self.samples_per_second:.1f} images/s"
        return "  ".join([terms, f"lr {learning_rate:.2e}", speed, *ap, _format_memory(peak_memory_gib())])


def _format_memory(gib: float) -> str:
    return f"{gib:.1f} GiB" if gib >= 0.1 else f"{1024 * gib:.0f} MiB"


def peak_memory_gib() -> float:
    """Return the peak memory of this process in GiB: of its GPU if it has one, else its resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if resource is None:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024  # bytes per unit of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class RunHistory:
    """The log of a run: rows of `step`, `epoch` and losses or COCO metrics in `history.jsonl`.

    A resumed run keeps the rows up to its checkpoint; those after it are logged again. If the file cannot be written,
    this is a warning only, and the next row that can be written brings the missing ones.

    Args:
        folder (`Path`): Directory of the file; created if needed.
        state (`TrainingState`): State of the run when it starts or is resumed.
        enabled (`bool`): Whether this process writes the file; true on the main process only.
    """

    def __init__(self, folder: Path, state: TrainingState, enabled: bool):
        self.path = folder / "history.jsonl"
        self.enabled = enabled
        self.rows: list[dict[str, Any]] = []
        self._is_complete = False
        with _warn_only():
            self.rows += (row for row in _read_rows(self.path) if _is_before_checkpoint(row, state))
            if enabled:
                self._rewrite()

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row."""
        self.rows.append(dict(row))
        if self.enabled:
            with _warn_only():
                (self._append if self._is_complete else self._rewrite)()

    def sync(self) -> None:
        """Write the file to the disk, before a checkpoint that relies on its rows."""
        if self.enabled:
            with _warn_only():
                if not self._is_complete:
                    self._rewrite()
                fsync(self.path)

    def plot(self) -> None:
        """Plot losses and average precision into `curves.png`."""
        if self.enabled:
            with _warn_only():
                plot_training_curves(self.rows, self.path.with_name("curves.png"))

    def _append(self) -> None:
        self._is_complete = False
        with annotate_oserror(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")
        self._is_complete = True

    def _rewrite(self) -> None:
        self._is_complete = False
        with atomic_write(self.path) as path:
            path.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        self._is_complete = True


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Read the rows of a history up to one that is incomplete or damaged, as when the process was killed."""
    with suppress(FileNotFoundError, ValueError):
        yield from map(json.loads, path.read_bytes().splitlines())


def _is_before_checkpoint(row: Mapping[str, Any], state: TrainingState) -> bool:
    """Return whether a run logs a row before the checkpoint with this state. It is evaluated after the first one."""
    return row["step"] < state.step + ("ap" not in row or state.is_evaluated)


@contextmanager
def _warn_only() -> Iterator[None]:
    """Do not end a run because of a file that only informs, open in another program or on a full disk."""
    try:
        yield
    except OSError as error:
        logger.warning("%s; the run continues", error)


@contextmanager
def init_tracking(
    accelerator: Accelerator, state: TrainingState, output_dir: Path, arguments: Mapping[str, Any]
) -> Iterator[None]:
    """Start a run of the tracker with the hyperparameters, or resume the one that a resumed run had.

    TensorBoard, Weights & Biases, SwanLab and Trackio resume it. MLflow, which gives runs ids of its own, gets a
    second run of the same name with the steps after the checkpoint. Other trackers get their own defaults.

    However the context is left, the tracker can write what it has.

    Args:
        accelerator (`Accelerator`): Has the tracker in `log_with`, or none.
        state (`TrainingState`): State of the run: its `run_id`, and the step it is resumed after.
        output_dir (`Path`): Directory of the run, which gives the run its name.
        arguments (`Mapping[str, Any]`): Names and values of the hyperparameters.
    """
    name = output_dir.resolve().name
    # where the tracker supports it, the rows after the checkpoint are replaced
    options = {
        "wandb": {"name": name, "id": state.run_id, "resume": "allow"},
        "swanlab": {"experiment_name": name, "id": state.run_id, "resume": "allow"},
        "trackio": {"name": f"{name}-{state.run_id}", "resume": "allow"},
        "mlflow": {"run_name": f"{name}-{state.run_id}"},
        "tensorboard": {"purge_step": state.step + 1 if state.step else 0},
    }
    plain = (bool, int, float, str)
    config = {key: value if isinstance(value, plain) else str(value) for key, value in arguments.items()}
    accelerator.init_trackers(PROJECT, config=None if state.step else config, init_kwargs=options)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
