"""Checkpoints of a run: everything that the next step depends on, in one folder per checkpoint.

A checkpoint is written beside its place, brought to the disk and then renamed, so that one that has its name is whole.
"""

import json
import logging
import pickle
import shutil
import tempfile
import uuid
import zlib
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import load
from safetensors import SafetensorError
from torch import nn

from ..configuration_dino_detr import DinoDetrConfig
from ..data.dataset import DetectionSplit
from ..utils.distributed import SHARDED_DISTRIBUTED_TYPES, all_gather_unique, all_reduce_max
from ..utils.errors import InputError
from ..utils.io import fsync, fsync_tree, read_text, write_json


logger = logging.getLogger(__name__)

_STATE_FILE = "training_state.json"
_NAME = "step_" + 8 * "[0-9]"  # as a pattern of `glob`
_FAILED = "failed"
_RANDOM_STATE = "random_states_{}.pkl"  # Accelerate's file of each process

# Checkpoints that are there at once while one is written: the last, the new one and, if it is neither, the best.
_AT_LEAST, _AT_MOST = 2, 3

# What Accelerate raises when a disk is full depends on who writes: Python, safetensors or torch, which raises
# RuntimeErrors, as for anything else, that have one of these words.
_WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)
_TORCH_WRITES = ("inline_container", "StreamWriter", "file write")


@dataclass
class TrainingState:
    """Where a run is. With the weights, optimizer and random numbers that Accelerate saves, all that it depends on.

    Attributes:
        settings (`dict`): What a resumed run must have in common with the one it goes on with.
        step (`int`): Optimizer steps done.
        history (`list[dict]`): A row per report: `step`, `epoch`, and losses or COCO's numbers.
        best_step (`int` or `None`): The step whose checkpoint has the highest `best_ap`, once one was evaluated.
        best_ap (`float`): Average precision at `best_step`, in [0, 1]; -1 before.
        run_id (`str`): By which a tracker knows the run when it goes on.
        total_steps (`int` or `None`): Optimizer steps that the run was to have, on which its learning rate depends;
            None in checkpoints of versions that did not know.
    """

    settings: dict[str, Any]
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best_step: int | None = None
    best_ap: float = -1.0
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    total_steps: int | None = None

    @property
    def evaluated(self) -> bool:
        """Whether the model of this step was evaluated, so that a resumed run need not do it."""
        return any(row["step"] == self.step and "ap" in row for row in self.history)

    @property
    def export_step(self) -> int:
        """The step whose model is the result: the best, or the last as long as none was evaluated."""
        return self.step if self.best_step is None else self.best_step


def checkpoint_path(folder: Path, step: int) -> Path:
    """Name the checkpoint of a step."""
    return folder / f"step_{step:08d}"


def get_last_checkpoint(folder: Path) -> Path | None:
    """Find the checkpoint of the highest step, if there is one."""
    return max(folder.glob(_NAME), default=None)


def resolve_resume_checkpoint(output: Path, checkpoints: Path, *, resume: bool, overwrite: bool) -> Path | None:
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
    checkpoint = get_last_checkpoint(checkpoints)
    if resume and checkpoint is None and checkpoints.is_dir() and not (output / "config.json").exists():
        logger.warning("%s: the run was stopped before its first checkpoint and begins anew", output)
        return None
    if resume and checkpoint is None:
        raise InputError(f"{output}: holds no checkpoint to resume from; start without --resume")
    if resume:
        return checkpoint
    if output.is_file():
        raise InputError(f"{output}: is a file; give a folder")
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise InputError(f"{output}: is not empty; give another folder, or --resume or --overwrite its run")
    if output.is_dir() and any(output.iterdir()) and not _holds_a_run(output, checkpoints):
        raise InputError(f"{output}: holds no run or model that --overwrite could replace; give another folder")
    return None


def _holds_a_run(output: Path, checkpoints: Path) -> bool:
    """Whether a run, or the model that it left, is there rather than somebody's work that has files of these names."""
    if get_last_checkpoint(checkpoints) or (checkpoints.is_dir() and (output / "history.csv").is_file()):
        return True
    try:
        config = json.loads((output / "config.json").read_text(encoding="utf-8"))
        return config["model_type"] == DinoDetrConfig.model_type
    except (OSError, ValueError, LookupError, TypeError):
        return False


def data_fingerprint(data: DetectionSplit) -> str:
    """Tell a dataset from any other, wherever its files are: by images and categories.

    Boxes may be corrected before a run goes on, and are left out.

    Args:
        data (`DetectionSplit`): What a run trains on, or is measured on; the result belongs in [`TrainingState`]'s
            settings.
    """
    images = [(image.image_id, image.height, image.width) for image in data.images]
    return _fingerprint(repr((images, sorted(data.categories.items()))))


def file_fingerprint(path: Path | None) -> str:
    """Tell the text of a file from any other, wherever the file is; "none" for no file.

    Raises:
        InputError: If the file cannot be read.
    """
    return "none" if path is None else _fingerprint(read_text(path))


def _fingerprint(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def prepare_checkpoints(folder: Path, *, resume: bool) -> None:
    """See that checkpoints can be written, before there is a first one to lose, and delete those of an older run.

    Args:
        folder (`Path`): Where the checkpoints will be; made if it does not exist.
        resume (`bool`): Whether those in it are this run's. What a killed process left half-written goes anyway.

    Raises:
        OSError: If the folder cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    remove_checkpoints(folder, kept=set(folder.glob(_NAME)) if resume else ())
    remove_checkpoints(folder / _FAILED, kept=set((folder / _FAILED).glob(_NAME)) if resume else ())


def check_disk_space(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, more: Iterable[torch.Tensor] = ()
) -> None:
    """See, before the first step, that a run's checkpoints fit on the disk.

    Two are needed at least: the last one is deleted when the next is whole. With the best one they can be three.

    Args:
        folder (`Path`): Where the checkpoints will be; need not exist. Those in it count as space.
        model (`nn.Module`): What is trained.
        optimizer (`torch.optim.Optimizer`): Of Adam's kind: it keeps two numbers for each that it trains.
        more (`Iterable[torch.Tensor]`, *optional*): What else is saved, such as an average of the weights.

    Raises:
        InputError: If there is plainly too little space; where it may just do, a warning is logged.
    """
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    saved = (*model.parameters(), *model.buffers(), *more, *trained, *trained)
    size = sum(tensor.numel() * tensor.element_size() for tensor in saved)
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    space = free + size * len(list(folder.glob(_NAME)))
    text = f"{folder}: a checkpoint takes {_gib(size)}, %s {_gib(free)} are free; make space or give another --output"
    if space < _AT_LEAST * size:
        raise InputError(text % f"{_AT_LEAST} are needed at the same time, and")
    if space < _AT_MOST * size:
        logger.warning(text, f"up to {_AT_MOST} are needed at the same time, and")


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def load_checkpoint(accelerator: Accelerator, checkpoint: Path) -> None:
    """Give model, optimizer and random numbers the state that they had.

    Args:
        accelerator (`Accelerator`): Holds model and optimizer.
        checkpoint (`Path`): From [`get_last_checkpoint`].

    Raises:
        InputError: If a file of it is missing or damaged.
    """
    try:
        _check_random_states(accelerator, checkpoint)
        accelerator.load_state(str(checkpoint))
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise InputError(_damaged(checkpoint, error)) from error


def _check_random_states(accelerator: Accelerator, checkpoint: Path) -> None:
    """Read what `load_state` leaves out without a word: random numbers that it cannot read or has no place for."""
    paths = sorted(checkpoint.glob(_RANDOM_STATE.format("*")))
    if not paths:
        raise FileNotFoundError(f"no {_RANDOM_STATE.format(0)}")
    of_devices = {len(load(path).get("torch_cuda_manual_seed", ())) for path in paths}
    if len(paths) != accelerator.num_processes or of_devices != {torch.cuda.device_count()}:
        logger.warning(
            "%s: was written by %d processes that saw %s GPUs, and is read by %d that see %d: the run goes on with "
            "other random numbers than it would have had",
            *(checkpoint, len(paths), "/".join(map(str, of_devices))),
            *(accelerator.num_processes, torch.cuda.device_count()),
        )


def _damaged(checkpoint: Path, error: Exception) -> str:
    reason = str(error).partition("\n")[0] or type(error).__name__
    return f"{checkpoint}: is damaged or incomplete ({reason}); restore it, or remove it to go on from an earlier one"


def load_training_state(checkpoint: Path, settings: dict[str, Any]) -> TrainingState:
    """Read where a run was, and see that it is the run to go on with.

    Args:
        checkpoint (`Path`): From [`get_last_checkpoint`].
        settings (`dict`): What the run that goes on was started with. What only one of the two knows is not compared:
            the checkpoint may be of another version.

    Raises:
        InputError: If a setting is not the checkpoint's, or the file that holds them is missing or damaged.
    """
    try:
        state = TrainingState(**json.loads((checkpoint / _STATE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(_damaged(checkpoint, error)) from error
    now = json.loads(json.dumps(settings))  # as it comes back from the file: tuples are lists
    changed = [
        f"{name}: {state.settings[name]!r} before, {now[name]!r} now"
        for name in sorted(state.settings.keys() & now.keys())
        if state.settings[name] != now[name]
    ]
    if changed:
        raise InputError(
            f"{checkpoint}: a run can only be resumed with the settings that it began with ({'; '.join(changed)}); "
            "use those, or start another run in another folder"
        )
    best = checkpoint_path(checkpoint.parent, state.export_step)
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

    Raises:
        InputError: If it cannot be written, say because the disk is full. The earlier ones are still there.
    """
    path = checkpoint_path(folder, state.step)
    # else only what is known about this step has changed, such as its score; other machines may see the folder late
    is_new = bool(all_reduce_max(accelerator, int(accelerator.is_main_process and not path.exists())))
    temporary = folder / f".{path.name}.part"
    if is_new:
        _write_files(accelerator, temporary)
    failure = ""
    if accelerator.is_main_process:
        try:
            write_json((temporary if is_new else path) / _STATE_FILE, asdict(state))
            if is_new:
                fsync_tree(temporary)
                temporary.rename(path)
                fsync(folder)
        except OSError as error:
            failure = str(error)
    _stop_if(failure, accelerator, temporary)
    if accelerator.is_main_process:
        remove_checkpoints(folder, kept=(path, checkpoint_path(folder, state.export_step)))
    accelerator.wait_for_everyone()


def _write_files(accelerator: Accelerator, temporary: Path) -> None:
    """Save what Accelerate holds. The processes write into one folder, so one of them makes it."""
    failure = ""
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(temporary))
    except _WRITE_ERRORS as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in _TORCH_WRITES):
            raise
        failure = str(error).partition("\n")[0]
        if (
            accelerator.distributed_type in SHARDED_DISTRIBUTED_TYPES
        ):  # the others wait for this process before they come so far
            raise _not_written([failure], temporary) from error
    _stop_if(failure, accelerator, temporary)


def _stop_if(failure: str, accelerator: Accelerator, temporary: Path) -> None:
    """Stop every process if one could not write, and give back the space that the half checkpoint takes."""
    failures = all_gather_unique(failure)
    if not failures:
        return
    problem = _not_written(failures, temporary)
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    raise problem


def _not_written(failures: Iterable[str], temporary: Path) -> InputError:
    free = _gib(shutil.disk_usage(temporary.parent).free)
    last = get_last_checkpoint(temporary.parent)
    go_on = f"go on from {last.name} with --resume" if last else "start again"
    return InputError(
        f"{temporary.parent}: a checkpoint could not be written ({'; '.join(failures)}; {free} were left on the "
        f"disk). Make space there, then {go_on}"
    )


def save_emergency_checkpoint(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, state: TrainingState
) -> str:
    """Save the state of a run that has to stop, called by every process, and say what can be done with it.

    A state whose numbers are all finite becomes an ordinary checkpoint. One that is spoilt already must not take the
    place of those that are not: it goes into a folder of its own.

    Args:
        accelerator (`Accelerator`): Holds model and optimizer.
        model (`nn.Module`): The model.
        optimizer (`torch.optim.Optimizer`): Its optimizer.
        folder (`Path`): Where the checkpoints are.
        state (`TrainingState`): Of the last step that was done.
    """
    averages = (value for values in optimizer.state.values() for value in values.values())
    spoilt = all_reduce_max(accelerator, not _all_finite((*model.state_dict().values(), *averages)))
    try:
        save_checkpoint(accelerator, folder / _FAILED if spoilt else folder, state)
    except InputError as error:
        return f"The state before this step was not saved: {error}"
    if not spoilt:
        return f"The state before this step is kept in {checkpoint_path(folder, state.step)}"
    last = get_last_checkpoint(folder)
    go_on = f"--resume goes on from {last.name}" if last else "there is no earlier checkpoint"
    return f"The state before this step has such numbers too and is kept in {folder / 'failed'}; {go_on}"


def _all_finite(values: Iterable[Any]) -> bool:
    return all(bool(value.isfinite().all()) for value in values if isinstance(value, torch.Tensor))


def remove_checkpoints(folder: Path, kept: Collection[Path] = ()) -> None:
    """Delete the checkpoints in a folder, finished or not, but those to be kept. Whatever else is there stays.

    Args:
        folder (`Path`): Where the checkpoints are; need not exist.
        kept (`Collection[Path]`, *optional*): From [`checkpoint_path`].
    """
    for path in {*folder.glob(_NAME), *folder.glob(f".{_NAME}.part")}.difference(kept):
        shutil.rmtree(path)
