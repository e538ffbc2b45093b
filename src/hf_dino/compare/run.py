"""Train the runs of a comparison one after the other, shared by all processes that were started on its directory."""

import gc
import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..training import make_accelerator
from ..training.checkpoint import lock_directory, remove_checkpoints
from ..utils.errors import InputError
from .measures import MeasuringFineTuner
from .plan import SHAPES, ComparisonSettings, Run, prepare_comparison, run_arguments


logger = logging.getLogger(__name__)

Value = TypeVar("Value")


def compare(
    output_dir: Path,
    runs: Sequence[Run],
    settings: ComparisonSettings,
    *,
    dataset: str | None = None,
    on_finished: Callable[[], object] = lambda: None,
    **machine: Any,
) -> dict[Run, str]:
    """Train all runs that are not finished and that no other process is training.

    Any number of processes may do so at once on a shared disk. Killed at any moment, a run is resumed by the next
    process that calls this. The processes of one `accelerate launch` train each run together. A run that fails, as
    by a loss that is not finite, does not stop the others.

    Args:
        output_dir (`Path`): Directory of the comparison.
        runs (`list[Run]`): From [`plan_runs`], in the order in which they are trained.
        settings (`ComparisonSettings`): What all runs have in common.
        dataset (`str`, *optional*): Dataset to train on; by default, `shapes` is generated in `output_dir`.
        on_finished (`Callable`, *optional*): Called by the main process after each run.
        machine: Options of [`FineTuningArguments`] that change no result, such as `dataloader_num_workers`.

    Returns:
        `dict[Run, str]`: The runs that failed, and why.

    Raises:
        InputError: If the settings are not those that the comparison began with, or cannot be used.
        SystemExit: After SIGINT, SIGTERM or SIGUSR1, once the step is done and its checkpoint written.
    """
    accelerator = make_accelerator(run_arguments(runs[0], dataset or SHAPES, settings, **machine))
    data = _from_main(accelerator, lambda: prepare_comparison(output_dir, dataset, settings))
    failures: dict[Run, str] = {}
    while True:
        with ExitStack() as lock:
            run = _from_main(accelerator, lambda: _claim(runs, failures, lock))
            if run is None:
                break
            accelerator.print(f"{run.row}, seed {run.seed}: {run.folder}")
            try:
                _train(run, data, settings, machine)
            except (InputError, FloatingPointError) as error:
                failures[run] = str(error)
                logger.error("%s, seed %d: %s", run.row, run.seed, error)
        if accelerator.is_main_process:
            _inform(on_finished)
    accelerator.end_training()
    return failures


def _inform(write_report: Callable[[], object]) -> None:
    """Write a report of what there is. A file that only informs does not end the trainings."""
    try:
        write_report()
    except (InputError, OSError) as error:
        logger.warning("no report was written: %s", error)


def _train(run: Run, dataset: str, settings: ComparisonSettings, machine: dict[str, Any]) -> None:
    """Train a run to its end, and free what it took of memory and disk; the model and the measures are kept."""
    arguments = run_arguments(run, dataset, settings, **machine)
    tuner = MeasuringFineTuner(arguments, make_accelerator(arguments))
    tuner.train_and_save()
    if tuner.accelerator.is_main_process:
        remove_checkpoints(tuner.checkpoints)
    del tuner
    gc.collect()


def _claim(runs: Sequence[Run], failed: Collection[Run], lock: ExitStack) -> Run | None:
    """Return the first run that is neither finished nor being trained, and lock it until `lock` is closed."""
    for run in (run for run in runs if not run.is_finished and run not in failed):
        with ExitStack() as attempt:
            if _try_lock(run.lock, attempt) and not run.is_finished:  # as it may be since another process released it
                lock.enter_context(attempt.pop_all())
                return run
    return None


def _try_lock(folder: Path, stack: ExitStack) -> bool:
    try:
        stack.enter_context(lock_directory(folder))
    except InputError:
        return False
    return True


def _from_main(accelerator: Accelerator, function: Callable[[], Value]) -> Value:
    """Return what a function returns on the main process, which alone calls it, and raise its errors on all."""
    result: list[Any] = [None, ""]
    if accelerator.is_main_process:
        try:
            result[0] = function()
        except (InputError, OSError) as error:
            result[1] = str(error)
    value, failure = broadcast_object_list(result)
    if failure:
        raise InputError(failure)
    return value
