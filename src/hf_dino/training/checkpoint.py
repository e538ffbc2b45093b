"""Checkpoints of a run: everything that the next step depends on, in one folder per checkpoint."""

import json
import logging
import pickle
import shutil
import tempfile
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from ..data.errors import InputError
from .files import write_json


logger = logging.getLogger(__name__)

_STATE_FILE = "training_state.json"
_NAME = "step_" + 8 * "[0-9]"  # as a pattern of `glob`


@dataclass
class TrainingState:
    """Where a run is. With the weights, optimizer and random numbers that Accelerate saves, all that it depends on.

    Attributes:
        settings (`dict`): What a resumed run must have in common with the one it goes on with.
        step (`int`): Optimizer steps done.
        history (`list[dict]`): A row per report: `step`, `epoch`, and losses or COCO's numbers.
        best_step (`int` or `None`): The step whose checkpoint has the highest `best_ap`, once one was evaluated.
        best_ap (`float`): Average precision at `best_step`, in [0, 1]; -1 before.
    """

    settings: dict[str, Any]
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best_step: int | None = None
    best_ap: float = -1.0

    @property
    def kept_step(self) -> int:
        """The step whose model is the result: the best, or the last as long as none was evaluated."""
        return self.step if self.best_step is None else self.best_step


def checkpoint_path(folder: Path, step: int) -> Path:
    """Name the checkpoint of a step."""
    return folder / f"step_{step:08d}"


def latest_checkpoint(folder: Path) -> Path | None:
    """Find the checkpoint of the highest step, if there is one."""
    return max(folder.glob(_NAME), default=None)


def find_start(output: Path, checkpoints: Path, *, resume: bool, overwrite: bool) -> Path | None:
    """Find the checkpoint that a run starts from, and see that nothing in its output folder gets lost.

    Args:
        output (`Path`): The run's output folder, which need not exist.
        checkpoints (`Path`): Its folder of checkpoints.
        resume (`bool`): Go on with the run that is there.
        overwrite (`bool`): Start anew even if something is there.

    Returns:
        `Path` or `None`: The checkpoint, or None for a fresh start.

    Raises:
        InputError: If there is nothing to resume, or something that was not to be overwritten.
    """
    checkpoint = latest_checkpoint(checkpoints)
    if resume and checkpoint is None:
        raise InputError(f"{output}: holds no checkpoint to resume from; start without --resume")
    if resume:
        return checkpoint
    if output.exists() and (output.is_file() or any(output.iterdir())) and not overwrite:
        raise InputError(f"{output}: is not empty; give another folder, or --resume or --overwrite its run")
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not _holds_a_run(output, checkpoints)):
        raise InputError(f"{output}: holds no run or model that --overwrite could replace; give another folder")
    return None


def _holds_a_run(output: Path, checkpoints: Path) -> bool:
    return checkpoints.is_dir() or (output / "config.json").is_file()


def prepare_checkpoints(folder: Path, *, resume: bool) -> None:
    """See that checkpoints can be written, before there is a first one to lose, and delete those of an older run.

    Args:
        folder (`Path`): Where the checkpoints will be; made if it does not exist.
        resume (`bool`): Whether those in it are this run's.

    Raises:
        OSError: If the folder cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    if not resume:
        remove_checkpoints(folder)


def load_checkpoint(accelerator: Accelerator, checkpoint: Path) -> None:
    """Give model, optimizer and random numbers the state that they had.

    Args:
        accelerator (`Accelerator`): Holds model and optimizer.
        checkpoint (`Path`): From [`latest_checkpoint`].

    Raises:
        InputError: If a file of it is missing or damaged.
    """
    try:
        accelerator.load_state(str(checkpoint))
    except (OSError, EOFError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise InputError(_damaged(checkpoint, error)) from error


def _damaged(checkpoint: Path, error: Exception) -> str:
    reason = str(error).partition("\n")[0] or type(error).__name__
    return f"{checkpoint}: is damaged or incomplete ({reason}); restore it, or remove it to go on from an earlier one"


def read_state(checkpoint: Path, settings: dict[str, Any]) -> TrainingState:
    """Read where a run was, and see that it is the run to go on with.

    Args:
        checkpoint (`Path`): From [`latest_checkpoint`].
        settings (`dict`): What the run that goes on was started with.

    Raises:
        InputError: If a setting is not the checkpoint's, or the file that holds them is missing or damaged.
    """
    try:
        state = TrainingState(**json.loads((checkpoint / _STATE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(_damaged(checkpoint, error)) from error
    now = json.loads(json.dumps(settings))  # as it comes back from the file: tuples are lists
    changed = [
        f"{name}: {state.settings.get(name)!r} before, {now.get(name)!r} now"
        for name in sorted(state.settings.keys() | now.keys())
        if state.settings.get(name) != now.get(name)
    ]
    if changed:
        raise InputError(
            f"{checkpoint}: a run can only be resumed with the settings that it began with ({'; '.join(changed)}); "
            "use those, or start another run in another folder"
        )
    best = checkpoint_path(checkpoint.parent, state.kept_step)
    if not best.is_dir():
        logger.warning("%s, the best checkpoint so far, is gone: the best from here on will be the result", best)
        state.best_step, state.best_ap = None, -1.0
    return state


def save_checkpoint(accelerator: Accelerator, folder: Path, state: TrainingState) -> None:
    """Write a checkpoint, called by every process, and then delete all but this one and the best.

    At every moment there is a complete checkpoint, and what it calls the best is there too.

    Args:
        accelerator (`Accelerator`): Holds model and optimizer.
        folder (`Path`): Where the checkpoints are.
        state (`TrainingState`): Written beside them.
    """
    path = checkpoint_path(folder, state.step)
    if not path.exists():  # else only what is known about this step has changed, such as its score
        # the processes write their random numbers into one folder, so one of them makes and names it
        temporary = folder / f".{path.name}.part"
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_json(temporary / _STATE_FILE, asdict(state))
            temporary.rename(path)
    elif accelerator.is_main_process:
        write_json(path / _STATE_FILE, asdict(state))
    if accelerator.is_main_process:
        remove_checkpoints(folder, kept=(path, checkpoint_path(folder, state.kept_step)))
    accelerator.wait_for_everyone()


def remove_checkpoints(folder: Path, kept: Collection[Path] = ()) -> None:
    """Delete the checkpoints in a folder, finished or not, but those to be kept. Whatever else is there stays.

    Args:
        folder (`Path`): Where the checkpoints are; need not exist.
        kept (`Collection[Path]`, *optional*): From [`checkpoint_path`].
    """
    for path in {*folder.glob(_NAME), *folder.glob(f".{_NAME}.part")}.difference(kept):
        shutil.rmtree(path)
