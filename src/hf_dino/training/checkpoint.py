"""Checkpoints of a run: everything the next step depends on, in one directory per checkpoint.

A checkpoint is written to a temporary directory, flushed to the disk and then renamed, so a checkpoint that has its
final name is complete.
"""

import json
import logging
import os
import pickle
import shutil
import socket
import tempfile
import time
import uuid
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import load
from safetensors import SafetensorError
from torch import nn

from ..data.dataset import DetectionSplit
from ..detectors import CONVENTIONS
from ..utils.distributed import SHARDED_DISTRIBUTED_TYPES, all_gather_unique, all_reduce_max
from ..utils.errors import InputError, import_if_available
from ..utils.io import fsync, fsync_tree, read_text, write_json


fcntl = import_if_available("fcntl")  # not on Windows

logger = logging.getLogger(__name__)

_STATE_FILE = "training_state.json"
_NAME = "step_" + 8 * "[0-9]"  # as a pattern of `glob`
_FAILED = "failed"
_RANDOM_STATE = "random_states_{}.pkl"  # Accelerate's file of each process
_LOCK_FILE = ".lock"
_NETWORK_DISK_DELAY = 60.0  # seconds; NFS caches for 30 to 60 that a name did not exist

# Checkpoints that exist at once while one is written: the last, the new one and, if it is neither, the best.
_MIN_CHECKPOINTS, _MAX_CHECKPOINTS = 2, 3

# What Accelerate raises when a disk is full depends on who writes: Python, safetensors, or torch, whose RuntimeError
# has one of these words.
_WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)
_TORCH_WRITES = ("inline_container", "StreamWriter", "file write")

# Accelerate warns at each checkpoint of weights that a model uses twice; they are tied again when it is loaded.
logging.getLogger("accelerate.utils.other").addFilter(
    lambda record: "Removed shared tensor" not in record.getMessage()
)


@dataclass
class TrainingState:
    """Progress of a run: with the weights, optimizer and random states that Accelerate saves, all it depends on.

    Attributes:
        settings (`dict`): Settings that a resumed run must have in common with the one it continues.
        step (`int`): Optimizer steps done.
        validation_ap (`list[float]`): Average precision of each evaluation, in [0, 1].
        evaluated_step (`int`): Step of the last evaluation, 0 if there was none.
        best_step (`int` or `None`): Step of the checkpoint with the highest `best_ap`, `None` before an evaluation.
        best_ap (`float`): Average precision at `best_step`, in [0, 1]; -1 before an evaluation.
        run_id (`str`): Identifies the run in a tracker, also after it was resumed.
        total_steps (`int` or `None`): Planned optimizer steps, on which the learning rate depends.
    """

    settings: dict[str, Any]
    step: int = 0
    validation_ap: list[float] = field(default_factory=list)
    evaluated_step: int = 0
    best_step: int | None = None
    best_ap: float = -1.0
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    total_steps: int | None = None

    @property
    def is_evaluated(self) -> bool:
        """Return whether the model of this step was evaluated, so that a resumed run does not evaluate it again."""
        return self.step > 0 and self.evaluated_step == self.step

    @property
    def export_step(self) -> int:
        """The step whose model is the result: the best, or the last if none was evaluated."""
        return self.step if self.best_step is None else self.best_step

    def add_evaluation(self, ap: float) -> None:
        """Record the average precision of the model of this step."""
        self.validation_ap.append(ap)
        self.evaluated_step = self.step
        if self.best_step is None or ap > self.best_ap:
            self.best_step, self.best_ap = self.step, ap


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step."""
    return folder / f"step_{step:08d}"


def get_last_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint of the highest step, or `None`."""
    return max(folder.glob(_NAME), default=None)


def resolve_resume_checkpoint(output_dir: Path, checkpoints: Path, *, resume: bool, overwrite: bool) -> Path | None:
    """Find the checkpoint that a run starts from, and check that nothing in its output directory gets lost.

    Args:
        output_dir (`Path`): The run's output directory, which need not exist.
        checkpoints (`Path`): Directory of its checkpoints.
        resume (`bool`): Resume the run in it.
        overwrite (`bool`): Start a new run even if there is one.

    Returns:
        `Path` or `None`: The checkpoint, `None` for a new run.

    Raises:
        InputError: If there is nothing to resume, or something that may not be overwritten.
    """
    checkpoint = get_last_checkpoint(checkpoints)
    if resume:
        is_unfinished = checkpoints.is_dir() and not (output_dir / "config.json").exists()
        if checkpoint is None and not is_unfinished:
            raise InputError(f"{output_dir}: has no checkpoint to resume from; remove --resume_from_checkpoint")
        if checkpoint is None:
            logger.warning("%s: the run was stopped before its first checkpoint and is restarted", output_dir)
        return checkpoint
    if output_dir.is_file():
        raise InputError(f"{output_dir}: is a file, not a directory")
    is_used = output_dir.is_dir() and any(output_dir.iterdir())
    if is_used and not overwrite:
        raise InputError(
            f"{output_dir}: is not empty; use a different --output_dir, --resume_from_checkpoint or "
            "--overwrite_output_dir"
        )
    if is_used and not _contains_run(output_dir, checkpoints):
        raise InputError(
            f"{output_dir}: contains no run or model that --overwrite_output_dir could replace; use a different "
            "--output_dir"
        )
    return None


def _contains_run(output_dir: Path, checkpoints: Path) -> bool:
    """Return whether there is a run or a model, rather than unrelated files with the same names."""
    if get_last_checkpoint(checkpoints) or (checkpoints.is_dir() and (output_dir / "history.jsonl").is_file()):
        return True
    try:
        config = json.loads((output_dir / "config.json").read_text(encoding="utf-8"))
        return config["model_type"] in CONVENTIONS
    except (OSError, ValueError, LookupError, TypeError):
        return False


def data_fingerprint(split: DetectionSplit) -> str:
    """Compute a checksum of the images and categories of a split.

    It does not depend on the directory of the dataset. Boxes may be corrected before a run is resumed, so they are
    left out.

    Args:
        split (`DetectionSplit`): A split that a run is trained or evaluated on.
    """
    images = [(image.image_id, image.height, image.width) for image in split.images]
    return _fingerprint(repr((images, sorted(split.categories.items()))))


def file_fingerprint(path: Path | None) -> str:
    """Compute a checksum of the text of a file, independent of its path; "none" for no file.

    Raises:
        InputError: If the file cannot be read.
    """
    return "none" if path is None else _fingerprint(read_text(path))


def _fingerprint(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


@contextmanager
def lock_output_dir(accelerator: Accelerator, folder: Path, start: Path | None, *, overwrite: bool) -> Iterator[None]:
    """Lock the directory of checkpoints for this run and prepare it for the first; called by every process.

    The system releases the lock when the process ends, in whatever way.

    Args:
        accelerator (`Accelerator`): The accelerator of the run.
        folder (`Path`): Directory of the checkpoints; created if needed.
        start (`Path` or `None`): From [`resolve_resume_checkpoint`]; with `None`, checkpoints of an older run are
            deleted.
        overwrite (`bool`): Whether there may be an older run.

    Raises:
        InputError: On every process, if another run uses the directory, or did since `start` was found, or a process
            does not see it, or it cannot be written.
    """
    with ExitStack() as locks:
        failure = ""
        if accelerator.is_main_process:
            try:
                locks.enter_context(lock_directory(folder))
                _check_start(folder, start, overwrite=overwrite)
                _prepare(folder, resume=start is not None)
            except (InputError, OSError) as error:
                failure = str(error)
        _raise_on_all(failure)
        host, is_visible = socket.gethostname(), _wait_for(folder / _LOCK_FILE)
        _raise_on_all("" if is_visible else f"{folder}: not found on {host}; use an --output_dir on a shared disk")
        yield


def _raise_on_all(failure: str) -> None:
    """Raise an error on every process if one of them has a failure."""
    if failures := all_gather_unique(failure):
        raise InputError("; ".join(failures))


def _wait_for(path: Path) -> bool:
    """Return whether an existing file is visible here, at once or after the delay of network disks."""
    deadline = time.monotonic() + _NETWORK_DISK_DELAY
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return path.exists()


@contextmanager
def lock_directory(folder: Path) -> Iterator[None]:
    """Hold the lock of a directory, which ends with this process. The directory is created if needed.

    `filelock` uses `flock`, which forked DataLoader workers inherit: orphaned by a kill, they would hold it for
    seconds. `lockf` belongs to this process alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK_FILE).open("a+", encoding="utf-8") as file:
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            owner = file.read().strip() or "a process that has just started"
            raise InputError(
                f"{folder}: used by another run ({owner}); wait for it to finish or use a different --output_dir"
            ) from None
        except OSError as error:
            logger.warning("%s: cannot be locked (%s); do not start another run in it", folder, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _check_start(folder: Path, start: Path | None, *, overwrite: bool) -> None:
    """Check that no other run came and went while this one read its data."""
    last = get_last_checkpoint(folder)
    if last != start and not (start is None and overwrite):
        raise InputError(f"{folder}: another run has just written {last}; start again")


def _prepare(folder: Path, *, resume: bool) -> None:
    """Check that checkpoints can be written, and delete partial ones and, for a new run, those of an older one."""
    with tempfile.TemporaryFile(dir=folder):
        pass
    for each in (folder, folder / _FAILED):
        remove_checkpoints(each, kept=set(each.glob(_NAME)) if resume else ())


def check_disk_space(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, more: Iterable[torch.Tensor] = ()
) -> None:
    """Check, before the first step, that the checkpoints of a run fit on the disk.

    At least two are needed, since the last one is deleted once the next is complete. With the best one it is three.

    Args:
        folder (`Path`): Directory of the checkpoints; need not exist. Those in it count as free space.
        model (`nn.Module`): The model.
        optimizer (`torch.optim.Optimizer`): An optimizer like Adam, which keeps two values per trained parameter.
        more (`Iterable[torch.Tensor]`, *optional*): Tensors that are saved too, such as averaged weights.

    Raises:
        InputError: If two do not fit. If three do not, a warning is logged.
    """
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    saved = (*model.parameters(), *model.buffers(), *more, *trained, *trained)
    size = sum(tensor.numel() * tensor.element_size() for tensor in saved)
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    space = free + size * len(list(folder.glob(_NAME)))
    text = f"{folder}: a checkpoint takes {_gib(size)}, %s are needed at the same time, and {_gib(free)} are free"
    if space < _MIN_CHECKPOINTS * size:
        raise InputError(text % _MIN_CHECKPOINTS + "; free disk space or use a different --output_dir")
    if space < _MAX_CHECKPOINTS * size:
        logger.warning(text, f"up to {_MAX_CHECKPOINTS}")


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def load_checkpoint(accelerator: Accelerator, checkpoint: Path) -> None:
    """Restore model, optimizer and random states.

    Args:
        accelerator (`Accelerator`): The accelerator that prepared model and optimizer.
        checkpoint (`Path`): From [`get_last_checkpoint`].

    Raises:
        InputError: If one of its files is missing or damaged.
    """
    try:
        _check_random_states(accelerator, checkpoint)
        accelerator.load_state(str(checkpoint))
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise InputError(_damaged(checkpoint, error)) from error


def _check_random_states(accelerator: Accelerator, checkpoint: Path) -> None:
    """Check the random states, which `load_state` skips silently if they are unreadable or of other devices."""
    paths = sorted(checkpoint.glob(_RANDOM_STATE.format("*")))
    if not paths:
        raise FileNotFoundError(f"no {_RANDOM_STATE.format(0)}")
    num_devices = {len(load(path).get("torch_cuda_manual_seed", ())) for path in paths}
    if len(paths) != accelerator.num_processes or num_devices != {torch.cuda.device_count()}:
        logger.warning(
            "%s: written by %d processes with %s GPUs each, but read by %d with %d: the run resumes with different "
            "random numbers",
            *(checkpoint, len(paths), "/".join(map(str, num_devices))),
            *(accelerator.num_processes, torch.cuda.device_count()),
        )


def _damaged(checkpoint: Path, error: Exception) -> str:
    reason = str(error).partition("\n")[0] or type(error).__name__
    return f"{checkpoint}: is damaged or incomplete ({reason}); restore it, or remove it to resume from an earlier one"


def load_training_state(checkpoint: Path, settings: dict[str, Any]) -> TrainingState:
    """Read the state of a run and check that its settings are those of the run that resumes it.

    Args:
        checkpoint (`Path`): From [`get_last_checkpoint`].
        settings (`dict`): Settings of the resumed run. Settings that only one of the two has are not compared, since
            the checkpoint may be of another version.

    Raises:
        InputError: If a setting differs, or the file of the state is missing or damaged.
    """
    try:
        state = TrainingState(**json.loads((checkpoint / _STATE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(_damaged(checkpoint, error)) from error
    now = json.loads(json.dumps(settings))  # as read back from a file: tuples are lists
    changed = [
        f"{name}: {state.settings[name]!r} before, {now[name]!r} now"
        for name in sorted(state.settings.keys() & now.keys())
        if state.settings[name] != now[name]
    ]
    if changed:
        raise InputError(
            f"{checkpoint}: a run can only be resumed with the settings it was started with ({'; '.join(changed)}); "
            "use those, or start another run with a different --output_dir"
        )
    best = checkpoint_path(checkpoint.parent, state.export_step)
    if not best.is_dir():
        logger.warning("%s, the best checkpoint so far, not found: the best of the following will be the result", best)
        state.best_step, state.best_ap = None, -1.0
    return state


def save_checkpoint(accelerator: Accelerator, folder: Path, state: TrainingState) -> None:
    """Write a checkpoint, then delete all others but the best; called by every process.

    At any moment there is a complete checkpoint, and the best one according to its state.

    Args:
        accelerator (`Accelerator`): The accelerator that prepared model and optimizer.
        folder (`Path`): Directory of the checkpoints.
        state (`TrainingState`): State of the run.

    Raises:
        InputError: If it cannot be written, for example because the disk is full. Earlier ones are kept.
    """
    path = checkpoint_path(folder, state.step)
    # else only the state has changed, by an evaluation; other machines may see the directory late
    is_new = bool(all_reduce_max(accelerator, int(accelerator.is_main_process and not path.exists())))
    temporary = folder / f".{path.name}.part"
    if is_new:
        _save_state(accelerator, temporary)
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
    _raise_if_not_written(failure, accelerator, temporary)
    if accelerator.is_main_process:
        remove_checkpoints(folder, kept=(path, checkpoint_path(folder, state.export_step)))
    accelerator.wait_for_everyone()


def _save_state(accelerator: Accelerator, temporary: Path) -> None:
    """Save what Accelerate manages. All processes write to the directory, which one of them creates."""
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
        if accelerator.distributed_type in SHARDED_DISTRIBUTED_TYPES:  # the others wait for this process in save_state
            raise _not_written([failure], temporary) from error
    _raise_if_not_written(failure, accelerator, temporary)


def _raise_if_not_written(failure: str, accelerator: Accelerator, temporary: Path) -> None:
    """Raise an error on every process if one of them could not write, and free the space of the partial checkpoint."""
    failures = all_gather_unique(failure)
    if not failures:
        return
    error = _not_written(failures, temporary)
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    raise error


def _not_written(failures: Iterable[str], temporary: Path) -> InputError:
    free = _gib(shutil.disk_usage(temporary.parent).free)
    last = get_last_checkpoint(temporary.parent)
    then = f"resume from {last.name} with --resume_from_checkpoint" if last else "start again"
    return InputError(
        f"{temporary.parent}: a checkpoint could not be written ({'; '.join(failures)}; {free} were free). Free disk "
        f"space, then {then}"
    )


def save_emergency_checkpoint(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, state: TrainingState
) -> str:
    """Save the state of a run that has to stop, called by every process, and return what can be done with it.

    A finite state becomes an ordinary checkpoint. One with non-finite values must not replace finite ones: it is
    written to a directory of its own.

    Args:
        accelerator (`Accelerator`): The accelerator that prepared model and optimizer.
        model (`nn.Module`): The model.
        optimizer (`torch.optim.Optimizer`): Its optimizer.
        folder (`Path`): Directory of the checkpoints.
        state (`TrainingState`): State after the last complete step.
    """
    moments = (value for values in optimizer.state.values() for value in values.values())
    is_nonfinite = all_reduce_max(accelerator, not _all_finite((*model.state_dict().values(), *moments)))
    try:
        save_checkpoint(accelerator, folder / _FAILED if is_nonfinite else folder, state)
    except InputError as error:
        return f"The state before this step was not saved: {error}"
    if not is_nonfinite:
        return f"The state before this step is saved in {checkpoint_path(folder, state.step)}"
    last = get_last_checkpoint(folder)
    then = f"--resume_from_checkpoint resumes from {last.name}" if last else "there is no earlier checkpoint"
    return f"The state before this step has non-finite values too and is saved in {folder / _FAILED}; {then}"


def _all_finite(values: Iterable[Any]) -> bool:
    return all(bool(value.isfinite().all()) for value in values if isinstance(value, torch.Tensor))


def remove_checkpoints(folder: Path, kept: Collection[Path] = ()) -> None:
    """Delete checkpoints, complete or partial, from a directory, and nothing else.

    Args:
        folder (`Path`): Directory of the checkpoints; need not exist.
        kept (`Collection[Path]`, *optional*): Checkpoints to keep, from [`checkpoint_path`].
    """
    for path in {*folder.glob(_NAME), *folder.glob(f".{_NAME}.part")}.difference(kept):
        shutil.rmtree(path)
